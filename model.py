r"""The dual-stream transformer of LTX-2, at any size, with optional sinks.

Video and audio differ only in width, so each part is written once. `HalfLayer` is the half of a
layer that belongs to one stream, `Layer` is two of them, `Modality` is everything of one stream
outside the layers. One forward pass serves the bidirectional teacher, the masked student in
training and the cached student in streaming. Only `view` differs: it decides which keys each query
attends to (kv_cache.py).

Legend, for the whole project
    B clips, T tokens, F latent frames, C channels, H heads, D width per head, S sinks, N blocks,
    Q, K queries and keys where their numbers differ (caption tokens are keys), L noise levels;
    _v, _a for the stream. For decoded clips: P frames of H x W pixels, M time steps of the sound.
    sigma   noise level in [0, 1]: **1 is pure noise, 0 is clean**
    x_sigma = (1 - sigma) x0 + sigma noise,   velocity v = noise - x0,   x0 = x_sigma - sigma v

    block   one second: 3 video latent frames, 25 audio latents;  prefix: block 0, see masks.py
    pass    one call of the transformer;  refresh: the pass at sigma = 0 that writes the keys and
            values of a finished block again;  window: blocks kept besides prefix and sinks

    marks in comments: "Paper" a difference from the paper, "Simpler" a part left out, "Trap" a
    mistake that is easily made

One layer (norm is RMSNorm without weight; arrows are residuals, gated except for captions)

    video  v --self--> --captions-->  n_v = norm(v) \/ --A2V: queries n_v, keys n_a--> --MLP-->
    audio  a --self--> --captions-->  n_a = norm(a) /\ --V2A: queries n_a, keys n_v--> --MLP-->

Both n_v and n_a are computed before either stream attends to the other. Sources: Lightricks/LTX-2,
ltx-core transformer; Hugging Face diffusers, transformer_ltx2.py, against which it is tested.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import config
import rope
from kv_cache import Heads, MaskedView, attention
from masks import SITES, Span, clip_span, four_masks
from plumbing import files
from sink_tokens import SinkTokens, init_sinks, sink_angles

# ---- noise, velocity and clean estimates ----


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

    generator   torch.Generator on the CPU, or a list with one for each clip
    """
    shapes = (
        (n, len(span.video) * cfg.tokens_per_frame, cfg.video_channels),
        (n, len(span.audio), cfg.audio_channels),
    )
    # Drawn on the CPU, video first, so that a seed gives the same noise on every device.
    return [to_device(draw_normal(shape, generator), device, dtype) for shape in shapes]


def draw_normal(shape, generator):
    """Normal numbers (n, ...); with a list of n generators, each clip has numbers of its own."""
    if isinstance(generator, list):  # so a clip does not depend on the others in its batch
        n, *rest = shape
        return torch.stack([torch.randn(rest, generator=generator[b]) for b in range(n)])
    return torch.randn(shape, generator=generator)


def noise_like(x, generator):
    """Pure noise with the shape, device and dtype of x; drawn on the CPU, like draw_noise."""
    return to_device(torch.randn(x.shape, generator=generator), x.device, x.dtype)


def to_device(x, device, dtype):
    """Move a tensor to a device; from CPU to GPU without waiting, through pinned memory."""
    if device is not None and torch.device(device).type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory().to(device, non_blocking=True)
    return x.to(device, dtype)


def to_x0(x, sigma, v):
    """Clean estimate from a velocity: x0 = x_sigma - sigma v, computed in float32 or better.

    x, v (B, T, C)   sigma (B, T) or (B, 1) -> (B, T, C) in the dtype of x

    >>> x0, noise, sigma = torch.ones(1, 2, 4), torch.randn(1, 2, 4), torch.tensor([[1.0, 0.3]])
    >>> torch.allclose(to_x0(add_noise(x0, noise, sigma), sigma, noise - x0), x0, atol=1e-6)
    True
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) - sigma[..., None].to(wide) * v.to(wide)).to(x.dtype)


# ---- adaptive normalisation ----


def timestep_embedding(tau, width=256):
    """Cosines, then sines of a timestep: (B, T) -> (B, T, width) float32.

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
        e = timestep_embedding(tau).to(self.linear.bias.dtype)
        z = self.linear_2(F.silu(self.linear_1(e)))
        return self.linear(F.silu(z)).unflatten(-1, (self.rows, -1)), z


