"""Comparisons measure what they say, and their command lines run from start to end."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import random_clip, random_model, run_here

import config
import kv_cache
import model
from masks import block_span, clip_of_seconds, num_blocks
from plumbing import files
from studies import compare

TINY = replace(config.TOY, num_layers=1, num_heads=2, video_width=24, audio_width=16)
BLOCKS = num_blocks(5, TINY)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs an experiment, and returns the JSON of one with a table."""
    monkeypatch.setattr(compare.evaluate, "RESAMPLES", 3)
    monkeypatch.setattr(compare, "TEACHER_SIGMAS", (1.0, 0.5, 0.0))

    def run(experiment, *arguments):
        out = tmp_path / experiment
        words = experiment, *arguments, "--out", out
        assert run_here(compare, words, monkeypatch, capsys)[0] == 0
        if experiment in compare.TABLES:
            return json.loads(out.with_suffix(".json").read_text())

    return run


@pytest.fixture
def weights(tmp_path):
    """Untrained weights of a teacher and of a student."""
    paths = {}
    for cfg in (config.TOY_TEACHER, config.TOY):
        paths[cfg.name] = tmp_path / f"{cfg.name}.safetensors"
        files.save_weights(paths[cfg.name], model.build(cfg).state_dict(), cfg, {})
    return paths


def test_drift_from_the_command_line(run, weights, tmp_path, monkeypatch):
    """Three kinds of stream, ten seconds: a row per five seconds, and how it was measured."""
    names = "window 2", "nothing pinned", "no refresh"
    monkeypatch.setattr(compare, "STREAMS", {name: compare.STREAMS[name] for name in names})
    written = run("drift", "--clips", 2, "--seconds", 10, "--student", weights["toy"])
    result, about = written["result"], written["about"]
    assert about["command"].endswith("-- drift") and {"device", "date", "threads"} <= about.keys()
    assert [len(rows) for rows in result.values()] == [2, 2, 2]
    assert "| toy, nothing pinned | 5-10 |" in (tmp_path / "drift.md").read_text()


def test_without_refresh_a_clean_pass_writes_nothing():
    """Keys stay those of the last noisy pass; other passes and the net itself do not change."""
    net = random_model(TINY, torch.float32)
    text, span = net.project_text(torch.eye(9)[None, :3]), block_span(0, TINY)
    x = model.draw_noise(1, span, TINY, torch.Generator().manual_seed(0))

    def keys_after(net, *sigmas):
        view = kv_cache.CachedView(TINY, 2)
        with torch.no_grad():
            for sigma in sigmas:
                level = torch.full((1,), sigma)
                model.predict_x0(net, *x, level, level, text, span, view)
        return view.layers[0]["video_self"].k[:, :16].clone()

    bare = compare.WithoutRefresh(net)
    assert torch.equal(keys_after(bare, 0.5, 0.0), keys_after(net, 0.5))
    assert not torch.equal(keys_after(net, 0.5, 0.0), keys_after(net, 0.5))


def test_controls_from_the_command_line(run, weights, tmp_path, monkeypatch):
    """First and last five seconds of each student; the table has one row for all seeds."""
    student = compare.Student(weights["toy"].with_suffix(""), 4, "x.py")
    made = dict.fromkeys(("II", "II, seed 1", "II, seed 2", "control"), student)
    monkeypatch.setitem(compare.COMPARED, "controls", made)
    result = run("controls", "--clips", 2, "--seconds", 10)["result"]
    pooled = [f"II, 3 seeds, {t} s" for t in ("0-5", "5-10")]
    assert len(result) == 10 and result.keys() >= set(pooled)
    assert result[pooled[0]]["f1"][0] == pytest.approx(result["II, 0-5 s"]["f1"][0])
    rows = (tmp_path / "controls.md").read_text().splitlines()[2:]
    shown = [*pooled, "control, 0-5 s", "control, 5-10 s"]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in shown]
    assert compare.over([1.0, 2.0, 6.0]) == [3.0, 1.0, 6.0]


def test_a_control_that_is_not_trained_says_how(tmp_path, monkeypatch, capsys):
    """The error names the command."""
    monkeypatch.chdir(tmp_path)
    arguments = "controls", "--only", "III from stage I"
    status, _, err = run_here(compare, arguments, monkeypatch, capsys)
    wanted = "train first: python self_forcing.py --student weights/toy_dmd.safetensors --run runs"
    assert status == 2 and wanted in err


