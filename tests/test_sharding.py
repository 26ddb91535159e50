"""Two processes are one: losses of the three stages, resumption, and weights at the end.

Two processes, connected by gloo, are started once and do everything; tests look at the files that
they leave. Sizes are tiny and weights random, so that no agreement is trivial.
"""

import contextlib
import copy
import json
import os
import socket
import sys
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp
from helpers import PAPER, ROOT, random_clip, random_model, run_here, tiny

import config
import dmd
import model
import ode_regression
import rollout
import self_forcing
from full_size import memory, sharding
from full_size import text as captions
from full_size import weights as ltx2
from kv_cache import MaskedView
from masks import clip_span, num_blocks
from plumbing import processes, trainer
from toy.source import TOY_PROMPTS, toy_captions
from toy.training import TrainingSource

TEACHER = tiny(replace(PAPER, name="toy_teacher"), num_sinks=0, num_layers=1)
STUDENT = tiny(PAPER, num_sinks=4, num_layers=1)
BLOCKS, STEPS = num_blocks(5, TEACHER), 2
ROUNDING = dict(rel=2e-4, abs=1e-6)  # float32, added up in another order, and AdamW steps of it

# the same as at full size: LTX-2's names, prompts by number, bfloat16
LTX2 = replace(TEACHER, name="tiny_ltx2", sigmas=(1.0, 0.5, 0.0))
FULL = replace(STUDENT, name="tiny_full", sigmas=(1.0, 0.5, 0.0))
SHORT = ["--steps", "1", "--batch", "2", "--prompts", "features", "--run", "run", "--out"]


# ---- what runs in every process ----


def trained(cfg, seed):
    """A net that learns, sharded among the processes; if there are several, layers run twice."""
    net = random_model(cfg, torch.float32, seed).requires_grad_(True)
    if processes.is_sharded():
        sharding.passes_apart(sharding.checkpoint_layers(net))
    return sharding.shard(net, torch.float32)


def matching(cfg, make):
    """An update of stage I or III, and who learns."""
    real = sharding.shard(random_model(TEACHER, torch.float32, 1), torch.float32)
    recipes = dmd.make_recipes(10, seed=3, batch=2)
    learners = dmd.make_learners(trained(cfg, 2), trained(TEACHER, 3), recipes)
    draw = TOY_PROMPTS.draw
    return dmd.make_update(*learners.values(), real, (2.0, 3.0), make, draw), learners


def regression():
    """The update of stage II on made-up trajectories, by AdamW, and who learns."""
    torch.manual_seed(0)
    states = [random_clip(STUDENT, BLOCKS, clips=4, dtype=torch.float32) for _ in STUDENT.sigmas]
    video, audio = (torch.stack(x, 1) for x in zip(*states))
    data = {"tokens": torch.tensor([[1, 5, 7]] * 4), "video": video, "audio": audio}
    recipe = trainer.Recipe(steps=4, batch=2, seed=5, muon_lr=0, warmup=1)
    learner = trainer.Learner(trained(STUDENT, 2), recipe)
    losses = ode_regression.make_losses(learner.model, data, recipe, TOY_PROMPTS)
    return trainer.descent(learner, losses), {"student": learner}


STAGES = {
    "dmd": partial(matching, TEACHER, dmd.backward_simulation),
    "ode_regression": regression,
    "self_forcing": partial(matching, STUDENT, partial(self_forcing.rollout_clip, window=4)),
}


def rows(stage):
    """What the first steps of a stage log, with one update of the critic instead of five."""
    dmd.CRITIC_UPDATES = 1
    update, learners = STAGES[stage]()
    run = trainer.Run(learners, "python x.py")
    run.steps = STEPS
    run.train(update, print_every=1)
    return run.log


def new_run(folder, die_at=None):
    """Stage II, killed at a step or not."""
    update, learners = regression()
    run = trainer.Run(learners, "python x.py", folder)

    def or_die(step):
        if step == die_at:
            raise KeyboardInterrupt
        return update(step)

    return run, or_die


def whole_state(run):
    return {name: processes.whole(x).clone() for name, x in run.student.tensors().items()}


def killed_and_resumed():
    """Whether a run that was killed at step 2 ends as one that was not, and what it left."""
    run, update = new_run(None)
    run.train(update, print_every=1)
    whole = whole_state(run)
    first, update = new_run("killed", die_at=2)
    with pytest.raises(KeyboardInterrupt):
        first.train(update, print_every=1, save_every=2)
    second, update = new_run("killed")
    resumed_at = second.step
    second.train(update, print_every=1, save_every=2)
    parts = whole_state(second)
    differing = [n for n in whole if not torch.equal(whole[n], parts[n])]
    return {"at": resumed_at, "differing": differing, "same_log": run.log == second.log,
            "keys": whole.keys() == parts.keys(), "left": sorted(os.listdir("killed"))}  # fmt: skip


