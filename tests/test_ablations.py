"""Ablations measure what they say, and their command lines run from start to end."""

import json
from dataclasses import replace
from unittest import mock

import pytest
import torch
from helpers import random_clip, random_model, run_here

import config
import kv_cache
import model
from masks import clip_of_seconds, four_masks, num_blocks
from plumbing import files
from studies import ablations, plots

TINY = replace(config.TOY, num_layers=1, num_heads=2, video_width=24, audio_width=16)
BLOCKS = num_blocks(5, TINY)


def noisy_clips(net, clips):
    """What a pass of the network reads, but for the view: random clips at sigma = 0.5."""
    latents, sigma = random_clip(net.cfg, BLOCKS, clips, torch.float32), torch.full((clips,), 0.5)
    text = net.project_text(torch.eye(9)[None, :3].expand(clips, -1, -1))
    return *latents, sigma, sigma, text, clip_of_seconds(net.cfg)


@pytest.mark.parametrize("S", [0, 4])
def test_the_probe_sees_what_the_first_audio_latent_may_see(S):
    """Weights over sinks and A0 sum to 1; without sinks entropy is 0; outputs do not change."""
    cfg = replace(TINY, num_sinks=S)
    net, masks = random_model(cfg, torch.float32), four_masks(cfg, BLOCKS)
    probe, plain = ablations.A0Probe(masks, S), kv_cache.MaskedView(masks)
    args = noisy_clips(net, clips=2)
    for a, b in zip(net(*args, probe), net(*args, plain)):
        assert torch.equal(a, b)
    assert probe.weights[0].shape == (2, 2, S + 1)
    torch.testing.assert_close(probe.weights[0].sum(-1), torch.ones(2, 2))
    if S == 0:
        assert probe.entropy() == pytest.approx(0, abs=1e-6) and probe.share() == 0
    else:
        assert 0 < probe.entropy() < 1.62 and 0 < probe.share() < 1


def test_the_probe_holds_the_weights_of_the_attention():
    """Times the values that A0 sees, they are the attention's own output at A0."""
    masks, ones = four_masks(replace(TINY, num_sinks=4), BLOCKS), torch.ones(16)
    probe, heads = ablations.A0Probe(masks, 4), kv_cache.Heads(2, 1e-6, ones, ones)
    visible = masks["audio_self"][4]
    q, k, v = torch.randn(3, 2, len(visible), 16)
    out = probe.attend(0, "audio_self", q, k, v, heads)
    seen = torch.einsum("bhk,bkhd->bhd", probe.weights[0], heads.split(v)[:, visible])
    torch.testing.assert_close(out[:, 4], seen.flatten(1))


@pytest.mark.parametrize(
    "change", [ablations.with_gates, ablations.without_norm, ablations.with_large_logits]
)
def test_other_attentions_are_other_attentions(change):
    """Without q/k norm, with large logits, with a closed gate: the velocities differ."""
    net = random_model(TINY, torch.float32)
    args = *noisy_clips(net, clips=1), kv_cache.MaskedView()
    before = net(*args)
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(before, change(net)(*args)))


def random_trajectories(count):
    """Trajectories of five states."""
    states = [random_clip(TINY, BLOCKS, count, torch.float32) for _ in range(5)]
    video, audio = (torch.stack(parts, 1) for parts in zip(*states))
    return {"tokens": torch.ones(count, 3, dtype=torch.long), "video": video, "audio": audio}


@pytest.mark.parametrize("latents", [1, 3])
def test_the_gradient_of_block_0_is_that_of_block_0(latents):
    """All other blocks are clean: their noisy states do not change the loss."""
    net, data = model.build(TINY), random_trajectories(8)
    with ablations.longer_block_0(latents):
        loss = ablations.block_0_loss(net, data, 0)
        data["audio"][:, :4, latents:] += 1  # noisy audio states after block 0
        assert torch.equal(loss, ablations.block_0_loss(net, data, 0))
        data["audio"][:, :4, latents - 1] += 1
        assert not torch.equal(loss, ablations.block_0_loss(net, data, 0))


@pytest.mark.parametrize("latents", [1, 3])
def test_the_loss_of_block_0_needs_no_later_second(latents):
    """It is equal on whole clips, with the noise levels and masks of whole clips."""
    net, data, cfg = random_model(TINY, torch.float32), random_trajectories(8), TINY
    levels = torch.full((8, BLOCKS), len(cfg.sigmas) - 1)
    levels[:, 0] = torch.arange(8) % (len(cfg.sigmas) - 1)
    whole = ablations.toy_captions(data["tokens"]), data["video"], data["audio"]
    with ablations.longer_block_0(latents):
        view = kv_cache.MaskedView(four_masks(cfg, BLOCKS))
        _, right = ablations.ode_regression.regression_losses(net, whole, levels, cfg.sigmas, view)
        torch.testing.assert_close(ablations.block_0_loss(net, data, 0), right)


