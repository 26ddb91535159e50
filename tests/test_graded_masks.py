"""Graded: blocks of frames and tokens, the rule of attention, the four masks.

What is right is counted here by hand, token by token, for the layout 1+3k / 1+25k and, where it
says 4, for 4+3k / 26+25k.
"""

from dataclasses import replace

import pytest
import torch

import config
import masks

CFG = replace(config.TOY, height=16, width=16, num_sinks=2)  # 4 tokens a video frame
MERGED = replace(CFG, prefix_video_frames=4, prefix_audio_frames=26)
BLOCKS = 4


def block_of(frame, prefix, step):
    """Counted: the prefix is block 0, then every `step` frames are one block more."""
    block = 0
    while frame >= prefix + block * step:
        block += 1
    return block


def tokens(cfg, sinks=True):
    """Every token of a clip in order, as (name, block), for both streams."""
    video, audio = [], [(f"sink {s}", 0) for s in range(cfg.num_sinks if sinks else 0)]
    for frame in range(cfg.prefix_video_frames + (BLOCKS - 1) * 3):
        block = block_of(frame, cfg.prefix_video_frames, 3)
        video += [(f"video, frame {frame}, block {block}", block)] * cfg.tokens_per_frame
    for frame in range(cfg.prefix_audio_frames + (BLOCKS - 1) * 25):
        block = block_of(frame, cfg.prefix_audio_frames, 25)
        audio.append((f"audio, frame {frame}, block {block}", block))
    return {"video": video, "audio": audio}


def first_difference(found, expected):
    """The first token whose block is wrong, in words; None if all are right."""
    assert len(found) == len(expected), f"{len(found)} tokens, expected {len(expected)}"
    for i, (block, (name, right)) in enumerate(zip(found.tolist(), expected)):
        if block != right:
            return f"token {i} ({name}) is said to be in block {block}"


def explain(seen, query, key):
    """Why this query may, or may not, see this key."""
    (q_name, q), (k_name, k) = query, key
    sees = f"query ({q_name}) {'sees' if seen else 'does not see'} key ({k_name})"
    if seen:
        return f"{sees}: " + ("a leak from the future" if k > q else "it left the window")
    if k == q:
        return f"{sees}: inside a block everything sees everything"
    if k == 0:
        return f"{sees}: block 0, with prefix and sinks, is seen by all, for ever"
    return f"{sees}: the past is visible as far as the window reaches"


def first_wrong_pair(mask, queries, keys, window=None):
    """The first (query, key) on which a mask is wrong, in words; None if it is right."""
    shape = len(queries), len(keys)
    assert mask.shape == shape, f"mask is {tuple(mask.shape)}, (queries, keys) are {shape}"
    for i, (query, row) in enumerate(zip(queries, mask.tolist())):
        for key, seen in zip(keys, row):
            q, k = query[1], key[1]
            right = k <= q and (k == 0 or window is None or q - k <= window)
            if seen != right:
                return explain(seen, query, key)


def blocks_alone(n):
    """One token a block."""
    return [(f"block {b}", b) for b in range(n)]


@pytest.mark.points(1, "block_of_frame")
def test_blocks_begin_behind_the_prefix_and_every_step():
    """Frame by frame for both streams behind a prefix of one frame, given as numbers."""
    for prefix, step in ((1, 3), (1, 25)):
        for frame in range(prefix + 3 * step):
            found, right = (
                int(masks.block_of_frame(frame, prefix, step)),
                block_of(frame, prefix, step),
            )
            assert found == right, (
                f"with a prefix of {prefix} and {step} frames a block, frame {frame} is in block "
                f"{right}, not {found}"
            )


@pytest.mark.points(1, "block_of_frame")
def test_blocks_of_a_tensor_of_frames():
    """A tensor of indices gives a tensor of whole numbers, with 0 all over a longer prefix."""
    found = masks.block_of_frame(torch.arange(12), 4, 3)
    assert not found.is_floating_point(), "blocks are counted in whole numbers, use //"
    assert found.tolist() == [0] * 4 + [1] * 3 + [2] * 3 + [3] * 2, (
        f"frames 0..11 with a prefix of 4 are in blocks {found.tolist()}"
    )


