"""Graded: the position of each token, and how it rotates the token's channels.

Expected angles are computed pair by pair from the formula, with `math` instead of tensors.
"""

import math
from dataclasses import replace

import pytest
import torch

import config
import rope

CFG = replace(
    config.TOY, num_heads=2, video_width=32, audio_width=16, height=16, width=24,
    rope_heads="contiguous",
)  # fmt: skip
# 2 rows of 3 columns; video has 16 pairs: one that is not rotated, then 5 frequencies of 3 axes


def grid(width, axes, cfg):
    """Compute the K frequencies by the formula: from pi / 2 to theta times that."""
    K = width // (2 * axes)
    return [math.pi / 2 * cfg.rope_theta ** (j / (K - 1)) for j in range(K)]


def by_hand(x, angles, layout):
    """Rotate every pair of channels of every head: x (H, D), angles in the order of the pairs."""
    y, (heads, width) = x.clone(), x.shape
    for h in range(heads):
        for pair in range(width // 2):
            i, j = (pair, pair + width // 2) if layout == "split" else (2 * pair, 2 * pair + 1)
            cos, sin = (f(angles[h * (width // 2) + pair]) for f in (math.cos, math.sin))
            y[h, i], y[h, j] = x[h, i] * cos - x[h, j] * sin, x[h, j] * cos + x[h, i] * sin
    return y


@pytest.mark.points(2, "_midpoints")
def test_a_latent_stands_in_the_middle_of_its_input_frames():
    """The first latent covers input frame 0 alone, every later one covers `stride` frames."""
    for stride in (8, 4):
        frames = [0]  # input frames of the latent
        for f in range(4):
            found = float(rope._midpoints(range(f, f + 1), stride))
            right = (frames[0] + frames[-1] + 1) / 2
            covers = f"latent {f} covers input frames {frames[0]} to {frames[-1]}"
            assert found == right, f"{covers}, their middle is {right}, not {found}"
            frames = range(frames[-1] + 1, frames[-1] + 1 + stride)


@pytest.mark.points(1, "frequencies")
def test_frequencies_go_from_pi_over_2_to_theta_times_that():
    """K = width // (2 axes) of them, evenly spaced on a logarithmic scale, both ends included."""
    for width, axes in ((32, 3), (16, 1)):
        found, right = rope.frequencies(width, axes, CFG).tolist(), grid(width, axes, CFG)
        pairs = f"{width} channels are {width // 2} pairs for {axes} axes"
        count = len(found)
        assert count == len(right), f"{pairs}: {len(right)} frequencies, not {count}"
        for name, j in (("first", 0), ("last", -1), ("second", 1)):
            message = f"the {name} frequency is {found[j]:.5g}, expected {right[j]:.5g}"
            assert found[j] == pytest.approx(right[j], rel=1e-6), message


@pytest.mark.points(1, "frequencies")
def test_the_grid_has_the_precision_of_the_config():
    """float64 for the teacher, float32 for the student."""
    exact = torch.tensor(grid(2048, 1, config.LTX2), dtype=torch.float64)
    teacher, student = (rope.frequencies(2048, 1, c) for c in (config.LTX2, config.FULL))
    errors = [float((g / exact - 1).abs().max()) for g in (teacher, student)]
    assert errors[0] < 1e-7, f"the teacher's grid is off by {errors[0]:.1g}: compute it in float64"
    assert errors[1] > 1e-7, "the student's grid is too exact: rope_float64=False means float32"


@pytest.mark.points(3, "rotate")
def test_every_pair_of_channels_rotates_by_the_angle_of_its_token():
    """For both layouts, several heads and tokens, against a loop over pairs."""
    torch.manual_seed(0)
    x, angles = torch.randn(1, 3, 2, 6).double(), torch.randn(3, 6).double()
    for layout, other in (("split", "interleaved"), ("interleaved", "split")):
        y = rope.rotate(x, rope.Rope(angles.cos(), angles.sin(), layout))
        assert y.shape == x.shape, f"{layout}: {tuple(x.shape)} became {tuple(y.shape)}"

        def is_rotated(layout, sign=1):
            rows = [by_hand(x[0, t], (sign * angles[t]).tolist(), layout) for t in range(3)]
            return torch.allclose(y[0], torch.stack(rows))

        assert not is_rotated(other), f"{layout}: the channels are paired as in {other!r}"
        assert not is_rotated(layout, -1), f"{layout}: every pair rotates the other way"
        assert is_rotated(layout), f"{layout}: (a, b) should become (a cos - b sin, b cos + a sin)"


@pytest.mark.points(3, "video_angles")
def test_a_video_token_has_a_time_a_row_and_a_column():
    """Positions are read back from the slowest pairs, token by token; the axes are t, y, x."""
    angles = rope.video_angles(range(2), CFG)
    assert angles.shape == (12, 16), f"2 frames of 2 x 3 tokens: {tuple(angles.shape)}"
    assert not angles[:, 0].any(), "the first pair is left over and must not be rotated"
    slowest, token = grid(32, 3, CFG)[0], 0
    for frame, seconds in enumerate((0.5 / 24, 5 / 24)):
        for row in range(2):
            for column in range(3):
                where = (seconds, 8 * row + 4, 8 * column + 4)
                sizes = CFG.rope_max_seconds, CFG.rope_max_pixels, CFG.rope_max_pixels
                for axis, right, most, pair in zip("tyx", where, sizes, (1, 2, 3)):
                    found = most * (float(angles[token, pair]) / slowest + 1) / 2
                    assert found == pytest.approx(right, abs=1e-4), (
                        f"token {token} (frame {frame}, row {row}, column {column}) stands at "
                        f"{axis} = {round(found, 4) + 0:g}, expected {right:.4g} "
                        f"{'seconds' if axis == 't' else 'pixels, the middle of its square'}"
                    )
                token += 1


@pytest.mark.points(2, "shift_angles")
def test_a_shift_is_the_difference_of_two_times():
    """7 seconds later is an angle of g_j 2 * 7 / max more, wherever the key was."""
    for site in ("audio_self", "a2v", "v2a"):
        found = rope.shift_angles(site, 7.0, CFG)
        assert found.shape == (1, 8), f"{site}: one row of audio_width / 2, not {found.shape}"
        right = torch.tensor([g * 14 / CFG.rope_max_seconds for g in grid(16, 1, CFG)]).double()
        position = torch.tensor([g * (14 / CFG.rope_max_seconds - 1) for g in grid(16, 1, CFG)])
        is_position = torch.allclose(found[0].float(), position)
        assert not is_position, f"{site}: this is the angle *of* 7 s, not the difference of 7 s"
        torch.testing.assert_close(found[0], right, rtol=1e-5, atol=0, msg=f"{site}: wrong angle")


@pytest.mark.points(1, "shift_angles")
def test_a_video_key_moves_in_time_but_not_in_space():
    """The pairs of rows and columns get an angle of 0."""
    found = rope.shift_angles("video_self", 7.0, CFG)
    assert found.shape == (1, 16), f"video_self: one row of video_width / 2, not {found.shape}"
    space = found[0, 1:].unflatten(0, (5, 3))[:, 1:]
    assert not space.any(), "rows and columns rotate too, but the key stays at the same place"
    right = torch.tensor([g * 14 / CFG.rope_max_seconds for g in grid(32, 3, CFG)]).double()
    torch.testing.assert_close(found[0, 1::3], right, rtol=1e-5, atol=0, msg="wrong angle in time")
