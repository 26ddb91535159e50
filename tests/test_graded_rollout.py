"""Graded: denoising in a few steps, and the loop over blocks: passes, refresh, cache, gradient.

The network is a stand-in that knows the clean clip and records every pass.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import config
import rollout
from kv_cache import CachedView
from masks import block_span, clip_span

CFG = replace(config.TOY, num_layers=1, height=16, width=16)  # 4 tokens per video frame
SIGMAS, BLOCKS = CFG.sigmas, 3
ROUNDED = [round(s, 3) for s in SIGMAS]  # 1, .906, .727, .421, 0


class Net(nn.Module):
    """Predicts the clean block times a weight, plus a small part of its noisy input."""

    def __init__(self, blocks=BLOCKS, part=0.01):
        super().__init__()
        self.cfg, self.passes, self.projected, self.part = CFG, [], 0, part
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

    def block(self, k):
        """Return block k of the clip, cut out by hand."""
        video = slice(0, 4) if k == 0 else slice(4 + 12 * (k - 1), 4 + 12 * k)
        audio = slice(0, 1) if k == 0 else slice(1 + 25 * (k - 1), 1 + 25 * k)
        return self.clip[0][:, video], self.clip[1][:, audio]

    def forward(self, video, audio, sigma_video, sigma_audio, text, span, view):
        k = [block_span(k, CFG) for k in range(6)].index(span)
        self.passes.append(
            SimpleNamespace(
                x=(video, audio), sigmas=(sigma_video, sigma_audio), block=k, text=text, view=view,
                sigma=round(float(sigma_video[0]), 3), cache=view.block, window=view.window,
                has_grad=torch.is_grad_enabled(),
            )
        )  # fmt: skip
        velocities = []
        for x, clean, s in zip((video, audio), self.block(k), (sigma_video, sigma_audio)):
            x0, s = self.weight * clean + self.part * x, s[:, None, None]
            velocities.append(torch.where(s > 0, (x - x0) / s, 0.0))
        return velocities


def levels(net, block):
    """Return the noise levels of all passes over a block."""
    return [p.sigma for p in net.passes if p.block == block]


@pytest.mark.points(1, "whole_clip")
def test_blocks_are_joined_in_order_for_each_stream():
    """Along the tokens, not along the clips."""
    net = Net()
    blocks = [rollout.Block(k, *net.block(k)) for k in range(BLOCKS)]
    for name, found, right in zip(("video", "audio"), rollout.whole_clip(blocks), net.clip):
        shape, expected = tuple(found.shape), tuple(right.shape)
        assert shape == expected, f"{name} is {shape}, not {expected}"
        assert torch.equal(found, right), f"the blocks of {name} are not in order"


@pytest.mark.points(1, "block_of")
def test_a_block_is_cut_out_at_its_place():
    """A video frame is tokens_per_frame tokens, an audio frame is one."""
    net = Net()
    for k in range(BLOCKS):
        found = rollout.block_of(net.clip, k, CFG)
        for name, x, right, per in zip(("video", "audio"), found, net.block(k), (4, 1)):
            shape, expected = tuple(x.shape), tuple(right.shape)
            wrong = f"{name} of block {k} is {shape}, not {expected}"
            assert shape == expected, f"{wrong}: a frame has {per} tokens"
            assert torch.equal(x, right), f"{name} of block {k} is cut out at the wrong place"


@pytest.mark.points(1, "refresh")
def test_the_refresh_is_one_pass_over_the_clean_block():
    """At noise level 0 of both streams, without gradient; the cache does not move on."""
    net, view = Net(), CachedView(CFG, BLOCKS)
    x0 = [x.clone().requires_grad_() for x in net.block(0)]
    rollout.refresh(net, x0, "text", block_span(0, CFG), view)
    assert levels(net, 0) == [0.0], f"the refresh is one pass at 0, not passes at {levels(net, 0)}"
    (p,) = net.passes
    assert all(len(s) == 1 and not s.any() for s in p.sigmas), "one level 0 per clip and stream"
    assert all(map(torch.equal, p.x, x0)), "the refresh does not see the clean block"
    assert (p.text, p.view) == ("text", view), "the refresh needs the block's text and the view"
    assert not p.has_grad, "the refresh records a gradient"
    assert view.block == 0, "only the loop moves the cache on"


def denoised(exit_step=None):
    """Denoise block 1 of 16 clips: the network, its result, and the noise at the start."""
    net, span = Net(part=0.0), block_span(1, CFG)
    noise = [torch.randn(16, *x.shape[1:]) for x in net.block(1)]
    generator = torch.Generator().manual_seed(5)
    view = CachedView(CFG, BLOCKS)
    x0 = rollout.denoise(net, noise, SIGMAS, None, span, view, generator, exit_step)
    return net, x0, noise


@pytest.mark.points(1, "denoise")
def test_four_levels_are_four_passes():
    """Each level except the last, 0, has one pass, at the same level for both streams."""
    net, _, noise = denoised()
    found, right = levels(net, 1), ROUNDED[:-1]
    assert found == right, f"passes at levels {found}, expected {right}"
    assert all(torch.equal(*p.sigmas) for p in net.passes), "video and audio at different levels"
    assert all(map(torch.equal, net.passes[0].x, noise)), "the first pass does not see the noise"


@pytest.mark.points(1, "denoise")
def test_fresh_noise_takes_the_estimate_to_the_next_level():
    """Between passes: (1 - s) x0 + s noise, with noise that was not used before."""
    net, _, start = denoised()
    seen = [start]
    for i, p in enumerate(net.passes[1:], 1):
        noise = [(x - (1 - SIGMAS[i]) * x0) / SIGMAS[i] for x, x0 in zip(p.x, net.block(1))]
        for stream, n in zip(("video", "audio"), noise):
            wrong = f"pass {i} sees {stream} that is not (1 - s) x0 + s noise"
            is_noise = abs(float(n.std()) - 1) < 0.1 and abs(float(n.mean())) < 0.1
            assert is_noise, f"{wrong} for its level s = {SIGMAS[i]:.3f}"
        for earlier in seen:
            is_new = (noise[0] - earlier[0]).abs().max() > 0.1
            assert is_new, f"pass {i} sees noise that was used before: draw fresh noise"
        seen.append(noise)


@pytest.mark.points(1, "denoise")
def test_the_result_is_the_estimate_of_the_last_pass():
    """No noise is added after it."""
    net, x0, _ = denoised()
    for found, right in zip(x0, net.block(1)):
        away = float((found - right).detach().abs().max())
        assert away < 1e-4, f"the result differs by {away:.2f} from the last x0: noise was added"


@pytest.mark.points(1, "denoise")
def test_only_the_exit_pass_carries_a_gradient():
    """Earlier passes only produce its input; under no_grad, no pass carries a gradient."""
    for exit_step, passes in ((None, 4), (1, 2)):
        net, x0, _ = denoised(exit_step)
        found = [p.has_grad for p in net.passes]
        assert len(found) == passes, f"exit_step={exit_step} takes {len(found)} passes"
        assert not any(found[:-1]), f"too many passes record a gradient: {found}"
        assert found[-1] and x0[0].requires_grad, "the exit pass carries no gradient"
    with torch.no_grad():
        net, _, _ = denoised()
    assert not any(p.has_grad for p in net.passes), "gradients are switched on under no_grad"


def roll(net, **options):
    """Start a rollout of three blocks; every block has a text of its own."""
    generator = torch.Generator().manual_seed(1)
    return rollout.rollout(net, lambda k: f"text {k}", BLOCKS, SIGMAS, generator, **options)


@pytest.mark.points(1, "rollout")
def test_a_block_takes_four_passes_and_a_refresh_but_the_last_block_no_refresh():
    """The levels of the list, then 0 for the keys that later blocks attend to."""
    net = Net()
    list(roll(net))
    for k in range(BLOCKS - 1):
        found = levels(net, k)
        assert found[:4] == ROUNDED[:4], f"passes of block {k} at levels {found}, not {ROUNDED}"
        wrong = f"after its passes block {k} is refreshed at levels {found[4:]}, not once at 0"
        assert found[4:] == [0.0], f"{wrong}: the cache keeps the keys of a noisy block"
    found = levels(net, BLOCKS - 1)
    assert found == ROUNDED[:4], f"the last block needs no refresh, but has passes at {found}"


@pytest.mark.points(1, "rollout")
def test_the_refresh_sees_the_finished_block():
    """The cache holds the block that was yielded, or the same block of a given history."""
    net = Net()
    blocks = list(roll(net))
    for block in blocks[:-1]:
        refresh = [p for p in net.passes if p.block == block.index][-1]
        is_cached = all(map(torch.equal, refresh.x, block[1:]))
        assert is_cached, f"the refresh does not see the finished block {block.index}"
    net.passes.clear()
    list(roll(net, history=[x + 5 for x in net.clip]))
    refresh = net.passes[4]
    is_cached = all(torch.equal(x, y + 5) for x, y in zip(refresh.x, net.block(0)))
    assert is_cached, "the given history is ignored: cache it instead of the generated blocks"


@pytest.mark.points(1, "rollout")
def test_the_cache_moves_on_once_per_block():
    """During all passes and the refresh of block k, the cache stands at block k."""
    net, view = Net(), CachedView(CFG, BLOCKS, window=20)
    list(roll(net, view=view))
    for i, p in enumerate(net.passes):
        where = f"during pass {i % 5} of block {p.block} the cache stands at block {p.cache}"
        assert p.cache == p.block, f"{where}: it must move on once, after the refresh"
        assert p.view is view and p.window == 20, "the given view is not used"
        assert p.text == f"text {p.block}", f"block {p.block} reads the prompt of another block"
    net.passes.clear()
    list(roll(net))
    assert min(p.window for p in net.passes) >= BLOCKS - 2, "the default view evicts blocks"


@pytest.mark.points(1, "rollout")
def test_no_gradient_crosses_from_block_to_block():
    """Only the last pass of a block carries a gradient; the refresh does not."""
    net = Net()
    blocks = list(roll(net))
    for k in range(BLOCKS):
        found = [p.has_grad for p in net.passes if p.block == k]
        assert found[3], f"the last pass of block {k} carries no gradient"
        assert not any(found[:3]), f"too many passes of block {k} record a gradient: {found}"
        refresh = f"the refresh of block {k} records a gradient"
        assert not any(found[4:]), f"{refresh}, which would cross to later blocks"
    assert blocks[1].video.requires_grad, "the yielded block carries no gradient"


@pytest.mark.points(1, "rollout")
def test_a_finished_block_is_yielded_at_once():
    """After its last pass; its refresh comes when the next block is asked for."""
    net = Net()
    block = next(iter(roll(net)))
    assert block.index == 0, f"the first block has index {block.index}"
    found = len(net.passes)
    why = "its refresh, or other blocks, came first"
    assert found == 4, f"block 0 is yielded after {found} passes, not 4: {why}"


@pytest.mark.points(1, "rollout")
def test_blocks_end_at_the_given_exit_steps():
    """Exit step e means e + 1 passes, then the refresh."""
    for exit_steps in ([1, 1, 1], [1, 0, 2]):
        net = Net()
        list(roll(net, exit_steps=exit_steps))
        for k, exit_step in enumerate(exit_steps):
            found, right = levels(net, k), ROUNDED[: exit_step + 1] + [0.0] * (k < BLOCKS - 1)
            block = f"with exit_steps={exit_steps} block {k}"
            assert found == right, f"{block} has passes at {found}, expected {right}"
