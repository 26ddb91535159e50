"""Stream video and sound from a prompt, block by block, into an mp4 that grows.

    python generate.py
    python generate.py --prompt "blue slow wood" --seconds 20 --seed 3
    python generate.py --prompt "0: red fast metal" --prompt "5: blue slow wood" --seconds 10
    python generate.py --config toy_released --window 1 --seconds 60

Writes out.mp4 (24 frames per second, with sound) and out.png, the contact sheet: frames above the
sound's spectrum, with impacts and onsets marked.

A prompt of the toy names a colour (red green blue yellow), a speed (slow fast) and a material (wood
metal), in any order. The model chooses what is left out. "5: ..." changes the prompt at second 5.

Each block is one second (block 0 may be a single frame). The model attends to block 0 and to the
last --window seconds, so memory and time per block are constant. In toy_released, block 0 is a
whole second, as in the later release. With --window 1 the ball keeps its colour and pitch longer.
An interrupted stream leaves a playable file of all finished blocks. On one machine, the same seed
gives the same bytes.

At full size, on one GPU, with published weights, or with random weights to measure speed:

    python generate.py --config released --device cuda --weights omniforcing/ --ltx2 LTX-2/ \\
                       --prompt "A dog barks at the waves."
    python generate.py --config full --device cuda --weights random --seconds 30

--weights: the generator's .safetensors file, index file or folder. --ltx2: the folder of
LTX-2 in the format of diffusers, with text_encoder, tokenizer, connectors, vae, audio_vae and
vocoder. --speed-up: full_size/README.md.

Speed.  TTFC: time from loaded weights and prompt until the first second of video and sound is
written.  passes: the transformer alone.  end to end: with decoding and writing. Both rates are of
the median block from the third block on. --report also has the timings of the whole stream, of
each block and of each stage.
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

import config
from film import sheet
from film.mp4 import Movie, check_film
from kernel import cache_append_attention as kernel
from kv_cache import CachedView
from masks import block_interval, num_blocks, trained_window
from plumbing import cli, files
from plumbing.stopwatch import Stopwatch
from rollout import few_step_sigmas, rollout
from toy import source as toy_source

STREAMED = ("toy", "toy_released", "full", "released")  # configs of students
TOY_PROMPT = "red fast metal"  # default prompts
FULL_PROMPT = "Waves break on a rocky shore at dusk while gulls cry."
SHEET_SECONDS, SHEET_PIXELS = 60, 64  # contact sheet: first 60 s, frames reduced to about 64 pixels
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---- the stream ----


class Cue(NamedTuple):
    """A prompt, and the second from which it applies."""

    seconds: float
    prompt: str


def parse_cues(prompts, seconds, check=toy_source.toy_features) -> list[Cue]:
    """Parse prompts of the command line, each "words" or "second: words"; sort them by time.

    check   called with the words of each prompt, to report errors before the stream starts

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
    """Index of the prompt for a block that starts at `start`: the last cue that began by then."""
    return max(i for i, cue in enumerate(cues) if cue.seconds <= start)


def check_prompts_used(cues, blocks, cfg):
    """Raises ValueError for a prompt that no block would use.

    A prompt takes effect at the first block that starts at or after its time.
    """
    starts = [block_interval(k, cfg)[0] for k in range(blocks)]
    used = {prompt_at(start, cues) for start in starts}
    for cue in (cue for i, cue in enumerate(cues) if i not in used):
        raise ValueError(
            f"no block uses the prompt at second {cue.seconds:g}: a block begins every "
            f"{cfg.block_seconds:g} s, the last at {starts[-1]:g}"
        )


def stream(
    net, prompt, seconds=5, seed=0, window=4, steps=None, batch=1, read=toy_source.toy_features
):
    """Return a generator of `rollout.Block`s of clean latents, each yielded as soon as it exists.

    prompt   words, or a list of Cue
    window   blocks kept besides prefix and sinks; None: all. With 4 (3 if block 0 is a whole
             second), no key is further away than in a training clip of 5 seconds
    steps    passes per block besides the refresh; default: as trained
    batch    clips with the same prompt and different noise
    read     words -> caption features (1, K, C_text), one for both streams or one for each
    """
    cfg, blocks = net.cfg, num_blocks(seconds, net.cfg)
    cues = [Cue(0, prompt)] if isinstance(prompt, str) else prompt
    like, texts = next(net.parameters()), []

    def text_at(k):
        index = prompt_at(block_interval(k, cfg)[0], cues)
        while len(texts) <= index:  # each prompt is projected once, when its time has come
            features = read(cues[len(texts)].prompt)
            texts.append(net.project_text(*(f.to(like).expand(batch, -1, -1) for f in features)))
        return texts[index]

    without_gradients = torch.inference_mode()(rollout)
    return without_gradients(
        net, text_at, blocks, few_step_sigmas(cfg, steps), torch.Generator().manual_seed(seed),
        batch=batch, view=CachedView(cfg, blocks, window),
    )  # fmt: skip


# ---- the command line ----


