"""Two ways to limit attention to the past: block-causal masks, and a rolling KV cache.

In training on whole clips, all tokens are computed at once and a mask hides the future. In
streaming, the past is finished. Its keys and values are kept, so block 6000 costs as much as
block 6. Until a block is evicted, both ways give the same numbers (tests/test_kv_cache.py checks
every block). Later they differ by the position of the pinned keys, see below.

Each layer has four attentions over the two streams. Each has a cache of its own:

    video_self   keys from video          audio_self   keys from sinks and audio
    a2v          keys from sinks + audio  v2a          keys from video

A cache is two buffers (B, slots, H, D), keys and values. Block 0, with the sinks, is pinned at the
front. After it, a ring holds the latest blocks, including the current one. A new block overwrites
the oldest (eviction):

    window = 2            slots:   prefix | ring of 3 blocks
    during block 3                    0   | 1  2  3
    during block 4                    0   | 4  2  3      1 is evicted
    during block 5                    0   | 4  5  3      2 is evicted

The slots are not in order of time. Attention does not need that, because every key is already
rotated by its position. The filled slots are always [0, n), so a slice replaces a mask.

Each block takes several passes: one per noise level, then one at sigma = 0, the *refresh*, which
leaves the clean keys and values for later blocks. Every pass writes the same slots. Only the loop
(rollout.py) moves on to the next block, by `next_block()`. A pass may therefore be repeated.

Positions.  When a block is evicted, the pinned keys move one block later in time. With the window
of training, they stay at a distance seen there, for ever. Rotations add up (rope.py).
The unmoved pinned keys are kept and rotated once by the total shift, so rounding errors do not
accumulate.

Forgetting.  `CachedView.forget` keeps the newest block alone: toy/switch.py, on a new prompt.

    python kv_cache.py    prints the slots of a ring of three blocks
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F

import rope
from kernel import cache_append_attention as kernel
from masks import SITES, full_window


class Heads(NamedTuple):
    """How projections become queries and keys: RMSNorm over the full width, heads, rotation."""

    count: int
    eps: float
    q_weight: torch.Tensor  # (H*D,) the norm runs over the full width, before the split into heads
    k_weight: torch.Tensor  # (H*D,)
    q_rope: rope.Rope | None = None  # None: captions, which have no positions here
    k_rope: rope.Rope | None = None

    def split(self, x):
        """(B, T, H*D) -> (B, T, H, D)."""
        return x.unflatten(-1, (self.count, -1))

    def queries(self, q):
        """Projected (B, T, H*D) -> normed and rotated (B, T, H, D)."""
        return self._normed(q, self.q_weight, self.q_rope)

    def keys(self, k):
        """Projected (B, T, H*D) -> normed and rotated (B, T, H, D)."""
        return self._normed(k, self.k_weight, self.k_rope)

    def _normed(self, x, weight, table):
        x = self.split(F.rms_norm(x, x.shape[-1:], weight, self.eps))
        return x if table is None else rope.rotate(x, table)


def attention(q, k, v, may_attend=None):
    """softmax(q k^T / sqrt(D)) v over (B, T, H, D) tensors -> (B, Q, H*D).

    may_attend   booleans or additive floats, broadcastable to (B, H, Q, K); None: no mask
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, may_attend).transpose(1, 2).flatten(2)


class MaskedView:
    """Attention within this pass only, limited by the masks.  No masks: bidirectional."""

    def __init__(self, masks=None):
        self.masks = masks or {}  # site -> (Q, K) booleans, see masks.four_masks

    def for_recompute(self, layer):
        """Return a view for running the layer again: this one, because it holds no state."""
        return self

    def attend(self, layer, site, q, k, v, heads: Heads):
        """Projections (B, T, H*D) of one pass -> (B, Q, H*D)."""
        mask = self.masks.get(site)
        return attention(heads.queries(q), heads.keys(k), heads.split(v), mask)


