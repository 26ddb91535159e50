"""What will a training need on every GPU, and does it fit?  Computed before anything is loaded.

Every net that learns is held four times over in float32: weights, gradient, and the two moments of
AdamW; a fifth time if it is averaged. All of it is cut among the processes, so more GPUs help:

    generator   18.9e9 parameters x (4 + 4 + 8 + 4) bytes = 378 GB  |
    critic      the same without average                    302 GB  |-- / processes
    teacher     frozen, in bfloat16                          38 GB  |

What is not cut is what a process works on: layers that are whole at the moment, and activations.
These are counted by running an update on tensors without contents (full_size/memory.py), with two and with
three layers: every further layer takes as much as the third.

Stage III's rollout goes backward pass by pass (`sharding.passes_apart`), or the gradients of all
layers, whole, 38 GB in bfloat16, would be among its activations.

    python -m full_size.memory                  a student on 8 GPUs, without activations
    python -m benchmarks.training_memory     the three stages on 8, 16 and 32
"""

import functools
from dataclasses import replace

import torch
from torch.utils._pytree import tree_map

import config
import model
from full_size import memory, sharding
from full_size import text as captions
from full_size.memory import GB, Row
from plumbing import trainer as training

LAYERS_AT_WORK = 2  # the one that runs, and the next, which is being gathered meanwhile
MOST_PROCESSES = 1024


def rows(nets, activations, processes) -> list[Row]:
    """What every process needs.

    nets          (name, config, recipe) of each; no recipe: it is frozen
    activations   bytes of an update, from `activation_bytes`
    """
    found = []
    for name, cfg, recipe in nets:
        n = _parameters(cfg, cfg.num_layers)
        for what, size in kept(recipe).items():
            how = f"{n:,} parameters x {size} bytes / {processes} processes"
            found.append(Row(f"{name}, {what}", -(-n * size // processes), how))
    how = "one update on tensors without contents, layers computed twice"
    return [*found, layers_row(nets[-1][1]), Row("activations", activations, how)]


def kept(recipe) -> dict:
    """Bytes a parameter, by what they are for."""
    if recipe is None:
        return {"frozen weights": 2}
    sizes = {"weights": 4, "gradient": 4, "moments": 8}
    return {**sizes, "average": 4} if recipe.ema else sizes


def layers_row(cfg) -> Row:
    """Layers that are whole for the moment in bfloat16, and the last one's gradient besides.

    A gradient is made in bfloat16 and copied to float32 to be averaged: 6 bytes.
    """
    some, more = (_parameters(cfg, layers) for layers in (1, 2))
    layer, outside = more - some, 2 * some - more
    size = layer * (2 * LAYERS_AT_WORK + 6) + outside * (2 + 6)
    how = f"{layer:,} parameters x ({LAYERS_AT_WORK} x 2 + 6) bytes, {outside:,} around them x 8"
    return Row("layers at work", size, how)


@functools.cache
def _parameters(cfg, layers):
    return model.build(replace(cfg, num_layers=layers), device="meta").num_parameters()


def activation_bytes(nets, loss, batch) -> int:
    """The most that is alive in an update of `batch` clips, besides the nets.

    loss   function of all nets, captions and a generator of random numbers
    """
    two, three = (_peak(nets, loss, batch, layers) for layers in (2, 3))
    return two + (nets[0][1].num_layers - 2) * (three - two)


def _peak(nets, loss, batch, layers):
    on_meta = [_net(replace(cfg, num_layers=layers), recipe is not None) for _, cfg, recipe in nets]
    given = *on_meta, _captions(batch, nets[0][1]), torch.Generator()
    with sharding.SharedDraws("meta"):
        return memory.peak_bytes(lambda: loss(*given).backward())


def _net(cfg, learns):
    """A net without contents; inputs are cast and gradients leave at once, as FSDP does it."""
    net = model.build(cfg, device="meta").to(torch.bfloat16).requires_grad_(learns)
    net.register_forward_pre_hook(lambda net, inputs: tree_map(_cast, inputs))
    for p in net.parameters() if learns else ():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return sharding.passes_apart(sharding.checkpoint_layers(net)) if learns else net


def _cast(x):
    return x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x


def _captions(batch, cfg):
    like = dict(device="meta", dtype=torch.bfloat16)
    features = [torch.empty(batch, captions.TOKENS, cfg.caption_width, **like) for _ in range(4)]
    return captions.Captions(tuple(features[:2]), tuple(features[2:]))


def check(nets, loss, batch):
    """Print what every process will need.

    Raises ValueError if it does not fit, saying how many processes would do.
    """
    processes, activations = sharding.count(), activation_bytes(nets, loss, batch)
    free = memory.free_bytes(sharding.device())
    if sharding.device().type == "cpu":  # which all processes share
        free //= processes
    needed = rows(nets, activations, processes)
    print(f"every one of {processes} processes, {batch} clips each:")
    print(memory.shown(needed, free))
    if memory.total(needed) > free:
        raise ValueError(refusal(nets, activations, processes, free))


def refusal(nets, activations, processes, free) -> str:
    """In one line: what is missing, and how many processes would do."""

    def need(n):
        return memory.total(rows(nets, activations, n))

    more = range(processes + 1, MOST_PROCESSES + 1)
    enough = next((n for n in more if need(n) <= free), None)
    advice = f"{enough} would do" if enough else "no number of them is enough"
    return (
        f"this training needs {need(processes) / GB:.1f} GB in each of {processes} processes, and "
        f"{free / GB:.1f} GB are free: {advice}"
    )


if __name__ == "__main__":
    recipe = training.Recipe(steps=1)
    found = rows([("student", config.FULL, recipe)], 0, 8)
    print(memory.shown(found, 80 * GB))
