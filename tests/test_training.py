"""Training: exact resumption, refusals that name the step, rates, averages, golden losses.

Golden losses were recorded on one x86 machine. Other CPUs and thread counts add up in another order
and round differently, at about 1e-7 a step; 1e-4 relative leaves room for ten steps of that, and
none for another method.
"""

import json
import sys
from dataclasses import replace

import pytest
import torch
from helpers import PAPER, ROOT, random_clip, run_here, tiny
from safetensors.torch import save_file

import config
import dmd
import model
import ode_regression
import self_forcing
import teacher
from kv_cache import MaskedView
from masks import clip_span
from plumbing import cli, files, stages, trainer
from toy.source import TOY_PROMPTS
from toy.training import TrainingClips

RECIPE = trainer.Recipe(steps=10, batch=2, warmup=3, seed=5)
GOLDEN = dict(rel=1e-4)
TEACHER_LOSSES = [
    3.95904, 3.75837, 4.66510, 3.47642, 3.70784,
    3.02950, 3.52818, 3.88575, 3.86818, 3.35637,
]  # fmt: skip
ODE_LOSSES = [
    3.88654, 4.09398, 3.89287, 4.05222, 4.28599,
    4.09147, 3.78231, 3.88177, 3.67269, 3.87234,
]  # fmt: skip
SMALL = dict(num_layers=1, num_heads=2, video_width=24, audio_width=16)
TINY_TEACHER = replace(config.TOY_TEACHER, **SMALL)
TINY_STUDENT = tiny(PAPER, num_layers=1, num_sinks=4)
SPAN = clip_span(2, TINY_STUDENT)


def quadratic(net):
    """A small task: velocities of random clips shall be 1; fresh clips at every step."""

    def losses(step):
        g = trainer.generator(5, step)
        video, audio = (torch.randn(2, n, c, generator=g) for n, c in ((16, 5), (26, 3)))
        sigma = torch.rand(2, generator=g)
        text = net.project_text(torch.eye(9)[None, :3].expand(2, -1, -1))
        v, a = net(video, audio, sigma, sigma, text, SPAN, MaskedView())
        return {"loss": (v - 1).square().mean() + (a - 1).square().mean(), "mean": v.mean()}

    return losses


class OneRun(trainer.Run):
    """A run of one learner by its losses; default: the quadratic task."""

    def __init__(self, folder=None, recipe=RECIPE, command="python x.py", settings=None):
        self.learner = trainer.Learner(model.build(TINY_STUDENT), recipe)
        self.model = self.learner.model
        self.losses = quadratic(self.model)
        super().__init__({"net": self.learner}, command, folder, settings)

    def descend(self, losses=None, **options):
        self.train(trainer.descent(self.learner, losses or self.losses), **options)


def finished_run(folder=None, **options):
    run = OneRun(folder, **options)
    run.descend()
    return run


def assert_equal_runs(one, other):
    a, b = one.learner.tensors(), other.learner.tensors()
    assert a.keys() == b.keys() and any("momentum" in n for n in a)
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


class Kill(Exception):
    pass


def killed_at(step, losses):
    def or_die(s):
        if s == step:
            raise Kill
        return losses(s)

    return or_die


# ---- resumption ----


@pytest.mark.parametrize("step", [0, 3, 7])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path, step, capsys):
    """Killed before the first save, in the warm-up or in the decay: bitwise the same end."""
    often = dict(print_every=1, save_every=2)
    whole, first = OneRun(), OneRun(tmp_path)
    whole.descend(**often)
    with pytest.raises(Kill):
        first.descend(killed_at(step, first.losses), **often)
    second = OneRun(tmp_path)
    assert second.step == step // 2 * 2
    second.descend(**often)
    assert_equal_runs(whole, second)
    assert whole.log == second.log and len(whole.log) == 10


