"""Graded: which end is noise, what a layer does with its modulation, and who listens to whom."""

import contextlib
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import config
import model

CFG = replace(config.TOY, num_layers=1, num_heads=2, video_width=32, audio_width=16)


@pytest.mark.points(1, "add_noise")
def test_sigma_1_is_noise_and_0_is_clean():
    """A straight line from clean to noise, at one level per token."""
    x0, noise, sigma = 8.0, 16.0, [0.0, 0.25, 1.0]
    clip = torch.full((1, 3, 2), x0)
    found = model.add_noise(clip, torch.full_like(clip, noise), torch.tensor([sigma]))
    assert found.shape == clip.shape, f"{tuple(clip.shape)} became {tuple(found.shape)}"
    found = found[0, :, 0].tolist()
    assert found[0] != noise, "time runs the wrong way round: sigma = 0 is clean, 1 is noise"
    right = [(1 - s) * x0 + s * noise for s in sigma]
    assert found == right, f"between 8 and 16, levels {sigma} give {found}, not {right}"


@pytest.mark.points(1, "to_x0")
def test_the_velocity_leads_back_to_the_clean_tokens():
    """x0 = x - sigma v, for v = noise - x0, with one level per token."""
    x0, noise = torch.randn(2, 2, 5, 3, generator=torch.Generator().manual_seed(0)).unbind()
    sigma = torch.tensor([[0.1, 0.3, 0.5, 0.7, 0.9]])
    x, v = x0 + sigma[..., None] * (noise - x0), noise - x0
    found = model.to_x0(x, sigma, v)
    assert not torch.allclose(found, x + sigma[..., None] * v), (
        "the sign is wrong: v points from clean to noise, so x0 is against it"
    )
    assert torch.allclose(found, x0, atol=1e-6), "this is not the clean end: x0 = x - sigma v"


