"""Graded: exit steps, the gradient of distribution matching, and the order of updates.

Networks are stand-ins that return known clean estimates and record every pass.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import config
import dmd
from masks import clip_span
from toy.source import toy_captions

CFG = replace(config.TOY_TEACHER, height=8, width=8)  # one video token per frame
SIGMAS = CFG.sigmas  # 1, .906, .727, .421, 0
CAPTIONS = toy_captions(torch.tensor([[1, 5, 7], [2, 6, 8]]))


class Net:
    """Predicts the same clean estimates in every pass, times a weight."""

    def __init__(self, x0):
        self.cfg, self.x0, self.passes = CFG, x0, []
        self.weight = torch.ones((), requires_grad=True)

    def project_text(self, features):
        return features

    def __call__(self, video, audio, sigma_video, sigma_audio, text, span, view):
        given = (video, audio), (sigma_video, sigma_audio), torch.is_grad_enabled()
        self.passes.append(SimpleNamespace(**dict(zip(("x", "sigma", "has_grad"), given))))
        triples = zip((video, audio), self.x0, (sigma_video, sigma_audio))
        return [(x - self.weight * end[: len(x)]) / s[:, None, None] for x, end, s in triples]


@pytest.mark.points(1, "draw_exit_step")
def test_every_pass_is_trained_equally_often():
    """Indices 0 to 3 of four passes; sigma = 0 is where they end, not a pass."""
    g = torch.Generator().manual_seed(0)
    drawn = [dmd.draw_exit_step(SIGMAS, g) for _ in range(2000)]
    assert max(drawn) < 4, "sigma = 0 was drawn, but it is no pass: nothing is left to learn there"
    counts = [drawn.count(i) for i in range(4)]
    assert min(counts) > 400, f"2000 draws fell on the four passes {counts} times"


@pytest.mark.points(2, "surrogate")
def test_the_surrogate_has_the_given_gradient():
    """d loss / d x = gradient / numel, for every x."""
    x = torch.tensor([[3.0, 5.0, -1.0]], requires_grad=True)
    gradient = torch.tensor([[10.0, -4.0, 1.0]])
    loss = dmd.surrogate(x, gradient)
    assert loss.dim() == 0, f"a loss is a scalar, not {tuple(loss.shape)}"
    (found,) = torch.autograd.grad(loss, x)
    assert found.any(), "no gradient is left: x - gradient is a constant, detach it as a whole"
    assert not torch.allclose(found, -gradient / 3), "the sign is wrong: descent goes uphill"
    assert torch.allclose(found, gradient / 3), f"the gradient over 3 elements became {found}"


def gradient_by_hand(x, real, fake):
    """Compute it clip by clip: fake - real over the mean distance of x and real."""
    rows = []
    for a, r, f in zip(x, real, fake):
        distance = sum(abs(float(d)) for d in (a - r).flatten()) / a.numel()
        rows.append((f - r) / distance)
    return torch.stack(rows)


@pytest.mark.points(1, "dmd_gradient")
def test_descent_moves_a_clip_from_fake_to_real():
    """The gradient is fake - real, and descent goes against it."""
    x, real, fake = torch.zeros(1, 2, 3), torch.full((1, 2, 3), 2.0), torch.full((1, 2, 3), -1.0)
    found = dmd.dmd_gradient(x, real, fake)
    assert (found < 0).all(), "the sign is wrong: descent would move clips from real to fake"


@pytest.mark.points(2, "dmd_gradient")
def test_every_clip_has_a_gradient_of_the_same_scale():
    """Divided by the mean |x - real| of each clip; never by zero."""
    x, real, fake = torch.randn(3, 2, 6, 3, generator=torch.Generator().manual_seed(0))
    real[1] *= 10
    found = dmd.dmd_gradient(x, real, fake)
    others = {
        "it must not depend on the fake score: divide by mean |x - real|": (x, fake),
        "it is the distance of x and real, not of the two scores": (real, fake),
    }
    for message, (a, b) in others.items():
        wrong = (fake - real) / (a - b).abs().mean((1, 2), keepdim=True)
        assert not torch.allclose(found, wrong, rtol=1e-4), f"the divisor is wrong: {message}"
    over_batch = torch.allclose(found, (fake - real) / (x - real).abs().mean(), rtol=1e-4)
    assert not over_batch, "the divisor is the mean of the batch: each clip has its own distance"
    right = gradient_by_hand(x, real, fake)
    assert torch.allclose(found, right, rtol=1e-4), "not (fake - real) / mean |x - real|"
    assert dmd.dmd_gradient(x, x, x).isfinite().all(), "division by zero where x equals real"


def matched(guidance=(1, 1)):
    """Compute the losses of two clips; also return the clips and both stand-ins."""
    span = clip_span(6, CFG)

    def random_clip(seed):
        torch.manual_seed(seed)
        sizes = (len(span.video), CFG.video_channels), (len(span.audio), CFG.audio_channels)
        return [torch.randn(2, *size) for size in sizes]

    clips = [x.requires_grad_() for x in random_clip(0)]
    real, fake = (Net([x.repeat(2, 1, 1) for x in random_clip(seed)]) for seed in (1, 2))
    g = torch.Generator().manual_seed(3)
    return dmd.dmd_losses(clips, CAPTIONS, real, fake, guidance, g), clips, real, fake


@pytest.mark.points(1, "dmd_losses")
def test_both_scores_judge_the_same_noised_clip():
    """One sigma per clip, for both streams and both scores; only the real score has guidance."""
    _, clips, real, fake = matched(guidance=(2.0, 3.0))
    (r,), (f,) = real.passes, fake.passes
    assert torch.equal(*f.sigma), "video and audio of a clip have different noise levels"
    assert f.sigma[0][0] != f.sigma[0][1], "all clips share one noise level: draw one per clip"
    assert len(f.x[0]) == 2, "the fake score is guided, but it has no guidance"
    assert len(r.x[0]) == 4, "the real score is not guided: it needs every clip without caption too"
    for x, y in zip(r.x, f.x):
        assert torch.equal(x[:2], y), "the two scores see different noised clips"
    assert not any(p.has_grad for p in (r, f)), "the scores only judge: no gradient through them"


@pytest.mark.points(2, "dmd_losses")
def test_each_stream_gets_its_own_gradient():
    """dL/dx = (f - r) / mean |x - r| / numel, for each stream."""
    losses, clips, real, fake = matched()
    assert len(losses) == 2, f"one loss for video and one for audio, not {len(losses)}"
    for stream, loss, x, r, f in zip(("video", "audio"), losses, clips, real.x0, fake.x0):
        (found,) = torch.autograd.grad(loss, x, retain_graph=True)
        with torch.no_grad():
            right = gradient_by_hand(x, r[:2], f[:2]) / x.numel()
        assert (found * right).sum() > 0, f"{stream}: real and fake are swapped, or the sign"
        assert torch.allclose(found, right, atol=1e-6), f"{stream}: not (f - r) / mean |x - r| / n"


def one_update(monkeypatch):
    """Run one update of stand-ins: the (learner, loss) of each step, and each call of `make`."""
    steps, made = [], []
    for name, losses in (("dmd_losses", (1.0, 2.0)), ("critic_losses", (3.0, 4.0))):
        pair = [torch.tensor(x) for x in losses]
        monkeypatch.setattr(dmd, name, lambda *args, pair=pair: pair)

    def learner(name):
        def update(loss, step):
            steps.append((name, float(loss)))

        recipe = SimpleNamespace(batch=2, seed=0)
        return SimpleNamespace(recipe=recipe, model=name, update=update)

    def make(net, clips, captions, g):
        made.append((net, captions, torch.is_grad_enabled()))
        return made[-1]

    def draw(n, g):
        return None, torch.rand(n, 3, generator=g)

    learners = learner("generator"), learner("critic")
    dmd.make_update(*learners, "real", (2, 2), make, draw)(0)
    return steps, made


@pytest.mark.points(1, "make_update")
def test_the_generator_steps_once_and_the_critic_five_times(monkeypatch):
    """In this order, each with its own optimiser, on the sum of video and audio."""
    steps, _ = one_update(monkeypatch)
    found = [name for name, _ in steps]
    assert found == ["generator"] + 5 * ["critic"], f"the steps are: {', '.join(found)}"
    losses = [loss for _, loss in steps]
    assert losses == [3.0] + 5 * [7.0], f"losses of the steps are {losses}: sum video and audio"


@pytest.mark.points(2, "make_update")
def test_the_critic_learns_from_new_clips_without_gradient(monkeypatch):
    """The generator makes new clips for every step; only those of its own step have a gradient."""
    _, made = one_update(monkeypatch)
    assert {net for net, *_ in made} == {"generator"}, "only the generator may make clips"
    different = len({float(drawn.sum()) for _, drawn, _ in made})
    assert different == 6, f"six steps have {different} different batches: draw and make new ones"
    found = [has_grad for *_, has_grad in made]
    assert found[0], "the clips of the generator's step carry no gradient: it would learn nothing"
    assert not any(found[1:]), "the critic's step trains through the generator: use no_grad"
