"""Ablations: short trainings of stage II, each with one change.

This file trains students and measures them. evaluate.py and compare.py train nothing.

    python -m studies.ablations sinks      how large are the gradients? With and without sinks, in
                                   both block layouts, with other attentions, in half precision
    python -m studies.ablations why_sinks  do sinks matter only as keys? More latents in block 0,
                                   sinks without values, sinks that read nothing
    python -m studies.ablations switches   how good are the streams? Other blocks, and no stage I

All students of `sinks` start from the same weights. They see the same trajectories (states of a
clip between noise and clean, see ode_regression.py) in the same order. Each ablation writes
results/NAME.json, .md and .png. After an interruption it continues with the unfinished variant.

Columns of `sinks`:

    max norm    largest gradient norm of a step before clipping, after the first ten steps
    A0 norm     the same for the loss of block 0's audio only. In the paper's layout this is A0, the
                latent that attends to a single key in addition to the sinks
    loss        x0 loss of one pass at sigma = 0.5, on trajectories that were not trained on
    entropy     of A0's attention, in nats; mean over layers and heads
    share       part of A0's attention that goes to the sinks; mean over layers and heads

The paper reports max norm and loss. evaluate.py explains the columns of `switches`.

`why_sinks` trains with three seeds (order of the batches, noise levels, initial sinks) on the first
two seconds of the trajectories, to save time. Without sinks, block 0 gets up to 26 audio latents:
the first ones of block 1 move to it. Its video stays one frame. Columns that differ:

    keys        keys of A0 in audio self-attention: latents of block 0, and sinks
    A0 norm     as above, for all audio latents of block 0: their mean loss
    A0 alone    the same for the loss of the first latent only
    median      over the steps in which the norm was measured, instead of the largest value

Expected: the number of keys matters, not what sinks learn. Refuted if the gradient has no peak at
two or three latents, or if sinks whose values are fixed to zero give another one.
"""

import contextlib
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Callable
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import config
import kv_cache
import masks
import model
import ode_regression
import rope
import teacher
from masks import clip_of_seconds, num_blocks, trained_window
from plumbing import cli, files, trainer
from studies import compare, evaluate, plots
from toy import codec as toy_codec
from toy.source import TOY_PROMPTS, load_bidirectional, student_from, toy_captions


def start_and_trajectories(from_teacher, args):
    """Return the weights to start from, and their trajectories: "tokens", "video", "audio".

    from_teacher   use the teacher, with guidance and smaller steps, not the student of stage I
    """
    path = args.real if from_teacher else args.few_step
    net = load_bidirectional(path)
    trajectories = ode_regression.load_or_draw_trajectories(
        f"{args.run}/{evaluate.short_name(path)}_trajectories.safetensors",
        net,
        count=args.walks,
        prompts=TOY_PROMPTS,
        guidance=teacher.GUIDANCE if from_teacher else (1, 1),
        between=4 if from_teacher else 1,
    )
    return net.state_dict(), trajectories


def first_seconds(trajectories, cfg, seconds):
    """Cut trajectories to the complete blocks of the first seconds."""
    span = clip_of_seconds(cfg, seconds)
    tokens_v = len(span.video) * cfg.tokens_per_frame
    video, audio = trajectories["video"][:, :, :tokens_v], trajectories["audio"]
    return {**trajectories, "video": video, "audio": audio[:, :, : len(span.audio)]}


# ---- sinks ----


class Bare(kv_cache.Heads):
    """Attention heads without the RMSNorm of queries and keys."""

    def _normed(self, x, weight, positions):
        x = self.split(x)
        return x if positions is None else rope.rotate(x, positions)


class Loud(kv_cache.Heads):
    """Attention heads with logits eight times as large."""

    def queries(self, q):
        return 8 * super().queries(q)