def note_plan(nets, loss, batch):
    """Write down what a stage plans its memory for."""
    if processes.is_first():
        with open("plans", "a") as f:
            parts = [f"{name} {cfg.name} {recipe and recipe.ema}" for name, cfg, recipe in nets]
            f.write(f"{batch} of {', '.join(parts)}\n")


def distilled():
    """All three stages by their command lines, as at full size."""
    config.CONFIGS.update({cfg.name: cfg for cfg in (LTX2, FULL)})
    config.LTX2, memory.check_training = LTX2, note_plan
    stages = (
        (dmd, "tiny_ltx2", "--teacher", "teacher.safetensors"),
        (ode_regression, "tiny_full", "--teacher", "dmd.safetensors", "--clips", "4"),
        (self_forcing, "tiny_full", "--teacher", "teacher.safetensors",
         "--student", "ode_regression.safetensors"),
    )  # fmt: skip
    for script, name, *options in stages:
        out = f"{script.__name__}.safetensors"
        sys.argv = [f"{script.__name__}.py", "--config", name, *options, *SHORT, out]
        sys.argv[sys.argv.index("run")] = f"run_{script.__name__}"
        yield script.main


def work(rank, folder, ports):
    """One of two processes; the first writes down the results."""
    os.chdir(folder)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(ports[0])
    with processes.joined("cpu"):
        found = {"rows": {stage: rows(stage) for stage in STAGES}, "resumed": killed_and_resumed()}
        if processes.is_first():
            with open("found.json", "w") as f:
                json.dump(found, f)
    for main, port in zip(distilled(), ports[1:]):
        os.environ["MASTER_PORT"] = str(port)
        main()


