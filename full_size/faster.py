"""Record a pass once, replay it with other contents: CUDA graphs.

A pass at full size is some 4500 launches, 93 a layer, half of them of kernels that are over in a
few microseconds: audio is 25 tokens. Launched one by one from Python, each takes the CPU about as
long, and the GPU waits. A CUDA graph is a recording of them all, launched as one.

What a recording fixes is memory, not contents: which kernel reads and writes where. So

  * whatever changes from pass to pass is copied into memory that stays: latents, noise levels,
    rotation tables, keys and values of the prompt, and how far a merged pass moves the pinned keys
  * answers come from memory that the next replay overwrites, so they are copied out
  * the caches are such memory already. Only *where* in the ring a block is written is part of the
    recording: there is one for each place (`CachedView.place`), window + 1 of them, and each is
    replayed for all noise levels of a block, and again a turn of the ring later
  * while the window fills, every block attends to more memory than the one before: not recorded

All recordings share one pool of memory for what is made on the way: only one runs at a time, and
nobody reads its answers after the next one has begun. Making a recording waits for the GPU, once.
Nothing may wait for the GPU during a pass (tests/test_graphs.py): a recording could not either.

    net = Recorded(net, cuda_recorder)          # takes the place of a model, for one stream

The other half of this file is `SideStream`: audio beside video, on a stream of its own. A second of
audio is bound by reading its weights, a second of video by multiplication; one hides behind the
other. In a recording the second stream costs no launches: it is an edge of the graph.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

import config
import model
from kv_cache import CachedView


class Inputs(NamedTuple):
    """All that a pass reads besides weights and caches, and that changes; the prompt apart."""

    latents: tuple  # video and audio
    sigmas: tuple  # noise levels of each
    ropes: dict  # rotation tables of the tokens
    moves: dict  # those that move pinned keys during a merged pass


class Recorded(nn.Module):
    """A model whose passes are recorded where that is possible, for one stream; answers as it does.

    recorder   () -> record, called anew for every stream; record: function -> (replay, its
               outputs), see `cuda_recorder`
    """

    def __init__(self, net, recorder):
        super().__init__()
        self.net, self.cfg, self.project_text = net, net.cfg, net.project_text
        self.recorder = recorder
        self._forget()

    def forward(self, video, audio, sigma_video, sigma_audio, text, span, view):
        """As `OmniTransformer.forward`, by a CachedView or a MergedView."""
        if view.layers is not self.memory:  # another stream: the last one's caches are let go of
            self._forget(view.layers)
        if view.place is None or torch.is_grad_enabled():
            return self.net(video, audio, sigma_video, sigma_audio, text, span, view)
        ropes = model.ropes_of(self.cfg, span, video.device, video.dtype)
        inputs = Inputs((video, audio), (sigma_video, sigma_audio), ropes, view.moves)
        kind, is_new = type(view), type(view) not in self.inputs
        self._keep(kind, inputs, text)
        if is_new:  # not yet: what is set up once for these sizes is set up now
            return self.net(video, audio, sigma_video, sigma_audio, text, span, view)
        if (kind, view.place) not in self.recordings:
            self.recordings[kind, view.place] = self.record(lambda: self._run(kind, view))
        replay, outputs = self.recordings[kind, view.place]
        replay()
        return [x.clone() for x in outputs]

    def _forget(self, memory=None):
        """No recordings yet, and these caches."""
        self.memory, self.inputs, self.recordings = memory, {}, {}  # by kind; by kind and place
        self.record = self.recorder()
        self.text = self.prompt = None  # fixed copy, and whose it is

    def _keep(self, kind, inputs, text):
        """Copy what is new into the memory that recordings read."""
        self.inputs[kind] = overwritten(self.inputs.get(kind), inputs)
        if text is not self.prompt:
            self.text, self.prompt = overwritten(self.text, text), text

    def _run(self, kind, view):
        """The pass that is recorded: everything is read from fixed memory."""
        fixed = self.inputs[kind]
        view.moves = fixed.moves
        return self.net.velocities(*fixed.latents, *fixed.sigmas, self.text, fixed.ropes, view)


def overwritten(old, new):
    """The tensors of `old`, a tree, with the contents of `new`; copies of them if there is no old.

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
    """-> record(function): its launches as a CUDA graph; all graphs share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def record(function):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            outputs = function()
        return graph.replay, outputs

    return record


class SideStream:
    """`OmniTransformer.fork` on a GPU: run something beside what is launched in the meantime.

        beside = fork()         # from here on both may go
        v = ...                 # on the main stream
        with beside:            # at the same time, on the other one
            a = ...
        ...                     # and from here on both are done

    # Trap: memory that Python lets go of is handed out again at once by the stream that made it,
    # without asking the other. So video is launched first: when audio lets go of what the main
    # stream made, that stream makes nothing more before it waits.
    """

    def __init__(self, device=None):
        self.stream = torch.cuda.Stream(device)

    def __call__(self):
        self.start = torch.cuda.current_stream(self.stream.device).record_event()
        return self

    def __enter__(self):
        self.main = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_event(self.start)
        torch.cuda.set_stream(self.stream)

    def __exit__(self, *error):
        torch.cuda.set_stream(self.main)
        self.main.wait_stream(self.stream)


if __name__ == "__main__":
    view, places = CachedView(config.FULL, 60, window=5), []
    for _ in range(60):
        places.append(view.place)
        view.move_on()
    recorded = set(places) - {None}
    replayed = sum(place is not None for place in places) - len(recorded)
    print(f"a minute with a window of 5 s: recorded at {len(recorded)} places in the ring, "
          f"{replayed} of 60 blocks are replayed from the first pass on")  # fmt: skip
