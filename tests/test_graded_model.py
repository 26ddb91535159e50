"""Graded: noise and velocity, modulation, and the steps of a layer of two streams."""

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
from grading import check, check_dtype, check_gradients, random_tensor, watched

import config
import kv_cache
import model
from masks import block_span

CFG = replace(
    config.TOY, num_layers=1, num_heads=2, video_width=16, audio_width=8, height=8, width=16,
    norm_eps=0.1, num_sinks=0,
)  # fmt: skip
SPAN = block_span(1, CFG)  # 3 frames of 2 video tokens, 25 audio tokens
CLIPS = 3
LEVELS = torch.tensor([[0.0, 0.25, 1.0], [0.5, 0.75, 0.125], [1.0, 0.0, 0.5]])  # of 3 clips


def spread(rows, tokens):
    """Repeat the rows (B, L, ...) of each level for its tokens: (B, T, ...)."""
    return rows.repeat_interleave(tokens // rows.shape[1], dim=1)


@pytest.mark.points(1, "add_noise")
def test_sigma_1_is_noise_and_0_is_clean():
    """A straight line from clean to noise, with levels of every clip, for one or for all tokens."""
    for dtype in (torch.bfloat16, torch.float64):
        x, noise = random_tensor(2, 3, 3, 3, dtype=dtype)
        with watched(x, noise):
            found = model.add_noise(x, noise, LEVELS)
        check_dtype(found, dtype, "the result has the dtype of x0")
    for sigma in (LEVELS, LEVELS[:, 1:2]):
        x0 = random_tensor(3, 3, 3, requires_grad=True)
        noise = random_tensor(3, 3, 3, seed=1)
        with watched(x0, noise, sigma):
            found = model.add_noise(x0, noise, sigma)
        s = sigma[:, :, None]
        levels = f"levels {tuple(sigma.shape)}"
        suspects = {
            "the direction is wrong: sigma = 0 is clean, sigma = 1 is noise": s * x0
            + (1 - s) * noise,
            "all clips get the levels of clip 0": (1 - s[:1]) * x0 + s[:1] * noise,
        }
        right = (1 - s) * x0 + s * noise
        check(found, right, f"{levels}: not (1 - sigma) x0 + sigma noise", suspects)
        assert found.requires_grad, "no gradient passes on to x0"


@pytest.mark.points(1, "to_x0")
def test_the_velocity_leads_back_to_the_clean_tokens():
    """x0 = x - sigma v, for v = noise - x0, with levels of every clip; gradients pass through."""
    x0, noise = random_tensor(2, 3, 3, 3)
    for sigma in (LEVELS, LEVELS[:, 1:2]):
        s = sigma[..., None]
        x, v = (x0 + s * (noise - x0)).requires_grad_(), (noise - x0).requires_grad_()
        with watched(x, sigma, v):
            found = model.to_x0(x, sigma, v)
        suspects = {
            "the sign is wrong: v points from clean to noise, so go against it": x + s * v,
            "all clips get the levels of clip 0": x - s[:1] * v,
        }
        check(found, x0, "this is not the clean end: x0 = x - sigma v", suspects)
        assert found.requires_grad, "no gradient passes through: a training would learn nothing"
        gradients = torch.autograd.grad(found.sum(), [x, v], allow_unused=True)
        for name, gradient in zip(("x", "the velocity"), gradients):
            assert gradient is not None, f"no gradient reaches {name}"


@pytest.mark.points(1, "to_x0")
def test_clean_estimates_are_computed_in_float32():
    """For bfloat16 tokens, only the result is rounded; float64 stays float64."""
    x, v = random_tensor(2, 3, 200, 3).bfloat16()
    sigma = torch.tensor([[0.4207186], [0.9], [0.1]])
    found = model.to_x0(x, sigma, v)
    check_dtype(found, torch.bfloat16, "the result has the dtype of x")
    right = (x.float() - sigma[..., None] * v.float()).bfloat16()
    assert torch.equal(found, right), "rounded too early: compute in float32, then round"
    x, v = random_tensor(2, 3, 3, 3, dtype=torch.float64)
    found = model.to_x0(x, LEVELS, v)
    check_dtype(found, torch.float64, "the result has the dtype of x")
    right = x - LEVELS[..., None].double() * v
    check(found, right, "float64 tokens go through float32: compute in float32 or better", {}, 1e-9)


@pytest.mark.points(1, "per_token")
def test_all_tokens_of_a_frame_have_its_level():
    """(B,) and (B, 1) apply to all tokens; the levels of F frames are repeated in place."""
    x = torch.zeros(3, 6, 4)
    for shape in ((3,), (3, 1)):
        sigma = LEVELS[:, 1].view(shape)
        with watched(sigma, x):
            found = model.per_token(sigma, x)
        fits = found.shape in ((3, 1), (3, 6))
        assert fits, f"levels {shape} became {tuple(found.shape)}, not (B, 1) or (B, T)"
        right = LEVELS[:, 1:2].expand(found.shape)
        check(found, right, f"levels {shape}: every clip keeps its own level")
    for sigma in (LEVELS, LEVELS[:, :2], spread(LEVELS, 6), LEVELS.double()):
        with watched(sigma, x):
            found = model.per_token(sigma, x)
        right = spread(sigma, 6)
        repeated = sigma.repeat(1, 6 // sigma.shape[1])
        suspects = {
            "levels alternate, but the tokens of a frame are consecutive": repeated,
            "all clips get the levels of clip 0": right[:1].expand_as(right),
        }
        check(found, right, f"levels {tuple(sigma.shape)} of 6 tokens", suspects)
        check_dtype(found, sigma.dtype, "levels keep their dtype")


@pytest.mark.points(2, "timestep_embedding")
def test_cosines_then_sines_of_falling_rates():
    """The rates fall from 1 towards 1/10000: exp(-ln(10000) i / half); always in float32."""
    tau = torch.tensor([[700.0, 2.0], [0.0, 420.0], [1.0, 999.0], [31.0, 8.0]])
    for width, dtype in ((8, torch.float32), (8, torch.bfloat16), (6, torch.float64)):
        half, given = width // 2, tau.to(dtype)
        with watched(given):
            found = model.timestep_embedding(given, width=width)
        shape = f"(4, 2) timesteps became {tuple(found.shape)}, not (4, 2, {width})"
        assert found.shape == (4, 2, width), shape
        check_dtype(found, torch.float32, f"{dtype} timesteps: the embedding is in float32")

        def waves(rates, names=(math.cos, math.sin)):
            rows = [[[f(t * r) for f in names for r in rates] for t in row] for row in exact]
            return torch.tensor(rows, dtype=torch.float64)

        exact = given.double().tolist()
        rates = [10000 ** (-i / half) for i in range(half)]
        too_far = [10000 ** (-i / (half - 1)) for i in range(half)]
        suspects = {
            "sines come first, not cosines": waves(rates, (math.sin, math.cos)),
            "divide by half, not by half - 1": waves(too_far),
        }
        wrong = "the rates must fall from 1 towards 1/10000"
        if dtype == torch.bfloat16:
            wrong = "bfloat16 timesteps: angles must be computed in float32"
        check(found, waves(rates), wrong, suspects, atol=1e-3)
    assert model.timestep_embedding(tau).shape == (4, 2, 256), "the default width is 256"


def random_half(stream, other, seed=0):
    """Make a `HalfLayer` with random weights, in float64."""
    widths = {"video": CFG.video_width, "audio": CFG.audio_width}
    row = 0 if stream == "video" else 2
    half = Half(widths[stream], widths[other], row, CFG).double()
    for i, p in enumerate(half.parameters()):
        p.data = 0.5 * random_tensor(*p.shape, seed=100 * seed + i, dtype=torch.float64)
    return half


def random_modulation(width, levels, seed):
    """Make random rows for three clips at L noise levels."""
    draw = functools.partial(random_tensor, dtype=torch.float64, seed=seed, requires_grad=True)
    shapes = [(CLIPS, levels, rows, width) for rows in (6, 4, 1)]
    return model.Modulation(*(draw(*shape) for shape in shapes), draw(CLIPS, levels, width))


def normed(x):
    return x / (x.square().mean(-1, keepdim=True) + CFG.norm_eps).sqrt()


class Half(model.HalfLayer):
    """A `HalfLayer` with self attention by hand, for `Layer.forward`."""

    def attend_self(self, x, modulation, positions, attend):
        shift, scale, gate = (
            self.table[i] + spread(modulation.main[:, :, i], x.shape[1]) for i in range(3)
        )
        y = normed(x) * (1 + scale) + shift
        return x + gate * self.self_attn(y, y, positions, positions, attend)


@pytest.mark.points(3, "HalfLayer.attend_self")
def test_self_attention_is_a_gated_residual_of_modulated_tokens():
    """x + gate * attention(N(x) (1 + scale) + shift), for one level a clip, a frame or a token."""
    tables = model.ropes_of(CFG, SPAN, torch.device("cpu"), torch.float64)
    for stream, other, T in (("video", "audio", 6), ("audio", "video", 25)):
        half, positions = random_half(stream, other), tables[f"{stream}_self"]
        for levels in (1, 5 if T == 25 else 3, T):
            shape = CLIPS, T, half.table.shape[1]
            x = random_tensor(*shape, dtype=torch.float64, requires_grad=True)
            modulation = random_modulation(x.shape[2], levels, seed=7)
            given = []

            def attend(q, k, v, heads):
                given.append((q, k, v, heads))
                return kv_cache.MaskedView().attend(0, "site", q, k, v, heads)

            with watched(x, modulation, half.table):
                found = model.HalfLayer.attend_self(half, x, modulation, positions, attend)
            assert len(given) == 1, f"there is one attention, not {len(given)}"
            ((q, k, v, heads),) = given
            is_own = heads.q_rope is positions and heads.k_rope is positions
            assert is_own, "queries and keys need the same rotation table, `positions`"
            shift, scale, gate = (
                half.table[i] + spread(modulation.main[:, :, i], T) for i in range(3)
            )
            n, project = normed(x), half.self_attn.to_q
            per = f"{stream}, {levels} levels for {T} tokens: "
            suspects = {
                f"{per}shift and scale are swapped": project(n * (1 + shift) + scale),
                f"{per}x is not normalised": project(x * (1 + scale) + shift),
                f"{per}scale by 1 + scale, not by scale": project(n * scale + shift),
                f"{per}the table is left out": project(
                    n * (1 + scale - half.table[1]) + shift - half.table[0]
                ),
                f"{per}the rows of clip 0 modulate all clips": project(
                    n * (1 + scale[:1]) + shift[:1]
                ),
            }
            y = n * (1 + scale) + shift
            check(q, project(y), f"{per}queries are not of N(x) (1 + scale) + shift", suspects)
            context = "in self attention, keys and values are of the same tokens as queries"
            for found_, layer in ((k, half.self_attn.to_k), (v, half.self_attn.to_v)):
                check(found_, layer(y), context)
            result = half.self_attn(y, y, positions, positions, kv_attend)
            suspects = {
                f"{per}the residual is missing: x + ...": gate * result,
                f"{per}the gate is missing": x + result,
                f"{per}the residual is the modulated x, not x": y + gate * result,
                f"{per}the gate is 1 + gate": x + (1 + gate) * result,
            }
            check(found, x + gate * result, f"{per}not x + gate * attention", suspects)
            learn = {"x": x, "the table": half.table, "the modulation": modulation.main}
            check_gradients(found, x + gate * result, learn, stream)


def kv_attend(q, k, v, heads):
    return kv_cache.MaskedView().attend(0, "site", q, k, v, heads)


class View(kv_cache.MaskedView):
    """A view without masks that records every call, and knows the names of the tables."""

    def __init__(self, tables):
        super().__init__()
        self.calls, self.names = [], {id(table): name for name, table in tables.items()}

    def attend(self, layer, site, q, k, v, heads):
        tables = heads.q_rope, heads.k_rope
        names = [self.names.get(id(table), "unknown") for table in tables]
        self.calls.append((layer, site, q, k, names))
        for x, table in zip((q, k), tables):
            fits = table is not None and table.cos.shape == (x.shape[1], x.shape[2] // 2)
            assert fits, f"{site}: rotations of (queries, keys) are {names}"
        return super().attend(layer, site, q, k, v, heads)


STEPS = ["attend_self", "attend_captions", "attend_other", "mlp"]
TOKENS = {6: "video", 25: "audio"}


@functools.cache
def inputs():
    """Make what a layer gets, in order of its arguments up to `ropes`, and both halves."""
    halves = random_half("video", "audio", 1), random_half("audio", "video", 2)
    v = random_tensor(CLIPS, 6, CFG.video_width, dtype=torch.float64, requires_grad=True)
    a = random_tensor(CLIPS, 25, CFG.audio_width, dtype=torch.float64, requires_grad=True)
    m_v, m_a = random_modulation(CFG.video_width, 3, 3), random_modulation(CFG.audio_width, 5, 4)
    captions = [
        half.text_attn.project_captions(random_tensor(CLIPS, 4, width, dtype=torch.float64))
        for half, width in zip(halves, (CFG.video_width, CFG.audio_width))
    ]
    captions = [tuple(x.detach() for x in pair) for pair in captions]
    words = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]])
    mask = words[:, None, None]
    tables = model.ropes_of(CFG, SPAN, torch.device("cpu"), torch.float64)
    tables = {name: table._replace(cos=table.cos.clone()) for name, table in tables.items()}
    return halves, (v, a, m_v, m_a, *captions, mask, tables)


