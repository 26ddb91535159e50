"""Recorded passes answer as passes do, and nothing in a pass waits, on a CPU as on a GPU.

Instead of CUDA graphs and streams there are stand-ins (tests/tape.py) that fail where those would.
On a GPU the real ones answer as well, with the CUDA kernel in them.
"""

import contextlib
import functools
from collections import Counter
from unittest import mock

import pytest
import torch
from helpers import LAYOUTS, PAPER, layout_name, random_model, random_text, tiny
from tape import Operators, Side, Tape, TwoStreams

import model
import rollout
from full_size import faster
from kernel import cache_append_attention as kernel
from kv_cache import CachedView
from masks import block_span

SIGMAS, WINDOW, BLOCKS = (1.0, 0.6, 0.0), 1, 8  # a ring of 2: full from block 3 on
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
def stream(net, texts, switch_at=99, blocks=BLOCKS, seed=0):
    """Video and audio of a whole stream, with another prompt from a block on."""
    g, view = torch.Generator().manual_seed(seed), CachedView(net.cfg, blocks, WINDOW)
    return rollout.whole_clip(
        rollout.rollout(net, lambda k: texts[k >= switch_at], blocks, SIGMAS, g, view=view)
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
    assert recorded.counts["recorded"] == 2  # places in the ring
    assert recorded.counts["replayed"] > recorded.counts["recorded"]


def test_a_second_stream_is_recorded_anew():
    """Its caches are others; the first one's recordings would write elsewhere."""
    net, texts = with_texts(CFG)
    recorded = Counting(net)
    for seed in (1, 2):
        assert_bitwise(stream(net, texts, seed=seed), stream(recorded, texts, seed=seed))
    assert recorded.counts["recorded"] == 4


def test_without_a_full_window_nothing_is_recorded():
    """A short stream evicts nothing, and its passes all read different slots."""
    net, texts = with_texts(CFG)
    recorded = Counting(net)
    assert_bitwise(stream(net, texts, blocks=3), stream(recorded, texts, blocks=3))
    assert not recorded.counts


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

    def run(self, span, view):
        latents, sigmas, ropes = self.inputs
        text = self.prompt if frozen == "prompt" else self.text
        if frozen == "tables":
            ropes = model.ropes_of(CFG, block_span(3, CFG), torch.device("cpu"), torch.float64)
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


# ---- two streams ----


def test_audio_beside_video_reads_nothing_too_early_and_frees_nothing_too_early():
    """A whole stream with a side stream: every order between the two is a wait."""
    net, texts = with_texts(CFG)
    alone = stream(net, texts, blocks=5)
    with TwoStreams() as streams:
        faster.run_beside(net, Side(streams))
        assert_bitwise(alone, stream(net, texts, blocks=5))
    assert not streams.faults and streams.clock["side"] > 100


def test_a_missing_wait_is_noticed():
    """Audio that starts before what it hears of video is there."""
    net, texts = with_texts(CFG)
    with TwoStreams() as streams:
        side = Side(streams)
        side.fork = lambda step, *args: step(*args)  # audio may then start where it did before
        streams.start = 0
        faster.run_beside(net, side)
        stream(net, texts, blocks=1)
    assert any("may not have written yet" in fault for fault in streams.faults)


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


def test_a_side_stream_forks_where_it_is_called_and_joins_where_it_ends(monkeypatch):
    """With stand-ins for torch.cuda: only audio is launched on the side stream."""
    cuda = mock.Mock()  # notes all calls in their order
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: cuda.side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: cuda.main)
    monkeypatch.setattr(torch.cuda, "set_stream", cuda.set_stream)
    side = faster.SideStream()
    for _ in range(2):
        side.fork(cuda.video, "step")
        side.beside(cuda.audio, "step")
    fork = cuda.main.record_event.return_value
    assert cuda.mock_calls == 2 * [
        mock.call.main.record_event(),
        mock.call.video("step"),
        mock.call.side.wait_event(fork),
        mock.call.set_stream(cuda.side),
        mock.call.audio("step"),
        mock.call.set_stream(cuda.main),
        mock.call.main.wait_stream(cuda.side),
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

both_kernels = pytest.mark.parametrize("few", [64, 3], ids=["fused", "append"])


def on_gpu():
    """A model with heads that the kernel has, 40 and 24, its projections joined; two prompts."""
    kernel.require()
    cfg = tiny(PAPER, num_sinks=2, video_width=80, audio_width=48)
    net = random_model(cfg, torch.float32).cuda()
    faster.join_projections(net)
    with torch.no_grad():
        features = torch.randn(2, 1, 3, cfg.caption_width).cuda()
        return net, [net.project_text(f) for f in features]


@pytest.mark.gpu
@both_kernels
@pytest.mark.parametrize("beside", [False, True])
def test_cuda_graphs_and_streams_answer_as_pytorch_does(beside, few, monkeypatch):
    """In float32: recorded and replayed, every attention by the kernel, with and without the second
    CUDA stream; twice."""
    net, texts = on_gpu()
    with monkeypatch.context() as pytorch:
        pytorch.setattr(kernel, "supports", lambda *_: False)
        plain = stream(net, texts, 8, blocks=14)
    monkeypatch.setattr(kernel, "MAX_FUSED_TOKENS", few)
    if beside:
        faster.run_beside(net, faster.SideStream())
    recorded = Counting(net, faster.cuda_recorder)
    with kernel.strict():
        clips = [stream(recorded, texts, 8, blocks=14) for _ in range(2)]
    for x, y in zip(2 * plain, [x for clip in clips for x in clip], strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    assert recorded.counts["replayed"] > recorded.counts["recorded"] > 0


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
def test_no_block_waits_for_the_gpu_once_the_window_is_full(record, few, monkeypatch):
    """Refresh, noise, positions, passes on both streams, pinned keys: PyTorch itself watches."""
    net, texts = on_gpu()
    monkeypatch.setattr(kernel, "MAX_FUSED_TOKENS", few)
    faster.run_beside(net, faster.SideStream())
    g, view = torch.Generator().manual_seed(0), CachedView(net.cfg, 14, WINDOW)
    net = faster.Recorded(net, faster.cuda_recorder) if record else net
    blocks = rollout.rollout(net, lambda k: texts[0], 14, SIGMAS, g, view=view)
    with torch.no_grad(), kernel.strict():
        for _ in range(10):  # by now every place in the ring was recorded
            next(blocks)
        with no_waiting():
            assert len(list(blocks)) == 4


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
