"""Graded: where and when a token is, and how that turns its channels.

Angles are computed here slot by slot from the formula, with `math` instead of tensors.
"""

import math
from dataclasses import replace

import pytest
import torch

import config
import rope

CFG = replace(
    config.TOY, num_heads=2, video_width=32, audio_width=16, height=16, width=24,
    rope_dealing="bands",
)  # fmt: skip
# 2 rows of 3 columns; video has 16 slots: one that never turns, then 5 frequencies of 3 axes


def grid(width, axes, cfg):
    """The frequencies by the formula: K from pi / 2 to theta times that."""
    K = width // (2 * axes)
    return [math.pi / 2 * cfg.rope_theta ** (j / (K - 1)) for j in range(K)]


def by_hand(x, angles, layout):
    """Every pair of channels of every head turned by its angle: x (H, D), angles in slot order."""
    y, (heads, width) = x.clone(), x.shape
    for h in range(heads):
        for slot in range(width // 2):
            i, j = (slot, slot + width // 2) if layout == "split" else (2 * slot, 2 * slot + 1)
            cos, sin = (f(angles[h * (width // 2) + slot]) for f in (math.cos, math.sin))
            y[h, i], y[h, j] = x[h, i] * cos - x[h, j] * sin, x[h, j] * cos + x[h, i] * sin
    return y


@pytest.mark.points(2, "_midpoints")
def test_a_latent_stands_in_the_middle_of_its_input_frames():
    """The first covers input frame 0 alone, every later one `stride` of them."""
    for stride in (8, 4):
        frames = [0]  # input frames of the latent
        for f in range(4):
            found = float(rope._midpoints(range(f, f + 1), stride))
            right = (frames[0] + frames[-1] + 1) / 2
            assert found == right, (
                f"stride {stride}: latent {f} covers input frames {frames[0]}..{frames[-1]}, whose "
                f"middle is {right}, not {found}"
            )
            frames = range(frames[-1] + 1, frames[-1] + 1 + stride)


@pytest.mark.points(1, "frequencies")
def test_frequencies_run_from_a_quarter_turn_to_theta_times_it():
    """K = width // (2 axes) of them, evenly spaced on a logarithmic scale, ends included."""
    for width, axes in ((32, 3), (16, 1)):
        found, right = rope.frequencies(width, axes, CFG).tolist(), grid(width, axes, CFG)
        assert len(found) == len(right), (
            f"{width} channels are {width // 2} slots; {axes} axes share them, so each has "
            f"{len(right)} frequencies, not {len(found)}"
        )
        for name, j in (("first", 0), ("last", -1), ("second", 1)):
            assert found[j] == pytest.approx(right[j], rel=1e-6), (
                f"the {name} frequency is {found[j]:.5g}, expected {right[j]:.5g}"
            )


@pytest.mark.points(1, "frequencies")
def test_the_grid_has_the_precision_that_the_config_asks_for():
    """Computed in float64 for the teacher and in float32 for the student."""
    exact = torch.tensor(grid(2048, 1, config.LTX2), dtype=torch.float64)
    teacher, student = (rope.frequencies(2048, 1, c) for c in (config.LTX2, config.FULL))
    errors = [float((g / exact - 1).abs().max()) for g in (teacher, student)]
    assert errors[0] < 1e-7, f"the teacher's grid is off by {errors[0]:.1g}: compute it in float64"
    assert errors[1] > 1e-7, "the student's grid is too exact: rope_float64=False means float32"


@pytest.mark.points(3, "rotate")
def test_every_pair_of_channels_turns_by_its_tokens_angle():
    """For both layouts, several heads and tokens, against a loop over pairs."""
    torch.manual_seed(0)
    x, angles = torch.randn(1, 3, 2, 6).double(), torch.randn(3, 6).double()
    for layout, other in (("split", "interleaved"), ("interleaved", "split")):
        y = rope.rotate(x, rope.Rope(angles.cos(), angles.sin(), layout))
        assert y.shape == x.shape, f"{layout}: {tuple(x.shape)} became {tuple(y.shape)}"

        def is_turned(layout, sign=1):
            rows = [by_hand(x[0, t], (sign * angles[t]).tolist(), layout) for t in range(3)]
            return torch.allclose(y[0], torch.stack(rows))

        assert not is_turned(other), f"{layout}: the channels are paired as in {other!r}"
        assert not is_turned(layout, -1), f"{layout}: every pair is turned the other way"
        assert is_turned(layout), f"{layout}: (a, b) becomes (a cos - b sin, b cos + a sin)"


@pytest.mark.points(3, "video_angles")
def test_video_tokens_have_a_time_a_row_and_a_column():
    """Positions are read back from the slowest slots, token by token; axis order is t, y, x."""
    angles = rope.video_angles(range(2), CFG)
    assert angles.shape == (12, 16), f"2 frames of 2 x 3 tokens: {tuple(angles.shape)}"
    assert not angles[:, 0].any(), "the slot in front that is left over must never turn"
    slowest, token = grid(32, 3, CFG)[0], 0
    for frame, seconds in enumerate((0.5 / 24, 5 / 24)):
        for row in range(2):
            for column in range(3):
                where = (seconds, 8 * row + 4, 8 * column + 4)
                sizes = CFG.rope_max_seconds, CFG.rope_max_pixels, CFG.rope_max_pixels
                for axis, right, most, slot in zip("tyx", where, sizes, (1, 2, 3)):
                    found = most * (float(angles[token, slot]) / slowest + 1) / 2
                    assert found == pytest.approx(right, abs=1e-4), (
                        f"token {token} (frame {frame}, row {row}, column {column}) stands at "
                        f"{axis} = {round(found, 4) + 0:g}, expected {right:.4g} "
                        f"{'seconds' if axis == 't' else 'pixels, the middle of its square'}"
                    )
                token += 1


@pytest.mark.points(2, "shift_angles")
def test_a_shift_is_the_difference_of_two_times():
    """7 seconds later is g_j 2 * 7 / max further, wherever the key was."""
    for site in ("audio_self", "a2v", "v2a"):
        found = rope.shift_angles(site, 7.0, CFG)
        assert found.shape == (1, 8), f"{site}: one row of audio_width / 2, not {found.shape}"
        right = torch.tensor([g * 14 / CFG.rope_max_seconds for g in grid(16, 1, CFG)]).double()
        position = torch.tensor([g * (14 / CFG.rope_max_seconds - 1) for g in grid(16, 1, CFG)])
        assert not torch.allclose(found[0].float(), position), (
            f"{site}: this is the angle *of* 7 s; a shift *by* 7 s is a difference, without the -1"
        )
        torch.testing.assert_close(found[0], right, rtol=1e-5, atol=0, msg=f"{site}: wrong angle")


@pytest.mark.points(1, "shift_angles")
def test_a_video_key_moves_in_time_and_not_in_space():
    """Row and column slots get an angle of 0."""
    found = rope.shift_angles("video_self", 7.0, CFG)
    assert found.shape == (1, 16), f"video_self: one row of video_width / 2, not {found.shape}"
    space = found[0, 1:].unflatten(0, (5, 3))[:, 1:]
    assert not space.any(), "rows and columns turn too: a later key is at the same place"
    right = torch.tensor([g * 14 / CFG.rope_max_seconds for g in grid(32, 3, CFG)]).double()
    torch.testing.assert_close(found[0, 1::3], right, rtol=1e-5, atol=0, msg="wrong angle in time")
