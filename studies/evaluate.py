"""The toy JavisBench: what do a model's clips show, do they sound in sync, and for how long?

Every row is scored on the same held-out captions by the same detectors. What these see and hear,
and how F1, DeSync and wall are counted, is in toy/detectors.py; all else is defined here:

    F1        impacts and onsets that belong together, within 60 ms      (truth 1.0)
    DeSync    ms between the two, within 250 ms; `capped` counts a missing partner as 300 ms
    wall      the sound comes from the wall that was hit
    impacts, onsets   events seen and heard per second, as shares of those in the first five seconds
              of the true clips of the same captions and seeds: F1 does not punish silence
    caption   colour, speed and material as asked for (mean of the three; each is in the JSON)
    whole     frames with exactly one whole ball
    kept      identity the caption does not tell (hue, radius, pitch), in the second half of the
              judged seconds: 1 if it is as in the clip's first 2 s, 0 if it is as unlike as another
              clip's. So 0-5 s compares 2.5-5 s with 0-2 s, and 15-20 s compares 17.5-20 s
    spread    how unlike the identities of two clips are in that second half, as a share of two
              true clips' in theirs, 2.5-5 s
    Frechet   distance between the distributions of 14 measured features in these clips and in
              the first five seconds of other true ones, computed as FVD and FAD are; see UNITS
              for the features

Numbers stand with 95 % intervals from resampling the clips. Streams are scored in stretches of 5 s,
so that drift over time would show, and second by second in the plot.

    python -m studies.evaluate                     the shipped teacher and students, some minutes
    python -m studies.evaluate --clips 16 --seconds 10
    python -m studies.evaluate --student            no students and no plot: the teacher and stage I only
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
import self_forcing
import teacher
from full_size.text import toy_captions
from kv_cache import CachedView
from masks import num_blocks
from plumbing import cli, files
from plumbing.stages import student_from
from studies import charts, plots
from toy import codec as toy_codec
from toy import detectors
from toy import world as toy_world

STUDENTS = [f"weights/toy_{name}.safetensors" for name in ("ode_regression", "self_forcing")]
BATCH = 16  # clips at a time
WINDOW = 5  # seconds that are judged together (the cache's window is another thing)
REFERENCE_SECONDS = 2  # at the start of a clip: what its identity is compared with
REFERENCE_CLIPS, REFERENCE_SEED = 384, toy_world.HELD_OUT + 10**6  # true clips for Frechet
RESAMPLES = 400  # of the clips, for the intervals

# The features of the Frechet distance, and the least difference in each that is worth noticing
# (some, like the ball's mass, hardly vary among true clips). Each is measured in units of its
# spread among true clips and of this difference, added as squares; std is over the frames.
UNITS = {
    "speed (px/s)": 1.0, "bend (px/frame^2)": 0.3,
    "mass": 0.2, "std of mass": 0.1, "spread": 0.1, "std of spread": 0.1,
    "std of x (px)": 1.0, "std of y (px)": 1.0,
    "left": 0.05, "right": 0.05, "top": 0.05, "bottom": 0.05,  # level of each wall's pitches
    "impacts": 0.5, "onsets": 0.5,  # in the window
}  # fmt: skip


# ---- measuring one batch ----


class Window(NamedTuple):
    """What B clips show between two times; counts of toy_detectors.Match and more."""

    match: np.ndarray  # (B, 8) the fields of toy_detectors.Match
    seconds: float  # in which events were asked for
    words: np.ndarray  # (B, 3) caption words shown as asked for
    whole: np.ndarray  # (B,) share of frames with one whole ball
    reference: np.ndarray  # (B, 3) identity in the first seconds
    identity: np.ndarray  # (B, 3) identity in the second half of the window
    features: np.ndarray  # (B, 14)


def measure(video, sound, words, windows, shuffle=False) -> list[Window]:
    """Detect once, then count in every (start, stop) window.

    video (B, P, 3, H, W)   sound (B, M, 16)   words (B, 3) as asked for
    shuffle   judge every picture with the next clip's sound: what chance would score
    """
    if shuffle:
        sound = sound.roll(-1, 0)
    ball = detectors.see_ball(video)
    seen, heard = detectors.find_impacts(ball), detectors.find_onsets(sound)
    end = (video.shape[1] - 1) / config.TOY.fps
    reference = _identity(ball, sound, heard, 0, REFERENCE_SECONDS)
    result = []
    for start, stop in windows:
        low, high = max(start, detectors.MARGIN), min(stop, end - detectors.MARGIN)
        match = [detectors.match(s, h, low, high) for s, h in zip(seen, heard)]
        part, levels, onsets = _cut(ball, sound, heard, start, stop)
        result.append(
            Window(
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
    """The part between two times, its events counted from its start."""
    cfg = config.TOY
    frames = slice(math.floor(start * cfg.fps), math.ceil(stop * cfg.fps) + 1)
    mel = slice(math.floor(start * cfg.mel_rate), math.ceil(stop * cfg.mel_rate) + 1)
    inside = [(e.times >= start) & (e.times < stop) for e in events]
    kept = [detectors.Events(e.times[i] - start, e.walls[i]) for e, i in zip(events, inside)]
    return detectors.Ball(*(x[:, frames] for x in ball)), sound[:, mel], kept


def _identity(ball, sound, events, start, stop):
    return detectors.identity(*_cut(ball, sound, events, start, stop)).numpy()


def _features(ball, sound, match):
    """(B, 14) numbers that describe a clip: motion, looks, loudness of each wall, events."""
    bend = ball.place.diff(n=2, dim=1).norm(dim=-1).mean(1)
    looks = [ball.mass.mean(1), ball.mass.std(1), ball.spread.mean(1), ball.spread.std(1)]
    place = [ball.place[..., 0].std(1), ball.place[..., 1].std(1)]
    walls = detectors.wall_levels(sound).square().mean(1).sqrt()  # (B, 4)
    events = torch.tensor([[m.impacts, m.onsets] for m in match]).float()
    parts = [detectors.speeds(ball), bend, *looks, *place, *walls.unbind(1), *events.unbind(1)]
    return torch.stack(parts, 1).numpy()


# ---- summing up ----


def join(batches) -> list[Window]:
    """Windows of several batches -> windows of all clips."""
    return [
        Window(*(x[0] if np.isscalar(x[0]) else np.concatenate(x) for x in zip(*same)))
        for same in zip(*batches)
    ]


def metrics(w: Window, truth: Window, others: Window, rows=slice(None)) -> dict:
    """The numbers of one table row, over a choice of clips.

    truth   the true clips of the same captions, for the event rates
    others  other true clips, for the Frechet distance
    """
    m = detectors.Match(*w.match[rows].sum(0))
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
    """1 - change / difference between clips, mean of the three attributes; 1 is perfect memory.

    >>> z = np.random.default_rng(0).normal(size=(50, 3))
    >>> round(float(identity_kept(z, z)), 2), round(float(identity_kept(z, np.roll(z, 7, 0))), 2)
    (1.0, -0.04)
    """
    if np.isnan(after).all(0).any() or np.isnan(before).all(0).any():
        return np.nan  # nothing was heard at all
    change = np.nanmean(np.abs(after - before), 0)
    return np.mean(1 - change / (_between_clips(after, before) + 1e-9))


def identity_spread(x, truth):
    """Difference between clips as a share of that between true clips, mean of three attributes.

    >>> z = np.random.default_rng(0).normal(size=(50, 3))
    >>> round(float(identity_spread(z / 2 + 7, z)), 6)
    0.5
    """
    if np.isnan(x).all(0).any():
        return np.nan
    return np.mean(_between_clips(x, x) / (_between_clips(truth, truth) + 1e-9))


def _between_clips(after, before):
    """(n, 3) identities at two times -> (3,) mean difference between one clip and another."""
    other = np.abs(after[:, None] - before[None])
    other[np.arange(len(other)), np.arange(len(other))] = np.nan
    return np.nanmean(other, (0, 1))


def frechet(x, truth):
    """Frechet distance between two sets of features (n, 14), each taken as a Gaussian.

    >>> x = np.random.default_rng(0).normal(size=(500, 14))
    >>> round(float(frechet(x, x)), 6), frechet(x + 1, x) > frechet(x + 0.5, x) > 1
    (0.0, np.True_)
    """
    scale = np.hypot(truth.std(0), list(UNITS.values()))
    x, truth = x / scale, truth / scale
    a, b = np.cov(x.T), np.cov(truth.T)
    values, vectors = np.linalg.eigh(b)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ a @ root).clip(0)).sum()
    return ((x.mean(0) - truth.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross


def with_intervals(w: Window, truth: Window, others: Window) -> dict:
    """Each metric with its 95 % interval: {"f1": [value, low, high], ...}."""
    rng = np.random.default_rng(0)
    n = len(w.match)
    draws = [metrics(w, truth, others, rng.integers(n, size=n)) for _ in range(RESAMPLES)]

    def interval(name):
        values = [d[name] for d in draws]
        if np.isnan(values).any():  # nothing to measure: no sound at all, say
            return [None, None]
        return [round(float(x), 4) for x in np.percentile(values, (2.5, 97.5))]

    return {k: [v if v == v else None, *interval(k)] for k, v in metrics(w, truth, others).items()}


# ---- who is judged: functions whose last arguments are clips (captions, mostly) and a seed ----


def true_clips(seconds, clips, seed):
    """The world itself: video (B, P, 3, H, W) and sound (B, M, 16), as all that follow return."""
    return toy_world.render_video(clips, seconds), toy_world.render_sound(clips, seconds)


def decode(codec, latents):
    """Whole clips from (video, audio) latents."""
    return codec.decode_video(latents[0], True), codec.decode_audio(latents[1], True)


def through_codec(codec, seconds, clips, seed):
    """True clips, encoded and decoded: the best that a model could do."""
    return decode(codec, codec.encode(*true_clips(seconds, clips, seed)))


def from_teacher(net, codec, sigmas, clips, seed, guidance=teacher.GUIDANCE):
    """The teacher's clips of five seconds, along these noise levels."""
    captions = toy_captions(toy_world.caption_tokens(clips))
    return decode(codec, teacher.sample(net, captions, sigmas, guidance=guidance, seed=seed))


