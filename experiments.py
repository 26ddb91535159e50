"""What does each part buy?  One thing changed at a time, all else and every seed the same.

    python experiments.py drift    a minute of streaming: stages II and III, with smaller and larger
                                   windows, fewer passes, and nothing pinned
    python experiments.py sinks    short stage II trainings with and without sinks, in both block
                                   layouts, with other attentions and in half precision
    python experiments.py joint    what the two streams hear of each other is switched off, or two
                                   clips are put together that were made apart
    python experiments.py gallery  what to look at: truth, teacher, and the last five seconds of a
                                   minute by the students of stages II and III

Each writes results/NAME.json, .md and .png; gallery writes assets/gallery.png.

What the columns of `sinks` mean. *max norm*: the largest norm of a step's gradient before clipping,
after the first ten steps; *A0 norm*: the same for the loss of the first audio latent alone, the one
that has a single key besides the sinks; *loss*: one-step x0 loss of clean walks' ends noised to
sigma = 0.5 throughout, on walks that no step has seen; *entropy* of A0's attention in nats and the
*share* of it that goes to the sinks, means over layers and heads. The paper's are the first and the
third.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Callable

import torch
from torch import nn

import cli
import config
import evaluate
import files
import kv_cache
import model
import ode_regression
import plots
import teacher
import toy_codec
import toy_world
import training
from captions import toy_captions
from masks import four_masks, num_blocks

# ---- drift ----

STREAMS = {
    "window 4": {},
    "window 2": dict(window=2),
    "window 8": dict(window=8),
    "2 steps": dict(steps=2),
    "1 step": dict(steps=1),
    "nothing pinned": dict(pinned=False),
}
SHOWN = ("f1", "impacts_rate", "onsets_rate", "caption", "whole", "kept")


def drift(args):
    """{student, stream: [metrics of seconds 0-5, 5-10, ...]}."""
    codec, first = toy_codec.load(), toy_world.HELD_OUT
    seeds = range(first, first + args.clips)
    windows = evaluate.five_second_windows(args.seconds)
    true = partial(evaluate.true_clips, args.seconds)
    truth = evaluate.judge(true, seeds, windows, "truth")
    by_time = {}
    for path in args.student:
        net, stage = model.load(path), evaluate.short_name(path)
        for name, how in STREAMS.items():
            make = partial(evaluate.from_stream, net, codec, args.seconds, **how)
            judged = evaluate.judge(make, seeds, windows, f"{stage}, {name}")
            rows = [evaluate.metrics(w, t, truth[0]) for w, t in zip(judged, truth)]
            by_time[f"{stage}, {name}"] = rows
    return by_time


def drift_table(by_time) -> str:
    """First, middle and last five seconds of every stream."""
    lines = ["| stream | seconds | " + " | ".join(SHOWN) + " |", "|---|---|" + "---|" * len(SHOWN)]
    for name, rows in by_time.items():
        for i in sorted({0, len(rows) // 2, len(rows) - 1}):
            cells = " | ".join(f"{rows[i][metric]:.3f}" for metric in SHOWN)
            lines.append(f"| {name} | {5 * i}-{5 * i + 5} | {cells} |")
    return "\n".join(lines)


# ---- sinks ----


class Bare(kv_cache.Heads):
    """Without the RMSNorm of queries and keys."""

    def _normed(self, x, weight, table):
        x = self.split(x)
        return x if table is None else kv_cache.rope.rotate(x, table)


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
    """The sinks' audio self-attention is gated."""
    for layer in net.audio.layers:
        layer.self_attn.to_out = TanhGate(layer.self_attn.to_out)
    return net


@dataclass(frozen=True)
class Variant:
    """A stage II training: its config, what is done to the network, and the precision."""

    cfg: config.Config = config.TOY
    change: Callable = lambda net: net
    precision: torch.dtype = torch.float32


