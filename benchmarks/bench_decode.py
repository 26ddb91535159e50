"""What does decoding in chunks cost: errors in picture and sound, and waiting?

    python -m benchmarks.bench_decode --weights omniforcing --ltx2 LTX-2 --config released
    python -m benchmarks.bench_decode --weights random          # full size, random weights
    python -m benchmarks.bench_decode --contexts                # on a CPU, half a minute
    python -m benchmarks.bench_decode --device cpu --tiny       # only to test the script

The decoders of LTX-2 look both ways in time, but a stream has no later latents yet. The script
makes a clip once. It decodes the clip at once, then block by block with different overlaps
(full_size/decoders.py). For each overlap it prints

    border, elsewhere   the difference from decoding at once: root mean square, relative to that of
                        the clip; within one latent of a block border, and in all other places
    seam                sound only: largest step of that difference between two chunks, relative to
                        the root mean square step between samples of the clip. A click is a large
                        step; well below 1 there is none
    first second        number of blocks that must exist before (80 % of) it can be shown, and how
                        much later that is than with the first overlap: each block counts
                        --block-seconds, decoding counts as measured
    ms a block          time of decoding, median from the third block on

With random weights only times are written: they do not depend on the weights, but the errors do.
A second table has the time of the video decoder alone, by context, and the time of diffusers.

--contexts shows how far the video decoder really looks back. It has all its layers, a sixteenth of
its channels and random weights. It decodes three latents of a small picture with some context, and
again with all the past.

Writes results/bench_decode.json and, unless --tiny, the table of benchmarks/README.md.
"""

import torch

import generate
from benchmarks import bench_generate, page
from benchmarks.bench_attention import seconds
from full_size import decoders, text, weights
from full_size.decoders import Overlap
from masks import block_interval
from plumbing import cli, files
from plumbing.stopwatch import Stopwatch, settled_median

EVERYTHING = Overlap((999, 999), (999, 999), (9999, 9999))  # the whole clip at once
# Context and look-ahead. The audio decoder looks back only, so the vocoder is varied for sound.
LATENTS = [(4, 0), (3, 0), (2, 0), (1, 0), (4, 1), (4, 2)]  # of the video decoder
MEL_FRAMES = [(1, 0), (18, 0), (18, 4), (18, 18)]  # of the vocoder, 10 ms each
UNITS = {"video": "latents", "sound": "mel frames"}


def decoded(make_decoder, overlap, blocks, device):
    """Decode a clip block by block.

    -> {"video": (frames (P, 3, H, W), their number after every block),
        "sound": (samples (n, 2), their number after every block)}, seconds of every block
    """
    decoder, watch = make_decoder(lambda _, f: f, overlap), Stopwatch(device)
    chunks, seconds = [], []
    for block in blocks:
        chunks.append(decoder.decode(block))
        seconds.append(watch.lap())
    chunks.append(decoder.finish())
    frames, _, samples = zip(*chunks)
    parts = [f.float() for f in frames], [s.float().mT for s in samples]
    counts = [torch.tensor(list(map(len, x))).cumsum(0).tolist() for x in parts]
    return dict(zip(UNITS, zip(map(torch.cat, parts), counts))), seconds


def near_borders(n, borders, rate, reach) -> torch.Tensor:
    """Return (n,) True for samples or frames, `rate` a second, within `reach` seconds of a border.

    >>> near_borders(6, [0.5], 6, 0.2).int()
    tensor([0, 0, 1, 1, 0, 0], dtype=torch.int32)
    """
    middles = (torch.arange(n) + 0.5) / rate
    return (middles[:, None] - torch.tensor(borders)).abs().amin(1) < reach


def relative_errors(chunked, whole, near) -> dict:
    """Return the root mean square of the difference, relative to that of the clip."""
    scale = whole.square().mean().sqrt()
    error = (chunked - whole).flatten(1).square().mean(1)  # time is axis 0
    places = {"border": near, "elsewhere": ~near}
    return {name: float(error[at].mean().sqrt() / scale) for name, at in places.items()}


def largest_step(chunked, whole, seams) -> float:
    """Return the largest step of the difference at a seam, relative to a typical step."""
    steps = (chunked - whole).diff(dim=0).flatten(1).abs().amax(1)
    at = [seam - 1 for seam in seams if 0 < seam < len(whole)]
    largest = max(steps[at].tolist(), default=0.0)
    return largest / float(whole.diff(dim=0).square().mean().sqrt())


# ---- the table ----


