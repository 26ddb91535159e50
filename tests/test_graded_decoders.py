"""Graded: decoding a growing sequence in chunks, and the toy's frames and sound without seams.

Chunks are compared with the whole sequence, decoded at once by a filter that needs both sides.
"""

from dataclasses import replace

import pytest
import torch

import config
from film import decoders
from rollout import Block
from toy import codec as toy_codec

CFG = replace(config.TOY, num_layers=1)


@pytest.mark.points(1, "ChunkedDecoder._num_outputs")
def test_the_first_input_gives_fewer_outputs():
    """LTX-2's video decoder: 1 frame, then 8 per latent; its vocoder: always 240 samples."""
    for stride, first in ((8, 1), (240, 240)):
        chunked = decoders.ChunkedDecoder(None, stride, first, context=1)
        for inputs in (-2, 0, 1, 2, 5):
            right = len([*range(first), *range(stride * (inputs - 1))]) if inputs > 0 else 0
            found = chunked._num_outputs(inputs)
            each = f"(the first {first}, the others {stride})"
            assert found == right, f"{inputs} inputs give {right} outputs {each}, not {found}"


def blurred(x):
    """Decode with two inputs of context on both sides: 1 output, then 8 per input."""
    kernel = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1])[None, None]
    y = torch.nn.functional.conv1d(x, kernel, padding=2)
    return y.repeat_interleave(8, dim=2)[:, :, 7:]


def decoded(x, context, look_ahead):
    """Return every result of `add` for blocks of 1, 3, 3, 3 inputs, and that of `finish`."""
    chunked = decoders.ChunkedDecoder(blurred, 8, 1, context, look_ahead)
    return [*map(chunked.add, x.split([1, 3, 3, 3], dim=2)), chunked.finish()]


@pytest.mark.points(1, "ChunkedDecoder._decode_until")
def test_no_output_is_lost_or_repeated():
    """Ten inputs give 73 outputs, with look-ahead or without; none waits longer than necessary."""
    x = torch.randn(1, 1, 10)
    for look_ahead, right in ((0, [1, 24, 24, 24, 0]), (2, [0, 9, 24, 24, 16])):
        found = [0 if y is None else y.shape[2] for y in decoded(x, 3, look_ahead)]
        given = f"blocks of 1, 3, 3, 3 inputs and a look-ahead of {look_ahead}"
        assert found == right, f"{given} give {found} outputs, expected {right}"


@pytest.mark.points(2, "ChunkedDecoder._decode_until")
def test_chunks_with_enough_overlap_equal_the_whole():
    """With as much context and look-ahead as the decoder uses, outputs are bitwise equal."""
    x = torch.randn(1, 1, 10, generator=torch.Generator().manual_seed(0))
    parts = [y for y in decoded(x, 2, 2) if y is not None]
    found, right = torch.cat(parts, 2), blurred(x)
    assert found.shape == right.shape, f"{found.shape[2]} outputs, expected {right.shape[2]}"
    wrong = (found != right)[0, 0].nonzero().flatten().tolist()
    assert not wrong, (
        f"output {wrong[0]} differs from the sequence decoded at once: count the outputs of a "
        f"chunk from its own first input, and keep inputs that were decoded before as context"
    )


@pytest.mark.points(1, "ChunkedDecoder._decode_until")
def test_an_endless_stream_keeps_a_few_inputs():
    """Context, and inputs that wait for later ones; nothing older."""
    chunked = decoders.ChunkedDecoder(blurred, 8, 1, context=3, look_ahead=2)
    for _ in range(10):
        chunked.add(torch.randn(1, 1, 3))
    found = chunked.kept.shape[2]
    assert found == 5, f"{found} inputs are kept; context 3 and look-ahead 2 need 5"


def random_blocks():
    """Make block 0 and three later blocks of random latents."""
    torch.manual_seed(0)
    sizes = [(16, 1)] + 3 * [(48, 25)]
    return [
        Block(k, torch.randn(1, v, CFG.video_channels), torch.randn(1, a, CFG.audio_channels))
        for k, (v, a) in enumerate(sizes)
    ]


@pytest.mark.points(1, "ToyDecoder.decode")
def test_a_block_decodes_to_its_own_second():
    """Block 0 is one frame without sound, every later one 24 frames and 24000 samples."""
    decoder = decoders.ToyDecoder(toy_codec.load(CFG))
    for block in random_blocks():
        chunk = decoder.decode(block)
        found = [len(chunk.frames), len(chunk.levels), chunk.samples.shape[1]]
        right = [24, 100, 24000] if block.index else [1, 1, 0]
        what = "frames, mel frames and samples"
        assert found == right, f"block {block.index} became {found} {what}, expected {right}"


@pytest.mark.points(2, "ToyDecoder.decode")
def test_sound_has_no_seams():
    """The samples of all blocks equal those of the whole clip decoded at once."""
    codec, blocks = toy_codec.load(CFG), random_blocks()
    decoder = decoders.ToyDecoder(codec)
    frames, levels, samples = zip(*map(decoder.decode, blocks))
    frames, levels, samples = torch.cat(frames), torch.cat(levels), torch.cat(samples, 1)[0]
    video, audio = (torch.cat([block[i] for block in blocks], 1) for i in (1, 2))
    pictures, whole = codec.decode_video(video, True)[0], codec.decode_audio(audio, True)[0]
    assert torch.allclose(frames, pictures, atol=1e-5), "the frames differ from those of the clip"
    assert torch.allclose(levels, whole, atol=1e-5), "the levels differ from those of the clip"
    away = (samples - toy_codec.synthesise(whole, 0, CFG)).abs()
    second = int(away.argmax()) // toy_codec.SAMPLE_RATE
    assert away.max() < 1e-3, (
        f"second {second} of the sound differs from the whole clip: a block begins at the last mel "
        f"frame of the block before, and phases depend on the number of the first mel frame"
    )
