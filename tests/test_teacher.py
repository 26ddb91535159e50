"""Flow matching: noise levels, the loss, Euler steps, and guidance."""

import pytest
import torch
from helpers import PAPER, random_clip, run_here, tiny

import masks
import model
import ode_regression
import teacher
from kv_cache import MaskedView
from plumbing import trainer
from toy import source as toy_source
from toy import world as toy_world
from toy.source import toy_captions
from toy.training import TrainingClips

CFG = tiny(PAPER, num_sinks=0)
TOKENS = torch.tensor([[1, 5, 7], [2, 6, 8], [3, 5, 8]])
CAPTIONS = toy_captions(TOKENS)
SIGMAS = [1.0, 0.9, 0.6, 0.2, 0.0]


class PerfectNet:
    """A net that knows the clean clip and returns the velocity that leads straight to it."""

    def __init__(self, x0, cfg=CFG):
        self.x0, self.cfg, self.calls = x0, cfg, []

    def project_text(self, features):
        return features

    def __call__(self, video, audio, sigma_video, sigma_audio, text, span, view):
        self.calls.append((video, audio, sigma_video, sigma_audio, text, span, view))
        sigmas = (
            model.per_token(s, x)[..., None]
            for s, x in zip((sigma_video, sigma_audio), (video, audio))
        )
        copies = len(video) // len(self.x0[0])
        ends = (x.repeat(copies, 1, 1) for x in self.x0)
        return [(x - end) / s for x, end, s in zip((video, audio), ends, sigmas)]


@pytest.fixture
def net():
    """A perfect net for three clips of two seconds."""
    torch.manual_seed(0)
    return PerfectNet(random_clip(CFG, 3, clips=3, dtype=torch.float32))


def sample(net, sigmas=SIGMAS, **options):
    return teacher.sample(net, CAPTIONS, sigmas, 2, **{"guidance": (1, 1), **options})


# ---- noise levels ----


def test_shift_5_gives_the_published_list():
    """Four even levels become 1000, 937.5, 833.3 and 625 thousandths."""
    levels = [1000 * s for s in teacher.schedule(4, shift=5.0)]
    assert levels == pytest.approx([1000, 937.5, 833.333, 625, 0], abs=1e-3)


def test_shift_1_moves_nothing():
    """Without shift the levels are evenly spaced."""
    assert teacher.schedule(4, shift=1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_a_schedule_falls_from_exactly_1_to_exactly_0(steps):
    """One level more than passes, strictly falling; the ends are exact."""
    levels = teacher.schedule(steps)
    assert len(levels) == steps + 1 and (levels[0], levels[-1]) == (1.0, 0.0)
    assert all(high > low for high, low in zip(levels, levels[1:]))


def test_training_levels_cover_both_ends_and_favour_noise():
    """The median is .6 (sigmoid of .4); a tenth of the levels is uniform and reaches both ends."""
    sigma = teacher.draw_training_sigmas(20000, torch.Generator().manual_seed(0))
    assert sigma.min() >= 0 and sigma.max() <= 1
    assert float(sigma.median()) == pytest.approx(0.59, abs=0.02)
    assert (sigma < 0.05).float().mean() > 0.004 and (sigma > 0.97).float().mean() > 0.002


# ---- training ----


def losses_of_perfect_net(latents, sigma, net):
    captions = toy_captions(TOKENS[: len(sigma)])
    return teacher.velocity_losses(net, latents, captions, sigma, torch.Generator().manual_seed(1))


def test_a_seed_has_clips_of_its_own():
    """The clips of a seed end where the next ones begin; trajectories begin after the last."""
    most = teacher.CLIPS_PER_SEED // 16
    for seed in range(teacher.SEEDS):
        clips = teacher.training_seeds(trainer.Recipe(most, 16, seed))
        assert (clips.start, clips.stop) == (seed * 10**7, (seed + 1) * 10**7)
    assert clips.stop == ode_regression.FIRST_SEED
    with pytest.raises(ValueError, match="--seed 10: expected 0 to 9"):
        teacher.training_seeds(trainer.Recipe(most, 16, seed=10))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seed", 10], "--seed 10: expected a whole number from 0 to 9"),
        (["--seed", 100], "--seed 100: expected a whole number from 0 to 9"),
        (["--steps", 625001], "--steps 625001: 10000016 clips; a seed has 10000000"),
    ],
)
def test_clips_that_others_are_kept_for_are_not_trained_on(
    options, message, tmp_path, monkeypatch, capsys
):
    """Seed 100 has the held-out clips, seed 10 the clips of trajectories, and too many steps need
    clips of the next seed. The error is one line, and no training begins."""
    options += ["--run", tmp_path / "run", "--out", tmp_path / "x.safetensors"]
    monkeypatch.setattr(trainer, "Run", None)
    status, _, err = run_here(teacher, options, monkeypatch, capsys)
    assert (status, err) == (2, f"teacher.py: {message}\n")
    assert not list(tmp_path.iterdir())


