"""One HTML page with the video, its sound, its events and the cache on one time axis.

The page needs no other file: it holds the video as base64. A short script draws the bands of the
sound, impacts and onsets, the borders of blocks, and the blocks that each block could attend to.
A line follows the video; a click on the axis jumps there.

    python generate.py --html out.html
"""

import base64
import html
import json
from pathlib import Path

import torch

from film import sheet
from kv_cache import RollingCache
from masks import block_interval
from plumbing import files

LEVELS_PER_SECOND = 50  # columns that show the sound

TEMPLATE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>@title@</title>
<style>
 body { font: 15px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
 video { display: block; width: 20rem; max-width: 100%; margin-bottom: 1rem }
 #time { position: relative; cursor: pointer }
 canvas { width: 100%; display: block; image-rendering: pixelated }
 #now { position: absolute; top: 0; bottom: 0; width: 2px; background: #d00 }
 td { width: 2.2rem; text-align: center; border: 1px solid #ccc; font-size: 13px }
 td.own { background: @video@; color: white } tr.now { outline: 2px solid #d00 }
 small { color: #555 }
</style>
<h1>@title@</h1>
<video id="film" controls src="data:video/mp4;base64,@film@"></video>
<div id="time"><canvas id="sound"></canvas><canvas id="axis"></canvas><div id="now"></div></div>
<p><small>Bands of the sound, low to high. &#9660; an impact is seen, &#9650; an onset is heard;
lines are borders of blocks. Click to go there.</small></p>
<h2>What each block could attend to</h2>
<table id="cache"></table>
<p><small>One row per block. Slots of the cache from left to right: first the pinned block 0 (with
the audio sinks), then the ring, in which a new block (dark) overwrites the oldest.</small></p>
<script>
const data = @data@;
const film = document.getElementById("film"), now = document.getElementById("now");
const axis = document.getElementById("axis"), sound = document.getElementById("sound");

function drawSound() {
  const [rows, bands] = [data.levels.length, data.levels[0].length];
  sound.width = rows; sound.height = bands; sound.style.height = "8rem";
  const pen = sound.getContext("2d");
  data.levels.forEach((level, t) => level.forEach((v, b) => {
    pen.fillStyle = `rgb(${2.4 * v}, ${1.4 * v}, ${30 + 0.5 * v})`;
    pen.fillRect(t, bands - 1 - b, 1, 1);
  }));
}

function drawAxis() {
  const width = axis.width = axis.clientWidth, height = axis.height = 56;
  const pen = axis.getContext("2d");
  const x = t => t / data.seconds * width;
  pen.font = "12px sans-serif";
  data.blocks.forEach(([low, high], k) => {
    pen.fillStyle = "#999"; pen.fillRect(x(high), 0, 1, height);
    pen.fillStyle = "#333"; if (high > low) pen.fillText("block " + k, x(low) + 4, height - 6);
  });
  for (const [events, sign, y] of [[data.seen, "\\u25bc", 16], [data.heard, "\\u25b2", 34]])
    for (const [t, wall] of events) {
      pen.fillStyle = data.colours[wall];
      pen.fillText(sign, x(t) - 5, y);
    }
}

function drawCache() {
  data.cache.forEach((held, k) => {
    const row = document.getElementById("cache").insertRow();
    held.forEach(block => {
      const cell = row.insertCell();
      cell.textContent = block; if (block === k) cell.className = "own";
    });
  });
}

function follow() {
  now.style.left = film.currentTime / data.seconds * 100 + "%";
  const block = data.blocks.findIndex(([low, high]) => film.currentTime < high);
  const shown = block < 0 ? data.blocks.length - 1 : block;
  const rows = [...document.getElementById("cache").rows];
  rows.forEach((row, k) => row.className = k === shown ? "now" : "");
  requestAnimationFrame(follow);
}

document.getElementById("time").onclick = event => {
  const box = axis.getBoundingClientRect();
  film.currentTime = (event.clientX - box.left) / box.width * data.seconds;
};
drawSound(); drawAxis(); drawCache(); follow();
window.onresize = drawAxis;
</script></html>
"""


def held_blocks(num_blocks, window) -> list[list[int]]:
    """Return for each block the list of blocks in the cache, slot by slot, while it is generated.

    >>> held_blocks(6, 2)
    [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 4, 2, 3], [0, 4, 5, 3]]
    """
    cache, held = RollingCache(1, 1, min(window + 1, max(1, num_blocks - 1))), []
    for k in range(num_blocks):
        keys = torch.full((1, 1, 1, 1), float(k))  # the cache itself decides where a block goes
        held.append(cache.append(keys, keys)[0].flatten().int().tolist())
        cache.next_block()
    return held


def contents(frames, levels, cfg, num_blocks, window) -> dict:
    """Return the data for the script of the page; times in seconds.

    frames   (P, 3, H, W) from time 0 on; the first minute of a long stream
    levels   (M, bands) of the sound, of the same length
    """
    seen, heard = sheet.clip_events(frames, levels, cfg)
    seconds = max(1 / cfg.fps, (len(frames) - 1) / cfg.fps)
    blocks = [list(block_interval(k, cfg)) for k in range(num_blocks)]
    blocks = [block for block in blocks if block[1] <= seconds]
    step = max(1, cfg.mel_rate // LEVELS_PER_SECOND)
    low, high = levels.min(), levels.max()
    shown = 100 * (levels[::step] - low) / (high - low + 1e-9)
    return {
        "seconds": seconds,
        "levels": shown.round().int().tolist(),
        "seen": [[round(float(t), 3), int(w)] for t, w in zip(*seen)],
        "heard": [[round(float(t), 3), int(w)] for t, w in zip(*heard)],
        "blocks": blocks,
        "cache": held_blocks(num_blocks, window)[: len(blocks)],
        "colours": sheet.WALL_COLOURS,
    }


def write(path, film, title, data):
    """Write the page.  film: path of the mp4; data: from `contents`."""
    parts = {
        "title": html.escape(title),
        "video": sheet.VIDEO,
        "film": base64.b64encode(Path(film).read_bytes()).decode(),
        "data": json.dumps(data).replace("</", "<\\/"),  # Trap: "</script>" would end the script
    }
    page = TEMPLATE
    for name, value in parts.items():
        page = page.replace(f"@{name}@", value)
    files.write_beside(path, lambda p: p.write_text(page, encoding="utf-8"))