class Request(NamedTuple):
    """A checked command line."""

    cfg: config.Config
    cues: list[Cue]
    seconds: float
    window: int
    steps: int | None
    weights: str | None
    ltx2: str | None
    device: torch.device
    dtype: torch.dtype
    speedups: tuple = ()  # names, see full_size/faster.py

    @property
    def num_blocks(self):
        return num_blocks(self.seconds, self.cfg)

    def about(self) -> dict:
        """The settings to be stored with every measurement."""
        return {
            **cli.machine(self.device),
            "config": self.cfg.name,
            "attention": kernel.path(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "window": self.window,
            "passes_a_block": len(few_step_sigmas(self.cfg, self.steps)) - 1,
            "speed_up": self.speedups,
        }


def parse_seconds(text) -> float:
    """Parse a positive number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(f"--seconds {text}: expected a whole number of seconds") from None
    if not 0 < seconds < float("inf"):
        raise ValueError(f"--seconds {text}: expected 1 or more")
    return seconds


def options():
    """The command line."""
    p = cli.parser(__doc__)
    words = 'words, or "second: words"; may be repeated'
    p.add_argument("--prompt", action="append", metavar="WORDS", help=words)
    p.add_argument("--seconds", default="5", help="length of the film, a whole number")
    p.add_argument("--seed", type=int, default=0, help="random seed of the noise")
    p.add_argument(
        "--window", type=int,
        help="seconds of the past in the cache; default as trained: 4, or 3 if block 0 is a whole "
        "second",
    )  # fmt: skip
    p.add_argument(
        "--steps", type=int,
        help="passes per block besides the refresh; default as trained: 4, or 3 (full); fewer are "
        "faster and worse",
    )  # fmt: skip
    p.add_argument("--out", default="out.mp4", help="film to write; its contact sheet is NAME.png")
    p.add_argument(
        "--html", help="web page to write: film, sound, events and cache on one time axis"
    )
    p.add_argument("--report", help="write the timings to this JSON file")
    p.add_argument("--config", default="toy", help=f"one of {', '.join(STREAMED)}")
    p.add_argument("--weights", help="default for a toy: the shipped one; random: to measure speed")
    p.add_argument("--ltx2", help="at full size: folder of LTX-2 with text encoder and decoders")
    p.add_argument("--device", default="cpu", help="cpu, cuda, mps, ...")
    p.add_argument(
        "--speed-up", nargs="+", metavar="NAME",
        help="all, or some of qkv, graph, beside, channels-last; see full_size/README.md",
    )  # fmt: skip
    p.add_argument(
        "--dtype", choices=list(DTYPES), metavar="TYPE",
        help=f"data type of the transformer: {', '.join(DTYPES)}; default: float32 (toy), bfloat16 "
        "(full size)",
    )  # fmt: skip
    return p


def check_args(args) -> Request:
    """Raises ValueError for a command line that cannot be carried out."""
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed}: expected 0 or more, and less than 2^63")
    cfg = cli.find_config(args.config)
    if cfg.name not in STREAMED:
        raise ValueError(f"--config {cfg.name}: not a student; expected {', '.join(STREAMED)}")
    if cfg.is_toy:
        default, check = TOY_PROMPT, toy_source.toy_features
    else:
        from full_size import text

        default, check = FULL_PROMPT, text.check
    seconds = parse_seconds(args.seconds)
    blocks = num_blocks(seconds, cfg)
    few_step_sigmas(cfg, args.steps)  # rejects a wrong --steps
    cues = parse_cues(args.prompt or [default], seconds, check)
    check_prompts_used(cues, blocks, cfg)
    window = trained_window(cfg) if args.window is None else args.window
    if window < 1:
        raise ValueError(f"--window {args.window}: expected 1 or more")
    if not cfg.is_toy and not args.weights:
        raise ValueError(f"--config {cfg.name} needs --weights: a generator's file, or random")
    if cfg.is_toy and args.ltx2:
        raise ValueError(f"--ltx2 {args.ltx2}: not used by --config {cfg.name}; leave --ltx2 out")
    if not cfg.is_toy and args.weights != "random" and not args.ltx2:
        raise ValueError(f"--config {cfg.name} needs --ltx2: LTX-2's folder in diffusers' format")
    device, speedups = cli.find_device(args.device), ()
    if args.speed_up:
        from full_size import faster

        speedups = faster.find_speedups(args.speed_up, cfg, device)
    return Request(
        cfg, cues, seconds, window, args.steps, args.weights, args.ltx2, device,
        dtype=DTYPES[args.dtype or ("float32" if cfg.is_toy else "bfloat16")],
        speedups=speedups,
    )  # fmt: skip


def open_source(request):
    """Load weights, prompts and decoders.  Raises ValueError, in one line, for what is missing."""
    if request.cfg.is_toy:
        source = toy_source.StreamSource(request)
    else:
        from full_size.source import StreamSource

        source = StreamSource(request)
    if request.device.type == "cuda":  # kernel.path compiles the CUDA kernel if it can
        print(f"attention by {kernel.path(request.device)}")
    if request.speedups:
        from full_size import faster

        source.net = faster.sped_up(source.net, request.speedups, request.device)
    return source


@contextlib.contextmanager
def defer_signals():
    """Let SIGINT and SIGTERM wait, so that the film contains only complete blocks."""
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
    """Decode and write blocks as they come; return frames and levels for the contact sheet.

    SIGINT and SIGTERM end it early; all finished blocks are written.
    """
    shown = []
    movie.add = watch.watch("write", movie.add, by_cpu=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    bar = tqdm(
        total=seconds, unit="s", desc="video", bar_format="{desc} {n:.0f}/{total:.0f} s {bar}"
    )
    try:
        for block in blocks:
            watch.block_made()
            low, high = block_interval(block.index, decoder.cfg)
            with defer_signals():
                add(decoder.decode(block), movie, shown, decoder.cfg)
                watch.block_written(movie.frames > decoder.cfg.fps)  # frame 0 and one second
            bar.update(high - low)
            bar.write(progress_line(block.index, low, high, watch), file=sys.stdout)
    except KeyboardInterrupt:
        print(f"interrupted: {movie.frames} frames are kept", file=sys.stderr)
    finally:
        bar.close()
    add(decoder.finish(), movie, shown, decoder.cfg)
    return shown


def progress_line(index, low, high, watch):
    """The times of a block, on one line."""
    passes, output = 1000 * watch.passes[-1], 1000 * watch.output[-1]
    times = f"passes {passes:5.0f} ms   decode and write {output:4.0f} ms"
    return f"block {index:3}  {low:4g} - {high:<4g} s   {times}"


def add(chunk, movie, shown, cfg):
    """Write a decoded chunk; keep small frames of the first 60 s for the contact sheet."""
    frames = (chunk.frames * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    movie.add(frames, chunk.samples.float().cpu().numpy())
    if movie.frames <= SHEET_SECONDS * cfg.fps + 1:
        shown.append((thumbnails(chunk.frames), chunk.levels.float().cpu()))


def thumbnails(frames):
    """Reduce frames (P, 3, H, W) by H // SHEET_PIXELS, if above 1, and move them to the CPU."""
    factor = frames.shape[2] // SHEET_PIXELS
    frames = frames.float()
    return (F.avg_pool2d(frames, factor) if factor > 1 and len(frames) else frames).cpu()


def sheet_of(film) -> Path:
    """Path of a film's contact sheet."""
    return Path(film).with_suffix(".png")


def check_targets(film, *others):
    """Raises ValueError for a file that cannot be written, or two files that are the same."""
    check_film(film)
    paths = [film, sheet_of(film), *others]
    for path in paths[1:]:
        files.check_writable(path)
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise ValueError("--out, its .png, --html and --report: expected different files")


def finish(args, request, shown, watch, frames, text_seconds):
    """Write contact sheet, page and report; print a summary."""
    if not frames:
        raise ValueError("interrupted before the first block was finished; nothing was written")
    cfg = request.cfg
    report = {**request.about(), **watch.report(frames, cfg), "text_seconds": text_seconds}
    if watch.ttfc:
        report["ttfc_with_text_seconds"] = watch.ttfc + text_seconds
    title = ", then ".join(cue.prompt for cue in request.cues)
    pictures, levels = map(torch.cat, zip(*shown))
    sheet.save(sheet.draw_clip(pictures, levels, title, cfg), sheet_of(args.out))
    if args.html:
        from film import page

        blocks = len(watch.output)
        contents = page.contents(pictures, levels, cfg, blocks, request.window)
        page.write(args.html, args.out, title, contents)
    if args.report:
        files.write_json(args.report, report)
    ttfc = f"{report['ttfc_seconds']:.2f} s" if report["ttfc_seconds"] else "-"
    passes, both = report["settled_passes_fps"], report["settled_end_to_end_fps"]
    print(
        f"{frames} frames: TTFC {ttfc}, passes {passes:.0f} FPS = {passes / cfg.fps:.1f}x "
        f"real time, end to end {both:.0f} FPS = {both / cfg.fps:.1f}x, "
        f"peak memory {report['peak_memory_mb']:.0f} MB"
    )
    written = f"{args.out} and {sheet_of(args.out)}"
    print(f"wrote {written}" + (f" and {args.html}" if args.html else ""))


def main():
    args = options().parse_args()
    request = check_args(args)
    check_targets(args.out, *filter(None, (args.html, args.report)))
    source = open_source(request)
    watch = Stopwatch(request.device)
    decoder, cfg = source.decoder(watch.watch), source.net.cfg
    watch.watch_passes(source.net, len(few_step_sigmas(cfg, request.steps)) - 1)
    size = cfg.height, cfg.width
    movie = Movie(args.out, size, cfg.fps, decoder.sample_rate, decoder.channels, decoder.scale)
    try:
        blocks = stream(
            source.net, request.cues, request.seconds, args.seed, request.window, request.steps,
            read=source.read,
        )  # fmt: skip
        shown = run(blocks, decoder, movie, request.seconds, watch)
    except BaseException:
        movie.discard()
        raise
    movie.close()
    finish(args, request, shown, watch, movie.frames, source.text_seconds)


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
