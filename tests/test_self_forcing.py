"""Self-forcing: clips made by a rollout, and the weights a student may start at."""

from dataclasses import replace

import pytest
import torch
from helpers import ROOT, random_model, run_here

import config
import dmd
import model
import rollout
import self_forcing
from kv_cache import CachedView
from toy import codec as toy_codec
from toy import world as toy_world
from toy.source import toy_captions, true_latents
from toy.training import TrainingSource


@pytest.mark.parametrize("is_forced, share", [(False, True), (True, True), (False, False)])
def test_rolled_out_clips_are_those_of_a_rollout_at_a_random_exit(is_forced, share):
    """Same captions and noise as `rollout`, all blocks at one exit step or each at its own;
    with the real past, or with its own."""
    cfg = replace(config.TOY, num_layers=1, num_heads=2, video_width=24, audio_width=16)
    net = random_model(cfg, torch.float32)
    clips = toy_world.draw_clips(range(2))
    captions = toy_captions(toy_world.caption_tokens(clips))
    made = self_forcing.rollout_clip(
        net, clips, captions, torch.Generator().manual_seed(4),
        window=2, history=true_latents if is_forced else None, share_exit=share,
    )  # fmt: skip
    g = torch.Generator().manual_seed(4)
    drawn = [dmd.draw_exit_step(cfg.sigmas, g) for _ in range(1 if share else 6)]
    exit_steps = drawn * 6 if share else drawn
    assert share or len(set(drawn)) > 1
    text = net.project_text(*captions.features)
    history = toy_codec.encode_clips(toy_codec.load(), clips, 5) if is_forced else None
    blocks = rollout.rollout(
        net, lambda k: text, 6, cfg.sigmas, g, 2, CachedView(cfg, 6, 2), exit_steps, history
    )
    assert all(map(torch.equal, made, rollout.whole_clip(blocks)))


# ---- where it starts ----

WEIGHTS = ROOT / "weights"


@pytest.mark.parametrize(
    "name, cfg, message",
    [
        ("toy_released_self_forcing", "toy", "made for config 'toy_released' with prefix_video_fr"),
        ("toy_ode_regression", "toy_released", "made for config 'toy' with prefix_video_frames=1"),
    ],
)
def test_a_student_with_other_blocks_is_refused(name, cfg, message, tmp_path, monkeypatch, capsys):
    """Either way round, one line that begins with its file: sinks would be new, or unexpected."""
    path = WEIGHTS / f"{name}.safetensors"
    options = ["--student", path, "--teacher", WEIGHTS / "toy_teacher.safetensors"]
    options += ["--config", cfg, "--steps", 1, "--run", tmp_path, "--out", tmp_path / "x"]
    status, _, err = run_here(self_forcing, options, monkeypatch, capsys)
    assert status == 2 and err.startswith(f"self_forcing.py: {path}: {message}")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["toy_teacher", "toy_dmd", "toy_ode_regression"])
def test_a_student_may_start_at_any_stage(name):
    """A bidirectional file has no blocks yet and gets the config's; a student has them."""
    path = WEIGHTS / f"{name}.safetensors"
    found = TrainingSource(config.TOY).open(path, config.TOY)
    assert found.cfg == config.TOY
    weights = found.load(learns=True).state_dict()
    for n, w in model.load(path).state_dict().items():
        assert torch.equal(weights[n], w)


def test_the_true_past_is_the_toys_alone(tmp_path, monkeypatch, capsys):
    """At full size there are prompts only: one line, and nothing is read."""
    options = ["--history", "true", "--config", "full", "--run", tmp_path, "--out", tmp_path / "x"]
    status, _, err = run_here(self_forcing, options, monkeypatch, capsys)
    message = "--history true: --config full has prompts, but no true clips"
    assert (status, err) == (2, f"self_forcing.py: {message}\n")
