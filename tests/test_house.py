"""The house stays small and in order: sizes, imports, and the depth of a stream."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch.nn.functional as F
from helpers import ROOT, run_here
from order import ORDER, imports_of

import generate

ROOMS = "kernel", "toy", "plumbing", "film", "full_size", "studies", "exercises", "benchmarks"
HALL = [path.name for path in ROOT.glob("*.py")]


def num_lines(files):
    return sum(len((ROOT / file).read_text().splitlines()) for file in files)


def loaded_by(module) -> list[str]:
    """The project files that are loaded once a fresh process has imported a module."""
    code = f"import sys, {module}\nfor m in sys.modules.values(): print(getattr(m, '__file__', ''))"
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    return [name for name in map(name_of, filter(None, printed.splitlines())) if name in ORDER]


def name_of(path) -> str:
    """A file as ORDER names it: "toy/world.py"."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def test_the_order_has_every_file_once():
    """All files of the hall and of the rooms."""
    rooms = [name_of(path) for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert sorted(ORDER) == sorted(HALL + rooms)


@pytest.mark.parametrize("file", ORDER)
def test_a_file_imports_only_from_above(file):
    """Exception: inside a function, for a full-size config only, a file may import full_size/."""
    above = set(ORDER[: ORDER.index(file)])
    assert imports_of(file, in_functions=False) <= above
    later = imports_of(file) - above
    assert all(name.startswith("full_size/") for name in later)
    assert not later or not file.startswith("full_size/")


def test_all_ways_to_import_are_seen(tmp_path):
    """Plain imports, imports from a room and from a file, at the top and inside a function."""
    path = tmp_path / "example.py"
    path.write_text(
        "import config, torch\nfrom toy import world\nfrom toy.codec import load\n"
        "def f():\n    from full_size import memory\n    import film.mp4\n"
    )
    top = {"config.py", "toy/world.py", "toy/codec.py"}
    assert imports_of(path, in_functions=False) == top
    assert imports_of(path) == top | {"full_size/memory.py", "film/mp4.py"}


def test_the_hall_is_small():
    """At most 13 files and 3,000 lines at the top level."""
    assert len(HALL) <= 13
    assert num_lines(HALL) <= 3000


def test_generate_brings_no_trainer_and_nothing_of_the_full_size():
    """At most 20 files and 4,200 lines; the page comes with --html, the kernel with a GPU."""
    files = loaded_by("generate")
    assert "generate.py" in files and len(files) <= 20
    assert num_lines(files) <= 4200
    trainers = {"teacher.py", "dmd.py", "ode_regression.py", "self_forcing.py"}
    trainers |= {"plumbing/trainer.py", "plumbing/stages.py"}
    assert not (trainers | {"film/page.py", "kernel/library.py"}) & set(files)
    assert not [file for file in files if file.startswith("full_size/")]


def test_dmd_brings_few_files():
    """At most 15."""
    files = loaded_by("dmd")
    assert "dmd.py" in files and len(files) <= 15


def test_a_stream_is_shallow(tmp_path, monkeypatch, capsys):
    """At most 13 frames of the project from `python generate.py` to attention."""
    depths, attention = [], F.scaled_dot_product_attention

    def counted(*arguments, **options):
        frames = [(name_of(f.filename), f.function) for f in inspect.stack(0)]
        frames = [frame for frame in frames if frame[0] in ORDER]
        depths.append(frames.index(("generate.py", "main")) + 2)  # main, and the module itself
        return attention(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    arguments = "--seconds", 1, "--out", tmp_path / "film.mp4"
    assert run_here(generate, arguments, monkeypatch, capsys)[0] == 0
    assert 5 < max(depths) <= 13
