"""How fast is the full size on one GPU: against its lower bound, the textbook, each speed-up?

    python -m benchmarks.bench_generate                windows of 5, 15 and 25 seconds
    python -m benchmarks.bench_generate --rounds 1     the ladder once instead of three times
    python -m benchmarks.bench_generate --floor        the lower bound, computed without a GPU

Random weights, batch 1, 512 x 768, bfloat16, four passes and a refresh per block.

The ladder comes first, with the first window. It adds the speed-ups of generate.py one by one.
Runs with and without the new one alternate. If it does not help, the next rungs leave it out.

Then one row for each window, with all speed-ups that helped:

    floor        lower bound of the passes: their operations, counted on tensors without contents,
                 at the rate that this GPU reaches on a large matrix product
    passes       the transformer alone, median of the blocks with a full window
    end to end   with decoding and mp4, same blocks; without diffusers the passes alone, without
                 av no mp4
    TTFC         time to first chunk: passes alone, and until the first second is written; the
                 prompt is encoded before
    first, last  time of the first and the last block with a full window, and peak memory until
                 then; with the first window, a film has --blocks blocks
    planned      peak memory, as full_size/memory.py computes it
    textbook     the same block as in the released inference: caches that grow by `cat`, positions
                 read from the GPU in every attention. Its time is divided by the time of our caches
                 without any speed-up, and with all that helped; a dash: its caches do not fit

The script refuses to run without the CUDA kernel. After every rung and every window it writes
results/bench_generate.json and the tables of benchmarks/README.md (not with --tiny). Started again
on the same day and kind of machine, it continues after the last one. Remove the JSON file after a
change of code.

`--device cpu --tiny` runs everything at a tiny size, to test the script.
"""

import copy
import gc
import json
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median_high
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import config
import generate
import model
from benchmarks import page
from film.mp4 import Movie, av
from full_size import decoders, faster, memory, text, weights
from kernel import cache_append_attention as kernel
from kv_cache import CachedView, attention
from masks import block_span
from plumbing import cli, files
from plumbing.stopwatch import Stopwatch, settled_median
from rollout import Block

RUNGS = "qkv", "graph", "beside"  # of the ladder, in this order


def tiny(cfg):
    """The same blocks in a model that runs anywhere."""
    return replace(
        cfg, num_layers=2, num_heads=2, video_width=32, audio_width=16, height=64, width=64
    )


# ---- the lower bound ----


def flops_of_block(cfg, window, tokens=text.TOKENS) -> int:
    """Operations of the passes and the refresh of a block with a full window.

    tokens   of the caption

    A multiply-add counts as two. All layers do the same, so two models tell what a layer adds.
    """
    one, two = (flops_of_pass(meta_net(cfg, layers), window, tokens) for layers in (1, 2))
    passes = len(cfg.sigmas)  # the last level is 0, the refresh
    return (one + (cfg.num_layers - 1) * (two - one)) * passes


def meta_net(cfg, layers):
    """A model with another number of layers, without contents."""
    return model.build(replace(cfg, num_layers=layers), device="meta")


def flops_of_pass(net, window, tokens=text.TOKENS) -> int:
    """Operations of one pass with a full window."""
    view = CachedView(net.cfg, window + 3, window)
    prompt = net.project_text(torch.empty(1, tokens, net.cfg.caption_width, device="meta"))
    for _ in range(window + 1):  # full, but nothing is evicted yet, so no past pass is needed
        view.next_block()
    with FlopCounterMode(display=False) as counter:
        one_pass(net, view, prompt)
    return counter.get_total_flops()


def work_of_layers(cfg, window) -> tuple[Counter, int]:
    """Work of one pass in all layers.

    -> {tokens: number of weights that are multiplied with so many tokens}, operations of attention
    """
    net, sizes = meta_net(cfg, 1), Counter()

    def count(layer, inputs, _):
        sizes[inputs[0].shape[-2]] += layer.weight.numel() * cfg.num_layers

    for layer in (m for m in net.layers.modules() if isinstance(m, nn.Linear)):
        layer.register_forward_hook(count)
    one, two = (flops_of_pass(n, window) for n in (net, meta_net(cfg, 2)))
    del sizes[text.TOKENS]  # keys and values of the prompt are computed before the stream
    linear = 2 * sum(tokens * n for tokens, n in sizes.items())
    return sizes, cfg.num_layers * (two - one) - linear


