"""Generated command lines and damaged files: no traceback, no hang, no half-written file.

    pytest -m slow tests/test_fuzz.py      # a few minutes

Every trial has a seed of its own, so one that fails can be run again by its number.
"""

import json
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import SMALL, random_model, run_here, save_small_student
from safetensors.torch import save_file

import config
import generate
from full_size import weights
from toy import source as toy_source

SECONDS = 30  # for one trial
NUMBERS = ["0", "1", "2", "-1", "1e99", "nan", "inf", "-inf", "1e-9", "9" * 40, "0x10", "1_0", "½"]
TEXTS = ["", " ", "red", "red fast metal", "$x^2$", "@film@", "16:9 red", "1: red", "1:red", "\0"]
TEXTS += [
    "<script>",
    "\u2028",
    "\udce9",
    "-",
    "--",
    "\N{BALLOON}" * 999,
    "0: red\n1: blue",
    "1e3: x",
]
PATHS = ["out.mp4", "a/b.mp4", ".", "/", "out.png", "/dev/null", "/proc/x.mp4", "x" * 300 + ".mp4"]
VALUES = {
    "--prompt": TEXTS, "--seconds": NUMBERS, "--seed": NUMBERS, "--window": NUMBERS,
    "--steps": NUMBERS, "--out": PATHS, "--html": PATHS, "--report": PATHS,
    "--config": ["toy", "toy_released", "full", "x", ""], "--weights": [*PATHS, "random", "a/b"],
    "--device": ["cpu", "meta", "cuda:99", "x", ""], "--dtype": [*generate.DTYPES, "x"],
    "--speed-up": ["all", "graph", "x", ""], "--ltx2": PATHS, "--unknown": TEXTS, "--help": [None],
}  # fmt: skip


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The file of a tiny random student."""
    return save_small_student(tmp_path_factory.mktemp("weights") / "student")


@pytest.fixture
def run(student, tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder, for SECONDS at most: -> exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("toy", "toy_released"):
        monkeypatch.setitem(config.CONFIGS, name, replace(SMALL, name=name))
        monkeypatch.setitem(toy_source.WEIGHTS, name, student)

    def too_long(*_):
        raise AssertionError(f"still running after {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    yield lambda script, *args: run_here(script, args, monkeypatch, capsys)
    signal.alarm(0)


def assert_in_order(status, err, folder, wanted=()):
    """Status 0 or 2, no traceback, one line for an error, and only files that were asked for."""
    assert status in (0, 2) and "Traceback" not in err
    if status == 2:
        assert err.splitlines()[-1].startswith(("generate.py: ", "full_size/weights.py: "))
    left = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert left <= set(wanted)
    assert status == 0 or not any(name.endswith(".mp4") for name in left)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_any_command_line(run, tmp_path, seed):
    """One to four options with values that somebody may type."""
    draw, arguments = random.Random(seed), []
    for option in draw.sample(sorted(VALUES), draw.randint(1, 4)):
        value = draw.choice(VALUES[option])
        arguments += [option] if value is None else [option, value]
    if "--seconds" not in arguments:
        arguments += ["--seconds", "1"]
    status, _, err = run(generate, *arguments)
    films = {a for a in ["out.mp4", *arguments] if a.endswith(".mp4") and len(a) < 200}
    wanted = films | {a for a in arguments if a in PATHS}
    wanted |= {str(generate.sheet_of(film)) for film in films}
    assert_in_order(status, err, tmp_path, wanted)


def damaged(data, draw) -> bytes:
    """Cut the bytes of a file, or overwrite, repeat or remove some of them."""
    place, length = draw.randrange(len(data)), draw.choice([1, 8, 100, 5000])
    end, junk = place + length, draw.randbytes(length)
    return draw.choice([
        data[:place], data[:place] + junk + data[end:], data[:end] + data[place:],
        data[:place] + data[end:], data[: draw.randrange(300)], junk, b"",
        data.replace(b"F32", b"I32", 1), data.replace(b"F32", b"F16", 1),
        data.replace(b"num_layers", b"numb_layers", 1), data.replace(b"shape", b"shade", 1),
    ])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(150))
def test_any_damaged_toy_weights(run, student, tmp_path, seed):
    """Either it is refused, or only numbers changed: then there is a film."""
    Path("w").write_bytes(damaged(student.read_bytes(), random.Random(seed)))
    status, _, err = run(generate, "--weights", "w", "--seconds", "1")
    assert_in_order(status, err, tmp_path, ["w", "out.mp4", "out.png"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_any_damaged_weights_of_the_full_size(run, monkeypatch, tmp_path, seed):
    """The same for files with the names of LTX-2, and for their index."""
    small = replace(
        SMALL, name="released", prefix_video_frames=4, prefix_audio_frames=26, num_sinks=0
    )
    monkeypatch.setitem(config.CONFIGS, "released", small)
    draw, net = random.Random(seed), random_model(small, torch.bfloat16)
    tensors = weights.to_ltx2(net.state_dict(), net)
    save_file(tensors, "part-1.safetensors")
    index = json.dumps({"weight_map": dict.fromkeys(tensors, "part-1.safetensors")})
    path = Path("x.safetensors.index.json")
    path.write_text(index)
    victim = draw.choice([path, Path("part-1.safetensors")])
    victim.write_bytes(damaged(victim.read_bytes(), draw))
    status, _, err = run(weights, path, "--config", "released")
    assert_in_order(status, err, tmp_path, [path.name, "part-1.safetensors"])
