"""Detectors for the evaluation: they find events and attributes in pixels and sound alone.

The detectors do not know how a clip was made, so the same detectors judge real and generated clips.
They work on batches, and their times are finer than a frame:

    impact   a line through four frames and a line through the next four frames cross near a wall
    onset    the level of a wall jumps; time: half of the rise is done, minus half the attack

    F1       fraction of impacts and onsets with a partner within 60 ms. An event has at most one
             partner; the closest events are paired first
    DeSync   mean time difference of pairs within 250 ms; `capped`: no partner counts as 300 ms
    wall     fraction of pairs in which impact and onset are on the same wall

    python -m toy.detectors    pairs found in sixteen real clips, and their time difference
"""

from typing import NamedTuple

import torch

import config
from toy import world

FIT = 4  # frames through which a line is fitted, before and after an impact
MIN_SLOPE = 0.12  # pixels per frame; reflections of slower balls are ignored
WALL_REACH = 4.0  # pixels; largest distance between ball and wall at a reflection
VISIBLE = 0.12  # a pixel this much brighter than the background belongs to the ball
MIN_FLUX = 0.25  # smallest rise of a wall's level within two mel frames
MIN_GAP = 6  # mel frames between two onsets on one wall
MATCH, NEAR, CAP = 0.060, 0.250, 0.300  # seconds: see F1 and DeSync above
CORNER = 0.020  # seconds added to the time difference of events on different walls
MARGIN = 0.25  # seconds at either end of a clip where reflections cannot be seen
FAST = 20.0  # pixels per second; slow: at most 15, fast: at least 25
METAL = 0.24  # level 130 ms after an onset, as a fraction of its peak; wood: .11, metal: .49
BAND_WALLS = (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3)  # wall of each band below the shimmer


class Ball(NamedTuple):
    """The ball in every frame of B clips."""

    place: torch.Tensor  # (B, P, 2) x, y of its centre in pixels
    mass: torch.Tensor  # (B, P) sum of its brightness; 1: a ball of normal size
    spread: torch.Tensor  # (B, P) root mean square radius; 1: exactly one ball of this mass
    hue: torch.Tensor  # (B, P) degrees


class Events(NamedTuple):
    """Impacts or onsets of one clip, in order of time."""

    times: torch.Tensor  # (E,) seconds
    walls: torch.Tensor  # (E,) index into world.WALLS


# ---- seeing ----


def see_ball(video) -> Ball:
    """Measure place, size and colour of the ball in videos (B, P, 3, H, W) in [0, 1]."""
    light = video.amax(2) - world.BACKGROUND  # (B, P, H, W)
    light = torch.where(light > VISIBLE, light, 0.0)
    total = light.sum((-1, -2)).clamp(min=1e-6)
    x = torch.arange(video.shape[-1]) + 0.5
    y = torch.arange(video.shape[-2]) + 0.5
    cx, cy = (light.sum(-2) @ x) / total, (light.sum(-1) @ y) / total
    d2 = (x - cx[..., None]).square()[..., None, :] + (y - cy[..., None]).square()[..., None]
    radius = ((light * d2).sum((-1, -2)) / total).sqrt()
    colour = (video * light[:, :, None]).sum((-1, -2)) / total[..., None]  # (B, P, 3)
    normal_mass, normal_radius = _normal_ball()
    mass = total / normal_mass
    spread = radius / (normal_radius * mass.sqrt().clamp(min=1e-3))
    return Ball(torch.stack([cx, cy], -1), mass, spread, _hue(colour))


def _normal_ball():
    """Return total brightness and root mean square radius of a ball of normal size."""
    r = torch.linspace(0, 10, 2001)  # distance from the centre
    light = (1 - world.BACKGROUND) * torch.exp(-((r / world.RADIUS) ** 4))
    light = torch.where(light > VISIBLE, light, 0.0)
    total = torch.trapezoid(light * r, r)
    return 2 * torch.pi * total, (torch.trapezoid(light * r**3, r) / total).sqrt()


