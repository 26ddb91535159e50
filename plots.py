"""Every picture of the project: small functions that take tensors and return a figure.

One palette with one meaning everywhere: video blue, audio orange, sinks grey, forbidden white.

    python plots.py masks            writes assets/masks.png, the paper's mask figure from our masks
    python plots.py losses           writes results/*_curve.png from the logs of the trainings
    python plots.py --help
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files, not windows

import matplotlib.pyplot as plt
import numpy as np
import torch

import cli
import config
import files
import masks
import toy_detectors
import toy_world

VIDEO, AUDIO, SINK = "#2b6cb0", "#dd7a1f", "#8a8f98"
WALL_COLOURS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a")  # of impacts and onsets
TITLES = {
    "video_self": "video self-attention",
    "audio_self": "audio self-attention",
    "a2v": "A2V: video listens to audio",
    "v2a": "V2A: audio listens to video",
}


def save(figure, path, dpi=100):
    """Write a PNG beside its target, rename it, and close the figure."""
    files.write_beside(path, lambda p: figure.savefig(p, dpi=dpi, format="png"))
    plt.close(figure)


# ---- masks ----


def draw_masks(cfg, blocks=4, window=None):
    """The four masks of a clip, tokens coloured by the stream of the key, blocks marked."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 9), layout="constrained")
    all_masks = masks.four_masks(cfg, blocks, window)
    video, audio = masks.video_token_blocks(blocks, cfg), masks.audio_token_blocks(blocks, cfg)
    for ax, site in zip(axes.flat, masks.SITES):
        from_video = site in ("video_self", "a2v")
        to_video = site in ("video_self", "v2a")
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
    """Lines at block borders, labels in blocks and seconds."""
    for blocks, line, axis in ((rows, ax.axhline, ax.yaxis), (columns, ax.axvline, ax.xaxis)):
        starts = (blocks[1:] != blocks[:-1]).nonzero()[:, 0] + 1
        for start in starts.tolist():
            line(start - 0.5, color="black", lw=0.8)
        edges = [0, *starts.tolist(), len(blocks)]
        names = []
        for k in range(len(edges) - 1):
            low, high = masks.block_seconds(k, cfg)
            names.append(f"B{k}\n{low:g}-{high:g} s" if k else "B0")
        axis.set_ticks([(a + b) / 2 - 0.5 for a, b in zip(edges, edges[1:])], names, fontsize=7)


# ---- clips ----


def draw_clip(frames, sound, title="", cfg=config.TOY, row_seconds=10, per_second=4):
    """Contact sheet of a clip above the bands of its sound; the toy's impacts and onsets marked.

    frames   (P, 3, H, W) in [0, 1], all frames from time 0 on
    sound    (M, bands) levels
    """
    seconds = (len(frames) - 1) / cfg.fps
    rows = max(1, int(np.ceil(seconds / row_seconds)))
    width = min(row_seconds, max(1, seconds))
    second, picture, bands = 1.8, 1.8 / per_second, 1.2  # inches
    figure, axes = plt.subplots(
        2 * rows, 1, figsize=(second * width + 0.8, (picture + bands + 0.2) * rows + 0.6),
        gridspec_kw={"height_ratios": [picture, bands] * rows}, squeeze=False, layout="constrained",
    )  # fmt: skip
    seen, heard = clip_events(frames, sound, cfg)
    for r in range(rows):
        start = r * row_seconds
        strip, levels = axes[2 * r, 0], axes[2 * r + 1, 0]
        _draw_strip(strip, frames, start, width, per_second, cfg)
        _draw_bands(levels, sound, start, width, cfg)
        for ax, events, marker in ((strip, seen, "v"), (levels, heard, "^")):
            for time, wall in zip(*events):
                if start <= time < start + width:
                    _mark(ax, float(time), int(wall), marker)
    axes[-1, 0].set_xlabel("seconds")
    marks = "   impacts seen $\\blacktriangledown$, onsets heard $\\blacktriangle$"
    figure.suptitle(title + (marks if cfg.name == "toy" else ""))
    return figure


def clip_events(frames, sound, cfg):
    """(times, walls) of what is seen and of what is heard; the detectors know the toy's ball."""
    if cfg.name != "toy":
        return ((), ()), ((), ())
    ball = toy_detectors.see_ball(frames[None])
    return toy_detectors.find_impacts(ball, cfg)[0], toy_detectors.find_onsets(sound[None], cfg)[0]


