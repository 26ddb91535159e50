"""Sinks: no position, A0's noise level, never in the output."""

from dataclasses import replace

import pytest
import torch
from helpers import PAPER, random_clip, random_model, random_text, tiny

import config
import rope
from kv_cache import MaskedView
from masks import clip_span
from model import ropes_of
from sink_tokens import SinkTokens, sink_angles

CFG = tiny(replace(PAPER, num_sinks=16))


def turned(cfg, site, tokens):
    """Random heads before and after the rotation of block 0, at one attention site."""
    table = ropes_of(cfg, clip_span(1, cfg), torch.device("cpu"), torch.float64)[site]
    width = 2 * table.cos.shape[1]
    x = torch.randn(1, tokens, cfg.num_heads, width // cfg.num_heads, dtype=torch.float64)
    return x, rope.rotate(x, table)


@pytest.mark.parametrize("site", ["audio_self", "audio_cross"])
def test_sinks_are_not_rotated(site):
    """With 'identity' the 16 sinks pass through RoPE bitwise unchanged; A0 does not."""
    x, y = turned(CFG, site, tokens=17)
    assert torch.equal(x[:, :16], y[:, :16])
    assert not torch.allclose(x[:, 16], y[:, 16])


def test_the_ablation_gives_sinks_the_times_before_a0():
    """'incremental' sinks have the times of 16 audio latents that end just before A0."""
    cfg = replace(CFG, sink_positions="incremental")
    first = torch.tensor([-0.65], dtype=torch.float64)  # 4 * -16 - 1 mel frames at 100 a second
    last = torch.tensor([-0.05], dtype=torch.float64)
    angles = sink_angles(cfg)
    assert torch.allclose(angles[:1], rope.time_angles(first, cfg), atol=1e-12)
    assert torch.allclose(angles[-1:], rope.time_angles(last, cfg), atol=1e-12)


def test_sinks_share_the_noise_level_of_a0():
    """Levels per token get the level of A0 in front, once per sink; one level stays one."""
    sinks = SinkTokens(3, 16)
    levels = torch.tensor([[0.1, 0.7, 0.8], [0.2, 0.5, 0.6]])
    assert torch.equal(sinks.prepend_sigma(levels)[:, :3], levels[:, :1].expand(2, 3))
    assert torch.equal(sinks.prepend_sigma(levels)[:, 3:], levels)
    assert torch.equal(sinks.prepend_sigma(levels[:, :1]), levels[:, :1])


def test_prepend_puts_the_same_learnt_tokens_before_every_clip():
    """The parameters stand before every clip; remove undoes prepend."""
    sinks, x = SinkTokens(3, 16), torch.randn(2, 5, 16)
    y = sinks.prepend(x)
    assert torch.equal(sinks.remove(y), x)
    assert torch.equal(y[:, :3], sinks.tokens.expand(2, 3, 16))


def test_sinks_are_removed_before_the_output():
    """A pass returns one velocity per audio latent, whatever the number of sinks."""
    for S in (0, 16):
        cfg = replace(CFG, num_sinks=S)
        model, span = random_model(cfg), clip_span(2, cfg)
        sigma = torch.rand(1, 26, dtype=torch.float64)
        _, a = model(
            *random_clip(cfg, 2), sigma[:, 0], sigma, random_text(model, cfg), span, MaskedView()
        )
        assert a.shape == (1, 26, cfg.audio_channels)


def test_sinks_matter_and_learn():
    """A change of the sinks changes both streams, and a loss on either reaches them."""
    model, span = random_model(CFG), clip_span(2, CFG)
    clip, text = random_clip(CFG, 2), random_text(model, CFG)
    model.sinks.tokens.requires_grad_(True)
    sigma = torch.full((1,), 0.5, dtype=torch.float64)
    for out in model(*clip, sigma, sigma, text, span, MaskedView()):
        (gradient,) = torch.autograd.grad(out.sum(), model.sinks.tokens, retain_graph=True)
        assert gradient.abs().amax(-1).min() > 1e-6


def test_no_sinks_no_parameters():
    """With S = 0 no parameter is a sink, as in LTX-2."""
    names = dict(random_model(replace(CFG, num_sinks=0)).named_parameters())
    assert not [n for n in names if "sinks" in n]
    assert config.RELEASED.num_sinks == config.LTX2.num_sinks == 0
