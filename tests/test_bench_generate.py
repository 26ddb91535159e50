"""The full-size benchmark measures what it says; run here at a tiny size."""

import gc
import json
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
MARKS = "attention", "ladder", "windows", "decode"  # of the tables in benchmarks/README.md


def subject(net, nets=None):
    """A net with random features of a prompt, and perhaps decoders."""
    features = text.random_features(["x"], net.cfg, dtype=torch.float32)["x"]
    return bench_generate.Subject(net, features, nets, CPU)


def test_the_textbook_gives_the_same_stream():
    """The baseline is slower, not different, over four blocks without a window."""
    net = random_model(tiny(PAPER))
    prompt = random_text(net, net.cfg)

    def clip(view=None):
        g, sigmas = torch.Generator().manual_seed(0), (1.0, 0.5, 0.0)
        return rollout.whole_clip(rollout.rollout(net, lambda k: prompt, 4, sigmas, g, view=view))

    for a, b in zip(clip(), clip(bench_generate.TextbookView())):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_operations_are_counted_in_products_and_attention():
    """A second layer adds the operations of its matrix products and attentions."""
    cfg = replace(config.TOY, num_layers=1, num_sinks=0)
    window, layers = 2, replace(cfg, num_layers=2)
    one, two = (bench_generate.flops_of_block(c, window) for c in (cfg, layers))
    v, a, T, F = cfg.video_width, cfg.audio_width, cfg.video_tokens_per_block, 25
    K_v, K_a = 16 + 3 * T, 1 + 3 * F  # keys: the prefix and a window of two besides this block
    linear = T * v * v * 4 + F * a * a * 4 + T * v * v * 2 + F * a * a * 2  # self; text
    linear += T * v * a * 2 + F * a * a * 2 + F * a * a * 2 + T * v * a * 2  # A2V; V2A
    linear += 8 * (T * v * v + F * a * a)  # MLPs
    scores = T * v * (K_v + text.TOKENS)  # video: self, captions
    scores += a * (F * (K_a + text.TOKENS) + T * K_a + F * K_v)  # audio: self, captions, A2V, V2A
    assert two - one == 2 * (linear + 2 * scores) * len(cfg.sigmas)


def test_the_page_quotes_the_floor():
    """As the script prints it, to the letter."""
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert bench_generate.floor_table(config.FULL, 5) in page


def test_it_runs_and_writes_its_table(tmp_path, monkeypatch, capsys):
    """`--device cpu --tiny`: every number is there, not zero, above its floor; fp8 is last."""
    monkeypatch.setattr(bench_generate.Subject, "speedups", ("fuse",))
    monkeypatch.setattr(faster, "fused", lambda function: function)  # runs on a CPU, too
    out, saved = tmp_path / "bench.json", []
    args = "--device", "cpu", "--tiny", "--windows", 1, "--blocks", 4, "--out", out
    write = bench_generate.files.write_json
    monkeypatch.setattr(
        bench_generate.files, "write_json", lambda *a: saved.append(len(a[1]["rows"])) or write(*a)
    )
    status, printed, _ = run_here(bench_generate, args, monkeypatch, capsys)
    result = json.loads(out.read_text())
    rows, ladder = result["rows"], result["ladder"]
    assert [rung["speed_up"] for rung in ladder] == ["", "fuse"] and saved[0] == 1 < len(saved)
    assert all(rung["block_seconds"] > 0 for rung in ladder)
    for row, in_fp8 in zip(rows, (False, True), strict=True):
        assert row["in_fp8"] == in_fp8 and row["slowest_over_median"] > 0
        assert 0 < row["share_of_floor"] < 1 and row["textbook_over_ours"] > 0
        fastest = config.FULL.fps * config.FULL.block_seconds / row["passes_fps"]  # seconds a block
        assert row["textbook_over_fastest"] == pytest.approx(row["textbook_seconds"] / fastest)
        assert row["passes_fps"] == pytest.approx(row["floor_fps"] * row["share_of_floor"])
    assert status == 0 and "| + `fuse` | " in printed and "| 1 s | fp8 | " in printed
    assert bench_generate.window_table(rows[:1]).count("FPS") == 2


