"""A change of the prompt in the toy: what is forgotten, and which passes are guided."""

from dataclasses import replace

import pytest
import torch
from helpers import MERGED, PAPER, assert_same, differ, random_model, random_text, tiny
from test_faster import Counting, assert_bitwise

import config
import generate
import rollout
from film.passes import PassPictures
from kv_cache import CachedView
from masks import block_span, clip_span
from plumbing.stopwatch import Stopwatch
from toy.switch import SCALE, Switching

SIGMAS, BLOCKS, AT = (1.0, 0.9, 0.7, 0.4, 0.0), 7, 3
LAYOUTS = [(PAPER, 2), (MERGED, 1)]


@torch.no_grad()
def stream(net, texts, window, at=AT, clips=1, seed=0):
    """The clip of a rollout whose text changes before block `at`."""
    view = CachedView(net.cfg, BLOCKS, window)
    generators = [torch.Generator().manual_seed(seed + b) for b in range(clips)]
    return rollout.whole_clip(
        rollout.rollout(
            net, lambda k: texts[k >= at], BLOCKS, SIGMAS, generators, clips, view
        )
    )  # fmt: skip


def example(cfg, clips=1):
    net = random_model(tiny(cfg, num_sinks=2, num_layers=1))
    with torch.no_grad():
        return net, [random_text(net, net.cfg, clips=clips) for _ in range(2)]


def before(clip, k, cfg):
    """Video and audio of a clip before block k."""
    span = clip_span(k, cfg)
    return clip[0][:, : len(span.video) * cfg.tokens_per_frame], clip[1][:, : len(span.audio)]


@torch.no_grad()
def slow(net, texts, window):
    """The specification: forget, and guide two blocks at levels below 0.8, written out."""
    cfg, generator, blocks = net.cfg, torch.Generator().manual_seed(0), []
    view, like = CachedView(cfg, BLOCKS, window), next(net.parameters())
    for k in range(BLOCKS):
        span, text = block_span(k, cfg), texts[k >= AT]
        if k == AT:
            view.forget()
        x = rollout.model.draw_noise(1, span, cfg, generator, None, like.dtype)
        for s, lower in zip(SIGMAS, SIGMAS[1:]):
            level = like.new_full((1,), s)
            x0 = rollout.model.predict_x0(net, *x, level, level, text, span, view)
            if AT <= k < AT + 2 and s in (0.7, 0.4):
                old = rollout.model.predict_x0(net, *x, level, level, texts[0], span, view)
                x0 = [o + SCALE * (n - o) for o, n in zip(old, x0)]
            if lower:
                noise = rollout.model.draw_noise(1, span, cfg, generator, None, like.dtype)
                x = [(1 - lower) * c + lower * n for c, n in zip(x0, noise)]
        blocks.append(rollout.Block(k, *x0))
        rollout.refresh(net, x0, text, span, view)
        view.next_block()
    return rollout.whole_clip(blocks)


@pytest.mark.parametrize("cfg, window", LAYOUTS)
def test_a_switch_does_what_its_text_says(cfg, window):
    """Every block after it equals the slow specification, whichever pass writes keys last."""
    net, texts = example(cfg)
    assert_same(stream(Switching(net), texts, window), slow(net, texts, window))


@pytest.mark.parametrize("cfg, window", LAYOUTS)
def test_before_the_switch_nothing_changes_by_a_bit(cfg, window):
    """Blocks before it, and streams without a change, are those of the student alone."""
    net, texts = example(cfg)
    plain, switched = stream(net, texts, window), stream(Switching(net), texts, window)
    assert_bitwise(before(plain, AT, net.cfg), before(switched, AT, net.cfg))
    assert differ(before(plain, AT + 1, net.cfg), before(switched, AT + 1, net.cfg))
    assert_bitwise(stream(net, texts, window, 99), stream(Switching(net), texts, window, 99))


