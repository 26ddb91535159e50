"""All pictures except the contact sheet: masks, caches, clips, attention, curves, bars of results.

Most functions return a figure in the palette of film/sheet.py. A notebook shows it with any backend
if the last line of a cell is `show(figure)`.

    python -m studies.plots masks      assets/masks.png: the paper's figure of the four masks
    python -m studies.plots losses     results/NAME_curve.png for every training log there
    python -m studies.plots --help
"""

import base64
import io
import json
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

import config
import masks
from film.sheet import AUDIO, SINK, VIDEO, clip_events, draw_stretch, draw_strip, plt, save
from film.sheet import draw_clip as draw_clip  # notebooks take all pictures from this file
from plumbing import cli

# for everything that is neither video, audio nor sink
CURVES = ("#1b9e77", "#7570b3", "#e7298a", "#555555", "#a6761d", "#66a61e", "#1f9bcf")
TITLES = {
    "video_self": "video self-attention",
    "audio_self": "audio self-attention",
    "a2v": "A2V: video queries, audio keys",
    "v2a": "V2A: audio queries, video keys",
}


# ---- in a notebook ----


class Picture:
    """A PNG for a notebook: Jupyter and notebooks/run.py call `_repr_png_`."""

    def __init__(self, png):
        self.png = png

    def _repr_png_(self):
        return self.png

    def __repr__(self):
        return f"<picture, {len(self.png) // 1000} kB>"


def show(figure, dpi=80, size=1.0) -> Picture:
    """Close a figure and return it as a picture, for the last line of a notebook cell.

    size   factor of the figure's size, but not of its text, which stays readable
    """
    width, height = figure.get_size_inches()
    if size != 1:
        figure.set_size_inches(width * size, height * size + 0.2)  # room for the labels below
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    plt.close(figure)
    # 192 colours are enough; they make the file of the notebook a third as large
    Image.open(drawn).convert("RGB").quantize(192).save(small, "png", optimize=True)
    return Picture(small.getvalue())


class Film:
    """An mp4 that plays inside a notebook, which stores it as base64."""

    def __init__(self, path, width=320):
        self.mp4, self.width = Path(path).read_bytes(), width

    def _repr_html_(self):
        source = f"data:video/mp4;base64,{base64.b64encode(self.mp4).decode()}"
        return f'<video controls loop width="{self.width}" src="{source}"></video>'

    def __repr__(self):
        return f"<film, {len(self.mp4) // 1000} kB>"


# ---- masks and caches ----


