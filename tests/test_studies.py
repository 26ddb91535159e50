"""The studies' command lines: every option arrives where it is used."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import random_model, run_here

import config
import kv_cache
import model
from plumbing import files
from studies import ablations, compare, evaluate, plots
from toy import world as toy_world

SMALL = dict(num_layers=1, num_heads=2, video_width=24, audio_width=16)
CONFIGS = {
    "real": replace(config.TOY_TEACHER, **SMALL),
    "few_step": replace(config.TOY_TEACHER, **SMALL),
    "student": replace(config.TOY, **SMALL),
    "second": replace(config.TOY, **SMALL),
}
TEACHERS = ["--real", "real.safetensors", "--few-step", "few_step.safetensors"]


@pytest.fixture
def study(tmp_path, monkeypatch, capsys):
    """A function that runs a study whose measurements only remember what is to be measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "TOY", CONFIGS["student"])
    for seed, (name, cfg) in enumerate(CONFIGS.items()):
        tensors = random_model(cfg, torch.float32, seed).state_dict()
        files.save_weights(f"{name}.safetensors", tensors, cfg, {})
    asked = SimpleNamespace(rows={}, seeds={}, times={}, written=[])

    def measure_all(make, seeds, times, title):
        asked.rows[title], asked.seeds[title], asked.times[title] = make, len(seeds), times
        return [None] * len(times)

    def write(args, results, table, figure):
        asked.written.append((args.out, args.command))

    monkeypatch.setattr(evaluate, "measure_all", measure_all)
    monkeypatch.setattr(evaluate, "metrics", lambda *args: {"f1": 0.0})
    monkeypatch.setattr(evaluate, "with_intervals", lambda *args: {"f1": [0.0] * 3})
    monkeypatch.setattr(evaluate, "write", write)
    for module, name in ((evaluate, "table"), (plots, "draw_drift"), (plots, "draw_rows")):
        monkeypatch.setattr(module, name, lambda *args, **options: None)
    monkeypatch.setattr(compare, "drift_table", lambda by_time: None)

    def study(script, *options):
        status, _, err = run_here(script, options, monkeypatch, capsys)
        assert status == 0, err
        return asked

    return study


def holds(net, name):
    """Whether a net has the weights of a file."""
    found, told = net.state_dict(), model.load(f"{name}.safetensors").state_dict()
    return all(torch.equal(found[n], x) for n, x in told.items())


# ---- evaluate ----

EVALUATED = ["--teacher", "real.safetensors", "--few-step", "few_step.safetensors"]
EVALUATED += ["--student", "student.safetensors", "second.safetensors"]


def test_evaluate_measures_the_given_weights(study):
    """Each in its own row; the student of stage I also as a stream."""
    asked = study(evaluate, *EVALUATED, "--clips", 3, "--seconds", 10, "--out", "e")
    rows = asked.rows
    assert holds(rows["teacher, 32 steps"].args[0], "real")
    assert holds(rows["teacher, 4 steps"].args[0], "real")
    assert holds(rows["stage I, 4 steps"].args[0], "few_step")
    assert holds(rows["stage I streamed, never trained to"].args[0], "few_step")
    for name in ("student", "second"):
        assert holds(rows[name].args[0], name) and rows[name].args[2] == 10
    assert asked.written[0][0] == "e"
    assert {n for name, n in asked.seeds.items() if name != "other true clips"} == {3}
    assert asked.seeds["other true clips"] == evaluate.REFERENCE_CLIPS
    assert asked.times["student"] == [(0, 5), (5, 10), *((t, t + 1) for t in range(10))]


@pytest.mark.parametrize(
    "options, window, steps",
    [((), evaluate.TRAINED, None), (("--window", 2), 2, None), (("--steps", 3), "trained", 3)],
)
def test_evaluate_streams_as_it_is_told(options, window, steps, study):
    """Window and passes reach the students and the streamed student of stage I."""
    rows = study(evaluate, *EVALUATED, "--seconds", 5, *options).rows
    for name in ("student", "second", "stage I streamed, never trained to"):
        assert rows[name].func is evaluate.from_stream
        assert rows[name].keywords == {"window": window, "steps": steps}


def test_evaluate_guides_its_teacher(study):
    """Both rows of the teacher."""
    rows = study(evaluate, *EVALUATED, "--seconds", 5, "--guidance", 2, 7).rows
    for name, passes in (("teacher, 32 steps", 32), ("teacher, 4 steps", 4)):
        assert rows[name].keywords["guidance"] == [2, 7] and len(rows[name].args[2]) == passes + 1