def layer_by_hand(forgotten=(), unmasked=()):
    """Run a layer in plain order; forgotten: each (stream, step) that is left out."""
    halves, (v, a, m_v, m_a, captions_v, captions_a, mask, ropes) = inputs()
    x, names = {"video": v, "audio": a}, ("video", "audio")
    half, m = dict(zip(names, halves)), dict(video=m_v, audio=m_a)
    captions = dict(video=captions_v, audio=captions_a)

    def step(name, kind, result):
        if (name, kind) not in forgotten:
            x[name] = result

    for name in names:
        own = half[name].attend_self(x[name], m[name], ropes[f"{name}_self"], kv_attend)
        step(name, "attend_self", own)
    for name in names:
        read = half[name].attend_captions(
            x[name], captions[name], None if name in unmasked else mask
        )
        step(name, "attend_captions", read)
    crossed = {name: half[name].cross_inputs(x[name], m[name]) for name in names}
    for name, other in (names, names[::-1]):
        tables = ropes[f"{name}_cross"], ropes[f"{other}_cross"]
        given = x[name], crossed[name][0], crossed[other][1], m[name], *tables, kv_attend
        step(name, "attend_other", half[name].attend_other(*given))
    for name in names:
        step(name, "mlp", half[name].mlp(x[name], m[name]))
    return x


