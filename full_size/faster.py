"""Speed-ups of a stream on a GPU: recorded passes, audio beside video, fused kernels.

They change a film by rounding only. generate.py applies them on `--speed-up`. full_size/README.md
tells how much each gained.

**graph.** One pass at full size is some 5000 kernel launches. Half of these kernels take only a few
microseconds, because a second of audio is 25 tokens. A launch from Python takes about as long, so
the GPU waits for the CPU. A CUDA graph is a recording of all launches, launched as one. A recording
fixes memory addresses, not contents:

  * Latents, noise levels, rotation tables, keys and values of the prompt change from pass to pass.
    They are copied into memory that stays.
  * The next replay overwrites the outputs, so they are copied out.
  * The caches stay in place anyway, also from one stream to the next. *Where* in the ring a block
    is written and how much is read are part of the recording. So there is one recording for block
    0, one for each block while the ring fills, and one for each place in the full ring. All passes
    of a block replay the same one.

Making a recording waits for the GPU, and takes longer than a pass. So `Recorded.warm_up` makes all
of them before the first stream. The code of a pass must never wait for the GPU, because this cannot
be recorded (tests/test_faster.py).

**beside.** A second of audio is bound by reading its weights, a second of video by multiplication.
So both run at once, on two CUDA streams. In a recording the second stream costs no launches. The
streams meet once per layer, before video and audio attend to each other.

**fuse.** Between two matrix products lie up to six element-wise operators, each of which reads and
writes all tokens. `FusedHalf` has them compiled into one kernel, which also rounds before a product
in fp8.

**parts.** With tiles of 128 queries, video's attention has 9 tiles x 32 heads = 288 tiles. The 132
multiprocessors of an H100 compute 132 at a time, so the third round has work for 24 of them only.
With the keys in three parts there are 864 tiles, each a third of the work: 7 short rounds in place
of 9. Each part returns its mean and the sum of its weights; `joined` averages the means by these.
"""

import functools
import math
import weakref

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

import rope
from film.writer import packet
from full_size import fp8
from kv_cache import CachedView, attention
from model import Attention, HalfLayer, gated, modulated, norm, ropes_of
from rollout import rollout

SPEEDUPS = "graph", "beside", "fuse", "parts"


def find_speedups(names, device) -> tuple:
    """Check names of speed-ups, or "all".  Raises ValueError without a GPU."""
    for name in names:
        if name not in ("all", *SPEEDUPS):
            raise ValueError(f"--speed-up {name}: unknown; expected all, {', '.join(SPEEDUPS)}")
        if device.type != "cuda":
            raise ValueError(f"--speed-up {name} needs a GPU; leave it out")
    return SPEEDUPS if "all" in names else tuple(names)


def sped_up(net, speedups, device):
    """Apply speed-ups to a transformer; the result takes its place."""
    if "fuse" in speedups:
        fuse(net)
    if "parts" in speedups:
        attend_in_parts(net)
    if "beside" in speedups:
        run_beside(net, SideStream(device))
    return Recorded(net, cuda_recorder) if "graph" in speedups else net


def speed_up(source, request):
    """Apply the speed-ups of a `generate.Request` to the transformer of a source."""
    source.net = sped_up(source.net, request.speedups, request.device)
    if "graph" in request.speedups:
        features = source.read(request.cues[0].prompt)
        decode = decoding(source.decoder(lambda _, function: function))
        source.net.warm_up(features, request.num_blocks, request.window, decode)


def decoding(decoder):
    """Return a function that takes a block through all that the GPU does after its passes."""
    return lambda block: packet("warm-up", decoder.decode(block), decoder.scale)


# ---- graph ----


