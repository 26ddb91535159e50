"""A class is graded: every answer in a process of its own, whatever it does."""

import json
import pickle
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as xml

import pytest
import rubric
from test_exercise import pytest_here

from exercises import classroom, coursework, grader, reward
from exercises.coursework import EXERCISES

SOURCE = EXERCISES["masks"].file.read_text("utf-8")
PAGE = (coursework.ROOT / "exercises" / "README.md").read_text("utf-8")
FIRST = "    q, k = query_blocks"  # of the body of may_attend


def patched(old, new):
    assert SOURCE.count(old) == 1
    return SOURCE.replace(old, new)


def does(code):
    """Return an answer that first does this in may_attend."""
    return patched(FIRST, f"    {code}\n{FIRST}")


def save(folder, answers):
    for student, answer in answers.items():
        data = answer if isinstance(answer, bytes) else answer.encode()
        (folder / student).mkdir()
        (folder / student / "masks.py").write_bytes(data)


def points_of(scores, student):
    return scores[student]["masks"]["points"]


# ---- the page for instructors ----

TEN = {
    "ada": SOURCE,
    "bea": coursework.skeleton("masks", SOURCE),
    "cem": coursework.skeleton("masks", SOURCE, solved=3),
    "dan": patched("k <= q", "k >= q"),
    "eva": patched("may_attend(audio, video, window)", "may_attend(audio, video)"),
    "fay": "<<<<<<< HEAD\n" + SOURCE,
    "gil": patched(
        "    video = video_token", "    while True:\n        pass\n    video = video_token"
    ),
    "hal": does("import os; os._exit(0)"),
    "ian": SOURCE.encode("utf-16"),
    "jo": SOURCE.encode("utf-8-sig"),
}


def commands():
    """Return the commands of the page with the lines that they print."""
    blocks = "".join(re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL))
    for text in blocks.split("$ ")[1:]:
        command, *lines = text.splitlines()
        yield command, [line.strip() for line in lines if line.strip()]


def test_an_instructors_day(tmp_path):
    """Hand out, answer, grade ten submissions, of them four broken, collect: as the page says."""
    (tmp_path / "submissions").mkdir()
    save(tmp_path / "submissions", TEN)
    cwd, seen = coursework.ROOT, 0
    for command, expected in commands():
        here = command.replace("../", f"{tmp_path}/")
        words = shlex.split(here)
        if words[0] == "cd":
            cwd = words[1]
            continue
        if "--grade" in words:  # with the instructor's copy
            cwd = coursework.ROOT
        assert words[0] == "python"
        run = [sys.executable, *words[1:]]
        done = subprocess.run(run, cwd=cwd, capture_output=True, text=True)
        printed = [line.strip() for line in done.stdout.replace(str(tmp_path), "..").splitlines()]
        assert [line for line in expected if line in printed] == expected, done.stdout + done.stderr
        seen += 1
    assert seen == 5
    rows = (tmp_path / "submissions" / "scores.csv").read_text("utf-8").splitlines()
    assert len(rows) == 11 and rows[0] == "student,masks,total,max,note"


def test_the_rubric_is_that_of_the_tables():
    """Claims, mistakes and graded samples of exercises/RUBRIC.md."""
    assert rubric.PAGE.read_text("utf-8") == rubric.page(), "run: python tests/rubric.py"


# ---- answers that are no answers ----

