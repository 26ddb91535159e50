"""How fast is the full size on one GPU: against its lower bound, the textbook, each speed-up?

    python -m benchmarks.bench_generate                windows of 5, 15 and 25 seconds
    python -m benchmarks.bench_generate --rounds 1     the ladder once instead of three times
    python -m benchmarks.bench_generate --floor        the lower bound, computed without a GPU
    python -m benchmarks.bench_generate --device cpu --tiny     only to test the script

Random weights, batch 1, 512 x 768, bfloat16, four passes and a refresh per block.

The ladder comes first, with the first window. It adds the speed-ups of generate.py one by one.
Runs with and without the new one alternate. If it does not help, the next rungs leave it out.

Then one row for each window, with all speed-ups that helped:

    floor        lower bound of the passes: their operations, counted on tensors without contents,
                 at the rate that this GPU reaches on a large matrix product
    passes       the transformer alone, median of the blocks with a full window
    end to end   with decoding and mp4, same blocks; without diffusers or av the passes alone
    TTFC         time to first chunk, without encoding the prompt: passes alone, and until the first
                 second is written
    first, last  time of the first and the last block with a full window, and peak memory until
                 then; with the first window, a film has --blocks blocks
    planned      peak memory, as full_size/memory.py computes it
    textbook     the same block with caches that grow by `cat`, see `TextbookView`. Its time is
                 divided by the time of our caches without any speed-up, and with all that helped;
                 a dash: its caches do not fit

After every rung and every window the script writes results/bench_generate.json and, unless --tiny,
the tables of benchmarks/README.md.
"""

import copy
import gc
import tempfile
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
from benchmarks.bench_attention import matmul_rate
from film.mp4 import Movie, av
from full_size import decoders, faster, memory, text, weights
from kernel import cache_append_attention as kernel
from kv_cache import CachedView, attention
from masks import block_span
from plumbing import cli, files
from plumbing.stopwatch import Stopwatch, settled_median
from rollout import Block


def tiny(cfg):
    """Return the same blocks in a model that runs anywhere."""
    return replace(
        cfg, num_layers=2, num_heads=2, video_width=32, audio_width=16, height=64, width=64
    )


# ---- the lower bound ----


def flops_of_block(cfg, window, tokens=text.TOKENS) -> int:
    """Count the operations of a block with a full window: of its passes and the refresh."""
    # All layers do the same, so two models tell what a layer adds.
    one, two = (flops_of_pass(meta_net(cfg, layers), window, tokens) for layers in (1, 2))
    passes = len(cfg.sigmas)  # the last level is 0, the refresh
    return (one + (cfg.num_layers - 1) * (two - one)) * passes


def meta_net(cfg, layers):
    """Build a model with another number of layers, without contents."""
    return model.build(replace(cfg, num_layers=layers), device="meta")


def flops_of_pass(net, window, tokens=text.TOKENS) -> int:
    """Count the operations of one pass with a full window; a multiply-add is two."""
    view = CachedView(net.cfg, window + 3, window)
    prompt = net.project_text(torch.empty(1, tokens, net.cfg.caption_width, device="meta"))
    for _ in range(window + 1):  # full, but nothing is evicted yet, so no past pass is needed
        view.next_block()
    with FlopCounterMode(display=False) as counter:
        one_pass(net, view, prompt)
    return counter.get_total_flops()


def floor_table(cfg, window, flops=800e12, bandwidth=3e12) -> str:
    """Return the lower bound of one pass on a GPU with this rate and bandwidth, as Markdown."""
    one, two = meta_net(cfg, 1), meta_net(cfg, 2)
    sizes = Counter()  # tokens -> number of weights that are multiplied with so many tokens

    def count(layer, inputs, _):
        sizes[inputs[0].shape[-2]] += layer.weight.numel() * cfg.num_layers

    for layer in (m for m in one.layers.modules() if isinstance(m, nn.Linear)):
        layer.register_forward_hook(count)
    a_layer = flops_of_pass(two, window) - flops_of_pass(one, window)
    del sizes[text.TOKENS]  # keys and values of the prompt are computed before the stream
    rows, attention_work = [], cfg.num_layers * a_layer
    for tokens, n in sorted(sizes.items(), reverse=True):
        work, size = 2 * tokens * n, 2 * n
        attention_work -= work
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

    def with_speedups(self, names):
        """Return the transformer with exactly these speed-ups; lay out the decoders."""
        self.lay_out_decoders(names)
        # The modules are a copy, so neither speed-ups nor hooks stay on `net`. The weights are not.
        shared = {id(p): p for p in self.net.parameters()}  # deepcopy takes these as copied
        return faster.sped_up(copy.deepcopy(self.net, shared), names, self.device)

    def lay_out_decoders(self, names):
        if self.decoders:
            is_last = "channels-last" in names
            layout = torch.channels_last_3d if is_last else torch.contiguous_format
            decoders.channels_last(self.decoders, layout)


