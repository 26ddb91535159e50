"""Build the CUDA kernel, load it, check its arguments, register it with PyTorch.

kernel/cache_append_attention.cu knows nothing of PyTorch: a C function takes pointers and sizes and
returns a CUDA error code. This module connects the two. kernel/cache_append_attention.py imports it
on the first need, which a stream on a CPU never has.

    build      nvcc, on first use, for the GPU of this machine, into a cache folder (some seconds)
    load       ctypes; both sides must agree on the size of the argument struct
    check      C sees only pointers, so dtype, device, shape and alignment are checked here
    register   torch.library: an operator for each of RUNGS. The schema tells torch.compile and
               opcheck which tensors it writes
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from plumbing import files

SOURCE = Path(__file__).with_name("cache_append_attention.cu")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
HEAD_SIZES = (24, 40, 64, 128)  # D of audio and video: toy (24, 40), full size (64, 128)
RUNGS = ("append", "online", "tensor_cores")  # as they are numbered in the .cu file
FEW_QUERIES = 32  # the most that `tensor_cores` takes: two tiles of the tensor cores
TENSOR_GPUS = ((8, 0), (9, 0), (10, 0))  # they give a thread block the 102 KB that it needs
MAX_THREADS = 1024  # per thread block
FLAGS = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC"]


# ---- build ----


def find_nvcc() -> str | None:
    """Return the CUDA compiler: on the path, in $CUDA_HOME, or where its installer puts it."""
    homes = os.environ.get("CUDA_HOME"), "/usr/local/cuda"
    folders = os.pathsep.join(f"{home}/bin" for home in homes if home)
    return shutil.which("nvcc") or shutil.which("nvcc", path=folders)


def cache_folder() -> Path:
    """Return the folder that keeps built kernels from one run to the next."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "omniforcing"


