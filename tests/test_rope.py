"""Rotary positions: relative, on one clock for both streams, exact in long streams."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from helpers import PAPER, tiny

import config
import rope

LAYOUTS = ["split", "interleaved"]


def scores(q, k, angles_q, angles_k, cfg):
    """Dot products per head of a rotated query with a rotated key, in float64."""
    q = rope.rotate(q, rope.cos_sin(angles_q, cfg, dtype=torch.float64))
    k = rope.rotate(k, rope.cos_sin(angles_k, cfg, dtype=torch.float64))
    return (q * k).sum(-1)


def random_heads(width, cfg):
    return torch.randn(1, 1, cfg.num_heads, width // cfg.num_heads, dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_depend_on_the_distance_in_time_alone(layout):
    """Two tokens 0.4 s apart have the same scores at any time of the stream."""
    cfg = replace(config.TOY, rope_layout=layout)
    q, k = random_heads(cfg.audio_width, cfg), random_heads(cfg.audio_width, cfg)

    def at(seconds, apart=0.4):
        t = torch.tensor([seconds, seconds + apart], dtype=torch.float64)
        a = rope.time_angles(t, cfg)
        return scores(q, k, a[:1], a[1:], cfg)

    assert torch.allclose(at(0.0), at(7.25), atol=1e-10)
    assert not torch.allclose(at(0.0), at(0.0, apart=0.8), atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_hour_long_stream_is_as_exact_as_its_first_second(layout):
    """After an hour, the full-size model has the scores of the first second, within 1e-8.

    Angles are then up to 5.6 million radians. In float32 they would be off by half a radian.
    """
    cfg = replace(config.FULL, rope_layout=layout)
    q, k = random_heads(cfg.audio_width, cfg), random_heads(cfg.audio_width, cfg)

    def at(frame):  # 25 latents, one second; latent 0 is left out, because it is shorter
        a = rope.time_angles(rope.audio_times(range(frame, frame + 25), cfg), cfg)
        return torch.stack([scores(q, k, a[:1], a[i : i + 1], cfg) for i in range(25)])

    assert (at(1) - at(1 + 25 * 3600)).abs().max() < 1e-8 * at(1).abs().max()


def test_a_table_an_hour_on_holds_the_exact_cosines():
    """After an hour, a float32 table holds the rounded cosines of exact rational times."""
    cfg, frame = config.FULL, 25 * 3600
    table = rope.cos_sin(rope.time_angles(rope.audio_times(range(frame, frame + 1), cfg), cfg), cfg)
    seconds = Fraction(4 * frame - 1, 100)  # middle of mel frames 4 i - 3 .. 4 i + 1
    turn = float(2 * seconds / Fraction(cfg.rope_max_seconds) - 1)
    exact = [math.cos(g * turn) for g in rope.frequencies(cfg.audio_width, 1, cfg).tolist()]
    assert torch.allclose(table.cos[0].double(), torch.tensor(exact).double(), atol=1e-7, rtol=0)


def test_times_of_the_first_latents_are_the_middles_of_their_input_frames():
    """V0 lasts one pixel frame, A0 one mel frame; later latents last 8 and 4 (LTX-2)."""
    video = [1 / 48] + [(8 * f - 3) / 24 for f in (1, 2, 3)]
    audio = [0.005] + [(4 * i - 1) * 0.01 for i in (1, 2, 3)]
    exact = dict(dtype=torch.float64)
    assert torch.allclose(rope.video_times(range(4), config.LTX2), torch.tensor(video, **exact))
    assert torch.allclose(rope.audio_times(range(4), config.LTX2), torch.tensor(audio, **exact))


def test_a_block_has_the_same_positions_alone_as_inside_the_clip():
    """Frame indices are global: frames 4 to 6 have rows 4 to 6 of the positions of the clip."""
    cfg, n = config.TOY, config.TOY.tokens_per_frame
    whole = rope.video_angles(range(10), cfg)
    assert torch.equal(rope.video_angles(range(4, 7), cfg), whole[4 * n : 7 * n])
    times = rope.audio_times(range(76), cfg)
    assert torch.equal(rope.audio_times(range(26, 51), cfg), times[26:51])


def test_channel_pairs_are_ordered_by_frequency_then_by_axis():
    """At LTX-2's video width of 4096: two pairs without rotation, then t0 y0 x0 t1 y1 x1 ..."""
    cfg = config.LTX2
    angles = rope.video_angles(range(2), cfg)
    g = rope.frequencies(4096, 3, cfg)
    token = 384 + 24 * 5 + 7  # frame 1, row 5, column 7
    turns = [2 * (5 / 24) / 20 - 1, 2 * (32 * 5 + 16) / 2048 - 1, 2 * (32 * 7 + 16) / 2048 - 1]
    assert len(g) == 682 and torch.equal(angles[:, :2], torch.zeros(768, 2).double())
    expected = g[:, None] * torch.tensor(turns, dtype=torch.float64)
    assert torch.allclose(angles[token, 2:], expected.flatten(), atol=1e-9)


