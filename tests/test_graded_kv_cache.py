"""Graded: what a rolling cache keeps, in which slots, and at which positions.

The expected contents are those of a plain Python list of blocks that drops its oldest. Keys hold
the number of their block, which shows what a query attends to.
"""

from dataclasses import replace

import pytest
import torch

import config
import rope
from kv_cache import CachedView, Heads, RollingCache, cache_append_attention
from masks import SITES

PREFIX, BLOCK, RING = 3, 4, 3  # tokens of block 0, of a later block; blocks in the ring
CFG = replace(
    config.TOY, num_layers=2, num_heads=2, video_width=24, audio_width=16, height=8, width=8,
    num_sinks=2,
)  # fmt: skip


def visible(block):
    """List the blocks that are visible during this one: block 0, then the latest in the ring."""
    ring = []
    for b in range(1, block + 1):
        ring = [*ring, b][-RING:]
    return [0, *ring]


def tokens_of(block):
    return BLOCK if block else PREFIX


def keys_of(block, value=None, **options):
    """Make keys (1, T, 1, 1) that all hold the number of their block, or another value."""
    value = float(block if value is None else value)
    return torch.full((1, tokens_of(block), 1, 1), value, **options)


def cache_at(block):
    """Make a cache whose earlier blocks are finished."""
    cache = RollingCache(PREFIX, BLOCK, RING)
    for b in range(block):
        cache.append(keys_of(b), keys_of(b))
        cache.next_block()
    return cache


@pytest.mark.points(1, "RollingCache.num_filled")
def test_the_cache_fills_up_and_then_stays_full():
    """The tokens of all visible blocks count, including the current block."""
    cache = RollingCache(PREFIX, BLOCK, RING)
    for cache.block in range(7):
        found, right = cache.num_filled, sum(map(tokens_of, visible(cache.block)))
        during = f"during block {cache.block} the cache holds blocks {visible(cache.block)}"
        assert found == right, f"{during}: {right} slots, not {found}"


@pytest.mark.points(2, "RollingCache.slots")
def test_a_new_block_overwrites_the_oldest():
    """Block 0 stays at the front. The ring after it is filled, then overwritten, in order."""
    cache, places = RollingCache(PREFIX, BLOCK, RING), [None] * RING
    for cache.block in range(8):
        block, found = cache.block, (cache.slots.start, cache.slots.stop)
        if block == 0:
            assert found == (0, PREFIX), f"block 0 has slots (0, {PREFIX}), not {found}"
            continue
        written = f"block {block} is written to slots {found}"
        assert found[0] >= PREFIX, f"{written}, over the prefix: its sinks are evicted"
        place = places.index(None) if None in places else places.index(min(places))
        right = PREFIX + place * BLOCK, PREFIX + (place + 1) * BLOCK
        ring = f"the ring after the prefix holds blocks {places}"
        assert found == right, f"{ring}: block {block} gets slots {right}, not {found}"
        places[place] = block


@pytest.mark.points(2, "RollingCache.append")
def test_a_block_attends_to_the_prefix_the_latest_blocks_and_itself():
    """The returned keys are those of the plain list, block by block, until three are evicted."""
    for block in range(7):
        k, v = cache_at(block).append(keys_of(block), keys_of(block, block + 100))
        found, right = k.flatten().int().tolist(), visible(block)
        during = f"during block {block} queries attend to blocks {sorted(set(found))}"
        assert 0 in found, f"{during}: the pinned prefix and its sinks are evicted"
        assert block in found, f"{during}: a block must attend to itself"
        assert set(found) <= set(right), f"{during}: one of them should be evicted by now"
        once = [b for b in right for _ in range(tokens_of(b))]
        assert sorted(found) == once, f"{during}; expected blocks {right}, with every token once"
        new_values = int((v.flatten() >= 100).sum())
        assert new_values == tokens_of(block), "values and keys differ in their slots"


