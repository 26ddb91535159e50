"""Grade a class: each answer in a process of its own, with limits of time and memory.

An answer is a program. It may loop for ever, end its process, skip its tests, or fill the memory.
So another process imports it and tells, test by test, what happens. When it stops telling, it is
killed, and the test that it was in has no points. The next process goes on after this test.
"""

import concurrent.futures
import contextlib
import csv
import io
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from exercises import coursework
from exercises.grader import NOT_RUN, score_of
from plumbing import files

SECONDS = 20  # for a test, and for the import
MEMORY = 4 * 2**30  # bytes of data of a process


# ---- one answer, in a process of its own ----


class Teller:
    """A pytest plugin that tells another process what happens, beside the plugin that grades."""

    def __init__(self, pipe, done):
        self.pipe, self.done = pipe, done  # done: ids of tests that shall not run again

    def tell(self, **message):
        self.pipe.send_bytes(json.dumps(message).encode())  # JSON: a pickle would run code

    def grader(self, config):
        return config.pluginmanager.get_plugin("grader")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.nodeid not in self.done]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session):
        self.rows = self.grader(session.config).tests
        self.tell(tests=self.rows)

    def pytest_runtest_logstart(self, nodeid):
        self.tell(test=nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report):
        if report.when == "teardown":
            self.tell(ended=report.nodeid, row=self.rows[report.nodeid])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        self.tell(broken=self.grader(session.config).broken)


