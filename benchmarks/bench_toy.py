"""How fast does the toy stream, does it stay so, and what does the cache buy?  (CPU)

    python -m benchmarks.bench_toy               all of it, about 10 minutes, on one thread
    python -m benchmarks.bench_toy --only prefix

  floor    the multiply-adds of a block's passes at the rate of a large matrix product, beside them
  stream   generate.py as a user runs it: TTFC, frames a second, times real time
  long     60 and 600 blocks: is time per block flat, is peak memory?
  prefix   time of block k with the rolling cache, and by re-running the whole prefix under the
           masks (as the first official release did), side by side in one run
  cost     what a second of film costs whom: the teacher, a whole clip in four passes, a stream

It sets the number of threads itself, one, for the processes that it starts as well. Writes
results/bench_toy.json and results/bench_toy.png, or what --out says.
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

import rollout
from toy import source as toy_source

ROOT = Path(__file__).resolve().parent.parent

import config
import dmd
import model
import teacher
from benchmarks import bench_generate
from kv_cache import CachedView, MaskedView
from masks import block_span, clip_span, four_masks
from plumbing import (
    cli,
    files,
)
from studies import plots
from toy import world as toy_world
from toy.source import toy_captions

LONGEST_PREFIX = 30  # blocks
THREADS = 1  # more would make some parts faster and all of them less alike
WINDOW = 4  # blocks
FIRST_FULL = 6  # with window 4 the first block whose cache is full is 5; one more to be settled


def run_generate(seconds) -> dict:
    """Timings of one run of generate.py in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, str(ROOT / "generate.py"), "--seconds", str(seconds)]
        command += ["--out", f"{folder}/out.mp4", "--report", str(report)]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        env = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
        subprocess.run(command, check=True, env=env, **quiet)
        return json.loads(report.read_text())


def bench_floor(net, features) -> dict:
    """A block's passes and refresh with a full window, and what they cannot be faster than here."""
    cpu, view = torch.device("cpu"), CachedView(net.cfg, WINDOW + 3, WINDOW)
    operations = bench_generate.flops_of_block(net.cfg, WINDOW, features[0].shape[1])
    rate = bench_generate.matmul_rate(cpu, torch.float32, 2048)
    seconds = bench_generate.time_block(net, view, WINDOW + 1, features, cpu)
    floor = operations / rate
    return {
        "operations_of_a_block": operations,
        "matmul_operations_per_second": round(rate),
        "floor_ms": round(1000 * floor, 2),
        "block_ms": round(1000 * seconds, 2),
        "block_over_floor": round(seconds / floor, 2),
    }


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
    """Is a long stream as fast and as small as a short one?

    Peak memory varies by some 10 MB from run to run: medians over alternating runs.
    """
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


@torch.inference_mode()
def bench_prefix(net, text, window=WINDOW) -> dict:
    """Seconds for the passes of block k: cached, and with every pass over blocks 0 .. k."""
    cfg, view = net.cfg, CachedView(net.cfg, LONGEST_PREFIX + 1, window)
    generator, cached, rerun, history = torch.Generator().manual_seed(0), [], [], []
    for k in range(LONGEST_PREFIX + 1):
        span = block_span(k, cfg)
        noise = model.draw_noise(1, span, cfg, generator)
        start = time.perf_counter()
        x0 = rollout.denoise(net, noise, cfg.sigmas, text, span, view, generator)
        dmd.at_sigma(net, x0, 0.0, text, span, view)
        view.next_block()
        cached.append(time.perf_counter() - start)
        history.append(x0)
        rerun.append(time_rerun(net, text, history, cfg.sigmas))
    return {"cached_seconds": cached, "rerun_seconds": rerun}