def time_passes(net, features, blocks, window, device) -> list[float]:
    """Return the seconds of the passes of every block, with the refresh of the block before."""
    watch, seconds = Stopwatch(device), blocks * net.cfg.block_seconds
    stream = generate.stream(net, "x", seconds, window=window, read=lambda _: features)
    return [watch.lap() for _ in stream]


@torch.inference_mode()
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


def time_decoding(subject, speedups, blocks=6) -> float:
    """Return the median seconds to decode a block of noise."""
    cfg, device = subject.net.cfg, subject.device
    subject.lay_out_decoders(speedups)
    decoder, watch = decoders.Decoder(*subject.decoders, cfg), Stopwatch(device)
    dtype, seconds = next(subject.decoders[0].parameters()).dtype, []
    for k in range(blocks):
        noise = model.draw_noise(1, block_span(k, cfg), cfg, None, device, dtype)
        watch.lap()
        decoder.decode(Block(k, *noise))
        seconds.append(watch.lap())
    return settled_median(seconds)


def full_blocks(per_block, window):
    """Drop the values of blocks with a partly filled window, and of blocks that were recorded."""
    return per_block[settled_after(window) :] or per_block[-1:]


def settled_after(window) -> int:
    """Return the number of blocks before the window is full and all passes are recorded."""
    return 2 * (window + 1) + 4  # each place of the ring is recorded once; two for good measure


def free_memory():
    """Give unused memory of the GPU back."""
    gc.collect()  # recordings are part of reference cycles
    torch.cuda.empty_cache()


# ---- the ladder ----


def climb(rungs, subject, window, rounds, save):
    """Add the rungs: each speed-up on top of those that helped so far."""

    def passes(speedups):
        free_memory()  # of the recordings before
        net, blocks = subject.with_speedups(speedups), settled_after(window) + 4
        per_block = time_passes(net, subject.features, blocks, window, subject.device)
        return median_high(full_blocks(per_block, window))

    def decoding(speedups):
        return time_decoding(subject, speedups)

    for name in faster.find_speedups(["all"], subject.net.cfg, subject.device):
        measure = decoding if name == "channels-last" else passes
        if measure is passes or subject.decoders:
            before = helpful(rungs)
            pairs = [(measure(before), measure((*before, name))) for _ in range(rounds)]
            rungs.append(rung(name, measure.__name__, pairs))
            save()


def helpful(rungs) -> tuple:
    """Return the names of the speed-ups that made the stream faster."""
    return tuple(r["speed_up"] for r in rungs if r["before_over_after"] > 1)


def rung(name, of_what, pairs) -> dict:
    """Return the medians over rounds of (before, after) in seconds."""
    before, after = (median_high(column) for column in zip(*pairs))
    return {
        "speed_up": name,
        "of": of_what,
        "before_seconds": before,
        "after_seconds": after,
        # within a round: a machine may be slower in the next one
        "before_over_after": median_high([b / a for b, a in pairs]),
    }


# ---- one window ----


def bench_window(subject, window, blocks, rate, speedups=()) -> dict:
    """Measure one row of the table; rate: see `matmul_rate`."""
    cfg, row = subject.net.cfg, {"window_seconds": window, "blocks": blocks, "matmul_flops": rate}
    fast = subject.with_speedups(speedups)
    if subject.decoders:
        row["film"] = bench_film(fast, subject, window, blocks, speedups)
        passes = row["film"]["passes_seconds"]
    else:
        passes = time_passes(fast, subject.features, blocks, window, subject.device)
    del fast  # its recordings hold the caches of their stream
    free_memory()
    full, floor = full_blocks(passes, window), flops_of_block(cfg, window) / rate
    median, frames = median_high(full), cfg.fps * cfg.block_seconds  # frames of a block
    row |= {
        "floor_fps": frames / floor,
        "passes_fps": frames / median,
        "share_of_floor": floor / median,
        "first_and_last_full_block_seconds": [full[0], full[-1]],
    }
    return row | beside_textbook(subject, window, median)


