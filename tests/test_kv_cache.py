"""Rolling caches: streaming with a cache equals the masked pass over the whole clip.

All tests run in float64, with random weights in every matrix. Outputs are of order 1 and float64
rounds at 1e-16, so agreement within 1e-10 shows that both methods are the same.
"""

from dataclasses import replace

import pytest
import torch
from helpers import (
    LAYOUTS,
    PAPER,
    assert_same,
    block_rows,
    differ,
    layout_name,
    random_clip,
    random_model,
    random_text,
    tiny,
)

import masks
import rope
from kv_cache import CachedView, Heads, MaskedView, RollingCache, attention, cache_append_attention
from model import add_noise

BLOCKS = 7  # window 1 evicts four of them, window 2 three


# ---- the slow specification ----


class EvictingView:
    """Attention over a whole clip; each block sees only keys that a stream would still hold."""

    def __init__(self, cfg, blocks, window=None, pinned=True):
        self.cfg, self.window = cfg, blocks if window is None else window
        self.pinned = pinned
        self.num_blocks = blocks
        video, audio = masks.video_token_blocks(blocks, cfg), masks.audio_token_blocks(blocks, cfg)
        self.blocks = {  # site -> block of every query, block of every key
            "video_self": (video, video),
            "audio_self": (audio, audio),
            "a2v": (video, audio),
            "v2a": (audio, video),
        }

    def attend(self, layer, site, q, k, v, heads):
        query_blocks, key_blocks = self.blocks[site]
        queries, keys, values = heads.queries(q), heads.keys(k), heads.split(v)
        out = []
        for b in range(self.num_blocks):
            seen = self.seen(b, key_blocks)
            moved = torch.where((key_blocks == 0)[:, None, None], self.later(keys, site, b), keys)
            out.append(attention(queries[:, query_blocks == b], moved[:, seen], values[:, seen]))
        return torch.cat(out, dim=1)

    def seen(self, block, key_blocks):
        """(K,) booleans: which keys a block attends to."""
        return masks.may_attend(torch.tensor([block]), key_blocks, self.window, self.pinned)[0]

    def later(self, keys, site, block):
        """Move keys one second later in time for every block that is evicted before `block`."""
        num_evicted = max(0, block - 1 - self.window)
        angles = rope.shift_angles(site, num_evicted * self.cfg.block_seconds, self.cfg)
        return rope.rotate(keys, rope.cos_sin(angles, self.cfg, dtype=keys.dtype))


def noisy_after(k, clip, noise, sigmas, cfg):
    """Return a clip that is clean before block k and noisy from k on, and its levels per frame.

    Every noisy block has a level for video and a level for audio.
    """
    levels = []
    for stream in (0, 1):
        s = torch.zeros(clip[stream].shape[:2], dtype=torch.float64)
        for b in range(k, len(sigmas)):
            s[:, block_rows(b, cfg)[stream]] = sigmas[b][stream]
        levels.append(s)
    tokens = [add_noise(x, n, s) for x, n, s in zip(clip, noise, levels)]
    return tokens, [levels[0][:, :: cfg.tokens_per_frame], levels[1]]


