"""The dual-stream transformer: LTX-2's, exactly, at any size.

Video and audio are the same thing at two widths, so each is written once: `HalfLayer` is one
modality's half of a layer, `Stream` is everything of one modality, `OmniTransformer` is two streams
that listen to each other. One forward serves the bidirectional teacher, the masked (training) and
the cached (streaming) student; only the `view` differs: what queries may attend to (kv_cache.py).

Legend, for the whole project
    B clips, T tokens, F latent frames, C channels, H heads, D width per head, S sinks, N blocks,
    Q, K queries and keys where they differ (a caption's tokens are keys), L noise levels; _v and
    _a for the stream. Of decoded clips: P pictures of H x W pixels, M steps of the sound.
    sigma   noise level in [0, 1]: **1 is pure noise, 0 is clean**
    x_sigma = (1 - sigma) x0 + sigma noise,   velocity v = noise - x0,   x0 = x_sigma - sigma v

    block   one second: 3 video latent frames and 25 audio latents;  prefix: block 0
    pass    one call of the transformer;  refresh: the pass at sigma = 0 that rewrites a finished
            block's keys and values;  window: blocks remembered besides prefix and sinks

One layer (N is RMSNorm without weight; each arrow is a gated residual)

    video  v --self--> --text-->  n_v = N(v) \\/ --listen to n_a--> --MLP-->
    audio  a --self--> --text-->  n_a = N(a) /\\ --listen to n_v--> --MLP-->

Both n_v and n_a are taken before either stream listens. Sources: Lightricks/LTX-2, ltx-core
transformer; Hugging Face diffusers, transformer_ltx2.py, against which it is tested.
"""

import contextlib
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import config
import rope
from kv_cache import Heads, MaskedView, attention
from masks import Span, clip_span, four_masks
from plumbing import files
from sink_tokens import SinkTokens, fresh_sinks, sink_angles

# ---- noise, velocity and clean estimates: the only place where they are converted ----


def add_noise(x0, noise, sigma):
    """x_sigma = (1 - sigma) x0 + sigma noise.  (flow matching; sigma = 1 is the noise end)

    x0, noise (B, T, C)   sigma (B, T) or (B, 1), in [0, 1] -> (B, T, C)

    >>> add_noise(torch.zeros(1, 2, 1), torch.ones(1, 2, 1), torch.tensor([[0.0, 0.25]])).flatten()
    tensor([0.0000, 0.2500])
    """
    sigma = sigma[..., None].to(x0.dtype)
    return (1 - sigma) * x0 + sigma * noise


def draw_noise(n, span, cfg, generator, device=None, dtype=None):
    """Pure noise for n clips of a span: (n, T_v, C_v) and (n, F_a, C_a).

    Drawn on the CPU, video first, so that a seed means the same clip on every device.
    """
    shapes = (
        (n, len(span.video) * cfg.tokens_per_frame, cfg.video_channels),
        (n, len(span.audio), cfg.audio_channels),
    )
    return [send(torch.randn(shape, generator=generator), device, dtype) for shape in shapes]


def noise_like(x, generator):
    """Pure noise of x's shape, where x is; drawn on the CPU as well."""
    return send(torch.randn(x.shape, generator=generator), x.device, x.dtype)


def send(x, device, dtype):
    """A tensor of the CPU, elsewhere.  A GPU copies from pinned memory, and nobody waits for it."""
    if device is not None and torch.device(device).type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory().to(device, non_blocking=True)
    return x.to(device, dtype)


