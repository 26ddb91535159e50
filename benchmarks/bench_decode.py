"""What does decoding by pieces cost in picture and sound, and what in waiting?

    python -m benchmarks.bench_decode --weights omniforcing --ltx2 LTX-2 --config released
    python -m benchmarks.bench_decode --weights random          # full size, noise for weights
    python -m benchmarks.bench_decode --device cpu --tiny       # does the script work?

LTX-2's decoders look both ways in time, and a stream has no later. A clip is made once and decoded
at once, then block by block with every overlap of the table. For each it prints

    border, elsewhere   the difference from decoding at once, root of mean square, as a share of the
                        clip's own: within one latent of a block border, and in all other places
    seam                sound only: the largest step of that difference where two pieces meet, in
                        units of the clip's own root-mean-square step between samples. A click is
                        a step: well below 1 there is none
    first second        how many blocks must be made before (95 % of) it can be shown, and the
                        seconds that it comes later than without any look-ahead: those blocks at
                        --block-seconds each, and what decoding a block takes more
    ms a block          decoding, median from the third block on

How far a network really looks is a matter of its weights, so with random ones errors would say
nothing, and only times are written, which do not depend on them (--tiny has them, to test this).

Writes results/bench_decode.json and the table of benchmarks/README.md, unless --tiny.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

import generate
from full_size import decoders
from full_size.decoders import Overlap
from full_size import parts
from full_size import weights as ltx2
from full_size.text import random_features
from masks import block_interval
from plumbing import (
    cli,
    files,
)
from plumbing.stopwatch import Stopwatch, settled_median

EVERYTHING = Overlap((999, 999), (999, 999), (9999, 9999))  # the whole clip at once
# context and look-ahead; the audio decoder looks back only, so it is the vocoder that is varied
LATENTS = [(4, 0), (4, 1), (4, 2)]  # of the video decoder
MEL_FRAMES = [(1, 0), (16, 0), (16, 4), (16, 16)]  # of the vocoder, 10 ms each
TINY = dict(num_layers=1, num_heads=2, video_width=32, audio_width=16, height=64, width=64)


# ---- decoding, and its clock ----


def decoded(make_decoder, overlap, blocks, device):
    """A clip's frames (P, 3, H, W) and samples (2, n), how many there were after every block, and
    the seconds that every block took."""
    decoder, watch = make_decoder(lambda _, f: f, overlap), Stopwatch(device)
    pieces, seconds = [], []
    for block in blocks:
        pieces.append(decoder.decode(block))
        seconds.append(watch.lap())
    pieces.append(decoder.finish())
    frames, _, samples = zip(*pieces)
    counts = [torch.tensor([len(f) for f in frames]), torch.tensor([s.shape[1] for s in samples])]
    counts = [c.cumsum(0).tolist() for c in counts]
    return torch.cat(frames).float(), torch.cat(samples, 1).float(), counts, seconds


def blocks_for(count, enough) -> int:
    """How many blocks it takes until so much is there.

    >>> blocks_for([1, 17, 41], 25)
    3
    """
    return next(k + 1 for k, n in enumerate(count) if n >= enough)


# ---- errors ----


def near_borders(n, borders, rate, reach) -> torch.Tensor:
    """(n,) whether sample or frame i is within `reach` seconds of a border, at `rate` a second.

    >>> near_borders(6, [0.5], 6, 0.2).int()
    tensor([0, 0, 1, 1, 0, 0], dtype=torch.int32)
    """
    middles = (torch.arange(n) + 0.5) / rate
    return (middles[:, None] - torch.tensor(borders)).abs().amin(1) < reach


def relative_errors(pieces, whole, near) -> dict:
    """Root of mean square of the difference over the clip's; time is axis 0."""
    scale = whole.square().mean().sqrt()
    error = (pieces - whole).flatten(1).square().mean(1)
    places = {"border": near, "elsewhere": ~near}
    return {name: float(error[at].mean().sqrt() / scale) for name, at in places.items()}


def largest_step(pieces, whole, seams) -> float:
    """Largest step of the difference at a seam, over the clip's own typical step."""
    steps = (pieces - whole).diff(dim=0).flatten(1).abs().amax(1)
    at = [seam - 1 for seam in seams if 0 < seam < len(whole)]
    largest = max(steps[at].tolist(), default=0.0)
    return largest / float(whole.diff(dim=0).square().mean().sqrt())


def borders_of(blocks, cfg) -> list[float]:
    """Seconds at which one block ends and the next begins."""
    return [block_interval(block.index, cfg)[1] for block in blocks[:-1]]


# ---- the table ----


class Judge:
    """Compares one stream of a clip, decoded by pieces, with the clip decoded at once."""

    def __init__(self, whole, rate, latent, borders):
        """whole (n, ...) frames or samples, `rate` a second; a latent lasts `latent` seconds."""
        self.whole, self.rate = whole, rate
        self.near = near_borders(len(whole), borders, rate, latent)
        self.first = self.median = None  # of the first overlap that is judged

    def row(self, pieces, counts, seconds, block_time) -> dict:
        """What an overlap costs; see the module's text."""
        first, median = blocks_for(counts, 0.95 * self.rate + 1), settled_median(seconds)
        self.first, self.median = self.first or first, self.median or median
        return {
            **relative_errors(pieces, self.whole, self.near),
            "seam": largest_step(pieces, self.whole, counts[:-1]),
            "blocks_before_first_second": first,
            "seconds_later": (first - self.first) * block_time + median - self.median,
            "decode_seconds": median,
        }


