"""All commands alike: numbers with bounds, no empty values, and no habit of a single platform."""

import argparse
import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from order import ORDER

import exercises.coursework as coursework
from full_size import memory
from plumbing import cli, stopwatch, texts

COMMANDS = [name for name in ORDER if "\n        main()\n" in (ROOT / name).read_text("utf-8")]
NEVER = ["-1", "nan", "inf", "-inf", "1e99", "-1e99", "9" * 21, "9" * 5000, "", " ", "x", "0x10"]
ZERO_IS_FINE = {"--seed", "--guidance", "--loss-weights", "--windows", "--clip", "--first"}
ZERO_IS_FINE |= {"--video-look-ahead"}
ZERO_IS_FINE |= {"studies/plots.py --window"}  # masks in which a block sees itself and block 0


class Asked(Exception):
    pass


@pytest.fixture
def parser(request, monkeypatch):
    """The parser of a command, as it is when its arguments are parsed."""

    def parse_args(parser):
        raise Asked(parser)

    module = importlib.import_module(request.param.removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(sys, "argv", [str(ROOT / request.param)])
    with monkeypatch.context() as patch, pytest.raises(Asked) as asked:
        patch.setattr(cli._Parser, "parse_args", parse_args)
        module.main()
    return asked.value.args[0]


def numbers_of(parser):
    """The options that take numbers, and the places and words of each."""
    for action in parser._actions:
        try:
            (action.type or str)("nan")  # paths and words are as good as any
        except argparse.ArgumentTypeError:
            yield action.option_strings[-1], action.nargs if isinstance(action.nargs, int) else 1


def refusal(parser, arguments, capsys):
    """The line that refuses arguments, or None if they are accepted."""
    try:
        parser.parse_args(arguments)
    except SystemExit as end:
        out, err = capsys.readouterr()
        assert (end.code, out, err.count("\n")) == (2, "", 1)
        return err
    return None


every_command = pytest.mark.parametrize("parser", COMMANDS, indirect=True)


@every_command
def test_every_number_has_bounds(parser):
    """int and float would take 10^99 seconds, or a learning rate of nan."""
    bare = [action.dest for action in parser._actions if action.type in (int, float)]
    assert not bare


@every_command
def test_numbers_that_would_take_for_ever_are_refused(parser, capsys):
    """In one line that names the option; 0 is refused, or listed above."""
    for option, count in numbers_of(parser):
        for value in NEVER:
            assert option in refusal(parser, [option, *[value] * count], capsys)
        if not {option, f"{parser.prog} {option}"} & ZERO_IS_FINE:
            line = refusal(parser, [option, *["0"] * count], capsys)
            assert f"{option} 0: expected a" in line and " number from " in line


@every_command
def test_an_empty_value_is_refused(parser, capsys):
    """As a path, a shell variable without a value would mean the folder one stands in."""
    for action in parser._actions:
        if action.nargs == 0 or action.default == "":
            continue
        words = [*action.option_strings[-1:], *[""] * (action.nargs == 2 or 1)]
        assert "\n" in refusal(parser, words, capsys)


def test_all_commands_are_tried():
    """Those of the hall, and one of every room that has commands."""
    assert {"generate.py", "teacher.py", "dmd.py", "ode_regression.py", "self_forcing.py"} < {
        *COMMANDS
    }
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("value", ["0", "4294967295"])
def test_every_accepted_seed_is_one_of_its_own(value):
    """The largest seed is the last one with 32 bits."""
    parser = cli.parser("")
    cli.add_seed(parser, "seed")
    assert parser.parse_args(["--seed", value]).seed == int(value)


def test_weights_are_found_from_any_folder(tmp_path, monkeypatch):
    """A file of this folder comes first, then one of the project; a third stays as it was given."""
    name = "weights/toy_dmd.safetensors"
    monkeypatch.chdir(tmp_path)
    assert cli.weights_path(name) == str(ROOT / name)
    assert cli.weights_path("weights/other.safetensors") == "weights/other.safetensors"
    Path("weights").mkdir()
    Path(name).touch()
    assert cli.weights_path(name) == name


# ---- platforms ----


def bare_text(tree):
    """Calls that open a file as text without saying how it is encoded."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        words = [getattr(value, "value", None) for value in call.args]
        if isinstance(call.func, ast.Attribute):  # of a path, not of plumbing/texts.py
            is_text = call.func.attr in ("read_text", "write_text")
            is_text = is_text and ast.unparse(call.func.value) != "texts"
        else:
            name = getattr(call.func, "id", None)
            is_text = name == "open" and not any("b" in str(word) for word in words[1:2])
        told = any(k.arg == "encoding" for k in call.keywords)
        if is_text and not told and not any(str(word).startswith("utf-8") for word in words):
            yield call.lineno


@pytest.mark.parametrize("name", ORDER)
def test_every_text_file_is_utf_8(name):
    """On Windows, the default is another encoding."""
    assert not list(bare_text(ast.parse((ROOT / name).read_text("utf-8"))))


@pytest.mark.parametrize("line", ["open(p)", "open(p, 'w')", "p.read_text()", "p.write_text('x')"])
def test_a_text_file_without_encoding_would_be_noticed(line):
    """The check above sees calls of functions and of methods."""
    assert list(bare_text(ast.parse(line))) == [1]


def test_an_answer_may_begin_with_a_byte_order_mark(tmp_path):
    """Some editors write one; text in another encoding is refused by file."""
    body = "def may_attend():\n    return 1\n"
    found = coursework.find("masks").tasks
    functions = "".join(body.replace("may_attend", task.function) for task in found)
    answer = tmp_path / "masks.py"
    answer.write_text(functions, "utf-8-sig")
    coursework.check_answer("masks", answer)
    answer.write_text(functions, "utf-16")
    with pytest.raises(ValueError, match="masks.py is text in UTF-16; expected Python in UTF-8"):
        coursework.check_answer("masks", answer)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_may_begin_with_a_byte_order_mark(tmp_path, encoding):
    """A config or an index that an editor has saved is still one."""
    (tmp_path / "config.json").write_text('{"a": "é"}', encoding)
    assert texts.read_json(tmp_path / "config.json") == {"a": "é"}


def test_peak_memory_is_optional(monkeypatch):
    """Windows has no module `resource`."""
    assert stopwatch.peak_memory_mb() > 1
    monkeypatch.setattr(stopwatch, "resource", None)
    assert stopwatch.peak_memory_mb() == 0


@pytest.mark.parametrize("kind", [AttributeError, ValueError])
def test_free_memory_may_be_unknown(kind, monkeypatch):
    """No sysconf (Windows), or none that counts pages (macOS): nothing is refused."""

    def sysconf(name):
        raise kind(name)

    monkeypatch.setattr(memory.Path, "exists", lambda path: False)
    monkeypatch.setattr(os, "sysconf", sysconf)
    device = argparse.Namespace(type="cpu")
    assert memory.free_bytes(device) > 1e15


def test_modules_that_windows_lacks_are_not_needed():
    """`resource` cannot be imported, and commands still start."""
    code = "import sys; sys.modules['resource'] = None; import generate, self_forcing"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
