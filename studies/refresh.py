"""What should the refresh see? Streams in which some passes do not read the whole cache.

    python -m studies.refresh    both students of stage III, 14 ways to stream, 20 minutes
    python -m studies.refresh --only "1+3k, refresh: itself, denoising: everything" --clips 16

Each block takes several denoising passes, then the refresh writes the keys and values that later
blocks read (kv_cache.py). In training all passes see the same blocks. Nothing is trained here. The
refresh and the denoising passes see different parts of the cache:

    everything     block 0 with the sinks, the blocks of the window, the block itself
    no prefix      the same, but block 0 is forgotten like any other block, and the sinks with it
    newest block   the block before and the block itself
    itself         the block itself

With a window of one block, "no prefix" and "newest block" are the same. The denoising passes see
everything or "no prefix". Block 1 therefore always reads block 0, which is in its window.

Expected: what drifts in a stream is written at the refresh. A refresh that sees less of the past
copies fewer errors from block to block, so identity or F1 at the end of a minute moves. Refuted if,
whatever the refresh sees, the 95 % intervals of both still overlap with those of "everything".

Metrics and table are as in compare.py. The picture shows the last five seconds. After an
interruption the command continues with the unfinished stream.
"""

from functools import partial
from typing import Callable, NamedTuple

import torch
from torch import nn

import model
from kv_cache import attention
from plumbing import cli
from studies import ablations, compare, evaluate
from toy import codec as toy_codec

REACH = {"everything": None, "no prefix": None, "newest block": 1, "itself": 0}  # blocks back
STUDENTS = compare.SHIPPED


# ---- passes that see less ----


def blocks_seen(what, block, window) -> list[int]:
    """Return the blocks that a pass of `block` reads.

    >>> blocks_seen("everything", 7, 2), blocks_seen("no prefix", 7, 2)
    ([0, 5, 6, 7], [5, 6, 7])
    >>> blocks_seen("no prefix", 2, 2), blocks_seen("newest block", 7, 2)
    ([0, 1, 2], [6, 7])
    """
    back = window if REACH[what] is None else REACH[what]
    seen = set(range(max(0, block - back), block + 1))
    return sorted(seen | {0} if what == "everything" else seen)


class Selected:
    """A view of a `CachedView` in which a pass reads only some blocks; it writes all its keys."""

    def __init__(self, view, what):
        self.view, self.blocks = view, blocks_seen(what, view.block, view.window)

    def attend(self, layer, site, q, k, v, heads):
        """Projections (B, T, H*D) of the current block -> (B, Q, H*D)."""
        cache = self.view.layers[layer][site]
        cache.append(heads.keys(k), heads.split(v))
        slots = [slots_of(cache, block) for block in self.blocks]
        keys, values = (torch.cat([x[:, s] for s in slots], 1) for x in (cache.k, cache.v))
        return attention(heads.queries(q), keys, values)


def slots_of(cache, block) -> slice:
    """Return the slots of a block in a `RollingCache`."""
    if block == 0:
        return slice(0, cache.prefix_tokens)
    start = cache.prefix_tokens + (block - 1) % cache.ring_blocks * cache.block_tokens
    return slice(start, start + cache.block_tokens)


class Selective(nn.Module):
    """A student whose refresh and whose denoising passes see different parts of the cache."""

    def __init__(self, net, refresh, denoising):
        super().__init__()
        self.net, self.cfg, self.project_text = net, net.cfg, net.project_text
        self.refresh, self.denoising = refresh, denoising

    def forward(self, video, audio, sigma_video, sigma_audio, text, span, view):
        # only the refresh has sigma = 0
        what = self.denoising if sigma_video.any() else self.refresh
        view = Selected(view, what)
        return self.net(video, audio, sigma_video, sigma_audio, text, span, view)


# ---- streams ----


class Stream(NamedTuple):
    """A student, and what its passes see."""

    student: compare.Student
    refresh: str
    denoising: str


def streams() -> dict:
    """Return all ways to stream by name; of two that are equal, the first."""
    found = {}
    for blocks, student in STUDENTS.items():
        for refresh in REACH:
            if student.window == REACH[refresh]:
                continue  # "newest block" is "no prefix"
            for denoising in ("everything", "no prefix"):
                name = f"{blocks}, refresh: {refresh}, denoising: {denoising}"
                found[name] = Stream(student, refresh, denoising)
    return found


def measure(args) -> Callable:
    """Return a function: name of a stream -> its rows {"NAME, 0-5 s": metrics}."""
    codec, measured = toy_codec.load(), compare.both_ends(args.clips, args.seconds)

    def rows(name):
        student, *seen = streams()[name]
        net = Selective(model.load(cli.weights_path(student.path)), *seen)
        options = {"window": student.window}
        make = partial(evaluate.from_stream, net, codec, args.seconds, **options)
        return measured(name, make)

    return rows


# ---- command line ----


def main():
    p = cli.parser(__doc__)
    evaluate.add_sizes(p, clips=48, seconds=60)
    p.add_argument("--only", nargs="*", metavar="NAME", help="only these streams")
    p.add_argument("--run", default="runs/refresh", help="folder of finished rows")
    p.add_argument("--out", default="results/refresh", help="writes .json, .md and .png")
    args = p.parse_args()
    names, args.command = cli.chosen(args.only, streams()), cli.command(p, args)
    evaluate.check(args.seconds, args.out)
    ablations.measure_streams(names, measure(args), args, "refresh")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
