"""Evaluate the toy (its JavisBench): quality, sync and identity of clips, and drift along streams.

This file measures the released models of all stages in one table. compare.py and ablations.py use
its metrics. Every row has the same held-out captions and the same detectors. toy/detectors.py
defines the detectors, F1, DeSync and wall; this file defines the other metrics:

    F1        share of impacts and onsets with a partner within 60 ms      (truth 1.0)
    DeSync    mean ms between partners within 250 ms; `capped`: no partner counts as 300 ms
    wall      share of pairs in which the sound has the pitch of the wall that was hit
    impacts, onsets   event rates, divided by the rates of the ground-truth clips (first 5 s, same
              captions and seeds). F1 alone does not penalise missing events
    caption   share of clips with colour, speed, material of the caption (mean; the JSON has each)
    whole     share of frames with exactly one ball of the right size
    kept      consistency of the identity (hue, radius, pitch), which the caption does not give:
              1 - d / D. d: change from the clip's first 2 s to the second half of the interval;
              D: mean difference between two clips. 0-5 s thus compares 2.5-5 s with 0-2 s
    spread    diversity: mean difference D in that second half, divided by D of ground-truth clips
              in 2.5-5 s
    Frechet   distance between the distributions of 14 features (UNITS) of these clips and of the
              first five seconds of other ground-truth clips, computed as in FVD and FAD

Each value has a bootstrap 95 % confidence interval over the clips; the table shows half its width.
Streams are measured in intervals of 5 s, to show drift, and second by second in the plot.

    python -m studies.evaluate              the shipped teacher and students, some minutes
    python -m studies.evaluate --clips 16 --seconds 10
    python -m studies.evaluate --student    without the students of stages II and III, and no plot
"""

import math
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import config
import dmd
import model
import teacher
from kv_cache import CachedView
from masks import num_blocks, trained_window
from plumbing import cli, files
from rollout import few_step_sigmas, rollout, whole_clip
from studies import plots
from toy import codec as toy_codec
from toy import detectors
from toy import world as toy_world
from toy.source import load_bidirectional, student_from, toy_captions

STUDENTS = ["weights/toy_ode_regression.safetensors", "weights/toy_self_forcing.safetensors"]
BATCH = 16  # clips at a time
CLIPS = cli.whole(2, 10**4)  # the type of --clips; diversity needs two
REFERENCE_SECONDS = 2  # at the start of a clip, for `kept`
REFERENCE_CLIPS, REFERENCE_SEED = 384, toy_world.HELD_OUT + 10**6  # for the Frechet distance
RESAMPLES = 400  # for the confidence intervals
TRAINED = "trained"  # a window: as many blocks back as in a training clip of the student's config

# The features of the Frechet distance, each with the smallest difference that matters. A feature is
# divided by sqrt(std^2 + difference^2), with the std over ground-truth clips. The std alone can be
# almost 0, as with the mass of the ball. "std" below is over the frames of a clip.
UNITS = {
    "speed (px/s)": 1.0, "bend (px/frame^2)": 0.3,
    "mass": 0.2, "std of mass": 0.1, "spread": 0.1, "std of spread": 0.1,
    "std of x (px)": 1.0, "std of y (px)": 1.0,
    "left": 0.05, "right": 0.05, "top": 0.05, "bottom": 0.05,  # level of each wall's pitches
    "impacts": 0.5, "onsets": 0.5,  # in the interval
}  # fmt: skip


# ---- measuring one batch ----


class Interval(NamedTuple):
    """Measurements of B clips between two times."""

    match: np.ndarray  # (B, 8) the fields of detectors.Match
    seconds: float  # in which events were counted
    words: np.ndarray  # (B, 3) True where the clip shows the caption's word
    whole: np.ndarray  # (B,) share of frames with exactly one ball
    reference: np.ndarray  # (B, 3) identity in the first seconds of the clip
    identity: np.ndarray  # (B, 3) identity in the second half of the interval
    features: np.ndarray  # (B, 14)


