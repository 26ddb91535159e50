"""Stream video and sound from a prompt: noise, block by block, into a film that grows.

    python generate.py
    python generate.py --prompt "blue slow wood" --seconds 20 --seed 3
    python generate.py --prompt "0: red fast metal" --prompt "5: blue slow wood" --seconds 10

Writes out.mp4 (24 frames a second, with sound) and out.png (its frames above the bands of its
sound, impacts and onsets marked).

A prompt names a colour (red green blue yellow), a speed (slow fast) and a material (wood metal), in
any order; what is left out, the model chooses. "5: ..." switches to a prompt at second 5.

Every block is one second (block 0 a single frame); the model remembers --window seconds of its past
besides the very first frame, so that memory and time per block stay the same for ever. Interrupting
leaves a playable file of all finished blocks. The same seed gives the same bytes on one machine.

How speed is counted:  TTFC  from having weights and prompt to the first second of picture and sound
written;  passes  the transformer alone;  end to end  with decoding and writing.
"""

import contextlib
import re
import resource
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import cli
import config
import dmd
import files
import model
import plots
import self_forcing
import toy_codec
import toy_world
from masks import block_seconds, num_blocks
from movie import Movie

WEIGHTS = {"toy": Path(__file__).parent / "weights" / "toy_self_forcing.safetensors"}
SHEET_SECONDS = 60  # of a longer stream, only so much is drawn
SCALE = 10  # the toy's 32 pixels become 320
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---- the stream ----


class Cue(NamedTuple):
    """From this second on, this prompt."""

    seconds: float
    prompt: str


def parse_cues(prompts, seconds) -> list[Cue]:
    """Command line prompts, each "words" or "second: words", in order of time.

    Raises ValueError if none begins at 0, two begin together, or one begins after the end.

    >>> parse_cues(["5: blue", "red fast"], 10)
    [Cue(seconds=0.0, prompt='red fast'), Cue(seconds=5.0, prompt='blue')]
    """
    cues = []
    for text in prompts:
        start, words = re.fullmatch(r"(?:\s*(\d+(?:\.\d+)?)\s*:)?(.*)", text, re.S).groups()
        toy_world.parse_prompt(words)  # complain now, not in the middle of a stream
        cues.append(Cue(float(start or 0), words.strip()))
    cues.sort()
    starts = [cue.seconds for cue in cues]
    if starts[0] != 0:
        raise ValueError(f"the first prompt begins at second {starts[0]:g}; one must begin at 0")
    if len(set(starts)) < len(starts):
        raise ValueError("two prompts begin at the same second")
    if starts[-1] >= seconds:
        raise ValueError(f"a prompt begins at second {starts[-1]:g}, the clip ends at {seconds:g}")
    return cues


@torch.inference_mode()
def stream(net, prompt, seconds=5, seed=0, window=4, steps=None, batch=1):
    """Yield `self_forcing.Block`s of clean latents, each as soon as it exists.

    prompt   words, or a list of Cue
    window   blocks remembered besides prefix and sinks; None: all. With 4 no key is ever further
             away than in a training clip of 5 seconds
    steps    passes a block besides the refresh, default as trained
    batch    clips side by side, different only in their noise
    """
    cfg, blocks = net.cfg, num_blocks(seconds, net.cfg)
    cues = [Cue(0, prompt)] if isinstance(prompt, str) else prompt
    like = next(net.parameters())
    texts = []  # the keys and values of each prompt, projected when its time has come

    def text_at(k):
        start = block_seconds(k, cfg)[0]
        index = max(i for i, cue in enumerate(cues) if cue.seconds <= start)
        while len(texts) <= index:
            tokens = toy_world.parse_prompt(cues[len(texts)].prompt).expand(batch, -1)
            texts.append(net.project_text(toy_world.caption_features(tokens).to(like)))
        return texts[index]

    sigmas = dmd.few_step_sigmas(cfg, steps)
    generator = torch.Generator().manual_seed(seed)
    yield from self_forcing.rollout(net, text_at, blocks, sigmas, generator, batch, window)


