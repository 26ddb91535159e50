"""How much memory?  Counted before anything is loaded.

What does not fit should be refused in the first second, with the arithmetic, and not by the
allocator after ten minutes. Sizes that follow from constants are multiplied out. What activations
take at their widest moment is not guessed either: the same code runs once on `meta` tensors, which
have shapes but no contents, while `peak_bytes` counts what is alive.

`full_size/memory.py` adds up what a stream needs, `full_size/memory.py` what a training does.
"""

import os
import weakref
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

GB = 1e9


class Row(NamedTuple):
    """One thing that takes memory."""

    what: str
    num_bytes: int
    how: str  # the arithmetic


def weights_row(net, dtype) -> Row:
    """Parameters times bytes each; `net` may be on the meta device."""
    n, size = net.num_parameters(), dtype.itemsize
    return Row("transformer", n * size, f"{n:,} parameters x {size} bytes")


# ---- sizes of activations: run on tensors without contents ----


class _Living(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that are still alive; views are no tensors."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._meet((args, kwargs), are_new=False)
        out = function(*args, **(kwargs or {}))
        self._meet(out, are_new=True)
        return out

    def _meet(self, tree, are_new):
        storages = [t.untyped_storage() for t in tree_iter(tree) if torch.is_tensor(t)]
        for storage in storages:
            if storage._cdata in self.sizes:
                continue
            self.sizes[storage._cdata] = storage.nbytes() if are_new else 0
            self.now += self.sizes[storage._cdata]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._dead, storage._cdata)

    def _dead(self, name):
        self.now -= self.sizes.pop(name)


class _Fused(torch.autograd.Function):
    """A fused attention: what it writes, and what it keeps for its backward pass.

    On a GPU no (Q, K) matrix of scores is ever written; on meta tensors it would be counted.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _fused_attention(q, k, v, *_, **__):
    return _Fused.apply(q, k, v)


def peak_bytes(function) -> int:
    """The most memory alive at once of what `function` makes, when called on meta tensors.

    >>> peak_bytes(lambda: (torch.empty(10, device="meta") + 1).sum())       # 40 + 40, then 40 + 4
    80
    """
    with mock.patch.object(F, "scaled_dot_product_attention", _fused_attention):
        with _Living() as living:
            function()
    return living.peak


# ---- what there is ----


def free_bytes(device) -> int:
    """Memory that can still be had there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # free, and what the system would give up of its file cache
        line = next(x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def total(rows) -> int:
    return sum(row.num_bytes for row in rows)


def shown(rows, free) -> str:
    """The arithmetic, one line each.

    >>> print(shown([Row("transformer", 37_750_000_000, "18.9e9 x 2 bytes")], 80_000_000_000))
       37.75 GB  transformer: 18.9e9 x 2 bytes
       37.75 GB  in all, of 80.00 GB free
    """
    lines = [f"{row.num_bytes / GB:8.2f} GB  {row.what}: {row.how}" for row in rows]
    return "\n".join([*lines, f"{total(rows) / GB:8.2f} GB  in all, of {free / GB:.2f} GB free"])


if __name__ == "__main__":
    x = torch.empty(1000, 1000, device="meta")
    chain = peak_bytes(lambda: (x @ x).relu().sum())
    print(shown([Row("product and its rectified copy", chain, "2 x 4 MB, and a sum")], 16 * GB))
