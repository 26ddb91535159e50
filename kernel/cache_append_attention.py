"""Build the CUDA kernel, register it with PyTorch, say which path runs.

kernel/cache_append_attention.cu does on a GPU what `kv_cache.cache_append_attention` says in PyTorch. It
knows nothing of PyTorch: a C function takes pointers and sizes and returns a CUDA error code. This
module is everything in between:

    build      nvcc, on first use, for the GPU that is there, into a cache folder (some seconds)
    load       ctypes; the two sides must agree on the size of the argument struct
    register   torch.library: two operators with a schema that says what they write, so that
               torch.compile and opcheck know; `fake` gives their shapes without a GPU
    check      C sees only pointers, so dtype, device, shape and alignment are checked here

Two operators: `append` norms, rotates and writes, for SDPA to follow; `fused` attends as well, in
one launch, and is meant for few queries and few new keys (`are_few`).

Neither knows about gradients. `supports` says whether the kernel may run; when it may not, the
PyTorch version does. A benchmark must not take one for the other: `require` asks once whether there
is a kernel, and within `strict` every call that would fall back to PyTorch is an error.

Under a CUDA graph: nothing here waits for the GPU, and memory comes from PyTorch. Sizes and slots
are part of a captured launch, so a stream needs a graph per place in the ring.

    python -m kernel.cache_append_attention        # which path runs here, and why
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
from rope import Rope

SOURCE = Path(__file__).with_suffix(".cu")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
HEAD_SIZES = (24, 40, 64, 128)  # of the toy's audio and video, and of the full size's
FEW = 64  # queries and new keys up to which one launch does it all; not measured on a GPU yet
MOST_THREADS = 1024  # of a block
NO_ROPE = Rope(None, None, "split")
FLAGS = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC"]


# ---- build ----


def find_nvcc() -> str | None:
    """The CUDA compiler on the path, in $CUDA_HOME, or where its installer puts it."""
    homes = os.environ.get("CUDA_HOME"), "/usr/local/cuda"
    folders = os.pathsep.join(f"{home}/bin" for home in homes if home)
    return shutil.which("nvcc") or shutil.which("nvcc", path=folders)


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


class Rows(ctypes.Structure):
    """Tokens (B, T, H*D) whose rows may lie apart; the struct of that name in the source."""

    _fields_ = [("x", ctypes.c_void_p), ("clip", ctypes.c_longlong), ("token", ctypes.c_longlong)]

    @classmethod
    def of(cls, x):
        return cls(x.data_ptr(), *x.stride()[:2])


class Raw(ctypes.Structure):
    """Queries or keys as they leave their projection; the struct of that name in the source."""

    _fields_ = [
        ("rows", Rows),
        *((name, ctypes.c_void_p) for name in ("weight", "cos", "sin")),
        *((name, ctypes.c_int) for name in ("tokens", "turns")),
    ]


class Args(ctypes.Structure):
    """Everything a launch needs; the struct of that name in the source."""

    _fields_ = [
        ("q", Raw),
        ("k", Raw),
        ("v", Rows),
        *((name, ctypes.c_void_p) for name in ("k_cache", "v_cache", "out")),
        *((name, ctypes.c_int) for name in ("B", "H", "N", "first", "filled", "start", "split")),
        ("eps", ctypes.c_float),
    ]


class Kernel:
    """A compiled kernel/cache_append_attention.cu."""

    def __init__(self, path):
        self.path = path
        library = ctypes.CDLL(str(path))
        if (size := library.cache_append_args_size()) != ctypes.sizeof(Args):
            raise RuntimeError(f"{path}: Args has {size} bytes, here {ctypes.sizeof(Args)}")
        self.launch = library.cache_append_attention
        self.launch.argtypes = [ctypes.c_int] * 3 + [ctypes.POINTER(Args), ctypes.c_void_p]
        self.error = library.cache_append_error
        self.error.restype = ctypes.c_char_p
        self.ready = library.cache_append_ready

    def __call__(self, dtype, head_size, whole, args, stream):
        """Launch on a stream.  Raises RuntimeError for any CUDA error."""
        self._check(self.launch(DTYPES[dtype], head_size, whole, ctypes.byref(args), stream))

    def check_ready(self):
        """Raises RuntimeError where no launch would succeed, for instance with an old driver."""
        self._check(self.ready())

    def _check(self, code):
        if code:
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
        kernel = Kernel(build(nvcc, torch.cuda.get_device_capability(device_index)))
        kernel.check_ready()
        return kernel
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


# ---- check ----

TENSORS = (
    "q", "q_weight", "q_cos", "q_sin", "k", "k_weight", "k_cos", "k_sin", "v", "k_cache", "v_cache"
)  # fmt: skip


RAW = ("q", "k", "v")  # may be slices of a larger tensor


def has_whole_rows(x) -> bool:
    """Whether channels lie side by side, and every row of x (B, T, C) begins at 16 bytes.

    >>> both = torch.zeros(1, 5, 96)
    >>> has_whole_rows(both[:, 1:, 48:]), has_whole_rows(both.mT), has_whole_rows(both[..., :90])
    (True, False, True)
    """
    apart = (s * x.element_size() % 16 == 0 for s in x.stride()[:2])
    return x.stride(2) == 1 and all(apart)


def check(tensors, first, filled, start):
    """Raise ValueError, in one line, for anything that the kernel would misread.

    It runs before every launch, so the usual case is one quick test per tensor.
    """
    q, k, k_cache = tensors[0], tensors[4], tensors[9]
    turns = [None if t is None else len(t) for t in (*tensors[2:4], *tensors[6:8])]
    shapes = expected_shapes(q.shape, k.shape, k_cache.shape, *turns)
    dtype, device, grad = q.dtype, q.device, torch.is_grad_enabled()
    for name, t, shape in zip(TENSORS, tensors, shapes):
        if t is None:
            continue
        if t.shape != shape:
            raise ValueError(f"{name} is {tuple(t.shape)}, expected {shape}")
        if t.dtype != dtype or t.device != device:
            raise ValueError(f"{name} is {t.dtype} on {t.device}, q is {dtype} on {device}")
        if not (has_whole_rows(t) if name in RAW else t.is_contiguous()):
            expected = "of whole rows" if name in RAW else "contiguous"
            raise ValueError(f"{name} is not {expected}: its strides are {t.stride()}")
        if t.data_ptr() % 16:
            raise ValueError(f"{name} does not start at a multiple of 16 bytes")
        if grad and t.requires_grad:
            raise ValueError(f"{name} requires grad, which the kernel does not record")
    if dtype not in DTYPES:
        raise ValueError(f"{dtype} is not supported; expected one of {', '.join(map(str, DTYPES))}")
    if not 0 <= first <= start <= start + k.shape[1] <= filled <= k_cache.shape[1]:
        raise ValueError(
            f"slots [{start}, {start + k.shape[1]}) of the new keys do not lie within the visible "
            f"[{first}, {filled}) of {k_cache.shape[1]}"
        )


@functools.lru_cache(maxsize=256)
def expected_shapes(q, k, k_cache, *turns):
    """The shape of every argument, in the order of TENSORS, from those of three.

    turns   rows of the four rotation tables; None if there are none
    """
    q, k, k_cache = (tuple(shape) for shape in (q, k, k_cache))
    if len(k_cache) != 4 or k_cache[3] not in HEAD_SIZES:
        raise ValueError(f"k_cache is {k_cache}, expected (B, slots, H, D) with D in {HEAD_SIZES}")
    if len(q) != 3 or len(k) != 3 or not (q[0] and q[1] and k[1]):
        raise ValueError(f"q is {q} and k is {k}, expected (B, tokens, H*D) with a token at least")
    if len({t is None for t in turns}) == 2:
        raise ValueError("cos and sin of queries and keys: give all four or none")
    B, _, H, D = k_cache
    if H * D // 2 > 4 * MOST_THREADS:
        raise ValueError(f"{H} heads of {D} are too wide: a thread of a row takes 4 pairs or more")
    width, shapes = H * D, []
    for tokens, rows in ((q[1], turns[0]), (k[1], turns[2])):  # sin must have as many as cos
        shapes += [(B, tokens, width), (width,)]
        shapes += 2 * [(1 if rows == 1 else tokens, width // 2)]
    return [*shapes, (B, k[1], width), k_cache, k_cache]


# ---- register ----

SIGNATURE = """(
    Tensor q, Tensor q_weight, Tensor? q_cos, Tensor? q_sin,
    Tensor k, Tensor k_weight, Tensor? k_cos, Tensor? k_sin,
    Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache,
    int first, int filled, int start, bool split, float eps) -> Tensor"""


def _operator(whole):
    """The implementation of `fused` (whole) or `append`: 11 tensors, then the rest of SIGNATURE."""

    def run(*arguments):
        tensors, (first, filled, start, split, eps) = arguments[:11], arguments[11:]
        q, k, v, k_cache = tensors[0], tensors[4], tensors[8], tensors[9]
        kernel = kernel_or_reason(q.device)
        if isinstance(kernel, str):
            raise ValueError(f"cache_append_attention: {kernel}")
        check(tensors, first, filled, start)
        out = q.new_empty(q.shape)
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        turns = [0 if t is None else len(t) for t in (tensors[2], tensors[6])]
        B, N, H, D = k_cache.shape
        args = Args(
            Raw(Rows.of(q), *pointers[1:4], q.shape[1], turns[0]),
            Raw(Rows.of(k), *pointers[5:8], k.shape[1], turns[1]),
            Rows.of(v), *pointers[9:], out.data_ptr(), B, H, N, first, filled, start, split, eps,
        )  # fmt: skip
        with _current(q.device) as stream:
            kernel(q.dtype, D, whole, args, stream)
        return out

    return run


@contextlib.contextmanager
def _current(device):
    """The stream to launch on, with its device made current if it is not."""
    if device.type == "cpu":
        yield None
    else:
        with torch.cuda.device(device):
            yield torch.cuda.current_stream().cuda_stream


def _fake(q, *_):
    return q.new_empty(q.shape)


def _register():
    for name, whole in (("omniforcing::append", False), ("omniforcing::fused", True)):
        torch.library.define(name, " ".join(SIGNATURE.split()))
        torch.library.impl(name, ("cuda", "cpu"), _operator(whole))
        torch.library.register_fake(name, _fake)


if not hasattr(torch.ops.omniforcing, "fused"):  # a graded exercise imports modules once more
    _register()


# ---- call ----

_is_strict = False  # see `strict`


@contextlib.contextmanager
def strict(on=True):
    """Within this, what PyTorch would have to do instead raises ValueError, from `supports`.

    For benchmarks: which path runs is asked anew at every attention, not only once.
    """
    global _is_strict
    before, _is_strict = _is_strict, on
    try:
        yield
    finally:
        _is_strict = before


def supports(q, k, v, heads) -> bool:
    """Whether the kernel may replace PyTorch for these raw projections (B, T, H*D).

    They may be slices: of a product that makes all three, of a pass over two blocks.
    Raises ValueError within `strict` if it may not.
    """
    reason = why_not(q, k, v, heads)
    if reason and _is_strict and q.device.type != "meta":  # where nothing runs anyway
        raise ValueError(f"PyTorch would have to do an attention of the CUDA kernel: {reason}")
    return reason is None


def why_not(q, k, v, heads) -> str | None:
    """What keeps the kernel from doing this attention; None: nothing does."""
    if isinstance(reason := kernel_or_reason(q.device), str):
        return reason
    if (D := q.shape[-1] // heads.count) not in HEAD_SIZES:
        return f"heads of {D}, expected one of {HEAD_SIZES}"
    tensors = (q, k, v, heads.q_weight, heads.k_weight)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "a gradient is asked for"
    if not all(t.dtype == q.dtype in DTYPES for t in tensors):
        return f"it would take {', '.join(sorted({str(t.dtype) for t in tensors}))}"
    if not all(map(has_whole_rows, (q, k, v))):
        return f"strides {q.stride()}, {k.stride()}, {v.stride()} are not of whole rows"
    return None


def are_few(q, k) -> bool:
    """Whether one launch should do it all.

    A block makes every new key for itself and reads its whole row, of all heads, for the norm:
    nothing for 25 audio tokens, more work than attention itself for 1152 video tokens. So V2A, with
    25 audio queries over 1152 new video keys, goes by `append` today. It would fit (170 of the 227
    KB of shared memory that a block may have on an H100), and which way is faster is not measured
    on a GPU yet: benchmarks/bench_attention.py times both.
    """
    return max(q.shape[1], k.shape[1]) <= FEW


def append(q, k, v, heads, cache) -> torch.Tensor:
    """Write k, v (B, T, H*D) into their slots -> normed, rotated queries (B, Q, H*D)."""
    return torch.ops.omniforcing.append(*_arguments(q, k, v, heads, cache))


def fused(q, k, v, heads, cache) -> torch.Tensor:
    """Write k, v (B, T, H*D) into their slots, attend to all visible ones -> (B, Q, H*D)."""
    return torch.ops.omniforcing.fused(*_arguments(q, k, v, heads, cache))


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
