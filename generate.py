"""Stream video and sound from a prompt: noise, block by block, into a film that grows.

    python generate.py
    python generate.py --prompt "blue slow wood" --seconds 20 --seed 3
    python generate.py --prompt "0: red fast metal" --prompt "5: blue slow wood" --seconds 10
    python generate.py --config toy_released --window 1 --seconds 60

Writes out.mp4 (24 frames a second, with sound) and out.png (its frames above the bands of its
sound, impacts and onsets marked).

A prompt of the toy names a colour (red green blue yellow), a speed (slow fast) and a material (wood
metal), in any order; what is left out, the model chooses. "5: ..." switches prompts at second 5.

Every block is one second (block 0 a single frame); the model remembers --window seconds of its past
besides block 0, so that memory and time per block stay the same for ever. The student of
toy_released has a whole second in block 0, as the later release, and forgets less of how its ball
looks and sounds. Interrupting leaves a playable file of all finished blocks. The same seed gives
the same bytes on one machine.

At full size, on one GPU, with published weights or with noise in their place (to measure):

    python generate.py --config released --device cuda --weights omniforcing/ --ltx2 LTX-2/ \\
                       --prompt "A dog barks at the waves."
    python generate.py --config full --device cuda --weights random --seconds 30

--weights is the generator's .safetensors file, index or folder. --ltx2 is LTX-2's folder in
diffusers' format, for text_encoder, tokenizer, connectors, vae, audio_vae and vocoder.

--speed-up all: everything of benchmarks/README.md that can run here, or some of it by name. It
changes rounding, so a film is not the same bit by bit, and nothing else.

How speed is counted:  TTFC  from having weights and prompt to the first second of picture and sound
written;  passes  the transformer alone;  end to end  with decoding and writing; both of the median
block from the third on. --report has the whole stream's as well, and every block's and stage's.
"""

import contextlib
import re
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import dmd
import self_forcing
import teacher
from film import page
from film.mp4 import Movie, check_film
from full_size import parts
from full_size import text as captions
from full_size.parts import Order
from full_size.text import toy_features
from masks import block_seconds, num_blocks
from plumbing import cli, files
from plumbing.stopwatch import Stopwatch
from studies import plots

STREAMED = ("toy", "toy_released", "full", "released")  # configs of students
TOY_PROMPT = "red fast metal"  # if nothing is asked for
FULL_PROMPT = "Waves break on a rocky shore at dusk while gulls cry."
SHEET_SECONDS, SHEET_PIXELS = 60, 64  # of a long stream, of large frames, only so much is drawn
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---- the stream ----


class Cue(NamedTuple):
    """From this second on, this prompt."""

    seconds: float
    prompt: str


def parse_cues(prompts, seconds, check=toy_features) -> list[Cue]:
    """Command line prompts, each "words" or "second: words", in order of time.

    check   called with the words of each, to complain now and not in the middle of a stream

    Raises ValueError if none begins at 0, two begin together, or one begins after the end.

    >>> parse_cues(["5: blue", "red fast"], 10)
    [Cue(seconds=0.0, prompt='red fast'), Cue(seconds=5.0, prompt='blue')]
    """
    cues = []
    for text in prompts:
        start, words = re.fullmatch(r"(?:\s*(\d+(?:\.\d+)?)\s*:)?(.*)", text, re.S).groups()
        check(words)
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


def prompt_at(start, cues) -> int:
    """Which prompt a block reads that begins at this second: the last that began by then."""
    return max(i for i, cue in enumerate(cues) if cue.seconds <= start)


def check_read(cues, blocks, cfg):
    """Raises ValueError for a prompt that no block would read: a switch waits for the next one."""
    starts = [block_seconds(k, cfg)[0] for k in range(blocks)]
    read = {prompt_at(start, cues) for start in starts}
    for cue in (cue for i, cue in enumerate(cues) if i not in read):
        raise ValueError(
            f"no block would read the prompt at second {cue.seconds:g}: one begins every "
            f"{cfg.block_seconds:g} s, the last at {starts[-1]:g}"
        )


@torch.inference_mode()
def stream(
    net, prompt, seconds=5, seed=0, window=4, steps=None, batch=1, read=toy_features,
    merge=False, view=None,
):  # fmt: skip
    """Yield `self_forcing.Block`s of clean latents, each as soon as it exists.

    prompt   words, or a list of Cue
    window   blocks remembered besides prefix and sinks; None: all. With 4, or 3 where block 0 is
             a whole second, no key is ever further away than in a training clip of 5 seconds
    steps    passes a block besides the refresh, default as trained
    batch    clips side by side, different only in their noise
    read     words -> caption features (1, K, C_text), one for both streams or one for each
    merge    refresh a block in the first pass of the next one; this and `view`: see `rollout`
    """
    cfg, blocks = net.cfg, num_blocks(seconds, net.cfg)
    cues = [Cue(0, prompt)] if isinstance(prompt, str) else prompt
    like = next(net.parameters())
    texts = []  # the keys and values of each prompt, projected when its time has come

    def text_at(k):
        index = prompt_at(block_seconds(k, cfg)[0], cues)
        while len(texts) <= index:
            features = read(cues[len(texts)].prompt)
            texts.append(net.project_text(*(f.to(like).expand(batch, -1, -1) for f in features)))
        return texts[index]

    sigmas = dmd.few_step_sigmas(cfg, steps)
    generator = torch.Generator().manual_seed(seed)
    how = dict(merge=merge, view=view)
    yield from self_forcing.rollout(net, text_at, blocks, sigmas, generator, batch, window, **how)


