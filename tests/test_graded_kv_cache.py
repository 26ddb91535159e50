"""Graded: what a rolling cache keeps, in which slots, and at which positions.

The expected contents are those of a plain Python list of blocks that drops its oldest. A key is a
number that tells its clip, its block and its token, which shows what a query attends to.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from grading import check, check_dtype, close, random_tensor, watched

import config
import rope
from kv_cache import CachedView, Heads, RollingCache, cache_append_attention
from masks import SITES

PREFIX, BLOCK, RING, CLIPS = 3, 4, 3, 3  # tokens of block 0, of a later block; blocks in the ring
SIZES = (PREFIX, BLOCK, RING), (5, 2, 1), (1, 6, 4)
CFG = replace(
    config.TOY, num_layers=2, num_heads=2, video_width=24, audio_width=16, height=8, width=8,
    num_sinks=2,
)  # fmt: skip
RELEASED = replace(CFG, prefix_video_frames=4, prefix_audio_frames=26, num_sinks=0)
SLOW = replace(CFG, block_seconds=2, rope_layout="interleaved")


def visible(block, ring_blocks=RING):
    """List the blocks that are visible during this one: block 0, then the latest in the ring."""
    ring = []
    for b in range(1, block + 1):
        ring = [*ring, b][-ring_blocks:]
    return [0, *ring]


def tokens_of(block):
    return BLOCK if block else PREFIX


def numbers_of(block, clip=0):
    """List the keys of a block: 10 x block + token, and 1000 for every clip."""
    return [1000.0 * clip + 10 * block + token for token in range(tokens_of(block))]


def keys_of(block, more=0.0, dtype=torch.float32, requires_grad=False):
    """Make the keys (B, T, 1, 1) of a block."""
    keys = torch.tensor([numbers_of(block, clip) for clip in range(CLIPS)], dtype=dtype)
    return (keys + more)[..., None, None].requires_grad_(requires_grad)


class Cache(RollingCache):
    """A cache with its slots by hand: `append` is graded without the functions before it."""

    @property
    def num_filled(self):
        return sum(map(self.tokens, visible(self.block, self.ring_blocks)))

    @property
    def slots(self):
        if self.block == 0:
            return slice(0, self.prefix_tokens)
        place = (self.block + self.ring_blocks - 1) % self.ring_blocks
        start = self.prefix_tokens + place * self.block_tokens
        return slice(start, start + self.block_tokens)

    def tokens(self, block):
        return self.block_tokens if block else self.prefix_tokens


def cache_at(block):
    """Make a cache whose earlier blocks are finished."""
    cache = Cache(PREFIX, BLOCK, RING)
    for b in range(block):
        cache.append(keys_of(b), keys_of(b, 0.5))
        cache.next_block()
    return cache


@pytest.mark.points(1, "RollingCache.num_filled")
def test_the_cache_fills_up_and_then_stays_full():
    """The tokens of all visible blocks count, including the current block."""
    for prefix, tokens, ring in SIZES:
        cache = RollingCache(prefix, tokens, ring)
        for cache.block in range(7):
            blocks = visible(cache.block, ring)
            found, right = cache.num_filled, prefix + (len(blocks) - 1) * tokens
            during = f"during block {cache.block} the cache holds blocks {blocks}"
            assert found == right, f"{during}: {right} slots, not {found}"


@pytest.mark.points(2, "RollingCache.slots")
def test_a_new_block_overwrites_the_oldest():
    """Block 0 stays at the front. The ring after it is filled, then overwritten, in order."""
    for prefix, tokens, ring in SIZES:
        cache, places = RollingCache(prefix, tokens, ring), [None] * ring
        for cache.block in range(8):
            block, found = cache.block, cache.slots
            assert isinstance(found, slice), f"the slots are a slice, not {found}"
            found = found.indices(prefix + ring * tokens)[:2]  # slice(3) and slice(0, 3) are alike
            if block == 0:
                assert found == (0, prefix), f"block 0 has slots (0, {prefix}), not {found}"
                continue
            written = f"block {block} is written to slots {found}"
            assert found[0] >= prefix, f"{written}, over the prefix: its sinks are evicted"
            place = places.index(None) if None in places else places.index(min(places))
            right = prefix + place * tokens, prefix + (place + 1) * tokens
            holds = f"the ring after the prefix holds blocks {places}"
            assert found == right, f"{holds}: block {block} gets slots {right}, not {found}"
            places[place] = block


def check_contents(keys, values, block, pinned=True):
    """Fail unless exactly the visible keys and values are there, in the same order."""
    blocks = visible(block) if pinned else visible(block)[1:]
    assert keys.dim() == 4 and len(keys) == CLIPS, f"{CLIPS} clips became {tuple(keys.shape)}"
    for clip, row in enumerate(keys.detach().flatten(1).tolist()):
        found = sorted({int(number % 1000) // 10 for number in row})
        during = f"during block {block} queries attend to blocks {found}"
        assert not pinned or 0 in found, f"{during}: the pinned prefix and its sinks are evicted"
        assert block in found, f"{during}: a block must attend to itself"
        hidden = f"{during}: one of them should be {'evicted by now' if pinned else 'hidden'}"
        assert set(found) <= set(blocks), hidden
        right = [number for b in blocks for number in numbers_of(b, clip)]
        once = f"{during}; expected blocks {blocks}, with every token of clip {clip} once"
        assert sorted(row) == right, once
    assert close(values, keys + 0.5), "values and keys differ in their slots"


@pytest.mark.points(1, "RollingCache.append")
def test_a_block_attends_to_the_prefix_the_latest_blocks_and_itself():
    """The returned keys are those of the plain list, block by block, until three are evicted."""
    for block in range(7):
        cache, new = cache_at(block), (keys_of(block), keys_of(block, 0.5))
        with watched(new):
            keys, values = cache.append(*new)
        check_contents(keys, values, block)
    for dtype in (torch.bfloat16, torch.float64):
        cache, new = Cache(PREFIX, BLOCK, RING), random_tensor(2, PREFIX, 2, 4, dtype=dtype)
        keys, values = cache.append(new, 2 * new)
        check_dtype(keys, dtype, "the cache keeps the dtype of the keys")
        assert torch.equal(keys, new), f"keys {tuple(new.shape)} became {tuple(keys.shape)}"


@pytest.mark.points(1, "RollingCache.append")
def test_a_hidden_prefix_is_not_returned():
    """Only slots from `first_visible` on are read, with gradients or without."""
    for block, requires_grad in itertools.product((4, 5), (False, True)):
        cache = cache_at(block)
        cache.first_visible = PREFIX
        more = dict(requires_grad=requires_grad)
        keys, values = cache.append(keys_of(block, **more), keys_of(block, 0.5, **more))
        has_block_0 = bool((keys % 1000 < 10).any())
        assert not has_block_0, "first_visible is ignored: an unpinned prefix is read for ever"
        check_contents(keys, values, block, pinned=False)


@pytest.mark.points(1, "RollingCache.append")
def test_a_second_pass_over_a_block_overwrites_the_first():
    """A pass may be repeated, with a gradient too: only the loop moves on."""
    for first_has_grad, second_has_grad in itertools.product((False, True), repeat=2):
        cache = cache_at(2)
        cache.append(*(keys_of(2, 5 + more, requires_grad=first_has_grad) for more in (0, 0.5)))
        on = "append moves on to the next block, but only the loop may do that"
        assert cache.block == 2, on
        stored = cache.k[:, 7:11].detach()
        is_written = close(stored, keys_of(2, 5))
        assert is_written, "a pass with a gradient writes nothing into the cache: every pass does"
        keys, values = cache.append(
            *(keys_of(2, more, requires_grad=second_has_grad) for more in (0, 0.5))
        )
        found = keys[0].detach().flatten().int().tolist()
        assert len(found) == PREFIX + 2 * BLOCK and not {25, 26, 27, 28} & set(found), (
            f"after a second pass over block 2 the cache returns {found}: the keys of the second "
            f"pass (20 to 23) must overwrite those of the first (25 to 28)"
        )
        check_contents(keys, values, 2)


@pytest.mark.points(1, "RollingCache.append")
def test_the_gradient_reaches_the_current_block_and_no_earlier_one():
    """The history is detached, and the next write does not break a backward pass."""
    for has_grad, last in itertools.product(((True, True), (True, False), (False, True)), (2, 5)):
        cache, inputs = Cache(PREFIX, BLOCK, RING), []
        for block in range(last + 1):
            inputs.append([keys_of(block, m, requires_grad=g) for m, g in zip((0, 0.5), has_grad)])
            found = cache.append(*inputs[-1])
            check_contents(*found, block)
            cache.next_block()
        for name, x, wanted in zip(("keys", "values"), found, has_grad):
            lost = f"no gradient reaches the {name} of the current block"
            assert x.requires_grad or not wanted, lost
        is_plain = not (cache.k.requires_grad or cache.v.requires_grad)
        assert is_plain, "the buffers of the cache carry a gradient: write without one"
        loss = sum(x.square().sum() for x in found)
        with torch.no_grad():
            cache.append(keys_of(last + 1), keys_of(last + 1))
        given = [x for pair in inputs for x in pair if x.requires_grad]
        try:
            gradients = torch.autograd.grad(loss, given, allow_unused=True)
        except RuntimeError as error:
            pytest.fail(f"writing the next block breaks the gradient of this block: {error}")
        new = sum(has_grad)
        crosses = any(gradient is not None for gradient in gradients[:-new])
        assert not crosses, "a gradient reaches earlier blocks: the history must be detached"
        for x, gradient in zip(given[-new:], gradients[-new:]):
            is_right = gradient is not None and close(gradient, 2 * x)
            assert is_right, "the gradient of the current block is wrong"


def rotated(x, angles, layout="split"):
    """Rotate x (..., D) by angles that fit (..., D / 2)."""
    pairs = x.unflatten(-1, (2, -1) if layout == "split" else (-1, 2))
    a, b = pairs.unbind(-2 if layout == "split" else -1)
    turned = a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()
    return torch.stack(turned, -2 if layout == "split" else -1).flatten(-2)


@pytest.mark.points(2, "RollingCache.move_prefix")
def test_pinned_keys_rotate_from_where_they_were_written():
    """After moves by 0.3, 0.7 and 0.5 they are 0.5 further, not 1.5; nothing else moves."""
    for layout in ("split", "interleaved"):
        cache = RollingCache(PREFIX, BLOCK, RING)
        cache.k, cache.v = random_tensor(2, CLIPS, PREFIX + RING * BLOCK, 2, 4).double()
        k, values = cache.k.clone(), cache.v.clone()
        total = 0.0
        for angle in (0.3, 0.7, 0.5):
            angles = torch.full((1, 4), angle, dtype=torch.float64)
            with watched(angles):
                cache.move_prefix(rope.Rope(angles.cos(), angles.sin(), layout))
            total += angle
            right = rotated(k[:, :PREFIX], angles[0, 0], layout)
            added = "the moves add up: rotate the original keys, not the rotated ones"
            suspects = {
                "the pinned keys do not move": k[:, :PREFIX],
                "the pinned keys of all clips became those of clip 0": right[:1].expand_as(right),
            }
            if total != angle:
                suspects[added] = rotated(k[:, :PREFIX], angles[0, 0] - angle + total, layout)
            rule = f"the pinned keys are not {angle} rad from where they were written"
            check(cache.k[:, :PREFIX], right, rule, suspects, 1e-9)
            assert torch.equal(cache.k[:, PREFIX:], k[:, PREFIX:]), "only the prefix may move"
            is_kept = torch.equal(cache.v, values)
            assert is_kept, "values have no position, so they must not change"


def two_heads():
    """Make weights and rotations of two heads of width 2, all with a gradient."""
    weights = torch.tensor([[1.0, 2, 3, 4], [2.0, 1, 4, 3]], dtype=torch.float64)
    angles = torch.tensor([[[0.4, 0.9]], [[1.3, 0.2]]], dtype=torch.float64)
    tables = [rope.Rope(a.cos(), a.sin(), "split") for a in angles]
    weights = [w.clone().requires_grad_() for w in weights]
    return Heads(2, 1e-6, *weights, *tables), angles


def prepared(x, weight, angles):
    """(B, T, 4) projections -> (B, T, 2, 2): RMSNorm over the full width, heads, rotation."""
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    return rotated(x.unflatten(-1, (2, 2)), angles.view(2, 1))


def dense(q, k, v, scale=2**-0.5):
    """Attend without torch's attention: (B, Q, 2, 2), (B, K, 2, 2) twice -> (B, Q, 4)."""
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


