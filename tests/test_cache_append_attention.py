"""The CUDA kernel agrees with the PyTorch it replaces, with or without a GPU.

The same source is compiled twice: by nvcc for a GPU, and by g++ with tests/emulation.h, which runs
CUDA threads as fibers on the CPU. Both are called through the same wrapper, so that most tests
exist in two versions; those that need a GPU are skipped where there is none.

The truth is kv_cache.cache_append_attention in float64. Errors are relative to the largest output,
and each dtype may round a few times: inputs are exact, but new keys, queries and outputs are
rounded to it (float32 6e-8, float16 5e-4, bfloat16 4e-3), as in PyTorch.

    pytest tests/test_cache_append_attention.py              # about half a minute
    pytest tests/test_cache_append_attention.py -m slow      # nvcc for three GPUs, sanitizers
    pytest tests/test_cache_append_attention.py -m gpu       # on a GPU, compute-sanitizer too
"""

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
from helpers import PAPER, ROOT, block_rows, random_clip, random_model, random_text, tiny
from tape import Operators

import masks
import rope
from kernel import cache_append_attention as kernel
from kv_cache import (
    CachedView,
    Heads,
    MergedView,
    RollingCache,
    attention,
    cache_append_attention,
)
from model import draw_noise, join_projections
from self_forcing import rollout, whole_clip