def bench(make_decoder, blocks, cfg, block_time, device) -> list[dict]:
    """Return one row for each overlap of LATENTS and MEL_FRAMES."""
    sample_rate = make_decoder(lambda _, f: f, Overlap()).sample_rate
    borders = [block_interval(block.index, cfg)[1] for block in blocks[:-1]]
    at_once, _ = decoded(make_decoder, EVERYTHING, blocks, device)
    streams = {
        "video": (cfg.fps, cfg.video_rate, "video", LATENTS),
        "sound": (sample_rate, cfg.audio_rate, "vocoder", MEL_FRAMES),
    }
    rows = []
    for stream, (rate, latent_rate, network, pairs) in streams.items():
        (whole, _), waits = at_once[stream], []
        near = near_borders(len(whole), borders, rate, float(1 / latent_rate))
        for pair in pairs:
            overlap = Overlap(**{network: pair})
            by_stream, seconds = decoded(make_decoder, overlap, blocks, device)
            chunked, counts = by_stream[stream]
            first = next(k for k, n in enumerate(counts, 1) if n >= 0.8 * rate + 1)
            median = settled_median(seconds)
            waits.append(first * block_time + median)
            rows.append({
                "stream": stream,
                "overlap": pair,
                **relative_errors(chunked, whole, near),
                "seam": largest_step(chunked, whole, counts[:-1]) if stream == "sound" else None,
                "blocks_before_first_second": first,
                "seconds_later": waits[-1] - waits[0],
                "decode_seconds": median,
            })  # fmt: skip
    return rows


def without_errors(rows) -> list[dict]:
    """Return the rows with their times alone."""
    return [{**row, "border": None, "elsewhere": None, "seam": None} for row in rows]


def table(rows) -> str:
    """Return the rows as Markdown."""
    head = ["", "context", "look-ahead", "border", "elsewhere", "seam", "first second after"]
    forms = {"border": "{:.2%}", "elsewhere": "{:.2%}", "seam": "{:.3f}"}
    lines = []
    for r in rows:
        context, look_ahead = r["overlap"]
        lines.append([
            r["stream"],
            f"{context} {UNITS[r['stream']]}",
            str(look_ahead),
            *("" if r[error] is None else form.format(r[error]) for error, form in forms.items()),
            f"{r['blocks_before_first_second']} blocks",
            f"{r['seconds_later']:.2f} s",
            f"{1000 * r['decode_seconds']:.0f}",
        ])  # fmt: skip
    return page.table([*head, "later by", "ms a block"], lines)


# ---- the time of a context ----


@torch.inference_mode()
def picture_seconds(decoder, device, contexts=(4, 3, 2, 1), calls=12) -> dict:
    """Return {way: seconds of the video decoder alone for a block}, with random latents."""
    vae, new, longest = decoder.vae, decoder.cfg.video_frames_per_block, max(contexts)
    size = 1, 128, longest + new, *decoder.cfg.grid
    latents = torch.randn(size).to(next(vae.parameters()))

    def median(decode, x):
        return settled_median([seconds(lambda: decode(x), device, 1) for _ in range(calls)])

    def ours(x):
        return decoders.decode_video(vae.decoder, x, new)

    times = {f"context {n}": median(ours, latents[:, :, longest - n :]) for n in contexts}
    for p in vae.parameters():  # diffusers is slower with kernels laid out as ours
        p.data = p.data.contiguous()
    return {f"diffusers, context {longest}": median(vae.decode, latents), **times}


def picture_table(times) -> str:
    """Return the times as Markdown."""
    numbers = [f"{1000 * seconds:.1f}" for seconds in times.values()]
    return page.table(["video decoder alone", *times], [["ms a block", *numbers]])


# ---- the error of a context ----


@torch.inference_mode()
def context_errors(decoder, contexts, new=3, clips=4) -> dict:
    """Return {context: error of the first new frame, error of all new frames}, both relative.

    The reference has all the past. "no look-ahead": what that lacks of all the future.
    """
    reach = 22  # latents on either side, see tests/test_decoders.py
    end, stop = reach + new, reach + new + reach
    noise = torch.randn(clips, 128, stop + 4, 2, 2)
    latents = noise.unfold(2, 5, 1).mean(-1) * 5**0.5  # neighbours in time are alike

    def decoded(first, stop):
        """Decode latents first to stop; return the frames of the new ones."""
        low = 8 * (reach - first) - 7  # the first latent of a chunk has a single frame
        frames = decoders.decode_video(decoder, latents[:, :, first:stop])
        return frames[:, :, low : low + 8 * new]

    past, whole = decoded(0, end), decoded(0, stop)
    found = {n: frame_errors(decoded(reach - n, end), past) for n in contexts}
    return {**found, "no look-ahead": frame_errors(past, whole)}


def frame_errors(found, expected) -> tuple[float, float]:
    """Return the relative error of the first frame, and of all frames (B, 3, P, H, W)."""
    scale, error = expected.square().mean(), (found - expected).square().mean((0, 1, 3, 4))
    return float((error[0] / scale).sqrt()), float((error.mean() / scale).sqrt())


