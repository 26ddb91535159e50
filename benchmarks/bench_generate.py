"""How fast does the full size stream on one GPU, how far is that from the floor, and from before?

    python -m benchmarks.bench_generate                    windows of 5, 15 and 25 seconds
    python -m benchmarks.bench_generate --rounds 1         the ladder once and not three times
    python -m benchmarks.bench_generate --floor            computed, without a GPU

Random weights, batch 1, 512 x 768, bfloat16, four passes and a refresh a block. First, with the
first window, a ladder: each speed-up of generate.py on top of those before it, before and after in
turns; what does not win is left out of the next rungs. Then, with what won, for each window, side
by side from one run,

    floor      multiply-adds of a block's passes, counted by running them without contents, at the
               rate that this GPU reaches on a large matrix product, measured just before
    passes     the transformer alone (DiT), medians of the blocks behind a full window
    end to end with LTX-2's decoders and the mp4, same blocks; and the stages of a block. Without
               diffusers the passes alone, without av everything but the mp4; both say so
    TTFC       to the first second, by the passes alone and to its being written, prompts read
    flat       the last of those blocks beside the first one: seconds, and peak memory until then;
               the first window's film has --blocks of them
    textbook   a block with a full window, over and over, as the released inference does it: caches
               that grow by `cat`, positions asked of the GPU in every attention. Beside it the
               same block by our caches without any speed-up, and with all that won; a dash where
               the textbook's caches would not fit

and peak memory of the film beside the plan of full_size/memory.py. Refuses to measure without the CUDA
kernel. Writes results/bench_generate.json and the tables of benchmarks/README.md (not with --tiny)
after every rung and window; begun again on the same day and kind of machine, it goes on behind the
last of them (remove the JSON after a change of code).

Not measured on a GPU yet. `--device cpu --tiny` runs all of it small, to test the script.
"""

import contextlib
import gc
import json
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median_high

import torch
from torch.utils.flop_counter import FlopCounterMode

from full_size import faster

ROOT = Path(__file__).resolve().parent.parent

import config
import dmd
import generate
import model
from film.mp4 import Movie, av
from full_size import (
    decoders,
    memory,
    memory_plan,
)
from full_size import text as captions
from full_size import weights as ltx2
from kernel import cache_append_attention as kernel
from kv_cache import CachedView, attention
from masks import block_span
from plumbing import (
    cli,
    files,
)
from plumbing.stopwatch import Stopwatch, settled_median
from self_forcing import Block

RUNGS = ("qkv", "graph", "beside", "merge")  # of the ladder, in this order
TINY = dict(num_layers=2, num_heads=2, video_width=32, audio_width=16, height=64, width=64)


# ---- the floor ----


def flops_of_block(cfg, window, tokens=captions.TOKENS) -> int:
    """Operations of a block's passes and its refresh, the window full; a multiply-add is two.

    tokens   of the caption

    All layers do the same, so one of them tells what any number does.
    """
    none, one = (flops_of_pass(empty(cfg, n), window, tokens) for n in (0, 1))
    return (none + cfg.num_layers * (one - none)) * len(cfg.sigmas)  # passes, and the refresh


def empty(cfg, layers):
    """A net of so many layers, without contents."""
    return model.build(replace(cfg, num_layers=layers), device="meta")


def flops_of_pass(net, window, tokens=captions.TOKENS) -> int:
    """Operations of one pass with a full window."""
    view = CachedView(net.cfg, window + 3, window)
    text = net.project_text(torch.empty(1, tokens, net.cfg.caption_width, device="meta"))
    for _ in range(window + 1):  # keys without contents need not be made
        view.move_on()
    with FlopCounterMode(display=False) as counter:
        one_pass(net, view, text)
    return counter.get_total_flops()


