"""The script that plants bugs tells a bug that is caught from one that lives."""

import subprocess
import sys

import pytest
from helpers import ROOT

PLANT = [sys.executable, ROOT / "tests" / "plant.py"]


@pytest.mark.parametrize(
    "old, new, status, said",
    [
        ("shape[2] // SHEET", "shape[3] // SHEET", 1, "it lives"),  # no doctest is about it
        (
            "plane.round()",
            "plane",
            0,
            "FAILED film/writer.py::film.writer.to_planes",
        ),
        ("no such text", "x", 2, "occurs 0 times in film/writer.py; expected once"),
    ],
)
def test_a_bug_is_planted_in_a_copy(old, new, status, said):
    """Status 0 if a test fails, 1 if none does, 2 if there is no such line; no file changes."""
    before = (ROOT / "film/writer.py").read_text()
    command = [*PLANT, "film/writer.py", old, new, "--tests", "film/writer.py"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == status and said in run.stdout + run.stderr
    assert (ROOT / "film/writer.py").read_text() == before