class Decoder:
    """Latents of consecutive blocks of one stream -> frames, band levels and samples."""

    def __init__(self, codec):
        self.codec = codec
        self.levels = torch.zeros(0, toy_world.BANDS)  # the last mel frame, once there is one
        self.mel_frames = 0

    def decode(self, block):
        """-> frames (P, 3, H, W) in [0, 1], levels (M, 16), samples (n,) in [-1, 1]."""
        first = block.index == 0
        frames = self.codec.decode_video(block.video.float().cpu(), first)[0]
        levels = self.codec.decode_audio(block.audio.float().cpu(), first)[0]
        # sound lies between mel frames: each block begins at the last frame of the one before
        heard = torch.cat([self.levels, levels])
        start = self.mel_frames - len(self.levels)
        samples = toy_codec.synthesise(heard, start, self.codec.cfg)
        self.levels, self.mel_frames = levels[-1:], self.mel_frames + len(levels)
        return frames, levels, samples


# ---- the command line ----


def load_student(path, cfg, device="cpu", dtype=torch.float32):
    """A student for this config.  Raises ValueError for a file that does not fit it."""
    net = model.load(path)
    ours, theirs = cfg.to_dict(), net.cfg.to_dict()
    if differing := [n for n in ours if ours[n] != theirs[n] and n != "name"]:
        n = differing[0]
        raise ValueError(
            f"{path}: made for config {net.cfg.name!r} with {n}={theirs[n]!r}; "
            f"--config {cfg.name} needs {n}={ours[n]!r}"
        )
    return net.to(device, dtype)


def parse_seconds(text) -> float:
    """A positive number of seconds from the command line."""
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(f"--seconds {text}: expected a whole number of seconds") from None
    if not 0 < seconds < float("inf"):
        raise ValueError(f"--seconds {text}: expected 1 or more")
    return seconds


