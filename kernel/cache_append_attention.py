"""Decide when the CUDA kernel runs, and call it.

kernel/cache_append_attention.cu is the GPU version of `kv_cache.cache_append_attention`. `append`
norms, rotates and writes; SDPA attends after it. `online` and `tensor_cores` do the same and attend
themselves: `online` is the version to read first, no stream uses it; `tensor_cores` is for few
queries in bfloat16 (`fits_tensor_cores`). None of them records gradients.

The kernel runs where `supports` is True, elsewhere the PyTorch version. A benchmark must not
confuse the two. `require` checks once that there is a kernel. Within `strict`, every call that
would fall back to PyTorch raises an error.

In a CUDA graph: nothing here waits for the GPU, and memory comes from PyTorch. Sizes and slots are
part of a captured launch, so a stream needs one graph per position in the ring.

    python -m kernel.cache_append_attention    says whether the kernel or PyTorch runs here
"""

import contextlib
import functools

import torch

from rope import Rope

NO_ROPE = Rope(None, None, "split")

emulated = None  # a library.Kernel: the same source compiled for the CPU; only tests set it


@functools.cache
def _library():
    """Import kernel/library.py, on the first need, and register its operators."""
    from kernel import library

    library.register(kernel_or_reason)
    return library


def kernel_or_reason(device):
    """Return the library.Kernel for tensors on this device, or a text: why there is none."""
    device = torch.device(device)
    if device.type == "cpu":
        return emulated or "no GPU"
    if device.type != "cuda":
        return f"no kernel for {device.type}"
    if not torch.cuda.is_available():
        return "no GPU"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _library().find(index)


def path(device="cuda") -> str:
    """Say which implementation runs: "CUDA kernel for sm_90", or "PyTorch: " and the reason."""
    found = kernel_or_reason(device)
    if isinstance(found, str):
        return f"PyTorch: {found}"
    if found is emulated:
        return "CUDA kernel, emulated"
    return "CUDA kernel for sm_{}{}".format(*torch.cuda.get_device_capability(device))


def require(device="cuda") -> str:
    """Return `path`.  Raises ValueError, with the reason, if PyTorch would run."""
    if (text := path(device)).startswith("PyTorch"):
        raise ValueError(f"the CUDA kernel cannot run here ({text.removeprefix('PyTorch: ')})")
    return text


_is_strict = False  # set by `strict`


@contextlib.contextmanager
def strict(on=True):
    """Within this context, raise ValueError in `supports` where PyTorch would run."""
    # Every attention chooses anew between kernel and PyTorch, so one check by `require` is too few.
    global _is_strict
    before, _is_strict = _is_strict, on
    try:
        yield
    finally:
        _is_strict = before


def supports(q, k, v, heads) -> bool:
    """Tell whether the kernel may replace PyTorch for these projections (B, T, H*D)."""
    found = kernel_or_reason(q.device)
    reason = found if isinstance(found, str) else _library().why_not(q, k, v, heads)
    if reason and _is_strict and q.device.type != "meta":  # on the meta device nothing runs at all
        raise ValueError(f"PyTorch would have to do an attention of the CUDA kernel: {reason}")
    return reason is None


def fits_tensor_cores(q, heads) -> bool:
    """Tell whether `tensor_cores` takes queries (B, Q, H*D): few, in bfloat16, heads of 64."""
    return _library().fits_tensor_cores(q, heads)


def append(q, k, v, heads, cache) -> torch.Tensor:
    """Write k, v (B, T, H*D) into their slots; return normed, rotated queries (B, Q, H*D)."""
    return _library().operators.append(*_arguments(q, k, v, heads, cache))


def online(q, k, v, heads, cache) -> torch.Tensor:
    """Write k, v (B, T, H*D) into their slots; return attention to all visible keys (B, Q, H*D)."""
    return _library().operators.online(*_arguments(q, k, v, heads, cache))


def tensor_cores(q, k, v, heads, cache) -> torch.Tensor:
    """Do the same as `online` on tensor cores, for few queries (`fits_tensor_cores`)."""
    return _library().operators.tensor_cores(*_arguments(q, k, v, heads, cache))


def _arguments(q, k, v, heads, cache):
    here = cache.checked_slots(heads.split(k))
    tables = [rope or NO_ROPE for rope in (heads.q_rope, heads.k_rope)]
    if tables[0].layout != tables[1].layout:
        raise ValueError("queries and keys must be rotated in the same layout")
    return (
        q, heads.q_weight, tables[0].cos, tables[0].sin,
        k, heads.k_weight, tables[1].cos, tables[1].sin, v, cache.k, cache.v,
        cache.first_visible, cache.num_filled, here.start, tables[0].layout == "split", heads.eps,
    )  # fmt: skip


if __name__ == "__main__":
    print(path())