MERGED = replace(config.TOY, prefix_video_frames=4, prefix_audio_frames=26)
NONE = replace(config.TOY, num_sinks=0)
SINKS = {
    **{f"S = {S}": Variant(replace(config.TOY, num_sinks=S)) for S in (0, 2, 4, 8, 16, 24)},
    "S = 16, incremental": Variant(replace(config.TOY, sink_positions="incremental")),
    "4+26, S = 0": Variant(replace(MERGED, num_sinks=0)),
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
BURN_IN, PROBE_EVERY, HELD_BACK = 10, 5, 32


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
        return float(-(w * w.clamp(min=1e-12).log()).sum(-1).mean())

    def share(self):
        return float(torch.stack(self.weights)[..., : self.num_sinks].sum(-1).mean())


def block_0_loss(net, data, view, step):
    """x0 loss of block 0's audio, every other block clean: A0 alone in the paper's layout."""
    rows = torch.arange(8) + 8 * step
    tokens, *walks = (x[rows % len(x)] for x in data)
    chosen = toy_captions(tokens), *walks
    levels = torch.full((8, num_blocks(teacher.SECONDS, net.cfg)), len(net.cfg.sigmas) - 1)
    levels[:, 0] = torch.arange(8) % (len(net.cfg.sigmas) - 1)
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


def train_variant(name, variant, start, data, held, args) -> dict:
    """A short stage II training; what SINK_COLUMNS names, or the step at which it broke down."""
    net = variant.change(ode_regression.student_from(start, variant.cfg))
    view = kv_cache.MaskedView(four_masks(net.cfg, num_blocks(teacher.SECONDS, net.cfg)))
    # AdamW, as in the paper: Muon orthogonalises every step, and so hides how large gradients are
    recipe = training.Recipe(args.steps, batch=8, muon_lr=0, adam_lr=args.lr, decay=0.0)
    learner = training.Learner(net, recipe)
    rows = dict(zip(("tokens", "video", "audio"), data))
    losses, norms, a0 = ode_regression.losses_of(net, rows, recipe), [], []
    is_half = variant.precision != torch.float32
    precise = partial(torch.autocast, "cpu", variant.precision) if is_half else nullcontext
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


def sinks(args):
    """{variant: results}."""
    start, _, _ = files.read_weights(args.teacher)
    start = {name: t.float() for name, t in start.items()}
    walks, _, _ = files.read_weights(args.walks)
    walks = [walks[name] for name in ("tokens", "video", "audio")]
    held, data = [x[:HELD_BACK] for x in walks], [x[HELD_BACK:] for x in walks]
    results = {}
    for name in args.only or SINKS:
        results[name] = train_variant(name, SINKS[name], start, data, held, args)
        print(name, results[name], flush=True)
    return results


def sinks_table(results) -> str:
    head = "| | " + " | ".join(SINK_COLUMNS.values()) + " | |"
    lines = [head, "|---|" + "---|" * (len(SINK_COLUMNS) + 1)]
    for name, row in results.items():
        cells = [f"{row[c]:.3g}" if c in row else "–" for c in SINK_COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row.get('broke down', '')} |")
    return "\n".join(lines)


# ---- what joint means ----

WALK = teacher.schedule(32)  # of the teacher, as in evaluate.py


def deaf(net, *streams):
    """A copy of a model in which these streams hear nothing of the other one."""
    net = copy.deepcopy(net)
    for stream in streams:
        for layer in getattr(net, stream).layers:
            for p in layer.cross_attn.to_out.parameters():
                p.zero_()
    return net


def put_together(make, clips, seed):
    """The pictures of one clip with the sound of another of the same caption."""
    return make(clips, seed)[0], make(clips, seed + 1)[1]


def joint(args):
    """{who: metrics}: teacher and stage III as they are, deaf in one or both streams, and apart."""
    codec, seeds = toy_codec.load(), range(toy_world.HELD_OUT, toy_world.HELD_OUT + args.clips)
    once = evaluate.five_second_windows(evaluate.WINDOW)
    truth = evaluate.judge(partial(evaluate.true_clips, 5), seeds, once, "truth")[0]
    makers = {
        "teacher": (args.real, lambda net: partial(evaluate.from_teacher, net, codec, WALK)),
        "stage III": (args.student[-1], lambda net: partial(evaluate.from_stream, net, codec, 5)),
    }
    results = {}
    for who, (path, maker) in makers.items():
        net = model.load(path).requires_grad_(False)
        makes = {
            who: maker(net),
            f"{who}, video deaf (no A2V)": maker(deaf(net, "video")),
            f"{who}, audio deaf (no V2A)": maker(deaf(net, "audio")),
            f"{who}, both deaf": maker(deaf(net, "video", "audio")),
            f"{who}, two clips put together": partial(put_together, maker(net)),
        }
        for name, make in makes.items():
            w = evaluate.judge(make, seeds, once, name)[0]
            results[name] = evaluate.with_intervals(w, truth, truth)
    return results


# ---- something to look at ----


def gallery(args):
    """{who: (frames, levels, second it starts at)} of one held-out caption, five seconds each."""
    codec, seconds = toy_codec.load(), args.seconds
    clips = toy_world.draw_clips([toy_world.HELD_OUT + args.clip])
    shown = {"truth": (*evaluate.true_clips(5, clips, 0), 0)}
    teacher_clip = evaluate.from_teacher(model.load(args.real), codec, WALK, clips, 0)
    shown["teacher"] = (*teacher_clip, 0)
    for path in args.student:
        stream = evaluate.from_stream(model.load(path), codec, seconds, clips, 0)
        shown[evaluate.short_name(path)] = (*stream, seconds - 5)
    prompt = " ".join(toy_world.VOCABULARY[t] for t in toy_world.caption_tokens(clips)[0])
    return prompt, {name: (video[0], sound[0], at) for name, (video, sound, at) in shown.items()}


# ---- command line ----


def write(args, result, table, figure):
    about = {"command": args.command, "torch": torch.__version__}
    about["threads"] = torch.get_num_threads()
    files.write_json(f"{args.out}.json", {"about": about, "result": result})
    files.write_beside(f"{args.out}.md", lambda p: p.write_text(table + "\n"))
    plots.save(figure, f"{args.out}.png")
    print(f"{table}\nwrote {args.out}.json, .md and .png")


def main():
    p = cli.parser(__doc__)
    p.add_argument("experiment", choices=("drift", "sinks", "joint", "gallery"))
    p.add_argument("--clips", type=int, default=32, help="drift, joint: held-out clips a row")
    p.add_argument("--seconds", type=int, default=60, help="of the streams, in fives")
    p.add_argument(
        "--student", nargs="*", default=evaluate.STUDENTS, help="weights, stage by stage"
    )
    p.add_argument("--real", default="weights/toy_teacher.safetensors", help="the teacher")
    p.add_argument("--clip", type=int, default=0, help="gallery: which held-out caption")
    p.add_argument("--teacher", default="weights/toy_dmd.safetensors", help="sinks: start")
    p.add_argument("--walks", default="runs/ode/trajectories.safetensors", help="sinks: data")
    p.add_argument("--steps", type=int, default=150, help="sinks: training steps each")
    p.add_argument("--lr", type=float, default=1e-3, help="sinks: learning rate of AdamW")
    p.add_argument("--only", nargs="*", choices=SINKS, help="sinks: these variants only")
    p.add_argument("--out", help="default results/EXPERIMENT")
    args = p.parse_args()
    args.command = cli.command(p, args, ("experiment", "out")) + f" -- {args.experiment}"
    folder = "assets" if args.experiment == "gallery" else "results"
    args.out = args.out or f"{folder}/{args.experiment}"
    if args.experiment == "drift":
        result = drift(args)
        write(args, result, drift_table(result), plots.draw_drift(result, step=5))
    elif args.experiment == "sinks":
        result = sinks(args)
        write(args, result, sinks_table(result), plots.draw_sinks(result))
    elif args.experiment == "joint":
        result = joint(args)
        write(args, result, evaluate.table(result), plots.draw_joint(result))
    else:
        plots.save(plots.draw_gallery(*gallery(args)), f"{args.out}.png")
        print(f"wrote {args.out}.png")


if __name__ == "__main__":
    cli.run(main)
