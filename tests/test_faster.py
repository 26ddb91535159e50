"""Recorded passes answer as passes do, and nothing in a pass waits, on a CPU as on a GPU.

Instead of CUDA graphs and streams there are stand-ins (tests/tape.py) that fail where those would.
On a GPU the real ones answer as well, with the CUDA kernel in them.
"""

import contextlib
import functools
from collections import Counter, deque
from unittest import mock

import pytest
import torch
from helpers import LAYOUTS, PAPER, layout_name, random_model, random_text, tiny
from tape import Operators, Side, Tape, TwoStreams

import generate
import model
import rollout
from full_size import faster
from kernel import cache_append_attention as kernel
from kv_cache import CachedView, attention

SIGMAS, WINDOW, BLOCKS = (1.0, 0.6, 0.0), 1, 8  # a ring of 2: full from block 3 on
PLACES = 4  # block 0, blocks 1 and 2 while the ring fills, its first place when it is full
CFG = tiny(PAPER, num_sinks=2, num_layers=1)


class Counting(faster.Recorded):
    """Counts what becomes of passes."""

    def __init__(self, net, recorder=lambda: Tape.record):
        self.counts = Counter()
        super().__init__(net, lambda: functools.partial(self._counted, recorder()))

    def _counted(self, record, function):
        self.counts["recorded"] += 1
        replay, outputs = record(function)
        return lambda: self.counts.update(["replayed"]) or replay(), outputs


@torch.no_grad()  # not inference mode, in which composite operators hide what they are made of
def stream(
    net, texts, switch_at=99, blocks=BLOCKS, seed=0, window=WINDOW, sigmas=SIGMAS, clips=1
):  # fmt: skip
    """Video and audio of a whole stream, with another prompt from a block on."""
    g, view = torch.Generator().manual_seed(seed), CachedView(net.cfg, blocks, window)
    return rollout.whole_clip(
        rollout.rollout(net, lambda k: texts[k >= switch_at], blocks, sigmas, g, clips, view)
    )


def with_texts(cfg):
    net = random_model(cfg)
    with torch.no_grad():
        return net, [random_text(net, cfg) for _ in range(2)]


def assert_bitwise(one, other):
    assert all(map(torch.equal, one, other))


# ---- recordings ----


@pytest.mark.parametrize("cfg", LAYOUTS[1:3], ids=layout_name)
def test_a_recorded_stream_is_the_same_bit_by_bit(cfg):
    """Every block, while the window fills, at each place for the first time, and replayed there
    with another past, other noise, levels and positions; the prompt changes along the way."""
    net, texts = with_texts(tiny(cfg, num_layers=1))
    recorded = Counting(net)
    assert_bitwise(stream(net, texts, 6, blocks=10), stream(recorded, texts, 6, blocks=10))
    assert recorded.counts["recorded"] == PLACES
    assert recorded.counts["replayed"] > recorded.counts["recorded"]


@torch.no_grad()
def test_a_recording_is_not_replayed_where_more_is_read():
    """A stream that pins nothing writes the slots of one that does, but reads fewer."""
    net, texts = with_texts(CFG)

    def clip(net, pinned):
        g, view = torch.Generator().manual_seed(0), CachedView(CFG, BLOCKS, WINDOW, pinned)
        return rollout.whole_clip(
            rollout.rollout(net, lambda k: texts[0], BLOCKS, SIGMAS, g, view=view)
        )

    recorded = Counting(net)
    for pinned in (True, False):
        assert_bitwise(clip(net, pinned), clip(recorded, pinned))


def test_after_a_warm_up_streams_are_only_replayed():
    """Two streams, another prompt in the middle, fewer passes, a short one: bitwise the plain ones,
    in the same memory, and no pass is recorded."""
    net, texts = with_texts(CFG)
    recorded = Counting(net)
    recorded.warm_up([torch.randn(1, 3, CFG.caption_width)], BLOCKS, WINDOW)
    assert recorded.counts.pop("recorded") == PLACES
    buffers = [(c.k, c.v) for c in recorded.view.caches]
    for changes in ({}, {"switch_at": 6, "seed": 1}, {"sigmas": (1.0, 0.0)}, {"blocks": 2}):
        assert_bitwise(stream(net, texts, **changes), stream(recorded, texts, **changes))
    assert recorded.counts["replayed"] and not recorded.counts["recorded"]
    caches = zip(recorded.view.caches, buffers, strict=True)
    assert all(cache.k is k and cache.v is v for cache, (k, v) in caches)


