"""The toy's benchmark counts right and says with how many threads; run here on a model of noise."""

import sys

import torch
from helpers import PAPER, ROOT, random_model, tiny

import config

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_generate  # noqa: E402
import bench_toy  # noqa: E402


def test_operations_are_those_of_the_full_size_benchmark():
    """For a caption as long as the full size's; a shorter one is less work."""
    long, short = (torch.empty(1, n, 9) for n in (bench_generate.captions.TOKENS, 3))
    counted = bench_toy.operations_of_block(config.TOY, [long])
    assert counted == bench_generate.flops_of_block(config.TOY, bench_toy.WINDOW)
    assert 0 < bench_toy.operations_of_block(config.TOY, [short]) < counted


def test_the_floor_is_below_the_measurement(monkeypatch):
    """Floor, measurement and ratio belong together."""
    monkeypatch.setattr(bench_generate, "matmul_rate", lambda *_: 1e12)
    net = random_model(tiny(PAPER, sigmas=config.FOUR_STEPS), torch.float32)
    found = bench_toy.bench_floor(net, [torch.randn(1, 3, net.cfg.caption_width)])
    floor = 1000 * found["operations_of_a_block"] / found["matmul_operations_per_second"]
    assert abs(found["floor_ms"] - floor) < 0.01
    assert found["block_ms"] > 0 and found["block_over_floor"] > 1