@pytest.mark.points(1, "RollingCache.append")
def test_a_second_pass_over_a_block_overwrites_the_first():
    """A pass may be repeated: only the loop moves on."""
    cache = cache_at(2)
    before = cache.append(keys_of(2, 7), keys_of(2, 7))[0].shape[1]
    found = cache.append(keys_of(2, 9), keys_of(2, 9))[0].flatten().int().tolist()
    assert cache.block == 2, "append moves on to the next block, but only the loop may do that"
    assert len(found) == before and 7 not in found, (
        f"after a second pass over block 2 the cache returns {found}: the keys of the second pass "
        f"(9) must overwrite those of the first (7)"
    )


@pytest.mark.points(1, "RollingCache.append")
def test_the_gradient_reaches_the_current_block_and_no_earlier_one():
    """The history is detached, and the next write does not break a backward pass."""
    cache, inputs = RollingCache(PREFIX, BLOCK, RING), []
    for block in range(3):
        inputs.append(keys_of(block, requires_grad=True))
        k, v = cache.append(inputs[-1], inputs[-1])
        cache.next_block()
    assert k.requires_grad, "no gradient reaches the keys of the current block"
    loss = (k * v).sum()
    with torch.no_grad():
        cache.append(keys_of(3, 50), keys_of(3, 50))
    try:
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
    except RuntimeError as error:
        pytest.fail(f"writing the next block breaks the gradient of this block: {error}")
    crosses = any(gradient is not None for gradient in found[:2])
    assert not crosses, "a gradient reaches earlier blocks: the history must be detached"
    assert found[2].eq(4).all(), "the gradient of the current block is wrong"