def to_x0(x, sigma, v):
    """Clean estimate from a velocity: x0 = x_sigma - sigma v, computed in float32 or better.

    x, v (B, T, C)   sigma (B, T) or (B, 1) -> (B, T, C) in x's dtype

    >>> x0, noise, sigma = torch.ones(1, 2, 4), torch.randn(1, 2, 4), torch.tensor([[1.0, 0.3]])
    >>> torch.allclose(to_x0(add_noise(x0, noise, sigma), sigma, noise - x0), x0, atol=1e-6)
    True
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) - sigma[..., None].to(wide) * v.to(wide)).to(x.dtype)


# ---- adaptive normalisation ----


def timestep_embedding(tau, width=256):
    """Sines and cosines of a timestep, 0 .. 1000: (B, T) -> (B, T, width) float32, cosines first.

    >>> timestep_embedding(torch.tensor([[0.0]])).sum()       # 128 cosines of 0
    tensor(128.)
    """
    half = width // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, device=tau.device) / half)
    angles = tau[..., None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class AdaLN(nn.Module):
    """From a noise level to `rows` vectors that shift, scale or gate a stream."""

    def __init__(self, width, rows):
        super().__init__()
        self.rows = rows
        self.linear_1 = nn.Linear(256, width)
        self.linear_2 = nn.Linear(width, width)
        self.linear = nn.Linear(width, rows * width)

    def forward(self, tau):
        """tau (B, T) -> rows (B, T, rows, C) and the embedded timestep (B, T, C)."""
        e = timestep_embedding(tau).to(self.linear.weight.dtype)
        z = self.linear_2(F.silu(self.linear_1(e)))
        return self.linear(F.silu(z)).unflatten(-1, (self.rows, -1)), z


class Modulation(NamedTuple):
    """What a pass's L noise levels ask of every layer of one stream; see `modulated` for L."""

    main: torch.Tensor  # (B, L, 6, C) shift, scale, gate of self attention; the same of the MLP
    cross: torch.Tensor  # (B, L, 4, C) scale, shift for A2V; scale, shift for V2A
    gate: torch.Tensor  # (B, L, 1, C) gate of what this stream hears
    final: torch.Tensor  # (B, L, C) embedded timestep, for the output layer


def norm(x, eps):
    """N(x): RMSNorm without weight."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def modulated(x, scale, shift):
    """x (1 + scale) + shift, by noise level.

    x (B, T, C)   scale, shift (B, L, C): each level is that of T / L tokens in a row

    L is 1 for a clip with one sigma, a frame has one level for all its tokens, or each token has
    its own. Levels are never repeated for their tokens: at full size that would be as large as x,
    eleven times a layer.

    >>> scale, shift = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[0.0], [5.0]]])
    >>> modulated(torch.ones(1, 4, 1), scale, shift).flatten()
    tensor([2., 2., 8., 8.])
    """
    if scale.shape[1] == 1:
        return x * (1 + scale) + shift
    x = x.unflatten(1, (scale.shape[1], -1))
    return (x * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def gated(x, gate):
    """gate * x, by noise level: x (B, T, C), gate (B, L, C)."""
    if gate.shape[1] == 1:
        return gate * x
    return (gate[:, :, None] * x.unflatten(1, (gate.shape[1], -1))).flatten(1, 2)


# ---- one half of a layer ----


class Attention(nn.Module):
    """Projections around an attention; what it may see is the view's business."""

    joined = False  # whether `join_projections` has laid their weights side by side

    def __init__(self, query_width, context_width, inner_width, cfg):
        super().__init__()
        self.num_heads, self.eps = cfg.num_heads, cfg.norm_eps
        self.to_q = nn.Linear(query_width, inner_width)
        self.to_k = nn.Linear(context_width, inner_width)
        self.to_v = nn.Linear(context_width, inner_width)
        self.to_out = nn.Linear(inner_width, query_width)
        self.q_norm = nn.Parameter(torch.ones(inner_width))
        self.k_norm = nn.Parameter(torch.ones(inner_width))

    def heads(self, q_rope=None, k_rope=None) -> Heads:
        return Heads(self.num_heads, self.eps, self.q_norm, self.k_norm, q_rope, k_rope)

    def forward(self, x, context, q_rope, k_rope, attend):
        """Queries from x (B, Q, C), keys and values from context (B, K, C') -> (B, Q, C)."""
        if x is context:
            q, k, v = self._project(x, self.to_q, self.to_k, self.to_v)
        else:
            q, (k, v) = self.to_q(x), self._project(context, self.to_k, self.to_v)
        return self.to_out(attend(q, k, v, self.heads(q_rope, k_rope)))

    def _project(self, x, *linears):
        """(B, T, C) -> (B, T, H*D) by each of them; by one matrix product, if they are joined."""
        if self.joined and not torch.is_grad_enabled():  # a gradient belongs to each of them
            whole = [as_one([getattr(linear, name) for linear in linears]) for name in PARTS]
            if all(part is not None for part in whole):
                return F.linear(x, *whole).chunk(len(linears), -1)
        return [linear(x) for linear in linears]

    def keys_values(self, context):
        """Text, projected once per prompt: (B, K, C') -> two of (B, K, H, D)."""
        heads, (k, v) = self.heads(), self._project(context, self.to_k, self.to_v)
        return heads.keys(k), heads.split(v.contiguous())  # a slice would keep all of its product

    def read(self, x, keys, values, mask):
        """Attend to keys and values that are ready: (B, Q, C) -> (B, Q, C)."""
        return self.to_out(attention(self.heads().queries(self.to_q(x)), keys, values, mask))