def test_a_stream_that_does_not_fit_is_recorded_anew():
    """More memory or more clips need other caches; a shorter window needs only other places."""
    net, texts = with_texts(CFG)
    recorded, counts = Counting(net), []
    for window in (2, 1, 3):
        plain = stream(net, texts, window=window)
        assert_bitwise(plain, stream(recorded, texts, window=window))
        counts.append(recorded.counts.pop("recorded"))
    assert counts == [6, 1, 8]  # with a ring of 2 instead of 3, only its return to the first place
    texts = [random_text(net, CFG, clips=2) for _ in range(2)]
    assert_bitwise(stream(net, texts, clips=2), stream(recorded, texts, clips=2))
    assert recorded.counts["recorded"] == PLACES


def test_of_two_streams_at_once_the_first_is_refused():
    """The second one has taken its caches: no wrong block comes out."""
    net, texts = with_texts(CFG)
    recorded = faster.Recorded(net, lambda: Tape.record)
    with torch.no_grad():
        first, second = (
            rollout.rollout(recorded, lambda k: texts[0], 5, SIGMAS, torch.Generator(), view=view)
            for view in (CachedView(CFG, 5, WINDOW), CachedView(CFG, 5, WINDOW))
        )
        next(first), next(second)
        with pytest.raises(ValueError, match="another stream has begun"):
            next(first)
        assert len(list(second)) == 4


def test_a_pass_that_carries_a_gradient_is_not_recorded():
    """The others of a rollout may be; blocks and gradient are the same bit by bit."""
    net, _ = with_texts(CFG)
    net.requires_grad_(True)
    found = []
    for model_ in (net, Counting(net)):
        g = torch.Generator().manual_seed(0)
        torch.manual_seed(1)
        text = random_text(net, CFG)
        view = CachedView(CFG, 5, window=1)
        blocks = list(rollout.rollout(model_, lambda k: text, 5, SIGMAS, g, view=view))
        weight = net.layers[0].video.self_attn.to_k.weight
        found.append((blocks[-1].video, *torch.autograd.grad(blocks[-1].video.sum(), weight)))
    assert_bitwise(*found)


@pytest.mark.parametrize("frozen", ["tables", "prompt", "level"])
def test_a_recording_that_keeps_an_input_is_noticed(frozen, monkeypatch):
    """Rotation tables, prompt or noise level stay those of the recording: the stream changes."""

    def run(self, inputs, span, view):
        latents, sigmas, ropes = inputs
        text = self.prompt if frozen == "prompt" else self.text
        if frozen == "tables":
            ropes = model.ropes_of(CFG, span, torch.device("cpu"), torch.float64)
        if frozen == "level":
            sigmas = [torch.full_like(s, float(s.max())) for s in sigmas]
        return self.net(*latents, *sigmas, text, span, view, ropes)

    net, texts = with_texts(CFG)
    monkeypatch.setattr(faster.Recorded, "_run", run)
    one, other = stream(net, texts, 6), stream(Counting(net), texts, 6)
    assert not all(map(torch.equal, one, other))


def test_recording_leaves_no_trace():
    """As with a CUDA graph: nothing is written until it is replayed, and then in the same place."""
    x, y = torch.ones(3), torch.zeros(2, 3)
    replay, (out,) = Tape.record(lambda: [y[1].add_(x) * 2])
    assert y.sum() == 0 and out.isnan().all()
    x.fill_(5)
    replay()
    assert y.tolist() == [[0] * 3, [5] * 3] and out.tolist() == [10] * 3


def test_a_warm_up_projects_its_prompt_as_a_stream_does():
    """In inference mode: in another mode, kernels of fp8 would be compiled again at the start."""
    net, modes = random_model(CFG, torch.float32), []
    recorded = Counting(net)
    recorded.project_text = lambda *features: (
        modes.append(torch.is_inference_mode_enabled()) or net.project_text(*features)
    )
    features = [torch.randn(1, 3, CFG.caption_width)]
    recorded.warm_up(features, 1, WINDOW)
    next(generate.stream(recorded, "x", 1, read=lambda _: features))
    assert modes == [True, True]


# ---- fused kernels ----


def fused_stream(monkeypatch, compiled, dtype):
    """Five blocks of a model, and of the same model with fused halves."""
    net = random_model(CFG, dtype)
    monkeypatch.setattr(faster, "fused", compiled)
    with torch.no_grad():
        texts = 2 * [random_text(net, CFG)]
    plain = stream(net, texts, blocks=5)
    faster.fuse(net)
    return plain, stream(net, texts, blocks=5)


def test_fused_halves_do_what_halves_do(monkeypatch):
    """In float64, if the functions are not compiled: rows and their order, sinks, both streams."""
    for x, y in zip(*fused_stream(monkeypatch, lambda function: function, torch.float64)):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_compiled_kernels_differ_by_rounding(monkeypatch):
    """In bfloat16, by the compiler for CPUs; a kernel rounds once, single operators after each."""
    for x, y in zip(*fused_stream(monkeypatch, faster.fused, torch.bfloat16)):
        assert (x - y).norm() <= 0.05 * x.norm()


