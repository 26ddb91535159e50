"""How fast does the toy stream, does it stay as fast, and what does the cache gain?  (CPU)

    python -m benchmarks.bench_toy                  all of it, about 10 minutes, on one thread
    python -m benchmarks.bench_toy --only prefix    one part

  floor    the passes of a block, and their lower bound at the rate of a large matrix product
  stream   generate.py as a user runs it: TTFC (time to first chunk), frames per second
  long     60 and 600 blocks: time per block and peak memory
  prefix   time of block k with the rolling cache, and without a cache: all passes run over the
           whole prefix under the masks, as in the first official release
  cost     time of five seconds by the teacher, by a whole clip in four passes, by a stream

The first three run the layers of generate.py (toy/faster.py), the others compare ways to make the
same clip with the layers of model.py, which all of them can use. The script uses one thread, also
in the processes that it starts. It writes results/bench_toy.json and results/bench_toy.png, or what
--out says.
"""

import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median_high

import torch

import config
import dmd
import model
import rollout
import teacher
from benchmarks import bench_generate
from benchmarks.bench_attention import matmul_rate, seconds
from kv_cache import CachedView, MaskedView
from masks import clip_span, four_masks, trained_window
from plumbing import cli, files
from plumbing.stopwatch import Stopwatch, settled_median
from studies import plots
from toy import faster, source, world

CPU = torch.device("cpu")
THREADS = 1  # more threads would speed up some parts, and make all of them vary more
WINDOW = trained_window(config.TOY)  # blocks
FIRST_FULL = WINDOW + 2  # block WINDOW + 1 is the first with a full cache; one later it is settled
LONGEST_PREFIX = 30  # blocks


# ---- generate.py, in processes of their own ----


