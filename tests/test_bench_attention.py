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
        assert shape["sdpa"] in SDPBackend.__members__
        for way in ("chain_eager", "cat_eager"):
            assert shape[way]["us"] > 0 and shape[way]["floors"] > 0 and shape[way]["floor_us"] > 0
        assert shape["chain_eager"]["chain_takes"] == 1
    assert status == 0 and bench.table(result["shapes"]) in printed


def test_a_ratio_says_how_much_longer_the_other_way_takes(monkeypatch):
    """Times over the time of the way itself, in the same round."""
    times = {bench.chain: 1.0, bench.cat: 4.0}
    monkeypatch.setattr(bench, "seconds", lambda call, *_: times[call.args[0]])
    rate = {"operations": 1.0, "bytes": 1.0}
    found = bench.bench(bench.TINY[0], torch.device("cpu"), rate, 1, 1, ("chain", "cat"))
    assert found["cat_eager"]["chain_takes"] == 0.25 and found["chain_eager"]["cat_takes"] == 4


def full_shape(site, window):
    return next(s for s in bench.full_shapes() if (s.site, s.window) == (site, window))


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
    # `write` reads and writes q, k and v, and nothing else
    write = bench.floor(full_shape("v2a", 5), rate, 2, "write")
    assert write == pytest.approx(2 * 2048 * (2 * 25 + 4 * 1152) / 3e12)
    # numbers of 4 bytes take twice as long to move
    audio = bench.floor(full_shape("audio_self", 5), rate, 4)
    assert 1e6 * audio == pytest.approx(2 * floors["audio_self", 5])


def test_a_rate_counts_each_operation_and_each_byte(monkeypatch):
    """A multiply-add is two operations, a copied byte is read and written; calls take 3 s each."""
    monkeypatch.setattr(bench.Stopwatch, "stages", lambda watch: {"calls": 15.0})
    assert bench.matmul_rate(torch.device("cpu"), torch.float32, 6) == 2 * 6**3 / 3
    assert bench.copy_rate(torch.device("cpu"), 6) == 2 * 6 / 3
    monkeypatch.setattr(bench_generate.fp8.torch, "_scaled_mm", lambda *_, **__: None)
    assert bench_generate.fp8_rate(torch.device("cpu"), 16) == 2 * 16**3 / 3


def test_ways_that_are_wrong_are_not_timed():
    """A fast wrong answer is no answer. The truth is kv_cache.py in float64."""
    arguments = bench.inputs(bench.TINY[0], "cpu", torch.float32)
    wrong = {"chain": bench.chain, "other": lambda *a: bench.chain(*a) * (1 + 1e-4)}
    with pytest.raises(ValueError, match="other differs from kv_cache.py in float64 by 0.0001"):
        bench.errors(wrong, arguments)
    found = bench.errors({"chain": bench.chain, "cat": bench.cat}, arguments)
    assert found.keys() == {"chain", "cat"} and all(0 < x < 1e-6 for x in found.values())


def test_every_layer_has_inputs_of_its_own(monkeypatch):
    """Otherwise the keys would wait in the L2 cache, and the time would be better than any pass."""
    seen = []
    monkeypatch.setattr(bench, "chain", lambda *a: seen.append(a[0]) or a[0].flatten(2))
    monkeypatch.setattr(bench, "errors", lambda *_: {})
    rate = {"operations": 1e12, "bytes": 1e12}
    bench.bench(bench.TINY[0], torch.device("cpu"), rate, rounds=1, layers=3, wanted=["chain"])
    assert len(seen) == 2 * 3  # to warm up, then a round
    assert not any(torch.equal(seen[3], x) for x in seen[4:])


def test_the_place_timed_is_the_last_of_a_full_ring():
    """So that the past is one slice, and `cat` copies no more than a real stream would."""
    for shape in [*bench.TINY, *bench.full_shapes()]:
        cache = kv_cache.RollingCache(shape.prefix, shape.T, shape.window + 1)
        cache.block = 2 * cache.ring_blocks
        assert cache.slots == slice(shape.K - shape.T, shape.K)


def made_up(us, floor_us=2.0):
    """What `bench` tells of ways that take so many microseconds."""
    found = {"chosen_by_kv_cache": "append", "sdpa": "FLASH_ATTENTION", "errors": {"chain": 1e-3}}
    for (way, mode), t in us.items():
        others = {f"{o}_takes": us[o, mode] / t for o in ("chain", "cat")}
        found[f"{way}_{mode}"] = {"us": t, "floor_us": floor_us, "floors": t / floor_us} | others
    return found


def test_the_table_shows_times_ratios_and_what_is_taken():
    """Eager and graph; bold is kv_cache.py's choice; a dash where a way cannot be timed."""
    times = {("chain", "eager"): 60, ("cat", "eager"): 75, ("append", "eager"): 50}
    times |= {(way, "graph"): t / 10 for (way, _), t in times.items()}
    times |= {("online", "eager"): 70, ("write", "eager"): 7}
    shapes = {"x: 25 x 417": made_up(times)}
    head, rule, eager, graph = bench.table(shapes).splitlines()
    assert head.count("|") == rule.count("|") == eager.count("|") == graph.count("|")
    assert eager == (
        "| x: 25 x 417 | eager | 2.0 | 60.0 | 75.0 | **50.0** | – | – | 70.0 | – | 25.00 | 1.20 | "
        "1.50 | FLASH_ATTENTION | 7.0 / 2.0 |"
    )
    assert "| graph | 2.0 | 6.0 | 7.5 | **5.0** | – | – | – | – | 2.50 | 1.20 | 1.50 |" in graph


def test_without_a_kernel_the_table_has_dashes():
    """On a CPU the kernel is not timed, so nothing is bold."""
    table = bench.table({"x": made_up({("chain", "eager"): 4, ("cat", "eager"): 5})})
    assert table.splitlines()[-1] == (
        "| x | eager | 2.0 | 4.0 | 5.0 | – | – | – | – | – | – | – | – | FLASH_ATTENTION | – |"
    )


@pytest.mark.parametrize("way", bench.WAYS)
def test_each_way_can_be_timed_alone(way, monkeypatch, tmp_path, capsys):
    """`--ways` and `--sites` choose; what was not timed does not get into the table of the page."""
    out = tmp_path / "bench.json"
    monkeypatch.setattr(bench.kernel, "emulated", None)
    arguments = "--device", "cpu", "--tiny", "--sites", "v2a", "--ways", way, "--out", out
    status, _, _ = run_here(bench, arguments, monkeypatch, capsys)
    (shape,) = json.loads(out.read_text())["shapes"].values()
    found = {key for key in shape if key.endswith(("_eager", "_graph"))}
    assert status == 0 and found == ({f"{way}_eager"} if way in ("chain", "cat") else set())


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
    (bench_generate, ["--device", "cpu", "--blocks", "5"], "--blocks 5: expected at least 8"),
    (bench_generate, ["--device", "cpu", "--rounds", "0"], "--rounds 0: expected a whole"),
    (bench_decode, ["--device", "cpu", "--seconds", "2"], "--seconds 2: expected a whole"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(script, options, message, monkeypatch, capsys):
    """One line and exit status 2, from each of the GPU benchmarks."""
    monkeypatch.setattr(bench.kernel, "emulated", None)
    status, _, err = run_here(script, options, monkeypatch, capsys)
    assert status == 2 and message in err and err.count("\n") == 1