def rows(make_decoder, blocks, cfg, sample_rate, block_time, device) -> list[dict]:
    """One row for each overlap of LATENTS and MEL_FRAMES."""
    borders, found = borders_of(blocks, cfg), []
    frames, samples, *_ = decoded(make_decoder, EVERYTHING, blocks, device)
    video = Judge(frames, cfg.fps, float(1 / cfg.video_rate), borders)
    sound = Judge(samples.mT, sample_rate, float(1 / cfg.audio_rate), borders)
    for pair in LATENTS:
        f, _, counts, seconds = decoded(make_decoder, Overlap(video=pair), blocks, device)
        row = video.row(f, counts[0], seconds, block_time)
        found.append({"stream": "video", "overlap": pair, **row, "seam": None})
    for pair in MEL_FRAMES:
        _, s, counts, seconds = decoded(make_decoder, Overlap(vocoder=pair), blocks, device)
        row = sound.row(s.mT, counts[1], seconds, block_time)
        found.append({"stream": "sound", "overlap": pair, **row})
    return found


def times_alone(found) -> list[dict]:
    """The rows without their errors."""
    return [{**row, "border": None, "elsewhere": None, "seam": None} for row in found]


def table(found) -> str:
    """The rows as Markdown; a dash for what is None."""
    lines = [
        "| | context | look-ahead | border | elsewhere | seam | first second after | later by | "
        "ms a block |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        unit = "latents" if r["stream"] == "video" else "mel frames"
        forms = {"border": "{:.2%}", "elsewhere": "{:.2%}", "seam": "{:.3f}"}
        errors = ["–" if r[e] is None else form.format(r[e]) for e, form in forms.items()]
        lines.append(
            f"| {r['stream']} | {r['overlap'][0]} {unit} | {r['overlap'][1]} | "
            f"{' | '.join(errors)} | {r['blocks_before_first_second']} blocks | "
            f"{r['seconds_later']:.2f} s | {1000 * r['decode_seconds']:.0f} |"
        )
    return "\n".join(lines)


# ---- the clip ----


def tiny_clip(seconds, cfg):
    """A random model's blocks and the smallest decoders of the same classes, as the tests use."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers import random_decoders

    cfg = replace(cfg, caption_width=8, **TINY)
    net, features = ltx2.random_weights(cfg, dtype=torch.float32), random_features(["x"], cfg)["x"]
    features = [f.float() for f in features]
    nets = random_decoders()
    blocks = list(generate.stream(net, "x", seconds, read=lambda _: features))
    return cfg, blocks, lambda watch, overlap: decoders.Decoder(*nets, cfg, overlap, watch)


def clip(args):
    """Blocks of a stream, as generate.py makes them, and its decoders."""
    command = ["--config", args.config, "--seconds", str(args.seconds), "--device", args.device]
    for name in ("weights", "ltx2", "prompt"):
        if value := getattr(args, name):
            command += [f"--{name}", value]
    order = generate.check_args(generate.options().parse_args(command))
    made = parts.parts_for(order)
    blocks = list(generate.stream(made.net, order.cues, order.seconds, read=made.read))
    return made.net.cfg, blocks, made.make_decoder


def main():
    p = cli.parser(__doc__)
    p.add_argument("--config", default="full", choices=["full", "released"])
    p.add_argument("--weights", default="random", help="as in generate.py")
    p.add_argument("--ltx2", help="as in generate.py")
    p.add_argument("--prompt", help="as in generate.py")
    p.add_argument("--seconds", type=int, default=5, help="length of the clip")
    p.add_argument("--block-seconds", type=float, default=1.0,
                   help="seconds that the passes of a block take; 1 is real time")  # fmt: skip
    p.add_argument("--device", default="cuda")
    p.add_argument("--tiny", action="store_true", help="tiny networks: tests this script, no more")
    p.add_argument("--out", default=str(ROOT / "results" / "bench_decode.json"))
    args = p.parse_args()
    device, cfg = cli.find_device(args.device), cli.find_config(args.config)
    if args.seconds < 3:
        raise ValueError(f"--seconds {args.seconds}: expected at least 3, for borders in between")
    cfg, blocks, make_decoder = tiny_clip(args.seconds, cfg) if args.tiny else clip(args)
    sample_rate = make_decoder(lambda _, f: f, Overlap()).sample_rate
    found = rows(make_decoder, blocks, cfg, sample_rate, args.block_seconds, device)
    about = cli.machine(device) | {"config": cfg.name, "weights": args.weights}
    about |= {"tiny": args.tiny, "block_seconds": args.block_seconds}
    if args.weights == "random" and not args.tiny:
        found = times_alone(found)
    print(table(found))
    files.write_json(args.out, {"about": about, "rows": found})
    print(f"wrote {args.out}")
    if not args.tiny:
        how = "{device}, torch {torch}, {date}, {weights} weights".format(**about)
        files.fill_in(ROOT / "benchmarks" / "README.md", "decode", f"{how}\n\n{table(found)}")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
