"""The page holds the film, the events and the cache, and a browser can show it."""

import re
import shutil
import subprocess

import pytest
import torch

import config
import page
import toy_world

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def toy_clip():
    clips = toy_world.draw_clips([toy_world.HELD_OUT])
    return toy_world.render_video(clips, 3)[0], toy_world.render_sound(clips, 3)[0]


@pytest.fixture
def written(tmp_path):
    """A page with a film that is none."""
    (tmp_path / "film.mp4").write_bytes(b"\x00film")
    data = page.contents(*toy_clip(), config.TOY, num_blocks=4, window=1)
    page.write(tmp_path / "page.html", tmp_path / "film.mp4", "red </script> & metal", data)
    return tmp_path / "page.html"


def test_the_page_needs_nothing_but_itself(written):
    """Film inside, no address of anything else, the prompt as text and not as markup."""
    text = written.read_text()
    assert "data:video/mp4;base64,AGZpbG0=" in text
    assert not re.findall(r"https?://|@\w+@", text)
    assert "<h1>red &lt;/script&gt; &amp; metal</h1>" in text and text.count("</script>") == 1


def test_what_is_drawn_is_what_happened():
    """True clips: as many impacts as onsets, at the same times; blocks and cache of four blocks."""
    data = page.contents(*toy_clip(), config.TOY, num_blocks=4, window=1)
    assert data["seconds"] == 3 and data["blocks"] == [[0, 0], [0, 1], [1, 2], [2, 3]]
    assert data["cache"] == [[0], [0, 1], [0, 1, 2], [0, 3, 2]]
    inside = [[t for t, _ in data[kind] if 0.2 < t < 2.8] for kind in ("seen", "heard")]
    assert len(inside[0]) == len(inside[1]) > 0
    assert max(abs(a - b) for a, b in zip(*inside)) < 0.03
    levels = torch.tensor(data["levels"])
    assert levels.shape == (151, toy_world.BANDS) and levels.min() == 0 and levels.max() == 100


def test_of_a_long_stream_the_first_part_is_shown():
    """Frames of 3 seconds out of 100 blocks: four rows."""
    data = page.contents(*toy_clip(), config.TOY, num_blocks=101, window=4)
    assert len(data["blocks"]) == len(data["cache"]) == 4


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_a_browser_draws_it(written):
    """The script runs to its end: four rows of cells, an axis as wide as the page."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    command = [CHROMIUM, *flags, "--dump-dom", written.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    table = re.search(r'<table id="cache">(.*?)</table>', dom, re.S)[1]
    rows = [re.findall(r"<td[^>]*>(\d+)</td>", row) for row in table.split("</tr>")[:-1]]
    assert [[int(n) for n in row] for row in rows] == [[0], [0, 1], [0, 1, 2], [0, 3, 2]]
    assert int(re.search(r'<canvas id="axis" width="(\d+)"', dom)[1]) > 300
