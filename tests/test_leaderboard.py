"""The leaderboard: one rule, one script that judges, and the project's own entries."""

import json

import pytest
import torch
from helpers import run_here, tiny

import config
import model
from exercises import leaderboard
from plumbing import files

ENTRIES = json.loads(leaderboard.TABLE.read_text("utf-8"))


def test_the_page_is_the_table():
    """The project's own entries, each judged on all clips, ranked by the rule."""
    assert leaderboard.PAGE.read_text("utf-8") == leaderboard.page(ENTRIES)
    assert set(leaderboard.OWN) <= set(ENTRIES)
    for name in leaderboard.OWN:
        assert ENTRIES[name]["clips"] == leaderboard.CLIPS and ENTRIES[name]["minutes"] > 0
    assert any(map(leaderboard.is_valid, ENTRIES.values()))


@pytest.mark.parametrize("f1, identity, valid", [
    (0.88, 0.5, True), (0.879, 0.9, False), (1.0, 0.499, False), (0.9, float("nan"), False),
])  # fmt: skip
def test_the_rule(f1, identity, valid):
    """Both bounds are included; silence has no identity."""
    assert leaderboard.is_valid({"f1": f1, "identity": identity}) == valid


def test_a_judgement_is_entered(tmp_path, monkeypatch, capsys):
    """By the command, for two clips: the steps and the refresh are counted; the page is written."""
    monkeypatch.setattr(leaderboard, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(leaderboard, "PAGE", tmp_path / "page.md")
    weights = "weights/toy_self_forcing.safetensors"
    options = "--weights", weights, "--steps", "1", "--window", "2", "--clips", "2", "--name", "me"
    status, out, _ = run_here(leaderboard, options, monkeypatch, capsys)
    assert status == 0 and "me: 2 passes a block, F1 " in out
    entry = json.loads((tmp_path / "table.json").read_text())["me"]
    assert (entry["passes"], entry["clips"]) == (2, 2) and 0 <= entry["f1"] <= 1
    assert "| me | 2 |" in (tmp_path / "page.md").read_text()


def test_larger_networks_are_refused(tmp_path, monkeypatch, capsys):
    """Twice as wide as the toy: one line, no judging."""
    cfg = tiny(config.TOY, num_layers=20, video_width=256, audio_width=256, num_heads=4)
    torch.manual_seed(0)
    files.save_weights(tmp_path / "big.safetensors", model.build(cfg).state_dict(), cfg, {})
    options = "--weights", tmp_path / "big.safetensors"
    status, _, err = run_here(leaderboard, options, monkeypatch, capsys)
    assert status == 2 and "expected a toy of at most" in err and err.count("\n") == 1
    assert run_here(leaderboard, (), monkeypatch, capsys)[0] == 2
