"""The full-size benchmark measures what it says; run here at a tiny size."""

import gc
import json
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import PAPER, ROOT, random_model, random_text, run_here, tiny
from tape import Tape

import config
import generate
import model
import rollout
from benchmarks import bench_decode, bench_generate
from full_size import faster, text
from kv_cache import CachedView

CPU = torch.device("cpu")


def subject(net, nets=None):
    """A net with random features of a prompt, and perhaps decoders."""
    features = text.random_features(["x"], net.cfg, dtype=torch.float32)["x"]
    return bench_generate.Subject(net, features, nets, CPU)


def test_the_textbook_gives_the_same_stream():
    """The baseline is slower, not different: bitwise, over four blocks without a window."""
    net = random_model(tiny(PAPER))
    prompt = random_text(net, net.cfg)

    def clip(view=None):
        g = torch.Generator().manual_seed(0)
        return rollout.whole_clip(
            rollout.rollout(net, lambda k: prompt, 4, (1.0, 0.5, 0.0), g, view=view)
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
    linear = T * v * v * 4 + F * a * a * 4 + T * v * v * 2 + F * a * a * 2  # self; text
    linear += T * v * a * 2 + F * a * a * 2 + F * a * a * 2 + T * v * a * 2  # A2V; V2A
    linear += 8 * (T * v * v + F * a * a)  # MLPs
    scores = (
        T * K_v * v
        + F * K_a * a
        + T * K_a * a
        + F * K_v * a
        + T * text.TOKENS * v
        + F * text.TOKENS * a
    )
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
    assert [rung["speed_up"] for rung in ladder] == ["qkv"]
    assert all(rung["before_seconds"] > 0 < rung["after_seconds"] for rung in ladder)
    assert 0 < row["share_of_floor"] < 1 and row["textbook_over_ours"] > 0
    fastest = bench_generate.frames_per_second(1, config.FULL) / row["passes_fps"]
    assert row["textbook_over_fastest"] == pytest.approx(row["textbook_seconds"] / fastest)
    assert row["passes_fps"] == pytest.approx(row["floor_fps"] * row["share_of_floor"])
    assert "| `qkv` | passes | " in capsys.readouterr().out
    assert bench_generate.window_table([row]).count("FPS") == 2


def test_it_goes_on_behind_what_was_measured(tmp_path, monkeypatch, capsys):
    """Begun again with one more window, what is there stays; on another day or machine, nothing."""
    out, climbs, windows = tmp_path / "bench.json", [], []

    def climb(rungs, *_):
        climbs.append(len(rungs))
        rungs[:] = [bench_generate.rung("qkv", "passes", [(2, 1)])]

    def bench_window(subject, window, *_):
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
    """A recorded net frees the caches of the last stream when the next one begins."""
    net = random_model(tiny(PAPER), torch.float32)
    features = [torch.randn(1, 3, net.cfg.caption_width)] * 2
    recorded = faster.Recorded(net, lambda: Tape.record)
    bench_generate.time_passes(recorded, features, 5, 1, CPU)
    keys = weakref.ref(recorded.caches[0]["video_self"].k)
    next(generate.stream(recorded, "x", 5, read=lambda _: features, window=1))
    gc.collect()
    assert keys() is None


def test_a_film_is_measured_with_its_decoders():
    """Stages, the speed of full blocks, and both layouts of the decoder; the net is as it was."""
    pytest.importorskip("diffusers")
    cfg = bench_generate.tiny(replace(config.FULL, caption_width=8))
    measured = subject(random_model(cfg, torch.float32), bench_decode.tiny_decoders())
    film = bench_generate.bench_film(measured.with_speedups(()), measured, 1, 9)
    stages = {"denoise", "refresh", "video decoder", "vocoder", "write"}
    assert stages <= film["stage_seconds"].keys() and all(film["stage_seconds"].values())
    assert film["full_blocks_fps"] > 0
    assert not measured.net._forward_hooks and not measured.net._forward_pre_hooks
    assert 0 < film["ttfc_passes_seconds"] < film["ttfc_seconds"] and len(film["peaks_mb"]) == 10
    found = bench_generate.layout_rung(measured, rounds=1)
    assert found["speed_up"] == "channels-last" and found["after_seconds"] > 0
    row = dict(
        window_seconds=1, floor_fps=9, passes_fps=8, share_of_floor=0.8, film=film,
        first_and_last_full_block_seconds=[0.2, 0.3],
        **bench_generate.beside_plan(film, measured, 1, ()),
    )  # fmt: skip
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
    ours, book = CachedView(net.cfg, 4), bench_generate.TextbookView()
    for view in (ours, book):
        assert bench_generate.time_block(net, features, view, 3, CPU, times=1) > 0
    assert ours.block == book.block == 3
    for (layer, site), (keys, _) in book.past.items():
        cache = ours.layers[layer][site]
        assert keys.shape[1] == cache.num_filled - cache.num_new


def test_the_page_has_a_row_for_every_speed_up_and_a_place_for_every_table():
    """What generate.py offers is explained, and what is measured is filled in between its marks."""
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert all(f"\n| `{name}` | " in page for name in faster.SPEEDUPS)
    assert all(page.count(f"<!-- {mark} -->") == 2 for mark in ("ladder", "windows", "decode"))


def test_a_rung_is_set_up_and_taken_down_again():
    """Each measurement has the speed-ups that it names and no other, and nobody copies weights."""
    measured = subject(random_model(tiny(PAPER), torch.float32))
    view = CachedView(measured.net.cfg, 2)
    for names in (("qkv",), (), ("qkv",)):
        net = measured.with_speedups(names)
        sites = [m for m in net.modules() if isinstance(m, model.Attention)]
        assert sites and {isinstance(s, faster.JoinedAttention) for s in sites} == {"qkv" in names}
        pairs = zip(net.parameters(), measured.net.parameters(), strict=True)
        assert all(mine is shared for mine, shared in pairs)
        bench_generate.time_block(net, measured.features, view, 0, CPU, times=1)
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
    status, _, err = run_here(bench_generate, args, monkeypatch, capsys)
    assert status == 2 and message in err
