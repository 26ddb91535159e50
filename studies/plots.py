"""Pictures of masks, caches, clips and attention: small functions that return a figure.

One palette with one meaning everywhere: video blue, audio orange, sinks grey, forbidden white.
In a notebook, `show(figure)` as the last line of a cell shows it, with any backend.

    python -m studies.plots          writes assets/masks.png, the paper's mask figure from our masks
    python -m studies.plots --help

Curves and bars of results are in `studies/plots.py`.
"""

import base64
import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files, not windows

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

import config
import masks
from plumbing import cli, files
from toy import detectors as toy_detectors
from toy import world as toy_world

VIDEO, AUDIO, SINK = "#2b6cb0", "#dd7a1f", "#8a8f98"
WALL_COLOURS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a")  # of impacts and onsets
CURVES = (
    "#1b9e77",
    "#7570b3",
    "#e7298a",
    "#555555",
    "#a6761d",
    "#66a61e",
    "#1f9bcf",
)  # whatever else
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


# ---- in a notebook ----


class Picture:
    """A PNG that a notebook shows: Jupyter and notebooks/run.py ask for `_repr_png_`."""

    def __init__(self, png):
        self.png = png

    def _repr_png_(self):
        return self.png

    def __repr__(self):
        return f"<picture, {len(self.png) // 1000} kB>"


