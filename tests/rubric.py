"""Render exercises/RUBRIC.md from the tables of points and of wrong answers.

python tests/rubric.py    writes the page; test_class.py checks that it is up to date
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from marking import changed, mark, source_of  # noqa: E402
from wrong_answers import WRONG  # noqa: E402

from exercises import coursework  # noqa: E402

PAGE = ROOT / "exercises" / "RUBRIC.md"
HEAD = """# Rubric and graded samples

`python tests/rubric.py` writes this page. For each exercise it has the claims that earn points, one
per test; the mistakes of `tests/wrong_answers.py`, by function, each with words of the message that
the student reads; and one graded sample.
"""


def cell(text) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def claims(name) -> list[str]:
    """Return table rows: the function, the points and the claim of each graded test."""
    nodes = ast.parse(coursework.graded_file(name).read_text("utf-8")).body
    about = {node.name: ast.get_docstring(node) for node in nodes if hasattr(node, "args")}
    rows = coursework.graded_tests(name).items()
    return [
        f"| `{function}` | {points} | {cell(about[test].splitlines()[0])} |"
        for test, (points, function) in rows
    ]


def place_of(name, old) -> str:
    """Return the function that contains this code of a module."""
    source = source_of(name)
    line = 1 + source[: source.index(old)].count("\n")
    for function, node in coursework.functions_in(source).items():
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        if first <= line <= node.end_lineno:
            return f"`{function}`"
    return ""


def mistakes(name) -> list[str]:
    rows = [(place_of(name, old), mistake, told) for mistake, (old, _, told) in WRONG[name].items()]
    return [f"| {place} | {cell(mistake)} | {cell(told)} |" for place, mistake, told in rows]


def sample(name) -> str:
    """Return a wrong answer as a diff, and its marks as a student reads them."""
    mistake, patch = next((m, p) for m, p in WRONG[name].items() if p[1])
    rows = mark(name, changed(name, patch))
    lines = [f"A sample: {mistake}.", "", "```diff"]
    lines += [f"{sign} {line}" for sign, text in zip("-+", patch) for line in text.splitlines()]
    lines += ["```", "", "```text"]
    for task in coursework.find(name).tasks:
        graded = [row for row in rows if row["function"] == task.function]
        got = sum(row["points"] for row in graded)
        reason = next((row["reason"] for row in graded if row["reason"]), "")
        lines += [f"{task.function:32} {got}/{task.points}  {reason}".rstrip()]
    return "\n".join([*lines, "```"])


def page() -> str:
    parts = [HEAD]
    for name, exercise in coursework.EXERCISES.items():
        parts += [
            f"## {name}: {exercise.idea}, {exercise.points} points\n",
            "| function | points | the claim |\n|---|---|---|",
            *claims(name),
            "\n| function | mistake | the message says |\n|---|---|---|",
            *mistakes(name),
            f"\n{sample(name)}\n",
        ]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
