"""Graded: noise and velocity, modulation, and the steps of a layer of two streams."""

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
    """A straight line from clean to noise, with one level per token."""
    x0, noise, sigma = 8.0, 16.0, [0.0, 0.25, 1.0]
    clip = torch.full((1, 3, 2), x0)
    found = model.add_noise(clip, torch.full_like(clip, noise), torch.tensor([sigma]))
    assert found.shape == clip.shape, f"{tuple(clip.shape)} became {tuple(found.shape)}"
    found = found[0, :, 0].tolist()
    assert found[0] != noise, "the direction is wrong: sigma = 0 is clean, sigma = 1 is noise"
    right = [(1 - s) * x0 + s * noise for s in sigma]
    assert found == right, f"between 8 and 16, levels {sigma} give {found}, not {right}"


@pytest.mark.points(1, "to_x0")
def test_the_velocity_leads_back_to_the_clean_tokens():
    """x0 = x - sigma v, for v = noise - x0, with one level per token."""
    x0, noise = torch.randn(2, 2, 5, 3, generator=torch.Generator().manual_seed(0)).unbind()
    sigma = torch.tensor([[0.1, 0.3, 0.5, 0.7, 0.9]])
    x, v = x0 + sigma[..., None] * (noise - x0), noise - x0
    found = model.to_x0(x, sigma, v)
    forwards = torch.allclose(found, x + sigma[..., None] * v)
    assert not forwards, "the sign is wrong: v points from clean to noise, so go against it"
    assert torch.allclose(found, x0, atol=1e-6), "this is not the clean end: x0 = x - sigma v"