ODD = {  # -> points, note
    "skips": (does("import pytest; pytest.skip('too hard')"), 4, ""),
    "ends all tests": (does("import pytest; pytest.exit('bye')"), 4, "may_attend ends the tests"),
    "interrupts": (does("raise KeyboardInterrupt"), 4, "may_attend ends the tests"),
    "ends on import": ("import os; os._exit(0)\n" + SOURCE, 0, "ends the program when it is impor"),
    "skips on import": ("import pytest; pytest.skip('x')\n" + SOURCE, 0, "cannot be imported: Sk"),
    "fills the memory": (does("torch.ones(2**31)"), 4, ""),
    "is a pickle": (pickle.dumps({"points": 10}), 0, "masks.py is a pickle, which nothing here op"),
    "holds zeros": (SOURCE.encode() + b"\0", 0, "masks.py is not text; expected Python in UTF-8"),
    "disturbs": (
        "import os\nfor pipe in range(3, 99):\n    try:\n        os.write(pipe, b'\\0\\0\\0\\1x')\n"
        "    except OSError:\n        pass\n" + SOURCE, 0, "writes into the grader's pipe",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """The scores of odd answers, and their folder."""
    folder = tmp_path_factory.mktemp("odd")
    save(folder, {student: answer for student, (answer, _, _) in ODD.items()})
    (folder / "sends a score" / "answers").mkdir(parents=True)
    for name in ("masks.score.json", "results.json"):
        (folder / "sends a score" / "answers" / name).write_text('{"points": 10, "score": 10}')
    return classroom.grade_class(folder, "masks"), folder


@pytest.mark.parametrize("student", ODD)
def test_an_odd_answer_is_treated_as_what_it_is(student, graded):
    """It keeps the points of the other functions, and the note says what it did."""
    score = graded[0][student]["masks"]
    _, points, note = ODD[student]
    assert score["points"] == points and note in score["note"], score
    assert bool(note) == bool(score["note"])


def test_the_reasons_of_a_skip_and_of_a_full_memory_are_told(graded):
    """In the row of each test."""
    for student, told in {"skips": "skips the test", "fills the memory": "memory"}.items():
        rows = graded[0][student]["masks"]["tests"]
        reasons = {row["reason"] for row in rows if row["function"] == "may_attend"}
        assert reasons and all(told in reason for reason in reasons)


def test_stale_scores_are_removed(graded):
    """A student who sends a score but no answer has none afterwards."""
    scores, folder = graded
    assert scores["sends a score"]["masks"]["note"] == "missing"
    assert not list(folder.glob("*/answers/*.score.json"))
    assert json.loads((folder / "sends a score/answers/results.json").read_text())["score"] == 0


def test_the_process_of_an_answer_leaves_nothing_behind(tmp_path):
    """A program that an answer has started is stopped with it."""
    started = "import pathlib, subprocess; p = subprocess.Popen(['sleep', '99']); "
    save(
        tmp_path,
        {"a": does(f"{started}pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(p.pid))")},
    )
    assert classroom.grade("masks", tmp_path / "a")["points"] == 10
    state = subprocess.run(["ps", "-o", "stat=", (tmp_path / "pid").read_text()],
                           capture_output=True, text=True).stdout  # fmt: skip
    assert not state.strip() or state.startswith("Z")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: folder / "nowhere", "expected a folder with one folder for each student"),
        (lambda folder: folder, "holds no answers, and no folders of students"),
    ],
)
def test_a_folder_without_submissions_is_an_error(make, message, tmp_path):
    """Named on one line, before anything is graded."""
    with pytest.raises(ValueError, match=message):
        classroom.grade_class(make(tmp_path))


def test_github_reads_the_points_from_two_notices():
    """As its own reporter of Classroom writes them."""
    scores = {"masks": grader.score_of("masks", [])}
    assert classroom.notices(scores).splitlines() == [
        "::notice title=Autograding complete::Points 0/10",
        '::notice title=Autograding report::{"totalPoints": 0, "maxPoints": 10}',
    ]


# ---- working at it ----


def test_one_function_is_graded_alone(tmp_path):
    """`--exercise masks.four_masks` runs its tests, prints their points, and writes no score."""
    (tmp_path / "masks.py").write_text(SOURCE)
    status, told = pytest_here("--exercise=masks.four_masks", f"--answers={tmp_path}")
    assert status == 0 and "four_masks                       2/2" in told
    assert "may_attend" not in told and not list(tmp_path.glob("*.json"))
    status, told = pytest_here("--exercise=masks.five_masks", f"--answers={tmp_path}")
    assert status == 4 and "--exercise masks.five_masks: expected masks. and one of block" in told


def test_prints_of_failing_tests_are_shown(tmp_path):
    """Beside the reason, in the score as well; those of passing tests are not."""
    wrong = does("print('keys', len(key_blocks))").replace("k <= q", "k < q")
    wrong = wrong.replace("    later = 1", "    print('a frame')\n    later = 1")
    (tmp_path / "masks.py").write_text(wrong)
    _, told = pytest_here("--exercise=masks", f"--answers={tmp_path}", "--capture=sys")
    assert "printed: keys 9" in told
    rows = json.loads((tmp_path / "masks.score.json").read_text())["tests"]
    assert {"keys 9"} <= {line for row in rows for line in row.get("printed", ())}
    assert not [row for row in rows if row["points"] and "printed" in row]


def test_junit_has_the_points(tmp_path):
    """Earned and possible ones, as properties of each test."""
    (tmp_path / "masks.py").write_text(patched("k <= q", "k < q"))
    pytest_here("--exercise=masks", f"--answers={tmp_path}", f"--junit-xml={tmp_path}/masks.xml")
    found = {"points": 0, "max_points": 0}
    for row in xml.parse(tmp_path / "masks.xml").iter("property"):
        found[row.get("name")] += int(row.get("value"))
    assert found == {"points": 4, "max_points": 10}


# ---- the reward ----


def test_a_film_by_right_answers_has_every_byte_right(tmp_path, monkeypatch):
    """The film is made by the answers, in the hall and in a room."""
    monkeypatch.setattr(coursework, "ANSWERS", tmp_path)
    with pytest.raises(ValueError, match="--film: no answers yet"):
        reward.report()
    for name in ("kv_cache", "decoders"):
        source = EXERCISES[name].file.read_text("utf-8")
        trace = f"import pathlib\npathlib.Path({str(tmp_path / name)!r}).touch()\n"
        (tmp_path / f"{name}.py").write_text(source + trace)
    told = reward.report()
    assert told == "made by your kv_cache, decoders\nevery byte of picture and sound is right"
    assert (tmp_path / "kv_cache").exists() and (tmp_path / "decoders").exists()
    assert (tmp_path / "film.mp4").stat().st_size > 10_000