def work_of_layers(cfg, window) -> tuple[Counter, int]:
    """Of one pass: {tokens: weights that each of so many tokens is multiplied with}, and the
    operations of attention."""
    net, weights = empty(cfg, 1), Counter()

    def count(layer, inputs, _):
        weights[inputs[0].shape[-2]] += layer.weight.numel() * cfg.num_layers

    for stream in (net.video, net.audio):
        for layer in (m for m in stream.layers.modules() if isinstance(m, torch.nn.Linear)):
            layer.register_forward_hook(count)
    one, none = (flops_of_pass(n, window) for n in (net, empty(cfg, 0)))
    del weights[captions.TOKENS]  # the prompt's keys and values are made before, once
    linear = 2 * sum(tokens * n for tokens, n in weights.items())
    return weights, cfg.num_layers * (one - none) - linear


def floor_table(cfg, window, flops=800e12, bandwidth=3e12) -> str:
    """What a pass cannot be faster than on a GPU of this rate and bandwidth, as Markdown."""
    weights, attention = work_of_layers(cfg, window)
    lines = [f"| of one pass, {cfg.num_layers} layers | work | floor |", "|---|---|---|"]
    for tokens, n in sorted(weights.items(), reverse=True):
        work, size = 2 * tokens * n, 2 * n
        seconds = max(work / flops, size / bandwidth)
        lines.append(
            f"| linear layers, {tokens} tokens | {n / 1e9:.1f} G weights: {work / 1e12:.1f} TFLOP, "
            f"{size / 1e9:.1f} GB to be read | {1000 * seconds:.1f} ms |"
        )
    work = f"{attention / 1e12:.1f} TFLOP | {1000 * attention / flops:.1f} ms"
    return "\n".join([*lines, f"| attention | {work} |"])


@torch.no_grad()
def one_pass(net, view, text, sigma=0.0):
    """A pass over noise, in the block where the view stands."""
    like, span = next(net.parameters()), block_span(view.block, net.cfg)
    noise = model.draw_noise(1, span, net.cfg, None, like.device, like.dtype)
    dmd.at_sigma(net, noise, sigma, text, span, view)


def fill(net, view, text, blocks):
    """So many blocks to be remembered."""
    for _ in range(blocks):
        one_pass(net, view, text)
        view.next_block()


def matmul_rate(device, dtype, n=8192) -> float:
    """Operations a second on a product of n x n matrices."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        watch = Stopwatch(device)
        for _ in range(5):
            a @ b
        seconds.append(watch.lap() / 5)
    return 2 * n**3 / settled_median(seconds)


# ---- what the released inference does ----


class TextbookView:
    """Caches that grow by `cat`, for every attention of every pass; see the module's text.

    The same numbers as `CachedView` without a window (OmniForcing v2, ltx-causal).
    """

    block = 0  # counted for whoever asks

    def __init__(self):
        self.past, self.new = {}, {}  # (layer, site) -> keys and values: finished, and in work

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


def time_passes(net, blocks, window, features, device, merge=False) -> list[float]:
    """Seconds of every block's passes, the refresh of the block before included."""
    watch, how = Stopwatch(device), dict(window=window, merge=merge)
    seconds = blocks * net.cfg.block_seconds
    for _ in generate.stream(net, "x", seconds, read=lambda _: features, **how):
        watch.passes.append(watch.lap())
    return watch.passes


@torch.inference_mode()
def time_block(net, view, k, features, device, times=5) -> float:
    """Seconds of the passes of block k and its refresh, in its place behind k others: a median."""
    text = net.project_text(*features)
    fill(net, view, text, k)
    watch, seconds = Stopwatch(device), []
    for _ in range(times + 2):
        watch.lap()
        for sigma in net.cfg.sigmas:
            one_pass(net, view, text, sigma)
        seconds.append(watch.lap())
    return settled_median(seconds)


def frames_per_second(seconds, cfg):
    return cfg.fps * cfg.block_seconds / seconds


def full_blocks(passes, window):
    """Times of the blocks whose window was full and whose passes had been recorded before."""
    return passes[settled_after(window) :] or passes[-1:]


