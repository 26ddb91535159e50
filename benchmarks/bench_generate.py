"""How fast does the full size stream on one GPU, how far is that from the floor, and from before?

    python benchmarks/bench_generate.py                        windows of 5, 15 and 25 seconds
    python benchmarks/bench_generate.py --windows 5 --blocks 120    is it flat, is memory?

Random weights, batch 1, 512 x 768, bfloat16, four passes and a refresh a block. For each window it
prints, side by side from one run,

    floor      multiply-adds of a block's passes, counted by running them without contents, at the
               rate that this GPU reaches on a large matrix product, measured just before
    passes     the transformer alone (DiT), medians from the third full block on
    textbook   the same passes as the released inference does them: caches that grow by `cat`,
               positions asked of the GPU in every attention
    end to end with LTX-2's decoders and the mp4, and the stages of a block

and peak memory beside the plan of memory_plan.py. Writes results/bench_generate.json.

Not measured on a GPU yet. `--device cpu --tiny` runs all of it small, to test the script.
"""

import json
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median_high

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script from anywhere

import captions  # noqa: E402
import cli  # noqa: E402
import config  # noqa: E402
import decoders  # noqa: E402
import dmd  # noqa: E402
import files  # noqa: E402
import generate  # noqa: E402
import ltx2  # noqa: E402
import memory_plan  # noqa: E402
import model  # noqa: E402
from kv_cache import CachedView, attention  # noqa: E402
from masks import block_span  # noqa: E402
from movie import Movie  # noqa: E402
from stopwatch import Stopwatch, settled_median  # noqa: E402

TINY = dict(num_layers=2, num_heads=2, video_width=32, audio_width=16, height=64, width=64)


# ---- the floor ----


def flops_of_block(cfg, window) -> int:
    """Operations of a block's passes and its refresh, the window full; a multiply-add is two."""
    net = model.build(cfg, device="meta")
    view, text = CachedView(cfg, window + 3, window), meta_text(net)
    for _ in range(window + 1):
        meta_pass(net, view, text)
        view.next_block()
    with FlopCounterMode(display=False) as counter:
        meta_pass(net, view, text)
    return counter.get_total_flops() * len(cfg.sigmas)  # passes, and the refresh


def meta_text(net):
    return net.project_text(torch.empty(1, captions.TOKENS, net.cfg.caption_width, device="meta"))


@torch.no_grad()
def meta_pass(net, view, text):
    span = block_span(view.block, net.cfg)
    noise = model.draw_noise(1, span, net.cfg, None, "meta")
    dmd.at_sigma(net, noise, 1.0, text, span, view)


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

    def __init__(self, cfg, num_blocks, window=None, pinned=True):
        self.past, self.current = {}, {}  # (layer, site) -> keys and values of finished blocks

    def attend(self, layer, site, q, k, v, heads):
        where, new = (layer, site), (heads.keys(k), heads.split(v))
        past = self.past.get(where)
        self.position = torch.full((1,), k.shape[1], device=k.device).item()  # waits for the GPU
        both = new if past is None else [torch.cat([p.clone(), n], 1) for p, n in zip(past, new)]
        self.current[where] = both
        return attention(heads.queries(q), *both)

    def next_block(self):
        self.past, self.current = self.current, {}


# ---- measuring ----


def time_passes(net, blocks, window, features, device, view=None) -> list[float]:
    """Seconds of every block's passes, the refresh of the block before included."""
    watch, view_of = Stopwatch(device), generate.self_forcing.CachedView
    if view:
        generate.self_forcing.CachedView = view
    try:
        seconds = blocks * net.cfg.block_seconds
        for _ in generate.stream(net, "x", seconds, window=window, read=lambda _: features):
            watch.passes.append(watch.lap())
    finally:
        generate.self_forcing.CachedView = view_of
    return watch.passes


def frames_per_second(seconds, cfg):
    return cfg.fps * cfg.block_seconds / seconds


