"""Contact sheet and page: the film, its events and the cache; any text is a title, never code."""

import json
import re
import shutil
import subprocess
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import NASTY, run_here
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

import config
import masks
from film import page, sheet
from kv_cache import CachedView
from studies import plots
from toy import world as toy_world

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

nasty = pytest.mark.parametrize("words", NASTY.values(), ids=NASTY.keys())


def toy_clip(seconds=3):
    """A few seconds of frames and sound."""
    clips = toy_world.draw_clips([toy_world.HELD_OUT])
    return toy_world.render_video(clips, seconds)[0], toy_world.render_sound(clips, seconds)[0]


def contents(seconds=3, cfg=config.TOY, blocks=4, cues=((0, "red"),), clip=3):
    request = SimpleNamespace(cfg=cfg, num_blocks=blocks, window=1, cues=cues)
    return page.contents(*toy_clip(clip), request, seconds)


@pytest.fixture
def write(tmp_path):
    """Write a page with a made-up video: title, data -> its path."""

    def write(title, data):
        (tmp_path / "film.mp4").write_bytes(b"\x00film")
        page.write(tmp_path / "page.html", tmp_path / "film.mp4", title, data)
        return tmp_path / "page.html"

    return write


# ---- any text is a title ----


@nasty
def test_any_prompt_is_text_in_the_page(write, words):
    """It stands in the heading as it is, in the data as it is, and adds no tag and no address."""
    text = write(words, contents(cues=[(0, words)])).read_text("utf-8")
    plain = write("red", contents()).read_text("utf-8")
    for tag in ("<", "<script", "</script", "<!--", "data:video", "http"):
        wanted = plain.count(tag) + (words.count(tag) if tag == "http" else 0)
        assert text.count(tag) == wanted, tag
    heading = re.search(r"<h1[^>]*>(.*?)</h1>", text, re.S)[1]
    data = json.loads(re.search(r"const data = (.*?);\n", text)[1])
    assert page.html.unescape(heading) == sheet.plain(words) == data["prompts"][0][1]
    assert "data:video/mp4;base64,AGZpbG0=" in text
    assert len(re.search(r"<title>(.*?)</title>", text)[1]) < 200


@nasty
@pytest.mark.parametrize("seconds", [1, 5])
def test_any_prompt_is_the_title_of_a_sheet(tmp_path, words, seconds):
    """At most two lines within the picture, every character drawn as itself, and no warning."""
    with warnings.catch_warnings(action="error"):
        figure = sheet.draw_clip(*toy_clip(seconds), title=words)
        (title,) = [t for t in figure.texts if t.get_text()]
        lines, whole = title.get_text().split("\n"), sheet.plain(words)
        assert len(lines) <= 2 and not title.get_parse_math()
        box = title.get_window_extent()
        sheet.save(figure, tmp_path / "sheet.png")
    assert box.width < figure.bbox.width
    shown = "".join(lines).replace(" ", "")
    if shown.endswith("…"):
        assert len(shown) > 20 and whole.replace(" ", "").startswith(shown[:-1])
    else:
        assert shown == whole.replace(" ", "")


def test_impacts_are_marked_above_the_pictures_and_onsets_below_the_sound():
    """At their times, in the colours of their walls."""
    figure, clip = sheet.draw_clip(*toy_clip()), toy_clip()
    for ax, events, marker, edge in zip(
        figure.axes, sheet.clip_events(*clip, config.TOY), "v^", (1, 0)
    ):
        marks = [line for line in ax.lines if line.get_marker() == marker]
        assert len(marks) == len(events.times) > 0
        for mark, time, wall in zip(marks, *events):
            assert mark.get_xydata().tolist() == [[time, ax.get_ylim()[edge]]]
            assert mark.get_color() == sheet.WALL_COLOURS[wall]
    sheet.plt.close(figure)


def test_the_second_row_of_a_sheet_has_its_own_sound():
    """It begins at second 10; sound begins there, too."""
    frames, sound = toy_clip(12)
    sound[:1000], sound[1000:] = 0, 1
    figure = sheet.draw_clip(frames, sound)
    first, second = (figure.axes[row].images[0].get_array() for row in (1, 3))
    assert first[:, :-1].max() == 0 and second.min() == 1
    sheet.plt.close(figure)


def test_a_strip_shows_the_middle_of_every_time_step():
    """Four pictures a second, each of six frames: the fourth of them."""
    frames = torch.arange(49.0).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) / 48
    figure, ax = sheet.plt.subplots()
    sheet.draw_strip(ax, frames, 1, 1, 4, config.TOY)
    shown = ax.images[0].get_array()[0, ::2, 0] * 48
    assert shown.tolist() == pytest.approx([27, 33, 39, 45])
    sheet.plt.close(figure)


