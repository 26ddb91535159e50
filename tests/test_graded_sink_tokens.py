"""Graded: sinks in front of the audio, without a position, at the noise level of A0."""

from dataclasses import replace

import pytest
import torch
from grading import check, check_dtype, random_tensor, watched

import config
import rope
from sink_tokens import SinkTokens, sink_angles


def three_sinks():
    """Make three sinks of width 4 with the values 100, 200 and 300."""
    sinks = SinkTokens(3, 4)
    sinks.tokens.data = torch.tensor([100.0, 200.0, 300.0])[None, :, None].repeat(1, 1, 4)
    return sinks


@pytest.mark.points(1, "SinkTokens.prepend")
def test_the_same_learnable_tokens_precede_every_clip():
    """Sinks first, then the unchanged audio; the gradients of all clips reach the sinks."""
    sinks = three_sinks()
    for clips in (2, 1, 3):
        x = random_tensor(clips, 5, 4, requires_grad=True)
        try:
            with watched(x, sinks.tokens):
                y = sinks.prepend(x)
        except NotImplementedError:
            raise
        except RuntimeError as error:
            pytest.fail(f"a batch of {clips} clips does not work: {error}")
        assert y.shape == (clips, 8, 4), f"3 sinks and 5 tokens became {tuple(y.shape)}"
        assert not torch.equal(y[:, :5], x), "the sinks stand after the audio, not before it"
        assert torch.equal(y[:, 3:], x), "the audio tokens after the sinks have changed"
        found = y[:, :3].tolist()
        right = sinks.tokens.repeat(clips, 1, 1).tolist()
        assert found == right, "the sinks are not the parameters"
        assert y.requires_grad, "no gradient reaches the sinks, but they must learn"
        of_sinks, of_x = torch.autograd.grad(y.sum(), [sinks.tokens, x], allow_unused=True)
        assert of_sinks is not None, "no gradient reaches the sinks, but they must learn"
        assert of_sinks.eq(clips).all(), "all clips must train the same sinks"
        assert of_x is not None and of_x.eq(1).all(), "no gradient reaches the audio"
    for dtype in (torch.bfloat16, torch.float64):
        y = sinks.prepend(random_tensor(2, 5, 4, dtype=dtype))
        check_dtype(y, dtype, "the sinks are cast to the dtype of the audio")


@pytest.mark.points(1, "SinkTokens.remove")
def test_sinks_are_removed_from_the_front():
    """Only the audio tokens remain, for any number of sinks."""
    for count in (3, 1, 5):
        sinks, y = SinkTokens(count, 4), torch.arange(8.0)[None, :, None].expand(2, 8, 4)
        found = sinks.remove(y)
        assert found.dim() == 3 and len(found) == 2, f"2 clips became {tuple(found.shape)}"
        found, kept = found[1, :, 0].tolist(), list(range(8))
        wrong_end = "the end of the audio is removed instead of the sinks"
        assert found != kept[:-count], wrong_end
        given = f"tokens 0 to 7 begin with {count} sinks"
        assert found == kept[count:], f"{given}; {found} remain"
    x = random_tensor(2, 5, 4, requires_grad=True)
    sinks = three_sinks()
    assert sinks.remove(x).requires_grad, "no gradient passes on to the audio tokens"


@pytest.mark.points(1, "SinkTokens.prepend_sigma")
def test_sinks_have_the_noise_level_of_a0():
    """With one level per token, the level of A0 comes first, once per sink, clip by clip."""
    sinks = three_sinks()
    sigma = torch.tensor([[0.25, 0.5, 0.75], [0.5, 0.0, 1.0], [0.0, 0.9, 0.3]])
    with watched(sigma):
        found = sinks.prepend_sigma(sigma)
    assert found.shape == (3, 6), f"3 sinks and 3 levels became {tuple(found.shape)}"
    assert torch.equal(found[:, 3:], sigma), "the levels of the tokens themselves have changed"
    assert found[:, :3].any(), "the sinks are clean (0), but they need the level of A0"
    of_sinks, right = found[:, :3].tolist(), [[level] * 3 for level in sigma[:, 0].tolist()]
    assert of_sinks == right, f"sinks have {of_sinks}; A0 has {sigma[:, 0].tolist()}"
    for dtype in (torch.bfloat16, torch.float64):
        found = sinks.prepend_sigma(random_tensor(2, 5, dtype=dtype))
        assert found.shape == (2, 8), f"3 sinks and 5 levels became {tuple(found.shape)}"
        check_dtype(found, dtype, "noise levels keep their dtype")
    found = sinks.prepend_sigma(torch.full((2, 5), 0.5))
    equal = "5 levels that happen to be equal are still one for each token"
    assert found.shape == (2, 8), f"{equal}: they became {tuple(found.shape)}, not (2, 8)"


@pytest.mark.points(1, "SinkTokens.prepend_sigma")
def test_one_level_for_the_clip_stays_one_level():
    """(B, 1) applies to all tokens, sinks included."""
    sigma = torch.tensor([[0.3], [0.8]])
    found = three_sinks().prepend_sigma(sigma)
    shape = tuple(found.shape)
    assert torch.equal(found, sigma), f"one level became {shape}: it applies to the sinks already"


@pytest.mark.points(1, "sink_angles")
def test_sinks_are_not_rotated():
    """'identity': all angles are 0, so cos = 1 and sin = 0."""
    for cfg in (config.TOY, replace(config.TOY, num_sinks=3, audio_width=32)):
        found, shape = sink_angles(cfg), (cfg.num_sinks, cfg.audio_width // 2)
        assert found.shape == shape, f"(S, audio_width / 2) is {shape}, not {tuple(found.shape)}"
        at_0 = rope.time_angles(torch.zeros(cfg.num_sinks).double(), cfg)
        mistake = "sinks are rotated: these are the angles of time 0, which are not 0"
        rule = "sinks are rotated, but they have no position: all angles must be 0"
        check(found, torch.zeros(shape), rule, {mistake: at_0})
        check_dtype(found, torch.float64, "angles are computed in float64")


@pytest.mark.points(1, "sink_angles")
def test_the_ablation_gives_sinks_the_times_before_a0():
    """'incremental': the times of audio latents -S to -1, one latent apart."""
    toy = replace(config.TOY, sink_positions="incremental", num_sinks=3)
    other = replace(toy, num_sinks=5, audio_stride=2, mel_rate=50, audio_width=32)
    for cfg in (toy, other):
        frames, stride = range(-cfg.num_sinks, 0), cfg.audio_stride
        times = [(stride * f - 1) / cfg.mel_rate for f in frames]
        times = torch.tensor(times, dtype=torch.float64)
        found, right = sink_angles(cfg), rope.time_angles(times, cfg)
        suspects = {
            "the sinks of the ablation have positions, so they must be rotated": 0 * right,
            "the sinks stand after A0, not before it": rope.time_angles(-times, cfg),
            "the sinks run backwards: sink 0 is the earliest": right.flip(0),
        }
        places = ", ".join(f"{t:.2f}" for t in times.tolist())
        check(found, right, f"the sinks should stand at {places} seconds", suspects, 1e-9)
        check_dtype(found, torch.float64, "angles are computed in float64")
