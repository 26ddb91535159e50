"""Prompts that change: how soon is the new one obeyed, and does the ball's path stay whole?

Streams of the toy change their prompt at second 4: each of the 12 pairs of colours, alone, with
another speed, with another material, and with both, 48 streams. All rows continue the same four
seconds, with the same noise. What is done at the switch:

    nothing       the next blocks read the new prompt
    re-cache      the refresh of the blocks in the cache is repeated under the new prompt (LongLive)
    forget        the cache keeps some of the blocks only; as it is, it has block 0 and the window
    guided        the next blocks are guided away from another prompt: the old or the empty one
    painted anew  the newest block gets noise of level 0.42 and loses it under the new prompt; the
                  cache then holds the result, the film does not
    trained       another student: stage III with switches in its rollouts (self_forcing.py)

A row names blocks and scale of the guidance, "2 x 1.5": two blocks, scale 1.5. "late" means only in
the last two passes, below the noise level 0.8. "as shipped" streams through toy/switch.py, as
generate.py does: all but the newest block is forgotten, and guidance is late, 2 x 2.

Columns, each with a bootstrap 95 % confidence interval over the streams:

    1 s ... 6 s   share of frames in the new colour, in each second after the switch
    speed         share of the clips with another speed that have it in second 1 and in second 2
    material      the same for the material, among clips with a sound, in seconds 1 and 2 together
    F1            of seconds 1 and 2 and of seconds 3 to 6 (evaluate.py)
    whole         share of frames with exactly one ball of the right size, in seconds 1 and 2
    step, jumps   between the last frame before and the first after the switch: step of the ball in
                  pixels, and share of streams where it is above 4. "elsewhere" has the same borders
                  of blocks where no prompt changes, in the row "nothing"
    kept          identity (evaluate.py): seconds 3 to 6 after the switch against the 4 s before it
    passes        more than without a switch; a pass of the new prompt costs about 15 ms

Pictures are decoded by the linear codec, as in evaluate.py. Its ball jumps at the border of every
latent, so compare a step with those elsewhere.

Expected after trial runs: re-caching helps little, because the cached pictures show the old colour.
Forgetting helps, and without the newest block the ball jumps. Guidance helps most, because it asks
for the difference between the prompts, and an old prompt is better to leave than an empty one. It
harms the picture from a scale of 3 on, since no student was trained with it. A block 0 of a whole
second holds its stream to the old colour for ever, a single frame does not.

    python -m studies.prompt_switch
    python -m studies.prompt_switch --only "toy, nothing" "toy, as shipped"
"""

import functools
from functools import partial
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import config
import model
from kv_cache import CachedView
from masks import SITES, block_span, num_blocks
from plumbing import cli
from rollout import Block, denoise, refresh, rollout, whole_clip
from studies import ablations, evaluate, plots
from toy import codec as toy_codec
from toy import detectors
from toy import world as toy_world
from toy.source import WEIGHTS
from toy.switch import BELOW, GUIDED_BLOCKS, Switching, guided

BEFORE, AFTER = 4, 6  # seconds
LONG_STEP = 4.0  # pixels; twice the usual step at a border
RESAMPLES = 400


# ---- what is done at a switch ----


class Method(NamedTuple):
    """What is done when the prompt changes."""

    blocks: int | None = None  # the newest blocks that the cache keeps; None: its window
    block_0: bool = True  # whether it keeps block 0
    recache: bool = False
    noise: int = 3  # with `repaint`: index of the level
    repaint: bool = False
    guided: int = 0  # blocks after the switch
    scale: float = 1.0
    below: float = 2.0  # noise level of the guided passes
    away_from: str = "old"  # or "empty"
    shipped: bool = False


NEWEST = Method(blocks=1, block_0=False)
LATE = NEWEST._replace(guided=2, below=BELOW)
METHODS = {
    "nothing": Method(),
    "re-cache": Method(recache=True),
    "forget all but block 0 and the newest": Method(blocks=1),
    "the same, re-cached": Method(blocks=1, recache=True),
    "forget all but the newest": NEWEST,
    "forget all but block 0": Method(blocks=0),
    "painted anew, forget all but block 0 and the newest": Method(blocks=1, repaint=True),
    "guided 2 x 2": Method(guided=2, scale=2),
    "guided 2 x 3": Method(guided=2, scale=3),
    "guided 2 x 2 away from no prompt": Method(guided=2, scale=2, away_from="empty"),
    "forget all but block 0 and the newest, guided 2 x 2": Method(blocks=1, guided=2, scale=2),
    "the same, re-cached, guided 2 x 1.5": Method(1, recache=True, guided=2, scale=1.5),
    "forget all but the newest, guided 1 x 2": NEWEST._replace(guided=1, scale=2),
    "forget all but the newest, guided 2 x 2": NEWEST._replace(guided=2, scale=2),
    "forget all but the newest, guided late 2 x 1.5": LATE._replace(scale=1.5),
    "forget all but the newest, guided late 2 x 3": LATE._replace(scale=3),
    "as shipped": Method(shipped=True),
}
STUDENTS = {"toy": ("toy", 4), "4+3k, window 1": ("toy_released", 1)}
STUDENTS["4+3k, window 3"] = "toy_released", 3
FEW = "nothing", "re-cache", "forget all but the newest", "guided 2 x 2", "as shipped"  # drawn


