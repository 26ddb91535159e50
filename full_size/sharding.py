"""A model that is too large for one GPU, cut into shards: one process a GPU, FSDP2 between them.

Each of n processes holds an n-th of every parameter, with its gradient and its moments, and works
on an n-th of the batch. A layer is gathered just before it runs and dropped right after:

    process 0   shard 0 of all layers ---+                          clips 0, 1 of the batch
    process 1   shard 1 of all layers ---+--> layer 7, whole, for the moment it takes
    process 2   shard 2 of all layers ---+                          clips 4, 5
        backward: gathered once more; gradients are averaged over the processes and cut again

The trainings know next to nothing of it. `torchrun --nproc-per-node 8 dmd.py` starts the same file
eight times; what this module changes is done from outside:

  * `shard` hangs FSDP2 on the net: it gathers around `net.layer`, which is both halves of a layer
  * `shared_draws`: every process draws the random numbers of the *whole* batch, from the same seed,
    and keeps the rows of its own clips, so that n processes see what one would have seen
  * losses are means over as many clips everywhere, so the mean of all processes' losses (and of
    their gradients, which FSDP2 takes) is the batch's

Activations are not kept (`checkpoint_layers`): of each layer only the input is, and the layer runs
once more when its gradient is asked for. # Trap: a layer that reads a rolling cache must then read
what it read before; see `kv_cache.CachedView.frozen`. Nor are gradients kept longer than they must
(`passes_apart`): a rollout of six blocks goes backward block by block.

Without torchrun there is no process group, and everything here does nothing; torch's machinery for
shards, which takes half as long to import as torch itself, is then left alone.
"""

import contextlib
import functools
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from plumbing import files

# ---- processes ----


@contextlib.contextmanager
def processes(kind):
    """Join the processes that torchrun started; without torchrun, stay alone.

    kind   "cuda": one GPU a process, by NCCL; "cpu": by gloo

    Raises ValueError for a GPU that is not there, or that is wanted without torchrun.
    """
    if "WORLD_SIZE" not in os.environ:
        if kind != "cpu":
            raise ValueError(f"--device {kind}: start it by torchrun, even on a single GPU")
        yield
        return
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: no GPU is usable here; try --device cpu")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        with contextlib.nullcontext() if is_first() else _silence():
            yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _silence():
    """What one process says need not be said by all; errors go to stderr, and are."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def is_sharded() -> bool:
    """Whether there are processes to share with."""
    return dist.is_initialized()


def count() -> int:
    return dist.get_world_size() if is_sharded() else 1


def rank() -> int:
    return dist.get_rank() if is_sharded() else 0


def is_first() -> bool:
    return rank() == 0


def device() -> torch.device:
    """Where this process computes."""
    is_cuda = is_sharded() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")


def share_of(batch) -> int:
    """How many clips of a batch are this process's.  Raises ValueError if they cannot be shared."""
    if batch % count():
        raise ValueError(f"a batch of {batch} clips among {count()} processes: choose a multiple")
    return batch // count()


def rows(x):
    """This process's part of a sequence or a tensor of one row per clip of the batch.

    >>> rows([1, 2, 3])                                                 # a single process
    [1, 2, 3]
    """
    n = share_of(len(x))
    return x[rank() * n : (rank() + 1) * n]


# ---- what processes tell each other ----


def averaged(x):
    """Mean over the processes of a tensor, without gradient; a single process keeps its own."""
    if count() == 1:
        return x
    mean = x.detach().to(torch.float32).clone()
    dist.all_reduce(mean)
    return mean / count()