class Modulation(NamedTuple):
    """What all layers of a stream add to their tables, at L noise levels; L: see `modulated`."""

    main: torch.Tensor  # (B, L, 6, C) shift, scale, gate of self attention; the same of the MLP
    cross: torch.Tensor  # (B, L, 4, C) scale, shift for A2V; scale, shift for V2A
    gate: torch.Tensor  # (B, L, 1, C) gate of the attention to the other stream
    final: torch.Tensor  # (B, L, C) embedded timestep, for the output


def norm(x, eps):
    """RMSNorm without weight."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def modulated(x, scale, shift):
    """x (1 + scale) + shift, by noise level.

    x (B, T, C)   scale, shift (B, L, C): each level applies to T / L consecutive tokens

    L = 1: one level per clip; L = F: one per latent frame; L = T: one per token.

    >>> scale, shift = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[0.0], [5.0]]])
    >>> modulated(torch.ones(1, 4, 1), scale, shift).flatten()
    tensor([2., 2., 8., 8.])
    """
    if scale.shape[1] == 1:
        return x * (1 + scale) + shift
    # Broadcast: expanded to all tokens, the 11 rows of a layer would each be as large as x.
    x = x.unflatten(1, (scale.shape[1], -1))
    return (x * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def gated(x, gate):
    """gate * x, by noise level: x (B, T, C), gate (B, L, C)."""
    if gate.shape[1] == 1:
        return gate * x
    return (gate[:, :, None] * x.unflatten(1, (gate.shape[1], -1))).flatten(1, 2)


# ---- a layer ----


class Attention(nn.Module):
    """The projections around an attention; `attend` decides which keys each query attends to."""

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
        q, k, v = self.project(x, context)
        return self.to_out(attend(q, k, v, self.heads(q_rope, k_rope)))

    def project(self, x, context):
        """Queries (B, Q, H*D), keys and values (B, K, H*D)."""
        return self.to_q(x), *self.project_context(context)

    def project_context(self, context):
        """Keys and values, two of (B, K, H*D)."""
        return self.to_k(context), self.to_v(context)

    def project_captions(self, context):
        """Caption features (B, K, C') -> keys and values, two of (B, K, H, D)."""
        heads, (k, v) = self.heads(), self.project_context(context)
        return heads.keys(k), heads.split(v)

    def attend_captions(self, x, keys, values, mask):
        """Attend to keys and values that were projected before: (B, Q, C) -> (B, Q, C)."""
        return self.to_out(attention(self.heads().queries(self.to_q(x)), keys, values, mask))


class HalfLayer(nn.Module):
    """The half of a layer that belongs to one stream: all its weights, and the residual steps.

    listen_row   rows listen_row and listen_row + 1 of `cross_table` modulate this stream's queries,
                 the other two its keys and values. Rows 0, 1 are for A2V and 2, 3 for V2A, so it
                 is 0 for video (queries of A2V) and 2 for audio (queries of V2A).
    """

    def __init__(self, width, other_width, listen_row, cfg):
        super().__init__()
        self.eps, self.listen_row = cfg.norm_eps, listen_row
        self.self_attn = Attention(width, width, width, cfg)
        self.text_attn = Attention(width, width, width, cfg)
        self.cross_attn = Attention(width, other_width, cfg.audio_width, cfg)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        self.table = nn.Parameter(torch.zeros(6, width))  # rows as in Modulation.main
        self.cross_table = nn.Parameter(torch.zeros(5, width))  # as Modulation.cross, then .gate

    def attend_self(self, x, modulation, positions, attend):
        """Add self attention: x (B, T, C) -> (B, T, C)."""
        shift, scale, gate = (self.table[:3] + modulation.main[:, :, :3]).unbind(2)
        y = modulated(norm(x, self.eps), scale, shift)
        return x + gated(self.self_attn(y, y, positions, positions, attend), gate)

    def attend_captions(self, x, keys_values, mask):
        """Add attention to the captions, which has neither gate nor positions."""
        return x + self.text_attn.attend_captions(norm(x, self.eps), *keys_values, mask)

    def cross_inputs(self, x, modulation):
        """Queries of this stream, and context for the other stream, both (B, T, C) from x."""
        y, made = norm(x, self.eps), []
        for row in (self.listen_row, 2 - self.listen_row):
            rows = self.cross_table[row : row + 2] + modulation.cross[:, :, row : row + 2]
            scale, shift = rows.unbind(2)  # Trap: in the main table, shift comes before scale
            made.append(modulated(y, scale, shift))
        return made

    def attend_other(self, x, queries, context, modulation, q_rope, k_rope, attend):
        """Add attention to the other stream: x, queries (B, T, C), context (B, K, C')."""
        gate = self.cross_table[4] + modulation.gate[:, :, 0]
        return x + gated(self.cross_attn(queries, context, q_rope, k_rope, attend), gate)

    def mlp(self, x, modulation):
        """Add the MLP: x (B, T, C) -> (B, T, C)."""
        shift, scale, gate = (self.table[3:] + modulation.main[:, :, 3:]).unbind(2)
        y = modulated(norm(x, self.eps), scale, shift)
        return x + gated(self.mlp_out(F.gelu(self.mlp_in(y), approximate="tanh")), gate)


class Layer(nn.Module):
    """One layer of both streams: the drawing at the top of this file."""

    def __init__(self, index, video: HalfLayer, audio: HalfLayer):
        super().__init__()
        self.index, self.video, self.audio = index, video, audio

    def forward(self, v, a, m_v, m_a, captions_v, captions_a, mask, ropes, view):
        """v (B, T_v, C_v), a (B, T_a, C_a) -> the same shapes.

        m_v, m_a   `Modulation` of either stream; captions_v, captions_a: keys and values
        ropes      rotation tables, see `ropes_of`
        """
        video, audio = self.video, self.audio
        at = {site: functools.partial(view.attend, self.index, site) for site in SITES}
        r_v, r_a = ropes["video_cross"], ropes["audio_cross"]

        v = video.attend_self(v, m_v, ropes["video_self"], at["video_self"])
        a = audio.attend_self(a, m_a, ropes["audio_self"], at["audio_self"])
        v = video.attend_captions(v, captions_v, mask)
        a = audio.attend_captions(a, captions_a, mask)
        q_v, c_v = video.cross_inputs(v, m_v)  # both streams before either attends to the other
        q_a, c_a = audio.cross_inputs(a, m_a)
        v = video.attend_other(v, q_v, c_a, m_v, r_v, r_a, at["a2v"])
        a = audio.attend_other(a, q_a, c_v, m_a, r_a, r_v, at["v2a"])
        del q_v, c_v, q_a, c_a  # as large as the streams: free them before the MLPs
        return video.mlp(v, m_v), audio.mlp(a, m_a)

    def project_captions(self, video, audio):
        """Projected captions (B, K, C_v), (B, K, C_a) -> keys and values of either stream."""
        return [
            half.text_attn.project_captions(c)
            for half, c in ((self.video, video), (self.audio, audio))
        ]


# ---- one modality, outside the layers ----


class Modality(nn.Module):
    """Input projection, captions, noise levels and output of one stream."""

    def __init__(self, width, channels, cfg):
        super().__init__()
        self.cfg = cfg
        self.proj_in = nn.Linear(channels, width)
        self.caption_1 = nn.Linear(cfg.caption_width, width)
        self.caption_2 = nn.Linear(width, width)
        self.adaln = AdaLN(width, 6)
        self.adaln_cross = AdaLN(width, 4)
        self.adaln_gate = AdaLN(width, 1)
        self.table = nn.Parameter(torch.zeros(2, width))  # shift, scale of the output
        self.proj_out = nn.Linear(width, channels)

    def captions(self, features):
        """Caption features (B, K, C_text) -> (B, K, width)."""
        return self.caption_2(F.gelu(self.caption_1(features), approximate="tanh"))

    def modulate(self, sigma) -> Modulation:
        """sigma (B, L) -> rows for every level."""
        tau = 1000 * sigma  # in the dtype of sigma, as LTX-2: in bfloat16 .421 becomes 420
        main, final = self.adaln(tau)
        cross, _ = self.adaln_cross(tau)
        gate, _ = self.adaln_gate(sigma * self.cfg.gate_timestep_scale)
        return Modulation(main, cross, gate, final)

    def output(self, x, modulation):
        """(B, T, width) -> velocity (B, T, channels)."""
        shift, scale = (self.table + modulation.final[:, :, None]).unbind(2)
        y = F.layer_norm(x, x.shape[-1:], eps=self.cfg.norm_eps)
        return self.proj_out(modulated(y, scale, shift))


@dataclass(frozen=True)
class Captions:
    """Features of the captions of a batch, and of empty captions for classifier-free guidance."""

    features: tuple  # of (B, K, C_text): one for both streams, or one for video and one for audio
    nothing: tuple  # the same for B empty captions

    def __len__(self):
        return len(self.features[0])

    def with_nothing(self) -> tuple:
        """Features of twice the batch: the captions, then the empty captions."""
        return tuple(torch.cat(pair) for pair in zip(self.features, self.nothing))


class TextKV(NamedTuple):
    """Keys and values of a prompt: projected once, read by every pass."""

    video: tuple  # per layer: keys and values (B, K, H, D_v)
    audio: tuple  # per layer: keys and values (B, K, H, D_a)
    mask: torch.Tensor | None  # (B, 1, 1, K) booleans, True = attend to this token


# ---- the model ----


class OmniTransformer(nn.Module):
    """Two streams, one velocity for each."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        v, a = cfg.video_width, cfg.audio_width
        self.video = Modality(v, cfg.video_channels, cfg)
        self.audio = Modality(a, cfg.audio_channels, cfg)
        self.layers = nn.ModuleList(
            Layer(i, HalfLayer(v, a, 0, cfg), HalfLayer(a, v, 2, cfg))
            for i in range(cfg.num_layers)
        )
        self.sinks = SinkTokens(cfg.num_sinks, a) if cfg.num_sinks else None

    def project_text(self, video_features, audio_features=None, mask=None) -> TextKV:
        """Caption features (B, K, C_text), one per stream or shared, and a (B, K) 0/1 mask."""
        audio_features = video_features if audio_features is None else audio_features
        mask = None if mask is None else mask.bool()[:, None, None, :]
        c_v, c_a = self.video.captions(video_features), self.audio.captions(audio_features)
        return TextKV(*zip(*(layer.project_captions(c_v, c_a) for layer in self.layers)), mask)

    def forward(
        self, video, audio, sigma_video, sigma_audio, text: TextKV, span: Span, view, ropes=None
    ):
        """Velocities of the noisy tokens of `span`.

        video  (B, F_v * rows * columns, C_v)   audio  (B, F_a, C_a), without sinks
        sigma  (B,) for the clip, (B, F) per latent frame or (B, T) per token, for each stream
        text   from `project_text`
        span   which latent frames these are, counted from the start of the clip
        view   MaskedView or CachedView: which keys each query attends to
        ropes  rotation tables; default: `ropes_of`; full_size/faster.py gives fixed ones
        ->     (B, T_v, C_v), (B, F_a, C_a) velocities
        """
        ropes = ropes or ropes_of(self.cfg, span, video.device, video.dtype)
        v, a = self.video.proj_in(video), self.audio.proj_in(audio)
        sigma_video, sigma_audio = (s.view(len(s), -1) for s in (sigma_video, sigma_audio))
        with_sinks = self.sinks is not None and span.has_sinks
        if with_sinks:
            a, sigma_audio = self.sinks.prepend(a), self.sinks.prepend_sigma(sigma_audio)
        m_v, m_a = self.video.modulate(sigma_video), self.audio.modulate(sigma_audio)
        for layer, captions_v, captions_a in zip(self.layers, text.video, text.audio):
            v, a = layer(v, a, m_v, m_a, captions_v, captions_a, text.mask, ropes, view)
        if with_sinks:
            a = self.sinks.remove(a)
            m_a = m_a._replace(final=m_a.final[:, -a.shape[1] :])
        return self.video.output(v, m_v), self.audio.output(a, m_a)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def predict_x0(net, video, audio, sigma_video, sigma_audio, text: TextKV, span: Span, view):
    """Clean estimates of both streams from one pass; arguments as in `OmniTransformer.forward`."""
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
    with rope.angle_device(device):
        angles = _angles_of(cfg, span)
    return {name: rope.cos_sin(a, cfg, device, dtype) for name, a in angles.items()}


def _angles_of(cfg, span):
    audio = rope.time_angles(rope.audio_times(span.audio, cfg), cfg)
    if cfg.num_sinks and span.has_sinks:
        audio = torch.cat([sink_angles(cfg), audio])
    times = rope.video_times(span.video, cfg).repeat_interleave(cfg.tokens_per_frame)
    return {
        "video_self": rope.video_angles(span.video, cfg),
        "audio_self": audio,
        "video_cross": rope.time_angles(times, cfg),  # cross-modal attention knows time alone
        "audio_cross": audio,
    }


# ---- weights ----


def build(cfg, seed=0, device=None) -> OmniTransformer:
    """Create a model; every layer starts as the identity.

    Gates start at 1, the last matrix of every residual branch at 0. The output layers learn first,
    then the ends of the branches, then the rest.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device(device or "cpu"):
        model = OmniTransformer(cfg)
    if device != "meta":
        _initialise(model, generator)
    return model


@torch.no_grad()
def _initialise(model, generator):
    # stream by stream: another order would draw other numbers from the same seed
    halves = [[getattr(layer, name) for layer in model.layers] for name in ("video", "audio")]
    parts = [model.video, *halves[0], model.audio, *halves[1]]
    for name, p in (named for part in parts for named in part.named_parameters()):
        is_branch_end = name.endswith(("to_out.weight", "mlp_out.weight", "proj_out.weight"))
        if name.endswith("bias") or is_branch_end or "adaln" in name and ".linear.w" in name:
            p.zero_()
        elif name.endswith(".weight"):
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
    if model.sinks:
        p = model.sinks.tokens
        p.copy_(init_sinks(*p.shape[1:], generator))
    for half in (*halves[0], *halves[1]):
        half.table[[2, 5]] = 1.0
        half.cross_table[4] = 1.0


def load(path) -> OmniTransformer:
    """Return the model of a weight file of this project, in float32 and evaluation mode.

    Raises ValueError for a file that is incomplete, was not written by this project, or does not
    fit its own config.
    """
    tensors, cfg, _ = files.read_weights(path)
    model = build(cfg)
    files.load_into(model, tensors, path)
    return model.eval()


if __name__ == "__main__":
    cfg = config.TOY
    model = build(cfg)
    span = clip_span(6, cfg)
    noise = draw_noise(1, span, cfg, torch.Generator())
    sigma = torch.ones(1)
    text = model.project_text(torch.eye(9)[None, 1:4])
    for label, masks in (("bidirectional", None), ("block-causal", four_masks(cfg, 6))):
        v, a = model(*noise, sigma, sigma, text, span, MaskedView(masks))
        print(f"{label}: video {tuple(v.shape)}, audio {tuple(a.shape)}")
    print(f"{cfg.name}: {model.num_parameters():,} parameters")
    for big in (config.LTX2, config.FULL, config.RELEASED):
        print(f"{big.name}: {build(big, device='meta').num_parameters():,} parameters")
