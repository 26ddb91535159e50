"""The evaluator ranks what it should rank, and says how sure it is."""

import json
import sys
from functools import partial

import pytest

import cli
import config
import evaluate
import files
import model
import toy_world

SEEDS = range(toy_world.HELD_OUT, toy_world.HELD_OUT + 16)
WHOLE = [(0, 5)]


@pytest.fixture(scope="module")
def truth():
    return evaluate.judge(partial(evaluate.true_clips, 5), SEEDS, WHOLE, "truth")[0]


def test_truth_is_perfect(truth):
    """True clips have F1 1, the truth's event rate, their captions, and keep their identity."""
    m = evaluate.metrics(truth, truth, truth)
    assert m["f1"] == m["impacts_rate"] == m["onsets_rate"] == m["caption"] == 1
    assert m["frechet"] == pytest.approx(0, abs=1e-6)
    assert m["kept"] > 0.9 and m["spread"] == 1


def test_shuffled_sounds_are_noticed(truth):
    """With another clip's sound F1 falls to chance, and nothing else of the picture changes."""
    shuffled = evaluate.judge(partial(evaluate.true_clips, 5), SEEDS, WHOLE, "", shuffle=True)[0]
    m = evaluate.metrics(shuffled, truth, truth)
    assert m["f1"] < 0.3 and m["whole"] == 1 and m["colour"] == 1


def test_silence_is_noticed(truth):
    """A silent clip has no onsets, and its missing partners count in capped DeSync."""

    def silent(clips, seed):
        video, sound = evaluate.true_clips(5, clips, seed)
        return video, 0 * sound

    m = evaluate.metrics(evaluate.judge(silent, SEEDS, WHOLE, "")[0], truth, truth)
    assert m["f1"] == m["onsets_rate"] == 0
    assert m["capped_ms"] == 300


def test_windows_split_the_events():
    """Events of the seconds add up to those of the whole stream."""
    windows = [(0, 4), *((t, t + 1) for t in range(4))]
    whole, *seconds = evaluate.judge(partial(evaluate.true_clips, 4), SEEDS, windows, "")
    assert sum(w.match[:, 1].sum() for w in seconds) == whole.match[:, 1].sum() > 0


def test_intervals_hold_the_value(truth):
    """The value lies within its own interval, and more clips make it narrower."""
    few = truth._replace(**{n: getattr(truth, n)[:4] for n in truth._fields if n != "seconds"})
    wide, narrow = (evaluate.with_intervals(w, w, truth)["kept"] for w in (few, truth))
    assert narrow[1] <= narrow[0] <= narrow[2]
    assert narrow[2] - narrow[1] < wide[2] - wide[1]


def test_command_line(tmp_path, monkeypatch, capsys):
    """evaluate.py writes table, JSON and plot; even for students that know nothing yet."""
    paths = []
    for cfg in (config.TOY_TEACHER, config.TOY):
        paths.append(str(tmp_path / f"{cfg.name}.safetensors"))
        files.save_weights(paths[-1], model.build(cfg).state_dict(), cfg, {})
    monkeypatch.setattr(evaluate, "REFERENCE_CLIPS", 16)
    monkeypatch.setattr(evaluate, "RESAMPLES", 5)
    monkeypatch.setattr(evaluate.teacher, "schedule", lambda steps: [1.0, 0.5, 0.0])
    out = str(tmp_path / "e")
    arguments = ["--clips", "2", "--seconds", "5", "--student", paths[1]]
    arguments += ["--teacher", paths[0], "--few-step", paths[0]]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments, "--out", out])
    cli.run(evaluate.main)
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert {"truth", "stage I, 4 steps", "stage I streamed, never trained to"} <= rows.keys()
    assert "toy, 0-5 s" in rows
    assert (tmp_path / "e.md").read_text().strip() in capsys.readouterr().out
    assert (tmp_path / "e.png").exists()


@pytest.mark.parametrize("arguments", [["--seconds", "7"], ["--clips", "1"], ["--teacher", "no"]])
def test_bad_input(arguments, monkeypatch, capsys):
    """Bad input is one line on stderr and exit status 2."""
    monkeypatch.setattr(evaluate, "REFERENCE_CLIPS", 16)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--clips", "2", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.run(evaluate.main)
    lines = [x for x in capsys.readouterr().err.splitlines() if "evaluate.py:" in x]
    assert stop.value.code == 2 and len(lines) == 1
