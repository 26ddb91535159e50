"""The evaluation ranks clips correctly, and tells how certain it is."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from helpers import run_here

import config
import model
from masks import num_blocks
from plumbing import files
from studies import evaluate
from toy import world as toy_world

SEEDS = evaluate.held_out(16)


def measured(make):
    """The Interval of the first five seconds of the clips that `make` returns."""
    return evaluate.measure_all(make, SEEDS, [(0, 5)], "")[0]


@pytest.fixture(scope="module")
def truth():
    return measured(partial(evaluate.true_clips, 5))


def test_truth_is_perfect(truth):
    """Ground truth: F1 and event rates 1, captions right, identity kept."""
    m = evaluate.metrics(truth, truth, truth)
    assert m["f1"] == m["impacts_rate"] == m["onsets_rate"] == m["caption"] == 1
    assert m["frechet"] == pytest.approx(0, abs=1e-6)
    assert m["kept"] > 0.9 and m["spread"] == 1


def test_shuffled_sounds_are_noticed(truth):
    """With the sound of another clip, F1 falls to chance; metrics of the frames stay."""
    m = evaluate.metrics(measured(partial(evaluate.shuffled_clips, 5)), truth, truth)
    assert m["f1"] < 0.3 and m["whole"] == 1 and m["colour"] == 1


def test_silence_is_noticed(truth):
    """A silent clip has no onsets, and its missing partners count in capped DeSync."""
    clips = toy_world.draw_clips(SEEDS)
    video, sound = evaluate.true_clips(5, clips, 0)
    silent = evaluate.measure(video, 0 * sound, clips.words, [(0, 5)])[0]
    m = evaluate.metrics(silent, truth, truth)
    assert m["f1"] == m["onsets_rate"] == 0 and m["capped_ms"] == 300


def test_intervals_split_the_events():
    """The events of all seconds add up to the events of the stream."""
    times = [(0, 4), *((t, t + 1) for t in range(4))]
    whole, *seconds = evaluate.measure_truth(4, SEEDS, times)
    assert sum(w.match[:, 1].sum() for w in seconds) == whole.match[:, 1].sum() > 0


def test_confidence_intervals_contain_the_value(truth):
    """More clips make the interval narrower."""
    few = truth._replace(**{n: getattr(truth, n)[:4] for n in truth._fields if n != "seconds"})
    wide, narrow = (evaluate.with_intervals(w, w, truth)["kept"] for w in (few, truth))
    assert narrow[1] <= narrow[0] <= narrow[2]
    assert narrow[2] - narrow[1] < wide[2] - wide[1]


# ---- metrics of known numbers ----


def interval(**changes):
    """Four clips of ten impacts each, in 2 s; see `numbers`."""
    match = [8, 10, 9, 16, 6, 9, 0.27, 2]  # the fields of detectors.Match
    words = [[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]]
    known = dict(
        match=np.array([match] * 4, dtype=float), seconds=2.0, words=np.array(words, dtype=bool),
        whole=np.array([1, 1, 1, 0.6]), reference=np.eye(4)[:, :3], identity=np.eye(4)[:, :3],
        features=np.random.default_rng(0).normal(size=(4, 14)),
    )  # fmt: skip
    return evaluate.Interval(**{**known, **changes})


def test_every_metric_is_what_it_says():
    """Shares, milliseconds, and events a second compared with the truth's."""
    # ground truth of 5 s with 20 impacts and 18 onsets: 4 a second, here 5 and 4.5 a second
    truth = interval(match=np.array([[8, 20, 18, 16, 6, 9, 0.27, 2]] * 4), seconds=5.0)
    m = evaluate.metrics(interval(), truth, truth)
    assert m["f1"] == pytest.approx(16 / 19, abs=1e-4)
    assert m["desync_ms"] == pytest.approx(270 / 9)
    assert m["capped_ms"] == pytest.approx((270 + 2 * 300) / (9 + 2), abs=1e-4)
    assert m["wall"] == pytest.approx(6 / 8)
    assert m["impacts_rate"] == pytest.approx((10 / 2) / (20 / 5))
    assert m["onsets_rate"] == pytest.approx((9 / 2) / (18 / 5))
    assert [m[name] for name in ("colour", "speed", "material")] == [0.75, 0.25, 0]
    assert m["caption"] == pytest.approx(1 / 3, abs=1e-4) and m["whole"] == 0.9
    assert (m["kept"], m["spread"], m["frechet"]) == (1, 1, 0)


