"""Chunked decoding equals decoding all at once, if context and look-ahead are long enough."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import random_decoders

import config
from film.decoders import ChunkedDecoder
from full_size import decoders, memory
from full_size.decoders import Decoder, Overlap
from masks import block_span
from rollout import Block

CFG = replace(config.FULL, height=64, width=64)
N = 4  # blocks


def upsampler(reach, stride, first):
    """A filter over `reach` inputs on either side, then repetition: the rule of lengths."""
    kernel = torch.rand(1, 1, 2 * reach + 1, generator=torch.Generator().manual_seed(0)) + 0.1

    def decode(x):
        y = torch.nn.functional.conv1d(x, kernel, padding=reach)
        return y.repeat_interleave(stride, dim=2)[:, :, stride - first :]

    return decode


@pytest.mark.parametrize("stride, first", [(8, 1), (4, 1), (240, 240)])
@pytest.mark.parametrize("sizes", [[1, 3, 3, 3, 3], [4, 3, 3, 3], [1] * 13, [13]])
def test_chunks_with_enough_overlap_equal_decoding_at_once(stride, first, sizes):
    """Context and look-ahead of the filter's reach, plus one for the short first input: bitwise
    the same, in whatever parts the inputs come."""
    decode, x = upsampler(2, stride, first), torch.randn(1, 1, 13)
    chunked = ChunkedDecoder(decode, stride, first, context=3, look_ahead=2)
    parts = [*map(chunked.add, x.split(sizes, dim=2)), chunked.finish()]
    assert torch.equal(torch.cat([y for y in parts if y is not None], 2), decode(x))


def test_a_short_first_input_needs_context():
    """Without context, every chunk would begin with the short first input."""
    with pytest.raises(ValueError, match="context=0"):
        ChunkedDecoder(upsampler(1, 8, 1), 8, 1, context=0)


def test_a_decoder_without_neighbours_needs_no_context():
    """If the first input is as long as the others, chunks may begin anywhere."""
    chunked = ChunkedDecoder(upsampler(0, 4, 4), 4, 4, context=0)
    x = torch.randn(1, 1, 5)
    parts = [chunked.add(new) for new in x.split(2, dim=2)]
    assert torch.equal(torch.cat(parts, 2), upsampler(0, 4, 4)(x))


# ---- the published networks, tiny and random ----


@pytest.fixture(scope="module")
def networks():
    """LTX-2's three decoders, tiny, with random weights and statistics."""
    pytest.importorskip("diffusers")
    return random_decoders()


def blocks():
    """Random latents, block by block."""
    g = torch.Generator().manual_seed(1)
    for k in range(N):
        span = block_span(k, CFG)
        video = torch.randn(1, len(span.video) * CFG.tokens_per_frame, 128, generator=g)
        yield Block(k, video, torch.randn(1, len(span.audio), 128, generator=g))


def decoded(networks, *overlap):
    """All frames and samples, and the number of frames of every block."""
    decoder = Decoder(*networks, CFG, Overlap(*overlap))
    frames, _, samples = zip(*map(decoder.decode, blocks()), decoder.finish())
    return torch.cat(frames), torch.cat(samples, 1), [len(f) for f in frames]


EVERYTHING = (99, 99), (99, 99), (999, 999)  # context and look-ahead of all three networks


def test_blocks_come_out_as_frames_and_samples(networks):
    """24 frames and 24000 stereo samples a second, in range, the first block a single frame."""
    frames, samples, counts = decoded(networks)
    assert frames.shape == (73, 3, 64, 64) and counts == [1, 24, 24, 24, 0]
    assert samples.shape == (2, 301 * 240)
    assert 0 <= frames.min() < frames.max() <= 1 and samples.abs().max() <= 1