class Recorded(nn.Module):
    """A model whose passes are recorded where possible, for one stream at a time."""

    def __init__(self, net, recorder):
        """recorder: `cuda_recorder`, or a stand-in."""
        super().__init__()
        self.net, self.cfg, self.project_text = net, net.cfg, net.project_text
        self.recorder = recorder
        self.view = None  # of the current stream
        self.room = None  # (clips, blocks in the ring) for which there is memory
        self.begun = weakref.WeakSet()  # the views of all streams so far

    @torch.no_grad()
    def warm_up(self, features, blocks, window, decode=lambda block: None):
        """Record all passes of a stream on noise, before a prompt comes.

        features, blocks, window   as the stream will have them; contents do not matter
        decode                     called with every block of noise, see `decoding`: kernels are
                                   loaded on their first use, which takes up to 80 ms
        """
        like = next(self.parameters())
        with torch.inference_mode():  # as in a stream; else `fp8.rounded` is compiled twice
            text = self.project_text(*(f.to(like) for f in features))
        view = CachedView(self.cfg, blocks, window)
        places = min(blocks, 2 * ring_of(view))  # block 0, a ring that fills, a full one
        noise, levels = torch.Generator(), (1.0, 0.0)
        stream = rollout(self, lambda k: text, places, levels, noise, view=view)
        for block in tqdm(stream, "recording passes", places, leave=False):
            decode(block)
        self.prompt = None  # frees its keys and values; the fixed copy stays

    def forward(self, video, audio, sigma_video, sigma_audio, text, span, view):
        if torch.is_grad_enabled():
            return self.net(video, audio, sigma_video, sigma_audio, text, span, view)
        if view is not self.view:
            self._begin(view, clips=len(video))
        ropes = ropes_of(self.cfg, span, video.device, video.dtype)
        # everything that changes from pass to pass, except caches and prompt
        new = (video, audio), (sigma_video, sigma_audio), ropes
        kind = min(view.block, 1), sigma_video.dim()  # other sizes: in block 0, with a picture
        self.inputs[kind] = inputs = overwritten(self.inputs.get(kind), new)
        if text is not self.prompt:
            self.text, self.prompt = overwritten(self.text, text), text
        place = *place_of(view), kind
        if place not in self.recordings:
            run = functools.partial(self._run, inputs, span, view)
            run()  # libraries set up their work space for these sizes, outside a recording
            self.recordings[place] = self.record(run)
        replay, outputs = self.recordings[place]
        replay()
        return [x.clone() for x in outputs]

    def _run(self, inputs, span, view):
        # This is recorded: it reads everything from fixed memory.
        latents, sigmas, ropes = inputs
        return self.net(*latents, *sigmas, self.text, span, view, ropes)

    def _begin(self, view, clips):
        """Start a stream, in the memory of the last one if it fits: recordings write there."""
        if view in self.begun:
            raise ValueError(
                "another stream has begun to use these recordings: start this one anew"
            )
        is_empty, ring = view.layers[0]["video_self"].k is None, ring_of(view)
        if self.view and is_empty and clips == self.room[0] and ring <= self.room[1]:
            for new, old in zip(view.caches, self.view.caches):
                new.k, new.v = old.k, old.v
        else:  # this frees the old recordings and caches
            self.room, self.recordings, self.record = (clips, ring), {}, self.recorder()
            self.inputs = {}  # fixed copies, by kind
            self.text = self.prompt = None  # the fixed copy, and the prompt it is a copy of
        self.view = view
        view.move_prefixes = functools.partial(move_prefixes, view.layers)
        self.begun.add(view)


def move_prefixes(layers, site, by):
    """Do the same as `CachedView.move_prefixes`, with one rotation for all layers."""
    # Layer by layer these are over 1,000 launches, while the GPU has nothing else to do.
    caches = [layer[site] for layer in layers]
    pinned = [cache.k[:, : cache.prefix_tokens] for cache in caches]
    if caches[0].unmoved_prefix_k is None:
        for cache, keys in zip(caches, pinned):
            cache.unmoved_prefix_k = keys.clone()
    moved = rope.rotate(torch.cat([cache.unmoved_prefix_k for cache in caches]), by)
    torch._foreach_copy_(pinned, list(moved.chunk(len(caches))))


def ring_of(view) -> int:
    """Return the number of blocks in the ring of a view."""
    return view.layers[0]["video_self"].ring_blocks