@pytest.mark.points(1, "video_token_blocks")
def test_all_tokens_of_a_video_frame_are_in_its_block():
    """Tokens are frame-major, so blocks never go back."""
    for cfg in (CFG, MERGED):
        found = masks.video_token_blocks(BLOCKS, cfg)
        assert found.diff().min() >= 0, "blocks go back: tokens are frame-major, not frame by frame"
        wrong = first_difference(found, tokens(cfg)["video"])
        assert not wrong, wrong


@pytest.mark.points(1, "audio_token_blocks")
def test_sinks_stand_in_front_of_the_audio_in_block_0():
    """S + F_a tokens, or F_a without sinks."""
    for cfg in (CFG, MERGED):
        for sinks in (True, False):
            found = masks.audio_token_blocks(BLOCKS, cfg, sinks)
            wrong = first_difference(found, tokens(cfg, sinks)["audio"])
            assert not wrong, wrong


@pytest.mark.points(2, "may_attend")
def test_time_flows_one_way_across_blocks_and_both_ways_inside():
    """Without a window: the key's block is not later than the query's."""
    names = [(f"token {i}, block {i // 3}", i // 3) for i in range(9)]
    blocks = torch.arange(9) // 3
    wrong = first_wrong_pair(masks.may_attend(blocks, blocks), names, names)
    assert not wrong, wrong


@pytest.mark.points(1, "may_attend")
def test_a_window_forgets_all_but_the_pinned_block_0():
    """So many blocks before its own, and block 0 for ever."""
    blocks, names = torch.arange(7), blocks_alone(7)
    for window in (1, 2):
        wrong = first_wrong_pair(masks.may_attend(blocks, blocks, window), names, names, window)
        assert not wrong, f"window {window}: {wrong}"


@pytest.mark.points(1, "may_attend")
def test_without_a_pin_block_0_is_forgotten_like_any_other():
    """Its key leaves the window of block 3 when that remembers two."""
    blocks = torch.arange(5)
    seen = masks.may_attend(blocks, blocks, 2, pinned=False)[:, 0].tolist()
    assert seen == [True] * 3 + [False] * 2, (
        f"unpinned, block 0 is seen by blocks 0 to 4: {seen}; it should leave the window of 2"
    )


@pytest.mark.points(1, "four_masks")
def test_each_site_has_its_own_queries_and_keys():
    """a2v is video asking audio: video rows, audio columns; v2a the other way round."""
    every, four = tokens(CFG), masks.four_masks(CFG, BLOCKS)
    sites = {"video_self": "video video", "audio_self": "audio audio"}
    sites |= {"a2v": "video audio", "v2a": "audio video"}
    assert set(four) == set(sites), f"sites are {sorted(four)}"
    for site, streams in sites.items():
        queries, keys = (every[stream] for stream in streams.split())
        shape = tuple(four[site].shape)
        assert shape != (len(keys), len(queries)) or len(keys) == len(queries), (
            f"{site} is (keys, queries): who listens asks, and a query is a row"
        )
        wrong = first_wrong_pair(four[site], queries, keys)
        assert not wrong, f"{site}: {wrong}"


@pytest.mark.points(1, "four_masks")
def test_window_and_sinks_reach_all_four_masks():
    """Both options are handed on."""
    every, four = tokens(CFG, sinks=False), masks.four_masks(CFG, BLOCKS, window=1, sinks=False)
    for site, streams in {"audio_self": "audio audio", "a2v": "video audio"}.items():
        queries, keys = (every[stream] for stream in streams.split())
        wrong = first_wrong_pair(four[site], queries, keys, window=1)
        assert not wrong, f"{site} with window 1 and no sinks: {wrong}"