class Case:
    """A tiny model, a prompt, and two random clips with a noise level per block and stream."""

    def __init__(self, cfg, blocks=BLOCKS, window=None, pinned=True):
        self.cfg, self.blocks, self.window, self.pinned = tiny(cfg), blocks, window, pinned
        self.model = random_model(self.cfg)
        self.text = random_text(self.model, self.cfg, clips=2)
        self.clip, self.noise = (random_clip(self.cfg, blocks, clips=2) for _ in range(2))
        self.sigmas = torch.rand(blocks, 2, dtype=torch.float64) * 0.9 + 0.1

    def masked(self, k, view=None):
        """Velocities of block k in a pass over the whole clip with a clean past."""
        tokens, levels = noisy_after(k, self.clip, self.noise, self.sigmas, self.cfg)
        view = view or EvictingView(self.cfg, self.blocks, self.window, self.pinned)
        span = masks.clip_span(self.blocks, self.cfg)
        v, a = self.model(*tokens, *levels, self.text, span, view)
        rows_v, rows_a = block_rows(k, self.cfg)
        return v[:, rows_v], a[:, rows_a]

    def block(self, k, sigma):
        """Block k of video and audio, each at its own noise level."""
        rows = block_rows(k, self.cfg)
        pairs = zip(self.clip, self.noise, rows, sigma)
        return [add_noise(x[:, r], n[:, r], s.expand(2, 1)) for x, n, r, s in pairs]

    def streamed(self, k, view, sigma):
        """Velocities of a pass over block k alone."""
        levels = [s.expand(2) for s in sigma]
        span = masks.block_span(k, self.cfg)
        return self.model(*self.block(k, sigma), *levels, self.text, span, view)

    def refresh(self, k, view):
        return self.streamed(k, view, torch.zeros(2, dtype=torch.float64))

    def cached_view(self, history=0):
        """A view after the refresh of the first `history` blocks."""
        view = CachedView(self.cfg, self.blocks, self.window, self.pinned)
        for k in range(history):
            self.refresh(k, view)
            view.next_block()
        return view


# ---- the invariant ----


@pytest.mark.parametrize("window", [1, 2, None])
@pytest.mark.parametrize("cfg", LAYOUTS, ids=layout_name)
def test_streaming_block_k_equals_row_block_k_of_the_masked_pass(cfg, window):
    """For every block, in both layouts, with and without sinks, also after three evictions."""
    case = Case(cfg, window=window)
    view = case.cached_view()
    for k in range(BLOCKS):
        case.streamed(k, view, torch.rand(2, dtype=torch.float64))  # an earlier, noisier step
        assert_same(case.streamed(k, view, case.sigmas[k]), case.masked(k))
        case.refresh(k, view)
        view.next_block()
    assert window is None or view.num_evicted >= 3


@pytest.mark.parametrize("cfg", LAYOUTS, ids=layout_name)
def test_the_invariant_holds_when_even_the_prefix_is_evicted(cfg):
    """The ablation without pinned keys: block 0 is evicted when it leaves the window."""
    case = Case(cfg, window=2, pinned=False)
    view = case.cached_view()
    for k in range(5):
        assert_same(case.streamed(k, view, case.sigmas[k]), case.masked(k))
        case.refresh(k, view)
        view.next_block()
    pinned = EvictingView(case.cfg, BLOCKS, 2)
    assert differ(case.masked(4), case.masked(4, pinned))
    assert_same(case.masked(2), case.masked(2, pinned))


@pytest.mark.parametrize("layout", ["split", "interleaved"])
def test_the_invariant_holds_for_both_rotary_layouts(layout):
    """New keys and moved pinned keys are rotated in the same layout."""
    case = Case(replace(PAPER, rope_layout=layout, sink_positions="incremental"), window=1)
    k = BLOCKS - 1
    assert_same(case.streamed(k, case.cached_view(k), case.sigmas[k]), case.masked(k))


@pytest.mark.parametrize("cfg", LAYOUTS, ids=layout_name)
def test_the_slow_specification_without_a_window_is_the_ordinary_mask(cfg):
    """Without eviction, EvictingView equals MaskedView with the four masks."""
    case = Case(cfg, blocks=4)
    ordinary = MaskedView(masks.four_masks(case.cfg, 4))
    assert_same(case.masked(2), case.masked(2, ordinary))


def test_the_invariant_is_not_trivial():
    """Window, mask, noise level and the move of the pinned keys each change the velocities."""
    case, k = Case(PAPER, window=1), BLOCKS - 1
    truth = case.streamed(k, case.cached_view(k), case.sigmas[k])
    still = EvictingView(case.cfg, BLOCKS, window=1)
    still.later = lambda keys, site, block: keys
    assert differ(truth, case.masked(k, still))
    assert differ(truth, case.masked(k, EvictingView(case.cfg, BLOCKS, window=2)))
    assert differ(truth, case.masked(k, MaskedView()))
    assert differ(truth, case.refresh(k, case.cached_view(k)))