def test_a_text_becomes_one_line_without_controls():
    """Letters of all scripts stay; an undecodable byte becomes a question mark."""
    assert sheet.plain(NASTY["controls"]) == "tab and bell and NUL and escape [31m"
    assert sheet.plain(NASTY["two lines"]) == "first line second line third"
    assert sheet.plain(NASTY["not UTF-8"]) == "caf? at night"
    for name in ("dollars", "a formula", "other scripts", "markup"):
        assert sheet.plain(NASTY[name]) == NASTY[name]


def test_a_title_finds_the_font_that_has_its_letters(monkeypatch):
    """With DejaVu Serif as the only other font, a letter that the default lacks comes from it."""
    sans, serif = map(font_manager.findfont, ("DejaVu Sans", "DejaVu Serif"))
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [__file__, serif])
    only = FT2Font(serif).get_charmap().keys() - FT2Font(sans).get_charmap().keys()
    letter = chr(min(only))
    assert sheet.fonts_for("red") == sheet.fonts_for("\U0010ffff") == ["sans-serif"]
    assert sheet.fonts_for(f"red {letter}") == ["sans-serif", "DejaVu Serif"]
    figure = sheet.draw_clip(*toy_clip(1), title=f"red {letter}")
    assert figure.texts[0].get_fontfamily() == ["sans-serif", "DejaVu Serif"]
    sheet.plt.close(figure)


# ---- the page ----


def test_the_page_needs_nothing_but_itself(write):
    """The video is inside, there is no other address and no placeholder left."""
    text = write("red", contents()).read_text()
    assert "data:video/mp4;base64,AGZpbG0=" in text
    assert not re.findall(r"https?://|@\w+@|url\(| src=\"(?!data:)", text)


def test_what_is_drawn_is_what_happened():
    """Ground truth: as many impacts as onsets, at the same times; walls have their colours."""
    data = contents()
    assert data["seconds"] == data["heard_until"] == 3
    assert data["blocks"] == [(0, 0), (0, 1), (1, 2), (2, 3)]
    inside = [[t for t, _ in data[kind] if 0.2 < t < 2.8] for kind in ("seen", "heard")]
    assert len(inside[0]) == len(inside[1]) > 0
    assert max(abs(a - b) for a, b in zip(*inside)) < 0.03
    levels = torch.tensor(data["levels"])
    assert levels.shape == (151, toy_world.BANDS) and levels.min() == 0 and levels.max() == 100
    assert [name for name, _, _ in data["walls"]] == list(toy_world.WALLS)
    assert [colour for _, _, colour in data["walls"]] == list(sheet.WALL_COLOURS)


@pytest.mark.parametrize("blocks, window", [(6, 2), (12, 1), (3, 8), (1, 1)])
def test_the_table_shows_what_the_cache_holds(blocks, window):
    """Block 0, and the window before the block; each in its slot until another takes it."""
    table, held = page.CacheTable(blocks, window), []
    for k in range(blocks):
        if k <= window + 1:
            held = [*held, k]
        else:  # the oldest in the ring makes room
            held = [k if old == k - window - 1 else old for old in held]
        assert table.next_row() == held


@pytest.mark.parametrize("change", [1, 2, 6])
def test_the_table_shows_what_a_change_of_the_prompt_leaves(change):
    """The blocks that the cache of a stream shows; first the newest and the new one."""
    table, view = page.CacheTable(12, 3), CachedView(config.TOY, 12, 3)
    view.move_prefixes = lambda *_: None  # the keys here are numbers of blocks, without positions
    for k in range(12):
        if k == change:
            view.forget()
        for cache in view.caches:
            keys = torch.full((1, cache.num_new, 1, 1), float(k))
            shown, _ = cache.append(keys, keys)
        blocks = [block for block in table.next_row(k == change) if block is not None]
        assert [*dict.fromkeys(shown.flatten().int().tolist())] == blocks
        assert k != change or blocks == [k - 1, k]
        view.next_block()


def test_a_stream_that_ended_early_shows_the_blocks_it_made():
    """Of 101 blocks, the four in 3 seconds, in the slots of the long stream; no later prompt."""
    data = contents(blocks=101, cues=[(0, "red"), (1.5, "blue"), (70, "green")])
    assert data["blocks"] == contents()["blocks"] and data["held"][3] == [None, 2, 3]
    assert data["prompts"] == [[0, "red"], [2, "blue"]]