def measure(video, sound, words, times) -> list[Interval]:
    """Detect events once, then measure every interval (start, stop).

    video (B, P, 3, H, W)   sound (B, M, 16)   words (B, 3) of the caption
    """
    ball = detectors.see_ball(video)
    seen, heard = detectors.find_impacts(ball), detectors.find_onsets(sound)
    end = (video.shape[1] - 1) / config.TOY.fps
    reference = _identity(ball, sound, heard, 0, REFERENCE_SECONDS)
    result = []
    for start, stop in times:
        # at the ends of a clip the detectors see no impacts
        low, high = max(start, detectors.MARGIN), min(stop, end - detectors.MARGIN)
        match = [detectors.match(s, h, low, high) for s, h in zip(seen, heard)]
        part, levels, onsets = _cut(ball, sound, heard, start, stop)
        result.append(
            Interval(
                np.array(match, dtype=float),
                high - low,
                (detectors.read_words(part, levels, onsets) == words).numpy(),
                detectors.persistence(part).float().mean(1).numpy(),
                reference,
                _identity(ball, sound, heard, (start + stop) / 2, stop),
                _features(part, levels, match),
            )
        )
    return result


def _cut(ball, sound, events, start, stop):
    """Cut ball, sound and events to [start, stop) seconds; event times then count from `start`."""
    cfg = config.TOY
    frames = slice(math.floor(start * cfg.fps), math.ceil(stop * cfg.fps) + 1)
    mel = slice(math.floor(start * cfg.mel_rate), math.ceil(stop * cfg.mel_rate) + 1)
    inside = [(e.times >= start) & (e.times < stop) for e in events]
    kept = [detectors.Events(e.times[i] - start, e.walls[i]) for e, i in zip(events, inside)]
    return detectors.Ball(*(x[:, frames] for x in ball)), sound[:, mel], kept


def _identity(ball, sound, events, start, stop):
    return detectors.identity(*_cut(ball, sound, events, start, stop)).numpy()


def _features(ball, sound, match):
    """Return (B, 14) features in the order of UNITS: motion, looks, loudness per wall, events."""
    bend = ball.place.diff(n=2, dim=1).norm(dim=-1).mean(1)
    looks = [ball.mass.mean(1), ball.mass.std(1), ball.spread.mean(1), ball.spread.std(1)]
    place = [ball.place[..., 0].std(1), ball.place[..., 1].std(1)]
    walls = detectors.wall_levels(sound).square().mean(1).sqrt()  # (B, 4)
    events = torch.tensor([[m.impacts, m.onsets] for m in match]).float()
    parts = [detectors.speeds(ball), bend, *looks, *place, *walls.unbind(1), *events.unbind(1)]
    return torch.stack(parts, 1).numpy()


# ---- summing up ----


def metrics(w: Interval, truth: Interval, others: Interval, rows=slice(None)) -> dict:
    """Return the numbers of one table row.

    truth   ground-truth clips of the same captions, for event rates and diversity
    others  other ground-truth clips, for the Frechet distance
    rows    which of the clips to use
    """
    m = detectors.Match(*w.match[rows].sum(0))
    # intervals may differ in length: compare events per second
    true = detectors.Match(*truth.match[rows].sum(0) * w.seconds / truth.seconds)
    colour, speed, material = w.words[rows].mean(0)
    values = {
        "f1": m.hits / max(1, m.impacts + m.onsets),
        "desync_ms": 1000 * m.offsets / max(1, m.near),
        "capped_ms": 1000 * (m.offsets + detectors.CAP * m.missed) / max(1, m.near + m.missed),
        "wall": m.right_wall / max(1, m.pairs),
        "impacts_rate": m.impacts / true.impacts,
        "onsets_rate": m.onsets / true.onsets,
        "colour": colour,
        "speed": speed,
        "material": material,
        "caption": (colour + speed + material) / 3,
        "whole": w.whole[rows].mean(),
        "kept": identity_kept(w.reference[rows], w.identity[rows]),
        "spread": identity_spread(w.identity[rows], truth.identity[rows]),
        "frechet": frechet(w.features[rows], others.features),
    }
    return {name: round(float(value), 4) for name, value in values.items()}


