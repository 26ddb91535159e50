"""What if it were trained otherwise?  Short stage II trainings, one thing changed at a time.

    python -m studies.ablations sinks      with and without sinks, in both block layouts, with other
                                   attentions and in half precision: what do the gradients do?
    python -m studies.ablations switches   other blocks, and stage I left out: what do the streams show?

All start from the same weights, see the same walks (clips on their way from noise to clean, see
ode_regression.py) in the same order, and differ in what their name says. Each writes
results/NAME.json, .md and .png; started again after an interruption, it goes on at the variant
where it was. `studies/compare.py` is for questions that need no training.

What the columns of `sinks` mean. *max norm*: the largest norm of a step's gradient before clipping,
after the first ten steps; *A0 norm*: the same for the loss of block 0's audio alone, which in the
paper's layout is A0, the latent with a single key besides the sinks; *loss*: x0 loss of one pass,
when clean ends of walks are noised to sigma = 0.5 throughout, on walks that no step has seen;
*entropy*: of A0's attention, in nats; *share*: of A0's attention that goes to the sinks; both are
means over layers and heads. Max norm and loss are the paper's columns. Those of `switches` are what
they are in `studies/compare.py`.
"""

import json
from contextlib import nullcontext
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
from full_size.text import toy_captions
from masks import clip_span, four_masks, num_blocks
from plumbing import cli, files
from plumbing import stages as training_parts
from plumbing import trainer as training
from studies import charts, evaluate
from studies import compare as experiments
from toy import codec as toy_codec


def start_and_walks(from_teacher, args):
    """Weights that students start at, and clips on their way from noise to clean.

    from_teacher   the teacher's own, guided and with small steps, instead of stage I's
    """
    path, how = (args.real, (teacher.GUIDANCE, 4)) if from_teacher else (args.few_step, ((1, 1), 1))
    net, name = model.load(path), evaluate.short_name(path)
    file = f"{args.run}/{name}_walks.safetensors"
    walks = ode_regression.load_trajectories(file, net, args.walks, *how)
    return net.state_dict(), [walks[part] for part in ("tokens", "video", "audio")]


# ---- sinks ----


class Bare(kv_cache.Heads):
    """Without the RMSNorm of queries and keys."""

    def _normed(self, x, weight, table):
        x = self.split(x)
        return x if table is None else rope.rotate(x, table)


class Loud(kv_cache.Heads):
    """With logits eight times as large."""

    def queries(self, q):
        return 8 * super().queries(q)


class TanhGate(nn.Module):
    """Attention behind a gate tanh(g) that starts closed, so the model must open it anew."""

    def __init__(self, to_out):
        super().__init__()
        self.to_out, self.g = to_out, nn.Parameter(torch.zeros(to_out.out_features))

    def forward(self, x):
        return torch.tanh(self.g) * self.to_out(x)


def with_heads(kind, net):
    """Every attention of the network uses another kind of kv_cache.Heads."""
    for part in net.modules():
        if isinstance(part, model.Attention):
            heads = part.heads
            part.heads = lambda *ropes, heads=heads: kind(*heads(*ropes))
    return net


without_norm, with_large_logits = partial(with_heads, Bare), partial(with_heads, Loud)


def with_gates(net):
    """Every audio self-attention is gated: the paper's alternative to sinks."""
    for layer in net.audio.layers:
        layer.self_attn.to_out = TanhGate(layer.self_attn.to_out)
    return net


class HalfPrecision(TorchFunctionMode):
    """Matrix products and attention of 16-bit numbers, added up in float32 as tensor cores do.

    Operands and results are rounded, and so are gradients on their way back. Unlike torch.autocast
    it takes float32's time on processors without 16-bit arithmetic, and is the same on all.
    """

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
        return x.to(self.dtype).to(x.dtype) if is_number else x


@dataclass(frozen=True)
class Variant:
    """A stage II training: its config, what is done to the network, and the precision."""

    cfg: config.Config = config.TOY
    change: Callable = lambda net: net
    precision: torch.dtype = torch.float32


