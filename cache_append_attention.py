"""Build the CUDA kernel, register it with PyTorch, say which path runs.

cache_append_attention.cu does on a GPU what `kv_cache.cache_append_attention` says in PyTorch. It
knows nothing of PyTorch: a C function takes pointers and sizes and returns a CUDA error code. This
module is everything in between:

    build      nvcc, on first use, for the GPU that is there, into a cache folder (some seconds)
    load       ctypes; the two sides must agree on the size of the argument struct
    register   torch.library: two operators with a schema that says what they write, so that
               torch.compile and opcheck know; `fake` gives their shapes without a GPU
    check      C sees only pointers, so dtype, device, shape and alignment are checked here

Two operators: `append` norms, rotates and writes, for SDPA to follow; `fused` attends as well, in
one launch, and is meant for few queries and few new keys.

Neither knows about gradients. `supports` says whether the kernel may run; when it may not, the
PyTorch version does. `require` turns "PyTorch runs instead" into an error, for benchmarks.

Under a CUDA graph: nothing here waits for the GPU, and memory comes from PyTorch. Sizes and slots
are part of a captured launch, so a stream needs a graph per place in the ring.

    python cache_append_attention.py        # which path runs here, and why
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import files

SOURCE = Path(__file__).with_suffix(".cu")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
HEAD_SIZES = (24, 40, 64, 128)  # of the toy's audio and video, and of the full size's
FEW = 64  # queries and new keys up to which one launch does it all; not measured on a GPU yet
FLAGS = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC"]


# ---- build ----


def find_nvcc() -> str | None:
    """The CUDA compiler on the path, or where its installer puts it."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cache_folder() -> Path:
    """Where built kernels are kept from one run to the next."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "omniforcing"


def build(nvcc, capability) -> Path:
    """The kernel for one GPU architecture, e.g. (9, 0); compiled unless it has been before.

    The name holds a hash of all it depends on, so an old file is never mistaken for a new one.
    Raises RuntimeError with what the compiler said.
    """
    arch = "{}{}".format(*capability)
    flags = [*FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(flags).encode() + version).hexdigest()
    path = cache_folder() / f"cache_append_attention_sm{arch}_{key[:16]}.so"
    if not path.exists():
        print(f"compiling {SOURCE.name} for sm_{arch}, once", file=sys.stderr)
        files.write_beside(path, lambda p: _compile([nvcc, *flags, str(SOURCE), "-o", str(p)]))
    return path


def _compile(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed: {result.stderr.strip()}")


# ---- load ----


class Raw(ctypes.Structure):
    """Queries or keys as they leave their projection; the struct of that name in the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "cos", "sin")),
        *((name, ctypes.c_int) for name in ("tokens", "turns")),
    ]


class Args(ctypes.Structure):
    """Everything a launch needs; the struct of that name in the source."""

    _fields_ = [
        ("q", Raw),
        ("k", Raw),
        *((name, ctypes.c_void_p) for name in ("v", "k_cache", "v_cache", "out")),
        *((name, ctypes.c_int) for name in ("B", "H", "N", "first", "filled", "start", "split")),
        ("eps", ctypes.c_float),
    ]


class Kernel:
    """A compiled cache_append_attention.cu."""

    def __init__(self, path):
        library = ctypes.CDLL(str(path))
        if (size := library.cache_append_args_size()) != ctypes.sizeof(Args):
            raise RuntimeError(f"{path}: Args has {size} bytes, here {ctypes.sizeof(Args)}")
        self.launch = library.cache_append_attention
        self.launch.argtypes = [ctypes.c_int] * 3 + [ctypes.POINTER(Args), ctypes.c_void_p]
        self.error = library.cache_append_error
        self.error.restype = ctypes.c_char_p

    def __call__(self, dtype, head_size, whole, args, stream):
        """Launch on a stream.  Raises RuntimeError for any CUDA error."""
        if code := self.launch(DTYPES[dtype], head_size, whole, ctypes.byref(args), stream):
            raise RuntimeError(
                f"cache_append_attention: CUDA error {code}: {self.error(code).decode()}"
            )


emulated: Kernel | None = None  # the same source compiled for the CPU; only tests set it


