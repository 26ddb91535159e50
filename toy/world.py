"""Bouncing balls with impact sounds: a small world to train on, in which sync can be measured.

One soft ball flies straight through a square room, and the walls reflect it. Each impact makes a
sound. The wall determines the pitch, and the speed towards the wall determines the loudness. So the
sound follows from the picture, and tells something about it. A joint model has to learn both.

    video   32 x 32 RGB in [0, 1], 24 frames per second, frame p at time p / 24
    sound   levels of 16 pitch bands, 100 times per second. These 16 levels are called a mel frame
            (LTX-2: 64 levels). Mel frame m is at time m / 100
    N seconds are 24 N + 1 frames and 100 N + 1 mel frames: both begin with one frame at time 0

    caption    colour, speed, material (how long an impact rings)
    identity   small shifts of hue, radius and pitch, constant over the clip and **not** in the
               caption: a model can only keep them by attending to its past

This world replaces the training data of the paper and its benchmark, JavisBench. A formula gives
the positions, so impact times are exact. The seed of a clip determines everything in it. Seeds from
`HELD_OUT` on are never used in training. All constants are our choice.

    python -m toy.world    four captions, and the times at which their balls hit a wall
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import config

COLOURS = {"red": 0.0, "green": 120.0, "blue": 230.0, "yellow": 54.0}  # hue in degrees
SPEEDS = {"slow": (12.0, 15.0), "fast": (25.0, 30.0)}  # pixels per second
MATERIALS = {"wood": 0.06, "metal": 0.18}  # seconds in which the level of an impact falls to 1/e
SLOTS = (tuple(COLOURS), tuple(SPEEDS), tuple(MATERIALS))
VOCABULARY = ("", *SLOTS[0], *SLOTS[1], *SLOTS[2])  # token 0: no word

HELD_OUT = 10**9  # seeds from here on are for evaluation

RADIUS = 4.2  # pixels; at this distance from the centre, opacity is 1/e
BACKGROUND = 0.05  # brightness of the empty room, in [0, 1]
SATURATION = 0.8  # of the ball's colour, in [0, 1]
HUE_RANGE, RADIUS_RANGE, PITCH_RANGE = 12.0, 0.12, 0.6  # of the identity: degrees, fraction, bands

BANDS = 16
WALLS = ("left", "right", "top", "bottom")
WALL_BANDS = (1.0, 4.5, 8.0, 11.5)  # pitch of each wall
BAND_WIDTH = 0.45  # standard deviation of a pitch, in bands
SHIMMER_BAND, SHIMMER = 14.5, 0.4  # metal also sounds in this band, at this fraction of its level
ATTACK = 0.010  # seconds from silence to the full level
LOUDEST_SPEED = 28.0  # pixels per second towards the wall; such an impact has level 1


class Clips(NamedTuple):
    """Everything that determines B clips."""

    words: torch.Tensor  # (B, 3) index into each of SLOTS
    identity: torch.Tensor  # (B, 3) hue, radius, pitch, each in [-1, 1]
    start: torch.Tensor  # (B, 2) centre of the ball at time 0, as a fraction of its room
    velocity: torch.Tensor  # (B, 2) pixels per second along x (to the right) and y (down)


def draw_clips(seeds) -> Clips:
    """Draw the clips of these seeds; they are the same on every machine.

    >>> draw_clips([7]).words.tolist() == draw_clips([3, 7]).words[1:].tolist()
    True
    """
    words, identity, start, velocity = (np.array(x) for x in zip(*map(_draw_clip, seeds)))
    return Clips(*(torch.from_numpy(x) for x in (words, identity, start, velocity)))


def _draw_clip(seed):
    rng = np.random.default_rng(seed)
    words = [rng.integers(len(slot)) for slot in SLOTS]
    identity, start = rng.uniform(-1, 1, 3), rng.uniform(0, 1, 2)
    # 22 to 68 degrees in any quadrant: at a flatter angle, the ball would rarely reach two walls
    angle = np.deg2rad(rng.uniform(22, 68) + 90 * rng.integers(4))
    speed = rng.uniform(*SPEEDS[SLOTS[1][words[1]]])
    return words, identity, start, [speed * np.cos(angle), speed * np.sin(angle)]


# ---- captions ----


def caption_tokens(clips) -> torch.Tensor:
    """Return the tokens (B, 3) of the clips: colour, speed, material."""
    first = torch.tensor([VOCABULARY.index(slot[0]) for slot in SLOTS])
    return clips.words + first


def words_of(clips) -> list[str]:
    """Return the captions of the clips in words.

    >>> words_of(draw_clips([0]))
    ['yellow fast metal']
    """
    return [" ".join(VOCABULARY[t] for t in tokens) for tokens in caption_tokens(clips)]


def parse_prompt(text) -> torch.Tensor:
    """Return the tokens (1, 3) of a prompt.  Words may come in any order or be left out.

    >>> parse_prompt("fast red metal").tolist()
    [[1, 6, 8]]
    >>> parse_prompt("a purple ball")
    Traceback (most recent call last):
    ValueError: prompt: unknown word 'purple'; known: red green blue yellow, slow fast, wood metal
    """
    known = ", ".join(" ".join(slot) for slot in SLOTS)
    tokens = [0, 0, 0]
    for word in text.lower().replace(",", " ").split():
        if word in ("a", "ball"):
            continue
        slot = next((i for i, words in enumerate(SLOTS) if word in words), None)
        if slot is None:
            raise ValueError(f"prompt: unknown word {word!r}; known: {known}")
        if other := VOCABULARY[tokens[slot]]:
            raise ValueError(f"prompt: {other!r} and {word!r} exclude each other")
        tokens[slot] = VOCABULARY.index(word)
    if not any(tokens):
        raise ValueError(f"prompt {text!r} says nothing; use some of: {known}")
    return torch.tensor([tokens])


def caption_features(tokens) -> torch.Tensor:
    """Encode tokens (B, 3) as one-hot vectors (B, 3, 9), in place of a text encoder."""
    return F.one_hot(tokens, len(VOCABULARY)).float()


# ---- motion ----


def radii(clips) -> torch.Tensor:
    """Return the radius (B,) of each ball in pixels."""
    return RADIUS * (1 + RADIUS_RANGE * clips.identity[:, 1])


def _room(clips, cfg):
    """Return width and height (B, 2) of the area where the centre of the ball can be."""
    size = torch.tensor([cfg.width, cfg.height], dtype=torch.float64)
    return size - 2 * radii(clips)[:, None]


def ball_positions(clips, times, cfg=config.TOY) -> torch.Tensor:
    """Return x and y of the ball's centre in pixels (B, P, 2) at times (P,) in seconds."""
    # Let the ball fly straight on through mirrored rooms; then fold its path into the real room.
    room = _room(clips, cfg)[:, None]
    straight = clips.start[:, None] * room + clips.velocity[:, None] * times[:, None]
    folded = torch.remainder(straight, 2 * room)
    return radii(clips)[:, None, None] + torch.minimum(folded, 2 * room - folded)


