"""Masks: the fast ones equal a slow loop that states the rule, and blocks tile the timeline."""

from dataclasses import replace

import pytest
import torch
from helpers import LAYOUTS, MERGED, PAPER, layout_name, tiny

import config
import masks

BLOCKS = 5


def block_of_token(index, stream, cfg):
    """Return the block of a token, by counting frames from the start of the sequence."""
    if stream == "video":
        frame, prefix, step = index // cfg.tokens_per_frame, cfg.prefix_video_frames, 3
    else:
        if index < cfg.num_sinks:  # sinks stand in front of the audio and count as block 0
            return 0
        frame, prefix, step = index - cfg.num_sinks, cfg.prefix_audio_frames, 25
    block = 0
    while frame >= prefix + block * step:
        block += 1
    return block


def sees(query_block, key_block, window):
    """The rule, one `if` per sentence."""
    if key_block > query_block:  # the future is not known yet
        return False
    if key_block == 0:  # prefix and sinks are pinned: everyone sees them, for ever
        return True
    if window is None:  # nothing is ever evicted
        return True
    return query_block - key_block <= window  # `window` blocks before its own are kept


def slow_mask(query_stream, key_stream, cfg, window):
    """Double loop over queries and keys, by token index."""
    tokens = {
        "video": len(masks.clip_span(BLOCKS, cfg).video) * cfg.tokens_per_frame,
        "audio": len(masks.clip_span(BLOCKS, cfg).audio) + cfg.num_sinks,
    }
    blocks = {s: [block_of_token(i, s, cfg) for i in range(n)] for s, n in tokens.items()}
    return torch.tensor(
        [[sees(q, k, window) for k in blocks[key_stream]] for q in blocks[query_stream]]
    )


STREAMS = {  # site -> stream of the queries, stream of the keys
    "video_self": ("video", "video"),
    "audio_self": ("audio", "audio"),
    "a2v": ("video", "audio"),
    "v2a": ("audio", "video"),
}


@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("cfg", LAYOUTS, ids=layout_name)
def test_fast_masks_equal_the_slow_rule(cfg, window):
    """All four masks equal a double loop over tokens, for both layouts, with and without sinks."""
    cfg = tiny(cfg)
    fast = masks.four_masks(cfg, BLOCKS, window)
    assert set(fast) == set(STREAMS)
    for site, streams in STREAMS.items():
        assert torch.equal(fast[site], slow_mask(*streams, cfg, window)), site


def test_sinks_are_seen_by_all_and_see_only_block_0():
    """Every query sees every sink; a sink sees sinks, A0 and V0 and nothing later."""
    cfg = replace(PAPER, num_sinks=16)
    four = masks.four_masks(cfg, 3, window=1)
    assert four["audio_self"][:, :16].all() and four["a2v"][:, :16].all()
    assert four["audio_self"][:16, :17].all() and not four["audio_self"][:16, 17:].any()
    first_frame = cfg.tokens_per_frame
    assert four["v2a"][:16, :first_frame].all() and not four["v2a"][:16, first_frame:].any()


def test_sinks_can_be_left_out_of_the_masks():
    """A mask without its sink rows and columns is the mask of the other tokens."""
    cfg = replace(PAPER, num_sinks=16)
    with_sinks = masks.four_masks(cfg, 3)["audio_self"]
    assert torch.equal(masks.four_masks(cfg, 3, sinks=False)["audio_self"], with_sinks[16:, 16:])


@pytest.mark.parametrize("cfg", [PAPER, MERGED], ids=layout_name)
def test_blocks_tile_the_clip(cfg):
    """Every latent frame of both streams belongs to exactly one block, in order."""
    spans = [masks.block_span(k, cfg) for k in range(7)]
    clip = masks.clip_span(7, cfg)
    assert [f for s in spans for f in s.video] == list(clip.video)
    assert [f for s in spans for f in s.audio] == list(clip.audio)
    assert [s.has_sinks for s in spans] == [True] + 6 * [False]


@pytest.mark.parametrize("cfg", [PAPER, MERGED], ids=layout_name)
def test_blocks_of_both_streams_end_at_the_same_instant(cfg):
    """The last video latent and the last audio latent of a block end at the same time."""
    for k in range(7):
        span = masks.block_span(k, cfg)
        end = masks.block_interval(k, cfg)[1]
        assert (span.video.stop - 1) / 3 == (span.audio.stop - 1) / 25 == end


@pytest.mark.parametrize("seconds, cfg, blocks", [(5, PAPER, 6), (0, PAPER, 1), (5, MERGED, 5)])
def test_number_of_blocks_of_a_clip(seconds, cfg, blocks):
    """N seconds are N + 1 blocks if block 0 is one frame, N blocks if it is one second."""
    assert masks.num_blocks(seconds, cfg) == blocks


@pytest.mark.parametrize("seconds", [2.5, -1, 0.001])
def test_durations_that_end_inside_a_block_are_refused(seconds):
    """The message names the duration and the possible ends."""
    with pytest.raises(ValueError, match=f"{seconds:g} seconds end inside.*0, 1, 2, ... seconds"):
        masks.num_blocks(seconds, PAPER)


def test_too_short_for_a_merged_prefix_is_refused():
    """If block 0 is one second, no clip is shorter than that."""
    with pytest.raises(ValueError, match="0 seconds end inside a block: blocks end at 1, 2, 3"):
        masks.num_blocks(0, MERGED)


def test_text_picture_draws_a_hash_where_attention_is_allowed():
    """The picture of two blocks of one token is a lower triangle."""
    blocks = torch.arange(2)
    assert masks.mask_to_text(masks.may_attend(blocks, blocks)) == "#.\n##"


def test_window_matters():
    """A larger window shows more keys, so the tests above do test windows."""
    counts = [masks.four_masks(config.TOY, 6, w)["a2v"].sum() for w in (1, 2, 3, None)]
    assert counts == sorted(counts) and len(set(map(int, counts))) == 4