def identity_kept(before, after):
    """Return 1 - change / difference between clips, mean of the three attributes.

    >>> z = np.random.default_rng(0).normal(size=(50, 3))
    >>> round(float(identity_kept(z, z)), 2), round(float(identity_kept(z, np.roll(z, 7, 0))), 2)
    (1.0, -0.04)
    """
    if np.isnan(after).all(0).any() or np.isnan(before).all(0).any():
        return np.nan  # no clip has any sound, so no pitch
    change = np.nanmean(np.abs(after - before), 0)
    return np.mean(1 - change / (_between_clips(after, before) + 1e-9))


def identity_spread(x, truth):
    """Return the difference between clips, relative to the truth; mean of the three attributes.

    >>> z = np.random.default_rng(0).normal(size=(50, 3))
    >>> round(float(identity_spread(z / 2 + 7, z)), 6)
    0.5
    """
    if np.isnan(x).all(0).any():
        return np.nan
    return np.mean(_between_clips(x, x) / (_between_clips(truth, truth) + 1e-9))


def _between_clips(after, before):
    """Return the mean difference (3,) between two clips, of identities (n, 3) at two times."""
    other = np.abs(after[:, None] - before[None])
    other[np.arange(len(other)), np.arange(len(other))] = np.nan  # not a pair of two clips
    return np.nanmean(other, (0, 1))