def draw_gallery(title, clips, seconds=5, per_second=4, cfg=config.TOY):
    """Strips above their sound, events marked: {name: (frames, levels, second to start at)}."""
    figure, axes = plt.subplots(
        2 * len(clips), 1, figsize=(1.8 * seconds + 1.4, 1.5 * len(clips) + 0.8),
        gridspec_kw={"height_ratios": [0.45, 0.9] * len(clips)}, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for (name, (frames, sound, start)), strip, levels in zip(
        clips.items(), axes[::2, 0], axes[1::2, 0]
    ):
        _draw_strip(strip, frames, start, seconds, per_second, cfg)
        _draw_bands(levels, sound, start, seconds, cfg)
        for ax, events, marker in zip((strip, levels), clip_events(frames, sound, cfg), "v^"):
            for time, wall in zip(*events):
                if start <= time < start + seconds:
                    _mark(ax, float(time), int(wall), marker)
        strip.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle(title)
    return figure


def _draw_strip(ax, frames, start, width, per_second, cfg):
    step = cfg.fps // per_second
    first = start * cfg.fps + step // 2
    pictures = frames[first : int((start + width) * cfg.fps) + 1 : step]
    if len(pictures):
        image = torch.cat(list(pictures), 2).permute(1, 2, 0).numpy()
        end = start + len(pictures) / per_second
        ax.imshow(image, extent=(start, end, 0, 1), aspect="auto", interpolation="nearest")
    for border in np.arange(start, start + width, 1 / per_second):
        ax.axvline(border, color="white", lw=0.5)
    ax.set(xlim=(start, start + width), ylim=(0, 1), xticks=[], yticks=[])


def _draw_bands(ax, sound, start, width, cfg):
    piece = sound[start * cfg.mel_rate : int((start + width) * cfg.mel_rate) + 1]
    end = start + len(piece) / cfg.mel_rate
    low, high = (0, 1) if cfg.name == "toy" else (float(sound.min()), float(sound.max()))
    ax.imshow(
        piece.T.numpy(), extent=(start, end, 0, piece.shape[1]), origin="lower", aspect="auto",
        cmap="magma", vmin=low, vmax=high, interpolation="nearest",
    )  # fmt: skip
    if cfg.name == "toy":
        ax.set_yticks([b + 0.5 for b in toy_world.WALL_BANDS], toy_world.WALLS, fontsize=7)
    ax.set(xlim=(start, start + width), xticks=np.arange(start, start + width + 0.5))
    ax.tick_params(axis="x", labelsize=7)


def _mark(ax, time, wall, marker):
    low, high = ax.get_ylim()
    y = high if marker == "v" else low
    ax.plot(time, y, marker, color=WALL_COLOURS[wall], ms=7, clip_on=False, zorder=5, mec="white")
    ax.axvline(time, color=WALL_COLOURS[wall], lw=0.8, alpha=0.7)


# ---- curves ----


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


DRIFT = {  # metric: label and range
    "f1": ("F1", (0, 1.02)),
    "capped_ms": ("DeSync, capped (ms)", (0, 310)),
    "impacts_rate": ("impacts / truth", (0, 1.5)),
    "onsets_rate": ("onsets / truth", (0, 1.5)),
    "caption": ("caption shown", (0, 1.02)),
    "whole": ("one whole ball", (0, 1.02)),
}


def draw_drift(by_time, step=1):
    """Metrics along the stream: {name: [metrics of the first `step` seconds, the next, ...]}."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 5), layout="constrained", sharex=True)
    for ax, (metric, (label, limits)) in zip(axes.flat, DRIFT.items()):
        for i, (name, windows) in enumerate(by_time.items()):
            middle = (np.arange(len(windows)) + 0.5) * step
            ax.plot(middle, [w[metric] for w in windows], "o-", ms=3, label=name, color=f"C{i}")
        ax.set(title=label, ylim=limits)
        ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.set_xlabel("second of the stream")
    axes[0, 0].legend(fontsize=7)
    return figure


def draw_joint(results):
    """F1 and the right wall, with intervals, of {name: {metric: [value, low, high]}}."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    for ax, metric, label in zip(axes, ("f1", "wall"), ("F1", "sound from the wall that was hit")):
        values = np.array([row[metric] for row in results.values()], dtype=float)
        errors = np.abs(values[:, 1:] - values[:, :1]).T
        ax.barh(range(len(values)), values[:, 0], xerr=errors, color=SINK)
        ax.set(title=label, xlim=(0, 1.02), yticks=range(len(values)), yticklabels=results)
        ax.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    return figure


def draw_sinks(results):
    """Bars of a sink ablation, {variant: {"max_norm": .., "loss": .., ...}}."""
    shown = ("max_norm", "a0_norm", "loss", "entropy", "share")
    figure, axes = plt.subplots(1, 5, figsize=(13, 5), layout="constrained", sharey=True)
    for ax, column in zip(axes, shown):
        values = [row.get(column, np.nan) for row in results.values()]
        ax.barh(range(len(values)), values, color=SINK)
        ax.set(title=column.replace("_", " "), yticks=range(len(values)), yticklabels=results)
        ax.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    return figure


def main():
    p = cli.parser(__doc__)
    p.add_argument("picture", choices=["masks", "losses"], help="which picture to draw")
    p.add_argument("--config", default="toy", help=f"one of {', '.join(config.CONFIGS)}")
    p.add_argument("--blocks", type=int, default=4)
    p.add_argument("--window", type=int, help="blocks remembered; default all")
    p.add_argument("--out", default="assets/masks.png")
    args = p.parse_args()
    if args.picture == "losses":
        return draw_losses()
    cfg = cli.find_config(args.config)
    if cfg.tokens_per_frame > 24:
        raise ValueError(f"{cfg.name} has {cfg.tokens_per_frame} tokens a frame: too many to draw")
    save(draw_masks(cfg, args.blocks, args.window), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