class TanhGate(nn.Module):
    """The output of an attention times tanh(g).  g starts at 0: training must open the gate."""

    def __init__(self, to_out):
        super().__init__()
        self.to_out, self.g = to_out, nn.Parameter(torch.zeros(to_out.out_features))

    def forward(self, x):
        return torch.tanh(self.g) * self.to_out(x)


def with_heads(kind, net):
    """Give every attention of the network another kind of `kv_cache.Heads`."""
    for part in net.modules():
        if isinstance(part, model.Attention):
            heads = part.heads
            part.heads = lambda *ropes, heads=heads: kind(*heads(*ropes))
    return net


def with_gates(net):
    """Gate every audio self-attention: the paper's alternative to sinks."""
    for layer in net.layers:
        layer.audio.self_attn.to_out = TanhGate(layer.audio.self_attn.to_out)
    return net


without_norm, with_large_logits = partial(with_heads, Bare), partial(with_heads, Loud)


class HalfPrecision(TorchFunctionMode):
    """Round inputs, outputs and their gradients of matrix products and attention to 16 bits."""

    # The sums stay in float32, as in tensor cores. torch.autocast does the same, but it is slow on
    # processors without 16-bit arithmetic, and differs between processors.
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (F.linear, F.scaled_dot_product_attention):
            return func(*args, **kwargs)
        named = {name: self.rounded(x) for name, x in kwargs.items()}
        return self.rounded(func(*map(self.rounded, args), **named))

    def rounded(self, x):
        is_number = isinstance(x, torch.Tensor) and x.is_floating_point()
        # the backward pass of `to` rounds the gradient in the same way
        return x.to(self.dtype).to(x.dtype) if is_number else x


@dataclass(frozen=True)
class Variant:
    """One training: its config, a change of the network, and the precision."""

    cfg: config.Config = config.TOY
    change: Callable = lambda net: net
    precision: torch.dtype = torch.float32
    seconds: int = config.CLIP_SECONDS  # the first seconds of every trajectory are trained on
    around: Callable = contextlib.nullcontext  # the context in which it trains: other masks
    seed: int = 0


MERGED = replace(config.TOY_RELEASED, num_sinks=16)
NONE = replace(config.TOY, num_sinks=0)
SINKS = {
    "S = 0": Variant(NONE),
    "S = 2": Variant(replace(config.TOY, num_sinks=2)),
    "S = 4": Variant(replace(config.TOY, num_sinks=4)),
    "S = 8": Variant(replace(config.TOY, num_sinks=8)),
    "S = 16": Variant(replace(config.TOY, num_sinks=16)),
    "S = 24": Variant(replace(config.TOY, num_sinks=24)),
    "S = 16, incremental": Variant(replace(config.TOY, sink_positions="incremental")),
    "4+26, S = 0": Variant(config.TOY_RELEASED),
    "4+26, S = 16": Variant(MERGED),
    "S = 0, no q/k norm": Variant(NONE, without_norm),
    "S = 16, no q/k norm": Variant(change=without_norm),
    "S = 0, logits x 8": Variant(NONE, with_large_logits),
    "S = 16, logits x 8": Variant(change=with_large_logits),
    "S = 0, tanh gate": Variant(NONE, with_gates),
    "S = 0, bfloat16": Variant(NONE, precision=torch.bfloat16),
    "S = 16, bfloat16": Variant(precision=torch.bfloat16),
    "S = 0, float16": Variant(NONE, precision=torch.float16),
    "S = 16, float16": Variant(precision=torch.float16),
}
SINK_COLUMNS = {
    "max_norm": "max norm", "a0_norm": "A0 norm", "loss": "loss at 0.5",
    "entropy": "entropy", "share": "share",
}  # fmt: skip
BURN_IN, PROBE_EVERY = 10, 5  # steps
HELD_BACK = 32  # trajectories that are not trained on
BATCH = 8  # clips