def deep_decoder(shrink=16):
    """Return the video decoder with all layers and `shrink` times fewer channels."""
    torch.manual_seed(0)
    network, _ = decoders.decoder_classes()["vae"]
    few = tuple(channels // shrink for channels in (256, 512, 1024))
    encoder = dict(block_out_channels=(8,) * 4, layers_per_block=(1,) * 5)  # not used
    net = network(decoder_block_out_channels=few, decoder_causal=False, **encoder)
    return net.eval().requires_grad_(False).decoder


def context_table(errors) -> str:
    """Return the errors as Markdown."""
    columns = [f"context {name}" if isinstance(name, int) else name for name in errors]
    names = "first frame", "the block"
    rows = [[name, *(f"{pair[i]:.1%}" for pair in errors.values())] for i, name in enumerate(names)]
    return page.table(["error", *columns], rows)


# ---- the clip ----


def tiny_clip(seconds, cfg):
    """Return config, blocks and decoder of a clip by tiny random networks."""
    cfg = bench_generate.tiny(cfg)
    net = weights.random_weights(cfg, dtype=torch.float32)
    features = text.random_features(["x"], cfg, dtype=torch.float32)["x"]
    blocks = list(generate.stream(net, "x", seconds, read=lambda _: features))
    nets = tiny_decoders()
    return cfg, blocks, lambda watch, overlap: decoders.Decoder(*nets, cfg, overlap, watch)


def tiny_decoder_classes() -> dict:
    """Return `decoders.decoder_classes` with the smallest networks of the same classes."""
    (vae, _), (audio_vae, _), (vocoder, _) = decoders.decoder_classes().values()
    video = dict(
        block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4, decoder_causal=False,
    )  # fmt: skip
    audio = dict(base_channels=128, ch_mult=(1, 1, 1), num_res_blocks=0)
    small = dict(hidden_channels=32)
    return {"vae": (vae, video), "audio_vae": (audio_vae, audio), "vocoder": (vocoder, small)}


def tiny_decoders() -> list:
    """Return these networks with random weights and statistics."""
    torch.manual_seed(0)
    nets = [network(**options) for network, options in tiny_decoder_classes().values()]
    for net in nets[:2]:  # the vocoder has no statistics
        net.latents_mean.normal_()
        net.latents_std.uniform_(0.5, 2)
    return [net.eval().requires_grad_(False) for net in nets]


def full_clip(args):
    """Return config, blocks and decoder of a clip, as generate.py makes it."""
    command = ["--config", args.config, "--seconds", str(args.seconds), "--device", args.device]
    command += ["--weights", args.weights, *(["--ltx2", args.ltx2] if args.ltx2 else [])]
    request = generate.check_args(generate.options().parse_args(command))
    source = generate.open_source([request])
    blocks = list(generate.stream(source.net, request.cues, request.seconds, read=source.read))
    return request.cfg, blocks, source.decoder


def main():
    p = cli.parser(__doc__)
    p.add_argument("--config", default="full", choices=["full", "released"])
    p.add_argument("--weights", default="random", help="as in generate.py")
    p.add_argument("--ltx2", help="as in generate.py")
    seconds = cli.whole(3, 600)  # at least 3, so that there are borders in between
    p.add_argument("--seconds", type=seconds, default=5, help="length of the clip")
    passes = "seconds that the passes of a block take; 1: real time"
    p.add_argument("--block-seconds", type=cli.real(0.001, 100), default=1.0, help=passes)
    p.add_argument("--contexts", action="store_true", help="only the errors of contexts, see above")
    p.add_argument("--device", default="cuda", help="where to run")
    p.add_argument("--tiny", action="store_true", help="tiny networks, only to test this script")
    p.add_argument("--out", help="JSON file to write; default in results/, with --tiny in runs/")
    args = p.parse_args()
    if args.contexts:
        text = context_table(context_errors(deep_decoder(), (1, 2, 3, 4, 6, 8)))
        print(text)
        return page.fill_in("context", text)
    args.out = page.json_path(args, "bench_decode")
    device, cfg = cli.find_device(args.device), cli.find_config(args.config)
    cfg, blocks, make_decoder = tiny_clip(args.seconds, cfg) if args.tiny else full_clip(args)
    rows = bench(make_decoder, blocks, cfg, args.block_seconds, device)
    if args.weights == "random" and not args.tiny:
        rows = without_errors(rows)
    times = picture_seconds(make_decoder(lambda _, f: f, Overlap()), device)
    tables = f"{table(rows)}\n\n{picture_table(times)}"
    print(tables)
    about = {
        **cli.machine(device),
        "config": cfg.name,
        "weights": args.weights,
        "tiny": args.tiny,
        "block_seconds": args.block_seconds,
    }
    files.write_json(args.out, {"about": about, "rows": rows, "video_decoder": times})
    print(f"wrote {args.out}")
    if not args.tiny:
        where = "{device}, torch {torch}, {date}, {weights} weights".format(**about)
        page.fill_in("decode", f"{where}\n\n{tables}")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
