"""Skeletons of modules, hints, points and progress.

The solution of an exercise is the module itself, so no second copy is stored. In a skeleton, the
body of each function that `exercises/table.toml` lists becomes a hint and an error; everything else
stays. Students write these bodies in `answers/NAME.py`. grader.py puts this file in the place of
the module. A test in `tests/test_graded_NAME.py` names the function that it grades:
`@pytest.mark.points(2, "may_attend")`. Expected values never come from code that students write.
"""

import ast
import codecs
import contextlib
import json
import re
import textwrap
import tomllib
from pathlib import Path
from typing import NamedTuple

from exercises.behind import functions_in
from plumbing import files

ROOT = Path(__file__).parent.parent
ANSWERS = ROOT / "answers"
# An answer starts with these lines, so that it can be run from any folder.
RUNNABLE = """
if __name__ == "__main__":  # python answers/NAME.py
    import sys

    sys.path.insert(0, sys.path[0] + "/..")
    from exercises import behind

    behind.stand_behind()
"""


# ---- the table ----


class Task(NamedTuple):
    """One body to write."""

    function: str  # a function of the module, or Class.method
    points: int
    hints: list[str]  # three: where to look, how to do it, almost the code
    more: str = ""  # what the docstring leaves open, and examples


class Exercise(NamedTuple):
    """The bodies to write in one module, from easy to hard."""

    module: str  # as it is imported: "masks", "film.decoders"
    idea: str
    minutes: int
    tasks: list[Task]

    @property
    def points(self) -> int:
        return sum(task.points for task in self.tasks)

    @property
    def file(self) -> Path:
        return ROOT / f"{self.module.replace('.', '/')}.py"


def read_exercise(name, row) -> Exercise:
    """Read one exercise of table.toml."""
    tasks = [
        Task(
            function, task["points"], [" ".join(hint.split()) for hint in task["hints"]],
            task.get("task", "").strip("\n"),
        )
        for function, task in row["tasks"].items()
    ]  # fmt: skip
    return Exercise(row.get("module", name), row["idea"], row["minutes"], tasks)


TABLE = tomllib.loads((ROOT / "exercises" / "table.toml").read_text("utf-8"))
EXERCISES = {name: read_exercise(name, row) for name, row in TABLE.items()}


def find(name) -> Exercise:
    if name not in EXERCISES:
        raise ValueError(f"exercise {name!r}: unknown; expected one of {', '.join(EXERCISES)}")
    return EXERCISES[name]


def version() -> str:
    """Return the version of the exercises: the newest one of CHANGELOG.md."""
    text = (ROOT / "exercises" / "CHANGELOG.md").read_text("utf-8")
    return re.search(r"^## (\S+)", text, re.MULTILINE)[1]


# ---- skeletons ----


def stub(name, task, indent) -> list[str]:
    """Return the lines that replace a body in a skeleton: the first hint, and an error."""
    hint = textwrap.wrap(f"Points: {task.points}. {task.hints[0]}", 98 - indent)
    lines = [*hint, f"More: python -m exercises --hint {name}.{task.function} 2"]
    error = f'raise NotImplementedError("{task.function} is not written yet")'
    return [" " * indent + line for line in (*(f"# {line}" for line in lines), error)]


def with_more(docstring, more, indent) -> list[str]:
    """Return the lines of a docstring with more text at its end, once."""
    added = [(" " * indent + line).rstrip() for line in more.splitlines()]
    if not docstring or not added or added[-1] in docstring:
        return docstring
    last = docstring[-1].removesuffix('"""').rstrip()
    return [*docstring[:-1], *filter(None, [last]), "", *added, " " * indent + '"""']


def skeleton(name, source, solved=0) -> str:
    """Remove the bodies of an exercise from the source of its module, except the first `solved`."""
    lines, nodes = source.splitlines(), functions_in(source)
    holes = [(nodes[task.function], task) for task in find(name).tasks[solved:]]
    # Go from the last to the first, because a new body shifts the line numbers after it.
    for node, task in sorted(holes, key=lambda hole: -hole[0].lineno):
        first = node.body[0]  # its docstring, or its first statement
        line = first.end_lineno if ast.get_docstring(node) is not None else first.lineno - 1
        text = with_more(lines[first.lineno - 1 : line], task.more, first.col_offset)
        lines[first.lineno - 1 : node.end_lineno] = text + stub(name, task, first.col_offset)
    return "\n".join(lines) + "\n"


def start(name, force=False) -> Path:
    """Write the skeleton of an exercise, and return its path."""
    source = find(name).file.read_text("utf-8")
    end = ast.parse(source).body[0].end_lineno  # of the docstring
    lines = skeleton(name, source).splitlines(keepends=True)
    text = "".join([*lines[:end], RUNNABLE.replace("NAME", name), *lines[end:]])
    answer = ANSWERS / f"{name}.py"
    if answer.exists() and not force:
        raise ValueError(f"{shown(answer)} exists already; --force overwrites your work")
    files.write_beside(answer, lambda path: path.write_text(text, "utf-8"))
    return answer