def settled_after(window) -> int:
    """Blocks until the window is full, a turn of the ring in which passes are recorded, and two."""
    return 2 * (window + 1) + 4


def set_up(net, speedups, device):
    """The transformer with exactly these speed-ups."""
    net.fork = contextlib.nullcontext
    for site in (m for m in net.modules() if isinstance(m, model.Attention)):
        site.joined = False
    return faster.sped_up(net, speedups, device)


def climb(rungs, net, nets, features, window, device, rounds, save):
    """Add the missing rungs: every speed-up on top of those that won so far."""
    possible, blocks = faster.find_speedups(["all"], net.cfg, device), settled_after(window) + 4

    def median_of(speedups):
        free_memory(device)  # of the recordings before
        faster, merge = set_up(net, speedups, device), "merge" in speedups
        passes = time_passes(faster, blocks, window, features, device, merge)
        return median_high(full_blocks(passes, window))

    known = {r["speed_up"] for r in rungs}
    for name in (name for name in RUNGS if name in possible and name not in known):
        won = won_of(rungs)
        pairs = [(median_of(won), median_of((*won, name))) for _ in range(rounds)]
        rungs.append(rung(name, "passes", pairs))
        save()
    if nets and "channels-last" not in known:
        rungs.append(layout_rung(nets, net.cfg, device, rounds))
        save()


def won_of(rungs) -> tuple:
    """Names of the speed-ups that made it faster."""
    return tuple(r["speed_up"] for r in rungs if r["before_over_after"] > 1)


def layout_rung(nets, cfg, device, rounds) -> dict:
    """Both layouts of the decoder in turns."""
    layouts, pairs = (torch.contiguous_format, torch.channels_last_3d), []
    for _ in range(rounds):
        pairs.append([])
        for layout in layouts:
            decoders.channels_last(nets, layout)
            pairs[-1].append(time_decoding(nets, cfg, device))
    return rung("channels-last", "decoding", pairs)


def rung(name, of_what, pairs) -> dict:
    """Medians over rounds of (before, after) in seconds; the ratio is taken within a round."""
    before, after = (median_high(column) for column in zip(*pairs))
    ratio = median_high([b / a for b, a in pairs])
    times = {"before_seconds": before, "after_seconds": after, "before_over_after": ratio}
    return {"speed_up": name, "of": of_what, **times}


def time_decoding(nets, cfg, device, blocks=6) -> float:
    """Seconds to decode a block of noise, median from the third on."""
    decoder, watch = decoders.Decoder(*nets, cfg), Stopwatch(device)
    like = dict(device=device, dtype=next(nets[0].parameters()).dtype)
    seconds = []
    for k in range(blocks):
        block = Block(k, *model.draw_noise(1, block_span(k, cfg), cfg, None, **like))
        watch.lap()
        decoder.decode(block)
        seconds.append(watch.lap())
    return settled_median(seconds)


def bench_window(net, nets, features, window, blocks, rate, device, speedups=()) -> dict:
    """One line of the table."""
    cfg, merge = net.cfg, "merge" in speedups
    fast, film = set_up(net, speedups, device), None
    if nets:
        film = bench_film(fast, nets, features, window, blocks, device, merge)
        passes = film["passes_seconds"]
    else:
        passes = time_passes(fast, blocks, window, features, device, merge)
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
        row |= {"film": film, **beside_plan(film, net, window, speedups)}
    del fast  # recordings hold the caches of their stream
    free_memory(device)
    return row | beside_textbook(set_up(net, (), device), features, window, median, device)


def beside_plan(film, net, window, speedups) -> dict:
    """Peak memory as planned, and as it was until the first full block and until the last."""
    blocks, dtype = len(film["passes_seconds"]), next(net.parameters()).dtype
    plan = memory_plan.total(memory_plan.film_rows(net.cfg, blocks, window, dtype, speedups))
    peaks = [mb * 2**20 / 1e9 for mb in full_blocks(film["peaks_mb"], window)]
    return {"plan_gb": plan / 1e9, "first_and_last_peak_gb": [peaks[0], peaks[-1]]}


