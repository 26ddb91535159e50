"""The codec and the vocoder: rates, the first-frame rule, fidelity, no seams."""

import pytest
import torch

import config
from toy import codec as toy_codec
from toy import world

CLIPS = world.draw_clips(range(world.HELD_OUT, world.HELD_OUT + 24))
SECONDS = 5


@pytest.fixture(scope="module")
def codec():
    return toy_codec.load()


@pytest.fixture(scope="module")
def clip():
    """Video and sound of held-out clips."""
    return world.render_video(CLIPS, SECONDS), world.render_sound(CLIPS, SECONDS)


@pytest.fixture(scope="module")
def latents(codec, clip):
    return codec.encode(*clip)


def psnr(x, y):
    return float(-10 * (x - y).square().mean().log10())


# ---- rates and shapes ----


def test_encoding_and_decoding_have_the_shapes_of_the_config(codec, clip, latents):
    """After the first latent, a second is 48 video tokens and 25 audio tokens; decoding inverts."""
    assert latents[0].shape == (24, 16 + 48 * SECONDS, config.TOY.video_channels)
    assert latents[1].shape == (24, 1 + 25 * SECONDS, config.TOY.audio_channels)
    assert codec.decode_video(latents[0], True).shape == clip[0].shape
    assert codec.decode_audio(latents[1], True).shape == clip[1].shape


def test_the_first_latent_depends_on_the_first_frame_only(codec, clip):
    """Changing all later frames leaves the first latents bitwise equal, and vice versa."""
    video, sound = (x[:2].clone() for x in clip)
    before = codec.encode(video, sound)
    video[:, 1:], sound[:, 1:] = 0.5, 0.5
    after = codec.encode(video, sound)
    assert all(torch.equal(x[:, :n], y[:, :n]) for x, y, n in zip(before, after, (16, 1)))
    assert not any(torch.equal(x[:, n:], y[:, n:]) for x, y, n in zip(before, after, (16, 1)))
    video[:, 0], sound[:, 0] = 0, 0
    last = codec.encode(video, sound)
    assert all(torch.equal(x[:, n:], y[:, n:]) for x, y, n in zip(last, after, (16, 1)))


@pytest.mark.parametrize("starts_clip, frames", [(True, (1, 1)), (False, (8, 4))])
def test_a_latent_alone_decodes_to_its_own_frames(starts_clip, frames, codec, latents):
    """The first to one frame, so that a stream can begin at once; others to their stride."""
    video, audio = latents[0][:, :16], latents[1][:, :1]
    decoded = codec.decode_video(video, starts_clip), codec.decode_audio(audio, starts_clip)
    assert tuple(x.shape[1] for x in decoded) == frames


@pytest.mark.parametrize("frames", [1, 8])
def test_patches_invert(frames):
    """Cutting a video into patches can be undone, also on a grid that is not square."""
    video = torch.rand(2, 2 * frames, 3, 16, 24)
    x = toy_codec.video_patches(video, 8, frames)
    assert x.shape == (2, 2, 6, frames * 3 * 64)
    assert torch.equal(toy_codec.video_from_patches(x, 8, frames, (2, 3)), video)


def test_patches_are_in_order_of_rows_then_columns():
    """Token 1 is to the right of token 0, token 3 is below it (grid 2 x 3)."""
    video = torch.zeros(1, 1, 3, 16, 24)
    video[..., :8, 8:16], video[..., 8:, :8] = 1, 2
    means = toy_codec.video_patches(video, 8, 1).mean(-1).flatten()
    assert means.tolist() == [0, 1, 0, 2, 0, 0]


# ---- fidelity ----


def test_decoding_block_by_block_equals_decoding_the_clip(codec, latents):
    """Every latent is decoded alone, so streaming gives the same bits."""
    video, audio = latents
    blocks_v = [video[:, :16], *video[:, 16:].split(48, dim=1)]
    blocks_a = [audio[:, :1], *audio[:, 1:].split(25, dim=1)]
    by_block = [codec.decode_video(x, k == 0) for k, x in enumerate(blocks_v)]
    assert torch.equal(torch.cat(by_block, 1), codec.decode_video(video, True))
    by_block = [codec.decode_audio(x, k == 0) for k, x in enumerate(blocks_a)]
    assert torch.equal(torch.cat(by_block, 1), codec.decode_audio(audio, True))


def test_latents_of_the_shipped_codec_have_unit_rms(latents):
    """Within 10 % on held-out clips, for both streams, as flow matching expects."""
    for x in latents:
        assert float(x.square().mean().sqrt()) == pytest.approx(1, abs=0.1)


