"""Puts the root of the project on sys.path, and grades exercises: `pytest --exercise masks`.

See exercises/coursework.py. Grading puts a student's file in the place of a module, runs the tests that give
points, and prints and writes a score: `exercises/masks.score.json` beside the answer.
"""

import datetime
import importlib.util
import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: one thread for each worker
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from exercises import coursework as exercise
from plumbing import files

ROOT = Path(__file__).parent
NOT_RUN = "not run"


def pytest_addoption(parser):
    group = parser.getgroup("exercises")
    group.addoption("--exercise", metavar="NAME", help="grade exercises/NAME.py and nothing else")
    group.addoption(
        "--answers", metavar="FOLDER", default=exercise.ANSWERS, help="where NAME.py lies instead"
    )


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")


def pytest_configure(config):
    config.addinivalue_line("markers", "points(n, function): worth n points for that function")
    if name := config.getoption("exercise"):
        if config.getoption("numprocesses", None):
            raise pytest.UsageError("--exercise grades in one process: leave out -n")
        try:
            grader = Grader(name, Path(config.getoption("answers")).resolve())
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        config.args[:] = [str(exercise.graded_file(name))]
        config.option.doctestmodules = False
        config.option.reportchars = ""  # the table of points says what failed and why
        if config.option.tbstyle == "auto":
            config.option.tbstyle = "no"
        config.pluginmanager.register(grader)


@pytest.fixture(autouse=True)
def the_same_numbers_every_time():
    """What a test draws without a seed of its own."""
    import torch  # not before it is needed: --help is quick

    torch.manual_seed(0)


class Grader:
    """One student's file in the place of a module, and the points it earns."""

    def __init__(self, name, answers):
        """Raises ValueError, in one line, for an answer that cannot be graded."""
        self.name, self.answer = name, answers / f"{name}.py"
        self.file = self.answer.with_suffix(".score.json")
        self.tests = {}  # name of the test -> its row of the score
        self.broken = None  # why the tests could not be collected
        exercise.check_answer(name, self.answer)
        # Whoever imports the module later, test or other module, gets what sys.modules holds. So
        # the answer must be there first, and nobody may be left who has imported the original.
        self.originals = project_modules()
        for module in self.originals:
            del sys.modules[module]
        self.load()

    def load(self):
        """Import the answer under the name of the module that it stands for."""
        spec = importlib.util.spec_from_file_location(self.name, self.answer)
        sys.modules[self.name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            self.pytest_unconfigure()
            raise ValueError(
                f"{exercise.shown(self.answer)} cannot be imported: {type(error).__name__}: {error}"
            ) from None

    def pytest_unconfigure(self):
        for module in project_modules():
            del sys.modules[module]
        sys.modules.pop(self.name, None)
        sys.modules.update(self.originals)

    def pytest_collection_finish(self, session):
        for item in session.items:
            points, function = item.get_closest_marker("points").args
            row = {"function": function, "test": item.name}
            self.tests[item.nodeid] = row | {"points": 0, "max": points, "reason": NOT_RUN}

    def pytest_collectreport(self, report):
        if report.failed:
            self.broken = report.longreprtext.splitlines()[-1].removeprefix("E").strip()

    def pytest_runtest_logreport(self, report):
        row = self.tests[report.nodeid]
        if report.failed:
            row["points"], row["reason"] = 0, self.reason(report)
        elif report.when == "call" and report.passed:
            row["points"], row["reason"] = row["max"], None

    def reason(self, report) -> str:
        """The first line of an error, without what pytest and Python put around it."""
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else report.longreprtext
        line = message.strip().splitlines()[0]
        for prefix in ("AssertionError: ", "NotImplementedError: ", "Failed: "):
            line = line.removeprefix(prefix)
        is_theirs = crash and Path(crash.path) == self.answer
        is_unwritten = line.endswith("is not written yet")
        return f"line {crash.lineno}: {line}" if is_theirs and not is_unwritten else line

    @property
    def score(self) -> dict:
        rows = list(self.tests.values())
        return {
            "exercise": self.name,
            "points": sum(row["points"] for row in rows),
            "max": exercise.find(self.name).points,
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "tests": rows,
        }

    @property
    def is_whole(self) -> bool:
        """Did all tests run, or only some of them (-k, -x, Ctrl-C)?"""
        rows = [row for row in self.tests.values() if row["reason"] != NOT_RUN]
        return sum(row["max"] for row in rows) == exercise.find(self.name).points

    def pytest_sessionfinish(self):
        if self.is_whole:
            files.write_json(self.file, self.score)

    def pytest_terminal_summary(self, terminalreporter):
        score = self.score
        terminalreporter.section(f"exercise {self.name}")
        if self.broken:
            return terminalreporter.write_line(f"nothing is graded: {self.broken}")
        for task in exercise.find(self.name).tasks:
            rows = [row for row in score["tests"] if row["function"] == task.function]
            got = sum(row["points"] for row in rows) if rows else "-"
            reasons = list(dict.fromkeys(row["reason"] for row in rows if row["reason"]))
            for i, reason in enumerate(reasons or [""]):
                start = f"{task.function:32} {got}/{task.points}" if i == 0 else ""
                terminalreporter.write_line(f"{start:38} {reason}".rstrip())
        written = exercise.shown(self.file) if self.is_whole else "not all tests ran: not written"
        terminalreporter.write_line(f"{'score':32} {score['points']}/{score['max']}   {written}")


def project_modules() -> dict:
    """Imported modules of the project and of its tests; this file is none of them."""
    folders = str(ROOT), str(ROOT / "tests")
    return {
        name: module
        for name, module in sys.modules.items()
        if os.path.dirname(getattr(module, "__file__", None) or "") in folders
        and name != "conftest"
    }