def floor_table(cfg, window, flops=800e12, bandwidth=3e12) -> str:
    """Lower bound of one pass on a GPU with this rate and bandwidth, as Markdown."""
    sizes, attention_flops = work_of_layers(cfg, window)
    lines = [f"| of one pass, {cfg.num_layers} layers | work | floor |", "|---|---|---|"]
    for tokens, n in sorted(sizes.items(), reverse=True):
        work, size = 2 * tokens * n, 2 * n
        seconds = max(work / flops, size / bandwidth)
        lines.append(
            f"| linear layers, {tokens} tokens | {n / 1e9:.1f} G weights: {work / 1e12:.1f} TFLOP, "
            f"{size / 1e9:.1f} GB to be read | {1000 * seconds:.1f} ms |"
        )
    work = f"{attention_flops / 1e12:.1f} TFLOP | {1000 * attention_flops / flops:.1f} ms"
    return "\n".join([*lines, f"| attention | {work} |"])


@torch.no_grad()
def one_pass(net, view, prompt, sigma=0.0):
    """Run a pass on noise, in the current block of the view."""
    like, span = next(net.parameters()), block_span(view.block, net.cfg)
    noise = model.draw_noise(1, span, net.cfg, None, like.device, like.dtype)
    sigma = like.new_full((1,), sigma)
    model.predict_x0(net, *noise, sigma, sigma, prompt, span, view)


def fill(net, view, prompt, blocks):
    """Put blocks of noise into a cache."""
    for _ in range(blocks):
        one_pass(net, view, prompt)
        view.next_block()


