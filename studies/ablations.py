"""Ablations: short trainings of stage II, each with one change.

This file trains students and measures them. evaluate.py and compare.py train nothing.

    python -m studies.ablations sinks      how large are the gradients? With and without sinks, in
                                   both block layouts, with other attentions, in half precision
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
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import config
import kv_cache
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


def block_0_loss(net, data, view, step):
    """Return the x0 loss of block 0's audio, with all other blocks clean."""
    rows, clean = torch.arange(BATCH) + BATCH * step, len(net.cfg.sigmas) - 1
    chosen = {name: x[rows % len(x)] for name, x in data.items()}
    trajectories = toy_captions(chosen["tokens"]), chosen["video"], chosen["audio"]
    levels = torch.full((BATCH, num_blocks(config.CLIP_SECONDS, net.cfg)), clean)
    levels[:, 0] = torch.arange(BATCH) % clean  # every noisy level in turn
    return ode_regression.regression_losses(net, trajectories, levels, net.cfg.sigmas, view)[1]


def gradient_norm(net, loss):
    """Return the norm of the gradient over all parameters; leave their .grad unchanged."""
    gradients = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return float(nn.utils.get_total_norm([g for g in gradients if g is not None]))


@torch.no_grad()
def after_training(net, held, masks) -> dict:
    """Return the loss at sigma = 0.5 on trajectories that were held back, and A0's attention."""
    generator, half = torch.Generator().manual_seed(0), torch.full((1, 1), 0.5)
    ends = [held[name][:, -1] for name in ("video", "audio")]
    noisy = [model.add_noise(e, torch.randn(e.shape, generator=generator), half) for e in ends]
    # trajectories of two states: half noisy, clean
    trajectories = toy_captions(held["tokens"]), *(torch.stack(x, 1) for x in zip(noisy, ends))
    blocks = num_blocks(config.CLIP_SECONDS, net.cfg)
    levels = torch.zeros(len(ends[0]), blocks, dtype=torch.long)
    probe = A0Probe(masks, net.cfg.num_sinks)
    losses = ode_regression.regression_losses(net, trajectories, levels, (0.5, 0.0), probe)
    return {"loss": float(sum(losses)), "entropy": probe.entropy(), "share": probe.share()}


def train_variant(variant, start, data, held, args) -> dict:
    """Train briefly; return the values of SINK_COLUMNS, or why the training broke down."""
    net = variant.change(student_from(start, variant.cfg))
    view = ode_regression.masked_view(net.cfg, num_blocks(config.CLIP_SECONDS, net.cfg))
    # AdamW, as in the paper: a step of Muon is an orthogonal matrix, however large the gradient
    recipe = trainer.Recipe(args.steps, BATCH, muon_lr=0, adam_lr=args.lr, decay=0.0)
    learner = trainer.Learner(net, recipe)
    losses = ode_regression.make_losses(net, data, recipe, TOY_PROMPTS)
    norms, a0_norms = [], []
    precision = HalfPrecision(variant.precision)  # float32: changes nothing
    try:
        for step in range(args.steps):
            if step >= BURN_IN and step % PROBE_EVERY == 0:
                with precision:
                    a0_norms.append(gradient_norm(net, block_0_loss(net, data, view, step)))
            with precision:
                loss = losses(step)["loss"]
            norms.append(learner.update(loss, step))
    except ValueError as error:  # loss or gradient is not finite: a result as well
        return {"broke down": str(error)}
    result = {"max_norm": max(norms[BURN_IN:]), "a0_norm": max(a0_norms)}
    return result | after_training(net, held, view.masks)


def sinks(args) -> Callable:
    """Return a function: name of a variant -> train it, return its row {name: results}."""
    start, trajectories = start_and_trajectories(False, args)
    held = {name: x[:HELD_BACK] for name, x in trajectories.items()}
    data = {name: x[HELD_BACK:] for name, x in trajectories.items()}
    return lambda name: {name: train_variant(SINKS[name], start, data, held, args)}


def sinks_table(results) -> str:
    """Return a Markdown table of {variant: results}."""
    head = "| | " + " | ".join(SINK_COLUMNS.values()) + " | |"
    lines = [head, "|---|" + "---|" * (len(SINK_COLUMNS) + 1)]
    for name, row in results.items():
        cells = [f"{float(f'{row[c]:.3g}'):g}" if c in row else "–" for c in SINK_COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row.get('broke down', '')} |")
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
    data = first_seconds(trajectories, switch)
    losses = ode_regression.make_losses(net, data, learner.recipe, TOY_PROMPTS, switch.seconds)
    trainer.Run({"student": learner}, "").train(trainer.descent(learner, losses))
    net.load_state_dict(learner.average.tensors)
    return net.eval()


def first_seconds(trajectories, switch):
    """Cut trajectories to the complete blocks of the first `switch.seconds`."""
    span = clip_of_seconds(switch.cfg, switch.seconds)
    tokens_v = len(span.video) * switch.cfg.tokens_per_frame
    video, audio = trajectories["video"][:, :, :tokens_v], trajectories["audio"]
    return {**trajectories, "video": video, "audio": audio[:, :, : len(span.audio)]}


def switches(args) -> Callable:
    """Return a function: name of a variant -> train it, return its rows {"name, 0-5 s": ...}."""
    codec, seeds = toy_codec.load(), evaluate.held_out(args.clips)
    times = [(0, 5), (STREAMED - 5, STREAMED)]
    truth = evaluate.measure_truth(STREAMED, seeds, times)

    def rows(name):
        switch = SWITCHES[name]
        net = train_switch(switch, args)
        make = partial(evaluate.from_stream, net, codec, STREAMED, window=switch.window)
        return compare.by_interval(name, make, seeds, times, truth)

    return rows


# ---- command line ----


def check(args):
    """Raise ValueError, before any work is done, for options that cannot work."""
    if args.ablation == "sinks" and args.steps <= BURN_IN:  # norms count after BURN_IN only
        raise ValueError(f"--steps {args.steps}: expected at least {BURN_IN + 1}")
    evaluate.check(STREAMED, args.out)


def main():
    p = cli.parser(__doc__)
    p.add_argument("ablation", choices=("sinks", "switches"))
    cli.add_weights(p, "--few-step", "weights/toy_dmd.safetensors", "student of stage I")
    cli.add_weights(p, "--real", "weights/toy_teacher.safetensors", "the teacher")
    about = "trajectories to train on"
    p.add_argument("--walks", type=cli.whole(HELD_BACK + 1, 10**5), default=384, help=about)
    about = "steps per training; default: sinks 150, switches 250"
    p.add_argument("--steps", type=trainer.STEPS, help=about)
    about = "sinks: learning rate of AdamW"
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
    results = measure_variants(names, ablation(args), args)
    evaluate.write(args, {"result": results}, table(results), draw(results))


def measure_variants(names, measure, args) -> dict:
    """Return the rows of all variants; after an interruption, measure only the missing ones."""
    file, done = Path(args.run) / f"{args.ablation}.json", {}
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
    "switches": (SWITCHES, 250, switches, evaluate.table, plots.draw_rows),
}

if __name__ == "__main__":
    with cli.one_line_errors():
        main()