def _hue(rgb):
    """Convert RGB (..., 3) to degrees (...) in [0, 360)."""
    angles = torch.tensor([0.0, 120.0, 240.0]) * torch.pi / 180
    s, c = rgb @ angles.sin(), rgb @ angles.cos()
    return torch.rad2deg(torch.atan2(s, c)) % 360


def fit_lines(track):
    """Fit a line to every FIT consecutive frames of (..., P); return slopes and last values."""
    # Index i of both results is the line through frames i to i + FIT - 1.
    windows = track.unfold(-1, FIT, 1)
    t = torch.arange(FIT, dtype=track.dtype) - (FIT - 1) / 2
    slope = windows @ t / t.square().sum()
    return slope, windows.mean(-1) + slope * (FIT - 1) / 2


def find_impacts(ball: Ball, cfg=config.TOY) -> list[Events]:
    """Find the reflections in each clip."""
    if ball.place.shape[1] < 2 * FIT:  # too short for a line on either side
        return [Events(torch.zeros(0), torch.zeros(0, dtype=torch.long)) for _ in ball.place]
    radius = (world.RADIUS * ball.mass.median(1).values.sqrt()).clamp(2, 7)  # (B,)
    found = [_reflections(ball.place[..., axis], axis, radius, cfg) for axis in range(2)]
    events = []
    for (times_x, walls_x), (times_y, walls_y) in zip(*found):
        times, order = torch.cat([times_x, times_y]).sort()
        events.append(Events(times, torch.cat([walls_x, walls_y])[order]))
    return events


def _reflections(track, axis, radius, cfg):
    """Find reflections along one axis: for each clip, times in seconds and walls."""
    slope, last = fit_lines(track)
    before, after = slope[:, :-FIT], slope[:, FIT:]  # lines that end at i and begin at i + 1
    end, begin = last[:, :-FIT], last[:, FIT:] - (FIT - 1) * after
    change = before - after
    # Where the lines cross, t frames after frame i:  end + before t  =  begin + after (t - 1)
    t = (begin - after - end) / change
    where = end + before * t
    size = (cfg.width, cfg.height)[axis]
    wall = (change > 0).long()  # 1, the right or bottom wall, if the ball flew towards it before
    gap = torch.where(wall == 1, size - radius[:, None] - where, where - radius[:, None]).abs()
    is_reflected = (before * after < 0) & (before.abs() > MIN_SLOPE) & (after.abs() > MIN_SLOPE)
    is_hit = is_reflected & (t > -0.75) & (t < 1.75) & (gap < WALL_REACH)
    best = _local_maximum(torch.where(is_hit, change.abs(), 0.0), FIT - 1)
    frame = torch.arange(t.shape[1]) + FIT - 1
    return [((frame + t[b])[best[b]] / cfg.fps, wall[b][best[b]] + 2 * axis) for b in range(len(t))]


def _local_maximum(x, reach):
    """Tell whether each value of (B, T) is positive and the largest within +-reach."""
    peak = torch.nn.functional.max_pool1d(x[:, None], 2 * reach + 1, 1, reach)[:, 0]
    return (x > 0) & (x == peak)


# ---- hearing ----


def wall_levels(sound):
    """Sum the energy of the bands of each wall: levels (B, M, 16) -> levels (B, M, 4)."""
    energy = sound[..., : len(BAND_WALLS)].square()
    walls = torch.nn.functional.one_hot(torch.tensor(BAND_WALLS), len(world.WALLS)).float()
    return (energy @ walls).sqrt()