PARTS = ("weight", "bias")  # of a linear layer


@torch.no_grad()
def join_projections(net):
    """Lay the weights of queries, keys and values of every attention side by side in one buffer.

    Three small matrix products become a larger one, which fills a GPU better; two, where queries
    come from the other stream. Names, keys of the state dict and numbers stay; there is no second
    copy, since each attention's old weights go as its new ones come. For inference: whatever moves
    the weights elsewhere (`.to`) only undoes it.
    """
    for site in (m for m in net.modules() if isinstance(m, Attention)):
        q, *others = linears = (site.to_q, site.to_k, site.to_v)
        for name in PARTS:
            together = linears if q.in_features == others[0].in_features else others
            old = [getattr(linear, name) for linear in together]
            for p, rows in zip(old, torch.cat(old).split([len(p) for p in old])):
                p.data = rows
        site.joined = True


def as_one(tensors):
    """Tensors that lie one behind the other in one buffer, as one tensor; otherwise None.

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


class HalfLayer(nn.Module):
    """One modality's half of a layer: self attention, text, the other stream, MLP.

    listens_in   first of the two rows of `cross_table` that shape this stream when it listens;
                 the other pair shapes it when it is heard. LTX-2 stores A2V before V2A in both
                 streams: 0 for video (which listens in A2V), 2 for audio.
    """

    def __init__(self, width, other_width, listens_in, cfg):
        super().__init__()
        self.eps, self.listens_in = cfg.norm_eps, listens_in
        self.self_attn = Attention(width, width, width, cfg)
        self.text_attn = Attention(width, width, width, cfg)
        self.cross_attn = Attention(width, other_width, cfg.audio_width, cfg)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        self.table = nn.Parameter(torch.zeros(6, width))  # as Modulation.main
        self.cross_table = nn.Parameter(torch.zeros(5, width))  # as Modulation.cross, then gate

    def attend_self(self, x, modulation, table, attend):
        shift, scale, gate = (self.table[:3] + modulation.main[:, :, :3]).unbind(2)
        y = modulated(norm(x, self.eps), scale, shift)
        return x + gated(self.self_attn(y, y, table, table, attend), gate)

    def attend_text(self, x, keys_values, mask):
        return x + self.text_attn.read(norm(x, self.eps), *keys_values, mask)

    def listening(self, normed, modulation):
        """N(x) as the queries of what this stream hears."""
        return self._cross_modulated(normed, modulation, self.listens_in)

    def heard(self, normed, modulation):
        """N(x) as the context for the other stream."""
        return self._cross_modulated(normed, modulation, 2 - self.listens_in)

    def _cross_modulated(self, normed, modulation, row):
        # Trap: scale comes before shift here; in the main table it is the other way round.
        rows = self.cross_table[row : row + 2] + modulation.cross[:, :, row : row + 2]
        scale, shift = rows.unbind(2)
        return modulated(normed, scale, shift)

    def attend_other(self, x, queries, context, modulation, q_rope, k_rope, attend):
        gate = self.cross_table[4] + modulation.gate[:, :, 0]
        return x + gated(self.cross_attn(queries, context, q_rope, k_rope, attend), gate)

    def mlp(self, x, modulation):
        shift, scale, gate = (self.table[3:] + modulation.main[:, :, 3:]).unbind(2)
        y = modulated(norm(x, self.eps), scale, shift)
        return x + gated(self.mlp_out(F.gelu(self.mlp_in(y), approximate="tanh")), gate)


# ---- one modality ----


class Stream(nn.Module):
    """Everything of one modality: entrance, noise levels, text, half-layers, exit."""

    def __init__(self, width, other_width, channels, listens_in, cfg):
        super().__init__()
        self.cfg = cfg
        self.patchify = nn.Linear(channels, width)
        self.caption_1 = nn.Linear(cfg.caption_width, width)
        self.caption_2 = nn.Linear(width, width)
        self.adaln = AdaLN(width, 6)
        self.adaln_cross = AdaLN(width, 4)
        self.adaln_gate = AdaLN(width, 1)
        self.layers = nn.ModuleList(
            HalfLayer(width, other_width, listens_in, cfg) for _ in range(cfg.num_layers)
        )
        self.table = nn.Parameter(torch.zeros(2, width))  # shift, scale of the exit
        self.unpatchify = nn.Linear(width, channels)

    def modulate(self, sigma) -> Modulation:
        """sigma (B, L) -> rows for every level."""
        tau = 1000 * sigma  # in sigma's own dtype, as LTX-2 does: bfloat16 rounds .421 to 420
        main, final = self.adaln(tau)
        cross, _ = self.adaln_cross(tau)
        gate, _ = self.adaln_gate(sigma * self.cfg.gate_timestep_scale)
        return Modulation(main, cross, gate, final)

    def project_text(self, features):
        """Caption features (B, K, C_text) -> keys and values of every layer's text attention."""
        c = self.caption_2(F.gelu(self.caption_1(features), approximate="tanh"))
        return [layer.text_attn.keys_values(c) for layer in self.layers]

    def exit(self, x, modulation):
        """(B, T, width) -> velocity (B, T, channels)."""
        shift, scale = (self.table + modulation.final[:, :, None]).unbind(2)
        y = F.layer_norm(x, x.shape[-1:], eps=self.cfg.norm_eps)
        return self.unpatchify(modulated(y, scale, shift))


