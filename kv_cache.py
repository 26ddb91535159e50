"""What may these queries attend to?  Two answers: a mask, or a rolling cache.

While training on whole clips, every token is recomputed and a mask hides the future. While
streaming, the past is finished and its keys and values are kept, so that block k costs the same
whether it is the 6th or the 6000th. Both answers give the same numbers; that is the invariant this
project rests on, and `tests/test_kv_cache.py` checks it for every block.

Each layer has four attentions over the two streams, and each keeps a cache of its own:

    video_self   keys from video          audio_self   keys from sinks and audio
    a2v          keys from sinks + audio  v2a          keys from video

A cache is two buffers (B, slots, H, D), keys and values. Block 0, with the sinks, is pinned in
front; behind it a ring holds the latest blocks, the current one included, and the oldest is
overwritten:

    window = 2            slots:   prefix | ring of 3 blocks
    during block 3                 S V0   | 1  2  3
    during block 4                 S V0   | 4  2  3      1 is forgotten
    during block 5                 S V0   | 4  5  3      2 is forgotten

Slots are out of order in time; attention does not mind, since positions are inside the keys. The
filled slots are always [0, n) with n known on the host: no mask is needed, a slice does it.

A block takes several passes (one per noise level, then one at sigma = 0, the *refresh*, that leaves
the clean keys and values for later blocks). Every pass writes the same slots; only the loop moves
on to the next block, by `next_block()`. So a pass may be repeated without harm. (The refresh may
share a pass with the next block's first: `MergedView`.)

Positions.  When a block is forgotten, the pinned keys move one block later in time, so that prefix
and sinks stay at a distance the model was trained on, however long the stream. Rotations add up
(rope.py): the pinned keys are turned from their original each time, by one exact angle, so errors
do not add up as well.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F

import rope
from kernel import cache_append_attention as kernel
from masks import LISTENER, SITES, whole_window


class Heads(NamedTuple):
    """How raw projections become queries and keys: full-width RMSNorm, heads, rotation."""

    count: int
    eps: float
    q_weight: torch.Tensor  # (H*D,) the norm runs over the whole width, before the head split
    k_weight: torch.Tensor  # (H*D,)
    q_rope: rope.Rope | None = None  # None: text, which has no positions here
    k_rope: rope.Rope | None = None

    def of(self, queries: slice, keys: slice) -> "Heads":
        """The same for some of the queries and keys."""
        return self._replace(q_rope=self.q_rope.of(queries), k_rope=self.k_rope.of(keys))

    def split(self, x):
        """(B, T, H*D) -> (B, T, H, D)."""
        return x.unflatten(-1, (self.count, -1))

    def queries(self, q):
        """Raw (B, T, H*D) -> normed, rotated (B, T, H, D)."""
        return self._normed(q, self.q_weight, self.q_rope)

    def keys(self, k):
        """Raw (B, T, H*D) -> normed, rotated (B, T, H, D)."""
        return self._normed(k, self.k_weight, self.k_rope)

    def _normed(self, x, weight, table):
        x = self.split(F.rms_norm(x, x.shape[-1:], weight, self.eps))
        return x if table is None else rope.rotate(x, table)


def attention(q, k, v, may_attend=None):
    """softmax(q k^T / sqrt(D)) v over (B, T, H, D) tensors -> (B, Q, H*D).

    may_attend   booleans or additive floats, broadcastable to (B, H, Q, K); None: everything
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, may_attend).transpose(1, 2).flatten(2)


class MaskedView:
    """Attend within this very pass, as far as the masks allow; no masks: bidirectional."""

    def __init__(self, masks=None):
        self.masks = masks or {}  # site -> (Q, K) booleans, see masks.four_masks

    def frozen(self, layer):
        """For a layer that is run twice (`CachedView.frozen`): nothing here ever changes."""
        return self

    def attend(self, layer, site, q, k, v, heads: Heads):
        """Raw projections (B, T, H*D) of one pass -> (B, Q, H*D)."""
        mask = self.masks.get(site)
        return attention(heads.queries(q), heads.keys(k), heads.split(v), mask)