class A0Probe(kv_cache.MaskedView):
    """A masked view that records the weights of A0, the first audio latent, in self-attention."""

    def __init__(self, masks, num_sinks):
        super().__init__(masks)
        self.num_sinks, self.weights = num_sinks, []  # per layer (B, H, keys visible to A0)

    def attend(self, layer, site, q, k, v, heads):
        if site == "audio_self":
            keys = heads.keys(k)[:, self.masks[site][self.num_sinks]]
            query = heads.queries(q)[:, self.num_sinks]  # (B, H, D)
            logits = torch.einsum("bhd,bkhd->bhk", query, keys) / query.shape[-1] ** 0.5
            self.weights.append(logits.float().softmax(-1))
        return super().attend(layer, site, q, k, v, heads)

    def entropy(self):
        w = torch.stack(self.weights)
        return abs(float((w * w.clamp(min=1e-12).log()).sum(-1).mean()))  # abs: 0 instead of -0

    def share(self):
        return float(torch.stack(self.weights)[..., : self.num_sinks].sum(-1).mean())


def block_0_loss(net, data, step):
    """Return the x0 loss of block 0's audio, with all other blocks clean."""
    rows, clean = torch.arange(BATCH) + BATCH * step, len(net.cfg.sigmas) - 1
    chosen = {name: x[rows % len(x)] for name, x in data.items()}
    # under the mask block 0 sees no other block, so later seconds need not be computed
    chosen, blocks = first_seconds(chosen, net.cfg, 1), num_blocks(1, net.cfg)
    trajectories = toy_captions(chosen["tokens"]), chosen["video"], chosen["audio"]
    levels = torch.full((BATCH, blocks), clean)
    levels[:, 0] = torch.arange(BATCH) % clean  # every noisy level in turn
    view = ode_regression.masked_view(net.cfg, blocks)
    return ode_regression.regression_losses(net, trajectories, levels, net.cfg.sigmas, view)[1]


class OnlyA0(nn.Module):
    """A network whose first audio latent alone sends a gradient back."""

    def __init__(self, net):
        super().__init__()
        self.net, self.cfg, self.project_text = net, net.cfg, net.project_text

    def forward(self, *inputs):
        video, audio = self.net(*inputs)
        return video.detach(), torch.cat([audio[:, :1], audio[:, 1:].detach()], 1)


def a0_norms(net, data, step) -> tuple[float, float]:
    """Return the gradient norms of block 0's audio, and of its first latent alone."""
    of_block = gradient_norm(net, block_0_loss(net, data, step))
    latents = int((masks.frame_blocks(num_blocks(1, net.cfg), net.cfg)[1] == 0).sum())
    if latents == 1:
        return of_block, of_block
    # the loss of the block is a mean, in which its first latent counts 1 / latents
    return of_block, gradient_norm(net, latents * block_0_loss(OnlyA0(net), data, step))


def gradient_norm(net, loss):
    """Return the norm of the gradient over all parameters; leave their .grad unchanged."""
    gradients = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return float(nn.utils.get_total_norm([g for g in gradients if g is not None]))


@torch.no_grad()
def after_training(net, held, seconds) -> dict:
    """Return the loss at sigma = 0.5 on trajectories that were held back, and A0's attention."""
    generator, half = torch.Generator().manual_seed(0), torch.full((1, 1), 0.5)
    ends = [held[name][:, -1] for name in ("video", "audio")]
    noisy = [model.add_noise(e, torch.randn(e.shape, generator=generator), half) for e in ends]
    # trajectories of two states: half noisy, clean
    trajectories = toy_captions(held["tokens"]), *(torch.stack(x, 1) for x in zip(noisy, ends))
    blocks = num_blocks(seconds, net.cfg)
    levels = torch.zeros(len(ends[0]), blocks, dtype=torch.long)
    probe = A0Probe(ode_regression.masked_view(net.cfg, blocks).masks, net.cfg.num_sinks)
    losses = ode_regression.regression_losses(net, trajectories, levels, (0.5, 0.0), probe)
    return {"loss": float(sum(losses)), "entropy": probe.entropy(), "share": probe.share()}


