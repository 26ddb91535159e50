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
from pathlib import Path

from film import sheet
from kv_cache import RollingCache
from masks import block_interval
from plumbing import files
from toy import world as toy_world

LEVELS_PER_SECOND = 50  # columns that show the sound

TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>@tab@</title>
<style>
 :root { color-scheme: light dark; --line: rgb(128 128 128 / .45); --gutter: 3.6rem }
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 1rem auto; padding: 0 1rem }
 h1 { font-size: 1.3rem; cursor: pointer; overflow-wrap: anywhere }
 h1.short { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2;
            overflow: hidden }
 #top { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start }
 video { flex: 1 1 16rem; min-width: 0; max-width: 26rem }
 #cache { flex: 1 1 18rem; min-width: 0 } #cache div { overflow-x: auto; padding: 2px }
 table { border-collapse: collapse; font-size: 13px; line-height: 1.35 }
 td { min-width: 1.9rem; padding: 1px 5px; text-align: center; border: 1px solid var(--line) }
 s { opacity: .55; font-size: 11px; margin-right: 3px }
 td.own { background: @video@; color: white } tr.now { outline: 2px solid #d00 }
 td:first-child, tr.head td { border: 0; text-align: right; white-space: nowrap }
 tr.head td { text-align: left }
 #time { position: relative; cursor: pointer; margin: 1.5rem 1rem 1rem var(--gutter) }
 .row { position: relative; height: 1.3rem; font-size: 12px; white-space: nowrap }
 .row > * { position: absolute; transform: translateX(-50%); font-style: normal }
 .row > b, #prompts > span { transform: none; font-weight: normal }
 .row > b { right: 100%; padding-right: .5rem } #prompts > span { text-indent: 4px; z-index: 1;
   overflow: hidden; text-overflow: ellipsis; box-sizing: border-box }
 #sound { height: 8.5rem; background: rgb(128 128 128 / .15) } #sound b { translate: 0 50% }
 canvas { left: 0; height: 100%; display: block; transform: none !important }
 #lines { position: absolute; inset: 0 0 2.6rem 0 } #lines > * { position: absolute; height: 100% }
 .border { border-left: 1px solid var(--line) } .switch { border-left: 2px dashed @audio@ }
 #now { position: absolute; inset: 0 auto 2.6rem 0; width: 2px; background: #d00 }
 small { display: block; opacity: .75; max-width: 46rem; margin-top: .5rem }
</style></head><body>
<h1 class="short" dir="auto" title="click: all of it, or two lines">@title@</h1>
<div id="top"><video id="film" controls playsinline src="data:video/mp4;base64,@film@"></video>
<div id="cache"><div><table></table></div><small></small></div></div>
<div id="time"><div class="row" id="prompts"></div>
<div class="row" id="seen"></div><div class="row" id="sound"><canvas></canvas></div>
<div class="row" id="heard"></div><div class="row" id="seconds"><b>second</b></div>
<div class="row" id="blocks"><b>block</b></div>
<div id="lines"></div><div id="now"></div></div>
<small></small>
<script>
const data = @data@, ROWS = 12, STEPS = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600];
const get = id => document.getElementById(id), film = get("film"), time = get("time");
let current = -1;  // the block that plays

function put(place, kind, text, t, style = {}) {  // text, never markup
  const made = place.appendChild(document.createElement(kind));
  made.textContent = made.title = text;
  Object.assign(made.style, {left: t / data.seconds * 100 + "%"}, style);
  return made;
}

function drawSound() {
  const canvas = get("sound").firstChild, bands = data.levels[0].length, high = 8;
  canvas.width = data.levels.length; canvas.height = bands * high;
  canvas.style.width = data.heard_until / data.seconds * 100 + "%";
  const pen = canvas.getContext("2d");
  data.levels.forEach((level, t) => level.forEach((v, b) => {
    pen.fillStyle = `rgb(${2.4 * v}, ${1.4 * v}, ${30 + 0.5 * v})`;
    pen.fillRect(t, (bands - 1 - b) * high, 1, high);
  }));
  for (const [name, band, colour] of data.walls)
    put(get("sound"), "b", name, 0, {left: "", color: colour, bottom: 100 * band / bands + "%"});
  if (!data.walls.length) put(get("sound"), "b", "sound", 0, {left: "", bottom: "50%"});
}

function drawEvents() {
  for (const [row, sign] of [["seen", "\\u25bc"], ["heard", "\\u25b2"]]) {
    get(row).hidden = !data.walls.length;
    put(get(row), "b", row + " " + sign, 0, {left: ""});
    for (const [t, wall] of data[row]) put(get(row), "i", sign, t, {color: data.walls[wall][2]});
  }
  get("prompts").hidden = data.prompts.length < 2;
  data.prompts.forEach(([t, words], i) => {
    const [end] = data.prompts[i + 1] || [data.seconds];
    put(get("prompts"), "span", words, t, {width: (end - t) / data.seconds * 100 + "%"});
  });
}

