"""Compute the memory of a stream or a training before anything is loaded.

One that cannot fit is refused in the first second, with the arithmetic, and not by the allocator
after ten minutes. Bytes are counted in two ways:

  * Weights, caches and optimiser states are products of constants.
  * Activations follow from the code. It runs once on `meta` tensors, which have shapes but no
    contents, and `peak_bytes` counts the tensors that are alive at the same time.

A stream needs the transformer, the KV caches of a full window, the keys and values of its prompts,
one pass and the decoders. The text encoder is freed before all these are loaded.

A training holds every network that learns in float32: weights, gradient, the two moments of AdamW,
and sometimes an average. All of it is sharded, so more processes help:

    generator   18.9e9 parameters x (4 + 4 + 8 + 4) bytes = 378 GB  |
    critic      the same without average                    302 GB  |-- / processes
    teacher     frozen, in bfloat16                          38 GB  |

Gathered layers and activations are not sharded. Activations are counted with two and with three
layers, and extrapolated: every further layer adds as much as the third.

    python -m full_size.memory               a stream with a window of 5, 15 and 25 s, on two cards
    python -m benchmarks.training_memory     the three stages on 8, 16 and 32 GPUs
"""

import functools
import math
import os
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

import config
import model
from full_size import decoders, fp8, parts, sharding, text
from kv_cache import CachedView
from masks import SITES, block_span, full_window
from plumbing import cli, processes
from rollout import Block

GB = 1e9
# of the printed tables
STREAM = config.FULL, 121  # config and blocks: two minutes
WINDOWS, CARDS = (5, 15, 25), (48 * GB, 80 * GB)
SPARE = 0.03  # part of a card that the plan leaves free: on an H100 a peak was 1.1 % above its plan
LAYERS_AT_WORK = 2  # FSDP gathers the next layer while one runs
MAX_PROCESSES = 1024  # the largest number that is tried as advice


class Row(NamedTuple):
    """One thing that takes memory."""

    what: str
    num_bytes: int
    how: str  # the arithmetic


def total(rows) -> int:
    return sum(row.num_bytes for row in rows)


def shown(rows, free) -> str:
    """Return the arithmetic, one line per row.

    >>> print(shown([Row("transformer", 37_750_000_000, "18.9e9 x 2 bytes")], 80_000_000_000))
       37.75 GB  transformer: 18.9e9 x 2 bytes
       37.75 GB  in all, of 80.00 GB free
    """
    lines = [f"{row.num_bytes / GB:8.2f} GB  {row.what}: {row.how}" for row in rows]
    return "\n".join([*lines, f"{total(rows) / GB:8.2f} GB  in all, of {free / GB:.2f} GB free"])


