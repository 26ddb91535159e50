"""Distribution matching: the gradient, the losses, the few steps, and the order of updates."""

from dataclasses import replace

import pytest
import torch
from helpers import random_clip, random_model, run_here

import config
import dmd
import model
import self_forcing
import teacher
from kv_cache import MaskedView
from masks import clip_span, num_blocks
from plumbing import trainer
from toy import source as toy_source
from toy import world as toy_world
from toy.source import toy_captions

DRAW = toy_source.TOY_PROMPTS.draw
TINY = replace(config.TOY_TEACHER, num_layers=1, num_heads=2, video_width=24, audio_width=16)
TINY_CAUSAL = replace(TINY, num_sinks=4)
BLOCKS = num_blocks(config.CLIP_SECONDS, TINY)
CAPTIONS = toy_captions(torch.tensor([[1, 5, 7], [2, 6, 8]]))
GOLDEN = dict(rel=1e-4)
STAGE_I_LOSSES = [
    4.09273, 3.95306, 3.99510, 3.06697, 2.57082,
    2.56990, 3.13550, 2.88618, 2.82957, 3.79942,
]  # fmt: skip
STAGE_III_LOSSES = [
    3.94013, 3.57074, 2.65206, 2.61567, 3.42332,
    3.03338, 2.38919, 3.71186, 3.42954, 2.86172,
]  # fmt: skip


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Recorded:
    """A score that records its inputs."""

    def __init__(self, net):
        self.cfg, self.project_text, self.net, self.asked = net.cfg, net.project_text, net, []

    def __call__(self, video, audio, sigma_v, sigma_a, *rest):
        self.asked.append((video, audio, sigma_v, sigma_a))
        return self.net(video, audio, sigma_v, sigma_a, *rest)


@pytest.fixture
def scores():
    return [Recorded(random_model(TINY, torch.float32, seed)) for seed in (1, 2)]


@pytest.fixture
def clips():
    torch.manual_seed(0)
    return [x.requires_grad_() for x in random_clip(TINY, BLOCKS, clips=2, dtype=torch.float32)]


# ---- the gradient ----


def test_descent_moves_clips_from_the_fake_score_to_the_real_one():
    """A descent step with fixed predictions moves x along real - fake."""
    x, real, fake = (torch.randn(1, 6, 3, generator=rng(s)) for s in range(3))
    moved = x - 0.1 * dmd.dmd_gradient(x, real, fake)
    step, apart = moved - x, real - fake
    assert (step * apart).sum() > 0
    cosine = torch.nn.functional.cosine_similarity(step.flatten(), apart.flatten(), dim=0)
    assert float(cosine) == pytest.approx(1)


def test_every_clip_pulls_equally_hard():
    """The gradient does not depend on the scale of a clip, nor on other clips of the batch."""
    x, real, fake = (torch.randn(2, 6, 3, generator=rng(s)) for s in range(3))
    g = dmd.dmd_gradient(x, real, fake)
    torch.testing.assert_close(dmd.dmd_gradient(10 * x, 10 * real, 10 * fake), g)
    torch.testing.assert_close(dmd.dmd_gradient(x[:1], real[:1], fake[:1]), g[:1])
    assert dmd.dmd_gradient(x, x, x).abs().max() == 0  # no division by zero


def test_matching_two_gaussians_finds_the_mean():
    """With exact scores, clips from N(-3, 1) move until their mean is 2, the real mean."""

    def x0(noisy, sigma, mean):  # noisy clips of N(mean, 1) are Gaussian: a closed form
        share = (1 - sigma) / ((1 - sigma) ** 2 + sigma**2)
        return mean + share * (noisy - (1 - sigma) * mean)

    mean, g = torch.tensor(-3.0, requires_grad=True), rng()
    for _ in range(400):
        x = mean + torch.randn(64, 1, 1, generator=g)
        sigma = dmd.draw_score_sigmas(64, g)[:, None, None]
        noisy = model.add_noise(x.detach(), torch.randn(x.shape, generator=g), sigma[..., 0])
        towards = dmd.dmd_gradient(x, x0(noisy, sigma, 2.0), x0(noisy, sigma, mean.detach()))
        (gradient,) = torch.autograd.grad(dmd.surrogate(x, towards.detach()), mean)
        mean = (mean - 0.05 * gradient).detach().requires_grad_()
    assert float(mean.detach()) == pytest.approx(2, abs=0.15)