@functools.cache
def _find(device_index) -> Kernel | str:
    """The kernel for a GPU, or why there is none."""
    if (nvcc := find_nvcc()) is None:
        return "no nvcc"
    try:
        return Kernel(build(nvcc, torch.cuda.get_device_capability(device_index)))
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        print(f"cache_append_attention: PyTorch runs instead: {error}", file=sys.stderr)
        return f"the kernel could not be built ({' '.join(str(error).split())[:200]})"


def kernel_or_reason(device) -> Kernel | str:
    """The kernel for tensors on this device, or why there is none."""
    device = torch.device(device)
    if device.type == "cpu":
        return emulated or "no GPU"
    if device.type != "cuda":
        return f"no kernel for {device.type}"
    if not torch.cuda.is_available():
        return "no GPU"
    return _find(torch.cuda.current_device() if device.index is None else device.index)


def path(device="cuda") -> str:
    """Which implementation runs, and why: "CUDA kernel for sm_90" | "PyTorch: no GPU" | ..."""
    found = kernel_or_reason(device)
    if isinstance(found, str):
        return f"PyTorch: {found}"
    if found is emulated:
        return "CUDA kernel, emulated"
    return "CUDA kernel for sm_{}{}".format(*torch.cuda.get_device_capability(device))


def require(device="cuda") -> str:
    """`path`, where the kernel must be what runs.  Raises ValueError with the reason if not."""
    if (text := path(device)).startswith("PyTorch"):
        raise ValueError(f"the CUDA kernel cannot run here ({text.removeprefix('PyTorch: ')})")
    return text


# ---- register ----

SIGNATURE = """(
    Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight,
    Tensor? q_cos, Tensor? q_sin, Tensor? k_cos, Tensor? k_sin,
    Tensor(a!) k_cache, Tensor(b!) v_cache,
    int first, int filled, int start, bool split, float eps) -> Tensor"""


def _operator(whole):
    """The implementation of `fused` (whole) or `append`; arguments as in SIGNATURE."""

    def run(q, k, v, q_weight, k_weight, q_cos, q_sin, k_cos, k_sin, k_cache, v_cache,
            first, filled, start, split, eps):  # fmt: skip
        found = kernel_or_reason(q.device)
        if isinstance(found, str):
            raise ValueError(f"cache_append_attention: {found}")
        tables = (q_cos, q_sin, k_cos, k_sin)
        check(q, k, v, q_weight, k_weight, tables, k_cache, v_cache, first, filled, start)
        out = torch.empty_like(q)
        B, N, H, D = k_cache.shape
        args = Args(
            _raw(q, q_weight, q_cos, q_sin), _raw(k, k_weight, k_cos, k_sin), v.data_ptr(),
            k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(), B, H, N,
            first, filled, start, split, eps,
        )  # fmt: skip
        if q.device.type == "cpu":
            found(q.dtype, D, whole, args, None)
        else:
            with torch.cuda.device(q.device):
                stream = torch.cuda.current_stream(q.device).cuda_stream
                found(q.dtype, D, whole, args, stream)
        return out

    return run


def _raw(x, weight, cos, sin) -> Raw:
    if cos is None:
        return Raw(x.data_ptr(), weight.data_ptr(), None, None, x.shape[1], 0)
    pointers = (t.data_ptr() for t in (x, weight, cos, sin))
    return Raw(*pointers, x.shape[1], cos.shape[0])


def _fake(q, *_):
    return torch.empty_like(q)


library = torch.library.Library("omniforcing", "DEF")
for _name, _whole in (("append", False), ("fused", True)):
    library.define(_name + SIGNATURE)
    for _key in ("CUDA", "CPU"):
        library.impl(_name, _operator(_whole), _key)
    torch.library.register_fake(f"omniforcing::{_name}", _fake, lib=library)


# ---- check ----