def free_bytes(device) -> int:
    """Return the free memory of a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # MemAvailable includes the file cache, which the system can give up
        lines = meminfo.read_text("utf-8").splitlines()
        return 1024 * int(next(x for x in lines if x.startswith("MemAvailable")).split()[1])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # Windows has no sysconf, macOS does not count pages
        return sys.maxsize  # not known: refuse nothing


# ---- activations: counted on tensors without contents ----


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all living tensors that were made inside `with`."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0  # sizes: of every storage, by its address

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._count((args, kwargs), are_new=False)  # inputs that were made outside cost nothing
        out = function(*args, **(kwargs or {}))
        self._count(out, are_new=True)
        return out

    def _count(self, tree, are_new):
        storages = [t.untyped_storage() for t in tree_iter(tree) if torch.is_tensor(t)]
        for storage in storages:  # a view has the storage of its base, so it costs nothing
            if storage._cdata in self.sizes:
                continue
            self.sizes[storage._cdata] = storage.nbytes() if are_new else 0
            self.now += self.sizes[storage._cdata]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, address):
        self.now -= self.sizes.pop(address)


class _FusedAttention(torch.autograd.Function):
    """The memory of a fused attention: its output, and what it saves for the backward pass."""

    # On a GPU, SDPA never writes the (Q, K) scores. On meta tensors PyTorch would make them.
    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _round_in_one_kernel(x):
    """The memory of fp8.rounded as one kernel: its outputs, no float32 copy of x."""
    scale = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    return fp8.Rounded(torch.empty_like(x, dtype=fp8.FP8), scale)


def peak_bytes(function) -> int:
    """Call a function on meta tensors; return the most bytes of its tensors alive at one time.

    >>> peak_bytes(lambda: (torch.empty(10, device="meta") + 1).sum())       # 40 + 40, then 40 + 4
    80
    """

    def attention(q, k, v, *_, **__):
        return _FusedAttention.apply(q, k, v)

    with (
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch.object(fp8, "rounded", _round_in_one_kernel),
        _LiveBytes() as living,
    ):
        function()
    return living.peak


# ---- a stream ----


def weights_row(cfg, dtype, in_fp8=False) -> Row:
    """Count the weights of the transformer; in_fp8: see full_size/fp8.py."""
    net, counts = _meta_student(cfg, dtype, in_fp8), Counter()
    for p in net.parameters():
        counts[p.itemsize] += p.numel()
    how = ", ".join(f"{n:,} parameters x {size} bytes" for size, n in sorted(counts.items()))
    return Row("transformer", sum(n * size for size, n in counts.items()), how)


def _meta_student(cfg, dtype, in_fp8):
    net = model.build(cfg, device="meta").to(dtype)
    if in_fp8:
        fp8.quantise(net.layers)
    return net


def cache_row(cfg, blocks, window, dtype) -> Row:
    """Count the caches of `CachedView(cfg, blocks, window)` when the window is full."""
    view = CachedView(replace(cfg, num_layers=1), blocks, window)  # all layers are alike
    evicts, values = view.window < full_window(blocks), 0
    for site, cache in view.layers[0].items():
        width = cfg.video_width if site == "video_self" else cfg.audio_width
        slots = cache.prefix_tokens + cache.ring_blocks * cache.block_tokens
        values += 2 * slots * width  # keys and values
        values += evicts * cache.prefix_tokens * width  # a copy of the pinned keys, before rotation
    how = f"{cfg.num_layers} layers x (keys, values) of {len(SITES)} attentions"
    size = cfg.num_layers * values * dtype.itemsize
    return Row("rolling caches", size, f"{how}, window {view.window} blocks")


def text_row(cfg, prompts, dtype) -> Row:
    """Count the keys and values of every prompt, for each layer and modality."""
    width = cfg.video_width + cfg.audio_width
    values = 2 * prompts * cfg.num_layers * text.TOKENS * width
    how = f"{prompts} x {text.TOKENS} tokens x {cfg.num_layers} layers x 2 x {width} channels"
    return Row("keys and values of prompts", values * dtype.itemsize, how)


@torch.inference_mode()
def pass_row(cfg, dtype, in_fp8=False, layers=2) -> Row:
    """Count the activations of one pass."""
    # Without gradients a layer frees its activations: two layers need as many as all 48.
    net = _meta_student(replace(cfg, num_layers=layers), dtype, in_fp8)
    features = torch.empty(1, text.TOKENS, cfg.caption_width, device="meta", dtype=dtype)
    prompt, view = net.project_text(features), CachedView(net.cfg, 3, window=1)

    def one_pass(k):
        _, video, audio = _meta_block(k, cfg, dtype)
        sigma = video.new_ones(1)
        model.predict_x0(net, video, audio, sigma, sigma, prompt, block_span(k, cfg), view)

    one_pass(0)  # allocates the caches, which have a row of their own
    view.next_block()
    one_pass(1)  # makes the rotation tables, which `model.ropes_of` caches
    tokens = cfg.video_tokens_per_block + cfg.audio_frames_per_block
    size = peak_bytes(lambda: one_pass(1))
    return Row("one pass", size, f"{tokens} tokens at the widest moment")


def _meta_block(k, cfg, dtype) -> Block:
    noise = model.draw_noise(1, block_span(k, cfg), cfg, torch.Generator(), "meta", dtype)
    return Block(k, *noise)


@torch.inference_mode()
def decoder_rows(cfg, dtype, overlap=(4, 0)) -> list[Row]:
    """Count the decoders of LTX-2, and their activations for a block; overlap: of the video."""
    nets = decoders.meta_decoders(dtype)
    decoder = decoders.Decoder(*nets, cfg, decoders.Overlap(overlap))
    frames = cfg.video_frames_per_block
    size = sum(t.nbytes for net in nets for t in net.state_dict().values())
    full = 1 + math.ceil(sum(overlap) / frames)  # from then on, every block has its full context
    for k in range(full):
        decoder.decode(_meta_block(k, cfg, dtype))
    peak = peak_bytes(lambda: decoder.decode(_meta_block(full, cfg, dtype)))
    how = f"{sum(overlap)} latents of context and {frames} new ones"
    return [
        Row("decoders", size, "of video and audio, and the vocoder in float32"),
        Row("decoding", peak, how),
    ]


def stream_rows(cfg, blocks, window, dtype, speedups=(), prompts=1, in_fp8=False) -> list[Row]:
    """Count everything that a stream needs except the decoders; speedups: see faster.SPEEDUPS."""
    one_pass, is_recorded = pass_row(cfg, dtype, in_fp8), "graph" in speedups
    copies = prompts + is_recorded  # recorded passes read a copy of the prompt of their own
    rows = [
        weights_row(cfg, dtype, in_fp8),
        cache_row(cfg, blocks, window, dtype),
        text_row(cfg, copies, dtype),
        one_pass,
    ]
    pool = Row("recorded passes", one_pass.num_bytes, "one memory pool, as large as one pass")
    return [*rows, pool] if is_recorded else rows


def film_rows(
    cfg, blocks, window, dtype, speedups=(), prompts=1, in_fp8=False, overlap=(4, 0)
) -> list[Row]:
    """Count everything that a film needs: its stream and the decoders of LTX-2."""
    stream = stream_rows(cfg, blocks, window, dtype, speedups, prompts, in_fp8)
    return stream + decoder_rows(cfg, dtype, overlap)


def check_stream(request):
    """Print the memory that a `generate.Request` needs.  Raises ValueError if it does not fit."""
    cfg, blocks, dtype = request.cfg, request.num_blocks, request.dtype
    free = free_bytes(request.device)
    prompts = min(2, len(request.cues))  # while one follows another, both are there
    rows = film_rows(
        cfg, blocks, request.window, dtype, request.speedups, prompts, request.in_fp8,
        request.video_overlap,
    )  # fmt: skip
    print(shown(rows, free))
    check_window(rows, free, cfg, blocks, dtype, request.in_fp8)
    if request.ltx2:
        check_text(request.ltx2, free)


@torch.inference_mode()
def encoder_row(cfg, dtype) -> Row:
    """Count the encoder of a first picture, and its activations."""
    vae = decoders.meta_encoder(dtype)
    picture = torch.empty(3, cfg.height, cfg.width, device="meta")
    size = sum(t.nbytes for t in vae.state_dict().values())
    peak = peak_bytes(lambda: decoders.encode_picture(vae, picture))
    how = f"{size / GB:.2f} GB of weights, and one frame of {cfg.height} x {cfg.width}"
    return Row("video encoder", size + peak, how)


def check_encoder(request):
    """Print what encoding a picture needs.  Raises ValueError if it does not fit."""
    row, free = encoder_row(request.cfg, request.dtype), free_bytes(request.device)
    print(f"{row.num_bytes / GB:8.2f} GB  before all that: the {row.what}, {row.how}, freed")
    if row.num_bytes > free:
        raise ValueError(f"--image needs {row.num_bytes / GB:.1f} GB, {free / GB:.1f} GB are free")


def check_features(prompts, request):
    """Raise ValueError if the features of so many prompts do not fit into the host's memory."""
    size = prompts * 2 * text.TOKENS * request.cfg.caption_width * request.dtype.itemsize
    if size > (free := free_bytes(torch.device("cpu"))):
        raise ValueError(
            f"the features of {prompts} prompts need {size / GB:.1f} GB of the host's memory, and "
            f"{free / GB:.1f} GB are free: cut the list into shorter ones"
        )


