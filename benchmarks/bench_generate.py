"""How fast is the full size on one GPU: against its lower bound, the textbook, each speed-up?

    python -m benchmarks.bench_generate                windows of 5 and 15 s, bfloat16 and fp8
    python -m benchmarks.bench_generate --blocks 40    a shorter first film
    python -m benchmarks.bench_generate --floor        the lower bound, computed without a GPU
    python -m benchmarks.bench_generate --device cpu --tiny     only to test the script

Random weights, batch 1, 512 x 768, four passes and a refresh per block, all in one process, in the
order of their worth. First one film for each window, with all speed-ups, in bfloat16:

    floor        lower bound of the passes: their operations, counted on tensors without contents,
                 at the rate that this GPU reaches on a large matrix product
    passes       the transformer alone, median of the blocks with a full window
    end to end   with decoding and mp4, same blocks; without diffusers or av the passes alone
    TTFC         time to first chunk, without encoding the prompt, after the warm-up: passes alone,
                 and until the first second is written
    intervals    seconds between finished blocks: median and 95th percentile; and how many blocks
                 come too late for a viewer who starts with the first second
    slowest      the slowest block after block 0, divided by the median
    peak         memory, and as full_size/memory.py computes it

Then, for each window, the textbook: the same block with caches that grow by `cat`, see
`TextbookView`. Its time is divided by the time of our caches without any speed-up, and with all; a
dash: its caches do not fit. Then the films in fp8 (full_size/fp8.py). At last the ladder, with the
first window, in bfloat16: one more speed-up in each row.

After every row the script writes results/bench_generate.json and, unless --tiny, the tables of
benchmarks/README.md, so it may be stopped at any time. The last lines are a summary.
"""

import copy
import gc
import itertools
import tempfile
import time
from collections import Counter
from dataclasses import replace
from statistics import median_high
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import config
import generate
import model
from benchmarks import page
from benchmarks.bench_attention import matmul_rate, seconds
from film import filming
from film.mp4 import av
from full_size import decoders, faster, fp8, memory, text, weights
from kernel import cache_append_attention as kernel
from kv_cache import CachedView, attention
from masks import block_span
from plumbing import cli, files
from plumbing.stopwatch import Stopwatch, percentile_95, settled_median


def tiny(cfg):
    """Return the same blocks in a model that runs anywhere."""
    return replace(
        cfg, num_layers=2, num_heads=2, video_width=32, audio_width=16, height=64, width=64
    )


# ---- the lower bound ----


def flops_of_block(cfg, window, tokens=text.TOKENS) -> int:
    """Count the operations of a block with a full window: of its passes and the refresh."""
    return sum(flops_by_kind(cfg, window, tokens))


def flops_by_kind(cfg, window, tokens=text.TOKENS) -> list[int]:
    """Count as `flops_of_block`: of matrix products, and of attention."""
    # All layers do the same, so two models tell what a layer adds.
    one, two = (flops_of_pass(meta_net(cfg, layers), window, tokens) for layers in (1, 2))
    passes = len(cfg.sigmas)  # the last level is 0, the refresh
    return [(a + (cfg.num_layers - 1) * (b - a)) * passes for a, b in zip(one, two)]


def meta_net(cfg, layers):
    """Build a model with another number of layers, without contents."""
    return model.build(replace(cfg, num_layers=layers), device="meta")


def flops_of_pass(net, window, tokens=text.TOKENS) -> tuple[int, int]:
    """Count one pass with a full window: products, attention; a multiply-add is two operations."""
    view = CachedView(net.cfg, window + 3, window)
    prompt = net.project_text(torch.empty(1, tokens, net.cfg.caption_width, device="meta"))
    for _ in range(window + 1):  # full, but nothing is evicted yet, so no past pass is needed
        view.next_block()
    with FlopCounterMode(display=False) as counter:
        one_pass(net, view, prompt)
    attention = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    return counter.get_total_flops() - attention, attention