@pytest.mark.parametrize("change", [0, 0.25, 0.5])
def test_identity_that_drifts_is_kept_less(change):
    """Two clips that differ by 1 in every attribute: 1 - change / 1; the spread stays 1."""
    before = np.array([[0.0] * 3, [1.0] * 3])
    assert evaluate.identity_kept(before, before + change) == pytest.approx(1 - change)
    assert evaluate.identity_spread(before + change, before) == pytest.approx(1)
    assert evaluate.identity_spread(before * (1 + change), before) == pytest.approx(1 + change)


def test_intervals_are_the_middle_95_percent(monkeypatch):
    """Of the metrics of the draws, from the 2.5th to the 97.5th percentile."""
    values = iter(range(evaluate.RESAMPLES + 1))
    monkeypatch.setattr(evaluate, "metrics", lambda *args: {"f1": next(values)})
    found = evaluate.with_intervals(interval(), interval(), interval())["f1"]
    assert found == pytest.approx([400, 0.025 * 399, 0.975 * 399])


@pytest.mark.parametrize(
    "column, shown", [("f1", "0.500 ± 0.050"), ("frechet", "0.50 ± 0.05"), ("desync_ms", "0 ± 0")]
)
def test_a_cell_shows_half_of_its_interval(column, shown):
    """With the digits of its column; without an interval it is a dash."""
    assert evaluate._cell(column, 0.5, 0.46, 0.56) == shown
    assert evaluate._cell(column, 0.5, None, None) == "–"


def test_identity_is_that_of_the_second_half(truth):
    """Frames and sound of one clip until 2.6 s, most of five, then of another: the reference is the
    first one's, identity the second one's. So it is in a later interval of a stream."""
    clips, others = toy_world.draw_clips(SEEDS), toy_world.draw_clips(range(16))
    (video, sound), (video_2, sound_2) = (evaluate.true_clips(5, c, 0) for c in (clips, others))
    joined = torch.cat([video[:, :63], video_2[:, 63:]], 1)
    sounds = torch.cat([sound[:, :262], sound_2[:, 262:]], 1)
    found = evaluate.measure(joined, sounds, clips.words, [(0, 5), (2, 4)])
    pure = evaluate.measure(video_2, sound_2, others.words, [(0, 5)])[0]
    for interval in found:
        np.testing.assert_allclose(interval.reference, truth.reference)
        for part in (0, 1):  # hue and radius; of the pitch there may be too few onsets
            expected = pure.identity[:, part]
            np.testing.assert_allclose(interval.identity[:, part], expected, atol=0.3)
    assert np.abs(pure.identity - truth.identity)[:, 1].max() > 0.3