TEACHER, STAGE_III = "weights/toy_teacher.safetensors", compare.evaluate.STUDENTS[1]
BAD = {
    "clips": (("drift", "--clips", 0), "--clips 0: expected"),
    "no seconds": (("drift", "--seconds", 0), "--seconds 0: expected"),
    "seconds": (("drift", "--seconds", 7), "--seconds 7: expected"),
    "a student as teacher": (("joint", "--real", STAGE_III), "a causal student, made for"),
    "no student": (("joint", "--student"), "--student: expected at least one argument"),
    "same names": (("drift", "--student", STAGE_III, STAGE_III), "called self_forcing; rename"),
    "a teacher": (("gallery", "--student", TEACHER), "called teacher; rename"),
    "unknown": (("memory", "--only", "nobody"), "expected some of 'stage II' 'stage II, 4+3k'"),
    "only": (("drift", "--only", "stage II"), "--only: for controls and memory; drift has no"),
    "out": (("joint", "--out", "README.md/e"), "README.md/e.json: not writable"),
    "out of a picture": (("identity", "--out", "README.md/e"), "README.md/e.png: not writable"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line(arguments, message, monkeypatch, capsys):
    """Exit status 2, before any clip is made."""
    for makes in ("measure_all", "true_clips", "from_stream"):
        monkeypatch.setattr(compare.evaluate, makes, None)
    status, out, err = run_here(compare, arguments, monkeypatch, capsys)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err


def test_the_table_of_students_is_consistent():
    """The window is as in training unless the name tells it; the command is that of the stage.

    Commands run in the order of the table, start at files that exist by then, make their own file.
    """
    made = {"weights/toy_dmd.safetensors", *compare.evaluate.STUDENTS}
    for name, student in (compare.CONTROLS | compare.MEMORY).items():
        trained = 3 if "4+3k" in name else 4
        assert student.window == (1 if "window 1" in name else trained), name
        words = student.command.split()
        assert words[0] == ("self_forcing.py" if "III" in name else "ode_regression.py"), name
        _, has_seed, seed = name.partition(", seed ")
        assert not has_seed or f" --seed {seed} " in student.command, name
        assert "--student" not in words or words[words.index("--student") + 1] in made, name
        assert words[-2:] == ["--out", student.path], name
        made.add(student.path)


@pytest.mark.parametrize("streams", [("video",), ("audio",), ("video", "audio")])
def test_a_deaf_stream_hears_nothing(streams):
    """The other stream's clip does not change it; without `deaf` it does."""
    net = random_model(TINY, torch.float32)
    text, sigma = net.project_text(torch.eye(9)[None, :3]), torch.full((1,), 0.5)
    video, audio = random_clip(TINY, BLOCKS, dtype=torch.float32)

    def velocities(net, video, audio):
        return net(video, audio, sigma, sigma, text, clip_of_seconds(TINY), kv_cache.MaskedView())

    deafened = compare.deaf(net, *streams)
    v = [velocities(deafened, video, x)[0] for x in (audio, audio + 1)]
    a = [velocities(deafened, x, audio)[1] for x in (video, video + 1)]
    assert torch.equal(*v) == ("video" in streams) and torch.equal(*a) == ("audio" in streams)
    assert not torch.equal(velocities(net, video, audio)[0], velocities(net, video, audio + 1)[0])


def test_two_clips_put_together_are_two():
    """Pictures of one seed, sound of the next."""
    got = compare.put_together(lambda clips, seed: (f"v{seed}", f"a{seed}"), None, 5)
    assert got == ("v5", "a6")


def test_joint_and_gallery_from_the_command_line(run, weights, tmp_path):
    """Ten rows with intervals; a picture of ground truth, teacher and a stream."""
    made = "--real", weights["toy_teacher"], "--student", weights["toy"]
    result = run("joint", "--clips", 2, *made)["result"]
    assert len(result) == 10 and "stage III, both deaf" in result
    run("gallery", "--seconds", 10, *made)
    assert (tmp_path / "gallery.png").read_bytes().startswith(b"\x89PNG")


def test_identity_streams_both_shipped_students(run, monkeypatch):
    """Six strips of the given length, two per caption; another caption changes them."""
    drawn = []
    monkeypatch.setattr(compare.plots, "draw_strips", lambda clips, **options: drawn.append(clips))
    monkeypatch.setattr(compare.plots, "save", lambda figure, path: None)
    for clip in (0, 3):
        run("identity", "--seconds", 5, "--clip", clip)
    captions = [name.rsplit(", ", 1)[0] for name in drawn[0]]
    assert len(captions) == 6 and captions[::2] == captions[1::2]
    assert {len(frames) for frames in drawn[0].values()} == {5 * config.TOY.fps + 1}
    assert not torch.equal(*(next(iter(clips.values())) for clips in drawn))
