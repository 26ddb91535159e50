"""Graded: decoding a growing sequence in chunks, and the toy's frames and sound without seams.

Chunks are compared with the whole sequence, decoded at once by a filter that needs both sides.
"""

from dataclasses import replace

import pytest
import torch
from grading import check, check_dtype, random_tensor, watched

import config
from film import decoders
from rollout import Block
from toy import codec as toy_codec

CFG = replace(config.TOY, num_layers=1)
RELEASED = replace(config.TOY_RELEASED, num_layers=1)


@pytest.mark.points(1, "ChunkedDecoder._num_outputs")
def test_the_first_input_gives_fewer_outputs():
    """LTX-2's video decoder: 1 frame, then 8 per latent; its vocoder: always 240 samples."""
    for stride, first in ((8, 1), (240, 240), (4, 1), (3, 2), (2, 5)):
        chunked = decoders.ChunkedDecoder(None, stride, first, context=1)
        for inputs in (-2, -1, 0, 1, 2, 3, 5):
            right = len([*range(first), *range(stride * (inputs - 1))]) if inputs > 0 else 0
            found = chunked._num_outputs(inputs)
            each = f"(the first {first}, the others {stride})"
            assert found == right, f"{inputs} inputs give {right} outputs {each}, not {found}"


def blurred(x):
    """Decode with two inputs of context on both sides: 1 output, then 8 per input."""
    kernel = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1])
    padded = torch.nn.functional.pad(x.movedim(2, -1), (2, 2)).unfold(-1, 5, 1)
    y = (padded * kernel).sum(-1).movedim(-1, 2)
    return y.repeat_interleave(8, dim=2)[:, :, 7:]


def doubled(x):
    """Decode every input by itself into two outputs."""
    return torch.cat([x, 2 * x], dim=1).repeat_interleave(2, dim=2)


def decoded(x, context, look_ahead, sizes=(1, 3, 3, 3), decode=blurred):
    """Return every result of `add` for blocks of these sizes, and that of `finish`."""
    stride, first = (8, 1) if decode is blurred else (2, 2)
    chunked = decoders.ChunkedDecoder(decode, stride, first, context, look_ahead)
    with watched(x):
        return [*map(chunked.add, x.split(sizes, dim=2)), chunked.finish()]


@pytest.mark.points(1, "ChunkedDecoder._decode_until")
def test_no_output_is_lost_or_repeated():
    """Ten inputs give 73 outputs, with look-ahead or without; none waits longer than necessary."""
    x = random_tensor(1, 1, 10)
    for sizes, look_ahead, right in (
        ((1, 3, 3, 3), 0, [1, 24, 24, 24, 0]),
        ((1, 3, 3, 3), 2, [0, 9, 24, 24, 16]),
        ((4, 3, 3), 1, [17, 24, 24, 8]),
        ((1,) * 10, 3, [0, 0, 0, 1, 8, 8, 8, 8, 8, 8, 24]),
    ):
        found = [0 if y is None else y.shape[2] for y in decoded(x, 3, look_ahead, sizes)]
        given = f"blocks of {', '.join(map(str, sizes))} inputs and a look-ahead of {look_ahead}"
        assert found == right, f"{given} give {found} outputs, expected {right}"
    nothing = decoded(x, 3, 2)[0]
    assert nothing is None, "while nothing is ready, the result is None, not an empty tensor"


@pytest.mark.points(2, "ChunkedDecoder._decode_until")
def test_chunks_with_enough_overlap_equal_the_whole():
    """With as much context and look-ahead as the decoder uses, all clips, channels and pixels."""
    for shape in ((1, 1, 10), (3, 2, 10), (2, 1, 10, 2, 3)):
        x = random_tensor(*shape)
        for context, look_ahead, sizes in (
            (2, 2, (1, 3, 3, 3)), (3, 2, (4, 3, 3)), (4, 5, (1,) * 10),
        ):  # fmt: skip
            parts = [y for y in decoded(x, context, look_ahead, sizes) if y is not None]
            for y in parts:
                is_whole = y.shape[3:] == x.shape[3:]
                assert is_whole, f"{tuple(x.shape)} became {tuple(y.shape)}: time is axis 2"
            found, right = torch.cat(parts, 2), blurred(x)
            clips = f"{len(x)} clips became {len(found)}"
            assert len(found) == len(x), f"{clips}: decode the whole batch"
            count = f"{found.shape[2]} outputs, expected {right.shape[2]}"
            assert found.shape == right.shape, count
            away = (found - right).abs().movedim(2, 0).flatten(1).amax(1)
            wrong = (away > 1e-5).nonzero().flatten().tolist()
            assert not wrong, (
                f"output {wrong[0]} differs from the sequence decoded at once: count the outputs "
                f"of a chunk from its own first input, and keep inputs that were decoded before "
                f"as context"
            )
    x = random_tensor(2, 1, 10)
    found = torch.cat([y for y in decoded(x, 0, 0, decode=doubled) if y is not None], 2)
    check(found, doubled(x), "without context or look-ahead the chunks differ from the whole")