def check_window(rows, free, cfg, blocks, dtype, in_fp8=False):
    """Raise ValueError for a stream that does not fit, naming the longest window that does."""
    if total(rows) <= free:
        return
    window = longest_window(rows, free, cfg, blocks, dtype)
    advice = f"--window {window} would fit" if window else "no window is short enough"
    smaller = "" if in_fp8 else "; --dtype fp8 makes the transformer smaller"
    raise ValueError(
        f"this stream needs {total(rows) / GB:.1f} GB and {free / GB:.1f} GB are free: "
        f"{advice}{smaller}"
    )


def longest_window(rows, free, cfg, blocks, dtype) -> int:
    """Return the longest window with which the stream of these rows fits; 0 if none does."""
    others = total([row for row in rows if row.what != "rolling caches"])
    caches = {w: cache_row(cfg, blocks, w, dtype).num_bytes for w in range(1, blocks)}
    return max((window for window, size in caches.items() if others + size <= free), default=0)


def check_text(folder, free):
    """Print the size of the text encoder.  Raises ValueError if it does not fit."""
    size = text_bytes(folder)
    print(f"{size / GB:8.2f} GB  before all that: the text encoder, freed when it has read")
    if size > free:
        raise ValueError(f"{folder}: a text encoder of {size / GB:.1f} GB, {free / GB:.1f} GB free")