def test_a_changed_future_leaves_the_past_bitwise_equal():
    """In a masked pass, a change from block k on changes no bit of the blocks before k."""
    case = Case(PAPER, blocks=5)
    view = MaskedView(masks.four_masks(case.cfg, 5))
    span = masks.clip_span(5, case.cfg)
    tokens, levels = noisy_after(5, case.clip, case.noise, case.sigmas[:5], case.cfg)
    before = case.model(*tokens, *levels, case.text, span, view)
    for k in range(1, 5):
        tokens, levels = noisy_after(k, case.clip, case.noise, case.sigmas[:5], case.cfg)
        after = case.model(*tokens, *levels, case.text, span, view)
        for x, y, rows in zip(before, after, block_rows(k, case.cfg)):
            assert torch.equal(x[:, : rows.start], y[:, : rows.start])
            assert not torch.equal(x[:, rows], y[:, rows])


def test_repeated_passes_do_no_harm():
    """Ten noisy passes before the refresh leave the same keys and values as no pass."""
    case, k = Case(PAPER, window=1), 4
    plain, busy = case.cached_view(k), case.cached_view(k)
    for sigma in torch.rand(10, 2, dtype=torch.float64):
        case.streamed(k, busy, sigma)
    assert_same(case.refresh(k, busy), case.refresh(k, plain))
    for one, other in zip(plain.layers, busy.layers):
        for site in masks.SITES:
            assert torch.equal(one[site].k, other[site].k)
            assert torch.equal(one[site].v, other[site].v)


# ---- forgetting ----


class ForgetfulView(EvictingView):
    """Before each of the blocks `at`, all blocks but the newest are forgotten."""

    def __init__(self, at, *args):
        super().__init__(*args)
        self.at = at

    def seen(self, block, key_blocks):
        newest = [k - 1 for k in self.at if k <= block]
        if not newest:
            return super().seen(block, key_blocks)
        return (key_blocks >= max(newest[-1], block - self.window)) & (key_blocks <= block)


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("at", [(2,), (3,), (5,), (3, 4, 6)])
@pytest.mark.parametrize("cfg", LAYOUTS, ids=layout_name)
def test_after_forgetting_blocks_see_the_newest_and_what_follows(cfg, at, window):
    """The ring turns on as usual, nothing is pinned, and the blocks before are as they were."""
    case = Case(cfg, BLOCKS + 1, window)
    view, spec = case.cached_view(), ForgetfulView(at, case.cfg, BLOCKS + 1, window)
    for k in range(BLOCKS + 1):
        if k in at:
            view.forget()
        case.streamed(k, view, torch.rand(2, dtype=torch.float64))
        assert_same(case.streamed(k, view, case.sigmas[k]), case.masked(k, spec))
        case.refresh(k, view)
        view.next_block()
    assert differ(case.masked(at[0], spec), case.masked(at[0]))


def test_block_0_is_not_forgotten_while_it_is_the_newest():
    """It is no longer pinned: with a window of one, block 2 does not see it."""
    case = Case(PAPER, window=1)
    view, spec = case.cached_view(1), EvictingView(case.cfg, BLOCKS, 1, pinned=False)
    view.forget()
    for k in (1, 2, 3):
        assert_same(case.streamed(k, view, case.sigmas[k]), case.masked(k, spec))
        case.refresh(k, view)
        view.next_block()


# ---- under autograd ----


def test_gradients_of_a_streamed_block_equal_those_of_the_masked_pass():
    """d loss / d block is the same, even if later passes have written to the same slots."""
    case, k = Case(PAPER, window=1), BLOCKS - 2
    rows = block_rows(k, case.cfg)
    view = case.cached_view(k)
    for x in case.clip:
        x.requires_grad_(True)
    whole = torch.autograd.grad(sum(x.pow(2).sum() for x in case.masked(k)), case.clip)
    loss = sum(x.pow(2).sum() for x in case.streamed(k, view, case.sigmas[k]))
    with torch.no_grad():
        case.refresh(k, view)
        view.next_block()
        case.refresh(k + 1, view)
    alone = torch.autograd.grad(loss, case.clip)
    assert_same([g[:, r] for g, r in zip(alone, rows)], [g[:, r] for g, r in zip(whole, rows)])


