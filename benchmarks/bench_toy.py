"""How fast does the toy stream, does it stay as fast, and what does the cache gain?  (CPU)

    python -m benchmarks.bench_toy                  all of it, about 10 minutes, on one thread
    python -m benchmarks.bench_toy --only prefix    one part

  floor    the passes of a block, and their lower bound at the rate of a large matrix product
  stream   generate.py as a user runs it: TTFC (time to first chunk), frames per second
  long     60 and 600 blocks: time per block and peak memory
  prefix   time of block k with the rolling cache, and without a cache: all passes run over the
           whole prefix under the masks, as in the first official release
  cost     time of five seconds by the teacher, by a whole clip in four passes, by a stream

The script uses one thread, also in the processes that it starts. It writes results/bench_toy.json
and results/bench_toy.png, or what --out says.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median_high

import torch

import config
import dmd
import model
import rollout
import teacher
from benchmarks import bench_generate
from kv_cache import CachedView, MaskedView
from masks import block_span, clip_span, four_masks, trained_window
from plumbing import cli, files
from studies import plots
from toy import source, world

CPU = torch.device("cpu")
THREADS = 1  # more threads would speed up some parts, and make all of them vary more
WINDOW = trained_window(config.TOY)  # blocks
FIRST_FULL = (
    WINDOW + 2
)  # the cache is full from block WINDOW + 1 on; one block later, it is settled
LONGEST_PREFIX = 30  # blocks


# ---- generate.py, in processes of their own ----


def run_generate(seconds) -> dict:
    """Timings of one run of generate.py."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, str(cli.ROOT / "generate.py"), "--seconds", str(seconds)]
        command += ["--out", f"{folder}/out.mp4", "--report", str(report)]
        subprocess.run(
            command,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": str(THREADS)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return json.loads(report.read_text())


def bench_stream(repeats=5) -> dict:
    """Medians over runs of 5 seconds."""
    runs = [run_generate(5) for _ in range(repeats)]
    names = (
        "ttfc_seconds",
        "passes_times_real_time",
        "end_to_end_times_real_time",
        "peak_memory_mb",
    )
    return {name: round(median_high([r[name] for r in runs]), 3) for name in names}


def bench_long(repeats=3) -> dict:
    """Time per block and peak memory of a short and a long stream."""
    # Peak memory varies by some 10 MB from run to run: medians over alternating runs.
    runs = [(run_generate(60), run_generate(600)) for _ in range(repeats)]
    memory = [median_high([r["peak_memory_mb"] for r in same]) for same in zip(*runs)]
    short, long = runs[-1]
    early = median_high(short["passes_seconds"][FIRST_FULL : FIRST_FULL + 10])
    return {
        "first_full_window_ms": round(1000 * early, 1),
        "blocks_50_to_60_ms": round(1000 * median_high(short["passes_seconds"][50:61]), 1),
        "blocks_590_to_600_ms": round(1000 * median_high(long["passes_seconds"][590:601]), 1),
        "peak_memory_60_mb": round(memory[0], 1),
        "peak_memory_600_mb": round(memory[1], 1),
    }


# ---- passes, in this process ----


def bench_floor(net, features) -> dict:
    """Time of the passes of a block with a full window, and their lower bound on this machine."""
    view = CachedView(net.cfg, WINDOW + 3, WINDOW)
    operations = bench_generate.flops_of_block(net.cfg, WINDOW, features[0].shape[1])
    rate = bench_generate.matmul_rate(CPU, torch.float32, 2048)
    seconds = bench_generate.time_block(net, features, view, WINDOW + 1, CPU)
    floor = operations / rate
    return {
        "operations_of_a_block": operations,
        "matmul_operations_per_second": round(rate),
        "floor_ms": round(1000 * floor, 2),
        "block_ms": round(1000 * seconds, 2),
        "block_over_floor": round(seconds / floor, 2),
    }


@torch.inference_mode()
def bench_prefix(net, text, window=WINDOW) -> dict:
    """Seconds of the passes of block k: with the cache, and over blocks 0 .. k without it."""
    cfg, view = net.cfg, CachedView(net.cfg, LONGEST_PREFIX + 1, window)
    generator, cached, rerun, history = torch.Generator().manual_seed(0), [], [], []
    for k in range(LONGEST_PREFIX + 1):
        span = block_span(k, cfg)
        noise = model.draw_noise(1, span, cfg, generator)
        start = time.perf_counter()
        x0 = rollout.denoise(net, noise, cfg.sigmas, text, span, view, generator)
        rollout.refresh(net, x0, text, span, view)
        view.next_block()
        cached.append(time.perf_counter() - start)
        history.append(x0)
        rerun.append(time_rerun(net, text, history, cfg.sigmas))
    return {"cached_seconds": cached, "rerun_seconds": rerun}


def time_rerun(net, text, history, sigmas):
    """Seconds of the same passes over the whole prefix.  Without a cache there is no refresh."""
    k = len(history) - 1
    span, masks = clip_span(k + 1, net.cfg), four_masks(net.cfg, k + 1)
    video, audio = (torch.cat(x, 1) for x in zip(*history))
    start = time.perf_counter()
    for sigma in sigmas[:-1]:
        levels = [torch.zeros(1, x.shape[1]) for x in (video, audio)]
        for level, new in zip(levels, history[-1]):
            level[:, -new.shape[1] :] = sigma  # the blocks before are clean
        model.predict_x0(net, video, audio, *levels, text, span, MaskedView(masks))
    return time.perf_counter() - start


@torch.inference_mode()
def bench_cost(student, text, captions) -> dict:
    """How often each second passes through the transformer, and how fast five seconds are made.

    -> {who: passes per second of the clip, times real time}

    Nothing is decoded. With guidance, a pass counts twice.
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

    makers = {
        "teacher, 32 steps": (64, by_teacher(teacher.schedule(32))),
        "teacher, 4 steps": (8, by_teacher(sigmas)),
        "stage I, 4 steps": (4, lambda: dmd.few_step_clips(stage_1, captions, g)),
        "streamed, 4 steps and refresh": (5, streamed),
    }
    return {
        who: {"passes_a_second": passes, "times_real_time": round(5 / seconds_of(make), 2)}
        for who, (passes, make) in makers.items()
    }


def seconds_of(make, repeats=3) -> float:
    """Median seconds of a call, after one call that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        make()
        taken.append(time.perf_counter() - start)
    return median_high(taken[1:])


# ---- results ----


def draw_prefix(result):
    """Draw the two curves of `bench_prefix`."""
    figure, ax = plots.plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, label in (("rerun", "re-run the prefix, 4 passes"), ("cached", "cache, 4 + refresh")):
        ax.plot([1000 * t for t in result[f"{name}_seconds"]], "o-", ms=3, label=label)
    ax.set(xlabel="block (= second of the stream)", ylabel="ms a block", yscale="log")
    ax.legend()
    ax.grid(alpha=0.3)
    return figure


def print_prefix(result):
    """Print some blocks of `bench_prefix`."""
    pairs = list(zip(result["cached_seconds"], result["rerun_seconds"]))
    for k in (1, 5, 10, 20, 30):
        cached, rerun = pairs[k]
        times = f"cached {1000 * cached:5.0f} ms, re-run {1000 * rerun:5.0f} ms"
        print(f"block {k:2}: {times}, {rerun / cached:.1f}x")


def machine() -> dict:
    """The machine, to be stored with the results."""
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {**cli.machine(CPU), "processor": processor, "threads": torch.get_num_threads()}


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
    result = {name: part() for name, part in parts.items() if args.only in (None, name)}
    for name, found in result.items():
        if name == "prefix":
            print_prefix(found)
        else:
            print(name, json.dumps(found, indent=1))
    result["machine"] = machine()
    print("{threads} thread, {processor}, torch {torch}".format(**result["machine"]))
    if out:
        if "prefix" in result:
            plots.save(draw_prefix(result["prefix"]), f"{out}.png")
        files.write_json(f"{out}.json", result)
        print(f"wrote {out}.json")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
