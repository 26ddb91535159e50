"""The attention benchmark runs at tiny shapes, counts right, and refuses what it cannot measure."""

import json

import pytest
import torch
from helpers import run_here
from torch.nn.attention import SDPBackend

import kv_cache
from benchmarks import bench_attention as bench
from benchmarks import bench_decode, bench_generate


def test_the_script_runs_on_a_cpu_at_tiny_shapes(monkeypatch, tmp_path, capsys):
    """Every way is timed beside its floor; the file says which path ran."""
    out = tmp_path / "bench.json"
    monkeypatch.setattr(bench.kernel, "emulated", None)
    arguments = "--device", "cpu", "--tiny", "--out", out
    status, printed, _ = run_here(bench, arguments, monkeypatch, capsys)
    result = json.loads(out.read_text())
    assert result["path"] == "PyTorch: no GPU" and len(result["shapes"]) == len(bench.TINY)
    for shape in result["shapes"].values():
        assert shape["floor_us"] > 0 and shape["sdpa"] in SDPBackend.__members__
        for way in ("chain_eager", "cat_eager"):
            assert shape[way]["us"] > 0 and shape[way]["floors"] > 0
        assert shape["chain_eager"]["chain_takes"] == 1
    assert status == 0 and bench.table(result["shapes"]) in printed


def test_the_shapes_are_those_of_the_full_size():
    """Four sites, two windows; work and traffic of the video by hand."""
    shapes = {(s.site, s.window): s for s in bench.full_shapes()}
    assert len(shapes) == 8
    video = shapes["video_self", 5]
    assert (video.Q, video.T, video.K, video.H, video.D) == (1152, 1152, 384 + 6 * 1152, 32, 128)
    assert video.operations() == 4 * 1152 * 7296 * 4096
    # q, k, v in; out, slots of k and v out; the 6144 other slots of k and v in; two bytes each
    assert video.bytes() == 2 * 4096 * (6 * 1152 + 2 * 6144)
    audio = shapes["audio_self", 15]
    assert (audio.Q, audio.K, audio.D) == (25, 17 + 16 * 25, 64)
    assert (shapes["a2v", 5].Q, shapes["a2v", 5].K) == (1152, 17 + 6 * 25)
    assert (shapes["v2a", 5].Q, shapes["v2a", 5].K) == (25, 7296)


def test_the_floor_is_the_slower_of_two():
    """800 TFLOP/s and 3 TB/s: the video is bound by products, the audio by bytes."""
    rate, shapes = {"operations": 800e12, "bytes": 3e12}, bench.full_shapes()
    floors = {(s.site, s.window): 1e6 * bench.floor(s, rate, 2) for s in shapes}
    assert floors["video_self", 5] == pytest.approx(4 * 1152 * 7296 * 4096 / 800e6)
    assert floors["audio_self", 5] == pytest.approx(2 * 2048 * (6 * 25 + 2 * 142) / 3e6)


def test_ways_that_disagree_are_not_timed():
    """A fast wrong answer is no answer."""
    arguments = bench.inputs(bench.TINY[0], "cpu", torch.float32)
    wrong = {"chain": bench.chain, "other": lambda *a: bench.chain(*a) * 1.01}
    with pytest.raises(ValueError, match="other differs from chain by"):
        bench.check_agreement(wrong, arguments)
    bench.check_agreement({"chain": bench.chain, "cat": bench.cat}, arguments)


def test_the_place_timed_is_the_last_of_a_full_ring():
    """So that the past is one slice, and `cat` copies no more than a real stream would."""
    for shape in [*bench.TINY, *bench.full_shapes()]:
        cache = kv_cache.RollingCache(shape.prefix, shape.T, shape.window + 1)
        cache.block = 2 * cache.ring_blocks
        assert cache.slots == slice(shape.K - shape.T, shape.K)


def made_up(us, floor_us=2.0):
    """What `bench` tells of ways that take so many microseconds."""
    found = {"floor_us": floor_us, "chosen_by_kv_cache": "append", "sdpa": "FLASH_ATTENTION"}
    for (way, mode), t in us.items():
        others = {f"{o}_takes": us[o, mode] / t for o in ("chain", "cat")}
        found[f"{way}_{mode}"] = {"us": t, "floors": t / floor_us} | others
    return found


def test_the_table_shows_times_ratios_and_what_is_taken():
    """Eager and graph; bold is kv_cache.py's choice; a dash where a way cannot be timed."""
    times = {("chain", "eager"): 60, ("cat", "eager"): 75, ("append", "eager"): 50}
    times |= {(way, "graph"): t / 10 for (way, _), t in times.items()} | {("fused", "eager"): 20}
    head, rule, eager, graph = bench.table({"x: 25 x 417": made_up(times)}).splitlines()
    assert head.count("|") == rule.count("|") == eager.count("|") == graph.count("|")
    assert eager == (
        "| x: 25 x 417 | eager | 2.0 | 60.0 | 75.0 | **50.0** | 20.0 | 25.00 | 3.00 | 1.50 | "
        "FLASH_ATTENTION |"
    )
    assert "| graph | 2.0 | 6.0 | 7.5 | **5.0** | – | 2.50 | – | 1.50 |" in graph


def test_without_a_kernel_the_table_has_dashes():
    """On a CPU the kernel is not timed, so nothing is bold."""
    table = bench.table({"x": made_up({("chain", "eager"): 4, ("cat", "eager"): 5})})
    assert table.splitlines()[-1] == (
        "| x | eager | 2.0 | 4.0 | 5.0 | – | – | – | – | – | FLASH_ATTENTION |"
    )


def test_unfused_attention_is_not_timed(monkeypatch):
    """SDPA's last resort stores all scores. Compared with it, every other way would look good."""
    arguments = bench.inputs(bench.TINY[0], "cpu", torch.float32)
    assert bench.sdpa_backend(*arguments) == "FLASH_ATTENTION"
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_: int(SDPBackend.MATH))
    with pytest.raises(ValueError, match="no fused kernel for this shape"):
        bench.sdpa_backend(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script, options, message", [
    (bench, [], "--device cuda: not usable here"),
    (bench, ["--device", "cpu"], "the CUDA kernel cannot run here (no GPU)"),
    (bench_generate, [], "--device cuda: not usable here"),
    (bench_generate, ["--device", "cpu"], "the CUDA kernel cannot run here (no GPU)"),
    (bench_generate, ["--device", "cpu", "--blocks", "5"], "--blocks 5: expected at least 17"),
    (bench_generate, ["--device", "cpu", "--rounds", "0"], "--rounds 0: expected 1 or more"),
    (bench_decode, ["--device", "cpu", "--seconds", "2"], "--seconds 2: expected at least 3"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(script, options, message, monkeypatch, capsys):
    """One line and exit status 2, from each of the GPU benchmarks."""
    monkeypatch.setattr(bench.kernel, "emulated", None)
    status, _, err = run_here(script, options, monkeypatch, capsys)
    assert status == 2 and message in err and err.count("\n") == 1