def test_no_gradient_reaches_history():
    """The cache holds detached keys and values: inputs of past blocks get no gradient."""
    case, k = Case(PAPER, window=2), 4
    for x in case.clip:
        x.requires_grad_(True)
    loss = sum(x.sum() for x in case.streamed(k, case.cached_view(k), case.sigmas[k]))
    for gradient, rows in zip(torch.autograd.grad(loss, case.clip), block_rows(k, case.cfg)):
        assert gradient[:, rows].abs().max() > 0
        assert gradient[:, : rows.start].abs().max() == 0


# ---- one cache by itself ----

HEADS = Heads(2, 1e-6, torch.rand(8, dtype=torch.float64) + 0.5, torch.rand(8).double() + 0.5)


def raw(tokens):
    """Raw projections of two clips, two heads of four channels."""
    return torch.randn(2, tokens, 8, dtype=torch.float64, requires_grad=True)


def test_gradients_equal_dense_attention():
    """Values and gradients equal dense attention to the past and the current block."""
    cache = RollingCache(prefix_tokens=3, block_tokens=4, ring_blocks=2)
    appended = []
    for block in range(5):  # at block 4 the ring holds 4 | 3
        q, k, v = raw(5), raw(3 if block == 0 else 4), raw(3 if block == 0 else 4)
        out = cache_append_attention(q, k, v, HEADS, cache)
        appended.append((HEADS.keys(k), HEADS.split(v)))
        cache.next_block()
    history = [[x.detach() for x in appended[b]] for b in (0, 3)]
    keys, values = (torch.cat(x, dim=1) for x in zip(*history, appended[4]))
    dense = attention(HEADS.queries(q), keys, values)
    assert_same([out], [dense])
    weights = torch.randn_like(out)
    assert_same(*(torch.autograd.grad((o * weights).sum(), (q, k, v)) for o in (out, dense)))


def test_order_of_slots_while_the_ring_turns():
    """Slots are filled from the front; then a new block overwrites the oldest one."""
    cache = RollingCache(prefix_tokens=1, block_tokens=1, ring_blocks=3)
    seen = []
    for block in range(6):
        k, _ = cache.append(*(torch.full((1, 1, 1, 2), float(block)) for _ in range(2)))
        seen.append(k[0, :, 0, 0].int().tolist())
        cache.next_block()
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 4, 2, 3], [0, 4, 5, 3]]


def test_without_gradient_nothing_is_copied():
    """The returned keys and values are views of the buffers."""
    cache = RollingCache(prefix_tokens=1, block_tokens=2, ring_blocks=3)
    k, v = cache.append(*(torch.zeros(1, 1, 2, 4) for _ in range(2)))
    assert k.data_ptr() == cache.k.data_ptr() and v.data_ptr() == cache.v.data_ptr()


@pytest.mark.parametrize("block, tokens, room", [(0, 2, 3), (0, 4, 3), (1, 3, 4), (2, 5, 4)])
def test_a_wrong_number_of_keys_is_refused(block, tokens, room):
    """A block must fill its slots exactly; the message names the block and both numbers."""
    cache = RollingCache(prefix_tokens=3, block_tokens=4, ring_blocks=2)
    for b in range(block):
        cache.append(*(torch.zeros(1, 4 if b else 3, 2, 4) for _ in range(2)))
        cache.next_block()
    with pytest.raises(ValueError, match=f"block {block} brings {tokens} keys.* holds {room}$"):
        cache.append(*(torch.zeros(1, tokens, 2, 4) for _ in range(2)))


def test_a_window_without_a_past_is_refused():
    """With window 0, a block could not attend to the block before it."""
    with pytest.raises(ValueError, match="window=0: a block must remember at least the one before"):
        CachedView(PAPER, 10, window=0)


