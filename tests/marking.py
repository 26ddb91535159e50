"""Mark an answer in this process: swap its functions into the modules, and run the graded tests.

It gives the rows of `pytest --exercise`, but imports nothing again, so it takes a fraction of a
second. test_exercise.py checks that both ways agree.
"""

import ast
import contextlib
import functools
import importlib

import pytest
import torch

from exercises import coursework, grader
from exercises.coursework import EXERCISES


def patches(text):
    """Read a list of changes of a module: {what it is: (code of the module, new code, phrase)}.

    Each is a line "what it is: phrase of the message" (the phrase may be left out), then code that
    the module has once (-), and other code (+).  Without a + line, the code is left out.
    """
    found = {}
    for line in text.strip("\n").splitlines():
        if line[:1] not in "-+":
            name, _, phrase = line.partition(": ")
            assert name not in found, f"there are two: {name}"
            found[name] = [], [], phrase
        else:
            found[name][line[0] == "+"].append(line[2:])
    return {
        name: ("\n".join(old), "\n".join(new), phrase) for name, (old, new, phrase) in found.items()
    }


@functools.cache
def source_of(name):
    return EXERCISES[name].file.read_text("utf-8")


def changed(name, patch) -> str:
    """Return the source of a module with a change."""
    old, new, _ = patch
    count = source_of(name).count(old)
    assert count == 1, f"{name} has this code {count} times, expected once:\n{old}"
    return source_of(name).replace(old, new)


def new_functions(name, source) -> dict:
    """Return the functions of an answer that differ from those of the module, by name."""
    ours, theirs = (coursework.functions_in(text) for text in (source_of(name), source))
    return {f: node for f, node in theirs.items() if ast.dump(node) != ast.dump(ours[f])}


@contextlib.contextmanager
def answered(name, source):
    """Put the new functions of an answer into the places of the originals, everywhere."""
    module = importlib.import_module(EXERCISES[name].module)
    with pytest.MonkeyPatch.context() as patch:
        for place, node in new_functions(name, source).items():
            scratch = {}
            code = compile(ast.Module([node], []), f"answers/{name}.py", "exec")
            exec(code, vars(module), scratch)  # its globals are those of the module
            kind, _, short = place.rpartition(".")
            if kind:
                patch.setattr(getattr(module, kind), short, scratch[short])
                continue
            original = getattr(module, short)
            for other in grader.project_modules().values():
                for label, value in list(vars(other).items()):
                    if value is original:
                        patch.setattr(other, label, scratch[short])
        forget()
        yield
    forget()


def forget():
    """Empty the caches of the hall: they hold results of other answers."""
    for cached in ("rope.frequencies", "model.ropes_of"):
        module, _, function = cached.partition(".")
        getattr(importlib.import_module(module), function).cache_clear()


def mark(name, source, until=None) -> list[dict]:
    """Mark an answer: a row of function, test, points, maximum and reason for every graded test.

    until   a phrase: stop once a test has failed with it and another test has passed
    """
    tests = importlib.import_module(f"test_graded_{name}")
    order = coursework.graded_tests(name)
    if until:  # first the tests of the functions that are changed
        new = new_functions(name, source)
        order = sorted(order, key=lambda test: order[test][1] not in new)
    rows = []
    with answered(name, source):
        for test in order:
            rows.append(row_of(test, getattr(tests, test)))
            if until and points(rows) and any(until in (row["reason"] or "") for row in rows):
                break
    return rows


def row_of(name, test) -> dict:
    """Run a graded test, like pytest with the fixture of conftest.py."""
    points, function = next(m for m in test.pytestmark if m.name == "points").args
    torch.manual_seed(0)
    reason = None
    try:
        test()
    except (Exception, pytest.fail.Exception) as error:
        reason = first_line(error)
    finally:
        torch.set_grad_enabled(True)
    earned = points * (reason is None)
    return {"function": function, "test": name, "points": earned, "max": points, "reason": reason}


def points(rows) -> int:
    return sum(row["points"] for row in rows)


def first_line(error) -> str:
    """Return the first line of an error, as grader.py reports it."""
    kind = type(error).__name__
    is_told = isinstance(error, (AssertionError, NotImplementedError, pytest.fail.Exception))
    return (str(error) if is_told else f"{kind}: {error}").strip().splitlines()[0]