def tell_all(pipe, name, folder, done):
    """Grade an answer in this process."""
    if hasattr(os, "setsid"):
        os.setsid()  # so that programs which the answer starts can be stopped as well
        os.closerange(3, pipe.fileno())  # the answer gets no pipe of other processes
        os.closerange(pipe.fileno() + 1, 2**16)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    settings = ["-c", str(coursework.ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    teller = Teller(pipe, done)
    teller.tell(started=True)
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        options = [f"--exercise={name}", f"--answers={folder}", str(coursework.ROOT)]
        status = pytest.main([*settings, *options], plugins=[teller])
    if status == pytest.ExitCode.USAGE_ERROR:
        teller.tell(broken=errors.getvalue().strip().removeprefix("ERROR: "))


@contextlib.contextmanager
def telling(name, folder, done):
    """Yield the end of a pipe that another process writes to; stop this process afterwards."""
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:  # a process that has imported torch makes the others, in a moment
        context.set_forkserver_preload(["torch", "pytest"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=tell_all, args=(theirs, name, folder, done), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        with contextlib.suppress(ProcessLookupError, AttributeError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        ours.close()


def grade(name, folder, seconds=SECONDS) -> dict:
    """Grade folder/NAME.py, and return its score: as grader.py writes it, and a note."""
    rows, note = {}, "" if holds(folder, name) else "missing"
    while not note or rows:
        done = [test for test, row in rows.items() if row["reason"] != NOT_RUN]
        with telling(name, folder, done) as pipe:
            test, end = follow(pipe, rows, seconds)
        if test is None:
            note = (end or note).removeprefix(f"{coursework.shown(folder.resolve())}{os.sep}")
            break
        rows[test] |= {"points": 0, "reason": f"the answer {end}"}
        note = note or f"{rows[test]['function']} {end}"
        if end.startswith("takes"):  # the other tests of this function would take as long
            for row in rows.values():
                if row["function"] == rows[test]["function"] and row["reason"] == NOT_RUN:
                    row["reason"] = f"not run, because {rows[test]['test']} {end}"
    if note and not rows:
        rows = {"": {"function": "", "test": "all", "points": 0, "max": 0, "reason": note}}
    return score_of(name, rows.values()) | {"note": note}


def follow(pipe, rows, seconds) -> tuple[str | None, str | None]:
    """Enter what a process tells into `rows`.

    Returns the test in which it stopped, if any, and why nothing, or nothing more, is graded.
    """
    test, has_tests = None, False
    with contextlib.suppress(EOFError):
        pipe.recv_bytes()  # without a limit: on a busy machine, a process may start late
    while True:
        try:
            if not pipe.poll(seconds):
                end = f"takes longer than {seconds:g} seconds"
                break
            message = json.loads(pipe.recv_bytes())
            if "tests" in message:
                rows |= {id: row for id, row in message["tests"].items() if id not in rows}
                has_tests = True
            elif "test" in message:
                test = message["test"]
            elif "ended" in message:
                enter(rows[message["ended"]], message["row"])
                test = None
            elif message["broken"] or not unfinished(rows):
                return None, message["broken"]
            else:
                end = "ends the tests"  # by pytest.exit, or as Ctrl-C does
                break
        except (EOFError, ConnectionError):
            end = "ends the program"
            break
        except (OSError, ValueError, LookupError, TypeError):
            end = "writes into the grader's pipe"
            break
    if test is None and not has_tests:
        return None, f"{end} when it is imported"
    return test or next(iter(unfinished(rows)), None), end


def unfinished(rows) -> list[str]:
    return [id for id, row in rows.items() if row["reason"] == NOT_RUN]


def enter(row, told):
    """Enter a result, with no more points than the test has."""
    row |= {"points": min(int(told["points"]), row["max"]), "reason": told["reason"]}
    if "printed" in told:
        row["printed"] = [str(line) for line in told["printed"]]


# ---- a class ----


def submissions_in(folder) -> dict[str, Path]:
    """Return {student: folder of NAME.py}.  A student's answers may lie in a folder `answers`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--grade {folder}: expected a folder with one folder for each student")
    if (own := answers_of(folder)) and any(holds(own, name) for name in coursework.EXERCISES):
        return {folder.resolve().name: own}
    students = [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name[0] not in "._"]
    if not students:
        raise ValueError(f"--grade {folder}: holds no answers, and no folders of students")
    return {student.name: answers_of(student) for student in students}


def answers_of(folder) -> Path:
    has_inner = (folder / "answers").is_dir()
    return folder / "answers" if has_inner else folder


def holds(folder, name) -> bool:
    return (folder / f"{name}.py").exists()


def grade_class(folder, only=None, seconds=SECONDS) -> dict[str, dict[str, dict]]:
    """Grade all submissions, write the scores: {student: {exercise: score}}.

    Writes scores.csv into `folder`, and beside the answers NAME.score.json and results.json, which
    is what Gradescope reads. Scores of an earlier grading are removed first.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # many processes share the cores
    students = submissions_in(folder)
    names = [only] if only else list(coursework.EXERCISES)
    names = [n for n in names if only or any(holds(answers, n) for answers in students.values())]
    if only:
        coursework.find(only)
    for answers in students.values():
        for stale in [*answers.glob("*.score.json"), answers / "results.json"]:
            stale.unlink(missing_ok=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        graded = {
            student: {name: pool.submit(grade, name, answers, seconds) for name in names}
            for student, answers in students.items()
        }
        scores = {s: {n: job.result() for n, job in jobs.items()} for s, jobs in graded.items()}
    for student, answers in students.items():
        for name, score in scores[student].items():
            if holds(answers, name):
                files.write_json(answers / f"{name}.score.json", score)
        files.write_json(answers / "results.json", results(scores[student]))
    files.write_beside(Path(folder, "scores.csv"), lambda path: write_csv(path, scores))
    return scores


def rows_of(scores) -> list[list]:
    """Return a header and a row for each student: points, their sum, its maximum, notes."""
    names = list(next(iter(scores.values())))
    rows = [["student", *names, "total", "max", "note"]]
    for student, found in scores.items():
        points = [score["points"] for score in found.values()]
        notes = [f"{name}: {score['note']}" for name, score in found.items() if score["note"]]
        most = sum(score["max"] for score in found.values())
        rows.append([student, *points, sum(points), most, "; ".join(notes)])
    return rows


def write_csv(path, scores):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows_of(scores))


def table(scores) -> str:
    """Return the rows as text in columns."""
    rows = [[str(cell) for cell in row] for row in rows_of(scores)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for student, *points, note in rows:
        cells = [cell.rjust(width) for cell, width in zip(points, widths[1:])]
        lines.append("  ".join([student.ljust(widths[0]), *cells, note]).rstrip())
    return "\n".join(lines)


# ---- for other programs ----


def results(scores) -> dict:
    """Return the content of results.json, as Gradescope's autograder reads it."""
    # https://gradescope-autograders.readthedocs.io/en/latest/specs/
    tests = []
    for name, score in scores.items():
        for row in score["tests"]:
            output = [row["reason"] or "right", *row.get("printed", ())]
            tests.append({
                "name": f"{name}.{row['function']}: {row['test']}",
                "score": row["points"], "max_score": row["max"],
                "output": "\n".join(output), "visibility": "visible",
            })  # fmt: skip
    notes = [f"{name}: {score['note']}" for name, score in scores.items() if score["note"]]
    points = sum(score["points"] for score in scores.values())
    if not scores:
        notes = ["no answers found; expected files as in the hand-out, for example masks.py"]
    about = {"output": "\n".join(notes), "visibility": "visible"}
    return {"score": points, **about, "tests": tests}


def notices(scores) -> str:
    """Return what GitHub reads from the output of an action: points as two notices."""
    # As https://github.com/classroom-resources/autograding-grading-reporter reports them
    points = sum(score["points"] for score in scores.values())
    most = sum(score["max"] for score in scores.values())
    report = json.dumps({"totalPoints": points, "maxPoints": most})
    return (
        f"::notice title=Autograding complete::Points {points}/{most}\n"
        f"::notice title=Autograding report::{report}"
    )
