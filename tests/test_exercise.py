"""Exercises: a skeleton earns nothing, the module itself everything, and each mistake is named.

A grader is trusted for what it rejects. So every exercise is graded here: empty and right by
`pytest --exercise`, as a student would do it, but in this process, and half done by marking.py,
which is faster. test_answers.py has right and wrong answers.
"""

import ast
import contextlib
import importlib
import io
import json
import os
import re
import sys

import pytest
from helpers import help_of, run_here
from marking import mark, points, source_of

import kv_cache
from exercises import __main__ as command
from exercises import coursework
from exercises.coursework import EXERCISES

# plugins that must not run twice in a process, or whose garbage collection takes longer than a test
OFF = ("cacheprovider", "faulthandler", "unraisableexception", "threadexception")
INSTRUCTORS = (coursework.ROOT / "exercises" / "README.md").read_text()


def pytest_here(*args):
    """Run pytest in this process: -> exit status and its output."""
    off = [option for p in OFF for option in ("-p", f"no:{p}")]
    settings = ["-c", str(coursework.ROOT / "pyproject.toml"), "--capture=no", "--color=no", *off]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(out):
            status = pytest.main([*settings, *args, str(coursework.ROOT)])
    return int(status), out.getvalue()


def grade(name, source, folder):
    """Grade an answer: -> the score as it is written, and the output that the student sees."""
    (folder / f"{name}.py").write_text(source)
    _, told = pytest_here(f"--exercise={name}", f"--answers={folder}")
    return json.loads((folder / f"{name}.score.json").read_text()), told


@pytest.mark.parametrize("name", EXERCISES)
def test_a_skeleton_earns_nothing_and_names_what_is_missing(name, tmp_path):
    """No test passes by accident: each fails because the function that it grades is missing."""
    score, _ = grade(name, coursework.skeleton(name, source_of(name)), tmp_path)
    assert score["points"] == 0 and len(score["tests"]) == len(coursework.graded_tests(name))
    for row in score["tests"]:
        assert row["reason"] == f"{row['function']} is not written yet", row["test"]


@pytest.mark.parametrize("name", EXERCISES)
def test_a_function_needs_only_the_functions_before_it(name, tmp_path):
    """With the first k functions written, exactly their points are earned; with all, all points."""
    tasks = EXERCISES[name].tasks
    for k in range(1, len(tasks)):
        rows = mark(name, coursework.skeleton(name, source_of(name), solved=k))
        assert points(rows) == sum(task.points for task in tasks[:k]), rows
    answer = coursework.skeleton(name, source_of(name), solved=len(tasks))
    score, told = grade(name, answer, tmp_path)
    assert answer == source_of(name) and score["points"] == score["max"], told


