"""The transformer: noise levels, text, flags, and agreement with diffusers' LTX-2."""

from dataclasses import replace

import pytest
import torch
from helpers import PAPER, assert_same, differ, random_clip, random_model, random_text, tiny

import config
import rope
from full_size import weights as ltx2
from kv_cache import MaskedView
from masks import clip_span, four_masks
from model import add_noise, build, ropes_of, timestep_embedding, to_x0

CFG = tiny(replace(PAPER, num_sinks=4))
BLOCKS = 3


def run(model, clip, sigma_video, sigma_audio, text, view=None, blocks=BLOCKS):
    span = clip_span(blocks, model.cfg)
    return model(*clip, sigma_video, sigma_audio, text, span, view or MaskedView())


@pytest.fixture(scope="module")
def model():
    return random_model(CFG)


@pytest.fixture
def clip():
    torch.manual_seed(1)
    return random_clip(CFG, BLOCKS, clips=2)


# ---- noise and velocity ----


def test_velocity_leads_back_to_the_clean_tokens():
    """to_x0 undoes add_noise when the velocity is noise - x0, at any level per token."""
    x0, noise = torch.randn(2, 2, 7, 3).unbind()
    sigma = torch.rand(2, 7)
    assert torch.allclose(to_x0(add_noise(x0, noise, sigma), sigma, noise - x0), x0, atol=1e-6)


def test_sigma_1_is_pure_noise_and_0_is_clean():
    """The ends of the noise scale are exact."""
    x0, noise = torch.randn(2, 1, 5, 3).unbind()
    assert torch.equal(add_noise(x0, noise, torch.ones(1, 1)), noise)
    assert torch.equal(add_noise(x0, noise, torch.zeros(1, 1)), x0)
    assert torch.equal(to_x0(x0, torch.zeros(1, 1), noise), x0)


def test_clean_estimates_are_computed_in_float32():
    """In bfloat16, only the result of x - sigma v is rounded."""
    x, v = torch.randn(2, 1, 50, 3).bfloat16().unbind()
    sigma = torch.full((1, 1), 0.4207186)
    assert torch.equal(to_x0(x, sigma, v), (x.float() - 0.4207186 * v.float()).bfloat16())


def test_timestep_embedding_has_cosines_first():
    """cos(tau w_i), then sin(tau w_i), with w_i from 1 down to 1e-4 exclusive (LTX-2)."""
    e = timestep_embedding(torch.tensor([[2.0]]))[0, 0]
    w = 10000.0 ** (-torch.arange(128) / 128)
    assert torch.allclose(e, torch.cat([(2 * w).cos(), (2 * w).sin()]), atol=1e-6)


# ---- noise levels of a pass ----


def test_one_sigma_per_clip_per_frame_or_per_token_is_the_same(model, clip):
    """The same level per clip, per frame or per token gives the same velocities, with sinks."""
    text = random_text(model, CFG, clips=2)
    s = torch.tensor([0.3, 0.8], dtype=torch.float64)
    frames, tokens, audio = 7, clip[0].shape[1], clip[1].shape[1]
    truth = run(model, clip, s, s, text)
    for video_levels in (frames, tokens):
        levels = [s[:, None].expand(2, n) for n in (video_levels, audio)]
        assert_same(truth, run(model, clip, *levels, text))


def test_levels_per_frame_are_levels_per_token_repeated(model, clip):
    """Frame f has the tokens 4 f to 4 f + 3; its level is their level."""
    text = random_text(model, CFG, clips=2)
    per_frame, audio = (torch.rand(2, n, dtype=torch.float64) for n in (7, clip[1].shape[1]))
    per_token = per_frame.repeat_interleave(CFG.tokens_per_frame, dim=1)
    one, other = (run(model, clip, s, audio, text) for s in (per_frame, per_token))
    assert_same(one, other)


def test_each_stream_has_its_own_noise_level(model, clip):
    """A change of the level of one stream changes the velocities of both."""
    text = random_text(model, CFG, clips=2)
    low, high = (torch.full((2,), s, dtype=torch.float64) for s in (0.2, 0.9))
    truth = run(model, clip, low, high, text)
    assert differ(truth, run(model, clip, low, low, text))
    assert differ(truth, run(model, clip, high, high, text))
    assert differ(truth, run(model, clip, high, low, text))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_only_the_gates_see_the_gate_timestep_scale(scale):
    """Gates are functions of sigma * scale, everything else of 1000 sigma."""
    stream = random_model(replace(CFG, gate_timestep_scale=scale)).video
    sigma = torch.tensor([[0.1, 0.7]], dtype=torch.float64)
    rows = stream.modulate(sigma)
    assert torch.equal(rows.gate, stream.adaln_gate(scale * sigma)[0])
    assert torch.equal(rows.main, stream.adaln(1000 * sigma)[0])
    assert torch.equal(rows.cross, stream.adaln_cross(1000 * sigma)[0])