def beside_textbook(net, features, window, fastest, device) -> dict:
    """The block that has the whole window behind it, by our caches and by the textbook's."""
    k, dtype = window + 1, next(net.parameters()).dtype  # its cache never forgets; nor need ours
    ours = time_block(net, CachedView(net.cfg, k + 1), k, features, device)
    free_memory(device)
    size = memory_plan.cache_row(net.cfg, k + 1, None, dtype).num_bytes
    if memory.free_bytes(device) < 1.2 * size:  # it copies one attention's at a time
        return {"same_block_seconds": ours}
    book = time_block(net, TextbookView(), k, features, device)
    ratios = {"textbook_over_ours": book / ours, "textbook_over_fastest": book / fastest}
    return {"same_block_seconds": ours, "textbook_seconds": book, **ratios}


def free_memory(device):
    """What is not used any more leaves the GPU now; a recording is part of cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Unwritten:
    """Takes the place of a Movie where the package av is missing: counts frames."""

    def __init__(self, *_):
        self.frames = 0

    def add(self, frames, samples):
        self.frames += len(frames)

    def close(self):
        pass


def bench_film(net, nets, features, window, blocks, device, merge=False) -> dict:
    """The report of a whole film, as generate.py writes it, and the speed of its full blocks."""
    cfg, watch = net.cfg, Stopwatch(device)
    decoder = decoders.Decoder(*nets, cfg, watch=watch.watch)
    watch.watch_passes(net, len(cfg.sigmas) - 1)
    seconds = blocks * cfg.block_seconds
    with tempfile.TemporaryDirectory() as folder:
        film = f"{folder}/x.mp4", (cfg.height, cfg.width), cfg.fps
        movie = (Movie if av else Unwritten)(*film, decoder.sample_rate, decoder.channels)
        how = dict(window=window, merge=merge, read=lambda _: features)
        stream = generate.stream(net, "x", seconds, **how)
        generate.run(stream, decoder, movie, seconds, watch)
        movie.close()
    del net.forward  # back to that of its class
    whole = [sum(both) for both in zip(watch.passes, watch.output)]
    fps = frames_per_second(median_high(full_blocks(whole, window)), cfg)
    report = watch.report(movie.frames, cfg) | {"full_blocks_fps": fps, "peaks_mb": watch.peaks}
    return report | {"is_written": bool(av)}


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
    """{column: text}; nothing where there was no film, or no room for the textbook's caches."""
    film, first_second, end, peaks, plan = row.get("film"), "", "", "", ""
    if film:
        end = f"{film['full_blocks_fps']:.0f} FPS" + ("" if film["is_written"] else ", no mp4")
        first_second = f"{film['ttfc_passes_seconds']:.2f}, {film['ttfc_seconds']:.2f} s"
        peaks = "{:.1f}, {:.1f} GB".format(*row["first_and_last_peak_gb"])
        plan = f"{row['plan_gb']:.1f} GB"
    times = [1000 * s for s in row["first_and_last_full_block_seconds"]]
    book = "textbook_seconds" in row and "{textbook_over_ours:.2f}, {textbook_over_fastest:.2f}"
    return {
        "window": f"{row['window_seconds']} s",
        "floor": f"{row['floor_fps']:.0f} FPS",
        "passes": f"{row['passes_fps']:.0f} FPS, {row['share_of_floor']:.0%}",
        "end to end": end,
        "TTFC: passes, all": first_second,
        "first, last full block": "{:.0f}, {:.0f} ms".format(*times),
        "peak until then": peaks,
        "planned": plan,
        "textbook ÷ ours: plain, fastest": book and book.format(**row),
    }