@pytest.mark.points(1, "ChunkedDecoder._decode_until")
def test_an_endless_stream_keeps_a_few_inputs():
    """Context, and inputs that wait for later ones; nothing older is kept or decoded."""
    for context, look_ahead in ((3, 2), (1, 0), (2, 4)):
        lengths = []

        def decode(x):
            lengths.append(x.shape[2])
            return blurred(x)

        chunked = decoders.ChunkedDecoder(decode, 8, 1, context, look_ahead)
        for _ in range(10):
            chunked.add(random_tensor(1, 1, 3))
        found, most = chunked.kept.shape[2], context + look_ahead
        kept = f"{found} inputs are kept; context {context} and look-ahead {look_ahead}"
        assert found == most, f"{kept} need {most}"
        assert max(lengths) <= most + 3, f"{max(lengths)} inputs are decoded for 3 new ones"
        done = f"`done` counts the inputs whose outputs were returned: {30 - look_ahead}"
        assert chunked.done == 30 - look_ahead, f"{done}, not {chunked.done}"


def random_blocks(cfg, dtype=torch.float32):
    """Make block 0 and three later blocks of random latents, of two clips."""
    prefix = cfg.prefix_video_frames, cfg.prefix_audio_frames
    blocks = []
    for k in range(4):
        video, audio = prefix if k == 0 else (3, 25)
        shapes = (2, 16 * video, cfg.video_channels), (2, audio, cfg.audio_channels)
        video, audio = (
            random_tensor(*shape, seed=2 * k + i, dtype=dtype) for i, shape in enumerate(shapes)
        )
        blocks.append(Block(k, video, audio))
    return blocks


@pytest.mark.points(1, "ToyDecoder.decode")
def test_a_block_decodes_to_its_own_second():
    """Block 0 may be one frame without sound; every later one has 24 frames and 24000 samples."""
    for cfg, first in ((CFG, [1, 1, 0]), (RELEASED, [25, 101, 24000])):
        called = []

        def watch(name, part, called=called):
            return lambda *given: called.append(name) or part(*given)

        decoder = decoders.ToyDecoder(toy_codec.load(cfg), watch)
        for block in random_blocks(cfg, torch.bfloat16 if cfg is RELEASED else torch.float32):
            chunk = decoder.decode(block)
            found = [len(chunk.frames), len(chunk.levels), chunk.samples.shape[-1]]
            right = [24, 100, 24000] if block.index else first
            what = "frames, mel frames and samples"
            assert found == right, f"block {block.index} became {found} {what}, expected {right}"
            shapes = chunk.frames.shape[1:], chunk.samples.shape[:-1]
            sizes = "frames are (P, 3, 32, 32) and samples (1, n): the picture and sound of clip 0"
            assert shapes == ((3, 32, 32), (1,)), sizes
            for x in chunk:
                check_dtype(x, torch.float32, "the decoders take latents in float32")
        unseen = {"video decoder", "audio decoder", "vocoder"} - set(called)
        timed = "call self.decode_video, self.decode_audio and self.synthesise, which are timed"
        assert not unseen, f"{timed}: the stopwatch never sees the {', '.join(sorted(unseen))}"


@pytest.mark.points(2, "ToyDecoder.decode")
def test_sound_has_no_seams():
    """The samples of all blocks equal those of the whole clip decoded at once."""
    for cfg in (CFG, RELEASED):
        codec, blocks = toy_codec.load(cfg), random_blocks(cfg)
        decoder = decoders.ToyDecoder(codec)
        with watched(blocks):
            frames, levels, samples = zip(*map(decoder.decode, blocks))
        frames, levels, samples = torch.cat(frames), torch.cat(levels), torch.cat(samples, 1)[0]
        video, audio = (torch.cat([block[i] for block in blocks], 1)[:1] for i in (1, 2))
        pictures, whole = codec.decode_video(video, True)[0], codec.decode_audio(audio, True)[0]
        layout = f"with {cfg.prefix_video_frames} video latents in block 0"
        check(frames, pictures, f"{layout}, the frames differ from those of the clip")
        check(levels, whole, f"{layout}, the levels differ from those of the clip")
        right = toy_codec.synthesise(whole, 0, cfg)
        assert samples.shape == right.shape, f"{len(samples)} samples, expected {len(right)}"
        away = (samples - right).abs()
        second = int(away.argmax()) // toy_codec.SAMPLE_RATE
        assert away.max() < 1e-3, (
            f"{layout}, second {second} of the sound differs from the whole clip: a block begins "
            f"at the last mel frame of the block before, and phases depend on the number of the "
            f"first mel frame"
        )
