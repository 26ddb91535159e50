"""How fast does the full size stream on one GPU, how far is that from the floor, and from before?

    python benchmarks/bench_generate.py                        windows of 5, 15 and 25 seconds
    python benchmarks/bench_generate.py --windows 5 --blocks 120    is it flat, is memory?

Random weights, batch 1, 512 x 768, bfloat16, four passes and a refresh a block. First, with the
first window, a ladder: each speed-up of generate.py on top of those before it, before and after in
turns; what does not win is left out of the next rungs. Then, with what won, for each window, side
by side from one run,

    floor      multiply-adds of a block's passes, counted by running them without contents, at the
               rate that this GPU reaches on a large matrix product, measured just before
    passes     the transformer alone (DiT), medians from the third full block on
    end to end with LTX-2's decoders and the mp4, same blocks; and the stages of a block
    textbook   a block with a full window, over and over, without any speed-up, and as the released
               inference does it: caches that grow by `cat`, positions asked of the GPU in every
               attention; a dash where these caches would not fit

and peak memory of the film beside the plan of memory_plan.py. Refuses to measure without the CUDA
kernel. Writes results/bench_generate.json, and unless
--tiny the tables of benchmarks/README.md.

Not measured on a GPU yet. `--device cpu --tiny` runs all of it small, to test the script.
"""

import contextlib
import gc
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median_high

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script from anywhere

import cache_append_attention as kernel  # noqa: E402
import captions  # noqa: E402
import cli  # noqa: E402
import config  # noqa: E402
import decoders  # noqa: E402
import dmd  # noqa: E402
import files  # noqa: E402
import generate  # noqa: E402
import ltx2  # noqa: E402
import memory  # noqa: E402
import memory_plan  # noqa: E402
import model  # noqa: E402
import parts  # noqa: E402
from kv_cache import CachedView, attention  # noqa: E402
from masks import block_span  # noqa: E402
from movie import Movie  # noqa: E402
from self_forcing import Block  # noqa: E402
from stopwatch import Stopwatch, settled_median  # noqa: E402

RUNGS = ("qkv", "graph", "beside", "merge")  # of the ladder, in this order
TINY = dict(num_layers=2, num_heads=2, video_width=32, audio_width=16, height=64, width=64)


# ---- the floor ----


def flops_of_block(cfg, window) -> int:
    """Operations of a block's passes and its refresh, the window full; a multiply-add is two."""
    net = model.build(cfg, device="meta")
    view, text = CachedView(cfg, window + 3, window), meta_text(net)
    fill(net, view, text, window + 1)
    with FlopCounterMode(display=False) as counter:
        one_pass(net, view, text)
    return counter.get_total_flops() * len(cfg.sigmas)  # passes, and the refresh


def meta_text(net):
    return net.project_text(torch.empty(1, captions.TOKENS, net.cfg.caption_width, device="meta"))


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
    return parts.sped_up(net, speedups, device)


def ladder(net, nets, features, window, blocks, device, rounds) -> tuple[list[dict], tuple]:
    """Every speed-up on top of those that won so far: -> rows, and the names of those that won."""
    possible, found, won = parts.find_speedups(["all"], net.cfg, device), [], ()

    def median_of(speedups):
        faster, merge = set_up(net, speedups, device), "merge" in speedups
        return median_high(
            full_blocks(time_passes(faster, blocks, window, features, device, merge), window)
        )

    for name in (name for name in RUNGS if name in possible):
        pairs = [(median_of(won), median_of((*won, name))) for _ in range(rounds)]
        found.append(rung(name, "passes", pairs))
        won = (*won, name) if found[-1]["before_over_after"] > 1 else won
    if nets:
        found.append(layout_rung(nets, net.cfg, device, rounds))
        won = (*won, "channels-last") if found[-1]["before_over_after"] > 1 else won
    return found, won


