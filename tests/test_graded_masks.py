"""Graded: the blocks of frames and tokens, the attention rule, the four masks.

Expected values are counted by hand, token by token, for the layouts 1+3k / 1+25k and 4+3k / 26+25k.
"""

from dataclasses import replace

import pytest
import torch

import config
import masks

CFG = replace(config.TOY, height=16, width=16, num_sinks=2)  # 4 tokens per video frame
RELEASED = replace(CFG, prefix_video_frames=4, prefix_audio_frames=26)
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


def tokens(cfg, sinks=True):
    """List every token of a clip in order, as (name, block), for both streams."""
    video, audio = [], [(f"sink {s}", 0) for s in range(cfg.num_sinks if sinks else 0)]
    for frame in range(cfg.prefix_video_frames + (BLOCKS - 1) * 3):
        block = block_of(frame, cfg.prefix_video_frames, 3)
        video += [(f"video, frame {frame}, block {block}", block)] * cfg.tokens_per_frame
    for frame in range(cfg.prefix_audio_frames + (BLOCKS - 1) * 25):
        block = block_of(frame, cfg.prefix_audio_frames, 25)
        audio.append((f"audio, frame {frame}, block {block}", block))
    return {"video": video, "audio": audio}


def check_blocks(found, expected):
    """Fail on the first token whose block is wrong."""
    assert len(found) == len(expected), f"{len(found)} tokens, expected {len(expected)}"
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


def check_mask(mask, queries, keys, window=None, which=""):
    """Fail on the first (query, key) on which a mask is wrong."""
    shape = len(queries), len(keys)
    assert mask.shape == shape, f"mask is {tuple(mask.shape)}, (queries, keys) are {shape}"
    for query, row in zip(queries, mask.tolist()):
        for key, attends in zip(keys, row):
            q, k = query[1], key[1]
            right = k <= q and (k == 0 or window is None or q - k <= window)
            assert attends == right, which + explain(attends, query, key)


@pytest.mark.points(1, "block_of_frame")
def test_a_block_begins_after_the_prefix_and_at_every_step():
    """Number by number, for both streams with a prefix of one frame."""
    for prefix, step in ((1, 3), (1, 25)):
        for frame in range(prefix + 3 * step):
            found = int(masks.block_of_frame(frame, prefix, step))
            right = block_of(frame, prefix, step)
            layout = f"with a prefix of {prefix} and {step} frames per block"
            assert found == right, f"{layout}, frame {frame} is in block {right}, not {found}"


@pytest.mark.points(1, "block_of_frame")
def test_a_tensor_of_frames_gives_a_tensor_of_blocks():
    """Whole numbers, and 0 everywhere in a longer prefix."""
    found = masks.block_of_frame(torch.arange(12), 4, 3)
    assert not found.is_floating_point(), "block indices are whole numbers: use //"
    right = [0] * 4 + [1] * 3 + [2] * 3 + [3] * 2
    assert found.tolist() == right, f"frames 0 to 11 with a prefix of 4 got blocks {found.tolist()}"


@pytest.mark.points(1, "video_token_blocks")
def test_every_token_of_a_video_frame_has_its_block():
    """Tokens are ordered by frame, so blocks never decrease."""
    for cfg in (CFG, RELEASED):
        found = masks.video_token_blocks(BLOCKS, cfg)
        assert found.diff().min() >= 0, "blocks decrease, but all tokens of frame 0 come first"
        check_blocks(found, tokens(cfg)["video"])


@pytest.mark.points(1, "audio_token_blocks")
def test_sinks_precede_the_audio_and_belong_to_block_0():
    """S + F_a tokens, or F_a without sinks."""
    for cfg in (CFG, RELEASED):
        for sinks in (True, False):
            found = masks.audio_token_blocks(BLOCKS, cfg, sinks)
            check_blocks(found, tokens(cfg, sinks)["audio"])


@pytest.mark.points(2, "may_attend")
def test_attention_goes_backwards_between_blocks_and_both_ways_inside():
    """Without a window, the key's block is not later than the query's block."""
    names = [(f"token {i}, block {i // 3}", i // 3) for i in range(9)]
    blocks = torch.arange(9) // 3
    check_mask(masks.may_attend(blocks, blocks), names, names)


@pytest.mark.points(1, "may_attend")
def test_a_window_hides_everything_older_except_block_0():
    """A query attends to `window` blocks before its own, and to block 0."""
    blocks, names = torch.arange(7), [(f"block {b}", b) for b in range(7)]
    for window in (1, 2):
        found = masks.may_attend(blocks, blocks, window)
        check_mask(found, names, names, window, f"window {window}: ")


@pytest.mark.points(1, "may_attend")
def test_without_the_pin_block_0_leaves_the_window_too():
    """With a window of two blocks, block 3 no longer attends to block 0."""
    blocks = torch.arange(5)
    found = masks.may_attend(blocks, blocks, 2, pinned=False)[:, 0].tolist()
    rule = "not pinned and with a window of 2, block 0 should be hidden from blocks 3 and 4"
    assert found == [True] * 3 + [False] * 2, f"{rule}; blocks 0 to 4 attend to it: {found}"


@pytest.mark.points(1, "four_masks")
def test_each_attention_has_its_own_queries_and_keys():
    """a2v has video queries (rows) and audio keys (columns); v2a the other way round."""
    every, four = tokens(CFG), masks.four_masks(CFG, BLOCKS)
    assert set(four) == set(STREAMS), f"the masks are {sorted(four)}"
    for site, streams in STREAMS.items():
        queries, keys = (every[stream] for stream in streams)
        if len(keys) != len(queries):
            shape, swapped = tuple(four[site].shape), (len(keys), len(queries))
            assert shape != swapped, f"{site} is (keys, queries): every query should be a row"
        check_mask(four[site], queries, keys, which=f"{site}: ")


@pytest.mark.points(1, "four_masks")
def test_window_and_sinks_reach_the_masks():
    """Both options are passed on."""
    every, four = tokens(CFG, sinks=False), masks.four_masks(CFG, BLOCKS, window=1, sinks=False)
    for site in ("audio_self", "a2v"):
        queries, keys = (every[stream] for stream in STREAMS[site])
        check_mask(four[site], queries, keys, 1, f"{site} with window 1 and no sinks: ")
