"""Coursework: skeletons earn nothing, the modules everything, and mistakes are named.

A grader is trusted for what it refuses. So every exercise is graded here as a student's would be,
by `pytest --exercise` in this process: empty, half done, right, and wrong in plausible ways.
"""

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys

import pytest
from helpers import run_here
from wrong_answers import WRONG

import kv_cache
import masks
import rope
from exercises import coursework as exercise
from exercises.coursework import EXERCISES

# plugins that must not run twice in a process, or that collect garbage for longer than a test takes
OFF = ("cacheprovider", "faulthandler", "unraisableexception", "threadexception")


def source_of(name):
    return (exercise.ROOT / f"{name}.py").read_text()


def pytest_here(*args):
    """Run pytest in this process: -> exit status and what it printed."""
    off = [option for p in OFF for option in ("-p", f"no:{p}")]
    settings = ["-c", str(exercise.ROOT / "pyproject.toml"), "--capture=no", "--color=no", *off]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(out):
            status = pytest.main([*settings, *args, str(exercise.ROOT)])
    return int(status), out.getvalue()


def grade(name, source, folder):
    """The score of an answer as it is written for the instructor, and what the student is told."""
    (folder / f"{name}.py").write_text(source)
    _, told = pytest_here(f"--exercise={name}", f"--answers={folder}")
    return json.loads((folder / f"{name}.score.json").read_text()), told


@pytest.mark.parametrize("name", EXERCISES)
def test_a_skeleton_earns_nothing_and_says_what_is_missing(name, tmp_path):
    """No test passes by accident: each fails because the function it grades is not written."""
    score, _ = grade(name, exercise.skeleton(name, source_of(name)), tmp_path)
    assert score["points"] == 0 and len(score["tests"]) == len(exercise.graded_tests(name))
    for row in score["tests"]:
        assert row["reason"] == f"{row['function']} is not written yet", row["test"]


@pytest.mark.parametrize("name", EXERCISES)
def test_the_module_itself_earns_everything(name, tmp_path):
    """The reference is a perfect answer."""
    score, told = grade(name, source_of(name), tmp_path)
    assert score["points"] == score["max"] == EXERCISES[name].points, told


@pytest.mark.parametrize("name", EXERCISES)
def test_a_function_is_graded_with_the_help_of_those_before_it_only(name, tmp_path):
    """With the first k functions written, exactly their points are earned, for every k."""
    tasks = EXERCISES[name].tasks
    for k in range(1, len(tasks)):
        folder = tmp_path / str(k)
        folder.mkdir()
        score, told = grade(name, exercise.skeleton(name, source_of(name), solved=k), folder)
        assert score["points"] == sum(task.points for task in tasks[:k]), told


@pytest.mark.parametrize("name, mistake", [(n, m) for n in WRONG for m in WRONG[n]])
def test_a_plausible_mistake_costs_points_and_is_named(name, mistake, tmp_path):
    """A single slip in the reference fails some test, whose message says what it means."""
    right, wrong, phrase = WRONG[name][mistake]
    assert source_of(name).count(right) == 1
    score, told = grade(name, source_of(name).replace(right, wrong), tmp_path)
    assert 0 < score["points"] < score["max"]
    assert phrase in told and any(phrase in (row["reason"] or "") for row in score["tests"]), told