class RollingCache:
    """Keys and values of one attention: the pinned prefix, then a ring of blocks."""

    def __init__(self, prefix_tokens, block_tokens, ring_blocks):
        self.prefix_tokens = prefix_tokens  # keys of block 0, sinks included
        self.block_tokens = block_tokens  # keys of every later block
        self.ring_blocks = ring_blocks  # window + 1: the current block needs a place as well
        self.block = 0  # the block being written
        self.first = 0  # first slot that may be read: 0, or behind a prefix that is not pinned
        self.k = self.v = None  # (B, slots, H, D), made by the first append
        self.original_prefix_k = None  # (B, prefix, H, D) as rotated when it was written

    @property
    def num_filled(self) -> int:
        """Slots in use once the current block is written; always the first ones."""
        return self.prefix_tokens + min(self.block, self.ring_blocks) * self.block_tokens

    @property
    def num_new(self) -> int:
        """Keys that the current block brings, all of them in every pass."""
        return self.block_tokens if self.block else self.prefix_tokens

    @property
    def slots(self) -> slice:
        """Where the current block is written."""
        if self.block == 0:
            return slice(0, self.prefix_tokens)
        start = self.prefix_tokens + (self.block - 1) % self.ring_blocks * self.block_tokens
        return slice(start, start + self.block_tokens)

    def append(self, k, v):
        """Write the current block's keys and values (B, T, H, D); return all visible ones.

        Without gradient the answer is a view of the buffer: nothing is copied. Under autograd it
        is a copy, history first: the gradient reaches the current block only, and the next write
        into the buffer cannot spoil a backward pass that still needs these values.
        """
        here = self.place_for(k)
        with torch.no_grad():
            self.k[:, here], self.v[:, here] = k, v
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            return self._history_and(k, self.k), self._history_and(v, self.v)
        return self.visible()

    def place_for(self, k) -> slice:
        """The slots of keys (B, T, H, D), which must fill them exactly."""
        if self.k is None:
            self._allocate(k)
        if k.shape[1] != self.num_new:
            raise ValueError(
                f"block {self.block} brings {k.shape[1]} keys, its place in the cache holds "
                f"{self.num_new}"
            )
        return self.slots

    def visible(self):
        """Keys and values that may be read, the current block's included: views of the buffers."""
        return self.k[:, self.first : self.num_filled], self.v[:, self.first : self.num_filled]

    def _allocate(self, k):
        slots = self.prefix_tokens + self.ring_blocks * self.block_tokens
        self.k, self.v = (k.new_empty(k.shape[0], slots, *k.shape[2:]) for _ in range(2))

    def _history_and(self, new, buffer):
        if buffer is None:  # nothing was written yet
            return new
        here = self.slots
        before, after = slice(self.first, here.start), slice(here.stop, self.num_filled)
        return torch.cat([buffer[:, before], buffer[:, after], new], 1)

    def next_block(self):
        """Leave the current block as it is and move to the next place."""
        self.block += 1

    def move_prefix(self, by: rope.Rope):
        """Turn the pinned keys by an angle counted from where they were written."""
        if self.original_prefix_k is None:  # a stream that forgets nothing needs no second copy
            self.original_prefix_k = self.k[:, : self.prefix_tokens].clone()
        self.k[:, : self.prefix_tokens] = rope.rotate(self.original_prefix_k, by)


def cache_append_attention(q, k, v, heads: Heads, cache: RollingCache):
    """Norm and rotate, append to the cache, attend to all it holds: one call per attention.

    q (B, Q, H*D)   k, v (B, T, H*D) raw projections -> (B, Q, H*D); Q may differ from T.

    On a GPU and without gradients a kernel does the same in one launch, or in one before SDPA.
    """
    if kernel.supports(q, k, v, heads):
        if kernel.are_few(q, k):
            return kernel.fused(q, k, v, heads, cache)
        return attention(heads.split(kernel.append(q, k, v, heads, cache)), *cache.visible())
    keys, values = cache.append(heads.keys(k), heads.split(v))
    return attention(heads.queries(q), keys, values)


