"""A hand-out has no solutions in plain sight, and a student who answers rightly has all points."""

import csv
import json
import subprocess
import sys
import zipfile

import pytest

from exercises import behind, coursework, handout
from exercises.coursework import EXERCISES


def source_of(name):
    return EXERCISES[name].file.read_text("utf-8")


def python(folder, *args):
    """Run Python in a folder: -> what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A hand-out in which every exercise is blank."""
    folder = tmp_path_factory.mktemp("course")
    handout.hand_out(folder, "masks")
    return folder


def bodies(names):
    """Return the bodies of some exercises, without docstrings: several lines each."""
    for name in names:
        source = source_of(name)
        nodes = coursework.functions_in(source)
        for task in EXERCISES[name].tasks:
            node = nodes[task.function]
            start = node.body[0].end_lineno  # of the docstring
            if len(body := source.splitlines()[start : node.end_lineno]) > 1:
                yield "\n".join(line.strip() for line in body)


@pytest.mark.parametrize("first", ["masks", "dmd"])
def test_no_file_shows_a_body_asked_for(first, tmp_path, course):
    """Modules are skeletons, notebooks lack the cells, and other files do not repeat bodies."""
    folder = course
    if first != "masks":
        folder = tmp_path / "course"
        handout.hand_out(folder, first)
    names = list(EXERCISES)
    blank = names[names.index(first) :]
    for name, exercise in EXERCISES.items():
        text = (folder / exercise.file.relative_to(coursework.ROOT)).read_text("utf-8")
        expected = coursework.skeleton(name, source_of(name)) if name in blank else source_of(name)
        assert text == expected, name
    told = []
    for path in folder.rglob("*"):
        if path.suffix in (".py", ".md", ".toml", ".yml"):
            told.append(path.read_text("utf-8"))
        elif path.suffix == ".ipynb":
            for c in json.loads(path.read_text("utf-8"))["cells"]:
                printed = ["".join(o.get("text", ())) for o in c.get("outputs", ())]
                told += ["".join(c["source"]), *printed]
    told = "\n".join(line.strip() for text in told for line in text.splitlines())
    assert not [body for body in bodies(blank) if body in told]
    shown = [body for body in bodies(names) if body in told]
    assert bool(shown) == (first != "masks")
    for absent in ("exercises/README.md", "exercises/RUBRIC.md", "tests/test_masks.py", ".git"):
        assert not (folder / absent).exists(), absent


def test_cells_that_print_bodies_are_replaced_by_a_note(course):
    """In notebook 2, `slots` and `append`; the rest of a cell stays, without what it printed."""
    cells = json.loads((course / "notebooks" / "02_cache.ipynb").read_text("utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    note = "*Exercise `kv_cache` asks for `kv_cache.RollingCache.slots`.*"
    assert sum(note in source for source in sources) == 1
    (rest,) = (cell for cell in cells if "shift_angles" in "".join(cell["source"]))
    assert rest["cell_type"] == "code" and not rest["outputs"]
    assert "getsource" not in "".join(rest["source"])


def test_right_answers_reach_every_point_in_the_copy(course, tmp_path):
    """All of them the full score, and `kv_cache` its own when it is the only one written."""
    for student, names in {"ada": list(EXERCISES), "bo": ["kv_cache"]}.items():
        (tmp_path / student).mkdir()
        for name in names:
            (tmp_path / student / f"{name}.py").write_text(source_of(name), "utf-8")
    told = python(course, "-m", "exercises", "--grade", tmp_path)
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text("utf-8").splitlines()))
    ada, bo = rows
    full = {name: str(exercise.points) for name, exercise in EXERCISES.items()}
    assert {name: ada[name] for name in EXERCISES} == full, told
    assert ada["total"] == ada["max"] == str(sum(map(int, full.values())))
    assert bo["kv_cache"] == bo["total"] == full["kv_cache"], told


