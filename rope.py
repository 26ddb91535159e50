"""Rotary position embeddings (RoPE): one clock for video and audio.

Attention compares queries and keys by dot product. RoPE rotates each pair of channels by an angle
that is linear in the token's position, so the dot product depends on the *distance* between two
tokens. Video and audio share one clock. A position is a time in seconds (for video also a row and a
column in pixels), never an index. A video latent that lasts a third of a second can therefore find
the audio latents of the same moment.

    angle of position p on an axis, frequency j:   g_j * (2 p / max - 1),
    g_j = pi/2 * theta^(j / (K-1)),  j = 0 .. K-1                      (LTX-2; ltx-core rope)

A width of C channels has C/2 pairs, each rotated by one angle. With n axes there are
K = C // (2n) frequencies. The first (C mod 2n)/2 pairs are not rotated. The others are ordered by
frequency, then by axis: t0 y0 x0 t1 y1 x1 ... In LTX-2 each of the 32 heads gets contiguous pairs:
head 0 owns the slowest frequencies. In the toy, the 4 heads take pairs round-robin, so each head
has the whole range of frequencies. `rope_layout` says which two of a head's D channels form a pair:

    split         channel i with i + D/2          (LTX-2)
    interleaved   channel 2i with 2i + 1          (the student of OmniForcing)

Angles are computed in float64, so after an hour they are still exact to float32. Only cos and sin
are cast to the dtype of the model.

    python rope.py    prints q . k of two tokens 0.2 s apart, at 0 s and at 3600 s
"""

import functools
import math
from typing import NamedTuple

import torch

import config


class Rope(NamedTuple):
    """cos and sin of the rotation angles of T tokens."""

    cos: torch.Tensor  # (T, C/2)
    sin: torch.Tensor  # (T, C/2)
    layout: str  # "split" | "interleaved"