def test_the_shipped_codec_is_faithful(codec, clip, latents):
    """On held-out clips, PSNR above 33 dB for video (measured 34.2) and 42 dB for audio (44.3)."""
    assert psnr(clip[0], codec.decode_video(latents[0], True)) > 33
    assert psnr(clip[1], codec.decode_audio(latents[1], True)) > 42


def test_decoded_pixels_and_levels_stay_in_range(codec):
    """For any latents, pixels lie in [0, 1] and levels are not negative."""
    video, audio = 5 * torch.randn(2, 256, 48), 5 * torch.randn(2, 126, 20)
    pixels, levels = codec.decode_video(video, True), codec.decode_audio(audio, True)
    assert (pixels.min(), pixels.max()) == (0, 1)
    assert levels.min() == 0


def test_levels_above_1_are_not_cut_off(codec, clip):
    """Two impacts at once are louder than one; here everything is twice as loud."""
    _, louder = codec.encode(clip[0][:1], 2 * clip[1][:1])
    assert codec.decode_audio(louder, True).max() > 1.2


def test_components_recover_what_lies_in_their_span():
    """Three components reproduce 3-dimensional data exactly, and each has its own size."""
    torch.manual_seed(0)
    x = torch.randn(500, 3) @ torch.randn(3, 10) + 1
    components = toy_codec.Components(10, 3)
    components.fit(x)
    z = components.encode(x)
    torch.testing.assert_close(components.decode(z), x, atol=1e-4, rtol=0)  # float32, values to 10
    assert float(z.square().mean()) == pytest.approx(1, abs=1e-3)
    # Half whitened: the variance of z is proportional to the standard deviation of the data.
    std = (z * components.scale).std(0)
    torch.testing.assert_close(z.var(0) / std, (z.var(0) / std).mean().expand(3), rtol=0.01, atol=0)


# ---- vocoder ----


def test_sound_in_chunks_equals_sound_in_one_piece(clip):
    """Three chunks, each from the last mel frame of the one before, give the same bits."""
    levels = clip[1][0]
    cuts = [0, 1, 137, 500]
    chunks = [toy_codec.synthesise(levels[a : b + 1], a) for a, b in zip(cuts, cuts[1:])]
    assert torch.equal(torch.cat(chunks), toy_codec.synthesise(levels))


def test_an_hour_into_a_stream_the_vocoder_is_still_exact():
    """The same levels sound the same an hour of whole periods later: phases do not lose bits."""
    levels = torch.zeros(51, 16)
    levels[:, [0, 5, 10, 15]] = 1.0  # 196, 392, 784 and 1568 Hz: whole periods in an hour
    now, later = (toy_codec.synthesise(levels, start) for start in (0, 360000))
    torch.testing.assert_close(now, later, atol=1e-3, rtol=0)


@pytest.mark.parametrize("band", [0, 4, 11, 15])
def test_a_band_sounds_at_its_pitch(band):
    """The strongest frequency of a single band is 196 Hz x 2^(band / 5)."""
    levels = torch.zeros(101, 16)
    levels[:, band] = 1.0
    spectrum = torch.fft.rfft(toy_codec.synthesise(levels)).abs()
    assert int(spectrum.argmax()) == pytest.approx(196 * 2 ** (band / 5), abs=1)  # bins of 1 Hz


def test_a_louder_band_sounds_louder_and_silence_is_silent():
    """Level 0 is exactly 0; level .4 has twice the amplitude of .2, where tanh is linear."""
    one = torch.zeros(11, 16)
    assert toy_codec.synthesise(one).abs().max() == 0
    one[:, 3] = 0.2
    ratio = toy_codec.synthesise(2 * one).abs().max() / toy_codec.synthesise(one).abs().max()
    assert float(ratio) == pytest.approx(2, rel=0.01)


def test_samples_never_leave_the_range():
    """240 samples per mel frame, within [-1, 1] even if every band is loud."""
    sound = toy_codec.synthesise(10 * torch.rand(101, 16))
    assert sound.shape == (24000,) and sound.abs().max() <= 1


def test_an_incomplete_codec_is_refused_in_one_line(tmp_path, monkeypatch):
    """The error names the truncated file."""
    cut = tmp_path / "toy_codec.safetensors"
    cut.write_bytes(toy_codec.FILE.read_bytes()[:-100])
    monkeypatch.setattr(toy_codec, "FILE", cut)
    with pytest.raises(ValueError, match="toy_codec.safetensors: not a whole safetensors file"):
        toy_codec.load()
