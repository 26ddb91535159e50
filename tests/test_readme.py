"""The pages tell the truth: paths exist, commands run, tables are those of the scripts."""

import json
import re
import sys
from pathlib import Path

import pytest
from helpers import ROOT, help_of, options_of
from order import ORDER

from benchmarks import training_memory

PAGES = (
    "README.md", "DIFFERENCES.md", "results/README.md", "full_size/README.md",
    "benchmarks/README.md", "exercises/README.md",
)  # fmt: skip
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
README, RESULTS = TEXTS["README.md"], TEXTS["results/README.md"]
HALL = {path.stem for path in ROOT.glob("*.py")} - {"conftest"}
FILE_TABLE = re.findall(r"^\| `(\w+)\.py` \|", README, re.MULTILINE)
MOST_WORDS = 1700  # of README.md


# ---- paths and names ----

FILE = r"`((?:\w+/)*\w+\.(?:py|cu|md|txt|toml|json|png|safetensors))`"


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    """Every link, as seen from the page, and every file that is named is in the repository."""
    text, folder = TEXTS[page], (ROOT / page).parent
    links = re.findall(r"\]\(([\w/.]+)\)", text)
    files = [name for name in re.findall(FILE, text) if "NAME" not in name]
    missing = [link for link in links if not (folder / link).exists()]
    missing += [f for f in files if not ((ROOT / f).exists() or (folder / f).exists())]
    assert links or files
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_named_functions_exist(page):
    """`masks.may_attend` in a text is a name that masks.py defines."""
    pairs = re.findall(r"`(\w+)\.(\w+)`", TEXTS[page])
    for module, name in (pair for pair in pairs if pair[0] in HALL and pair[1] != "py"):
        source = (ROOT / f"{module}.py").read_text()
        assert re.search(rf"^(def |class )?{name}\b", source, re.MULTILINE), f"{module}.{name}"


def test_the_first_screen_has_what_a_newcomer_needs():
    """Clip, command, paper, prerequisites and the place to start stand above the first section."""
    first = README.split("\n## ")[0]
    for needed in ("assets/clip.mp4", "assets/clip.png", "python generate.py", "Python 3.11",
                   "arxiv.org/abs/2603.11647", "notebooks/01_masks.ipynb"):  # fmt: skip
        assert needed in first


def test_the_readme_is_short():
    """Counted as `wc -w` does."""
    assert len(README.split()) <= MOST_WORDS


# ---- files and rooms ----


def test_the_file_table_lists_the_hall():
    """Exactly the top-level files, in the order of tests/order.py, which follows the imports."""
    assert set(FILE_TABLE) == HALL
    assert FILE_TABLE == [Path(f).stem for f in ORDER if "/" not in f and Path(f).stem in HALL]


def test_the_hall_does_not_draw():
    """Files that are read to learn leave matplotlib to the rooms."""
    drawing = re.compile(r"^\s*(import|from) matplotlib", re.MULTILINE)
    assert not [m for m in HALL if drawing.search((ROOT / f"{m}.py").read_text())]


def test_every_room_has_one_line():
    """Folders with code, and those with data, each have a bullet in README."""
    rooms = {path.parent.name for path in ROOT.glob("[a-z]*/*.py")} - {"answers", "runs"}
    rooms |= {"results", "weights", "assets"}
    assert sorted(re.findall(r"^\* `(\w+)/`: ", README, re.MULTILINE)) == sorted(rooms)


# ---- commands ----


def commands_of(text) -> set[str]:
    """What stands behind `python` or, in a training at full size, behind `$G`."""
    one_line = re.sub(r"(?<!`)`[^`]+`(?!`)", lambda code: " ".join(code[0].split()), text)
    found = re.findall(r"(?:\bpython|\$G) ((?:-m [\w.]+|[\w/]+\.py)[^#`\n&]*)", one_line)
    return {command.strip() for command in found}


OPTIONS_OF_PYTEST = ROOT / "conftest.py", *(ROOT / "exercises").glob("*.py")
COMMANDS = sorted(set().union(*map(commands_of, TEXTS.values())))


def script_of(words) -> str:
    """The file that a command runs.

    >>> script_of(["-m", "studies.evaluate", "--clips"]), script_of(["masks.py"])
    ('studies/evaluate.py', 'masks.py')
    """
    if words[0] != "-m":
        return words[0]
    place = words[1].replace(".", "/")
    return f"{place}/__main__.py" if (ROOT / place).is_dir() else f"{place}.py"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_accepted(command):
    """Every command names a script, options that it takes, and a choice that it has."""
    words = command.split()
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    if words[:2] == ["-m", "pytest"]:
        ours = "".join(path.read_text() for path in OPTIONS_OF_PYTEST)
        assert {o for o in given if f'"{o}"' not in ours} <= {"--dist", "--junit-xml"}
        return
    script = script_of(words).removeprefix("answers/")  # an answer is a module with holes
    assert (ROOT / script).exists()
    assert not given or given <= options_of(script)
    if script in ("studies/compare.py", "studies/ablations.py"):
        choice = words[2]
        assert re.search(rf"[{{,]{choice}[,}}]", help_of(script)), f"{script}: {choice}"


