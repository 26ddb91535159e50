"""Ablations measure what they say, and their command lines run from start to end."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from helpers import random_clip, random_model, run_here

import config
import kv_cache
import model
from masks import clip_span, four_masks, num_blocks
from plumbing import cli, files
from studies import ablations, plots

CHANGES = ablations.with_gates, ablations.without_norm, ablations.with_large_logits
SMALL = dict(num_layers=1, num_heads=2, video_width=24, audio_width=16)
TINY = replace(config.TOY, **SMALL)
BLOCKS = num_blocks(5, TINY)


def span_of(cfg):
    return clip_span(num_blocks(5, cfg), cfg)


@pytest.mark.parametrize("S", [0, 4])
def test_the_probe_sees_what_the_first_audio_latent_may_see(S):
    """Weights over sinks and A0 sum to 1; without sinks entropy is 0; outputs do not change."""
    cfg = replace(TINY, num_sinks=S)
    net, masks = random_model(cfg, torch.float32), four_masks(cfg, BLOCKS)
    probe, plain = ablations.A0Probe(masks, S), kv_cache.MaskedView(masks)
    clip, sigma = random_clip(cfg, BLOCKS, clips=2, dtype=torch.float32), torch.full((2,), 0.5)
    text = net.project_text(torch.eye(9)[None, :3].expand(2, -1, -1))
    args = (*clip, sigma, sigma, text, span_of(cfg))
    for a, b in zip(net(*args, probe), net(*args, plain)):
        assert torch.equal(a, b)
    assert probe.weights[0].shape == (2, 2, S + 1)
    torch.testing.assert_close(probe.weights[0].sum(-1), torch.ones(2, 2))
    if S == 0:
        assert probe.entropy() == pytest.approx(0, abs=1e-6) and probe.share() == 0
    else:
        assert 0 < probe.entropy() < 1.62 and 0 < probe.share() < 1


def test_other_attentions_are_other_attentions():
    """Without q/k norm, with large logits, with a closed gate: the velocities differ."""
    args = None
    for change in CHANGES:
        net = random_model(TINY, torch.float32)
        if args is None:
            clip, sigma = random_clip(TINY, BLOCKS, dtype=torch.float32), torch.full((1,), 0.5)
            text = net.project_text(torch.eye(9)[None, :3])
            args = (*clip, sigma, sigma, text, span_of(TINY), kv_cache.MaskedView())
        before = net(*args)
        after = change(net)(*args)
        assert all((a - b).abs().max() > 1e-4 for a, b in zip(before, after))


def test_the_gradient_of_block_0_is_that_of_block_0(monkeypatch):
    """All other blocks are clean: their noisy states do not change the loss."""
    net = model.build(TINY)
    states = [torch.stack([random_clip(TINY, BLOCKS, 8, torch.float32)[i] for _ in range(5)], 1)
              for i in (0, 1)]  # fmt: skip
    data = torch.ones(8, 3, dtype=torch.long), *states
    view = kv_cache.MaskedView(four_masks(TINY, BLOCKS))
    loss = ablations.block_0_loss(net, data, view, 0)
    states[1][:, :4, 1:] += 1  # noisy audio states after A0
    assert torch.equal(loss, ablations.block_0_loss(net, data, view, 0))
    states[1][:, :4, 0] += 1
    assert not torch.equal(loss, ablations.block_0_loss(net, data, view, 0))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs the command line with untrained weights and random trajectories."""
    paths = [tmp_path / f"toy_{name}.safetensors" for name in ("dmd", "teacher")]
    for path in paths:
        weights = model.build(config.TOY_TEACHER).state_dict()
        files.save_weights(path, weights, config.TOY_TEACHER, {})

    def draw(net, sigmas, seeds, *_):
        clips = [random_clip(config.TOY, BLOCKS, len(seeds), torch.float32) for _ in range(5)]
        states = (torch.stack(parts, 1) for parts in zip(*clips))
        return torch.ones(len(seeds), 3, dtype=torch.long), *states

    monkeypatch.setattr(ablations.ode_regression, "draw_trajectories", draw)

    def run(*arguments):
        made = "--walks", 48, "--run", tmp_path, "--few-step", paths[0], "--real", paths[1]
        out = "--out", tmp_path / "x"
        monkeypatch.setattr(
            sys, "argv", ["studies/ablations.py", *map(str, arguments + made + out)]
        )
        with cli.one_line_errors():
            ablations.main()
        assert (tmp_path / "x.png").exists()
        return json.loads((tmp_path / "x.json").read_text())["result"]

    return run


def test_sinks_from_the_command_line(run, tmp_path, monkeypatch):
    """Two variants, a few steps: table, JSON and picture; sinks get a share of attention."""
    monkeypatch.setattr(ablations, "BURN_IN", 1)
    monkeypatch.setattr(ablations, "PROBE_EVERY", 1)
    result = run("sinks", "--steps", 2, "--only", "S = 0", "S = 16")
    assert result["S = 0"]["share"] == 0 < result["S = 16"]["share"] < 1
    assert all(row["max_norm"] > 0 and row["a0_norm"] > 0 for row in result.values())
    assert "| S = 16 |" in (tmp_path / "x.md").read_text()


def test_a_training_that_breaks_down_is_reported(run, tmp_path, monkeypatch):
    """Not finite is a result, not a crash."""
    monkeypatch.setattr(ablations.trainer.Learner, "update", lambda self, loss, step: _raise(step))
    run("sinks", "--steps", 12, "--only", "S = 0")
    assert "step 0: the loss is nan" in (tmp_path / "x.md").read_text()


def _raise(step):
    raise ValueError(f"step {step}: the loss is nan")