def layout_rung(nets, cfg, device, rounds) -> dict:
    """Both layouts of the decoder in turns; it is left in the one that wins."""
    layouts, pairs = (torch.contiguous_format, torch.channels_last_3d), []
    for _ in range(rounds):
        pairs.append([])
        for layout in layouts:
            decoders.channels_last(nets, layout)
            pairs[-1].append(time_decoding(nets, cfg, device))
    found = rung("channels-last", "decoding", pairs)
    decoders.channels_last(nets, layouts[found["before_over_after"] > 1])
    return found


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
    cfg, merge, dtype = net.cfg, "merge" in speedups, next(net.parameters()).dtype
    fast = set_up(net, speedups, device)
    passes = full_blocks(time_passes(fast, blocks, window, features, device, merge), window)
    floor, median = flops_of_block(cfg, window) / rate, median_high(passes)
    row = {
        "window_seconds": window,
        "floor_fps": frames_per_second(floor, cfg),
        "passes_fps": frames_per_second(median, cfg),
        "share_of_floor": floor / median,
        "first_and_last_full_block_seconds": [passes[0], passes[-1]],
    }
    if nets:
        row["film"] = bench_film(fast, nets, features, window, blocks, device, merge)
        rows = memory_plan.decoder_rows(cfg, dtype)
        graph = "graph" in speedups
        rows += memory_plan.stream_rows(cfg, blocks + 1, window, dtype, merge=merge, graph=graph)
        row["plan_gb"] = memory_plan.total(rows) / 1e9
        row["peak_gb"] = row["film"]["peak_memory_mb"] * 2**20 / 1e9
    del fast  # recordings hold the caches of their stream
    free_memory(device)
    return row | beside_textbook(set_up(net, (), device), features, window, device)


def beside_textbook(net, features, window, device) -> dict:
    """The block that has the whole window behind it, by our caches and by the textbook's."""
    k, dtype = window + 1, next(net.parameters()).dtype  # its cache never forgets; nor need ours
    ours = time_block(net, CachedView(net.cfg, k + 1), k, features, device)
    free_memory(device)
    size = memory_plan.cache_row(net.cfg, k + 1, None, dtype).num_bytes
    if memory.free_bytes(device) < 1.2 * size:  # it copies one attention's at a time
        return {"same_block_seconds": ours}
    book = time_block(net, TextbookView(), k, features, device)
    return {"same_block_seconds": ours, "textbook_seconds": book, "textbook_over_ours": book / ours}


def free_memory(device):
    """What is not used any more leaves the GPU now; a recording is part of cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def bench_film(net, nets, features, window, blocks, device, merge=False) -> dict:
    """The report of a whole film, as generate.py writes it, and the speed of its full blocks."""
    cfg, watch = net.cfg, Stopwatch(device)
    decoder = decoders.Decoder(*nets, cfg, watch=watch.watch)
    watch.watch_passes(net, len(cfg.sigmas) - 1)
    seconds = blocks * cfg.block_seconds
    with tempfile.TemporaryDirectory() as folder:
        size = cfg.height, cfg.width
        movie = Movie(f"{folder}/x.mp4", size, cfg.fps, decoder.sample_rate, decoder.channels)
        how = dict(window=window, merge=merge, read=lambda _: features)
        stream = generate.stream(net, "x", seconds, **how)
        generate.run(stream, decoder, movie, seconds, watch)
        movie.close()
    del net.forward  # back to that of its class
    report = watch.report(movie.frames, cfg.fps)
    whole = [sum(both) for both in zip(watch.passes, watch.output)]
    report["full_blocks_fps"] = frames_per_second(median_high(full_blocks(whole, window)), cfg)
    return {k: v for k, v in report.items() if k not in ("passes_seconds", "output_seconds")}


def ladder_table(rungs) -> str:
    """The ladder as Markdown."""
    lines = ["| speed-up | of | before | after | before ÷ after |", "|---|---|---|---|---|"]
    for r in rungs:
        before, after = 1000 * r["before_seconds"], 1000 * r["after_seconds"]
        times = f"{before:.1f} ms a block | {after:.1f} ms a block"
        lines.append(f"| `{r['speed_up']}` | {r['of']} | {times} | {r['before_over_after']:.3f} |")
    return "\n".join(lines)


def window_table(rows) -> str:
    """Speed and memory by window as Markdown."""
    lines = [
        "| window | floor | passes | of floor | end to end | peak, planned | textbook ÷ ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        film, book = r.get("film"), r.get("textbook_over_ours")
        cells = [f"{r['window_seconds']} s", f"{r['floor_fps']:.0f} FPS"]
        cells += [f"{r['passes_fps']:.0f} FPS", f"{r['share_of_floor']:.0%}"]
        cells += [f"{film['full_blocks_fps']:.0f} FPS" if film else "–"]
        cells += [f"{r['peak_gb']:.1f} GB, {r['plan_gb']:.1f} GB" if film else "–"]
        cells += [f"{book:.2f}" if book else "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def find_decoders(device, dtype):
    """LTX-2's decoders full of noise, or none where diffusers is missing; says so."""
    try:
        return decoders.random_weights(device, dtype)
    except ValueError as error:
        print(f"passes only: {error}")


