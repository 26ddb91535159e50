"""The notebooks are committed as executed, small, of short cells, and every cell still runs."""

import ast
import functools
import importlib
import json
import subprocess
import sys

import pytest
from helpers import ROOT

FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
LARGEST = {"09_streaming": 600}  # kB; this one holds a film
CELL_LINES = 14


@functools.cache
def cells_of(name):
    """(title, source, cell) of every code cell."""
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    titles = (f"{name}, code cell {i}" for i in range(1, len(code) + 1))
    return [(t, "".join(cell["source"]), cell) for t, cell in zip(titles, code)]


@functools.cache
def module_names():
    """Functions and classes that the modules define, without the private ones."""
    names = set()
    for path in ROOT.glob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        names |= {n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    return {name for name in names if not name.startswith("_")} - {"main"}


def test_nine_in_reading_order():
    """They are numbered without a gap."""
    assert [name[:2] for name in NAMES] == [f"{i:02}" for i in range(1, 10)]


@pytest.mark.parametrize("name", NAMES)
def test_committed_as_executed(name):
    """Every code cell was executed, in order, once."""
    counts = [cell["execution_count"] for _, _, cell in cells_of(name)]
    assert counts == list(range(1, len(counts) + 1)), "run: python notebooks/run.py"


@pytest.mark.parametrize("name", NAMES)
def test_small(name):
    """A notebook opens quickly and a change to it can be reviewed."""
    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size <= 1000 * LARGEST.get(name, 300)
    assert path.read_text(encoding="utf-8").startswith('{\n "cells"'), "indent is 1"
    assert 10 <= len(cells_of(name)) <= 20


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short(name):
    """A cell is one thought."""
    for title, source, _ in cells_of(name):
        assert len(source.splitlines()) <= CELL_LINES or title.endswith("cell 1"), title


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_defined_twice(name):
    """What a module defines is imported from there."""
    for title, source, _ in cells_of(name):
        defined = {
            node.name
            for node in ast.walk(ast.parse(source))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }
        assert not defined & module_names(), title


@pytest.mark.parametrize("name", NAMES)
def test_code_shown_exists(name):
    """Every `inspect.getsource(module.thing)` names something that the module has."""
    for title, source, _ in cells_of(name):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "inspect.getsource":
                module, *path = ast.unparse(node.args[0]).split(".")
                found = importlib.import_module(module)
                for part in path:
                    assert hasattr(found, part), f"{title}: {ast.unparse(node)}"
                    found = getattr(found, part)


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_runs(name):
    """From the first cell to the last, in a process of its own; the message names the cell."""
    command = [sys.executable, str(FOLDER / "run.py"), "--check", name]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
