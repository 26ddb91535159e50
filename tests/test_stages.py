"""The trainings' command lines: every option arrives where it is used, and recipes are golden."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from helpers import random_model, run_here

import config
import dmd
import model
import ode_regression
import self_forcing
import teacher
from plumbing import files, stages, trainer
from toy import source

SMALL = dict(num_layers=1, num_heads=2, video_width=24, audio_width=16)
TEACHER = replace(config.TOY_TEACHER, **SMALL)
STUDENTS = {
    "toy": replace(config.TOY, **SMALL, num_sinks=4, sigmas=(1.0, 0.6, 0.3, 0.0)),
    "toy_released": replace(config.TOY_RELEASED, **SMALL),
}


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """A function that trains with small networks: -> what its parts were given.

    Updates, losses and trajectories are replaced by such that only remember their arguments.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "TOY", STUDENTS["toy"])
    monkeypatch.setattr(config, "TOY_TEACHER", TEACHER)
    for name, cfg in STUDENTS.items():
        monkeypatch.setitem(config.CONFIGS, name, cfg)
    for seed, name in enumerate(("teacher", "other", "student", "released"), 1):
        cfg = {"student": STUDENTS["toy"], "released": STUDENTS["toy_released"]}.get(name, TEACHER)
        tensors = random_model(cfg, torch.float32, seed).state_dict()
        files.save_weights(f"{name}.safetensors", tensors, cfg, {})
    given = SimpleNamespace(drawn=[])

    def make_update(generator, critic, real, guidance, make, draw):
        given.learners, given.real, given.guidance = [generator, critic], real, guidance
        given.make, given.draw = make, draw
        given.start = {n: p.clone() for n, p in generator.model.state_dict().items()}
        return lambda step: {"video": 0.0}

    def make_losses(net, data, recipe, prompts=None, **options):
        given.data, given.recipe, given.options = data, recipe, options
        given.start = {n: p.clone() for n, p in net.state_dict().items()}
        return lambda step: {"loss": sum(0 * p.sum() for p in net.parameters())}

    def draw_trajectories(net, sigmas, seeds, guidance, between, prompts):
        given.drawn.append((net, sigmas, list(seeds), guidance, between))
        return [torch.ones(len(seeds), 1) for _ in range(3)]

    monkeypatch.setattr(dmd, "make_update", make_update)
    monkeypatch.setattr(teacher, "make_losses", make_losses)
    monkeypatch.setattr(ode_regression, "make_losses", make_losses)
    monkeypatch.setattr(ode_regression, "draw_trajectories", draw_trajectories)
    needed = {
        teacher: [],
        dmd: ["--teacher", "teacher.safetensors"],
        ode_regression: ["--teacher", "teacher.safetensors", "--clips", 2],
        self_forcing: ["--teacher", "teacher.safetensors", "--student", "student.safetensors"],
    }

    def train(script, *options):
        places = ["--steps", 1, "--run", "run", "--out", "out.safetensors"]
        words = [*needed[script], *places, *options]
        status, given.out, given.err = run_here(script, words, monkeypatch, capsys)
        assert status in (0, 2)
        return given

    return train


def assert_holds(tensors, name):
    """The weights of a file, among these tensors."""
    for n, x in model.load(f"{name}.safetensors").state_dict().items():
        assert torch.equal(tensors[n], x)


ALL = pytest.mark.parametrize("script", [teacher, dmd, ode_regression, self_forcing])
STAGES = pytest.mark.parametrize("script", [dmd, ode_regression, self_forcing])
MATCHING = pytest.mark.parametrize("script", [dmd, self_forcing])


def recipes(given):
    return [x.recipe for x in given.learners] if hasattr(given, "learners") else [given.recipe]


@ALL
def test_steps_seed_and_places(script, train):
    """They reach every recipe; state, weights and curve are where they were asked for."""
    options = "--steps", 3, "--seed", 9, "--run", "there", "--out", "here/x.safetensors"
    given = train(script, *options)
    assert {(r.steps, r.seed) for r in recipes(given)} == {(3, 9)}
    _, _, made_by = files.read_weights("here/x.safetensors")
    assert made_by["steps"] == 3 and "--steps 3 --seed 9" in made_by["command"]
    with open("here/x_curve.json", encoding="utf-8") as curve:
        assert json.load(curve)[-1]["step"] == 3
    assert trainer.state_of("there").exists() and not trainer.state_of("run").exists()


@STAGES
def test_batch(script, train):
    """Of every learner."""
    assert {r.batch for r in recipes(train(script, "--batch", 4))} == {4}


@ALL
def test_another_seed_is_another_start(script, train):
    """New weights, or at least new sinks, are drawn by the seed; what is in a file is not."""
    runs = enumerate((0, 0, 1))
    first, *others = (train(script, "--seed", n, "--run", f"run{i}").start for i, n in runs)
    same = [all(torch.equal(first[n], x[n]) for n in first) for x in others]
    assert same == [True, script in (dmd, self_forcing)]