def test_the_page_says_what_it_does_not_show():
    """Sound is kept for a part of a long stream; short films evict nothing."""
    cut, whole = "Sound and marks end after 3 s, the film goes on.", contents()
    assert cut in contents(90, blocks=91)["about"][1] and cut not in whole["about"][1]
    assert "evicted block is crossed out" in whole["about"][0]
    assert "Too short a film to evict" in contents(2, blocks=3)["about"][0]


def test_only_what_a_film_has_is_explained():
    """Sinks, walls and a change of the prompt are named where they exist."""
    cues = [(0, "red"), (1, "blue")]
    toy, released = contents(cues=cues), contents(cfg=config.TOY_RELEASED, blocks=3)
    full = contents(cfg=config.FULL)
    assert "block 0 with 16 audio sinks" in toy["about"][0] and "sinks" not in released["about"][0]
    assert "impact" in toy["about"][1] and "impact" not in full["about"][1]
    assert full["walls"] == full["seen"] == full["heard"] == []
    assert "dashed" in toy["about"][1] and "dashed" not in released["about"][1]


@pytest.mark.parametrize("cfg", [config.TOY_RELEASED, config.TOY_TEACHER], ids=lambda cfg: cfg.name)
def test_every_toy_has_events_and_walls(cfg):
    """Marks and labels do not depend on the block layout."""
    data = contents(cfg=cfg), contents()
    assert data[0]["seen"] == data[1]["seen"] != [] and data[0]["heard"] == data[1]["heard"] != []
    figure = sheet.draw_clip(*toy_clip(), cfg=cfg)
    walls = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert tuple(walls) == toy_world.WALLS
    assert "▼ impacts seen   ▲ onsets heard" in figure.axes[-1].get_xlabel()
    sheet.plt.close(figure)


# ---- the page in a browser ----

PROBE = """<script>
const words = row => [...document.querySelectorAll(`#${row} > i, #${row} > span`)];
const meets = row => words(row).some((x, i, all) =>
  i && all[i - 1].getBoundingClientRect().right > x.getBoundingClientRect().left + 0.5);
const texts = row => words(row).map(x => x.textContent);
onload = () => setTimeout(() => document.body.textContent = "FOUND" + JSON.stringify({
  overlaps: ["seconds", "blocks", "prompts"].filter(meets),
  seconds: texts("seconds"), blocks: texts("blocks"), prompts: texts("prompts"),
  rows: [...document.querySelectorAll(".row:not([hidden])")].map(row => row.id),
  switches: document.querySelectorAll(".switch").length, width: document.body.scrollWidth,
  passes: [...document.images].filter(image => image.naturalWidth).length,
  changes: [...document.querySelectorAll("td.prompt")].map(cell => cell.textContent),
  high: document.querySelector("table").clientHeight,
  marks: words("seen").length, cells: [...document.querySelector("table").rows].map(
    row => [...row.cells].slice(1).map(c => c.textContent)), now: get("now").style.left,
  playing: document.querySelector("tr.now td").textContent,
  beside: get("cache").getBoundingClientRect().left >= film.getBoundingClientRect().right,
}) + "END", 500);
Object.defineProperty(film, "currentTime", {get: () => TIME});
</script></html>"""


