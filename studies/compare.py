"""What does each part buy?  One thing changed at a time, all else and every seed the same.

    python -m studies.compare drift     a minute of streaming by stages II and III: smaller and larger
                                    windows, fewer passes, no refresh, nothing pinned
    python -m studies.compare controls  what of stage III is due to self-forcing? The same training
                                    behind the true past, from a shorter stage II and from stage I,
                                    and with other seeds; names the trainings that must run first
    python -m studies.compare memory    does a stream remember its identity for longer if block 0 is a
                                    whole second, or if training often hides the near past?
    python -m studies.compare joint     what the two streams hear of each other is switched off, or two
                                    clips are put together that were made apart
    python -m studies.compare gallery   what to look at: truth, teacher, and the last five seconds of a
                                    minute by the students of stages II and III
    python -m studies.compare identity  a minute by both shipped students of stage III, of which one
                                    keeps its identity

Each writes results/NAME.json, .md and .png; the last two only assets/NAME.png. Nothing is trained
here; `studies/ablations.py` is for questions that need a training.

Metrics are those of `studies/evaluate.py`, but for what they are compared with. Frechet distances are to
the first five seconds of the true clips of the same captions, so they cannot be compared with its
own. Shares of events and spread are of these true clips in the very seconds that are judged.
"""

import copy
from functools import partial
from pathlib import Path
from typing import NamedTuple

import config
import model
import teacher
from plumbing import cli
from studies import charts, evaluate, plots
from toy import codec as toy_codec
from toy import world as toy_world

# ---- drift ----

STREAMS = {  # what is changed; see evaluate.streams_of
    "window 4": dict(window=4),
    "window 2": dict(window=2),
    "window 8": dict(window=8),
    "2 steps": dict(steps=2),
    "1 step": dict(steps=1),
    "nothing pinned": dict(pinned=False),
}
NO_REFRESH = "no refresh"
SHOWN = ("f1", "impacts_rate", "onsets_rate", "caption", "whole", "kept")


def drift(args):
    """{student, stream: [metrics of seconds 0-5, 5-10, ...]}."""
    students, codec = evaluate.load(args.student), toy_codec.load()
    seeds, windows = evaluate.held_out(args.clips), evaluate.five_second_windows(args.seconds)
    true = partial(evaluate.true_clips, args.seconds)
    truth = evaluate.judge(true, seeds, windows, "truth")
    by_time = {}
    for stage, net in students.items():
        for name, changed in (STREAMS | {NO_REFRESH: {}}).items():
            streamed = without_refresh(net) if name == NO_REFRESH else net
            make = evaluate.streams_of(streamed, codec, args.seconds, **changed)
            judged = evaluate.judge(make, seeds, windows, f"{stage}, {name}")
            rows = [evaluate.metrics(w, t, truth[0]) for w, t in zip(judged, truth)]
            by_time[f"{stage}, {name}"] = rows
    return by_time, drift_table(by_time), charts.draw_drift(by_time, step=5)


def without_refresh(net):
    """A copy whose finished blocks keep the keys and values that their last, noisy pass wrote."""
    net = copy.copy(net)
    forward = net.forward

    def unless_clean(video, audio, sigma, *rest):
        return forward(video, audio, sigma, *rest) if sigma.any() else (video, audio)

    net.forward = unless_clean
    return net