def test_an_answer_and_a_notebook_run_in_a_blank_copy(course, tmp_path):
    """Right code stands behind both, from any folder."""
    python(course, "-m", "exercises", "kv_cache")
    answer = course / "answers" / "kv_cache.py"
    call = "    behind.stand_behind()\n"
    head = answer.read_text("utf-8").partition(call)[0]
    answer.write_text(head + call + source_of("kv_cache"), "utf-8")
    assert "during block 5: [0, 4, 5, 3]" in python(tmp_path, answer)
    assert "cells" in python(course, "notebooks/run.py", "--check", "01")


def test_a_hand_out_cannot_be_handed_out(tmp_path, monkeypatch):
    """It has no solutions to leave out, or to grade with; and nothing is overwritten."""
    with pytest.raises(ValueError, match="not empty"):
        handout.hand_out(coursework.ROOT, "masks")
    (pack := tmp_path / "reference.bin").write_bytes(behind.pack({}))
    monkeypatch.setattr(behind, "PACK", pack)
    for make in (lambda: handout.hand_out(tmp_path / "x", "masks"),
                 lambda: handout.zip_autograder(tmp_path / "x.zip")):  # fmt: skip
        with pytest.raises(ValueError, match="this copy is a hand-out"):
            make()


def test_imports_of_a_hand_out_are_filled_in(tmp_path, monkeypatch):
    """Only the bodies that the file lacks; the lines of tracebacks are those of the file."""
    blank = coursework.skeleton("masks", source_of("masks"))
    file = tmp_path / "masks.py"
    file.write_text(blank, "utf-8")
    loader = behind.Loader("masks", file, {"block_of_frame": "return frame / 0"})
    namespace = {"__name__": "masks"}
    exec(loader.get_code("masks"), namespace)
    with pytest.raises(NotImplementedError, match="may_attend is not written yet"):
        namespace["may_attend"](None, None)
    with pytest.raises(ZeroDivisionError) as error:
        namespace["block_of_frame"](1, 1, 1)
    line = blank.splitlines()[error.traceback[-1].lineno]
    assert "block_of_frame is not written yet" in line


def test_the_zip_file_grades_as_gradescope_runs_it(tmp_path):
    """setup.sh and run_autograder at the root; a submission gives results/results.json."""
    handout.zip_autograder(tmp_path / "autograder.zip")
    with zipfile.ZipFile(tmp_path / "autograder.zip") as archive:
        names = {"setup.sh", "run_autograder"}
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
        assert names <= set(modes) and all(modes[name] == 0o755 for name in names)
        archive.extractall(tmp_path / "source")
    for folder in ("submission", "results"):
        (tmp_path / folder).mkdir()
    wrong = source_of("masks").replace("k <= q", "k < q")
    (tmp_path / "submission" / "masks.py").write_text(wrong, "utf-8")
    (tmp_path / "submission" / "old").mkdir()
    (tmp_path / "submission" / "old" / "results.json").write_text('{"score": 1000}', "utf-8")
    python(tmp_path, tmp_path / "source" / "run_autograder", tmp_path)
    found = json.loads((tmp_path / "results" / "results.json").read_text("utf-8"))
    assert found["score"] == sum(test["score"] for test in found["tests"]) == 4
    assert sum(test["max_score"] for test in found["tests"]) == EXERCISES["masks"].points
    for test in found["tests"]:
        assert set(test) == {"name", "score", "max_score", "output", "visibility"}
        assert test["visibility"] == "visible"
    failed = [test["output"] for test in found["tests"] if not test["score"]]
    assert any("every token attends to every other one" in output for output in failed)
    (tmp_path / "submission" / "masks.py").unlink()  # nothing to grade
    python(tmp_path, tmp_path / "source" / "run_autograder", tmp_path)
    found = json.loads((tmp_path / "results" / "results.json").read_text("utf-8"))
    assert found["score"] == 0 and "expected" in found["output"]


def test_the_workflow_has_the_names_that_github_expects(course):
    """Workflow, job, and a command of this project."""
    text = (course / ".github" / "workflows" / "grade.yml").read_text("utf-8")
    assert text.count("\nname: Autograding Tests\n") == 1 and "\n  run-autograding-tests:\n" in text
    assert "python -m exercises --grade answers" in text
    assert "answers" not in (course / ".gitignore").read_text("utf-8")
