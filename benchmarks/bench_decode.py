"""What does decoding in chunks cost: errors in picture and sound, and waiting?

    python -m benchmarks.bench_decode --weights omniforcing --ltx2 LTX-2 --config released
    python -m benchmarks.bench_decode --weights random          # full size, random weights
    python -m benchmarks.bench_decode --device cpu --tiny       # only to test the script

The decoders of LTX-2 look both ways in time, but a stream has no later latents yet. The script
makes a clip once. It decodes the clip at once, then block by block with different overlaps
(full_size/decoders.py). For each overlap it prints

    border, elsewhere   the difference from decoding at once: root mean square, relative to that of
                        the clip; within one latent of a block border, and in all other places
    seam                sound only: largest step of that difference between two chunks, relative to
                        the root mean square step between samples of the clip. A click is a large
                        step; well below 1 there is none
    first second        number of blocks that must exist before (95 % of) it can be shown, and how
                        much later that is than with the first overlap: each block counts
                        --block-seconds, decoding counts as measured
    ms a block          time of decoding, median from the third block on

How far a network really looks depends on its weights. With random weights the errors would mean
nothing, so only times are written; times do not depend on the weights. (--tiny writes both.)

Writes results/bench_decode.json and, unless --tiny, the table of benchmarks/README.md.
"""

import torch

import generate
from benchmarks import bench_generate, page
from full_size import decoders, text, weights
from full_size.decoders import Overlap
from masks import block_interval
from plumbing import cli, files
from plumbing.stopwatch import Stopwatch, settled_median

EVERYTHING = Overlap((999, 999), (999, 999), (9999, 9999))  # the whole clip at once
# Context and look-ahead. The audio decoder looks back only, so the vocoder is varied for sound.
LATENTS = [(4, 0), (4, 1), (4, 2)]  # of the video decoder
MEL_FRAMES = [(1, 0), (16, 0), (16, 4), (16, 16)]  # of the vocoder, 10 ms each


# ---- decoding, timed ----


def decoded(make_decoder, overlap, blocks, device):
    """Decode a clip block by block.

    -> frames (P, 3, H, W), samples (n, 2); two lists with the number of frames and of samples
       after every block; seconds of every block
    """
    decoder, watch = make_decoder(lambda _, f: f, overlap), Stopwatch(device)
    chunks, seconds = [], []
    for block in blocks:
        chunks.append(decoder.decode(block))
        seconds.append(watch.lap())
    chunks.append(decoder.finish())
    frames, _, samples = zip(*chunks)
    frames, samples = [f.float() for f in frames], [s.float().mT for s in samples]
    counts = [torch.tensor(list(map(len, x))).cumsum(0).tolist() for x in (frames, samples)]
    return torch.cat(frames), torch.cat(samples), counts, seconds


def blocks_for(counts, enough) -> int:
    """Number of blocks after which the count reaches `enough`.

    >>> blocks_for([1, 17, 41], 25)
    3
    """
    return next(k + 1 for k, n in enumerate(counts) if n >= enough)


# ---- errors ----


def near_borders(n, borders, rate, reach) -> torch.Tensor:
    """(n,) True for samples or frames, `rate` per second, within `reach` seconds of a border.

    >>> near_borders(6, [0.5], 6, 0.2).int()
    tensor([0, 0, 1, 1, 0, 0], dtype=torch.int32)
    """
    middles = (torch.arange(n) + 0.5) / rate
    return (middles[:, None] - torch.tensor(borders)).abs().amin(1) < reach


def relative_errors(chunked, whole, near) -> dict:
    """Root mean square of the difference, relative to that of the clip; time is axis 0."""
    scale = whole.square().mean().sqrt()
    error = (chunked - whole).flatten(1).square().mean(1)
    places = {"border": near, "elsewhere": ~near}
    return {name: float(error[at].mean().sqrt() / scale) for name, at in places.items()}


def largest_step(chunked, whole, seams) -> float:
    """Largest step of the difference at a seam, relative to a typical step of the clip."""
    steps = (chunked - whole).diff(dim=0).flatten(1).abs().amax(1)
    at = [seam - 1 for seam in seams if 0 < seam < len(whole)]
    largest = max(steps[at].tolist(), default=0.0)
    return largest / float(whole.diff(dim=0).square().mean().sqrt())


class Judge:
    """Compares one stream of a clip, decoded in chunks, with the clip decoded at once."""

    def __init__(self, whole, rate, latent, borders):
        """whole: (n, ...) frames or samples, `rate` per second; a latent lasts `latent` seconds."""
        self.whole, self.rate = whole, rate
        self.near = near_borders(len(whole), borders, rate, latent)
        self.first = self.median = None  # of the first overlap, with which others are compared

    def row(self, chunked, counts, seconds, block_time) -> dict:
        """What an overlap costs; see the top of this file."""
        first, median = blocks_for(counts, 0.95 * self.rate + 1), settled_median(seconds)
        self.first, self.median = self.first or first, self.median or median
        return {
            **relative_errors(chunked, self.whole, self.near),
            "seam": largest_step(chunked, self.whole, counts[:-1]),
            "blocks_before_first_second": first,
            "seconds_later": (first - self.first) * block_time + median - self.median,
            "decode_seconds": median,
        }


