"""Graded: the rollout that streams and trains: passes, refresh, cache, gradient.

The network is a stand-in that answers with known clean estimates and records every pass.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import config
import rollout
import self_forcing
from masks import block_span, clip_span
from toy.source import toy_captions

CFG = replace(config.TOY, num_layers=1, height=16, width=16)  # 4 tokens a video frame
SIGMAS, BLOCKS = CFG.sigmas, 3
CAPTIONS = toy_captions(torch.tensor([[1, 5, 7], [2, 6, 8]]))


class Net(nn.Module):
    """Knows a clean clip; every pass of a block answers with its share, times a weight."""

    def __init__(self, blocks=BLOCKS):
        super().__init__()
        self.cfg, self.passes, self.projected = CFG, [], 0
        self.weight = nn.Parameter(torch.ones(()))
        span = clip_span(blocks, CFG)
        torch.manual_seed(0)
        self.clip = (
            torch.randn(1, len(span.video) * CFG.tokens_per_frame, CFG.video_channels),
            torch.randn(1, len(span.audio), CFG.audio_channels),
        )

    def project_text(self, features):
        self.projected += 1
        return features

    def share(self, k):
        """Block k of the clip, cut out by hand."""
        video = slice(0, 4) if k == 0 else slice(4 + 12 * (k - 1), 4 + 12 * k)
        audio = slice(0, 1) if k == 0 else slice(1 + 25 * (k - 1), 1 + 25 * k)
        return self.clip[0][:, video], self.clip[1][:, audio]

    def forward(self, video, audio, sigma_video, sigma_audio, text, span, view):
        block = [block_span(k, CFG) for k in range(6)].index(span)
        self.passes.append(
            SimpleNamespace(
                x=(video, audio), sigma=round(float(sigma_video[0]), 3), block=block,
                cache=view.block, window=view.window, has_grad=torch.is_grad_enabled(), text=text,
            )
        )  # fmt: skip
        pairs = zip((video, audio), self.share(block), (sigma_video, sigma_audio))
        # the small part of x makes the estimate of every pass a little different
        x0 = [(self.weight * end + 0.01 * x, x, s[:, None, None]) for x, end, s in pairs]
        return [torch.where(s > 0, (x - end) / s, 0.0) for end, x, s in x0]


def rollout(net, blocks=BLOCKS, **options):
    generator = torch.Generator().manual_seed(1)
    return rollout.rollout(net, lambda k: f"text {k}", blocks, SIGMAS, generator, **options)


def levels(net, block):
    return [p.sigma for p in net.passes if p.block == block]


ROUNDED = [round(s, 3) for s in SIGMAS]


@pytest.mark.points(1, "whole_clip")
def test_blocks_are_joined_in_order_for_each_stream():
    """Along tokens, not clips."""
    net = Net()
    blocks = [rollout.Block(k, *net.share(k)) for k in range(BLOCKS)]
    for name, found, right in zip(("video", "audio"), rollout.whole_clip(blocks), net.clip):
        assert found.shape == right.shape, (
            f"{name} is {tuple(found.shape)}, not {tuple(right.shape)}"
        )
        assert torch.equal(found, right), f"the blocks of {name} are not in order"


@pytest.mark.points(2, "block_of")
def test_a_block_is_cut_out_where_it_belongs():
    """Frames of a span are tokens times tokens_per_frame for video, tokens for audio."""
    net = Net()
    for k in range(BLOCKS):
        found = rollout.block_of(net.clip, k, CFG)
        for name, x, right, per in zip(("video", "audio"), found, net.share(k), (4, 1)):
            assert x.shape == right.shape, (
                f"{name} of block {k} is {tuple(x.shape)}, not {tuple(right.shape)}: a frame is "
                f"{per} tokens"
            )
            assert torch.equal(x, right), f"{name} of block {k} is cut out at the wrong place"


@pytest.mark.points(2, "rollout")
def test_a_block_takes_four_passes_and_a_refresh_the_last_one_no_refresh():
    """The levels of the list, then 0 for what later blocks will read; nobody reads the last."""
    net = Net()
    list(rollout(net))
    for k in range(BLOCKS - 1):
        found = levels(net, k)
        assert found[:4] == ROUNDED[:4], f"passes of block {k} at levels {found}, not {ROUNDED}"
        assert found[4:] == [0.0], (
            f"after its passes block {k} is refreshed at levels {found[4:]}, not once at 0: the "
            f"cache holds the keys of a noisy block"
        )
    found = levels(net, BLOCKS - 1)
    assert found == ROUNDED[:4], f"the last block needs no refresh, its passes are at {found}"


@pytest.mark.points(1, "rollout")
def test_the_refresh_sees_the_finished_block():
    """What later blocks remember is what was handed out, or the given history instead."""
    net = Net()
    blocks = list(rollout(net))
    for block in blocks[:-1]:
        refresh = [p for p in net.passes if p.block == block.index][-1]
        assert all(map(torch.equal, refresh.x, block[1:])), (
            f"the cache is filled from something else than finished block {block.index}: the "
            f"refresh must see the clean block"
        )
    net.passes.clear()
    list(rollout(net, history=[x + 5 for x in net.clip]))
    refresh = net.passes[4]
    assert all(torch.equal(x, y + 5) for x, y in zip(refresh.x, net.share(0))), (
        "a given history is ignored: it is to be remembered instead of what was generated"
    )


@pytest.mark.points(1, "rollout")
def test_the_cache_moves_on_once_a_block():
    """During all passes and the refresh of block k the cache stands at block k."""
    net = Net()
    list(rollout(net, window=20))
    for i, p in enumerate(net.passes):
        assert p.cache == p.block, (
            f"during pass {i % 5} of block {p.block} the cache stands at block {p.cache}: it moves "
            f"on once, behind the refresh"
        )
        assert p.window == 20, "the window is not handed on to the cache"
        assert p.text == f"text {p.block}", f"block {p.block} reads the prompt of another one"


@pytest.mark.points(1, "rollout")
def test_no_gradient_crosses_from_block_to_block():
    """Only a block's last pass is recorded; the refresh is not."""
    net = Net()
    blocks = list(rollout(net))
    for k in range(BLOCKS):
        found = [p.has_grad for p in net.passes if p.block == k]
        assert found[3], f"the last pass of block {k} carries no gradient"
        assert not any(found[:3]), f"gradient everywhere: passes of block {k} are {found}"
        assert not any(found[4:]), (
            f"the refresh of block {k} is recorded for a gradient, which would reach across blocks"
        )
    assert blocks[1].video.requires_grad, "what is handed out carries no gradient"