def attended(last, ring_blocks=2):
    """Run blocks 0 to `last` of three clips: result, cache, heads, and all that was given."""
    cache, given, (heads, angles) = RollingCache(PREFIX, BLOCK, ring_blocks), [], two_heads()
    for block in range(last + 1):
        tokens = tokens_of(block)
        projections = [
            random_tensor(CLIPS, n, 4, seed=3 * block + i, dtype=torch.float64, requires_grad=True)
            for i, n in enumerate((2, tokens, tokens))
        ]
        given.append(projections)
        with watched(projections):
            found = cache_append_attention(*projections, heads, cache)
        assert cache.block == block, "the cache moves on, but only the loop may do that"
        if block < last:
            cache.next_block()
    return found, cache, heads, angles, given


@pytest.mark.points(1, "cache_append_attention")
def test_a_block_attends_to_the_history_and_to_itself_in_one_call():
    """Norm, rotate, append, attend: equal to dense attention over all visible keys and values."""
    for last in (4, 1):
        found, cache, heads, (q_angles, k_angles), given = attended(last)
        assert found.shape == (CLIPS, 2, 4), f"2 queries of width 4 became {tuple(found.shape)}"
        blocks = [given[b] for b in visible(last, 2)]
        keys, values = (torch.cat([block[i] for block in blocks], 1) for i in (1, 2))
        q, values = given[last][0], values.unflatten(-1, (2, 2))
        queries = prepared(q, heads.q_weight, q_angles)
        ready = prepared(keys, heads.k_weight, k_angles)
        plain = torch.zeros(1, 2, dtype=torch.float64)
        suspects = {
            "queries attend to their own block only; use all keys that append returns": dense(
                queries, ready[:, -BLOCK:], values[:, -BLOCK:]
            ),
            "queries do not attend to the pinned prefix": dense(
                queries, ready[:, PREFIX:], values[:, PREFIX:]
            ),
            "queries attend to raw keys; norm and rotate them before you append them": dense(
                queries, keys.unflatten(-1, (2, 2)), values
            ),
            "the queries are not normed and rotated": dense(q.unflatten(-1, (2, 2)), ready, values),
            "the keys are normed and rotated like queries": dense(
                queries, prepared(keys, heads.q_weight, q_angles), values
            ),
            "queries or keys are normed, but not rotated": dense(
                queries, prepared(keys, heads.k_weight, plain), values
            ),
            "the values are normed and rotated like keys": dense(
                queries, ready, prepared(values.flatten(2), heads.k_weight, k_angles)
            ),
            "q k is not divided by sqrt(D)": dense(queries, ready, values, 1.0),
        }
        rule = "this is not softmax(q k / sqrt(D)) v over the history and the block"
        check(found, dense(queries, ready, values), rule, suspects, 1e-9)