def frechet(x, truth):
    """Return the Frechet distance between two Gaussians, fitted to features (n, 14) each.

    >>> x = np.random.default_rng(0).normal(size=(500, 14))
    >>> round(float(frechet(x, x)), 6), frechet(x + 1, x) > frechet(x + 0.5, x) > 1
    (0.0, np.True_)
    """
    scale = np.hypot(truth.std(0), list(UNITS.values()))
    x, truth = x / scale, truth / scale
    a, b = np.cov(x.T), np.cov(truth.T)
    values, vectors = np.linalg.eigh(b)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T  # the matrix square root of b
    cross = np.sqrt(np.linalg.eigvalsh(root @ a @ root).clip(0)).sum()
    return ((x.mean(0) - truth.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross


def with_intervals(w: Interval, truth: Interval, others: Interval) -> dict:
    """Return each metric with its 95 % confidence interval: {"f1": [value, low, high], ...}."""
    rng = np.random.default_rng(0)
    n = len(w.match)
    draws = [metrics(w, truth, others, rng.integers(n, size=n)) for _ in range(RESAMPLES)]

    def interval(name):
        values = [d[name] for d in draws]
        if np.isnan(values).any():  # e.g. no clip of a draw has any sound
            return [None, None]
        return [round(float(x), 4) for x in np.percentile(values, (2.5, 97.5))]

    return {k: [v if v == v else None, *interval(k)] for k, v in metrics(w, truth, others).items()}


# ---- clips to measure: functions whose last two arguments are toy clips and a seed ----

# All return video and sound. The functions with a model use only the captions of the clips.


def true_clips(seconds, clips, seed):
    """Render the ground truth: video (B, P, 3, H, W) and sound (B, M, 16)."""
    return toy_world.render_video(clips, seconds), toy_world.render_sound(clips, seconds)


def shuffled_clips(seconds, clips, seed):
    """Pair the video of each ground-truth clip with the sound of the next: a chance baseline."""
    video, sound = true_clips(seconds, clips, seed)
    return video, sound.roll(-1, 0)


def decode(codec, latents):
    """Decode complete clips from (video, audio) latents."""
    return codec.decode_video(latents[0], True), codec.decode_audio(latents[1], True)


def through_codec(codec, seconds, clips, seed):
    """Encode and decode the ground truth: an upper bound for the models."""
    return decode(codec, codec.encode(*true_clips(seconds, clips, seed)))


def from_teacher(net, codec, sigmas, clips, seed, guidance=teacher.GUIDANCE):
    """Sample clips of five seconds from the teacher, at these noise levels."""
    captions = toy_captions(toy_world.caption_tokens(clips))
    return decode(codec, teacher.sample(net, captions, sigmas, guidance=guidance, seed=seed))


@torch.inference_mode()
def from_few_steps(net, codec, clips, seed):
    """Sample clips of five seconds from a bidirectional few-step student."""
    captions = toy_captions(toy_world.caption_tokens(clips))
    generator = torch.Generator().manual_seed(seed)
    return decode(codec, dmd.few_step_clips(net, captions, generator))


@torch.inference_mode()
def from_stream(net, codec, seconds, clips, seed, *, window=TRAINED, steps=None, pinned=True):
    """Stream block by block, as generate.py does, many captions side by side.

    window   blocks kept in the cache, in addition to block 0; None: all
    pinned   False: block 0 is evicted like any other block
    """
    if window == TRAINED:
        window = trained_window(net.cfg)
    text = net.project_text(toy_world.caption_features(toy_world.caption_tokens(clips)))
    blocks, sigmas = num_blocks(seconds, net.cfg), few_step_sigmas(net.cfg, steps)
    view, g = CachedView(net.cfg, blocks, window, pinned), torch.Generator().manual_seed(seed)
    stream = rollout(net, lambda k: text, blocks, sigmas, g, batch=len(clips.words), view=view)
    return decode(codec, whole_clip(stream))


def short_name(path) -> str:
    """Return a student's name in tables.

    >>> short_name("weights/toy_self_forcing.safetensors")
    'self_forcing'
    """
    return Path(path).stem.removeprefix("toy_")


def measure_all(make, seeds, times, title) -> list[Interval]:
    """Make clips batch by batch and measure them.  make(clips, seed) -> video, sound."""
    batches = []
    # `with` ends the bar before a message of an error is printed
    with tqdm(range(0, len(seeds), BATCH), desc=title, mininterval=5, leave=False) as bar:
        for first in bar:
            clips = toy_world.draw_clips(seeds[first : first + BATCH])
            batches.append(measure(*make(clips, seeds[first]), clips.words, times))
    return [
        Interval(*(x[0] if np.isscalar(x[0]) else np.concatenate(x) for x in zip(*same)))
        for same in zip(*batches)
    ]


def measure_truth(seconds, seeds, times, title="truth") -> list[Interval]:
    """Measure ground-truth clips of `seconds`."""
    return measure_all(partial(true_clips, seconds), seeds, times, title)


# ---- the table ----

COLUMNS = {
    "f1": "F1", "desync_ms": "DeSync ms", "capped_ms": "capped ms", "wall": "wall",
    "impacts_rate": "impacts", "onsets_rate": "onsets", "caption": "caption", "whole": "whole",
    "kept": "kept", "spread": "spread", "frechet": "Frechet",
}  # fmt: skip


def table(rows) -> str:
    """Return a Markdown table of {name: metrics with intervals}."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name, values in rows.items():
        cells = [_cell(column, *values[column]) for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(column, value, low, high):
    if low is None:
        return "–"
    digits = 0 if column.endswith("_ms") else 2 if column == "frechet" else 3
    return f"{value:.{digits}f} ± {(high - low) / 2:.{digits}f}"


# ---- all rows ----


def held_out(n) -> range:
    """Return the seeds of the n clips on which everything is measured."""
    return range(toy_world.HELD_OUT, toy_world.HELD_OUT + n)


def five_second_intervals(seconds) -> list[tuple[int, int]]:
    """Return (start, stop) of consecutive intervals."""
    return [(t, t + 5) for t in range(0, seconds, 5)]


OTHER_ROWS = ("truth", "teacher", "stage I")  # a student cannot have these names


def load(paths) -> dict:
    """Load students: {name in tables: net}.

    Raises ValueError for a name that another row has.
    """
    nets = {}
    for path in paths:
        if (name := short_name(path)) in (*OTHER_ROWS, *nets):
            raise ValueError(f"--student {path}: another row is called {name}; rename a file")
        nets[name] = model.load(path)
    return nets


def five_second_rows(codec, args) -> dict:
    """Return the functions that make five-second clips: {row: function of clips and seed}."""
    few_step = load_bidirectional(args.few_step)
    untrained = student_from(few_step.state_dict(), config.TOY)
    stream = partial(from_stream, window=args.window, steps=args.steps)
    net = load_bidirectional(args.teacher)
    sample = partial(from_teacher, net, codec, guidance=args.guidance)
    return {
        "truth, sounds shuffled": partial(shuffled_clips, 5),
        "truth through the codec": partial(through_codec, codec, 5),
        "teacher, 32 steps": partial(sample, teacher.schedule(32)),
        "teacher, 4 steps": partial(sample, config.FOUR_STEPS),
        "stage I, 4 steps": partial(from_few_steps, few_step, codec),
        "stage I streamed, never trained to": partial(stream, untrained, codec, 5),
    }


def evaluate(args):
    """Return all rows, {name: metrics with intervals}, and {student: [metrics of each second]}."""
    codec, students = toy_codec.load(), load(args.student)
    seeds, once = held_out(args.clips), [(0, 5)]
    makers = {"truth": partial(true_clips, 5), **five_second_rows(codec, args)}
    found = {name: measure_all(make, seeds, once, name)[0] for name, make in makers.items()}
    intervals, by_second = five_second_intervals(args.seconds), {}
    stream = partial(from_stream, window=args.window, steps=args.steps)
    for name, net in students.items():
        times = intervals + [(t, t + 1) for t in range(args.seconds)]
        measured = measure_all(partial(stream, net, codec, args.seconds), seeds, times, name)
        found |= {f"{name}, {a}-{b} s": w for (a, b), w in zip(intervals, measured)}
        by_second[name] = measured[len(intervals) :]
    reference = range(REFERENCE_SEED, REFERENCE_SEED + REFERENCE_CLIPS)
    truth, others = found["truth"], measure_truth(5, reference, once, "other true clips")[0]
    rows = {name: with_intervals(w, truth, others) for name, w in found.items()}
    return rows, {n: [metrics(w, truth, others) for w in ws] for n, ws in by_second.items()}


# ---- command line; compare.py and ablations.py check and write with the same functions ----


def add_sizes(p, clips, seconds):
    """Add the options --clips and --seconds, with these defaults."""
    p.add_argument("--clips", type=CLIPS, default=clips, help="held-out clips per row")
    about = "length of the streams, a multiple of 5"
    p.add_argument("--seconds", type=cli.whole(5, 600), default=seconds, help=about)


def check(seconds, out, kinds=("json", "md", "png")):
    """Raise ValueError, before any work is done, if nothing can be measured or written."""
    if seconds % 5:
        raise ValueError(f"--seconds {seconds}: expected a multiple of 5")
    for kind in kinds:
        files.check_writable(f"{out}.{kind}", makes_folders=True)


def write(args, results, table, figure):
    """Write OUT.json with all results, OUT.md with the table, and OUT.png unless figure is None."""
    about = {"command": args.command, **cli.machine(torch.device("cpu"))}
    about["threads"] = torch.get_num_threads()
    files.write_json(f"{args.out}.json", {"about": about, **results})
    files.write_beside(f"{args.out}.md", lambda p: p.write_text(table + "\n", "utf-8"))
    if figure:
        plots.save(figure, f"{args.out}.png")
    print(f"{table}\nwrote {args.out}{'.json, .md and .png' if figure else '.json and .md'}")


def main():
    p = cli.parser(__doc__)
    add_sizes(p, clips=96, seconds=20)
    cli.add_weights(p, "--teacher", "weights/toy_teacher.safetensors", "the teacher")
    cli.add_guidance(p, teacher.GUIDANCE, "guidance scale of the teacher")
    cli.add_weights(p, "--few-step", "weights/toy_dmd.safetensors", "student of stage I")
    cli.add_weights(p, "--student", STUDENTS, "students of stages II and III", nargs="*")
    about = "blocks in the cache; default: as in training"
    p.add_argument("--window", type=cli.whole(1, 1000), help=about)
    about = "passes per block; default: as in training"
    p.add_argument("--steps", type=cli.whole(1, len(config.TOY.sigmas) - 1), help=about)
    p.add_argument("--out", default="results/evaluation", help="writes .json, .md and .png")
    args = p.parse_args()
    check(args.seconds, args.out)
    args.command = cli.command(p, args)
    args.window = TRAINED if args.window is None else args.window
    start = time.perf_counter()
    rows, by_second = evaluate(args)
    figure = plots.draw_drift(by_second) if by_second else None
    write(args, {"rows": rows, "by_second": by_second}, table(rows), figure)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