def test_switches_from_the_command_line(run, tmp_path, monkeypatch):
    """Two rows per variant; the teacher's trajectories have a file of their own."""
    monkeypatch.setattr(ablations.evaluate, "RESAMPLES", 3)
    monkeypatch.setattr(ablations, "STREAMED", 10)
    names = "1+6k, 1+50k, blocks of 2 s", "stage I left out"
    result = run("switches", "--steps", 1, "--clips", 2, "--only", *names)
    assert list(result) == [f"{n}, {t} s" for n in names for t in ("0-5", "5-10")]
    assert {p.name for p in tmp_path.glob("*trajectories*")} == {
        "dmd_trajectories.safetensors", "teacher_trajectories.safetensors"
    }  # fmt: skip


def test_an_interrupted_run_goes_on_at_the_variant_where_it_was(run, tmp_path, monkeypatch):
    """Finished rows are kept until the run is complete; another command starts anew."""
    measured = []

    def measure(name):
        measured.append(name)
        if measured == ["S = 0", "S = 2"]:
            raise KeyboardInterrupt
        return {name: {"max_norm": len(measured)}}

    fake = ablations.SINKS, ablations.BURN_IN + 1, lambda args: measure, str, draw_none
    monkeypatch.setitem(ablations.ABLATIONS, "sinks", fake)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run("sinks", "--only", "S = 0", "S = 2")
    rows = run("sinks", "--only", "S = 0", "S = 2")
    assert measured == ["S = 0", "S = 2", "S = 2"]
    assert {name: row["max_norm"] for name, row in rows.items()} == {"S = 0": 1, "S = 2": 3}
    run("sinks", "--only", "S = 0")
    assert measured[3:] == ["S = 0"]


def draw_none(results):
    return plots.plt.figure()


def test_an_unknown_variant_is_refused(run, capsys):
    """The error lists the known variants."""
    with pytest.raises(SystemExit, match="2"):
        run("sinks", "--only", "S = 7")
    assert "--only 'S = 7': expected some of 'S = 0' 'S = 2'" in capsys.readouterr().err


BAD = {
    "steps": (("sinks", "--steps", 10), "--steps 10: expected at least 11"),
    "no steps": (("switches", "--steps", 0), "--steps 0: expected at least 1"),
    "walks": (("sinks", "--walks", 32), "--walks 32: expected at least 33"),
    "clips": (("switches", "--clips", 0), "--clips 0: expected at least 2"),
    "out": (("sinks", "--out", "README.md/e"), "README.md/e.json: not writable"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    """Exit status 2, before any trajectory is drawn."""
    monkeypatch.setattr(ablations, "start_and_trajectories", None)
    monkeypatch.setattr(ablations.evaluate, "measure_all", None)
    status, out, err = run_here(ablations, (*arguments, "--run", tmp_path), monkeypatch, capsys)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err


def test_the_result_says_how_it_was_measured(run, tmp_path, monkeypatch):
    """The command that repeats it, with device, versions and date."""
    fake = ablations.SINKS, 11, lambda args: lambda name: {name: {}}, str, draw_none
    monkeypatch.setitem(ablations.ABLATIONS, "sinks", fake)
    run("sinks", "--only", "S = 0")
    about = json.loads((tmp_path / "x.json").read_text())["about"]
    assert about.keys() == {"command", "device", "torch", "cuda", "date", "threads"}
    assert about["command"].endswith("--only 'S = 0' -- sinks")


@pytest.mark.parametrize("switch", ablations.SWITCHES.values(), ids=list(ablations.SWITCHES))
def test_a_clip_of_training_just_fits_into_the_window(switch):
    """Nothing is evicted in a training clip; one block later, something is."""
    blocks = num_blocks(switch.seconds, switch.cfg)
    view = kv_cache.CachedView(switch.cfg, blocks + 1, switch.window)
    view.block = blocks - 1
    assert view.num_evicted == 0
    view.block += 1
    assert view.num_evicted == 1


@pytest.mark.parametrize("seconds, blocks", [(1, 5), (2, 2)])
def test_trajectories_are_cut_to_complete_blocks(seconds, blocks):
    """Five seconds, or four in blocks of two; the beginning does not change."""
    cfg = replace(config.TOY, block_seconds=seconds)
    switch = ablations.Switch(cfg, seconds=seconds * blocks)
    trajectories = torch.ones(3, 3), torch.randn(3, 5, 256, 48), torch.randn(3, 5, 126, 20)
    tokens, video, audio = ablations.first_seconds(trajectories, switch)
    tokens_v, frames_a = 16 * (1 + 3 * seconds * blocks), 1 + 25 * seconds * blocks
    assert torch.equal(video, trajectories[1][:, :, :tokens_v]) and video.shape[2] == tokens_v
    assert torch.equal(audio, trajectories[2][:, :, :frames_a]) and audio.shape[2] == frames_a


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_autocast(dtype):
    """Products and gradients are equal bit by bit, and differ from those in float32."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(16, 9), torch.randn(3, 7, 16)

    def product_and_gradients(precise):
        with precise:
            y = layer(x).float()
        return y, *torch.autograd.grad(y.sum(), list(layer.parameters()))

    ours = product_and_gradients(ablations.HalfPrecision(dtype))
    theirs = product_and_gradients(torch.autocast("cpu", dtype))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(ours[0], layer(x))


def test_half_precision_reaches_attention():
    """Values that float16 cannot represent become infinite, as on a GPU."""
    q = torch.full((1, 1, 2, 4), 1e5)
    with ablations.HalfPrecision(torch.float16):
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert not out.isfinite().any()