def gathered(x):
    """Inverse of `rows` for tensors: everybody's, one after the other."""
    if count() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(count())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def whole(x):
    """A tensor that was cut into shards, put together again; any other as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def whole_on_first(tensors, dtype) -> dict:
    """Whole tensors on the CPU of the first process, which writes them; the others get none."""
    found = {}
    for name, x in tensors.items():
        x = whole(x)  # all must take part, one tensor at a time
        if is_first():
            found[name] = x.to("cpu", dtype)
    return found


# ---- random numbers ----

DRAWS = (torch.rand, torch.randn, torch.randint)


class SharedDraws(TorchFunctionMode):
    """Draws are made for the whole batch, on the CPU; this process keeps the rows of its clips.

    The first axis of a draw is the batch. A draw without axes, as that of the exit pass, belongs to
    all clips, and every process makes it. What is drawn without a generator is no business of ours.
    """

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in DRAWS or "generator" not in kwargs:
            return function(*args, **kwargs)
        *high, size = args if function is torch.randint or len(args) == 1 else (args,)
        size = (size,) if isinstance(size, int) else tuple(size)
        if not size:
            return function(*args, **kwargs)
        drawn = function(*high, (size[0] * count(), *size[1:]), **kwargs)
        return rows(drawn).to(self.device)


def shared_draws():
    """A context in which this process draws its own clips' share of the batch's random numbers."""
    return SharedDraws(device()) if is_sharded() else contextlib.nullcontext()


# ---- the net ----


def checkpoint_layers(net):
    """Keep the inputs of layers, not their activations: those are computed again when needed."""
    run = net.layer

    def layer(i, *args):
        *inputs, view = args
        if not torch.is_grad_enabled():
            return run(i, *inputs, view)
        again = dict(use_reentrant=False, preserve_rng_state=False)  # nothing random is in a layer
        return checkpoint(run, i, *inputs, view.frozen(i), **again)

    net.layer = layer
    return net


class Apart(torch.autograd.Function):
    """Tensors as they are; but all that is behind them goes backward in a call of its own."""

    @staticmethod
    def forward(ctx, anchor, tensors):
        """anchor   an empty leaf that wants a gradient, or autograd would not come back to us"""
        ctx.tensors = tensors
        return tuple(x.detach() for x in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        # what is behind every pass, the captions' keys and values, must outlast the first call
        torch.autograd.backward(ctx.tensors, gradients, retain_graph=True)
        ctx.tensors = None  # and what is behind this pass only need not
        return None, None


def passes_apart(net):
    """Let every pass go backward alone: gradients add up in `.grad`, and not on the way there.

    Autograd hands on a weight's gradient when all that used the weight have added to it. In one
    call for the six passes of a rollout, the gradients of all layers, 38 GB at full size, would be
    whole until the last pass is done; in six calls no more than a layer's are.
    """
    forward = net.forward

    def apart(*args):
        out = forward(*args)
        return Apart.apply(torch.empty(0, requires_grad=True), out) if out[0].grad_fn else out

    net.forward = apart
    return net


def shard(net, dtype):
    """Cut a net among the processes, in place, layer by layer; alone, leave it as it is.

    net     on the CPU, or on the meta device to be filled afterwards
    dtype   in which layers are gathered and computed; shards keep the net's own, and gradients are
            averaged in float32

    # Trap: FSDP gathers around a module's `forward`. A layer here is no module but a method, for
    # LTX-2 names its halves apart. So each pair is one unit, gathered around `run` of either half.
    """
    if not is_sharded():
        return net
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # what enters the net is cast once; inside, rotary tables keep their precision
    once, never = (
        MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=cast)
        for cast in (True, False)
    )
    options = dict(mesh=init_device_mesh(device().type, (count(),)), reshard_after_forward=True)
    pairs = list(zip(net.video.layers, net.audio.layers))
    for pair in pairs:
        fully_shard(list(pair), mp_policy=never, **options)
        for half in pair:
            half.run = _call
            register_fsdp_forward_method(half, "run")
            half.text_attn.keys_values = functools.partial(half.run, half.text_attn.keys_values)
    fully_shard(net, mp_policy=once, **options)
    register_fsdp_forward_method(net, "project_text")
    # keys and values of captions are views, and nobody writes into them
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    layer = net.layer
    net.layer = lambda i, *args: pairs[i][0].run(layer, i, *args)
    return net.to_empty(device=device()) if next(net.parameters()).is_meta else net


def _call(function, *args):
    return function(*args)


def fill(net, tensors):
    """Copy whole tensors, as they come, into a sharded net: each process cuts out its own part.

    tensors   iterable of (name, tensor)

    Raises ValueError, naming it, for a parameter that was not among them.
    """
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
    """Write a state, every process its shards, as `folder/state-STEP`; then remove the one before.

    about   plain values, "step" among them
    """
    from torch.distributed import checkpoint as dcp

    folder = Path(folder)
    done, making = folder / f"state-{about['step']:06}", folder / f".state-{about['step']:06}"
    if is_first():
        for half in folder.glob(".state-*"):  # of a run that was killed while it wrote
            shutil.rmtree(half)
        making.mkdir(parents=True)
    dist.barrier()
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
    """Whole states in a folder, the newest last."""
    return sorted(Path(folder).glob("state-[0-9]*"))


def about(state) -> dict:
    """What a state says of itself.  Raises ValueError if that cannot be read."""
    try:
        return dict(json.loads((state / "about.json").read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{state}: not a whole state ({error}); remove it") from None


def saved_shapes(state) -> dict:
    """Shape of every tensor of a state, by name."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(state)).read_metadata().state_dict_metadata
    return {name: x.size for name, x in found.items()}


def read(state, tensors):
    """Read a state into these tensors, which may be cut among another number of processes."""
    from torch.distributed import checkpoint as dcp

    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(state)))


if __name__ == "__main__":
    with processes("cpu"):
        with shared_draws():
            drawn = torch.rand(2, generator=torch.Generator().manual_seed(0))
        print(f"process {rank()} of {count()} draws {drawn.tolist()}", file=sys.stderr)