def floor_table(cfg, window, flops=800e12, bandwidth=3e12) -> str:
    """Return the lower bound of one pass on a GPU with this rate and bandwidth, as Markdown."""
    one = meta_net(cfg, 1)
    sizes = Counter()  # tokens -> number of weights that are multiplied with so many tokens

    def count(layer, inputs, _):
        sizes[inputs[0].shape[-2]] += layer.weight.numel() * cfg.num_layers

    for layer in (m for m in one.layers.modules() if isinstance(m, nn.Linear)):
        layer.register_forward_hook(count)
    _, attention_work = flops_of_pass(one, window)
    del sizes[text.TOKENS]  # keys and values of the prompt are computed before the stream
    rows, attention_work = [], cfg.num_layers * attention_work
    for tokens, n in sorted(sizes.items(), reverse=True):
        work, size = 2 * tokens * n, 2 * n
        done = f"{n / 1e9:.1f} G weights: {work / 1e12:.1f} TFLOP, {size / 1e9:.1f} GB to be read"
        milliseconds = 1000 * max(work / flops, size / bandwidth)
        rows.append([f"linear layers, {tokens} tokens", done, f"{milliseconds:.1f} ms"])
    milliseconds = 1000 * attention_work / flops
    rows.append(["attention", f"{attention_work / 1e12:.1f} TFLOP", f"{milliseconds:.1f} ms"])
    return page.table([f"of one pass, {cfg.num_layers} layers", "work", "floor"], rows)


@torch.no_grad()
def one_pass(net, view, prompt, sigma=0.0):
    """Run a pass on noise, in the current block of the view."""
    like, span = next(net.parameters()), block_span(view.block, net.cfg)
    noise = model.draw_noise(1, span, net.cfg, None, like.device, like.dtype)
    sigma = like.new_full((1,), sigma)
    model.predict_x0(net, *noise, sigma, sigma, prompt, span, view)


# ---- the textbook ----


class TextbookView:
    """KV caches that grow by `cat` in every attention of every pass, as in the released inference.

    The numbers equal those of a `CachedView` that evicts nothing (OmniForcing v2, ltx-causal).
    """

    def __init__(self):
        self.past, self.new = {}, {}  # (layer, site) -> keys and values: finished, current block
        self.block = 0

    def attend(self, layer, site, q, k, v, heads):
        # the released inference reads the position from the GPU here, and waits for it
        torch.full((1,), k.shape[1], device=k.device).item()
        self.new[layer, site] = heads.keys(k), heads.split(v)
        return attention(heads.queries(q), *self._with_past((layer, site)))

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
    decoders: list | None  # the three networks of LTX-2; None without diffusers or av
    device: torch.device
    in_fp8: bool = False

    @property
    def speedups(self):
        """All speed-ups that this device can run."""
        return faster.SPEEDUPS if self.device.type == "cuda" else ()

    def with_speedups(self, names):
        """Return the transformer with exactly these speed-ups."""
        # The modules are a copy, so neither speed-ups nor hooks stay on `net`. The weights are not.
        shared = {id(p): p for p in self.net.parameters()}  # deepcopy takes these as copied
        return faster.sped_up(copy.deepcopy(self.net, shared), names, self.device)

    def rounded(self):
        """Let the transformer multiply in fp8, in place: its weights in bfloat16 are gone."""
        fp8.quantise(self.net.layers)
        return self._replace(in_fp8=True)


