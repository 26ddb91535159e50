"""fp8 at toy scale: which products bear rounding to 8 bits, and does a stream notice it?

    python -m studies.fp8        5 variants of the student of stage III, 8 minutes
    python -m studies.fp8 --only float32 fp8 --clips 16

full_size/fp8.py multiplies video's products in fp8 on a GPU. On a CPU it computes the same rounding
step by step, in a product with wide sums. Each variant rounds other products of the same student,
also audio's. Two measurements:

    error    of the velocities, against float32: clean held-out clips are the past, their next block
             is noisy, at all noise levels of the stream. Square root of the mean square, relative
             to the velocity; for video and for audio; with the best and the worst block
    stream   the metrics of evaluate.py, in the first and in the last five seconds

The second table has errors only: one kind of product is rounded, in all layers. After an
interruption the command continues with the unfinished variant.
"""

import contextlib
import copy
from functools import partial
from typing import Callable, NamedTuple
from unittest import mock

import torch

import model
from full_size import fp8
from kv_cache import CachedView
from masks import block_span, trained_window
from plumbing import cli
from rollout import block_of
from studies import ablations, compare, evaluate, plots
from toy import codec as toy_codec
from toy import world as toy_world

ERROR_CLIPS = 16
BLOCKS = 6  # of a clip of five seconds


# ---- variants ----


def tensor_rounded(x) -> fp8.Rounded:
    """Round as `fp8.rounded` does, but with one scale for the whole tensor."""
    _, scale = fp8_rounded(x.flatten()[None])
    return fp8.Rounded((x.float() / scale).to(fp8.FP8), scale.expand(*x.shape[:-1], 1))


fp8_rounded = fp8.rounded  # a variant replaces fp8.rounded


class Variant(NamedTuple):
    """What is rounded, and how."""

    chosen: Callable = lambda name: False  # of a product's name; see fp8.quantise
    everywhere: bool = False  # outside the layers as well
    precision: torch.dtype = torch.float32  # of all other products, and of attention
    rounded: Callable = fp8_rounded

    def applied_to(self, net):
        """Return a rounded copy of the net."""
        net = copy.deepcopy(net)
        fp8.quantise(net if self.everywhere else net.layers, self.chosen)
        return net

    @contextlib.contextmanager
    def at_work(self):
        """Round inside this context."""
        with (
            mock.patch.object(fp8, "rounded", self.rounded),
            ablations.HalfPrecision(self.precision),
        ):
            yield


def inside(*parts):
    """Choose the products whose name contains one of these parts."""
    return lambda name: any(part in name for part in parts)


VARIANTS = {
    "float32": Variant(),
    "bfloat16": Variant(precision=torch.bfloat16),
    "fp8": Variant(inside(""), precision=torch.bfloat16),  # both streams
    "outside the layers too": Variant(inside(""), everywhere=True, precision=torch.bfloat16),
    "one scale per tensor": Variant(inside(""), precision=torch.bfloat16, rounded=tensor_rounded),
}


# ---- error of the velocities ----


@torch.no_grad()
def velocities(net, clip, text) -> dict:
    """Predict all blocks of clean clips (video, audio) at all levels: {(block, level): two}."""
    view = CachedView(net.cfg, BLOCKS, trained_window(net.cfg))
    generator, found = torch.Generator().manual_seed(0), {}
    for k in range(BLOCKS):
        x0, span = block_of(clip, k, net.cfg), block_span(k, net.cfg)
        noise = model.draw_noise(len(x0[0]), span, net.cfg, generator)
        for level in net.cfg.sigmas:  # the last one is 0: its keys are the past of the next block
            sigma = torch.full((len(x0[0]), 1), level)
            noisy = [model.add_noise(x, e, sigma) for x, e in zip(x0, noise)]
            found[k, level] = net(*noisy, sigma, sigma, text, span, view)
        view.next_block()
    return found