def train_variant(variant, start, data, held, args) -> dict:
    """Train briefly; return gradients, loss and attention, or why the training broke down."""
    net = variant.change(student_from(start, variant.cfg, variant.seed))
    # AdamW, as in the paper: a step of Muon is an orthogonal matrix, however large the gradient
    recipe = trainer.Recipe(args.steps, BATCH, variant.seed, muon_lr=0, adam_lr=args.lr, decay=0.0)
    learner = trainer.Learner(net, recipe)
    data, held = (first_seconds(x, net.cfg, variant.seconds) for x in (data, held))
    losses = ode_regression.make_losses(net, data, recipe, TOY_PROMPTS, variant.seconds)
    norms, at_block_0 = [], []
    precision = HalfPrecision(variant.precision)  # float32: changes nothing
    try:
        for step in range(args.steps):
            if step >= BURN_IN and step % PROBE_EVERY == 0:
                with precision:
                    at_block_0.append(a0_norms(net, data, step))
            with precision:
                loss = losses(step)["loss"]
            norms.append(learner.update(loss, step))
    except ValueError as error:  # loss or gradient is not finite: a result as well
        return {"broke down": str(error)}
    result = {"max_norm": max(norms[BURN_IN:])}
    for name, values in zip(("a0", "alone"), zip(*at_block_0)):
        result |= {f"{name}_norm": max(values), f"{name}_median": median(values)}
    return result | after_training(net, held, variant.seconds)


def sinks(args) -> Callable:
    """Return a function: name of a variant -> train it, return its row {name: results}."""
    start, trajectories = start_and_trajectories(False, args)
    held = {name: x[:HELD_BACK] for name, x in trajectories.items()}
    data = {name: x[HELD_BACK:] for name, x in trajectories.items()}
    variants = ABLATIONS[args.ablation][0]

    def row(name):
        with variants[name].around():
            return {name: train_variant(variants[name], start, data, held, args)}

    return row


def sinks_table(results) -> str:
    """Return a Markdown table of {variant: results}."""
    head = "| | " + " | ".join(SINK_COLUMNS.values()) + " | |"
    lines = [head, "|---|" + "---|" * (len(SINK_COLUMNS) + 1)]
    for name, row in results.items():
        cells = [f"{float(f'{row[c]:.3g}'):g}" if c in row else "–" for c in SINK_COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row.get('broke down', '')} |")
    return "\n".join(lines)


# ---- why sinks ----


@contextlib.contextmanager
def longer_block_0(latents):
    """Train with so many audio latents in block 0; block 1 has the fewer."""
    usual = masks.frame_blocks

    def frame_blocks(blocks, cfg):
        video, audio = usual(blocks, cfg)
        return video, audio.masked_fill(torch.arange(len(audio)) < latents, 0)

    with (
        mock.patch.object(masks, "frame_blocks", frame_blocks),  # who sees whom
        mock.patch.object(ode_regression, "frame_blocks", frame_blocks),  # noise levels
    ):
        yield


def without_values(net):
    """Fix the values of the sinks to zero. Their keys take attention as before."""

    def hook(to_v, inputs, values):  # of a whole clip: the sinks come first
        sinks = values[:, : net.cfg.num_sinks]
        return torch.cat([torch.zeros_like(sinks), values[:, net.cfg.num_sinks :]], 1)

    for layer in net.layers:
        for attention in (layer.audio.self_attn, layer.video.cross_attn):
            attention.to_v.register_forward_hook(hook)
    return net


@contextlib.contextmanager
def sinks_read_nothing(num_sinks):
    """Train with sinks that attend to sinks only. They still get captions and noise levels."""

    def four_masks(*args):
        found = masks.four_masks(*args)
        found["audio_self"][:num_sinks, num_sinks:] = False
        found["v2a"][:num_sinks] = False  # the attention of a query without keys is 0 in PyTorch
        return found

    with mock.patch.object(ode_regression, "four_masks", four_masks):
        yield


