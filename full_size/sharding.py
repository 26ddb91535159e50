"""A model too large for one GPU: sharded by FSDP2, one process per GPU.

Each of n processes holds an n-th of every parameter, of its gradient and of its Adam moments, and
works on an n-th of the batch. A layer is gathered just before it runs, and freed right after:

    process 0   shard 0 of all layers ---+                          clips 0, 1 of the batch
    process 1   shard 1 of all layers ---+--> layer 7, gathered     clips 2, 3
    process 2   shard 2 of all layers ---+                          clips 4, 5
        backward: gathered again; gradients are averaged over the processes, then sharded

The stages need not know. `torchrun --nproc-per-node 8 dmd.py` starts the same file eight times, and
plumbing/processes.py divides batches and random numbers. Three things keep memory small:

  * `shard`: FSDP2 gathers one `Layer` at a time, both of its halves together.
  * `checkpoint_layers`: activation checkpointing. Only the inputs of a layer are kept; the backward
    pass runs the layer again.
  * `passes_apart`: a rollout of six blocks goes backward block by block.
"""

import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from model import Layer
from plumbing import files
from plumbing.processes import count, device, is_first, is_sharded, joined, rank, shared_draws

# ---- the model ----


class CheckpointedLayer(Layer):
    """A layer that keeps only its inputs; the backward pass computes its activations again."""

    def forward(self, *inputs):
        if not torch.is_grad_enabled():
            return super().forward(*inputs)
        *inputs, view = inputs
        # Trap: the layer runs again after the stream has moved on, so it must read the cache as it
        # was: see `kv_cache.CachedView.for_recompute`.
        then = view.for_recompute(self.index)
        once_more = dict(use_reentrant=False, preserve_rng_state=False)  # a layer draws nothing
        return checkpoint(super().forward, *inputs, then, **once_more)


def checkpoint_layers(net):
    """Use activation checkpointing in every layer of a model, in place."""
    for i, layer in enumerate(net.layers):
        net.layers[i] = CheckpointedLayer(i, layer.video, layer.audio)
    return net


class Apart(torch.autograd.Function):
    """The identity; but everything before it goes backward in a call of its own."""

    @staticmethod
    def forward(ctx, anchor, tensors):
        """anchor: an empty leaf that requires a gradient, or autograd would skip this function."""
        ctx.tensors = tensors
        return tuple(x.detach() for x in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        # All passes read the keys and values of the captions, so their graph must be kept.
        torch.autograd.backward(ctx.tensors, gradients, retain_graph=True)
        ctx.tensors = None  # the graph of this pass is no longer needed
        return None, None


def passes_apart(net):
    """Let every pass go backward alone, so that gradients are added in `.grad`."""
    # Autograd passes on the gradient of a weight when all users of the weight have added to it. In
    # one backward call for the six passes of a rollout, the gradients of all layers (38 GB at full
    # size) would exist until the last pass is done. In six calls, only the gradients of one layer.

    def apart(net, inputs, out):
        return Apart.apply(torch.empty(0, requires_grad=True), out) if out[0].grad_fn else None

    net.register_forward_hook(apart)
    return net


def shard(net, dtype):
    """Shard a model among the processes, in place, layer by layer.

    net     on the CPU, or on the meta device to be filled afterwards
    dtype   in which layers are gathered and computed; shards keep their own dtype
    """
    if not is_sharded():
        return net
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # Trap: FSDP2 would cast all inputs, noise levels too: in bfloat16, 978.26 becomes 976.
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device().type, (count(),))
    for layer in net.layers:
        fully_shard(layer, mp_policy=policy, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(layer, "project_captions")
    fully_shard(net, mp_policy=policy, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(net, "project_text")
    cast_tokens(net, dtype)
    # keys and values of captions are views, but nobody writes into them
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    return net.to_empty(device=device()) if next(net.parameters()).is_meta else net


def cast_tokens(net, dtype):
    """Let a model cast the tokens that enter it: latents, or features of captions."""

    def cast(net, inputs):
        return *(x.to(dtype) for x in inputs[:2]), *inputs[2:]

    project = net.project_text
    net.project_text = lambda *features: project(*cast(net, features))
    net.register_forward_pre_hook(cast)


def fill(net, tensors):
    """Copy full tensors, (name, tensor), into a sharded model; each process keeps its own part."""
    from torch.distributed.tensor import distribute_tensor

    parameters = dict(net.named_parameters())
    for name, x in tensors:
        p = parameters.pop(name)
        x = x.to(p.device, p.dtype)
        with torch.no_grad():
            p.copy_(distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None))
    if parameters:
        raise ValueError(f"tensor {next(iter(parameters))} is missing")


# ---- sharded states ----


def save(folder, tensors, about):
    """Write a state as `folder/state-STEP`, every process its shards; then remove the older one."""
    from torch.distributed import checkpoint as dcp

    folder = Path(folder)
    done, making = folder / f"state-{about['step']:06}", folder / f".state-{about['step']:06}"
    if is_first():
        for partial in folder.glob(".state-*"):  # from a run that was killed while it wrote
            shutil.rmtree(partial)
        making.mkdir(parents=True)
    dist.barrier()  # no process writes before the folder exists
    dcp.save(
        tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(making), save_distributed=True)
    )
    if is_first():
        files.write_json(making / "about.json", about)
        shutil.rmtree(done, ignore_errors=True)
        os.replace(making, done)
        for old in states(folder)[:-1]:
            shutil.rmtree(old)
    dist.barrier()


def states(folder) -> list[Path]:
    """List the complete states in a folder, the newest last."""
    return sorted(Path(folder).glob("state-[0-9]*"))


def about(state) -> dict:
    """Read the plain values of a state."""
    try:
        return dict(json.loads((state / "about.json").read_text("utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{state}: not a whole state ({error}); remove it") from None


def saved_shapes(state) -> dict:
    """Read the shape of every tensor of a state, by name."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(state)).read_metadata().state_dict_metadata
    return {name: x.size for name, x in found.items()}


def read(state, tensors):
    """Read a state into these tensors, which may be sharded among another number of processes."""
    from torch.distributed import checkpoint as dcp

    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(state)))


if __name__ == "__main__":
    with joined("cpu"):
        with shared_draws():
            drawn = torch.rand(2, generator=torch.Generator().manual_seed(0))
        print(f"process {rank()} of {count()} draws {drawn.tolist()}", file=sys.stderr)
