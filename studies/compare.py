"""What does each part contribute?  Trained students, compared with one change at a time.

This file changes how students are streamed, or compares students of different trainings.
evaluate.py measures the released models as they are; ablations.py trains students of its own.

    python -m studies.compare drift     a minute of streaming by stages II and III: smaller and
                                    larger windows, fewer passes, no refresh, nothing pinned
    python -m studies.compare controls  how much of stage III is due to self-forcing? The same
                                    training with the ground-truth past, from a shorter stage II,
                                    from stage I, and with other seeds. Names the trainings that
                                    must run first
    python -m studies.compare memory    does a stream keep its identity longer if block 0 is a whole
                                    second, or if training often hides the recent past?
    python -m studies.compare joint     the attention between video and audio is switched off, or
                                    video and audio of two clips are combined
    python -m studies.compare gallery   pictures: ground truth, teacher, and the last five seconds
                                    of a minute by the students of stages II and III
    python -m studies.compare identity  pictures: a minute by both shipped students of stage III;
                                    one of them keeps its identity

Each writes results/NAME.json, .md and .png; the last two write only assets/NAME.png.

evaluate.py defines the metrics. Two things differ here. Frechet distances are measured to the first
five seconds of the ground-truth clips of the same captions, so do not compare them with the numbers
of evaluate.py. Event rates and spread are relative to these clips in the same seconds.
"""

import copy
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import nn

import model
import teacher
from plumbing import cli
from studies import evaluate, plots
from toy import codec as toy_codec
from toy import world as toy_world

# ---- drift ----


class Streaming(NamedTuple):
    """How a student is streamed."""

    window: int | str = evaluate.TRAINED
    steps: int | None = None  # passes per block; None: as in training
    pinned: bool = True
    refresh: bool = True


STREAMS = {
    "window 4": Streaming(window=4),
    "window 2": Streaming(window=2),
    "window 8": Streaming(window=8),
    "2 steps": Streaming(steps=2),
    "1 step": Streaming(steps=1),
    "nothing pinned": Streaming(pinned=False),
    "no refresh": Streaming(refresh=False),
}
DRIFT_COLUMNS = ("f1", "impacts_rate", "onsets_rate", "caption", "whole", "kept")


def drift(args):
    """Measure every way of streaming: {"student, stream": [metrics of 0-5 s, of 5-10 s, ...]}."""
    students, codec = evaluate.load(args.student), toy_codec.load()
    seeds, times = evaluate.held_out(args.clips), evaluate.five_second_intervals(args.seconds)
    true = partial(evaluate.true_clips, args.seconds)
    truth = evaluate.measure_all(true, seeds, times, "truth")
    by_time = {}
    for student, net in students.items():
        for stream, how in STREAMS.items():
            make = evaluate.streams_of(
                net if how.refresh else WithoutRefresh(net),
                codec,
                args.seconds,
                window=how.window,
                steps=how.steps,
                pinned=how.pinned,
            )
            found = evaluate.measure_all(make, seeds, times, f"{student}, {stream}")
            rows = [evaluate.metrics(w, t, truth[0]) for w, t in zip(found, truth)]
            by_time[f"{student}, {stream}"] = rows
    return by_time, drift_table(by_time), plots.draw_drift(by_time, step=5)


class WithoutRefresh(nn.Module):
    """A student that skips the refresh: the cache keeps the keys of the last noisy pass."""

    def __init__(self, net):
        super().__init__()
        self.net, self.cfg, self.project_text = net, net.cfg, net.project_text

    def forward(self, video, audio, sigma_video, *others):
        if not sigma_video.any():  # a refresh: return without writing to the cache
            return video, audio
        return self.net(video, audio, sigma_video, *others)


