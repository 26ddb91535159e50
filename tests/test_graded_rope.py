"""Graded: the position of each token, and how it rotates the token's channels.

Expected angles are computed pair by pair from the formula, with `math` instead of tensors.
"""

import math
from dataclasses import replace

import pytest
import torch
from grading import check, check_dtype, close, random_tensor, watched

import config
import rope

CFG = replace(
    config.TOY, num_heads=2, video_width=32, audio_width=16, height=16, width=24,
    rope_heads="contiguous",
)  # fmt: skip
# 2 rows of 3 columns; video has 16 pairs: one that is not rotated, then 5 frequencies of 3 axes
WIDE = replace(
    CFG, video_width=40, audio_width=24, pixel_stride=32, height=96, width=64, rope_theta=50.0,
    rope_max_seconds=20.0, rope_max_pixels=500.0, rope_heads="round_robin", rope_float64=False,
)  # fmt: skip
HOUR, PI_2 = 3600, float(torch.tensor(math.pi / 2))  # in float32, like every frequency


def grid(width, axes, cfg):
    """Compute the K frequencies by the formula: from pi / 2 to theta times that."""
    K = width // (2 * axes)
    return [math.pi / 2 * cfg.rope_theta ** (j / (K - 1)) for j in range(K)]


def by_head(pairs, cfg):
    """Give the pairs of a token, from slow to fast, to its heads: a list of all heads' pairs."""
    if cfg.rope_heads == "contiguous":
        return pairs
    return [pair for head in range(cfg.num_heads) for pair in pairs[head :: cfg.num_heads]]