def test_a_stream_of_fewer_passes_and_a_window(monkeypatch):
    """`from_stream` hands them to the rollout and the cache."""
    seen = {}

    def rollout(net, text_at, blocks, sigmas, generator, batch, view):
        seen.update(blocks=blocks, sigmas=sigmas, view=view, seed=generator.initial_seed())

    monkeypatch.setattr(evaluate, "rollout", rollout)
    monkeypatch.setattr(evaluate, "whole_clip", lambda stream: None)
    monkeypatch.setattr(evaluate, "decode", lambda codec, latents: None)
    net, clips = random_model(CONFIGS["student"], torch.float32), toy_world.draw_clips([0])
    evaluate.from_stream(net, None, 10, clips, 5, window=2, steps=3, pinned=False)
    assert (seen["blocks"], len(seen["sigmas"]), seen["seed"]) == (11, 4, 5)
    view = seen["view"]
    assert isinstance(view, kv_cache.CachedView) and (view.window, view.pinned) == (2, False)


# ---- compare ----


def test_compare_drift_measures_the_given_students(study):
    """In intervals of five seconds of the whole stream."""
    students = "--student", "student.safetensors", "second.safetensors"
    asked = study(compare, "drift", *students, "--clips", 4, "--seconds", 15, "--out", "d")
    made = {name: make for name, make in asked.rows.items() if name != "truth"}
    assert len(made) == 2 * len(compare.STREAMS) and set(asked.seeds.values()) == {4}
    assert {tuple(times) for times in asked.times.values()} == {((0, 5), (5, 10), (10, 15))}
    assert asked.written[0][0] == "d"


def test_compare_joint_measures_teacher_and_last_student(study):
    """Both whole and deaf."""
    options = "--student", "second.safetensors", "student.safetensors", "--clips", 4
    asked = study(compare, "joint", "--real", "real.safetensors", *options)
    assert holds(asked.rows["teacher"].args[0], "real")
    assert holds(asked.rows["stage III"].args[0], "student")
    assert set(asked.seeds.values()) == {4} and asked.written[0][0] == "results/joint"


def test_compare_controls_measures_the_chosen_ones(study, monkeypatch):
    """First and last five seconds, with the window of each."""
    made = {"a": compare.Student("student", 4, "x.py"), "b": compare.Student("second", 2, "x.py")}
    monkeypatch.setitem(compare.COMPARED, "controls", made)
    asked = study(compare, "controls", "--only", "b", "--clips", 4, "--seconds", 20)
    assert "a" not in asked.rows and holds(asked.rows["b"].args[0], "second")
    assert asked.rows["b"].keywords == {"window": 2} and asked.rows["b"].args[2] == 20
    assert asked.times["b"] == [(0, 5), (15, 20)] and asked.seeds["b"] == 4


@pytest.mark.parametrize("experiment", ["gallery", "identity"])
def test_pictures_show_the_chosen_caption(experiment, study, monkeypatch):
    """Number 5 of the held-out captions, from streams of ten seconds."""
    drawn, seconds = [], []
    draw_clips = toy_world.draw_clips

    def from_stream(net, codec, length, clips, seed):
        seconds.append(length)
        return torch.zeros(len(clips.words), 2, 3, 8, 8), torch.zeros(len(clips.words), 2, 16)

    def from_teacher(net, codec, sigmas, clips, seed):
        return from_stream(net, codec, 5, clips, seed)

    def stream_of(student, codec, length):
        return lambda clips, seed: from_stream(student, codec, length, clips, seed)

    monkeypatch.setattr(toy_world, "draw_clips", lambda s: drawn.append(list(s)) or draw_clips(s))
    monkeypatch.setattr(evaluate, "from_stream", from_stream)
    monkeypatch.setattr(evaluate, "from_teacher", from_teacher)
    monkeypatch.setattr(compare, "stream_of", stream_of)
    for name in ("draw_gallery", "draw_strips"):
        monkeypatch.setattr(plots, name, lambda *args, **options: None)
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(path))
    options = "--clip", 5, "--seconds", 10, "--student", "student.safetensors", "--out", "p"
    study(compare, experiment, *options, "--real", "real.safetensors")
    assert drawn[0][0] == toy_world.HELD_OUT + 5 and drawn[-1] == "p.png"
    assert set(seconds) - {5} == {10}