def test_the_textbook_is_so_many_times_slower(monkeypatch):
    """2 s of ours, 1.5 s of the fastest, 6 s of the textbook: three and four times."""
    times = iter((2.0, 6.0))
    monkeypatch.setattr(bench_generate, "time_block", lambda *_: next(times))
    found = bench_generate.beside_textbook(subject(random_model(tiny(PAPER))), 1, fastest=1.5)
    assert (found["textbook_over_ours"], found["textbook_over_fastest"]) == (3, 4)


def test_all_streams_of_a_recorded_net_use_the_same_caches():
    """Until one needs more: then the old ones are freed before the new ones are made."""
    net = random_model(tiny(PAPER), torch.float32)
    features = [torch.randn(1, 3, net.cfg.caption_width)] * 2
    recorded = faster.Recorded(net, lambda: Tape.record)
    bench_generate.time_passes(recorded, features, 5, 1, CPU)
    keys = weakref.ref(recorded.view.caches[0].k)
    bench_generate.time_passes(recorded, features, 4, 1, CPU)
    assert recorded.view.caches[0].k is keys()
    next(generate.stream(recorded, "x", 5, read=lambda _: features, window=2))
    gc.collect()
    assert keys() is None


def test_a_film_is_measured_with_its_decoders():
    """Stages, intervals, the speed of full blocks, memory; the net is as it was."""
    pytest.importorskip("diffusers")
    cfg = bench_generate.tiny(replace(config.FULL, caption_width=8))
    measured = subject(random_model(cfg, torch.float32), bench_decode.tiny_decoders())
    row = bench_generate.bench_window(measured, window=1, blocks=6, rate=(1e12, 1e12))
    film = row["film"]
    stages = {"denoise", "refresh", "video decoder", "vocoder", "write"}
    assert stages <= film["stage_seconds"].keys() and all(film["stage_seconds"].values())
    assert film["full_blocks_fps"] > 0 and film["peak_gb"] > 0 and film["plan_gb"] > 0
    assert not measured.net._forward_hooks and not measured.net._forward_pre_hooks
    assert 0 < film["ttfc_passes_seconds"] < film["ttfc_seconds"]
    film["interval_median_and_95_seconds"], film["viewer_waits"] = [0.5, 0.75], 2
    table = bench_generate.window_table([row])
    assert (
        f"| 0.50, 0.75 s | 2 of 7 | {film['peak_gb']:.1f}, {film['plan_gb']:.1f} GB | – |" in table
    )


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
    assert all(page.count(f"<!-- {mark} -->") == 2 for mark in MARKS)


def test_a_rung_is_set_up_and_taken_down_again(monkeypatch):
    """Each measurement has the speed-ups that it names and no other, and nobody copies weights."""
    monkeypatch.setattr(faster, "fused", lambda function: function)
    measured = subject(random_model(tiny(PAPER), torch.float32))
    view = CachedView(measured.net.cfg, 2)
    for names in (("fuse",), (), ("fuse",)):
        net = measured.with_speedups(names)
        halves = [m for m in net.modules() if isinstance(m, model.HalfLayer)]
        assert {isinstance(half, faster.FusedHalf) for half in halves} == {"fuse" in names}
        pairs = zip(net.parameters(), measured.net.parameters(), strict=True)
        assert all(mine is shared for mine, shared in pairs)
        bench_generate.time_block(net, measured.features, view, 0, CPU, times=1)
    table = bench_generate.ladder_table(
        [{"speed_up": "", "block_seconds": 0.8}, {"speed_up": "x", "block_seconds": 0.4}],
        config.FULL,
    )
    assert table.endswith("| none | 800 ms | 30.0 | 1.00 |\n| + `x` | 400 ms | 60.0 | 2.00 |")
