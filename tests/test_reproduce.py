"""The commands of reproduce.py exist, and run in the right order."""

import subprocess
import sys

import pytest
from helpers import options_of

from plumbing import cli
from studies import reproduce

STEPS = reproduce.FULL + reproduce.CONTROLS + reproduce.QUICK + reproduce.GPU
STAGES = ("teacher", "dmd", "ode_regression", "self_forcing")
COMMANDS = [command for command, _ in STEPS if not command.startswith("-m pytest")]


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["studies/reproduce.py", *args])
    with cli.one_line_errors():
        reproduce.main()


def script_of(command):
    """The file that a command runs: "-m toy.codec --fit" -> "toy/codec.py"."""
    first, *others = command.split()
    return others[0].replace(".", "/") + ".py" if first == "-m" else first


@pytest.mark.parametrize("script", sorted({script_of(command) for command in COMMANDS}))
def test_every_option_is_known(script):
    """The script exists and has every option that it is given."""
    used = [word for c in COMMANDS if script_of(c) == script for word in c.split()[1:]]
    assert (reproduce.ROOT / script).exists()
    if not used:
        return  # nothing to ask, and scripts without options have no --help
    assert {word for word in used if word.startswith("--")} <= options_of(script)


def test_the_quick_one_is_short_and_keeps_its_hands_off_what_is_shipped():
    """At most 20 minutes; weights go to runs/quick, the table has a name of its own."""
    assert sum(minutes for _, minutes in reproduce.QUICK) <= 20
    for command, _ in reproduce.QUICK:
        words = command.split()
        written = [words[i + 1] for i, w in enumerate(words) if w in ("--out", "--run")]
        assert written
        assert all(path.startswith("runs/quick/") or path == "results/quick" for path in written)
        assert not any(path.endswith(".safetensors") and "/quick_" not in path for path in written)


def test_commands_run_in_order_until_one_fails(monkeypatch, capsys):
    """The commands after a failure do not run; the error tells how to continue."""
    ran = []

    def fake(command, cwd):
        ran.append(" ".join(command[1:]))
        return subprocess.CompletedProcess(command, 0 if len(ran) < 3 else 2)

    monkeypatch.setattr(reproduce.subprocess, "run", fake)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--quick")
    assert ran == [command for command, _ in reproduce.QUICK[:3]]
    assert "exit status 2; start again to go on from there" in capsys.readouterr().err


def test_on_a_gpu_a_failure_stops_nothing(monkeypatch, capsys):
    """The other commands run all the same, and the failure is reported at the end."""
    ran = []

    def fake(command, cwd):
        ran.append(" ".join(command[1:]))
        return subprocess.CompletedProcess(command, int(len(ran) == 1))

    monkeypatch.setattr(reproduce.subprocess, "run", fake)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--gpu")
    assert len(ran) == len(reproduce.GPU)
    assert "tests/test_faster.py: exit status 1; start" in capsys.readouterr().err


def test_every_test_for_a_gpu_is_run_there():
    """Every test file with GPU tests is named."""
    files = (reproduce.ROOT / "tests").glob("test_*.py")
    marked = {f"tests/{file.name}" for file in files if "pytest.mark.gpu" in file.read_text()}
    assert marked - {"tests/test_reproduce.py"} == set(reproduce.KERNEL_TESTS.split())


def test_two_kinds_at_once_are_refused(monkeypatch, capsys):
    """--quick or --controls, not both."""
    with pytest.raises(SystemExit):
        run(monkeypatch, "--quick", "--controls", "--list")
    assert "not allowed with argument --quick" in capsys.readouterr().err


def test_the_list_runs_nothing(monkeypatch, capsys):
    """--list prints every command and the sum of minutes."""
    monkeypatch.setattr(reproduce.subprocess, "run", None)
    run(monkeypatch, "--list")
    out = capsys.readouterr().out
    assert all(f"python {command}" in out for command, _ in reproduce.FULL)


def test_every_training_of_the_full_run_writes_released_weights():
    """A stage writes to runs/ by default, so the full run names weights/."""
    stages = [c for c, _ in reproduce.FULL if c.split()[0].removesuffix(".py") in STAGES]
    assert len(stages) == len(STAGES)
    for command in stages:
        out = command.partition(" --out ")[2]
        assert out.startswith("weights/") and (reproduce.ROOT / out).exists()


def test_curves_of_controls_are_copied(monkeypatch, tmp_path):
    """After --controls, the loss curves of runs/controls are in results/; --list copies none."""
    (tmp_path / "runs" / "controls").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    (tmp_path / "runs" / "controls" / "own_exit_curve.json").write_text("[]")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "run", lambda command: 0)
    run(monkeypatch, "--controls", "--list")
    assert not list((tmp_path / "results").iterdir())
    run(monkeypatch, "--controls")
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["own_exit_curve.json"]