class Impacts(NamedTuple):
    """Impacts of B clips in order of time; E is the largest number in one clip."""

    times: torch.Tensor  # (B, E) seconds; inf: the clip has no further impact
    walls: torch.Tensor  # (B, E) index into WALLS
    speeds: torch.Tensor  # (B, E) pixels per second towards the wall


def impacts(clips, start, stop, cfg=config.TOY) -> Impacts:
    """Return all impacts in [start, stop) seconds."""
    # At an impact, the straight path of `ball_positions` enters the next mirrored room.
    room = _room(clips, cfg)
    furthest = float(clips.velocity.abs().max()) * max(abs(start), abs(stop)) / float(room.min())
    border = torch.arange(-int(furthest) - 1, int(furthest) + 3)  # (K,) even: left or top wall
    t = (border * room[..., None] - (clips.start * room)[..., None]) / clips.velocity[..., None]
    t = torch.where((t >= start) & (t < stop), t, torch.inf)  # (B, 2, K)
    wall = (2 * torch.arange(2)[:, None] + border % 2).expand_as(t)
    speed = clips.velocity.abs()[..., None].expand_as(t)
    t, order = t.flatten(1).sort(1)
    most = int(t.isfinite().sum(1).max())
    wall, speed = (x.flatten(1).gather(1, order) for x in (wall, speed))
    return Impacts(t[:, :most], wall[:, :most], speed[:, :most])


