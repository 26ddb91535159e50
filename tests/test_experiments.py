"""Experiments: what is measured is what it says, and the command lines run end to end."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from helpers import random_clip, random_model

import cli
import config
import experiments
import files
import kv_cache
import model
from masks import clip_span, four_masks, num_blocks

CHANGES = experiments.with_gates, experiments.without_norm, experiments.with_large_logits
SMALL = dict(num_layers=1, num_heads=2, video_width=24, audio_width=16)
TINY = replace(config.TOY, **SMALL)
BLOCKS = num_blocks(5, TINY)


def span_of(cfg):
    return clip_span(num_blocks(5, cfg), cfg)


@pytest.mark.parametrize("S", [0, 4])
def test_the_probe_sees_what_the_first_audio_latent_may_see(S):
    """Weights over sinks and A0 that sum to 1; alone it has entropy 0; outputs do not change."""
    cfg = replace(TINY, num_sinks=S)
    net, masks = random_model(cfg, torch.float32), four_masks(cfg, BLOCKS)
    probe, plain = experiments.A0Probe(masks, S), kv_cache.MaskedView(masks)
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
    """Without q/k norm, with large logits, behind a closed gate: the velocities differ."""
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
    """Noise in any other block would change the loss: all of them are clean."""
    net = model.build(TINY)
    walks = [torch.stack([random_clip(TINY, BLOCKS, 8, torch.float32)[i] for _ in range(5)], 1)
             for i in (0, 1)]  # fmt: skip
    data = torch.ones(8, 3, dtype=torch.long), *walks
    view = kv_cache.MaskedView(four_masks(TINY, BLOCKS))
    loss = experiments.block_0_loss(net, data, view, 0)
    walks[1][:, :4, 1:] += 1  # noisy audio states behind A0
    assert torch.equal(loss, experiments.block_0_loss(net, data, view, 0))
    walks[1][:, :4, 0] += 1
    assert not torch.equal(loss, experiments.block_0_loss(net, data, view, 0))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["experiments.py", *map(str, arguments)])
    cli.run(experiments.main)


@pytest.fixture
def weights(tmp_path):
    """Untrained weights of a teacher and of a student, and walks of no meaning."""
    paths = {}
    for cfg in (config.TOY_TEACHER, config.TOY):
        paths[cfg.name] = tmp_path / f"{cfg.name}.safetensors"
        files.save_weights(paths[cfg.name], model.build(cfg).state_dict(), cfg, {})
    clips = [random_clip(config.TOY, BLOCKS, 40, torch.float32) for _ in range(5)]
    video, audio = (torch.stack(states, 1) for states in zip(*clips))
    walks = {"tokens": torch.ones(40, 3, dtype=torch.long), "video": video, "audio": audio}
    paths["walks"] = tmp_path / "walks.safetensors"
    files.save_weights(paths["walks"], walks, config.TOY_TEACHER, {})
    return paths


def test_sinks_from_the_command_line(weights, tmp_path, monkeypatch, capsys):
    """Two variants, a few steps: table, JSON and picture; with sinks there is a share."""
    out = tmp_path / "sinks"
    arguments = ["--teacher", weights["toy_teacher"], "--walks", weights["walks"], "--steps", 12]
    run(monkeypatch, "sinks", *arguments, "--only", "S = 0", "S = 16", "--out", out)
    result = json.loads((tmp_path / "sinks.json").read_text())["result"]
    assert result["S = 0"]["share"] == 0 < result["S = 16"]["share"] < 1
    assert all(row["max_norm"] > 0 and row["a0_norm"] > 0 for row in result.values())
    assert "| S = 16 |" in (tmp_path / "sinks.md").read_text()
    assert (tmp_path / "sinks.png").exists()


def test_a_training_that_breaks_down_is_reported(weights, tmp_path, monkeypatch, capsys):
    """Not finite is a result, not a crash."""
    monkeypatch.setattr(
        experiments.training.Learner, "update", lambda self, loss, step: _raise(step)
    )
    arguments = ["--teacher", weights["toy_teacher"], "--walks", weights["walks"], "--steps", 12]
    run(monkeypatch, "sinks", *arguments, "--only", "S = 0", "--out", tmp_path / "x")
    assert "step 0: the loss is nan" in (tmp_path / "x.md").read_text()


def _raise(step):
    raise ValueError(f"step {step}: the loss is nan")


def test_drift_from_the_command_line(weights, tmp_path, monkeypatch, capsys):
    """Two kinds of stream of ten seconds: a row for every five seconds."""
    streams = {"window 2": dict(window=2), "nothing pinned": dict(pinned=False)}
    monkeypatch.setattr(experiments, "STREAMS", streams)
    out = tmp_path / "drift"
    arguments = ["--clips", 2, "--seconds", 10, "--student", weights["toy"], "--out", out]
    run(monkeypatch, "drift", *arguments)
    result = json.loads((tmp_path / "drift.json").read_text())["result"]
    assert [len(rows) for rows in result.values()] == [2, 2]
    assert "| toy, nothing pinned | 5-10 |" in (tmp_path / "drift.md").read_text()


@pytest.mark.parametrize("streams", [("video",), ("audio",), ("video", "audio")])
def test_a_deaf_stream_hears_nothing(streams):
    """Another clip in the other stream changes nothing for it, everything for one that hears."""
    net = random_model(TINY, torch.float32)
    text, sigma = net.project_text(torch.eye(9)[None, :3]), torch.full((1,), 0.5)
    video, audio = random_clip(TINY, BLOCKS, dtype=torch.float32)

    def velocities(net, video, audio):
        return net(video, audio, sigma, sigma, text, span_of(TINY), kv_cache.MaskedView())

    deafened = experiments.deaf(net, *streams)
    v = [velocities(deafened, video, x)[0] for x in (audio, audio + 1)]
    a = [velocities(deafened, x, audio)[1] for x in (video, video + 1)]
    assert torch.equal(*v) == ("video" in streams) and torch.equal(*a) == ("audio" in streams)
    assert not torch.equal(velocities(net, video, audio)[0], velocities(net, video, audio + 1)[0])


def test_two_clips_put_together_are_two(weights):
    """Pictures of one seed, sound of the next."""
    got = experiments.put_together(lambda clips, seed: (f"v{seed}", f"a{seed}"), None, 5)
    assert got == ("v5", "a6")


def test_joint_and_gallery_from_the_command_line(weights, tmp_path, monkeypatch, capsys):
    """Ten rows with intervals; a picture of truth, teacher and a stream's last five seconds."""
    monkeypatch.setattr(experiments.evaluate, "RESAMPLES", 3)
    monkeypatch.setattr(experiments, "WALK", (1.0, 0.5, 0.0))
    made = "--real", weights["toy_teacher"], "--student", weights["toy"]
    run(monkeypatch, "joint", "--clips", 2, *made, "--out", tmp_path / "joint")
    result = json.loads((tmp_path / "joint.json").read_text())["result"]
    assert len(result) == 10 and "stage III, both deaf" in result
    run(monkeypatch, "gallery", "--seconds", 7, *made, "--out", tmp_path / "gallery")
    assert (tmp_path / "gallery.png").read_bytes().startswith(b"\x89PNG")