MERGED = replace(config.TOY_RELEASED, num_sinks=16)
NONE = replace(config.TOY, num_sinks=0)
SINKS = {
    **{f"S = {S}": Variant(replace(config.TOY, num_sinks=S)) for S in (0, 2, 4, 8, 16, 24)},
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
HELD_BACK = 32  # walks that are not trained on
BATCH = 8  # clips


class A0Probe(kv_cache.MaskedView):
    """A masked view that keeps how the first audio latent attends in audio self-attention."""

    def __init__(self, masks, num_sinks):
        super().__init__(masks)
        self.num_sinks, self.weights = num_sinks, []  # per layer (B, H, keys that A0 may see)

    def attend(self, layer, site, q, k, v, heads):
        if site == "audio_self":
            keys = heads.keys(k)[:, self.masks[site][self.num_sinks]]
            query = heads.queries(q)[:, self.num_sinks]  # (B, H, D)
            logits = torch.einsum("bhd,bkhd->bhk", query, keys) / query.shape[-1] ** 0.5
            self.weights.append(logits.float().softmax(-1))
        return super().attend(layer, site, q, k, v, heads)

    def entropy(self):
        w = torch.stack(self.weights)
        return abs(float((w * w.clamp(min=1e-12).log()).sum(-1).mean()))  # not -0

    def share(self):
        return float(torch.stack(self.weights)[..., : self.num_sinks].sum(-1).mean())


def block_0_loss(net, data, view, step):
    """x0 loss of block 0's audio, every other block clean: A0 alone in the paper's layout."""
    rows, clean = torch.arange(BATCH) + BATCH * step, len(net.cfg.sigmas) - 1
    tokens, *walks = (x[rows % len(x)] for x in data)
    chosen = toy_captions(tokens), *walks
    levels = torch.full((BATCH, num_blocks(teacher.SECONDS, net.cfg)), clean)
    levels[:, 0] = torch.arange(BATCH) % clean
    return ode_regression.regression_losses(net, chosen, levels, net.cfg.sigmas, view)[1]


def gradient_norm(net, loss):
    """Norm over all parameters, without touching what the optimiser sees."""
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return float(nn.utils.get_total_norm([g for g in gradients if g is not None]))


@torch.no_grad()
def after_training(net, held, masks) -> dict:
    """One-step loss at sigma = 0.5 of walks that were held back, and how A0 attends there."""
    tokens, *walks = held
    g = torch.Generator().manual_seed(0)
    ends = [walk[:, -1] for walk in walks]
    noise = [torch.randn(end.shape, generator=g) for end in ends]
    half = torch.full((1, 1), 0.5)
    pairs = [torch.stack([model.add_noise(e, n, half), e], 1) for e, n in zip(ends, noise)]
    levels = torch.zeros(len(tokens), num_blocks(teacher.SECONDS, net.cfg), dtype=torch.long)
    probe = A0Probe(masks, net.cfg.num_sinks)
    captions = toy_captions(tokens)
    losses = ode_regression.regression_losses(net, (captions, *pairs), levels, (0.5, 0.0), probe)
    return {"loss": float(sum(losses)), "entropy": probe.entropy(), "share": probe.share()}


def train_variant(variant, start, data, held, args) -> dict:
    """A short stage II training; what SINK_COLUMNS names, or the step at which it broke down."""
    net = variant.change(training_parts.student_from(start, variant.cfg))
    view = kv_cache.MaskedView(four_masks(net.cfg, num_blocks(teacher.SECONDS, net.cfg)))
    # AdamW, as in the paper: Muon orthogonalises every step, and so hides how large gradients are
    recipe = training.Recipe(args.steps, BATCH, muon_lr=0, adam_lr=args.lr, decay=0.0)
    learner = training.Learner(net, recipe)
    rows = dict(zip(("tokens", "video", "audio"), data))
    losses, norms, a0 = ode_regression.losses_of(net, rows, recipe), [], []
    is_half = variant.precision != torch.float32
    precise = partial(HalfPrecision, variant.precision) if is_half else nullcontext
    try:
        for step in range(args.steps):
            if step >= BURN_IN and step % PROBE_EVERY == 0:
                with precise():
                    a0.append(gradient_norm(net, block_0_loss(net, data, view, step)))
            with precise():
                loss = losses(step)["loss"]
            norms.append(learner.update(loss, step))
    except ValueError as error:  # not finite
        return {"broke down": str(error)}
    result = {"max_norm": max(norms[BURN_IN:]), "a0_norm": max(a0)}
    return result | after_training(net, held, view.masks)


def sinks(args) -> Callable:
    """What gives a variant's row, {variant: results}."""
    start, walks = start_and_walks(False, args)
    held, data = [x[:HELD_BACK] for x in walks], [x[HELD_BACK:] for x in walks]
    return lambda name: {name: train_variant(SINKS[name], start, data, held, args)}


def sinks_table(results) -> str:
    head = "| | " + " | ".join(SINK_COLUMNS.values()) + " | |"
    lines = [head, "|---|" + "---|" * (len(SINK_COLUMNS) + 1)]
    for name, row in results.items():
        cells = [f"{float(f'{row[c]:.3g}'):g}" if c in row else "–" for c in SINK_COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row.get('broke down', '')} |")
    return "\n".join(lines)


# ---- switches ----


@dataclass(frozen=True)
class Switch:
    """A stage II training and how it is streamed."""

    cfg: config.Config = config.TOY
    seconds: int = teacher.SECONDS  # of a walk, from its start, that are trained on
    from_teacher: bool = False  # stage I left out: the teacher's weights, the teacher's walks

    @property
    def window(self) -> int:
        """As far as the last block of a clip sees in training; a longer one breaks a stream."""
        return teacher.trained_window(self.cfg, self.seconds)


SWITCHES = {
    "1+3k, 1+25k, blocks of 1 s": Switch(),
    "4+3k, 26+25k, blocks of 1 s": Switch(MERGED),
    "4+3k, 26+25k, no sinks": Switch(config.TOY_RELEASED),
    "1+6k, 1+50k, blocks of 2 s": Switch(replace(config.TOY, block_seconds=2), seconds=4),
    "stage I left out": Switch(from_teacher=True),
}
STREAMED = 20  # seconds, of which the first and the last five are judged


def train_switch(switch, args):
    """The averaged student of a short stage II training."""
    start, walks = start_and_walks(switch.from_teacher, args)
    net = training_parts.student_from(start, switch.cfg)
    learner = training.Learner(net, ode_regression.recipe_of(args.steps))
    rows = dict(zip(("tokens", "video", "audio"), first_seconds(walks, switch)))
    losses = ode_regression.losses_of(net, rows, learner.recipe, seconds=switch.seconds)
    training.Run({"student": learner}, "").train(training.descent(learner, losses))
    net.load_state_dict(learner.average.tensors)
    return net.eval()


def first_seconds(walks, switch):
    """Walks cut to whole blocks; what is left of a clip is a clip."""
    tokens, video, audio = walks
    span = clip_span(num_blocks(switch.seconds, switch.cfg), switch.cfg)
    tokens_v = len(span.video) * switch.cfg.tokens_per_frame
    return tokens, video[:, :, :tokens_v], audio[:, :, : len(span.audio)]


def switches(args) -> Callable:
    """What gives a variant's rows, {"variant, seconds": metrics with intervals}."""
    codec, seeds = toy_codec.load(), evaluate.held_out(args.clips)
    windows = [(0, 5), (STREAMED - 5, STREAMED)]
    truth = evaluate.judge(partial(evaluate.true_clips, STREAMED), seeds, windows, "truth")

    def rows(name):
        switch = SWITCHES[name]
        net = train_switch(switch, args)
        make = evaluate.streams_of(net, codec, STREAMED, window=switch.window)
        return experiments.by_window(name, make, seeds, windows, truth)

    return rows


# ---- command line ----


def check(args):
    """Raises ValueError for what cannot be trained, judged or written, before anything is."""
    least = BURN_IN + 1 if args.ablation == "sinks" else 1  # gradients count behind BURN_IN only
    if args.steps < least:
        raise ValueError(f"--steps {args.steps}: expected at least {least}")
    if args.walks <= HELD_BACK:
        raise ValueError(f"--walks {args.walks}: expected at least {HELD_BACK + 1}")
    evaluate.check_clips(args.clips)
    evaluate.check_out(args.out)


def main():
    p = cli.parser(__doc__)
    p.add_argument("ablation", choices=("sinks", "switches"))
    p.add_argument("--few-step", default="weights/toy_dmd.safetensors", help="stage I: start")
    p.add_argument("--real", default="weights/toy_teacher.safetensors", help="the teacher")
    p.add_argument("--walks", type=int, default=384, help="clips to train on")
    p.add_argument("--steps", type=int, help="of each training; default sinks 150, switches 250")
    p.add_argument("--lr", type=float, default=1e-3, help="sinks: learning rate of AdamW")
    p.add_argument("--clips", type=int, default=48, help="switches: held-out clips a row")
    p.add_argument("--only", nargs="*", metavar="NAME", help="these variants only")
    p.add_argument("--run", default="runs/ablations", help="folder for walks, and rows so far")
    p.add_argument("--out", help="default results/ABLATION")
    args = p.parse_args()
    known, steps, ablation, table, draw = ABLATIONS[args.ablation]
    names = cli.chosen(args.only, known)
    args.steps = steps if args.steps is None else args.steps
    args.command = cli.command(p, args, ("ablation", "out", "run")) + f" -- {args.ablation}"
    args.out = args.out or f"results/{args.ablation}"
    check(args)
    results = measured(names, ablation(args), args)
    evaluate.write(args, {"result": results}, table(results), draw(results))


def measured(names, measure, args) -> dict:
    """Rows of all variants; what an interrupted run has measured is not measured again."""
    file, done = Path(args.run) / f"{args.ablation}.json", {}
    if file.exists() and (state := json.loads(file.read_text()))["command"] == args.command:
        done = state["rows"]
    for name in names:
        if name not in done:
            done[name] = measure(name)
            files.write_json(file, {"command": args.command, "rows": done})
            print(done[name], flush=True)
    file.unlink()
    return {row: values for name in names for row, values in done[name].items()}


ABLATIONS = {
    "sinks": (SINKS, 150, sinks, sinks_table, charts.draw_sinks),
    "switches": (SWITCHES, 250, switches, evaluate.table, charts.draw_streams),
}

if __name__ == "__main__":
    cli.run(main)
