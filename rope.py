"""When and where a token is: rotary positions.

Attention compares queries and keys by dot product. Rotating each pair of channels by an angle
proportional to the token's position makes that product depend on the *distance* between two
tokens. Video and audio share one clock: a position is a time in seconds (and, for video, a row and
a column in pixels), never an index. That is how a video latent that lasts a third of a second finds
the audio latents that sound during it.

    angle of position p on an axis, frequency j:   g_j * (2 p / max - 1),
    g_j = pi/2 * theta^(j / (K-1)),  j = 0 .. K-1                      (LTX-2; ltx-core rope)

A width of C channels has C/2 slots, each a pair of channels that turns by one angle. With n axes
there are K = C // (2n) frequencies; slots are filled frequency by frequency, the axis fastest
(t0 y0 x0 t1 y1 x1 ...), behind (C mod 2n)/2 slots that never turn. LTX-2 deals the slots to its 32
heads in bands: the first head owns the slowest frequencies. The toy's 4 heads take them in turns,
so that each has the whole range. Which two of a head's D channels form a slot is the layout:

    split         channel i with i + D/2          (LTX-2)
    interleaved   channel 2i with 2i + 1          (OmniForcing's student)

Angles are computed in float64 from exact times, so an hour-long stream is as exact as its first
second; cos and sin are cast to the model's dtype at the end.

    python rope.py    q . k of two tokens 0.2 s apart, now and in an hour
"""

import functools
import math
from typing import NamedTuple

import torch

import config


class Rope(NamedTuple):
    """Rotation tables of some tokens."""

    cos: torch.Tensor  # (T, C/2)
    sin: torch.Tensor  # (T, C/2)
    layout: str  # "split" | "interleaved"

    def of(self, tokens: slice) -> "Rope":
        """The tables of some of the tokens."""
        return self._replace(cos=self.cos[tokens], sin=self.sin[tokens])


def rotate(x, rope: Rope):
    """Turn every pair of channels by its token's angle.

    x (B, T, H, D) -> same shape; a table of one row turns all tokens alike

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
    """Middle of each latent frame in input frames: [0, 1) for the first, then `stride` each."""
    f = torch.arange(frames.start, frames.stop, dtype=torch.float64)
    start = torch.where(f == 0, 0.0, stride * f - stride + 1)
    return (start + stride * f + 1) / 2


@functools.lru_cache
def frequencies(width, axes, cfg, device="cpu") -> torch.Tensor:
    """(K,) the g_j for `width` channels and `axes` axes, float64.

    LTX-2 keeps the grid in float64 until a last cast to float32, the student computes it in
    float32. They differ by up to 4e-7 of their value: 5e-3 rad at the highest frequency of LTX-2.
    """
    dtype = torch.float64 if cfg.rope_float64 else torch.float32
    exponents = torch.linspace(0, 1, width // (2 * axes), dtype=dtype, device="cpu")
    grid = torch.pow(cfg.rope_theta, exponents) * math.pi / 2  # on the CPU: everywhere the same
    return grid.to(torch.float32).double().to(device)


def slot_angles(turns, width, cfg) -> torch.Tensor:
    """(T, axes) turns 2 p / max - 1, which g_j multiplies -> (T, width/2) angles, float64."""
    axes = turns.shape[1]
    angles = (
        frequencies(width, axes, cfg, turns.device)[:, None] * turns[:, None, :]
    )  # (T, K, axes)
    angles = angles.flatten(1)
    still = angles.new_zeros(len(turns), width // 2 - angles.shape[1])
    return deal(torch.cat([still, angles], dim=1), cfg)


def deal(slots, cfg):
    """(T, C/2) slots from slow to fast -> the same slots head by head.

    >>> from dataclasses import replace
    >>> two = replace(config.LTX2, num_heads=2)
    >>> deal(torch.tensor([[0, 1, 2, 3]]), two)  # head 0 | head 1
    tensor([[0, 1, 2, 3]])
    >>> deal(torch.tensor([[0, 1, 2, 3]]), replace(two, rope_dealing="turns"))
    tensor([[0, 2, 1, 3]])
    """
    if cfg.rope_dealing == "bands":
        return slots
    return slots.unflatten(1, (-1, cfg.num_heads)).transpose(1, 2).flatten(1)


def video_angles(frames, cfg) -> torch.Tensor:
    """(F * rows * columns, video_width/2) angles of video tokens by time, row and column."""
    rows, columns = cfg.grid
    pixels = [
        (torch.arange(n, dtype=torch.float64) + 0.5) * cfg.pixel_stride for n in (rows, columns)
    ]
    t, y, x = torch.meshgrid(video_times(frames, cfg), *pixels, indexing="ij")
    scaled = (t / cfg.rope_max_seconds, y / cfg.rope_max_pixels, x / cfg.rope_max_pixels)
    turns = torch.stack([2 * p.flatten() - 1 for p in scaled], dim=1)
    return slot_angles(turns, cfg.video_width, cfg)


def time_angles(times, cfg) -> torch.Tensor:
    """(T, audio_width/2) angles by time alone: audio, and both sides of cross-modal attention."""
    return slot_angles(2 * times[:, None] / cfg.rope_max_seconds - 1, cfg.audio_width, cfg)


def shift_angles(site, seconds, cfg) -> torch.Tensor:
    """(1, C/2) further angle that moves a rotated key of this attention `seconds` later in time.

    Rotations add up, so a cached key can be moved without knowing where it was.
    """
    turn = 2 * seconds / cfg.rope_max_seconds
    if site == "video_self":
        turns = turn * torch.eye(1, 3, dtype=torch.float64)  # in time; rows and columns stay
        return slot_angles(turns, cfg.video_width, cfg)
    return slot_angles(torch.full((1, 1), turn, dtype=torch.float64), cfg.audio_width, cfg)


def computed_on(device):
    """For a `with` statement: angles made inside it are made on `device`; None is the CPU.

    Otherwise a GPU would wait for the CPU to make a large block's. (Apple's GPUs have no float64,
    so theirs come from the CPU.)
    """
    device = torch.device(device or "cpu")
    return torch.device("cpu") if device.type == "mps" else device


@torch.inference_mode(False)  # tables are remembered, and a later training may reuse them
def tables(angles, cfg, device=None, dtype=torch.float32) -> Rope:
    """cos and sin of (T, C/2) angles in the model's dtype."""
    to = functools.partial(torch.Tensor.to, device=device, dtype=dtype)
    return Rope(to(angles.cos()), to(angles.sin()), cfg.rope_layout)


if __name__ == "__main__":
    x = torch.randn(1, 2, config.TOY.num_heads, config.TOY.audio_width // config.TOY.num_heads)
    for start in (0.0, 3600.0):  # the same two tokens, 0.2 s apart, now and in an hour
        where = torch.tensor([start, start + 0.2], dtype=torch.float64)
        q, k = rotate(x, tables(time_angles(where, config.TOY), config.TOY))[0]
        print(f"at {start:6.0f} s: q . k = {(q * k).sum():.5f}")