def full_blocks(passes, window):
    """Times of the blocks whose window was full, two to settle left out."""
    return passes[window + 3 :] or passes[-1:]


def bench_window(net, nets, features, window, blocks, rate, device) -> dict:
    """One line of the table."""
    cfg = net.cfg
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    passes = full_blocks(time_passes(net, blocks, window, features, device), window)
    median = median_high(passes)
    short = window + 2  # the textbook's cache never forgets: compare where both hold the same
    book = time_passes(net, short, None, features, device, TextbookView)[-1]
    ours = time_passes(net, short, None, features, device)[-1]
    floor = flops_of_block(cfg, window) / rate
    row = {
        "window_seconds": window,
        "floor_fps": frames_per_second(floor, cfg),
        "passes_fps": frames_per_second(median, cfg),
        "share_of_floor": floor / median,
        "first_and_last_full_block_seconds": [passes[0], passes[-1]],
        "textbook_seconds": book,
        "same_blocks_seconds": ours,
        "textbook_over_ours": book / ours,
    }
    if nets:
        row["end_to_end"] = bench_film(net, nets, features, window, blocks, device)
    dtype = next(net.parameters()).dtype
    rows = memory_plan.stream_rows(cfg, blocks + 1, window, dtype)
    row["plan_gb"] = memory_plan.total(rows + decoder_rows(nets, cfg, dtype)) / 1e9
    if device.type == "cuda":
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def decoder_rows(nets, cfg, dtype):
    return memory_plan.decoder_rows(cfg, dtype) if nets else []


def bench_film(net, nets, features, window, blocks, device) -> dict:
    """The report of a whole film, as generate.py writes it."""
    cfg, watch, forward = net.cfg, Stopwatch(device), net.forward
    decoder = decoders.Decoder(*nets, cfg, watch=watch.watch)
    watch.watch_passes(net, len(cfg.sigmas) - 1)
    seconds = blocks * cfg.block_seconds
    with tempfile.TemporaryDirectory() as folder:
        size = cfg.height, cfg.width
        movie = Movie(f"{folder}/x.mp4", size, cfg.fps, decoder.sample_rate, decoder.channels)
        stream = generate.stream(net, "x", seconds, window=window, read=lambda _: features)
        generate.run(stream, decoder, movie, seconds, watch)
        movie.close()
    net.forward = forward
    report = watch.report(movie.frames, cfg.fps)
    return {k: v for k, v in report.items() if not k.endswith("put_seconds")}


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
    p.add_argument("--blocks", type=int, default=40, help="of a stream; more than the window + 3")
    p.add_argument("--device", default="cuda")
    p.add_argument("--tiny", action="store_true", help="a tiny model: tests this script, no more")
    p.add_argument("--out", default=str(ROOT / "results" / "bench_generate.json"))
    args = p.parse_args()
    device, cfg = cli.find_device(args.device), cli.find_config(args.config)
    cfg = replace(cfg, sigmas=config.FOUR_STEPS, **(TINY if args.tiny else {}))
    dtype = torch.float32 if args.tiny else torch.bfloat16
    if args.blocks < max(args.windows) + 4:
        raise ValueError(f"--blocks {args.blocks}: expected at least {max(args.windows) + 4}")
    rate = matmul_rate(device, dtype, 256 if args.tiny else 8192)
    net = ltx2.random_weights(cfg, device, dtype)
    features = captions.random_features(["x"], cfg, device, dtype)["x"]
    nets = None if args.tiny else find_decoders(device, dtype)
    rows = []
    for window in args.windows:
        rows.append(bench_window(net, nets, features, window, args.blocks, rate, device))
        print(json.dumps(rows[-1], indent=1))
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    about = {"device": gpu, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    about |= {"config": cfg.name, "tiny": args.tiny, "dtype": str(dtype), "matmul_flops": rate}
    files.write_json(args.out, {"about": about, "rows": rows})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
