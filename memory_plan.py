"""What will a stream need, and does it fit?  Computed before anything is loaded.

Nineteen billion parameters, a cache that grows with the window, decoders, and for a while a text
encoder two thirds the size of it all: what does not fit should be refused in the first second, with
the arithmetic, and not by the allocator after ten minutes.

Sizes that follow from constants are multiplied out. What an activation takes at its widest moment
is not guessed either: the same code runs once on `meta` tensors, which have shapes but no contents,
while `peak_bytes` counts what is alive.

    python memory_plan.py              the full size at windows of 5, 15 and 25 seconds
"""

import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import captions
import cli
import config
import decoders
import dmd
import model
from kv_cache import CachedView
from masks import SITES, block_span
from self_forcing import Block

GB = 1e9


class Row(NamedTuple):
    """One thing that takes memory while the stream runs."""

    what: str
    num_bytes: int
    how: str  # the arithmetic


# ---- sizes that follow from constants ----


def weights_row(net, dtype) -> Row:
    """Parameters times bytes each; `net` may be on the meta device."""
    n, size = net.num_parameters(), dtype.itemsize
    return Row("transformer", n * size, f"{n:,} parameters x {size} bytes")


def cache_row(cfg, blocks, window, dtype, batch=1) -> Row:
    """The rolling caches of `CachedView(cfg, blocks, window)`, when the window is full."""
    view = CachedView(replace(cfg, num_layers=1), blocks, window)  # all layers are alike
    is_evicting = view.window < blocks - 2  # then the prefix is kept as it was written as well
    values = sum(_cache_values(view.layers[0][site], site, cfg, is_evicting) for site in SITES)
    how = f"{cfg.num_layers} layers x (keys, values) of 4 attentions, window {view.window} blocks"
    return Row("rolling caches", batch * cfg.num_layers * values * dtype.itemsize, how)


def _cache_values(cache, site, cfg, is_evicting):
    """Numbers that one cache holds: keys, values, and perhaps the prefix's first keys."""
    width = cfg.video_width if site == "video_self" else cfg.audio_width
    slots = cache.prefix_tokens + cache.ring_blocks * cache.block_tokens
    return width * (2 * slots + is_evicting * cache.prefix_tokens)


def text_row(cfg, prompts, dtype, batch=1) -> Row:
    """Keys and values of every prompt, once for each layer and stream."""
    width = cfg.video_width + cfg.audio_width
    values = 2 * prompts * batch * cfg.num_layers * captions.TOKENS * width
    how = f"{prompts} x {captions.TOKENS} tokens x {cfg.num_layers} layers x 2 x {width} channels"
    return Row("keys and values of prompts", values * dtype.itemsize, how)


# ---- sizes of activations: run on tensors without contents ----


class _Living(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that are still alive; views are no tensors."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._meet((args, kwargs), are_new=False)
        out = function(*args, **(kwargs or {}))
        self._meet(out, are_new=True)
        return out

    def _meet(self, tree, are_new):
        storages = [t.untyped_storage() for t in tree_iter(tree) if torch.is_tensor(t)]
        for storage in storages:
            if storage._cdata in self.sizes:
                continue
            self.sizes[storage._cdata] = storage.nbytes() if are_new else 0
            self.now += self.sizes[storage._cdata]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._dead, storage._cdata)

    def _dead(self, name):
        self.now -= self.sizes.pop(name)


