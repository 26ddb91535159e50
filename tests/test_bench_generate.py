"""The full-size benchmark measures what it says; run here at a tiny size."""

import gc
import json
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import PAPER, ROOT, random_decoders, random_model, random_text, tiny
from tape import Tape

import config
import model
import rollout

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_generate  # noqa: E402


def test_the_textbook_gives_the_same_stream():
    """The baseline is slower, not different: bitwise, over four blocks without a window."""
    net = random_model(tiny(PAPER))
    text = random_text(net, net.cfg)

    def clip(view=None):
        g = torch.Generator().manual_seed(0)
        return rollout.whole_clip(
            rollout.rollout(net, lambda k: text, 4, (1.0, 0.5, 0.0), g, view=view)
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


def test_the_floor_of_the_page_is_the_scripts():
    """To the letter."""
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert bench_generate.floor_table(config.FULL, 5) in page


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
    assert 0 < row["share_of_floor"] < 1 and row["textbook_over_ours"] > 0
    fastest = bench_generate.frames_per_second(1, config.FULL) / row["passes_fps"]
    assert row["textbook_over_fastest"] == pytest.approx(row["textbook_seconds"] / fastest)
    assert row["passes_fps"] == pytest.approx(row["floor_fps"] * row["share_of_floor"])
    assert "| `merge` | passes | " in capsys.readouterr().out
    assert bench_generate.window_table([row]).count("FPS") == 2


def test_it_goes_on_behind_what_was_measured(tmp_path, monkeypatch, capsys):
    """Begun again with one more window, what is there stays; on another day or machine, nothing."""
    out, climbs, windows = tmp_path / "bench.json", [], []

    def climb(rungs, *_):
        climbs.append(len(rungs))
        rungs[:] = [bench_generate.rung("qkv", "passes", [(2, 1)])]

    def bench_window(net, nets, features, window, *_):
        windows.append(window)
        return {"window_seconds": window}

    monkeypatch.setattr(bench_generate, "climb", climb)
    monkeypatch.setattr(bench_generate, "bench_window", bench_window)
    monkeypatch.setattr(bench_generate, "window_table", str)
    args = ["bench_generate.py", "--device", "cpu", "--tiny", "--out", str(out), "--windows"]
    for asked in (["1"], ["1", "2"]):
        monkeypatch.setattr(sys, "argv", args + asked)
        bench_generate.main()
    assert climbs == [0, 1] and windows == [1, 2]
    found = json.loads(out.read_text())
    assert bench_generate.resumed(out, found["about"]) == (found["ladder"], found["rows"])
    for other in ({"date": "another"}, {"torch": "another"}):
        assert bench_generate.resumed(out, {**found["about"], **other}) == ([], [])


def test_a_finished_stream_leaves_no_caches_behind():
    """A recorded net lets go of the last stream's memory when the next one begins."""
    net = random_model(tiny(PAPER), torch.float32)
    features = [torch.randn(1, 3, net.cfg.caption_width)] * 2
    recorded = bench_generate.parts.graphs.Recorded(net, lambda: Tape.record)
    bench_generate.time_passes(recorded, 5, 1, features, torch.device("cpu"))
    keys = weakref.ref(recorded.memory[0]["video_self"].k)
    next(bench_generate.generate.stream(recorded, "x", 5, read=lambda _: features, window=1))
    gc.collect()
    assert keys() is None


def test_a_film_is_measured_with_its_decoders():
    """Stages, the speed of full blocks, and both layouts of the decoder; the net is as it was."""
    pytest.importorskip("diffusers")
    cfg = replace(config.FULL, caption_width=8, **bench_generate.TINY)
    net, nets = random_model(cfg, torch.float32), random_decoders()
    features = bench_generate.captions.random_features(["x"], cfg, "cpu", torch.float32)["x"]
    film = bench_generate.bench_film(net, nets, features, 1, 9, torch.device("cpu"))
    stages = {"denoise", "refresh", "video decoder", "vocoder", "write"}
    assert stages <= film["stage_seconds"].keys() and all(film["stage_seconds"].values())
    assert film["full_blocks_fps"] > 0 and "forward" not in vars(net)
    assert 0 < film["ttfc_passes_seconds"] < film["ttfc_seconds"] and len(film["peaks_mb"]) == 10
    found = bench_generate.layout_rung(nets, cfg, torch.device("cpu"), rounds=1)
    assert found["speed_up"] == "channels-last" and found["after_seconds"] > 0
    row = dict(window_seconds=1, floor_fps=9, passes_fps=8, share_of_floor=0.8, film=film)
    row |= dict(
        first_and_last_full_block_seconds=[0.2, 0.3],
        **bench_generate.beside_plan(film, net, 1, ()),
    )
    assert "| 200, 300 ms |" in (table := bench_generate.window_table([row]))
    assert f" GB | {row['plan_gb']:.1f} GB | – |" in table
    row["film"]["is_written"] = False
    assert " FPS, no mp4 |" in bench_generate.window_table([row])


def test_without_av_frames_are_counted():
    """As many as a film would have."""
    film = bench_generate.Unwritten("x.mp4", (2, 2), 24, 8000, 2)
    film.add(range(25), None), film.add(range(24), None)
    film.close()
    assert film.frames == 49


def test_a_block_is_timed_behind_its_past():
    """Both caches end at the same place, with the same number of keys in each attention."""
    net = random_model(tiny(PAPER), torch.float32)
    features = [torch.randn(1, 3, net.cfg.caption_width)] * 2
    ours, book = bench_generate.CachedView(net.cfg, 4), bench_generate.TextbookView()
    for view in (ours, book):
        assert bench_generate.time_block(net, view, 3, features, torch.device("cpu"), 1) > 0
    assert ours.block == book.block == 3
    for (layer, site), (keys, _) in book.past.items():
        cache = ours.layers[layer][site]
        assert keys.shape[1] == cache.num_filled - cache.num_new


def test_the_page_has_a_row_for_every_speed_up_and_a_place_for_every_table():
    """What generate.py offers is explained, and what is measured is filled in between its marks."""
    page = (bench_generate.ROOT / "benchmarks" / "README.md").read_text()
    assert all(f"\n| `{name}` | " in page for name in bench_generate.faster.SPEEDUPS)
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
        (["--device", "cpu", "--blocks", "5"], "--blocks 5: expected at least 17"),
        (["--device", "cpu", "--rounds", "0"], "--rounds 0: expected 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(args, message, monkeypatch, capsys):
    """One line, exit status 2."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(sys, "argv", ["bench_generate.py", *args])
    with pytest.raises(SystemExit, match="2"):
        with_errors(bench_generate.main)
    assert message in capsys.readouterr().err
