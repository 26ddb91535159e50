"""Eyes and ears of the evaluator: from pixels and sound alone, what happened, and when?

Nothing here knows how a clip was made, so the same detectors judge true clips and a model's. All
work on whole batches, and times are finer than a frame:

    impact   two straight lines through four frames on either side, crossing near a wall
    onset    a jump of a wall's level; the attack is 10 ms long, so half its height is 5 ms late

    F1       share of impacts and onsets that have a partner within 60 ms, when they are matched
             one to one, the closest first
    DeSync   mean distance in time of the pairs within 250 ms; `capped` counts a miss as 300 ms
    wall     share of the pairs in which the sound's wall is the picture's wall

# Trap: F1 does not punish silence. A model that does less errs less, so the number of events per
second is always shown beside it.

    python -m toy.detectors    on sixteen true clips: pairs found, and how far apart
"""

from typing import NamedTuple

import torch

import config
from toy import world

FIT = 4  # frames on either side of an impact
MIN_SLOPE = 0.12  # pixels per frame, the slowest approach that counts
WALL_REACH = 4.0  # pixels between the ball's centre and where a reflection belongs
VISIBLE = 0.12  # brightness above the background that belongs to the ball
MIN_FLUX = 0.25  # rise of a wall's level over two mel frames
MIN_GAP = 6  # mel frames between two onsets on one wall
MATCH, NEAR, CAP = 0.060, 0.250, 0.300  # seconds
CORNER = 0.020  # seconds that a partner on another wall counts as further away
MARGIN = 0.25  # seconds at either end of a clip in which reflections are not seen
FAST = 20.0  # pixels per second; slow balls end at 15, fast ones begin at 25
METAL = 0.24  # level 130 ms after an onset, as a share of its peak: wood .11, metal .49
BAND_WALLS = (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3)  # wall of each band below the shimmer


class Ball(NamedTuple):
    """The ball in every frame of B clips."""

    place: torch.Tensor  # (B, P, 2) x, y of its centre in pixels
    mass: torch.Tensor  # (B, P) its brightness summed up; 1 is a ball of normal size
    spread: torch.Tensor  # (B, P) root mean square radius; 1 is a whole ball of that mass
    hue: torch.Tensor  # (B, P) degrees


class Events(NamedTuple):
    """Impacts or onsets of one clip, in order of time."""

    times: torch.Tensor  # (E,) seconds
    walls: torch.Tensor  # (E,) index into toy_world.WALLS


# ---- seeing ----


def see_ball(video) -> Ball:
    """(B, P, 3, H, W) in [0, 1] -> where the ball is and what it looks like."""
    light = video.amax(2) - world.BACKGROUND  # (B, P, H, W)
    light = torch.where(light > VISIBLE, light, 0.0)
    total = light.sum((-1, -2)).clamp(min=1e-6)
    x = torch.arange(video.shape[-1]) + 0.5
    y = torch.arange(video.shape[-2]) + 0.5
    cx, cy = (light.sum(-2) @ x) / total, (light.sum(-1) @ y) / total
    d2 = (x - cx[..., None]).square()[..., None, :] + (y - cy[..., None]).square()[..., None]
    radius = ((light * d2).sum((-1, -2)) / total).sqrt()
    mass = total / _normal_mass()
    colour = (video * light[:, :, None]).sum((-1, -2)) / total[..., None]  # (B, P, 3)
    spread = radius / (_normal_radius() * mass.sqrt().clamp(min=1e-3))
    return Ball(torch.stack([cx, cy], -1), mass, spread, _hue(colour))


def _profile():
    """Distance from the centre and brightness of a normal ball, on a fine grid."""
    r = torch.linspace(0, 10, 2001)
    light = (1 - world.BACKGROUND) * torch.exp(-((r / world.RADIUS) ** 4))
    return r, torch.where(light > VISIBLE, light, 0.0)


def _normal_mass():
    r, light = _profile()
    return 2 * torch.pi * torch.trapezoid(light * r, r)


def _normal_radius():
    r, light = _profile()
    return (torch.trapezoid(light * r**3, r) / torch.trapezoid(light * r, r)).sqrt()


def _hue(rgb):
    """(..., 3) -> (...) degrees in [0, 360)."""
    angles = torch.tensor([0.0, 120.0, 240.0]) * torch.pi / 180
    s, c = rgb @ angles.sin(), rgb @ angles.cos()
    return torch.rad2deg(torch.atan2(s, c)) % 360


def lines(track):
    """Least-squares lines through every FIT frames in a row: (..., P) -> slope, value at the last.

    Index i of the answers (..., P - FIT + 1) is the line through frames i .. i + FIT - 1.
    """
    windows = track.unfold(-1, FIT, 1)
    t = torch.arange(FIT, dtype=track.dtype) - (FIT - 1) / 2
    slope = windows @ t / t.square().sum()
    return slope, windows.mean(-1) + slope * (FIT - 1) / 2