def matmul_rate(device, dtype, n=8192) -> float:
    """Operations per second in a product of n x n matrices."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        watch = Stopwatch(device)
        for _ in range(5):
            a @ b
        seconds.append(watch.lap() / 5)
    return 2 * n**3 / settled_median(seconds)


# ---- the textbook ----


class TextbookView:
    """KV caches that grow by `cat` in every attention of every pass; see the top of this file.

    The numbers equal those of a `CachedView` that evicts nothing (OmniForcing v2, ltx-causal).
    """

    def __init__(self):
        self.past, self.new = {}, {}  # (layer, site) -> keys and values: finished, current block
        self.block = 0

    def attend(self, layer, site, q, k, v, heads):
        where = layer, site
        self.position = torch.full((1,), k.shape[1], device=k.device).item()  # waits for the GPU
        self.new[where] = heads.keys(k), heads.split(v)
        return attention(heads.queries(q), *self._with_past(where))

    def _with_past(self, where):
        new, past = self.new[where], self.past.get(where)
        return new if past is None else [torch.cat([p.clone(), n], 1) for p, n in zip(past, new)]

    def next_block(self):
        for where in self.new:
            self.past[where] = self._with_past(where)
        self.block += 1


# ---- measuring ----


class Subject(NamedTuple):
    """The networks that are measured."""

    net: model.OmniTransformer
    features: tuple  # of the prompt
    decoders: list | None  # the three networks of LTX-2; None without diffusers
    device: torch.device

    @property
    def dtype(self):
        return next(self.net.parameters()).dtype

    def with_speedups(self, names):
        """Return the transformer with exactly these speed-ups.

        Its modules are a copy, so neither speed-ups nor hooks stay on `net`. Its weights are not.
        """
        shared = {id(p): p for p in self.net.parameters()}  # deepcopy takes these as copied
        return faster.sped_up(copy.deepcopy(self.net, shared), names, self.device)


def time_passes(net, features, blocks, window, device) -> list[float]:
    """Seconds of the passes of every block, including the refresh of the block before."""
    watch, seconds = Stopwatch(device), blocks * net.cfg.block_seconds
    for _ in generate.stream(net, "x", seconds, window=window, read=lambda _: features):
        watch.passes.append(watch.lap())
    return watch.passes


@torch.inference_mode()
def time_block(net, features, view, k, device, times=5) -> float:
    """Median seconds of the passes and the refresh of block k, after k blocks in the cache."""
    prompt = net.project_text(*features)
    fill(net, view, prompt, k)
    watch, seconds = Stopwatch(device), []
    for _ in range(times + 2):
        watch.lap()
        for sigma in net.cfg.sigmas:
            one_pass(net, view, prompt, sigma)
        seconds.append(watch.lap())
    return settled_median(seconds)


def time_decoding(subject, blocks=6) -> float:
    """Seconds to decode a block of noise, median from the third block on."""
    cfg, device = subject.net.cfg, subject.device
    decoder, watch = decoders.Decoder(*subject.decoders, cfg), Stopwatch(device)
    dtype, seconds = next(subject.decoders[0].parameters()).dtype, []
    for k in range(blocks):
        noise = model.draw_noise(1, block_span(k, cfg), cfg, None, device, dtype)
        watch.lap()
        decoder.decode(Block(k, *noise))
        seconds.append(watch.lap())
    return settled_median(seconds)


def frames_per_second(seconds, cfg):
    """Frames per second if a block takes so many seconds."""
    return cfg.fps * cfg.block_seconds / seconds


def full_blocks(per_block, window):
    """Drop the values of blocks with a partly filled window, and of blocks that were recorded."""
    return per_block[settled_after(window) :] or per_block[-1:]


def settled_after(window) -> int:
    """Blocks until the window is full and passes have been recorded at every place of the ring."""
    return 2 * (window + 1) + 4  # two more for good measure


def free_memory(device):
    """Give unused memory of the GPU back."""
    gc.collect()  # recordings are part of reference cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- the ladder ----


def climb(rungs, subject, window, rounds, save):
    """Add the missing rungs: each speed-up on top of those that helped so far."""
    possible = faster.find_speedups(["all"], subject.net.cfg, subject.device)

    def median_of(speedups):
        free_memory(subject.device)  # of the recordings before
        net, blocks = subject.with_speedups(speedups), settled_after(window) + 4
        passes = time_passes(net, subject.features, blocks, window, subject.device)
        return median_high(full_blocks(passes, window))

    known = {r["speed_up"] for r in rungs}
    for name in (name for name in RUNGS if name in possible and name not in known):
        before = helpful(rungs)
        pairs = [(median_of(before), median_of((*before, name))) for _ in range(rounds)]
        rungs.append(rung(name, "passes", pairs))
        save()
    if subject.decoders and "channels-last" not in known:
        rungs.append(layout_rung(subject, rounds))
        save()


def helpful(rungs) -> tuple:
    """Names of the speed-ups that made the stream faster."""
    return tuple(r["speed_up"] for r in rungs if r["before_over_after"] > 1)


def layout_rung(subject, rounds) -> dict:
    """Both memory layouts of the video decoder in turns."""
    layouts, pairs = (torch.contiguous_format, torch.channels_last_3d), []
    for _ in range(rounds):
        pairs.append([])
        for layout in layouts:
            decoders.channels_last(subject.decoders, layout)
            pairs[-1].append(time_decoding(subject))
    return rung("channels-last", "decoding", pairs)


def rung(name, of_what, pairs) -> dict:
    """Medians over rounds of (before, after) in seconds; ratios are taken within a round."""
    before, after = (median_high(column) for column in zip(*pairs))
    return {
        "speed_up": name,
        "of": of_what,
        "before_seconds": before,
        "after_seconds": after,
        "before_over_after": median_high([b / a for b, a in pairs]),
    }


# ---- one window ----


def bench_window(subject, window, blocks, rate, speedups=()) -> dict:
    """Measure one row of the table; rate: see `matmul_rate`."""
    cfg, device = subject.net.cfg, subject.device
    fast, film = subject.with_speedups(speedups), None
    if subject.decoders:
        film = bench_film(fast, subject, window, blocks)
        passes = film["passes_seconds"]
    else:
        passes = time_passes(fast, subject.features, blocks, window, device)
    full, floor = full_blocks(passes, window), flops_of_block(cfg, window) / rate
    median = median_high(full)
    row = {
        "window_seconds": window,
        "blocks": blocks,
        "matmul_flops": rate,
        "floor_fps": frames_per_second(floor, cfg),
        "passes_fps": frames_per_second(median, cfg),
        "share_of_floor": floor / median,
        "first_and_last_full_block_seconds": [full[0], full[-1]],
    }
    if film:
        row |= {"film": film, **beside_plan(film, subject, window, speedups)}
    del fast  # its recordings hold the caches of their stream
    free_memory(device)
    return row | beside_textbook(subject, window, median)


def bench_film(net, subject, window, blocks) -> dict:
    """The report of a whole film, as generate.py writes it, and the speed of its full blocks."""
    cfg, watch = net.cfg, Stopwatch(subject.device)
    decoder = decoders.Decoder(*subject.decoders, cfg, watch=watch.watch)
    watch.watch_passes(net, len(cfg.sigmas) - 1)
    seconds, size = blocks * cfg.block_seconds, (cfg.height, cfg.width)
    with tempfile.TemporaryDirectory() as folder:
        open_movie = Movie if av else Unwritten
        movie = open_movie(f"{folder}/x.mp4", size, cfg.fps, decoder.sample_rate, decoder.channels)
        stream = generate.stream(net, "x", seconds, window=window, read=lambda _: subject.features)
        generate.run(stream, decoder, movie, seconds, watch)
        movie.close()
    both = [sum(pair) for pair in zip(watch.passes, watch.output)]
    return {
        **watch.report(movie.frames, cfg),
        "full_blocks_fps": frames_per_second(median_high(full_blocks(both, window)), cfg),
        "peaks_mb": watch.peaks,
        "is_written": bool(av),
    }


class Unwritten:
    """Replaces a `Movie` where the package av is missing: counts frames."""

    def __init__(self, *_):
        self.frames = 0

    def add(self, frames, samples):
        self.frames += len(frames)

    def close(self):
        pass


def beside_plan(film, subject, window, speedups) -> dict:
    """Planned peak memory, and the measured one until the first and the last full block."""
    blocks = len(film["passes_seconds"])
    rows = memory.film_rows(subject.net.cfg, blocks, window, subject.dtype, speedups)
    peaks = [mb * 2**20 / 1e9 for mb in full_blocks(film["peaks_mb"], window)]
    return {
        "plan_gb": memory.total(rows) / 1e9,
        "first_and_last_peak_gb": [peaks[0], peaks[-1]],
    }


def beside_textbook(subject, window, fastest) -> dict:
    """Time the block that sees a full window, by our caches and by the textbook's."""
    net, device, features = subject.with_speedups(()), subject.device, subject.features
    k = window + 1  # up to this block, nothing is evicted from our cache either
    ours = time_block(net, features, CachedView(net.cfg, k + 1), k, device)
    free_memory(device)
    size = memory.cache_row(net.cfg, k + 1, None, subject.dtype).num_bytes
    if memory.free_bytes(device) < 1.2 * size:  # it also copies the caches of one attention
        return {"same_block_seconds": ours}
    book = time_block(net, features, TextbookView(), k, device)
    return {
        "same_block_seconds": ours,
        "textbook_seconds": book,
        "textbook_over_ours": book / ours,
        "textbook_over_fastest": book / fastest,
    }