def run_layer():
    """Run layer 7: the streams after it, its view, and its arguments."""
    halves, given = inputs()
    layer, view = model.Layer(7, *halves), View(given[-1])
    with watched(given):
        after = layer(*given, view)
    assert len(after) == 2, f"a layer returns video and audio, not {len(after)} things"
    return dict(zip(("video", "audio"), after)), view, given


@pytest.mark.points(1, "Layer.forward")
def test_each_stream_goes_through_four_steps():
    """Self attention, captions, the other stream, MLP: each continues where the last one ended."""
    after, _, _ = run_layer()
    right = layer_by_hand()
    for name in after:
        suspects = {
            f"{stream}: {step} is forgotten, or its result is lost": functools.partial(
                lambda name, *place: layer_by_hand(forgotten=[place])[name], name, stream, step
            )
            for stream, step in itertools.product(after, STEPS)
        }
        suspects |= {
            f"{stream}: the mask of the captions is forgotten": functools.partial(
                lambda name, *stream: layer_by_hand(unmasked=stream)[name], name, *streams
            )
            for stream, *streams in (("video", "video"), ("audio", "audio"), ("both", *after))
        }
        what = f"{name}: not the four steps of the drawing, in their order"
        check(after[name], right[name], what, suspects, 1e-9)
    halves, given = inputs()
    for name in after:
        learn = dict(zip(("video", "audio"), given))
        check_gradients(after[name], right[name], learn, f"{name} after the layer")
    learn = {
        f"{name}.{p}": weight
        for name, half in zip(after, halves)
        for p, weight in half.named_parameters()
        if not p.startswith(("text_attn.to_k", "text_attn.to_v", "text_attn.k_norm"))
    }
    total = sum(x.square().sum() for x in after.values())
    for name, g in zip(learn, torch.autograd.grad(total, [*learn.values()], allow_unused=True)):
        is_there = g is not None and g.flatten(1 if g.dim() > 1 else 0).any(-1).all()
        assert is_there, f"no gradient reaches {name}, or not all of its rows"


