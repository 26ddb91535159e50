"""Graded: the blocks of frames and tokens, the attention rule, the four masks.

Expected values are counted by hand, token by token, for both block layouts (1+3k / 1+25k and
4+3k / 26+25k) and for blocks of two seconds.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from grading import watched

import config
import masks

CFG = replace(config.TOY, height=8, width=24, num_sinks=2)  # 3 tokens per video frame
RELEASED = replace(CFG, prefix_video_frames=4, prefix_audio_frames=26, num_sinks=0)
SLOW = replace(CFG, block_seconds=2, width=16, num_sinks=5)  # 6 and 50 frames per block
LAYOUTS = CFG, RELEASED, SLOW
BLOCKS = 4
STREAMS = {  # of queries and keys
    "video_self": ("video", "video"),
    "audio_self": ("audio", "audio"),
    "a2v": ("video", "audio"),
    "v2a": ("audio", "video"),
}


def block_of(frame, prefix, step):
    """Count the block of a frame: the prefix is block 0, then every `step` frames are one block."""
    block = 0
    while frame >= prefix + block * step:
        block += 1
    return block


def tokens(cfg, sinks=True, blocks=BLOCKS):
    """List every token of a clip in order, as (name, block), for both streams."""
    video, audio = [], [(f"sink {s}", 0) for s in range(cfg.num_sinks if sinks else 0)]
    step_v, step_a = int(3 * cfg.block_seconds), int(25 * cfg.block_seconds)
    for frame in range(cfg.prefix_video_frames + (blocks - 1) * step_v):
        block = block_of(frame, cfg.prefix_video_frames, step_v)
        video += [(f"video, frame {frame}, block {block}", block)] * cfg.tokens_per_frame
    for frame in range(cfg.prefix_audio_frames + (blocks - 1) * step_a):
        block = block_of(frame, cfg.prefix_audio_frames, step_a)
        audio.append((f"audio, frame {frame}, block {block}", block))
    return {"video": video, "audio": audio}


def check_blocks(found, expected):
    """Fail on the first token whose block is wrong."""
    assert len(found) == len(expected), f"{len(found)} tokens, expected {len(expected)}"
    assert not found.is_floating_point(), "block indices are whole numbers, not floats"
    for i, (block, (name, right)) in enumerate(zip(found.tolist(), expected)):
        assert block == right, f"token {i} ({name}) got block {block}"


def explain(attends, query, key):
    """Say why this query may, or may not, attend to this key."""
    (q_name, q), (k_name, k) = query, key
    pair = f"query ({q_name}) {'attends' if attends else 'does not attend'} to key ({k_name})"
    if attends:
        return f"{pair}: " + ("a leak from the future" if k > q else "the key has left the window")
    if k == q:
        return f"{pair}: inside a block, every token attends to every other one"
    if k == 0:
        return f"{pair}: every query attends to block 0, which holds prefix and sinks"
    return f"{pair}: the past is visible as far as the window reaches"


def check_mask(mask, queries, keys, window=None, which="", pinned=True):
    """Fail on the first (query, key) on which a mask is wrong."""
    shape = len(queries), len(keys)
    found = f"{which}the mask is {tuple(mask.shape)}"
    assert mask.shape == shape, f"{found}, but (queries, keys) are {shape}"
    assert mask.dtype == torch.bool, f"{which}a mask holds booleans, not {mask.dtype}"
    for query, row in zip(queries, mask.tolist()):
        for key, attends in zip(keys, row):
            q, k = query[1], key[1]
            is_near = window is None or q - k <= window
            right = k <= q and (is_near or (k == 0 and pinned))
            assert attends == right, which + explain(attends, query, key)


@pytest.mark.points(1, "block_of_frame")
def test_a_block_begins_after_the_prefix_and_at_every_step():
    """Number by number, for short and long prefixes and steps."""
    for prefix, step in ((1, 3), (1, 25), (4, 3), (26, 25), (2, 1)):
        for frame in range(prefix + 3 * step + 1):
            found = int(masks.block_of_frame(frame, prefix, step))
            right = block_of(frame, prefix, step)
            layout = f"with a prefix of {prefix} and {step} frames per block"
            assert found == right, f"{layout}, frame {frame} is in block {right}, not {found}"


@pytest.mark.points(1, "block_of_frame")
def test_a_tensor_of_frames_gives_a_tensor_of_blocks():
    """Whole numbers, also for frames from the middle of a clip; the frames stay as they are."""
    found = masks.block_of_frame(torch.arange(12), 4, 3)
    assert not found.is_floating_point(), "block indices are whole numbers: use //"
    for first, prefix, step in ((0, 4, 3), (0, 1, 25), (30, 26, 25), (9, 1, 3)):
        frames = torch.arange(first, first + 60)
        with watched(frames):
            found = masks.block_of_frame(frames, prefix, step).tolist()
        right = [block_of(frame, prefix, step) for frame in frames.tolist()]
        given = f"frames {first} to {first + 59} with a prefix of {prefix} and a step of {step}"
        assert found == right, f"{given} got blocks {found}"


@pytest.mark.points(1, "video_token_blocks")
def test_every_token_of_a_video_frame_has_its_block():
    """Tokens are ordered by frame, so blocks never decrease."""
    for cfg, blocks in itertools.product(LAYOUTS, (1, BLOCKS)):
        found = masks.video_token_blocks(blocks, cfg)
        is_sorted = found.tolist() == sorted(found.tolist())
        assert is_sorted, "blocks decrease, but all tokens of frame 0 come first"
        check_blocks(found, tokens(cfg, blocks=blocks)["video"])


@pytest.mark.points(1, "audio_token_blocks")
def test_sinks_precede_the_audio_and_belong_to_block_0():
    """S + F_a tokens, or F_a without sinks."""
    for cfg, blocks in itertools.product(LAYOUTS, (1, BLOCKS)):
        check_blocks(masks.audio_token_blocks(blocks, cfg), tokens(cfg, blocks=blocks)["audio"])
        found = masks.audio_token_blocks(blocks, cfg, sinks=False)
        check_blocks(found, tokens(cfg, False, blocks)["audio"])


@pytest.mark.points(2, "may_attend")
def test_attention_goes_backwards_between_blocks_and_both_ways_inside():
    """Without a window, the key's block is not later than the query's block."""
    names = [(f"token {i}, block {i // 3}", i // 3) for i in range(9)]
    blocks = torch.arange(9) // 3
    check_mask(masks.may_attend(blocks, blocks), names, names)
    check_mask(masks.may_attend(blocks, blocks, pinned=False), names, names, which="no window: ")


@pytest.mark.points(1, "may_attend")
def test_a_window_hides_everything_older_except_block_0():
    """For queries and keys from anywhere, in any order: a ring is not in the order of time."""
    of_queries, of_keys = [0, 1, 2, 3, 4, 5, 6, 2], [4, 5, 3, 0, 6, 2, 1]
    for keys in (sorted(of_keys), of_keys, [3, 1, 2]):
        for window in (2, 1, 0, 9):
            names = [[(f"block {b}", b) for b in blocks] for blocks in (of_queries, keys)]
            q, k = torch.tensor(of_queries), torch.tensor(keys)
            with watched(q, k):
                found = masks.may_attend(q, k, window)
            check_mask(found, *names, window, f"window {window}, keys of blocks {keys}: ")


@pytest.mark.points(1, "may_attend")
def test_without_the_pin_block_0_leaves_the_window_too():
    """With a window of two blocks, block 3 no longer attends to block 0."""
    blocks, names = torch.arange(5), [(f"block {b}", b) for b in range(5)]
    found = masks.may_attend(blocks, blocks, 2, pinned=False)
    column = found[:, 0].tolist()
    rule = "not pinned and with a window of 2, block 0 should be hidden from blocks 3 and 4"
    assert column == [True] * 3 + [False] * 2, f"{rule}; blocks 0 to 4 attend to it: {column}"
    for window in (0, 1, 2):
        found = masks.may_attend(blocks, blocks, window, pinned=False)
        check_mask(found, names, names, window, f"not pinned, window {window}: ", pinned=False)


@pytest.mark.points(1, "four_masks")
def test_each_attention_has_its_own_queries_and_keys():
    """a2v has video queries (rows) and audio keys (columns); v2a the other way round."""
    for cfg in (CFG, RELEASED):
        every, four = tokens(cfg), masks.four_masks(cfg, BLOCKS)
        assert set(four) == set(STREAMS), f"the masks are {sorted(four)}"
        for site, streams in STREAMS.items():
            queries, keys = (every[stream] for stream in streams)
            if len(keys) != len(queries):
                shape, swapped = tuple(four[site].shape), (len(keys), len(queries))
                assert shape != swapped, f"{site} is (keys, queries): every query should be a row"
            check_mask(four[site], queries, keys, which=f"{site}: ")


@pytest.mark.points(1, "four_masks")
def test_window_and_sinks_reach_the_masks():
    """Both options are passed on to all four attentions."""
    for window, sinks in ((1, False), (0, True)):
        every, four = tokens(CFG, sinks), masks.four_masks(CFG, BLOCKS, window, sinks)
        for site, streams in STREAMS.items():
            queries, keys = (every[stream] for stream in streams)
            which = f"{site} with window {window} and {'' if sinks else 'no '}sinks: "
            check_mask(four[site], queries, keys, window, which)