HERE = Path(__file__).parent
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
EMULATE = ["g++", "-std=c++17", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-x", "c++"]
OPS = ("append", "fused")

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to emulate the kernel")
needs_nvcc = pytest.mark.skipif(kernel.find_nvcc() is None, reason="no nvcc to compile the kernel")
needs_gpu = pytest.mark.gpu  # skipped where there is none (conftest.py)
EMULATED_AND_REAL = [
    pytest.param("cpu", marks=needs_gxx, id="emulated"),
    pytest.param("cuda", marks=needs_gpu, id="gpu"),
]


def emulate(source, target, *options):
    """Compile a kernel source for the CPU."""
    include = ["-include", str(HERE / "emulation.h")]
    subprocess.run([*EMULATE, *options, *include, str(source), "-o", str(target)], check=True)
    return kernel.Kernel(target)


@pytest.fixture(scope="session")
def emulated_kernel(tmp_path_factory):
    return emulate(kernel.SOURCE, tmp_path_factory.mktemp("emulated") / "kernel.so", "-O2")


@pytest.fixture(params=EMULATED_AND_REAL)
def device(request, monkeypatch):
    """Where the kernel runs; without it, or with PyTorch instead, the test fails."""
    if request.param == "cpu":
        monkeypatch.setattr(kernel, "emulated", request.getfixturevalue("emulated_kernel"))
    kernel.require(request.param)
    return request.param


# ---- a stream through one cache, by the kernel and by PyTorch ----


class Case(NamedTuple):
    """One attention; the first block is block 0 or a later one, behind a past of random tokens."""

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
    one_turn: bool = False  # one row in the tables turns all tokens
    slices: bool = False  # raw q, k and v are slices of larger tensors, full of NaN elsewhere


CASES = {
    "wraps twice": Case(2, 2, 24, 5, 7, 9, ring=3, blocks=9, layout="interleaved"),
    "more queries than keys": Case(1, 2, 40, 17, 25, 33, ring=2),
    "forgets its prefix": Case(1, 3, 24, 3, 5, 4, ring=2, pinned=False),
    "one query": Case(1, 2, 64, 3, 5, 1, ring=3, first_block=2, blocks=3, layout="interleaved"),
    "one key": Case(1, 1, 24, 1, 1, 8, ring=2, layout=None),
    "widest head": Case(1, 1, 128, 4, 31, 17, ring=2, first_block=1, blocks=2, layout=None),
    "tiles for all warps and more": Case(1, 1, 64, 9, 32, 8, ring=9, first_block=20, blocks=2),
    "all tokens turned alike": Case(1, 2, 40, 2, 3, 5, ring=2, blocks=3, one_turn=True),
    "slices": Case(2, 2, 24, 5, 7, 9, ring=2, blocks=3, slices=True),
}
HEAD_CASES = [  # every size that the kernel has
    Case(1, H, D, 3, 6, 7, ring=2, first_block=1, blocks=2)
    for H, D in ((2, 24), (1, 40), (2, 64), (1, 128))
]


class Stream:
    """The same random blocks through two caches: the kernel's in its dtype, PyTorch's in float64.

    Slots that were never written hold NaN in the kernel's cache, so reading one shows.
    """

    def __init__(self, case, dtype=torch.float32, device="cpu", seed=0):
        self.case, self.dtype, self.device = case, dtype, device
        torch.manual_seed(seed)
        self.weights = [self.random(case.H * case.D).abs() + 0.5 for _ in range(2)]
        self.mine, self.truth = self.cache(), self.cache()
        slots = case.prefix + case.ring * case.T
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
                cache.first = cache.prefix_tokens

    def table(self, tokens):
        if self.case.layout is None:
            return None
        rows = 1 if self.case.one_turn else tokens
        angles = 3 * torch.randn(rows, self.case.H * self.case.D // 2)
        cos, sin = (t.to(self.dtype).double() for t in (angles.cos(), angles.sin()))
        return rope.Rope(cos, sin, self.case.layout)

    def draw(self):
        """Raw q, k, v and heads of one pass, in float64."""
        c = self.case
        T = c.T if self.mine.block else c.prefix
        q, k, v = (self.random(c.B, n, c.H * c.D) for n in (c.Q, T, T))
        return q, k, v, Heads(c.H, 1e-6, *self.weights, self.table(c.Q), self.table(T))

    def to_kernel(self, x):
        """Tensors, tables and heads in the kernel's dtype and on its device."""
        if isinstance(x, torch.Tensor):
            return x.to(self.device, self.dtype)
        return type(x)(*map(self.to_kernel, x)) if isinstance(x, tuple) else x

    def run(self, op, inputs):
        """The kernel's answer; after `append` the CPU attends, in float64, to what it left."""
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
        """Values are copied bit by bit, keys are rounded once, nothing else was touched."""
        n = self.truth.num_filled
        k, v = self.mine.k.double().cpu(), self.mine.v.double().cpu()
        assert torch.equal(v[:, :n], self.truth.v[:, :n])
        tolerance = TOLERANCE[self.dtype] * self.truth.k[:, :n].abs().max()
        assert (k[:, :n] - self.truth.k[:, :n]).abs().max() <= tolerance
        assert k[:, n:].isnan().all() and v[:, n:].isnan().all()


def as_slice(x):
    """The same tokens inside a larger tensor: behind a row, between other channels."""
    B, T, C = x.shape
    larger = x.new_full((B, T + 1, 3 * C), torch.nan)
    larger[:, 1:, C : 2 * C] = x
    return larger[:, 1:, C : 2 * C]


def check_stream(case, dtype, device, op, passes=2):
    """Every block of a case agrees, and leaves the cache as it should; -> the largest error."""
    stream, worst = Stream(case, dtype, device), 0.0
    for block in range(case.blocks):
        worst = max(worst, stream.error(op, passes))
        assert worst <= TOLERANCE[dtype], f"block {block}: relative error {worst}"
        stream.check_slots()
        if block < case.blocks - 1:
            stream.next_block()
    return worst


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_agrees_with_pytorch_block_by_block(name, op, device):
    """Partial fill, turning ring, repeated passes, odd sizes, Q != T: outputs and every slot."""
    check_stream(CASES[name], torch.float32, device, op)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["split", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_both_rotary_layouts(dtype, layout, op, device):
    """16-bit types take wider loads of pairs, at all head sizes."""
    for case in HEAD_CASES:
        check_stream(case._replace(layout=layout), dtype, device, op, passes=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_rounds_no_more_than_pytorch(dtype, device):
    """PyTorch in the same dtype also rounds between norm and rotation."""
    stream = Stream(CASES["more queries than keys"], dtype, device)
    inputs = stream.draw()
    truth = cache_append_attention(*inputs, stream.truth)
    mine = stream.run("fused", inputs)
    q, k, v, heads = (stream.to_kernel(x) for x in inputs)
    keys, values = stream.cache().append(heads.keys(k), heads.split(v))
    pytorch = attention(heads.queries(q), keys, values).double().cpu()
    assert (mine - truth).abs().mean() <= 1.1 * (pytorch - truth).abs().mean()


def test_a_full_size_second_of_audio(device):
    """25 queries, heads of 64, sinks and prefix of 17, a window of 5 seconds, bfloat16."""
    case = Case(1, 2, 64, 17, 25, 25, ring=6, first_block=9, blocks=1, layout="interleaved")
    check_stream(case, torch.bfloat16, device, "fused", passes=1)


# ---- inside the model ----


def stream_model(cfg, device, blocks=4):
    """Velocities of every block of a random clip, window 1: the prefix is moved twice."""
    net = random_model(cfg, torch.float32)
    text = torch.randn(1, 3, cfg.caption_width)
    clip = random_clip(cfg, blocks, dtype=torch.float32)
    net, view = net.to(device), CachedView(cfg, blocks, window=1)
    text, sigma = net.project_text(text.to(device)), torch.full((1,), 0.5, device=device)
    velocities = []
    for k in range(blocks):
        tokens = [x[:, rows].to(device) for x, rows in zip(clip, block_rows(k, cfg))]
        velocities += net(*tokens, sigma, sigma, text, masks.block_span(k, cfg), view)
        view.next_block()
    return [v.cpu() for v in velocities]


@pytest.mark.parametrize("few, chosen", [(64, "fused"), (3, "append")])
def test_a_stream_of_the_model_by_kernel_and_by_pytorch(few, chosen, device, monkeypatch):
    """All four attentions at the toy's head sizes; the hook takes one launch for few tokens."""
    cfg = tiny(PAPER, num_layers=1, num_heads=1, video_width=40, audio_width=24)
    calls, operator = [], getattr(kernel, chosen)
    monkeypatch.setattr(kernel, "FEW", few)
    monkeypatch.setattr(kernel, chosen, lambda *x: calls.append(chosen) or operator(*x))
    actual = stream_model(cfg, device)
    assert len(calls) == 4 * 4  # attentions of a layer, blocks
    monkeypatch.setattr(kernel, "supports", lambda *_: False)
    expected = stream_model(cfg, device)  # elsewhere an angle of 500 rad is off by its last digit
    near = 1e-5 if device == "cpu" else 1e-4  # there SDPA multiplies float32 in pieces of 11 bits
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=near, rtol=near)


@pytest.mark.parametrize("few, chosen", [(64, "fused"), (3, "append")])
def test_joined_and_merged_passes_hand_slices_to_the_kernel(few, chosen, device, monkeypatch):
    """The kernel takes them as they are, two attentions of every site in a merged pass."""
    cfg = tiny(PAPER, num_layers=1, num_heads=1, video_width=40, audio_width=24)
    calls, operator = [], getattr(kernel, chosen)
    monkeypatch.setattr(kernel, "FEW", few)
    monkeypatch.setattr(kernel, chosen, lambda *x: calls.append(x[0]) or operator(*x))

    @torch.no_grad()
    def clip():
        net = random_model(cfg, torch.float32).to(device)
        join_projections(net)
        text = random_text(net, cfg)
        g = torch.Generator().manual_seed(0)
        blocks = rollout(net, lambda k: text, 4, (1.0, 0.5, 0.0), g, window=1, merge=True)
        return whole_clip(blocks)

    actual = clip()
    assert len(calls) == 4 * (2 + 3 * 3)  # block 0 takes two passes, then one over two and one
    assert any(not q.is_contiguous() for q in calls)
    monkeypatch.setattr(kernel, "supports", lambda *_: False)
    for one, other in zip(actual, clip(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


COPIES = {"aten::cat", "aten::stack", "aten::clone", "aten::_to_copy", "aten::repeat"}


def copies_of_a_pass(layers, merge, joined):
    """Tensors copied whole in one pass with a full window: by operator."""
    cfg = tiny(PAPER, num_layers=layers, num_heads=1, video_width=40, audio_width=24)
    net = random_model(cfg, torch.float32)
    if joined:
        join_projections(net)
    view, seen = CachedView(cfg, 8, window=1), Operators()
    with torch.no_grad():
        text = random_text(net, cfg)
        for k in range(5):
            span = masks.block_span(k, cfg)
            if merge and k == 4:
                span = masks.block_span(3, cfg).then(span)
            x = draw_noise(1, span, cfg, None)
            level, on = torch.ones(1), view
            if k == 4:
                on = MergedView(view) if merge else view
                seen.__enter__()
            net(*x, level, level, text, span, on)
            if k < (3 if merge else 4):
                view.next_block()
    seen.__exit__(None, None, None)
    return Counter({name: n for name, n in seen.counts.items() if name in COPIES})


@needs_gxx
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("merge", [False, True])
def test_a_layer_copies_no_tensor(merge, joined, emulated_kernel, monkeypatch):
    """With the kernel (emulated): nothing is concatenated or cloned in a layer. A merged pass
    puts its two answers together, once for each attention, and moves its pinned keys."""
    monkeypatch.setattr(kernel, "emulated", emulated_kernel)
    found = copies_of_a_pass(2, merge, joined) - copies_of_a_pass(1, merge, joined)
    moved = 4 * merge  # rope.rotate of the pinned keys
    assert found == Counter({"aten::cat": 4 * merge + moved} if merge else {})


def test_under_autograd_pytorch_runs(device):
    """The hook records gradients; the operator itself refuses tensors that ask for them."""
    stream = Stream(CASES["all tokens turned alike"], device=device)
    q, k, v, heads = (stream.to_kernel(x) for x in stream.draw())
    q.requires_grad_()
    assert not kernel.supports(q, k, v, heads)
    cache_append_attention(q, k, v, heads, stream.mine).sum().backward()
    assert q.grad.abs().max() > 0
    with pytest.raises(ValueError, match="q requires grad, which the kernel does not record"):
        kernel.fused(q, k, v, heads, stream.mine)
    with torch.no_grad():
        assert kernel.supports(q, k, v, heads)


def in_float64(q, k, v, heads):
    weights = dict(q_weight=heads.q_weight.double(), k_weight=heads.k_weight.double())
    return q.double(), k.double(), v.double(), heads._replace(**weights)


UNSUPPORTED = {  # what becomes of q, k, v and heads, and why PyTorch must do it then
    "float64": (in_float64, "it would take torch.float64"),
    "mixed": (lambda q, k, v, heads: (q, k, v, heads._replace(k_weight=heads.k_weight.half())),
              "it would take torch.float16, torch.float32"),
    "head size": (lambda q, k, v, heads: (q, k, v, heads._replace(count=4)), "heads of 20"),
    "strides": (lambda q, k, v, heads: (q, k, v.mT.contiguous().mT, heads), "not of whole rows"),
    "gradient": (lambda q, k, v, heads: (q.requires_grad_(), k, v, heads), "a gradient is asked"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_the_kernel_does_not_support_is_left_to_pytorch(name, device):
    """Another dtype or head size, a gradient, strides; within `strict` it is an error, and why."""
    change, reason = UNSUPPORTED[name]
    stream = Stream(CASES["all tokens turned alike"]._replace(layout=None), device=device)
    inputs = [stream.to_kernel(x) for x in stream.draw()]
    assert kernel.supports(*inputs)
    inputs = change(*inputs)
    assert not kernel.supports(*inputs)
    with kernel.strict(), pytest.raises(ValueError, match=f"PyTorch would have to .*{reason}"):
        cache_append_attention(*inputs, stream.cache())
    assert not kernel.supports(*inputs)


def test_within_strict_nothing_falls_back_for_want_of_a_kernel(monkeypatch):
    """It is an error, unless nothing runs (meta) or `strict` is told to stand back."""
    monkeypatch.setattr(kernel, "emulated", None)
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
    """Valid arguments of both operators, by name."""
    shapes = dict(q=(B, Q, H * D), q_weight=(H * D,))
    shapes |= {name: (Q, H * D // 2) for name in ("q_cos", "q_sin")}
    shapes |= dict(k=(B, T, H * D), k_weight=(H * D,))
    shapes |= {name: (T, H * D // 2) for name in ("k_cos", "k_sin")}
    shapes |= dict(v=(B, T, H * D), k_cache=(B, N, H, D), v_cache=(B, N, H, D))
    tensors = {name: torch.randn(s, dtype=dtype, device=device) for name, s in shapes.items()}
    return tensors | dict(first=0, filled=10, start=5, split=True, eps=1e-6)


def operator(op):
    return getattr(torch.ops.omniforcing, op)


@pytest.mark.parametrize("op", OPS)
def test_the_schema_is_true(op, device):
    """What is written is declared, the fake shapes are right, torch.compile may use it."""
    result = torch.library.opcheck(operator(op).default, tuple(arguments(device).values()))
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
    "width": (lambda a: arguments(a["q"].device, H=400), "400 heads of 24 are too wide"),
    "no tokens": (lambda a: {**a, "q": a["q"][:, :0]}, "with a token at least"),
    "tables": (lambda a: {**a, "k_sin": a["k_sin"][:2]}, r"k_sin is \(2, 24\), expected \(5, 24\)"),
    "turns": (lambda a: {**a, "q_cos": a["q_cos"][:1]}, r"q_sin is \(3, 24\), expected \(1, 24\)"),
    "no sine": (lambda a: {**a, "k_sin": None}, "give all four or none"),
    "values": (lambda a: {**a, "v": a["v"][:, :4]}, r"v is \(1, 4, 48\), expected \(1, 5, 48\)"),
    "cache": (lambda a: {**a, "v_cache": a["v_cache"][:, 1:]}, "v_cache is .* expected"),
    "strides": (lambda a: {**a, "q": a["q"].mT.contiguous().mT}, "q is not of whole rows"),
    "rows": (lambda a: {**a, "v": torch.zeros(1, 5, 49, device=a["q"].device)[..., :48]},
             "v is not of whole rows"),
    "weights": (lambda a: {**a, "k_weight": torch.zeros(96, device=a["q"].device)[::2]},
                "k_weight is not contiguous"),
    "alignment": (lambda a: {**a, "q": torch.zeros(145, device=a["q"].device)[1:].view(1, 3, 48)},
                  "q does not start at a multiple of 16 bytes"),
    "slots": (lambda a: {**a, "start": 6}, r"slots \[6, 11\) .* within .* \[0, 10\) of 15"),
    "first": (lambda a: {**a, "first": 6}, "do not lie within"),
    "beyond": (lambda a: {**a, "filled": 16}, "do not lie within"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_c_would_misread_are_refused_in_one_line(name, device):
    """The message names the argument, what it is and what was expected; nothing is written."""
    change, message = WRONG[name]
    wrong = change(arguments(device))
    before = wrong["k_cache"].clone()
    for op in OPS:
        with pytest.raises(ValueError, match=message) as error:
            operator(op)(*wrong.values())
        assert "\n" not in str(error.value)
    assert torch.equal(wrong["k_cache"], before)


def test_a_struct_of_another_size_is_refused(emulated_kernel, monkeypatch):
    """A field added on one side only would shift all that follow."""

    class Longer(ctypes.Structure):
        _fields_ = [*kernel.Args._fields_, ("more", ctypes.c_int64)]

    monkeypatch.setattr(kernel, "Args", Longer)
    with pytest.raises(RuntimeError, match="Args has 192 bytes, here 200"):
        kernel.Kernel(emulated_kernel.path)


def test_a_cuda_error_is_raised(device):
    """More new keys than a block's shared memory can hold: the launch is refused, loudly."""
    many = arguments(device, D=128, T=500, N=600) | dict(filled=550)
    with pytest.raises(RuntimeError, match="CUDA error 1: invalid argument"):
        operator("fused")(*many.values())


# ---- which path runs ----


def test_without_a_kernel_the_path_says_why(monkeypatch):
    """No GPU, no compiler, a failed build: each is told, and `require` refuses."""
    monkeypatch.setattr(kernel, "emulated", None)
    assert kernel.path("cpu") == "PyTorch: no GPU"
    with pytest.raises(ValueError, match=r"^the CUDA kernel cannot run here \(no GPU\)$"):
        kernel.require("cpu")
    with pytest.raises(ValueError, match="no GPU"):
        operator("fused")(*arguments("cpu").values())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel.path() == "PyTorch: no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernel, "find_nvcc", lambda: None)
    assert kernel._find.__wrapped__(0) == "no nvcc"


def test_a_failed_build_is_told_and_pytorch_runs(monkeypatch, capsys, tmp_path):
    """What the compiler said goes to stderr; nothing is left in the cache folder."""
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && echo 1 || { echo oh no >&2; exit 3; }\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel, "find_nvcc", lambda: str(compiler))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert "oh no" in kernel._find.__wrapped__(0)
    assert "PyTorch runs instead" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.so"))


# ---- compiled by nvcc ----

ONE_SIZE = "-DHEAD_SIZES(X)=X(64)"  # compiles three times as fast as all


@needs_nvcc
def test_the_real_library_builds_once_and_fails_loudly_without_a_gpu(monkeypatch, tmp_path, capsys):
    """Cached by what it depends on; a launch without a driver is an error, not silence."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel, "FLAGS", [*kernel.FLAGS, ONE_SIZE])
    path = kernel.build(kernel.find_nvcc(), (9, 0))
    assert kernel.build(kernel.find_nvcc(), (9, 0)) == path
    assert capsys.readouterr().err.count("compiling") == 1
    assert [p.name for p in tmp_path.rglob("*.so")] == [path.name]
    real = kernel.Kernel(path)
    if torch.cuda.is_available():
        pytest.skip("built, but there is a GPU: no launch without a driver")
    with pytest.raises(RuntimeError, match="CUDA error 35"):
        real.check_ready()
    monkeypatch.setattr(kernel, "emulated", real)
    for op in OPS:
        with pytest.raises(RuntimeError, match="CUDA error 35: CUDA driver version is insuff"):
            operator(op)(*arguments("cpu", D=64).values())


def registers(arch, folder, *options):
    """What ptxas says of every kernel: [(spilled bytes, registers)]."""
    command = [kernel.find_nvcc(), "-std=c++17", "-O3", "-cubin", "-Xptxas", "-v", *options]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", str(kernel.SOURCE)]
    command += ["-o", str(folder / "kernel.cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill stores", text)
    return list(zip(map(int, spills), map(int, re.findall(r"Used (\d+) registers", text))))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90])
def test_no_register_is_spilled(arch, tmp_path):
    """Two kernels, three dtypes, four head sizes: all compile, and all fit the registers."""
    found = registers(arch, tmp_path)
    assert len(found) == 2 * 3 * len(kernel.HEAD_SIZES)
    assert all(spilled == 0 for spilled, _ in found)


@needs_gpu
@pytest.mark.parametrize("op", OPS)
def test_a_captured_launch_replays(op):
    """Under a CUDA graph the same launch serves new inputs in the same memory."""
    kernel.require()
    stream = Stream(CASES["more queries than keys"], device="cuda")
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
APPEND_K = "*k = head_of(a.k_cache, a.N, a.start + t) + c"
MERGE = "block.leave_for_merge(run);\n    __syncthreads();"
LEAVE = "void leave_for_merge(const Running &run) const {"
BUGS = {
    "keys beyond the last take part": [("valid ? S[r] : -INFINITY", "S[r]")],
    "slots being overwritten are read": [
        ("a.first + j < a.start ? a.first + j : a.first + j + T", "a.first + j")
    ],
    "one slot is read twice": [("a.first + j < a.start ?", "a.first + j <= a.start ?")],
    "a forgotten prefix is still read": [
        ("a.first + j < a.start ? a.first + j : a.first + j + T", "j < a.start ? j : j + T")
    ],
    "new keys are read back from the cache": [
        (": new_k + (j - num_old) * D", ": head_of(a.k_cache, a.N, a.start + j - num_old)")
    ],
    "new keys are read back, in order only if block 0 is first": [
        (": new_k + (j - num_old) * D", ": head_of(a.k_cache, a.N, a.start + j - num_old)"),
        ("int i = blockIdx.x * threads + threadIdx.x", "int i = blockIdx.x ? T * D : threadIdx.x"),
        ("i += gridDim.x * threads", "i += threads"),
        ("block.append_new();", "block.append_new(); __syncthreads();"),
    ],
    "keys appended one place further (append)": [
        ("a.start + token;", "a.start + (token + 1) % raw.tokens;")
    ],
    "keys appended one place further (fused)": [
        (APPEND_K, APPEND_K.replace("+ t)", "+ (t + 1) % T)"))
    ],
    "only the first blocks append": [("i += gridDim.x * threads", "i += T * D")],
    "the other rotary layout": [("bool split = a.split", "bool split = !a.split")],
    "rotation the wrong way": [("x.b[j] * c + x.a[j] * s", "x.b[j] * c - x.a[j] * s")],
    "all tokens turned by the first angle": [("raw.turns == 1 ? 0 : token", "0")],
    "values normed as well": [("if (which != 2)", "if (true)")],
    "norm per head (append)": [("sum / width + a.eps", "sum / D + a.eps")],
    "norm per head (fused)": [
        ("inverse_rms(head - h * D, width, a.eps)", "inverse_rms(head, D, a.eps)")
    ],
    "no weight in the norm": [("x.b[j] *= inverse_rms * w.b[j]", "x.b[j] *= inverse_rms")],
    "every clip reads the first one": [("((size_t)b * tokens + token)", "((size_t)token)")],
    "every clip is the first one": [("+ b * rows.clip", "+ 0 * b")],
    "rows taken for neighbours (append)": [
        (
            "row_of<scalar>(which == 2 ? a.v : raw.rows, blockIdx.y, token)",
            "((const scalar *)(which == 2 ? a.v : raw.rows).x + row * width)",
        ),
    ],
    "rows taken for neighbours (fused)": [
        (
            "const scalar *head = head_of(raw.rows, token)",
            "const scalar *head = head_of(raw.rows.x, raw.tokens, token)",
        )
    ],
    "values taken for neighbours": [("head_of(a.v, t) + c", "head_of(a.v.x, T, t) + c")],
    "no 1 / sqrt(D)": [("1.44269504f / sqrtf(D)", "1.44269504f")],
    "exp2 taken for exp": [("1.44269504f / sqrtf(D)", "1 / sqrtf(D)")],
    "output not rescaled": [("run.O[r][c] *= shrink", "run.O[r][c] *= 1")],
    "sum not rescaled": [("run.l[r] * shrink", "run.l[r]")],
    "warps merged without their maxima": [("exp2f(m[w * ROWS + r] - top)", "1")],
    "half a warp is summed": [("step; step /= 2) x += ", "step > 1; step /= 2) x += ")],
    "shared memory too small": [("WARPS * ROWS * (D + 2);", "WARPS * ROWS * D;")],
    "no barrier after the new keys": [
        ("block.prepare_new_keys();\n    __syncthreads();", "block.prepare_new_keys();")
    ],
    "no barrier before the merge": [(MERGE, "block.leave_for_merge(run);")],
    "no barrier in the norm": [("= sum;\n        __syncthreads();", "= sum;")],
    "no barrier between scores and values": [("__syncwarp();  // from lanes", "// from lanes")],
    "a warp passes the barrier by": [
        (MERGE, MERGE.replace("__sync", "if (threadIdx.x / WARP != 1) __sync"))
    ],
    "lanes missing from a shuffle": [(LEAVE, LEAVE + " if (lane * C >= D) return;")],
}

BUG_CASES = (
    Case(2, 2, 24, 5, 7, 9, ring=2, blocks=4, layout="interleaved", slices=True),
    Case(1, 2, 24, 3, 70, 8, ring=4, first_block=6, blocks=1, pinned=False),
)


def planted(edits):
    """The kernel's source with a bug."""
    source = kernel.SOURCE.read_text()
    for old, new in edits:
        assert source.count(old) == 1, f"the source has changed: {old!r} is not in it once"
        source = source.replace(old, new)
    return source


def in_namespaces(sources):
    """One translation unit of many kernels, chosen by `choose(i)`: headers are read only once."""
    text, cases = "static int chosen;\n", ""
    for i, source in enumerate(sources):
        source = source.replace('extern "C" ', "").replace("extern __shared__ float4 shared[];", "")
        text += f"namespace n{i} {{\n#line 1\n{source}\n}}\n#undef HEAD_SIZES\n"
        call = f"n{i}::cache_append_attention(dtype, D, whole, (n{i}::Args *)a, s)"
        cases += f"if (chosen == {i}) return {call};\n"
    return (
        text
        + f"""extern "C" {{
        void choose(int i) {{ chosen = i; }}
        int cache_append_ready() {{ return 0; }}
        int cache_append_args_size() {{ return n0::cache_append_args_size(); }}
        const char *cache_append_error(int code) {{ return n0::cache_append_error(code); }}
        int cache_append_attention(int dtype, int D, int whole, void *a, void *s)
        {{ {cases} return 1; }} }}"""
    )


@pytest.fixture(scope="session")
def bugs(tmp_path_factory):
    """All of BUGS, and last of all the source as it is."""
    folder = tmp_path_factory.mktemp("bugs")
    source = in_namespaces([planted(edits) for edits in [*BUGS.values(), []]])
    for line in ("launch_for<__half>", "launch_for<__nv_bfloat16>"):  # compile float only
        source = source.replace(line, "launch_for<float>")
    source = source.replace("X(24) X(40) X(64) X(128)", "X(24)")
    (folder / "bugs.cu").write_text(source)
    return emulate(folder / "bugs.cu", folder / "bugs.so", "-O1")


def is_found(library, number, seed) -> bool:
    """Whether any case fails, with threads and blocks in order (seed 0) or shuffled."""
    code = ctypes.CDLL(str(library.path))
    code.choose(number)
    code.emulation_shuffle(seed)
    try:
        for case in BUG_CASES:
            for op in OPS:
                check_stream(case, torch.float32, "cpu", op)
    except (AssertionError, RuntimeError):
        return True
    finally:
        code.emulation_shuffle(0)
    return False


@needs_gxx
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name, bugs, monkeypatch):
    """With threads and blocks in order, or in one of three random orders."""
    monkeypatch.setattr(kernel, "emulated", bugs)
    number = list(BUGS).index(name)
    assert any(is_found(bugs, number, seed) for seed in range(4))


@needs_gxx
def test_without_a_bug_none_is_found(bugs, monkeypatch):
    """The same cases in the same orders."""
    monkeypatch.setattr(kernel, "emulated", bugs)
    assert not any(is_found(bugs, len(BUGS), seed) for seed in range(4))


# ---- sanitizers ----


def sanitize(sanitizer, folder, source=kernel.SOURCE):
    """Build and run tests/sanitize.cpp: -> exit status and what the sanitizer said."""
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
    "no barrier after the new keys": ("thread", "data race"),
    "no barrier before the merge": ("thread", "data race"),
    "no barrier in the norm": ("thread", "data race"),
    "no barrier between scores and values": ("thread", "data race"),
    "rows beyond the last are written": ("address,undefined", "heap-buffer-overflow"),
    "a load at half its alignment": ("address,undefined", "misaligned address"),
}
UNSAFE = {  # only a sanitizer may run these
    "rows beyond the last are written": [("if (first_row + r >= Q) return;", "")],
    "a load at half its alignment": [
        ("head_of(a.v, j - num_old)", "head_of(a.v, j - num_old) + 1")
    ],
}


@needs_gxx
@pytest.mark.slow
@pytest.mark.parametrize("name", SEEN)
def test_sanitizers_see_planted_bugs(name, tmp_path):
    """Every removed barrier is a race; what is out of bounds or misaligned is named."""
    (tmp_path / "bug.cu").write_text(planted((BUGS | UNSAFE)[name]))
    sanitizer, complaint = SEEN[name]
    status, text = sanitize(sanitizer, tmp_path, tmp_path / "bug.cu")
    assert status != 0 and complaint in text


# ---- compute-sanitizer, on a GPU ----

OURS = ("_Z6appendI", "_Z5fusedI")  # names of our kernels begin so; libraries' are not watched
WATCH = """
import pathlib, sys
sys.path[:0] = sys.argv[2:]
import test_cache_append_attention as tests
tests.kernel.SOURCE = pathlib.Path(sys.argv[1])
tests.check_everything("cuda")
"""


def check_everything(device):
    """All cases and head sizes in every dtype: what compute-sanitizer watches."""
    heads = [case._replace(layout=name) for case in HEAD_CASES for name in ("split", "interleaved")]
    for op, dtype in itertools.product(OPS, TOLERANCE):
        for case in [*CASES.values(), *heads]:
            check_stream(case, dtype, device, op, passes=1)


def watched(*program, options=()):
    """Run Python under compute-sanitizer: -> exit status and what both said.

    Every tensor is an allocation of its own: in PyTorch's pool the next byte would be a neighbour's
    and allowed.
    """
    command = ["compute-sanitizer", *options, "--target-processes", "application-only"]
    command += ["--launch-timeout", "120", sys.executable, "-c", *map(str, program)]
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=alone, timeout=300)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture(scope="session")
def can_be_watched():
    """Skips where programs may use the GPU but compute-sanitizer may not watch: some sandboxes."""
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("no compute-sanitizer")
    _, text = watched("import torch; print(torch.zeros(1, device='cuda').tolist(), 'is alive')")
    if "[0.0] is alive" not in text:
        pytest.skip(f"compute-sanitizer cannot watch this GPU: {' '.join(text.split())[:300]}")


def sanitize_on_gpu(tool, folder, monkeypatch, source=kernel.SOURCE):
    """Every case under a tool of compute-sanitizer: -> exit status and what it said."""
    monkeypatch.setattr(kernel, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    kernel.build(kernel.find_nvcc(), torch.cuda.get_device_capability())  # not under its eyes
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
    """It does look at our kernels, and knows where a tensor ends."""
    (tmp_path / "bug.cu").write_text(planted((BUGS | UNSAFE)[name]))
    tool, complaint = SEEN_ON_A_GPU[name]
    status, text = sanitize_on_gpu(tool, tmp_path, monkeypatch, tmp_path / "bug.cu")
    assert status != 0 and complaint in text, text[-2000:]


# ---- the benchmark ----


@pytest.fixture
def bench(emulated_kernel, monkeypatch):
    """The benchmark's script as a module, with the emulated kernel."""
    spec = importlib.util.spec_from_file_location("bench", ROOT / "benchmarks/bench_attention.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(kernel, "emulated", emulated_kernel)
    return module


@needs_gxx
def test_the_benchmark_times_the_kernel(bench):
    """With a kernel, both of its ways are compared as well, and agree with PyTorch."""
    rate = {"operations": 1e12, "bytes": 1e12}
    with kernel.strict():  # kv_cache.py's own choice runs as well
        result = bench.bench(bench.TINY[0], torch.device("cpu"), rate, rounds=1, repeats=1)
    assert {f"{way}_eager" for way in bench.WAYS} < set(result)
    assert result["chosen_by_kv_cache"] == "fused"


@needs_gxx
@pytest.mark.parametrize("site, dtype, fits", [
    ("audio_self", torch.bfloat16, True), ("v2a", torch.bfloat16, True),
    ("v2a", torch.float32, False), ("video_self", torch.bfloat16, False),
])  # fmt: skip
def test_the_benchmark_times_fused_where_its_keys_fit(site, dtype, fits, bench):
    """A head of V2A's new keys takes 170 of an H100's 227 KB, in bfloat16; video's do not fit."""
    shape = next(shape for shape in bench.full_shapes() if shape.site == site)
    arguments = bench.inputs(shape._replace(H=1, window=1), "cpu", dtype)
    assert bench.fits(arguments) == fits == ("fused" in bench.ways(arguments))
    assert kernel.are_few(*arguments[:2]) == (site == "audio_self")