NO_SINKS, TWO_SINKS = (replace(SINKS[f"S = {S}"], seconds=2) for S in (0, 2))
KEYS = {  # by name: keys of A0 in audio self-attention, and the training
    **{
        f"latents: {n}": (n, replace(NO_SINKS, around=partial(longer_block_0, n)))
        for n in (1, 2, 3, 5, 13, 26)
    },
    "S = 2": (3, TWO_SINKS),
    "S = 2, values fixed to zero": (3, replace(TWO_SINKS, change=without_values)),
    "S = 2, sinks read nothing": (3, replace(TWO_SINKS, around=partial(sinks_read_nothing, 2))),
}
WHY_SINKS = {  # one seed after the other
    f"{name}, seed {seed}": replace(variant, seed=seed)
    for seed in range(compare.SEEDS)
    for name, (_, variant) in KEYS.items()
}
WHY_COLUMNS = {
    "a0_norm": "A0 norm", "a0_median": "median", "alone_norm": "A0 alone",
    "alone_median": "median", "max_norm": "max norm", "loss": "loss at 0.5",
}  # fmt: skip


def over_seeds(results) -> dict:
    """Merge the seeds of {"NAME, seed N": results}: {NAME: {column: [mean, lowest, highest]}}."""
    merged = {}
    for name, (keys, _) in KEYS.items():
        rows = [row for full, row in results.items() if full.rpartition(", ")[0] == name]
        if broken := [row["broke down"] for row in rows if "broke down" in row]:
            merged[name] = {"keys": keys, "broke down": "; ".join(broken)}
        elif rows:
            values = {c: compare.over([row[c] for row in rows]) for c in WHY_COLUMNS}
            merged[name] = {"keys": keys, **values}
    return merged


