"""How long does a newcomer wait for a clip, for the tests, and for a graded exercise?

    python -m benchmarks.newcomer

Clones this repository into a temporary folder, makes a fresh virtual environment and runs the
commands of README.md one after the other. The seconds depend on the machine and on the network.
Writes results/newcomer.json.
"""

import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from plumbing import cli, files

STEPS = {
    "clone": "git clone --quiet {root} {folder}",
    "environment": "{python} -m venv venv",
    "install": "venv/bin/pip install --quiet -r requirements.txt",
    "clip": "venv/bin/python generate.py",
    "install for tests": "venv/bin/pip install --quiet -r requirements-dev.txt",
    "tests": "venv/bin/python -m pytest -q -n auto --dist loadfile",
    "take an exercise": "venv/bin/python -m exercises masks",
    "grade it": "venv/bin/python -m pytest -q --exercise masks",
}
UNSOLVED = 1  # exit status of pytest: an exercise that nobody has solved fails


def main():
    cli.parser(__doc__).parse_args()
    seconds = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "clone"
        for name, command in STEPS.items():
            command = command.format(root=cli.ROOT, folder=folder, python=sys.executable).split()
            where, start = folder if folder.exists() else place, time.perf_counter()
            done = subprocess.run(command, cwd=where, capture_output=True, text=True)
            seconds[name] = round(time.perf_counter() - start, 1)
            if done.returncode != (UNSOLVED if name == "grade it" else 0):
                raise ValueError(f"{name}: exit status {done.returncode}: {done.stdout[-300:]}")
            print(f"{sum(seconds.values()):7.1f} s  {name} ({seconds[name]} s)", flush=True)
    about = {**cli.machine(torch.device("cpu")), "processor": platform.machine()}
    files.write_json(cli.ROOT / "results" / "newcomer.json", {"about": about, "seconds": seconds})
    print("wrote results/newcomer.json")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