class _FusedAttention(TorchFunctionMode):
    """On a GPU no (Q, K) matrix of scores is ever written; on meta tensors it would be counted."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))


@torch.inference_mode()
def peak_bytes(function) -> int:
    """The most memory alive at once of what `function` makes, when called on meta tensors.

    >>> peak_bytes(lambda: (torch.empty(10, device="meta") + 1).sum())       # 40 + 40, then 40 + 4
    80
    """
    with _FusedAttention(), _Living() as living:
        function()
    return living.peak


@torch.inference_mode()
def pass_row(net, dtype, batch=1, merge=False) -> Row:
    """The largest pass, besides weights and caches; `net` on the meta device.

    merge   it may be over two blocks
    """
    cfg, net = net.cfg, net.to(dtype)
    like = dict(device="meta", dtype=dtype)
    text = net.project_text(torch.empty(batch, captions.TOKENS, cfg.caption_width, **like))
    view = CachedView(cfg, 3, window=1)

    def one_pass(k, view, past=None):
        dmd.at_sigma(net, block(k), 1.0, text, block_span(k, cfg), view, past)

    def block(k):
        return [*_empty_block(k, cfg, batch, **like)[1:]]

    def widest():
        past = dmd.Finished(block(1), text, block_span(1, cfg)) if merge else None
        one_pass(1 + merge, view.remembered(), past)

    one_pass(0, view)  # allocates the caches, which have a row of their own
    view.next_block()
    widest()  # makes the rotary tables, which are kept
    tokens = (1 + merge) * (cfg.video_tokens_per_block + cfg.audio_frames_per_block)
    return Row("one pass", peak_bytes(widest), f"{tokens} tokens at the widest moment")


def _empty_block(k, cfg, batch, **like):
    return Block(k, *model.draw_noise(batch, block_span(k, cfg), cfg, torch.Generator(), **like))


@torch.inference_mode()
def decoder_rows(cfg, dtype) -> list[Row]:
    """LTX-2's decoders and what they need while they decode a block with its context."""
    nets = decoders.empty(dtype)
    decoder = decoders.Decoder(*nets, cfg)
    tensors = [t for net in nets for t in net.state_dict().values()]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    for k in range(4):  # until there is as much context as there ever will be
        block = _empty_block(k, cfg, 1, device="meta", dtype=dtype)
        peak = peak_bytes(lambda: decoder.decode(block))
    context, _ = decoders.Overlap().video
    how = f"{context} latents of context and {cfg.video_frames_per_block} new ones"
    return [
        Row("decoders", weights, "of video and audio, and the vocoder in float32"),
        Row("decoding", peak, how),
    ]


# ---- the plan ----


def stream_rows(
    cfg, blocks, window, dtype, prompts=1, batch=1, merge=False, graph=False
) -> list[Row]:
    """What streaming needs besides the decoders; `merge` and `graph` as in parts.SPEEDUPS."""
    net = model.build(cfg, device="meta")
    one_pass = pass_row(net, dtype, batch, merge)
    recorded = Row("recorded passes", one_pass.num_bytes, "one pool of memory, of the widest")
    return [
        weights_row(net, dtype),
        cache_row(cfg, blocks, window, dtype, batch),
        text_row(cfg, prompts + graph, dtype, batch),  # recordings read a copy of their own
        one_pass,
        *([recorded] if graph else []),
    ]


def free_bytes(device) -> int:
    """Memory that can still be had there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # free, and what the system would give up of its file cache
        line = next(x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def total(rows) -> int:
    return sum(row.num_bytes for row in rows)


def shown(rows, free) -> str:
    """The arithmetic, one line each.

    >>> print(shown([Row("transformer", 37_750_000_000, "18.9e9 x 2 bytes")], 80_000_000_000))
       37.75 GB  transformer: 18.9e9 x 2 bytes
       37.75 GB  in all, of 80.00 GB free
    """
    lines = [f"{row.num_bytes / GB:8.2f} GB  {row.what}: {row.how}" for row in rows]
    return "\n".join([*lines, f"{total(rows) / GB:8.2f} GB  in all, of {free / GB:.2f} GB free"])


def check(rows, free, cfg, blocks, dtype, batch=1):
    """Raises ValueError for a plan that does not fit, naming the longest window that does."""
    if total(rows) <= free:
        return
    others = total([row for row in rows if row.what != "rolling caches"])
    fitting = [w for w in range(1, blocks) if others + _cache(cfg, blocks, w, dtype, batch) <= free]
    seconds = f"--window {max(fitting)} would fit" if fitting else "no window is short enough"
    raise ValueError(
        f"this stream needs {total(rows) / GB:.1f} GB and {free / GB:.1f} GB are free: {seconds}"
    )


def check_text(folder, free):
    """Raises ValueError for a text encoder that does not fit, though it leaves before the rest."""
    found = [p for part in captions.TEXT_PARTS for p in Path(folder, part).glob("*.safetensors")]
    size = sum(p.stat().st_size for p in found)
    print(f"{size / GB:8.2f} GB  before all that: the text encoder, freed when it has read")
    if size > free:
        raise ValueError(f"{folder}: a text encoder of {size / GB:.1f} GB, {free / GB:.1f} GB free")


def _cache(cfg, blocks, window, dtype, batch):
    return cache_row(cfg, blocks, window, dtype, batch).num_bytes


if __name__ == "__main__":

    def main():
        like = config.FULL, torch.bfloat16
        for seconds in (5, 15, 25):
            print(f"window {seconds} s, two minutes, bfloat16:")
            rows = stream_rows(config.FULL, 121, seconds, torch.bfloat16) + decoder_rows(*like)
            print(shown(rows, 80 * GB), "\n")

    cli.run(main)