def text_bytes(folder) -> int:
    """Return the size of the text encoder and the connectors."""
    read = (parts.part_files(Path(folder, name)) for name in ("text_encoder", "connectors"))
    return sum(file.stat().st_size for part in read for file in part)


def place_for_text(folder, device) -> torch.device:
    """Return where the text encoder fits beside a loaded stream: its device, or else the CPU.

    Raises ValueError if it fits nowhere.
    """
    size = text_bytes(folder)
    for place in (device, torch.device("cpu")):
        if size * (1 + SPARE) < (free := free_bytes(place)):
            return place
    raise ValueError(f"{folder}: a text encoder of {size / GB:.1f} GB, {free / GB:.1f} GB free")


# ---- a training ----


def training_rows(nets, activations, num_processes) -> list[Row]:
    """Count everything that each process needs.

    nets          (name, config, recipe) of each network; a frozen one has no recipe (None)
    activations   bytes of one update, from `activation_bytes`
    """
    rows = []
    for name, cfg, recipe in nets:
        n = num_parameters(cfg, cfg.num_layers)
        for what, size in bytes_per_parameter(recipe).items():
            how = f"{n:,} parameters x {size} bytes / {num_processes} processes"
            rows.append(Row(f"{name}, {what}", -(-n * size // num_processes), how))
    how = "one update on tensors without contents, layers computed twice"
    return [*rows, layers_row(nets[-1][1]), Row("activations", activations, how)]


def bytes_per_parameter(recipe) -> dict:
    """Return the bytes that are kept for one parameter, by purpose."""
    if recipe is None:
        return {"frozen weights": 2}
    sizes = {"weights": 4, "gradient": 4, "moments": 8}
    return {**sizes, "average": 4} if recipe.ema else sizes


def layers_row(cfg) -> Row:
    """Count the gathered layers, in bfloat16, and the gradient of one of them."""
    one, two = (num_parameters(cfg, layers) for layers in (1, 2))
    layer, outside = two - one, 2 * one - two
    # a gradient is made in bfloat16 and copied to float32 to be averaged: 2 + 4 bytes
    size = layer * (2 * LAYERS_AT_WORK + 6) + outside * (2 + 6)
    how = f"{layer:,} parameters x ({LAYERS_AT_WORK} x 2 + 6) bytes, {outside:,} around them x 8"
    return Row("layers at work", size, how)


@functools.cache
def num_parameters(cfg, layers) -> int:
    """Count the parameters of a model with another number of layers."""
    return model.build(replace(cfg, num_layers=layers), device="meta").num_parameters()


def activation_bytes(nets, loss, batch) -> int:
    """Count the peak bytes of activations during an update of `batch` clips.

    loss   function of all networks, `model.Captions` and a torch.Generator
    """
    # every further layer adds as much as the third
    two, three = (peak_of_update(nets, loss, batch, layers) for layers in (2, 3))
    return two + (nets[0][1].num_layers - 2) * (three - two)


def peak_of_update(nets, loss, batch, layers) -> int:
    """Count the peak bytes of activations if every network had this number of layers."""
    on_meta = [_meta_net(replace(cfg, num_layers=layers), recipe) for _, cfg, recipe in nets]
    captions = _meta_captions(batch, nets[0][1])
    model.ropes_of.cache_clear()  # else this count would miss tables made by another one
    with processes.SharedDraws("meta"):  # random numbers become meta tensors as well
        return peak_bytes(lambda: loss(*on_meta, captions, torch.Generator()).backward())


def _meta_net(cfg, recipe):
    """Return a network without contents that treats inputs and gradients as FSDP does."""
    net = model.build(cfg, device="meta").to(torch.bfloat16).requires_grad_(recipe is not None)
    net.register_forward_pre_hook(lambda net, inputs: tree_map(_to_bfloat16, inputs))
    if recipe is None:
        return net
    for p in net.parameters():  # FSDP shards a gradient as soon as it is complete
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return sharding.passes_apart(sharding.checkpoint_layers(net))


def _to_bfloat16(x):
    return x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x


def _meta_captions(batch, cfg) -> model.Captions:
    shape = batch, text.TOKENS, cfg.caption_width
    features = [torch.empty(shape, device="meta", dtype=torch.bfloat16) for _ in range(4)]
    return model.Captions(tuple(features[:2]), tuple(features[2:]))


def check_training(nets, loss, batch):
    """Print the memory that each process of a training needs; see `activation_bytes`.

    Raises ValueError if it does not fit.
    """
    num_processes, activations = processes.count(), activation_bytes(nets, loss, batch)
    free = free_bytes(processes.device())
    if processes.device().type == "cpu":  # all processes share one memory
        free //= num_processes
    rows = training_rows(nets, activations, num_processes)
    print(f"every one of {num_processes} processes, {batch} clips each:")
    print(shown(rows, free))
    if total(rows) > free:
        raise ValueError(training_refusal(nets, activations, num_processes, free))


def training_refusal(nets, activations, num_processes, free) -> str:
    """Say in one line how much is missing, and how many processes would be enough."""

    def needed(n):
        return total(training_rows(nets, activations, n))

    more = range(num_processes + 1, MAX_PROCESSES + 1)
    enough = next((n for n in more if needed(n) <= free), None)
    advice = f"{enough} would do" if enough else "no number of them is enough"
    return (
        f"this training needs {needed(num_processes) / GB:.1f} GB in each of {num_processes} "
        f"processes, and {free / GB:.1f} GB are free: {advice}"
    )


# ---- tables ----


def plan() -> list:
    """Plan two minutes at full size: for each window the rows in bfloat16, and those in fp8."""
    decoding = decoder_rows(config.FULL, torch.bfloat16)

    def rows(window, in_fp8):
        return stream_rows(*STREAM, window, torch.bfloat16, ("graph",), 1, in_fp8) + decoding

    return [(rows(window, False), rows(window, True)) for window in WINDOWS]


def window_table(plans) -> str:
    """Return the rows of `plan` as Markdown; where fp8 needs another size, it comes second."""

    def cell(*sizes):
        return " / ".join(dict.fromkeys(f"{size / GB:.2f}" for size in sizes)) + " GB"

    lines = [["window", *(f"{window} s" for window in WINDOWS)], ["---"] * (1 + len(WINDOWS))]
    for i, row in enumerate(plans[0][0]):
        lines.append([row.what, *(cell(*(p[i].num_bytes for p in both)) for both in plans)])
    lines.append(["in all", *(cell(*map(total, both)) for both in plans)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def card_table(plans) -> str:
    """Return the longest window that fits each card, as Markdown."""
    lines = ["| longest window | bfloat16 | fp8 |", "|---|---|---|"]
    for card in CARDS:
        free = (1 - SPARE) * card
        found = [longest_window(rows, free, *STREAM, torch.bfloat16) for rows in plans[0]]
        cells = [f"{window} s" if window else "none" for window in found]
        lines.append(f"| {card / GB:.0f} GB | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    cli.parser(__doc__).parse_args()
    plans = plan()
    print(f"{window_table(plans)}\n\n{card_table(plans)}")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