class RollingCache:
    """Keys and values of one attention: the pinned prefix, then a ring of blocks."""

    def __init__(self, prefix_tokens, block_tokens, ring_blocks):
        self.prefix_tokens = prefix_tokens  # keys of block 0, including the sinks
        self.block_tokens = block_tokens  # keys of every later block
        self.ring_blocks = ring_blocks  # window + 1: the current block needs a place as well
        self.block = 0  # index of the current block
        self.first_visible = 0  # first slot to read; prefix_tokens once an unpinned prefix is out
        self.k = self.v = None  # (B, slots, H, D), allocated by the first append
        self.unmoved_prefix_k = None  # (B, prefix, H, D) pinned keys as they were written

    @property
    def num_filled(self) -> int:
        """Number of slots in use, current block included; they are always the first ones."""
        return self.prefix_tokens + min(self.block, self.ring_blocks) * self.block_tokens

    @property
    def num_new(self) -> int:
        """Number of keys that every pass of the current block brings."""
        return self.block_tokens if self.block else self.prefix_tokens

    @property
    def slots(self) -> slice:
        """Slots of the current block."""
        if self.block == 0:
            return slice(0, self.prefix_tokens)
        start = self.prefix_tokens + (self.block - 1) % self.ring_blocks * self.block_tokens
        return slice(start, start + self.block_tokens)

    def append(self, k, v):
        """Write the keys and values (B, T, H, D) of the current block; return all visible ones.

        Without gradients, the result is a view of the buffers: nothing is copied.
        """
        here = self.checked_slots(k)
        with torch.no_grad():
            self.k[:, here], self.v[:, here] = k, v
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            # A copy: the gradient reaches only the current block, and later writes into the buffer
            # do not change values that the backward pass still needs.
            return self.after_history(k, self.k), self.after_history(v, self.v)
        return self.visible()

    def checked_slots(self, k) -> slice:
        """Slots of the current block; allocates buffers.  Raises ValueError if k does not fit."""
        if self.k is None:
            slots = self.prefix_tokens + self.ring_blocks * self.block_tokens
            self.k, self.v = (k.new_empty(len(k), slots, *k.shape[2:]) for _ in range(2))
        if k.shape[1] != self.num_new:
            raise ValueError(
                f"block {self.block} brings {k.shape[1]} keys, its place in the cache holds "
                f"{self.num_new}"
            )
        return self.slots

    def visible(self):
        """Keys and values to attend to, including the current block: views of the buffers."""
        slots = slice(self.first_visible, self.num_filled)
        return self.k[:, slots], self.v[:, slots]

    def after_history(self, new, buffer):
        """Concatenate the finished blocks of a buffer and the new tensor (B, T, H, D)."""
        if buffer is None:  # nothing was written yet
            return new
        here = self.slots
        before, after = slice(self.first_visible, here.start), slice(here.stop, self.num_filled)
        return torch.cat([buffer[:, before], buffer[:, after], new], 1)

    def next_block(self):
        """Keep the current block; later passes write to the next place of the ring."""
        self.block += 1

    def forget(self):
        """Keep the newest finished block alone, from now on the first of the ring."""
        self.block -= 1
        newest, self.block = self.slots, 1
        for buffer in (self.k, self.v):
            buffer[:, self.slots] = buffer[:, newest].clone()  # the two may overlap
        self.block, self.first_visible = 2, self.prefix_tokens

    def move_prefix(self, by: rope.Rope):
        """Rotate the pinned keys; `by` is the total angle since they were written."""
        if self.unmoved_prefix_k is None:  # a stream without evictions needs no second copy
            self.unmoved_prefix_k = self.k[:, : self.prefix_tokens].clone()
        self.k[:, : self.prefix_tokens] = rope.rotate(self.unmoved_prefix_k, by)


def cache_append_attention(q, k, v, heads: Heads, cache: RollingCache, attend_keys=attention):
    """Norm and rotate, append to the cache, attend to all visible keys: one call per attention.

    q (B, Q, H*D)   k, v (B, T, H*D) projections -> (B, Q, H*D); Q may differ from T.
    attend_keys     attention to all visible keys; full_size/faster.py has another one

    On a GPU without gradients, a CUDA kernel runs. For few queries it does everything, for many it
    does all but attention, and SDPA follows.
    """
    if kernel.supports(q, k, v, heads):
        if kernel.fits_tensor_cores(q, heads.count):
            return kernel.tensor_cores(q, k, v, heads, cache)
        return attend_keys(heads.split(kernel.append(q, k, v, heads, cache)), *cache.visible())
    keys, values = cache.append(heads.keys(k), heads.split(v))
    return attend_keys(heads.queries(q), keys, values)


