"""Reproduce the released weights, the results and the pictures, command by command.

    python -m studies.reproduce             hours: codecs, teacher, three stages, tables, pictures
    python -m studies.reproduce --controls  more hours: the students of `studies.compare controls`
                                            and `memory`, the ablations, and their tables
    python -m studies.reproduce --quick     minutes: three short stages from the released teacher
    python -m studies.reproduce --gpu       minutes: GPU tests, tables of benchmarks/README.md
    python -m studies.reproduce --list      prints the commands and runs none

You may interrupt and start again at any time: an unfinished training continues, a finished one is
not repeated. The full run overwrites weights/, with the same numbers on the same kind of machine.
--controls overwrites the released student of toy_released. All other weights go to runs/, tables
and loss curves to results/.
"""

import shlex
import shutil
import subprocess
import sys

import torch

from plumbing import cli
from plumbing.cli import ROOT
from studies import compare

# (command, minutes on two CPU cores)
FULL = [
    ("-m toy.fit codec", 1),
    ("-m toy.fit decoder --out weights/toy_decoder.safetensors", 12),
    ("teacher.py --out weights/toy_teacher.safetensors", 99),
    ("dmd.py --out weights/toy_dmd.safetensors", 15),
    ("ode_regression.py --out weights/toy_ode_regression.safetensors", 30),
    ("self_forcing.py --out weights/toy_self_forcing.safetensors", 20),
    ("-m toy.fit", 1),
    ("-m studies.evaluate", 4),
    ("-m studies.compare drift", 7),
    ("-m studies.compare joint", 4),
    ("-m studies.compare gallery", 1),
    ("-m studies.compare identity", 1),
    ("-m studies.plots losses", 1),
    ("generate.py --out assets/clip.mp4", 1),
    ("-m studies.plots masks", 1),
    ("-m benchmarks.bench_toy", 10),
    ("notebooks/run.py", 3),
]


def trainings(students) -> list:
    """Return the commands that train these students and are not in FULL, with their minutes."""
    released = [command for command, _ in FULL]
    commands = dict.fromkeys(s.command for s in students.values() if s.command not in released)
    # of a short stage II, of stage III, of a stage II
    minutes = [7 if "--steps" in c else 20 if c.startswith("self") else 30 for c in commands]
    return list(zip(commands, minutes))


STAGES = shlex.join(name for name in compare.CONTROLS if name.startswith("stage "))
MINUTE = f"--clips 96 --seconds 60 --only {STAGES} --out results/minute"
WINDOW_2 = "runs/controls/window_2.safetensors"
CONTROLS = [
    *trainings(compare.CONTROLS),
    ("-m studies.compare controls --clips 96 --seconds 20", 16),
    (f"-m studies.compare controls {MINUTE}", 16),
    (f"self_forcing.py --window 2 --run runs/controls/window_2 --out {WINDOW_2}", 20),
    (f"-m studies.compare drift --student {WINDOW_2} --out results/drift_window_2", 4),
    *trainings(compare.MEMORY),
    ("-m studies.compare memory --clips 96", 30),
    ("-m studies.ablations sinks", 40),
    ("-m studies.ablations why_sinks", 30),
    ("-m studies.ablations switches", 30),
    ("-m studies.refresh", 20),
    ("-m studies.pasts past", 95),
    ("-m studies.pasts refresh", 40),
    ("-m studies.first_teachers", 90),
    ("-m studies.prompt_switch", 15),
    ("-m studies.image", 4),
    ("-m studies.fp8", 8),
]
QUICK = [
    ("dmd.py --steps 40 --run runs/quick/dmd --out runs/quick/quick_dmd.safetensors", 5),
    ("ode_regression.py --teacher runs/quick/quick_dmd.safetensors --clips 256 --steps 200 "
     "--run runs/quick/ode --out runs/quick/quick_ode_regression.safetensors", 3),
    ("self_forcing.py --student runs/quick/quick_ode_regression.safetensors --steps 40 "
     "--run runs/quick/self_forcing --out runs/quick/quick_self_forcing.safetensors", 8),
    ("-m studies.evaluate --clips 32 --seconds 10 --few-step runs/quick/quick_dmd.safetensors "
     "--student runs/quick/quick_ode_regression.safetensors "
     "runs/quick/quick_self_forcing.safetensors --out results/quick", 2),
]  # fmt: skip
# For one GPU of 80 GB, in the order of their worth. Times are for a machine without a cache.
KERNEL_TESTS = (  # they run without av
    "tests/test_cache_append_attention.py tests/test_faster.py tests/test_fp8.py"
)
GPU = [
    (f"-m pytest -m 'gpu and not slow' {KERNEL_TESTS}", 2),
    ("-m benchmarks.bench_generate", 7),
    ("-m benchmarks.bench_attention", 1),
    ("-m benchmarks.bench_decode", 2),
]
TABLES = "windows", "ladder"  # of benchmarks/README.md, printed after all that


def main():
    p = cli.parser(__doc__)
    which = p.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="short stages, released teacher")
    which.add_argument("--controls", action="store_true", help="trainings of the comparisons")
    which.add_argument("--gpu", action="store_true", help="everything that needs a GPU")
    p.add_argument("--list", action="store_true", help="print the commands and run none")
    args = p.parse_args()
    steps = QUICK if args.quick else CONTROLS if args.controls else GPU if args.gpu else FULL
    if args.gpu and not args.list and not torch.cuda.is_available():
        raise ValueError("--gpu: no GPU is usable here; --list prints the commands")
    total = sum(minutes for _, minutes in steps)
    where = "a GPU" if args.gpu else "two CPU cores"
    failed = []
    for i, (command, minutes) in enumerate(steps, 1):
        print(f"{i}/{len(steps)}  python {command}  (about {minutes} min)", flush=True)
        if args.list:
            continue
        if status := subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT).returncode:
            failed.append(f"python {command}: exit status {status}")
            if not args.gpu:  # the commands for a GPU are independent, and time is expensive
                break
    if args.controls and not args.list:  # trainings in runs/ write their curves there
        for curve in (ROOT / "runs" / "controls").glob("*_curve.json"):
            shutil.copy(curve, ROOT / "results")
    if args.gpu and not args.list:
        text = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
        print(*(text.split(f"<!-- {name} -->")[1] for name in TABLES))
    print(f"about {total // 60} h {total % 60} min on {where}")
    if failed:
        raise ValueError(f"{'; '.join(failed)}; start again: a training goes on where it stopped")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