def angles_by_hand(position, width, cfg):
    """Compute the angles of one token at a scaled position with one or three axes."""
    rotated = [g * p for g in grid(width, len(position), cfg) for p in position]
    return by_head([0.0] * (width // 2 - len(rotated)) + rotated, cfg)


def rotated_by_hand(x, angles, layout):
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
        frames, right = [0], []  # input frames of the latent
        for f in range(6):
            found = float(rope._midpoints(range(f, f + 1), stride))
            right.append((frames[0] + frames[-1] + 1) / 2)
            covers = f"latent {f} covers input frames {frames[0]} to {frames[-1]}"
            assert found == right[f], f"{covers}, their middle is {right[f]}, not {found}"
            frames = range(frames[-1] + 1, frames[-1] + 1 + stride)
        for some in (range(6), range(2, 5), range(1, 6)):
            found = rope._midpoints(some, stride).tolist()
            wrong = f"latents {some.start} to {some.stop - 1} stand at {found}"
            assert found == right[some.start : some.stop], f"{wrong}, not at {right}"
    found = rope._midpoints(range(3), 8)
    check_dtype(found, torch.float64, "positions must stay exact for hours")


@pytest.mark.points(1, "frequencies")
def test_frequencies_go_from_pi_over_2_to_theta_times_that():
    """K = width // (2 axes) of them, evenly spaced on a logarithmic scale, both ends included."""
    for width, axes, cfg in ((32, 3, CFG), (16, 1, CFG), (40, 3, WIDE), (24, 1, WIDE)):
        found, right = rope.frequencies(width, axes, cfg).tolist(), grid(width, axes, cfg)
        pairs = f"{width} channels are {width // 2} pairs for {axes} axes"
        count = len(found)
        assert count == len(right), f"{pairs}: {len(right)} frequencies, not {count}"
        for name, j in (("first", 0), ("last", -1), ("second", 1)):
            message = f"the {name} frequency is {found[j]:.5g}, expected {right[j]:.5g}"
            assert found[j] == pytest.approx(right[j], rel=1e-5), message
        even = "between the ends the frequencies are not evenly spaced on a logarithmic scale"
        assert found == pytest.approx(right, rel=1e-5), even


@pytest.mark.points(1, "frequencies")
def test_the_grid_has_the_precision_of_the_config():
    """float64 for the teacher, float32 for the student; cast to float32, then float64 again."""
    exact = torch.tensor(grid(2048, 1, config.LTX2), dtype=torch.float64)
    teacher, student = (rope.frequencies(2048, 1, c) for c in (config.LTX2, config.FULL))
    for found in (teacher, student):
        check_dtype(found, torch.float64, "angles are computed in float64")
        is_cast = torch.equal(found, found.float().double())
        assert is_cast, "the grid is not cast to float32 at the end, as in LTX-2"
    errors = [float((g / exact - 1).abs().max()) for g in (teacher, student)]
    assert errors[0] < 1e-7, f"the teacher's grid is off by {errors[0]:.1g}: compute it in float64"
    assert errors[1] > 1e-7, "the student's grid is too exact: rope_float64=False means float32"
    assert errors[1] < 1e-5, f"the student's grid is off by {errors[1]:.1g}"
    device = rope.frequencies(16, 1, CFG, "meta").device.type
    assert device == "meta", f"`device` is ignored: asked for another one, the grid is on {device}"


@pytest.mark.points(2, "rotate")
def test_every_pair_of_channels_rotates_by_the_angle_of_its_token():
    """For both layouts, several clips, heads and tokens, against a loop over pairs."""
    x, angles = random_tensor(3, 4, 2, 6).double(), random_tensor(4, 6, seed=1).double()
    for layout, other in (("split", "interleaved"), ("interleaved", "split")):
        with watched(x, angles):
            y = rope.rotate(x, rope.Rope(angles.cos(), angles.sin(), layout))
        assert y.shape == x.shape, f"{layout}: {tuple(x.shape)} became {tuple(y.shape)}"

        def right(layout, sign=1, of=lambda b: b):
            rows = [[rotated_by_hand(x[of(b), t], (sign * angles[t]).tolist(), layout)
                     for t in range(4)] for b in range(3)]  # fmt: skip
            return torch.stack([torch.stack(row) for row in rows])

        suspects = {
            f"{layout}: the channels are paired as in {other!r}": right(other),
            f"{layout}: every pair rotates the other way": right(layout, -1),
            f"{layout}: all clips became clip 0": right(layout, of=lambda b: 0),
        }
        rule = f"{layout}: (a, b) should become (a cos - b sin, b cos + a sin)"
        check(y, right(layout), rule, suspects)


@pytest.mark.points(1, "rotate")
def test_a_table_of_one_row_rotates_all_tokens_alike():
    """In the dtype of x, and with a gradient for x."""
    angles = random_tensor(1, 6, seed=1).double()
    for dtype, atol in ((torch.bfloat16, 3e-2), (torch.float32, 1e-5), (torch.float64, 1e-9)):
        x = random_tensor(3, 4, 2, 6, dtype=dtype, requires_grad=True)
        for layout in ("split", "interleaved"):
            table = rope.Rope(angles.cos().to(dtype), angles.sin().to(dtype), layout)
            try:
                y = rope.rotate(x, table)
            except NotImplementedError:
                raise
            except RuntimeError as error:
                pytest.fail(f"a table of one row must rotate all tokens: {error}")
            check_dtype(y, dtype, f"{layout}: the result has the dtype of x")
            rows = [[rotated_by_hand(row.double(), angles[0].tolist(), layout) for row in clip]
                    for clip in x.detach()]  # fmt: skip
            right = torch.stack([torch.stack(row) for row in rows])
            rounded = close(y, right) and not close(y, right, atol)
            assert not rounded, f"{layout}: {dtype} is rounded on the way: compute in it or wider"
            check(y, right, f"{layout}: a table of one row does not rotate all tokens", {}, atol)
            assert y.requires_grad, f"{layout}: no gradient passes through the rotation"


@pytest.mark.points(2, "video_angles")
def test_a_video_token_has_a_time_a_row_and_a_column():
    """Positions are read back from the slowest pairs, token by token; the axes are t, y, x."""
    angles = rope.video_angles(range(2), CFG)
    assert angles.shape == (12, 16), f"2 frames of 2 x 3 tokens: {tuple(angles.shape)}"
    check_dtype(angles, torch.float64, "angles are computed in float64")
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


def video_by_hand(frames, cfg, stride=None):
    """Compute the angles of all tokens, one by one."""
    rows, columns = cfg.height // cfg.pixel_stride, cfg.width // cfg.pixel_stride
    stride, angles = stride or cfg.pixel_stride, []
    for f in frames:
        t = (8 * f - 3 if f else 0.5) / cfg.fps
        for row in range(rows):
            for column in range(columns):
                place = [(t, cfg.rope_max_seconds)]
                place += [((i + 0.5) * stride, cfg.rope_max_pixels) for i in (row, column)]
                scaled = [2 * p / most - 1 for p, most in place]
                angles.append(angles_by_hand(scaled, cfg.video_width, cfg))
    return torch.tensor(angles, dtype=torch.float64)


@pytest.mark.points(1, "video_angles")
def test_positions_are_right_at_every_size_and_after_an_hour():
    """For another grid, pixel stride, maximum and order of heads; exact far from the start."""
    for cfg in (CFG, WIDE):
        for frames in (range(2), range(5, 7)):
            where = f"frames {frames.start} to {frames.stop - 1}, {cfg.pixel_stride} pixels a token"
            suspects = {
                f"{where}: the pixel stride is a fixed number": video_by_hand(frames, cfg, 8),
                f"{where}: counted from the first frame given": video_by_hand(range(2), cfg),
            }
            right = video_by_hand(frames, cfg)
            check(rope.video_angles(frames, cfg), right, f"{where}: wrong angles", suspects, 1e-4)
    late = range(3 * HOUR, 3 * HOUR + 2)
    found = rope.video_angles(late, CFG)[:, 1]  # the slowest pair of the time axis
    seconds = [(8 * f - 3) / 24 for f in late for _ in range(6)]
    right = [PI_2 * (2 * t / CFG.rope_max_seconds - 1) for t in seconds]
    is_exact = found.tolist() == pytest.approx(right, rel=1e-9)
    assert is_exact, "after an hour the angles are off: positions go through float32 somewhere"


def check_exact(slowest, seconds, cfg):
    """Fail unless the angle of the slowest pair, whose frequency is pi / 2, is exact."""
    right = PI_2 * 2 * seconds / cfg.rope_max_seconds
    is_exact = float(slowest) == pytest.approx(right, rel=1e-9)
    assert is_exact, "the shift goes through float32: after an hour the keys stand elsewhere"


@pytest.mark.points(2, "shift_angles")
def test_a_shift_is_the_difference_of_two_times():
    """7.3 seconds later is an angle of g_j 2 * 7.3 / max more, wherever the key was."""
    for cfg in (CFG, WIDE):
        for site in ("audio_self", "a2v", "v2a"):
            found = rope.shift_angles(site, 7.3, cfg)
            width = cfg.audio_width
            shape = f"{site}: one row of audio_width / 2, not {tuple(found.shape)}"
            assert found.shape == (1, width // 2), shape
            check_dtype(found, torch.float64, "angles are computed in float64")
            right, position, whole = (
                torch.tensor([angles_by_hand([2 * s / cfg.rope_max_seconds - minus], width, cfg)])
                for s, minus in ((7.3, 0), (7.3, 1), (7, 0))
            )
            suspects = {
                f"{site}: this is the angle *of* 7.3 s, not the difference of 7.3 s": position,
                f"{site}: 7.3 s are cut to 7 s: a block need not last whole seconds": whole,
            }
            check(found, right, f"{site}: wrong angle", suspects)
            check_exact(found[0, 0], 7.3, cfg)


@pytest.mark.points(1, "shift_angles")
def test_a_video_key_moves_in_time_but_not_in_space():
    """The pairs of rows and columns get an angle of 0; whole seconds are as good as floats."""
    found = rope.shift_angles("video_self", 7.0, CFG)
    assert found.shape == (1, 16), f"video_self: one row of video_width / 2, not {found.shape}"
    space = found[0, 1:].unflatten(0, (5, 3))[:, 1:]
    assert not space.any(), "rows and columns rotate too, but the key stays at the same place"
    for cfg in (CFG, WIDE):
        for seconds in (0, 1, 2.5, 7.0, HOUR):
            found = rope.shift_angles("video_self", seconds, cfg)
            check_dtype(found, torch.float64, "angles are computed in float64")
            moved = [2 * seconds / cfg.rope_max_seconds, 0, 0]
            right = torch.tensor([angles_by_hand(moved, cfg.video_width, cfg)])
            check(found, right, f"video_self, {seconds} s later: wrong angle in time", atol=1e-4)
    check_exact(rope.shift_angles("video_self", 7.0, CFG)[0, 1], 7.0, CFG)
