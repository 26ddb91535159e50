"""Stream video and sound from a prompt, block by block, into an mp4 that grows.

    python generate.py
    python generate.py --prompt "blue slow wood" --seconds 20 --seed 3
    python generate.py --prompt "0: red fast metal" --prompt "5: blue slow wood" --seconds 10
    python generate.py --live
    python generate.py --prompts list.txt --out-dir films

Writes out.mp4 (24 frames per second, with sound) and out.png, the contact sheet: frames above the
sound's spectrum, with impacts and onsets marked. --live plays the stream in the browser while it is
made, and takes new prompts; without --out it keeps nothing. Other machines need --host and the
token in the link, or a tunnel. --prompts makes many films and loads everything once: one prompt a
line, or JSON lines with id, prompt, seed, seconds, image. The same command goes on where it was.
--image is the first picture; the toy takes over where its ball is, but hardly how it looks.

A prompt of the toy names a colour (red green blue yellow), a speed (slow fast) and a material (wood
metal), in any order. The model chooses what is left out. "5: ..." changes the prompt at second 5.

Each block is one second. The model attends to block 0 and to the last --window seconds, so memory
and time per block are constant. The default student, toy_released, has the layout of the later
release, in which block 0 is a whole second: its ball keeps colour and pitch (results/README.md).
"--config toy" has the paper's layout, in which block 0 is a single frame. In the toy, a new prompt
makes the cache forget all but the newest second, also block 0. However a stream ends, the film of
its finished blocks is kept. On one machine, with one OMP_NUM_THREADS, a seed gives the same bytes.

At full size, on one GPU, with published weights, or with random weights to measure speed:

    python generate.py --config released --device cuda --weights omniforcing/ --ltx2 LTX-2/ \\
                       --prompt "A dog barks at the waves."
    python generate.py --config full --device cuda --weights random --seconds 30

--weights: the generator's .safetensors file, index file or folder. --ltx2: the folder of LTX-2 in
the format of diffusers, with text_encoder, tokenizer, connectors, vae, audio_vae and vocoder. Both
may be names on the Hugging Face Hub. --speed-up: full_size/README.md.

Speed.  TTFC (time to first chunk): from loaded weights and prompt until the first second of video
and sound is written.  passes: the transformer alone.  end to end: with decoding and writing. Both
rates are those of the median block, from the third block on. --report also has the timings of the
whole stream, of each block and of each stage.
"""

import re
from bisect import bisect_left
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import config
from film.filming import StopRequest, check_not_read, check_targets, finish, open_movie, run
from kernel import cache_append_attention as kernel
from kv_cache import CachedView
from masks import block_interval, num_blocks, trained_window
from plumbing import cli
from plumbing.stopwatch import Stopwatch
from rollout import few_step_sigmas, rollout
from toy import source as toy_source

STREAMED = ("toy", "toy_released", "full", "released")  # configs of students
TOY_PROMPT = "red fast metal"  # default prompts
FULL_PROMPT = "Waves break on a rocky shore at dusk while gulls cry."
MOST_SECONDS = 86400  # of a film: a day
CUE = re.compile(r"(?:\s*([0-9]+(?:\.[0-9]+)?):(?!\S))?(.*)", re.S)  # second, text
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES["fp8"] = torch.bfloat16  # and the products inside the layers in fp8: full_size/fp8.py


# ---- the stream ----


class Cue(NamedTuple):
    """A prompt, and the second from which it applies."""

    seconds: float
    prompt: str


def parse_cues(prompts, seconds, check=toy_source.toy_features) -> list[Cue]:
    """Parse prompts, each any text or "second: text", with white space after the colon; sort them.

    check   called with the words of each prompt, to report errors before the stream starts

    Raises ValueError if none begins at 0, two begin together, or one begins after the end.

    >>> parse_cues(["5: blue", "red fast"], 10)
    [Cue(seconds=0.0, prompt='red fast'), Cue(seconds=5.0, prompt='blue')]
    """
    cues = []
    for text in prompts:
        start, words = CUE.fullmatch(text).groups()
        check(words)
        cues.append(Cue(float(start or 0), words.strip()))
    cues.sort()
    starts = [cue.seconds for cue in cues]
    hint = '; if "5: " belongs to the text of a prompt, write "0: 5: ..."'
    if starts[0] != 0:
        raise ValueError(f"the first prompt begins at second {starts[0]:g}, not at 0{hint}")
    if len(set(starts)) < len(starts):
        raise ValueError('two prompts begin at the same second; expected "5: text" for a later one')
    if starts[-1] >= seconds:
        raise ValueError(f"a prompt begins at second {starts[-1]:g} of {seconds:g}{hint}")
    return cues


