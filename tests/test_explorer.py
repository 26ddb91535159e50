"""The explorer draws the masks of masks.py and the ring of kv_cache.py, in a real browser."""

import base64
import functools
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

import config
import masks
from kv_cache import CachedView

PAGE = ROOT / "notebooks" / "explorer.html"
BROWSERS = "chromium", "chromium-browser", "google-chrome"
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
LAYOUTS = {"paper": config.TOY, "released": config.TOY_RELEASED}
SETTINGS = [
    {"layout": ("paper", "released")[i % 2], "blocks": blocks, "window": window, "sinks": sinks}
    for i, (blocks, window, sinks) in enumerate(
        [(2, 1, 0), (2, 1, 16), (2, 7, 1), (3, 1, 0), (3, 2, 32), (4, 1, 16), (4, 1, 0), (4, 2, 5),
         (5, 2, 16), (5, 4, 16), (5, 3, 0), (6, 4, 16), (6, 1, 3), (6, 2, 0), (7, 5, 16), (7, 3, 8),
         (7, 1, 16), (8, 7, 16), (8, 2, 0), (8, 6, 31)]
    )
]  # fmt: skip
# Moves the sliders as a hand does, and reads the drawn pixels and cells.
READER = """
<script>
function pixels(canvas) {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const bits = new Uint8Array(Math.ceil(data.length / 32));
  for (let i = 0; i < data.length / 4; i++)
    if (data[4 * i] + data[4 * i + 1] + data[4 * i + 2] < 765) bits[i >> 3] |= 128 >> (i & 7);
  let text = "";
  for (const byte of bits) text += String.fromCharCode(byte);
  return [canvas.height, canvas.width, btoa(text)];
}
const found = SETTINGS.map(setting => {
  for (const [id, value] of Object.entries(setting)) get(id).value = value;
  get("window").dispatchEvent(new Event("input", { bubbles: true }));
  const masks = Object.fromEntries([...document.querySelectorAll("canvas")].map(c => [c.id, pixels(c)]));
  const cells = row => [...row.querySelectorAll("td")].map(cell => cell.textContent);
  return { masks, ring: [...get("ring").rows].slice(1).map(cells) };
});
document.title = "found " + JSON.stringify(found);
</script>
"""  # noqa: E501


@functools.cache
def drawn():
    """Return what the page draws for every setting, in one run of the browser."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        reader = READER.replace("SETTINGS", json.dumps(SETTINGS), 1)
        page.write_text(PAGE.read_text("utf-8").replace("</html>", reader + "</html>"), "utf-8")
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                   f"--user-data-dir={folder}/profile", page.as_uri()]  # fmt: skip
        printed = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return json.loads(re.search(r"<title>found (.*)</title>", printed)[1])


@pytest.mark.skipif(not BROWSER, reason="no Chromium")
@pytest.mark.parametrize("i", range(len(SETTINGS)))
def test_the_page_draws_what_the_code_computes(i):
    """Every pixel of the four masks, and every place of the ring."""
    s, found = SETTINGS[i], drawn()[i]
    cfg = replace(LAYOUTS[s["layout"]], num_sinks=s["sinks"])
    for site, mask in masks.four_masks(cfg, s["blocks"], s["window"]).items():
        height, width, text = found["masks"][site]
        bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))
        assert (height, width) == tuple(mask.shape), site
        assert np.array_equal(bits[: height * width].reshape(height, width), mask.numpy()), site
    view = CachedView(replace(cfg, num_layers=1), s["blocks"], s["window"])
    ring = {}
    for block, row in enumerate(found["ring"]):
        cache = view.layers[0]["v2a"]
        if block:
            place = (cache.slots.start - cache.prefix_tokens) // cache.block_tokens
            ring[place] = str(block)
        places = ["0", *(ring.get(place, "") for place in range(cache.ring_blocks))]
        assert row == [*places, str(view.num_evicted)], block
        for site in view.layers[0].values():
            site.next_block()
        view.block += 1


def test_the_page_needs_no_other_file():
    """Self-contained: no address in it, and no import."""
    text = PAGE.read_text("utf-8")
    assert not re.search(r"https?:|src=|href=|import |fetch\(", text)
