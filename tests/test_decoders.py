"""Chunked decoding equals decoding all at once, if context and look-ahead are long enough."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import random_decoders

import config
from film.decoders import ChunkedDecoder
from full_size import decoders
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
    """All past and future as context: the same as decoding at once, for all networks.

    With the default overlap, sound is nearly the same, without seams.
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
    torch.testing.assert_close(once[1], vocoder(mel)[0], atol=1e-5, rtol=0)
    assert (decoded(networks)[1] - once[1]).abs().max() < 1e-3 * once[1].abs().max()


def test_pictures_get_better_with_look_ahead(networks):
    """The difference to decoding at once falls with every latent of look-ahead."""
    whole, *found = (decoded(networks, part)[0] for part in ((99, 99), (4, 0), (4, 1), (4, 2)))
    errors = [(frames - whole).abs().mean() for frames in found]
    assert errors[0] > errors[1] > errors[2]


def test_a_folder_that_lacks_a_part_is_refused(tmp_path):
    """One line, not a traceback out of a library."""
    pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match="no decoders in diffusers' format"):
        decoders.load(tmp_path)


def test_channels_last_changes_the_layout_only(networks):
    """Weights are equal, results up to rounding; the kernels of the VAE have another layout."""
    plain = decoded(networks)
    faster = copy.deepcopy(networks)
    decoders.channels_last(faster)
    for old, new in zip(networks[0].parameters(), faster[0].parameters()):
        assert torch.equal(old, new)
    kernels = [p for p in faster[0].parameters() if p.dim() == 5]
    assert all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in kernels)
    for one, other in zip(plain[:2], decoded(faster)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


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