# ---- the command line ----


def parse_seconds(text) -> float:
    """A positive number of seconds from the command line."""
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(f"--seconds {text}: expected a whole number of seconds") from None
    if not 0 < seconds < float("inf"):
        raise ValueError(f"--seconds {text}: expected 1 or more")
    return seconds


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


def run(blocks, decoder, movie, seconds, watch):
    """Decode and write blocks as they come.  Returns frames and levels for the contact sheet.

    Ctrl-C and a polite kill end it early, with every finished block written.
    """
    sheet = []
    movie.add = watch.watch("write", movie.add, by_cpu=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    bar = tqdm(
        total=seconds, unit="s", desc="video", bar_format="{desc} {n:.0f}/{total:.0f} s {bar}"
    )
    try:
        for block in blocks:
            watch.block_made()
            low, high = block_seconds(block.index, decoder.cfg)
            with signals_wait():
                add(decoder.decode(block), movie, sheet, decoder.cfg)
                watch.block_written(movie.frames > decoder.cfg.fps)  # frame 0 and one second
            bar.update(high - low)
            bar.write(line_of(block.index, low, high, watch), file=sys.stdout)
    except KeyboardInterrupt:
        print(f"interrupted: {movie.frames} frames are kept", file=sys.stderr)
    finally:
        bar.close()
    add(decoder.finish(), movie, sheet, decoder.cfg)
    return sheet


def line_of(index, low, high, watch):
    """What a block took, on one line."""
    passes, output = 1000 * watch.passes[-1], 1000 * watch.output[-1]
    times = f"passes {passes:5.0f} ms   decode and write {output:4.0f} ms"
    return f"block {index:3}  {low:4g} - {high:<4g} s   {times}"


def add(piece, movie, sheet, cfg):
    """Write what is decoded; keep a little for the contact sheet."""
    pictures = (piece.frames * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    movie.add(pictures, piece.samples.float().cpu().numpy())
    if movie.frames <= SHEET_SECONDS * cfg.fps + 1:
        sheet.append((thumbnails(piece.frames), piece.levels.float().cpu()))


def thumbnails(frames):
    """(P, 3, H, W) -> the same, on the CPU and no higher than SHEET_PIXELS."""
    factor = frames.shape[2] // SHEET_PIXELS
    frames = frames.float()
    return (F.avg_pool2d(frames, factor) if factor > 1 and len(frames) else frames).cpu()


def options():
    """The command line."""
    p = cli.parser(__doc__)
    words = 'words, or "second: words"; may be repeated'
    p.add_argument("--prompt", action="append", metavar="WORDS", help=words)
    p.add_argument("--seconds", default="5", help="length of the film, a whole number")
    p.add_argument("--seed", type=int, default=0, help="another seed, another film")
    p.add_argument(
        "--window", type=int,
        help="seconds of the past that are remembered; default as trained: 4, or 3 if block 0 is a "
        "whole second",
    )  # fmt: skip
    p.add_argument(
        "--steps", type=int,
        help="passes a block besides the refresh; default as trained: 4, or 3 (full); fewer is "
        "faster and worse",
    )  # fmt: skip
    p.add_argument("--out", default="out.mp4", help="film; the contact sheet ends in .png instead")
    p.add_argument(
        "--html", help="write a page with film, sound, events and cache on one time axis"
    )
    p.add_argument("--report", help="write the timings to this JSON file")
    p.add_argument("--config", default="toy", help=f"one of {', '.join(STREAMED)}")
    p.add_argument("--weights", help="default: a toy's shipped student; random: to measure")
    p.add_argument("--ltx2", help="folder of LTX-2's text path and decoders, at full size")
    p.add_argument("--device", default="cpu", help="cpu, cuda, mps, ...")
    kinds = f"of the transformer, {', '.join(DTYPES)}; default: float32 (toy), bfloat16 (full size)"
    names = ", ".join(f"{name} ({what})" for name, what in parts.SPEEDUPS.items())
    p.add_argument("--speed-up", nargs="+", metavar="NAME", help=f"all, or {names}")
    p.add_argument("--dtype", choices=list(DTYPES), metavar="TYPE", help=kinds)
    return p


def parse(args) -> Order:
    """Raises ValueError for an order that cannot be carried out."""
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed}: expected 0 or more, and less than 2^63")
    cfg = cli.find_config(args.config)
    if cfg.name not in STREAMED:
        raise ValueError(f"--config {cfg.name}: no student; expected one of {', '.join(STREAMED)}")
    is_toy, seconds = cfg.is_toy, parse_seconds(args.seconds)
    blocks = num_blocks(seconds, cfg)
    dmd.few_step_sigmas(cfg, args.steps)  # complains of --steps
    prompts = args.prompt or [TOY_PROMPT if is_toy else FULL_PROMPT]
    cues = parse_cues(prompts, seconds, toy_features if is_toy else captions.check)
    check_read(cues, blocks, cfg)
    window = teacher.trained_window(cfg) if args.window is None else args.window
    if window < 1:
        raise ValueError(f"--window {args.window}: a block must remember at least 1 second")
    if cfg.name not in parts.WEIGHTS and not args.weights:
        raise ValueError(f"--config {cfg.name} needs --weights: a generator's file, or random")
    if is_toy and args.ltx2:
        raise ValueError(f"--ltx2 {args.ltx2}: --config {cfg.name} has a codec of its own")
    if not is_toy and args.weights != "random" and not args.ltx2:
        raise ValueError(f"--config {cfg.name} needs --ltx2: LTX-2's folder in diffusers' format")
    dtype = DTYPES[args.dtype or ("float32" if is_toy else "bfloat16")]
    device = cli.find_device(args.device)
    speedups = parts.find_speedups(args.speed_up or (), cfg, device)
    at = device, dtype, speedups
    return Order(cfg, cues, seconds, window, args.steps, args.weights, args.ltx2, *at)


def main():
    args = options().parse_args()
    order = parse(args)
    check_targets(args.out, *filter(None, (args.html, args.report)))
    made = parts.parts_for(order)
    watch = Stopwatch(order.device)
    decoder, cfg = made.make_decoder(watch.watch), made.net.cfg
    watch.watch_passes(made.net, len(dmd.few_step_sigmas(cfg, order.steps)) - 1)
    size = cfg.height, cfg.width
    movie = Movie(args.out, size, cfg.fps, decoder.sample_rate, decoder.channels, decoder.scale)
    try:
        how = dict(window=order.window, steps=order.steps, read=made.read)
        merge = "merge" in order.speedups
        blocks = stream(made.net, order.cues, order.seconds, args.seed, merge=merge, **how)
        sheet = run(blocks, decoder, movie, order.seconds, watch)
    except BaseException:
        movie.discard()
        raise
    movie.close()
    finish(args, order, sheet, watch, movie.frames, made.text_seconds)


def sheet_of(film) -> Path:
    """Where a film's contact sheet is written."""
    return Path(film).with_suffix(".png")


def check_targets(film, *others):
    """Raises ValueError for a file that cannot be written, or two that are one."""
    check_film(film)
    others = sheet_of(film), *others
    for path in others:
        files.check_writable(path)
    if len({Path(path).resolve() for path in (film, *others)}) <= len(others):
        raise ValueError("--out, its .png, --html and --report: expected different files")


def finish(args, order, sheet, watch, frames, text_seconds):
    """Contact sheet, report and a line that sums up."""
    if not frames:
        raise ValueError("interrupted before the first block was finished; nothing was written")
    report = {**order.about(), **watch.report(frames, order.cfg), "text_seconds": text_seconds}
    if watch.ttfc:
        report["ttfc_with_text_seconds"] = watch.ttfc + text_seconds
    title = ", then ".join(cue.prompt for cue in order.cues)
    picture = sheet_of(args.out)
    frames_shown, levels = map(torch.cat, zip(*sheet))
    plots.save(plots.draw_clip(frames_shown, levels, title, order.cfg), picture)
    if args.html:
        made = len(watch.output), order.window
        page.write(
            args.html, args.out, title, page.contents(frames_shown, levels, order.cfg, *made)
        )
    if args.report:
        files.write_json(args.report, report)
    ttfc = f"{report['ttfc_seconds']:.2f} s" if report["ttfc_seconds"] else "-"
    passes, both = report["settled_passes_fps"], report["settled_end_to_end_fps"]
    print(
        f"{frames} frames: TTFC {ttfc}, passes {passes:.0f} FPS = {passes / order.cfg.fps:.1f}x "
        f"real time, end to end {both:.0f} FPS = {both / order.cfg.fps:.1f}x, "
        f"peak memory {report['peak_memory_mb']:.0f} MB"
    )
    print(f"wrote {args.out} and {picture}" + (f" and {args.html}" if args.html else ""))


if __name__ == "__main__":
    cli.run(main)
