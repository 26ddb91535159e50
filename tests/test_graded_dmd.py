"""Graded: few-step generation, the direction of distribution matching, and who is trained on what.

Networks are stand-ins that answer with known clean estimates and remember what they were asked.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import config
import dmd
import rollout
from masks import block_span, clip_span
from toy.source import toy_captions

CFG = replace(config.TOY_TEACHER, height=8, width=8)  # one video token a frame
SIGMAS = CFG.sigmas  # 1, .906, .727, .421, 0
CAPTIONS = toy_captions(torch.tensor([[1, 5, 7], [2, 6, 8]]))


class Net:
    """Answers every pass with the same clean estimates, times a weight that can be learnt."""

    def __init__(self, x0):
        self.cfg, self.x0, self.passes = CFG, x0, []
        self.weight = torch.ones((), requires_grad=True)

    def project_text(self, features):
        return features

    def __call__(self, video, audio, sigma_video, sigma_audio, text, span, view):
        asked = (video, audio), (sigma_video, sigma_audio), torch.is_grad_enabled()
        self.passes.append(SimpleNamespace(**dict(zip(("x", "sigma", "has_grad"), asked))))
        pairs = zip((video, audio), self.x0, (sigma_video, sigma_audio))
        return [(x - self.weight * end[: len(x)]) / s[:, None, None] for x, end, s in pairs]


def random_clip(span, seed, clips=2):
    torch.manual_seed(seed)
    return [
        torch.randn(clips, len(span.video), CFG.video_channels),
        torch.randn(clips, len(span.audio), CFG.audio_channels),
    ]


@pytest.mark.points(1, "draw_exit_step")
def test_every_pass_is_trained_equally_often():
    """Indices 0 to 3 of four passes; sigma = 0 is where they end, not a pass."""
    g = torch.Generator().manual_seed(0)
    drawn = [dmd.draw_exit_step(SIGMAS, g) for _ in range(2000)]
    assert max(drawn) < 4, "drawn: sigma = 0. It is no pass: nothing is left to learn there"
    counts = [drawn.count(i) for i in range(4)]
    assert min(counts) > 400, f"2000 draws fell on the four passes {counts} times"


@pytest.mark.points(2, "surrogate")
def test_the_surrogate_has_the_gradient_it_was_given():
    """d loss / d x = gradient / numel, whatever x is."""
    x = torch.tensor([[3.0, 5.0, -1.0]], requires_grad=True)
    gradient = torch.tensor([[10.0, -4.0, 1.0]])
    loss = dmd.surrogate(x, gradient)
    assert loss.dim() == 0, f"a loss is a scalar, not {tuple(loss.shape)}"
    (found,) = torch.autograd.grad(loss, x)
    assert found.any(), "no gradient is left: x - gradient is a fixed point, detach it as a whole"
    assert not torch.allclose(found, -gradient / 3), "the sign is wrong: descent goes uphill"
    assert torch.allclose(found, gradient / 3), (
        f"the gradient {gradient[0].tolist()} over 3 elements became {found[0].tolist()}"
    )


def direction(x, real, fake):
    """By hand, clip by clip: fake minus real over the mean distance of x and real."""
    rows = []
    for a, r, f in zip(x, real, fake):
        distance = sum(abs(float(d)) for d in (a - r).flatten()) / a.numel()
        rows.append((f - r) / distance)
    return torch.stack(rows)


@pytest.mark.points(1, "dmd_gradient")
def test_descent_moves_a_clip_from_fake_to_real():
    """The direction is fake minus real; descent goes against it."""
    x, real, fake = torch.zeros(1, 2, 3), torch.full((1, 2, 3), 2.0), torch.full((1, 2, 3), -1.0)
    found = dmd.dmd_gradient(x, real, fake)
    assert (found < 0).all(), "the sign is wrong: descent would move clips from real to fake"


@pytest.mark.points(2, "dmd_gradient")
def test_every_clip_pulls_equally_hard():
    """Divided by the mean |x - real| of each clip by itself; never by zero."""
    x, real, fake = torch.randn(3, 2, 6, 3, generator=torch.Generator().manual_seed(0))
    real[1] *= 10
    found = dmd.dmd_gradient(x, real, fake)
    others = {
        "it must not depend on the fake score: divide by mean |x - real|": (x, fake),
        "it is the distance of x and real, not of the two scores": (real, fake),
    }
    for message, (a, b) in others.items():
        wrong = (fake - real) / (a - b).abs().mean((1, 2), keepdim=True)
        assert not torch.allclose(found, wrong, rtol=1e-4), f"the normaliser is wrong: {message}"
    over_batch = (fake - real) / (x - real).abs().mean()
    assert not torch.allclose(found, over_batch, rtol=1e-4), (
        "the normaliser is the batch's: every clip is divided by its own distance"
    )
    assert torch.allclose(found, direction(x, real, fake), rtol=1e-4), "not (f - r) / mean|x - r|"
    assert dmd.dmd_gradient(x, x, x).isfinite().all(), "divided by zero where x is real"


def denoised(exit_step=None):
    """Block 1 of 16 clips by a stand-in: the net, its answer, the noise at first and its span."""
    span = block_span(1, CFG)
    noise, net = random_clip(span, 0, 16), Net(random_clip(span, 1, 16))
    generator = torch.Generator().manual_seed(5)
    x0 = rollout.denoise(net, noise, SIGMAS, None, span, None, generator, exit_step)
    return net, x0, noise


@pytest.mark.points(1, "denoise")
def test_four_levels_are_four_passes():
    """Each level but the last, 0, gets one pass; both streams at the same level."""
    net, _, noise = denoised()
    found = [round(float(p.sigma[0][0]), 3) for p in net.passes]
    right = [round(s, 3) for s in SIGMAS[:-1]]
    assert found == right, f"passes at levels {found}, expected {right}"
    assert all(torch.equal(*p.sigma) for p in net.passes), "video and audio at different levels"
    assert all(map(torch.equal, net.passes[0].x, noise)), "the first pass does not see the noise"


@pytest.mark.points(1, "denoise")
def test_fresh_noise_takes_the_estimate_to_the_next_level():
    """Between passes: (1 - s) x0 + s noise, with noise that was not seen before."""
    net, _, start = denoised()
    seen = [start]
    for i, p in enumerate(net.passes[1:], 1):
        noise = [(x - (1 - SIGMAS[i]) * x0) / SIGMAS[i] for x, x0 in zip(p.x, net.x0)]
        for stream, n in zip(("video", "audio"), noise):
            assert abs(float(n.std()) - 1) < 0.1 and abs(float(n.mean())) < 0.1, (
                f"pass {i} sees {stream} that is not (1 - s) x0 + s noise for its level "
                f"s = {SIGMAS[i]:.3f}"
            )
        for earlier in seen:
            assert (noise[0] - earlier[0]).abs().max() > 0.1, (
                f"pass {i} sees noise that was there before: draw it afresh"
            )
        seen.append(noise)


@pytest.mark.points(1, "denoise")
def test_the_last_pass_ends_at_its_clean_estimate():
    """Nothing is re-noised after it."""
    net, x0, _ = denoised()
    for found, right in zip(x0, net.x0):
        away = float((found - right).detach().abs().max())
        assert away < 1e-4, f"the answer is {away:.2f} away from the last x0: it was re-noised"


@pytest.mark.points(1, "denoise")
def test_only_the_exit_pass_carries_a_gradient():
    """Earlier passes are how its input came about; without gradient there is none at all."""
    for exit_step, passes in ((None, 4), (1, 2)):
        net, x0, _ = denoised(exit_step)
        found = [p.has_grad for p in net.passes]
        assert len(found) == passes, f"exit_step={exit_step} takes {len(found)} passes"
        assert not any(found[:-1]), f"gradient everywhere: passes recorded for one are {found}"
        assert found[-1] and x0[0].requires_grad, "the exit pass carries no gradient"
    with torch.no_grad():
        net, _, _ = denoised()
    assert not any(p.has_grad for p in net.passes), "the gradient is switched on under no_grad"


def matched(guidance=(1, 1)):
    """Matching losses of two clips, with both stand-ins, and the clips."""
    span = clip_span(6, CFG)
    clips = [x.requires_grad_() for x in random_clip(span, 0)]
    real, fake = (Net([x.repeat(2, 1, 1) for x in random_clip(span, s)]) for s in (1, 2))
    g = torch.Generator().manual_seed(3)
    return dmd.dmd_losses(clips, CAPTIONS, real, fake, guidance, g), clips, real, fake


@pytest.mark.points(1, "dmd_losses")
def test_both_scores_judge_the_same_noised_clip():
    """One sigma a clip for both streams, and for both scores; guidance is the real one's alone."""
    _, clips, real, fake = matched(guidance=(2.0, 3.0))
    (r,), (f,) = real.passes, fake.passes
    assert torch.equal(*f.sigma), "video and audio of a clip have different noise levels"
    assert f.sigma[0][0] != f.sigma[0][1], "all clips share one noise level: draw one for each"
    assert len(f.x[0]) == 2, "the fake score is guided: it has no guidance"
    assert len(r.x[0]) == 4, "the real score is not guided: it needs every clip without caption too"
    for x, y in zip(r.x, f.x):
        assert torch.equal(x[:2], y), "the two scores see different noised clips"
    assert not any(p.has_grad for p in (r, f)), "the scores only judge: no gradient through them"