# ---- long streams ----


def stream_random_keys(cfg, blocks, num_blocks, window):
    """Stream random keys: -> view, keys of block 0 by (layer, site), bytes after each block."""
    torch.manual_seed(0)
    view, first, sizes = CachedView(cfg, num_blocks, window), {}, []
    width = dict.fromkeys(masks.SITES, cfg.audio_width) | {"video_self": cfg.video_width}
    for block in range(blocks):
        for layer in range(cfg.num_layers):
            for site, cache in view.layers[layer].items():
                tokens = cache.block_tokens if block else cache.prefix_tokens
                k, one = torch.randn(1, tokens, width[site]), torch.ones(width[site])
                view.attend(layer, site, k[:, :1], k, k, Heads(cfg.num_heads, 1e-6, one, one))
                first.setdefault((layer, site), k)
        sizes.append(view.num_bytes())
        view.next_block()
    return view, first, sizes


SMALL = tiny(replace(PAPER, num_sinks=2), num_layers=1, height=8, width=8)


def test_memory_is_constant_once_the_window_is_full():
    """Neither the bytes nor the visible keys grow after the first eviction."""
    view, _, sizes = stream_random_keys(SMALL, 12, 12, window=2)
    assert len(set(sizes[4:])) == 1
    cache, filled = RollingCache(3, 4, 3), []
    for cache.block in range(12):
        filled.append(cache.num_filled)
    assert filled == [3, 7, 11] + 9 * [15]
    assert view.num_evicted == 9


def test_a_stream_without_eviction_keeps_no_second_copy_of_its_prefix():
    """A cache is two buffers of all slots; eviction adds the original pinned keys."""
    caches = CachedView(SMALL, 6).layers[0].values()
    slots = {c: c.prefix_tokens + 5 * c.block_tokens for c in caches}
    widths = [SMALL.video_width] + 3 * [SMALL.audio_width]
    two_buffers = sum(2 * slots[c] * w * 4 for c, w in zip(caches, widths))  # float32: 4 bytes
    whole, evicting = (stream_random_keys(SMALL, 6, 6, window)[0] for window in (None, 4))
    assert whole.num_bytes() == two_buffers
    pinned = sum(c.prefix_tokens * w * 4 for c, w in zip(caches, widths))
    assert evicting.num_evicted == 1 and evicting.num_bytes() == two_buffers + pinned


def test_600_blocks_hold_no_more_memory_than_60():
    """Ten minutes need as much memory as one minute."""
    minute, ten = (stream_random_keys(SMALL, n, n, window=5)[0] for n in (60, 600))
    assert minute.num_bytes() == ten.num_bytes() > 0


def test_a_short_stream_does_not_pay_for_a_long_window():
    """The ring of a stream of four blocks holds three blocks, however large the window."""
    for window in (None, 3, 1000):
        assert CachedView(SMALL, 4, window).layers[0]["a2v"].ring_blocks == 3
    assert CachedView(SMALL, 1, None).layers[0]["a2v"].ring_blocks == 1


@pytest.mark.parametrize("site", masks.SITES)
def test_moving_the_prefix_does_not_accumulate_error(site):
    """After 600 blocks the pinned keys are as exact as after one rotation by 598 seconds.

    float32 rounds at 6e-8; keys are of order 1 and are rotated twice.
    """
    view, first, _ = stream_random_keys(SMALL, 600, 601, window=1)
    assert view.num_evicted == 598
    one = torch.ones(first[0, site].shape[-1], dtype=torch.float64)
    keys = Heads(SMALL.num_heads, 1e-6, one, one).keys(first[0, site].double())
    angles = rope.shift_angles(site, 598, SMALL)
    fresh = rope.rotate(keys, rope.cos_sin(angles, SMALL, dtype=torch.float64))
    cache = view.layers[0][site]
    pinned = cache.k[:, : cache.prefix_tokens].double()
    torch.testing.assert_close(pinned, fresh, atol=2e-6, rtol=0)