# ---- attention in parts ----


@pytest.mark.parametrize("clips, keys", [(1, 12), (1, 13), (2, 12)])
def test_attention_in_parts_is_attention(monkeypatch, clips, keys):
    """One clip in parts; several clips, or keys that cannot be divided, at once."""
    monkeypatch.setattr(faster, "fused", lambda function: function)
    q, k, v = (torch.randn(clips, n, 2, 8, dtype=torch.float64) for n in (5, keys, keys))
    k[:, 2] *= 30  # one key has almost all of the weight, in one of the parts
    calls = []
    monkeypatch.setattr(faster, "joined", lambda *a, f=faster.joined: calls.append(a) or f(*a))
    torch.testing.assert_close(faster.attention_in_parts(q, k, v), attention(q, k, v))
    assert len(calls) == (clips == 1 and keys == 12)


def test_a_stream_in_parts_is_the_same(monkeypatch):
    """Video's self attention alone, at every number of filled slots, fused as well."""
    monkeypatch.setattr(faster, "fused", lambda function: function)
    cfg = tiny(PAPER, num_sinks=2, height=32, width=96)  # 3 tokens a frame
    net, texts = with_texts(cfg)
    plain, calls = stream(net, texts), []
    monkeypatch.setattr(faster, "joined", lambda *a, f=faster.joined: calls.append(a) or f(*a))
    for attend_faster in (faster.attend_in_parts, faster.fuse):
        attend_faster(net)
        for x, y in zip(plain, stream(net, texts)):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    # two streams, in which every block has a refresh but the last
    assert len(calls) == 2 * (BLOCKS * len(SIGMAS) - 1) * cfg.num_layers


# ---- two streams ----


def test_audio_beside_video_reads_nothing_too_early_and_frees_nothing_too_early():
    """A whole stream with a side stream, two layers: every order between the two is a wait."""
    net, texts = with_texts(tiny(PAPER, num_sinks=2))
    alone = stream(net, texts, blocks=5)
    with TwoStreams() as streams:
        faster.run_beside(net, Side(streams))
        assert_bitwise(alone, stream(net, texts, blocks=5))
    assert not streams.faults and streams.clock["side"] > 100


@pytest.mark.parametrize("missing", ["fork", "join", "kept"])
def test_a_missing_wait_is_noticed(missing):
    """Of audio for video, of video for audio; or memory is freed that audio still reads."""
    net, texts = with_texts(CFG)
    with TwoStreams() as streams:
        side = Side(streams)
        if missing == "kept":
            side.kept = deque(maxlen=0)
        else:
            setattr(side, missing, lambda step, *args: step(*args))
            streams.start = 0  # audio may then start where it did before
        faster.run_beside(net, side)
        stream(net, texts, blocks=1)
    expected = "used again" if missing == "kept" else "may not have written yet"
    assert any(expected in fault for fault in streams.faults)


@pytest.mark.parametrize("is_freed", [False, True])
def test_memory_that_is_reused_too_early_is_noticed(is_freed):
    """Memory that audio reads is freed before video, launched second, makes its tensors."""
    with TwoStreams() as streams:
        x = torch.zeros(3) + 1
        side = Side(streams)
        side.fork(lambda: None)
        streams.begin_side()
        y = 2 * x
        if is_freed:
            del x
        streams.stream = "main"  # which has not waited yet
        z = torch.zeros(3) + 1
    assert bool(streams.faults) == is_freed and len(y) == len(z)


def test_a_side_stream_forks_where_it_is_called_and_joins_where_it_is_told(monkeypatch):
    """With stand-ins for torch.cuda: only audio is launched on the side stream."""
    cuda = mock.Mock()  # notes all calls in their order
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: cuda.side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: cuda.main)
    monkeypatch.setattr(torch.cuda, "set_stream", cuda.set_stream)
    side = faster.SideStream()
    for _ in range(2):
        side.fork(cuda.video, "step")
        side.beside(cuda.audio, "step")
        assert side.kept == [("step",)]
        side.join(cuda.inputs, "step")
        assert not side.kept
    fork = cuda.main.record_event.return_value
    assert cuda.mock_calls == 2 * [
        mock.call.main.record_event(),
        mock.call.video("step"),
        mock.call.side.wait_event(fork),
        mock.call.set_stream(cuda.side),
        mock.call.audio("step"),
        mock.call.set_stream(cuda.main),
        mock.call.main.wait_stream(cuda.side),
        mock.call.inputs("step"),
    ]


