"""The plan of a training: what is kept, what is alive at once, and how many GPUs would do."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import PAPER, tiny

import config
import dmd
import model
import self_forcing
import teacher
from full_size import memory, sharding, training_plan
from full_size import text as captions
from kv_cache import MaskedView
from masks import clip_span

CFG = tiny(PAPER, num_sinks=0)
GENERATOR, CRITIC = dmd.make_recipes(10, 0, 8, is_toy=False)


def one_pass(net, captions, generator):
    """The smallest loss: one pass over two blocks."""
    span = clip_span(2, net.cfg)
    noise = model.draw_noise(len(captions), span, net.cfg, generator)
    text, sigma = (
        net.project_text(*captions.features),
        torch.rand(len(captions), generator=generator),
    )
    return sum(v.mean() for v in net(*noise, sigma, sigma, text, span, MaskedView()))


def test_what_is_kept_is_multiplied_out():
    """Weights, gradient, two moments and average in float32; frozen weights in bfloat16."""
    nets = [("t", config.LTX2, None), ("g", config.FULL, GENERATOR), ("c", config.LTX2, CRITIC)]
    found = training_plan.rows(nets, 10**9, 8)
    teacher, student = 18_876_174_592, 18_876_207_360
    sizes = [row.num_bytes * 8 for row in found[:8]]
    right = [2 * teacher, *(n * student for n in (4, 4, 8, 4)), *(n * teacher for n in (4, 4, 8))]
    assert sizes == pytest.approx(right, abs=8)
    assert found[-1].num_bytes == 10**9 and "8 processes" in found[0].how


def test_a_layer_more_takes_what_the_third_takes():
    """Five layers counted are five layers extrapolated; weights' gradients leave at once."""
    nets = [("g", replace(CFG, num_layers=5), GENERATOR)]
    counted = training_plan._peak(nets, one_pass, 2, 5)
    assert training_plan.activation_bytes(nets, one_pass, 2) == pytest.approx(counted, rel=0.02)


def test_layers_that_run_twice_keep_their_inputs_only(monkeypatch):
    """A layer more takes a small part of what it takes where activations are kept."""
    monkeypatch.setattr(captions, "TOKENS", 4)  # whose keys and values are kept in any case
    nets = [("g", CFG, GENERATOR)]

    def more():
        two, three = (training_plan._peak(nets, one_pass, 4, layers) for layers in (2, 3))
        return three - two

    twice = more()
    monkeypatch.setattr(sharding, "checkpoint_layers", lambda net: net)
    assert 0 < twice < 0.2 * more()


def test_gradients_of_a_rollout_do_not_wait_for_its_last_pass(monkeypatch):
    """In one backward call for all blocks, every layer would keep its gradients, in bfloat16."""
    monkeypatch.setattr(captions, "TOKENS", 4)
    monkeypatch.setattr(teacher, "SECONDS", 2)
    cfg = replace(CFG, sigmas=(1.0, 0.0))  # a pass and a refresh: what keeps gradients is the exit
    nets, made = [("g", cfg, GENERATOR)], partial(self_forcing.rollout_clip, window=4)

    def loss(net, captions, generator):
        return sum(x.mean() for x in made(net, None, captions, generator))

    def more():
        two, three = (training_plan._peak(nets, loss, 1, layers) for layers in (2, 3))
        return three - two

    apart = more()
    monkeypatch.setattr(sharding, "passes_apart", lambda net: net)
    two, three = (training_plan._parameters(CFG, layers) for layers in (2, 3))
    assert 0.8 < (more() - apart) / (2 * (three - two)) < 1


def test_what_does_not_fit_is_refused_with_the_number_that_does(monkeypatch):
    """One process is too few by one byte: two would do, and do; without room for one layer none."""
    nets = [("g", CFG, GENERATOR)]
    needed = memory.total(training_plan.rows(nets, 5000, 1))
    assert training_plan.refusal(nets, 5000, 1, needed - 1).endswith("free: 2 would do")
    assert memory.total(training_plan.rows(nets, 5000, 2)) < needed
    assert training_plan.refusal(nets, 5000, 1, 5000).endswith("no number of them is enough")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 5000)
    with pytest.raises(ValueError, match="^this training needs .* in each of 1 processes"):
        training_plan.check(nets, one_pass, 2)