def time_rerun(net, text, history, sigmas):
    """Seconds of the same passes over the whole prefix: no cache, so no refresh either."""
    k = len(history) - 1
    span, masks = clip_span(k + 1, net.cfg), four_masks(net.cfg, k + 1)
    video, audio = (torch.cat(x, 1) for x in zip(*history))
    start = time.perf_counter()
    for sigma in sigmas[:-1]:
        levels = [torch.zeros(1, x.shape[1]) for x in (video, audio)]
        for level, new in zip(levels, history[-1]):
            level[:, -new.shape[1] :] = sigma
        model.predict_x0(net, video, audio, *levels, text, span, MaskedView(masks))
    return time.perf_counter() - start


def seconds_of(make, repeats=3) -> float:
    """Median of what a call takes, after one to settle."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        make()
        taken.append(time.perf_counter() - start)
    return median_high(taken[1:])


@torch.inference_mode()
def bench_cost(student, text, captions) -> dict:
    """{who: how often each second passes through the transformer, how fast five seconds are made}.

    Passes of whole clips and of blocks; with guidance a pass counts twice. Nothing is decoded.
    """
    net = {
        name: model.load(ROOT / "weights" / f"toy_{name}.safetensors")
        for name in ("teacher", "dmd")
    }
    g, sigmas = torch.Generator().manual_seed(0), student.cfg.sigmas

    def by_teacher(levels):
        return lambda: teacher.sample(net["teacher"], captions, levels)

    def streamed():
        return list(rollout.rollout(student, lambda k: text, 6, sigmas, g, window=WINDOW))

    makers = {
        "teacher, 32 steps": (64, by_teacher(teacher.schedule(32))),
        "teacher, 4 steps": (8, by_teacher(sigmas)),
        "stage I, 4 steps": (4, lambda: dmd.few_step_clips(net["dmd"], captions, g)),
        "streamed, 4 steps and refresh": (5, streamed),
    }
    return {
        who: {"passes_a_second": passes, "times_real_time": round(5 / seconds_of(make), 2)}
        for who, (passes, make) in makers.items()
    }


def draw_prefix(result):
    """The two curves of `bench_prefix`."""
    figure, ax = plots.plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, label in (("rerun", "re-run the prefix, 4 passes"), ("cached", "cache, 4 + refresh")):
        ax.plot([1000 * t for t in result[f"{name}_seconds"]], "o-", ms=3, label=label)
    ax.set(xlabel="block (= second of the stream)", ylabel="ms a block", yscale="log")
    ax.legend()
    ax.grid(alpha=0.3)
    return figure


def main():
    p = cli.parser(__doc__)
    p.add_argument("--only", choices=["floor", "stream", "long", "prefix", "cost"], help="just one")
    p.add_argument("--out", help="default results/bench_toy, if all are run; writes .json and .png")
    args = p.parse_args()
    out = args.out or (None if args.only else ROOT / "results" / "bench_toy")
    torch.set_num_threads(THREADS)
    net = toy_source.load_student(toy_source.WEIGHTS["toy"], config.TOY)
    captions = toy_captions(toy_world.parse_prompt("red fast metal"))
    with torch.inference_mode():
        text = net.project_text(*captions.features)
    kinds = {  # Trap: a process begins with its parent's peak of memory; what needs much comes last
        "stream": bench_stream,
        "long": bench_long,
        "prefix": lambda: bench_prefix(net, text),
        "cost": lambda: bench_cost(net, text, captions),
        "floor": lambda: bench_floor(net, captions.features),
    }
    result = {name: part() for name, part in kinds.items() if args.only in (None, name)}
    for name in ("floor", "stream", "long", "cost"):
        if name in result:
            print(name, json.dumps(result[name], indent=1))
    if "prefix" in result:
        pairs = list(zip(*result["prefix"].values()))
        for k in (1, 5, 10, 20, 30):
            c, r = pairs[k]
            print(
                f"block {k:2}: cached {1000 * c:5.0f} ms, re-run {1000 * r:5.0f} ms, {r / c:.1f}x"
            )
        if out:
            plots.save(draw_prefix(result["prefix"]), f"{out}.png")
    result["machine"] = {
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print("{threads} thread, {processor}, torch {torch}".format(**result["machine"]))
    if out:
        files.write_json(f"{out}.json", result)
        print(f"wrote {out}.json")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