# ---- the command line ----


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run `python -m exercises` with answers in an empty folder: -> exit status, stdout, stderr."""
    monkeypatch.setattr(coursework, "ANSWERS", tmp_path)

    def main(*args):
        return run_here(command, args, monkeypatch, capsys)

    return main


def test_table_modules_and_tests_agree(run):
    """Every function exists, every test has its points, and points add up."""
    status, out, _ = run("--check")
    assert status == 0 and "11 exercises: table, modules and tests agree" in out


def test_a_table_that_does_not_fit_is_an_error(run, monkeypatch):
    """A renamed function, other points and a missing module are each named, on one line."""
    right = EXERCISES["masks"]
    renamed = right.tasks[0]._replace(function="block_of_latent")
    heavier = right.tasks[3]._replace(points=7)
    wrong = right._replace(tasks=[renamed, *right.tasks[1:3], heavier, right.tasks[4]])
    missing = EXERCISES["rope"]._replace(module="film.ropes")
    monkeypatch.setattr(coursework, "EXERCISES", {"masks": wrong, "ropes": missing})
    status, _, err = run("--check")
    assert status == 2 and err.count("\n") == 1
    for part in (
        "masks: there is no function block_of_latent",
        "grades block_of_frame, which is not in the table",
        "may_attend has 7 points in the table, 4 in its tests",
        "ropes: there is no film/ropes.py and no tests/test_graded_ropes.py",
    ):
        assert part in err


def test_a_started_exercise_is_the_module_without_some_bodies(run, tmp_path):
    """Everything else is unchanged, line by line; docstrings may say more."""
    assert run("kv_cache")[0] == 0
    answer, module = (tmp_path / "kv_cache.py").read_text(), source_of("kv_cache")
    holes = {task.function for task in EXERCISES["kv_cache"].tasks}
    ours, theirs = coursework.functions_in(module), coursework.functions_in(answer)
    assert list(ours) == list(theirs)
    for name in ours:
        before, after = (ast.get_docstring(f[name]) or "" for f in (ours, theirs))
        assert after.startswith(before)
        is_same = ast.dump(ours[name]) == ast.dump(theirs[name])
        assert is_same == (name not in holes), name
    more = "\n".join(task.more for task in EXERCISES["kv_cache"].tasks)
    runnable = coursework.RUNNABLE.replace("NAME", "kv_cache")
    kept = {line.strip() for line in f'{module}\n{more}\n{runnable}\n"""'.splitlines()}
    added = [line.strip() for line in answer.splitlines()]
    added = [line for line in added if line not in kept and line + '"""' not in kept]
    assert all(line.startswith(("#", "raise NotImplementedError")) for line in added)
    assert max(map(len, answer.splitlines())) <= 100
    assert coursework.skeleton("kv_cache", answer) == answer


def test_work_is_not_overwritten(run, tmp_path):
    """A second start is an error without --force, and --all leaves started exercises alone."""
    (tmp_path / "masks.py").write_text("my work")
    status, _, err = run("masks")
    assert status == 2 and "masks.py exists already; --force overwrites your work" in err
    run("--all")
    assert {p.stem for p in tmp_path.iterdir()} == set(EXERCISES)
    assert (tmp_path / "masks.py").read_text() == "my work"
    assert run("masks", "--force")[0] == 0 and "may_attend" in (tmp_path / "masks.py").read_text()


def test_hints_become_clearer(run):
    """There are three different ones per function; the first is the default."""
    for exercise in EXERCISES.values():
        for task in exercise.tasks:
            assert len(set(task.hints)) == 3 and all(task.hints)
    first, second = (run("--hint", "rollout.denoise", *depth)[1] for depth in ((), ("2",)))
    assert (first.strip(), second.strip()) == tuple(EXERCISES["rollout"].tasks[3].hints[:2])


def test_the_list_shows_the_progress(run, tmp_path):
    """Not started, not graded, the latest score, and whether the answer was edited after it."""
    for name in ("rope", "model", "dmd"):
        run(name)
    for name in ("model", "dmd"):
        (tmp_path / f"{name}.score.json").write_text('{"points": 7, "max": 12}')
    os.utime(tmp_path / "dmd.py", (2**31, 2**31))
    _, out, _ = run("--list")
    for told in ("kv_cache", "not started"), ("rope", "not graded"), ("dmd", "7/12, edited since"):
        assert re.search(rf"^{told[0]} .*\({told[1]}\)$", out, re.MULTILINE), out
    assert re.search(r"^model .* 13 points .*\(7/12\)$", out, re.MULTILINE)


BAD = {
    "unknown exercise": (["mask"], "exercise 'mask': unknown; expected one of masks, rope"),
    "unknown function": (["--hint", "masks.x"], "expected masks. and one of block_of_frame"),
    "unknown hint": (["--hint", "m.x"], "exercise 'm': unknown"),
    "depth": (["--hint", "masks.may_attend", "4"], "expected a depth of 1, 2, 3"),
    "two depths": (["--hint", "rollout.denoise", "2", "3"], "denoise 2 3: expected one depth"),
    "handout": (["--handout", coursework.ROOT], "not empty"),
    "flag": (["--solve"], "unrecognized arguments: --solve"),
}


