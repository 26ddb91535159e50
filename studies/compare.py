"""Compare trained students: each comparison changes one thing.

This file streams students in other ways, or compares students of different trainings.
evaluate.py measures the released models as they are; ablations.py trains students of its own.

    python -m studies.compare drift      or another of these names:

    drift      a minute of streaming by stages II and III: smaller and larger windows, fewer passes,
               no refresh, nothing pinned
    controls   how much of stage III is due to self-forcing? The same training with the ground-truth
               past, from a shorter stage II, from stage I, and with other seeds. If students are
               missing, it prints the commands that train them
    memory     does a stream keep its identity longer if block 0 is a whole second, or if training
               often hides the recent past?
    joint      the attention between video and audio is switched off, or video and audio of two
               clips are combined
    gallery    pictures: ground truth, teacher, and the last five seconds of a minute by stages II
               and III
    identity   pictures: a minute by both shipped students of stage III; one keeps its identity

Each writes results/NAME.json, .md and .png; the last two write only assets/NAME.png.

evaluate.py defines the metrics. Two things differ here. The Frechet distance is the distance to the
first five seconds of the ground-truth clips with the same captions, so do not compare it with the
numbers of evaluate.py. Event rates and spread are relative to these clips in the same seconds.
"""

import copy
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

from torch import nn

import model
import teacher
from plumbing import cli
from studies import evaluate, plots
from toy import codec as toy_codec
from toy import world as toy_world
from toy.source import load_bidirectional

# ---- drift ----

STREAMS = {  # options of evaluate.from_stream
    "window 4": {"window": 4},
    "window 2": {"window": 2},
    "window 8": {"window": 8},
    "2 steps": {"steps": 2},
    "1 step": {"steps": 1},
    "nothing pinned": {"pinned": False},
    "no refresh": {},  # drift() wraps the student
}
DRIFT_COLUMNS = "f1", "impacts_rate", "onsets_rate", "caption", "whole", "kept"