class CachedView:
    """Attention to the finished blocks and the current one: four rolling caches per layer."""

    def __init__(self, cfg, num_blocks, window=None, pinned=True):
        """Prepare a stream of `num_blocks` blocks.

        window   blocks kept before the current one, in addition to block 0; None: all of them
        pinned   False: block 0 (prefix and sinks) is evicted like any other block (ablation)
        """
        if window is not None and window < 1:
            raise ValueError(f"window={window}: a block must remember at least the one before it")
        self.cfg, self.num_blocks, self.pinned = cfg, num_blocks, pinned
        self.window = num_blocks if window is None else window
        ring = max(1, min(self.window + 1, num_blocks - 1))
        video = cfg.prefix_video_frames * cfg.tokens_per_frame, cfg.video_tokens_per_block, ring
        audio = cfg.num_sinks + cfg.prefix_audio_frames, cfg.audio_frames_per_block, ring
        sizes = dict(zip(SITES, (video, audio, audio, video)))  # of keys; table: top of the file
        self.layers = [
            {site: RollingCache(*sizes[site]) for site in SITES} for _ in range(cfg.num_layers)
        ]
        self.block = 0

    @property
    def caches(self) -> list[RollingCache]:
        """All caches of all layers."""
        return [cache for layer in self.layers for cache in layer.values()]

    @property
    def num_evicted(self) -> int:
        """Number of blocks evicted so far, block 0 not counted."""
        return max(0, self.block - 1 - self.window)

    def attend(self, layer, site, q, k, v, heads: Heads, attend_keys=attention):
        """Projections (B, T, H*D) of the current block -> (B, Q, H*D)."""
        return cache_append_attention(q, k, v, heads, self.layers[layer][site], attend_keys)

    @torch.no_grad()  # moves cached tensors, which have no gradient
    def next_block(self):
        """Keep the finished block, move to the next place, move the pinned keys along."""
        self.block += 1
        for cache in self.caches:
            cache.next_block()
            if not self.pinned and self.block > self.window:
                cache.first_visible = cache.prefix_tokens
        if self.num_evicted:
            for site in SITES:
                self.move_prefixes(site, self._prefix_rotation(site, self.layers[0][site].k))

    @torch.no_grad()
    def forget(self):
        """Forget all finished blocks except the newest; block 0 is no longer pinned."""
        self.pinned = False  # if block 0 is the newest, it leaves with the window
        if self.block > 1:
            self.block = 2
            for layer in self.layers:
                for cache in layer.values():
                    cache.forget()

    def move_prefixes(self, site, by: rope.Rope):
        """Rotate the pinned keys of an attention, in all layers."""
        for layer in self.layers:
            layer[site].move_prefix(by)

    def _prefix_rotation(self, site, like) -> rope.Rope:
        """How far the pinned keys of an attention have moved since they were written."""
        with rope.angle_device(like.device):
            seconds = self.num_evicted * self.cfg.block_seconds
            angles = rope.shift_angles(site, seconds, self.cfg)
        return rope.cos_sin(angles, self.cfg, like.device, like.dtype)

    def for_recompute(self, layer):
        """Return a read-only view of one layer, for activation checkpointing.

        The backward pass runs the layer again, when the stream is at a later block. The view writes
        nothing. The earlier blocks must be as they were: none overwritten, no pinned key moved.

        Raises ValueError for a window that evicts blocks.
        """
        if self.window < (least := full_window(self.num_blocks)):
            raise ValueError(
                f"window={self.window}: activation checkpointing recomputes attention over all "
                f"{self.num_blocks} blocks; expected a window of {least} or more, which evicts none"
            )
        return ReadOnlyView({site: copy.copy(c) for site, c in self.layers[layer].items()})

    def num_bytes(self) -> int:
        """Memory of the caches."""
        buffers = [b for c in self.caches for b in (c.k, c.v, c.unmoved_prefix_k)]
        return sum(b.numel() * b.element_size() for b in buffers if b is not None)


class ReadOnlyView:
    """One layer's caches as they were during one block, readable at a later block."""

    def __init__(self, caches):
        self.caches = caches  # site -> copies that share the buffers but keep their own counters

    def attend(self, layer, site, q, k, v, heads: Heads):
        """Projections (B, T, H*D) of the block -> (B, Q, H*D)."""
        cache = self.caches[site]
        keys = cache.after_history(heads.keys(k), cache.k)
        values = cache.after_history(heads.split(v), cache.v)
        return attention(heads.queries(q), keys, values)


if __name__ == "__main__":
    cache = RollingCache(prefix_tokens=1, block_tokens=1, ring_blocks=3)
    for block in range(6):
        cache.append(*(torch.full((1, 1, 1, 2), float(block)) for _ in range(2)))
        print(f"during block {block}: {cache.k[0, : cache.num_filled, 0, 0].int().tolist()}")
        cache.next_block()