def test_enough_overlap_gives_the_whole_clip(networks):
    """All past and future as context: the same as diffusers, all at once.

    The sound is the same with the default overlap, too.
    """
    once = decoded(networks, *EVERYTHING)
    vae, audio_vae, vocoder = networks
    whole = list(blocks())
    video = torch.cat([b.video for b in whole], 1).unflatten(1, (-1, *CFG.grid))
    video = video.permute(0, 4, 1, 2, 3) * vae.latents_std.view(-1, 1, 1, 1)
    video = vae.decode(video + vae.latents_mean.view(-1, 1, 1, 1)).sample[0].transpose(0, 1)
    torch.testing.assert_close(once[0], (video / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    audio = torch.cat([b.audio for b in whole], 1) * audio_vae.latents_std + audio_vae.latents_mean
    mel = audio_vae.decode(audio.unflatten(2, (8, 16)).transpose(1, 2)).sample
    for samples in once[1], decoded(networks)[1]:
        torch.testing.assert_close(samples, vocoder(mel)[0], atol=1e-5, rtol=0)


def test_pictures_get_better_with_look_ahead(networks):
    """The difference to decoding at once falls with every latent of look-ahead."""
    whole, *found = (decoded(networks, part)[0] for part in ((99, 99), (4, 0), (4, 1), (4, 2)))
    errors = [(frames - whole).abs().mean() for frames in found]
    assert errors[0] > errors[1] > errors[2]


def test_a_folder_that_lacks_a_part_is_refused(tmp_path):
    """One line, not a traceback out of a library."""
    pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match="no vae/"):
        decoders.check_folder(tmp_path)


# ---- the published depth, with few channels ----


@pytest.fixture(scope="module")
def deep():
    """The three networks with all layers and few channels, in float64."""
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    shallow = dict(block_out_channels=(8, 8, 8, 8), layers_per_block=(1,) * 5)  # the encoder
    video = dict(decoder_block_out_channels=(8, 16, 32), decoder_causal=False, **shallow)
    few = video, dict(base_channels=4), dict(hidden_channels=32)
    classes = decoders.decoder_classes().values()
    nets = [network(**options) for (network, _), options in zip(classes, few)]
    return [net.double().eval().requires_grad_(False) for net in nets]


def at_once_and_in_chunks(decode, x, stride, first, overlap, sizes):
    """Decode x at once, and in parts of these sizes."""
    chunked = ChunkedDecoder(decode, stride, first, *overlap)
    parts = [*map(chunked.add, x.split(sizes, 2)), chunked.finish()]
    return decode(x), torch.cat([part for part in parts if part is not None], 2)


def test_the_reach_is_that_of_the_published_networks():
    """33 latents back; 18 mel frames both ways; computed without contents."""
    pytest.importorskip("diffusers")
    _, audio_vae, vocoder = decoders.meta_decoders()
    assert decoders.audio_reach(audio_vae.decoder) == (33, 0)
    assert decoders.vocoder_reach(vocoder) == (18, 18)


def reached(decode, x, low, high):
    """Return the first and the last input with a gradient from outputs low to high."""
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(decode(x)[:, :, low:high].square().sum(), x)
    (times,) = gradient.abs().sum((0, 1, 3)).nonzero(as_tuple=True)
    return int(times[0]), int(times[-1])


def test_the_reach_is_where_the_gradient_ends(deep):
    """Of the outputs of one input; not one input more, not one less."""
    _, audio_vae, vocoder = deep
    back, ahead = decoders.audio_reach(audio_vae.decoder)
    x = torch.randn(1, 8, 40, 2).double()  # 2 of the 16 bins
    found = reached(lambda x: audio_vae.decode(x, False)[0], x, 4 * 36 - 3, 4 * 36 + 1)
    assert found == (36 - back, 36 + ahead)
    back, ahead = decoders.vocoder_reach(vocoder)
    found = reached(vocoder, torch.randn(1, 2, 41, 64).double(), 20 * 240, 21 * 240)
    assert found == (20 - back, 20 + ahead)


def test_sound_in_chunks_equals_sound_at_once(deep):
    """With the reach of each network as overlap; with half of it, no longer."""
    _, audio_vae, vocoder = deep
    mel, x = lambda x: audio_vae.decode(x, False)[0], torch.randn(1, 8, 46, 2).double()
    cases = (
        (mel, x, 4, 1, decoders.audio_reach(audio_vae.decoder), [1, 25, 20]),
        (vocoder, torch.randn(1, 2, 61, 64).double(), 240, 240, (18, 18), [1, 30, 30]),
    )
    for *case, (context, ahead), sizes in cases:
        once, chunked = at_once_and_in_chunks(*case, (context, ahead), sizes)
        torch.testing.assert_close(chunked, once, atol=1e-12, rtol=1e-10)
        once, chunked = at_once_and_in_chunks(*case, (context // 2, ahead // 2), sizes)
        assert (chunked - once).abs().max() > 1e-9 * once.abs().max()


# ---- the video decoder with channels innermost ----


@pytest.mark.parametrize("frames, rows, columns", [(1, 2, 3), (4, 2, 2), (7, 3, 2)])
def test_the_video_decoder_is_that_of_diffusers(deep, frames, rows, columns):
    """Every frame, and the last frames alone, which are computed from fewer earlier ones."""
    vae, x = deep[0], torch.randn(2, 128, frames, rows, columns).double()
    whole, close = vae.decode(x, return_dict=False)[0], dict(atol=1e-13, rtol=1e-10)
    torch.testing.assert_close(decoders.decode_video(vae.decoder, x), whole, **close)
    for new in range(1, frames):
        last = decoders.decode_video(vae.decoder, x, new)
        assert last.shape == whole.shape
        last, needed = last[:, :, -8 * new :], whole[:, :, -8 * new :]
        torch.testing.assert_close(last, needed, **close)


def test_bfloat16_rounds_no_more_than_in_diffusers(deep):
    """The error from float64, of both."""
    vae, x = deep[0], torch.randn(2, 128, 4, 2, 3).double()
    exact, low = vae.decode(x, return_dict=False)[0], copy.deepcopy(vae).bfloat16()
    theirs = low.decode(x.bfloat16(), return_dict=False)[0]
    ours = decoders.decode_video(low.decoder, x.bfloat16())
    error, bound = ((y.double() - exact).square().mean() for y in (ours, theirs))
    assert 0 < error < 1.1 * bound < 0.01 * exact.square().mean()


@torch.inference_mode()
def test_a_residual_block_holds_one_padded_input_and_one_output():
    """Counted on the meta device: features between its convolutions are freed in time."""
    pytest.importorskip("diffusers")
    vae = decoders.meta_decoders()[0].requires_grad_(False)
    x = torch.empty(1, 9, 32, 48, 1024, dtype=torch.bfloat16, device="meta")
    size = memory.peak_bytes(lambda: decoders.add_residual(vae.decoder.mid_block.resnets[0], x))
    assert size == 2 * 1024 * (11 * 34 * 50 + 9 * 32 * 48)


def test_a_chunk_of_pictures_is_that_of_diffusers(networks, monkeypatch):
    """The decoder leaves out no frame that is kept, with and without look-ahead."""
    overlaps = (1, 0), (4, 0), (2, 2)
    ours = [decoded(networks, video)[0] for video in overlaps]

    def by_diffusers(decoder, latents, new):
        return networks[0].decode(latents, return_dict=False)[0]

    monkeypatch.setattr(decoders, "decode_video", by_diffusers)
    for frames, video in zip(ours, overlaps):
        torch.testing.assert_close(frames, decoded(networks, video)[0], atol=1e-5, rtol=0)


def test_frames_that_are_not_needed_are_not_computed(deep):
    """Published depth, 7 latents, 24 new frames: the last layers read fewer than all."""
    decoder = deep[0].decoder
    stages = [[*stage.upsamplers, *stage.resnets] for stage in decoder.up_blocks]
    steps = [*decoder.mid_block.resnets, *sum(stages, [])]
    assert decoders.needed_frames(steps, 24)[-6:] == [19, 35, 33, 31, 29, 27]
    assert decoders.needed_frames(steps, 8)[0] == 22  # so its reach is 22: itself, and conv_in


def test_channels_stay_innermost(networks, monkeypatch):
    """Each convolution reads and writes this layout, and no kernel is copied."""
    vae, layout, seen = copy.deepcopy(networks[0]), torch.channels_last_3d, []
    before = vae.state_dict()
    decoders.channels_innermost(vae)
    assert all(torch.equal(before[name], p) for name, p in vae.state_dict().items())
    convolve = torch.nn.functional.conv3d

    def watched(x, weight, bias):
        seen.extend(t.is_contiguous(memory_format=layout) for t in (x, weight))
        return convolve(x, weight, bias)

    monkeypatch.setattr(decoders.F, "conv3d", watched)
    decoders.decode_video(vae.decoder, torch.randn(1, 128, 3, 2, 3))
    assert len(seen) == 2 * 13 and all(seen)


# ---- the vocoder in float32 ----


def settings():
    """The settings of cuDNN."""
    b = torch.backends.cudnn
    return b.enabled, b.benchmark, b.deterministic, b.allow_tf32, b.conv.fp32_precision


@pytest.mark.parametrize("allowed", [True, False])
def test_the_vocoder_runs_in_full_float32(networks, monkeypatch, allowed):
    """No TF32 while the vocoder runs; afterwards, and after an error, all settings are back."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    *others, vocoder = copy.deepcopy(networks)
    before, seen = settings(), []
    vocoder.register_forward_pre_hook(lambda *_: seen.append(settings()))
    decoder = Decoder(*others, vocoder, CFG)
    decoder.decode(next(blocks()))
    decoder.finish()
    assert seen and settings() == before
    assert all(s[:3] == before[:3] and s[3] is False and s[4] != "tf32" for s in seen)
    with pytest.raises(ZeroDivisionError), decoders.no_tf32():
        raise ZeroDivisionError
    assert settings() == before


def test_the_vocoder_is_read_as_it_was_saved(networks, tmp_path):
    """Its weights stay float32, bit by bit, while the other two are read as bfloat16."""
    for net, name in zip(networks, decoders.PARTS):
        net.save_pretrained(tmp_path / name)
    *others, vocoder = decoders.load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for net in others for p in net.parameters()} == {torch.bfloat16}
    saved = networks[2].state_dict()
    assert all(torch.equal(x, saved[name]) for name, x in vocoder.state_dict().items())
    assert not any(torch.equal(x, x.bfloat16().float()) for x in saved.values())
