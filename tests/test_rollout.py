"""The rollout: passes, levels, the refresh, gradients, and agreement with a slow re-run."""

import pytest
import torch
from helpers import PAPER, block_rows, differ, random_model, tiny
from test_kv_cache import EvictingView

import config
import model
import rollout
from kv_cache import CachedView
from masks import SITES, block_span, clip_span

CFG = tiny(PAPER, num_sinks=4)
SIGMAS, BLOCKS = CFG.sigmas, 4
EXACT = dict(atol=1e-9, rtol=0)  # float64, outputs of order 1 to 10, five passes a block


class Watched:
    """A random model in float64 that records every pass."""

    def __init__(self):
        self.net = random_model(CFG)
        self.passes = []
        self.net.register_forward_hook(self._record)
        features = torch.randn(1, 3, 9, generator=torch.Generator().manual_seed(0))
        self.features = features.double()

    def _record(self, net, args, velocities):
        video, audio, sigma_v, sigma_a, _, span, view = args
        self.passes.append(
            dict(x=(video, audio), sigma=(sigma_v, sigma_a), span=span, view=view, v=velocities,
                 has_grad=torch.is_grad_enabled(), block=getattr(view, "block", None))
        )  # fmt: skip

    def text(self, batch=1):
        return self.net.project_text(self.features.expand(batch, -1, -1))

    def rollout(self, blocks=BLOCKS, seed=3, batch=1, window=None, exit_step=None, history=None):
        """Return an iterator over blocks, and clear the record of passes."""
        self.passes.clear()
        view = CachedView(CFG, blocks, window)
        exit_steps = None if exit_step is None else [exit_step] * blocks
        text, generator = self.text(batch), torch.Generator().manual_seed(seed)
        return rollout.rollout(
            self.net, lambda k: text, blocks, SIGMAS, generator, batch, view, exit_steps, history
        )

    def levels(self):
        return [float(p["sigma"][0][0]) for p in self.passes]

    def x0(self, i):
        """Clean estimates of pass i."""
        p = self.passes[i]
        return [x - s[:, None, None] * v for x, s, v in zip(p["x"], p["sigma"], p["v"])]


@pytest.fixture
def watched():
    return Watched()


def all_equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def one_pass(net, x, sigma, text, span, view):
    """Clean estimates of x = (video, audio) by one pass at one noise level."""
    level = x[0].new_full((len(x[0]),), sigma)
    return model.predict_x0(net, *x, level, level, text, span, view)


# ---- passes and levels ----


def test_a_block_takes_four_passes_and_a_refresh_the_last_one_no_refresh(watched):
    """Four levels, then 0 for the refresh; no block reads the last one, so it has no refresh."""
    list(watched.rollout())
    expected = [*SIGMAS] * (BLOCKS - 1) + [*SIGMAS[:-1]]
    assert watched.levels() == pytest.approx(expected)
    assert len(watched.passes) == 5 * BLOCKS - 1


