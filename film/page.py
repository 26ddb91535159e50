"""One HTML page with the video, its sound, its events and the cache on one time axis.

The page needs no other file: it holds the video as base64. The table beside the film shows to which
blocks each block could attend. The axis below shows the bands of the sound, impacts and onsets,
borders of blocks and changes of the prompt. A line follows the film; a click jumps to its time.

    python generate.py --html page.html
"""

import base64
import html
import json
import re
from itertools import pairwise
from pathlib import Path

import torch

from film import sheet
from kv_cache import RollingCache
from masks import block_interval
from plumbing import files
from toy import world as toy_world

LEVELS_PER_SECOND = 50  # columns that show the sound
FOLDER = Path(__file__).parent


def fill(name, parts) -> str:
    """Return a page of this folder, with its placeholders @NAME@ filled.

    @style@ and @script@ are shared.css and shared.js; parts: all others.
    """
    page, style, script = (
        (FOLDER / file).read_text("utf-8") for file in (name, "shared.css", "shared.js")
    )
    page = page.replace("@style@", style).replace("@script@", script)
    parts = {"video": sheet.VIDEO, "audio": sheet.AUDIO, **parts}
    # In one pass, so that no placeholder in a prompt is filled.
    return re.sub(r"@(\w+)@", lambda found: parts[found[1]], page)


def in_script(value) -> str:
    """Return a value as JSON for a script.

    >>> in_script("</script>")
    '"\\\\u003c/script>"'
    """
    return json.dumps(value).replace("<", "\\u003c")  # Trap: "</script>" would end the script


class CacheTable:
    """The blocks in the cache of a stream, by slot, asked of a cache with a key for each block."""

    def __init__(self, num_blocks, window):
        self.cache = RollingCache(1, 1, min(window + 1, max(1, num_blocks - 1)))
        self.window, self.block, self.is_pinned = window, 0, True

    def next_row(self, forgets=False) -> list:
        """Return what each slot holds while the next block is made; None: nothing to attend to.

        forgets   whether the prompt has changed, see toy/switch.py

        >>> table = CacheTable(9, 2)
        >>> [table.next_row(k == 5) for k in range(6)][2:]
        [[0, 1, 2], [0, 1, 2, 3], [0, 4, 2, 3], [None, 4, 5]]
        """
        cache = self.cache
        if self.block:  # as `CachedView` does
            cache.next_block()
            if not self.is_pinned and cache.block > self.window:
                cache.first_visible = 1
        if forgets:
            self.is_pinned = False
            if cache.block > 1:
                cache.forget()
        key = torch.full((1, 1, 1, 1), float(self.block))
        keys, _ = cache.append(key, key)
        self.block += 1
        return [None] * cache.first_visible + [int(k) for k in keys.flatten()]


def switches(cues, blocks) -> list:
    """Return [second, prompt] of every prompt that a block used; the second is that block's start.

    >>> switches([(0, "red"), (1.5, "blue"), (8, "green")], [(0, 1), (1, 2), (2, 3)])
    [[0, 'red'], [2, 'blue']]
    """
    starts = [[low for low, _ in blocks if low >= second] for second, _ in cues]
    return [[later[0], sheet.plain(words)] for later, (_, words) in zip(starts, cues) if later]


def forgets(old, new, cfg) -> bool:
    """Return whether the cache forgets at this change of the prompt: toy/switch.py."""
    # neither the order of words nor "a ball" has a meaning: world.parse_prompt
    words = [{*text.lower().replace(",", " ").split()} - {"a", "ball"} for text in (old, new)]
    return cfg.is_toy and words[0] != words[1]


def contents(frames, levels, request, seconds, strips=()) -> dict:
    """Return the data for the script of the page; times in seconds.

    frames    (P, 3, H, W) from time 0 on; the first minute of a long stream
    levels    (M, bands) of the sound, of the same length
    request   generate.Request of the stream
    seconds   length of the film, which may have ended early
    strips    pictures of the passes of each block, from `film.passes`
    """
    cfg = request.cfg
    seen, heard = sheet.clip_events(frames, levels, cfg)
    blocks = [block_interval(k, cfg) for k in range(request.num_blocks)]
    blocks = [block for block in blocks if block[1] <= seconds]
    prompts, table = switches(request.cues, blocks), CacheTable(request.num_blocks, request.window)
    changes = {low for (_, old), (low, new) in pairwise(prompts) if forgets(old, new, cfg)}
    held = [table.next_row(low in changes) for low, _ in blocks]
    step = max(1, cfg.mel_rate // LEVELS_PER_SECOND)
    low, high = levels.min(), levels.max()
    walls = zip(toy_world.WALLS, toy_world.WALL_BANDS, sheet.WALL_COLOURS) if cfg.is_toy else ()
    data = {
        "seconds": max(1 / cfg.fps, seconds),
        "heard_until": max(1 / cfg.fps, (len(frames) - 1) / cfg.fps),
        "levels": (100 * (levels[::step] - low) / (high - low + 1e-9)).round().int().tolist(),
        "walls": [(name, band + 0.5, colour) for name, band, colour in walls],
        "seen": [[round(float(t), 3), int(w)] for t, w in zip(*seen)],
        "heard": [[round(float(t), 3), int(w)] for t, w in zip(*heard)],
        "blocks": blocks,
        "block_seconds": float(cfg.block_seconds),
        "held": held,
        "strips": strips[: len(blocks)],
        "prompts": prompts,
    }
    return data | {
        "about": [about_cache(held, cfg, any(strips), len(prompts) > 1), about_time(data, cfg)]
    }


def about_cache(held, cfg, has_strips=False, has_changes=False) -> str:
    """Explain the table."""
    pinned = f"block 0 with {cfg.num_sinks} audio sinks" if cfg.num_sinks else "block 0"
    evicts = any(row[1:-1] != before[1:] for before, row in pairwise(held[1:]))
    seen = "Noise → clean: the last picture of the block, as each pass estimates it. "
    return seen * has_strips + (
        f"A row lists the blocks in the cache while a block is generated: {pinned}, which is "
        "pinned, then the ring, in which the new block (dark) takes the oldest one's place. "
        + ("An evicted block is crossed out." if evicts else "Too short a film to evict a block.")
        + " After a new prompt only the newest block stays." * (has_changes and cfg.is_toy)
    )


def about_time(data, cfg) -> str:
    """Explain the axis, and name what is not on it."""
    until = data["heard_until"]
    goes_on = data["seconds"] > until + 1 / cfg.fps
    return " ".join(
        ["The sound, low to high; loud is bright. Lines are borders of blocks."]
        + ["Marks: an impact is seen, an onset is heard; the wall gives the colour."] * cfg.is_toy
        + ["The prompt changes at a dashed line."] * (len(data["prompts"]) > 1)
        + [f"Sound and marks end after {until:.0f} s, the film goes on."] * goes_on
        + ["Click to go there."]
    )


def write(path, film, title, data):
    """Write the page.  film: path of the mp4; data: from `contents`."""
    title = sheet.plain(title)
    parts = {
        "title": html.escape(title),
        "tab": html.escape(title if len(title) < 80 else title[:79] + "…"),
        "film": base64.b64encode(Path(film).read_bytes()).decode(),
        "data": in_script(data),
    }
    files.write_beside(path, lambda p: p.write_text(fill("page.html", parts), encoding="utf-8"))
