"""Graded: sinks in front of the audio, without a position, at the noise level of A0."""

from dataclasses import replace

import pytest
import torch

import config
import rope
from sink_tokens import SinkTokens, sink_angles


@pytest.fixture
def sinks():
    """Three sinks of width 4 with the values 100, 200 and 300."""
    sinks = SinkTokens(3, 4)
    sinks.tokens.data = torch.tensor([100.0, 200.0, 300.0])[None, :, None].repeat(1, 1, 4)
    return sinks


@pytest.mark.points(1, "SinkTokens.prepend")
def test_the_same_learnable_tokens_precede_every_clip(sinks):
    """Sinks first, then the unchanged audio; the gradients of both clips reach the sinks."""
    x = torch.arange(2 * 5 * 4.0).view(2, 5, 4)
    y = sinks.prepend(x)
    assert y.shape == (2, 8, 4), f"3 sinks and 5 tokens became {tuple(y.shape)}"
    assert not torch.equal(y[:, :5], x), "the sinks stand after the audio, not before it"
    assert torch.equal(y[:, 3:], x), "the audio tokens after the sinks have changed"
    assert y[:, :3, 0].tolist() == [[100, 200, 300]] * 2, "the sinks are not the parameters"
    assert y.requires_grad, "no gradient reaches the sinks, but they must learn"
    (gradient,) = torch.autograd.grad(y.sum(), sinks.tokens)
    assert gradient.eq(2).all(), "both clips must train the same sinks"


@pytest.mark.points(1, "SinkTokens.remove")
def test_sinks_are_removed_from_the_front(sinks):
    """Only the audio tokens remain."""
    y = torch.arange(8.0)[None, :, None].expand(2, 8, 4)
    found = sinks.remove(y)[0, :, 0].tolist()
    assert found != [0, 1, 2, 3, 4], "the end of the audio is removed instead of the sinks"
    assert found == [3, 4, 5, 6, 7], f"tokens 0 to 7 begin with 3 sinks; {found} remain"


@pytest.mark.points(1, "SinkTokens.prepend_sigma")
def test_sinks_have_the_noise_level_of_a0(sinks):
    """With one level per token, the level of A0 comes first, once per sink, clip by clip."""
    sigma = torch.tensor([[0.25, 0.5, 0.75], [0.5, 0.0, 1.0]])
    found = sinks.prepend_sigma(sigma)
    assert found.shape == (2, 6), f"3 sinks and 3 levels became {tuple(found.shape)}"
    assert torch.equal(found[:, 3:], sigma), "the levels of the tokens themselves have changed"
    assert found[:, :3].any(), "the sinks are clean (0), but they need the level of A0"
    of_sinks = found[:, :3].tolist()
    assert of_sinks == [[0.25] * 3, [0.5] * 3], f"sinks have {of_sinks}; A0 has 0.25 and 0.5"


@pytest.mark.points(1, "SinkTokens.prepend_sigma")
def test_one_level_for_the_clip_stays_one_level(sinks):
    """(B, 1) applies to all tokens, sinks included."""
    sigma = torch.tensor([[0.3], [0.8]])
    found = sinks.prepend_sigma(sigma)
    shape = tuple(found.shape)
    assert torch.equal(found, sigma), f"one level became {shape}: it applies to the sinks already"


@pytest.mark.points(1, "sink_angles")
def test_sinks_are_not_rotated():
    """'identity': all angles are 0, so cos = 1 and sin = 0."""
    found = sink_angles(config.TOY)
    assert found.shape == (16, 48), f"(S, audio_width / 2) is (16, 48), not {tuple(found.shape)}"
    time_0 = torch.allclose(found, rope.time_angles(torch.zeros(16).double(), config.TOY))
    assert not time_0, "sinks are rotated: these are the angles of time 0, which are not 0"
    assert not found.any(), "sinks are rotated, but they have no position: all angles must be 0"


@pytest.mark.points(1, "sink_angles")
def test_the_ablation_gives_sinks_the_times_before_a0():
    """'incremental': the times of audio latents -S to -1, 0.04 s apart."""
    cfg = replace(config.TOY, sink_positions="incremental", num_sinks=3)
    times = torch.tensor([-0.13, -0.09, -0.05], dtype=torch.float64)
    found = sink_angles(cfg)
    assert found.any(), "the sinks of the ablation have positions, so they must be rotated"
    after = rope.time_angles(-times, cfg)
    assert not torch.allclose(found, after), "the sinks stand after A0, not before it"
    torch.testing.assert_close(
        found, rope.time_angles(times, cfg), atol=1e-9, rtol=0,
        msg="the three sinks should stand at -0.13, -0.09 and -0.05 seconds",
    )  # fmt: skip