def place_of(view) -> tuple:
    """Return what a recording fixes: the slots that a pass writes and those that it reads."""
    cache = view.layers[0]["video_self"]  # the other caches move with it
    return cache.slots.start, cache.first_visible, cache.num_filled


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
        # thread_local: other threads, such as the writer's, may wait for the GPU meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = function()
        return graph.replay, outputs

    return record


# ---- beside ----


class SideStream:
    """A second CUDA stream for audio, beside the main stream for video.

    video step:  fork(step, ...)     on the main stream; audio may start where it starts
    audio step:  beside(step, ...)   on the side stream
    then:        join(step, ...)     on the main stream, after all of audio until now
    """

    # Trap: memory that Python frees is reused at once by the stream that made it, without asking
    # the other one. So what audio reads is kept until the main stream has waited for audio.

    def __init__(self, device=None):
        self.stream, self.kept = torch.cuda.Stream(device), []

    def fork(self, step, *args):
        self.start = torch.cuda.current_stream(self.stream.device).record_event()
        return step(*args)

    def beside(self, step, *args):
        main = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_event(self.start)
        self.kept.append(args)
        torch.cuda.set_stream(self.stream)
        try:
            return step(*args)
        finally:
            torch.cuda.set_stream(main)

    def join(self, step, *args):
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        self.kept.clear()
        return step(*args)


class ScheduledHalf(nn.Module):
    """A HalfLayer whose steps are run by functions `run(step, *args)`."""

    def __init__(self, half, run, run_inputs):
        super().__init__()
        self.half, self.text_attn = half, half.text_attn
        for name in ("attend_self", "attend_captions", "attend_other", "mlp"):
            setattr(self, name, functools.partial(run, getattr(half, name)))
        self.cross_inputs = functools.partial(run_inputs, half.cross_inputs)


def run_beside(net, side):
    """Run the audio halves beside the video halves, in place; they meet once a layer."""
    for layer in net.layers:
        layer.video = ScheduledHalf(layer.video, side.fork, side.fork)
        layer.audio = ScheduledHalf(layer.audio, side.beside, side.join)
    net.audio.output = functools.partial(side.join, net.audio.output)


# ---- fuse ----


class FusedHalf(HalfLayer):
    """A HalfLayer that runs element-wise work as one kernel before and one after each sublayer."""

    # Wraps what runs before a product: here unchanged, `then_rounded` if the product is in fp8.
    ending = staticmethod(lambda function: function)

    def attend_self(self, x, modulation, positions, attend):
        before = fused(self.ending(modulated_norm))
        y = before(x, self.table[:2], modulation.main[:, :, :2], self.eps)
        y = self.self_attn(y, y, positions, positions, attend)
        return fused(gated_sum)(x, y, self.table[2], modulation.main[:, :, 2])

    def attend_captions(self, x, keys_values, mask):
        y = fused(self.ending(norm))(x, self.eps)
        return x + self.text_attn.attend_captions(y, *keys_values, mask)

    def cross_inputs(self, x, modulation):
        before = fused(self.ending(modulated_norms))
        both = before(x, self.cross_table[:4], modulation.cross, self.eps)
        return both if self.listen_row == 0 else both[::-1]

    def attend_other(self, x, queries, context, modulation, q_rope, k_rope, attend):
        y = self.cross_attn(queries, context, q_rope, k_rope, attend)
        return fused(gated_sum)(x, y, self.cross_table[4], modulation.gate[:, :, 0])

    def mlp(self, x, modulation):
        before = fused(self.ending(modulated_norm))
        y = before(x, self.table[3:5], modulation.main[:, :, 3:5], self.eps)
        y = self.mlp_out(fused(self.ending(gelu))(self.mlp_in(y)))
        return fused(gated_sum)(x, y, self.table[5], modulation.main[:, :, 5])


fused = fp8.in_one_kernel