# ---- the command line ----


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run exercises/coursework.py with answers in an empty folder: -> exit status, stdout, stderr."""
    monkeypatch.setattr(exercise, "ANSWERS", tmp_path)

    def main(*args):
        return run_here(exercise, args, monkeypatch, capsys)

    return main


def test_table_modules_and_tests_agree(run):
    """Every function exists, every test is marked, and points add up."""
    status, out, _ = run("--check")
    assert status == 0 and "10 exercises: table, modules and tests agree" in out


def test_a_table_that_does_not_fit_is_refused(run, monkeypatch):
    """A renamed function, other points and a missing module are each told in the one line."""
    right = EXERCISES["masks"]
    renamed = right.tasks[0]._replace(function="block_of_latent")
    heavier = right.tasks[3]._replace(points=7)
    wrong = right._replace(tasks=[renamed, *right.tasks[1:3], heavier, right.tasks[4]])
    monkeypatch.setattr(exercise, "EXERCISES", {"masks": wrong, "ropes": EXERCISES["rope"]})
    status, _, err = run("--check")
    assert status == 2 and err.count("\n") == 1
    for part in (
        "masks: there is no function block_of_latent",
        "grades block_of_frame, which is not in the table",
        "may_attend has 7 points in the table, 4 in its tests",
        "ropes: there is no ropes.py and no tests/test_graded_ropes.py",
    ):
        assert part in err


def test_a_started_exercise_is_the_module_but_for_its_bodies(run, tmp_path):
    """Everything else stands as it was, line by line; docstrings, too."""
    assert run("kv_cache")[0] == 0
    answer, module = (tmp_path / "kv_cache.py").read_text(), source_of("kv_cache")
    holes = {task.function for task in EXERCISES["kv_cache"].tasks}
    ours, theirs = exercise.functions_in(module), exercise.functions_in(answer)
    assert list(ours) == list(theirs)
    for name in ours:
        assert ast.get_docstring(ours[name]) == ast.get_docstring(theirs[name])
        is_same = ast.dump(ours[name]) == ast.dump(theirs[name])
        assert is_same == (name not in holes), name
    kept = set(module.splitlines())
    added = [line.strip() for line in answer.splitlines() if line not in kept]
    assert all(line.startswith(("#", "raise NotImplementedError")) for line in added)
    assert max(map(len, answer.splitlines())) <= 100
    assert exercise.skeleton("kv_cache", answer) == answer


def test_work_is_not_overwritten(run, tmp_path):
    """Without --force the second start is refused, and --all goes round what is started."""
    (tmp_path / "masks.py").write_text("my work")
    status, _, err = run("masks")
    assert status == 2 and "masks.py is there already; --force overwrites your work" in err
    run("--all")
    assert {p.stem for p in tmp_path.iterdir()} == set(EXERCISES)
    assert (tmp_path / "masks.py").read_text() == "my work"
    assert run("masks", "--force")[0] == 0 and "may_attend" in (tmp_path / "masks.py").read_text()


def test_hints_grow(run):
    """Three for every function, each another; the first is the default and in the skeleton."""
    for name, exercises in EXERCISES.items():
        for task in exercises.tasks:
            assert len(set(task.hints)) == 3 and all(task.hints)
    first, second = (run("--hint", "rollout.denoise", *depth)[1] for depth in ((), ("2",)))
    assert (first.strip(), second.strip()) == tuple(EXERCISES["dmd"].tasks[3].hints[:2])


def test_the_list_tells_how_far_one_is(run, tmp_path):
    """Not started, not graded, the latest score, and whether the answer is newer than that."""
    for name in ("rope", "model", "dmd"):
        run(name)
    for name in ("model", "dmd"):
        (tmp_path / f"{name}.score.json").write_text('{"points": 7, "max": 12}')
    os.utime(tmp_path / "dmd.py", (2**31, 2**31))
    _, out, _ = run("--list")
    for told in ("kv_cache", "not started"), ("rope", "not graded"), ("dmd", "7/12, edited since"):
        assert re.search(rf"^{told[0]} .*\({told[1]}\)$", out, re.MULTILINE), out
    assert re.search(r"^model .* 12 points .*\(7/12\)$", out, re.MULTILINE)


BAD = {
    "unknown exercise": (["mask"], "exercise 'mask': unknown; expected one of masks, rope"),
    "unknown function": (["--hint", "masks.x"], "expected masks. and one of block_of_frame"),
    "unknown hint": (["--hint", "m.x"], "exercise 'm': unknown"),
    "depth": (["--hint", "masks.may_attend", "4"], "expected a depth of 1, 2, 3"),
    "two depths": (["--hint", "rollout.denoise", "2", "3"], "denoise 2 3: expected one depth"),
    "handout": (["--handout", exercise.ROOT], "not empty"),
    "flag": (["--solve"], "unrecognized arguments: --solve"),
}


@pytest.mark.parametrize("args, message", BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line(run, args, message):
    """Exit status 2, and what would have been right."""
    status, out, err = run(*args)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err


# ---- grading ----


@pytest.mark.parametrize(
    "name, answer, message",
    [
        ("mask", None, "ERROR: exercise 'mask': unknown; expected one of masks"),
        ("masks", None, "masks.py: no such file; start with python -m exercises masks"),
        ("masks", "def f(:\n", "masks.py, line 1: invalid syntax"),
        ("masks", "x = 1\n", "no function block_of_frame; keep the skeleton's names"),
        (
            "masks",
            "import config_\n" + source_of("masks"),
            "masks.py cannot be imported: ModuleNotFoundError",
        ),
    ],
)
def test_what_cannot_be_graded_ends_in_one_line(name, answer, message, tmp_path):
    """Exit status 4, no score, and the modules of the project are back in their places."""
    if answer:
        (tmp_path / f"{name}.py").write_text(answer)
    status, told = pytest_here(f"--exercise={name}", f"--answers={tmp_path}")
    assert status == 4 and told.strip().count("\n") == 0 and message in told
    assert not list(tmp_path.glob("*.json"))
    assert sys.modules["masks"] is masks and sys.modules["kv_cache"] is kv_cache


def test_an_error_in_an_answer_is_told_with_its_line(tmp_path):
    """Where it happened and what Python says, in the table of points."""
    source = source_of("masks").replace("allowed = k <= q", "allowed = k <= query")
    line = 1 + source[: source.index("k <= query")].count("\n")
    score, told = grade("masks", source, tmp_path)
    assert f"line {line}: NameError: name 'query' is not defined" in told
    assert score["points"] == 4  # all before may_attend, which four_masks needs as well


def test_an_answer_without_what_its_tests_import_is_no_score(tmp_path):
    """The tests cannot even be collected: the reason is told, nothing is written."""
    (tmp_path / "kv_cache.py").write_text(source_of("kv_cache").replace("Heads", "Head"))
    status, told = pytest_here("--exercise=kv_cache", f"--answers={tmp_path}")
    assert status == 2 and "nothing is graded: ImportError: cannot import name 'Heads'" in told
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("only", ["-k token", "-x"])
def test_a_partial_run_writes_no_score(only, tmp_path):
    """Choosing tests, or stopping at the first failure, is for work in progress."""
    (tmp_path / "masks.py").write_text(source_of("masks").replace("k <= q", "k < q"))
    _, told = pytest_here("--exercise=masks", f"--answers={tmp_path}", *only.split())
    assert "not all tests ran: not written" in told
    assert not list(tmp_path.glob("*.json"))


def test_other_modules_get_the_answer_too(tmp_path):
    """Whoever imports rope while rope is graded gets the student's; afterwards, the original."""
    source = source_of("rope") + "\nimport kv_cache\nassert kv_cache.rope.__file__ == __file__\n"
    score, told = grade("rope", source, tmp_path)
    assert score["points"] == score["max"], told
    assert sys.modules["kv_cache"] is kv_cache and kv_cache.rope.__file__ == rope.__file__
    assert sys.modules["rope"] is rope