def untrained(folder, cfg):
    """Write untrained weights; return their path."""
    path = folder / f"{cfg.name}.safetensors"
    files.save_weights(path, model.build(cfg).state_dict(), cfg, {})
    return path


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs the command line with an untrained teacher and reads e.json."""
    monkeypatch.setattr(evaluate, "REFERENCE_CLIPS", 16)
    monkeypatch.setattr(evaluate, "RESAMPLES", 5)
    monkeypatch.setattr(evaluate.teacher, "schedule", lambda steps: [1.0, 0.5, 0.0])
    made = untrained(tmp_path, config.TOY_TEACHER)

    def run(*arguments):
        small = "--clips", 2, "--seconds", 5, "--teacher", made, "--few-step", made
        words = *small, "--out", tmp_path / "new" / "e", *arguments
        status, out, _ = run_here(evaluate, words, monkeypatch, capsys)
        assert status == 0 and (tmp_path / "new" / "e.md").read_text().strip() in out
        return json.loads((tmp_path / "new" / "e.json").read_text())

    return run


def test_command_line(run, tmp_path):
    """Table, JSON and plot are written, for untrained students too."""
    rows = run("--student", untrained(tmp_path, config.TOY))["rows"]
    assert list(rows) == [
        "truth", "truth, sounds shuffled", "truth through the codec", "teacher, 32 steps",
        "teacher, 4 steps", "stage I, 4 steps", "stage I streamed, never trained to", "toy, 0-5 s"
    ]  # fmt: skip
    assert (tmp_path / "new" / "e.png").exists()


def test_without_students_there_are_the_other_rows(run, tmp_path, monkeypatch):
    """An empty --student: a table without plot; the JSON tells how it was measured."""
    makers = {"stage I, 4 steps": partial(evaluate.true_clips, 5)}
    monkeypatch.setattr(evaluate, "five_second_rows", lambda codec, args: makers)
    result = run("--guidance", 1, 1, "--student")
    assert list(result["rows"]) == ["truth", "stage I, 4 steps"]
    assert result["by_second"] == {} and not (tmp_path / "new" / "e.png").exists()
    about = result["about"]
    assert about.keys() == {"command", "device", "torch", "cuda", "date", "threads"}
    command = about["command"]
    assert command.startswith("python -m studies.evaluate --clips 2 --seconds 5 --teacher ")
    assert " --guidance 1.0 1.0 " in command and command.endswith(" --student")


@pytest.mark.parametrize("cfg, least", [(config.TOY, 4), (config.TOY_RELEASED, 3)])
def test_a_window_of_none_is_all(cfg, least, monkeypatch):
    """None means all blocks, as everywhere; by default, a stream sees as far as in training."""
    fakes = {"rollout": lambda *_, batch, view: view.window, "whole_clip": int}
    for name, fake in {**fakes, "decode": lambda codec, window: window}.items():
        monkeypatch.setattr(evaluate, name, fake)
    stream = partial(evaluate.from_stream, model.build(cfg), None, 10, toy_world.draw_clips([0]), 0)
    assert (stream(window=None), stream()) == (num_blocks(10, cfg), least)


TEACHER, STAGE_III = "weights/toy_teacher.safetensors", evaluate.STUDENTS[1]
BAD = {
    "seconds": (["--seconds", 7], "--seconds 7: expected a multiple of 5"),
    "clips": (["--clips", 1], "--clips 1: expected a whole number from 2 "),
    "no file": (["--teacher", "no"], "no: no such file"),
    "passes": (["--steps", 5], "--steps 5: expected a whole number from 1 to 4"),
    "window": (["--window", 0], "--window 0: expected a whole number from 1"),
    "out": (["--out", "README.md/e"], "README.md/e.json: not writable"),
    "same names": (["--student", STAGE_III, STAGE_III], "another row is called self_forcing"),
    "a teacher": (["--student", TEACHER], "another row is called teacher"),
    "a student as teacher": (["--teacher", STAGE_III], "a causal student, made for config 'toy'"),
    "a student of stage III": (["--few-step", STAGE_III], "a causal student, made for config"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input(arguments, message, monkeypatch, capsys):
    """One line on stderr and exit status 2, before any clip is made."""
    monkeypatch.setattr(evaluate, "measure_all", None)
    status, out, err = run_here(evaluate, ["--clips", 2, *arguments], monkeypatch, capsys)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err


def test_a_bar_is_wiped_before_an_interruption_is_told(capsys):
    """Otherwise the message would stand on the line of the bar."""

    def make(clips, seed):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate.measure_all(make, SEEDS, [(0, 5)], "student")
    drawn = capsys.readouterr().err
    assert "student" in drawn and drawn.endswith("\r")