def check(q, k, v, q_weight, k_weight, tables, k_cache, v_cache, first, filled, start):
    """Raise ValueError, in one line, for anything the kernel would misread."""
    named = dict(zip(("q_cos", "q_sin", "k_cos", "k_sin"), tables))
    named = {name: t for name, t in named.items() if t is not None}
    named |= dict(q=q, k=k, v=v, q_weight=q_weight, k_weight=k_weight)
    named |= dict(k_cache=k_cache, v_cache=v_cache)
    if q.dtype not in DTYPES:
        raise ValueError(f"cache_append_attention: dtype {q.dtype} is not supported")
    if k_cache.dim() != 4 or k_cache.shape[3] not in HEAD_SIZES:
        raise ValueError(
            f"k_cache is {tuple(k_cache.shape)}, expected (B, slots, H, D) with D in {HEAD_SIZES}"
        )
    for name, shape in _shapes(q, k, k_cache, tables).items():
        if name in named and tuple(named[name].shape) not in shape:
            raise ValueError(f"{name} is {tuple(named[name].shape)}, expected {shape[0]}")
    for name, t in named.items():
        _check_tensor(name, t, q)
    if not 0 <= first <= start <= start + k.shape[1] <= filled <= k_cache.shape[1]:
        raise ValueError(
            f"slots [{start}, {start + k.shape[1]}) of the new keys do not lie within "
            f"[{first}, {filled}) of {k_cache.shape[1]}"
        )


def _shapes(q, k, k_cache, tables):
    """The shapes each argument may have."""
    B, N, H, D = k_cache.shape
    Q, T = (x.shape[1] if x.dim() == 3 else 0 for x in (q, k))
    if H * D // 2 > 1024 * (4 if D in (24, 40) or k.element_size() == 4 else 8):
        raise ValueError(f"{H} heads of {D}: rows are too wide for a block of 1024 threads")
    if any((one is None) != (tables[0] is None) for one in tables):
        raise ValueError("cos and sin of queries and keys: give all four or none")
    shapes = dict(q=[(B, Q, H * D)], k=[(B, T, H * D)], v=[(B, T, H * D)])
    shapes |= {name: [(H * D,)] for name in ("q_weight", "k_weight")}
    shapes |= {f"q_{f}": [(Q, H * D // 2), (1, H * D // 2)] for f in ("cos", "sin")}
    shapes |= {f"k_{f}": [(T, H * D // 2), (1, H * D // 2)] for f in ("cos", "sin")}
    return shapes | dict(k_cache=[(B, N, H, D)], v_cache=[(B, N, H, D)])


def _check_tensor(name, t, q):
    if t.dtype != q.dtype or t.device != q.device:
        raise ValueError(f"{name} is {t.dtype} on {t.device}, q is {q.dtype} on {q.device}")
    if not t.is_contiguous():
        raise ValueError(f"{name} is not contiguous: strides {t.stride()}")
    if t.data_ptr() % 16:
        raise ValueError(f"{name} does not start at a multiple of 16 bytes")
    if torch.is_grad_enabled() and t.requires_grad:
        raise ValueError(f"{name} requires grad, which the kernel does not record")


# ---- call ----


def supports(q, k, v, heads) -> bool:
    """Whether the kernel may replace PyTorch for these raw projections (B, T, H*D)."""
    tensors = (q, k, v, heads.q_weight, heads.k_weight)
    return (
        q.device.type == "cuda"
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and all(t.dtype == q.dtype in DTYPES and t.is_contiguous() for t in tensors)
        and q.shape[-1] // heads.count in HEAD_SIZES
        and not isinstance(kernel_or_reason(q.device), str)
    )


def are_few(q, k) -> bool:
    """Whether one launch should do it all.

    A block makes every new key for itself and reads its whole row, of all heads, for the norm:
    nothing for 25 audio tokens, more work than attention itself for 1152 video tokens.
    """
    return max(q.shape[1], k.shape[1]) <= FEW


def append(q, k, v, heads, cache) -> torch.Tensor:
    """Write k, v (B, T, H*D) into their slots -> normed, rotated queries (B, Q, H*D)."""
    return torch.ops.omniforcing.append(*_arguments(q, k, v, heads, cache))


def fused(q, k, v, heads, cache) -> torch.Tensor:
    """Write k, v (B, T, H*D) into their slots, attend to all visible ones -> (B, Q, H*D)."""
    return torch.ops.omniforcing.fused(*_arguments(q, k, v, heads, cache))


def _arguments(q, k, v, heads, cache):
    here = cache.place_for(heads.split(k))
    tables = [None] * 4
    split = False
    if heads.q_rope is not None:
        tables = [heads.q_rope.cos, heads.q_rope.sin, heads.k_rope.cos, heads.k_rope.sin]
        split = heads.q_rope.layout == "split"
    return (
        q, k, v, heads.q_weight, heads.k_weight, *tables, cache.k, cache.v,
        cache.first, cache.num_filled, here.start, split, heads.eps,
    )  # fmt: skip


if __name__ == "__main__":
    print(path())