def find_onsets(sound, cfg=config.TOY) -> list[Events]:
    """Find the impacts that are heard in each clip, from band levels (B, M, 16)."""
    level = wall_levels(sound).mT  # (B, 4, M)
    flux = torch.nn.functional.pad(level[..., 2:] - level[..., :-2], (2, 0))
    is_onset = _local_maximum(flux.flatten(0, 1), MIN_GAP).view_as(flux) & (flux > MIN_FLUX)
    events = []
    for b in range(len(sound)):
        walls, frames = is_onset[b].nonzero(as_tuple=True)
        times = torch.tensor([_half_rise(level[b, w], m) for w, m in zip(walls, frames)])
        times, order = (times / cfg.mel_rate - world.ATTACK / 2).sort()
        events.append(Events(times, walls[order]))
    return events


def _half_rise(level, frame):
    """Return the time, in mel frames, at which half of the rise to the peak is done."""
    low, high = max(0, int(frame) - 3), min(len(level), int(frame) + 3)
    rise = level[low:high]
    top = int(rise.argmax())
    base = rise[: top + 1].min()
    half = (base + rise[top]) / 2
    below = top
    while below > 0 and rise[below] > half:
        below -= 1
    step = rise[min(below + 1, top)] - rise[below]
    return low + below + float((half - rise[below]) / step if step > 0 else 0.0)


# ---- judging ----


class Match(NamedTuple):
    """Agreement of picture and sound in one clip: counts and sums, so that clips can be added."""

    pairs: int  # within MATCH
    # Trap: F1 does not punish silence, because a model with fewer events makes fewer errors. Always
    # report the number of events per second as well.
    impacts: int  # in the interval
    onsets: int  # in the interval
    hits: float  # impacts with a partner, plus onsets with a partner, within MATCH
    right_wall: int  # pairs on the same wall
    near: int  # pairs within NEAR
    offsets: float  # seconds, sum of the time differences of near pairs
    missed: int  # events without a partner within NEAR


def match(seen: Events, heard: Events, start, stop) -> Match:
    """Pair impacts and onsets, and count those in [start, stop) seconds."""
    # A partner may lie outside the interval, or an event near its ends would count as a miss.
    distance = (seen.times[:, None] - heard.times[None]).abs()
    # In a corner, two impacts are a few ms apart. There the wall decides which events are a pair.
    other_wall = seen.walls[:, None] != heard.walls[None]
    near = _greedy(distance, distance + CORNER * other_wall)
    pairs = [(i, j) for i, j in near if distance[i, j] <= MATCH]
    seen_in, heard_in = ((e.times >= start) & (e.times < stop) for e in (seen, heard))
    impacts, onsets = int(seen_in.sum()), int(heard_in.sum())
    pairs_in = [(i, j) for i, j in pairs if seen_in[i]]
    near_in = [(i, j) for i, j in near if seen_in[i] or heard_in[j]]

    def events_in(some_pairs):
        return sum(bool(seen_in[i]) + bool(heard_in[j]) for i, j in some_pairs)

    return Match(
        pairs=len(pairs_in),
        impacts=impacts,
        onsets=onsets,
        hits=events_in(pairs),
        right_wall=sum(int(seen.walls[i] == heard.walls[j]) for i, j in pairs_in),
        near=len(near_in),
        offsets=float(sum(distance[i, j] for i, j in near_in)),
        missed=impacts + onsets - events_in(near),
    )


def _greedy(distance, cost):
    """Choose pairs (row, column) at most NEAR apart, the cheapest first, each event once."""
    pairs, rows, columns = [], set(), set()
    candidates = (distance <= NEAR).nonzero().tolist()
    for i, j in sorted(candidates, key=lambda ij: float(cost[ij[0], ij[1]])):
        if i not in rows and j not in columns:
            pairs.append((i, j))
            rows.add(i)
            columns.add(j)
    return pairs


def read_words(ball: Ball, sound, onsets) -> torch.Tensor:
    """Recognise colour, speed and material of each clip: (B, 3) indices into world.SLOTS."""
    colour = _colour_distances(ball).abs().argmin(1)
    is_fast = speeds(ball) > FAST
    is_metal = torch.tensor([_rings_long(s, e) for s, e in zip(wall_levels(sound), onsets)])
    return torch.stack([colour, is_fast.long(), is_metal.long()], 1)