@pytest.mark.points(1, "to_x0")
def test_clean_estimates_are_computed_in_float32():
    """For bfloat16 tokens, only the result is rounded."""
    x, v = torch.randn(2, 1, 200, 3, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    found = model.to_x0(x, torch.full((1, 1), 0.4207186), v)
    assert found.dtype == torch.bfloat16, f"bfloat16 tokens became {found.dtype}"
    right = (x.float() - 0.4207186 * v.float()).bfloat16()
    assert torch.equal(found, right), "rounded too early: compute in float32, then round"


@pytest.mark.points(1, "per_token")
def test_all_tokens_of_a_frame_have_its_level():
    """(B,) and (B, 1) stay one level; the levels of F frames are repeated in place."""
    x = torch.zeros(2, 6, 4)
    found = model.per_token(torch.tensor([0.25, 0.5]), x)
    assert found.shape == (2, 1), f"levels (B,) became {tuple(found.shape)}, not (B, 1)"
    found = model.per_token(torch.tensor([[0.25, 0.5], [0.75, 1.0]]), x)[0].tolist()
    assert found != [0.25, 0.5] * 3, "levels alternate, but the tokens of a frame are consecutive"
    assert found == [0.25] * 3 + [0.5] * 3, f"2 frames of 3 tokens have levels {found}"


@pytest.mark.points(2, "timestep_embedding")
def test_cosines_then_sines_of_falling_rates():
    """The rates fall from 1 towards 1/10000: exp(-ln(10000) i / half)."""
    half, tau = 4, 700.0
    found = model.timestep_embedding(torch.tensor([[tau, 2.0]]), width=8)
    assert found.shape == (1, 2, 8), f"(1, 2) timesteps became {tuple(found.shape)}"
    found = found[0, 0].tolist()

    def waves(rates):
        return [[f(tau * rate) for rate in rates] for f in (math.cos, math.sin)]

    cosines, sines = waves([10000 ** (-i / half) for i in range(half)])
    close = dict(abs=1e-3)
    assert found != pytest.approx(sines + cosines, **close), "sines come first, not cosines"
    too_far = sum(waves([10000 ** (-i / (half - 1)) for i in range(half)]), [])
    assert found != pytest.approx(too_far, **close), "divide by half, not by half - 1"
    assert found == pytest.approx(cosines + sines, **close), f"tau = 700 gave {found}"


class Double(nn.Module):
    """A stand-in for an attention: records its arguments and returns its input times two."""

    def forward(self, x, context, q_rope, k_rope, attend):
        self.given = x, context, q_rope, k_rope, attend
        return 2 * x


@pytest.mark.points(3, "HalfLayer.attend_self")
def test_self_attention_is_a_gated_residual_of_modulated_tokens():
    """x + gate * attention(N(x) (1 + scale) + shift), with rows 0 to 2 of table plus modulation."""
    torch.manual_seed(0)
    half = model.build(CFG).layers[0].video
    half.table.data.normal_()
    half.self_attn = Double()
    x, main = torch.randn(1, 5, 32), torch.randn(1, 5, 6, 32)
    modulation = model.Modulation(main, None, None, None)
    found = half.attend_self(x, modulation, "table", "attend")
    shift, scale, gate = (half.table[i] + main[:, :, i] for i in range(3))
    n = x / (x.square().mean(-1, keepdim=True) + CFG.norm_eps).sqrt()
    given, context, *rest = half.self_attn.given
    assert given is context or torch.equal(given, context), "in self attention, context = queries"
    assert rest == ["table", "table", "attend"], "queries and keys need the same rotation table"
    close = dict(atol=1e-5, rtol=1e-5)
    swapped = n * (1 + shift) + scale
    assert not torch.allclose(given, swapped, **close), "shift and scale are swapped"
    assert not torch.allclose(given, x * (1 + scale) + shift, **close), "x is not normalised"
    assert not torch.allclose(given, n * scale + shift, **close), "scale by 1 + scale, not by scale"
    assert torch.allclose(given, n * (1 + scale) + shift, **close), "not N(x) (1 + scale) + shift"
    result = 2 * given
    assert not torch.allclose(found, gate * result, **close), "the residual is missing: x + ..."
    assert not torch.allclose(found, x + result, **close), "the gate is missing"
    assert torch.allclose(found, x + gate * result, **close), "not x + gate * attention"


class Half:
    """A stand-in for one stream's half of a layer: records its steps; each step adds something."""

    def __init__(self, name):
        self.name, self.steps = name, []

    def step(self, name, x, added, *given):
        self.steps.append(SimpleNamespace(name=name, x=x, given=given, result=x + added))
        return x + added

    def attend_self(self, x, modulation, positions, attend):
        return self.step("attend_self", x, 1, modulation, positions, attend("q", "k"))

    def attend_captions(self, x, keys_values, mask):
        return self.step("attend_captions", x, 2, keys_values, mask)

    def cross_inputs(self, x, modulation):
        assert modulation == f"modulation of {self.name}", "the modulation is the other stream's"
        return ("queries", self.name, x), ("context", self.name, x)

    def attend_other(self, x, queries, context, modulation, q_rope, k_rope, attend):
        given = queries, context, modulation, q_rope, k_rope, attend("q", "k")
        return self.step("attend_other", x, 10, *given)

    def mlp(self, x, modulation):
        return self.step("mlp", x, 100, modulation)


STEPS = ["attend_self", "attend_captions", "attend_other", "mlp"]
SWAPPED = {"video": "audio", "audio": "video"}


def run_layer():
    """Run layer 7 on stand-ins: the streams before and after, and both halves by name."""
    torch.manual_seed(0)
    before = {"video": torch.randn(1, 4, 32), "audio": torch.randn(1, 3, 16)}
    halves = {name: Half(name) for name in before}
    view = SimpleNamespace(attend=lambda layer, site, *qk: (layer, site, *qk))
    each = [[f"{kind} of {name}" for name in before] for kind in ("modulation", "captions")]
    ropes = {f"{name}_{kind}": f"{name}_{kind}" for name in before for kind in ("self", "cross")}
    layer = model.Layer(7, *halves.values())
    after = layer(*before.values(), *each[0], *each[1], "mask", ropes, view)
    return before, dict(zip(before, after)), halves


@pytest.mark.points(1, "Layer.forward")
def test_each_stream_goes_through_four_steps():
    """Self attention, captions, the other stream, MLP: each continues where the last one ended."""
    before, after, halves = run_layer()
    for name, half in halves.items():
        found, x = [step.name for step in half.steps], before[name]
        for forgotten in STEPS:
            assert forgotten in found, f"{name}: {forgotten} is forgotten"
        assert found == STEPS, f"{name}: the steps are {', '.join(found)}"
        for step in half.steps:
            assert torch.equal(step.x, x), f"{name}: {step.name} loses the result before it"
            x = step.result
        assert torch.equal(after[name], x), f"{name}: the layer does not return the last result"
        captions, mlp = half.steps[1].given, half.steps[3].given
        assert captions == (f"captions of {name}", "mask"), f"{name} reads {captions}"
        assert mlp == (f"modulation of {name}",), f"{name}: the MLP gets the {mlp[0]}"


@pytest.mark.points(2, "Layer.forward")
def test_both_streams_attend_to_each_other_as_they_were():
    """Own queries and the other's context, both from before either attends to the other."""
    _, _, halves = run_layer()
    for name, half in halves.items():
        other = SWAPPED[name]
        (kind, me, own), (kind_2, they, theirs), *_ = half.steps[2].given
        assert (kind, me) == ("queries", name), f"{name} attends with the {kind} of {me}"
        assert (kind_2, they) == ("context", other), f"{name} attends to the {kind_2} of {they}"
        late = f"{name} attends to {other} after {other} has changed"
        is_before = torch.equal(theirs, halves[other].steps[1].result)
        assert is_before, f"{late}: both streams must read the values from before this step"
        assert torch.equal(own, half.steps[1].result), f"{name}: queries are from the wrong step"


@pytest.mark.points(1, "Layer.forward")
def test_each_attention_has_its_own_site_and_rotations():
    """Video attends at a2v, with video rotations for queries and audio rotations for keys."""
    _, _, halves = run_layer()
    for name, site in (("video", "a2v"), ("audio", "v2a")):
        modulation, positions, found = halves[name].steps[0].given
        assert found == (7, f"{name}_self", "q", "k"), f"{name} attends to itself at {found[:2]}"
        assert positions == f"{name}_self", f"{name}: self attention rotates by {positions}"
        assert modulation == f"modulation of {name}", f"{name}: self attention gets {modulation}"
        _, _, modulation, *rotations, found = halves[name].steps[2].given
        where = f"{name} attends to the other stream at {found[:2]}"
        assert found[:2] == (7, site), f"{where}, but queries of {site} come from {name}"
        right = [f"{name}_cross", f"{SWAPPED[name]}_cross"]
        assert rotations == right, f"{name}: rotations of (queries, keys) are {rotations}"
        assert modulation == f"modulation of {name}", f"{name}: cross attention gets {modulation}"