def check_answer(name, answer):
    """Raise ValueError if an answer is missing, is not Python, or lacks one of its functions."""
    if not answer.is_file():
        raise ValueError(f"{shown(answer)}: no such file; start with python -m exercises {name}")
    try:
        found = functions_in(text_of(answer))
    except SyntaxError as error:
        raise ValueError(f"{shown(answer)}, line {error.lineno}: {error.msg}") from None
    except (RecursionError, MemoryError):
        raise ValueError(f"{shown(answer)}: too deeply nested for Python") from None
    if missing := [task.function for task in find(name).tasks if task.function not in found]:
        raise ValueError(f"{shown(answer)}: no function {missing[0]}; keep the skeleton's names")


def text_of(answer) -> str:
    """Read an answer.  Raises ValueError, saying what else it is."""
    data, kind = answer.read_bytes(), "is not text"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        kind = "is text in UTF-16"  # e.g. by `>` in an old PowerShell
    elif data.startswith(b"\x80") and data.endswith(b"."):
        kind = "is a pickle, which nothing here opens"
    elif b"\0" not in data:
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode("utf-8-sig")  # some editors write a byte order mark
    raise ValueError(f"{shown(answer)} {kind}; expected Python in UTF-8")


def shown(path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


# ---- hints and progress ----


def find_task(place, option) -> Task:
    """Return the task of "NAME.function".  Raises ValueError, naming the option, if it is none."""
    name, _, function = place.partition(".")
    tasks = {task.function: task for task in find(name).tasks}
    if function not in tasks:
        raise ValueError(f"{option} {place}: expected {name}. and one of {', '.join(tasks)}")
    return tasks[function]


def hint(place, depth=1) -> str:
    """Return a hint for "NAME.function"."""
    task = find_task(place, "--hint")
    if str(depth) not in ("1", "2", "3"):
        raise ValueError(f"--hint {place} {depth}: expected a depth of 1, 2, 3")
    return task.hints[int(depth) - 1]


def progress(name) -> str:
    """Return "not started", "not graded", or the points of the latest grading."""
    answer, score = ANSWERS / f"{name}.py", ANSWERS / f"{name}.score.json"
    if not (answer.exists() and score.exists()):
        return "not graded" if answer.exists() else "not started"
    found = json.loads(score.read_text("utf-8"))
    edited = answer.stat().st_mtime > score.stat().st_mtime
    return f"{found['points']}/{found['max']}" + (", edited since" if edited else "")


def overview() -> str:
    lines = []
    for name, ex in EXERCISES.items():
        size = f"{ex.points:3} points {ex.minutes:4} minutes"
        lines.append(f"{name:15} {size}   {ex.idea} ({progress(name)})")
        worth = ", ".join(f"{task.function} {task.points}" for task in ex.tasks)
        lines += textwrap.wrap(worth, 98, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


# ---- do the table, the modules and the tests agree? ----


def graded_file(name) -> Path:
    return ROOT / "tests" / f"test_graded_{name}.py"


def graded_tests(name) -> dict[str, tuple[int, str]]:
    """Return the points and the graded function of each test; (0, "") for a test without them."""
    # Read from the text: importing the tests would import the modules that they grade.
    mark = r'(?m)^(?:@pytest\.mark\.points\((\d+), "([\w.]+)"\)\n)?def (test_\w+)'
    rows = re.findall(mark, graded_file(name).read_text("utf-8"))
    return {test: (int(points or 0), function) for points, function, test in rows}


def problems(name) -> list[str]:
    """Return contradictions between the table, the module and the tests of an exercise."""
    places = find(name).file, graded_file(name)
    if missing := [shown(path) for path in places if not path.exists()]:
        return [f"{name}: there is no {' and no '.join(missing)}"]
    nodes, tests = functions_in(places[0].read_text("utf-8")), graded_tests(name)
    worth = {task.function: task.points for task in find(name).tasks}
    found = [
        f"{test} grades {function or 'nothing'}, which is not in the table"
        for test, (_, function) in tests.items()
        if function not in worth
    ]
    for function, points in worth.items():
        graded = sum(n for n, f in tests.values() if f == function)
        if graded != points:
            found.append(f"{function} has {points} points in the table, {graded} in its tests")
        if function not in nodes:
            found.append(f"there is no function {function}")
        elif nodes[function].lineno == nodes[function].body[0].lineno:
            # `skeleton` removes whole lines.
            found.append(f"{function} has its body on the line of its def")
    return [f"{name}: {line}" for line in found]