def in_browser(path, width=1200, time=0):
    """Open a page in Chromium, at a time of the film: -> what stands where."""
    probe = path.with_name("probe.html")
    probe.write_text(path.read_text("utf-8").replace("</html>", PROBE.replace("TIME", str(time))))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    command = [CHROMIUM, *flags, f"--window-size={width},900", "--dump-dom", probe.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    return json.loads(page.html.unescape(re.search(r"FOUND(.*)END", dom)[1]))


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_a_browser_draws_the_table_beside_the_film(write):
    """Evicted blocks are crossed out: 1 by 3. The row of the block that plays is marked."""
    found = in_browser(write("red", contents()), time=1.5)
    assert found["cells"][1:] == [["0"], ["0", "1"], ["0", "1", "2"], ["0", "13", "2"]]
    assert found["playing"] == "block 2, 1–2 s" and found["now"] == "50%" and found["beside"]
    assert found["seconds"] == ["0", "1", "2", "3"] and found["blocks"] == ["1", "2", "3"]
    assert found["marks"] == len(contents()["seen"]) and found["switches"] == 0
    assert found["rows"] == ["seen", "sound", "heard", "seconds", "blocks"]


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_a_browser_shows_passes_and_prompts_in_the_table(write):
    """A column of pictures if there are any; a row above the first block of a new prompt."""
    pixel = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
    data = contents(cues=[(0, "red"), (1, "blue")]) | {"strips": [pixel] * 4}
    found = in_browser(write("red, then blue", data))
    assert found["cells"][0] == ["noise → clean", "pinned", "ring"] and found["passes"] == 4
    assert found["cells"][2:5] == [["", "0", "1"], [], ["", "0", "1", "2"]]
    assert found["changes"] == ["blue"]


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_a_browser_shows_no_walls_at_full_size(write):
    """The rows of impacts and onsets are away, the row of prompts is there if they change."""
    data = contents(cfg=config.FULL, cues=[(0, "rain"), (1, "snow")])
    found = in_browser(write("rain, then snow", data))
    assert found["rows"] == ["prompts", "sound", "seconds", "blocks"]
    assert found["prompts"] == ["rain", "snow"] and found["switches"] == 1


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
@pytest.mark.parametrize("seconds, width", [(60, 500), (120, 1200), (3600, 500)])
def test_labels_do_not_overlap(write, seconds, width):
    """At any length and width; nothing is wider than the page, and the table stays short."""
    cues = [(0, "red " * 100), (5, "blue"), (6, "海浪拍打岩石" * 20), (seconds - 9, "green")]
    data = contents(seconds, blocks=seconds + 1, cues=cues)
    found = in_browser(write("red", data), width, seconds - 1)
    assert not found["overlaps"] and len(found["seconds"]) > 5 and len(found["blocks"]) > 4
    assert found["seconds"][-1] == str(seconds) and found["switches"] == 3
    assert found["width"] <= width and len([*filter(None, found["cells"])]) == 13
    assert found["high"] < 450
    assert f"{seconds - 2}{seconds}" in found["cells"][-1]  # evicted, new


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_a_browser_takes_no_prompt_for_code(write):
    """All nasty prompts at once, one a second: each is shown as it is."""
    cues = list(enumerate(NASTY.values()))
    data = contents(len(cues), blocks=len(cues) + 1, cues=cues)
    found = in_browser(write(", then ".join(NASTY.values()), data))
    assert found["prompts"] == [sheet.plain(words) for words in NASTY.values()]


# ---- other pictures ----


def test_masks_of_an_impossible_window_are_refused(tmp_path, monkeypatch, capsys):
    """One line, and nothing is drawn; a window of 0 is possible: the past is block 0 only."""
    out = tmp_path / "masks.png"
    arguments = "masks", "--window", -3, "--out", out
    status, _, err = run_here(plots, arguments, monkeypatch, capsys)
    assert (
        status == 2
        and err == "studies/plots.py: --window -3: expected a whole number from 0 to 30\n"
    )
    assert not out.exists()


def test_the_masks_are_drawn_from_the_command_line(tmp_path, monkeypatch, capsys):
    """A PNG at the given path."""
    out = tmp_path / "picture.png"
    status, printed, _ = run_here(plots, ["masks", "--out", out], monkeypatch, capsys)
    assert status == 0 and printed == f"wrote {out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_axes_of_a_mask_are_marked_by_the_blocks_of_their_own_stream():
    """Queries down, keys across; lines stand where a block begins."""
    cfg = config.TOY
    video, audio = masks.video_token_blocks(3, cfg), masks.audio_token_blocks(3, cfg)
    figure = plots.draw_masks(cfg, 3)
    queries_and_keys = (video, video), (audio, audio), (video, audio), (audio, video)
    for ax, (queries, keys) in zip(figure.axes, queries_and_keys, strict=True):
        down = [y[0] for y in (line.get_ydata() for line in ax.lines) if y[0] == y[1]]
        across = [x[0] for x in (line.get_xdata() for line in ax.lines) if x[0] == x[1]]
        for lines, blocks in ((down, queries), (across, keys)):
            assert lines == [(blocks < k).sum() - 0.5 for k in (1, 2)]
    plots.plt.close(figure)


def test_drift_is_drawn_at_the_middle_of_each_interval():
    """A panel for each metric, under its title."""
    rows = [{metric: i + k for i, metric in enumerate(plots.DRIFT)} for k in range(3)]
    figure = plots.draw_drift({"student": rows}, step=5)
    for i, (ax, (title, _)) in enumerate(zip(figure.axes, plots.DRIFT.values(), strict=True)):
        assert ax.get_title() == title
        assert ax.lines[0].get_xydata().tolist() == [[2.5, i], [7.5, i + 1], [12.5, i + 2]]
    plots.plt.close(figure)


def test_every_training_log_becomes_a_picture(tmp_path):
    """NAME_curve.json -> NAME_curve.png."""
    (tmp_path / "x_curve.json").write_text('[{"step": 25, "loss": 2, "video": 1, "low": 0.5}]')
    plots.draw_losses(tmp_path)
    assert (tmp_path / "x_curve.png").read_bytes().startswith(b"\x89PNG")
