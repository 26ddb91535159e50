"""What is shipped and quoted, made anew, command by command; other numbers name their own command.

    python -m studies.reproduce             hours: codec, teacher, three stages, tables, pictures
    python -m studies.reproduce --controls  hours more: other seeds and the trainings of `studies/compare.py
                                    controls`, and of `studies/ablations.py`, and their tables
    python -m studies.reproduce --quick     minutes: three short stages from the shipped teacher, a table
    python -m studies.reproduce --gpu       minutes: tests on a GPU, and the tables of benchmarks/README.md
    python -m studies.reproduce --list      say it only

A training that was stopped goes on where it was, and one that is done is not done again, so this
may be interrupted and started again at any time. The full run writes over weights/ and results/
(the same numbers, on the same kind of machine); the others write their weights to runs/ (all but
those of --config toy_released, which are shipped too), their tables and curves to results/.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from plumbing import cli
from studies import compare as experiments

ROOT = Path(__file__).parent.parent

MINUTES = {"ode_regression.py": 30, "self_forcing.py": 20}  # of a training, on two CPU cores


def trainings(students) -> list:
    """Commands that the full run lacks, and minutes; only stage II is ever cut short."""
    commands = dict.fromkeys(s.command for s in students.values() if s.command not in MINUTES)
    return [(how, 7 if "--steps" in how else MINUTES[how.split()[0]]) for how in commands]


# command, and minutes
FULL = [
    ("toy/codec.py --fit", 1),
    ("teacher.py", 99),
    ("dmd.py", 15),
    *MINUTES.items(),
    ("studies/evaluate.py", 4),
    ("studies/compare.py drift", 7),
    ("studies/compare.py joint", 4),
    ("studies/compare.py gallery", 1),
    ("studies/compare.py identity", 1),
    ("studies/plots.py losses", 1),
    ("generate.py --out assets/clip.mp4", 1),
    ("studies/plots.py", 1),
    ("studies/plots.py imports", 1),
    ("benchmarks/bench_toy.py", 10),
    ("notebooks/run.py", 3),
]
MINUTE = shlex.join(name for name in experiments.CONTROLS if name.startswith("stage "))
WINDOW_2 = "runs/controls/window_2.safetensors"
CONTROLS = [
    *trainings(experiments.CONTROLS),
    ("studies/compare.py controls --clips 96 --seconds 20", 16),
    (
        f"studies/compare.py controls --clips 96 --seconds 60 --only {MINUTE} --out results/minute",
        16,
    ),
    (f"self_forcing.py --window 2 --run runs/controls/window_2 --out {WINDOW_2}", 20),
    (f"studies/compare.py drift --student {WINDOW_2} --out results/drift_window_2", 4),
    *trainings(experiments.MEMORY),
    ("studies/compare.py memory --clips 96", 30),
    ("studies/ablations.py sinks", 40),
    ("studies/ablations.py switches", 30),
]
QUICK = [
    ("dmd.py --steps 40 --run runs/quick/dmd --out runs/quick/quick_dmd.safetensors", 5),
    (
        "ode_regression.py --teacher runs/quick/quick_dmd.safetensors --clips 256 --steps 200 "
        "--run runs/quick/ode --out runs/quick/quick_ode_regression.safetensors",
        3,
    ),
    (
        "self_forcing.py --student runs/quick/quick_ode_regression.safetensors --steps 40 "
        "--run runs/quick/self_forcing --out runs/quick/quick_self_forcing.safetensors",
        8,
    ),
    (
        "studies/evaluate.py --clips 32 --seconds 10 --few-step runs/quick/quick_dmd.safetensors "
        "--student runs/quick/quick_ode_regression.safetensors "
        "runs/quick/quick_self_forcing.safetensors --out results/quick",
        2,
    ),
]
# for one GPU of 80 GB; minutes are a guess until there has been one
KERNEL_TESTS = "tests/test_cache_append_attention.py tests/test_graphs.py"  # none of them needs av
GPU = [
    (f"-m pytest -m 'gpu and not slow' {KERNEL_TESTS}", 2),
    ("benchmarks/bench_attention.py", 1),
    ("benchmarks/bench_generate.py", 9),
    ("benchmarks/bench_decode.py", 2),
    (f"-m pytest -m 'gpu and slow' {KERNEL_TESTS}", 5),  # compute-sanitizer
]


def main():
    p = cli.parser(__doc__)
    which = p.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="short stages from the shipped teacher")
    which.add_argument("--controls", action="store_true", help="trainings that are not shipped")
    which.add_argument("--gpu", action="store_true", help="what only a GPU can tell")
    p.add_argument("--list", action="store_true", help="print the commands and run none")
    args = p.parse_args()
    steps = QUICK if args.quick else CONTROLS if args.controls else GPU if args.gpu else FULL
    total = sum(minutes for _, minutes in steps)
    where = "a GPU" if args.gpu else "two CPU cores"
    failed = []
    for i, (command, minutes) in enumerate(steps, 1):
        print(f"{i}/{len(steps)}  python {command}  (about {minutes} min)", flush=True)
        if not args.list and (status := run(command)):
            failed.append(f"python {command}: exit status {status}")
            if not args.gpu:  # there, nothing needs what comes before it, and time is dear
                break
    print(f"about {total // 60} h {total % 60} min on {where}")
    if failed:
        raise ValueError(f"{'; '.join(failed)}; start again to go on from there")


def run(command) -> int:
    """Its exit status; what it says is shown as it comes."""
    return subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT).returncode


if __name__ == "__main__":
    cli.run(main)