# ---- picture and sound ----


def hue_to_rgb(hue) -> torch.Tensor:
    """Convert hues (...) in degrees to RGB (..., 3) in [0, 1]: HSV, with value 1 and SATURATION."""
    k = (torch.tensor([5.0, 3.0, 1.0], dtype=hue.dtype) + hue[..., None] / 60) % 6
    return 1 - SATURATION * torch.minimum(k, 4 - k).clamp(0, 1)


def render_video(clips, seconds, cfg=config.TOY) -> torch.Tensor:
    """Render the frames (B, 24 * seconds + 1, 3, H, W) in [0, 1]; seconds is an integer.

    >>> render_video(draw_clips([0, 1]), 5).shape
    torch.Size([2, 121, 3, 32, 32])
    """
    times = torch.arange(seconds * cfg.fps + 1, dtype=torch.float64) / cfg.fps
    x, y = ball_positions(clips, times, cfg).float().unbind(-1)  # (B, P)
    radius = radii(clips).float()[:, None, None]
    dx2 = ((x[..., None] - torch.arange(cfg.width) - 0.5) / radius) ** 2  # (B, P, W)
    dy2 = ((y[..., None] - torch.arange(cfg.height) - 0.5) / radius) ** 2  # (B, P, H)
    distance2 = dy2[..., :, None] + dx2[..., None, :]
    opacity = torch.exp(-(distance2**2))[:, :, None]  # a disc with a soft edge
    hues = torch.tensor(list(COLOURS.values()))[clips.words[:, 0]]
    rgb = hue_to_rgb(hues + HUE_RANGE * clips.identity[:, 0].float())
    return BACKGROUND + opacity * (rgb - BACKGROUND)[:, None, :, None, None]


def wall_profiles(clips) -> torch.Tensor:
    """Return the energy per band (B, 4, 16) of an impact of level 1 on each wall."""
    shift = PITCH_RANGE * clips.identity[:, 2].float()[:, None, None]
    is_metal = clips.words[:, 2].float()[:, None, None]
    pitch = _bump(torch.tensor(WALL_BANDS)[:, None] + shift)
    return pitch + SHIMMER**2 * is_metal * _bump(SHIMMER_BAND + shift)


def _bump(centre):
    return torch.exp(-((torch.arange(BANDS) - centre) ** 2) / (2 * BAND_WIDTH**2))


def render_sound(clips, seconds, cfg=config.TOY) -> torch.Tensor:
    """Render the sound: levels (B, 100 * seconds + 1, 16), square roots of the energies of bands.

    >>> render_sound(draw_clips([0, 1]), 5).shape
    torch.Size([2, 501, 16])
    """
    frames = torch.arange(seconds * cfg.mel_rate + 1) / cfg.mel_rate  # (M,)
    hits = impacts(clips, -1.0, seconds, cfg)  # impacts before the clip may still ring
    since = frames - hits.times.float()[..., None]  # (B, E, M)
    decay = torch.tensor(list(MATERIALS.values()))[clips.words[:, 2], None, None]
    # Even the softest impact has level .35, so that impacts at a flat angle are audible, too.
    loudness = (0.35 + 0.65 * hits.speeds.float() / LOUDEST_SPEED)[..., None]
    level = loudness * (since / ATTACK).clamp(0, 1) * torch.exp(-since.clamp(min=0) / decay)
    energy = torch.zeros(len(since), len(WALLS), len(frames))
    energy.scatter_add_(1, hits.walls[..., None].expand_as(level), level**2)
    return (energy.mT @ wall_profiles(clips)).sqrt()


if __name__ == "__main__":
    clips = draw_clips(range(HELD_OUT, HELD_OUT + 4))
    for caption, times in zip(words_of(clips), impacts(clips, 0, 5).times):
        print(f"{caption:18} impacts at", " ".join(f"{t:.2f}" for t in times if t < 5))