class Timing:
    """Seconds spent, block by block."""

    def __init__(self):
        self.start = self.mark = time.perf_counter()
        self.passes, self.output, self.ttfc = [], [], None

    def lap(self):
        now = time.perf_counter()
        seconds, self.mark = now - self.mark, now
        return seconds

    def report(self, frames, cfg) -> dict:
        """Frames per second by both conventions, medians from the third block on."""
        passes, whole = sum(self.passes), self.mark - self.start
        third_on = sorted(self.passes[2:]) or sorted(self.passes)
        return {
            "frames": frames,
            "ttfc_seconds": self.ttfc,
            "passes_fps": frames / passes,
            "passes_times_real_time": frames / passes / cfg.fps,
            "end_to_end_fps": frames / whole,
            "end_to_end_times_real_time": frames / whole / cfg.fps,
            "median_block_seconds": third_on[len(third_on) // 2],
            "passes_seconds": self.passes,
            "output_seconds": self.output,
            "peak_memory_mb": peak_memory_mb(),
        }


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


@contextlib.contextmanager
def signals_wait():
    """Ctrl-C and a polite kill wait until a block is written: no half second in the film."""
    caught, kinds = [], (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(kind, lambda *_: caught.append(True)) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, handlers):
            signal.signal(kind, handler)
    if caught:
        raise KeyboardInterrupt


def run(blocks, decoder, movie, seconds, timing):
    """Decode and write blocks as they come.  Returns frames and levels for the contact sheet.

    Ctrl-C and a polite kill end it early, with every finished block written.
    """
    cfg, sheet = decoder.codec.cfg, []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    bar = tqdm(
        total=seconds, unit="s", desc="video", bar_format="{desc} {n:.0f}/{total:.0f} s {bar}"
    )
    try:
        for block in blocks:
            timing.passes.append(timing.lap())
            low, high = block_seconds(block.index, cfg)
            with signals_wait():
                frames, levels, samples = decoder.decode(block)
                pictures = (frames * 255).round().byte().permute(0, 2, 3, 1).numpy()
                movie.add(pictures, samples.numpy())
                timing.output.append(timing.lap())
                if block.index == 1:
                    timing.ttfc = timing.mark - timing.start
                if high <= SHEET_SECONDS:
                    sheet.append((frames, levels))
            bar.update(high - low)
            bar.write(
                f"block {block.index:3}  {low:4g} - {high:<4g} s   passes "
                f"{1000 * timing.passes[-1]:5.0f} ms   decode and write "
                f"{1000 * timing.output[-1]:4.0f} ms",
                file=sys.stdout,
            )
    except KeyboardInterrupt:
        print(f"interrupted: {movie.frames} frames are kept", file=sys.stderr)
    finally:
        bar.close()
    return sheet


def main():
    p = cli.parser(__doc__)
    words = 'words, or "second: words"; may be repeated (default: red fast metal)'
    p.add_argument("--prompt", action="append", metavar="WORDS", help=words)
    p.add_argument("--seconds", default="5", help="length of the film, a whole number")
    p.add_argument("--seed", type=int, default=0, help="another seed, another film")
    p.add_argument("--window", type=int, default=4, help="seconds of the past that are remembered")
    p.add_argument("--steps", type=int, help="passes a block, 1 to 4; fewer is faster and worse")
    p.add_argument("--out", default="out.mp4", help="film; the contact sheet ends in .png instead")
    p.add_argument("--report", help="write the timings to this JSON file")
    p.add_argument("--config", default="toy", help=f"one of {', '.join(config.CONFIGS)}")
    p.add_argument("--weights", help="safetensors file; default: the shipped student")
    p.add_argument("--device", default="cpu", help="cpu, cuda, mps, ...")
    p.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of the transformer")
    args = p.parse_args()
    cfg = cli.find_config(args.config)
    if cfg.name not in WEIGHTS:
        raise ValueError(f"--config {cfg.name}: only {', '.join(WEIGHTS)} can be streamed so far")
    seconds = parse_seconds(args.seconds)
    num_blocks(seconds, cfg), dmd.few_step_sigmas(cfg, args.steps)
    cues = parse_cues(args.prompt or ["red fast metal"], seconds)
    device, codec = cli.find_device(args.device), toy_codec.load(cfg)
    net = load_student(args.weights or WEIGHTS[cfg.name], cfg, device, DTYPES[args.dtype])
    if args.window < 1:
        raise ValueError(f"--window {args.window}: a block must remember at least 1 second")
    movie, timing = Movie(args.out, cfg.fps, toy_codec.SAMPLE_RATE, SCALE), Timing()
    try:
        blocks = stream(net, cues, seconds, args.seed, args.window, args.steps)
        sheet = run(blocks, Decoder(codec), movie, seconds, timing)
    except BaseException:
        movie.discard()
        raise
    movie.close()
    finish(args, cues, cfg, sheet, timing, movie.frames)


def finish(args, cues, cfg, sheet, timing, frames):
    """Contact sheet, report and a line that sums up."""
    if not sheet:
        raise ValueError("interrupted before the first block was finished; nothing was written")
    report = timing.report(frames, cfg)
    title = ", then ".join(cue.prompt for cue in cues)
    picture = Path(args.out).with_suffix(".png")
    plots.save(plots.draw_clip(*map(torch.cat, zip(*sheet)), title, cfg), picture)
    if args.report:
        files.write_json(args.report, report)
    ttfc = f"{report['ttfc_seconds']:.2f} s" if report["ttfc_seconds"] else "-"
    print(
        f"{frames} frames: TTFC {ttfc}, passes {report['passes_fps']:.0f} FPS = "
        f"{report['passes_times_real_time']:.1f}x real time, end to end "
        f"{report['end_to_end_fps']:.0f} FPS = {report['end_to_end_times_real_time']:.1f}x, "
        f"peak memory {report['peak_memory_mb']:.0f} MB"
    )
    print(f"wrote {args.out} and {picture}")


if __name__ == "__main__":
    cli.run(main)
