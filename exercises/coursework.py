"""Coursework: modules with holes to fill in, hints, and what each hole is worth.

    python -m exercises masks                       write exercises/masks.py, masks.py with holes
    python -m pytest --exercise masks              grade it, function by function
    python -m exercises --hint masks.may_attend 2   a hint; there are three, each tells more
    python -m exercises --list                      all exercises, and how far you are

The solution is the module itself, so a skeleton is never maintained, only made: signatures,
docstrings and everything around stay, and the body of every function of `exercises/table.toml` becomes
a hint and an error. Write the bodies in `exercises/NAME.py` in the order of the table, easy to
hard: a function is graded with the help of those before it, never of those after it.

Grading (conftest.py) puts your file in the place of the module, for the tests and for all other
modules. A test says whom it grades, `@pytest.mark.points(2, "may_attend")`, and stands in
`tests/test_graded_NAME.py`; its expectation never comes from code that you replace.
"""

import ast
import json
import shutil
import textwrap
import tomllib
from pathlib import Path
from typing import NamedTuple

from plumbing import cli, files

ROOT = Path(__file__).parent.parent
ANSWERS = ROOT / "answers"
HANDED_OUT = (
    "*.py", "*.toml", "requirements*.txt", "README.md", "LICENSE", "NOTICE", ".gitignore",
    "assets/*", "results/*", "weights/*", "tests/test_graded_*.py",
)  # fmt: skip


# ---- the table ----


class Task(NamedTuple):
    """One body to write."""

    function: str  # a function of the module, or Class.method
    points: int
    hints: list[str]  # three


class Exercise(NamedTuple):
    """The bodies to write in one module, easy to hard."""

    idea: str
    minutes: int
    tasks: list[Task]

    @property
    def points(self) -> int:
        return sum(task.points for task in self.tasks)


def read_table() -> dict[str, Exercise]:
    """The exercises of exercises/table.toml by name, which is the module's."""
    table = tomllib.loads((ROOT / "exercises" / "table.toml").read_text())
    return {
        name: Exercise(
            row["idea"],
            row["minutes"],
            [
                Task(function, task["points"], [" ".join(hint.split()) for hint in task["hints"]])
                for function, task in row["tasks"].items()
            ],
        )
        for name, row in table.items()
    }


EXERCISES = read_table()


def find(name) -> Exercise:
    """The exercise of that name.  Raises ValueError, listing the known ones."""
    if name not in EXERCISES:
        raise ValueError(f"exercise {name!r}: unknown; expected one of {', '.join(EXERCISES)}")
    return EXERCISES[name]


# ---- skeletons ----


def functions_in(source) -> dict[str, ast.FunctionDef]:
    """Functions of a module by name, methods as Class.method.

    >>> list(functions_in("def f(): pass\\nclass C:\\n    def g(self): pass"))
    ['f', 'C.g']
    """
    found = {}
    for node in ast.parse(source).body:
        is_class = isinstance(node, ast.ClassDef)
        for f in node.body if is_class else [node]:
            if isinstance(f, ast.FunctionDef):
                found[f"{node.name}.{f.name}" if is_class else f.name] = f
    return found


def body_lines(node) -> slice:
    """Lines of a function behind its docstring, as indices from 0."""
    has_docstring = ast.get_docstring(node) is not None
    first = node.body[0].end_lineno if has_docstring else node.body[0].lineno - 1
    return slice(first, node.end_lineno)


def stub(name, task, indent) -> list[str]:
    """What stands in a skeleton instead of a body: the first hint, and an error."""
    hint = textwrap.wrap(f"{plural(task.points, 'point')}. {task.hints[0]}", 98 - indent)
    lines = [*hint, f"More: python -m exercises --hint {name}.{task.function} 2"]
    error = f'raise NotImplementedError("{task.function} is not written yet")'
    return [" " * indent + line for line in (*(f"# {line}" for line in lines), error)]


def skeleton(name, source, solved=0) -> str:
    """The source of a module without the bodies of its exercise; the first `solved` are left in."""
    lines, nodes = source.splitlines(), functions_in(source)
    holes = [(nodes[task.function], task) for task in find(name).tasks[solved:]]
    # from the last to the first, or the line numbers of later ones would be wrong
    for node, task in sorted(holes, key=lambda hole: -hole[0].lineno):
        lines[body_lines(node)] = stub(name, task, node.body[0].col_offset)
    return "\n".join(lines) + "\n"


def start(name, force=False) -> Path:
    """Write the skeleton of an exercise.

    Raises ValueError if there is an answer already, unless `force`.
    """
    find(name)
    answer = ANSWERS / f"{name}.py"
    if answer.exists() and not force:
        raise ValueError(f"{shown(answer)} is there already; --force overwrites your work")
    text = skeleton(name, (ROOT / f"{name}.py").read_text())
    files.write_beside(answer, lambda path: path.write_text(text))
    return answer


def check_answer(name, answer):
    """Raises ValueError if an answer is not there, no Python, or lacks one of its functions."""
    tasks = find(name).tasks
    if not answer.exists():
        raise ValueError(f"{shown(answer)}: no such file; start with python -m exercises {name}")
    try:
        found = functions_in(answer.read_text())
    except SyntaxError as error:
        raise ValueError(f"{shown(answer)}, line {error.lineno}: {error.msg}") from None
    if missing := [task.function for task in tasks if task.function not in found]:
        raise ValueError(f"{shown(answer)}: no function {missing[0]}; keep the skeleton's names")


