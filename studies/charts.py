"""Charts of results: loss curves, metrics along a stream, bars of ablations; and who imports whom.

Palette, `save` and `show` are those of `studies/plots.py`, which draws masks and clips.

    python -m studies.plots losses     writes results/*_curve.png from the logs of the trainings
    python -m studies.plots imports    writes assets/imports.png: who imports whom, in reading order
    python -m studies.plots --help
"""

import ast
import json
import re
from pathlib import Path

import numpy as np

from plumbing import cli
from studies.plots import AUDIO, CURVES, SINK, VIDEO, plt, save

# ---- trainings ----


def draw_loss(log, title):
    """Loss curves of a training log, a list of {"step": .., name: ..}."""
    figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    steps = [row["step"] for row in log]
    for name in log[0]:
        if name not in ("step", "norm", "loss"):
            colour = {"video": VIDEO, "audio": AUDIO}.get(name, SINK)
            style = {"low": ":", "mid": "--", "high": "-."}.get(name, "-")
            label = {"low": "video, sigma < .4", "mid": "video, .4 - .7", "high": "video, > .7"}
            values = [row[name] for row in log]
            ax.plot(steps, values, style, color=colour, lw=1.2, label=label.get(name, name))
    ax.set(xlabel="step", ylabel="loss", yscale="log", title=title)
    ax.legend(fontsize=7)
    ax.grid(alpha=0.3)
    return figure


def draw_losses(folder="results"):
    """Draw every curve that a training has left there."""
    for path in sorted(Path(folder).glob("*_curve.json")):
        name = path.stem.removesuffix("_curve")
        save(draw_loss(json.loads(path.read_text()), name), path.with_suffix(".png"))
        print(f"wrote {path.with_suffix('.png')}")


# ---- evaluation and ablations ----

DRIFT = {  # metric: label and range
    "f1": ("F1", (0, 1.02)),
    "impacts_rate": ("impacts / truth", (0, 1.25)),
    "onsets_rate": ("onsets / truth", (0, 1.25)),
    "caption": ("caption shown", (0, 1.02)),
    "whole": ("one whole ball", (0, 1.02)),
    "kept": ("identity kept", (-0.1, 1.02)),
}


def draw_drift(by_time, step=1):
    """Metrics along the stream: {name: [metrics of the first `step` seconds, the next, ...]}.

    name   "student", or "student, condition": a line style each student, a colour each condition
    """
    students, conditions = (
        list(dict.fromkeys(x)) for x in zip(*(n.partition(", ")[::2] for n in by_time))
    )
    figure, axes = plt.subplots(2, 3, figsize=(12.5, 5), layout="constrained", sharex=True)
    for ax, (metric, (label, limits)) in zip(axes.flat, DRIFT.items()):
        for name, windows in by_time.items():
            student, _, condition = name.partition(", ")
            line, colour = students.index(student), conditions.index(condition)
            colour = line if len(conditions) == 1 else colour
            ax.plot(
                (np.arange(len(windows)) + 0.5) * step, [w[metric] for w in windows],
                ("--", "-", ":")[line % 3], color=CURVES[colour % len(CURVES)], label=name, lw=1.3,
            )  # fmt: skip
        ax.set(title=label, ylim=limits)
        ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.set_xlabel("second of the stream")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _bars(ax, values, names, title, **more):
    """Horizontal bars, one for each name."""
    ax.barh(range(len(values)), values, color=SINK, **more)
    ax.set(title=title, yticks=range(len(values)), yticklabels=names)
    ax.grid(alpha=0.3, axis="x")


def draw_joint(results):
    """How well picture and sound belong together, of {name: {metric: [value, low, high]}}."""
    return _draw_rows(results, {"f1": "F1", "wall": "sound from the wall that was hit"})


def draw_streams(results):
    """What becomes of streams, of {name: {metric: [value, low, high]}}."""
    shown = {
        "f1": "F1",
        "onsets_rate": "onsets, share of the truth's",
        "kept": "identity kept",
        "spread": "spread of identities",
    }
    return _draw_rows(results, shown)


def _draw_rows(results, shown):
    """Bars with intervals; `shown` has a title for every metric."""
    size = 3 + 3.5 * len(shown), 1.2 + 0.24 * len(results)
    figure, axes = plt.subplots(1, len(shown), figsize=size, layout="constrained", sharey=True)
    for ax, (metric, title) in zip(axes, shown.items()):
        values = np.array([row[metric] for row in results.values()], dtype=float)
        _bars(ax, values[:, 0], results, title, xerr=np.abs(values[:, 1:] - values[:, :1]).T)
        ax.set_xlim(0, np.nanmax(values, initial=1.05))  # bars with their intervals
    axes[0].invert_yaxis()
    return figure


def draw_sinks(results):
    """Bars of a sink ablation, {variant: {"max_norm": .., "loss": .., ...}}; no bar: broke down."""
    shown = ("max_norm", "a0_norm", "loss", "entropy", "share")
    figure, axes = plt.subplots(1, 5, figsize=(13, 5), layout="constrained", sharey=True)
    for ax, column in zip(axes, shown):
        values = [row.get(column, np.nan) for row in results.values()]
        _bars(ax, values, results, column.replace("_", " "))
        if column.endswith("norm") and np.isfinite(values).any():
            ax.set_xscale("log")
    axes[0].invert_yaxis()
    return figure


# ---- the house ----


def reading_order(readme="README.md") -> list[str]:
    """Names of the modules in the order of README's table of files."""
    return re.findall(r"^\| `(\w+)\.py`", Path(readme).read_text(), re.M)


def imports_of(path) -> set[str]:
    """Names of the modules that a Python file imports."""
    nodes = list(ast.walk(ast.parse(Path(path).read_text())))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return set(plain + [node.module for node in nodes if isinstance(node, ast.ImportFrom)])


def draw_imports(order):
    """Modules from top to bottom, an arc from each one up to what it imports."""
    figure, ax = plt.subplots(figsize=(6, 0.27 * len(order)), layout="constrained")
    turn = np.linspace(-np.pi / 2, np.pi / 2, 40)
    for i, name in enumerate(order):
        ax.text(-0.2, i, name, ha="right", va="center", fontsize=9)
        for j in (order.index(other) for other in imports_of(f"{name}.py") & set(order)):
            colour = CURVES[j % len(CURVES)]
            ax.plot(0.3 * abs(i - j) * np.cos(turn), (i + j + (i - j) * np.sin(turn)) / 2,
                    color=colour, lw=0.8)  # fmt: skip
    ax.set(xlim=(-5, 0.3 * len(order)), ylim=(len(order), -1))
    ax.axis("off")
    return figure


def main():
    p = cli.parser(__doc__)
    p.add_argument("chart", choices=("losses", "imports"), help="what to draw")
    p.add_argument("--out", default="assets/imports.png", help="imports: picture to write")
    args = p.parse_args()
    if args.chart == "losses":
        draw_losses()
    else:
        save(draw_imports(reading_order()), args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
