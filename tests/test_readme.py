"""The READMEs tell the truth: paths exist, commands run, tables are the scripts'."""

import json
import re

import pytest
from helpers import ROOT, options_of

from studies import charts

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "results" / "README.md").read_text()
TABLE = dict(re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", README, re.MULTILINE))
CODE = (README + RESULTS).replace("```", "\n")
ON_ONE_LINE = re.sub(r"`[^`]*`", lambda code: " ".join(code[0].split()), CODE)  # inline code
COMMANDS = sorted(set(re.findall(r"python ((?:benchmarks/)?\w+\.py[^#`\n]*)", ON_ONE_LINE)))


@pytest.mark.parametrize("text, folder", [(README, ROOT), (RESULTS, ROOT / "results")])
def test_paths_exist(text, folder):
    """Every picture, as seen from the page, and every file named is in the repository."""
    pictures = re.findall(r"\]\(([\w/.]+)\)", text)
    named = re.findall(r"`((?:\w+/)*\w+\.(?:py|md|txt|json|png|safetensors))`", text)
    produced = {"out.png"}  # written by a command
    paths = [folder / p for p in pictures] + [ROOT / p for p in named if p not in produced]
    assert pictures and not [p for p in paths if not p.exists()]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_accepted(command):
    """Every command of the READMEs names a script, and options that it takes."""
    script, *options = command.split()
    assert (ROOT / script).exists()
    if flags := {o for o in options if o.startswith("--")}:
        assert flags <= options_of(script)


def test_line_counts():
    """The table's line counts are right to within a tenth."""
    assert len(TABLE) >= 15
    for file, lines in TABLE.items():
        actual = len((ROOT / file).read_text().splitlines())
        assert abs(actual - int(lines)) <= 0.1 * actual, f"{file} has {actual} lines"


def test_reading_order_is_import_order():
    """A module imports only from modules above it in the table; helpers have no row."""
    order = list(TABLE)
    assert charts.reading_order(ROOT / "README.md") == [file.removesuffix(".py") for file in order]
    for i, file in enumerate(order):
        imported = {f"{name}.py" for name in charts.imports_of(ROOT / file)} & set(order)
        assert imported <= set(order[:i]), f"{file} imports from below: {imported - set(order[:i])}"


def test_only_plots_imports_matplotlib():
    """Modules that are read to learn do not draw."""
    importing = [p.name for p in ROOT.glob("*.py") if "matplotlib" in charts.imports_of(p)]
    assert importing == ["studies/plots.py"]


TABLES = "evaluation", "minute", "memory", "controls", "sinks", "switches", "quick"


@pytest.mark.parametrize("name", TABLES)
def test_result_tables_are_the_scripts(name):
    """A table of results is, to the letter, what the script wrote."""
    assert (ROOT / "results" / f"{name}.md").read_text().strip() in README + RESULTS


def test_benchmark_numbers_are_the_scripts():
    """The speeds quoted are those of results/bench_toy.json."""
    stream = json.loads((ROOT / "results" / "bench_toy.json").read_text())["stream"]
    quoted = f"{stream['passes_times_real_time']:.1f}× real time"
    assert quoted in README and quoted in RESULTS


def test_simplifications_are_told():
    """Every `# Simpler:` of a module is found in the README's table of differences."""
    count = sum(p.read_text().count("# Simpler:") for p in ROOT.glob("*.py"))
    assert README.count("`# Simpler:`") == count > 0