# ---- numbers ----


def quoted_rows() -> list[tuple[str, str]]:
    """Rows of result tables, with intervals, that a page quotes: (page, row)."""
    rows = [(p, line) for p, text in TEXTS.items() for line in text.splitlines() if " ± " in line]
    return [(page, line) for page, line in rows if line.startswith("| ")]


def test_quoted_rows_are_the_scripts():
    """A row that a page quotes is, to the letter, what a script wrote."""
    written = [line for path in (ROOT / "results").glob("*.md") if path.name != "README.md"
               for line in path.read_text().splitlines()]  # fmt: skip
    assert not [row for row in quoted_rows() if row[1] not in written]


def test_every_table_of_results_is_linked():
    """results/README.md leads to each table that a script wrote."""
    tables = {path.name for path in (ROOT / "results").glob("*.md")} - {"README.md"}
    assert tables <= set(re.findall(r"\]\((\w+\.md)\)", RESULTS))


SHORT_TABLE = {  # row of README: how the row of results/evaluation.json begins
    "teacher, 32 steps": "teacher, 32 steps",
    "stage I, 4 steps": "stage I, 4 steps",
    "stage I streamed": "stage I streamed",
    "stage II streamed": "ode_regression, 0-5 s",
    "stage III streamed": "self_forcing, 0-5 s",
}


def test_the_short_table_is_rounded_from_the_results():
    """Five rows of F1, onsets and whole balls, with two digits."""
    rows = json.loads((ROOT / "results" / "evaluation.json").read_text())["rows"]
    for name, start in SHORT_TABLE.items():
        (found,) = (row for key, row in rows.items() if key.startswith(start))
        cells = [f"{found[column][0]:.2f}" for column in ("f1", "onsets_rate", "whole")]
        assert f"| {' | '.join([name, *cells])} |" in README


def test_benchmark_numbers_are_the_scripts():
    """The speeds quoted are those of results/bench_toy.json."""
    bench = json.loads((ROOT / "results" / "bench_toy.json").read_text())
    stream, long, floor, prefix = (bench[part] for part in ("stream", "long", "floor", "prefix"))
    passes = f"{stream['passes_times_real_time']:.1f}× real time"
    blocks = ("first_full_window_ms", "blocks_50_to_60_ms", "blocks_590_to_600_ms")
    quoted = [
        f"passes | {passes} |",
        f"| end to end | {stream['end_to_end_times_real_time']:.1f}× real time |",
        f"| TTFC | {stream['ttfc_seconds']:.2f} s |",
        "| {:.0f}, {:.0f}, {:.0f} ms |".format(*(long[block] for block in blocks)),
        f"| {long['peak_memory_60_mb']:.0f}, {long['peak_memory_600_mb']:.0f} MB |",
        f"| {floor['floor_ms']:.0f} ms, {floor['block_ms']:.0f} ms |",
        *(
            f"| {who} | {row['passes_a_second']} | {row['times_real_time']:.1f}× |"
            for who, row in bench["cost"].items()
        ),
    ]
    for k in (10, 30):
        ratio = prefix["rerun_seconds"][k] / prefix["cached_seconds"][k]
        quoted.append(f"block {k} {'would take ' if k == 10 else ''}{ratio:.1f} times")
    flat = " ".join(RESULTS.split())
    assert not [text for text in quoted if text not in flat]


@pytest.mark.slow
def test_the_training_table_is_the_scripts(monkeypatch, capsys):
    """full_size/README.md has what `python -m benchmarks.training_memory` prints."""
    monkeypatch.setattr(sys, "argv", ["training_memory.py"])
    training_memory.main()
    assert capsys.readouterr().out.strip() in TEXTS["full_size/README.md"]


def test_in_that_table_only_students_are_averaged_and_teachers_do_not_learn():
    """As in the stages themselves; an average of the critic would take 75 GB."""
    kinds = {"teacher": None, "generator": True, "student": True, "critic": False}
    for nets, _ in training_memory.stages().values():
        found = {name: recipe and bool(recipe.ema) for name, _, recipe in nets}
        assert found.items() <= kinds.items()


def test_the_minutes_of_the_tests_are_measured():
    """As long as results/newcomer.json says."""
    seconds = json.loads((ROOT / "results" / "newcomer.json").read_text())["seconds"]
    assert f"{seconds['tests'] / 60:.0f} minutes on two cores" in README


def test_simplifications_are_told():
    """Every `# Simpler:` of the code is found in the table of differences."""
    code = [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py"), *ROOT.glob("kernel/*.cu")]
    code = [path for path in code if path.parent.name not in ("tests", "answers", "runs")]
    count = sum(path.read_text().count("# Simpler:") for path in code)
    assert TEXTS["DIFFERENCES.md"].count("`# Simpler:`") == count > 0