# ---- ablations ----


@pytest.fixture
def train(study, monkeypatch):
    """A function that runs an ablation without training: -> what would be trained."""
    asked = SimpleNamespace(drawn=[], variants=[])

    def load_or_draw(path, net, count, guidance, between, prompts):
        asked.drawn.append((path, net, count, tuple(guidance), between))
        data = torch.zeros(count, 5, 4, 2)
        return {"tokens": torch.zeros(count, 3), "video": data, "audio": data}

    def train_variant(variant, start, data, held, args):
        asked.variants.append((start, len(data["video"]), len(held["video"]), args.steps, args.lr))
        return {}

    def train_switch(switch, args):
        ablations.start_and_trajectories(switch.from_teacher, args)
        asked.variants.append((switch, args.steps))
        return "net"

    monkeypatch.setattr(ablations.ode_regression, "load_or_draw_trajectories", load_or_draw)
    monkeypatch.setattr(ablations, "train_variant", train_variant)
    monkeypatch.setattr(ablations, "train_switch", train_switch)
    table = lambda results: "table"  # noqa: E731
    for name, (known, steps, measure, _, _) in ablations.ABLATIONS.items():
        fake = known, steps, measure, table, table
        monkeypatch.setitem(ablations.ABLATIONS, name, fake)
    asked.study = lambda *options: study(ablations, *options, *TEACHERS, "--run", "run")
    return asked


def test_ablation_of_sinks(train):
    """Trajectories of the student of stage I; 32 of them are held back."""
    options = "--walks", 40, "--steps", 20, "--lr", 0.5, "--only", "S = 2", "--out", "s"
    written = train.study("sinks", *options).written
    ((path, net, count, guidance, between),) = train.drawn
    assert (path, count, guidance, between) == (
        "run/few_step_trajectories.safetensors", 40, (1, 1), 1
    )  # fmt: skip
    assert holds(net, "few_step")
    ((start, learnt, held, steps, lr),) = train.variants
    assert (learnt, held, steps, lr) == (8, 32, 20, 0.5)
    assert written[0][0] == "s" and "--lr 0.5" in written[0][1]


def test_ablation_of_switches(train):
    """Trajectories of the teacher are guided, and come in smaller steps."""
    options = "--walks", 40, "--clips", 3, "--steps", 7, "--only", "stage I left out"
    asked = train.study("switches", *options)
    ((path, net, count, guidance, between),) = train.drawn
    assert (path, count, guidance, between) == (
        "run/real_trajectories.safetensors", 40, (3.0, 5.0), 4
    )  # fmt: skip
    assert holds(net, "real")
    assert [steps for _, steps in train.variants] == [7]
    assert set(asked.seeds.values()) == {3} and asked.written[0][0] == "results/switches"
    assert asked.rows["stage I left out"].args[:1] == ("net",)


def test_the_rates_of_a_sink_training(monkeypatch):
    """--lr and --steps are those of its recipe."""
    seen = []

    def learner(net, recipe):
        seen.append(recipe)
        raise ValueError("begun")

    monkeypatch.setattr(ablations.trainer, "Learner", learner)
    start = random_model(CONFIGS["real"], torch.float32).state_dict()
    variant = replace(ablations.SINKS["S = 0"], cfg=replace(CONFIGS["student"], num_sinks=0))
    with pytest.raises(ValueError, match="begun"):
        ablations.train_variant(variant, start, {}, {}, SimpleNamespace(steps=20, lr=0.5))
    assert (seen[0].steps, seen[0].adam_lr, seen[0].muon_lr, seen[0].decay) == (20, 0.5, 0, 0)


# ---- plots ----


def test_masks_are_drawn_as_they_are_told(study, monkeypatch):
    """Config, blocks, window and place."""
    drawn = []
    monkeypatch.setattr(plots, "draw_masks", lambda *args: drawn.append(args))
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(path))
    options = "--config", "toy_released", "--blocks", 3, "--window", 1, "--out", "m.png"
    study(plots, "masks", *options)
    assert drawn == [(config.CONFIGS["toy_released"], 3, 1), "m.png"]


def test_losses_of_a_folder_are_drawn(tmp_path, monkeypatch, capsys):
    """Every curve in it, beside it."""
    (tmp_path / "x_curve.json").write_text(json.dumps([{"step": 1, "video": 2.0}]), "utf-8")
    plots.draw_losses(tmp_path)
    assert (tmp_path / "x_curve.png").exists()