def build(nvcc, capability) -> Path:
    """Return the library for one GPU architecture, e.g. (9, 0); compile it if it is missing."""
    arch = "{}{}".format(*capability)
    flags = [*FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    # The name holds a hash of everything the library depends on: an old file is never reused.
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


class StridedRows(ctypes.Structure):
    """Tokens (B, T, H*D) whose rows may lie apart; the C struct of the same name."""

    _fields_ = [("x", ctypes.c_void_p), ("clip", ctypes.c_longlong), ("token", ctypes.c_longlong)]

    @classmethod
    def of(cls, x):
        return cls(x.data_ptr(), *x.stride()[:2])


class Projection(ctypes.Structure):
    """Queries or keys, before norm and rotation; the C struct of the same name."""

    _fields_ = [
        ("rows", StridedRows),
        *((name, ctypes.c_void_p) for name in ("weight", "cos", "sin")),
        *((name, ctypes.c_int) for name in ("tokens", "rope_rows")),
    ]


class Args(ctypes.Structure):
    """Everything that a launch needs; the C struct of the same name."""

    _fields_ = [
        ("q", Projection),
        ("k", Projection),
        ("v", StridedRows),
        *((name, ctypes.c_void_p) for name in ("k_cache", "v_cache", "out", "parts")),
        *((name, ctypes.c_int) for name in ("B", "H", "slots", "splits")),
        *((name, ctypes.c_int) for name in ("first", "filled", "start", "split")),
        ("eps", ctypes.c_float),
    ]


class Kernel:
    """A compiled cache_append_attention.cu; call it to launch."""

    def __init__(self, path):
        self.path = path
        library = ctypes.CDLL(str(path))
        # A field added on one side only would shift all fields after it.
        if (size := library.cache_append_args_size()) != ctypes.sizeof(Args):
            raise RuntimeError(f"{path}: Args has {size} bytes, here {ctypes.sizeof(Args)}")
        self.launch = library.cache_append_attention
        self.launch.argtypes = [ctypes.c_int] * 3 + [ctypes.POINTER(Args), ctypes.c_void_p]
        self.error = library.cache_append_error
        self.error.restype = ctypes.c_char_p
        self.ready = library.cache_append_ready

    def __call__(self, dtype, head_size, rung, args, stream):
        """Launch on a stream.  Raises RuntimeError for any CUDA error."""
        self._check(self.launch(DTYPES[dtype], head_size, rung, ctypes.byref(args), stream))

    def check_ready(self):
        """Raise RuntimeError if no launch can succeed, for instance because of an old driver."""
        self._check(self.ready())

    def _check(self, code):
        if code:
            message = f"CUDA error {code}: {self.error(code).decode()}"
            raise RuntimeError(f"cache_append_attention: {message}")


@functools.cache
def find(device_index) -> Kernel | str:
    """Return the kernel for a GPU, or the reason why there is none."""
    if (nvcc := find_nvcc()) is None:
        return "no nvcc"
    try:
        kernel = Kernel(build(nvcc, torch.cuda.get_device_capability(device_index)))
        kernel.check_ready()
        return kernel
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        print(f"cache_append_attention: PyTorch runs instead: {error}", file=sys.stderr)
        return f"the kernel could not be built ({' '.join(str(error).split())[:200]})"


# ---- check ----

TENSORS = (
    "q", "q_weight", "q_cos", "q_sin", "k", "k_weight", "k_cos", "k_sin", "v", "k_cache", "v_cache"
)  # fmt: skip
STRIDED = ("q", "k", "v")  # may be slices of a larger tensor


def has_contiguous_rows(x) -> bool:
    """Tell whether channels of x (B, T, C) are adjacent and rows multiples of 16 bytes apart.

    >>> both = torch.zeros(1, 5, 96)
    >>> [has_contiguous_rows(x) for x in (both[:, 1:, 48:], both.mT, both[..., :90])]
    [True, False, True]
    """
    (clip, token, channel), size = x.stride(), x.element_size()
    return channel == 1 and clip * size % 16 == 0 and token * size % 16 == 0


def why_not(q, k, v, heads) -> str | None:
    """Return the reason why the kernel cannot do this attention; None if it can."""
    if (D := q.shape[-1] // heads.count) not in HEAD_SIZES:
        return f"heads of {D}, expected one of {HEAD_SIZES}"
    tensors = (q, k, v, heads.q_weight, heads.k_weight)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "gradients are needed"
    if not all(t.dtype == q.dtype in DTYPES for t in tensors):
        return f"dtypes {', '.join(sorted({str(t.dtype) for t in tensors}))}"
    if not all(map(has_contiguous_rows, (q, k, v))):
        return f"strides {q.stride()}, {k.stride()}, {v.stride()}, expected contiguous rows"
    return None


def check(tensors, first, filled, start):
    """Raise ValueError, in one line, for anything that the kernel would misread."""
    # This runs before every launch, so it must be fast: a few quick tests per tensor.
    q, k, k_cache = tensors[0], tensors[4], tensors[9]
    rope_rows = [None if t is None else len(t) for t in (*tensors[2:4], *tensors[6:8])]
    shapes = expected_shapes(q.shape, k.shape, k_cache.shape, *rope_rows)
    dtype, device, grad = q.dtype, q.device, torch.is_grad_enabled()
    for name, t, shape in zip(TENSORS, tensors, shapes):
        if t is None:
            continue
        if t.shape != shape:
            raise ValueError(f"{name} is {tuple(t.shape)}, expected {shape}")
        if t.dtype != dtype or t.device != device:
            raise ValueError(f"{name} is {t.dtype} on {t.device}, q is {dtype} on {device}")
        if not (has_contiguous_rows(t) if name in STRIDED else t.is_contiguous()):
            expected = "contiguous rows" if name in STRIDED else "a contiguous tensor"
            raise ValueError(f"{name} has strides {t.stride()}, expected {expected}")
        if t.data_ptr() % 16:
            raise ValueError(f"{name} does not start at a multiple of 16 bytes")
        if grad and t.requires_grad:
            raise ValueError(f"{name} requires grad, which the kernel does not record")
    if dtype not in DTYPES:
        raise ValueError(f"{dtype} is not supported; expected one of {', '.join(map(str, DTYPES))}")
    if not 0 <= first <= start <= start + k.shape[1] <= filled <= k_cache.shape[1]:
        new, seen = f"[{start}, {start + k.shape[1]})", f"[{first}, {filled}) of {k_cache.shape[1]}"
        raise ValueError(f"slots {new} of the new keys do not lie within the visible slots {seen}")


@functools.lru_cache(maxsize=256)
def expected_shapes(q, k, k_cache, *rope_rows):
    """Return the shape of every argument; rope_rows: rows of the four rotation tables, or None."""
    q, k, k_cache = (tuple(shape) for shape in (q, k, k_cache))
    if len(k_cache) != 4 or k_cache[3] not in HEAD_SIZES:
        raise ValueError(f"k_cache is {k_cache}, expected (B, slots, H, D) with D in {HEAD_SIZES}")
    if len(q) != 3 or len(k) != 3 or not (q[0] and q[1] and k[1]):
        raise ValueError(f"q is {q} and k is {k}, expected (B, tokens, H*D), at least one token")
    if len({t is None for t in rope_rows}) == 2:
        raise ValueError("cos and sin of queries and keys: expected all four or none")
    B, _, H, D = k_cache
    if H * D // 2 > 4 * MAX_THREADS:  # `append`: a thread has at least 4 channel pairs of a row
        raise ValueError(f"{H} heads of {D} channels: expected at most {8 * MAX_THREADS} channels")
    width, shapes = H * D, []
    for tokens, rows in ((q[1], rope_rows[0]), (k[1], rope_rows[2])):  # sin: as many rows as cos
        shapes += [(B, tokens, width), (width,)]
        shapes += 2 * [(1 if rows == 1 else tokens, width // 2)]
    return [*shapes, (B, k[1], width), k_cache, k_cache]


def fits_tensor_cores(q, heads) -> bool:
    """Tell whether `tensor_cores` takes queries (B, Q, H*D): few, in bfloat16, heads of 64."""
    few = q.shape[1] <= FEW_QUERIES and q.shape[2] == 64 * heads and q.dtype == torch.bfloat16
    return few and (not q.is_cuda or torch.cuda.get_device_capability(q.device) in TENSOR_GPUS)


def num_splits(heads, keys) -> int:
    """Return the number of thread blocks of `tensor_cores` that share the keys of a head.

    >>> num_splits(32, 7296), num_splits(32, 167)
    (4, 1)
    """
    # One thread block for each processor of an H100, with two tiles or more for each of 12 warps.
    return max(1, min(132 // heads, keys // (2 * 12 * 16)))


# ---- register ----

SIGNATURE = """(
    Tensor q, Tensor q_weight, Tensor? q_cos, Tensor? q_sin,
    Tensor k, Tensor k_weight, Tensor? k_cos, Tensor? k_sin,
    Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache,
    int first, int filled, int start, bool split, float eps) -> Tensor"""


def _operator(rung, kernel_or_reason):
    """Return the implementation of one of RUNGS; SIGNATURE lists its arguments."""

    def run(*arguments):
        tensors, (first, filled, start, split, eps) = arguments[:11], arguments[11:]
        q, k, v, k_cache = tensors[0], tensors[4], tensors[8], tensors[9]
        kernel = kernel_or_reason(q.device)
        if isinstance(kernel, str):
            raise ValueError(f"cache_append_attention: {kernel}")
        check(tensors, first, filled, start)
        out, splits, parts = q.new_empty(q.shape), 1, None
        B, slots, H, D = k_cache.shape
        if rung == "tensor_cores":
            if not fits_tensor_cores(q, H):
                raise ValueError(
                    f"{q.shape[1]} queries of {D} channels in {q.dtype}: the tensor cores take at "
                    f"most {FEW_QUERIES} of 64 channels in {torch.bfloat16}"
                )
            splits = num_splits(B * H, filled - first)
            parts = q.new_empty(splits, *q.shape[:2], H, D + 4, dtype=torch.float32)
        pointers = [None if t is None else t.data_ptr() for t in (*tensors, out, parts)]
        rope_rows = [0 if t is None else len(t) for t in (tensors[2], tensors[6])]
        args = Args(
            Projection(StridedRows.of(q), *pointers[1:4], q.shape[1], rope_rows[0]),
            Projection(StridedRows.of(k), *pointers[5:8], k.shape[1], rope_rows[1]),
            StridedRows.of(v), *pointers[9:],
            B, H, slots, splits, first, filled, start, split, eps,
        )  # fmt: skip
        with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
            stream = torch.cuda.current_stream().cuda_stream if q.is_cuda else None
            kernel(q.dtype, D, RUNGS.index(rung), args, stream)
        return out

    return run


operators = torch.ops.omniforcing  # empty until `register` has been called


def register(kernel_or_reason):
    """Register the operators; a function of a device tells them their Kernel, or the reason."""
    if hasattr(operators, "online"):  # a grading imports this module a second time
        return
    for rung in RUNGS:
        name = f"omniforcing::{rung}"
        torch.library.define(name, " ".join(SIGNATURE.split()))
        torch.library.impl(name, ("cuda", "cpu"), _operator(rung, kernel_or_reason))
        # Shape of the output without running, for torch.compile and the meta device.
        torch.library.register_fake(name, lambda q, *_: q.new_empty(q.shape))