def find_decoders(device, dtype):
    """LTX-2's decoders full of noise, or none where diffusers is missing; says so."""
    try:
        return decoders.random_weights(device, dtype)
    except ValueError as error:
        print(f"passes only: {error}")


def resumed(out, about) -> tuple[list, list]:
    """Rungs and rows that an earlier run has measured, today and on such a machine."""
    found = json.loads(Path(out).read_text()) if Path(out).exists() else {"about": None}
    return (found["ladder"], found["rows"]) if found["about"] == about else ([], [])


def main():
    p = cli.parser(__doc__)
    p.add_argument("--config", default="full", choices=["full", "released"])
    p.add_argument("--windows", type=int, nargs="+", default=[5, 15, 25], help="seconds")
    p.add_argument("--blocks", type=int, default=120, help="of the first window's film")
    p.add_argument("--rounds", type=int, default=3, help="of the ladder, medians of them")
    p.add_argument("--floor", action="store_true", help="compute the floor of a pass, and no more")
    p.add_argument("--device", default="cuda")
    p.add_argument("--tiny", action="store_true", help="a tiny model: tests this script, no more")
    p.add_argument("--out", default=str(ROOT / "results" / "bench_generate.json"))
    args = p.parse_args()
    if args.floor:
        return print(floor_table(cli.find_config(args.config), args.windows[0]))
    device, cfg = cli.find_device(args.device), cli.find_config(args.config)
    cfg = replace(cfg, sigmas=config.FOUR_STEPS, **(TINY if args.tiny else {}))
    dtype, first = torch.float32 if args.tiny else torch.bfloat16, args.windows[0]
    if args.blocks < (least := settled_after(first) + 1):
        raise ValueError(f"--blocks {args.blocks}: expected at least {least}")
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: expected 1 or more")
    path = "PyTorch" if args.tiny else kernel.require(device)
    about = cli.machine(device) | {"config": cfg.name, "tiny": args.tiny, "dtype": str(dtype)}
    about |= {"attention": path}
    rungs, rows = resumed(args.out, about)

    def save():
        files.write_json(args.out, {"about": about, "ladder": rungs, "rows": rows})
        if not args.tiny:
            fill_page(about, rungs, rows, first)

    with kernel.strict(not args.tiny):
        measure(args, cfg, device, dtype, rungs, rows, save)
    print(f"wrote {args.out}")


def measure(args, cfg, device, dtype, rungs, rows, save):
    """Add what is missing of the ladder and of the windows, and save it piece by piece."""
    first = args.windows[0]
    rate = matmul_rate(device, dtype, 256 if args.tiny else 8192)
    net = ltx2.random_weights(cfg, device, dtype)
    features = captions.random_features(["x"], cfg, device, dtype)["x"]
    nets = None if args.tiny else find_decoders(device, dtype)
    climb(rungs, net, nets, features, first, device, args.rounds, save)
    print(ladder_table(rungs))
    won = won_of(rungs)
    if nets:
        is_last = "channels-last" in won
        decoders.channels_last(nets, torch.channels_last_3d if is_last else torch.contiguous_format)
    for window in (w for w in args.windows if w not in {r["window_seconds"] for r in rows}):
        blocks = args.blocks if window == first else settled_after(window) + 8
        rows.append(bench_window(net, nets, features, window, blocks, rate, device, won))
        save()
        print(window_table(rows[-1:]))


def fill_page(about, rungs, rows, window):
    """The tables of benchmarks/README.md, as far as they go."""
    page = ROOT / "benchmarks" / "README.md"
    how = "{device}, torch {torch}, {date}, {config}".format(**about)
    files.fill_in(page, "ladder", f"{how}, window {window} s\n\n{ladder_table(rungs)}")
    if rows:
        won = ", ".join(won_of(rungs))
        files.fill_in(page, "windows", f"{how}, with {won}\n\n{window_table(rows)}")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
