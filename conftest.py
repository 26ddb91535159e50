"""Settings of pytest: one thread per worker, one seed, no GPU tests without a GPU, `--exercise`.

pytest puts the folder of this file on sys.path, so tests can import the project.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, which reads it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from exercises import coursework, grader


def pytest_addoption(parser):
    group = parser.getgroup("exercises")
    group.addoption("--exercise", metavar="NAME", help="grade answers/NAME.py and nothing else")
    group.addoption(
        "--answers", metavar="FOLDER", default=coursework.ANSWERS,
        help="folder of NAME.py instead of answers/",
    )  # fmt: skip


def pytest_configure(config):
    config.addinivalue_line("markers", "points(n, function): worth n points for that function")
    if name := config.getoption("exercise"):
        grader.start_grading(config, name, config.getoption("answers"))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture(autouse=True)
def fixed_seed():
    """Seed what a test draws without a generator of its own."""
    torch.manual_seed(0)