def test_frequencies_run_from_a_quarter_turn_to_theta_times_it():
    """g_0 = pi/2 and g_(K-1) = theta pi/2."""
    g = rope.frequencies(2048, 1, config.LTX2)
    assert g[0] == pytest.approx(math.pi / 2) and g[-1] == pytest.approx(1e4 * math.pi / 2)


def test_the_two_precisions_of_the_grid_differ_slightly():
    """The grid of the teacher is exact up to rounding; the student's grid is off by up to 4e-7."""
    exact = torch.tensor([math.pi / 2 * 1e4 ** (j / 1023) for j in range(1024)]).double()
    teacher = rope.frequencies(2048, 1, config.LTX2)
    student = rope.frequencies(2048, 1, config.FULL)
    assert torch.equal(teacher, exact)
    assert 1e-7 < (student / exact - 1).abs().max() < 4e-7


def test_layouts_differ_by_a_permutation_of_channels():
    """Interleaved channels 2i, 2i+1 are split channels i, i + D/2 of the same head."""
    split, inter = (replace(config.TOY, rope_layout=name) for name in LAYOUTS)
    angles = rope.time_angles(torch.tensor([1.7], dtype=torch.float64), split)
    x = random_heads(split.audio_width, split)
    half = x.shape[-1] // 2
    order = torch.arange(2 * half).view(2, half).T.flatten()  # 0, half, 1, half + 1, ...
    a = rope.rotate(x, rope.cos_sin(angles, split, dtype=torch.float64))
    b = rope.rotate(x[..., order], rope.cos_sin(angles, inter, dtype=torch.float64))
    assert torch.equal(a[..., order], b)
    assert not torch.allclose(a, rope.rotate(x, rope.cos_sin(angles, inter, dtype=torch.float64)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("site", ["video_self", "audio_self", "a2v", "v2a"])
def test_shifting_a_rotated_key_equals_rotating_it_at_the_later_time(site, layout):
    """A cached key can be moved in time without knowing its position."""
    cfg = tiny(PAPER, rope_layout=layout)
    if site == "video_self":
        now, later = (rope.video_angles(range(f, f + 1), cfg) for f in (1, 1 + 3 * 7))
    else:
        times = rope.video_times if site == "v2a" else rope.audio_times
        rate = 3 if site == "v2a" else 25
        now, later = (rope.time_angles(times(range(f, f + 1), cfg), cfg) for f in (1, 1 + rate * 7))
    shape = 1, len(now), cfg.num_heads, now.shape[1] * 2 // cfg.num_heads
    x = torch.randn(shape, dtype=torch.float64)
    f64 = dict(dtype=torch.float64)
    moved = rope.rotate(
        rope.rotate(x, rope.cos_sin(now, cfg, **f64)),
        rope.cos_sin(rope.shift_angles(site, 7.0, cfg), cfg, **f64),
    )
    assert torch.allclose(moved, rope.rotate(x, rope.cos_sin(later, cfg, **f64)), atol=1e-10)


def test_rotation_keeps_lengths():
    """Rotations change no norm, so attention logits stay in range at any position."""
    cfg = config.TOY
    x = torch.randn(1, 48, cfg.num_heads, cfg.video_width // cfg.num_heads, dtype=torch.float64)
    y = rope.rotate(x, rope.cos_sin(rope.video_angles(range(900, 903), cfg), cfg, dtype=x.dtype))
    assert torch.allclose(x.norm(dim=-1), y.norm(dim=-1))
    assert not torch.allclose(x, y)
