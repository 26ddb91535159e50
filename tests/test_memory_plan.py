"""The plan is what really happens: its rows against bytes counted on running models."""

from dataclasses import replace

import pytest
import torch
from helpers import LAYOUTS, ROOT, layout_name, random_model, random_text, tiny

import config
import model
import rollout
import self_forcing
from full_size import memory, memory_plan
from full_size import text as captions
from full_size.memory_plan import Row
from kv_cache import CachedView

F32 = torch.float32


def streamed_view(net, blocks, window, monkeypatch):
    """The cache after a whole stream."""
    views = []

    def noted(*args):
        views.append(CachedView(*args))
        return views[-1]

    monkeypatch.setattr(self_forcing, "CachedView", noted)
    text, g = random_text(net, net.cfg), torch.Generator().manual_seed(0)
    with torch.inference_mode():
        list(rollout.rollout(net, lambda k: text, blocks, (1.0, 0.0), g, window=window))
    return views[0]


@pytest.mark.parametrize("cfg", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("blocks, window", [(6, 2), (4, 2), (3, 2), (4, None), (1, 1)])
def test_the_cache_row_is_what_a_stream_holds(cfg, blocks, window, monkeypatch):
    """Both layouts, with and without sinks, evicting or not, to the byte."""
    net = random_model(tiny(cfg), F32)
    held = streamed_view(net, blocks, window, monkeypatch).num_bytes()
    assert memory_plan.cache_row(net.cfg, blocks, window, F32).num_bytes == held


def test_weights_and_text_are_counted_to_the_byte():
    """Parameters of the model, keys and values of two prompts of 1024 tokens."""
    net = random_model(tiny(LAYOUTS[0]), F32)
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    assert memory_plan.weights_row(net, F32).num_bytes == size
    text = random_text(net, net.cfg, captions.TOKENS, clips=2)
    tensors = [t for stream in (text.video, text.audio) for pair in stream for t in pair]
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert memory_plan.text_row(net.cfg, 2, F32).num_bytes == held


def test_peak_counts_what_is_alive_at_once():
    """Freed tensors make room, views and what was there before cost nothing."""
    x = torch.empty(100, device="meta")

    def chain():
        y = x.view(10, 10) + 1  # 400 bytes
        y = y * 2  # 400 more, then the first are freed
        return (y * 3).sum()  # 400 again, and 4

    assert memory_plan.peak_bytes(chain) == 804


def test_attention_writes_no_scores():
    """A fused attention needs its output, not a (Q, K) matrix."""
    q = torch.empty(1, 2, 1000, 8, device="meta")

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    assert memory_plan.peak_bytes(attend) == 1000 * 2 * 8 * 4


def test_a_pass_is_as_large_as_its_widest_layer():
    """Ten layers need no more activations than two; twice the clips need twice as much."""
    two, ten = (model.build(replace(config.TOY, num_layers=n), device="meta") for n in (2, 10))
    sizes = [memory_plan.pass_row(net, F32).num_bytes for net in (two, ten)]
    assert sizes[0] == sizes[1] > 0
    assert 1.9 < memory_plan.pass_row(two, F32, batch=2).num_bytes / sizes[0] <= 2


@pytest.fixture(scope="module")
def full_plans():
    """The full size's rows of two minutes, by window."""
    plan = memory_plan.stream_rows
    return {window: plan(config.FULL, 121, window, torch.bfloat16) for window in (5, 15, 25)}


def test_the_full_size_fits_one_gpu_of_80_gb(full_plans):
    """Windows of 5 and 15 seconds do; weights are the 18.9 billion parameters in bfloat16."""
    for window in (5, 15):
        assert full_plans[window][0].num_bytes == 2 * 18_876_207_360
        assert memory_plan.total(full_plans[window]) < 70e9


def test_what_does_not_fit_is_refused_with_the_window_that_does():
    """One byte less than window 3 needs: window 2 is named, and it fits."""
    cfg = tiny(LAYOUTS[1])
    rows = [Row("weights", 1000, ""), memory_plan.cache_row(cfg, 20, 3, F32)]
    memory_plan.check(rows, memory_plan.total(rows), cfg, 20, F32)
    with pytest.raises(ValueError, match="--window 2 would fit"):
        memory_plan.check(rows, memory_plan.total(rows) - 1, cfg, 20, F32)
    with pytest.raises(ValueError, match="no window is short enough"):
        memory_plan.check(rows, 1000, cfg, 20, F32)


def test_free_memory_is_a_sensible_number():
    """Some megabytes at least, and less than a petabyte."""
    assert 1e7 < memory.free_bytes(torch.device("cpu")) < 1e15


def test_the_readme_quotes_the_plan(full_plans):
    """Its table of memory is what `python -m full_size.memory` prints."""
    pytest.importorskip("diffusers")
    readme = (ROOT / "README.md").read_text()
    decoders = memory_plan.total(memory_plan.decoder_rows(config.FULL, torch.bfloat16)) / 1e9
    for rows in full_plans.values():
        weights, cache, text, one_pass = (row.num_bytes / 1e9 for row in rows)
        rest = one_pass + decoders
        for size in (weights, cache, text, rest):
            assert f"| {size:.2f} GB " in readme