def free_ports(n):
    with contextlib.ExitStack() as stack:
        servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
        return [stack.enter_context(server).getsockname()[1] for server in servers]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes worked."""
    folder = tmp_path_factory.mktemp("two")
    net = random_model(LTX2, torch.float32, 1)
    ltx2.save(folder / "teacher.safetensors", net.state_dict(), LTX2, {})
    features = captions.random_features(["a dog", "rain", ""], LTX2, dtype=torch.float32)
    short = {p: captions.Features(*(x[:, :5] for x in pair)) for p, pair in features.items()}
    captions.encode_to_folder(short.get, ["a dog", "rain"], "", folder / "features")
    mp.spawn(work, (folder, free_ports(4)), nprocs=2)
    return folder


# ---- what is claimed ----


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_log_what_one_logs(two, stage, capsys, monkeypatch):
    """Losses and gradient norms of all stages: each process has half of the batch and of the net,
    and computes its layers twice."""
    found = json.loads((two / "found.json").read_text())["rows"][stage]
    monkeypatch.setattr(dmd, "CRITIC_UPDATES", 1)
    for ours, one in zip(found, rows(stage), strict=True):
        assert ours == pytest.approx(one, **ROUNDING)
        assert ours["norm"] > 0


def test_a_killed_run_of_two_processes_goes_on_as_if_uninterrupted(two):
    """Resumed at the last sharded state; weights, average, moments and log end bitwise the same."""
    found = json.loads((two / "found.json").read_text())["resumed"]
    assert found["at"] == 2 and found["keys"] and found["same_log"]
    assert found["differing"] == []
    assert found["left"] == ["state-000004"]


def test_each_process_plans_for_its_own_clips(two):
    """One of the batch of two; with every network, its config, and its average if it learns."""
    matched = "1 of teacher tiny_ltx2 None, generator {} 0.99, critic tiny_ltx2 0.0"
    assert (two / "plans").read_text().splitlines() == [
        matched.format("tiny_ltx2"), "1 of student tiny_full 0.99", matched.format("tiny_full")
    ]  # fmt: skip


def test_consolidated_weights_are_read_as_ltx2_files(two, capsys):
    """All three stages by their command lines; flags are stated, sinks are there. Each stage has
    moved the weights of the stage before, a little: by a few steps of 2e-5."""
    before = random_model(LTX2, torch.float32, 1).state_dict()
    last = {n: w.bfloat16() for n, w in before.items()}
    capsys.readouterr()
    for name, cfg in (("dmd", LTX2), ("ode_regression", FULL), ("self_forcing", FULL)):
        net = ltx2.Source(two / f"{name}.safetensors", cfg).load()
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and "stated by the file" in said  # and no word of fresh sinks
        weights = net.state_dict()
        assert ("sinks.tokens" in weights) == (cfg is FULL)
        assert any((weights[n] != w).any() for n, w in last.items())
        last = {n: weights[n] for n in before}
        for n, w in before.items():
            torch.testing.assert_close(weights[n].float(), w, atol=0.02, rtol=0.01)
        assert json.loads((two / f"{name}_curve.json").read_text())[-1]["step"] == 1


# ---- alone ----


def rolled_gradients(net):
    """Gradients of a rollout of five seconds by every weight, and of what its captions say."""
    words = torch.eye(9)[None, [1, 5, 7]].double().requires_grad_()
    text, g = net.project_text(words), torch.Generator().manual_seed(1)
    exits = [1] * BLOCKS
    blocks = rollout.rollout(net, lambda k: text, BLOCKS, STUDENT.sigmas, g, exit_steps=exits)
    video, audio = rollout.whole_clip(blocks)
    (video.pow(2).mean() + audio.pow(2).mean()).backward()
    return [x.grad for x in (words, *net.parameters())]


def test_layers_that_run_twice_have_the_same_gradient(monkeypatch):
    """Stage III's rollout, to the last bit: a layer computed again, after the cache has moved on
    by up to five blocks, reads the history that it read at first."""
    cfg = replace(STUDENT, num_layers=2)
    kept, twice = (random_model(cfg).requires_grad_(True) for _ in range(2))
    runs, forward = [], model.Layer.forward

    def counted(layer, *args):
        runs.append(isinstance(layer, sharding.CheckpointedLayer))
        return forward(layer, *args)

    monkeypatch.setattr(model.Layer, "forward", counted)
    sharding.checkpoint_layers(twice)
    for a, b in zip(rolled_gradients(kept), rolled_gradients(twice), strict=True):
        assert torch.equal(a, b)
    passes = 2 * BLOCKS + BLOCKS - 1  # one before the exit, the exit, the refresh
    assert sum(runs) == cfg.num_layers * (passes + BLOCKS)


def test_passes_that_go_backward_alone_have_the_same_gradient():
    """Stage III's rollout in six backward calls instead of one, captions behind all of them; the
    gradient of a weight is complete, and added to the weight's own, after every pass."""
    at_once, apart = (random_model(STUDENT).requires_grad_(True) for _ in range(2))
    added = {name: [] for name in ("at once", "apart")}
    for net, counts in zip((at_once, apart), added.values()):
        weight = net.layers[0].video.self_attn.to_q.weight
        weight.register_post_accumulate_grad_hook(lambda p, counts=counts: counts.append(1))
    sharding.passes_apart(sharding.checkpoint_layers(apart))
    for a, b in zip(rolled_gradients(at_once), rolled_gradients(apart), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert [len(counts) for counts in added.values()] == [1, BLOCKS]


@pytest.fixture
def alone(monkeypatch):
    """The process group of torchrun with a single process."""
    port = str(free_ports(1)[0])
    places = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    for name, value in dict(places, MASTER_PORT=port).items():
        monkeypatch.setenv(name, value)
    with processes.joined("cpu"):
        yield


def test_noise_levels_reach_a_sharded_net_in_float32(alone, monkeypatch):
    """In bfloat16, 978.26 would be 976. Latents and captions are cast as in a net on one GPU."""
    net = random_model(TEACHER, torch.float32)
    told, embedding = [], model.timestep_embedding
    monkeypatch.setattr(model, "timestep_embedding", lambda t: embedding(told.append(t) or t))
    latents = random_clip(TEACHER, BLOCKS, dtype=torch.float32)
    sigma, span = torch.full((1,), 0.97826087), clip_span(BLOCKS, TEACHER)
    words = torch.eye(9)[None, [1, 5, 7]]

    def velocities(net, dtype):
        text = net.project_text(words.to(dtype))
        return net(*(x.to(dtype) for x in latents), sigma, sigma, text, span, MaskedView())

    whole = velocities(copy.deepcopy(net).bfloat16(), torch.bfloat16)
    told.clear()
    parts = velocities(sharding.shard(net, torch.bfloat16), torch.float32)
    assert {t.dtype for t in told} == {torch.float32}
    assert {round(t.item(), 3) for t in told} == {978.261}
    assert all(map(torch.equal, whole, parts))


def test_a_sharded_net_lacks_no_tensor(alone):
    """One that is missing would keep what was in the memory before."""
    tensors = random_model(TEACHER, torch.float32).state_dict()
    name, _ = tensors.popitem()
    net = sharding.shard(model.build(TEACHER, device="meta"), torch.float32)
    with pytest.raises(ValueError, match=f"^tensor {name} is missing$"):
        sharding.fill(net, tensors.items())


def test_gradients_are_averaged_in_float32(alone, monkeypatch):
    """Every layer, and the model around them, although they compute in bfloat16."""
    policies, fully_shard = [], torch.distributed.fsdp.fully_shard

    def recorded(net, mp_policy, **options):
        policies.append(mp_policy)
        return fully_shard(net, mp_policy=mp_policy, **options)

    monkeypatch.setattr(torch.distributed.fsdp, "fully_shard", recorded)
    sharding.shard(random_model(TEACHER, torch.float32), torch.bfloat16)
    found = {(p.param_dtype, p.reduce_dtype, p.cast_forward_inputs) for p in policies}
    assert found == {(torch.bfloat16, torch.float32, False)}
    assert len(policies) == TEACHER.num_layers + 1


def test_a_kill_while_writing_leaves_the_old_shards(alone, tmp_path, monkeypatch):
    """The next state that is written removes both the old one and the half one."""
    tensors = {"x": torch.ones(3)}
    sharding.save(tmp_path, tensors, {"step": 1})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("torch.distributed.checkpoint.save", mock.Mock(side_effect=KeyboardInterrupt))
        sharding.save(tmp_path, tensors, {"step": 2})
    assert sorted(os.listdir(tmp_path)) == [".state-000002", "state-000001"]
    sharding.save(tmp_path, tensors, {"step": 3})
    assert os.listdir(tmp_path) == ["state-000003"]


def test_means_over_processes_are_not_rounded(monkeypatch):
    """Of losses in bfloat16, where 1 + 1/512 would be 1, and of counts."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes.dist, "all_reduce", lambda x: x.add_(1 / 512))
    for x in (torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(3)):
        assert float(processes.averaged(x)) == (int(x) + 1 / 512) / 2


def test_a_window_that_forgets_is_refused_where_layers_run_twice():
    """One line that names the window and the shortest that will do."""
    net = sharding.checkpoint_layers(random_model(STUDENT, torch.float32).requires_grad_(True))
    given = net, None, toy_captions(torch.tensor([[1, 5, 7]])), torch.Generator()
    with pytest.raises(ValueError, match="^window=3: .* expected a window of 4 or more, "):
        self_forcing.rollout_clip(*given, window=3)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_process_draws_its_rows_of_the_whole_batch(monkeypatch, rank):
    """Uniform, normal and whole numbers in one stream; what has no rows is the same for all."""
    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(processes, "rank", lambda: rank)

    def drawn(n):
        g = torch.Generator().manual_seed(0)
        return (
            torch.rand(n, generator=g), torch.randint(9, (), generator=g),
            torch.randn((n, 2), generator=g), torch.randint(9, (n,), generator=g),
            torch.rand(n, 1, generator=g),
        )  # fmt: skip

    with processes.SharedDraws("cpu"):
        ours = drawn(2)
    for mine, whole in zip(ours, drawn(6)):
        assert torch.equal(mine, whole[2 * rank : 2 * rank + 2] if whole.dim() else whole)
    with pytest.raises(ValueError, match="a batch of 8 clips among 3 processes: choose a multiple"):
        processes.share_of(8)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--config", "full"], "--config full: start it by torchrun, even on a single GPU"),
        (["--prompts", "x"], "--prompts x: the toy draws its own; expected --config full"),
        (["--device", "cuda"], "--device cuda: start it by torchrun"),
        (["--config", "huge"], "--config huge: unknown; expected one of"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message, monkeypatch, capsys):
    """One line and exit status 2, before anything is read."""
    status, _, err = run_here(dmd, options, monkeypatch, capsys)
    assert status == 2 and message in err and len(err.splitlines()) == 1


def test_a_teachers_file_makes_two_nets():
    """The frozen teacher and the critic that starts as it: training one leaves the other."""
    path = ROOT / "weights" / "toy_teacher.safetensors"
    found = TrainingSource().open(path)
    real, critic = found.load(learns=False), found.load(learns=True)
    assert not any(p.requires_grad for p in real.parameters())
    for a, b in zip(real.parameters(), critic.parameters(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr() and b.requires_grad