@pytest.mark.points(2, "dmd_losses")
def test_the_gradient_of_a_clip_is_the_direction_over_its_size():
    """dL/dx = (f - r) / mean|x - r| / numel, for each stream by itself."""
    losses, clips, real, fake = matched()
    assert len(losses) == 2, f"one loss for video and one for audio, not {len(losses)}"
    for stream, loss, x, r, f in zip(("video", "audio"), losses, clips, real.x0, fake.x0):
        (found,) = torch.autograd.grad(loss, x, retain_graph=True)
        with torch.no_grad():
            right = direction(x, r[:2], f[:2]) / x.numel()
        assert (found * right).sum() > 0, f"{stream}: real and fake are swapped, or the sign"
        assert torch.allclose(found, right, atol=1e-6), f"{stream}: not (f - r) / mean|x - r| / n"


def one_update(monkeypatch):
    """One update of stand-ins: who stepped, on what loss; and for whom clips were made, and how."""
    events, made = [], []
    for name, losses in (("dmd_losses", (1.0, 2.0)), ("critic_losses", (3.0, 4.0))):
        pair = [torch.tensor(x) for x in losses]
        monkeypatch.setattr(dmd, name, lambda *args, pair=pair: pair)

    def learner(name):
        def update(loss, step):
            events.append((name, float(loss)))

        recipe = SimpleNamespace(batch=2, seed=0)
        return SimpleNamespace(recipe=recipe, model=name, update=update)

    def make(net, clips, captions, g):
        made.append((net, captions, torch.is_grad_enabled()))
        return made[-1]

    def draw(n, g):
        return None, torch.rand(n, 3, generator=g)

    learners = learner("generator"), learner("critic")
    dmd.make_update(*learners, "real", (2, 2), make, draw)(0)
    return events, made


@pytest.mark.points(1, "make_update")
def test_the_generator_steps_once_and_its_critic_five_times(monkeypatch):
    """In this order, each by its own optimiser, on the sum of video and audio."""
    events, _ = one_update(monkeypatch)
    found = [name for name, _ in events]
    assert found == ["generator"] + 5 * ["critic"], f"who steps, in order: {', '.join(found)}"
    losses = [loss for _, loss in events]
    assert losses == [3.0] + 5 * [7.0], f"losses of the steps are {losses}: sum video and audio"


@pytest.mark.points(2, "make_update")
def test_the_critic_learns_from_clips_as_data(monkeypatch):
    """Clips of the generator, afresh for every step; only the generator's carry a gradient."""
    _, made = one_update(monkeypatch)
    assert {net for net, *_ in made} == {"generator"}, "clips are made by the generator alone"
    assert len({float(drawn.sum()) for _, drawn, _ in made}) == 6, (
        "the six steps do not have six different batches of prompts: draw and make them afresh"
    )
    found = [has_grad for *_, has_grad in made]
    assert found[0], "the generator's clips carry no gradient: nothing would be learnt"
    assert not any(found[1:]), (
        "the critic is trained through the generator: its clips are data, make them without "
        "gradient"
    )