def test_noise_levels_cover_the_schedule_between_its_ends():
    """They lie between shifted(.02) and shifted(.98), with median shifted(.5)."""
    sigma = dmd.draw_score_sigmas(20000, rng())
    low, high = teacher.shifted(0.02, 8.0), teacher.shifted(0.98, 8.0)
    assert low <= sigma.min() < low + 0.01 and high - 0.01 < sigma.max() <= high
    assert float(sigma.median()) == pytest.approx(teacher.shifted(0.5, 8.0), abs=0.01)


# ---- the two losses ----


def test_both_scores_see_the_same_clip_at_one_noise_level_for_both_streams(scores, clips):
    """One sigma per clip. The teacher gets every clip twice, with and without its caption."""
    real, fake = scores
    dmd.dmd_losses(clips, CAPTIONS, real, fake, (2.0, 3.0), rng())
    (r,), (f,) = real.asked, fake.asked
    assert [len(x) for x in r] == [4] * 4 and [len(x) for x in f] == [2] * 4
    for a, b in zip(r, f):
        assert torch.equal(a, torch.cat([b, b]))
    assert torch.equal(f[2], f[3]) and f[2][0] != f[2][1]


def test_the_gradient_of_a_clip_is_the_direction_over_its_size(scores, clips):
    """dL/dx = (f - r) / mean|x - r| / numel for each stream, with its own guidance."""
    real, fake = scores
    guidance = (2.0, 3.0)
    losses = dmd.dmd_losses(clips, CAPTIONS, real, fake, guidance, rng())
    gradients = torch.autograd.grad(sum(losses), clips)
    video, audio, sigma, _ = fake.asked[0]
    span = clip_span(BLOCKS, TINY)
    ask = (video, audio, sigma, span, MaskedView())
    r = teacher.Guided(real.net, CAPTIONS, guidance).x0(*ask)
    f = teacher.Guided(fake.net, CAPTIONS).x0(*ask)
    for g, x, x_r, x_f in zip(gradients, clips, r, f):
        distance = (x - x_r).abs().mean((1, 2), keepdim=True)
        torch.testing.assert_close(g, (x_f - x_r) / distance / x.numel())


def test_nothing_is_left_to_learn_when_the_scores_agree(scores, clips):
    """If the critic equals the teacher, without guidance, the gradient is 0."""
    losses = dmd.dmd_losses(clips, CAPTIONS, scores[0], scores[0], (1, 1), rng())
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(sum(losses), clips))


def test_matching_trains_neither_score(scores, clips):
    """No weight of the two scores gets a gradient."""
    for score in scores:
        score.net.requires_grad_(True)
    sum(dmd.dmd_losses(clips, CAPTIONS, *scores, (2.0, 2.0), rng())).backward()
    assert all(p.grad is None for s in scores for p in s.net.parameters())


def test_the_critic_learns_by_flow_matching_on_what_was_made(scores, clips):
    """Its loss is the flow-matching loss of the teacher, on the clips of the student."""
    fake = scores[1].net.requires_grad_(True)
    data = [x.detach() for x in clips]
    loss = sum(dmd.critic_losses(fake, data, CAPTIONS, rng(5)))
    g = rng(5)
    sigma = dmd.draw_score_sigmas(2, g)
    expected = teacher.velocity_losses(fake, data, CAPTIONS, sigma, g)
    assert torch.equal(loss, sum(x.mean() for x in expected))
    loss.backward()
    assert fake.get_parameter("video.proj_out.weight").grad.abs().max() > 0


# ---- few steps ----


def test_every_pass_is_trained_equally_often():
    """Exit steps are uniform over the four passes; no pass has sigma = 0."""
    g = rng()
    counts = torch.tensor([dmd.draw_exit_step(TINY.sigmas, g) for _ in range(4000)]).bincount()
    assert len(counts) == 4 and (counts - 1000).abs().max() < 120


def test_a_few_step_clip_takes_its_passes_on_the_whole_clip():
    """Four passes at the levels of the student; with an exit step, fewer."""
    net, levels = random_model(TINY, torch.float32), []
    net.register_forward_hook(lambda net, args, out: levels.append(float(args[2][0])))
    video, audio = dmd.few_step_clips(net, CAPTIONS, rng())
    assert levels == pytest.approx(TINY.sigmas[:-1])
    assert video.shape == (2, 256, 48) and audio.shape == (2, 126, 20)
    levels.clear()
    dmd.few_step_clips(net, CAPTIONS, rng(), exit_step=1)
    assert levels == pytest.approx(TINY.sigmas[:2])


# ---- training ----


def learners(steps=3, cfg=TINY):
    """Return a tiny generator and critic, and their teacher."""
    real = model.build(TINY, 7).requires_grad_(False)
    recipes = dmd.make_recipes(steps, 3, batch=2)
    return dmd.make_learners(model.build(cfg, 7), model.build(TINY, 7), recipes), real