def find_impacts(ball: Ball, cfg=config.TOY) -> list[Events]:
    """Reflections seen in each clip: none in a clip too short for a line on either side."""
    if ball.place.shape[1] < 2 * FIT:
        return [Events(torch.zeros(0), torch.zeros(0, dtype=torch.long)) for _ in ball.place]
    radius = (world.RADIUS * ball.mass.median(1).values.sqrt()).clamp(2, 7)  # (B,)
    found = [_reflections(ball.place[..., axis], axis, radius, cfg) for axis in range(2)]
    events = []
    for (times_x, walls_x), (times_y, walls_y) in zip(*found):
        times, order = torch.cat([times_x, times_y]).sort()
        events.append(Events(times, torch.cat([walls_x, walls_y])[order]))
    return events


def _reflections(track, axis, radius, cfg):
    """Reflections along one axis: per clip, times in seconds and walls."""
    slope, last = lines(track)
    before, after = slope[:, :-FIT], slope[:, FIT:]  # lines that end at i and begin at i + 1
    end, begin = last[:, :-FIT], last[:, FIT:] - (FIT - 1) * after
    turn = before - after
    # both lines in frames after i:  end + before t  =  begin + after (t - 1)
    t = (begin - after - end) / turn
    where = end + before * t
    size = (cfg.width, cfg.height)[axis]
    wall = (turn > 0).long()  # flying right or down before: the far wall
    gap = torch.where(wall == 1, size - radius[:, None] - where, where - radius[:, None]).abs()
    is_turn = (before * after < 0) & (before.abs() > MIN_SLOPE) & (after.abs() > MIN_SLOPE)
    is_hit = is_turn & (t > -0.75) & (t < 1.75) & (gap < WALL_REACH)
    best = _local_maximum(torch.where(is_hit, turn.abs(), 0.0), FIT - 1)
    frame = torch.arange(t.shape[1]) + FIT - 1
    return [((frame + t[b])[best[b]] / cfg.fps, wall[b][best[b]] + 2 * axis) for b in range(len(t))]


def _local_maximum(x, reach):
    """(B, T) -> booleans: positive, and the first largest within +-reach."""
    peak = torch.nn.functional.max_pool1d(x[:, None], 2 * reach + 1, 1, reach)[:, 0]
    return (x > 0) & (x == peak)


# ---- hearing ----


def wall_levels(sound):
    """(B, M, 16) band levels -> (B, M, 4) level of each wall's pitches together."""
    energy = sound[..., : len(BAND_WALLS)].square()
    walls = torch.nn.functional.one_hot(torch.tensor(BAND_WALLS), len(world.WALLS)).float()
    return (energy @ walls).sqrt()


def find_onsets(sound, cfg=config.TOY) -> list[Events]:
    """Impacts heard in each clip of (B, M, 16) band levels."""
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
    """When (in mel frames) the level passes half way between before the onset and its peak."""
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
    """How picture and sound of one clip agree, as counts and sums that may be added up."""

    pairs: int  # within MATCH
    impacts: int  # that were asked for a partner
    onsets: int  # the same
    hits: float  # impacts with a partner, plus onsets with a partner
    right_wall: int  # pairs in which both name the same wall
    near: int  # pairs within NEAR
    offsets: float  # seconds, sum over near pairs
    missed: int  # events without a partner within NEAR


def match(seen: Events, heard: Events, start, stop) -> Match:
    """Pair impacts and onsets; only events in [start, stop) seconds are asked for a partner.

    At either end of a clip leave MARGIN out: there a reflection cannot be seen on both sides.
    """
    distance = (seen.times[:, None] - heard.times[None]).abs()
    # In a corner two impacts are a few ms apart: there the wall decides who belongs to whom.
    other_wall = seen.walls[:, None] != heard.walls[None]
    near = _greedy(distance, distance + CORNER * other_wall)
    pairs = [(i, j) for i, j in near if distance[i, j] <= MATCH]
    asked_seen, asked_heard = ((e.times >= start) & (e.times < stop) for e in (seen, heard))
    inside = [(i, j) for i, j in pairs if asked_seen[i]]
    near_inside = [(i, j) for i, j in near if asked_seen[i] or asked_heard[j]]
    near_seen, near_heard = {i for i, _ in near}, {j for _, j in near}
    missed = sum(i not in near_seen for i in asked_seen.nonzero()[:, 0].tolist())
    missed += sum(j not in near_heard for j in asked_heard.nonzero()[:, 0].tolist())
    return Match(
        pairs=len(inside),
        impacts=int(asked_seen.sum()),
        onsets=int(asked_heard.sum()),
        hits=sum(bool(asked_seen[i]) + bool(asked_heard[j]) for i, j in pairs),
        right_wall=sum(int(seen.walls[i] == heard.walls[j]) for i, j in inside),
        near=len(near_inside),
        offsets=float(sum(distance[i, j] for i, j in near_inside)),
        missed=missed,
    )