def test_recordings_share_a_pool(monkeypatch):
    """With stand-ins for torch.cuda: a graph for each function, captured in the same pool."""
    capture = mock.MagicMock()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: mock.Mock())
    monkeypatch.setattr(torch.cuda, "graph", capture)
    record = faster.cuda_recorder()
    for answer in (1, 2):
        replay, outputs = record(lambda: answer)
        assert outputs == answer and replay is capture.call_args.args[0].replay
    one, other = capture.call_args_list
    assert one.args != other.args and one.kwargs["pool"] is other.kwargs["pool"]


# ---- the real ones ----

both_kernels = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["append", "tensor_cores"]
)  # the second is for bfloat16 and heads of 64


def on_gpu(dtype=torch.float32):
    """A model with heads that the kernel has; two prompts."""
    kernel.require()
    narrow = dtype == torch.float32
    widths = (
        dict(video_width=80, audio_width=48) if narrow else dict(video_width=256, audio_width=128)
    )
    cfg = tiny(PAPER, num_sinks=2, **widths)
    net = random_model(cfg, dtype).cuda()
    with torch.no_grad():
        features = torch.randn(2, 1, 3, cfg.caption_width, dtype=dtype).cuda()
        return net, [net.project_text(f) for f in features]


@pytest.mark.gpu
@pytest.mark.parametrize("speedups", [(), ("beside",), ("beside", "fuse")])
def test_cuda_graphs_and_streams_answer_as_pytorch_does(speedups, monkeypatch):
    """In float32: recorded and replayed, every attention by the kernel, with and without the second
    CUDA stream and fused kernels; two streams after a warm-up."""
    net, texts = on_gpu()
    with monkeypatch.context() as pytorch:
        pytorch.setattr(kernel, "supports", lambda *_: False)
        plain = stream(net, texts, 8, blocks=14)
    recorded = Counting(faster.sped_up(net, speedups, torch.device("cuda")), faster.cuda_recorder)
    with kernel.strict():
        recorded.warm_up([torch.randn(1, 3, net.cfg.caption_width)], 14, WINDOW)
        clips = [stream(recorded, texts, 8, blocks=14) for _ in range(2)]
    for x, y in zip(2 * plain, [x for clip in clips for x in clip], strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    assert recorded.counts["recorded"] == PLACES < recorded.counts["replayed"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_parts_is_attention_on_a_gpu(dtype):
    """By cuDNN in bfloat16, which alone it takes; the parts are joined in one kernel."""
    q, k, v = (torch.randn(1, n, 4, 128, dtype=dtype, device="cuda") for n in (384, 1152, 1152))
    found = faster.attention_in_parts(q, k, v)
    torch.testing.assert_close(found, attention(q, k, v), atol=2e-3, rtol=2e-2)


@pytest.mark.gpu
@both_kernels
def test_a_recording_answers_as_its_kernels_do(dtype):
    """Recorded and launched one by one, with a prompt that changes: the same film."""
    net, texts = on_gpu(dtype)
    with kernel.strict():
        plain = stream(net, texts, 6)
        recorded = stream(faster.Recorded(net, faster.cuda_recorder), texts, 6)
    for x, y in zip(plain, recorded):
        assert (x - y).norm() <= 0.02 * x.norm()


@contextlib.contextmanager
def no_waiting():
    """Whatever makes the CPU wait for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@both_kernels
@pytest.mark.parametrize("record", [False, True])
def test_no_block_waits_for_the_gpu(record, dtype):
    """Refresh, noise, positions, passes on both streams, pinned keys: PyTorch itself watches, after
    the warm-up of recorded passes or until others have set up their libraries."""
    net, texts = on_gpu(dtype)
    faster.run_beside(net, faster.SideStream())
    g, view, settled = torch.Generator().manual_seed(0), CachedView(net.cfg, 14, WINDOW), 10
    with torch.no_grad(), kernel.strict():
        if record:
            net, settled = faster.Recorded(net, faster.cuda_recorder), 0
            net.warm_up([torch.randn(1, 3, net.cfg.caption_width)], 14, WINDOW)
        blocks = rollout.rollout(net, lambda k: texts[0], 14, SIGMAS, g, view=view)
        for _ in range(settled):
            next(blocks)
        with no_waiting():
            assert len(list(blocks)) == 14 - settled


@pytest.mark.gpu
def test_a_number_that_is_read_back_is_noticed():
    """The test above would fail."""
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        torch.ones(1, device="cuda").item()


# ---- nothing waits ----

WAITS = {  # operators whose answer the CPU needs before it can go on
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero",
    "aten::_unique2", "aten::equal", "aten::repeat_interleave",
}  # fmt: skip


def test_a_stream_never_waits_for_the_gpu():
    """Passes, noise in between, positions, the cache moving on: not one number is read back."""
    net, texts = with_texts(CFG)
    stream(net, texts)  # tables that are computed once
    with Operators() as seen:
        stream(net, texts, seed=1)
    assert not WAITS & seen.counts.keys()