def shown(path) -> str:
    """A path as it is told: from the root of the project if it lies there."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


# ---- hints and progress ----


def plural(n, noun) -> str:
    """A number and what it counts.

    >>> plural(1, "point"), plural(3, "point")
    ('1 point', '3 points')
    """
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def hint(what, depth=1) -> str:
    """A hint for "NAME.function": 1 says where to look, 2 how to go about it, 3 nearly the code.

    Raises ValueError for an unknown exercise or function, listing the known ones, or depth.
    """
    name, _, function = what.partition(".")
    hints = {task.function: task.hints for task in find(name).tasks}
    if function not in hints:
        raise ValueError(f"--hint {what}: expected {name}. and one of {', '.join(hints)}")
    depths = [str(i + 1) for i in range(len(hints[function]))]
    if str(depth) not in depths:
        raise ValueError(f"--hint {what} {depth}: expected a depth of {', '.join(depths)}")
    return hints[function][int(depth) - 1]


def progress(name) -> str:
    """How far an answer is: "not started", "not graded", or its points when last graded."""
    answer, score = ANSWERS / f"{name}.py", ANSWERS / f"{name}.score.json"
    if not answer.exists():
        return "not started"
    if not score.exists():
        return "not graded"
    found = json.loads(score.read_text())
    edited = answer.stat().st_mtime > score.stat().st_mtime
    return f"{found['points']}/{found['max']}" + (", edited since" if edited else "")


def overview() -> str:
    """The table of exercises, as `--list` prints it."""
    lines = []
    for name, ex in EXERCISES.items():
        what = f"{ex.points:3} points {ex.minutes:4} minutes"
        lines.append(f"{name:15} {what}   {ex.idea} ({progress(name)})")
        worth = ", ".join(f"{task.function} {task.points}" for task in ex.tasks)
        lines += textwrap.wrap(worth, 98, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


# ---- the table, the modules and the tests agree ----


def graded_file(name) -> Path:
    """The tests that give points in an exercise."""
    return ROOT / "tests" / f"test_graded_{name}.py"


def graded_tests(name) -> dict[str, tuple[int, str]]:
    """Tests of an exercise: name -> points and the function that is graded; (0, "") if unmarked."""
    found = {}
    for test, node in functions_in(graded_file(name).read_text()).items():
        if test.startswith("test_"):
            marks = [d for d in node.decorator_list if isinstance(d, ast.Call)]
            marks = [m.args for m in marks if ast.unparse(m.func) == "pytest.mark.points"]
            found[test] = tuple(map(ast.literal_eval, marks[0])) if marks else (0, "")
    return found


def problems() -> list[str]:
    """What is wrong with the table, one line each; nothing is as it should be."""
    return [f"{name}: {line}" for name in EXERCISES for line in _problems(name)]


def _problems(name):
    module = ROOT / f"{name}.py"
    if missing := [shown(path) for path in (module, graded_file(name)) if not path.exists()]:
        return [f"there is no {' and no '.join(missing)}"]
    nodes, tests = functions_in(module.read_text()), graded_tests(name)
    worth = {task.function: task.points for task in find(name).tasks}
    found = [
        f"{test} grades {function or 'nothing'}, which is not in the table"
        for test, (_, function) in tests.items()
        if function not in worth
    ]
    for function, points in worth.items():
        graded = sum(n for n, f in tests.values() if f == function)
        if graded != points:
            found.append(f"{function} has {points} points in the table, {graded} in its tests")
        if function not in nodes:
            found.append(f"there is no function {function}")
        elif nodes[function].lineno == nodes[function].body[0].lineno:
            found.append(f"{function} has its body on the line of its def")
    return found


# ---- for instructors ----


def hand_out(folder, first):
    """Copy the project for students, without the bodies of exercise `first` and all that follow.

    Exercises stand in the order of the imports: what comes before is needed, and may be read by
    then. The ordinary tests and the instructor's page stay behind, for they tell the solutions.

    Raises ValueError if there is something in the folder already.
    """
    names, folder = list(EXERCISES), Path(folder)
    blank = names[names.index(first) :]
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--handout {folder}: not empty")
    for source in (path for pattern in HANDED_OUT for path in ROOT.glob(pattern)):
        target = folder / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.stem in blank and source.parent == ROOT:
            target.write_text(skeleton(source.stem, source.read_text()))
        else:
            shutil.copyfile(source, target)


def main():
    p = cli.parser(__doc__)
    p.add_argument("name", nargs="?", help="exercise to start")
    p.add_argument("--force", action="store_true", help="start over: overwrite your work")
    p.add_argument("--list", action="store_true", help="all exercises and how far you are")
    p.add_argument(
        "--all", action="store_true", help="start every exercise that is not started yet"
    )
    p.add_argument("--hint", nargs="+", metavar="NAME.function", help="and a depth, 1 to 3")
    p.add_argument(
        "--handout", metavar="FOLDER", help="copy the project without NAME and the exercises after"
    )
    p.add_argument("--check", action="store_true", help="compare table, modules and tests")
    args = p.parse_args()
    if args.hint:
        if len(args.hint) > 2:
            raise ValueError(f"--hint {' '.join(args.hint)}: expected one depth")
        print(hint(*args.hint))
    elif args.check:
        if found := problems():
            raise ValueError("; ".join(found))
        print(f"{plural(len(EXERCISES), 'exercise')}: table, modules and tests agree")
    elif args.handout:
        first = args.name or next(iter(EXERCISES))
        find(first)
        hand_out(args.handout, first)
        print(f"wrote {args.handout}: {first} and all exercises after it are blank")
    elif args.list or not (args.name or args.all):
        print(overview())
    else:
        unstarted = [name for name in EXERCISES if not (ANSWERS / f"{name}.py").exists()]
        for name in [args.name] if args.name else unstarted:
            answer = shown(start(name, args.force))
            print(f"wrote {answer}; grade it: python -m pytest --exercise {name}")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