# ---- for instructors ----


def test_a_handout_has_no_solutions_from_the_exercise_on_and_grades(run, tmp_path):
    """From kv_cache on: earlier modules are whole, later ones blank, and grading works there."""
    folder = tmp_path / "course"
    assert run("kv_cache", "--handout", folder)[0] == 0
    names = list(EXERCISES)
    for name in names:
        is_whole = (folder / f"{name}.py").read_text() == source_of(name)
        assert is_whole == (names.index(name) < names.index("kv_cache"))
    told = "".join(path.read_text() for path in folder.glob("**/*.py"))
    assert "torch.set_grad_enabled(" not in told  # of rollout.denoise
    assert not (folder / "INSTRUCTORS.md").exists() and not (folder / ".git").exists()
    (folder / "exercises").mkdir()
    (folder / "exercises" / "kv_cache.py").write_text(source_of("kv_cache"))
    command = [sys.executable, "-m", "pytest", "--exercise", "kv_cache"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "15/15   exercises/kv_cache.score.json" in done.stdout


def test_the_instructors_table_is_the_scripts():
    """Ideas, points and minutes of INSTRUCTORS.md are those of exercises/table.toml."""
    text = (exercise.ROOT / "INSTRUCTORS.md").read_text()
    for name, ex in EXERCISES.items():
        worth = ", ".join(f"`{task.function}` {task.points}" for task in ex.tasks)
        row = f"| `{name}` | {ex.idea} | {ex.points} | {ex.minutes} | {worth} |"
        assert row in text, f"INSTRUCTORS.md should have the line\n{row}"


def test_the_instructors_options_exist(run):
    """Every option on the page is known to exercises/coursework.py or to pytest."""
    _, ours, _ = run("--help")
    _, pytests = pytest_here("--help")
    text = (exercise.ROOT / "INSTRUCTORS.md").read_text()
    assert set(re.findall(r"--\w+", text)) <= set(re.findall(r"--\w+", ours + pytests))