class View(CachedView):
    """A cache that can forget any blocks; what is pinned then moves as if they were evicted."""

    skipped = 0  # blocks that were forgotten

    @property
    def num_evicted(self):
        return self.skipped + max(0, self.block - 1 - self.window)

    def keep(self, blocks):
        """Forget all finished blocks except block 0 and the newest ones."""
        gone = self.block - 1 - blocks
        for cache in self.caches:
            places = []
            for block in range(self.block - blocks, self.block):
                cache.block = block
                places.append(cache.slots)
            for buffer in (cache.k, cache.v):
                kept = [buffer[:, place].clone() for place in places]
                for cache.block, keys in enumerate(kept, 1):
                    buffer[:, cache.slots] = keys
            cache.block = blocks + 1
        self.block = blocks + 1
        self.skip(gone)

    def skip(self, blocks):
        """Move the pinned keys as if so many blocks more had been evicted."""
        self.skipped += blocks
        if self.num_evicted:
            for site in SITES:
                self.move_prefixes(site, self._prefix_rotation(site, self.layers[0][site].k))


class Guided(nn.Module):
    """A student whose predictions are moved away from those of another prompt."""

    def __init__(self, net, other, scale, below):
        super().__init__()
        self.net, self.cfg = net, net.cfg
        self.other, self.scale, self.below = other, scale, below

    def forward(self, video, audio, sigma_video, sigma_audio, text, *place):
        latents = video, audio, sigma_video, sigma_audio
        if sigma_video.max() >= self.below:
            return self.net(*latents, text, *place)
        both = self.net(*latents, self.other, *place), self.net(*latents, text, *place)
        return [guided(old, new, self.scale) for old, new in zip(*both)]


def rows() -> dict:
    """Return student and method of every row by its name; of equal ones, the first."""
    found = {}
    for student, (_, window) in STUDENTS.items():
        different = {}
        for name in FEW if window == 3 else METHODS:
            blocks = None if METHODS[name].blocks == window else METHODS[name].blocks
            different.setdefault(METHODS[name]._replace(blocks=blocks), name)
        found |= {f"{student}, {name}": (student, name) for name in different.values()}
    return found


# ---- streams ----


class Past(NamedTuple):
    """The first seconds of all streams of a student, and their prompts."""

    net: nn.Module
    window: int
    blocks: list
    texts: dict  # "old", "new", "empty"


def switches():
    """Return the words (48, 3) before and after the switch: indices into world.SLOTS."""
    old, new = [], []
    for i, (a, b) in enumerate(permutations(range(4), 2)):
        speed, material = i % 2, i // 2 % 2
        for other in range(4):  # bit 0: another speed, bit 1: another material
            old.append([a, speed, material])
            new.append([b, speed ^ (other & 1), material ^ (other >> 1)])
    return torch.tensor(old), torch.tensor(new)


@functools.lru_cache(maxsize=1)  # the rows of a student stand together
@torch.inference_mode()
def past(path, window, seed) -> Past:
    """Stream the seconds before the switch."""
    net = model.load(path)
    words = [toy_world.caption_tokens(toy_world.Clips(w, *[None] * 3)) for w in switches()]
    tokens = dict(zip(("old", "new", "empty"), [*words, torch.zeros_like(words[0])]))
    texts = {name: net.project_text(toy_world.caption_features(t)) for name, t in tokens.items()}
    blocks, g = num_blocks(BEFORE, net.cfg), torch.Generator().manual_seed(seed)
    view, batch = CachedView(net.cfg, blocks, window), len(words[0])
    stream = rollout(net, lambda k: texts["old"], blocks, net.cfg.sigmas, g, batch, view)
    return Past(net, window, list(stream), texts)


