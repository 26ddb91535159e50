"""The benchmark of the toy counts right; run here on a random model."""

import torch
from helpers import PAPER, random_clip, random_model, random_text, tiny
from pytest import approx

import config
import rollout
from benchmarks import bench_generate, bench_toy


def test_operations_are_counted_by_the_layer():
    """As those of all layers at once; a shorter caption is less work."""
    cfg, window = config.TOY, bench_toy.WINDOW
    net = bench_generate.meta_net(cfg, cfg.num_layers)
    counted = sum(bench_generate.flops_of_pass(net, window)) * len(cfg.sigmas)
    assert counted == bench_generate.flops_of_block(cfg, window)
    assert 0 < bench_generate.flops_of_block(cfg, window, tokens=3) < counted


def test_without_a_cache_all_blocks_are_in_every_pass(monkeypatch):
    """The last one is noisy, the others are clean; there is no refresh."""
    net = random_model(tiny(PAPER, sigmas=config.FOUR_STEPS), torch.float32)
    clip, passes = random_clip(net.cfg, 3, dtype=torch.float32), []
    blocks = [rollout.block_of(clip, k, net.cfg) for k in range(3)]
    monkeypatch.setattr(bench_toy, "seconds", lambda call, *_: call())
    monkeypatch.setattr(bench_toy.model, "predict_x0", lambda *given: passes.append(given))
    bench_toy.time_rerun(net, None, blocks, net.cfg.sigmas)
    assert [float(given[3].max()) for given in passes] == approx(config.FOUR_STEPS[:-1])
    for _, *streams, sigma_video, sigma_audio, _, _, _ in passes:
        for x, levels, whole, new in zip(streams, (sigma_video, sigma_audio), clip, blocks[-1]):
            assert torch.equal(x, whole)
            assert levels.count_nonzero() == levels[:, -new.shape[1] :].count_nonzero() > 1


def test_a_rerun_is_not_timed_with_the_next_block(monkeypatch):
    """By a clock that moves only while the prefix is run again."""
    net, now = random_model(tiny(PAPER), torch.float32), [0.0]
    monkeypatch.setattr(bench_toy, "LONGEST_PREFIX", 2)
    monkeypatch.setattr("plumbing.stopwatch.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(bench_toy, "time_rerun", lambda *_: now.append(now.pop() + 5) or 5.0)
    found = bench_toy.bench_prefix(net, random_text(net, net.cfg))
    assert found == {"cached_seconds": [0, 0, 0], "rerun_seconds": [5, 5, 5]}


def test_the_floor_is_below_the_measurement(monkeypatch):
    """Floor, measurement and ratio belong together."""
    monkeypatch.setattr(bench_toy, "matmul_rate", lambda *_: 1e12)
    net = random_model(tiny(PAPER, sigmas=config.FOUR_STEPS), torch.float32)
    found = bench_toy.bench_floor(net, [torch.randn(1, 3, net.cfg.caption_width)])
    floor = 1000 * found["operations_of_a_block"] / found["matmul_operations_per_second"]
    assert abs(found["floor_ms"] - floor) < 0.01
    assert found["block_ms"] > 0 and found["block_over_floor"] > 1
