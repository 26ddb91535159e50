"""Grade an answer: put it in the place of its module, run the graded tests, add up the points.

`python -m pytest --exercise masks` (see conftest.py) prints the points of each function, with a
reason for each failure, and writes the score beside the answer: `answers/masks.score.json`.
"""

import datetime
import importlib.util
import sys
from pathlib import Path

import pytest

from exercises import coursework
from plumbing import files

NOT_RUN = "not run"
NOT_OURS = {".venv", "site-packages", "answers"}  # folders inside the project


def start_grading(config, name, answers):
    """Make this run of pytest grade answers/NAME.py, and run nothing else."""
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("--exercise grades in one process: leave out -n")
    try:
        grader = Grader(name, Path(answers).resolve())
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    config.args[:] = [str(coursework.graded_file(name))]
    config.option.doctestmodules = False
    config.option.reportchars = ""  # the table of points tells all failures
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "no"
    config.pluginmanager.register(grader)


class Grader:
    """A pytest plugin that puts an answer in the place of its module and counts its points."""

    def __init__(self, name, answers):
        self.name, self.exercise = name, coursework.find(name)
        self.answer = answers / f"{name}.py"
        self.file = self.answer.with_suffix(".score.json")
        self.tests = {}  # id of a test -> its row of the score
        self.broken = None  # why the tests could not be collected
        coursework.check_answer(name, self.answer)
        # An import statement returns the module in sys.modules. So put the answer there first, and
        # import every module again that has imported the original.
        self.originals = project_modules()
        for module in self.originals:
            del sys.modules[module]
        self.load()

    def load(self):
        """Import the answer under the name of the module that it replaces."""
        name = self.exercise.module
        spec = importlib.util.spec_from_file_location(name, self.answer)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        room, _, short = name.rpartition(".")
        if room:  # `import film.decoders` finds the module in sys.modules and sets no attribute
            setattr(importlib.import_module(room), short, module)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            self.pytest_unconfigure()
            why = f"cannot be imported: {type(error).__name__}: {error}"
            raise ValueError(f"{coursework.shown(self.answer)} {why}") from None

    def pytest_unconfigure(self):
        for module in project_modules():
            del sys.modules[module]
        sys.modules.pop(self.exercise.module, None)
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
        rows = list(self.tests.values())
        return {
            "exercise": self.name,
            "points": sum(row["points"] for row in rows),
            "max": self.exercise.points,
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "tests": rows,
        }

    @property
    def is_complete(self) -> bool:
        """Tell whether all tests ran; after -k, -x or Ctrl-C they did not."""
        rows = [row for row in self.tests.values() if row["reason"] != NOT_RUN]
        return sum(row["max"] for row in rows) == self.exercise.points

    def pytest_sessionfinish(self):
        if self.is_complete:
            files.write_json(self.file, self.score)

    def pytest_terminal_summary(self, terminalreporter):
        score, write = self.score, terminalreporter.write_line
        terminalreporter.section(f"exercise {self.name}")
        if self.broken:
            return write(f"nothing is graded: {self.broken}")
        for task in self.exercise.tasks:
            rows = [row for row in score["tests"] if row["function"] == task.function]
            got = sum(row["points"] for row in rows) if rows else "-"
            reasons = list(dict.fromkeys(row["reason"] for row in rows if row["reason"]))
            for i, reason in enumerate(reasons or [""]):
                start = f"{task.function:32} {got}/{task.points}" if i == 0 else ""
                write(f"{start:38} {reason}".rstrip())
        place = coursework.shown(self.file)
        written = place if self.is_complete else "not written, because not all tests ran"
        write(f"{'score':32} {score['points']}/{score['max']}   {written}")


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