@pytest.mark.parametrize("args, message", BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line(run, args, message):
    """Exit status 2, and the expected input."""
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
        ("masks", "import config_\n{}", "masks.py cannot be imported: ModuleNotFoundError"),
        ("decoders", "import config_\n{}", "decoders.py cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_file_that_cannot_be_graded_ends_in_one_line(name, answer, message, tmp_path):
    """Exit status 4, no score, and the modules of the project are back in their places."""
    before = dict(sys.modules)
    if answer:
        (tmp_path / f"{name}.py").write_text(answer.replace("{}", source_of(name)))
    status, told = pytest_here(f"--exercise={name}", f"--answers={tmp_path}")
    assert status == 4 and told.strip().count("\n") == 0 and message in told
    assert not list(tmp_path.glob("*.json"))
    for module in ("masks", "kv_cache", "film", "film.decoders", "exercises.coursework"):
        assert sys.modules.get(module) is before.get(module)


def test_an_error_in_an_answer_is_reported_with_its_line(tmp_path):
    """The table of points has the line number and Python's message."""
    source = source_of("masks").replace("allowed = k <= q", "allowed = k <= query")
    line = 1 + source[: source.index("k <= query")].count("\n")
    score, told = grade("masks", source, tmp_path)
    assert f"line {line}: NameError: name 'query' is not defined" in told
    assert score["points"] == 4  # all before may_attend, which four_masks needs as well


def test_an_answer_without_the_names_that_tests_import_has_no_score(tmp_path):
    """The tests cannot be collected: the reason is printed, nothing is written."""
    (tmp_path / "kv_cache.py").write_text(source_of("kv_cache").replace("Heads", "Head"))
    status, told = pytest_here("--exercise=kv_cache", f"--answers={tmp_path}")
    assert status == 2 and "nothing is graded: ImportError: cannot import name 'Heads'" in told
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("only", ["-k token", "-x"])
def test_a_partial_run_writes_no_score(only, tmp_path):
    """Choosing tests, or stopping at the first failure, is for work in progress."""
    (tmp_path / "masks.py").write_text(source_of("masks").replace("k <= q", "k < q"))
    _, told = pytest_here("--exercise=masks", f"--answers={tmp_path}", *only.split())
    assert "not written, because not all tests ran" in told
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    "name, check",
    [
        ("rope", "import kv_cache\nassert kv_cache.rope.__file__ == __file__\n"),
        (
            "decoders",
            "import film.decoders\nfrom film import decoders\nfrom toy import source\n"
            "assert film.decoders.__file__ == decoders.__file__ == __file__\n"
            "assert source.ToyDecoder is ToyDecoder\n",
        ),
    ],
)
def test_other_modules_get_the_answer_too(name, check, tmp_path):
    """All importers of the module get the student's file while it is graded, then the original."""
    module = importlib.import_module(EXERCISES[name].module)
    score, told = grade(name, f"{source_of(name)}\n{check}", tmp_path)
    assert score["points"] == score["max"], told
    assert importlib.import_module(EXERCISES[name].module) is module
    room, _, short = EXERCISES[name].module.rpartition(".")
    assert not room or getattr(sys.modules[room], short) is module
    assert sys.modules["kv_cache"] is kv_cache


# ---- for instructors ----


def test_the_table_of_the_instructors_page_is_complete():
    """Ideas, points and minutes of exercises/README.md are those of exercises/table.toml."""
    for name, ex in EXERCISES.items():
        worth = ", ".join(f"`{task.function}` {task.points}" for task in ex.tasks)
        row = f"| `{name}` | {ex.idea} | {ex.points} | {ex.minutes} | {worth} |"
        assert row in INSTRUCTORS, f"exercises/README.md should have the line\n{row}"


def test_the_options_of_the_instructors_page_exist(run):
    """Every option on the page is one of `python -m exercises`, the leaderboard, or pytest."""
    _, ours, _ = run("--help")
    _, pytests = pytest_here("--help")
    known = ours + pytests + help_of("exercises/leaderboard.py")
    assert set(re.findall(r"--\w+", INSTRUCTORS)) <= set(re.findall(r"--\w+", known))