def rotated(x, angles):
    """Rotate x (T, H, D) by angles (H, D / 2), channel i with i + D / 2."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@pytest.mark.points(2, "RollingCache.move_prefix")
def test_pinned_keys_rotate_from_where_they_were_written():
    """After moves by 0.3 and by 0.7 they are 0.7 further, not 1.0; nothing else moves."""
    torch.manual_seed(0)
    cache = RollingCache(PREFIX, BLOCK, RING)
    cache.k, cache.v = torch.randn(2, 1, PREFIX + RING * BLOCK, 2, 4)
    first, ring, values = cache.k[:, :PREFIX].clone(), cache.k[:, PREFIX:].clone(), cache.v.clone()
    for angle in (0.3, 0.7):
        angles = torch.full((1, 4), angle)
        cache.move_prefix(rope.Rope(angles.cos(), angles.sin(), "split"))

    def is_rotated(by):
        right = rotated(first[0], torch.full((2, 2), by))
        return torch.allclose(cache.k[0, :PREFIX], right, atol=1e-6)

    assert not is_rotated(1.0), "the moves add up: rotate the original keys, not the rotated ones"
    assert not is_rotated(0.0), "the pinned keys do not move"
    assert is_rotated(0.7), "the pinned keys are not 0.7 rad from where they were written"
    assert torch.equal(cache.k[:, PREFIX:], ring), "only the prefix may move"
    assert torch.equal(cache.v, values), "values have no position, so they must not change"


HEADS = Heads(
    2, 1e-6, torch.tensor([1.0, 2, 3, 4]).double(), torch.tensor([2.0, 1, 4, 3]).double(),
    *(rope.Rope(a.cos(), a.sin(), "split") for a in torch.tensor([[[0.4, 0.9]], [[1.3, 0.2]]])),
)  # fmt: skip


def prepared(x, weight, table):
    """(T, 4) projections -> (T, 2, 2): RMSNorm over the full width, two heads, one angle each."""
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    return rotated(x.unflatten(-1, (2, 2)), torch.atan2(table.sin, table.cos).view(2, 1))


def dense(q, k, v):
    """Attention by loops over heads and queries: (Q, 2, 2), (K, 2, 2) twice -> (Q, 4)."""
    rows = torch.zeros(len(q), 2, 2, dtype=q.dtype)
    for h in range(2):
        for i in range(len(q)):
            weights = torch.stack([q[i, h] @ k[j, h] / 2**0.5 for j in range(len(k))]).softmax(0)
            rows[i, h] = sum(w * v[j, h] for j, w in enumerate(weights))
    return rows.flatten(1)


@pytest.mark.points(2, "cache_append_attention")
def test_a_block_attends_to_the_history_and_to_itself_in_one_call():
    """Norm, rotate, append, attend: equal to loops over all keys and values so far."""
    torch.manual_seed(0)
    cache, given = RollingCache(PREFIX, BLOCK, RING), []
    for block in range(2):
        q, k, v = torch.randn(3, tokens_of(block), 4, dtype=torch.float64)
        given.append((k, v))
        found = cache_append_attention(q[None, :2], k[None], v[None], HEADS, cache)[0]
        cache.next_block()
    keys, values = (torch.cat(x) for x in zip(*given))
    queries = prepared(q[:2], HEADS.q_weight, HEADS.q_rope)
    ready, values = prepared(keys, HEADS.k_weight, HEADS.k_rope), values.unflatten(-1, (2, 2))
    assert found.shape == (2, 4), f"2 queries of width 4 became {tuple(found.shape)}"
    own = torch.allclose(found, dense(queries, ready[PREFIX:], values[PREFIX:]))
    assert not own, "queries attend to their own block only; use all keys that append returns"
    raw = torch.allclose(found, dense(queries, keys.unflatten(-1, (2, 2)), values))
    assert not raw, "queries attend to raw keys; norm and rotate them before you append them"
    right = torch.allclose(found, dense(queries, ready, values))
    assert right, "this is not softmax(q k / sqrt(D)) v over the history and the block"


def filled_view(blocks, **options):
    """Make a view of random keys that has finished some blocks; return layer 0's first keys too."""
    torch.manual_seed(0)
    view = CachedView(CFG, 20, **options)
    for layer in view.layers:
        for site, cache in layer.items():
            width = CFG.video_width if site == "video_self" else CFG.audio_width
            slots = cache.prefix_tokens + cache.ring_blocks * cache.block_tokens
            cache.k, cache.v = torch.randn(2, 1, slots, 2, width // 2, dtype=torch.float64)
    first = {site: c.k[:, : c.prefix_tokens].clone() for site, c in view.layers[0].items()}
    for _ in range(blocks):
        view.next_block()
    return view, first


@pytest.mark.points(1, "CachedView.next_block")
def test_every_cache_moves_on_by_one_block():
    """All caches of all layers, and the view itself."""
    view, _ = filled_view(2)
    assert view.block == 2, f"after two blocks the view is at block {view.block}"
    for i, layer in enumerate(view.layers):
        for site in SITES:
            found = layer[site].block
            assert found == 2, f"after two blocks layer {i}, {site} is at block {found}"


@pytest.mark.points(2, "CachedView.next_block")
def test_pinned_keys_follow_the_window():
    """With n blocks evicted, prefix and sinks are n seconds later than they were written."""
    view, first = filled_view(6, window=2)  # at block 6: 4 and 5 are kept, 1 to 3 are evicted
    for site in SITES:
        cache = view.layers[0][site]
        found = cache.k[:, : cache.prefix_tokens]
        for seconds in (*range(3), *range(4, 8), 3):  # the right one last
            by = rope.cos_sin(rope.shift_angles(site, seconds, CFG), CFG, dtype=torch.float64)
            if torch.allclose(found, rope.rotate(first[site], by)):
                break
        else:
            seconds = None
        assert seconds == 3, (
            f"{site}: blocks 1 to 3 are evicted, so the pinned keys must stand 3 s later than they "
            f"were written; they stand {'elsewhere' if seconds is None else f'{seconds} s later'}"
        )


@pytest.mark.points(1, "CachedView.next_block")
def test_without_the_pin_the_prefix_leaves_the_window():
    """Block 0 is hidden from the first block that is more than `window` blocks later."""
    for blocks, hidden in ((2, False), (3, True)):
        view, _ = filled_view(blocks, window=2, pinned=False)
        for site, cache in view.layers[1].items():
            rule = f"block {blocks} {'must not' if hidden else 'may still'} attend to block 0"
            is_hidden = cache.first_visible == cache.prefix_tokens
            assert is_hidden == hidden, f"{site}: not pinned and with a window of 2, {rule}"