class Text(NamedTuple):
    """A prompt as the layers read it: projected once, used by every pass."""

    video: list  # per layer: keys and values (B, K, H, D_v)
    audio: list  # per layer: keys and values (B, K, H, D_a)
    mask: torch.Tensor | None  # (B, 1, 1, K) booleans, True = read this token


# ---- both ----


class OmniTransformer(nn.Module):
    """Two streams, one velocity for each."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        v, a = cfg.video_width, cfg.audio_width
        self.video = Stream(v, a, cfg.video_channels, 0, cfg)
        self.audio = Stream(a, v, cfg.audio_channels, 2, cfg)
        self.sinks = SinkTokens(cfg.num_sinks, a) if cfg.num_sinks else None
        self.fork = contextlib.nullcontext  # how audio runs beside video, see graphs.SideStream

    def project_text(self, video_features, audio_features=None, mask=None) -> Text:
        """Caption features (B, K, C_text), one per stream or shared, and a (B, K) 0/1 mask."""
        audio_features = video_features if audio_features is None else audio_features
        mask = None if mask is None else mask.bool()[:, None, None, :]
        return Text(
            self.video.project_text(video_features), self.audio.project_text(audio_features), mask
        )

    def forward(self, video, audio, sigma_video, sigma_audio, text: Text, span: Span, view):
        """Velocities of the noisy tokens of `span`.

        video  (B, F_v * rows * columns, C_v)   audio  (B, F_a, C_a), without sinks
        sigma  (B,) for the clip, (B, F) per latent frame or (B, T) per token, for each stream
        text   from `project_text`
        span   which latent frames these are; positions are global
        view   MaskedView or CachedView: what may be attended to
        ->     (B, T_v, C_v), (B, F_a, C_a) velocities
        """
        ropes = ropes_of(self.cfg, span, video.device, video.dtype)
        with_sinks = self.sinks is not None and span.has_sinks
        return self.velocities(
            video, audio, sigma_video, sigma_audio, text, ropes, view, with_sinks
        )

    def velocities(
        self, video, audio, sigma_video, sigma_audio, text, ropes, view, with_sinks=False
    ):
        """The same for tokens whose rotations are known; `with_sinks`: they begin the clip."""
        v, a = self.video.patchify(video), self.audio.patchify(audio)
        sigma_video, sigma_audio = (s.view(len(s), -1) for s in (sigma_video, sigma_audio))
        if with_sinks:
            a, sigma_audio = self.sinks.prepend(a), self.sinks.prepend_sigma(sigma_audio)
        m_v, m_a = self.video.modulate(sigma_video), self.audio.modulate(sigma_audio)
        for i in range(self.cfg.num_layers):
            texts = text.video[i], text.audio[i], text.mask
            v, a = self.layer(i, v, a, m_v, m_a, *texts, ropes, view)
        if with_sinks:
            a = self.sinks.remove(a)
            m_a = m_a._replace(final=m_a.final[:, -a.shape[1] :])
        return self.video.exit(v, m_v), self.audio.exit(a, m_a)

    def layer(self, i, v, a, m_v, m_a, text_v, text_a, mask, ropes, view):
        """Layer i of both streams: each by itself, then both listen, then both MLPs."""
        half_v, half_a = self.video.layers[i], self.audio.layers[i]

        def at(site):
            return functools.partial(view.attend, i, site)

        beside = self.fork()
        v = half_v.attend_self(v, m_v, ropes["video_self"], at("video_self"))
        v = half_v.attend_text(v, text_v, mask)
        with beside:
            a = half_a.attend_self(a, m_a, ropes["audio_self"], at("audio_self"))
            a = half_a.attend_text(a, text_a, mask)
        v, a = self._listen(half_v, half_a, v, a, m_v, m_a, ropes, at)
        beside = self.fork()
        v = half_v.mlp(v, m_v)
        with beside:
            a = half_a.mlp(a, m_a)
        return v, a

    def _listen(self, half_v, half_a, v, a, m_v, m_a, ropes, at):
        """Both streams hear each other as they were before either listened."""
        n_v, n_a = norm(v, self.cfg.norm_eps), norm(a, self.cfg.norm_eps)
        q_v, c_v = half_v.listening(n_v, m_v), half_v.heard(n_v, m_v)
        q_a, c_a = half_a.listening(n_a, m_a), half_a.heard(n_a, m_a)
        r_v, r_a = ropes["video_cross"], ropes["audio_cross"]
        beside = self.fork()
        v = half_v.attend_other(v, q_v, c_a, m_v, r_v, r_a, at("a2v"))
        with beside:
            a = half_a.attend_other(a, q_a, c_v, m_a, r_a, r_v, at("v2a"))
        return v, a

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def predict_x0(net, video, audio, sigma_video, sigma_audio, text: Text, span: Span, view):
    """One pass of the transformer, answered as clean estimates of both streams; see `forward`."""
    velocities = net(video, audio, sigma_video, sigma_audio, text, span, view)
    noisy, sigmas = (video, audio), (sigma_video, sigma_audio)
    return [to_x0(x, per_token(s, x), v) for x, s, v in zip(noisy, sigmas, velocities)]


def per_token(sigma, x):
    """Noise levels (B,), (B, F) or (B, T) of tokens x (B, T, C) -> (B, 1) or (B, T).

    >>> per_token(torch.tensor([[0.1, 0.5]]), torch.zeros(1, 4, 8))          # 2 frames, 4 tokens
    tensor([[0.1000, 0.1000, 0.5000, 0.5000]])
    """
    sigma = sigma.view(len(sigma), -1)
    levels = sigma.shape[1]
    return sigma if levels == 1 else sigma.repeat_interleave(x.shape[1] // levels, dim=1)


@functools.lru_cache(maxsize=16)  # the passes of a block share their tables
def ropes_of(cfg, span: Span, device, dtype) -> dict[str, rope.Rope]:
    """Rotation tables of a span's tokens, sinks included, for self and cross-modal attention."""
    with rope.computed_on(device):
        angles = _angles_of(cfg, span)
    return {name: rope.tables(a, cfg, device, dtype) for name, a in angles.items()}


