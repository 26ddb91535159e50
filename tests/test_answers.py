"""Wrong answers lose points and are named, right ones get all points, and hints lead to them.

Answers are marked by marking.py, which is faster than `pytest --exercise`.
"""

import ast
import doctest
import importlib
import re
import textwrap

import pytest
from marking import changed, mark, points, source_of
from right_answers import FOLLOWED, RIGHT
from test_exercise import grade
from wrong_answers import WRONG

from exercises import coursework
from exercises.coursework import EXERCISES


@pytest.mark.parametrize("name, mistake", [(n, m) for n in WRONG for m in WRONG[n]])
def test_a_plausible_mistake_costs_points_and_is_named(name, mistake):
    """One mistake in the module fails a test, and its message says what is wrong."""
    phrase = WRONG[name][mistake][2]
    rows = mark(name, changed(name, WRONG[name][mistake]), until=phrase)
    assert points(rows) > 0 or len(EXERCISES[name].tasks) == 1
    assert phrase and any(phrase in (row["reason"] or "") for row in rows), rows


@pytest.mark.parametrize("name, answer", [(n, a) for n in RIGHT for a in RIGHT[n]])
def test_another_right_answer_gets_full_points(name, answer):
    """A grader asks for what the docstrings say, and for nothing else."""
    rows = mark(name, changed(name, RIGHT[name][answer]))
    assert points(rows) == EXERCISES[name].points, [row["reason"] for row in rows if row["reason"]]


@pytest.mark.parametrize("name", ["masks", "decoders"])
def test_both_ways_of_marking_agree(name, tmp_path):
    """For a mistake, marking.py gives the rows that `pytest --exercise` writes."""
    answer = changed(name, next(iter(WRONG[name].values())))
    score, _ = grade(name, answer, tmp_path)
    assert mark(name, answer) == score["tests"] and score["points"] < score["max"]


# ---- hints and docstrings ----


def followed(name) -> str:
    """Return the source of a module with all bodies of an exercise written from third hints."""
    source = source_of(name)
    for function, body in FOLLOWED[name].items():
        node = coursework.functions_in(source)[function]
        lines, first = source.splitlines(), node.body[0]
        start = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
        body = textwrap.indent(textwrap.dedent(body).strip(), " " * first.col_offset).splitlines()
        source = "\n".join([*lines[:start], *body, *lines[node.end_lineno :]]) + "\n"
    return source


@pytest.mark.parametrize("name", EXERCISES)
def test_who_follows_the_third_hints_gets_full_points(name):
    """The code in their backticks stands in the answer, which is marked like any other."""
    for task in EXERCISES[name].tasks:
        body = "".join(FOLLOWED[name][task.function].split())
        for code in re.findall(r"`([^`]+)`", task.hints[2]):
            assert "".join(code.split()) in body, f"{task.function}: {code}"
    rows = mark(name, followed(name))
    assert points(rows) == EXERCISES[name].points, [row["reason"] for row in rows if row["reason"]]


@pytest.mark.parametrize("name", EXERCISES)
def test_what_a_hint_names_exists(name):
    """A name in the backticks of the first two hints is one of the module or of its classes."""
    module = importlib.import_module(EXERCISES[name].module)
    source = source_of(name)
    for task in EXERCISES[name].tasks:
        for code in re.findall(r"`([\w.]+)`", " ".join(task.hints[:2])):
            parts = code.split(".")
            is_there = hasattr(module, parts[0]) or re.search(rf"\b{parts[-1]}\b", source)
            assert is_there, f"{task.function}: {code}"


@pytest.mark.parametrize("name", EXERCISES)
def test_every_skeleton_has_examples_that_are_right(name):
    """At least one, in the docstrings of the functions to write; the module itself passes them."""
    module, source = importlib.import_module(EXERCISES[name].module), source_of(name)
    functions = coursework.functions_in(coursework.skeleton(name, source))
    runner, count = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE), 0
    for task in EXERCISES[name].tasks:
        text = ast.get_docstring(functions[task.function])
        place = name, task.function
        test = doctest.DocTestParser().get_doctest(text, dict(vars(module)), *place, 0)
        count += len(test.examples)
        assert runner.run(test).failed == 0, place
    assert count > 0


def test_a_skeleton_says_more_than_the_docstring():
    """The text of table.toml stands below the docstring, once, and fits the line."""
    for name, exercise in EXERCISES.items():
        skeleton, kept = coursework.skeleton(name, source_of(name)), source_of(name).splitlines()
        assert max(len(line) for line in skeleton.splitlines() if line not in kept) <= 100
        assert coursework.skeleton(name, skeleton) == skeleton
        ours, theirs = (coursework.functions_in(text) for text in (source_of(name), skeleton))
        for task in exercise.tasks:
            before, after = (ast.get_docstring(f[task.function]) for f in (ours, theirs))
            assert after == (f"{before}\n\n{task.more}" if task.more else before)
