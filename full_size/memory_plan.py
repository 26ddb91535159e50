"""What will a stream need, and does it fit?  Computed before anything is loaded.

Nineteen billion parameters, a cache that grows with the window, decoders, and for a while a text
encoder two thirds the size of it all: what does not fit should be refused in the first second, with
the arithmetic, and not by the allocator after ten minutes.

How bytes are counted, and the tools for it, are in `full_size/memory.py`.

    python -m full_size.memory              the full size at windows of 5, 15 and 25 seconds
"""

from dataclasses import replace
from pathlib import Path

import torch

import config
import dmd
import model
from full_size import decoders
from full_size import text as captions
from full_size.memory import GB, Row, peak_bytes, shown, total, weights_row
from kv_cache import CachedView
from masks import SITES, block_span, whole_window
from plumbing import cli
from self_forcing import Block

# ---- sizes that follow from constants ----


def cache_row(cfg, blocks, window, dtype, batch=1) -> Row:
    """The rolling caches of `CachedView(cfg, blocks, window)`, when the window is full."""
    view = CachedView(replace(cfg, num_layers=1), blocks, window)  # all layers are alike
    # then the prefix is kept as it was written as well
    is_evicting = view.window < whole_window(blocks)
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
    nets = decoders.meta_decoders(dtype)
    decoder = decoders.Decoder(*nets, cfg)
    tensors = [t for net in nets for t in net.state_dict().values()]
    weights = sum(t.numel() * t.element_size() for t in tensors)

    def decode(k):
        return decoder.decode(_empty_block(k, cfg, 1, device="meta", dtype=dtype))

    for k in range(3):  # then there is as much context as there ever will be
        decode(k)
    peak = peak_bytes(lambda: decode(3))
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
    short = model.build(replace(cfg, num_layers=2), device="meta")  # the rest need no more
    one_pass = pass_row(short, dtype, batch, merge)
    recorded = Row("recorded passes", one_pass.num_bytes, "one pool of memory, of the widest")
    return [
        weights_row(net, dtype),
        cache_row(cfg, blocks, window, dtype, batch),
        text_row(cfg, prompts + graph, dtype, batch),  # recordings read a copy of their own
        one_pass,
        *([recorded] if graph else []),
    ]


def film_rows(cfg, blocks, window, dtype, speedups=(), prompts=1) -> list[Row]:
    """What a whole film needs: its stream, with speed-ups by name, and LTX-2's decoders."""
    how = dict(merge="merge" in speedups, graph="graph" in speedups)
    return stream_rows(cfg, blocks, window, dtype, prompts, **how) + decoder_rows(cfg, dtype)


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
        for seconds in (5, 15, 25):
            print(f"window {seconds} s, two minutes, bfloat16:")
            print(shown(film_rows(config.FULL, 121, seconds, torch.bfloat16), 80 * GB), "\n")

    with cli.one_line_errors():
        main()
