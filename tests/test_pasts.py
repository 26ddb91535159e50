"""The studies of stage III and of what comes before it: what is trained on is what they say."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import SMALL, random_model, run_here, save_small_student
from torch import nn

import masks
import model
from studies import first_teachers, pasts
from toy import source, world


class Knowing(nn.Module):
    """Its velocities lead straight to the blocks of a known clip; notes levels and latents."""

    def __init__(self, clip, cfg=SMALL):
        super().__init__()
        self.clip, self.cfg, self.calls = clip, cfg, []
        self.weight = nn.Parameter(torch.zeros(1))

    def project_text(self, features):
        return features

    def forward(self, video, audio, sigma_video, sigma_audio, text, span, view):
        self.calls.append((span, sigma_video[:1].view(-1)[0].item(), video, audio))
        per_frame, found = self.cfg.tokens_per_frame, []
        bounds = (span.video.start * per_frame, span.video.stop * per_frame), span.audio
        for x, whole, at, s in zip((video, audio), self.clip, bounds, (sigma_video, sigma_audio)):
            low, high = at if isinstance(at, tuple) else (at.start, at.stop)
            s = model.per_token(s, x)[..., None]
            found.append(torch.where(s > 0, (x - whole[:, low:high]) / s.clamp(min=1e-9), 0))
        return [v + 0 * self.weight for v in found]


@pytest.fixture
def clips():
    return world.draw_clips(range(2))


@pytest.fixture
def knowing(clips):
    return Knowing(source.true_latents(clips))


def captions_of(clips):
    return source.toy_captions(world.caption_tokens(clips))


def test_resampled_blocks_are_denoised_from_the_level_and_cached(knowing, clips):
    """Of a student that knows the clip: the clip. Each pass at LEVEL, then the refresh of it."""
    made = pasts.resampled(knowing, captions_of(clips), torch.Generator().manual_seed(0), clips)
    for x, real in zip(made, knowing.clip):
        torch.testing.assert_close(x, real, atol=1e-5, rtol=1e-5)
    assert [round(s, 4) for _, s, *_ in knowing.calls] == [round(pasts.LEVEL, 4), 0] * 6
    noisy, clean = knowing.calls[2][2], knowing.calls[3][2]
    assert (noisy - (1 - pasts.LEVEL) * clean).std() == pytest.approx(pasts.LEVEL, rel=0.1)


def test_without_refresh_the_cache_gets_a_pass_at_the_last_level(knowing):
    """Other passes are left alone."""
    kept = pasts.LastLevelKept(knowing, torch.Generator().manual_seed(0))
    span, zero = masks.block_span(1, SMALL), torch.zeros(2)
    per_frame = SMALL.tokens_per_frame
    video = torch.randn(2, len(span.video) * per_frame, SMALL.video_channels)
    audio = torch.randn(2, len(span.audio), SMALL.audio_channels)
    for sigma in (zero, zero + 1):
        kept(video, audio, sigma, sigma, None, span, None)
    (_, low, noisy, noisy_audio), (_, high, same, _) = knowing.calls
    last = SMALL.sigmas[-2]
    assert low == pytest.approx(last) and high == 1 and same is video
    for x, n in ((video, noisy), (audio, noisy_audio)):
        assert ((n - (1 - last) * x) / last).std() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("arm", pasts.PASTS.values(), ids=pasts.PASTS)
def test_an_arm_trains_behind_its_past(clips, arm, monkeypatch):
    """What the refresh caches: the student's own blocks, real ones, or resampled ones."""
    net = random_model(SMALL, torch.float32)
    net.cfg = pasts.replace(net.cfg, sigmas=pasts.few_step_sigmas(net.cfg, arm.passes))
    cached, refresh = [], pasts.self_forcing.rollout.__globals__["refresh"]
    monkeypatch.setitem(
        pasts.self_forcing.rollout.__globals__, "refresh",
        lambda net, x0, *others: cached.append(x0[0]) or refresh(net, x0, *others),
    )  # fmt: skip
    again, resampled = [], pasts.resampled

    def noted(*args):
        again.append(resampled(*args))
        return again[0]

    monkeypatch.setattr(pasts, "resampled", noted)
    made = arm.make(net, clips, captions_of(clips), torch.Generator().manual_seed(0))
    cached = torch.cat(cached, 1).detach()
    past = {"own": made, "true": source.true_latents(clips), "resampled": again and again[0]}
    for name, clip in past.items():
        if clip:
            same = torch.equal(cached, clip[0][:, : cached.shape[1]].detach())
            assert same == (name == arm.past)


def test_flow_matching_asks_for_the_velocity(monkeypatch):
    """A network that knows the clips has no loss; each block has its level in both streams."""
    recipe, args = pasts.trainer.Recipe(10, batch=2), SimpleNamespace()
    _, latents, _ = first_teachers.real_clips(recipe)(3)
    net = Knowing(latents)
    assert first_teachers.flow_matching(net, recipe, args)(3)["loss"] < 1e-8
    net.clip = [x + 1 for x in latents]
    assert first_teachers.flow_matching(net, recipe, args)(3)["loss"] > 0.5


def test_consistency_compares_neighbours_behind_the_real_past():
    """A network that knows the clips has no loss; its cache gets the real blocks."""
    recipe = pasts.trainer.Recipe(10, batch=2)
    _, latents, _ = first_teachers.real_clips(recipe)(0)
    net = Knowing(latents)
    assert first_teachers.consistency(net, recipe, None)(0)["loss"] < 1e-8
    refreshed = [video for _, _, video, _ in net.calls[2::3]]
    assert torch.equal(torch.cat(refreshed, 1), latents[0]) and len(net.calls) == 18


def test_seeds_learn_from_clips_of_their_own():
    """And from none that the teacher, or the evaluation, has seen."""
    draws = [first_teachers.real_clips(pasts.trainer.Recipe(4, batch=2, seed=s)) for s in (0, 1)]
    seen = [draw(step)[1][0] for draw in draws for step in range(4)]
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("study, words, rows", [
    (pasts, ["past", "--only", "1 pass, true past, seed 0"], 1),
    (pasts, ["refresh", "--only", "trained without refresh, seed 1"], 2),
    (first_teachers, ["--distil", 1, "--walks", 8, "--only", "regression, seed 0"], 2),
])  # fmt: skip
def test_a_study_runs_from_start_to_end(tmp_path, study, words, rows, monkeypatch, capsys):
    """It trains and writes its tables; the second time it does not train again."""
    monkeypatch.setattr(pasts.evaluate, "RESAMPLES", 3)
    words += ["--steps", 1, "--clips", 2, "--seconds", 5, "--run", tmp_path / "run"]
    if study is pasts:
        words += ["--student", save_small_student(tmp_path / "s.safetensors")]
    trained = []
    for out in ("a", "b"):
        status, said, _ = run_here(study, [*words, "--out", tmp_path / out], monkeypatch, capsys)
        assert status == 0
        trained.append("from step 0" in said)
    a, b = (json.loads((tmp_path / f"{out}.json").read_text())["result"] for out in "ab")
    assert a == b and len(a) == rows and trained == [True, False]