@torch.inference_mode()
def remember(start: Past, method: Method, generator):
    """Return the cache with which the first block after the switch begins."""
    net, finished, texts = start.net, len(start.blocks), start.texts
    view = View(net.cfg, finished + AFTER, start.window)
    kept = min(start.window if method.blocks is None else method.blocks, finished - 1)
    again = method.recache or method.repaint
    first = max(1, finished - kept)
    for k, video, audio in start.blocks:
        if again and 0 < k < first:
            continue
        x0, span = (video, audio), block_span(k, net.cfg)
        if method.repaint and k:
            sigmas = net.cfg.sigmas[method.noise :]
            noise = [model.noise_like(x, generator) for x in x0]
            noisy = [
                model.add_noise(x, n, x.new_full((1, 1), sigmas[0])) for x, n in zip(x0, noise)
            ]
            x0 = denoise(net, noisy, sigmas, texts["new"], span, view, generator)
        refresh(net, x0, texts["new" if again else "old"], span, view)
        view.next_block()
        if again and k == 0:
            view.skip(first - 1)
    if method.blocks is not None and not again:
        view.keep(kept)
    if not method.block_0:
        for cache in view.caches:
            cache.first_visible = cache.prefix_tokens
    return view


@torch.inference_mode()
def continue_stream(start: Past, method: Method, seed) -> list:
    """Return the blocks after the switch."""
    generator, texts = torch.Generator().manual_seed(seed), start.texts
    # its own noise, so that what follows has the same noise in all rows
    view = remember(start, method, torch.Generator().manual_seed(seed + 1))
    net, blocks, first, like = start.net, [], len(start.blocks), start.blocks[0].video
    if method.shipped:
        net = Switching(net)
        net.text, net.old = texts["old"], None
    leaving = Guided(net, texts[method.away_from], method.scale, method.below)
    for k in range(first, first + AFTER):
        span = block_span(k, net.cfg)
        noise = model.draw_noise(len(like), span, net.cfg, generator, like.device, like.dtype)
        student = leaving if k < first + method.guided else net
        x0 = denoise(student, noise, net.cfg.sigmas, texts["new"], span, view, generator)
        blocks.append(Block(k, *x0))
        refresh(net, x0, texts["new"], span, view)
        view.next_block()
    return blocks


def more_passes(method, window) -> int:
    """Return how many passes a switch costs.

    >>> more_passes(METHODS["nothing"], 4), more_passes(METHODS["as shipped"], 4)
    (0, 4)
    >>> more_passes(METHODS["re-cache"], 4), more_passes(METHODS["guided 2 x 2"], 4)
    (5, 8)
    """
    levels = config.TOY.sigmas[:-1]
    kept = window if method.blocks is None else method.blocks
    cached = (1 + kept) * (method.recache or method.repaint)
    painted = kept * len(levels[method.noise :]) * method.repaint
    blocks, below = (GUIDED_BLOCKS, BELOW) if method.shipped else (method.guided, method.below)
    return cached + painted + blocks * sum(level < below for level in levels)


# ---- measurements ----


def measure(start: Past, after, codec) -> dict:
    """Return {metric: (numerators (B,), denominators (B,))}; a value is the quotient of sums."""
    old, new = switches()
    video, audio = whole_clip([*start.blocks, *after])
    frames, sound = codec.decode_video(video, True), codec.decode_audio(audio, True)
    ball, first = detectors.see_ball(frames), config.TOY.fps * BEFORE + 1

    def seconds(x):  # (B, P) -> (B, AFTER), the mean of each second after the switch
        return x[:, first:].float().unflatten(1, (AFTER, -1)).mean(2)

    colour = seconds(colours(ball) == new[:, :1])
    found = {f"colour_{s + 1}": colour[:, s] for s in range(AFTER)}
    found["whole"] = seconds(detectors.persistence(ball))[:, :2].mean(1)
    step = ball.place.diff(dim=1).norm(dim=-1)  # (B, P - 1)
    elsewhere = step[:, [config.TOY.fps * s for s in range(BEFORE + 2, BEFORE + AFTER)]]
    border = step[:, first - 1]
    found |= {"step": border, "jumps": (border > LONG_STEP).float()}
    found |= {"step_elsewhere": elsewhere.mean(1)}
    found["jumps_elsewhere"] = (elsewhere > LONG_STEP).float().mean(1)
    found = {name: (x, torch.ones(len(x))) for name, x in found.items()}
    changed = (new != old).float()  # (B, 3)
    for s in range(2):
        part = slice(first + config.TOY.fps * s, first + config.TOY.fps * (s + 1))
        is_fast = detectors.speeds(detectors.Ball(*(x[:, part] for x in ball))) > detectors.FAST
        obeys = (is_fast == new[:, 1].bool()).float()
        found[f"speed_{s + 1}"] = obeys * changed[:, 1], changed[:, 1]
    times = [(BEFORE, BEFORE + 2), (BEFORE + 2, BEFORE + AFTER), (0, BEFORE)]
    soon, late, before = evaluate.measure(frames, sound, new, times)
    for name, w in (("f1_soon", soon), ("f1_late", late)):
        matches = detectors.Match(*torch.from_numpy(w.match).T)
        found[name] = matches.hits, matches.impacts + matches.onsets
    heard = changed[:, 2] * torch.from_numpy(
        soon.match[:, detectors.Match._fields.index("onsets")] > 0
    )
    found["material"] = torch.from_numpy(soon.words[:, 2]) * heard, heard
    found = {name: tuple(x.double().numpy() for x in pair) for name, pair in found.items()}
    return {**found, "identities": (before.identity, late.identity)}


