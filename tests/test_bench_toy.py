"""The benchmark of the toy counts right; run here on a random model."""

import torch
from helpers import PAPER, random_model, tiny

import config
from benchmarks import bench_generate, bench_toy


def test_operations_are_counted_by_the_layer():
    """As those of all layers at once; a shorter caption is less work."""
    cfg, window = config.TOY, bench_toy.WINDOW
    net = bench_generate.meta_net(cfg, cfg.num_layers)
    counted = sum(bench_generate.flops_of_pass(net, window)) * len(cfg.sigmas)
    assert counted == bench_generate.flops_of_block(cfg, window)
    assert 0 < bench_generate.flops_of_block(cfg, window, tokens=3) < counted


def test_the_floor_is_below_the_measurement(monkeypatch):
    """Floor, measurement and ratio belong together."""
    monkeypatch.setattr(bench_toy, "matmul_rate", lambda *_: 1e12)
    net = random_model(tiny(PAPER, sigmas=config.FOUR_STEPS), torch.float32)
    found = bench_toy.bench_floor(net, [torch.randn(1, 3, net.cfg.caption_width)])
    floor = 1000 * found["operations_of_a_block"] / found["matmul_operations_per_second"]
    assert abs(found["floor_ms"] - floor) < 0.01
    assert found["block_ms"] > 0 and found["block_over_floor"] > 1