def rotate(x, rope: Rope):
    """Rotate every pair of channels by the angle of its token.

    x (B, T, H, D) -> same shape; a table of one row rotates all tokens by the same angles

    >>> quarter = Rope(torch.zeros(1, 2), torch.ones(1, 2), "split")          # 90 degrees
    >>> rotate(torch.tensor([1., 2., 3., 4.]).view(1, 1, 1, 4), quarter).flatten()
    tensor([-3., -4.,  1.,  2.])
    >>> quarter = quarter._replace(layout="interleaved")
    >>> rotate(torch.tensor([1., 2., 3., 4.]).view(1, 1, 1, 4), quarter).flatten()
    tensor([-2.,  1., -4.,  3.])
    """
    H, half = x.shape[2], x.shape[3] // 2
    cos, sin = rope.cos.view(-1, H, half), rope.sin.view(-1, H, half)
    if rope.layout == "split":
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    a, b = x.unflatten(-1, (half, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def video_times(frames, cfg) -> torch.Tensor:
    """(F,) middle of each video latent frame in seconds, float64.

    >>> video_times(range(3), config.LTX2) * 24
    tensor([ 0.5000,  5.0000, 13.0000], dtype=torch.float64)
    """
    return _midpoints(frames, cfg.video_stride) / cfg.fps


def audio_times(frames, cfg) -> torch.Tensor:
    """(F,) middle of each audio latent frame in seconds, float64.

    >>> audio_times(range(3), config.LTX2)
    tensor([0.0050, 0.0300, 0.0700], dtype=torch.float64)
    """
    return _midpoints(frames, cfg.audio_stride) / cfg.mel_rate


def _midpoints(frames, stride):
    """Middle of each latent frame, counted in input frames."""
    f = torch.arange(frames.start, frames.stop, dtype=torch.float64)
    start = torch.where(f == 0, 0.0, stride * f - stride + 1)  # frame 0 covers one input frame
    return (start + stride * f + 1) / 2


@functools.lru_cache
def frequencies(width, axes, cfg, device="cpu") -> torch.Tensor:
    """(K,) frequencies g_j for `width` channels and `axes` axes, float64.

    LTX-2 computes the grid in float64 and casts it to float32 at the end. The student computes it
    in float32. The relative difference is up to 4e-7: 5e-3 rad at LTX-2's highest frequency.
    """
    dtype = torch.float64 if cfg.rope_float64 else torch.float32
    exponents = torch.linspace(0, 1, width // (2 * axes), dtype=dtype, device="cpu")
    grid = torch.pow(cfg.rope_theta, exponents) * math.pi / 2  # on the CPU: the same on all devices
    return grid.to(torch.float32).double().to(device)


def pair_angles(positions, width, cfg) -> torch.Tensor:
    """(T, axes) scaled positions 2 p / max - 1 -> (T, width/2) angles, float64."""
    axes = positions.shape[1]
    g = frequencies(width, axes, cfg, positions.device)
    angles = (g[:, None] * positions[:, None, :]).flatten(1)  # (T, K, axes) -> (T, K * axes)
    unrotated = angles.new_zeros(len(positions), width // 2 - angles.shape[1])
    return assign_to_heads(torch.cat([unrotated, angles], dim=1), cfg)


def assign_to_heads(pairs, cfg):
    """(T, C/2) channel pairs from slow to fast -> the same pairs, head by head.

    >>> from dataclasses import replace
    >>> two = replace(config.LTX2, num_heads=2)
    >>> assign_to_heads(torch.tensor([[0, 1, 2, 3]]), two)  # head 0 | head 1
    tensor([[0, 1, 2, 3]])
    >>> assign_to_heads(torch.tensor([[0, 1, 2, 3]]), replace(two, rope_heads="round_robin"))
    tensor([[0, 2, 1, 3]])
    """
    if cfg.rope_heads == "contiguous":
        return pairs
    return pairs.unflatten(1, (-1, cfg.num_heads)).transpose(1, 2).flatten(1)


def video_angles(frames, cfg) -> torch.Tensor:
    """(F * rows * columns, video_width/2) angles of video tokens from time, row and column."""
    rows, columns = cfg.grid
    pixels = [
        (torch.arange(n, dtype=torch.float64) + 0.5) * cfg.pixel_stride for n in (rows, columns)
    ]
    t, y, x = torch.meshgrid(video_times(frames, cfg), *pixels, indexing="ij")
    scaled = (t / cfg.rope_max_seconds, y / cfg.rope_max_pixels, x / cfg.rope_max_pixels)
    positions = torch.stack([2 * p.flatten() - 1 for p in scaled], dim=1)
    return pair_angles(positions, cfg.video_width, cfg)


def time_angles(times, cfg) -> torch.Tensor:
    """(T, audio_width/2) angles from time alone: for audio, and for cross-modal attention."""
    return pair_angles(2 * times[:, None] / cfg.rope_max_seconds - 1, cfg.audio_width, cfg)


def shift_angles(site, seconds, cfg) -> torch.Tensor:
    """(1, C/2) extra angle that moves a rotated key of attention `site` by `seconds` in time.

    Rotations add up, so a cached key can be moved although its position is not stored.
    """
    shift = 2 * seconds / cfg.rope_max_seconds
    if site == "video_self":
        shifts = shift * torch.eye(1, 3, dtype=torch.float64)  # time moves, row and column do not
        return pair_angles(shifts, cfg.video_width, cfg)
    return pair_angles(torch.full((1, 1), shift, dtype=torch.float64), cfg.audio_width, cfg)


def angle_device(device) -> torch.device:
    """Device on which to compute angles; `with angle_device(...)` makes it the default.

    It is the model's own device. With angles from the CPU, a GPU would wait at large blocks. MPS
    has no float64, so its angles are computed on the CPU.
    """
    device = torch.device(device or "cpu")
    return torch.device("cpu") if device.type == "mps" else device


@torch.inference_mode(False)  # model.ropes_of caches these; training may reuse them
def cos_sin(angles, cfg, device=None, dtype=torch.float32) -> Rope:
    """cos and sin of (T, C/2) angles, in the dtype of the model."""
    to = functools.partial(torch.Tensor.to, device=device, dtype=dtype)
    return Rope(to(angles.cos()), to(angles.sin()), cfg.rope_layout)


if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(1, 2, config.TOY.num_heads, config.TOY.audio_width // config.TOY.num_heads)
    for start in (0.0, 3600.0):  # the same two tokens, 0.2 s apart, now and in an hour
        where = torch.tensor([start, start + 0.2], dtype=torch.float64)
        q, k = rotate(x, cos_sin(time_angles(where, config.TOY), config.TOY))[0]
        print(f"at {start:6.0f} s: q . k = {(q * k).sum():.5f}")