def fp8_rate(device, n=8192) -> float:
    """Measure the operations per second in an fp8 product of n x n matrices."""
    a, b = (fp8.rounded(torch.randn(n, n, device=device)) for _ in range(2))

    def product():
        return torch._scaled_mm(
            a[0], b[0].t(), a[1], b[1].t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return 2 * n**3 / settled_median([seconds(product, device, 5) for _ in range(7)])


def time_passes(net, features, blocks, window, device) -> list[float]:
    """Return the seconds of the passes of every block, with the refresh of the block before."""
    watch, seconds = Stopwatch(device), blocks * net.cfg.block_seconds
    stream = generate.stream(net, "x", seconds, window=window, read=lambda _: features)
    return [watch.lap() for _ in stream]


@torch.no_grad()  # as the warm-up: for inference mode, fused kernels would be compiled again
def time_block(net, features, view, k, device, times=5) -> float:
    """Return the median seconds of the passes and the refresh of block k."""
    prompt = net.project_text(*features)
    for _ in range(k):  # blocks of noise fill the cache
        one_pass(net, view, prompt)
        view.next_block()
    watch, seconds = Stopwatch(device), []
    for _ in range(times + 2):
        watch.lap()
        for sigma in net.cfg.sigmas:
            one_pass(net, view, prompt, sigma)
        seconds.append(watch.lap())
    return settled_median(seconds)


FULL_BLOCKS = 16  # with a full window, of every film but the first


def full_blocks(per_block, window):
    """Drop the values of the blocks before the window is full."""
    return per_block[settled_after(window) :] or per_block[-1:]


def settled_after(window) -> int:
    """Return the number of blocks before the window is full."""
    return window + 2  # block 0, the window, one for good measure


def free_memory():
    """Give unused memory of the GPU back."""
    gc.collect()  # recordings are part of reference cycles
    torch.cuda.empty_cache()


# ---- one film ----


def bench_window(subject, window, blocks, rate) -> dict:
    """Measure one row of the table; rate: operations per second in products and in attention."""
    cfg, row = subject.net.cfg, {"window_seconds": window, "blocks": blocks, "flops_rate": rate}
    names, begin = subject.speedups, time.perf_counter()
    net = subject.with_speedups(names)
    if "graph" in names:
        made = [decoders.Decoder(*subject.decoders, cfg)] if subject.decoders else []
        net.warm_up(subject.features, blocks, window, *map(faster.decoding, made))
    row |= {"speed_up": names, "in_fp8": subject.in_fp8}
    row["warm_up_seconds"] = time.perf_counter() - begin
    if subject.decoders:
        row["film"] = bench_film(net, subject, window, blocks, names)
        passes = row["film"]["passes_seconds"]
    else:
        passes = time_passes(net, subject.features, blocks, window, subject.device)
    del net  # its recordings hold the caches of their stream
    free_memory()
    full, work = full_blocks(passes, window), flops_by_kind(cfg, window)
    floor = sum(n / r for n, r in zip(work, rate))
    median, frames = median_high(full), cfg.fps * cfg.block_seconds  # frames of a block
    return row | {
        "floor_fps": frames / floor,
        "passes_fps": frames / median,
        "share_of_floor": floor / median,
        "block_seconds": median,
        "first_and_last_full_block_seconds": [full[0], full[-1]],
        "slowest_over_median": max(passes[1:]) / median,
    }


def bench_film(net, subject, window, blocks, speedups) -> dict:
    """Return the report of a film, as generate.py writes it, its full blocks, and its memory."""
    cfg, watch = net.cfg, Stopwatch(subject.device)
    decoder = decoders.Decoder(*subject.decoders, cfg, watch=watch.watch)
    watch.watch_passes(net, len(cfg.sigmas) - 1)
    seconds = blocks * cfg.block_seconds
    with tempfile.TemporaryDirectory() as folder:
        movie = filming.open_movie(f"{folder}/x.mp4", decoder, watch)
        stream = generate.stream(net, "x", seconds, window=window, read=lambda _: subject.features)
        _, errors = filming.run(stream, decoder, movie, watch, seconds)
    for error in errors:
        raise error
    written = itertools.pairwise(watch.written[: len(watch.passes)])
    intervals = full_blocks([end - begin for begin, end in written], window)
    dtype, is_fp8 = subject.features[0].dtype, subject.in_fp8
    planned = memory.film_rows(cfg, len(watch.passes), window, dtype, speedups, in_fp8=is_fp8)
    return {
        **watch.report(movie.frames, cfg),
        "full_blocks_fps": cfg.fps * cfg.block_seconds / median_high(intervals),
        "interval_median_and_95_seconds": [median_high(intervals), percentile_95(intervals)],
        "peak_gb": max(watch.peaks) * 2**20 / memory.GB,
        "plan_gb": memory.total(planned) / memory.GB,
    }


def beside_textbook(subject, window, fastest) -> dict:
    """Time the block that sees a full window, with our caches and with those of the textbook."""
    net, device, features = subject.with_speedups(()), subject.device, subject.features
    k = window + 1  # up to this block, nothing is evicted from our cache either
    ours = time_block(net, features, CachedView(net.cfg, k + 1), k, device)
    free_memory()
    size = memory.cache_row(net.cfg, k + 1, None, features[0].dtype).num_bytes
    if memory.free_bytes(device) < 1.2 * size:  # it also copies the caches of one attention
        return {"same_block_seconds": ours}
    book = time_block(net, features, TextbookView(), k, device)
    free_memory()
    return {
        "same_block_seconds": ours,
        "textbook_seconds": book,
        "textbook_over_ours": book / ours,
        "textbook_over_fastest": book / fastest,
    }


# ---- the ladder ----


def climb(subject, window, rounds) -> list[dict]:
    """Time a block with a full window, with no speed-up and with one more in each row."""
    names = subject.speedups
    seconds, k = [[] for _ in range(len(names) + 1)], window + 1
    for _ in range(rounds):  # in turn, because a machine may be slower in the next minute
        for n, found in enumerate(seconds):
            net, view = subject.with_speedups(names[:n]), CachedView(subject.net.cfg, k + 1)
            found.append(time_block(net, subject.features, view, k, subject.device))
            del net, view
            free_memory()
    medians = [median_high(found) for found in seconds]
    pairs = zip(("", *names), medians, seconds)
    return [{"speed_up": name, "block_seconds": m, "rounds": found} for name, m, found in pairs]


# ---- tables ----


def ladder_table(rungs, cfg) -> str:
    """Return the ladder as Markdown."""
    rows, before = [], rungs[0]["block_seconds"]
    for r in rungs:
        now = r["block_seconds"]
        name = f"+ `{r['speed_up']}`" if r["speed_up"] else "none"
        fps = f"{cfg.fps * cfg.block_seconds / now:.1f}"
        rows.append([name, f"{1000 * now:.0f} ms", fps, f"{before / now:.2f}"])
        before = now
    return page.table(["speed-up", "passes of a block", "FPS", "before ÷ after"], rows)


def window_table(rows) -> str:
    """Return speed and memory by window and precision as Markdown."""
    head = ["window", "precision", "floor", "passes", "slowest ÷ median", "end to end"]
    head += ["TTFC: passes, all", "intervals: median, 95 %", "late blocks", "peak, planned"]
    return page.table([*head, "textbook ÷ ours: plain, fastest"], map(window_cells, rows))


def window_cells(row) -> list[str]:
    """Return one line of the table; "" without a film, or without room for the textbook."""
    film, book = [""] * 5, ""
    if found := row.get("film"):
        film = [
            f"{found['full_blocks_fps']:.0f} FPS",
            f"{found['ttfc_passes_seconds']:.2f}, {found['ttfc_seconds']:.2f} s",
            "{:.2f}, {:.2f} s".format(*found["interval_median_and_95_seconds"]),
            f"{found['viewer_waits']} of {len(found['passes_seconds'])}",
            f"{found['peak_gb']:.1f}, {found['plan_gb']:.1f} GB",
        ]
    if "textbook_seconds" in row:
        book = f"{row['textbook_over_ours']:.2f}, {row['textbook_over_fastest']:.2f}"
    passes = f"{row['passes_fps']:.0f} FPS, {row['share_of_floor']:.0%}"
    precision = "fp8" if row["in_fp8"] else "bfloat16"
    bound = f"{row['window_seconds']} s", precision, f"{row['floor_fps']:.0f} FPS"
    return [*bound, passes, f"{row['slowest_over_median']:.2f}", *film, book]


def stages_line(row) -> str:
    """Return the warm-up and the median milliseconds of each stage of a film."""
    stages = row.get("film", {}).get("stage_seconds", {}).items()
    listed = ", ".join(f"{stage} {1000 * seconds:.0f}" for stage, seconds in stages)
    return f"warm-up {row['warm_up_seconds']:.1f} s; ms a block: {listed or 'passes only'}"


def fill_page(about, rungs, rows, cfg):
    """Write the tables of benchmarks/README.md, as far as they are measured."""
    where, first = "{device}, torch {torch}, {date}, {config}".format(**about), rows[0]
    page.fill_in("windows", f"{where}\n\n{window_table(rows)}")
    if rungs:
        window = f"bfloat16, window {first['window_seconds']} s"
        page.fill_in("ladder", f"{where}, {window}\n\n{ladder_table(rungs, cfg)}")


# ---- the command line ----


def main():
    p = cli.parser(__doc__)
    p.add_argument("--config", default="full", choices=["full", "released"])
    windows, about = cli.whole(1, 100), "length of the first window's film"
    p.add_argument("--windows", type=windows, nargs="+", default=[5, 15], help="seconds")
    p.add_argument("--blocks", type=cli.whole(1, 10**4), default=120, help=about)
    about = "rounds of the ladder; medians are taken"
    p.add_argument("--rounds", type=cli.whole(1, 100), default=1, help=about)
    p.add_argument("--floor", action="store_true", help="only compute the lower bound of a pass")
    p.add_argument("--device", default="cuda", help="cuda; cpu only with --tiny")
    p.add_argument("--tiny", action="store_true", help="a tiny model, only to test this script")
    p.add_argument("--out", help="JSON file to write; default in results/, with --tiny in runs/")
    args = p.parse_args()
    args.out = page.json_path(args, "bench_generate")
    cfg = cli.find_config(args.config)
    if args.floor:
        return print(floor_table(cfg, args.windows[0]))
    device, cfg = cli.find_device(args.device), replace(cfg, sigmas=config.FOUR_STEPS)
    cfg = tiny(cfg) if args.tiny else cfg
    dtype, first = torch.float32 if args.tiny else torch.bfloat16, args.windows[0]
    if args.blocks < (least := settled_after(first) + 1):
        raise ValueError(f"--blocks {args.blocks}: expected at least {least}")
    about = {
        **cli.machine(device),
        "config": cfg.name,
        "tiny": args.tiny,
        "dtype": str(dtype),
        "attention": "PyTorch" if args.tiny else kernel.require(device),
    }
    rungs, rows = [], []

    def save():
        files.write_json(args.out, {"about": about, "ladder": rungs, "rows": rows})
        if not args.tiny:
            fill_page(about, rungs, rows, cfg)

    def films(subject, rate):
        for window in args.windows:
            full = args.blocks - settled_after(first) if not rows else FULL_BLOCKS
            rows.append(bench_window(subject, window, settled_after(window) + full, (rate, wide)))
            report(rows[-1])

    def report(row):
        print(f"{stages_line(row)}\n{window_table([row])}", flush=True)
        save()

    with kernel.strict(not args.tiny):  # no attention may fall back to PyTorch
        wide = matmul_rate(device, dtype, 256 if args.tiny else 8192)
        subject = load(cfg, device, dtype, has_decoders=bool(av) and not args.tiny)
        films(subject, wide)
        for row in rows:
            row |= beside_textbook(subject, row["window_seconds"], row["block_seconds"])
            report(row)
        subject = subject.rounded()
        free_memory()
        films(subject, wide if args.tiny else fp8_rate(device))
        for wide_row, row in zip(rows, rows[len(args.windows) :]):
            keys = "textbook_seconds", "textbook_over_ours"
            row |= {key: wide_row[key] for key in keys if key in wide_row}
            if "textbook_seconds" in row:
                row["textbook_over_fastest"] = row["textbook_seconds"] / row["block_seconds"]
        save()
        del subject
        free_memory()
        rungs += climb(load(cfg, device, dtype, has_decoders=False), first, args.rounds)
        save()
    print(f"{ladder_table(rungs, cfg)}\n\n{window_table(rows)}\n\nwrote {args.out}")


def load(cfg, device, dtype, has_decoders) -> Subject:
    """Make networks with random weights."""
    net = weights.random_weights(cfg, device, dtype)
    features = text.random_features(["x"], cfg, device, dtype)["x"]
    nets = None
    if has_decoders:
        try:
            nets = decoders.random_weights(device, dtype)
        except ValueError as error:
            print(f"passes only: {error}")
    return Subject(net, features, nets, device)


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