def test_clips_of_a_batch_switch_as_they_do_alone():
    """Row b of a batch is the clip of its seed and its own texts."""
    net, texts = example(PAPER, clips=2)
    both = stream(Switching(net), texts, 2, clips=2)
    for b in range(2):
        rows = [rows_of(text, b) for text in texts]
        alone = stream(Switching(net), rows, 2, seed=b)
        assert_same([x[b : b + 1] for x in both], alone)


def rows_of(text, b):
    """Keys and values of caption b alone."""
    pick = [tuple(tuple(x[b : b + 1] for x in kv) for kv in half) for half in text[:2]]
    return type(text)(*pick, text.mask)


@pytest.mark.parametrize("cfg, window", LAYOUTS)
def test_recorded_passes_switch_bit_by_bit(cfg, window):
    """Where less is read after forgetting, other passes are recorded; texts alternate."""
    net, texts = example(cfg)
    recorded = Counting(net)
    assert_bitwise(
        stream(Switching(net), texts, window), stream(Switching(recorded), texts, window)
    )
    assert recorded.counts["replayed"]


def cost_of(net, cues, seconds=6, **options):
    """Number of passes of a stream."""
    passes = []
    hook = net.register_forward_hook(lambda *_: passes.append(1))
    for _ in generate.stream(net, cues, seconds, **options):
        pass
    hook.remove()
    return len(passes)


@pytest.mark.parametrize("steps, more", [(4, 4), (3, 2), (2, 2), (1, 0)])
def test_a_switch_of_a_stream_costs_four_passes(steps, more):
    """With fewer steps, those of them below the level; the last refresh never runs."""
    net = random_model(tiny(config.TOY, num_layers=1), torch.float32)
    cues, blocks = [generate.Cue(0, "red"), generate.Cue(2, "blue")], 7
    usual = blocks * (steps + 1) - 1
    assert cost_of(net, cues[:1], steps=steps) == usual
    assert cost_of(net, cues, steps=steps) == usual + more


def test_watchers_tell_repeated_passes_from_others():
    """The stopwatch counts them apart; the pictures of a block are the guided estimates."""
    net = random_model(replace(config.TOY, num_layers=1))
    watch, pictures, clean, before = Stopwatch(), PassPictures(net, 4), {}, [None]
    watch.watch_passes(net, 4)

    def record(net, inputs, velocities):
        video, _, sigma, *_ = inputs
        x0 = (video - sigma * velocities[0])[:, -net.cfg.tokens_per_frame :]
        if video is before[0]:
            x0 = clean[float(sigma)] + SCALE * (x0 - clean[float(sigma)])
        clean[float(sigma)], before[0] = x0, video

    net.register_forward_hook(record)
    for _ in generate.stream(net, [generate.Cue(0, "red"), generate.Cue(2, "blue")], 5):
        watch.block_made()
        watch.block_decoded()
        assert_same(pictures.estimates, [clean[level] for level in net.cfg.sigmas[:-1]])
    assert watch.more_passes[:6] == [0, 0, 0, 2, 2, 0]
    refreshes = [block for block, *_ in watch.marks["refresh"]]
    assert refreshes == [1, 2, 3, 4, 5]  # each runs when the next block is asked for


def test_at_full_size_a_new_prompt_is_only_read():
    """No pass is added for a config that is no toy."""
    net = random_model(tiny(PAPER, num_layers=1), torch.float32)
    cues = [generate.Cue(0, "red"), generate.Cue(2, "blue")]
    assert not net.cfg.is_toy and cost_of(net, cues) == cost_of(net, cues[:1])


def test_repeating_the_new_prompt_does_not_end_its_guidance():
    """A cue with the same words a second later changes no latent."""
    net = random_model(tiny(PAPER))
    cues = [generate.Cue(0, "red"), generate.Cue(2, "blue")]
    once, twice = (
        rollout.whole_clip(list(generate.stream(net, more, 5)))
        for more in (cues, [*cues, generate.Cue(3, "blue")])
    )
    assert all(map(torch.equal, once, twice))
