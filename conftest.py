"""Settings of pytest, and its option --exercise.  pytest puts this folder on sys.path."""

import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, which reads it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from exercises import coursework, grader


def pytest_addoption(parser):
    group = parser.getgroup("exercises")
    group.addoption("--exercise", metavar="NAME", help="grade answers/NAME.py, or NAME.function")
    about = "folder of NAME.py, instead of answers/"
    group.addoption("--answers", metavar="FOLDER", default=coursework.ANSWERS, help=about)


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a background job of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)  # tested programs inherit it
    config.addinivalue_line("markers", "points(n, function): worth n points for that function")
    grader.configure(config)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture(autouse=True)
def fixed_seed():
    """Seed the global generator, because some tests draw from it."""
    torch.manual_seed(0)