def test_every_flag_changes_the_numbers_but_no_shape(clip):
    """The same weights load with any of the three flags, but the output differs.

    So a wrong flag goes unnoticed when weights are loaded.
    """
    cfg = replace(CFG, rope_theta=10000.0)  # here both grid precisions differ, by up to 5e-3 rad
    truth = random_model(cfg)
    text, sigma = random_text(truth, cfg, clips=2), torch.full((2,), 0.5, dtype=torch.float64)
    for flag in (
        dict(rope_layout="interleaved"),
        dict(rope_float64=False),
        dict(gate_timestep_scale=1.0),
    ):
        other = random_model(replace(cfg, **flag))
        other.load_state_dict(truth.state_dict())
        one, two = (run(m, clip, sigma, sigma, text) for m in (truth, other))
        assert not torch.allclose(one[0], two[0], atol=1e-7)
        assert not torch.allclose(one[1], two[1], atol=1e-7)


# ---- masks and captions ----


@pytest.mark.parametrize("S", [0, 16])
def test_masked_and_bidirectional_passes_differ(S, clip):
    """They differ at every token: even the last block reads a past that saw no future."""
    cfg = replace(CFG, num_sinks=S)
    model = random_model(cfg)
    text, sigma = random_text(model, cfg, clips=2), torch.full((2,), 0.5, dtype=torch.float64)
    free = run(model, clip, sigma, sigma, text)
    causal = run(model, clip, sigma, sigma, text, MaskedView(four_masks(cfg, BLOCKS)))
    for one, other in zip(free, causal):
        assert (one - other).abs().amax(-1).min() > 1e-6


def test_a_mask_that_allows_everything_is_no_mask(model, clip):
    """A single block has nothing to hide: masked and bidirectional passes are the same."""
    text, sigma = random_text(model, CFG, clips=2), torch.full((2,), 0.5, dtype=torch.float64)
    first = clip[0][:, : CFG.tokens_per_frame], clip[1][:, :1]
    views = MaskedView(four_masks(CFG, 1)), MaskedView()
    assert_same(*(run(model, first, sigma, sigma, text, v, blocks=1) for v in views))


def test_masked_caption_tokens_are_not_read(model, clip):
    """Padding after a caption changes nothing if it is masked, and a lot if it is not."""
    features = torch.randn(2, 6, CFG.caption_width, dtype=torch.float64)
    keep = torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)
    sigma = torch.full((2,), 0.5, dtype=torch.float64)

    def with_text(features, mask=None):
        return run(model, clip, sigma, sigma, model.project_text(features, mask=mask))

    cut = with_text(features[:, :4])
    assert_same(cut, with_text(features, keep))
    assert_same(with_text(features), with_text(features, torch.ones(2, 6)))
    assert differ(cut, with_text(features))


def test_each_stream_reads_its_own_caption_features(model, clip):
    """Video features reach audio only through the video, and shared features are the default."""
    video, audio = torch.randn(2, 2, 5, CFG.caption_width, dtype=torch.float64).unbind()
    sigma = torch.full((2,), 0.5, dtype=torch.float64)
    texts = [model.project_text(video, f) for f in (None, video, audio)]
    shared, same, own = (run(model, clip, sigma, sigma, t) for t in texts)
    assert_same(shared, same)
    assert differ(shared, own)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(texts[0].video, texts[2].video))


def test_clips_of_a_batch_do_not_mix(model, clip):
    """A batch of two gives the same velocities as two batches of one."""
    features = torch.randn(2, 4, CFG.caption_width, dtype=torch.float64)
    sigma = torch.tensor([0.2, 0.9], dtype=torch.float64)
    both = run(model, clip, sigma, sigma, model.project_text(features))
    for b in range(2):
        one = [x[b : b + 1] for x in (*clip, sigma, sigma)]
        alone = run(model, one[:2], *one[2:], model.project_text(features[b : b + 1]))
        assert_same([x[b : b + 1] for x in both], alone)


# ---- precision and initial values ----