@pytest.mark.points(1, "to_x0")
def test_clean_estimates_are_computed_in_float32():
    """bfloat16 tokens: only the result is rounded."""
    x, v = torch.randn(2, 1, 200, 3, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    found = model.to_x0(x, torch.full((1, 1), 0.4207186), v)
    assert found.dtype == torch.bfloat16, f"bfloat16 tokens became {found.dtype}"
    assert torch.equal(found, (x.float() - 0.4207186 * v.float()).bfloat16()), (
        "rounded on the way: compute in float32, then go back to the tokens' dtype"
    )


@pytest.mark.points(1, "per_token")
def test_a_frames_level_is_that_of_all_its_tokens():
    """(B,) and (B, 1) stay one level; F levels of T tokens are repeated in place."""
    x = torch.zeros(2, 6, 4)
    found = model.per_token(torch.tensor([0.25, 0.5]), x)
    assert found.shape == (2, 1), f"levels (B,) became {tuple(found.shape)}, not (B, 1)"
    found = model.per_token(torch.tensor([[0.25, 0.5], [0.75, 1.0]]), x)[0].tolist()
    assert found != [0.25, 0.5] * 3, "levels alternate: tokens are frame-major, repeat in place"
    assert found == [0.25] * 3 + [0.5] * 3, f"2 frames of 3 tokens have levels {found}"


@pytest.mark.points(2, "timestep_embedding")
def test_timesteps_are_cosines_then_sines_of_falling_rates():
    """Rates fall from 1 towards 1/10000: exp(-ln(10000) i / half)."""
    half, tau = 4, 700.0
    found = model.timestep_embedding(torch.tensor([[tau, 2.0]]), width=8)
    assert found.shape == (1, 2, 8), f"(1, 2) timesteps became {tuple(found.shape)}"
    found = found[0, 0].tolist()

    def waves(rates):
        return [[f(tau * rate) for rate in rates] for f in (math.cos, math.sin)]

    cosines, sines = waves([10000 ** (-i / half) for i in range(half)])
    close = dict(abs=1e-3)
    assert found != pytest.approx(sines + cosines, **close), "sines come first: cosines should"
    too_far = sum(waves([10000 ** (-i / (half - 1)) for i in range(half)]), [])
    assert found != pytest.approx(too_far, **close), (
        "the rates reach 1/10000: divide by half, not by half - 1"
    )
    assert found == pytest.approx(cosines + sines, **close), f"tau = 700 gave {found}"


class Plus(nn.Module):
    """Stands in for an attention: remembers what it is asked and answers with twice its input."""

    def forward(self, x, context, q_rope, k_rope, attend):
        self.asked = x, context, q_rope, k_rope, attend
        return 2 * x


@pytest.fixture
def half():
    """A video half-layer with random tables and a stand-in for its self attention."""
    torch.manual_seed(0)
    half = model.build(CFG).video.layers[0]
    half.table.data.normal_()
    half.self_attn = Plus()
    return half


@pytest.mark.points(3, "HalfLayer.attend_self")
def test_self_attention_is_a_gated_residual_of_modulated_tokens(half):
    """x + gate * attention(N(x) (1 + scale) + shift), rows 0 to 2 of table plus modulation."""
    x, main = torch.randn(1, 5, 32), torch.randn(1, 5, 6, 32)
    modulation = model.Modulation(main, None, None, None)
    found = half.attend_self(x, modulation, "table", "attend")
    shift, scale, gate = (half.table[i] + main[:, :, i] for i in range(3))
    n = x / (x.square().mean(-1, keepdim=True) + CFG.norm_eps).sqrt()
    asked, context, *rest = half.self_attn.asked
    assert asked is context or torch.equal(asked, context), "self attention: context is the query"
    assert rest == ["table", "table", "attend"], "queries and keys get the same table of rotations"
    close = dict(atol=1e-5, rtol=1e-5)
    assert not torch.allclose(asked, n * (1 + shift) + scale, **close), (
        "shift and scale are swapped"
    )
    assert not torch.allclose(asked, x * (1 + scale) + shift, **close), "x is not normalised"
    assert not torch.allclose(asked, n * scale + shift, **close), "scale by 1 + scale: 0 is neutral"
    assert torch.allclose(asked, n * (1 + scale) + shift, **close), "not N(x) (1 + scale) + shift"
    answer = 2 * asked
    assert not torch.allclose(found, gate * answer, **close), "the residual is missing: x + ..."
    assert not torch.allclose(found, x + answer, **close), "the gate is missing"
    assert torch.allclose(found, x + gate * answer, **close), "not x + gate * attention"


class Half:
    """Stands in for one modality's half of a layer, and remembers what it hears."""

    def __init__(self, name):
        self.name = name

    def listening(self, normed, modulation):
        assert modulation == f"modulation of {self.name}"
        return "queries", self.name, normed

    def heard(self, normed, modulation):
        assert modulation == f"modulation of {self.name}"
        return "context", self.name, normed

    def attend_other(self, x, queries, context, modulation, q_rope, k_rope, attend):
        self.asked = x, queries, context, q_rope, k_rope, attend
        return x + 10


def listen():
    """One exchange: the streams before and after, normed by hand, and both stand-ins."""
    torch.manual_seed(0)
    before = {"video": torch.randn(1, 4, 32), "audio": torch.randn(1, 3, 16)}
    halves = [Half(name) for name in before]
    modulations = [f"modulation of {name}" for name in before]
    ropes = {name: name for name in ("video_cross", "audio_cross")}
    net, at = SimpleNamespace(cfg=CFG, fork=contextlib.nullcontext), str  # a site is its own name
    exchange = model.OmniTransformer._listen
    after = exchange(net, *halves, *before.values(), *modulations, ropes, at)
    normed = {
        n: x / (x.square().mean(-1, keepdim=True) + CFG.norm_eps).sqrt() for n, x in before.items()
    }
    return before, after, normed, halves


@pytest.mark.points(2, "OmniTransformer._listen")
def test_both_streams_hear_each_other_as_they_were():
    """Queries are one's own normed tokens, the context the other's, before either listened."""
    before, _, normed, halves = listen()
    for half, other in zip(halves, ("audio", "video")):
        x, (kind, me, own), (kind_2, they, theirs), *_ = half.asked
        name = half.name
        assert (kind, me) == ("queries", name), f"{name} listens with {me}'s {kind}"
        assert (kind_2, they) == ("context", other), f"{name} hears {they}'s {kind_2}, not {other}"
        assert torch.equal(x, before[name]), f"{name} is added to something else than itself"
        assert torch.allclose(theirs, normed[other], atol=1e-5), (
            f"{name} hears {other} after that has listened, or not normed: both hear each other as "
            f"they were before"
        )
        assert torch.allclose(own, normed[name], atol=1e-5), f"{name} asks with other than N(x)"


@pytest.mark.points(1, "OmniTransformer._listen")
def test_listening_has_its_own_site_and_rotations():
    """Video listens at a2v: video rotations for queries, audio's for keys; audio the reverse."""
    before, after, _, halves = listen()
    sites = {"video": ["video_cross", "audio_cross", "a2v"]}
    sites["audio"] = ["audio_cross", "video_cross", "v2a"]
    for half in halves:
        found, right = list(half.asked[3:]), sites[half.name]
        assert found[2] == right[2], f"{half.name} listens at {found[2]}: who listens is named last"
        assert found == right, f"{half.name}: rotations of (queries, keys) are {found[:2]}"
    for half, x in zip(halves, after):
        assert torch.equal(x, before[half.name] + 10), f"{half.name} is not what it heard"