def drift_table(by_time) -> str:
    """Return a Markdown table of the first, middle and last five seconds of every stream."""
    columns = DRIFT_COLUMNS
    lines = ["| stream | seconds | " + " | ".join(columns) + " |"]
    lines.append("|---|---|" + "---|" * len(columns))
    for name, rows in by_time.items():
        for i in sorted({0, len(rows) // 2, len(rows) - 1}):
            cells = " | ".join(f"{rows[i][metric]:.3f}" for metric in columns)
            lines.append(f"| {name} | {5 * i}-{5 * i + 5} | {cells} |")
    return "\n".join(lines)


# ---- controls and memory: who is compared ----


class Student(NamedTuple):
    """A weight file, and the window of its streams."""

    path: str
    training: str  # the command that makes it, but for --out
    window: int  # blocks in the cache, in addition to block 0

    @property
    def command(self) -> str:
        return f"{self.training} --out {self.path}"


SEEDS = 3  # of "NAME", "NAME, seed 1" and "NAME, seed 2"

# Windows 4 (block 0 is one frame) and 3 (block 0 is a second, "4+3k" video latents) hold exactly a
# training clip.
CONTROLS = {
    "stage II": Student(
        "weights/toy_ode_regression.safetensors",
        "ode_regression.py",
        window=4,
    ),
    "stage III": Student(
        "weights/toy_self_forcing.safetensors",
        "self_forcing.py",
        window=4,
    ),
    "stage II, seed 1": Student(
        "runs/controls/long_ode_regression_1.safetensors",
        "ode_regression.py --seed 1 --run runs/controls/long_ode_regression_1",
        window=4,
    ),
    "stage III, seed 1": Student(
        "runs/controls/from_long_1.safetensors",
        "self_forcing.py --student runs/controls/long_ode_regression_1.safetensors --seed 1 "
        "--run runs/controls/from_long_1",
        window=4,
    ),
    "stage II, seed 2": Student(
        "runs/controls/long_ode_regression_2.safetensors",
        "ode_regression.py --seed 2 --run runs/controls/long_ode_regression_2",
        window=4,
    ),
    "stage III, seed 2": Student(
        "runs/controls/from_long_2.safetensors",
        "self_forcing.py --student runs/controls/long_ode_regression_2.safetensors --seed 2 "
        "--run runs/controls/from_long_2",
        window=4,
    ),
    "short II": Student(
        "runs/controls/ode_regression_0.safetensors",
        "ode_regression.py --steps 500 --seed 0 --run runs/controls/ode_regression_0",
        window=4,
    ),
    "III from short II": Student(
        "runs/controls/self_forcing_0.safetensors",
        "self_forcing.py --student runs/controls/ode_regression_0.safetensors --seed 0 "
        "--run runs/controls/self_forcing_0",
        window=4,
    ),
    "short II, seed 1": Student(
        "runs/controls/ode_regression_1.safetensors",
        "ode_regression.py --steps 500 --seed 1 --run runs/controls/ode_regression_1",
        window=4,
    ),
    "III from short II, seed 1": Student(
        "runs/controls/self_forcing_1.safetensors",
        "self_forcing.py --student runs/controls/ode_regression_1.safetensors --seed 1 "
        "--run runs/controls/self_forcing_1",
        window=4,
    ),
    "short II, seed 2": Student(
        "runs/controls/ode_regression_2.safetensors",
        "ode_regression.py --steps 500 --seed 2 --run runs/controls/ode_regression_2",
        window=4,
    ),
    "III from short II, seed 2": Student(
        "runs/controls/self_forcing_2.safetensors",
        "self_forcing.py --student runs/controls/ode_regression_2.safetensors --seed 2 "
        "--run runs/controls/self_forcing_2",
        window=4,
    ),
    "III from short II behind the true past": Student(
        "runs/controls/true_history.safetensors",
        "self_forcing.py --student runs/controls/ode_regression_0.safetensors --history true "
        "--run runs/controls/true_history",
        window=4,
    ),
    "III from short II, own exit for every block": Student(
        "runs/controls/own_exit.safetensors",
        "self_forcing.py --student runs/controls/ode_regression_0.safetensors --exit own "
        "--run runs/controls/own_exit",
        window=4,
    ),
    "III from stage I": Student(
        "runs/controls/from_stage_I.safetensors",
        "self_forcing.py --student weights/toy_dmd.safetensors --run runs/controls/from_stage_I",
        window=4,
    ),
}
MEMORY = {
    "stage II": Student(
        "weights/toy_ode_regression.safetensors",
        "ode_regression.py",
        window=4,
    ),
    "stage II, 4+3k": Student(
        "runs/controls/released_ode_regression.safetensors",
        "ode_regression.py --config toy_released --run runs/controls/released_ode_regression",
        window=3,
    ),
    "stage II, 4+3k, window 1": Student(
        "runs/controls/released_ode_regression.safetensors",
        "ode_regression.py --config toy_released --run runs/controls/released_ode_regression",
        window=1,
    ),
    "stage II, 4+3k, past often hidden": Student(
        "runs/controls/hiding_ode_regression.safetensors",
        "ode_regression.py --config toy_released --windows 0 1 2 3 "
        "--run runs/controls/hiding_ode_regression",
        window=3,
    ),
    "stage II, 4+3k, past often hidden, window 1": Student(
        "runs/controls/hiding_ode_regression.safetensors",
        "ode_regression.py --config toy_released --windows 0 1 2 3 "
        "--run runs/controls/hiding_ode_regression",
        window=1,
    ),
    "stage III": Student(
        "weights/toy_self_forcing.safetensors",
        "self_forcing.py",
        window=4,
    ),
    "stage III, 4+3k, past often hidden": Student(
        "weights/toy_released_self_forcing.safetensors",
        "self_forcing.py --config toy_released --window 1 "
        "--student runs/controls/hiding_ode_regression.safetensors "
        "--run runs/controls/hiding_self_forcing",
        window=3,
    ),
    "stage III, 4+3k, past often hidden, window 1": Student(
        "weights/toy_released_self_forcing.safetensors",
        "self_forcing.py --config toy_released --window 1 "
        "--student runs/controls/hiding_ode_regression.safetensors "
        "--run runs/controls/hiding_self_forcing",
        window=1,
    ),
    "stage II, 4+3k, past often hidden, window 1, seed 1": Student(
        "runs/controls/hiding_ode_regression_1.safetensors",
        "ode_regression.py --config toy_released --windows 0 1 2 3 --seed 1 "
        "--run runs/controls/hiding_ode_regression_1",
        window=1,
    ),
    "stage III, 4+3k, past often hidden, window 1, seed 1": Student(
        "runs/controls/hiding_self_forcing_1.safetensors",
        "self_forcing.py --config toy_released --window 1 "
        "--student runs/controls/hiding_ode_regression_1.safetensors --seed 1 "
        "--run runs/controls/hiding_self_forcing_1",
        window=1,
    ),
}
COMPARED = {"controls": CONTROLS, "memory": MEMORY}


# ---- controls and memory: how they are compared ----


def compare(args):
    """Measure the first and the last five seconds: {"student, 0-5 s": metrics with intervals}."""
    everyone = COMPARED[args.experiment]
    chosen = {name: everyone[name] for name in cli.chosen(args.only, everyone)}
    if missing := [s.command for s in chosen.values() if not Path(s.path).exists()]:
        commands = "; ".join(f"python {command}" for command in missing)
        raise ValueError(f"train first: {commands}")
    codec, seeds = toy_codec.load(), evaluate.held_out(args.clips)
    times = [(0, 5), (args.seconds - 5, args.seconds)]
    true = partial(evaluate.true_clips, args.seconds)
    truth = evaluate.measure_all(true, seeds, times, "truth")
    results = {}
    for name, student in chosen.items():
        make = streams(student, codec, args.seconds)
        results |= by_interval(name, make, seeds, times, truth)
    shown = over_seeds(results)
    return results | shown, evaluate.table(shown), plots.draw_streams(shown)


def streams(student, codec, seconds):
    """Load a Student; return its streams as a function of clips and seed."""
    net = model.load(student.path)
    return evaluate.streams_of(net, codec, seconds, window=student.window)


def by_interval(name, make, seeds, times, truth) -> dict:
    """Measure the clips of `make`: {"NAME, START-STOP s": metrics with intervals}."""
    found = evaluate.measure_all(make, seeds, times, name)
    return {
        f"{name}, {start}-{stop} s": evaluate.with_intervals(w, t, truth[0])
        for (start, stop), w, t in zip(times, found, truth)
    }


def over_seeds(results) -> dict:
    """Merge the rows of a student's training seeds into one: mean, least and largest value."""
    shown, merged = {}, set()
    for name, row in results.items():
        student, _, seconds = name.rpartition(", ")
        others = [f"{student}, seed {seed}, {seconds}" for seed in range(1, SEEDS)]
        if others := [other for other in others if other in results]:
            rows = [row, *(results[other] for other in others)]
            values = {metric: over([r[metric][0] for r in rows]) for metric in row}
            shown[f"{student}, {len(rows)} seeds, {seconds}"] = values
            merged.update(others)
        elif name not in merged:
            shown[name] = row
    return shown


def over(values):
    """Return [mean, least, largest], or None three times if a value is missing."""
    if None in values:
        return [None, None, None]
    return [sum(values) / len(values), min(values), max(values)]


# ---- joint: video and audio apart ----

TEACHER_SIGMAS = teacher.schedule(32)  # as in evaluate.py


def deaf(net, *streams):
    """Return a copy of the model in which these streams receive nothing from the other one."""
    net = copy.deepcopy(net)
    for layer in net.layers:
        for stream in streams:
            # out = W x + b with W = b = 0 adds nothing to the residual stream
            for p in getattr(layer, stream).cross_attn.to_out.parameters():
                p.zero_()
    return net


def put_together(make, clips, seed):
    """Return the video of one clip and the sound of another one with the same caption."""
    return make(clips, seed)[0], make(clips, seed + 1)[1]


def joint(args):
    """Measure teacher and stage III, complete and with video and audio apart: {who: metrics}."""
    codec, seeds = toy_codec.load(), evaluate.held_out(args.clips)
    once = evaluate.five_second_intervals(evaluate.INTERVAL_SECONDS)
    truth = evaluate.measure_all(partial(evaluate.true_clips, 5), seeds, once, "truth")[0]
    teacher_net = model.load(args.real).requires_grad_(False)
    student_net = model.load(args.student[-1]).requires_grad_(False)
    makers = apart("teacher", teacher_net, lambda net: teacher_clips(net, codec))
    makers |= apart("stage III", student_net, lambda net: evaluate.streams_of(net, codec, 5))
    results = {}
    for name, make in makers.items():
        w = evaluate.measure_all(make, seeds, once, name)[0]
        results[name] = evaluate.with_intervals(w, truth, truth)
    return results, evaluate.table(results), plots.draw_joint(results)


def teacher_clips(net, codec):
    """Return the teacher's clips of five seconds as a function of clips and seed."""
    return partial(evaluate.from_teacher, net, codec, TEACHER_SIGMAS)


def apart(who, net, maker) -> dict:
    """Return {row: function of clips and seed}.  maker(net) -> such a function."""
    return {
        who: maker(net),
        f"{who}, video deaf (no A2V)": maker(deaf(net, "video")),
        f"{who}, audio deaf (no V2A)": maker(deaf(net, "audio")),
        f"{who}, both deaf": maker(deaf(net, "video", "audio")),
        f"{who}, two clips put together": partial(put_together, maker(net)),
    }


# ---- pictures ----


def gallery(args):
    """Draw five seconds of one held-out caption by everyone, frames and sound."""
    students, codec = evaluate.load(args.student), toy_codec.load()
    clips = toy_world.draw_clips([toy_world.HELD_OUT + args.clip])
    made = {  # video, sound, and the second from which to draw
        "truth": (*evaluate.true_clips(5, clips, 0), 0),
        "teacher": (*teacher_clips(model.load(args.real), codec)(clips, 0), 0),
    }
    for name, net in students.items():
        stream = evaluate.streams_of(net, codec, args.seconds)
        made[name] = (*stream(clips, 0), args.seconds - 5)
    firsts = {name: (video[0], sound[0], start) for name, (video, sound, start) in made.items()}
    return plots.draw_gallery(toy_world.words_of(clips)[0], firsts)


def identity(args):
    """Draw a frame every three seconds: three held-out captions by both students of stage III.

    The two strips of a caption start from the same noise and stand below each other.
    """
    first = toy_world.HELD_OUT + args.clip
    clips, codec = toy_world.draw_clips(range(first, first + 3)), toy_codec.load()
    students = {
        "1+3k": MEMORY["stage III"],
        "4+3k": MEMORY["stage III, 4+3k, past often hidden, window 1"],
    }
    shown = {}
    for blocks, student in students.items():
        videos, _ = streams(student, codec, args.seconds)(clips, 0)
        for words, video in zip(toy_world.words_of(clips), videos):
            shown[f"{words}, {blocks}"] = video
    return plots.draw_strips(dict(sorted(shown.items())), per_second=1 / 3)


# ---- command line ----

TABLES = {"drift": drift, "controls": compare, "memory": compare, "joint": joint}
PICTURES = {"gallery": gallery, "identity": identity}


def check(args):
    """Raises ValueError for options that make no sense, or results that cannot be written."""
    evaluate.check(args)
    if args.only is not None and args.experiment not in COMPARED:
        raise ValueError(f"--only: for {' and '.join(COMPARED)}; {args.experiment} has no choice")
    if args.clip < 0:
        raise ValueError(f"--clip {args.clip}: expected 0 or more")
    evaluate.check_out(args.out, ("png",) if args.experiment in PICTURES else ("json", "md", "png"))


def main():
    p = cli.parser(__doc__)
    p.add_argument("experiment", choices=(*TABLES, *PICTURES))
    p.add_argument("--clips", type=int, default=32, help="held-out clips per row")
    p.add_argument("--seconds", type=int, default=60, help="length of the streams, a multiple of 5")
    p.add_argument(
        "--student", nargs="+", default=evaluate.STUDENTS, help="weights, stage by stage"
    )
    p.add_argument("--real", default="weights/toy_teacher.safetensors", help="the teacher")
    p.add_argument("--only", nargs="*", metavar="WHO", help="controls, memory: only these students")
    p.add_argument("--clip", type=int, default=0, help="gallery, identity: which held-out caption")
    p.add_argument("--out", help="default: results/EXPERIMENT, for pictures assets/EXPERIMENT")
    args = p.parse_args()
    args.command = cli.command(p, args, ("experiment", "out")) + f" -- {args.experiment}"
    folder = "assets" if args.experiment in PICTURES else "results"
    args.out = args.out or f"{folder}/{args.experiment}"
    check(args)
    if args.experiment in TABLES:
        results, table, figure = TABLES[args.experiment](args)
        evaluate.write(args, {"result": results}, table, figure)
    else:
        plots.save(PICTURES[args.experiment](args), f"{args.out}.png")
        print(f"wrote {args.out}.png")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