def prompt_at(start, cues) -> int:
    """Index of the prompt for a block that starts at `start`: the last cue that began by then."""
    return max(i for i, cue in enumerate(cues) if cue.seconds <= start)


def check_prompts_used(cues, blocks, cfg):
    """Raise ValueError for a prompt that no block uses: a prompt waits until a block starts."""
    for i, cue in enumerate(cues):
        k = bisect_left(range(blocks), cue.seconds, key=lambda k: block_interval(k, cfg)[0])
        if k == blocks or prompt_at(block_interval(k, cfg)[0], cues) != i:
            raise ValueError(
                f"no block uses the prompt at second {cue.seconds:g}: a block begins every "
                f"{cfg.block_seconds:g} s, the last at {block_interval(blocks - 1, cfg)[0]:g}"
            )


def stream(
    net, prompt, seconds=5, seed=0, window=4, steps=None, batch=1, read=toy_source.toy_features,
    picture=None,
):  # fmt: skip
    """Return a generator of `rollout.Block`s of clean latents, each yielded as soon as it exists.

    prompt   words, or a list of Cue, which may grow; in the toy, a new one is guided: toy/switch.py
    window   blocks kept besides prefix and sinks; None: all. With 4 (3 if block 0 is a whole
             second), no key is further away than in a training clip of 5 seconds
    steps    passes per block besides the refresh; default: as trained
    seed     of the noise of the first clip; the next clips have the next seeds
    batch    clips with the same prompt
    read     words -> caption features (1, K, C_text), one for both streams or one for each
    picture  clean tokens (1, rows * columns, C_v) of the first latent frame
    """
    if picture is not None:
        from film.picture import WithPicture

        net = WithPicture(net, picture)
    cfg, blocks = net.cfg, num_blocks(seconds, net.cfg)
    cues = [Cue(0, prompt)] if isinstance(prompt, str) else prompt
    generators = [torch.Generator().manual_seed((seed + b) % 2**32) for b in range(batch)]
    like, texts = next(net.parameters()), []

    def text_at(k):
        index = prompt_at(block_interval(k, cfg)[0], cues)
        while len(texts) <= index:  # each prompt is projected once, when its time has come
            features = read(cues[len(texts)].prompt)
            texts.append(net.project_text(*(f.to(like).expand(batch, -1, -1) for f in features)))
            texts[:-1] = [None] * (len(texts) - 1)  # at full size, each has 1.2 GB
        return texts[index]

    if cfg.is_toy and cues is prompt:  # a list, which may grow
        from toy.switch import Switching

        net = Switching(net)  # a new prompt is obeyed soon
    without_gradients = torch.inference_mode()(rollout)
    return without_gradients(
        net, text_at, blocks, few_step_sigmas(cfg, steps), generators,
        batch=batch, view=CachedView(cfg, blocks, window),
    )  # fmt: skip


# ---- the command line ----


class Request(NamedTuple):
    """A checked command line."""

    cfg: config.Config
    cues: list[Cue]
    seconds: float
    seed: int
    window: int
    steps: int | None
    out: str  # film; its contact sheet lies beside it
    html: str | None
    report: str | None
    weights: str | None
    ltx2: str | None
    device: torch.device
    dtype: torch.dtype
    speedups: tuple = ()  # names, see full_size/faster.py
    in_fp8: bool = False  # see full_size/fp8.py
    video_overlap: tuple = (4, 0)  # context and look-ahead, see full_size/decoders.py
    image: str | None = None  # the first picture

    @property
    def num_blocks(self):
        return num_blocks(self.seconds, self.cfg)

    def asked(self) -> dict:
        """All that decides the film, in the words of the report."""
        return {
            "config": self.cfg.name,
            "weights": self.weights,
            "ltx2": self.ltx2,
            "prompts": [f"{cue.seconds:g}: {cue.prompt}" for cue in self.cues],
            "image": self.image and str(Path(self.image).resolve()),
            "seconds": self.seconds,
            "seed": self.seed,
            "dtype": "fp8" if self.in_fp8 else str(self.dtype).removeprefix("torch."),
            "window": self.window,
            "passes_a_block": len(few_step_sigmas(self.cfg, self.steps)) - 1,
            "speed_up": self.speedups,
            "video_overlap": self.video_overlap,
        }

    def about(self) -> dict:
        """The settings to be stored with every measurement."""
        machine = {**cli.machine(self.device), "attention": kernel.path(self.device)}
        return {**machine, **self.asked()}


