"""Copies of the project: for students without solutions, and for Gradescope as a zip file."""

import ast
import json
import re
import shutil
import zipfile
from pathlib import Path

from exercises import behind, coursework

ROOT = coursework.ROOT
GRADING = (  # what grading needs
    "*.py", "*.toml", "requirements*.txt", "LICENSE", "NOTICE", "kernel/*", "toy/*", "full_size/*",
    "plumbing/*", "film/*", "studies/*", "exercises/*.py", "exercises/*.toml",
    "exercises/CHANGELOG.md", "tests/test_graded_*.py", "tests/grading.py",
)  # fmt: skip
# Ordinary tests and the pages for instructors show solutions, so students do not get them.
HANDED_OUT = (
    *GRADING, "README.md", "DIFFERENCES.md", ".gitignore", "notebooks/*", "assets/*", "results/*",
    "weights/*", "benchmarks/*.py", "exercises/leaderboard.json", "exercises/LEADERBOARD.md",
)  # fmt: skip
RENAMED = {  # place in the project -> place in a hand-out
    "exercises/assistants.md": "AGENTS.md",  # the file that assistants read first
    "exercises/actions.yml": ".github/workflows/grade.yml",
}
GRADESCOPE = ("exercises/gradescope/setup.sh", "exercises/gradescope/run_autograder")


def files_of(patterns) -> list[Path]:
    paths = (path for pattern in patterns for path in ROOT.glob(pattern))
    return sorted({path for path in paths if path.is_file()})


def check_complete(option):
    if behind.PACK.exists():
        raise ValueError(f"{option}: this copy is a hand-out; start from the project itself")


def blank_exercises(first) -> list[str]:
    """List an exercise and all later ones."""
    # Later exercises import the modules of earlier ones, so a course goes in this order.
    names = list(coursework.EXERCISES)
    coursework.find(first)
    return names[names.index(first) :]


def hand_out(folder, first):
    """Copy the project for students, without the bodies of exercise `first` and all later ones."""
    check_complete(f"--handout {folder}")
    blank, folder = blank_exercises(first), Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--handout {folder}: not empty")
    holes = {coursework.find(name).file: name for name in blank}
    asked = asked_in(blank)
    # The page of masks and cache contains the rules in JavaScript.
    left_out = {ROOT / "notebooks" / "explorer.html"} if "kv_cache" in blank else set()
    renamed = {ROOT / source: folder / target for source, target in RENAMED.items()}
    for source in [*(set(files_of(HANDED_OUT)) - left_out), *renamed]:
        target = renamed.get(source, folder / source.relative_to(ROOT))
        target.parent.mkdir(parents=True, exist_ok=True)
        if source in holes:
            text = coursework.skeleton(holes[source], source.read_text("utf-8"))
            target.write_text(text, "utf-8")
        elif source.suffix == ".ipynb":
            notebook = without_bodies(json.loads(source.read_text("utf-8")), asked)
            text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
            target.write_text(text, "utf-8")
        elif source.name == ".gitignore":  # students may commit their answers
            target.write_text(source.read_text("utf-8").replace("/answers/\n", ""), "utf-8")
        else:
            shutil.copyfile(source, target)
    pack = behind.pack({coursework.find(name).module: bodies_of(name) for name in blank})
    (folder / behind.PACK.relative_to(behind.ROOT)).write_bytes(pack)


def bodies_of(name) -> dict[str, str]:
    """Return the bodies that an exercise asks for."""
    exercise = coursework.find(name)
    source = exercise.file.read_text("utf-8")
    return behind.bodies_of(source, [task.function for task in exercise.tasks])


# ---- notebooks without the bodies asked for ----


def asked_in(names) -> dict[str, str]:
    """Return the exercise of each function asked for, as notebooks name it: masks.may_attend."""
    found = {}
    for name in names:
        exercise = coursework.find(name)
        short = exercise.module.rpartition(".")[2]
        found |= {f"{short}.{task.function}": name for task in exercise.tasks}
    return found


def without_bodies(notebook, asked) -> dict:
    """Replace the cells of a notebook that print bodies asked for, see `asked_in`."""
    cells = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        shown = shown_bodies(source, asked) if cell["cell_type"] == "code" else {}
        if shown:
            lines = source.splitlines(keepends=True)
            rest = [line for i, line in enumerate(lines, 1) if i not in shown]
            kept = {"source": rest, "outputs": [o for o in cell["outputs"] if "name" not in o]}
            names = dict.fromkeys(shown.values())
            text = [f"*Exercise `{asked[name]}` asks for `{name}`.*\n" for name in names]
            note = {"cell_type": "markdown", "id": f"{cell['id']}-asked", "metadata": {}}
            cells.append({**note, "source": text})
            cell = {**cell, **kept} if "".join(rest).strip() else None
        cells += [cell] if cell else []
    return {**notebook, "cells": cells}


def shown_bodies(source, asked) -> dict[int, str]:
    """Return the lines that print a body asked for: {line: function}.

    >>> shown_bodies("x = 1\\nprint(inspect.getsource(a.f))", {"a.f": "a"})
    {2: 'a.f'}
    """
    found = {}
    for statement in ast.parse(source).body:
        text = ast.unparse(statement)
        shown = re.fullmatch(r"print\(inspect\.getsource\((.*?)(\.fget)?\)\)", text)
        if shown and shown[1] in asked:
            lines = range(statement.lineno, statement.end_lineno + 1)
            found |= dict.fromkeys(lines, shown[1])
    return found


# ---- Gradescope ----


def zip_autograder(path):
    """Write the zip file that Gradescope's "Configure autograder" page takes."""
    # setup.sh and run_autograder at the root of the archive, see
    # https://gradescope-autograders.readthedocs.io/en/latest/specs/
    check_complete(f"--zip {path}")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for source in map(ROOT.joinpath, GRADESCOPE):
            info = zipfile.ZipInfo(source.name)
            info.external_attr = 0o755 << 16  # executable
            archive.writestr(info, source.read_bytes().replace(b"\r\n", b"\n"))
        for source in files_of([*GRADING, "weights/toy_codec.safetensors"]):
            archive.write(source, Path("project", source.relative_to(ROOT)))
