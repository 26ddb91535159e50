"""The commands of reproduce.py exist, and run in the right order."""

import subprocess

import pytest
from helpers import options_of, run_here

from studies import reproduce

STEPS = reproduce.FULL + reproduce.CONTROLS + reproduce.QUICK + reproduce.GPU
STAGES = ("teacher", "dmd", "ode_regression", "self_forcing")
COMMANDS = [command for command, _ in STEPS if not command.startswith("-m pytest")]


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the command line; no command runs, those that would are in run.ran."""

    def run(*arguments, failing=None, has_gpu=True):
        run.ran, run.has_gpu = [], has_gpu

        def fake(command, cwd):
            run.ran.append(" ".join(command[1:]))
            return subprocess.CompletedProcess(command, 2 if len(run.ran) == failing else 0)

        monkeypatch.setattr(reproduce.subprocess, "run", fake)
        monkeypatch.setattr(reproduce.torch.cuda, "is_available", lambda: run.has_gpu)
        return run_here(reproduce, arguments, monkeypatch, capsys)

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_known(command):
    """The script exists and has every option that it is given."""
    first, *others = command.removeprefix("-m ").split()
    script = first if first.endswith(".py") else first.replace(".", "/") + ".py"
    assert (reproduce.ROOT / script).exists()
    used = {word for word in others if word.startswith("--")}  # without options, no --help
    assert not used or used <= options_of(script)


def test_the_quick_one_is_short_and_keeps_its_hands_off_what_is_shipped():
    """At most 20 minutes; weights go to runs/quick, the table has a name of its own."""
    assert sum(minutes for _, minutes in reproduce.QUICK) <= 20
    for command, _ in reproduce.QUICK:
        words = command.split()
        written = [words[i + 1] for i, w in enumerate(words) if w in ("--out", "--run")]
        assert written
        assert all(path.startswith("runs/quick/") or path == "results/quick" for path in written)
        assert not any(path.endswith(".safetensors") and "/quick_" not in path for path in written)


def test_commands_run_in_order_until_one_fails(run):
    """The commands after a failure do not run; the error tells how to continue."""
    _, _, err = run("--quick", failing=3)
    assert run.ran == [command for command, _ in reproduce.QUICK[:3]]
    assert "exit status 2; start again: a training goes on where it stopped" in err


def test_on_a_gpu_a_failure_stops_nothing(run):
    """The other commands run all the same, at most 12 minutes; tables and failures come last."""
    status, out, err = run("--gpu", failing=1)
    assert status == 2 and len(run.ran) == len(reproduce.GPU)
    assert f"{reproduce.KERNEL_TESTS}: exit status 2; start" in err
    assert sum(minutes for _, minutes in reproduce.GPU) <= 12
    assert out.index("bench_decode") < out.index("\n| 5 s | ") < out.rindex("`graph`")


def test_without_a_gpu_none_of_its_commands_runs(run):
    """One line instead of five failures; their list is printed all the same."""
    status, _, err = run("--gpu", has_gpu=False)
    assert (status, run.ran) == (2, [])
    assert err == "studies/reproduce.py: --gpu: no GPU is usable here; --list prints the commands\n"
    assert run("--gpu", "--list", has_gpu=False)[0] == 0


def test_every_test_for_a_gpu_is_run_there():
    """Every test file with GPU tests is named."""
    files = (reproduce.ROOT / "tests").glob("test_*.py")
    marked = {f"tests/{file.name}" for file in files if "pytest.mark.gpu" in file.read_text()}
    assert marked - {"tests/test_reproduce.py"} == set(reproduce.KERNEL_TESTS.split())


def test_two_kinds_at_once_are_refused(run):
    """--quick or --controls, not both."""
    assert "not allowed with argument --quick" in run("--quick", "--controls", "--list")[2]


def test_the_list_runs_nothing(run):
    """--list prints every command and the sum of minutes."""
    status, out, _ = run("--list")
    assert status == 0 and run.ran == [] and "about 3 h" in out
    assert all(f"python {command}" in out for command, _ in reproduce.FULL)


def test_every_training_of_the_full_run_writes_released_weights():
    """A stage writes to runs/ by default, so the full run names weights/."""
    stages = [c for c, _ in reproduce.FULL if c.split()[0].removesuffix(".py") in STAGES]
    assert len(stages) == len(STAGES)
    for command in stages:
        out = command.partition(" --out ")[2]
        assert out.startswith("weights/") and (reproduce.ROOT / out).exists()


def test_curves_of_controls_are_copied(run, monkeypatch, tmp_path):
    """After --controls, the loss curves of runs/controls are in results/; --list copies none."""
    (tmp_path / "runs" / "controls").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    (tmp_path / "runs" / "controls" / "own_exit_curve.json").write_text("[]")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    for options, copied in ((["--list"], []), ([], ["own_exit_curve.json"])):
        run("--controls", *options)
        assert [p.name for p in (tmp_path / "results").iterdir()] == copied