# ---- the table ----


def bench(make_decoder, blocks, cfg, block_time, device) -> list[dict]:
    """One row for each overlap of LATENTS and MEL_FRAMES."""
    sample_rate = make_decoder(lambda _, f: f, Overlap()).sample_rate
    borders = [block_interval(block.index, cfg)[1] for block in blocks[:-1]]
    frames, samples, _, _ = decoded(make_decoder, EVERYTHING, blocks, device)
    video = Judge(frames, cfg.fps, float(1 / cfg.video_rate), borders)
    sound = Judge(samples, sample_rate, float(1 / cfg.audio_rate), borders)
    rows = []
    for pair in LATENTS:
        frames, _, counts, seconds = decoded(make_decoder, Overlap(video=pair), blocks, device)
        row = video.row(frames, counts[0], seconds, block_time)
        rows.append({"stream": "video", "overlap": pair, **row, "seam": None})
    for pair in MEL_FRAMES:
        _, samples, counts, seconds = decoded(make_decoder, Overlap(vocoder=pair), blocks, device)
        row = sound.row(samples, counts[1], seconds, block_time)
        rows.append({"stream": "sound", "overlap": pair, **row})
    return rows


def without_errors(rows) -> list[dict]:
    """The rows with their times alone."""
    return [{**row, "border": None, "elsewhere": None, "seam": None} for row in rows]


def table(rows) -> str:
    """The rows as Markdown; a dash for None."""
    lines = [
        "| | context | look-ahead | border | elsewhere | seam | first second after | later by | "
        "ms a block |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
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
    """Config, blocks and decoder of a clip by tiny random networks."""
    cfg = bench_generate.tiny(cfg)
    net = weights.random_weights(cfg, dtype=torch.float32)
    features = text.random_features(["x"], cfg, dtype=torch.float32)["x"]
    blocks = list(generate.stream(net, "x", seconds, read=lambda _: features))
    nets = tiny_decoders()
    return cfg, blocks, lambda watch, overlap: decoders.Decoder(*nets, cfg, overlap, watch)


def tiny_decoders() -> list:
    """The smallest networks of the classes of LTX-2, with random weights and statistics."""
    torch.manual_seed(0)
    (vae, _), (audio_vae, _), (vocoder, _) = decoders.decoder_classes().values()
    nets = [
        vae(
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 4,
            decoder_causal=False,
        ),
        audio_vae(base_channels=128, ch_mult=(1, 1, 1), num_res_blocks=1),
        vocoder(hidden_channels=32),
    ]
    for net in nets[:2]:
        net.latents_mean.normal_()
        net.latents_std.uniform_(0.5, 2)
    return [net.eval().requires_grad_(False) for net in nets]


def full_clip(args):
    """Config, blocks and decoder of a clip, as generate.py makes it."""
    command = ["--config", args.config, "--seconds", str(args.seconds), "--device", args.device]
    for name in ("weights", "ltx2", "prompt"):
        if value := getattr(args, name):
            command += [f"--{name}", value]
    request = generate.check_args(generate.options().parse_args(command))
    source = generate.open_source(request)
    blocks = list(generate.stream(source.net, request.cues, request.seconds, read=source.read))
    return request.cfg, blocks, source.decoder


def main():
    p = cli.parser(__doc__)
    p.add_argument("--config", default="full", choices=["full", "released"])
    p.add_argument("--weights", default="random", help="as in generate.py")
    p.add_argument("--ltx2", help="as in generate.py")
    p.add_argument("--prompt", help="as in generate.py")
    p.add_argument("--seconds", type=int, default=5, help="length of the clip")
    p.add_argument(
        "--block-seconds", type=float, default=1.0,
        help="seconds that the passes of a block take; 1: real time",
    )  # fmt: skip
    p.add_argument("--device", default="cuda", help="where to run")
    p.add_argument("--tiny", action="store_true", help="tiny networks, only to test this script")
    p.add_argument("--out", default=str(cli.ROOT / "results" / "bench_decode.json"))
    args = p.parse_args()
    device, cfg = cli.find_device(args.device), cli.find_config(args.config)
    if args.seconds < 3:
        raise ValueError(f"--seconds {args.seconds}: expected at least 3, for borders in between")
    cfg, blocks, make_decoder = tiny_clip(args.seconds, cfg) if args.tiny else full_clip(args)
    rows = bench(make_decoder, blocks, cfg, args.block_seconds, device)
    if args.weights == "random" and not args.tiny:
        rows = without_errors(rows)
    print(table(rows))
    about = {
        **cli.machine(device),
        "config": cfg.name,
        "weights": args.weights,
        "tiny": args.tiny,
        "block_seconds": args.block_seconds,
    }
    files.write_json(args.out, {"about": about, "rows": rows})
    print(f"wrote {args.out}")
    if not args.tiny:
        where = "{device}, torch {torch}, {date}, {weights} weights".format(**about)
        page.fill_in("decode", f"{where}\n\n{table(rows)}")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
