"""The CUDA kernel agrees with the PyTorch code that it replaces, with or without a GPU.

The same source is compiled twice: by nvcc for a GPU, and by g++ with tests/emulation.h, which runs
CUDA threads as fibers on the CPU. Both are called through the same wrapper, so most tests exist in
two versions. The GPU version is skipped where there is no GPU.

The reference is kv_cache.cache_append_attention in float64. Errors are relative to the largest
output. Inputs are exact, but new keys, queries and outputs are rounded to the dtype, as in PyTorch
(float32 6e-8, float16 5e-4, bfloat16 4e-3).

    pytest tests/test_cache_append_attention.py              # about half a minute
    pytest tests/test_cache_append_attention.py -m slow      # nvcc for three GPUs, sanitizers
    pytest tests/test_cache_append_attention.py -m gpu       # on a GPU, also compute-sanitizer
"""

import contextlib
import ctypes
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import PAPER, ROOT, random_model, random_text, tiny
from tape import Operators

import masks
import rope
from kernel import cache_append_attention as kernel
from kv_cache import CachedView, Heads, RollingCache, attention, cache_append_attention
from masks import SITES
from model import draw_noise, ropes_of

HERE = Path(__file__).parent
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# -Og: with more optimisation, compiling takes longer than it saves.
EMULATE = ["g++", "-std=c++17", "-Og", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-x", "c++"]
library = kernel._library()  # at once: the operators find `kernel.emulated` of this module
OPS = library.RUNGS

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to emulate the kernel")
needs_nvcc = pytest.mark.skipif(library.find_nvcc() is None, reason="no nvcc to compile the kernel")
needs_gpu = pytest.mark.gpu  # skipped where there is none (conftest.py)
EMULATED_AND_REAL = [
    pytest.param("cpu", marks=needs_gxx, id="emulated"),
    pytest.param("cuda", marks=needs_gpu, id="gpu"),
]


def emulate(source, target):
    """Compile a kernel source for the CPU."""
    include = ["-include", str(HERE / "emulation.h")]
    subprocess.run([*EMULATE, *include, str(source), "-o", str(target)], check=True)
    return library.Kernel(target)


@pytest.fixture(scope="session")
def emulated_kernel(tmp_path_factory):
    return emulate(library.SOURCE, tmp_path_factory.mktemp("emulated") / "kernel.so")


@pytest.fixture(params=EMULATED_AND_REAL)
def device(request, monkeypatch):
    """Device of the kernel.  The test fails if PyTorch would run instead."""
    if request.param == "cpu":
        monkeypatch.setattr(kernel, "emulated", request.getfixturevalue("emulated_kernel"))
    kernel.require(request.param)
    return request.param


# ---- a stream through one cache, by the kernel and by PyTorch ----


class Case(NamedTuple):
    """One attention; the first block is block 0, or a later one after a past of random tokens."""

    B: int
    H: int
    D: int
    prefix: int  # keys of block 0
    T: int  # keys of every later block
    Q: int  # queries of every block
    ring: int  # blocks of the ring
    first_block: int = 0
    blocks: int = 5
    pinned: bool = True
    layout: str | None = "split"
    one_row: bool = False  # the rotation tables have one row for all tokens
    slices: bool = False  # q, k and v are slices of larger tensors, which hold NaN elsewhere


CASES = {
    "wraps twice": Case(2, 2, 24, 5, 7, 9, ring=3, blocks=9, layout="interleaved"),
    "more queries than keys": Case(1, 2, 40, 17, 25, 33, ring=2),
    "evicts its prefix": Case(1, 3, 24, 3, 5, 4, ring=2, pinned=False),
    "one query": Case(1, 2, 64, 3, 5, 1, ring=3, first_block=2, blocks=3, layout="interleaved"),
    "one key": Case(1, 1, 24, 1, 1, 8, ring=2, layout=None),
    "widest head": Case(1, 1, 128, 4, 31, 17, ring=2, first_block=1, blocks=2, layout=None),
    "tiles for all warps and more": Case(1, 1, 64, 9, 32, 8, ring=9, first_block=20, blocks=2),
    "one angle for all tokens": Case(1, 2, 40, 2, 3, 5, ring=2, blocks=3, one_row=True),
    "slices": Case(2, 2, 24, 5, 7, 9, ring=2, blocks=3, slices=True),
}
FEW_CASES = {  # of `tensor_cores`, in bfloat16
    "a second of audio": Case(1, 2, 64, 17, 25, 25, ring=6, first_block=9, blocks=2),
    "wraps twice": Case(2, 2, 64, 5, 7, 32, ring=3, blocks=9, layout="interleaved"),
    "one query": Case(1, 1, 64, 1, 1, 1, ring=2, layout=None),
    "four ranges of keys, slices, no prefix": Case(
        2, 2, 64, 100, 400, 25, ring=4, first_block=6, blocks=1, pinned=False, slices=True
    ),
    "a range ends within a tile": Case(1, 1, 64, 3, 409, 17, ring=2, first_block=4, blocks=1),
}
HEAD_CASES = [  # every head size that the kernel has
    Case(1, H, D, 3, 6, 7, ring=2, first_block=1, blocks=2)
    for H, D in ((2, 24), (1, 40), (2, 64), (1, 128))
]


class Stream:
    """The same random blocks in two caches: `mine` for the kernel, `truth` for float64 PyTorch."""

    def __init__(self, case, dtype=torch.float32, device="cpu", seed=0):
        self.case, self.dtype, self.device = case, dtype, device
        torch.manual_seed(seed)
        self.weights = [self.random(case.H * case.D).abs() + 0.5 for _ in range(2)]
        self.mine, self.truth = self.cache(), self.cache()
        slots = case.prefix + case.ring * case.T  # NaN until written, so that reading one shows
        self.mine.k, self.mine.v = (
            torch.full((case.B, slots, case.H, case.D), torch.nan, dtype=dtype, device=device)
            for _ in range(2)
        )
        for _ in range(case.first_block):
            n = self.mine.num_filled
            for x in (self.mine.k, self.mine.v):
                x[:, :n] = self.random(case.B, n, case.H, case.D).to(x)
            self.next_block()
        self.truth.k, self.truth.v = (x.double().cpu() for x in (self.mine.k, self.mine.v))

    def cache(self):
        return RollingCache(self.case.prefix, self.case.T, self.case.ring)

    def random(self, *shape):
        """Random numbers that this dtype holds exactly, in float64."""
        return torch.randn(shape).to(self.dtype).double()

    def next_block(self):
        for cache in (self.mine, self.truth):
            cache.next_block()
            if not self.case.pinned and cache.block > self.case.ring - 1:
                cache.first_visible = cache.prefix_tokens

    def table(self, tokens):
        if self.case.layout is None:
            return None
        rows = 1 if self.case.one_row else tokens
        angles = 3 * torch.randn(rows, self.case.H * self.case.D // 2)
        cos, sin = (t.to(self.dtype).double() for t in (angles.cos(), angles.sin()))
        return rope.Rope(cos, sin, self.case.layout)

    def draw(self):
        """Projections q, k, v and heads of one pass, in float64."""
        c = self.case
        T = c.T if self.mine.block else c.prefix
        q, k, v = (self.random(c.B, n, c.H * c.D) for n in (c.Q, T, T))
        eps = 0.125  # so large that it matters
        return q, k, v, Heads(c.H, eps, *self.weights, self.table(c.Q), self.table(T))

    def to_kernel(self, x):
        """Tensors, tables and heads in the kernel's dtype and on its device."""
        if isinstance(x, torch.Tensor):
            return x.to(self.device, self.dtype)
        return type(x)(*map(self.to_kernel, x)) if isinstance(x, tuple) else x

    def run(self, op, inputs):
        """Output of the kernel; after `append`, attention is computed on the CPU in float64."""
        q, k, v, heads = (self.to_kernel(x) for x in inputs)
        if self.case.slices:
            q, k, v = map(as_slice, (q, k, v))
        out = getattr(kernel, op)(q, k, v, heads, self.mine)
        if op == "append":
            out = attention(*(x.cpu().double() for x in (heads.split(out), *self.mine.visible())))
        return out.cpu().double()

    def error(self, op, passes=1) -> float:
        """One block: the relative error of its last pass.  NaN counts as infinite."""
        for _ in range(passes):
            inputs = self.draw()
            mine = self.run(op, inputs)
            truth = cache_append_attention(*inputs, self.truth)
        error = (mine - truth).abs().max() / truth.abs().max()
        return float(error.nan_to_num(torch.inf))

    def check_slots(self):
        """Values are copied bit by bit, keys are rounded once, the other slots are untouched."""
        n = self.truth.num_filled
        k, v = self.mine.k.double().cpu(), self.mine.v.double().cpu()
        assert torch.equal(v[:, :n], self.truth.v[:, :n])
        tolerance = TOLERANCE[self.dtype] * self.truth.k[:, :n].abs().max()
        assert (k[:, :n] - self.truth.k[:, :n]).abs().max() <= tolerance
        assert k[:, n:].isnan().all() and v[:, n:].isnan().all()


def as_slice(x):
    """The same tokens as a slice of a larger tensor, which is NaN elsewhere."""
    B, T, C = x.shape
    larger = x.new_full((B, T + 1, 3 * C), torch.nan)
    larger[:, 1:, C : 2 * C] = x
    return larger[:, 1:, C : 2 * C]


def check_stream(case, dtype, device, op, passes=2):
    """Assert that the output and the cache agree after every block of a case."""
    stream = Stream(case, dtype, device)
    for block in range(case.blocks):
        if block:
            stream.next_block()
        error = stream.error(op, passes)
        assert error <= TOLERANCE[dtype], f"block {block}: relative error {error}"
        stream.check_slots()


@pytest.mark.parametrize("op", ["append", "online"])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_agrees_with_pytorch_block_by_block(name, op, device):
    """Partial fill, full ring, repeated passes, odd sizes, Q != T: outputs and every slot."""
    check_stream(CASES[name], torch.float32, device, op)


@pytest.mark.parametrize("name", FEW_CASES)
def test_the_tensor_cores_agree_with_pytorch_block_by_block(name, device):
    """One range of keys for each head, or several; one query to 32; repeated passes."""
    check_stream(FEW_CASES[name], torch.bfloat16, device, "tensor_cores")


@pytest.mark.parametrize("op", ["append", "online"])
@pytest.mark.parametrize("layout", ["split", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_both_rotary_layouts(dtype, layout, op, device):
    """16-bit types use wider loads of pairs, at all head sizes."""
    for case in HEAD_CASES:
        check_stream(case._replace(layout=layout), dtype, device, op, passes=1)


@pytest.mark.parametrize("op, dtype, case", [
    ("online", torch.float16, CASES["more queries than keys"]),
    ("online", torch.bfloat16, CASES["more queries than keys"]),
    ("tensor_cores", torch.bfloat16, FEW_CASES["wraps twice"]),
])  # fmt: skip
def test_the_kernel_rounds_no_more_than_pytorch(op, dtype, case, device):
    """PyTorch in the same dtype also rounds between norm and rotation."""
    stream = Stream(case, dtype, device)
    inputs = stream.draw()
    truth = cache_append_attention(*inputs, stream.truth)
    mine = stream.run(op, inputs)
    q, k, v, heads = (stream.to_kernel(x) for x in inputs)
    keys, values = stream.cache().append(heads.keys(k), heads.split(v))
    pytorch = attention(heads.queries(q), keys, values).double().cpu()
    assert (mine - truth).abs().mean() <= 1.1 * (pytorch - truth).abs().mean()


# ---- inside the model ----


@torch.no_grad()
def stream_model(device="cpu", layers=1, last_pass=contextlib.nullcontext(), dtype=torch.float32):
    """Velocities of four blocks of random tokens, window 1: the prefix is moved twice."""
    widths = (40, 24) if dtype == torch.float32 else (128, 64)  # of the toy, of the full size
    cfg = tiny(PAPER, num_layers=layers, num_heads=1, video_width=widths[0], audio_width=widths[1])
    ropes_of.cache_clear()  # so that every call computes the tables, whatever ran before
    net = random_model(cfg, dtype).to(device)
    text, sigma = random_text(net, cfg), torch.full((1,), 0.5, device=device, dtype=dtype)
    velocities, view = [], CachedView(cfg, 8, window=1)
    for k in range(4):
        span = masks.block_span(k, cfg)
        tokens = [x.to(device, dtype) for x in draw_noise(1, span, cfg, None)]
        with last_pass if k == 3 else contextlib.nullcontext():
            velocities += net(*tokens, sigma, sigma, text, span, view)
        view.next_block()
    return [v.cpu() for v in velocities]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_by_kernel_and_by_pytorch(dtype, device, monkeypatch):
    """Few queries take the tensor cores if they can."""
    calls = Counter()

    def noted(op, operator):
        return lambda *x: calls.update([op]) or operator(*x)

    for op in OPS:
        monkeypatch.setattr(kernel, op, noted(op, getattr(kernel, op)))
    actual = stream_model(device, dtype=dtype)
    few = 3 * 4 if dtype == torch.bfloat16 else 0  # attentions with heads of 64, blocks
    assert [calls[op] for op in OPS] == [4 * 4 - few, 0, few]
    monkeypatch.setattr(kernel, "supports", lambda *_: False)
    # On a GPU, SDPA multiplies float32 in pieces of 11 bits, and an angle of 500 rad differs in its
    # last digit.
    near = 2e-2 if dtype == torch.bfloat16 else 1e-5 if device == "cpu" else 1e-4
    for one, other in zip(actual, stream_model(device, dtype=dtype), strict=True):
        torch.testing.assert_close(one, other, atol=near, rtol=near)


COPIES = {"aten::cat", "aten::stack", "aten::clone", "aten::_to_copy", "aten::repeat"}


def copies_of_a_pass(layers):
    """Count the copying operators in one pass with a full window."""
    stream_model(layers=layers, last_pass=(seen := Operators()))
    return Counter({name: n for name, n in seen.counts.items() if name in COPIES})


@needs_gxx
def test_a_layer_copies_no_tensor(emulated_kernel, monkeypatch):
    """With the (emulated) kernel, a layer concatenates and clones nothing."""
    monkeypatch.setattr(kernel, "emulated", emulated_kernel)
    assert copies_of_a_pass(2) == copies_of_a_pass(1)


def test_under_autograd_pytorch_runs(device):
    """The PyTorch path records gradients; the operator refuses tensors that require them."""
    stream = Stream(CASES["one angle for all tokens"], device=device)
    q, k, v, heads = (stream.to_kernel(x) for x in stream.draw())
    q.requires_grad_()
    assert not kernel.supports(q, k, v, heads)
    cache_append_attention(q, k, v, heads, stream.mine).sum().backward()
    assert q.grad.abs().max() > 0
    with pytest.raises(ValueError, match="q requires grad, which the kernel does not record"):
        kernel.online(q, k, v, heads, stream.mine)
    with torch.no_grad():
        assert kernel.supports(q, k, v, heads)


def in_float64(q, k, v, heads):
    weights = dict(q_weight=heads.q_weight.double(), k_weight=heads.k_weight.double())
    return q.double(), k.double(), v.double(), heads._replace(**weights)


UNSUPPORTED = {  # how to change q, k, v and heads, and why PyTorch must run then
    "float64": (in_float64, "dtypes torch.float64"),
    "mixed": (lambda q, k, v, heads: (q, k, v, heads._replace(k_weight=heads.k_weight.half())),
              "dtypes torch.float16, torch.float32"),
    "head size": (lambda q, k, v, heads: (q, k, v, heads._replace(count=4)), "heads of 20"),
    "strides": (lambda q, k, v, heads: (q, k, v.mT.contiguous().mT, heads), "contiguous rows"),
    "gradient": (lambda q, k, v, heads: (q.requires_grad_(), k, v, heads), "gradients are needed"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_the_kernel_does_not_support_is_left_to_pytorch(name, device):
    """Another dtype or head size, a gradient, strides.  Within `strict` this raises, with why."""
    change, reason = UNSUPPORTED[name]
    stream = Stream(CASES["one angle for all tokens"]._replace(layout=None), device=device)
    inputs = [stream.to_kernel(x) for x in stream.draw()]
    assert kernel.supports(*inputs)
    inputs = change(*inputs)
    assert not kernel.supports(*inputs)
    with kernel.strict(), pytest.raises(ValueError, match=f"PyTorch would have to .*{reason}"):
        cache_append_attention(*inputs, stream.cache())
    assert not kernel.supports(*inputs)


def test_within_strict_a_missing_kernel_is_an_error(monkeypatch):
    """Except on the meta device, where nothing runs, and within `strict(False)`."""
    monkeypatch.setattr(kernel, "emulated", None)
    monkeypatch.delattr(kernel, "_library")  # which is not even imported
    stream = Stream(CASES["one key"])
    inputs = [stream.to_kernel(x) for x in stream.draw()]
    with kernel.strict():
        with pytest.raises(ValueError, match="attention of the CUDA kernel: no GPU$"):
            cache_append_attention(*inputs, stream.mine)
        assert not kernel.supports(*(x.to("meta") for x in inputs[:3]), inputs[3])
        with kernel.strict(False):
            cache_append_attention(*inputs, stream.mine)
        with pytest.raises(ValueError, match="no GPU"):
            kernel.supports(*inputs)


# ---- the operators and what they refuse ----


def arguments(device, B=1, H=2, D=24, Q=3, T=5, N=15, dtype=torch.float32):
    """Arguments of all operators, by name."""
    shapes = dict(q=(B, Q, H * D), q_weight=(H * D,))
    shapes |= {name: (Q, H * D // 2) for name in ("q_cos", "q_sin")}
    shapes |= dict(k=(B, T, H * D), k_weight=(H * D,))
    shapes |= {name: (T, H * D // 2) for name in ("k_cos", "k_sin")}
    shapes |= dict(v=(B, T, H * D), k_cache=(B, N, H, D), v_cache=(B, N, H, D))
    tensors = {name: torch.randn(s, dtype=dtype, device=device) for name, s in shapes.items()}
    return tensors | dict(first=0, filled=10, start=5, split=True, eps=1e-6)


def arguments_of(op, device, **sizes):
    """Valid arguments of one operator."""
    if op == "tensor_cores":
        sizes |= dict(D=64, dtype=torch.bfloat16)
    return arguments(device, **sizes)


def operator(op):
    return getattr(torch.ops.omniforcing, op)


@pytest.mark.parametrize("op", OPS)
def test_the_schema_is_true(op, device):
    """Writes are declared, the fake shapes are right, torch.compile may use the operator."""
    result = torch.library.opcheck(operator(op).default, tuple(arguments_of(op, device).values()))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", OPS)
def test_shapes_are_known_without_running(op):
    """On the meta device: an output like q, and no kernel is asked for."""
    out = operator(op)(*arguments("meta", dtype=torch.bfloat16).values())
    assert out.device.type == "meta" and out.shape == (1, 3, 48) and out.dtype == torch.bfloat16


WRONG = {
    "dtype": (lambda a: {k: x.double() if torch.is_tensor(x) else x for k, x in a.items()},
              "torch.float64 is not supported; expected one of torch.float32, torch.float16, "),
    "mixed": (lambda a: {**a, "v": a["v"].half()}, "v is torch.float16 on .*, q is torch.float32"),
    "head size": (lambda a: arguments(a["q"].device, D=20), r"with D in \(24, 40, 64, 128\)"),
    "width": (lambda a: arguments(a["q"].device, H=400),
              "400 heads of 24 channels: expected at most 8192"),
    "no tokens": (lambda a: {**a, "q": a["q"][:, :0]}, "at least one token"),
    "tables": (lambda a: {**a, "k_sin": a["k_sin"][:2]}, r"k_sin is \(2, 24\), expected \(5, 24\)"),
    "rope rows": (lambda a: {**a, "q_cos": a["q_cos"][:1]},
                  r"q_sin is \(3, 24\), expected \(1, 24\)"),
    "no sine": (lambda a: {**a, "k_sin": None}, "expected all four or none"),
    "values": (lambda a: {**a, "v": a["v"][:, :4]}, r"v is \(1, 4, 48\), expected \(1, 5, 48\)"),
    "cache": (lambda a: {**a, "v_cache": a["v_cache"][:, 1:]}, "v_cache is .* expected"),
    "strides": (lambda a: {**a, "q": a["q"].mT.contiguous().mT},
                "q has strides .* expected contiguous rows"),
    "rows": (lambda a: {**a, "v": torch.zeros(1, 5, 49, device=a["q"].device)[..., :48]},
             "v has strides .* expected contiguous rows"),
    "weights": (lambda a: {**a, "k_weight": torch.zeros(96, device=a["q"].device)[::2]},
                "k_weight has strides .* expected a contiguous tensor"),
    "alignment": (lambda a: {**a, "q": torch.zeros(146, device=a["q"].device)[2:].view(1, 3, 48)},
                  "q does not start at a multiple of 16 bytes"),
    "slots": (lambda a: {**a, "start": 6}, r"slots \[6, 11\) .* within .* slots \[0, 10\) of 15"),
    "first": (lambda a: {**a, "first": 6}, "do not lie within"),
    "beyond": (lambda a: {**a, "filled": 16}, "do not lie within"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_c_would_misread_are_refused_in_one_line(name, device):
    """The message names the argument, its value and the expected one; nothing is written."""
    change, message = WRONG[name]
    wrong = change(arguments(device))
    before = wrong["k_cache"].clone()
    for op in OPS:
        with pytest.raises(ValueError, match=message) as error:
            operator(op)(*wrong.values())
        assert "\n" not in str(error.value)
    assert torch.equal(wrong["k_cache"], before)


def test_a_struct_of_another_size_is_refused(emulated_kernel, monkeypatch):
    """A field added on one side only would shift all fields after it."""

    class Longer(ctypes.Structure):
        _fields_ = [*library.Args._fields_, ("more", ctypes.c_int64)]

    monkeypatch.setattr(library, "Args", Longer)
    with pytest.raises(RuntimeError, match="Args has 208 bytes, here 216"):
        library.Kernel(emulated_kernel.path)


def test_a_cuda_error_is_raised(device):
    """The library has no tensor cores for float32: the launch fails with an error."""
    launch = kernel.kernel_or_reason(device)
    with pytest.raises(RuntimeError, match="CUDA error 1: invalid argument"):
        launch(torch.float32, 64, OPS.index("tensor_cores"), library.Args(), None)


@pytest.mark.parametrize("sizes, message", [
    (dict(Q=33), "33 queries of 64 channels in .*: the tensor cores take at most 32 of 64"),
    (dict(D=128), "3 queries of 128 channels"),
    (dict(dtype=torch.float16), "in torch.float16: .* in torch.bfloat16"),
])  # fmt: skip
def test_tensor_cores_take_few_queries_of_one_kind(sizes, message, device):
    """`fits_tensor_cores` knows it before, the operator refuses it, in one line."""
    for changes, fits in (({}, True), ({"Q": 32}, True), (sizes, False)):
        a = arguments(device, **(dict(D=64, dtype=torch.bfloat16) | changes))
        assert kernel.fits_tensor_cores(a["q"], 2) == fits
    with pytest.raises(ValueError, match=message) as error:
        operator("tensor_cores")(*a.values())
    assert "\n" not in str(error.value)


# ---- which path runs ----


def test_without_a_kernel_the_path_says_why(monkeypatch):
    """No GPU or no compiler: `path` gives the reason, and `require` refuses."""
    monkeypatch.setattr(kernel, "emulated", None)
    assert kernel.path("cpu") == "PyTorch: no GPU"
    with pytest.raises(ValueError, match=r"^the CUDA kernel cannot run here \(no GPU\)$"):
        kernel.require("cpu")
    with pytest.raises(ValueError, match="no GPU"):
        operator("online")(*arguments("cpu").values())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel.path() == "PyTorch: no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(library, "find_nvcc", lambda: None)
    assert library.find.__wrapped__(0) == "no nvcc"


def test_a_library_is_built_anew_for_another_compiler_source_or_gpu(monkeypatch, tmp_path):
    """The same ones find the library that is there."""
    compiler, source = tmp_path / "nvcc", tmp_path / "x.cu"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "SOURCE", source)

    def built(version="1", text="a", capability=(9, 0)):
        script = f'[ "$1" = --version ] && echo {version} && exit\nshift $(($# - 1))\ntouch "$1"\n'
        compiler.write_text(f"#!/bin/sh\n{script}")
        compiler.chmod(0o755)
        source.write_text(text)
        return library.build(str(compiler), capability)

    assert len({built(), built("2"), built(text="b"), built(capability=(8, 0))}) == 4
    assert built() == built() and len(list(tmp_path.rglob("*.so"))) == 4


def test_a_failed_build_is_reported_and_pytorch_runs(monkeypatch, capsys, tmp_path):
    """The messages of the compiler go to stderr; nothing is left in the cache folder."""
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && echo 1 || { echo oh no >&2; exit 3; }\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "find_nvcc", lambda: str(compiler))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert "oh no" in library.find.__wrapped__(0)
    assert "PyTorch runs instead" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.so"))


# ---- compiled by nvcc ----

# Compiles four times as fast as the real library: one head size, no optimisation.
QUICK = ["-DHEAD_SIZES(X)=X(64)", "-Xcicc", "-O0", "-Xptxas", "-O0"]


@needs_nvcc
def test_the_real_library_builds_once_and_fails_loudly_without_a_gpu(monkeypatch, tmp_path, capsys):
    """The library is cached; a launch without a driver raises an error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "FLAGS", [*library.FLAGS, *QUICK])
    path = library.build(library.find_nvcc(), (9, 0))
    assert library.build(library.find_nvcc(), (9, 0)) == path
    assert capsys.readouterr().err.count("compiling") == 1
    assert [p.name for p in tmp_path.rglob("*.so")] == [path.name]
    real = library.Kernel(path)
    if torch.cuda.is_available():
        pytest.skip("built, but there is a GPU: no launch without a driver")
    with pytest.raises(RuntimeError, match="CUDA error 35"):
        real.check_ready()
    monkeypatch.setattr(kernel, "emulated", real)
    for op in OPS:
        with pytest.raises(RuntimeError, match="CUDA error 35: CUDA driver version is insuff"):
            operator(op)(*arguments_of(op, "cpu", D=64).values())


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90])
def test_no_register_is_spilled(arch, tmp_path):
    """Two kernels in three dtypes and four head sizes, and two more: none spills."""
    command = [library.find_nvcc(), "-std=c++17", "-O3", "-cubin", "-Xptxas", "-v"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", str(library.SOURCE)]
    command += ["-o", str(tmp_path / "kernel.cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill stores", text)
    assert spilled == ["0"] * (2 * 3 * len(library.HEAD_SIZES) + 2)


@needs_gpu
@pytest.mark.parametrize("op", OPS)
def test_a_captured_launch_replays(op):
    """In a CUDA graph, the same launch handles new inputs in the same memory."""
    kernel.require()
    few = op == "tensor_cores"
    case = FEW_CASES["a second of audio"] if few else CASES["more queries than keys"]
    stream = Stream(case, torch.bfloat16 if few else torch.float32, "cuda")
    inputs = [stream.to_kernel(x) for x in stream.draw()]
    call = getattr(kernel, op)
    call(*inputs, stream.mine)  # loads the module
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*inputs, stream.mine)
    for x in inputs[:3]:
        x.normal_()
    graph.replay()
    replayed = out.clone()
    assert torch.equal(replayed, call(*inputs, stream.mine))


# ---- does all this find bugs? ----

# name: replacements in the source, each of which must occur exactly once
STORE = "void store_part(const Running &run) const {\n#pragma unroll\n        for (int r"
MERGE = "block.store_part(run);\n    __syncthreads();\n    block.merge_warps();\n}\n\n// "
BUGS = {
    "keys appended one place further": [("a.start + token;", "a.start + (token + 1) % p.tokens;")],
    "the other rotary layout": [("bool split = a.split", "bool split = !a.split")],
    "rotation the wrong way": [("x.b[j] * c + x.a[j] * s", "x.b[j] * c - x.a[j] * s")],
    "all tokens rotated by the first angle": [("p.rope_rows == 1 ? 0 : token", "0")],
    "values normed as well": [("if (which != 2)", "if (true)")],
    "norm per head": [("sum / width + a.eps", "sum / D + a.eps")],
    "no epsilon in the norm": [("sum / width + a.eps", "sum / width")],
    "no weight in the norm": [("x.b[j] *= inverse_rms * w.b[j]", "x.b[j] *= inverse_rms")],
    "every clip is the first one": [("+ b * rows.clip", "+ 0 * b")],
    "rows taken for contiguous": [
        (
            "row_of<scalar>(which == 2 ? a.v : p.rows, blockIdx.y, token)",
            "((const scalar *)(which == 2 ? a.v : p.rows).x + row * width)",
        ),
    ],
    "no barrier in the norm": [("= sum;\n        __syncthreads();", "= sum;")],
    "half a warp is summed": [("step; step /= 2) x += ", "step > 1; step /= 2) x += ")],
    "every clip attends to the first one": [("((size_t)b * tokens + token)", "((size_t)token)")],
    "an evicted prefix is still read": [("return a.first + (j <", "return (j <")],
    "the last key is left out": [
        ("num_keys = a.filled - a.first", "num_keys = a.filled - a.first - 1")
    ],
    "parts merged without their maxima": [("exp2f(part[D] - all.m)", "1")],
    "exp2 taken for exp": [("SCALE = 1.44269504f", "SCALE = 1")],
    "keys beyond the last take part": [("if (tile + lane >= head.num_keys)", "if (false)")],
    "no 1 / sqrt(D)": [("(SCALE / sqrtf(D)) : 0", "SCALE : 0")],
    "output not rescaled": [("run.O[r][c] *= shrink", "run.O[r][c] *= 1")],
    "sum not rescaled": [("run.l[r] * shrink", "run.l[r]")],
    "shared memory too small": [("WARPS * QUERIES * (D + 4);", "WARPS * QUERIES * D;")],
    "no barrier after the queries": [("load_queries();\n    __syncthreads();", "load_queries();")],
    "no barrier before the merge": [(MERGE + "-", MERGE.replace("__syncthreads();", "") + "-")],
    "no barrier between scores and values": [("__syncwarp();  // before", "// before")],
    "a warp passes the barrier by": [
        (MERGE + "-", MERGE.replace("__sync", "if (threadIdx.x / WARP != 1) __sync") + "-")
    ],
    "lanes missing from a shuffle": [
        (STORE, STORE.replace("{\n", "{ if (lane * C >= D) return;\n"))
    ],
    # tensor cores
    "channels of keys in another order": [("+ i % 2 * 32 + 8 * t;", "+ i % 2 * 32 + 8 * (3 - t);")],
    "channels of values in another order": [("+ g % 2 * 32 + g / 2 * 8;", "+ g * 8;")],
    "keys beyond the last take part (tensor cores)": [("2 * t + i % 2 >= head.num_keys", "false")],
    "output not rescaled (tensor cores)": [("run.O[M][c][j] *= shrink", "run.O[M][c][j] *= 1")],
    "sum not rescaled (tensor cores)": [("l *= shrink", "l *= 1")],
    "a maximum of two lanes": [("warp_max<4>(top)", "warp_max<2>(top)")],
    "a sum of one lane": [("warp_sum<4>(run.l[i])", "run.l[i]")],
    "scores not scaled": [("exp2f(S[n][j] * scale - m)", "exp2f(S[n][j] - m)")],
    "the second tile of keys is the first": [("two(S[1][0], S[1][1])", "two(S[0][0], S[0][1])")],
    "each split takes all keys": [
        ("const int end = tiles * (blockIdx.x + 1) / a.splits", "const int end = tiles")
    ],
    "the last keys are left out": [
        ("(block.head.num_keys + block.TILE - 1)", "block.head.num_keys")
    ],
    "splits overwrite each other": [("(blockIdx.x * rows + row)", "row")],
    "one split is not merged": [("merge<D>(a.parts, a.splits,", "merge<D>(a.parts, a.splits - 1,")],
    "too few threads merge": [("(outputs + 255) / 256", "outputs / 256")],
    "no barrier before the merge (tensor cores)": [
        (MERGE + "A", MERGE.replace("__syncthreads();", "") + "A")
    ],
}

BUG_CASES = (  # and the operators that run them
    (Case(2, 2, 24, 5, 7, 9, ring=2, blocks=4, layout="interleaved", slices=True), OPS[:2]),
    (Case(1, 2, 24, 3, 70, 8, ring=4, first_block=6, blocks=1, pinned=False), OPS[:2]),
    (Case(2, 2, 64, 3, 5, 17, ring=2, first_block=3, blocks=1), OPS[2:]),
    (Case(1, 2, 64, 3, 409, 25, ring=3, first_block=5, blocks=1, pinned=False), OPS[2:]),
)


def planted(edits):
    """Return the source of the kernel with a bug."""
    source = library.SOURCE.read_text()
    for old, new in edits:
        assert source.count(old) == 1, f"the source has changed: {old!r} is not in it once"
        source = source.replace(old, new)
    return source


def in_namespaces(sources):
    """Put all sources into one file, to read headers only once; `choose(i)` selects one of them."""
    text, cases = "static int chosen;\n", ""
    for i, source in enumerate(sources):
        source = source.replace('extern "C" ', "").replace("extern __shared__ float4 shared[];", "")
        text += f"namespace n{i} {{\n#line 1\n{source}\n}}\n#undef HEAD_SIZES\n"
        call = f"n{i}::cache_append_attention(dtype, D, rung, (n{i}::Args *)a, s)"
        cases += f"if (chosen == {i}) return {call};\n"
    return (
        text
        + f"""extern "C" {{
        void choose(int i) {{ chosen = i; }}
        int cache_append_ready() {{ return 0; }}
        int cache_append_args_size() {{ return n0::cache_append_args_size(); }}
        const char *cache_append_error(int code) {{ return n0::cache_append_error(code); }}
        int cache_append_attention(int dtype, int D, int rung, void *a, void *s)
        {{ {cases} return 1; }} }}"""
    )


@pytest.fixture(scope="session")
def bugs(tmp_path_factory):
    """All of BUGS, and last the unchanged source; float with heads of 24, bfloat16 with 64."""
    folder = tmp_path_factory.mktemp("bugs")
    source = in_namespaces([planted(edits) for edits in [*BUGS.values(), []]])
    source = source.replace("launch_for<__half>", "launch_for<float>")
    source = source.replace("launch_for<__nv_bfloat16>(D, ", "launch<__nv_bfloat16, 64>(")
    source = source.replace("X(24) X(40) X(64) X(128)", "X(24)")
    (folder / "bugs.cu").write_text(source)
    return emulate(folder / "bugs.cu", folder / "bugs.so")


def is_found(bugs, number, seed) -> bool:
    """Whether any case fails, with threads and thread blocks in order (seed 0) or shuffled."""
    code = ctypes.CDLL(str(bugs.path))
    code.choose(number)
    code.emulation_shuffle(seed)
    try:
        for case, ops in BUG_CASES:
            for op in ops:
                dtype = torch.bfloat16 if op == "tensor_cores" else torch.float32
                check_stream(case, dtype, "cpu", op)
    except (AssertionError, RuntimeError):
        return True
    finally:
        code.emulation_shuffle(0)
    return False


@needs_gxx
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name, bugs, monkeypatch):
    """With threads and thread blocks in order, or in one of three random orders."""
    monkeypatch.setattr(kernel, "emulated", bugs)
    number = list(BUGS).index(name)
    assert any(is_found(bugs, number, seed) for seed in range(4))


@needs_gxx
def test_without_a_bug_none_is_found(bugs, monkeypatch):
    """The same cases in the same orders."""
    monkeypatch.setattr(kernel, "emulated", bugs)
    assert not any(is_found(bugs, len(BUGS), seed) for seed in range(4))


# ---- sanitizers ----


def sanitize(sanitizer, folder, source=library.SOURCE):
    """Build and run tests/sanitize.cpp: -> exit status and messages of the sanitizer."""
    options = ["-std=c++17", "-g", "-O1", "-DEMULATION_THREADS", f"-fsanitize={sanitizer}"]
    options += [f'-DSOURCE="{source}"', "-fno-sanitize-recover=all"]
    command = ["g++", *options, str(HERE / "sanitize.cpp"), "-o", str(folder / "sanitize")]
    subprocess.run(command, check=True)
    result = subprocess.run([folder / "sanitize"], capture_output=True, text=True)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel of Linux")
    return result.returncode, result.stderr


@needs_gxx
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizers_find_nothing(sanitizer, tmp_path):
    """No race between barriers, no byte out of bounds, no misaligned load."""
    assert sanitize(sanitizer, tmp_path) == (0, "")


SEEN = {
    "no barrier after the queries": ("thread", "data race"),
    "no barrier before the merge": ("thread", "data race"),
    "no barrier before the merge (tensor cores)": ("thread", "data race"),
    "no barrier in the norm": ("thread", "data race"),
    "no barrier between scores and values": ("thread", "data race"),
    "rows beyond the last are written": ("address,undefined", "heap-buffer-overflow"),
    "queries beyond the last are read": ("address,undefined", "heap-buffer-overflow"),
    "too few parts": ("address,undefined", "heap-buffer-overflow"),
    "a load at half its alignment": ("address,undefined", "misaligned address"),
}
UNSAFE = {  # only a sanitizer may run these
    "rows beyond the last are written": [("if (first_query + r >= head.Q) return;", "")],
    "queries beyond the last are read": [("if (8 * i + g < head.Q) run", "run")],
    "too few parts": [("(blockIdx.x * rows + row)", "((blockIdx.x + 1) * rows + row)")],
    "a load at half its alignment": [
        ("head.value(tile + j) +", "head.value(tile + j) + (j == 1) +")
    ],
}


@needs_gxx
@pytest.mark.slow
@pytest.mark.parametrize("name", SEEN)
def test_sanitizers_see_planted_bugs(name, tmp_path):
    """Every removed barrier is a race; accesses out of bounds or misaligned are named."""
    (tmp_path / "bug.cu").write_text(planted((BUGS | UNSAFE)[name]))
    sanitizer, complaint = SEEN[name]
    status, text = sanitize(sanitizer, tmp_path, tmp_path / "bug.cu")
    assert status != 0 and complaint in text


# ---- compute-sanitizer, on a GPU ----

OURS = (
    "_Z6appendI",
    "_Z6onlineI",
    "_Z12tensor_cores",
    "_Z7combine",
)  # how the names of our kernels begin; others are not watched
WATCH = """
import pathlib, sys
sys.path[:0] = sys.argv[2:]
import test_cache_append_attention as tests
tests.library.SOURCE = pathlib.Path(sys.argv[1])
tests.check_everything("cuda")
"""


def check_everything(device):
    """All cases and head sizes in every dtype, for compute-sanitizer."""
    heads = [case._replace(layout=name) for case in HEAD_CASES for name in ("split", "interleaved")]
    for op, dtype in itertools.product(("append", "online"), TOLERANCE):
        for case in [*CASES.values(), *heads]:
            check_stream(case, dtype, device, op, passes=1)
    for case in FEW_CASES.values():
        check_stream(case, torch.bfloat16, device, "tensor_cores", passes=1)


def watched(*program, options=()):
    """Run Python under compute-sanitizer: -> exit status and output of both."""
    command = ["compute-sanitizer", *options, "--target-processes", "application-only"]
    command += ["--launch-timeout", "120", sys.executable, "-c", *map(str, program)]
    # Every tensor is an allocation of its own. In PyTorch's memory pool, the byte after a tensor
    # may belong to another tensor, and accessing it would be allowed.
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=alone, timeout=300)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture(scope="session")
def can_be_watched():
    """Skip where compute-sanitizer is missing or may not watch the GPU, as in some sandboxes."""
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("no compute-sanitizer")
    _, text = watched("import torch; print(torch.zeros(1, device='cuda').tolist(), 'is alive')")
    if "[0.0] is alive" not in text:
        pytest.skip(f"compute-sanitizer cannot watch this GPU: {' '.join(text.split())[:300]}")


def sanitize_on_gpu(tool, folder, monkeypatch, source=library.SOURCE):
    """Run every case under a tool of compute-sanitizer: -> exit status and output."""
    monkeypatch.setattr(library, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    library.build(library.find_nvcc(), torch.cuda.get_device_capability())  # unwatched
    options = ["--tool", tool, "--error-exitcode", "1"]
    for name in OURS:
        options += ["--kernel-name", f"kernel_substring={name}"]
    if tool == "memcheck":
        options += ["--report-api-errors", "no", "--padding", "4096"]
    return watched(WATCH, source, ROOT, HERE, options=options)


@pytest.mark.slow
@needs_gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool, can_be_watched, tmp_path, monkeypatch):
    """All cases on the GPU: no access out of bounds, no race in shared memory, no lost barrier."""
    status, text = sanitize_on_gpu(tool, tmp_path, monkeypatch)
    assert status == 0, text[-2000:]


SEEN_ON_A_GPU = {
    "rows beyond the last are written": ("memcheck", "Invalid __global__ write"),
    "no barrier before the merge": ("racecheck", "Race reported between"),
}


@pytest.mark.slow
@needs_gpu
@pytest.mark.parametrize("name", SEEN_ON_A_GPU)
def test_compute_sanitizer_sees_planted_bugs(name, can_be_watched, tmp_path, monkeypatch):
    """The tools do watch our kernels, and know where a tensor ends."""
    (tmp_path / "bug.cu").write_text(planted((BUGS | UNSAFE)[name]))
    tool, complaint = SEEN_ON_A_GPU[name]
    status, text = sanitize_on_gpu(tool, tmp_path, monkeypatch, tmp_path / "bug.cu")
    assert status != 0 and complaint in text, text[-2000:]


# ---- the benchmark ----


@pytest.fixture
def bench(emulated_kernel, monkeypatch):
    """The benchmark as a module, with the emulated kernel."""
    spec = importlib.util.spec_from_file_location("bench", ROOT / "benchmarks/bench_attention.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(kernel, "emulated", emulated_kernel)
    return module


@needs_gxx
def test_the_benchmark_times_the_kernel(bench):
    """With a kernel, its rungs are also compared, and agree with PyTorch."""
    rate = {"operations": 1e12, "bytes": 1e12}
    with kernel.strict():  # also runs the operator that kv_cache.py chooses
        result = bench.bench(bench.TINY[0], torch.device("cpu"), rate, rounds=1, layers=1)
    timed = {key.removesuffix("_eager") for key in result if key.endswith("_eager")}
    assert timed == {"chain", "cat", "append", "online", "write"}
    assert result["chosen_by_kv_cache"] == "append"


@needs_gxx
@pytest.mark.parametrize("site", SITES)
def test_the_tensor_cores_are_timed_where_they_fit(site, bench):
    """With 25 queries of audio, in bfloat16."""
    shape = next(shape for shape in bench.full_shapes() if shape.site == site)
    arguments = bench.inputs(shape._replace(H=1, window=1), "cpu", torch.bfloat16)
    assert ("tensor_cores" in bench.ways(arguments)) == (site in ("audio_self", "v2a"))