def errors(found, truth) -> dict:
    """Compare velocities: {"video_error": [all blocks, best block, worst block], "audio_error"}."""
    result = {}
    for i, stream in enumerate(("video", "audio")):
        squares = torch.zeros(BLOCKS, 2)  # of the differences, of the velocities
        for (k, level), velocity in truth.items():
            squares[k] += torch.stack([((found[k, level][i] - velocity[i]) ** 2).mean(),
                                       (velocity[i] ** 2).mean()])  # fmt: skip
        by_block = (squares[:, 0] / squares[:, 1]).sqrt()
        whole = (squares[:, 0].sum() / squares[:, 1].sum()).sqrt()
        values = [float(x) for x in (whole, by_block.min(), by_block.max())]
        result[f"{stream}_error"] = [float(f"{x:.3g}") for x in values]
    return result


def error_measure(net, codec) -> Callable:
    """Return a function of a Variant: its errors on held-out clips."""
    clips = toy_world.draw_clips(evaluate.held_out(ERROR_CLIPS))
    clip = codec.encode(*evaluate.true_clips(5, clips, 0))
    features = toy_world.caption_features(toy_world.caption_tokens(clips))

    def predict(net):
        return velocities(net, clip, net.project_text(features))

    truth = predict(net)

    def measure(variant):
        with variant.at_work():
            return errors(predict(variant.applied_to(net)), truth)

    return measure


def kinds_of(net) -> dict:
    """List kinds of products in a layer: {name: part of the names of these products}."""
    groups = {"all self attention": "self_attn", "all of captions": "text_attn"}
    groups |= {"all of the other stream": "cross_attn", "all MLPs": "mlp"}
    single = [n for n, m in net.layers[0].named_modules() if isinstance(m, torch.nn.Linear)]
    return groups | {name: name for name in single}


# ---- streams ----


def stream(variant, net, codec, seconds, clips, seed):
    """Stream with a rounded student, see `evaluate.from_stream`."""
    with variant.at_work():
        return evaluate.from_stream(net, codec, seconds, clips, seed)


def measure(args) -> Callable:
    """Return a function: name of a variant -> its rows {"NAME, 0-5 s": metrics}."""
    net, codec = model.load(args.student).requires_grad_(False), toy_codec.load()
    measured, error = compare.both_ends(args.clips, args.seconds), error_measure(net, codec)

    def rows(name):
        if name == KINDS:
            kinds = kinds_of(net).items()
            return {KINDS: {kind: error(Variant(inside(part))) for kind, part in kinds}}
        variant = VARIANTS[name]
        with variant.at_work():
            rounded = variant.applied_to(net)
        make = partial(stream, variant, rounded, codec, args.seconds)
        wrong = error(variant)
        return {row: {**wrong, **metrics} for row, metrics in measured(name, make).items()}

    return rows


# ---- command line ----

KINDS = "kinds"  # the second table
TITLES = {
    "video_error": "error of video's velocity", "audio_error": "error of audio's velocity",
    "f1": "F1", "onsets_rate": "onsets", "kept": "identity kept",
}  # fmt: skip


def table(rows, kinds) -> str:
    """Return both tables as Markdown."""
    lines = ["| | video error, worst block | audio error, worst block |", "|---|---|---|"]

    def cells(row):
        return [f"{row[f'{s}_error'][0]:.4f}, {row[f'{s}_error'][2]:.4f}" for s in STREAMS]

    named = {name.rpartition(", ")[0]: row for name, row in rows.items()} | kinds
    lines += [f"| {name} | {' | '.join(cells(row))} |" for name, row in named.items()]
    return evaluate.table(rows) + "\n\n" + "\n".join(lines)


STREAMS = "video", "audio"


def main():
    p = cli.parser(__doc__)
    evaluate.add_sizes(p, clips=48, seconds=20)
    cli.add_weights(p, "--student", evaluate.STUDENTS[-1], "student of stage III")
    p.add_argument("--only", nargs="*", metavar="NAME", help="only these variants")
    p.add_argument("--run", default="runs/fp8", help="folder of finished rows")
    p.add_argument("--out", default="results/fp8", help="writes .json, .md and .png")
    args = p.parse_args()
    names, args.command = cli.chosen(args.only, VARIANTS), cli.command(p, args)
    evaluate.check(args.seconds, args.out)
    results = ablations.measure_variants([*names, KINDS], measure(args), args, "fp8")
    kinds = results.pop(KINDS)
    figure = plots.draw_rows(results, TITLES)
    for axis in figure.axes[:2]:  # errors are small
        axis.autoscale(axis="x")
    evaluate.write(args, {"result": results, "kinds": kinds}, table(results, kinds), figure)


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