@pytest.mark.points(2, "Layer.forward")
def test_both_streams_attend_to_each_other_as_they_were():
    """Own queries and the other's context, both from before either attends to the other."""
    _, view, _ = run_layer()
    halves, given = inputs()
    everything = [(s, k) for s in ("video", "audio") for k in ("attend_other", "mlp")]
    before = layer_by_hand(forgotten=everything)
    late = layer_by_hand(forgotten=[x for x in everything if x[1] == "mlp"])
    crossed = [c for c in view.calls if c[2].shape[1] != c[3].shape[1]]
    assert len(crossed) == 2, f"the streams attend to each other {len(crossed)} times, not twice"
    half, m = dict(zip(before, halves)), dict(zip(before, given[2:4]))
    for _, _, q, k, *_ in crossed:
        name, other = TOKENS[q.shape[1]], TOKENS[k.shape[1]]
        attention = half[name].cross_attn
        queries, _ = half[name].cross_inputs(before[name], m[name])
        _, context = half[other].cross_inputs(before[other], m[other])
        _, changed = half[other].cross_inputs(late[other], m[other])
        rule = "both streams must read the values from before this step"
        mistake = f"{name} attends to {other} after {other} has changed: {rule}"
        suspects = {mistake: attention.to_k(changed)}
        what = f"{name} does not attend to the context of {other}: {rule}"
        check(k, attention.to_k(context), what, suspects)
        own = f"{name}: the queries are not those of its own cross_inputs"
        check(q, attention.to_q(queries), own)


@pytest.mark.points(1, "Layer.forward")
def test_each_attention_has_its_own_site_and_rotations():
    """Video attends at a2v, with video rotations for queries and audio rotations for keys."""
    _, view, _ = run_layer()
    for index, site, q, k, found in view.calls:
        name, other = (TOKENS[x.shape[1]] for x in (q, k))
        assert index == 7, f"{site}: this is layer 7, but it attends as layer {index}"
        if name == other:
            right, ropes = f"{name}_self", [f"{name}_self"] * 2
        else:
            right, ropes = f"{other[0]}2{name[0]}", [f"{name}_cross", f"{other}_cross"]
        where = f"{name} attends to {other} at {site!r}"
        assert site == right, f"{where}, but queries of {right!r} come from {name}"
        assert found == ropes, f"{where}: rotations of (queries, keys) are {found}"
    sites = sorted(site for _, site, *_ in view.calls)
    assert sites == sorted(kv_cache.SITES), f"the layer attends at {', '.join(sites)}"