def drift_table(by_time) -> str:
    """First, middle and last five seconds of every stream."""
    lines = ["| stream | seconds | " + " | ".join(SHOWN) + " |", "|---|---|" + "---|" * len(SHOWN)]
    for name, rows in by_time.items():
        for i in sorted({0, len(rows) // 2, len(rows) - 1}):
            cells = " | ".join(f"{rows[i][metric]:.3f}" for metric in SHOWN)
            lines.append(f"| {name} | {5 * i}-{5 * i + 5} | {cells} |")
    return "\n".join(lines)


# ---- controls ----

# windows that remember all of a training clip of five seconds, with either kind of block 0
WHOLE, WHOLE_RELEASED = map(teacher.trained_window, (config.TOY, config.TOY_RELEASED))


class Student(NamedTuple):
    """Whose streams are compared."""

    path: str  # of the weights
    command: str  # that makes them
    window: int = WHOLE  # of the streams


def trained(name, command, window=WHOLE, path=None) -> Student:
    """One that the full run of `studies/reproduce.py` does not make."""
    path = path or f"runs/controls/{name}.safetensors"
    return Student(path, f"{command} --run runs/controls/{name} --out {path}", window)


SEEDS = 3
FEW = 500  # steps of stage II, a fifth of the shipped one's


def both_stages(names, files, seed, options=("", ""), window=WHOLE) -> dict:
    """Stages II and III once more, with a seed of their own: {name: Student}."""
    second, third = (f"{file}_{seed}" for file in files)
    in_second, in_third = options
    second = trained(second, f"ode_regression.py{in_second} --seed {seed}", window)
    how = f"self_forcing.py{in_third} --student {second.path} --seed {seed}"
    third = trained(third, how, window)
    return {seeded(name, seed): student for name, student in zip(names, (second, third))}


def seeded(name, seed) -> str:
    """The name of a student that was trained with this seed."""
    return f"{name}, seed {seed}" if seed else name


# names of the two students, and of their files
SHIPPED = ("stage II", "stage III"), ("long_ode_regression", "from_long")
SHORT = ("short II", "III from short II"), ("ode_regression", "self_forcing")
FROM_SHORT = "self_forcing.py --student runs/controls/ode_regression_0.safetensors"
CHANGED = {  # one thing each: file, command
    "III from short II behind the true past": ("true_history", f"{FROM_SHORT} --history true"),
    "III from short II, own exit for every block": ("own_exit", f"{FROM_SHORT} --exit own"),
    "III from stage I": ("from_stage_I", "self_forcing.py --student weights/toy_dmd.safetensors"),
}


def students() -> dict:
    """Who is compared by `controls`."""
    commands = "ode_regression.py", "self_forcing.py"
    found = dict(zip(SHIPPED[0], map(Student, evaluate.STUDENTS, commands)))
    for seed in range(1, SEEDS):
        found |= both_stages(*SHIPPED, seed)
    for seed in range(SEEDS):
        found |= both_stages(*SHORT, seed, (f" --steps {FEW}", ""))
    return found | {name: trained(*how) for name, how in CHANGED.items()}


CONTROLS = students()

# ---- memory ----

RELEASED = " --config toy_released"  # block 0 is a whole second: "4+3k" video latents
HIDING = f"{RELEASED} --windows 0 1 2 3", f"{RELEASED} --window 1"  # options of stages II and III
HIDDEN = "stage II, 4+3k, past often hidden", "stage III, 4+3k, past often hidden"
REMEMBERING = f"{HIDDEN[1]}, window 1"  # what keeps its identity best
SHIPPED_RELEASED = "weights/toy_released_self_forcing.safetensors"  # its weights


def memory() -> dict:
    """Who is compared by `memory`: one thing after the other is changed, in training or streaming.

    In training: a whole second in block 0; near pasts hidden. In streaming: a window of one block.
    """
    second, hiding = "released_ode_regression", ("hiding_ode_regression", "hiding_self_forcing")
    seen = trained(second, f"ode_regression.py{RELEASED}", WHOLE_RELEASED)
    hidden = trained(hiding[0], f"ode_regression.py{HIDING[0]}", WHOLE_RELEASED)
    how = f"self_forcing.py{HIDING[1]} --student {hidden.path}"
    third = trained(hiding[1], how, WHOLE_RELEASED, SHIPPED_RELEASED)
    found = {
        "stage II": CONTROLS["stage II"],
        "stage II, 4+3k": seen,
        "stage II, 4+3k, window 1": seen._replace(window=1),
        HIDDEN[0]: hidden,
        f"{HIDDEN[0]}, window 1": hidden._replace(window=1),
        "stage III": CONTROLS["stage III"],
        HIDDEN[1]: third,
        REMEMBERING: third._replace(window=1),
    }
    names = f"{HIDDEN[0]}, window 1", REMEMBERING
    return found | both_stages(names, hiding, 1, HIDING, window=1)


MEMORY = memory()

# ---- controls and memory: how they are compared ----

COMPARED = {"controls": CONTROLS, "memory": MEMORY}


def compare(args):
    """{student, seconds: metrics with intervals} of the first and the last five seconds."""
    everyone = COMPARED[args.experiment]
    chosen = {name: everyone[name] for name in cli.chosen(args.only, everyone)}
    if missing := [s.command for s in chosen.values() if not Path(s.path).exists()]:
        raise ValueError(f"train first: {'; '.join(f'python {how}' for how in missing)}")
    codec, seeds = toy_codec.load(), evaluate.held_out(args.clips)
    windows = [(0, 5), (args.seconds - 5, args.seconds)]
    truth = evaluate.judge(partial(evaluate.true_clips, args.seconds), seeds, windows, "truth")
    results = {}
    for name, student in chosen.items():
        make = streams(student, codec, args.seconds)
        results |= by_window(name, make, seeds, windows, truth)
    shown = over_seeds(results)
    return results | shown, evaluate.table(shown), charts.draw_streams(shown)


def streams(student, codec, seconds):
    """What a Student makes, as a function for `evaluate.judge`."""
    net = model.load(student.path)
    return evaluate.streams_of(net, codec, seconds, window=student.window)


def by_window(name, make, seeds, windows, truth) -> dict:
    """{"NAME, START-STOP s": metrics with intervals} of what `make` makes, beside the truth's."""
    judged = evaluate.judge(make, seeds, windows, name)
    return {
        f"{name}, {start}-{stop} s": evaluate.with_intervals(w, t, truth[0])
        for (start, stop), w, t in zip(windows, judged, truth)
    }


def over_seeds(results) -> dict:
    """A student of several training seeds becomes one row, their mean; ± is half of their range."""
    shown, pooled = {}, set()
    for name, row in results.items():
        student, _, seconds = name.rpartition(", ")
        others = [f"{seeded(student, s)}, {seconds}" for s in range(1, SEEDS)]
        if others := [other for other in others if other in results]:
            rows = [row, *(results[other] for other in others)]
            mean = {metric: over([r[metric][0] for r in rows]) for metric in row}
            shown[f"{student}, {1 + len(others)} seeds, {seconds}"] = mean
            pooled.update(others)
        elif name not in pooled:
            shown[name] = row
    return shown


def over(values):
    """[mean, least, most]; nothing if one of them is missing (no sound at all, say)."""
    if None in values:
        return [None, None, None]
    return [sum(values) / len(values), min(values), max(values)]


# ---- what joint means ----

WALK = teacher.schedule(32)  # the teacher's noise levels, as in studies/evaluate.py


def deaf(net, *streams):
    """A copy of a model in which these streams hear nothing of the other one."""
    net = copy.deepcopy(net)
    for stream in streams:
        for layer in getattr(net, stream).layers:
            for p in layer.cross_attn.to_out.parameters():
                p.zero_()
    return net


def put_together(make, clips, seed):
    """The pictures of one clip with the sound of another of the same caption."""
    return make(clips, seed)[0], make(clips, seed + 1)[1]


def joint(args):
    """{who: metrics}: teacher and stage III as they are, deaf in one or both streams, and apart."""
    codec, seeds = toy_codec.load(), evaluate.held_out(args.clips)
    once = evaluate.five_second_windows(evaluate.WINDOW)
    truth = evaluate.judge(partial(evaluate.true_clips, 5), seeds, once, "truth")[0]
    makers = {
        "teacher": (args.real, lambda net: partial(evaluate.from_teacher, net, codec, WALK)),
        "stage III": (args.student[-1], lambda net: evaluate.streams_of(net, codec, 5)),
    }
    results = {}
    for who, (path, maker) in makers.items():
        net = model.load(path).requires_grad_(False)
        makes = {
            who: maker(net),
            f"{who}, video deaf (no A2V)": maker(deaf(net, "video")),
            f"{who}, audio deaf (no V2A)": maker(deaf(net, "audio")),
            f"{who}, both deaf": maker(deaf(net, "video", "audio")),
            f"{who}, two clips put together": partial(put_together, maker(net)),
        }
        for name, make in makes.items():
            w = evaluate.judge(make, seeds, once, name)[0]
            results[name] = evaluate.with_intervals(w, truth, truth)
    return results, evaluate.table(results), charts.draw_joint(results)


# ---- something to look at ----


def gallery(args):
    """A held-out caption, five seconds each: frames and sound."""
    students, codec = evaluate.load(args.student), toy_codec.load()
    clips = toy_world.draw_clips([toy_world.HELD_OUT + args.clip])
    shown = {"truth": (*evaluate.true_clips(5, clips, 0), 0)}
    teacher_clip = evaluate.from_teacher(model.load(args.real), codec, WALK, clips, 0)
    shown["teacher"] = (*teacher_clip, 0)
    for name, net in students.items():
        stream = evaluate.streams_of(net, codec, args.seconds)(clips, 0)
        shown[name] = (*stream, args.seconds - 5)
    firsts = {name: (video[0], sound[0], at) for name, (video, sound, at) in shown.items()}
    return plots.draw_gallery(toy_world.words_of(clips)[0], firsts)


def identity(args):
    """Three held-out captions by both shipped students of stage III: a frame every three seconds.

    Strips of a caption begin at the same noise, and stand one below the other.
    """
    first = toy_world.HELD_OUT + args.clip
    clips, codec = toy_world.draw_clips(range(first, first + 3)), toy_codec.load()
    shown = {}
    for blocks, student in (("1+3k", MEMORY["stage III"]), ("4+3k", MEMORY[REMEMBERING])):
        films, _ = streams(student, codec, args.seconds)(clips, 0)
        captions = toy_world.words_of(clips)
        shown |= {f"{words}, {blocks}": film for words, film in zip(captions, films)}
    return plots.draw_strips(dict(sorted(shown.items())), per_second=1 / 3)


# ---- command line ----


def check(args):
    """Raises ValueError for what cannot be judged, compared, shown or written."""
    evaluate.check(args)
    if args.only is not None and args.experiment not in COMPARED:
        raise ValueError(f"--only: for {' and '.join(COMPARED)}; {args.experiment} has no choice")
    if args.clip < 0:
        raise ValueError(f"--clip {args.clip}: expected 0 or more")
    evaluate.check_out(args.out, ("png",) if args.experiment in PICTURES else ("json", "md", "png"))


def main():
    p = cli.parser(__doc__)
    p.add_argument("experiment", choices=(*EXPERIMENTS, *PICTURES))
    p.add_argument("--clips", type=int, default=32, help="held-out clips a row")
    p.add_argument("--seconds", type=int, default=60, help="of the streams, in fives")
    p.add_argument(
        "--student", nargs="+", default=evaluate.STUDENTS, help="weights, stage by stage"
    )
    p.add_argument("--real", default="weights/toy_teacher.safetensors", help="the teacher")
    p.add_argument("--only", nargs="*", metavar="WHO", help="controls, memory: only these")
    p.add_argument("--clip", type=int, default=0, help="gallery, identity: which held-out caption")
    p.add_argument("--out", help="default results/EXPERIMENT")
    args = p.parse_args()
    args.command = cli.command(p, args, ("experiment", "out")) + f" -- {args.experiment}"
    folder = "assets" if args.experiment in PICTURES else "results"
    args.out = args.out or f"{folder}/{args.experiment}"
    check(args)
    if args.experiment in EXPERIMENTS:
        results, table, figure = EXPERIMENTS[args.experiment](args)
        evaluate.write(args, {"result": results}, table, figure)
    else:
        plots.save(PICTURES[args.experiment](args), f"{args.out}.png")
        print(f"wrote {args.out}.png")


EXPERIMENTS = {"drift": drift, "controls": compare, "memory": compare, "joint": joint}
PICTURES = {"gallery": gallery, "identity": identity}

if __name__ == "__main__":
    cli.run(main)