@torch.inference_mode()
def from_few_steps(net, codec, clips, seed):
    """A bidirectional few-step student's clips of five seconds."""
    captions, g = toy_captions(toy_world.caption_tokens(clips)), torch.Generator().manual_seed(seed)
    return decode(codec, dmd.few_step_clips(net, captions, g))


@torch.inference_mode()
def from_stream(net, codec, seconds, clips, seed, *, window, steps=None, pinned=True):
    """Stream one block at a time, as generate.py does, for many captions side by side.

    window   blocks remembered besides prefix and sinks, see teacher.trained_window; None: all
    """
    text = net.project_text(toy_world.caption_features(toy_world.caption_tokens(clips)))
    sigmas = dmd.few_step_sigmas(net.cfg, steps)
    g = torch.Generator().manual_seed(seed)
    blocks, n = num_blocks(seconds, net.cfg), len(clips.words)
    rolled = self_forcing.rollout(net, lambda k: text, blocks, sigmas, g, n, window, pinned)
    return decode(codec, self_forcing.whole_clip(rolled))


def short_name(path) -> str:
    """A student's name in tables.

    >>> short_name("weights/toy_self_forcing.safetensors")
    'self_forcing'
    """
    return Path(path).stem.removeprefix("toy_")


def judge(make, seeds, windows, title, shuffle=False) -> list[Window]:
    """Make clips batch by batch and measure them.  make(clips, seed) -> video, sound."""
    batches = []
    for first in tqdm(range(0, len(seeds), BATCH), desc=title, mininterval=5, leave=False):
        clips = toy_world.draw_clips(seeds[first : first + BATCH])
        batches.append(measure(*make(clips, seeds[first]), clips.words, windows, shuffle))
    return join(batches)


