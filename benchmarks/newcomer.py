"""How long until a newcomer sees a clip, green tests, and a graded exercise?

    python -m benchmarks.newcomer

Clones this repository into a temporary folder, makes a fresh virtual environment and follows the
README, one command after the other, as a person would who reads nothing else. Seconds depend on the
machine and on how far away the packages are. Writes results/newcomer.json.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

from plumbing import (
    cli,
    files,
)

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
UNSOLVED = 1  # pytest's exit status: an exercise with holes is graded, and fails


def timed(command, folder, expected) -> float:
    """Seconds of a command.  Raises ValueError with its last lines if it ends otherwise."""
    start = time.perf_counter()
    done = subprocess.run(command.split(), cwd=folder, capture_output=True, text=True)
    if done.returncode != expected:
        raise ValueError(f"{command}: exit status {done.returncode}: {done.stdout[-300:]}")
    return round(time.perf_counter() - start, 1)


def main():
    cli.parser(__doc__).parse_args()
    seconds = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "clone"
        for name, command in STEPS.items():
            command = command.format(root=ROOT, folder=folder, python=sys.executable)
            expected = UNSOLVED if name == "grade it" else 0
            seconds[name] = timed(command, folder if folder.exists() else place, expected)
            print(f"{sum(seconds.values()):7.1f} s  {name} ({seconds[name]} s)", flush=True)
    about = {"machine": platform.machine(), "date": time.strftime("%Y-%m-%d")}
    files.write_json(ROOT / "results" / "newcomer.json", {"about": about, "seconds": seconds})
    print(json.dumps(about), "wrote results/newcomer.json")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
