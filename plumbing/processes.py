"""Share one training among the processes of torchrun.  With one process, nothing changes.

Each of n processes works on an n-th of every batch. All have equally many clips, so the loss of the
batch is the mean of their losses. The same is true of gradients. Every process draws the random
numbers of the *whole* batch from the same seed, and keeps the rows of its own clips
(`shared_draws`). So n processes see the same numbers as one process.

This file shares the batch. full_size/sharding.py shares the weights.
"""

import contextlib
import os

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def joined(kind):
    """Open and close the process group; without torchrun, do nothing.

    kind   "cuda": one GPU per process, over NCCL; "cpu": over gloo
    """
    if "WORLD_SIZE" not in os.environ:  # torchrun sets it
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
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.ExitStack() as stack:
            # Silence stdout in every process except the first. Errors still appear on stderr.
            if not is_first():
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield
    finally:
        dist.destroy_process_group()


def is_sharded() -> bool:
    return dist.is_initialized()  # True even with a single process of torchrun


def count() -> int:
    return dist.get_world_size() if is_sharded() else 1


def rank() -> int:
    return dist.get_rank() if is_sharded() else 0


def is_first() -> bool:
    return rank() == 0


def device() -> torch.device:
    """Return the device on which this process computes."""
    is_cuda = is_sharded() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")


def share_of(batch) -> int:
    """Return the number of clips per process in a batch of `batch` clips."""
    if batch % count():
        raise ValueError(f"a batch of {batch} clips among {count()} processes: choose a multiple")
    return batch // count()


def rows(x):
    """Return this process's part of a sequence or tensor with one row per clip of the batch."""
    n = share_of(len(x))
    return x[rank() * n : (rank() + 1) * n]


# ---- communication ----


def averaged(x):
    """Return the mean of a tensor over the processes, without gradient."""
    if count() == 1:
        return x
    # In float32, because x may be an integer (a count) or a loss in bfloat16.
    mean = x.detach().to(torch.float32).clone()
    dist.all_reduce(mean)
    return mean / count()


def gathered(x):
    """Concatenate the tensors of all processes; inverse of `rows`."""
    if count() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(count())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def whole(x):
    """Gather a sharded tensor; return any other tensor unchanged."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def whole_on_first(tensors, dtype) -> dict:
    """Gather all tensors on the CPU of the first process; return {} in every other process."""
    found = {}
    for name, x in tensors.items():
        # Gather one tensor at a time, or a GPU would hold the whole model. All processes take part.
        x = whole(x)
        if is_first():
            found[name] = x.to("cpu", dtype)
    return found


# ---- random numbers ----

DRAWS = (torch.rand, torch.randn, torch.randint)


class SharedDraws(TorchFunctionMode):
    """Draw random numbers for the whole batch on the CPU; keep the rows of this process's clips."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in DRAWS or "generator" not in kwargs:
            return function(*args, **kwargs)
        # The size is the last argument, randn(2, 3) or randn((2, 3)); its first axis is the batch.
        *high, size = args if function is torch.randint or len(args) == 1 else (args,)
        size = (size,) if isinstance(size, int) else tuple(size)
        if not size:  # one number for all clips, such as the exit pass: every process draws it
            return function(*args, **kwargs)
        drawn = function(*high, (size[0] * count(), *size[1:]), **kwargs)
        return rows(drawn).to(self.device)


def shared_draws():
    """Return a context in which this process draws the random numbers of its own clips."""
    return SharedDraws(device()) if is_sharded() else contextlib.nullcontext()