# ---- the table ----

COLUMNS = ("f1", "desync_ms", "capped_ms", "wall", "impacts_rate", "onsets_rate", "caption",
           "whole", "kept", "spread", "frechet")  # fmt: skip
HEADS = ("F1", "DeSync ms", "capped ms", "wall", "impacts", "onsets", "caption", "whole", "kept",
         "spread", "Frechet")  # fmt: skip


def table(rows) -> str:
    """Markdown: one line per (name, metrics with intervals)."""
    lines = ["| | " + " | ".join(HEADS) + " |", "|---|" + "---|" * len(HEADS)]
    for name, values in rows.items():
        cells = [_cell(column, *values[column]) for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(column, value, low, high):
    if low is None:
        return "–"
    digits = 0 if column.endswith("_ms") else 2 if column == "frechet" else 3
    return f"{value:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def held_out(n) -> range:
    """Seeds of the n clips that everyone is judged on."""
    return range(toy_world.HELD_OUT, toy_world.HELD_OUT + n)


def five_second_windows(seconds) -> list[tuple[int, int]]:
    """(start, stop) of the stretches of WINDOW seconds that are judged one by one."""
    return [(t, t + WINDOW) for t in range(0, seconds, WINDOW)]


OTHER_ROWS = ("truth", "teacher", "stage I")  # what rows that are not a student's begin with


def load(paths) -> dict:
    """Students by their names in tables.

    Raises ValueError for a name that another row has.
    """
    nets = {}
    for path in paths:
        if (name := short_name(path)) in (*OTHER_ROWS, *nets):
            raise ValueError(f"--student {path}: another row is called {name}; rename a file")
        nets[name] = model.load(path)
    return nets


def whole_clips(codec, args) -> dict:
    """Who makes clips of five seconds, besides the world: {row: function for `judge`}."""
    few_step = model.load(args.few_step)
    untrained = student_from(few_step.state_dict(), config.TOY)
    by_teacher = partial(from_teacher, model.load(args.teacher), codec, guidance=args.guidance)
    return {
        "truth through the codec": partial(through_codec, codec, WINDOW),
        "teacher, 32 steps": partial(by_teacher, teacher.schedule(32)),
        "teacher, 4 steps": partial(by_teacher, config.FOUR_STEPS),
        "stage I, 4 steps": partial(from_few_steps, few_step, codec),
        "stage I streamed, never trained to": streams_of(untrained, codec, WINDOW, **asked(args)),
    }


def streams_of(net, codec, seconds, **changed):
    """A student's streams, as a function for `judge`.

    changed   arguments of `from_stream`; by itself the window just holds a clip of training
    """
    if "window" not in changed:
        changed["window"] = teacher.trained_window(net.cfg)
    return partial(from_stream, net, codec, seconds, **changed)


def asked(args) -> dict:
    """What --window and --steps change."""
    given = dict(window=args.window, steps=args.steps)
    return {name: value for name, value in given.items() if value is not None}


def judge_clips(makers, args) -> dict:
    """Clips of five seconds, the true ones first: {row: Window}."""
    seeds, once, true = held_out(args.clips), [(0, WINDOW)], partial(true_clips, WINDOW)
    shuffled = judge(true, seeds, once, "sounds shuffled", shuffle=True)[0]
    judged = {"truth": judge(true, seeds, once, "truth")[0], "truth, sounds shuffled": shuffled}
    return judged | {name: judge(make, seeds, once, name)[0] for name, make in makers.items()}


def judge_stream(name, net, codec, args):
    """A student's streams in stretches, {row: Window}, and second by second, [Window]."""
    stretches = five_second_windows(args.seconds)
    seconds = [(t, t + 1) for t in range(args.seconds)]
    make = streams_of(net, codec, args.seconds, **asked(args))
    judged = judge(make, held_out(args.clips), stretches + seconds, name)
    rows = [f"{name}, {start}-{stop} s" for start, stop in stretches]
    return dict(zip(rows, judged)), judged[len(rows) :]


def other_true_clips() -> Window:
    """What Frechet distances are measured to: clips that nobody is judged on."""
    seeds = range(REFERENCE_SEED, REFERENCE_SEED + REFERENCE_CLIPS)
    return judge(partial(true_clips, WINDOW), seeds, [(0, WINDOW)], "other true clips")[0]


def evaluate(args):
    """All rows: {name: metrics with intervals}, and second by second: {student: [metrics]}."""
    codec, students = toy_codec.load(), load(args.student)
    judged, seconds = judge_clips(whole_clips(codec, args), args), {}
    for name, net in students.items():
        stretches, seconds[name] = judge_stream(name, net, codec, args)
        judged |= stretches
    truth, others = judged["truth"], other_true_clips()
    rows = {name: with_intervals(w, truth, others) for name, w in judged.items()}
    return rows, {n: [metrics(w, truth, others) for w in ws] for n, ws in seconds.items()}


# ---- command line; `studies/compare.py` and `studies/ablations.py` check and write by the same functions ----


def check(args):
    """Raises ValueError for clips that cannot be judged."""
    if args.seconds < WINDOW or args.seconds % WINDOW:
        raise ValueError(f"--seconds {args.seconds}: expected a multiple of {WINDOW}")
    check_clips(args.clips)


def check_clips(clips):
    """Raises ValueError for too few: one clip has no other that it could be unlike."""
    if clips < 2:
        raise ValueError(f"--clips {clips}: expected at least 2")


def check_out(out, kinds=("json", "md", "png")):
    """Raises ValueError if results cannot be written there: better now than after all the work."""
    for kind in kinds:
        files.check_writable(f"{out}.{kind}", makes_folders=True)


def write(args, found, shown, figure):
    """Write ARGS.OUT.json with what was found, .md with what is shown of it, and .png if drawn."""
    about = {"command": args.command, **cli.machine(torch.device("cpu"))}
    about["threads"] = torch.get_num_threads()
    files.write_json(f"{args.out}.json", {"about": about, **found})
    files.write_beside(f"{args.out}.md", lambda p: p.write_text(shown + "\n"))
    if figure:
        plots.save(figure, f"{args.out}.png")
    print(f"{shown}\nwrote {args.out}{'.json, .md and .png' if figure else '.json and .md'}")


def main():
    p = cli.parser(__doc__)
    p.add_argument("--clips", type=int, default=96, help="held-out clips a row")
    p.add_argument("--seconds", type=int, default=20, help="length of the streams, in fives")
    p.add_argument("--teacher", default="weights/toy_teacher.safetensors", help="its weights")
    cli.add_guidance(p, teacher.GUIDANCE, "of the teacher")
    p.add_argument("--few-step", default="weights/toy_dmd.safetensors", help="stage I student")
    p.add_argument("--student", nargs="*", default=STUDENTS, help="of stages II and III; or none")
    p.add_argument("--window", type=int, help="blocks remembered; default a training clip's")
    p.add_argument("--steps", type=int, help="passes a block; default as in training")
    p.add_argument("--out", default="results/evaluation", help="writes .json, .md and .png")
    args = p.parse_args()
    check(args)
    check_out(args.out)
    dmd.few_step_sigmas(config.TOY, args.steps)  # refuses passes that no student knows
    CachedView(config.TOY, 2, args.window)  # refuses a window that remembers nothing
    args.command = cli.command(p, args)
    start = time.perf_counter()
    rows, by_second = evaluate(args)
    figure = charts.draw_drift(by_second) if by_second else None
    write(args, {"rows": rows, "by_second": by_second}, table(rows), figure)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    cli.run(main)
