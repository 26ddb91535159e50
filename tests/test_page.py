"""The page holds the video, its events and the cache, and a browser can show it."""

import re
import shutil
import subprocess

import pytest
import torch
from helpers import run_here

import config
from film import page, sheet
from studies import plots
from toy import world as toy_world

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def toy_clip():
    """Three seconds of frames and sound."""
    clips = toy_world.draw_clips([toy_world.HELD_OUT])
    return toy_world.render_video(clips, 3)[0], toy_world.render_sound(clips, 3)[0]


def contents(cfg=config.TOY, blocks=4):
    return page.contents(*toy_clip(), cfg, blocks, window=1)


@pytest.fixture
def written(tmp_path):
    """A page with a made-up video."""
    (tmp_path / "film.mp4").write_bytes(b"\x00film")
    title = "red </script> & metal"
    page.write(tmp_path / "page.html", tmp_path / "film.mp4", title, contents())
    return tmp_path / "page.html"


def test_the_page_needs_nothing_but_itself(written):
    """The video is inside, there is no other address, the prompt is text and not markup."""
    text = written.read_text()
    assert "data:video/mp4;base64,AGZpbG0=" in text
    assert not re.findall(r"https?://|@\w+@", text)
    assert "<h1>red &lt;/script&gt; &amp; metal</h1>" in text and text.count("</script>") == 1


def test_what_is_drawn_is_what_happened():
    """Ground truth: as many impacts as onsets, at the same times; four blocks and their cache.

    Of a longer stream, these first seconds are shown.
    """
    data = contents()
    assert data["seconds"] == 3 and data["blocks"] == [[0, 0], [0, 1], [1, 2], [2, 3]]
    assert data["cache"] == [[0], [0, 1], [0, 1, 2], [0, 3, 2]]
    inside = [[t for t, _ in data[kind] if 0.2 < t < 2.8] for kind in ("seen", "heard")]
    assert len(inside[0]) == len(inside[1]) > 0
    assert max(abs(a - b) for a, b in zip(*inside)) < 0.03
    levels = torch.tensor(data["levels"])
    assert levels.shape == (151, toy_world.BANDS) and levels.min() == 0 and levels.max() == 100
    assert contents(blocks=101) == data


@pytest.mark.parametrize("cfg", [config.TOY_RELEASED, config.TOY_TEACHER], ids=lambda cfg: cfg.name)
def test_every_toy_has_events_and_walls(cfg):
    """Marks and labels do not depend on the block layout."""
    data = contents(cfg), contents()
    assert data[0]["seen"] == data[1]["seen"] != [] and data[0]["heard"] == data[1]["heard"] != []
    figure = sheet.draw_clip(*toy_clip(), cfg=cfg)
    walls = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert tuple(walls) == toy_world.WALLS and "onsets heard" in figure.get_suptitle()
    sheet.plt.close(figure)


def test_masks_of_an_impossible_window_are_refused(tmp_path, monkeypatch, capsys):
    """One line, and nothing is drawn; a window of 0 is possible: the past is block 0 only."""
    out = tmp_path / "masks.png"
    arguments = "masks", "--window", -3, "--out", out
    status, _, err = run_here(plots, arguments, monkeypatch, capsys)
    assert status == 2 and err == "studies/plots.py: --window -3: expected 0 or more\n"
    assert not out.exists()


def test_the_masks_are_drawn_from_the_command_line(tmp_path, monkeypatch, capsys):
    """A PNG at the given path."""
    out = tmp_path / "picture.png"
    status, printed, _ = run_here(plots, ["masks", "--out", out], monkeypatch, capsys)
    assert status == 0 and printed == f"wrote {out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")


def test_every_training_log_becomes_a_picture(tmp_path):
    """NAME_curve.json -> NAME_curve.png."""
    (tmp_path / "x_curve.json").write_text('[{"step": 25, "loss": 2, "video": 1, "low": 0.5}]')
    plots.draw_losses(tmp_path)
    assert (tmp_path / "x_curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_a_browser_draws_it(written):
    """The script runs to its end: four rows of cells, an axis of the page's width."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    command = [CHROMIUM, *flags, "--dump-dom", written.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    table = re.search(r'<table id="cache">(.*?)</table>', dom, re.S)[1]
    rows = [re.findall(r"<td[^>]*>(\d+)</td>", row) for row in table.split("</tr>")[:-1]]
    assert [[int(n) for n in row] for row in rows] == [[0], [0, 1], [0, 1, 2], [0, 3, 2]]
    assert int(re.search(r'<canvas id="axis" width="(\d+)"', dom)[1]) > 300
