"""What a training is made of, for the toy or the full size: where weights and prompts come from.

The three stages are the same code at both sizes. What differs is here:

                 the toy                                  the full size
    weights      files of this repository                 LTX-2's files, and those written here
    prompts      words of made-up clips                   a folder of features (full_size/text.py)
    precision    float32                                  layers run in bfloat16; what learns is
                                                          kept, and averaged over GPUs, in float32
    activations  kept                                     computed twice
    steps        as shipped, batches of 8                 the paper's, batches of 32

Either runs in one process or, under torchrun, in several.
"""

import copy
import functools
from typing import Callable, NamedTuple

import torch

import config
import model
from full_size import sharding
from full_size import weights as ltx2
from full_size.text import TOY_PROMPTS, EncodedPrompts, ToyPrompts
from plumbing import cli, files


class Parts(NamedTuple):
    """Everything around the losses."""

    is_toy: bool
    cfg: config.Config | None  # the student's; None: that of its file
    prompts: EncodedPrompts | ToyPrompts
    find: Callable  # path, config if it is not the teacher's, seed -> Found
    write: Callable  # path, tensors, config, made_by
    dtype: torch.dtype  # of weights that are written


class Found(NamedTuple):
    """A weight file that was looked at, but not read."""

    cfg: config.Config
    load: Callable  # learns -> net
    mark: str  # that tells its weights from others


BATCH = 8, 32  # clips, of the toy and at full size (paper)


def add_options(p, steps):
    """What the stages' command lines share; `steps` of the toy and at full size, as for `parse`."""
    p.add_argument(
        "--steps", type=int, help=f"training steps; default {steps[0]}, at full size {steps[1]}"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--config", help="of the student: toy (default), toy_released, ltx2, full, ...")
    p.add_argument("--prompts", help="at full size: a folder made by full_size/text.py")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default cpu; cuda: under torchrun")
    p.add_argument(
        "--batch", type=int,
        help=f"clips, of all processes together; default {BATCH[0]}, at full size {BATCH[1]}",
    )  # fmt: skip


def parse(p, steps):
    """The command line, what depends on the size filled in."""
    args = p.parse_args()
    is_full = not cli.find_config(args.config or "toy").is_toy
    args.steps = steps[is_full] if args.steps is None else args.steps
    args.batch = BATCH[is_full] if args.batch is None else args.batch
    return args


def parts_for(args, is_causal) -> Parts:
    """Raises ValueError, in one line, for what is missing or does not go together.

    is_causal   the toy's student has blocks and sinks of its own; else it is as its teacher
    """
    cfg = cli.find_config(args.config or "toy")
    if cfg.is_toy:
        _check_toy(cfg, args.prompts, is_causal)
        return toy_parts(cfg if is_causal else None)
    if not sharding.is_sharded():
        raise ValueError(f"--config {cfg.name}: start it by torchrun, even on a single GPU")
    if not args.prompts:
        raise ValueError(f"--config {cfg.name} needs --prompts: a folder made by full_size/text.py")
    return full_parts(args.prompts, cfg)


def _check_toy(cfg, prompts, is_causal):
    """Refuse what would be ignored: other prompts, and configs that no student would have."""
    if prompts:
        raise ValueError(f"--prompts {prompts}: the toy draws its own; expected --config full")
    if not is_causal and cfg != config.TOY:
        raise ValueError(f"--config {cfg.name}: this student is as its teacher; leave --config out")
    if is_causal and cfg == config.TOY_TEACHER:
        raise ValueError(f"--config {cfg.name} has no blocks; expected toy or toy_released")


def toy_parts(cfg) -> Parts:
    """Everything is in this repository."""

    def find(path, cfg=None, seed=0):
        net = model.load(path)
        if cfg:
            if net.cfg.name != config.TOY_TEACHER.name:  # a student's: its blocks are settled
                files.check_config(path, net.cfg, cfg)
            net = student_from(net.state_dict(), cfg, seed, path)

        def load(learns):  # another net every time: the teacher's file makes the critic as well
            own = copy.deepcopy(net).requires_grad_(learns)
            return sharding.shard(own, torch.float32)

        return Found(net.cfg, load, files.fingerprint(net.state_dict()))

    return Parts(True, cfg, TOY_PROMPTS, find, files.save_weights, torch.float16)


def full_parts(prompts, cfg) -> Parts:
    """LTX-2's weights and prompts that were encoded before."""

    def find(path, cfg=None, seed=0):
        source = ltx2.Source(path, cfg or config.LTX2)
        load = functools.partial(full_net, source)
        return Found(source.cfg, load, source.fingerprint())

    return Parts(False, cfg, EncodedPrompts(prompts, cfg), find, ltx2.save, torch.bfloat16)


def full_net(source, learns):
    """A net that is never whole in one place: every process reads the file and keeps its shards."""
    net = model.build(source.cfg, device="meta").to(torch.float32 if learns else torch.bfloat16)
    net.requires_grad_(learns)
    if learns:
        sharding.passes_apart(sharding.checkpoint_layers(net))
    sharding.shard(net, torch.bfloat16)
    sharding.fill(net, source.tensors())
    return net


def student_from(tensors, cfg, seed=0, path="teacher"):
    """A student that starts as these weights; sinks that they lack are new.

    path   of their file, for what is to be said if they do not fit
    """
    net = model.build(cfg, seed)
    files.load_into(net, {**_own_sinks(net), **tensors}, path)
    return net


def _own_sinks(net):
    return {n: p for n, p in net.state_dict().items() if n.startswith("sinks.")}
