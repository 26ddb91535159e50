"""Graded: denoising in a few steps, and the loop over blocks: passes, refresh, cache, gradient.

The network is a stand-in that knows the clean clips and records every pass.
"""

import functools
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from grading import check, check_dtype, close, fill, random_tensor, watched
from torch import nn

import config
import model
import rollout
from kv_cache import CachedView
from masks import block_span

CFG = replace(
    config.TOY, num_layers=1, height=8, width=16, video_channels=24, audio_channels=10, num_sinks=2
)  # 2 tokens per video frame
RELEASED = replace(
    CFG, prefix_video_frames=4, prefix_audio_frames=26, num_sinks=0, sigmas=config.THREE_STEPS
)
CLIPS, BLOCKS, MOST = 3, 3, 9
STREAMS = "video", "audio"
SIGMAS = 1.0, 0.8, 0.6, 0.3, 0.0  # not those of the config: they are an argument


def rounded(sigmas):
    return [round(s, 3) for s in sigmas]


def places(k, cfg):
    """Count the tokens of block k of a clip by hand: slices of video and audio."""
    found = []
    for prefix, step, tokens in (
        (cfg.prefix_video_frames, 3, cfg.tokens_per_frame), (cfg.prefix_audio_frames, 25, 1)
    ):  # fmt: skip
        start = 0 if k == 0 else prefix + (k - 1) * step
        found.append(slice(start * tokens, (prefix + k * step) * tokens))
    return found


@functools.cache
def long_clips(cfg):
    """Make random clean clips of MOST blocks: (B, T, C) of video and of audio."""
    ends = [place.stop for place in places(MOST - 1, cfg)]
    channels = cfg.video_channels, cfg.audio_channels
    return [random_tensor(CLIPS, *size, seed=i) for i, size in enumerate(zip(ends, channels))]


def clean_clips(cfg):
    """Return the first six blocks of these clips."""
    return [x[:, : place.stop] for x, place in zip(long_clips(cfg), places(5, cfg))]


def clean_block(k, cfg=CFG):
    return [x[:, place] for x, place in zip(long_clips(cfg), places(k, cfg))]