# ---- tables ----


def ladder_table(rungs) -> str:
    """The ladder as Markdown."""
    lines = ["| speed-up | of | before | after | before ÷ after |", "|---|---|---|---|---|"]
    for r in rungs:
        before, after = 1000 * r["before_seconds"], 1000 * r["after_seconds"]
        times = f"{before:.1f} ms a block | {after:.1f} ms a block"
        lines.append(f"| `{r['speed_up']}` | {r['of']} | {times} | {r['before_over_after']:.3f} |")
    return "\n".join(lines)


def window_table(rows) -> str:
    """Speed and memory by window as Markdown; a dash for what was not measured."""
    cells = [window_cells(row) for row in rows]
    lines = [cells[0].keys(), ["---"] * len(cells[0]), *(c.values() for c in cells)]
    return "\n".join(f"| {' | '.join(cell or '–' for cell in line)} |" for line in lines)


def window_cells(row) -> dict:
    """{column: text}; an empty text if there was no film, or no room for the textbook's caches."""
    film, first_second, end, peaks, plan, book = row.get("film"), "", "", "", "", ""
    if film:
        end = f"{film['full_blocks_fps']:.0f} FPS" + ("" if film["is_written"] else ", no mp4")
        first_second = f"{film['ttfc_passes_seconds']:.2f}, {film['ttfc_seconds']:.2f} s"
        peaks = "{:.1f}, {:.1f} GB".format(*row["first_and_last_peak_gb"])
        plan = f"{row['plan_gb']:.1f} GB"
    if "textbook_seconds" in row:
        book = f"{row['textbook_over_ours']:.2f}, {row['textbook_over_fastest']:.2f}"
    times = [1000 * s for s in row["first_and_last_full_block_seconds"]]
    return {
        "window": f"{row['window_seconds']} s",
        "floor": f"{row['floor_fps']:.0f} FPS",
        "passes": f"{row['passes_fps']:.0f} FPS, {row['share_of_floor']:.0%}",
        "end to end": end,
        "TTFC: passes, all": first_second,
        "first, last full block": "{:.0f}, {:.0f} ms".format(*times),
        "peak until then": peaks,
        "planned": plan,
        "textbook ÷ ours: plain, fastest": book,
    }