def colours(ball):
    """Return the nearest of the COLOURS in every frame: (B, P) indices."""
    hues = torch.tensor(list(toy_world.COLOURS.values()))
    return ((ball.hue[..., None] - hues + 180) % 360 - 180).abs().argmin(-1)


def with_intervals(found) -> dict:
    """Return {metric: [value, low, high]}, with 95 % intervals over the streams."""
    rng, n = np.random.default_rng(0), len(found["whole"][0])
    draws = [np.arange(n), *rng.integers(n, size=(RESAMPLES, n))]
    result = {}
    for name, (a, b) in found.items():
        if name == "identities":
            name, values = "kept", [evaluate.identity_kept(a[d], b[d]) for d in draws]
        else:
            values = [a[d].sum() / max(1, b[d].sum()) for d in draws]
        low, high = np.percentile(values[1:], (2.5, 97.5))
        numbers = [round(float(x), 4) for x in (values[0], low, high)]
        result[name] = [x if x == x else None for x in numbers]  # NaN: no pitch without a sound
    return result


def row(name, seed=0) -> dict:
    """Measure one row: {name: metrics with intervals}."""
    student, method = rows()[name]
    (config_name, window), method = STUDENTS[student], METHODS[method]
    start = past(WEIGHTS[config_name], window, seed)
    found = measure(start, continue_stream(start, method, seed + 2), toy_codec.load())
    return {name: {**with_intervals(found), "passes": [more_passes(method, window)] * 3}}


COLUMNS = {f"colour_{s + 1}": f"{s + 1} s" for s in range(AFTER)} | {
    "speed_1": "speed, 1 s", "speed_2": "2 s", "material": "material", "f1_soon": "F1, 1-2 s",
    "f1_late": "3-6 s", "whole": "whole", "step": "step", "jumps": "jumps", "kept": "kept",
    "passes": "passes",
}  # fmt: skip


def table(results) -> str:
    """Return a Markdown table of {name: metrics with intervals}."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name, values in results.items():
        if name.endswith(", nothing"):
            there = {c: values[f"{c}_elsewhere"] for c in ("step", "jumps")}
            lines.append(line(f"{name.removesuffix('nothing')}elsewhere", there))
        lines.append(line(name, values))
    return "\n".join(lines)


def line(name, values) -> str:
    """Return one line of the table; the ± is half the width of the interval."""
    return f"| {name} | " + " | ".join(cell(c, *values.get(c, [None])) for c in COLUMNS) + " |"


def cell(column, value, low=None, high=None) -> str:
    if value is None or column == "passes":
        return "" if value is None else f"{value}"
    return f"{value:.2f}" if low is None else f"{value:.2f} ± {(high - low) / 2:.2f}"


def drawn(results):
    """Draw the seconds after the switch, for some of the methods."""
    curves = {}
    for name, values in results.items():
        student, method = rows()[name]
        if method in FEW:
            seconds = [values[f"colour_{s + 1}"] for s in range(AFTER)]
            curves.setdefault(student, {})[method] = seconds
    return plots.draw_switches(curves)


# ---- command line ----


def main():
    p = cli.parser(__doc__)
    cli.add_seed(p, "random seed of the noise")
    p.add_argument("--only", nargs="*", metavar="NAME", help="only these rows")
    p.add_argument("--run", default="runs/prompt_switch", help="folder of finished rows")
    p.add_argument("--out", default="results/prompt_switch", help="writes .json, .md and .png")
    args = p.parse_args()
    names, args.command = cli.chosen(args.only, rows()), cli.command(p, args)
    evaluate.check(0, args.out)
    measured = partial(row, seed=args.seed)
    results = ablations.measure_variants(names, measured, args, "prompt_switch")
    evaluate.write(args, {"result": results}, table(results), drawn(results))


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