def test_the_gradient_of_the_first_latent(monkeypatch):
    """It is that of a loss in which no other latent counts."""
    net, data = random_model(TINY, torch.float32).requires_grad_(True), random_trajectories(8)
    of_block, alone = ablations.a0_norms(net, data, 0)
    assert of_block == alone  # block 0 has no other latent
    with ablations.longer_block_0(3):
        of_block, alone = ablations.a0_norms(net, data, 0)
        first = lambda squares, mask: squares[:, 0].mean()  # noqa: E731
        monkeypatch.setattr(ablations.ode_regression, "masked_mean", first)
        right = ablations.gradient_norm(net, ablations.block_0_loss(net, data, 0))
    assert alone == pytest.approx(right, rel=1e-4) and of_block != pytest.approx(right, rel=0.01)


def test_block_0_takes_latents_from_block_1():
    """Masks of audio change, those of video do not; afterwards all are as before."""
    usual = four_masks(TINY, 3)
    with ablations.longer_block_0(26):
        longer, blocks = four_masks(TINY, 3), ablations.masks.audio_token_blocks(3, TINY, False)
    assert blocks.tolist() == 26 * [0] + 25 * [2]
    assert torch.equal(longer["video_self"], usual["video_self"])
    assert not torch.equal(longer["audio_self"], usual["audio_self"])
    assert torch.equal(four_masks(TINY, 3)["audio_self"], usual["audio_self"])


def test_sinks_without_values():
    """Their values are zero in both attentions to audio, and nothing else changes."""

    class Zeroed(kv_cache.MaskedView):
        def attend(self, layer, site, q, k, v, heads):
            if site in ("audio_self", "a2v"):
                v = v.clone()
                v[:, : TINY.num_sinks] = 0
            return super().attend(layer, site, q, k, v, heads)

    net, masks = random_model(TINY, torch.float32), four_masks(TINY, BLOCKS)
    args = noisy_clips(net, clips=2)
    usual, right = net(*args, kv_cache.MaskedView(masks)), net(*args, Zeroed(masks))
    found = ablations.without_values(net)(*args, kv_cache.MaskedView(masks))
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(found, usual, strict=True))


def test_sinks_that_read_nothing(monkeypatch):
    """They leave the layers in the same state for every clip; usual sinks do not."""
    cfg = replace(TINY, num_sinks=2, num_layers=2)
    net, states = random_model(cfg, torch.float32), []
    monkeypatch.setattr(net.sinks, "remove", lambda x: states.append(x[:, :2]) or x[:, 2:])
    args = noisy_clips(net, clips=2)
    with ablations.sinks_read_nothing(2):
        net(*args, ablations.ode_regression.masked_view(cfg, BLOCKS))
    net(*args, ablations.ode_regression.masked_view(cfg, BLOCKS))
    (one, other), usual = states
    torch.testing.assert_close(one, other)
    assert (usual[0] - usual[1]).abs().max() > 1e-2


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs the command line with untrained weights and random trajectories."""
    paths = [tmp_path / f"toy_{name}.safetensors" for name in ("dmd", "teacher")]
    for path in paths:
        weights = model.build(config.TOY_TEACHER).state_dict()
        files.save_weights(path, weights, config.TOY_TEACHER, {})

    def draw(net, sigmas, seeds, *_):
        return random_trajectories(len(seeds)).values()

    monkeypatch.setattr(ablations.ode_regression, "draw_trajectories", draw)

    def run(*arguments):
        made = "--walks", 48, "--run", tmp_path, "--few-step", paths[0], "--real", paths[1]
        words = *arguments, *made, "--out", tmp_path / "x"
        if (status := run_here(ablations, words, monkeypatch, capsys)[0]) == 0:
            assert (tmp_path / "x.png").exists()
            return json.loads((tmp_path / "x.json").read_text())["result"]
        return status

    return run


def test_sinks_from_the_command_line(run, tmp_path, monkeypatch):
    """Two variants, a few steps: table, JSON and picture; sinks get a share of attention."""
    monkeypatch.setattr(ablations, "BURN_IN", 1)
    monkeypatch.setattr(ablations, "PROBE_EVERY", 1)
    update, norms = ablations.trainer.Learner.update, []

    def falling(learner, loss, step):
        norms.append(update(learner, loss, step) / 1000**step)
        return norms[-1]

    monkeypatch.setattr(ablations.trainer.Learner, "update", falling)
    result = run("sinks", "--steps", 2, "--only", "S = 0", "S = 16")
    assert [row["max_norm"] for row in result.values()] == norms[1::2]  # after the burn-in
    assert result["S = 0"]["share"] == 0 < result["S = 16"]["share"] < 1
    assert all(row["max_norm"] > 0 and row["a0_norm"] > 0 for row in result.values())
    assert "| S = 16 |" in (tmp_path / "x.md").read_text()


def test_why_sinks_from_the_command_line(run, tmp_path, monkeypatch):
    """Two seeds of a variant are merged into one line: mean, lowest and highest value."""
    names = [f"{name}, seed {seed}" for seed in (0, 1) for name in ("latents: 3", "S = 2")]
    result = run("why_sinks", "--steps", 11, "--only", *names)
    assert list(result) == names
    for name, keys in {"latents: 3": 3, "S = 2": 3}.items():
        low, high = sorted(result[f"{name}, seed {seed}"]["a0_norm"] for seed in (0, 1))
        assert 0 < low < high
        line = f"| {name} | {keys} | {(low + high) / 2:.3g} ({low:.3g}–{high:.3g}) |"
        assert line in (tmp_path / "x.md").read_text("utf-8")
    table = ablations.why_table({**result, names[1]: {"broke down": "step 3"}})
    assert table.endswith("\n| S = 2 | 3 | – | – | – | – | – | – | step 3 |")


def test_a_training_that_breaks_down_is_reported(run, tmp_path, monkeypatch):
    """Not finite is a result, not a crash."""
    update = mock.Mock(side_effect=ValueError("step 0: the loss is nan"))
    monkeypatch.setattr(ablations.trainer.Learner, "update", update)
    run("sinks", "--steps", 12, "--only", "S = 0")
    assert "step 0: the loss is nan" in (tmp_path / "x.md").read_text()


def test_switches_from_the_command_line(run, tmp_path, monkeypatch):
    """Two rows per variant; the teacher's trajectories have a file of their own."""
    monkeypatch.setattr(ablations.evaluate, "RESAMPLES", 3)
    monkeypatch.setattr(ablations, "STREAMED", 10)
    names = "1+6k, 1+50k, blocks of 2 s", "stage I left out"
    result = run("switches", "--steps", 1, "--clips", 2, "--only", *names)
    assert list(result) == [f"{n}, {t} s" for n in names for t in ("0-5", "5-10")]
    drawn = {path.stem for path in tmp_path.glob("*trajectories*")}
    assert drawn == {"dmd_trajectories", "teacher_trajectories"}