class CachedView:
    """Attend to the finished blocks and to the current one: four rolling caches per layer."""

    moves = {}  # rotations of pinned keys during a pass: none, they move between blocks

    def __init__(self, cfg, num_blocks, window=None, pinned=True):
        """Room for a stream of `num_blocks`.

        window   blocks remembered before the current one, besides block 0; None: all of them.
        pinned   False: block 0, prefix and sinks, is forgotten like any other (a control)
        """
        if window is not None and window < 1:
            raise ValueError(f"window={window}: a block must remember at least the one before it")
        self.cfg, self.num_blocks, self.pinned = cfg, num_blocks, pinned
        self.window = num_blocks if window is None else window
        ring = max(1, min(self.window + 1, num_blocks - 1))
        video = cfg.prefix_video_frames * cfg.tokens_per_frame, cfg.video_tokens_per_block, ring
        audio = cfg.num_sinks + cfg.prefix_audio_frames, cfg.audio_frames_per_block, ring
        sizes = dict(zip(SITES, (video, audio, audio, video)))  # keys: own, own, audio, video
        self.layers = [
            {site: RollingCache(*sizes[site]) for site in SITES} for _ in range(cfg.num_layers)
        ]
        self.block = 0

    @property
    def num_evicted(self) -> int:
        """Blocks forgotten by now."""
        return max(0, self.block - 1 - self.window)

    def attend(self, layer, site, q, k, v, heads: Heads):
        """Raw projections (B, T, H*D) of the current block -> (B, Q, H*D)."""
        return cache_append_attention(q, k, v, heads, self.layers[layer][site])

    def frozen(self, layer):
        """This block's view for a layer whose activations are computed again by its backward pass.

        By then the stream has moved on. So the layer writes nothing (what a pass with a gradient
        writes is noisy, and the refresh overwrites it before it is read), and the history must
        still be where it was: the ring must not have come round, nor the prefix have moved.

        Raises ValueError for a window that forgets.
        """
        if self.window < (least := whole_window(self.num_blocks)):
            raise ValueError(
                f"window={self.window}: of {self.num_blocks} blocks some would be forgotten, and "
                f"checkpointed activations are computed from them once more; expected a window of "
                f"{least} or more"
            )
        return FrozenView({site: copy.copy(c) for site, c in self.layers[layer].items()})

    @torch.no_grad()  # what is remembered is data: no gradient crosses from block to block
    def next_block(self):
        """The current block is finished: keep it, make room, move the pinned keys."""
        self.move_on()
        for site, by in self.shifts().items():
            for layer in self.layers:
                layer[site].move_prefix(by)

    def move_on(self):
        """Count one block further, everywhere; keys and values stay as they are."""
        self.block += 1
        for cache in (cache for layer in self.layers for cache in layer.values()):
            cache.next_block()
            if not self.pinned and self.block > self.window:
                cache.first = cache.prefix_tokens

    def shifts(self) -> dict[str, rope.Rope]:
        """How far the pinned keys of every site are moved now; nowhere if none was forgotten."""
        if not self.num_evicted:
            return {}
        seconds, first = self.num_evicted * self.cfg.block_seconds, self.layers[0]
        return {site: self._shift(site, seconds, first[site].k) for site in SITES}

    def _shift(self, site, seconds, like) -> rope.Rope:
        with rope.computed_on(like.device):
            angles = rope.shift_angles(site, seconds, self.cfg)
        return rope.tables(angles, self.cfg, like.device, like.dtype)

    def remembered(self) -> "CachedView":
        """This view as it is now, on the same memory; it stays here when the other moves on."""
        now = copy.copy(self)
        now.layers = [{site: copy.copy(c) for site, c in layer.items()} for layer in self.layers]
        return now

    @property
    def place(self) -> int | None:
        """Place of the current block in the ring, once the window is full; before that, None.

        Passes at the same place touch the same memory, one turn of the ring later.
        """
        ring = self.layers[0]["video_self"].ring_blocks
        return (self.block - 1) % ring if self.block > ring else None

    def num_bytes(self) -> int:
        """Memory held by the caches."""
        caches = [cache for layer in self.layers for cache in layer.values()]
        buffers = [b for c in caches for b in (c.k, c.v, c.original_prefix_k)]
        return sum(b.numel() * b.element_size() for b in buffers if b is not None)


class MergedView:
    """Two blocks in one pass: a finished one, now clean, is refreshed; the next one is begun.

    Both stand one behind the other in all that is linear. Attention goes block by block: the
    finished block writes its clean keys and values and attends as in a pass of its own; then the
    pinned keys move, as between two passes; then the next block does the same in its place.

    The view moves on to the next block at once, in `__init__`, as far as counting goes; what moves
    in memory moves during the pass.
    """

    def __init__(self, view: CachedView):
        self.finished = view.remembered()
        view.move_on()
        self.next, self.layers, self.moves = view, view.layers, view.shifts()

    @property
    def place(self) -> int | None:
        """As in CachedView: where the finished block is written; the next one follows."""
        return self.finished.place

    def attend(self, layer, site, q, k, v, heads: Heads):
        """Raw projections (B, T, H*D) of both blocks -> (B, Q, H*D)."""
        first, second = self._halves(site, q, k, v, heads)
        done = self.finished.attend(layer, site, *first)
        if self.moves:
            self.layers[layer][site].move_prefix(self.moves[site])
        return torch.cat([done, self.next.attend(layer, site, *second)], 1)

    def _halves(self, site, q, k, v, heads):
        """What each block brings to an attention."""
        caches = self.finished.layers[0]
        queries, keys = caches[LISTENER[site]].num_new, caches[site].num_new
        for rows, new in ((slice(queries), slice(keys)), (slice(queries, None), slice(keys, None))):
            yield q[:, rows], k[:, new], v[:, new], heads.of(rows, new)


class FrozenView:
    """One layer's caches during one block: what was finished before it, whenever it is asked."""

    def __init__(self, caches):
        """Copies that share the buffers, by site; see `CachedView.frozen`."""
        self.caches = caches

    def attend(self, layer, site, q, k, v, heads: Heads):
        """Raw projections (B, T, H*D) of the block -> (B, Q, H*D)."""
        cache = self.caches[site]
        keys = cache._history_and(heads.keys(k), cache.k)
        values = cache._history_and(heads.split(v), cache.v)
        return attention(heads.queries(q), keys, values)


if __name__ == "__main__":
    cache = RollingCache(prefix_tokens=1, block_tokens=1, ring_blocks=3)
    for block in range(6):
        cache.append(*(torch.full((1, 1, 1, 2), float(block)) for _ in range(2)))
        print(f"during block {block}: {cache.k[0, : cache.num_filled, 0, 0].int().tolist()}")
        cache.next_block()