def parse_seconds(text) -> float:
    """Parse a positive number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(f"--seconds {text}: expected a whole number of seconds") from None
    if not 0 < seconds <= MOST_SECONDS:
        raise ValueError(f"--seconds {text}: expected 1 to {MOST_SECONDS}")
    return seconds


def options():
    """The command line."""
    p = cli.parser(__doc__)
    words = 'text, or "SECOND: text" from that second on; may be repeated'
    p.add_argument("--prompt", action="append", metavar="WORDS", help=words)
    p.add_argument("--seconds", help="length of the film; default: 5, or 10 with --html")
    cli.add_seed(p, "random seed of the noise")
    p.add_argument(
        "--window", type=cli.whole(1, MOST_SECONDS),
        help="seconds of the past in the cache; default as trained: 1 for toy_released, 4 for toy "
        "and full, 3 for released",
    )  # fmt: skip
    p.add_argument(
        "--steps", type=cli.whole(1, 1000),
        help="passes per block besides the refresh; default as trained: 4, or 3 (full); fewer are "
        "faster and worse",
    )  # fmt: skip
    p.add_argument("--out", help="film to write; default: out.mp4; its contact sheet is NAME.png")
    p.add_argument(
        "--html", help="web page to write: film, sound, events and cache on one time axis"
    )
    p.add_argument("--report", help="write the timings to this JSON file")
    p.add_argument("--image", metavar="FILE", help="the first picture of the film; any image file")
    p.add_argument("--prompts", metavar="FILE", help="many films: one prompt a line, or JSON lines")
    p.add_argument("--out-dir", metavar="DIR", help="with --prompts: write DIR/ID.mp4, .png, .json")
    p.add_argument("--live", action="store_true", help="play it in the browser while it is made")
    about = "with --live: name or address for other machines; the link then holds a random token"
    p.add_argument("--host", help=about)
    about = "with --live: default: chosen by the system"
    p.add_argument("--port", type=cli.whole(1, 65535), metavar="N", help=about)
    about = "with --live: print the link only"
    p.add_argument("--no-browser", action="store_true", help=about)
    p.add_argument("--config", default="toy_released", help=f"one of {', '.join(STREAMED)}")
    p.add_argument("--weights", help="default for a toy: the shipped one; random: to measure speed")
    p.add_argument("--ltx2", help="at full size: folder of LTX-2, or its name on the Hub")
    context = "at full size: latents before a block that are decoded again with it; default: 4"
    p.add_argument("--video-context", type=cli.whole(1, 99), metavar="N", help=context)
    ahead = "at full size: later latents that a picture waits for, for fewer seams; default: 0"
    p.add_argument("--video-look-ahead", type=cli.whole(0, 99), metavar="N", help=ahead)
    p.add_argument("--device", default="cpu", help="cpu, cuda, mps, ...")
    p.add_argument(
        "--speed-up", nargs="+", metavar="NAME",
        help="all, or some of graph, beside, fuse, parts; need a GPU; see full_size/README.md",
    )  # fmt: skip
    about = f"precision: {', '.join(DTYPES)}; default float32 (toy), bfloat16 (full size)"
    p.add_argument("--dtype", choices=list(DTYPES), metavar="TYPE", help=about)
    return p


def check_args(args) -> Request:
    """Raise ValueError for a command line that cannot be carried out."""
    cfg = cli.find_config(args.config)
    if cfg.name not in STREAMED:
        raise ValueError(f"--config {cfg.name}: not a student; expected {', '.join(STREAMED)}")
    if cfg.is_toy:
        default, check = TOY_PROMPT, toy_source.toy_features
    else:
        from full_size import text

        default, check = FULL_PROMPT, text.check
    default_seconds = "10" if args.html else "5"  # a page should show that blocks are evicted
    seconds = parse_seconds(default_seconds if args.seconds is None else args.seconds)
    blocks = num_blocks(seconds, cfg)
    few_step_sigmas(cfg, args.steps)  # rejects a wrong --steps
    cues = parse_cues(args.prompt or [default], seconds, check)
    check_prompts_used(cues, blocks, cfg)
    window = args.window or toy_source.WINDOWS.get(cfg.name) or trained_window(cfg)
    if not cfg.is_toy and not args.weights:
        raise ValueError(f"--config {cfg.name} needs --weights: a generator's file, or random")
    for name in ("--ltx2", "--video-context", "--video-look-ahead"):
        value = vars(args)[name[2:].replace("-", "_")]
        if cfg.is_toy and value is not None:
            raise ValueError(f"{name} {value}: not used by --config {cfg.name}; leave {name} out")
    if not cfg.is_toy and args.weights != "random" and not args.ltx2:
        raise ValueError(f"--config {cfg.name} needs --ltx2: Lightricks/LTX-2 or its folder")
    if args.out_dir and not args.prompts:
        raise ValueError(f"--out-dir {args.out_dir}: needs --prompts; one film has --out")
    device, speedups = cli.find_device(args.device), ()
    if args.speed_up:
        from full_size import faster

        speedups = faster.find_speedups(args.speed_up, device)
    for name in ("host", "port", "no_browser"):
        if vars(args)[name] and not args.live:
            raise ValueError(f"--{name.replace('_', '-')} needs --live")
    if args.image:
        from film.picture import read_picture

        read_picture(args.image, cfg.height, cfg.width)  # complain before anything is loaded
    if not args.prompts and not args.live:  # these check their files themselves
        check_targets(args.out or "out.mp4", args.html, args.report)
    check_not_read(args.out or "out.mp4", args.report, args.image, args.prompts)
    return Request(
        cfg=cfg,
        cues=cues,
        seconds=seconds,
        seed=args.seed,
        window=window,
        steps=args.steps,
        out=args.out or "out.mp4",
        html=args.html,
        report=args.report,
        weights=args.weights,
        ltx2=args.ltx2,
        device=device,
        dtype=DTYPES[args.dtype or ("float32" if cfg.is_toy else "bfloat16")],
        speedups=speedups,
        in_fp8=args.dtype == "fp8",
        video_overlap=(args.video_context or 4, args.video_look_ahead or 0),
        image=args.image,
    )


def open_source(requests):
    """Load weights, prompts and decoders, for all requests.  Raises ValueError for what is missing.

    requests   with the same options but for prompts, seed, seconds and image
    """
    longest = max(requests, key=lambda request: request.seconds)
    if longest.cfg.is_toy:
        source = toy_source.StreamSource(longest)
    else:
        from full_size.source import StreamSource

        source = StreamSource(requests)
    if longest.device.type == "cuda":  # kernel.path compiles the CUDA kernel if it can
        print(f"attention by {kernel.path(longest.device)}")
    if longest.speedups:
        from full_size import faster

        faster.speed_up(source, longest)
    return source


def begin(request, source):
    """Begin a film: return stopwatch, decoder, blocks, and a list for the pictures of passes."""
    watch, passes = Stopwatch(request.device), request.asked()["passes_a_block"]
    decoder = source.decoder(watch.watch)
    watch.watch_passes(source.net, passes)
    cues = request.cues if len(request.cues) > 1 else request.cues[0].prompt
    blocks = stream(
        source.net, cues, request.seconds, request.seed, request.window, request.steps,
        read=source.read, picture=source.picture(request.image),
    )  # fmt: skip
    strips = []
    if request.html:
        from film.passes import PassPictures

        blocks = PassPictures(source.net, passes).of_blocks(blocks, strips)
    return watch, decoder, blocks, strips


def main():
    args, films = options().parse_args(), None
    if args.live:
        from film import live

        return live.serve(args, check_args, open_source, stream)
    if args.prompts:
        from film.prompt_list import FilmList

        films = FilmList(args, check_args)
    requests = films.requests if films else [check_args(args)]
    source = open_source(requests) if requests else None
    with StopRequest() as stop:
        for request in tqdm(requests, "films", disable=len(requests) < 2):
            try:
                watch, decoder, blocks, strips = begin(request, source)
                movie = open_movie(request.out, decoder, watch)
                made = run(blocks, decoder, movie, watch, request.seconds, stop)
                finish(request, stop, *made, watch, movie, source.text_seconds, strips)
            except Exception as error:
                if not films:
                    raise
                films.note(request.out, error)
            if stop.is_asked:
                break
    if films:
        films.end()


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