@MATCHING
def test_guidance_of_the_real_score(script, train):
    """Not the default."""
    assert train(script).guidance == teacher.GUIDANCE
    assert train(script, "--guidance", 2, 7, "--run", "run2").guidance == [2, 7]


@MATCHING
def test_the_teacher_gives_the_real_score_and_the_critics_start(script, train):
    """The real score is frozen, the critic learns."""
    given = train(script, "--teacher", "other.safetensors")
    for net, learns in ((given.real, False), (given.learners[1].model, True)):
        assert_holds(net.state_dict(), "other")
        assert all(p.requires_grad == learns for p in net.parameters())
    assert given.draw.__self__ is source.TOY_PROMPTS


def test_stage_i_starts_at_its_teacher(train):
    """And makes its clips by backward simulation."""
    given = train(dmd, "--teacher", "other.safetensors")
    assert_holds(given.start, "other")
    assert given.make is dmd.backward_simulation


def test_stage_iii_starts_at_its_student(train):
    """A student of another config, too."""
    assert_holds(train(self_forcing).start, "student")
    options = "--config", "toy_released", "--student", "released.safetensors", "--run", "run2"
    assert_holds(train(self_forcing, *options).start, "released")


@pytest.mark.parametrize(
    "options, name, value",
    [
        ((), "window", 4),
        (("--window", 2), "window", 2),
        ((), "share_exit", True),
        (("--exit", "own"), "share_exit", False),
        ((), "history", None),
        (("--history", "true"), "history", source.true_latents),
    ],
)
def test_options_of_the_rollout(options, name, value, train):
    """Window, exit and history reach `rollout_clip`."""
    make = train(self_forcing, *options).make
    assert make.func is self_forcing.rollout_clip and make.keywords[name] == value


def test_options_of_the_trajectories(train):
    """Number, guidance and steps in between; drawn by the teacher, at the student's levels."""
    options = "--clips", 20, "--guidance", 2, 7, "--between", 3, "--teacher", "other.safetensors"
    given = train(ode_regression, *options)
    first = ode_regression.FIRST_SEED
    assert sum((seeds for _, _, seeds, *_ in given.drawn), []) == list(range(first, first + 20))
    for net, sigmas, _, guidance, between in given.drawn:
        assert (sigmas, guidance, between) == (STUDENTS["toy"].sigmas, [2, 7], 3)
        assert_holds(net.state_dict(), "other")
    assert len(given.data["tokens"]) == 20
    assert_holds(given.start, "other")


def test_options_of_the_regression(train):
    """Weights of the two losses, windows of the masks, config of the student."""
    given = train(ode_regression)
    assert (given.options["weights"], given.options["windows"]) == ((1, 1), [None])
    options = "--loss-weights", 1, 0.16, "--windows", 0, 2, "--run", "run2"
    given = train(ode_regression, *options)
    assert (given.options["weights"], given.options["windows"]) == ([1, 0.16], [0, 2])
    train(ode_regression, "--config", "toy_released", "--run", "run3")
    assert model.load("out.safetensors").cfg == STUDENTS["toy_released"]


def test_a_teacher_may_start_at_weights(train):
    """Otherwise it starts as a new model."""
    assert_holds(train(teacher, "--init", "other.safetensors").start, "other")


@pytest.mark.parametrize(
    "script, option",
    [(teacher, "--init"), (dmd, "--teacher"), (ode_regression, "--teacher"),
     (self_forcing, "--teacher")],
)  # fmt: skip
def test_a_causal_student_is_no_teacher(script, option, train, monkeypatch, capsys):
    """It would be asked for whole clips, which it has never seen."""
    words = [option, "student.safetensors", "--run", "run", "--out", "out.safetensors"]
    status, _, err = run_here(script, words, monkeypatch, capsys)
    told = "student.safetensors: a causal student, made for config 'toy'; expected a teacher"
    assert (status, err) == (2, f"{script.__name__}.py: {told}\n")


def test_losses_without_weight_are_refused(train, monkeypatch, capsys):
    """Nothing would be learnt."""
    status, _, err = run_here(ode_regression, ["--loss-weights", 0, 0], monkeypatch, capsys)
    assert status == 2 and "--loss-weights 0 0: nothing would be learnt" in err


# ---- going on ----


@STAGES
def test_a_training_goes_on_however_it_is_called(script, train, tmp_path):
    """The teacher by another path, defaults spelt out, more steps: the same training, longer."""
    train(script)
    drawn = len(train(script).drawn)
    config_of_it = [] if script is dmd else ["--config", "toy"]
    (tmp_path / "elsewhere.safetensors").symlink_to(tmp_path / "teacher.safetensors")
    same = "--teacher", tmp_path / "elsewhere.safetensors", *config_of_it, "--batch", 8
    given = train(script, "--steps", 2, "--device", "cpu", *same)
    assert "step 1 of 1 so far; goes on to step 2" in given.out
    assert len(given.drawn) == drawn
    assert files.read_weights("out.safetensors")[2]["steps"] == 2


