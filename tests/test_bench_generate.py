"""The full-size benchmark measures what it says; run here at a tiny size."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from helpers import PAPER, ROOT, random_model, random_text, tiny

import cli
import config
import model
import self_forcing

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_generate  # noqa: E402


def test_the_textbook_gives_the_same_stream():
    """The baseline is slower, not different: bitwise, over four blocks without a window."""
    net = random_model(tiny(PAPER))
    text = random_text(net, net.cfg)

    def clip(view=None):
        g = torch.Generator().manual_seed(0)
        return self_forcing.whole_clip(
            self_forcing.rollout(net, lambda k: text, 4, (1.0, 0.5, 0.0), g, view=view)
        )

    for a, b in zip(clip(), clip(bench_generate.TextbookView())):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_operations_are_those_of_matrices_and_attention():
    """The toy without layers but one: the counted operations are the sum over its products."""
    cfg = replace(config.TOY, num_layers=1, num_sinks=0)
    window, layers = 2, replace(cfg, num_layers=2)
    one, two = (bench_generate.flops_of_block(c, window) for c in (cfg, layers))
    v, a, T, F = cfg.video_width, cfg.audio_width, cfg.video_tokens_per_block, 25
    K_v, K_a = 16 + 3 * T, 1 + 3 * F  # keys: the prefix and a window of two besides this block
    text = bench_generate.captions.TOKENS
    linear = T * v * v * 4 + F * a * a * 4 + T * v * v * 2 + F * a * a * 2  # self; text
    linear += T * v * a * 2 + F * a * a * 2 + F * a * a * 2 + T * v * a * 2  # A2V; V2A
    linear += 8 * (T * v * v + F * a * a)  # MLPs
    scores = T * K_v * v + F * K_a * a + T * K_a * a + F * K_v * a + T * text * v + F * text * a
    assert two - one == 2 * (linear + 2 * scores) * len(cfg.sigmas)


def test_it_runs_and_writes_its_table(tmp_path, monkeypatch, capsys):
    """`--device cpu --tiny`: every number is there, none is zero, the floor is below."""
    out = tmp_path / "bench.json"
    args = ["--device", "cpu", "--tiny", "--windows", "1", "--blocks", "9", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_generate.py", *args])
    bench_generate.main()
    result = json.loads(out.read_text())
    (row,), ladder = result["rows"], result["ladder"]
    assert [rung["speed_up"] for rung in ladder] == ["qkv", "merge"]
    assert all(rung["before_seconds"] > 0 < rung["after_seconds"] for rung in ladder)
    assert set(result["about"]["won"]) <= {"qkv", "merge"}
    assert 0 < row["share_of_floor"] < 1 and row["textbook_over_ours"] > 0
    assert row["passes_fps"] == pytest.approx(row["floor_fps"] * row["share_of_floor"])
    assert row["plan_gb"] > 0
    assert "| `merge` | passes | " in capsys.readouterr().out
    assert bench_generate.window_table([row]).count("FPS") == 2


def test_the_page_has_a_row_for_every_speed_up_and_a_place_for_every_table():
    """What generate.py offers is explained, and what is measured is filled in between its marks."""
    page = (bench_generate.ROOT / "benchmarks" / "README.md").read_text()
    assert all(f"\n| `{name}` | " in page for name in bench_generate.parts.SPEEDUPS)
    assert all(page.count(f"<!-- {mark} -->") == 2 for mark in ("ladder", "windows", "decode"))


def test_a_rung_is_set_up_and_taken_down_again():
    """Each measurement has the speed-ups that it names and no other."""
    net = random_model(tiny(PAPER))
    sites = [m for m in net.modules() if isinstance(m, model.Attention)]
    for names in (("qkv",), (), ("qkv", "merge")):
        assert bench_generate.set_up(net, names, torch.device("cpu")) is net
        assert {site.joined for site in sites} == {"qkv" in names}
    ratio = bench_generate.rung("x", "passes", [(2, 1), (9, 3), (8, 2)])
    assert ratio["before_over_after"] == 3 and ratio["after_seconds"] == 2


@pytest.mark.parametrize(
    "args, message",
    [
        (["--device", "cuda"], "not usable here"),
        (["--device", "cpu", "--blocks", "5"], "--blocks 5: expected at least 57"),
    ],
)
def test_what_cannot_be_measured_is_refused(args, message, monkeypatch, capsys):
    """One line, exit status 2."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(sys, "argv", ["bench_generate.py", *args])
    with pytest.raises(SystemExit, match="2"):
        cli.run(bench_generate.main)
    assert message in capsys.readouterr().err
