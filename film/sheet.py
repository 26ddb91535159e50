"""The contact sheet of a clip: frames above the bands of the sound, impacts and onsets marked.

It also holds the palette of all pictures: video blue, audio orange, sinks grey, a colour per wall.
"""

import bisect
import re
import textwrap
import warnings

import matplotlib

matplotlib.use("Agg")  # draw into files, open no windows; call it before importing pyplot

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

import config
from plumbing import files
from toy import world as toy_world

VIDEO, AUDIO, SINK = "#2b6cb0", "#dd7a1f", "#8a8f98"
WALL_COLOURS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a")  # marks of impacts and onsets


def save(figure, path, dpi=100):
    """Write the figure as a PNG and close it."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # glyphs that no font has
        files.write_beside(path, lambda p: figure.savefig(p, dpi=dpi, format="png"))
    plt.close(figure)


def draw_clip(frames, sound, title="", cfg=config.TOY, row_seconds=10, per_second=4):
    """Draw a clip in rows of `row_seconds`, with `per_second` frames for each second.

    frames   (P, 3, H, W) in [0, 1], all frames from time 0 on
    sound    (M, bands) levels
    """
    seconds = (len(frames) - 1) / cfg.fps
    rows = max(1, int(np.ceil(seconds / row_seconds)))
    width = min(row_seconds, max(1, seconds))
    second, picture, bands = 1.8, 1.8 / per_second, 1.2  # inches
    figure, axes = plt.subplots(
        2 * rows, 1, figsize=(second * width + 0.8, (picture + bands + 0.2) * rows + 0.9),
        gridspec_kw={"height_ratios": [picture, bands] * rows}, squeeze=False, layout="constrained",
    )  # fmt: skip
    events = clip_events(frames, sound, cfg)
    for r in range(rows):
        pair = axes[2 * r : 2 * r + 2, 0]
        draw_stretch(pair, frames, sound, events, r * row_seconds, width, per_second, cfg)
    marks = "\n▼ impacts seen   ▲ onsets heard" if cfg.is_toy else ""
    axes[-1, 0].set_xlabel("seconds" + marks, fontsize=8)
    _write_title(figure, plain(title))
    return figure


# ---- the title: a prompt, which may be any text ----


def plain(text) -> str:
    """Return text on one line, without control characters and bytes that are not UTF-8.

    >>> plain("tab\\tand bell\\a, not \\udcff UTF-8")
    'tab and bell , not ? UTF-8'
    """
    text = text.encode("utf-8", "replace").decode()  # a broken argument holds lone surrogates
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())


def two_lines(text, fits) -> str:
    """Break text into at most two lines, as long as `fits` allows; "…" ends a cut text.

    >>> print(two_lines("waves break on the rocks", lambda lines: len(lines) <= 18))
    waves break
    on th…
    """

    def broken(width):
        lines = textwrap.wrap(text, width)
        return "\n".join(lines if len(lines) <= 2 else [lines[0], lines[1][:-1] + "…"])

    # bisect counts the widths, from 2 characters on, that fit
    return broken(1 + bisect.bisect(range(2, 500), False, key=lambda w: not fits(broken(w))))


def fonts_for(text) -> list[str]:
    """Return font families: the default, then fonts of this machine with characters it lacks."""
    default = font_manager.FontProperties()
    families = default.get_family()
    missing = set(map(ord, text)) - FT2Font(font_manager.findfont(default)).get_charmap().keys()
    paths = font_manager.findSystemFonts() if missing else []
    for path in sorted(paths, key=lambda path: ("Regular" not in path, path)):
        try:
            font = FT2Font(path)
            if has := missing & font.get_charmap().keys():
                font_manager.fontManager.addfont(path)
                families.append(font.family_name)
                missing -= has
        except (OSError, RuntimeError, NotImplementedError):
            continue  # a damaged file, or a font made of pixels
    return families


def _write_title(figure, text):
    # parse_math=False: "$" begins no formula
    title = figure.suptitle("", family=fonts_for(text), parse_math=False, usetex=False)

    def fits(lines):
        title.set_text(lines)
        return title.get_window_extent().width < 0.97 * figure.bbox.width

    with warnings.catch_warnings(action="ignore", category=UserWarning):
        title.set_text(two_lines(text[:1000], fits))


# ---- the pictures ----


def clip_events(frames, sound, cfg):
    """Return (times, walls) of the impacts that are seen, and of the onsets that are heard."""
    if not cfg.is_toy:  # the detectors know only the ball of the toy
        return ((), ()), ((), ())
    from toy import detectors

    ball = detectors.see_ball(frames[None])
    return detectors.find_impacts(ball, cfg)[0], detectors.find_onsets(sound[None], cfg)[0]


def draw_stretch(pair, frames, sound, events, start, width, per_second, cfg):
    """Draw `width` seconds of a clip into two axes: frames above, sound and events below."""
    draw_strip(pair[0], frames, start, width, per_second, cfg)
    _draw_bands(pair[1], sound, start, width, cfg)
    for ax, (times, walls), marker, edge in zip(pair, events, "v^", (1, 0)):
        y = ax.get_ylim()[edge]  # impacts at the upper edge, onsets at the lower
        for time, wall in zip(times, walls):
            if start <= time < start + width:
                colour = WALL_COLOURS[wall]
                ax.plot(time, y, marker, color=colour, ms=7, clip_on=False, zorder=5, mec="white")
                ax.axvline(time, color=colour, lw=0.8, alpha=0.7)


def draw_strip(ax, frames, start, width, per_second, cfg):
    """Draw the frames of `width` seconds side by side, `per_second` of each second."""
    step = round(cfg.fps / per_second)
    first = start * cfg.fps + step // 2  # the middle frame of each time step
    pictures = frames[first : int((start + width) * cfg.fps) + 1 : step]
    if len(pictures):
        image = torch.cat(list(pictures), 2).permute(1, 2, 0).numpy()
        end = start + len(pictures) / per_second
        ax.imshow(image, extent=(start, end, 0, 1), aspect="auto", interpolation="bicubic")
    for border in np.arange(start, start + width, 1 / per_second):
        ax.axvline(border, color="white", lw=0.5)
    ax.set(xlim=(start, start + width), ylim=(0, 1), xticks=[], yticks=[])


def _draw_bands(ax, sound, start, width, cfg):
    levels = sound[start * cfg.mel_rate : int((start + width) * cfg.mel_rate) + 1]
    end = start + len(levels) / cfg.mel_rate
    # the toy's levels are in [0, 1]; at full size they are logarithms without fixed limits
    low, high = (0, 1) if cfg.is_toy else (float(sound.min()), float(sound.max()))
    ax.imshow(
        levels.T.numpy(), extent=(start, end, 0, levels.shape[1]), origin="lower", aspect="auto",
        cmap="magma", vmin=low, vmax=high, interpolation="nearest",
    )  # fmt: skip
    if cfg.is_toy:
        ax.set_yticks([b + 0.5 for b in toy_world.WALL_BANDS], toy_world.WALLS, fontsize=7)
    ax.set(xlim=(start, start + width), xticks=np.arange(start, start + width + 0.5))
    ax.tick_params(axis="x", labelsize=7)
