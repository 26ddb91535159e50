"""Measure and record the live page of generate.py in a real browser; needs Chromium.

    python -m studies.live        results/live.json and assets/live.gif, in two minutes

start_seconds   from pressing start until picture and sound play, for each press
longest_gap     seconds for which the picture stood still in a minute of one stream
ran_dry         what the page says about that minute
"""

import io
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from plumbing import browser, cli, files

# Notes every change of the time that plays, as [milliseconds of the clock, seconds of the film].
CLOCK = """
window.ticks = [];
setInterval(() => film.currentTime != ticks.at(-1)?.[1] &&
  ticks.push([performance.now(), film.currentTime]), 10)
"""
PROMPTS = "red fast metal", "blue slow wood", "yellow fast wood"
SCREEN = {"width": 1060, "height": 640, "deviceScaleFactor": 1.25, "mobile": False}
FRAMES, STEP, COLOURS = 6, 1, 128  # of the recording: for each prompt; seconds between two


class Process:
    """`python generate.py --live` in a process of its own."""

    def __init__(self, folder, *options):
        script = cli.ROOT / "generate.py"
        command = [sys.executable, "-u", script, "--live", "--no-browser", *options]
        # A shell lets programs in its background ignore Ctrl-C, and their children do as they do.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
        )
        signal.signal(signal.SIGINT, before)
        self.link = self.process.stdout.readline().split()[0]

    def end(self) -> tuple[int, str]:
        """Press Ctrl-C; return the exit status and what the process still printed."""
        self.process.send_signal(signal.SIGINT)
        out = self.process.communicate(timeout=30)[0]
        return self.process.returncode, out


def longest_gap(ticks) -> float:
    """Return the longest time for which the film stood still, in seconds.

    >>> longest_gap([[0, 0.0], [10, 0.01], [500, 0.02], [510, 0.03]])
    0.48
    """
    # Between two changes of the film's time, the clock runs ahead by the gap.
    steps = itertools.pairwise(ticks)
    return round(max((b[0] - a[0]) / 1000 - (b[1] - a[1]) for a, b in steps), 3)


def press_start(tab) -> float:
    """Press start; return the seconds until picture and sound play."""
    tab.run("get('send').click()")
    return float(tab.wait("get('played').textContent").split()[0])


def press_stop(tab):
    tab.run("get('stop').click()")
    tab.wait("get('send').textContent == 'start'")


def play_for(tab, seconds) -> dict:
    """Play a stream; return its longest gap, and whether it ran dry."""
    tab.run(CLOCK)
    press_start(tab)
    tab.wait(f"film.currentTime > {seconds}", 2 * seconds + 20)
    found = {
        "longest_gap": longest_gap([tick for tick in tab.run("ticks") if tick[1] > 0]),
        "ran_dry": tab.run("get('dry').textContent"),
        "between_blocks": tab.run("get('gaps').textContent"),
    }
    press_stop(tab)
    return found


def record(tab, path):
    """Write a GIF of a stream whose prompt changes twice."""
    pictures = []
    for prompt in PROMPTS:
        tab.run(f"get('words').value = '{prompt}', get('send').click()")
        for _ in range(FRAMES):
            time.sleep(STEP)
            shot = Image.open(io.BytesIO(tab.picture())).convert("RGB")
            pictures.append(shot.reduce((2, 2)))
    together = np.concatenate([np.asarray(picture) for picture in pictures[:: FRAMES // 2]])
    palette = Image.fromarray(together).quantize(COLOURS)
    first, *later = (picture.quantize(palette=palette, dither=0) for picture in pictures)
    how = {"save_all": True, "append_images": later, "duration": 1000 * STEP, "loop": 0}
    files.write_beside(path, lambda p: first.save(p, "gif", **how))


def main():
    p = cli.parser(__doc__)
    p.add_argument("--presses", type=cli.whole(1, 100), default=5, help="how often to press start")
    p.add_argument("--seconds", type=cli.whole(1, 3600), default=60, help="of the stream to watch")
    p.add_argument("--out", default="results/live.json", help="file of the measurements")
    p.add_argument("--gif", default="assets/live.gif", help="file of the recording")
    args = p.parse_args()
    if not browser.CHROMIUM:
        raise ValueError("needs Chromium; install it, so that the command chromium is found")
    server = Process(Path.cwd())
    try:
        with browser.opened(server.link) as tab:
            starts = []
            for _ in range(args.presses):
                starts.append(press_start(tab))
                time.sleep(2)
                press_stop(tab)
            report = {"start_seconds": starts, "cores": os.cpu_count(), "load": os.getloadavg()[0]}
            report |= {"seconds": args.seconds, **play_for(tab, args.seconds)}
            files.write_json(args.out, {**cli.machine(torch.device("cpu")), **report})
            tab.send("Emulation.setDeviceMetricsOverride", **SCREEN)
            record(tab, args.gif)
    finally:
        server.end()
    print(f"picture and sound after {min(starts):.2f} to {max(starts):.2f} s; {report}")
    print(f"wrote {args.out} and {args.gif}")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