def _colour_distances(ball: Ball):
    """Return the angles from the four COLOURS to the hue of each clip: (B, 4) signed degrees."""
    hues = torch.tensor(list(world.COLOURS.values()))
    return (circular_median(ball.hue)[:, None] - hues + 180) % 360 - 180


def circular_median(degrees):
    """Return the medians (B,) of angles (B, P)."""
    # Measure from the mean direction, so that 359 and 1 degrees are neighbours.
    angle = torch.deg2rad(degrees)
    mean = torch.rad2deg(torch.atan2(angle.sin().mean(1), angle.cos().mean(1)))[:, None]
    return (mean[:, 0] + ((degrees - mean + 180) % 360 - 180).median(1).values) % 360


def speeds(ball: Ball):
    """Return the median speed of each ball, (B,) in pixels per second."""
    slope, _ = fit_lines(ball.place.mT)
    return slope.norm(dim=1).median(1).values * config.TOY.fps


def _rings_long(levels, onsets):
    """Tell whether the median onset rings as long as metal; False without onsets."""
    kept = []  # level 130 ms after each onset, as a fraction of its peak
    for time, wall in zip(*onsets):
        m = round(float(time + world.ATTACK) * config.TOY.mel_rate)
        later = m + round(0.13 * config.TOY.mel_rate)
        if later < len(levels):
            peak = levels[max(0, m - 1) : m + 3, wall].max()
            kept.append(float(levels[later, wall] / peak.clamp(min=1e-3)))
    return bool(kept) and sorted(kept)[len(kept) // 2] > METAL


def persistence(ball: Ball):
    """Tell whether each frame shows exactly one ball of about the normal size: (B, P)."""
    return (ball.mass > 0.6) & (ball.mass < 1.5) & (ball.spread > 0.7) & (ball.spread < 1.35)


def identity(ball: Ball, sound, onsets) -> torch.Tensor:
    """Measure hue (degrees from the nearest colour), radius, pitch shift (bands): (B, 3)."""
    away = _colour_distances(ball)
    hue = away.gather(1, away.abs().argmin(1, keepdim=True))[:, 0]
    radius = world.RADIUS * ball.mass.median(1).values.clamp(min=0).sqrt()
    pitch = torch.tensor([_pitch_shift(s, e) for s, e in zip(sound, onsets)])
    return torch.stack([hue, radius, pitch], 1)


def _pitch_shift(levels, onsets):
    """Return the median shift of onsets from the pitches of their walls, in bands, or NaN."""
    bands = torch.arange(len(BAND_WALLS))
    shifts = []
    for time, wall in zip(*onsets):
        m = min(len(levels) - 1, round(float(time + 0.02) * config.TOY.mel_rate))
        energy = levels[m, : len(BAND_WALLS)].square() * (torch.tensor(BAND_WALLS) == wall)
        shifts.append(float((energy * bands).sum() / energy.sum().clamp(min=1e-6)))
        shifts[-1] -= world.WALL_BANDS[int(wall)]
    return sorted(shifts)[len(shifts) // 2] if shifts else float("nan")


if __name__ == "__main__":
    clips = world.draw_clips(range(world.HELD_OUT, world.HELD_OUT + 16))
    ball, sound = see_ball(world.render_video(clips, 5)), world.render_sound(clips, 5)
    seen, heard = find_impacts(ball), find_onsets(sound)
    agreed = [match(s, h, MARGIN, 5 - MARGIN) for s, h in zip(seen, heard)]
    m = Match(*map(sum, zip(*agreed)))
    print(f"{m.pairs} pairs of {m.impacts} impacts seen")
    print(f"{1000 * m.offsets / m.near:.1f} ms apart on average")
    assert torch.equal(read_words(ball, sound, heard), clips.words)