def test_a_kill_while_writing_leaves_the_old_state(tmp_path, monkeypatch, capsys):
    """The new state is written beside the old one: half of it does no harm and is cleared away."""
    run = OneRun(tmp_path)
    with pytest.raises(Kill):
        run.descend(killed_at(4, run.losses), save_every=2)
    before = run.file.read_bytes()

    def half(tensors, path, metadata):
        path.write_bytes(before[:1000])
        raise Kill

    monkeypatch.setattr(trainer, "save_file", half)
    with pytest.raises(Kill):
        run.save()
    assert run.file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_finished_run_is_not_trained_again(tmp_path, capsys):
    """Resuming at the end of the recipe asks for no loss and changes nothing."""
    run, again = finished_run(tmp_path), OneRun(tmp_path)
    again.descend(killed_at(10, again.losses))
    assert again.step == 10
    assert_equal_runs(run, again)


@pytest.mark.parametrize("change", [dict(steps=0), dict(steps=-5), dict(batch=0)])
def test_a_recipe_without_steps_or_clips_is_refused(change):
    """It would ship what it began with as if it had been trained."""
    with pytest.raises(ValueError, match=".+=.+: expected 1 or more"):
        replace(RECIPE, **change)


SETTINGS = {"--guidance": (3.0, 5.0), "hash of the teacher's weights": "1b2c"}


@pytest.mark.parametrize(
    "change, told",
    [
        (dict(recipe=replace(RECIPE, seed=6)), "--seed was 5, now 6"),
        (dict(recipe=replace(RECIPE, batch=4)), "--batch was 2, now 4"),
        (dict(recipe=replace(RECIPE, adam_lr=2e-3)), "net's adam_lr was 0.0015, now 0.002"),
        (dict(settings={**SETTINGS, "--guidance": (3.0, 4.0)}),
         "--guidance was [3.0, 5.0], now [3.0, 4.0]"),
        (dict(settings={**SETTINGS, "hash of the teacher's weights": "9e"}),
         "hash of the teacher's weights was 1b2c, now 9e"),
        (dict(settings={**SETTINGS, "--windows": [1]}), "--windows was None, now [1]"),
        (dict(recipe=replace(RECIPE, steps=9)), "--steps was 10, now 9"),
        (dict(recipe=replace(RECIPE, batch=4, seed=6)),
         "--batch was 2, now 4, --seed was 5, now 6"),
    ],
)  # fmt: skip
def test_the_state_of_another_training_is_refused(tmp_path, change, told, capsys):
    """The message names the file, what differs, and what to do."""
    run = finished_run(tmp_path, settings=SETTINGS)
    with pytest.raises(ValueError) as error:
        OneRun(tmp_path, **{"settings": SETTINGS, **change})
    advice = "choose another --run, or remove it to start anew"
    assert str(error.value) == f"{run.file}: belongs to another training ({told}); {advice}"


def test_a_run_called_in_another_way_is_continued(tmp_path, capsys):
    """What counts is what it does; lists and tuples are the same, as in JSON."""
    finished_run(tmp_path, settings=SETTINGS)
    other = {name: list(x) if name == "--guidance" else x for name, x in SETTINGS.items()}
    assert OneRun(tmp_path, command="python x.py --config toy", settings=other).step == 10


def test_more_steps_make_a_run_longer(tmp_path, capsys):
    """Extended before its rates fall, it equals a run that was longer from the start; a finished
    run takes the additional steps."""
    longer = replace(RECIPE, steps=12)
    whole, first = OneRun(recipe=longer), OneRun(tmp_path)
    whole.descend(print_every=1)
    with pytest.raises(Kill):
        first.descend(killed_at(4, first.losses), print_every=1, save_every=2)
    second = OneRun(tmp_path, recipe=longer)
    assert (second.step, capsys.readouterr().out.splitlines()[-1]) == (
        4, "step 4 of 10 so far; goes on to step 12"
    )  # fmt: skip
    second.descend(print_every=1)
    assert_equal_runs(whole, second)
    third = OneRun(tmp_path, recipe=replace(RECIPE, steps=13))
    third.descend()
    assert (third.step, third.log[-1]["step"]) == (13, 13)