def test_a_bfloat16_model_computes_in_bfloat16(model, clip):
    """Velocities have the dtype of the weights and agree with float64 up to rounding."""
    half = random_model(CFG, torch.bfloat16)
    half.load_state_dict(model.state_dict())
    features, sigma = torch.randn(2, 4, CFG.caption_width), torch.full((2,), 0.5)
    low_clip, low_text = [x.bfloat16() for x in clip], half.project_text(features.bfloat16())
    low = run(half, low_clip, sigma, sigma, low_text)
    high = run(model, clip, sigma.double(), sigma.double(), model.project_text(features.double()))
    for a, b in zip(low, high):
        assert a.dtype == torch.bfloat16
        assert (a - b).pow(2).mean() < 0.01 * b.pow(2).mean()


def test_a_fresh_model_predicts_nothing_and_follows_its_seed(clip):
    """Output layers start at zero. Equal seeds give equal weights, other seeds other weights."""
    one, same, other = (build(CFG, seed) for seed in (3, 3, 4))
    text, sigma = random_text(one, CFG, clips=2), torch.full((2,), 0.5)
    for v in run(one, [x.float() for x in clip], sigma, sigma, text):
        assert v.abs().max() == 0
    states = [m.state_dict() for m in (one, same, other)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    key = "layers.1.audio.cross_attn.to_q.weight"
    assert not torch.equal(states[0][key], states[2][key])


def test_the_matrices_of_a_fresh_model_keep_the_size_of_their_input():
    """Numbers of size 1 / sqrt(inputs), whether a matrix widens or narrows; or zeros."""
    matrices = [p for name, p in build(CFG).state_dict().items() if name.endswith(".weight")]
    sizes = [float(p.std() * p.shape[1] ** 0.5) for p in matrices if p.any()]
    assert sizes == pytest.approx([1] * len(sizes), abs=0.1)
    assert len(sizes) > len(matrices) / 2


# ---- the equations, one by one ----


class PlainLTX2:
    """The bidirectional transformer for one clip, written out with the key names of LTX-2.

    No classes per modality, no views, no fused kernels: slow, and easy to check against a paper.
    """

    def __init__(self, model):
        self.w, self.cfg = ltx2.to_ltx2(model.state_dict(), model), model.cfg

    def linear(self, name, x):
        return x @ self.w[name + ".weight"].T + self.w[name + ".bias"]

    def adaptive(self, name, tau, rows):
        """Vectors that shift, scale and gate, and the embedded timestep."""
        e = timestep_embedding(tau.view(1, 1)).double()[0, 0]
        hidden = silu(self.linear(name + ".emb.timestep_embedder.linear_1", e))
        z = self.linear(name + ".emb.timestep_embedder.linear_2", hidden)
        return self.linear(name + ".linear", silu(z)).view(rows, -1), z

    def attend(self, name, x, context, q_rope=None, k_rope=None):
        q = rms(self.linear(name + ".to_q", x)) * self.w[name + ".q_norm.weight"]
        k = rms(self.linear(name + ".to_k", context)) * self.w[name + ".k_norm.weight"]
        v = self.linear(name + ".to_v", context)
        q, k, v = (y.view(1, len(y), self.cfg.num_heads, -1) for y in (q, k, v))
        if q_rope:
            q, k = rope.rotate(q, q_rope), rope.rotate(k, k_rope)
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        out = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v)
        return self.linear(name + ".to_out.0", out.flatten(2)[0])

    def feed_forward(self, name, x):
        y = self.linear(name + ".net.0.proj", x)
        y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
        return self.linear(name + ".net.2", y)

    def forward(self, v, a, sigma_v, sigma_a, caption, ropes):
        v, a = self.linear("patchify_proj", v), self.linear("audio_patchify_proj", a)
        self.m_v, z_v = self.adaptive("adaln_single", 1000 * sigma_v, 6)
        self.m_a, z_a = self.adaptive("audio_adaln_single", 1000 * sigma_a, 6)
        c_v, c_a = (self.caption(p, caption) for p in ("", "audio_"))
        for i in range(self.cfg.num_layers):
            v, a = self.layer(f"transformer_blocks.{i}.", v, a, sigma_v, sigma_a, c_v, c_a, ropes)
        return self.exit("", v, z_v), self.exit("audio_", a, z_a)

    def caption(self, prefix, features):
        y = self.linear(prefix + "caption_projection.linear_1", features)
        y = torch.nn.functional.gelu(y, approximate="tanh")
        return self.linear(prefix + "caption_projection.linear_2", y)

    def layer(self, at, v, a, sigma_v, sigma_a, c_v, c_a, ropes):
        s_v = self.w[at + "scale_shift_table"] + self.m_v  # shift, scale, gate; twice
        s_a = self.w[at + "audio_scale_shift_table"] + self.m_a
        r_v, r_a = ropes["video_self"], ropes["audio_self"]
        y = rms(v) * (1 + s_v[1]) + s_v[0]
        v = v + s_v[2] * self.attend(at + "attn1", y, y, r_v, r_v)
        v = v + self.attend(at + "attn2", rms(v), c_v)
        y = rms(a) * (1 + s_a[1]) + s_a[0]
        a = a + s_a[2] * self.attend(at + "audio_attn1", y, y, r_a, r_a)
        a = a + self.attend(at + "audio_attn2", rms(a), c_a)
        v, a = self.cross(at, v, a, sigma_v, sigma_a, ropes["video_cross"], ropes["audio_cross"])
        v = v + s_v[5] * self.feed_forward(at + "ff", rms(v) * (1 + s_v[4]) + s_v[3])
        a = a + s_a[5] * self.feed_forward(at + "audio_ff", rms(a) * (1 + s_a[4]) + s_a[3])
        return v, a

    def cross(self, at, v, a, sigma_v, sigma_a, r_v, r_a):
        n_v, n_a = rms(v), rms(a)
        t_v, g_v = self.cross_rows(at, "video", "a2v", sigma_v)  # scale, shift for a2v, then v2a
        t_a, g_a = self.cross_rows(at, "audio", "v2a", sigma_a)
        hear = n_v * (1 + t_v[0]) + t_v[1], n_a * (1 + t_a[0]) + t_a[1]
        v = v + g_v * self.attend(at + "audio_to_video_attn", *hear, r_v, r_a)
        hear = n_a * (1 + t_a[2]) + t_a[3], n_v * (1 + t_v[2]) + t_v[3]
        a = a + g_a * self.attend(at + "video_to_audio_attn", *hear, r_a, r_v)
        return v, a

    def cross_rows(self, at, stream, direction, sigma):
        table = self.w[at + f"scale_shift_table_a2v_ca_{stream}"]
        rows, _ = self.adaptive(f"av_ca_{stream}_scale_shift_adaln_single", 1000 * sigma, 4)
        gate_tau = self.cfg.gate_timestep_scale * sigma
        gate, _ = self.adaptive(f"av_ca_{direction}_gate_adaln_single", gate_tau, 1)
        return table[:4] + rows, table[4] + gate[0]

    def exit(self, prefix, x, z):
        shift, scale = self.w[prefix + "scale_shift_table"] + z
        x = x - x.mean(-1, keepdim=True)
        return self.linear(prefix + "proj_out", rms(x) * (1 + scale) + shift)


