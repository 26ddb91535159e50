"""Speed-ups of a stream: joined projections, recorded passes (CUDA graphs), audio beside video.

They change the rounding of a film, and nothing else. generate.py applies them on `--speed-up`.
full_size/README.md tells how much each gained on a GPU.

**qkv.** `join_projections` lays the weights of queries, keys and values side by side. Three small
matrix products become a larger one, which fills a GPU better.

**graph.** One pass at full size is some 4700 kernel launches. Half of these kernels take only a few
microseconds, because a second of audio is 25 tokens. A launch from Python takes about as long, so
the GPU waits for the CPU. A CUDA graph is a recording of all launches, launched as one. A recording
fixes memory addresses, not contents:

  * Latents, noise levels, rotation tables, keys and values of the prompt change from pass to pass.
    They are copied into memory that stays.
  * The next replay overwrites the outputs, so they are copied out.
  * The caches stay in place anyway. Only *where* in the ring a block is written is part of the
    recording. So there is one recording for each of the window + 1 places. It is replayed for all
    passes of a block, and again when the ring has come round.
  * While the window fills, each block attends to more memory than the one before: not recorded.

Making a recording waits for the GPU, once. Nothing may wait for the GPU during a pass
(tests/test_faster.py): a recording could not either.

**beside.** A second of audio is bound by reading its weights, a second of video by multiplication.
On two CUDA streams one hides behind the other. In a recording the second stream costs no launches.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from model import Attention, ropes_of

SPEEDUPS = "qkv", "graph", "beside", "channels-last"


def find_speedups(names, cfg, device) -> tuple:
    """Check names of speed-ups; "all" means all that can run here."""
    impossible = {} if device.type == "cuda" else dict.fromkeys(("graph", "beside"), "a GPU")
    if cfg.is_toy:
        impossible["channels-last"] = "a full-size config"  # it is about LTX-2's video decoder
    if "all" in names:
        return tuple(name for name in SPEEDUPS if name not in impossible)
    for name in names:
        if name not in SPEEDUPS:
            raise ValueError(f"--speed-up {name}: unknown; expected all, {', '.join(SPEEDUPS)}")
        if name in impossible:
            raise ValueError(
                f"--speed-up {name} needs {impossible[name]}; leave it out, or say all"
            )
    return tuple(names)


def sped_up(net, speedups, device):
    """Apply speed-ups to a transformer; the result takes its place."""
    if "qkv" in speedups:
        join_projections(net)
    if "beside" in speedups:
        run_beside(net, SideStream(device))
    return Recorded(net, cuda_recorder) if "graph" in speedups else net


# ---- qkv ----


class JoinedAttention(Attention):
    """An attention whose projections lie side by side in memory and are one matrix product."""

    def __init__(self, site: Attention):
        """Takes over the parameters of `site`, under the same names."""
        nn.Module.__init__(self)
        self.num_heads, self.eps = site.num_heads, site.eps
        self.to_q, self.to_k, self.to_v, self.to_out = site.to_q, site.to_k, site.to_v, site.to_out
        self.q_norm, self.k_norm = site.q_norm, site.k_norm
        three = (self.to_q, self.to_k, self.to_v)
        together = three if self.to_q.in_features == self.to_k.in_features else three[1:]
        for name in ("weight", "bias"):
            old = [getattr(linear, name) for linear in together]
            for p, rows in zip(old, torch.cat([p.data for p in old]).split([len(p) for p in old])):
                p.data = rows  # the old memory is freed: there is never a second copy of all

    def project(self, x, context):
        if x is context:
            return one_product(x, self.to_q, self.to_k, self.to_v)
        return super().project(x, context)

    def project_context(self, context):
        return one_product(context, self.to_k, self.to_v)

    def project_captions(self, context):
        keys, values = super().project_captions(context)
        return keys, values.contiguous()  # a slice would keep the memory of the whole product


@torch.no_grad()
def join_projections(net):
    """Join the projections of every attention, in place."""
    # The names in the state dict do not change. Moving the weights later (`.to`) separates them.
    for layer in net.layers:
        for half in (layer.video, layer.audio):
            for name in ("self_attn", "text_attn", "cross_attn"):
                setattr(half, name, JoinedAttention(getattr(half, name)))


def one_product(x, *linears):
    """(B, T, C) -> (B, T, H*D) for each layer, in one product if their weights are joined."""
    if not torch.is_grad_enabled():  # with gradients, each weight needs its own
        names = "weight", "bias"
        parts = [as_one([getattr(linear, name) for linear in linears]) for name in names]
        if all(part is not None for part in parts):
            return F.linear(x, *parts).chunk(len(linears), -1)
    return [linear(x) for linear in linears]


def as_one(tensors):
    """Return tensors that are adjacent in one buffer as one tensor; otherwise None.

    >>> as_one(torch.arange(6).view(3, 2).split([1, 2]))
    tensor([[0, 1],
            [2, 3],
            [4, 5]])
    >>> as_one((torch.zeros(1), torch.zeros(1)))
    """
    first, end = tensors[0], tensors[0].data_ptr()
    buffer = first.untyped_storage()._cdata
    for t in tensors:
        if t.data_ptr() != end or t.untyped_storage()._cdata != buffer:
            return None
        end += t.nbytes
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


# ---- graph ----


class Recorded(nn.Module):
    """A model whose passes are recorded where possible, for one stream at a time."""

    def __init__(self, net, recorder):
        """recorder: `cuda_recorder`, or a stand-in; called for every stream."""
        super().__init__()
        self.net, self.cfg, self.project_text = net, net.cfg, net.project_text
        self.recorder = recorder
        self._start(caches=None)

    def _start(self, caches):
        # The recordings of the last stream would write into its caches: they are freed.
        self.caches, self.inputs, self.recordings = caches, None, {}  # recordings by ring index
        self.record = self.recorder()
        self.text = self.prompt = None  # the fixed copy, and the prompt it is a copy of

    def forward(self, video, audio, sigma_video, sigma_audio, text, span, view):
        if view.layers is not self.caches:
            self._start(view.layers)
        place = ring_index(view)
        if place is None or torch.is_grad_enabled():
            return self.net(video, audio, sigma_video, sigma_audio, text, span, view)
        ropes = ropes_of(self.cfg, span, video.device, video.dtype)
        is_first = self.inputs is None
        # everything that a pass reads and that changes, except weights, caches and prompt
        new = (video, audio), (sigma_video, sigma_audio), ropes
        self.inputs = overwritten(self.inputs, new)
        if text is not self.prompt:
            self.text, self.prompt = overwritten(self.text, text), text
        if is_first:  # libraries set up their work space for these sizes, outside a recording
            return self.net(video, audio, sigma_video, sigma_audio, text, span, view)
        if place not in self.recordings:
            self.recordings[place] = self.record(lambda: self._run(span, view))
        replay, outputs = self.recordings[place]
        replay()
        return [x.clone() for x in outputs]

    def _run(self, span, view):
        # This is recorded: it reads everything from fixed memory.
        latents, sigmas, ropes = self.inputs
        return self.net(*latents, *sigmas, self.text, span, view, ropes)


def ring_index(view) -> int | None:
    """Return the place of the current block in the ring; None while the ring is not full."""
    # Passes at the same place use the same memory.
    ring = view.layers[0]["video_self"].ring_blocks
    return (view.block - 1) % ring if view.block > ring else None


def overwritten(old, new):
    """Copy the tensors of the tree `new` into `old` and return it; without old, copies of new.

    >>> first = overwritten(None, {"x": torch.zeros(2)})
    >>> again = overwritten(first, {"x": torch.ones(2)})
    >>> again["x"], again["x"] is first["x"]
    (tensor([1., 1.]), True)
    """
    if old is None:
        return tree_map_only(torch.Tensor, torch.clone, new)
    pairs = zip(tree_leaves(old), tree_leaves(new), strict=True)
    pairs = [pair for pair in pairs if torch.is_tensor(pair[0])]
    torch._foreach_copy_(*map(list, zip(*pairs)))  # one launch
    return old


def cuda_recorder():
    """Return record(function) -> (replay, outputs)."""
    pool = torch.cuda.graph_pool_handle()  # one for all graphs, because only one runs at a time

    def record(function):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            outputs = function()
        return graph.replay, outputs

    return record


# ---- beside ----


class SideStream:
    """A second CUDA stream for audio.  Every step of video forks it, the next step of audio joins.

    video step:  fork(step, ...)     runs on the main stream; audio may start where it starts
    audio step:  beside(step, ...)   runs at the same time; the main stream then waits for it
    """

    # Trap: memory that Python frees is reused at once by the stream that made it, without asking
    # the other one. So video is launched first: when audio frees what the main stream made, the
    # main stream makes nothing more before it waits.

    def __init__(self, device=None):
        self.stream = torch.cuda.Stream(device)

    def fork(self, step, *args):
        self.start = torch.cuda.current_stream(self.stream.device).record_event()
        return step(*args)

    def beside(self, step, *args):
        main = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_event(self.start)
        torch.cuda.set_stream(self.stream)
        try:
            return step(*args)
        finally:
            torch.cuda.set_stream(main)
            main.wait_stream(self.stream)


class ScheduledHalf(nn.Module):
    """A HalfLayer whose steps are run by a function `run(step, *args)`."""

    def __init__(self, half, run):
        super().__init__()
        self.half, self.text_attn, self.cross_inputs = half, half.text_attn, half.cross_inputs
        for name in ("attend_self", "attend_captions", "attend_other", "mlp"):
            setattr(self, name, functools.partial(run, getattr(half, name)))


def run_beside(net, side):
    """Run every step of the audio halves beside the same step of the video halves, in place."""
    for layer in net.layers:
        layer.video = ScheduledHalf(layer.video, side.fork)
        layer.audio = ScheduledHalf(layer.audio, side.beside)