@functools.cache  # the same result each time, so that `fused` compiles it once
def then_rounded(function):
    """Return a function that also rounds the result of another one to fp8: a tensor, or a list."""

    def both(*args):
        out = function(*args)
        return [fp8.rounded(x) for x in out] if isinstance(out, list) else fp8.rounded(out)

    return both


def modulated_norm(x, table, rows, eps):
    """x (B, T, C), table (2, C), rows (B, L, 2, C): shift, then scale -> (B, T, C)."""
    shift, scale = (table + rows).unbind(2)
    return modulated(norm(x, eps), scale, shift)


def modulated_norms(x, table, rows, eps):
    """x (B, T, C), table (4, C), rows (B, L, 4, C): scale, then shift, twice -> 2 of (B, T, C)."""
    scale, shift, scale_2, shift_2 = (table + rows).unbind(2)
    y = norm(x, eps)
    return [modulated(y, scale, shift), modulated(y, scale_2, shift_2)]


def gated_sum(x, y, table, rows):
    """x, y (B, T, C), table (C), rows (B, L, C) -> (B, T, C)."""
    return x + gated(y, table + rows)


def gelu(x):
    """GELU as in model.py, cheaper: 1 + tanh(u) = 2 sigmoid(2 u) needs one exponential.

    >>> x = torch.linspace(-5, 5, 100)
    >>> torch.allclose(gelu(x), nn.functional.gelu(x, approximate="tanh"), atol=1e-6)
    True
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    u = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    return (wide * torch.sigmoid(2 * u)).to(x.dtype)


def fuse(net):
    """Fuse the element-wise work of every layer, in place."""
    for layer in net.layers:
        for half in (layer.video, layer.audio):
            half.__class__ = FusedHalf  # the same parameters, other methods
            if isinstance(half.mlp_in, fp8.Fp8Linear):  # then all that read its tokens are
                half.ending = then_rounded


# ---- parts ----

PARTS = 3  # at 512 x 768, a latent frame has 3 x 128 tokens
HALF = torch.float16, torch.bfloat16


class AttentionInParts(Attention):
    """An Attention whose queries attend to one part of the keys after the other."""

    def forward(self, x, context, q_rope, k_rope, attend):
        attend = functools.partial(attend, attend_keys=attention_in_parts)
        return super().forward(x, context, q_rope, k_rope, attend)


def attend_in_parts(net):
    """Let the self attention of video attend in parts, in place; other sites have few queries."""
    for layer in net.layers:
        layer.video.self_attn.__class__ = AttentionInParts  # the same parameters


def attention_in_parts(q, k, v):
    """`kv_cache.attention` of one clip, (1, T, H, D) -> (1, Q, H*D), with the keys in PARTS."""
    if len(q) > 1 or k.shape[1] % PARTS or q.is_cuda and q.dtype not in HALF:  # cuDNN takes HALF
        return attention(q, k, v)
    k, v = (x[0].unflatten(0, (PARTS, -1)) for x in (k, v))  # (PARTS, K / PARTS, H, D)
    q, k, v = (x.transpose(1, 2) for x in (q.expand(PARTS, -1, -1, -1), k, v))
    return fused(joined)(*attention_with_sums(q, k, v))


def attention_with_sums(q, k, v):
    """(B, H, T, D) -> attention (B, H, Q, D), and log of the sum of exp(scores) (B, H, Q)."""
    if q.is_cuda:  # cuDNN, which is faster than flash attention here
        return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


def joined(means, log_sums):
    """Parts (P, H, Q, D) and their log_sums (P, H, Q) -> attention to all keys (1, Q, H*D).

    >>> means, log_sums = torch.tensor([2.0, 8.0]), torch.tensor([3.0, 1.0]).log()
    >>> joined(means.view(2, 1, 1, 1), log_sums.view(2, 1, 1))   # (3 * 2 + 1 * 8) / (3 + 1)
    tensor([[[3.5000]]])
    """
    weights = (log_sums - log_sums.amax(0)).exp().view(*means.shape[:-1], 1)
    mean = (weights * means).sum(0) / weights.sum(0)
    return mean.transpose(0, 1).flatten(1)[None].to(means.dtype)