def test_a_step_draws_its_own_clips(monkeypatch):
    """Step 2 of seed 2, with 16 clips a step, draws the clips 20000032 to 20000047."""
    seen = []

    def draw(seeds):
        seen.extend(seeds)
        raise KeyboardInterrupt

    monkeypatch.setattr(toy_world, "draw_clips", draw)
    with pytest.raises(KeyboardInterrupt):
        teacher.make_losses(None, TrainingClips(), trainer.Recipe(steps=5, seed=2))(2)
    assert seen == list(range(20000032, 20000048))


def test_a_perfect_velocity_has_no_loss():
    """The target is noise - x0, so a net that knows x0 is right at every level."""
    latents = random_clip(CFG, 6, clips=3, dtype=torch.float32)
    sigma = torch.tensor([0.1, 0.5, 1.0])
    video, audio = losses_of_perfect_net(latents, sigma, PerfectNet(latents))
    assert video.shape == audio.shape == (3,)
    assert max(video.max(), audio.max()) < 1e-9  # float32: 1e-6 of rounding over sigma .1, squared


def test_a_net_that_is_off_by_2_has_a_loss_of_4():
    """The loss is the mean square over the elements of a clip, separately for each stream."""
    latents = random_clip(CFG, 6, clips=3, dtype=torch.float32)
    net = PerfectNet(latents)
    off = lambda *args: [v + d for v, d in zip(PerfectNet.__call__(net, *args), (2, -3))]  # noqa: E731
    off.project_text, off.cfg = net.project_text, CFG
    video, audio = losses_of_perfect_net(latents, torch.ones(3), off)
    assert video.tolist() == pytest.approx([4] * 3) and audio.tolist() == pytest.approx([9] * 3)


def test_both_streams_of_a_clip_are_equally_noisy_and_see_everything():
    """One sigma per clip, shared by video and audio, and no mask: the teacher is bidirectional."""
    latents = random_clip(CFG, 6, clips=3, dtype=torch.float32)
    net, sigma = PerfectNet(latents), torch.tensor([0.1, 0.5, 0.9])
    losses_of_perfect_net(latents, sigma, net)
    ((video, audio, sigma_video, sigma_audio, _, span, view),) = net.calls
    assert torch.equal(sigma_video, sigma) and torch.equal(sigma_audio, sigma)
    assert (len(span.video), len(span.audio)) == (16, 126)
    assert isinstance(view, MaskedView) and not view.masks
    g = torch.Generator().manual_seed(1)
    for noisy, x0 in zip((video, audio), latents):
        noise = torch.randn(x0.shape, generator=g)
        torch.testing.assert_close(noisy, x0 + sigma[:, None, None] * (noise - x0))


def test_a_tenth_of_the_captions_and_a_twentieth_of_the_words_are_hidden():
    """10 % of the captions become 0; in all others, 5 % of the words do. Nothing else changes."""
    tokens = torch.tensor([[1, 5, 7]]).expand(20000, -1)
    shown = toy_source.drop_caption_words(tokens, torch.Generator().manual_seed(0))
    assert ((shown == tokens) | (shown == 0)).all()
    empty = (shown == 0).all(1)
    assert float(empty.float().mean()) == pytest.approx(0.10, abs=0.01)
    assert float((shown[~empty] == 0).float().mean()) == pytest.approx(0.05, abs=0.01)


def test_the_readout_by_level_averages_the_clips_of_each_level():
    """Clips below .4, from .4 to .7, and from .7 on have separate means."""
    video, sigma = torch.tensor([1.0, 2.0, 4.0, 6.0]), torch.tensor([0.1, 0.5, 0.7, 1.0])
    shown = teacher.losses_by_noise(video, video + 1, sigma)
    assert (shown["low"], shown["mid"], shown["high"]) == (1.0, 2.0, 5.0)
    assert (shown["video"], shown["audio"]) == (3.25, 4.25)


# ---- sampling ----