def _angles_of(cfg, span):
    audio = rope.time_angles(rope.audio_times(span.audio, cfg), cfg)
    if cfg.num_sinks and span.has_sinks:
        audio = torch.cat([sink_angles(cfg), audio])
    times = rope.video_times(span.video, cfg).repeat_interleave(cfg.tokens_per_frame)
    return {
        "video_self": rope.video_angles(span.video, cfg),
        "audio_self": audio,
        "video_cross": rope.time_angles(times, cfg),  # cross-modal attention is about time alone
        "audio_cross": audio,
    }


def build(cfg, seed=0, device=None) -> OmniTransformer:
    """A fresh model: a plain pre-norm transformer whose layers start by changing nothing.

    Gates start at 1 and the last matrix of every branch at 0, so the residual stream starts as the
    input's; the exits learn first, then the ends of the branches, then everything.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device(device or "cpu"):
        model = OmniTransformer(cfg)
    if device != "meta":
        _initialise(model, generator)
    return model


@torch.no_grad()
def _initialise(model, generator):
    for name, p in model.named_parameters():
        is_branch_end = name.endswith(("to_out.weight", "mlp_out.weight", "unpatchify.weight"))
        if name.endswith("bias") or is_branch_end or ".adaln" in name and ".linear.w" in name:
            p.zero_()
        elif name.endswith(".weight"):
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
        elif name.endswith("sinks.tokens"):
            p.copy_(fresh_sinks(*p.shape[1:], generator))
    for stream in (model.video, model.audio):
        for layer in stream.layers:
            layer.table[[2, 5]] = 1.0
            layer.cross_table[4] = 1.0


def load(path) -> OmniTransformer:
    """The model of a weight file of this project, in float32, ready to be used.

    Raises ValueError for a file that is not whole, not ours, or does not fit its own config.
    """
    tensors, cfg, _ = files.read_weights(path)
    model = build(cfg)
    files.load_into(model, tensors, path)
    return model.eval()


if __name__ == "__main__":
    cfg = config.TOY
    model = build(cfg)
    span = clip_span(6, cfg)
    noise = torch.randn(1, 256, 48), torch.randn(1, 126, 20)
    sigma = torch.ones(1)
    text = model.project_text(torch.eye(9)[None, 1:4])
    for label, masks in (("bidirectional", None), ("block-causal", four_masks(cfg, 6))):
        v, a = model(*noise, sigma, sigma, text, span, MaskedView(masks))
        print(f"{label}: video {tuple(v.shape)}, audio {tuple(a.shape)}")
    print(f"{cfg.name}: {model.num_parameters():,} parameters")
    for big in (config.LTX2, config.FULL, config.RELEASED):
        print(f"{big.name}: {build(big, device='meta').num_parameters():,} parameters")