def drift(args):
    """Measure every way of streaming: {"student, stream": [metrics of 0-5 s, of 5-10 s, ...]}."""
    students, codec = evaluate.load(args.student), toy_codec.load()
    seeds, times = evaluate.held_out(args.clips), evaluate.five_second_intervals(args.seconds)
    truth = evaluate.measure_truth(args.seconds, seeds, times)
    by_time = {}
    for student, net in students.items():
        for stream, options in STREAMS.items():
            name = f"{student}, {stream}"
            streamed = WithoutRefresh(net) if stream == "no refresh" else net
            make = partial(evaluate.from_stream, streamed, codec, args.seconds, **options)
            found = evaluate.measure_all(make, seeds, times, name)
            by_time[name] = [evaluate.metrics(w, t, truth[0]) for w, t in zip(found, truth)]
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
    lines = ["| stream | seconds | " + " | ".join(DRIFT_COLUMNS) + " |"]
    lines.append("|---|---|" + "---|" * len(DRIFT_COLUMNS))
    for name, rows in by_time.items():
        for i in sorted({0, len(rows) // 2, len(rows) - 1}):
            cells = " | ".join(f"{rows[i][metric]:.3f}" for metric in DRIFT_COLUMNS)
            lines.append(f"| {name} | {5 * i}-{5 * i + 5} | {cells} |")
    return "\n".join(lines)


# ---- controls and memory: students ----


class Student(NamedTuple):
    """A trained student, and the window of its streams."""

    file: str  # path without .safetensors; in runs/, also the folder of its training
    window: int  # blocks in the cache, in addition to block 0
    training: str  # the command that trains it, without --run and --out

    @property
    def path(self) -> str:
        return f"{self.file}.safetensors"

    @property
    def command(self) -> str:
        run = f" --run {self.file}" if self.file.startswith("runs/") else ""
        return f"{self.training}{run} --out {self.path}"


SEEDS = 3  # number of training seeds: "NAME", "NAME, seed 1" and "NAME, seed 2"

# A training clip fills a window of 4 exactly if block 0 is one frame, and a window of 3 if block 0
# is a whole second ("4+3k" video latents).
CONTROLS = {
    "stage II": Student("weights/toy_ode_regression", 4, "ode_regression.py"),
    "stage III": Student("weights/toy_self_forcing", 4, "self_forcing.py"),
    "stage II, seed 1": Student("runs/controls/long_ode_regression_1", 4,
        "ode_regression.py --seed 1"),
    "stage III, seed 1": Student("runs/controls/from_long_1", 4,
        "self_forcing.py --student runs/controls/long_ode_regression_1.safetensors --seed 1"),
    "stage II, seed 2": Student("runs/controls/long_ode_regression_2", 4,
        "ode_regression.py --seed 2"),
    "stage III, seed 2": Student("runs/controls/from_long_2", 4,
        "self_forcing.py --student runs/controls/long_ode_regression_2.safetensors --seed 2"),
    "short II": Student("runs/controls/ode_regression_0", 4,
        "ode_regression.py --steps 500 --seed 0"),
    "III from short II": Student("runs/controls/self_forcing_0", 4,
        "self_forcing.py --student runs/controls/ode_regression_0.safetensors --seed 0"),
    "short II, seed 1": Student("runs/controls/ode_regression_1", 4,
        "ode_regression.py --steps 500 --seed 1"),
    "III from short II, seed 1": Student("runs/controls/self_forcing_1", 4,
        "self_forcing.py --student runs/controls/ode_regression_1.safetensors --seed 1"),
    "short II, seed 2": Student("runs/controls/ode_regression_2", 4,
        "ode_regression.py --steps 500 --seed 2"),
    "III from short II, seed 2": Student("runs/controls/self_forcing_2", 4,
        "self_forcing.py --student runs/controls/ode_regression_2.safetensors --seed 2"),
    "III from short II behind the true past": Student("runs/controls/true_history", 4,
        "self_forcing.py --student runs/controls/ode_regression_0.safetensors --history true"),
    "III from short II, own exit for every block": Student("runs/controls/own_exit", 4,
        "self_forcing.py --student runs/controls/ode_regression_0.safetensors --exit own"),
    "III from stage I": Student("runs/controls/from_stage_I", 4,
        "self_forcing.py --student weights/toy_dmd.safetensors"),
}  # fmt: skip
MEMORY = {
    "stage II": Student("weights/toy_ode_regression", 4, "ode_regression.py"),
    "stage II, 4+3k": Student("runs/controls/released_ode_regression", 3,
        "ode_regression.py --config toy_released"),
    "stage II, 4+3k, window 1": Student("runs/controls/released_ode_regression", 1,
        "ode_regression.py --config toy_released"),
    "stage II, 4+3k, past often hidden": Student("runs/controls/hiding_ode_regression", 3,
        "ode_regression.py --config toy_released --windows 0 1 2 3"),
    "stage II, 4+3k, past often hidden, window 1": Student("runs/controls/hiding_ode_regression", 1,
        "ode_regression.py --config toy_released --windows 0 1 2 3"),
    "stage III": Student("weights/toy_self_forcing", 4, "self_forcing.py"),
    "stage III, 4+3k, window 1": Student("runs/controls/released_self_forcing", 1,
        "self_forcing.py --config toy_released --window 1 --student "
        "runs/controls/released_ode_regression.safetensors"),
    "stage III, 4+3k, past often hidden": Student("weights/toy_released_self_forcing", 3,
        "self_forcing.py --config toy_released --window 1 --student "
        "runs/controls/hiding_ode_regression.safetensors --run runs/controls/hiding_self_forcing"),
    "stage III, 4+3k, past often hidden, window 1": Student("weights/toy_released_self_forcing", 1,
        "self_forcing.py --config toy_released --window 1 --student "
        "runs/controls/hiding_ode_regression.safetensors --run runs/controls/hiding_self_forcing"),
    "stage II, 4+3k, past often hidden, window 1, seed 1": Student(
        "runs/controls/hiding_ode_regression_1", 1,
        "ode_regression.py --config toy_released --windows 0 1 2 3 --seed 1"),
    "stage III, 4+3k, past often hidden, window 1, seed 1": Student(
        "runs/controls/hiding_self_forcing_1", 1,
        "self_forcing.py --config toy_released --window 1 --student "
        "runs/controls/hiding_ode_regression_1.safetensors --seed 1"),
}  # fmt: skip
# the students that generate.py streams, by their blocks
SHIPPED = {
    "1+3k": MEMORY["stage III"],
    "4+3k": MEMORY["stage III, 4+3k, past often hidden, window 1"],
}
COMPARED = {"controls": CONTROLS, "memory": MEMORY}


# ---- controls and memory: measurements ----


def compare(args):
    """Measure the first and the last five seconds: {"student, 0-5 s": metrics with intervals}."""
    everyone = COMPARED[args.experiment]
    chosen = {name: everyone[name] for name in cli.chosen(args.only, everyone)}
    missing = [s.command for s in chosen.values() if not Path(cli.weights_path(s.path)).exists()]
    if missing := list(dict.fromkeys(missing)):  # rows may share a student
        raise ValueError(f"train first: {'; '.join(f'python {command}' for command in missing)}")
    codec, measured, results = toy_codec.load(), both_ends(args.clips, args.seconds), {}
    for name, student in chosen.items():
        results |= measured(name, stream_of(student, codec, args.seconds))
    shown = over_seeds(results)
    return results | shown, evaluate.table(shown), plots.draw_rows(shown)


def stream_of(student, codec, seconds):
    """Load a Student; return its streams as a function of clips and seed."""
    net = model.load(cli.weights_path(student.path))
    return partial(evaluate.from_stream, net, codec, seconds, window=student.window)


def both_ends(clips, seconds) -> Callable:
    """Return a function (name, make) that measures the first and the last five seconds of streams.

    make   toy clips, seed -> video, sound
    ->     {"NAME, START-STOP s": metrics with intervals}
    """
    seeds, times = evaluate.held_out(clips), [(0, 5), (seconds - 5, seconds)]
    truth = evaluate.measure_truth(seconds, seeds, times)

    def measured(name, make):
        found = evaluate.measure_all(make, seeds, times, name)
        return {
            f"{name}, {start}-{stop} s": evaluate.with_intervals(w, t, truth[0])
            for (start, stop), w, t in zip(times, found, truth)
        }

    return measured


def over_seeds(results) -> dict:
    """Merge the rows of all training seeds of a student: mean, smallest and largest value."""
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
    """Return [mean, smallest, largest], or None three times if a value is missing."""
    if None in values:
        return [None, None, None]
    return [sum(values) / len(values), min(values), max(values)]


# ---- joint: video and audio apart ----

TEACHER_SIGMAS = teacher.schedule(32)  # as in evaluate.py


def deaf(net, *streams):
    """Return a copy of the model in which these streams get nothing from the other stream."""
    net = copy.deepcopy(net)
    for layer in net.layers:
        for stream in streams:
            # out = W x + b with W = b = 0 adds nothing to the residual stream
            for p in getattr(layer, stream).cross_attn.to_out.parameters():
                p.zero_()
    return net


def put_together(make, clips, seed):
    """Return the videos of clips and the sounds of other clips with the same captions."""
    return make(clips, seed)[0], make(clips, seed + 1)[1]


def joint(args):
    """Measure teacher and stage III, with and without cross-modal attention: {who: metrics}."""
    real, student = load_bidirectional(args.real), model.load(args.student[-1])
    codec, seeds, once = toy_codec.load(), evaluate.held_out(args.clips), [(0, 5)]
    truth = evaluate.measure_truth(5, seeds, once)[0]
    makers = {}
    for who, net, maker in (
        ("teacher", real, lambda n: partial(evaluate.from_teacher, n, codec, TEACHER_SIGMAS)),
        ("stage III", student, lambda n: partial(evaluate.from_stream, n, codec, 5)),
    ):
        net.requires_grad_(False)
        makers |= {
            who: maker(net),
            f"{who}, video deaf (no A2V)": maker(deaf(net, "video")),
            f"{who}, audio deaf (no V2A)": maker(deaf(net, "audio")),
            f"{who}, both deaf": maker(deaf(net, "video", "audio")),
            f"{who}, two clips put together": partial(put_together, maker(net)),
        }
    results = {}
    for name, make in makers.items():
        w = evaluate.measure_all(make, seeds, once, name)[0]
        results[name] = evaluate.with_intervals(w, truth, truth)
    titles = {"f1": "F1", "wall": "sound from the wall that was hit"}
    return results, evaluate.table(results), plots.draw_rows(results, titles)


# ---- pictures ----


def gallery(args):
    """Draw five seconds of one held-out caption by ground truth, teacher and students."""
    students, codec = evaluate.load(args.student), toy_codec.load()
    clips, end = toy_world.draw_clips([toy_world.HELD_OUT + args.clip]), args.seconds - 5
    real = load_bidirectional(args.real)
    sampled = evaluate.from_teacher(real, codec, TEACHER_SIGMAS, clips, 0)
    # (video, sound), and the second from which to draw
    made = {"truth": (evaluate.true_clips(5, clips, 0), 0), "teacher": (sampled, 0)}
    for name, net in students.items():
        made[name] = evaluate.from_stream(net, codec, args.seconds, clips, 0), end
    shown = {name: (video[0], sound[0], start) for name, ((video, sound), start) in made.items()}
    return plots.draw_gallery(toy_world.words_of(clips)[0], shown)


def identity(args):
    """Draw a frame every three seconds: three held-out captions by both students of stage III.

    The two strips of a caption start from the same noise and stand below each other.
    """
    first = toy_world.HELD_OUT + args.clip
    clips, codec = toy_world.draw_clips(range(first, first + 3)), toy_codec.load()
    students = {"1+3k": "stage III", "4+3k": "stage III, 4+3k, past often hidden, window 1"}
    shown = {}
    for blocks, name in students.items():
        videos, _ = stream_of(MEMORY[name], codec, args.seconds)(clips, 0)
        for words, video in zip(toy_world.words_of(clips), videos):
            shown[f"{words}, {blocks}"] = video
    return plots.draw_strips(dict(sorted(shown.items())), per_second=1 / 3, width=10)


# ---- command line ----

TABLES = {"drift": drift, "controls": compare, "memory": compare, "joint": joint}
PICTURES = {"gallery": gallery, "identity": identity}


def check(args):
    """Raise ValueError for options that make no sense, or results that cannot be written."""
    if args.only is not None and args.experiment not in COMPARED:
        raise ValueError(f"--only: for {' and '.join(COMPARED)}; {args.experiment} has no choice")
    kinds = ("png",) if args.experiment in PICTURES else ("json", "md", "png")
    evaluate.check(args.seconds, args.out, kinds)


def main():
    p = cli.parser(__doc__)
    p.add_argument("experiment", choices=(*TABLES, *PICTURES))
    evaluate.add_sizes(p, clips=32, seconds=60)
    cli.add_weights(p, "--student", evaluate.STUDENTS, "weights, by stage", nargs="+")
    cli.add_weights(p, "--real", "weights/toy_teacher.safetensors", "the teacher")
    p.add_argument("--only", nargs="*", metavar="WHO", help="controls, memory: only these students")
    about = "gallery, identity: number of the caption"
    p.add_argument("--clip", type=cli.whole(0, 10**6), default=0, help=about)
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