def why_table(results) -> str:
    """Return a Markdown table of the means over seeds, with lowest and highest value."""
    lines = ["| | keys | " + " | ".join(WHY_COLUMNS.values()) + " | |"]
    lines.append("|---|---|" + "---|" * (len(WHY_COLUMNS) + 1))
    for name, row in over_seeds(results).items():
        cells = ["{:.3g} ({:.3g}–{:.3g})".format(*row[c]) if c in row else "–" for c in WHY_COLUMNS]
        cells.append(row.get("broke down", ""))
        lines.append(f"| {name} | {row['keys']} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- switches ----


@dataclass(frozen=True)
class Switch:
    """One training, and the window of its student's streams."""

    cfg: config.Config = config.TOY
    seconds: int = config.CLIP_SECONDS  # the first seconds of every trajectory are trained on
    from_teacher: bool = False  # without stage I: the teacher's weights and trajectories

    @property
    def window(self) -> int:
        """The window of training; a longer one breaks streams."""
        return trained_window(self.cfg, self.seconds)


SWITCHES = {
    "1+3k, 1+25k, blocks of 1 s": Switch(),
    "4+3k, 26+25k, blocks of 1 s": Switch(MERGED),
    "4+3k, 26+25k, no sinks": Switch(config.TOY_RELEASED),
    "1+6k, 1+50k, blocks of 2 s": Switch(replace(config.TOY, block_seconds=2), seconds=4),
    "stage I left out": Switch(from_teacher=True),
}
STREAMED = 20  # seconds; the first and the last five are measured


def train_switch(switch, args):
    """Train briefly; return the averaged student."""
    start, trajectories = start_and_trajectories(switch.from_teacher, args)
    net = student_from(start, switch.cfg)
    learner = trainer.Learner(net, ode_regression.make_recipe(args.steps))
    data = first_seconds(trajectories, switch.cfg, switch.seconds)
    losses = ode_regression.make_losses(net, data, learner.recipe, TOY_PROMPTS, switch.seconds)
    trainer.Run({"student": learner}, "").train(trainer.descent(learner, losses))
    net.load_state_dict(learner.average.tensors)
    return net.eval()


def switches(args) -> Callable:
    """Return a function: name of a variant -> train it, return its rows {"name, 0-5 s": ...}."""
    codec, measured = toy_codec.load(), compare.both_ends(args.clips, STREAMED)

    def rows(name):
        switch = SWITCHES[name]
        net = train_switch(switch, args)
        make = partial(evaluate.from_stream, net, codec, STREAMED, window=switch.window)
        return measured(name, make)

    return rows


# ---- command line ----


def check(args):
    """Raise ValueError, before any work is done, for options that cannot work."""
    if args.ablation != "switches" and args.steps <= BURN_IN:  # norms count after BURN_IN only
        raise ValueError(f"--steps {args.steps}: expected at least {BURN_IN + 1}")
    evaluate.check(STREAMED, args.out)


def main():
    p = cli.parser(__doc__)
    p.add_argument("ablation", choices=tuple(ABLATIONS))
    cli.add_weights(p, "--few-step", "weights/toy_dmd.safetensors", "student of stage I")
    cli.add_weights(p, "--real", "weights/toy_teacher.safetensors", "the teacher")
    about = "trajectories to train on"
    p.add_argument("--walks", type=cli.whole(HELD_BACK + 1, 10**5), default=384, help=about)
    about = "steps per training; default: switches 250, others 150"
    p.add_argument("--steps", type=trainer.STEPS, help=about)
    about = "sinks, why_sinks: learning rate of AdamW"
    p.add_argument("--lr", type=cli.real(1e-9, 1), default=1e-3, help=about)
    about = "switches: held-out clips per row"
    p.add_argument("--clips", type=evaluate.CLIPS, default=48, help=about)
    p.add_argument("--only", nargs="*", metavar="NAME", help="only these variants")
    p.add_argument("--run", default="runs/ablations", help="trajectories and finished rows")
    p.add_argument("--out", help="default: results/ABLATION")
    args = p.parse_args()
    known, steps, ablation, table, draw = ABLATIONS[args.ablation]
    names = cli.chosen(args.only, known)
    args.steps = steps if args.steps is None else args.steps
    args.command = cli.command(p, args, ("ablation", "out", "run")) + f" -- {args.ablation}"
    args.out = args.out or f"results/{args.ablation}"
    check(args)
    results = measure_variants(names, ablation(args), args, args.ablation)
    evaluate.write(args, {"result": results}, table(results), draw(results))


def measure_streams(names, measure, args, file, titles=plots.STREAM_ENDS):
    """Measure both ends of the streams of all variants; write their table and picture."""
    results = measure_variants(names, measure, args, file)
    last = {name: row for name, row in results.items() if name.endswith(f"-{args.seconds} s")}
    figure = plots.draw_rows(last, titles)
    evaluate.write(args, {"result": results}, evaluate.table(results), figure)


def measure_variants(names, measure, args, file) -> dict:
    """Return the rows of all variants; after an interruption, measure only the missing ones."""
    file, done = Path(args.run) / f"{file}.json", {}
    if file.exists() and (state := json.loads(file.read_text("utf-8")))["command"] == args.command:
        done = state["rows"]
    for name in names:
        if name not in done:
            done[name] = measure(name)
            files.write_json(file, {"command": args.command, "rows": done})
            print(done[name], flush=True)
    file.unlink()  # the next run measures anew
    return {row: values for name in names for row, values in done[name].items()}


ABLATIONS = {  # variants, default steps, function that measures one, table, picture
    "sinks": (SINKS, 150, sinks, sinks_table, plots.draw_sinks),
    "why_sinks": (WHY_SINKS, 150, sinks, why_table, lambda r: plots.draw_keys(over_seeds(r))),
    "switches": (SWITCHES, 250, switches, evaluate.table, plots.draw_rows),
}

if __name__ == "__main__":
    with cli.one_line_errors():
        main()
