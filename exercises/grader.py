"""Grade an answer: put it in the place of its module, run the graded tests, add up the points.

`python -m pytest --exercise masks` (see conftest.py) prints the points of each function, with a
reason for each failure and what the failing tests printed, and writes the score beside the answer:
`answers/masks.score.json`. `--exercise masks.may_attend` grades one function and writes nothing.
behind.py says which code stands behind the answer.
"""

import datetime
import importlib
import sys
from pathlib import Path

import pytest

from exercises import behind, coursework
from plumbing import files

NOT_RUN = "not run"
NOT_OURS = {".venv", "site-packages", "answers"}  # folders inside the project
PRINTED = 20  # lines of a failing test that are shown


def configure(config):
    """Make this run of pytest grade the answer of --exercise, if given, and run nothing else."""
    if not (place := config.getoption("exercise")):
        behind.stand_behind()  # in a hand-out: examples in docstrings need the other modules
        return
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("--exercise grades in one process: leave out -n")
    try:
        grader = Grader(place, Path(config.getoption("answers")).resolve())
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    config.args[:] = [str(coursework.graded_file(grader.name))]
    config.option.doctestmodules = False
    config.option.reportchars = ""  # the table of points tells all failures
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "no"
    config.pluginmanager.register(grader, "grader")


class Grader:
    """A pytest plugin that puts an answer in the place of its module and counts its points."""

    def __init__(self, place, answers):
        self.name, _, self.only = place.partition(".")  # the function to grade; "": all
        self.exercise = coursework.find(self.name)
        self.tasks = self.exercise.tasks
        if self.only:
            self.tasks = [coursework.find_task(place, "--exercise")]
        self.answer = answers / f"{self.name}.py"
        self.file = self.answer.with_suffix(".score.json")
        self.tests = {}  # id of a test -> its row of the score
        self.broken = None  # why the tests could not be collected
        coursework.check_answer(self.name, self.answer)
        # Import every module again that has imported the original.
        self.originals = project_modules()
        for module in self.originals:
            del sys.modules[module]
        self.finder = behind.stand_behind({self.exercise.module: self.answer})
        self.load()

    def load(self):
        """Import the answer under the name of the module that it replaces."""
        try:
            importlib.import_module(self.exercise.module)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also SystemExit and pytest.skip
            self.pytest_unconfigure()
            why = f"cannot be imported: {type(error).__name__}: {error}"
            raise ValueError(f"{coursework.shown(self.answer)} {why}") from None

    def pytest_unconfigure(self):
        sys.meta_path.remove(self.finder)
        for module in project_modules():
            del sys.modules[module]
        sys.modules.pop(self.exercise.module, None)
        sys.modules.update(self.originals)

    def pytest_collection_modifyitems(self, items):
        if self.only:
            items[:] = [item for item in items if self.marked(item)[1] == self.only]

    def marked(self, item) -> tuple[int, str]:
        """Return the points of a test, and the function that it grades."""
        return item.get_closest_marker("points").args

    def pytest_collection_finish(self, session):
        for item in session.items:
            points, function = self.marked(item)
            row = {"function": function, "test": item.name}
            self.tests[item.nodeid] = row | {"points": 0, "max": points, "reason": NOT_RUN}

    def pytest_collectreport(self, report):
        if report.failed:
            self.broken = report.longreprtext.splitlines()[-1].removeprefix("E").strip()

    def pytest_runtest_logreport(self, report):
        row = self.tests[report.nodeid]
        if report.failed:
            row["points"], row["reason"] = 0, self.reason(report)
        elif report.skipped:
            row["reason"] = "the answer skips the test"
        elif report.when == "call":
            row["points"], row["reason"] = row["max"], None
        if report.when == "call" and not report.passed and report.capstdout:
            row["printed"] = report.capstdout.splitlines()[-PRINTED:]

    def pytest_runtest_teardown(self, item):
        row = self.tests[item.nodeid]  # properties of the test in --junit-xml
        item.user_properties += [("points", row["points"]), ("max_points", row["max"])]

    def reason(self, report) -> str:
        """Return the first line of an error, without the prefixes of pytest and Python."""
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
        return score_of(self.name, self.tests.values())

    @property
    def is_complete(self) -> bool:
        """Tell whether all tests ran; after -k, -x or Ctrl-C they did not."""
        rows = [row for row in self.tests.values() if row["reason"] != NOT_RUN]
        return sum(row["max"] for row in rows) == self.exercise.points

    def pytest_sessionfinish(self):
        if self.is_complete:
            files.write_json(self.file, self.score)

    def pytest_terminal_summary(self, terminalreporter):
        write = terminalreporter.write_line
        terminalreporter.section(f"exercise {self.name}")
        if self.broken:
            return write(f"nothing is graded: {self.broken}")
        for task in self.tasks:
            rows = [row for row in self.tests.values() if row["function"] == task.function]
            got = sum(row["points"] for row in rows) if rows else "-"
            told = {row["reason"]: row.get("printed", ()) for row in rows if row["reason"]}
            for i, (reason, printed) in enumerate(told.items() or [("", ())]):
                start = f"{task.function:32} {got}/{task.points}" if i == 0 else ""
                write(f"{start:38} {reason}".rstrip())
                for line in printed:
                    write(f"{'':38} printed: {line}")
        if self.only:
            return
        place = coursework.shown(self.file)
        written = place if self.is_complete else "not written, because not all tests ran"
        write(f"{'score':32} {self.score['points']}/{self.exercise.points}   {written}")


def score_of(name, rows) -> dict:
    """Return a score as it is written."""
    rows = list(rows)
    return {
        "exercise": name,
        "version": coursework.version(),
        "points": sum(row["points"] for row in rows),
        "max": coursework.find(name).points,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "tests": rows,
    }


def project_modules() -> dict:
    """Return the imported modules of the project and of its tests, except conftest.py."""
    return {n: m for n, m in list(sys.modules.items()) if n != "conftest" and is_ours(m)}


def is_ours(module) -> bool:
    """Tell whether a module belongs to the project, and not to a package installed inside it."""
    # A room has no __init__.py: it is a namespace package, with folders instead of a file.
    file, root = getattr(module, "__file__", None), coursework.ROOT
    paths = map(Path, [file] if file else getattr(module, "__path__", ()))
    parts = [path.relative_to(root).parts for path in paths if path.is_relative_to(root)]
    return any(NOT_OURS.isdisjoint(folders) for folders in parts)