def _greedy(distance, cost):
    """Cheapest pairs first, each event once: list of (row, column) less than NEAR apart."""
    pairs, rows, columns = [], set(), set()
    candidates = (distance <= NEAR).nonzero().tolist()
    for i, j in sorted(candidates, key=lambda ij: float(cost[ij[0], ij[1]])):
        if i not in rows and j not in columns:
            pairs.append((i, j))
            rows.add(i)
            columns.add(j)
    return pairs


def read_words(ball: Ball, sound, onsets) -> torch.Tensor:
    """(B, 3) what the clip shows of colour, speed and material, as indices into toy_world.SLOTS."""
    colour = _away_from_colours(ball).abs().argmin(1)
    is_fast = speeds(ball) > FAST
    is_metal = torch.tensor([_rings_long(s, e) for s, e in zip(wall_levels(sound), onsets)])
    return torch.stack([colour, is_fast.long(), is_metal.long()], 1)


def _away_from_colours(ball: Ball):
    """(B, 4) degrees from the hue of each of toy_world.COLOURS to the clip's, in [-180, 180)."""
    hues = torch.tensor(list(world.COLOURS.values()))
    return (circular_median(ball.hue)[:, None] - hues + 180) % 360 - 180


def circular_median(degrees):
    """(B, P) -> (B,) median of angles, measured from their mean direction."""
    angle = torch.deg2rad(degrees)
    mean = torch.rad2deg(torch.atan2(angle.sin().mean(1), angle.cos().mean(1)))[:, None]
    return (mean[:, 0] + ((degrees - mean + 180) % 360 - 180).median(1).values) % 360


def speeds(ball: Ball, cfg=config.TOY):
    """(B,) median speed in pixels per second."""
    slope, _ = lines(ball.place.mT)
    return slope.norm(dim=1).median(1).values * cfg.fps


def _rings_long(levels, onsets, cfg=config.TOY):
    """Does the median onset keep its level as metal does?  False if nothing was heard."""
    kept = []
    for time, wall in zip(*onsets):
        m = round(float(time + world.ATTACK) * cfg.mel_rate)
        later = m + round(0.13 * cfg.mel_rate)
        if later < len(levels):
            peak = levels[max(0, m - 1) : m + 3, wall].max()
            kept.append(float(levels[later, wall] / peak.clamp(min=1e-3)))
    return bool(kept) and sorted(kept)[len(kept) // 2] > METAL


def persistence(ball: Ball):
    """(B, P) is there exactly one whole ball in the frame?"""
    return (ball.mass > 0.6) & (ball.mass < 1.5) & (ball.spread > 0.7) & (ball.spread < 1.35)


def identity(ball: Ball, sound, onsets) -> torch.Tensor:
    """(B, 3) hue (degrees from its colour), radius (pixels) and pitch shift (bands) of each clip.

    The pitch is that of its onsets; NaN if nothing was heard.
    """
    away = _away_from_colours(ball)
    hue = away.gather(1, away.abs().argmin(1, keepdim=True))[:, 0]
    radius = world.RADIUS * ball.mass.median(1).values.clamp(min=0).sqrt()
    pitch = torch.tensor([_pitch_shift(s, e) for s, e in zip(sound, onsets)])
    return torch.stack([hue, radius, pitch], 1)


def _pitch_shift(levels, onsets, cfg=config.TOY):
    """Median of an onset's pitch less its wall's, in bands; NaN if nothing was heard."""
    bands = torch.arange(len(BAND_WALLS))
    shifts = []
    for time, wall in zip(*onsets):
        m = min(len(levels) - 1, round(float(time + 0.02) * cfg.mel_rate))
        energy = levels[m, : len(BAND_WALLS)].square() * (torch.tensor(BAND_WALLS) == wall)
        shifts.append(float((energy * bands).sum() / energy.sum().clamp(min=1e-6)))
        shifts[-1] -= world.WALL_BANDS[int(wall)]
    return sorted(shifts)[len(shifts) // 2] if shifts else float("nan")


if __name__ == "__main__":
    clips = world.draw_clips(range(world.HELD_OUT, world.HELD_OUT + 16))
    ball, sound = see_ball(world.render_video(clips, 5)), world.render_sound(clips, 5)
    seen, heard = find_impacts(ball), find_onsets(sound)
    agreed = [match(s, h, MARGIN, 5 - MARGIN) for s, h in zip(seen, heard)]
    pairs = sum(m.pairs for m in agreed)
    print(f"{pairs} pairs of {sum(m.impacts for m in agreed)} impacts seen")
    offset = sum(m.offsets for m in agreed) / sum(m.near for m in agreed)
    print(f"{1000 * offset:.1f} ms apart on average")
    assert torch.equal(read_words(ball, sound, heard), clips.words)