@pytest.mark.parametrize("steps", [1, 2, 16])
def test_euler_steps_of_a_perfect_velocity_land_on_the_clean_clip(net, steps):
    """The trajectory is a straight line, so one step is as good as many."""
    for x, x0 in zip(sample(net, teacher.schedule(steps)), net.x0):
        torch.testing.assert_close(x, x0, atol=1e-5, rtol=0)  # float32, values of order 1
    assert len(net.calls) == steps


def test_a_step_is_eulers():
    """x + (lower - sigma) v, with the velocity of the net at sigma, for any velocity field."""
    torch.manual_seed(0)
    net = model.build(CFG)
    net.requires_grad_(False)
    torch.nn.init.normal_(net.video.proj_out.weight)
    torch.nn.init.normal_(net.audio.proj_out.weight)
    _, kept = sample(net, [1.0, 0.7, 0.0], keep=(0, 1))
    text = net.project_text(toy_world.caption_features(TOKENS))
    span, one = masks.clip_span(3, CFG), torch.ones(3)
    velocity = net(*(x[:, 0] for x in kept), one, one, text, span, MaskedView())
    for x, v in zip(kept, velocity):
        assert v.abs().max() > 0.5
        torch.testing.assert_close(x[:, 1], x[:, 0] - 0.3 * v, atol=1e-5, rtol=0)


def test_the_net_is_asked_at_the_levels_of_the_list(net):
    """One pass for each level but the last, one sigma for all clips and both streams."""
    sample(net)
    assert [c[2].tolist() for c in net.calls] == [pytest.approx([s] * 3) for s in SIGMAS[:-1]]
    assert all(torch.equal(c[2], c[3]) for c in net.calls)


def test_kept_states_lie_at_the_asked_levels(net):
    """The first state is noise, the last is the result, the others lie on the line between."""
    answer, kept = sample(net, keep=range(5), seed=7)
    span = masks.clip_span(3, CFG)
    noise = model.draw_noise(3, span, CFG, torch.Generator().manual_seed(7))
    for states, n, x0, end in zip(kept, noise, net.x0, answer):
        assert torch.equal(states[:, 0], n) and torch.equal(states[:, -1], end)
        for i, sigma in enumerate(SIGMAS):
            torch.testing.assert_close(
                states[:, i], (1 - sigma) * x0 + sigma * n, atol=1e-5, rtol=0
            )


def test_only_the_asked_states_are_kept(net):
    """keep=(0, 3) gives two states, in that order."""
    _, all_kept = sample(net, keep=range(5))
    _, kept = sample(net, keep=(0, 3))
    for states, few in zip(all_kept, kept):
        assert torch.equal(few, states[:, [0, 3]])


def test_guidance_1_is_one_pass_of_the_batch_itself(net):
    """Without guidance, the batch is not doubled."""
    sample(net, guidance=(1, 1))
    assert [len(c[0]) for c in net.calls] == [3] * 4
    assert all(torch.equal(c[4], toy_world.caption_features(TOKENS)) for c in net.calls)


def test_guidance_runs_the_empty_caption_beside_the_given_one(net):
    """One pass has twice the batch: first the captions, then as many empty captions."""
    sample(net, guidance=(1.5, 1.5))
    features = toy_world.caption_features(torch.cat([TOKENS, torch.zeros_like(TOKENS)]))
    assert len(net.calls) == 4
    assert all(len(c[0]) == 6 and torch.equal(c[4], features) for c in net.calls)
    assert all(torch.equal(c[0][:3], c[0][3:]) for c in net.calls)


@pytest.mark.parametrize("scales, expected", [((2.0, 2.0), (5, 5)), ((2.0, 0.5), (5, 2))])
def test_guidance_pushes_away_from_the_empty_caption(scales, expected):
    """x0_u + s (x0_c - x0_u), with a scale for each stream; here x0_c = 3 and x0_u = 1."""
    net = PerfectNet(random_clip(CFG, 3, clips=3, dtype=torch.float32))
    guided = teacher.Guided(net, CAPTIONS, scales)
    net.x0 = [torch.cat([torch.full_like(x, 3.0), torch.full_like(x, 1.0)]) for x in net.x0]
    x = model.draw_noise(3, masks.clip_span(3, CFG), CFG, torch.Generator().manual_seed(0))
    for x0, value in zip(guided.x0(*x, torch.full((3,), 0.5), None, None), expected):
        torch.testing.assert_close(x0, torch.full_like(x0, value))


def test_a_seed_is_a_clip():
    """The same seed gives the same bits, another seed another clip."""
    net = model.build(CFG)
    one, same, other = (sample(net, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(one, same))
    assert not any(torch.equal(x, y) for x, y in zip(one, other))