@pytest.mark.points(1, "cache_append_attention")
def test_queries_keys_values_and_norms_learn():
    """A gradient reaches all five in a pass of a later block."""
    found, _, heads, _, given = attended(2)
    learn = dict(zip(("queries", "keys", "values"), given[-1]))
    learn |= {"weights of the queries' norm": heads.q_weight, "those of the keys": heads.k_weight}
    gradients = torch.autograd.grad(found.square().sum(), [*learn.values()], allow_unused=True)
    for name, gradient in zip(learn, gradients):
        is_there = gradient is not None and gradient.abs().max() > 1e-6
        assert is_there, f"no gradient reaches the {name}: they would never learn"


def filled_view(cfg=CFG, **options):
    """Make a view of two clips, with random keys in all caches; also return its first keys."""
    view, first = CachedView(cfg, 20, **options), []
    for i, layer in enumerate(view.layers):
        for n, (site, cache) in enumerate(layer.items()):
            width = cfg.video_width if site == "video_self" else cfg.audio_width
            slots = cache.prefix_tokens + cache.ring_blocks * cache.block_tokens
            shape, seed = (2, 2, slots, 2, width // 2), 10 * i + n
            cache.k, cache.v = random_tensor(*shape, seed=seed, dtype=torch.float64)
        first.append({site: (c.k.clone(), c.v.clone()) for site, c in layer.items()})
    return view, first


@pytest.mark.points(1, "CachedView.next_block")
def test_every_cache_moves_on_by_one_block():
    """All caches of all layers, and the view itself; block 0 stays visible for ever."""
    view, _ = filled_view(window=2)
    for block in range(1, 6):
        view.next_block()
        assert view.block == block, f"after {block} blocks the view is at block {view.block}"
        for i, layer in enumerate(view.layers):
            for site in SITES:
                found, where = layer[site].block, f"layer {i}, {site}"
                assert found == block, f"after {block} blocks {where} is at block {found}"
                hidden = f"{where}: block {block} no longer attends to the pinned block 0"
                assert layer[site].first_visible == 0, f"{hidden}, the global prefix"


def seconds_moved(cfg, site, first, now):
    """Return by how many seconds keys have moved in time; None: they are elsewhere."""
    for seconds in range(13):
        angles = rope.shift_angles(site, seconds, cfg)
        if close(now, rope.rotate(first, rope.cos_sin(angles, cfg, dtype=torch.float64)), 1e-9):
            return seconds


@pytest.mark.points(2, "CachedView.next_block")
def test_pinned_keys_follow_the_window():
    """With n blocks evicted, prefix and sinks are n blocks later than they were written."""
    for cfg, window in ((CFG, 2), (RELEASED, 1), (SLOW, 3), (CFG, None)):
        view, first = filled_view(cfg, window=window)
        for block in range(1, 7):
            view.next_block()
            evicted = max(0, block - 1 - window) if window else 0
            right = evicted * int(cfg.block_seconds)
            for (i, layer), site in itertools.product(enumerate(view.layers), SITES):
                cache, (keys, values) = layer[site], first[i][site]
                pinned = slice(0, cache.prefix_tokens)
                found = seconds_moved(cfg, site, keys[:, pinned], cache.k[:, pinned])
                where = f"layer {i}, {site}, block {block}"
                told = "elsewhere" if found is None else f"{found} s later"
                assert found == right, (
                    f"{where}: {evicted} blocks are evicted, so the pinned keys must stand {right} "
                    f"s later than they were written; they stand {told}"
                )
                ring = slice(cache.prefix_tokens, None)
                is_kept = torch.equal(cache.k[:, ring], keys[:, ring])
                assert is_kept, f"{where}: keys of the ring move, but only block 0 may"
                assert torch.equal(cache.v, values), f"{where}: values have no position"


@pytest.mark.points(1, "CachedView.next_block")
def test_without_the_pin_the_prefix_leaves_the_window():
    """Block 0 is hidden from the first block that is more than `window` blocks later."""
    for window in (2, 1):
        view, _ = filled_view(window=window, pinned=False)
        for block in range(1, 5):
            view.next_block()
            hidden = block > window
            rule = f"block {block} {'must not' if hidden else 'may still'} attend to block 0"
            for (i, layer), site in itertools.product(enumerate(view.layers), SITES):
                is_hidden = layer[site].first_visible == layer[site].prefix_tokens
                where = f"layer {i}, {site}: not pinned and with a window of {window}"
                assert is_hidden == hidden, f"{where}, {rule}"