def bench_film(net, subject, window, blocks, speedups) -> dict:
    """Return the report of a film, as generate.py writes it, its full blocks, and its memory."""
    cfg, watch = net.cfg, Stopwatch(subject.device)
    decoder = decoders.Decoder(*subject.decoders, cfg, watch=watch.watch)
    watch.watch_passes(net, len(cfg.sigmas) - 1)
    seconds, size = blocks * cfg.block_seconds, (cfg.height, cfg.width)
    with tempfile.TemporaryDirectory() as folder:
        movie = Movie(f"{folder}/x.mp4", size, cfg.fps, decoder.sample_rate, decoder.channels)
        stream = generate.stream(net, "x", seconds, window=window, read=lambda _: subject.features)
        generate.run(stream, decoder, movie, seconds, watch)
        movie.close()
    both = [sum(pair) for pair in zip(watch.passes, watch.output)]
    fps = cfg.fps * cfg.block_seconds / median_high(full_blocks(both, window))
    peaks = [mb * 2**20 / memory.GB for mb in full_blocks(watch.peaks, window)]
    dtype = subject.features[0].dtype
    planned = memory.film_rows(cfg, len(watch.passes), window, dtype, speedups)
    return {
        **watch.report(movie.frames, cfg),
        "full_blocks_fps": fps,
        "first_and_last_peak_gb": [peaks[0], peaks[-1]],
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
    return {
        "same_block_seconds": ours,
        "textbook_seconds": book,
        "textbook_over_ours": book / ours,
        "textbook_over_fastest": book / fastest,
    }


# ---- tables ----


def ladder_table(rungs) -> str:
    """Return the ladder as Markdown."""
    rows = []
    for r in rungs:
        times = [f"{1000 * r[f'{when}_seconds']:.1f} ms a block" for when in ("before", "after")]
        rows.append([f"`{r['speed_up']}`", r["of"], *times, f"{r['before_over_after']:.3f}"])
    return page.table(["speed-up", "of", "before", "after", "before ÷ after"], rows)


def window_table(rows) -> str:
    """Return speed and memory by window as Markdown."""
    head = ["window", "floor", "passes", "end to end", "TTFC: passes, all"]
    head += ["first, last full block", "peak until then", "planned"]
    return page.table([*head, "textbook ÷ ours: plain, fastest"], map(window_cells, rows))


def window_cells(row) -> list[str]:
    """Return one line of the table; "" without a film, or without room for the textbook."""
    end = first_second = peaks = plan = book = ""
    if film := row.get("film"):
        end = f"{film['full_blocks_fps']:.0f} FPS"
        first_second = f"{film['ttfc_passes_seconds']:.2f}, {film['ttfc_seconds']:.2f} s"
        peaks = "{:.1f}, {:.1f} GB".format(*film["first_and_last_peak_gb"])
        plan = f"{film['plan_gb']:.1f} GB"
    if "textbook_seconds" in row:
        book = f"{row['textbook_over_ours']:.2f}, {row['textbook_over_fastest']:.2f}"
    first, last = (1000 * s for s in row["first_and_last_full_block_seconds"])
    passes = f"{row['passes_fps']:.0f} FPS, {row['share_of_floor']:.0%}"
    bound = f"{row['window_seconds']} s", f"{row['floor_fps']:.0f} FPS"
    return [*bound, passes, end, first_second, f"{first:.0f}, {last:.0f} ms", peaks, plan, book]


def fill_page(about, rungs, rows, window):
    """Write the tables of benchmarks/README.md, as far as they are measured."""
    where = "{device}, torch {torch}, {date}, {config}".format(**about)
    page.fill_in("ladder", f"{where}, window {window} s\n\n{ladder_table(rungs)}")
    if rows:
        names = ", ".join(helpful(rungs))
        page.fill_in("windows", f"{where}, with {names}\n\n{window_table(rows)}")


# ---- the command line ----


def main():
    p = cli.parser(__doc__)
    p.add_argument("--config", default="full", choices=["full", "released"])
    p.add_argument("--windows", type=int, nargs="+", default=[5, 15, 25], help="seconds")
    p.add_argument("--blocks", type=int, default=120, help="length of the first window's film")
    p.add_argument("--rounds", type=int, default=3, help="rounds of the ladder; medians are taken")
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
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: expected 1 or more")
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
            fill_page(about, rungs, rows, first)

    with kernel.strict(not args.tiny):  # no attention may fall back to PyTorch
        rate = matmul_rate(device, dtype, 256 if args.tiny else 8192)
        subject = load(cfg, device, dtype, has_decoders=bool(av) and not args.tiny)
        climb(rungs, subject, first, args.rounds, save)
        print(ladder_table(rungs))
        for window in args.windows:
            blocks = args.blocks if window == first else settled_after(window) + 8
            rows.append(bench_window(subject, window, blocks, rate, helpful(rungs)))
            save()
            print(window_table(rows[-1:]))
    print(f"wrote {args.out}")


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
