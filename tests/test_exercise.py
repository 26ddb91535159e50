"""Coursework: skeletons earn nothing, the modules everything, and mistakes are named.

A grader is trusted for what it refuses. So every exercise is graded here as a student's would be,
by `pytest --exercise` in this process: empty, half done, right, and wrong in plausible ways.
"""

import contextlib
import io
import json

import pytest
from wrong_answers import WRONG

import exercise
from exercise import EXERCISES

# plugins of the outer run that must not be started twice, or collect garbage for longer than we test
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