def run_generate(seconds) -> dict:
    """Return the timings of one run of generate.py."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, str(cli.ROOT / "generate.py"), "--seconds", str(seconds)]
        command += ["--config", "toy", "--out", f"{folder}/out.mp4", "--report", str(report)]
        threads = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
        subprocess.run(command, check=True, env=threads, capture_output=True)
        return json.loads(report.read_text("utf-8"))


def bench_stream(repeats=5) -> dict:
    """Return medians over runs of 5 seconds."""
    runs = [run_generate(5) for _ in range(repeats)]
    names = "ttfc_seconds passes_times_real_time end_to_end_times_real_time peak_memory_mb"
    return {name: round(median_high([r[name] for r in runs]), 3) for name in names.split()}


def bench_long(repeats=3) -> dict:
    """Return time per block and peak memory of a short and a long stream."""
    # Peak memory varies by some 10 MB from run to run: medians over alternating runs.
    runs = [(run_generate(60), run_generate(600)) for _ in range(repeats)]
    memory = [median_high([r["peak_memory_mb"] for r in same]) for same in zip(*runs)]
    short, long = (run["passes_seconds"] for run in runs[-1])
    early = median_high(short[FIRST_FULL : FIRST_FULL + 10])
    return {
        "first_full_window_ms": round(1000 * early, 1),
        "blocks_50_to_60_ms": round(1000 * median_high(short[50:61]), 1),
        "blocks_590_to_600_ms": round(1000 * median_high(long[590:601]), 1),
        "peak_memory_60_mb": round(memory[0], 1),
        "peak_memory_600_mb": round(memory[1], 1),
    }


# ---- passes, in this process ----


def bench_floor(net, features) -> dict:
    """Time the passes of a block with a full window; compute their lower bound here."""
    view, net = CachedView(net.cfg, WINDOW + 3, WINDOW), copy.deepcopy(net)
    faster.speed_up(net)
    operations = bench_generate.flops_of_block(net.cfg, WINDOW, features[0].shape[1])
    rate = matmul_rate(CPU, torch.float32, 2048)
    block = bench_generate.time_block(net, features, view, WINDOW + 1, CPU)
    floor = operations / rate
    return {
        "operations_of_a_block": operations,
        "matmul_operations_per_second": round(rate),
        "floor_ms": round(1000 * floor, 2),
        "block_ms": round(1000 * block, 2),
        "block_over_floor": round(block / floor, 2),
    }


@torch.inference_mode()
def bench_prefix(net, text) -> dict:
    """Return the seconds of block k: with the cache, and by passes over blocks 0 .. k."""
    n, g, sigmas = LONGEST_PREFIX + 1, torch.Generator(), net.cfg.sigmas
    view = CachedView(net.cfg, n, WINDOW)
    watch, cached, rerun, history = Stopwatch(), [], [], []
    for block in rollout.rollout(net, lambda k: text, n, sigmas, g, view=view):
        cached.append(round(watch.lap(), 4))  # with the refresh of the block before
        history.append((block.video, block.audio))
        rerun.append(round(time_rerun(net, text, history, sigmas), 4))
        watch.lap()
    return {"cached_seconds": cached, "rerun_seconds": rerun}


def time_rerun(net, text, history, sigmas):
    """Return the seconds of the same passes over the whole prefix."""
    span, masks = clip_span(len(history), net.cfg), four_masks(net.cfg, len(history))
    video, audio = (torch.cat(x, 1) for x in zip(*history))

    def passes():
        for sigma in sigmas[:-1]:  # without a cache there is no refresh
            levels = [torch.zeros(1, x.shape[1]) for x in (video, audio)]
            for level, new in zip(levels, history[-1]):
                level[:, -new.shape[1] :] = sigma  # the blocks before are clean
            model.predict_x0(net, video, audio, *levels, text, span, MaskedView(masks))

    return seconds(passes, CPU, 1)


@torch.inference_mode()
def bench_cost(student, text, captions) -> dict:
    """Count the passes over each second, and time how five seconds are made.

    -> {who: passes per second of the clip, times real time}
    """
    weights = cli.ROOT / "weights"
    teacher_net = model.load(weights / "toy_teacher.safetensors")
    stage_1 = model.load(weights / "toy_dmd.safetensors")
    g, sigmas = torch.Generator().manual_seed(0), student.cfg.sigmas

    def by_teacher(levels):
        return lambda: teacher.sample(teacher_net, captions, levels)

    def streamed():
        view = CachedView(student.cfg, 6, WINDOW)
        return list(rollout.rollout(student, lambda k: text, 6, sigmas, g, view=view))

    makers = {  # with guidance, a pass counts twice; nothing is decoded
        "teacher, 32 steps": (64, by_teacher(teacher.schedule(32))),
        "teacher, 4 steps": (8, by_teacher(sigmas)),
        "stage I, 4 steps": (4, lambda: dmd.few_step_clips(stage_1, captions, g)),
        "streamed, 4 steps and refresh": (5, streamed),
    }
    results = {}
    for who, (passes, make) in makers.items():
        taken = settled_median([seconds(make, CPU, 1) for _ in range(5)])
        results[who] = {"passes_a_second": passes, "times_real_time": round(5 / taken, 2)}
    return results


def draw_prefix(result):
    """Draw the two curves of `bench_prefix`."""
    names = {"rerun": "re-run the prefix, 4 passes", "cached": "cache, 4 + refresh"}
    lines = {label: [1000 * t for t in result[f"{n}_seconds"]] for n, label in names.items()}
    return plots.draw_lines(lines, "block (= second of the stream)", "ms a block", yscale="log")


def main():
    p = cli.parser(__doc__)
    p.add_argument("--only", choices=["floor", "stream", "long", "prefix", "cost"], help="one part")
    p.add_argument("--out", help="default results/bench_toy, if all parts run; .json and .png")
    args = p.parse_args()
    out = args.out or (None if args.only else cli.ROOT / "results" / "bench_toy")
    torch.set_num_threads(THREADS)
    net = source.load_student(source.WEIGHTS["toy"], config.TOY)
    captions = source.toy_captions(world.parse_prompt("red fast metal"))
    with torch.inference_mode():
        text = net.project_text(*captions.features)
    # Trap: a new process starts with the peak memory of its parent. Large parts come last.
    parts = {
        "stream": bench_stream,
        "long": bench_long,
        "prefix": lambda: bench_prefix(net, text),
        "cost": lambda: bench_cost(net, text, captions),
        "floor": lambda: bench_floor(net, captions.features),
    }
    result = {}
    for name in [args.only] if args.only else parts:
        result[name] = parts[name]()
        print(name, json.dumps(result[name]), flush=True)
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    result["machine"] = {**cli.machine(CPU), "processor": processor, "threads": THREADS}
    print("{threads} thread, {processor}, torch {torch}".format(**result["machine"]))
    if out:
        if "prefix" in result:
            plots.save(draw_prefix(result["prefix"]), f"{out}.png")
        files.write_json(f"{out}.json", result)
        print(f"wrote {out}.json")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