def fill_page(about, rungs, rows, window):
    """Write the tables of benchmarks/README.md, as far as they are measured."""
    where = "{device}, torch {torch}, {date}, {config}".format(**about)
    page.fill_in("ladder", f"{where}, window {window} s\n\n{ladder_table(rungs)}")
    if rows:
        names = ", ".join(helpful(rungs))
        page.fill_in("windows", f"{where}, with {names}\n\n{window_table(rows)}")


# ---- the command line ----


def options():
    """The command line."""
    p = cli.parser(__doc__)
    p.add_argument("--config", default="full", choices=["full", "released"])
    p.add_argument("--windows", type=int, nargs="+", default=[5, 15, 25], help="seconds")
    p.add_argument("--blocks", type=int, default=120, help="length of the first window's film")
    p.add_argument("--rounds", type=int, default=3, help="rounds of the ladder; medians are taken")
    p.add_argument("--floor", action="store_true", help="only compute the lower bound of a pass")
    p.add_argument("--device", default="cuda", help="cuda; cpu only with --tiny")
    p.add_argument("--tiny", action="store_true", help="a tiny model, only to test this script")
    out = cli.ROOT / "results" / "bench_generate.json"
    p.add_argument("--out", default=str(out), help="JSON file to write")
    return p


def main():
    args = options().parse_args()
    if args.floor:
        return print(floor_table(cli.find_config(args.config), args.windows[0]))
    device = cli.find_device(args.device)
    cfg = replace(cli.find_config(args.config), sigmas=config.FOUR_STEPS)
    cfg = tiny(cfg) if args.tiny else cfg
    dtype, first = torch.float32 if args.tiny else torch.bfloat16, args.windows[0]
    if args.blocks < (least := settled_after(first) + 1):
        raise ValueError(f"--blocks {args.blocks}: expected at least {least}")
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: expected 1 or more")
    about = {
        **cli.machine(device),
        "config": cfg.name,
        "tiny": args.tiny,
        "dtype": str(dtype),
        "attention": "PyTorch" if args.tiny else kernel.require(device),
    }
    rungs, rows = resumed(args.out, about)

    def save():
        files.write_json(args.out, {"about": about, "ladder": rungs, "rows": rows})
        if not args.tiny:
            fill_page(about, rungs, rows, first)

    with kernel.strict(not args.tiny):
        rate = matmul_rate(device, dtype, 256 if args.tiny else 8192)
        subject = load(cfg, device, dtype, has_decoders=not args.tiny)
        measure(subject, args, rate, rungs, rows, save)
    print(f"wrote {args.out}")


def resumed(out, about) -> tuple[list, list]:
    """Rungs and rows that an earlier run measured on the same day and kind of machine."""
    found = json.loads(Path(out).read_text()) if Path(out).exists() else {"about": None}
    return (found["ladder"], found["rows"]) if found["about"] == about else ([], [])


def load(cfg, device, dtype, has_decoders) -> Subject:
    """Networks with random weights.  Without diffusers there are no decoders, and a notice."""
    net = weights.random_weights(cfg, device, dtype)
    features = text.random_features(["x"], cfg, device, dtype)["x"]
    nets = None
    if has_decoders:
        try:
            nets = decoders.random_weights(device, dtype)
        except ValueError as error:
            print(f"passes only: {error}")
    return Subject(net, features, nets, device)


def measure(subject, args, rate, rungs, rows, save):
    """Add the missing rungs and rows; save after each of them."""
    first = args.windows[0]
    climb(rungs, subject, first, args.rounds, save)
    print(ladder_table(rungs))
    speedups = helpful(rungs)
    if subject.decoders:
        is_last = "channels-last" in speedups
        layout = torch.channels_last_3d if is_last else torch.contiguous_format
        decoders.channels_last(subject.decoders, layout)
    done = {row["window_seconds"] for row in rows}
    for window in (w for w in args.windows if w not in done):
        blocks = args.blocks if window == first else settled_after(window) + 8
        rows.append(bench_window(subject, window, blocks, rate, speedups))
        save()
        print(window_table(rows[-1:]))


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