def test_fewer_steps_end_a_run_that_has_as_many(tmp_path, capsys):
    """Stopped at step 4 of 10, it may end there; what it has done is not undone."""
    first = OneRun(tmp_path)
    with pytest.raises(Kill):
        first.descend(killed_at(4, first.losses), save_every=2)
    assert OneRun(tmp_path, recipe=replace(RECIPE, steps=4)).step == 4
    with pytest.raises(ValueError, match="--steps was 10, now 3"):
        OneRun(tmp_path, recipe=replace(RECIPE, steps=3))


@pytest.fixture
def slow(monkeypatch):
    """Every step takes 60 s."""
    clock = iter(range(0, 10**6, 60))
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: next(clock))


def test_a_resumed_run_keeps_its_time(tmp_path, slow, capsys):
    """The minutes in the weight file are those of all its parts."""
    run = OneRun(tmp_path)
    with pytest.raises(Kill):
        run.descend(killed_at(4, run.losses), save_every=2)
    again = OneRun(tmp_path)
    assert again.seconds == 240
    again.descend()
    assert (again.seconds, again.made_by()["minutes"]) == (600, 10)


def test_a_state_of_an_earlier_version_is_refused(tmp_path):
    """It does not tell what its run does."""
    file = trainer.state_of(tmp_path)
    save_file({"x": torch.zeros(1)}, file, {"run": json.dumps({"step": 3, "of": {}})})
    with pytest.raises(ValueError, match=f"^{file}: of an earlier version; remove it to start"):
        OneRun(tmp_path)


WEIGHTS = {
    name: str(ROOT / "weights" / f"toy_{name}.safetensors")
    for name in ("teacher", "dmd", "ode_regression")
}


@pytest.mark.parametrize(
    "script, given, hashed",
    [
        (dmd, {"--teacher": "teacher"}, {"teacher": "teacher", "student": "teacher"}),
        (ode_regression, {"--teacher": "dmd"}, {"teacher": "dmd"}),
        (self_forcing, {"--teacher": "teacher", "--student": "ode_regression"},
         {"teacher": "teacher", "student": "ode_regression"}),
        (teacher, {"--init": "teacher"}, {"start": "teacher"}),
    ],
)  # fmt: skip
def test_a_run_knows_all_weights_that_it_begins_with(
    script, given, hashed, tmp_path, monkeypatch, capsys
):
    """Every file on the command line is told to the run, by a hash of what it holds, not by its
    path; teacher.py tells its codec as well."""
    told = []

    def run(learners, command, folder, settings):
        told.append(settings)
        raise ValueError("begun")

    monkeypatch.setattr(trainer, "Run", run)
    monkeypatch.setattr(ode_regression, "load_or_draw_trajectories", lambda *args, **kwargs: None)
    options = [word for option, name in given.items() for word in (option, WEIGHTS[name])]
    options += ["--run", tmp_path, "--out", tmp_path / "x.safetensors"]
    assert run_here(script, options, monkeypatch, capsys)[0] == 2
    for role, name in hashed.items():
        expected = files.fingerprint(model.load(WEIGHTS[name]).state_dict())
        assert told[0][f"hash of the {role}'s weights"] == expected
    assert script is not teacher or "hash of the codec's weights" in told[0]
    assert not any(str(ROOT) in str(value) for value in told[0].values())


@pytest.mark.parametrize("about", [None, {}, {"run": "{"}, {"run": "3"}, {"run": "[1]"}])
def test_a_foreign_state_is_refused_by_file(about, tmp_path):
    """Metadata that are missing, no JSON or no table: one line that names the file."""
    file = trainer.state_of(tmp_path)
    save_file({"x": torch.zeros(1)}, file, about)
    with pytest.raises(ValueError, match=f"^{file}: not a whole state file "):
        OneRun(tmp_path)