def main():
    p = cli.parser(__doc__)
    p.add_argument("--config", default="full", choices=["full", "released"])
    p.add_argument("--windows", type=int, nargs="+", default=[5, 15, 25], help="seconds")
    p.add_argument("--blocks", type=int, default=70, help="of a stream; over two windows and 6")
    p.add_argument("--device", default="cuda")
    p.add_argument("--tiny", action="store_true", help="a tiny model: tests this script, no more")
    p.add_argument("--out", default=str(ROOT / "results" / "bench_generate.json"))
    args = p.parse_args()
    device, cfg = cli.find_device(args.device), cli.find_config(args.config)
    cfg = replace(cfg, sigmas=config.FOUR_STEPS, **(TINY if args.tiny else {}))
    dtype = torch.float32 if args.tiny else torch.bfloat16
    if args.blocks < (least := settled_after(max(args.windows)) + 1):
        raise ValueError(f"--blocks {args.blocks}: expected at least {least}")
    path = "PyTorch" if args.tiny else kernel.require(device)
    rate = matmul_rate(device, dtype, 256 if args.tiny else 8192)
    net = ltx2.random_weights(cfg, device, dtype)
    features = captions.random_features(["x"], cfg, device, dtype)["x"]
    nets = None if args.tiny else find_decoders(device, dtype)
    blocks = min(args.blocks, settled_after(args.windows[0]) + 8)
    rounds = 1 if args.tiny else 3
    rungs, won = ladder(net, nets, features, args.windows[0], blocks, device, rounds)
    print(ladder_table(rungs))
    about = cli.machine(device) | {"config": cfg.name, "tiny": args.tiny, "dtype": str(dtype)}
    about |= {"matmul_flops": rate, "won": won, "attention": path}
    rows = []
    for window in args.windows:
        rows.append(bench_window(net, nets, features, window, args.blocks, rate, device, won))
        print(json.dumps(rows[-1], indent=1))
        files.write_json(args.out, {"about": about, "ladder": rungs, "rows": rows})
    print(f"wrote {args.out}")
    if not args.tiny:
        how = "{device}, torch {torch}, {date}, {config}, ".format(**about)
        how += f"{args.blocks} blocks"
        page = ROOT / "benchmarks" / "README.md"
        first = f"{how}, window {args.windows[0]} s\n\n{ladder_table(rungs)}"
        files.fill_in(page, "ladder", first)
        files.fill_in(page, "windows", f"{how}, with {', '.join(won)}\n\n{window_table(rows)}")


if __name__ == "__main__":
    cli.run(main)