def test_every_pass_is_about_one_block_and_the_loop_moves_on(watched):
    """Passes 0 to 4 are block 0, 5 to 9 block 1, by their spans and by the cache's count."""
    list(watched.rollout())
    for i, p in enumerate(watched.passes):
        assert p["span"] == block_span(i // 5, CFG)
        assert p["block"] == i // 5


def test_both_streams_of_a_pass_have_the_same_level(watched):
    """Each pass has one noise level, for video and audio."""
    list(watched.rollout())
    assert all(all_equal(*([s] for s in p["sigma"])) for p in watched.passes)


def test_a_finished_block_is_not_kept_waiting(watched):
    """A block is yielded after its last pass; its refresh runs when the next is requested."""
    blocks = watched.rollout()
    next(blocks)
    assert len(watched.passes) == 4
    next(blocks)
    assert len(watched.passes) == 9


def test_the_last_pass_is_not_renoised(watched):
    """A block is the clean estimate of its last pass, and the refresh gets exactly this block."""
    blocks = list(watched.rollout())
    for k, block in enumerate(blocks):
        assert block.index == k
        for x, y in zip(block[1:], watched.x0(5 * k + 3)):
            torch.testing.assert_close(x, y, **EXACT)
    for k, block in enumerate(blocks[:-1]):
        assert all_equal(block[1:], watched.passes[5 * k + 4]["x"])


def test_between_passes_fresh_noise_takes_the_estimate_to_the_next_level(watched):
    """First pure noise, then (1 - s) x0 + s noise; every noise is drawn anew, in order."""
    list(watched.rollout(seed=8))
    generator = torch.Generator().manual_seed(8)
    for k in range(BLOCKS):
        for i in range(4):
            noise = model.draw_noise(1, block_span(k, CFG), CFG, generator, None, torch.float64)
            seen, s = watched.passes[5 * k + i]["x"], SIGMAS[i]
            if i == 0:
                assert all_equal(seen, noise)
                continue
            for x, x0, n in zip(seen, watched.x0(5 * k + i - 1), noise):
                torch.testing.assert_close(x, (1 - s) * x0 + s * n, **EXACT)


@pytest.mark.parametrize(
    "steps, expected", [(1, [0]), (2, [0, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])]
)
def test_fewer_steps_use_levels_the_student_knows(steps, expected):
    """Levels are taken evenly from the trained list, from pure noise down to 0."""
    levels = rollout.few_step_sigmas(config.TOY, steps)
    assert levels == (*(config.TOY.sigmas[i] for i in expected), 0.0)


@pytest.mark.parametrize("steps", [0, -1, 5])
def test_other_numbers_of_steps_are_refused(steps):
    """The message says how many levels the student knows."""
    message = f"{steps} steps: the student was trained on 4; expected 1 to 4"
    with pytest.raises(ValueError, match=message):
        rollout.few_step_sigmas(config.TOY, steps)


# ---- the cache ----


def test_the_cache_holds_keys_and_values_of_clean_passes(watched):
    """The cache of a rollout equals a cache that only saw clean passes, bit by bit."""
    rolled = watched.rollout(BLOCKS)
    blocks = [next(rolled) for _ in range(BLOCKS)]
    view, clean = watched.passes[-1]["view"], CachedView(CFG, BLOCKS)
    text = watched.text()
    for block in blocks[:-1]:
        rollout.refresh(watched.net, block[1:], text, block_span(block.index, CFG), clean)
        clean.next_block()
    for ours, theirs in zip(view.layers, clean.layers):
        for site in SITES:
            n = theirs[site].slots.start  # up to where the last block is being written
            assert n > 0 and torch.equal(ours[site].k[:, :n], theirs[site].k[:, :n])
            assert torch.equal(ours[site].v[:, :n], theirs[site].v[:, :n])


@pytest.mark.parametrize("window", [None, 1])
def test_a_rollout_equals_rerunning_the_whole_prefix_with_masks(watched, window):
    """For every block and pass, one masked pass over the clean past and the noisy block, without a
    cache, gives the same velocities; window 1 evicts two blocks."""
    blocks = BLOCKS if window is None else 5
    rolled = list(watched.rollout(blocks, window=window))
    streamed, text = list(watched.passes), watched.text()
    for k in range(blocks):
        past = rollout.whole_clip(rolled[:k]) if k else ([], [])
        masks = EvictingView(CFG, k + 1, window)
        rows, span = block_rows(k, CFG), clip_span(k + 1, CFG)
        for p in streamed[5 * k : 5 * k + 4]:
            whole = [torch.cat([h, x], 1) if k else x for h, x in zip(past, p["x"])]
            sigmas = [torch.zeros(x.shape[:2], dtype=torch.float64) for x in whole]
            for s, r, level in zip(sigmas, rows, p["sigma"]):
                s[:, r] = level[:, None]
            again = watched.net(*whole, *sigmas, text, span, masks)
            for v, r, streamed_v in zip(again, rows, p["v"]):
                torch.testing.assert_close(v[:, r], streamed_v, **EXACT)


def test_a_block_depends_on_its_past(watched):
    """With the same noise, another block 0 gives another block 1: the cache is really read."""
    rolled, text = watched.rollout(2), watched.text()
    first, _ = next(rolled), next(rolled)
    noise = watched.passes[5]["x"]
    view = CachedView(CFG, 2)
    other = [x + 1 for x in first[1:]]
    rollout.refresh(watched.net, other, text, block_span(0, CFG), view)
    view.next_block()
    x0 = one_pass(watched.net, noise, 1.0, text, block_span(1, CFG), view)
    assert differ(x0, watched.x0(5))


# ---- seeds and batches ----


def test_a_seed_is_a_stream(watched):
    """The same seed gives the same bits, another seed other blocks, from the first one on."""
    one, same, other = (list(watched.rollout(seed=s)) for s in (3, 3, 4))
    for a, b, c in zip(one, same, other):
        assert all_equal(a[1:], b[1:]) and differ(a[1:], c[1:])


def test_a_longer_stream_begins_like_a_shorter_one(watched):
    """The length of a stream does not change its first blocks."""
    for a, b in zip(watched.rollout(2), list(watched.rollout(4))):
        assert all_equal(a[1:], b[1:])


def test_streams_of_a_batch_do_not_mix(watched, monkeypatch):
    """The second of three streams equals a stream alone with the same noise."""
    draw, drawn = model.draw_noise, []

    def recording(*args):
        drawn.append(draw(*args))
        return drawn[-1]

    monkeypatch.setattr(model, "draw_noise", recording)
    together = list(watched.rollout(batch=3))
    assert [x.shape[0] for x in together[0][1:]] == [3, 3]
    monkeypatch.setattr(model, "draw_noise", lambda *args: [n[1:2] for n in next(replay)])
    replay = iter(drawn)
    for block, alone in zip(together, list(watched.rollout(batch=1))):
        for x, y in zip(block[1:], alone[1:]):
            torch.testing.assert_close(x[1:2], y, **EXACT)


def test_whole_clips_are_blocks_in_order(watched):
    """Each block has its own rows of the clip, in both streams."""
    blocks = list(watched.rollout())
    video, audio = rollout.whole_clip(blocks)
    for k, block in enumerate(blocks):
        rows_v, rows_a = block_rows(k, CFG)
        assert torch.equal(video[:, rows_v], block.video)
        assert torch.equal(audio[:, rows_a], block.audio)


def test_the_prompt_is_asked_for_once_a_block(watched):
    """text_at is called with the index of a block when the block begins."""
    asked, text = [], watched.text()
    generator = torch.Generator().manual_seed(0)
    text_at = lambda k: asked.append(k) or text  # noqa: E731
    rolled = rollout.rollout(watched.net, text_at, 3, SIGMAS, generator)
    next(rolled)
    assert asked == [0]
    assert len(list(rolled)) == 2 and asked == [0, 1, 2]


# ---- training on a rollout ----


@pytest.mark.parametrize("exit_step", [0, 1, 3])
def test_an_exit_step_returns_the_estimate_of_that_pass(watched, exit_step):
    """With exit step i, block 0 is the x0 of pass i of a full rollout; then comes the refresh."""
    list(watched.rollout(1))
    expected = watched.x0(exit_step)
    rolled = watched.rollout(2, exit_step=exit_step)
    for x, y in zip(next(rolled)[1:], expected):
        torch.testing.assert_close(x, y, **EXACT)
    list(rolled)
    levels = [*SIGMAS[: exit_step + 1], 0.0, *SIGMAS[: exit_step + 1]]
    assert watched.levels() == pytest.approx(levels)


@pytest.mark.parametrize("exit_step", [0, 2, None])
def test_only_the_exit_pass_of_a_block_is_recorded_for_a_gradient(watched, exit_step):
    """Earlier passes and the refresh run without gradients."""
    watched.net.requires_grad_(True)
    list(watched.rollout(3, exit_step=exit_step))
    last = 3 if exit_step is None else exit_step
    expected = ([False] * last + [True, False]) * 3
    assert [p["has_grad"] for p in watched.passes] == expected[:-1]


def test_without_gradient_no_pass_is_recorded(watched):
    """Under no_grad the exit pass does not switch the gradient on again."""
    watched.net.requires_grad_(True)
    with torch.no_grad():
        block = next(watched.rollout())
    assert not block.video.requires_grad and not any(p["has_grad"] for p in watched.passes)


def test_no_gradient_crosses_from_block_to_block(watched):
    """A loss on block 2 has a gradient for the weights, but none for blocks 0 and 1."""
    watched.net.requires_grad_(True)
    blocks = list(watched.rollout(3))
    loss = sum(x.square().sum() for x in blocks[2][1:])
    earlier = [x for b in blocks[:2] for x in b[1:]]
    assert all(x.requires_grad for x in earlier)
    reached = torch.autograd.grad(loss, earlier, allow_unused=True, retain_graph=True)
    assert reached == (None,) * 4
    assert torch.autograd.grad(loss, watched.net.video.proj_in.weight)[0].abs().max() > 0


def test_the_gradient_of_a_block_is_that_of_its_exit_pass_alone(watched):
    """One pass with the same inputs and the same cached past has the same gradients."""
    net = watched.net.requires_grad_(True)
    blocks = list(watched.rollout(2))
    loss = sum(x.square().sum() for x in blocks[1][1:])
    weights = {n: p for n, p in net.named_parameters() if "caption" not in n and "text" not in n}
    rolled = torch.autograd.grad(loss, weights.values(), allow_unused=True, retain_graph=True)
    exit_input = [x.detach() for x in watched.passes[8]["x"]]
    view, text = CachedView(CFG, 2), watched.text()
    with torch.no_grad():
        rollout.refresh(net, blocks[0][1:], text, block_span(0, CFG), view)
        view.next_block()
    x0 = one_pass(net, exit_input, SIGMAS[3], text, block_span(1, CFG), view)
    alone = torch.autograd.grad(
        sum(x.square().sum() for x in x0), weights.values(), allow_unused=True
    )
    for name, a, b in zip(weights, rolled, alone):
        assert (a is None) == (b is None) == (name == "sinks.tokens"), name
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_the_sinks_and_the_caption_layers_learn_from_a_rollout(watched):
    """Block 0 has a gradient for the sinks, every block has one for the caption layers."""
    net = watched.net.requires_grad_(True)
    blocks = list(watched.rollout(2))
    names = {"video.caption_1.weight", "layers.1.audio.text_attn.to_v.weight"}
    names |= {"layers.0.video.text_attn.to_k.weight"}
    for block, wanted in zip(blocks, (names | {"sinks.tokens"}, names)):
        loss = sum(x.square().sum() for x in block[1:])
        weights = {n: net.get_parameter(n) for n in wanted}
        grads = torch.autograd.grad(loss, weights.values(), retain_graph=True)
        assert all(g.abs().max() > 0 for g in grads)


def test_a_block_is_cut_out_of_the_clip_where_it_was_put_in(watched):
    """block_of undoes whole_clip."""
    blocks = list(watched.rollout())
    clip = rollout.whole_clip(blocks)
    for block in blocks:
        assert all_equal(rollout.block_of(clip, block.index, CFG), block[1:])


def test_a_given_history_is_cached_instead_of_the_generated_blocks(watched):
    """Teacher forcing: with the generated blocks as history nothing changes. A change of block 1 of
    the history changes blocks 2 and 3, but not block 1 itself."""
    own = list(watched.rollout())
    clip = rollout.whole_clip(own)
    for a, b in zip(own, list(watched.rollout(history=clip))):
        assert all_equal(a[1:], b[1:])
    other = [x.clone() for x in clip]
    rows = block_rows(1, CFG)
    for x, r in zip(other, rows):
        x[:, r] += 1
    forced = list(watched.rollout(history=other))
    assert all(all_equal(own[k][1:], forced[k][1:]) for k in (0, 1))
    assert all(differ(own[k][1:], forced[k][1:]) for k in (2, 3))