def show(figure, dpi=80) -> Picture:
    """A figure as a picture for the last line of a notebook's cell; the figure is closed."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    plt.close(figure)
    # 128 colours are plenty here, and a third of the bytes
    Image.open(drawn).convert("RGB").quantize(128).save(small, "png", optimize=True)
    return Picture(small.getvalue())


class Film:
    """An mp4 that plays inside a notebook: the file travels in the page as base64."""

    def __init__(self, path, width=320):
        self.mp4, self.width = Path(path).read_bytes(), width

    def _repr_html_(self):
        source = f"data:video/mp4;base64,{base64.b64encode(self.mp4).decode()}"
        return f'<video controls loop width="{self.width}" src="{source}"></video>'

    def __repr__(self):
        return f"<film, {len(self.mp4) // 1000} kB>"


# ---- masks and caches ----


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


def draw_slots(moments, pinned=1):
    """What lies in the slots of a cache: {moment: [block in slot 0, in slot 1, ...]}.

    The first `pinned` slots are grey; the slot of the newest block is framed.
    """
    width = max(map(len, moments.values()))
    figure, ax = plt.subplots(
        figsize=(0.6 * width + 2.2, 0.42 * len(moments) + 0.7), layout="constrained"
    )
    for row, blocks in enumerate(moments.values()):
        for slot, block in enumerate(blocks):
            colour = SINK if slot < pinned else VIDEO
            is_new = block == max(blocks)
            edge = dict(ec="black" if is_new else "white", lw=2, zorder=2 if is_new else 1)
            ax.add_patch(plt.Rectangle((slot - 0.44, row - 0.4), 0.88, 0.8, fc=colour, **edge))
            ax.text(slot, row, str(block), ha="center", va="center", color="white", zorder=3)
    ax.set(xlim=(-0.6, width - 0.4), ylim=(len(moments) - 0.4, -0.6), xlabel="slot of the cache")
    ax.set_xticks(range(width))
    ax.set_yticks(range(len(moments)), moments)
    return figure


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
    events = clip_events(frames, sound, cfg)
    for r in range(rows):
        pair = axes[2 * r : 2 * r + 2, 0]
        _draw_stretch(pair, frames, sound, events, r * row_seconds, width, per_second, cfg)
    axes[-1, 0].set_xlabel("seconds")
    marks = "   impacts seen $\\blacktriangledown$, onsets heard $\\blacktriangle$"
    figure.suptitle(title + (marks if cfg.is_toy else ""))
    return figure


def clip_events(frames, sound, cfg):
    """(times, walls) of what is seen and of what is heard; the detectors know the toy's ball."""
    if not cfg.is_toy:
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
    for i, (name, (frames, sound, start)) in enumerate(clips.items()):
        pair, events = axes[2 * i : 2 * i + 2, 0], clip_events(frames, sound, cfg)
        _draw_stretch(pair, frames, sound, events, start, seconds, per_second, cfg)
        pair[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle(title)
    return figure


def _draw_stretch(pair, frames, sound, events, start, width, per_second, cfg):
    """`width` seconds of a clip in two axes: a strip, and below it the sound, events marked."""
    _draw_strip(pair[0], frames, start, width, per_second, cfg)
    _draw_bands(pair[1], sound, start, width, cfg)
    for ax, (times, walls), marker in zip(pair, events, "v^"):
        for time, wall in zip(times, walls):
            if start <= time < start + width:
                _mark(ax, float(time), int(wall), marker)


def _draw_strip(ax, frames, start, width, per_second, cfg):
    step = round(cfg.fps / per_second)
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
    low, high = (0, 1) if cfg.is_toy else (float(sound.min()), float(sound.max()))
    ax.imshow(
        piece.T.numpy(), extent=(start, end, 0, piece.shape[1]), origin="lower", aspect="auto",
        cmap="magma", vmin=low, vmax=high, interpolation="nearest",
    )  # fmt: skip
    if cfg.is_toy:
        ax.set_yticks([b + 0.5 for b in toy_world.WALL_BANDS], toy_world.WALLS, fontsize=7)
    ax.set(xlim=(start, start + width), xticks=np.arange(start, start + width + 0.5))
    ax.tick_params(axis="x", labelsize=7)


def _mark(ax, time, wall, marker):
    low, high = ax.get_ylim()
    y = high if marker == "v" else low
    ax.plot(time, y, marker, color=WALL_COLOURS[wall], ms=7, clip_on=False, zorder=5, mec="white")
    ax.axvline(time, color=WALL_COLOURS[wall], lw=0.8, alpha=0.7)


def draw_strips(clips, per_second=3, cfg=config.TOY):
    """Clips below each other, for comparison: {label: frames (P, 3, H, W) in [0, 1]}."""
    seconds = max(1 / per_second, max(len(f) - 1 for f in clips.values()) / cfg.fps)
    figure, axes = plt.subplots(
        len(clips), 1, figsize=(10, 0.35 + len(clips) * 10 / (seconds * per_second)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax, (label, frames) in zip(axes[:, 0], clips.items()):
        _draw_strip(ax, frames, 0, seconds, per_second, cfg)
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    axes[-1, 0].set_xticks(np.arange(int(seconds) + 1, step=max(1, int(seconds) // 12)))
    axes[-1, 0].set_xlabel("seconds", fontsize=8)
    return figure


# ---- attention, and other tables of numbers ----


def draw_maps(
    maps, colour=VIDEO, xlabel="key", ylabel="query", extent=None, numbers=False, marks=()
):
    """Tables of numbers side by side, zero white: {title: (rows, columns)}.

    colour    one for all, or one for each
    extent    (left, right, bottom, top) in the units of the labels; default: row and column
    numbers   write each number into its field
    marks     places on both axes to be marked by lines
    """
    colours = [colour] * len(maps) if isinstance(colour, str) else colour
    figure, axes = plt.subplots(
        1, len(maps), figsize=(min(11, 4.6 * len(maps)), 3.8), squeeze=False, layout="constrained"
    )
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
        for place in marks:
            ax.axvline(place, color="black", lw=0.5, ls=":")
            ax.axhline(place, color="black", lw=0.5, ls=":")
    return figure


# ---- curves ----


def draw_lines(lines, xlabel, ylabel, title="", **limits):
    """Curves of one picture: {label: values} or {label: (x, values)}.

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
    """Points of the plane: {title: {label: (n, 2)}}, one panel each.

    arrows   {title: (places (n, 2), directions (n, 2))}
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.5 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for ax, (title, sets) in zip(axes[0], panels.items()):
        for (label, points), colour in zip(sets.items(), CURVES):
            ax.plot(*torch.as_tensor(points).T, ".", ms=3, alpha=0.5, color=colour, label=label)
        if arrows and title in arrows:
            places, directions = (torch.as_tensor(a).T for a in arrows[title])
            ax.quiver(*places, *directions, color="black", width=0.005, angles="xy")
        ax.set(title=title, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        ax.legend(fontsize=7, loc="lower left", markerscale=4)
    return figure


def draw_calls(calls):
    """Passes of a rollout in order: (block, sigma, has_gradient); sigma = 0 is a refresh."""
    figure, ax = plt.subplots(figsize=(9, 2.8), layout="constrained")
    for i, (block, sigma, has_gradient) in enumerate(calls):
        colour = CURVES[2 if has_gradient else 3 if sigma == 0 else 0]
        ax.bar(i, sigma + 0.03, color=colour)
        if i == 0 or calls[i - 1][0] != block:
            ax.axvline(i - 0.5, color="black", lw=0.8)
            ax.text(i - 0.4, 1.08, f"block {block}", fontsize=8)
    for label, colour in (
        ("no gradient", CURVES[0]), ("gradient", CURVES[2]), ("refresh at sigma = 0", CURVES[3]),
    ):  # fmt: skip
        ax.bar(0, 0, color=colour, label=label)
    ax.set(xlabel="pass", ylabel="sigma", ylim=(0, 1.2))
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def main():
    p = cli.parser(__doc__)
    p.add_argument("--config", default="toy", help=f"one of {', '.join(config.CONFIGS)}")
    p.add_argument("--blocks", type=int, default=4, help="of the clip")
    p.add_argument("--window", type=int, help="blocks remembered; default all")
    p.add_argument("--out", default="assets/masks.png", help="picture to write")
    args = p.parse_args()
    cfg = cli.find_config(args.config)
    if args.blocks < 1:
        raise ValueError(f"--blocks {args.blocks}: expected 1 or more")
    if args.window is not None and args.window < 0:
        raise ValueError(f"--window {args.window}: expected 0 or more")
    if cfg.tokens_per_frame > 24:
        raise ValueError(f"{cfg.name} has {cfg.tokens_per_frame} tokens a frame: too many to draw")
    save(draw_masks(cfg, args.blocks, args.window), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