def rms(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def silu(x):
    return x * torch.sigmoid(x)


@pytest.mark.parametrize("gate_scale", [1.0, 1000.0])
def test_velocities_equal_the_equations_of_ltx2(gate_scale):
    """In float64, on random weights, with different noise levels of video and audio."""
    cfg = replace(CFG, num_sinks=0, gate_timestep_scale=gate_scale)
    model, span = random_model(cfg), clip_span(2, cfg)
    clip, features = random_clip(cfg, 2), torch.randn(1, 5, cfg.caption_width, dtype=torch.float64)
    sigmas = torch.tensor([[0.3], [0.8]], dtype=torch.float64)
    ours = run(model, clip, *sigmas, model.project_text(features), blocks=2)
    ropes = ropes_of(cfg, span, torch.device("cpu"), torch.float64)
    plain = PlainLTX2(model).forward(clip[0][0], clip[1][0], *sigmas, features[0], ropes)
    assert_same(ours, [x[None] for x in plain])


# ---- the same weights in diffusers ----


@pytest.fixture
def diffusers_ltx2():
    name = "diffusers.models.transformers.transformer_ltx2"
    return pytest.importorskip(name, reason="diffusers is not installed")


DIFFUSERS_NAMES = [  # names in LTX-2's file and in diffusers; a name before its own parts
    ("scale_shift_table_a2v_ca_video", "video_a2v_cross_attn_scale_shift_table"),
    ("scale_shift_table_a2v_ca_audio", "audio_a2v_cross_attn_scale_shift_table"),
    ("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
    ("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
    ("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
    ("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
    ("adaln_single", "time_embed"),
    ("patchify_proj", "proj_in"),
    ("q_norm", "norm_q"),
    ("k_norm", "norm_k"),
]


def in_diffusers(model, module):
    """Return the transformer of diffusers with the same weights."""
    cfg = model.cfg
    theirs = module.LTX2VideoTransformer3DModel(
        in_channels=cfg.video_channels,
        out_channels=cfg.video_channels,
        num_attention_heads=cfg.num_heads,
        attention_head_dim=cfg.video_width // cfg.num_heads,
        cross_attention_dim=cfg.video_width,
        audio_in_channels=cfg.audio_channels,
        audio_out_channels=cfg.audio_channels,
        audio_num_attention_heads=cfg.num_heads,
        audio_attention_head_dim=cfg.audio_width // cfg.num_heads,
        audio_cross_attention_dim=cfg.audio_width,
        num_layers=cfg.num_layers,
        caption_channels=cfg.caption_width,
        rope_type=cfg.rope_layout,
        rope_double_precision=cfg.rope_float64,
        cross_attn_timestep_scale_multiplier=cfg.gate_timestep_scale,
    )
    weights = {}
    for key, weight in ltx2.to_ltx2(model.state_dict(), model).items():
        for ours, renamed in DIFFUSERS_NAMES:
            key = key.replace(ours, renamed)
        weights[key] = weight
    theirs.load_state_dict(weights, strict=True)
    return theirs.eval()


def exact_coords(their_rope, their_audio_rope, cfg, span):
    """Return the bounds of every token in pixels and seconds, from diffusers but in float64."""
    # diffusers rounds them to float32. At the highest frequency this is worth 1e-3 rad, which would
    # hide real differences.
    F_v, F_a = len(span.video), len(span.audio)
    video = their_rope.prepare_video_coords(2, F_v, *cfg.grid, "cpu", fps=1.0).double()
    video[:, 0] /= cfg.fps
    mel_frames = (their_audio_rope.prepare_audio_coords(2, F_a, "cpu").double() * 100).round()
    return dict(video_coords=video, audio_coords=mel_frames / 100)


FLAG_SETS = {
    "teacher": dict(rope_layout="split", rope_float64=True, gate_timestep_scale=1000.0),
    "student": dict(rope_layout="interleaved", rope_float64=False, gate_timestep_scale=1.0),
}


@pytest.mark.parametrize("flags", FLAG_SETS)
def test_velocities_equal_those_of_diffusers(flags, diffusers_ltx2):
    """On the same random weights, both flag sets agree with diffusers to 1e-5 in float32.

    Noise levels differ per token and per stream, captions per stream, one caption is masked.
    """
    ltx2_axes = dict(
        rope_theta=10000.0, rope_max_seconds=20.0, rope_max_pixels=2048.0, rope_heads="contiguous"
    )
    strides = dict(pixel_stride=32, height=64, width=96)
    cfg = tiny(replace(PAPER, num_sinks=0, **FLAG_SETS[flags], **ltx2_axes), **strides)
    model = random_model(cfg, torch.float32)
    theirs, span = in_diffusers(model, diffusers_ltx2), clip_span(2, cfg)
    video, audio = random_clip(cfg, 2, clips=2, dtype=torch.float32)
    sigma_v, sigma_a = torch.rand(2, video.shape[1]), torch.rand(2, audio.shape[1])
    text_v, text_a = torch.randn(2, 2, 6, cfg.caption_width).unbind()
    keep = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    text = model.project_text(text_v, text_a, keep)
    ours = model(video, audio, sigma_v, sigma_a, text, span, MaskedView())
    with torch.no_grad():
        expected = theirs(
            video,
            audio,
            text_v,
            text_a,
            timestep=1000 * sigma_v,
            audio_timestep=1000 * sigma_a,
            encoder_attention_mask=keep,
            audio_encoder_attention_mask=keep,
            use_cross_timestep=False,
            return_dict=False,
            **exact_coords(theirs.rope, theirs.audio_rope, cfg, span),
        )
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("flags", FLAG_SETS)
def test_rotary_tables_equal_those_of_diffusers_at_full_width(flags, diffusers_ltx2):
    """Every channel pair of every token has the same angle, also pairs that are not rotated."""
    cfg = replace(config.LTX2, height=64, width=96, **FLAG_SETS[flags])
    span = clip_span(2, cfg)
    same = dict(rope_type=cfg.rope_layout, double_precision=cfg.rope_float64)
    kind = diffusers_ltx2.LTX2AudioVideoRotaryPosEmbed
    video = kind(4096, modality="video", **same)
    cross = kind(2048, modality="video", **same)
    audio = kind(2048, modality="audio", scale_factors=(4,), **same)
    coords = exact_coords(video, audio, cfg, span)
    expected = {
        "video_self": video(coords["video_coords"]),
        "video_cross": cross(coords["video_coords"][:, :1]),
        "audio_self": audio(coords["audio_coords"]),
    }
    ours = ropes_of(cfg, span, torch.device("cpu"), torch.float64)
    for site, tables in expected.items():
        for a, b in zip(ours[site][:2], tables):  # theirs: per channel, or (B, H, T, D / 2)
            b = b[0, :, ::2] if b.dim() == 3 else b[0].transpose(0, 1).flatten(1)
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