@pytest.mark.points(1, "rollout")
def test_a_finished_block_is_not_kept_waiting():
    """It is handed over after its last pass; the refresh comes when the next is asked for."""
    net = Net()
    block = next(iter(rollout(net)))
    assert block.index == 0, f"the first block has index {block.index}"
    assert len(net.passes) == 4, (
        f"block 0 is handed over after {len(net.passes)} passes, not 4: its refresh, or all other "
        f"blocks, came first"
    )


@pytest.mark.points(1, "rollout")
def test_all_blocks_end_at_the_same_exit_pass():
    """Given exit_step 1: two passes and the refresh, for every block."""
    net = Net()
    list(rollout(net, exit_step=1))
    for k in range(BLOCKS):
        right = ROUNDED[:2] + [0.0] * (k < BLOCKS - 1)
        assert levels(net, k) == right, (
            f"with exit_step=1 block {k} has passes at {levels(net, k)}, not {right}: one exit "
            f"step for all blocks"
        )


def rolled(seed, **options):
    net = Net(blocks=6)
    generator = torch.Generator().manual_seed(seed)
    return net, self_forcing.rollout_clip(net, None, CAPTIONS, generator, **options)


@pytest.mark.points(1, "rollout_clip")
def test_a_rollout_ends_at_one_random_pass():
    """Drawn once, for all blocks and clips; another seed, another pass."""
    seen = set()
    for seed in range(12):
        net, _ = rolled(seed)
        found = {len([s for s in levels(net, k) if s]) for k in range(6)}
        assert len(found) == 1, f"exit steps differ between blocks: {sorted(found)} passes"
        seen |= found
    assert len(seen) > 1, f"the exit step is never drawn: always {seen} passes"
    assert max(seen) <= 4 and seen >= {1, 4}, f"numbers of passes drawn: {sorted(seen)}"


@pytest.mark.points(1, "rollout_clip")
def test_clips_are_whole_and_as_many_as_captions():
    """Five seconds of both streams with a gradient, one prompt for all blocks, the given window."""
    net, (video, audio) = rolled(0, window=20)
    assert video.shape == (2, 64, CFG.video_channels), f"video is {tuple(video.shape)}"
    assert audio.shape == (2, 126, CFG.audio_channels), f"audio is {tuple(audio.shape)}"
    assert video.requires_grad, "no gradient: there would be nothing to train on"
    assert net.projected == 1, f"captions are projected {net.projected} times, once is enough"
    assert {p.window for p in net.passes} == {20}, "the window is not handed on"