def everything(run):
    return {f"{n}.{m}": t for n, x in run.learners.items() for m, t in x.tensors().items()}


def test_a_step_moves_the_generator_once_then_its_critic_five_times():
    """In this order, each with its own optimiser, each time on new clips."""
    found, real = learners()
    generator, critic = found.values()
    order, made = [], []
    for name, learner in found.items():
        step = learner.optimisers[0].step
        learner.optimisers[0].step = lambda n=name, s=step: (order.append(n), s())

    def make(net, clips, captions, g):
        assert net is generator.model
        made.append(dmd.backward_simulation(net, clips, captions, g))
        return made[-1]

    before = {n: p.clone() for n, p in real.state_dict().items()}
    dmd.make_update(generator, critic, real, (2.0, 2.0), make, DRAW)(0)
    assert order == ["generator"] + ["critic"] * 5
    assert len({float(video.detach().sum()) for video, _ in made}) == 6
    assert [video.requires_grad for video, _ in made] == [True] + [False] * 5
    assert all(torch.equal(p, before[n]) for n, p in real.state_dict().items())


def test_a_killed_distillation_goes_on_as_if_uninterrupted(tmp_path):
    """Generator, critic, averages and optimisers end with the same bits."""

    def new_run(folder, die_at=None):
        found, real = learners()
        run = trainer.Run(found, "python dmd.py", folder)
        simulate = dmd.backward_simulation
        update = dmd.make_update(*found.values(), real, (2.0, 2.0), simulate, DRAW)

        def or_die(step):
            if step == die_at:
                raise KeyboardInterrupt
            return update(step)

        return run, or_die

    whole, update = new_run(None)
    whole.train(update, print_every=1, save_every=1)
    first, update = new_run(tmp_path, die_at=2)
    with pytest.raises(KeyboardInterrupt):
        first.train(update, print_every=1, save_every=1)
    second, update = new_run(tmp_path)
    assert second.step == 2
    second.train(update, print_every=1, save_every=1)
    a, b = everything(whole), everything(second)
    assert a.keys() == b.keys() and [n for n in a if not torch.equal(a[n], b[n])] == []
    assert whole.log == second.log


def losses_recorded(make, cfg):
    found, real = learners(10, cfg)
    update = dmd.make_update(*found.values(), real, (2.0, 2.0), make, DRAW)
    rows = [update(step) for step in range(10)]
    return [float((r["critic v"] + r["critic a"]).detach()) for r in rows]


def test_ten_golden_losses_of_stage_i():
    """The critic's loss, after both losses and both optimisers, on simulated clips."""
    losses = losses_recorded(dmd.backward_simulation, TINY)
    assert losses == pytest.approx(STAGE_I_LOSSES, **GOLDEN)


def test_ten_golden_losses_of_stage_iii():
    """The critic's loss, on rollouts with sinks and a cache of two past blocks."""

    def make(*args):
        return self_forcing.rollout_clip(*args, window=2)

    assert losses_recorded(make, TINY_CAUSAL) == pytest.approx(STAGE_III_LOSSES, **GOLDEN)


@pytest.mark.parametrize("name", ["toy_released", "toy_teacher"])
def test_stage_i_refuses_another_config(name, tmp_path, monkeypatch, capsys):
    """Its student has the config of its teacher, so the option would have no effect."""
    options = ["--config", name, "--steps", 1, "--run", tmp_path, "--out", tmp_path / "x"]
    status, _, err = run_here(dmd, options, monkeypatch, capsys)
    message = f"--config {name}: stage I uses its teacher's config; leave it out"
    assert (status, err) == (2, f"dmd.py: {message}\n")


def test_prompts_are_those_of_the_training_world():
    """They are the captions of the drawn clips, some with hidden words."""
    clips, captions = DRAW(64, rng())
    true, tokens = toy_world.caption_tokens(clips), captions.features[0].argmax(-1)
    assert ((tokens == true) | (tokens == 0)).all() and (tokens == 0).any()
    assert (tokens == true).float().mean() > 0.7


def test_no_prompt_is_of_a_held_out_clip(monkeypatch):
    """Clips from HELD_OUT on are for the evaluation."""
    drawn, draw_clips = [], toy_world.draw_clips
    monkeypatch.setattr(
        toy_world, "draw_clips", lambda seeds: drawn.extend(seeds) or draw_clips(seeds)
    )
    DRAW(64, rng())
    assert len(drawn) == 64 and max(drawn) < toy_world.HELD_OUT