@pytest.mark.parametrize(
    "script, options, told",
    [
        (dmd, ("--guidance", 2, 7), "--guidance was [3.0, 5.0], now [2.0, 7.0]"),
        (dmd, ("--seed", 3), "--seed was 0, now 3"),
        (ode_regression, ("--windows", 0, 2), "--windows was None, now [0, 2]"),
        (ode_regression, ("--loss-weights", 1, 2), "--loss-weights was [1.0, 1.0], now [1.0, 2.0]"),
        (ode_regression, ("--clips", 4), "--clips was 2, now 4"),
        (self_forcing, ("--window", 3), "--window was 4, now 3"),
        (self_forcing, ("--history", "true"), "--history was own, now true"),
        (self_forcing, ("--exit", "own"), "--exit was shared, now own"),
        (self_forcing, ("--teacher", "other.safetensors"), "hash of the teacher's weights was"),
        (dmd, ("--teacher", "other.safetensors"), "hash of the student's weights was"),
        (teacher, ("--init", "other.safetensors"), "hash of the start's weights was None, now"),
    ],
)
def test_another_training_is_refused_by_the_option_that_differs(script, options, told, train):
    """One line that names it, and weights and state stay as they were."""
    train(script)
    before = trainer.state_of("run").read_bytes()
    given = train(script, *options)
    assert told in given.err and given.err.count("\n") == 1
    assert trainer.state_of("run").read_bytes() == before


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(config="toy_released"), "--config was toy, now toy_released"),
        (dict(identity="5e6f"), "--prompts was 1a2b, now 5e6f"),
        (dict(device="cuda", run="there", out="here", config=None, batch=4), ""),
    ],
)
def test_settings_are_what_a_training_does(changes, told):
    """Its config by name, its prompts by what they say; not where it runs, reads and writes."""

    def settings(identity="1a2b", **changes):
        args = dict(config="toy", device=None, run="run", out="x", batch=8, guidance=(3, 5))
        source = SimpleNamespace(prompts=SimpleNamespace(identity=identity))
        return stages.settings(SimpleNamespace(**{**args, **changes}), source, teacher="77")

    assert settings()["--guidance"] == (3, 5)
    assert trainer.differences(settings(), settings(**changes)) == told


# ---- recipes ----

FULL = dict(batch=32, seed=7, muon_lr=0, adam_lr=2e-5, weight_decay=0.01, decay=0.0, clip=1.0)
TOY = dict(batch=8, seed=7, weight_decay=0.01, decay=0.5, clip=1.0)
ADAM = dict(muon_lr=0, betas=(0.0, 0.95), ema=0.95)
MUON = dict(betas=(0.9, 0.98), warmup=30)


@pytest.mark.parametrize(
    "recipe, expected",
    [
        (dmd.make_recipes(400, 7, 32, is_toy=False)[0],
         dict(FULL, steps=400, betas=(0.0, 0.999), warmup=1, ema=0.99)),
        (dmd.make_recipes(400, 7, 32, is_toy=False)[1],
         dict(FULL, steps=400, betas=(0.0, 0.999), warmup=1, ema=0.0)),
        (ode_regression.make_recipe(3000, 7, 32, is_toy=False),
         dict(FULL, steps=3000, betas=(0.9, 0.999), warmup=100, ema=0.99)),
        (dmd.make_recipes(150, 7)[0], dict(TOY, **ADAM, steps=150, adam_lr=2e-4, warmup=10)),
        (dmd.make_recipes(150, 7)[1], dict(TOY, **ADAM, steps=150, adam_lr=5e-4, warmup=1)),
        (ode_regression.make_recipe(2500, 7),
         dict(TOY, **MUON, steps=2500, muon_lr=0.005, adam_lr=5e-4, ema=0.98)),
        (trainer.Recipe(6000, seed=7),
         dict(TOY | MUON, steps=6000, batch=16, muon_lr=0.02, adam_lr=1.5e-3, ema=0.995)),
    ],
    ids=["generator", "critic", "regression", "toy generator", "toy critic", "toy regression",
         "toy teacher"],
)  # fmt: skip
def test_a_recipe_is_what_it_was(recipe, expected):
    """Every number; those of the full size are the paper's where it gives them."""
    assert asdict(recipe) == expected


def test_steps_batches_and_constants_are_what_they_were():
    """Toy and full size (paper)."""
    assert (dmd.STEPS, ode_regression.STEPS) == ((150, 400), (2500, 3000))
    assert dmd.CRITIC_UPDATES * dmd.STEPS[1] == 2000  # each with an update of the critic
    assert (dmd.MIN_TIME, dmd.MAX_TIME, teacher.SHIFT) == (0.02, 0.98, 8.0)
    assert (teacher.GUIDANCE, ode_regression.CLEAN_SHARE) == ((3.0, 5.0), 0.25)
