"""The notebooks are committed as executed, small, of short cells, and every cell still runs."""

import ast
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from unittest import mock

import pytest
from helpers import ROOT

FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
LARGEST = {"10_streaming": 600}  # kB; this one holds a film
CELL_LINES = 14
QUESTION, FOLDED = "**Before ", "<details><summary>Answer</summary>"


@functools.cache
def all_cells(name):
    """Return all cells of a notebook as (type, source, cell)."""
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [(c["cell_type"], "".join(c["source"]), c) for c in notebook["cells"]]


@functools.cache
def cells_of(name):
    """Return (title, source, cell) of every code cell."""
    code = [(source, cell) for kind, source, cell in all_cells(name) if kind == "code"]
    return [(f"{name}, code cell {i}", *pair) for i, pair in enumerate(code, 1)]


def markdown_of(name):
    """Return all Markdown of a notebook as one text."""
    return "\n\n".join(source for kind, source, _ in all_cells(name) if kind == "markdown")


@functools.cache
def module_names():
    """Return the functions and classes that project files define, in all rooms, if not private."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    names = set()
    for path in (p for p in paths if p.parent.name not in ("tests", "answers", "runs")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        names |= {n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    return {name for name in names if not name.startswith("_")} - {"main"}


def load_setup():
    """Import notebooks/setup.py, under a name that no other module has."""
    spec = importlib.util.spec_from_file_location("notebook_setup", FOLDER / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_numbered_in_reading_order():
    """They are numbered from 1 to 11 without a gap."""
    assert [name[:2] for name in NAMES] == [f"{i:02}" for i in range(1, 12)]


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
        assert len(source.splitlines()) <= CELL_LINES, title


@pytest.mark.parametrize("name", NAMES)
def test_title_has_the_number(name):
    """The heading, and references to other notebooks, use the numbers of the file names."""
    assert all_cells(name)[0][1].startswith(f"# {int(name[:2])}. ")
    for number in re.findall(r"[Nn]otebook\s+(\d+)", markdown_of(name)):
        assert 1 <= int(number) <= len(NAMES) and int(number) != int(name[:2])


@pytest.mark.parametrize("name", NAMES)
def test_every_question_has_a_folded_answer(name):
    """The reader decides first; the answer is folded, and comes before the next question."""
    text = markdown_of(name)
    marks = re.findall("|".join(map(re.escape, (QUESTION, FOLDED))), text)
    assert marks and marks == [QUESTION, FOLDED] * (len(marks) // 2)
    assert text.count("<details>") == text.count("</details>")


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_is_explained(name):
    """After a picture, the text says what was to be seen before it goes on to something else."""
    cells = all_cells(name)
    for i, (kind, _, cell) in enumerate(cells):
        if kind == "code" and any("image/png" in o.get("data", {}) for o in cell["outputs"]):
            after = next(source for kind, source, _ in cells[i + 1 :] if kind == "markdown")
            assert not after.startswith(("#", QUESTION)), f"{name}, cell {i + 1}"


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_shown(name):
    """`plots.show` only shows something as the last line of a cell."""
    for title, source, _ in cells_of(name):
        *others, last = ast.parse(source).body
        calls = [n for s in others for n in ast.walk(s) if isinstance(n, ast.Call)]
        assert "plots.show" not in [ast.unparse(call.func) for call in calls], title


@pytest.mark.parametrize("name", NAMES)
def test_exercises_exist(name):
    """Every exercise that a notebook recommends is one of exercises/table.toml."""
    table = tomllib.loads((ROOT / "exercises" / "table.toml").read_text(encoding="utf-8"))
    for exercise in re.findall(r"exercises? ([a-z_]+)", markdown_of(name)):
        if f"-m exercises {exercise}" in markdown_of(name):
            assert exercise in table, exercise


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
    modules = {}  # name in the notebook -> name of the module
    for title, source, _ in cells_of(name):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                modules |= {a.asname or a.name: a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "inspect.getsource":
                module, *path = ast.unparse(node.args[0]).split(".")
                found = importlib.import_module(modules[module])
                for part in path:
                    assert hasattr(found, part), f"{title}: {ast.unparse(node)}"
                    found = getattr(found, part)


@pytest.mark.parametrize("folder", [FOLDER, ROOT], ids=["notebooks", "root"])
def test_first_cell_works_in_both_folders(folder):
    """All notebooks begin alike, and find the project from notebooks/ and from the root."""
    (first,) = {cells_of(name)[0][1] for name in NAMES}
    check = "import os, masks; assert os.path.exists('weights/toy_codec.safetensors')"
    command = [sys.executable, "-c", f"{first}\n{check}"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr


def test_in_colab_the_first_cell_gets_the_project(tmp_path):
    """In a folder with no file of the project it is cloned, once; a second run changes nothing."""
    files = "masks.py", "config.py", "requirements.txt", "notebooks/setup.py", "exercises/behind.py"
    for name in files:
        (target := tmp_path / "remote" / name).parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    git = ["git", "-C", tmp_path / "remote", "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    (colab := tmp_path / "content").mkdir()
    cell = cells_of(NAMES[0])[0][1]
    code = f"{cell}\n{cell}\nimport masks, os; print(masks.__file__, os.getcwd())"
    hosted = {**os.environ, "COLAB_RELEASE_TAG": "x", "PROJECT": (tmp_path / "remote").as_uri()}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=colab, env=hosted
    )
    project = str((colab / "project").resolve())
    assert run.stdout.split() == [f"{project}/masks.py", project], run.stderr
    assert not (colab / "project" / "project").exists()


@pytest.mark.parametrize("name", NAMES)
def test_minutes_and_needs_are_said_at_the_top(name):
    """In the first cell, after paper and files."""
    first = all_cells(name)[0][1]
    assert re.search(r"\n\*\*Time:\*\* \d+ minutes; .*\*\*Needs:\*\* .*no GPU\.\n", first)
    uses_weights = re.search(r"weights/|codec\.load|source\.WEIGHTS", "".join(
        source for _, source, _ in cells_of(name)
    ))  # fmt: skip
    assert bool(uses_weights) == ("the toy's weights" in first)


def test_missing_packages():
    """Only requirements that cannot be imported are missing, whatever their version."""
    requirements = "# a comment\ntorch==0.0.1\nno_such_package==1.0\n"
    assert load_setup().missing_packages(requirements) == ["no_such_package==1.0"]


@pytest.mark.parametrize("hosted", [False, True])
def test_only_hosted_notebooks_install(hosted, monkeypatch):
    """A hosted notebook installs what is missing; elsewhere the reader is told what to type."""
    setup = load_setup()
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(setup, "missing_packages", lambda requirements: ["no_such_package==1.0"])
    monkeypatch.setattr(setup, "HOSTED", ("PATH" if hosted else "NO_SUCH_VARIABLE",))
    with mock.patch.object(setup.subprocess, "run") as run:
        if hosted:
            setup.start()
            assert run.call_args.args[0][1:] == ["-m", "pip", "install", "no_such_package==1.0"]
        else:
            with pytest.raises(ImportError, match="pip install -r requirements.txt"):
                setup.start()
            run.assert_not_called()
    assert os.getcwd() == str(ROOT)


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_runs(name):
    """From the first cell to the last, in a process of its own; the message names the cell."""
    command = [sys.executable, str(FOLDER / "run.py"), "--check", name]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