def test_an_interrupted_run_goes_on_at_the_variant_where_it_was(run, tmp_path, monkeypatch):
    """Finished rows are kept until the run is complete; another command starts anew.

    The result says how it was measured: the command, with device, versions and date.
    """
    measured = []

    def measure(name):
        measured.append(name)
        if measured == ["S = 0", "S = 2"]:
            raise KeyboardInterrupt
        return {name: {"max_norm": len(measured)}}

    fake = ablations.SINKS, 11, lambda args: measure, str, lambda results: plots.plt.figure()
    monkeypatch.setitem(ablations.ABLATIONS, "sinks", fake)
    assert run("sinks", "--only", "S = 0", "S = 2") == 130  # interrupted
    rows = run("sinks", "--only", "S = 0", "S = 2")
    assert measured == ["S = 0", "S = 2", "S = 2"]
    assert {name: row["max_norm"] for name, row in rows.items()} == {"S = 0": 1, "S = 2": 3}
    run("sinks", "--only", "S = 0")
    assert measured[3:] == ["S = 0"]
    about = json.loads((tmp_path / "x.json").read_text())["about"]
    assert about.keys() == {"command", "device", "torch", "cuda", "date", "threads"}
    assert about["command"].endswith("--only 'S = 0' -- sinks")


STAGE_II = "weights/toy_ode_regression.safetensors"
BAD = {
    "unknown": (("sinks", "--only", "S = 7"), "'S = 7': expected some of 'S = 0' 'S = 2'"),
    "steps": (("sinks", "--steps", 10), "--steps 10: expected at least 11"),
    "walks": (("sinks", "--walks", 32), "--walks 32: expected a whole number from 33 "),
    "clips": (("switches", "--clips", 1), "--clips 1: expected a whole number from 2 "),
    "a student": (("sinks", "--few-step", STAGE_II), "a causal student, made for config 'toy'"),
    "out": (("sinks", "--out", "README.md/e"), "README.md/e.json: not writable"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    """Exit status 2, before any trajectory is drawn."""
    monkeypatch.setattr(ablations.ode_regression, "load_or_draw_trajectories", None)
    monkeypatch.setattr(ablations.evaluate, "measure_all", None)
    status, out, err = run_here(ablations, (*arguments, "--run", tmp_path), monkeypatch, capsys)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err


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
    whole = random_trajectories(3)
    cut = ablations.first_seconds(whole, cfg, seconds * blocks)
    lengths = {"video": 16 * (1 + 3 * seconds * blocks), "audio": 1 + 25 * seconds * blocks}
    for name, length in lengths.items():
        assert cut[name].shape[2] == length
        assert torch.equal(cut[name], whole[name][:, :, :length])


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
