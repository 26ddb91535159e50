"""Judge a student network for the open end of the course: good streams in few passes.

The rule: fewest passes a block, the refresh counted, among the entries with F1 >= 0.88 and identity
>= 0.5, both from second 5 to second 10 of 96 held-out clips. So the ball must be remembered for
longer than a training clip lasts. Ties: higher F1. studies/evaluate.py defines F1 and identity
(there: kept).

An entry is a weight file and a number of steps. It may have any training, noise levels, layout,
and window, but not more parameters than the toy's student. generate.py must stream it.

    python -m exercises.leaderboard --weights weights/toy_self_forcing.safetensors --name baseline
    python -m exercises.leaderboard --weights mine.safetensors --steps 2 --window 1 --name mine
    python -m exercises.leaderboard --own      the project's own entries

It prints the verdict, and enters it into leaderboard.json and LEADERBOARD.md, in this folder. For
the last judging, the instructor takes other clips: --first, a number that nobody else knows.
"""

import json
import time
from pathlib import Path

from exercises import behind
from plumbing import cli, files

F1, IDENTITY = 0.88, 0.5  # at least
START, STOP = 5, 10  # seconds
CLIPS = 96
TABLE = Path(__file__).with_name("leaderboard.json")
PAGE = Path(__file__).with_name("LEADERBOARD.md")
OWN = {  # name: weights, steps, window
    "stage II": ("toy_ode_regression", 4, None),
    **{f"stage III, {n} of 4 steps": ("toy_self_forcing", n, None) for n in (4, 2, 1)},
    **{f"released, {n} of 4 steps": ("toy_released_self_forcing", n, 1) for n in (4, 3, 2, 1)},
}


def judge(weights, steps=None, window=None, clips=CLIPS, first=0) -> dict:
    """Stream held-out clips and return the entry: passes a block, F1, identity, and minutes."""
    behind.stand_behind()  # in a hand-out, these modules lack bodies
    import model
    from studies import evaluate
    from toy import codec, detectors

    net, start = check(model.load(weights), weights), time.perf_counter()
    window = evaluate.TRAINED if window is None else window

    def make(clips, seed):
        return evaluate.from_stream(
            net, codec.load(), STOP, clips, seed, window=window, steps=steps
        )

    seeds = [seed + first for seed in evaluate.held_out(clips)]
    (found,) = evaluate.measure_all(make, seeds, [(START, STOP)], Path(weights).stem)
    match = detectors.Match(*found.match.sum(0))
    steps = len(net.cfg.sigmas) - 1 if steps is None else steps
    return {
        "passes": steps + 1,
        "f1": round(float(match.hits / max(1, match.impacts + match.onsets)), 3),
        "identity": round(float(evaluate.identity_kept(found.reference, found.identity)), 3),
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "clips": clips,
    }


def check(net, weights):
    """Raise ValueError for a network that is no toy, or larger than the toy's student."""
    import config
    import model

    most, size = model.build(config.TOY, device="meta").num_parameters(), net.num_parameters()
    if not net.cfg.is_toy or size > most:
        raise ValueError(
            f"--weights {weights}: {size} parameters, expected a toy of at most {most}"
        )
    return net


def is_valid(entry) -> bool:
    # A lack of sound makes the identity NaN, which is not above anything.
    return entry["f1"] >= F1 and entry["identity"] >= IDENTITY


def ranked(entries) -> list[str]:
    """Return the names of all entries, the best first, invalid ones last.

    >>> entry = dict(passes=5, f1=0.9, identity=0.6)
    >>> ranked({"a": entry, "b": entry | {"passes": 2, "f1": 0.8}, "c": entry | {"passes": 4}})
    ['c', 'a', 'b']
    """
    return sorted(
        entries, key=lambda n: (not is_valid(entries[n]), entries[n]["passes"], -entries[n]["f1"])
    )


def page(entries) -> str:
    """Return the table in Markdown."""
    rule = f"Fewest passes a block at F1 ≥ {F1} and identity ≥ {IDENTITY}, from second {START} to "
    rule += f"second {STOP} of {CLIPS} held-out clips."
    head = "place", "entry", "passes a block", "F1", "identity", "minutes of judging"
    lines = [rule, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for place, name in enumerate(ranked(entries), 1):
        e = entries[name]
        place = place if is_valid(e) else "–"
        lines.append(
            f"| {place} | {name} | {e['passes']} | {e['f1']:.3f} | {e['identity']:.3f} | "
            f"{e['minutes']} |"
        )
    return "\n".join(lines) + "\n"


def enter(name, entry):
    """Write an entry into the table; an earlier one of this name is replaced."""
    entries = json.loads(TABLE.read_text("utf-8")) if TABLE.exists() else {}
    files.write_json(TABLE, entries := entries | {name: entry})
    files.write_beside(PAGE, lambda path: path.write_text(page(entries), "utf-8"))
    verdict = f"place {ranked(entries).index(name) + 1}" if is_valid(entry) else "not valid"
    found = f"{entry['passes']} passes a block, F1 {entry['f1']}, identity {entry['identity']}"
    return f"{name}: {found}: {verdict}"


def main():
    p = cli.parser(__doc__)
    cli.add_weights(p, "--weights", None, "the entry")
    about = "passes a block, besides the refresh; default: as trained"
    p.add_argument("--steps", type=cli.whole(1, 100), help=about)
    about = "blocks in the cache; default: as in training"
    p.add_argument("--window", type=cli.whole(1, 1000), help=about)
    p.add_argument("--name", help="of the entry in the table; default: that of the file")
    p.add_argument("--clips", type=cli.whole(2, 10**4), default=CLIPS, help="held-out clips")
    about = "number of the first held-out clip"
    p.add_argument("--first", type=cli.whole(0, 10**5), default=0, help=about)
    p.add_argument("--own", action="store_true", help="judge the project's own entries")
    args = p.parse_args()
    if not (args.own or args.weights):
        raise ValueError("--weights FILE is missing; or judge the project's own entries: --own")
    name = args.name or Path(args.weights or "").stem
    entries = {name: (args.weights, args.steps, args.window)}
    if args.own:
        entries = {
            name: (cli.weights_path(f"weights/{file}.safetensors"), *rest)
            for name, (file, *rest) in OWN.items()
        }
    for name, entry in entries.items():
        print(enter(name, judge(*entry, args.clips, args.first)), flush=True)


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