class Net(nn.Module):
    """Predicts the clean block times a weight, plus a little of its noisy input and of its text.

    Like `OmniTransformer`, it takes noise levels (B,), (B, F) and (B, T).
    """

    def __init__(self, cfg=CFG, part=0.01, dtype=torch.float32):
        super().__init__()
        self.cfg, self.passes, self.projected, self.part = cfg, [], 0, part
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))
        self.caption_weight = nn.Parameter(torch.ones((), dtype=dtype))

    def project_text(self, video_features, audio_features=None, mask=None):
        self.projected += 1
        audio_features = video_features if audio_features is None else audio_features
        video, audio = (
            self.caption_weight * x[:, :, None] for x in (video_features, audio_features)
        )
        return model.TextKV(((video, video),), ((audio, audio),), mask)

    def forward(self, video, audio, sigma_video, sigma_audio, text, span, view, ropes=None):
        spans = [block_span(k, self.cfg) for k in range(MOST)]
        assert span in spans, f"the span of a pass is {span}, which is no block's"
        k, x = spans.index(span), (video, audio)
        shapes = [tuple(c.shape[1:]) for c in x]
        right = [tuple(c.shape[1:]) for c in clean_block(k, self.cfg)]
        assert shapes == right, f"a pass over block {k} gets tokens {shapes}, not {right}"
        sigmas = [s.view(len(s), -1) for s in (sigma_video, sigma_audio)]
        lengths = [len(s) for s in sigmas]
        assert lengths == [len(video)] * 2, f"{len(video)} clips have {lengths} noise levels"
        record = SimpleNamespace(
            x=x, sigmas=sigmas, block=k, text=text, view=view, x0=[],
            sigma=round(float(sigmas[0][0, 0]), 3), cache=view.block, window=view.window,
            has_grad=torch.is_grad_enabled(),
        )  # fmt: skip
        self.passes.append(record)
        fill(view)
        velocities, texts = [], (text and text.video, text and text.audio)
        clips = text and len(text.video[0][0])
        assert clips in (None, 1, len(video)), f"a pass over {len(video)} clips reads {clips} texts"
        for noisy, clean, s, read in zip(x, clean_block(k, self.cfg), sigmas, texts):
            x0 = self.weight * clean[: len(noisy)].to(noisy) + self.part * noisy
            if read:
                x0 = x0 + 0.01 * read[0][0].flatten(1).mean(1)[:, None, None].to(x0)
            record.x0.append(x0)
            s = s.repeat_interleave(noisy.shape[1] // s.shape[1], 1)[..., None]
            velocities.append(torch.where(s > 0, (noisy - x0) / s, 0.0))
        return velocities


def levels(net, block):
    """Return the noise levels of all passes over a block."""
    return [p.sigma for p in net.passes if p.block == block]


@pytest.mark.points(1, "whole_clip")
def test_blocks_are_joined_in_order_for_each_stream():
    """Along the tokens, not along the clips; also from a generator, with their gradient."""
    for count in (BLOCKS, 1):
        blocks = [rollout.Block(k, *clean_block(k)) for k in range(count)]
        for given in (blocks, (block for block in blocks)):
            try:
                found = rollout.whole_clip(given)
            except (RuntimeError, ValueError) as error:
                if given is blocks or isinstance(error, NotImplementedError):
                    raise
                pytest.fail(f"blocks from a generator, which can be read only once: {error}")
            assert len(found) == 2, f"a clip is video and audio, not {len(found)} things"
            for name, x, clip, end in zip(STREAMS, found, clean_clips(CFG), places(count - 1, CFG)):
                what = f"the blocks of {name} are not joined in order, along the tokens"
                check(x, clip[:, : end.stop], what, atol=0)
    learning = [b._replace(video=b.video.clone().requires_grad_()) for b in blocks]
    assert rollout.whole_clip(learning)[0].requires_grad, "the clip carries no gradient"


@pytest.mark.points(1, "block_of")
def test_a_block_is_cut_out_at_its_place():
    """A video frame is tokens_per_frame tokens, an audio frame is one; in both block layouts."""
    for cfg, k in itertools.product((CFG, RELEASED), range(4)):
        clip = [x.double().requires_grad_() for x in clean_clips(cfg)]
        found = rollout.block_of(clip, k, cfg)
        assert len(found) == 2, f"a block is video and audio, not {len(found)} things"
        for name, x, right, per in zip(STREAMS, found, clean_block(k, cfg), (2, 1)):
            wrong = f"{name} of block {k} is {tuple(x.shape)}, not {tuple(right.shape)}"
            assert x.shape == right.shape, f"{wrong}: a frame has {per} tokens"
            check_dtype(x, torch.float64, "a block has the dtype of its clip")
            is_right = torch.equal(x.float(), right)
            assert is_right, f"{name} of block {k} is cut out at the wrong place"
            assert x.requires_grad, f"{name} of block {k} carries no gradient"


@functools.cache
def text_of(k):
    """Return the keys and values of a prompt of its own for every block."""
    video, audio = (torch.full((CLIPS, 2, 1, 3), value + k) for value in (1.0, 10.0))
    return model.TextKV(((video, video),), ((audio, audio),), None)


@pytest.mark.points(1, "refresh")
def test_the_refresh_is_one_pass_over_the_clean_block():
    """At noise level 0 of all clips and both streams, without gradient; the cache stays."""
    net, view = Net(), CachedView(CFG, BLOCKS)
    x0 = [x.clone().requires_grad_() for x in clean_block(1)]
    with watched(x0):
        rollout.refresh(net, x0, text_of(1), block_span(1, CFG), view)
    assert levels(net, 1) == [0.0], f"the refresh is one pass at 0, not passes at {levels(net, 1)}"
    (p,) = net.passes
    assert not any(s.any() for s in p.sigmas), "all clips and both streams are at noise level 0"
    assert all(map(torch.equal, p.x, x0)), "the refresh does not see the clean block"
    assert p.text is text_of(1), "the refresh needs the text of its block"
    assert p.view is view, "the refresh does not go through the given view"
    assert not p.has_grad, "the refresh records a gradient"
    assert view.block == 0, "only the loop moves the cache on"


def denoised(exit_step=None, sigmas=CFG.sigmas, seed=5, dtype=torch.float32):
    """Denoise block 1 of three clips: the network, its result, and the noise at the start."""
    net, view = Net(dtype=dtype), CachedView(CFG, BLOCKS)
    noise = [random_tensor(*x.shape, seed=8 + i, dtype=dtype) for i, x in enumerate(clean_block(1))]
    generator = torch.Generator().manual_seed(seed)
    with watched(noise):
        x0 = rollout.denoise(
            net, noise, sigmas, text_of(1), block_span(1, CFG), view, generator, exit_step
        )
    for p in net.passes:
        assert p.view is view, "a pass does not go through the given view"
        assert p.text is text_of(1), "a pass does not read the given text"
        for x in p.x:
            check_dtype(x, dtype, "every pass gets tokens in the dtype of the input")
    return net, x0, noise


@pytest.mark.points(1, "denoise")
def test_each_level_above_0_is_a_pass():
    """In order, at the same level for all clips and both streams, up to the exit step."""
    for sigmas in (CFG.sigmas, config.THREE_STEPS, (1.0, 0.5, 0.0)):
        for exit_step in (None, 0, *range(1, len(sigmas) - 1)):
            net, _, noise = denoised(exit_step, sigmas)
            last = len(sigmas) - 2 if exit_step is None else exit_step
            found, right = levels(net, 1), rounded(sigmas[: last + 1])
            given = f"with levels {rounded(sigmas)} and exit_step={exit_step}"
            assert found == right, f"{given}: passes at levels {found}, expected {right}"
            for p, sigma in zip(net.passes, sigmas):
                is_shared = all((s - sigma).abs().max() < 1e-6 for s in p.sigmas)
                assert is_shared, "the clips, or video and audio, are at different levels"
            sees = all(map(torch.equal, net.passes[0].x, noise))
            assert sees, "the first pass does not see the noise"


def noises_of(net, sigmas=SIGMAS):
    """Return the noise (video, audio) that was mixed with x0 for each pass after the first."""
    mixed = []
    for before, p, s in zip(net.passes, net.passes[1:], sigmas[1:]):
        mixed.append([((x - (1 - s) * x0) / s).detach() for x, x0 in zip(p.x, before.x0)])
    return mixed


def is_noise(x):
    return abs(float(x.std()) - 1) < 0.15 and abs(float(x.mean())) < 0.2


def is_related(x, y):
    """Tell whether two arrays of noise are the same, or depend on each other."""
    return abs(float((x * y).mean())) > 0.4


@pytest.mark.points(1, "denoise")
def test_fresh_noise_takes_the_estimate_to_the_next_level():
    """Between passes: (1 - s) x0 + s noise; new for every pass and clip, from the generator."""
    denoised(dtype=torch.bfloat16)
    net, _, start = denoised(sigmas=SIGMAS)
    seen = [start]
    for i, noise in enumerate(noises_of(net), 1):
        for name, n in zip(STREAMS, noise):
            wrong = f"pass {i} sees {name} that is not (1 - s) x0 + s noise"
            assert is_noise(n), f"{wrong} for its level s = {SIGMAS[i]:.3f}"
            for a, b in itertools.combinations(n, 2):
                assert not is_related(a, b), f"pass {i}: two clips get the same noise of {name}"
        for earlier in seen:
            is_old = any(map(is_related, noise, earlier))
            assert not is_old, f"pass {i} sees noise that was used before: draw fresh noise"
        seen.append(noise)
    same, other = (noises_of(denoised(sigmas=SIGMAS, seed=s)[0]) for s in (5, 6))
    repeats = all(close(a, b) for x, y in zip(seen[1:], same) for a, b in zip(x, y))
    assert repeats, "the same generator gives other noise the second time"
    differs = not any(is_related(a, b) for x, y in zip(seen[1:], other) for a, b in zip(x, y))
    assert differs, "another seed of the generator gives the same noise"


@pytest.mark.points(1, "denoise")
def test_the_result_is_the_estimate_of_the_last_pass():
    """No noise is added after it, and it has the dtype of the input."""
    for exit_step, dtype in ((None, torch.float32), (0, torch.float64), (2, torch.float64)):
        net, x0, _ = denoised(exit_step, dtype=dtype)
        assert len(x0) == 2, f"the result is video and audio, not {len(x0)} things"
        for found, right in zip(x0, net.passes[-1].x0):
            away = float((found - right).detach().abs().max())
            wrong = f"the result differs by {away:.2f} from the last x0"
            assert away < 1e-4, f"{wrong}: noise was added, or it is of another pass"
            check_dtype(found, dtype, "the result has the dtype of the input")


@pytest.mark.points(1, "denoise")
def test_only_the_exit_pass_carries_a_gradient():
    """Earlier passes only produce its input; under no_grad, no pass carries a gradient."""
    for exit_step, passes in ((None, 4), (1, 2), (0, 1)):
        net, x0, _ = denoised(exit_step)
        found = [p.has_grad for p in net.passes]
        assert len(found) == passes, f"exit_step={exit_step} takes {len(found)} passes"
        assert not any(found[:-1]), f"too many passes record a gradient: {found}"
        both = found[-1] and all(x.requires_grad for x in x0)
        assert both, "the exit pass carries no gradient"
    with torch.no_grad():
        net, x0, _ = denoised()
    assert not any(p.has_grad for p in net.passes), "gradients are switched on under no_grad"


def roll(net, blocks=BLOCKS, seed=1, sigmas=CFG.sigmas, **options):
    """Start a rollout of three clips; every block has a text of its own."""
    generator = torch.Generator().manual_seed(seed)
    options = dict(batch=CLIPS) | options
    return rollout.rollout(net, text_of, blocks, sigmas, generator, **options)


@pytest.mark.points(1, "rollout")
def test_a_block_takes_its_passes_and_a_refresh():
    """The levels of the list, then 0 for the keys that later blocks attend to."""
    for cfg, sigmas in ((CFG, SIGMAS), (CFG, CFG.sigmas), (RELEASED, config.THREE_STEPS)):
        net, passes = Net(cfg), len(sigmas) - 1
        with watched(clean_clips(cfg)):
            blocks = list(roll(net, sigmas=sigmas))
        indices = [block.index for block in blocks]
        assert indices == [*range(BLOCKS)], f"{BLOCKS} blocks have the indices {indices}"
        order = [p.block for p in net.passes]
        assert order == sorted(order), f"the passes are over blocks {order}, not block after block"
        for k in range(BLOCKS):
            found, right = levels(net, k), rounded(sigmas[:-1])
            assert found[:passes] == right, f"passes of block {k} at levels {found}, not {right}"
            rest = found[passes:]
            wrong = f"after its passes block {k} is refreshed at levels {rest}, not once at 0"
            is_last = k == BLOCKS - 1  # no block reads the keys of the last one
            is_refreshed = rest == [0.0] or (is_last and not rest)
            assert is_refreshed, f"{wrong}: the cache keeps the keys of a noisy block"
    net = Net()
    (block,) = rollout.rollout(net, lambda k: None, 1, CFG.sigmas, torch.Generator())
    assert len(block.video) == 1, f"the default is one clip, not {len(block.video)}"


@pytest.mark.points(1, "rollout")
def test_every_block_and_clip_starts_from_its_own_noise():
    """Drawn from the given generator, in the dtype of the network's weights."""
    starts = {}
    for seed in (1, 2):
        net = Net(dtype=torch.float64)
        with watched():
            blocks = list(roll(net, blocks=4, seed=seed))
        starts[seed] = [next(p.x for p in net.passes if p.block == k) for k in range(4)]
        repeated = roll(Net(dtype=torch.float64), blocks=4, seed=seed)
        is_same = all(torch.equal(x.video, y.video) for x, y in zip(blocks, repeated))
        assert is_same, "the same generator gives another rollout the second time"
        check_dtype(blocks[1].video, torch.float64, "blocks have the dtype of the network")
    for k, noise in enumerate(starts[1]):
        for name, n, other in zip(STREAMS, noise, starts[2][k]):
            assert len(n) == CLIPS, f"batch={CLIPS}, but {name} of block {k} has {len(n)} clips"
            if k:
                assert is_noise(n), f"{name} of block {k} does not start as pure noise"
                is_new = not is_related(n, other)
                assert is_new, "another seed of the generator gives the same noise"
                alike = any(is_related(a, b) for a, b in itertools.combinations(n, 2))
                assert not alike, f"two clips of a batch start from the same noise of {name}"
    for (j, x), (k, y) in itertools.combinations(enumerate(starts[1][1:], 1), 2):
        is_new = not any(map(is_related, x, y))
        assert is_new, f"blocks {j} and {k} start from the same noise"


@pytest.mark.points(1, "rollout")
def test_the_refresh_sees_the_finished_block():
    """The cache holds the block that was yielded, or the same block of a given history."""
    net = Net()
    blocks = list(roll(net))
    for block in blocks[:-1]:
        refresh = [p for p in net.passes if p.block == block.index][-1]
        is_cached = all(map(torch.equal, refresh.x, block[1:]))
        assert is_cached, f"the refresh does not see the finished block {block.index}"
    net = Net()
    history = [x + 5 for x in clean_clips(CFG)]
    with watched(history):
        generated = list(roll(net, blocks=5, history=history))
    for k in range(4):
        (refresh,) = [p for p in net.passes if p.block == k and p.sigma == 0]
        is_cached = all(torch.equal(x, y + 5) for x, y in zip(refresh.x, clean_block(k)))
        ignored = f"block {k}: the given history is ignored"
        assert is_cached, f"{ignored}: cache it instead of the generated blocks"
    for block in generated:
        is_own = all(close(x, y, 0.5) for x, y in zip(block[1:], clean_block(block.index)))
        assert is_own, "with a history, the generated blocks must be yielded all the same"


@pytest.mark.points(1, "rollout")
def test_the_cache_moves_on_once_per_block():
    """During all passes and the refresh of block k, the cache stands at block k."""
    net, view = Net(), CachedView(CFG, BLOCKS, window=20)
    list(roll(net, view=view))
    for i, p in enumerate(net.passes):
        where = f"during pass {i % 5} of block {p.block} the cache stands at block {p.cache}"
        assert p.cache == p.block, f"{where}: it must move on once, after the refresh"
        assert p.view is view and p.window == 20, "the given view is not used"
        assert p.text is text_of(p.block), f"block {p.block} reads the prompt of another block"
    net = Net()
    list(roll(net, blocks=MOST, exit_steps=[0] * MOST))
    assert len({id(p.view) for p in net.passes}) == 1, "all blocks share one cache"
    assert min(p.window for p in net.passes) >= MOST - 2, "the default view evicts blocks"


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
        for name, x in zip(STREAMS, blocks[k][1:]):
            assert x.requires_grad, f"{name} of the yielded block {k} carries no gradient"
    with torch.no_grad():
        blocks = list(roll(Net()))
    assert not blocks[0].video.requires_grad, "gradients are switched on under no_grad"


@pytest.mark.points(1, "rollout")
def test_a_finished_block_is_yielded_at_once():
    """After its last pass; its refresh comes when the next block is asked for."""
    net = Net()
    blocks = roll(net)
    assert not net.passes, "passes run before a block is asked for"
    for k, block in enumerate(blocks):
        assert block.index == k, f"block {k} has index {block.index}"
        found, right = len(net.passes), 4 + 5 * k
        late = f"block {k} is yielded after {found} passes, not {right}"
        assert found == right, f"{late}: its refresh, or other blocks, came first"
        was_enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(True)  # or it stays disabled for the next test
        assert was_enabled, "gradients stay disabled for the caller between two blocks"


@pytest.mark.points(1, "rollout")
def test_blocks_end_at_the_given_exit_steps():
    """Exit step e means e + 1 passes, then the refresh."""
    for exit_steps in ([1, 1, 1], [1, 0, 2], (0, 3, 0), [3, 1, 0]):
        net = Net()
        list(roll(net, exit_steps=exit_steps))
        for k, exit_step in enumerate(exit_steps):
            found = [s for s in levels(net, k) if s]
            right = rounded(CFG.sigmas[: exit_step + 1])
            block = f"with exit_steps={exit_steps} block {k}"
            assert found == right, f"{block} has passes at {found}, expected {right}"