@pytest.mark.parametrize("seed", [-1, 4294, 5 + 2**32, 2**70])
def test_a_seed_that_would_draw_anothers_numbers_is_refused(seed):
    """Generators use 32 bits, which the last seed that is accepted does not exceed."""
    with pytest.raises(ValueError, match=f"^seed={seed}: expected 0 to 4293$"):
        replace(RECIPE, seed=seed)
    last = replace(RECIPE, seed=4293).seed
    assert trainer.generator(last, 10**6 - 1).initial_seed() < 2**32


def test_randomness_of_a_step_depends_on_seed_and_step_only():
    """Neighbouring steps and seeds draw different numbers, the same pair the same."""
    draws = [torch.rand(4, generator=trainer.generator(*p)) for p in ((0, 1), (1, 0), (0, 0))]
    assert len(torch.stack(draws).unique()) == 12
    assert torch.equal(draws[0], torch.rand(4, generator=trainer.generator(0, 1)))


# ---- what is not finite ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_the_step(value, capsys):
    """Step 4 has no loss: the message says so, and the weights are those after 4 steps."""
    run = OneRun()

    def bad(step):
        values = run.losses(step)
        return {"loss": values["loss"] * value} if step == 4 else values

    with pytest.raises(ValueError, match=f"^step 4: the loss is {value}; try another seed, or"):
        run.descend(bad)
    assert run.step == 4 and all(p.isfinite().all() for p in run.model.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_with_step_and_tensor(bad, capsys):
    """The very tensor is named, not the first one; and no weight has been touched."""
    run, name = OneRun(), "layers.0.audio.mlp_in.weight"
    parameter = run.model.get_parameter(name)
    parameter.register_hook(lambda g: g * bad if run.step == 2 else g)
    run.model.get_parameter("layers.0.audio.mlp_out.weight").data.fill_(0.1)
    with pytest.raises(ValueError, match=f"^step 2: gradient of {name} is not finite$"):
        run.descend()
    assert all(p.isfinite().all() for p in run.model.parameters())


# ---- rates, optimisers, average ----


def test_learning_rates_follow_the_schedule(capsys):
    """Both optimisers see warm-up, plateau and linear decay, each times its own full rate."""
    run, seen = OneRun(), []

    def recording(step):
        if step:
            seen.append([o.param_groups[0]["lr"] for o in run.learner.optimisers])
        return run.losses(step)

    run.descend(recording)
    shares = [1 / 3, 2 / 3, 1, 1, 1, 1, 0.8, 0.6, 0.4]
    assert [m for m, _ in seen] == pytest.approx([0.02 * s for s in shares])
    assert [a for _, a in seen] == pytest.approx([1.5e-3 * s for s in shares])


def test_muon_gets_the_matrices_of_the_layers_and_adam_the_rest():
    """Every parameter has exactly one optimiser; tables, biases, entrances, exits are AdamW's."""
    net = model.build(TINY_STUDENT)
    groups = [o.param_groups[0]["params"] for o in trainer.optimisers(net, RECIPE)]
    names = {p: n for n, p in net.named_parameters()}
    muon, adam = ({names[p] for p in group} for group in groups)
    assert len(groups[0]) + len(groups[1]) == len(names) == len(muon | adam)
    assert all(net.get_parameter(n).dim() == 2 and n.startswith("layers.") for n in muon)
    assert {"layers.0.video.self_attn.to_q.weight", "layers.0.audio.mlp_out.weight"} <= muon
    assert {"video.proj_in.weight", "sinks.tokens", "layers.0.audio.table"} <= adam
    (alone,) = trainer.optimisers(net, replace(RECIPE, muon_lr=0))
    assert set(alone.param_groups[0]["params"]) == set(names)


def test_gradients_are_clipped_to_the_norm_of_the_recipe():
    """The norm returned is that before clipping; what the optimisers see has norm 1."""
    run, seen = OneRun(), []
    parameters = list(run.model.parameters())
    run.learner.optimisers[0].step = lambda: seen.extend(p.grad.clone() for p in parameters)
    norm = run.learner.update(1000 * run.losses(0)["loss"], 0)
    assert norm > 10
    assert float(torch.stack([g.norm() for g in seen]).norm()) == pytest.approx(1, rel=1e-4)


def test_the_average_follows_fast_at_first_and_slowly_later():
    """a <- d a + (1 - d) w with d = min(decay, (1 + step) / (10 + step))."""
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    average, expected = trainer.Averaged(net, 0.9), 0.0
    for step in (0, 1, 50, 1000):
        net.weight.data.fill_(float(step + 1))  # moves no average: it is no view of the weights
        average.update(net, step)
        d = min(0.9, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * (step + 1)
        assert average.tensors["weight"].item() == pytest.approx(expected)


def test_progress_is_one_short_line_an_interval(capsys):
    """A line every four steps and one at the end: step, losses, time left; the log likewise."""
    run = OneRun()
    run.descend(print_every=4)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["4/10", "8/10", "10/10"]
    assert all("loss" in line and "min left" in line and len(line) < 80 for line in lines)
    assert [row["step"] for row in run.log] == [4, 8, 10]


def test_the_time_left_is_in_minutes(slow, capsys):
    """After 4 of 10 steps of a minute, 6 are left."""
    OneRun().descend(print_every=4)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(", ")[2] for line in lines] == [
        "6 min left", "2 min left", "0 min left"
    ]  # fmt: skip


# ---- golden losses ----


def losses_recorded(net, losses):
    """The losses of ten steps of training."""
    update = trainer.descent(trainer.Learner(net, RECIPE), losses)
    return [float(update(step)["loss"].detach()) for step in range(10)]


def random_trajectories():
    """Four states of four clips, of the right shapes and no meaning."""
    torch.manual_seed(0)
    walks = [random_clip(TINY_STUDENT, 6, clips=4, dtype=torch.float32) for _ in range(5)]
    video, audio = (torch.stack(states, 1) for states in zip(*walks))
    return {"tokens": torch.tensor([[1, 5, 7]] * 4), "video": video, "audio": audio}


def test_ten_golden_losses_of_the_teacher(capsys):
    """Flow matching on true clips: data, codec, noise, model and optimisers are what they were."""
    net = model.build(TINY_TEACHER)
    losses = losses_recorded(net, teacher.make_losses(net, TrainingClips(), RECIPE))
    assert losses == pytest.approx(TEACHER_LOSSES, **GOLDEN)
    assert losses[-1] < losses[0]


def test_ten_golden_losses_of_ode_regression(capsys):
    """Regression of made-up trajectories: levels, masks, sinks and loss are what they were."""
    net = model.build(TINY_STUDENT)
    losses = ode_regression.make_losses(net, random_trajectories(), RECIPE, TOY_PROMPTS)
    losses = losses_recorded(net, losses)
    assert losses == pytest.approx(ODE_LOSSES, **GOLDEN)


def test_shipped_weights_say_how_they_were_made(tmp_path, capsys, monkeypatch):
    """Half precision of the averages, with command, steps and versions; the curve beside it."""
    monkeypatch.chdir(tmp_path)
    run = finished_run()
    run.write_student("weights/net.safetensors")
    tensors, cfg, made_by = files.read_weights("weights/net.safetensors")
    assert cfg == TINY_STUDENT
    assert (made_by["command"], made_by["steps"]) == ("python x.py", 10)
    assert made_by["torch"] == torch.__version__
    assert all(torch.equal(t, run.learner.average.tensors[n].half()) for n, t in tensors.items())
    assert (tmp_path / "results" / "net_curve.json").is_file()


def test_the_curve_of_weights_elsewhere_stays_with_them(tmp_path, monkeypatch, capsys):
    """Only the curves of released weights go to results/."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    run = finished_run()
    for out in (elsewhere / "net.safetensors", "../elsewhere/other.safetensors"):
        run.write_student(out)
    names = {p.name for p in elsewhere.iterdir()}
    assert {"net_curve.json", "other_curve.json"} < names and not list(here.iterdir())
    run.write_student("runs/controls/net.safetensors")
    assert (here / "runs" / "controls" / "net_curve.json").is_file()
    assert not (here / "results").exists()


# ---- command lines ----


@pytest.mark.parametrize("script", [dmd, ode_regression, self_forcing, teacher])
@pytest.mark.parametrize("option", ["--out", "--run"])
@pytest.mark.parametrize("folder", ["/proc/x", "file"])
def test_a_place_that_cannot_be_written_is_refused_first(
    script, option, folder, tmp_path, monkeypatch, capsys
):
    """Before anything is read or drawn: one line that names it, and no folder is left."""
    (tmp_path / "file").touch()
    place = tmp_path / folder / "x"  # /proc/x/x where folder is absolute
    options = {"--run": tmp_path / "run", "--out": tmp_path / "new" / "x", option: place}
    monkeypatch.setattr(model, "load", None)
    monkeypatch.setattr(model, "build", None)
    words = [word for pair in options.items() for word in pair]
    status, _, err = run_here(script, words, monkeypatch, capsys)
    assert status == 2 and len(err.splitlines()) == 1
    assert f"{place}" in err and "choose another place" in err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def config_with(**changes):
    """What a file says of its config, with some of it changed."""
    return json.dumps(TINY_STUDENT.to_dict() | changes)


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"config": "3"}, "a config of 3"),
        ({"config": "{"}, "Expecting property name"),
        ({"config": "{}"}, "config fields missing or unknown: audio_channels, "),
        ({"config": config_with(num_layers="four")}, "num_layers='four'"),
        ({"config": config_with(sigmas=1.0)}, "sigmas=1.0"),
        ({"config": config_with(pixel_stride=0)}, ""),
        ({"config": config_with(), "made_by": "{"}, "Expecting property name"),
    ],
)
def test_foreign_metadata_are_refused_by_file(metadata, message, tmp_path):
    """No JSON, another kind of value or of table: one line that names the file."""
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata)
    with pytest.raises(ValueError, match=f"^{path}: its metadata is not this project's .{message}"):
        files.read_weights(path)


@pytest.mark.parametrize("name", ["hpu", "xla", "privateuseone"])
def test_a_device_that_is_not_there_is_refused_in_a_sentence(name):
    """Also where torch looks for a module, or explains itself for a paragraph."""
    with pytest.raises(ValueError, match=f"^--device {name}: not usable here ") as error:
        cli.find_device(name)
    assert str(error.value).endswith("; try --device cpu") and len(str(error.value)) < 160


@pytest.mark.parametrize("shape", [(40, 10), (10, 40), (16, 16)])
def test_muon_is_torchs_in_better_precision(shape):
    """Five steps end where torch.optim.Muon's do, within the rounding of its bfloat16."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    steppers = trainer.Muon([ours], 0.02, 0.01), torch.optim.Muon([theirs], 0.02, 0.01)
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(shape)
        for stepper in steppers:
            stepper.step()
    assert (ours - theirs).norm() < 0.02 * (ours - start).norm()


@pytest.mark.parametrize(
    "given, expected",
    [
        ([], (150, 8)),
        (["--config", "full"], (400, 32)),
        (["--config", "full", "--steps", "7", "--batch", "4"], (7, 4)),
    ],
)
def test_steps_and_batch_are_the_toys_or_the_papers(given, expected, monkeypatch):
    """By config, unless they are said."""
    monkeypatch.setattr(sys, "argv", ["dmd.py", *given])
    p = cli.parser("")
    stages.add_options(p, dmd.STEPS, "dmd")
    args = stages.parse(p, dmd.STEPS)
    assert (args.steps, args.batch) == expected


@pytest.mark.parametrize("run", ["there/x", "there/x/"])
def test_weights_lie_beside_the_folder_of_their_run(run, monkeypatch):
    """By default, and under its name; shells complete a folder with a slash."""
    monkeypatch.setattr(sys, "argv", ["dmd.py", "--run", run])
    p = cli.parser("")
    stages.add_options(p, dmd.STEPS, "dmd")
    assert stages.parse(p, dmd.STEPS).out == "there/x.safetensors"