function drawScale() {  // labels and lines stand as close as the width of the page allows
  const pixels = time.clientWidth / data.seconds, length = data.block_seconds * pixels;
  // the smallest step whose marks are at least `least` pixels apart
  const apart = (unit, least) => STEPS.find(n => n * unit >= least) || 7200;
  document.querySelectorAll("#lines > *, #seconds > i, #blocks > i").forEach(old => old.remove());
  for (let t = 0, n = apart(pixels, 34); t <= data.seconds; t += n) put(get("seconds"), "i", t, t);
  const label = apart(length, 34), border = apart(length, 5);
  data.blocks.forEach(([low, high], k) => {
    if (k % border == 0) put(get("lines"), "div", "", high).className = "border";
    if (k % label == 0 && high > low) put(get("blocks"), "i", k, (low + high) / 2);
  });
  data.prompts.slice(1).forEach(([t]) => put(get("lines"), "div", "", t).className = "switch");
}

function drawCache() {  // the rows around the block that plays
  const table = document.querySelector("table"), held = [], last = data.blocks.length;
  const first = Math.max(0, Math.min(current - ROWS / 2, last - ROWS));
  table.innerHTML = "<tr class=head><td><td>pinned<td colspan=999>ring";
  for (let k = 0; k < Math.min(first + ROWS, last); k++) {
    const slot = data.slots[k], evicted = held[slot];
    held[slot] = k;
    if (k < first) continue;
    const row = table.insertRow(), [low, high] = data.blocks[k];
    row.className = k == current ? "now" : k > current ? "later" : "";
    const when = low < high ? `${low}\\u2013${high} s` : "first frame";
    row.insertCell().textContent = `block ${k}, ${when}`;
    held.forEach((block, s) => {
      const cell = row.insertCell();
      if (s == slot) cell.className = "own";
      if (s == slot && evicted !== undefined)
        cell.appendChild(document.createElement("s")).textContent = evicted;
      cell.append(block);
    });
  }
}

function follow() {
  get("now").style.left = Math.min(1, film.currentTime / data.seconds) * 100 + "%";
  const found = data.blocks.findIndex(([low, high]) => film.currentTime < high);
  const block = found < 0 ? data.blocks.length - 1 : found;
  if (block != current) { current = block; drawCache(); }
  requestAnimationFrame(follow);
}

time.onclick = event => {
  const box = time.getBoundingClientRect();
  film.currentTime = Math.max(0, event.clientX - box.left) / box.width * data.seconds;
};
document.querySelector("h1").onclick = event => event.target.classList.toggle("short");
window.onresize = drawScale;
document.querySelectorAll("small").forEach((note, i) => note.textContent = data.about[i]);
drawSound(); drawEvents(); drawScale(); follow();
</script></body></html>
"""


def cache_slots(num_blocks, window) -> list[int]:
    """Return the cache slot that each block takes, and keeps until another block overwrites it.

    >>> cache_slots(6, 2)
    [0, 1, 2, 3, 1, 2]
    """
    cache, slots = RollingCache(1, 1, min(window + 1, max(1, num_blocks - 1))), []
    for _ in range(num_blocks):
        slots.append(cache.slots.start)  # the cache itself decides
        cache.next_block()
    return slots


def switches(cues, blocks) -> list:
    """Return [second, prompt] of every prompt that a block used; the second is that block's start.

    >>> switches([(0, "red"), (1.5, "blue"), (8, "green")], [(0, 1), (1, 2), (2, 3)])
    [[0, 'red'], [2, 'blue']]
    """
    starts = [[low for low, _ in blocks if low >= second] for second, _ in cues]
    return [[later[0], sheet.plain(words)] for later, (_, words) in zip(starts, cues) if later]


def contents(frames, levels, request, seconds) -> dict:
    """Return the data for the script of the page; times in seconds.

    frames    (P, 3, H, W) from time 0 on; the first minute of a long stream
    levels    (M, bands) of the sound, of the same length
    request   generate.Request of the stream
    seconds   length of the film, which may have ended early
    """
    cfg = request.cfg
    seen, heard = sheet.clip_events(frames, levels, cfg)
    blocks = [block_interval(k, cfg) for k in range(request.num_blocks)]
    blocks = [block for block in blocks if block[1] <= seconds]
    slots = cache_slots(request.num_blocks, request.window)[: len(blocks)]
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
        "slots": slots,
        "prompts": switches(request.cues, blocks),
    }
    return data | {"about": [about_cache(slots, cfg), about_time(data, cfg)]}


def about_cache(slots, cfg) -> str:
    """Explain the table."""
    pinned = f"block 0 with {cfg.num_sinks} audio sinks" if cfg.num_sinks else "block 0"
    evicts = len(set(slots)) < len(slots)
    return (
        f"A row lists the blocks in the cache while a block is generated: {pinned}, which is "
        "pinned, then the ring, in which the new block (dark) takes the oldest one's place. "
        + ("An evicted block is crossed out." if evicts else "Too short a film to evict a block.")
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
        "video": sheet.VIDEO,
        "audio": sheet.AUDIO,
        "film": base64.b64encode(Path(film).read_bytes()).decode(),
        # Trap: "</script>" or "<!--" in a prompt would end the script
        "data": json.dumps(data).replace("<", "\\u003c"),
    }
    # In one pass, so that no placeholder in a prompt is filled.
    page = re.sub(r"@(\w+)@", lambda found: parts[found[1]], TEMPLATE)
    files.write_beside(path, lambda p: p.write_text(page, encoding="utf-8"))