def draw_masks(cfg, blocks=4, window=None):
    """Draw the four masks of a clip, coloured by the stream of the key; lines mark blocks."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 9), layout="constrained")
    all_masks = masks.four_masks(cfg, blocks, window)
    video, audio = masks.video_token_blocks(blocks, cfg), masks.audio_token_blocks(blocks, cfg)
    for ax, site in zip(axes.flat, masks.SITES):
        from_video = site in ("video_self", "a2v")  # the queries
        to_video = site in ("video_self", "v2a")  # the keys
        image = np.ones((*all_masks[site].shape, 3))
        image[all_masks[site].numpy()] = matplotlib.colors.to_rgb(VIDEO if to_video else AUDIO)
        if not to_video:
            sinks = all_masks[site].numpy().copy()
            sinks[:, cfg.num_sinks :] = False
            image[sinks] = matplotlib.colors.to_rgb(SINK)
        ax.imshow(image, interpolation="nearest", aspect="auto")
        _mark_blocks(ax, video if from_video else audio, video if to_video else audio, cfg)
        ax.set(title=TITLES[site], xlabel="key", ylabel="query")
    figure.suptitle(f"{cfg.name}: {blocks} blocks, S = {cfg.num_sinks} sinks (grey) in block 0")
    return figure


def _mark_blocks(ax, rows, columns, cfg):
    """Draw lines at block borders, and label blocks with their seconds."""
    for blocks, line, axis in ((rows, ax.axhline, ax.yaxis), (columns, ax.axvline, ax.xaxis)):
        starts = (blocks[1:] != blocks[:-1]).nonzero()[:, 0] + 1
        for start in starts.tolist():
            line(start - 0.5, color="black", lw=0.8)
        edges = [0, *starts.tolist(), len(blocks)]
        names = []
        for k in range(len(edges) - 1):
            low, high = masks.block_interval(k, cfg)
            names.append(f"B{k}\n{low:g}-{high:g} s" if k else "B0")
        axis.set_ticks([(a + b) / 2 - 0.5 for a, b in zip(edges, edges[1:])], names, fontsize=7)


def draw_slots(moments):
    """Draw the blocks in the slots of a cache: {moment: [block in slot 0, block in slot 1, ...]}.

    Slot 0, with the pinned block 0, is grey. The newest block has a frame.
    """
    width = max(map(len, moments.values()))
    size = 0.6 * width + 2.2, 0.42 * len(moments) + 0.7
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    for row, blocks in enumerate(moments.values()):
        for slot, block in enumerate(blocks):
            # the frame of the newest block lies over its neighbours
            edge, zorder = ("black", 2) if block == max(blocks) else ("white", 1)
            fill, place = VIDEO if slot else SINK, (slot - 0.44, row - 0.4)
            ax.add_patch(plt.Rectangle(place, 0.88, 0.8, lw=2, fc=fill, ec=edge, zorder=zorder))
            ax.text(slot, row, str(block), ha="center", va="center", color="white", zorder=3)
    ax.set(xlim=(-0.6, width - 0.4), ylim=(len(moments) - 0.4, -0.6), xlabel="slot of the cache")
    ax.set_xticks(range(width))
    ax.set_yticks(range(len(moments)), moments)
    return figure


# ---- clips ----


def draw_gallery(title, clips, seconds=5, per_second=4, cfg=config.TOY):
    """Draw `seconds` of several clips: {name: (frames, levels, second to start at)}."""
    figure, axes = plt.subplots(
        2 * len(clips), 1, figsize=(1.8 * seconds + 1.4, 1.5 * len(clips) + 0.8),
        gridspec_kw={"height_ratios": [0.45, 0.9] * len(clips)}, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for i, (name, (frames, sound, start)) in enumerate(clips.items()):
        pair, events = axes[2 * i : 2 * i + 2, 0], clip_events(frames, sound, cfg)
        draw_stretch(pair, frames, sound, events, start, seconds, per_second, cfg)
        pair[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle(title)
    return figure


def draw_strips(clips, per_second=3, cfg=config.TOY, width=6.5):
    """Draw the frames of clips below each other: {label: frames (P, 3, H, W) in [0, 1]}."""
    seconds = max(1 / per_second, max(len(f) - 1 for f in clips.values()) / cfg.fps)
    # inches: a letter of a label takes about 0.075, and pictures are about as high as wide
    height = (width - 0.075 * max(map(len, clips))) / (seconds * per_second) + 0.06
    size = width, 0.5 + len(clips) * height
    figure, axes = plt.subplots(len(clips), 1, figsize=size, squeeze=False, layout="constrained")
    for ax, (label, frames) in zip(axes[:, 0], clips.items()):
        draw_strip(ax, frames, 0, seconds, per_second, cfg)
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    ticks = np.arange(int(seconds) + 1, step=max(1, int(seconds) // 12))
    axes[-1, 0].set_xticks(ticks, ticks, fontsize=9)
    axes[-1, 0].set_xlabel("seconds", fontsize=9)
    return figure


# ---- attention, and other tables of numbers ----


def draw_maps(
    maps, colour=VIDEO, xlabel="key", ylabel="query", extent=None, numbers=False, marks=()
):
    """Draw tables of numbers side by side, zero in white: {title: (rows, columns)}.

    colour    one for all tables, or a list with one for each
    extent    (left, right, bottom, top) in the units of the labels; default: row and column
    numbers   True: write each number into its field
    marks     positions to mark with a line on both axes
    """
    colours = [colour] * len(maps) if isinstance(colour, str) else colour
    size = min(11, 4.6 * len(maps)), 3.8
    figure, axes = plt.subplots(1, len(maps), figsize=size, squeeze=False, layout="constrained")
    for ax, (title, values), tint in zip(axes[0], maps.items(), colours):
        shades = matplotlib.colors.LinearSegmentedColormap.from_list("shades", ["white", tint])
        values = torch.as_tensor(values)
        image = ax.imshow(
            values, cmap=shades, vmin=0, extent=extent, aspect="auto", interpolation="nearest"
        )
        figure.colorbar(image, ax=ax, shrink=0.8)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        for (row, column), value in np.ndenumerate(values.numpy()) if numbers else ():
            ax.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=8)
        for position in marks:
            ax.axvline(position, color="black", lw=0.5, ls=":")
            ax.axhline(position, color="black", lw=0.5, ls=":")
    return figure


# ---- curves ----


def draw_lines(lines, xlabel, ylabel, title="", **limits):
    """Draw curves into one picture: {label: values} or {label: (x, values)}.

    limits   further settings of the axes, e.g. ylim=(0, 1), yscale="log"
    """
    figure, ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for i, (label, values) in enumerate(lines.items()):
        x, y = values if isinstance(values, tuple) else (range(len(values)), values)
        colour = {"video": VIDEO, "audio": AUDIO}.get(label, CURVES[i % len(CURVES)])
        ax.plot(x, y, "o-", ms=3, lw=1.2, label=label, color=colour)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title, **limits)
    ax.grid(alpha=0.3)
    if len(lines) > 1:
        ax.legend(fontsize=8)
    return figure


def draw_plane(panels, arrows=None, reach=4.0):
    """Draw points of the plane, one panel for each title: {title: {label: (n, 2)}}.

    arrows   {title: (positions (n, 2), directions (n, 2))}
    """
    size = 3.5 * len(panels), 3.6
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for ax, (title, sets) in zip(axes[0], panels.items()):
        for (label, points), colour in zip(sets.items(), CURVES):
            ax.plot(*torch.as_tensor(points).T, ".", ms=3, alpha=0.5, color=colour, label=label)
        if arrows and title in arrows:
            positions, directions = (torch.as_tensor(a).T for a in arrows[title])
            ax.quiver(*positions, *directions, color="black", width=0.005, angles="xy")
        ax.set(title=title, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        ax.legend(fontsize=7, loc="lower left", markerscale=4)
    return figure


def draw_calls(calls):
    """Draw the passes of a rollout in order: (block, sigma, has_gradient); sigma 0 is a refresh."""
    figure, ax = plt.subplots(figsize=(9, 2.8), layout="constrained")
    for i, (block, sigma, has_gradient) in enumerate(calls):
        colour = CURVES[2 if has_gradient else 3 if sigma == 0 else 0]
        ax.bar(i, sigma + 0.03, color=colour)  # + 0.03: a refresh is visible, too
        if i == 0 or calls[i - 1][0] != block:
            ax.axvline(i - 0.5, color="black", lw=0.8)
            ax.text(i - 0.4, 1.08, f"block {block}", fontsize=8)
    for label, i in {"no gradient": 0, "gradient": 2, "refresh at sigma = 0": 3}.items():
        ax.bar(0, 0, color=CURVES[i], label=label)
    ax.set(xlabel="pass", ylabel="sigma", ylim=(0, 1.2))
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


# ---- trainings ----

LOSSES = {  # columns of a training log: label, line and colour
    "video": ("video", "-", VIDEO),
    "audio": ("audio", "-", AUDIO),
    "low": ("video, sigma < .4", ":", SINK),
    "mid": ("video, .4 - .7", "--", SINK),
    "high": ("video, > .7", "-.", SINK),
    "critic v": ("critic, video", "--", VIDEO),
    "critic a": ("critic, audio", "--", AUDIO),
}


def draw_loss(log, title):
    """Draw the losses of a training log, a list of {"step": .., name: ..}."""
    figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    steps = [row["step"] for row in log]
    for name, (label, line, colour) in LOSSES.items():
        if name in log[0]:
            ax.plot(steps, [row[name] for row in log], line, color=colour, lw=1.2, label=label)
    ax.set(xlabel="step", ylabel="loss", yscale="log", title=title)
    ax.legend(fontsize=7)
    ax.grid(alpha=0.3)
    return figure


def draw_losses(folder="results"):
    """Draw every training log of the folder into a PNG."""
    for path in sorted(Path(folder).glob("*_curve.json")):
        name = path.stem.removesuffix("_curve")
        save(draw_loss(json.loads(path.read_text("utf-8")), name), path.with_suffix(".png"))
        print(f"wrote {path.with_suffix('.png')}")


# ---- evaluation and ablations ----

DRIFT = {  # metric: label and limits of the axis
    "f1": ("F1", (0, 1.02)),
    "impacts_rate": ("impacts / truth", (0, 1.25)),
    "onsets_rate": ("onsets / truth", (0, 1.25)),
    "caption": ("caption shown", (0, 1.02)),
    "whole": ("one whole ball", (0, 1.02)),
    "kept": ("identity kept", (-0.1, 1.02)),
}


def draw_drift(by_time, step=1):
    """Draw metrics along streams: {name: [metrics of the first `step` seconds, the next, ...]}.

    name   "student", or "student, condition": each student has a line, each condition a colour
    """
    students, conditions = (
        list(dict.fromkeys(x)) for x in zip(*(n.partition(", ")[::2] for n in by_time))
    )
    figure, axes = plt.subplots(2, 3, figsize=(12.5, 5), layout="constrained", sharex=True)
    for ax, (metric, (label, limits)) in zip(axes.flat, DRIFT.items()):
        for name, rows in by_time.items():
            student, _, condition = name.partition(", ")
            i, j = students.index(student), conditions.index(condition)
            style = {"ls": ("--", "-", ":")[i % 3], "lw": 1.3}
            style["color"] = CURVES[(i if len(conditions) == 1 else j) % len(CURVES)]
            middles = (np.arange(len(rows)) + 0.5) * step
            ax.plot(middles, [row[metric] for row in rows], label=name, **style)
        ax.set(title=label, ylim=limits)
        ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.set_xlabel("second of the stream")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


STREAM_ENDS = {
    "f1": "F1",
    "onsets_rate": "onsets, share of the truth's",
    "kept": "identity kept",
    "spread": "spread of identities",
}


def draw_rows(results, titles=STREAM_ENDS):
    """Draw a panel for each {metric: title}, with a bar and its interval for each result.

    results   {name: {metric: [value, low, high]}}
    """
    size = 3 + 3.5 * len(titles), 1.2 + 0.24 * len(results)
    figure, axes = plt.subplots(1, len(titles), figsize=size, layout="constrained", sharey=True)
    for ax, (metric, title) in zip(axes, titles.items()):
        values = np.array([row[metric] for row in results.values()], dtype=float)
        _bars(ax, values[:, 0], results, title, xerr=np.abs(values[:, 1:] - values[:, :1]).T)
        ax.set_xlim(0, np.nanmax(values, initial=1.05))  # bars with their intervals
    axes[0].invert_yaxis()
    return figure


def draw_sinks(results):
    """Draw a sink ablation: {variant: {"max_norm": .., ...}}; no bar where training broke down."""
    columns = ("max_norm", "a0_norm", "loss", "entropy", "share")
    figure, axes = plt.subplots(1, 5, figsize=(13, 5), layout="constrained", sharey=True)
    for ax, column in zip(axes, columns):
        values = [row.get(column, np.nan) for row in results.values()]
        _bars(ax, values, results, column.replace("_", " "))
        if column.endswith("norm") and np.isfinite(values).any():
            ax.set_xscale("log")
    axes[0].invert_yaxis()
    return figure


def draw_keys(results):
    """Draw gradients by the number of keys: {name: {"keys": n, column: [mean, low, high]}}."""
    panels = {"a0_norm": "audio of block 0", "alone_norm": "its first latent alone"}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for ax, (column, title) in zip(axes, panels.items()):
        lines = {}  # one of "latents: 1", "latents: 2" ..., and a point for each other name
        for name, row in results.items():
            if column in row:
                lines.setdefault(name.partition(":")[0], []).append((row["keys"], *row[column]))
        for i, (label, points) in enumerate(lines.items()):
            keys, mean, low, high = np.array(points).T
            ends = mean - low, high - mean
            ax.errorbar(keys * 1.04**i, mean, ends, marker="o", capsize=3, label=label)
        ax.set(title=title, xlabel="keys", xscale="log")
        ax.set_xticks(ticks := sorted({row["keys"] for row in results.values()}), ticks)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set(ylabel="largest gradient norm", ylim=(0, None))
    axes[1].legend(fontsize=8)
    return figure


def draw_switches(curves):
    """Draw the seconds after a switch: {student: {method: [value, low, high] of each second}}."""
    size = 1 + 3.6 * max(1, len(curves)), 3.4
    figure, axes = plt.subplots(
        1, max(1, len(curves)), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for ax, (student, methods) in zip(axes[0], curves.items()):
        for i, (method, seconds) in enumerate(methods.items()):
            value, low, high = np.array(seconds).T
            x = np.arange(1, len(value) + 1) + 0.06 * i  # intervals stand beside each other
            ends = value - low, high - value
            ax.errorbar(x, value, ends, color=CURVES[i], marker="o", ms=3, lw=1.2, label=method)
        ax.set(title=student, xlabel="second after the switch", ylim=(0, 1.03))
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("frames in the new colour")
    axes[0, -1].legend(fontsize=8)
    return figure


def _bars(ax, values, names, title, xerr=None):
    """Draw horizontal bars, one for each name."""
    ax.barh(range(len(values)), values, color=SINK, xerr=xerr)
    ax.set(title=title, yticks=range(len(values)), yticklabels=names)
    ax.grid(alpha=0.3, axis="x")


# ---- command line ----


def check(args):
    """Return the config.  Raises ValueError for masks that cannot be drawn."""
    cfg = cli.find_config(args.config)
    if cfg.tokens_per_frame > 24:
        raise ValueError(f"{cfg.name} has {cfg.tokens_per_frame} tokens a frame: too many to draw")
    return cfg


def main():
    p = cli.parser(__doc__)
    p.add_argument("picture", choices=("masks", "losses"), help="which pictures to draw")
    p.add_argument("--config", default="toy", help=f"masks: one of {', '.join(config.CONFIGS)}")
    blocks = cli.whole(1, 30)  # more cannot be read, and memory grows with the square
    p.add_argument("--blocks", type=blocks, default=4, help="masks: blocks of the clip")
    about = "masks: past blocks that are visible; default all"
    p.add_argument("--window", type=cli.whole(0, 30), help=about)
    p.add_argument("--out", default="assets/masks.png", help="masks: file to write")
    args = p.parse_args()
    if args.picture == "losses":
        draw_losses()
        return
    save(draw_masks(check(args), args.blocks, args.window), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
