"""The studies of stage III and of what comes before it: what is trained on is what they say."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import SMALL, random_model, run_here, save_small_student
from torch import nn

import masks
import model
import rollout
import teacher
from ode_regression import FIRST_SEED
from plumbing import trainer
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
    """Of a student that knows another clip: that clip, also in its cache."""
    real = [x.clone() for x in knowing.clip]
    knowing.clip = [x + 1 for x in real]
    made = pasts.resampled(knowing, captions_of(clips), torch.Generator().manual_seed(0), clips)
    refreshed = torch.cat([video for _, _, video, _ in knowing.calls[1::2]], 1)
    for x, other in ((made[0], knowing.clip[0]), (made[1], knowing.clip[1]), (refreshed, made[0])):
        torch.testing.assert_close(x, other, atol=1e-5, rtol=1e-5)
    assert [round(s, 4) for _, s, *_ in knowing.calls] == [round(pasts.LEVEL, 4), 0] * 6
    noisy = torch.cat([video for _, _, video, _ in knowing.calls[::2]], 1)
    noise = (noisy - (1 - pasts.LEVEL) * real[0]) / pasts.LEVEL
    assert noise.std() == pytest.approx(1, rel=0.05) and abs(noise.mean()) < 0.05


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
    net.cfg = replace(net.cfg, sigmas=rollout.few_step_sigmas(net.cfg, arm.passes))
    cached, again, refresh, resampled = [], [], rollout.refresh, pasts.resampled

    def noted_refresh(net, x0, *others):
        cached.append(x0[0])
        refresh(net, x0, *others)

    def noted_resampled(*args):
        again.append(resampled(*args))
        return again[0]

    monkeypatch.setattr(rollout, "refresh", noted_refresh)
    monkeypatch.setattr(pasts, "resampled", noted_resampled)
    made = arm.make(net, clips, captions_of(clips), torch.Generator().manual_seed(0))
    cached = torch.cat(cached, 1).detach()
    past = {"own": made, "true": source.true_latents(clips), "resampled": again and again[0]}
    for name, clip in past.items():
        if clip:
            same = torch.equal(cached, clip[0][:, : cached.shape[1]].detach())
            assert same == (name == arm.past)


@pytest.mark.parametrize("arm", pasts.REFRESHES.values(), ids=pasts.REFRESHES)
def test_an_arm_trains_with_or_without_a_refresh(clips, arm):
    """Five refreshes, or none."""
    net = Knowing(source.true_latents(clips))
    arm.make(net, clips, captions_of(clips), torch.Generator().manual_seed(0))
    assert sum(s == 0 for _, s, *_ in net.calls) == 5 * arm.has_refresh


def test_flow_matching_asks_for_the_velocity():
    """A network that knows the clips has no loss; another one has."""
    recipe = trainer.Recipe(10, batch=2)
    latents, _ = first_teachers.real_clips(recipe, 3)
    net = Knowing(latents)
    assert first_teachers.flow_matching(net, recipe, None)(3)["loss"] < 1e-8
    net.clip = [x + 1 for x in latents]
    assert first_teachers.flow_matching(net, recipe, None)(3)["loss"] > 0.5


def test_flow_matching_has_a_level_for_each_block():
    """The same in both streams, clean for some blocks; a block does not see later ones."""
    recipe, seen = trainer.Recipe(10, batch=64), []
    net = random_model(SMALL, torch.float32)
    net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs))
    first_teachers.flow_matching(net, recipe, None)(0)
    _, _, sigma_v, sigma_a, _, _, view = seen[0]
    of_frames = masks.frame_blocks(first_teachers.BLOCKS, SMALL)
    by_block = [
        torch.stack([s[:, blocks == k].amax(1) for k in range(6)], 1)
        for s, blocks in zip((sigma_v, sigma_a), of_frames)
    ]
    assert torch.equal(*by_block)
    for s, blocks in zip((sigma_v, sigma_a), of_frames):
        assert torch.equal(s, by_block[0][:, blocks])
    assert by_block[0].unique().numel() > 200 and 0.1 < (by_block[0] == 0).float().mean() < 0.4
    assert not view.masks["video_self"][0].all()


def test_consistency_compares_neighbours_behind_the_real_past():
    """A network that knows the clips has no loss; its cache gets the real blocks."""
    recipe = trainer.Recipe(10, batch=1)
    latents, _ = first_teachers.real_clips(recipe, 0)
    net = Knowing(latents)
    assert first_teachers.consistency(net, recipe, None)(0)["loss"] < 1e-8
    lower, higher, clean = (net.calls[i::3] for i in range(3))
    assert torch.equal(torch.cat([video for _, _, video, _ in clean], 1), latents[0])
    index = {round(s, 4): i for i, s in enumerate(SMALL.sigmas)}
    for (_, low, *_), (_, high, *_) in zip(lower, higher, strict=True):
        assert index[round(low, 4)] == index[round(high, 4)] + 1
    net.clip = [x + 1 for x in latents]  # only predictions of the real block are wrong now
    ends = [low == 0 for _, low, *_ in lower]
    assert any(ends) and first_teachers.consistency(net, recipe, None)(0)["loss"] > 0.1


def test_seeds_learn_from_clips_of_their_own(monkeypatch):
    """And from none that the teacher or the evaluation has seen."""
    seen, draw = [], world.draw_clips
    monkeypatch.setattr(world, "draw_clips", lambda seeds: seen.extend(seeds) or draw(seeds))
    for seed in (0, 1):
        for step in range(4):
            first_teachers.real_clips(trainer.Recipe(4, batch=2, seed=seed), step)
    assert len(set(seen)) == 16
    assert teacher.SEEDS * teacher.CLIPS_PER_SEED <= FIRST_SEED <= min(seen)
    assert max(seen) < world.HELD_OUT


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
    if "past" in words:
        (student,) = tmp_path.glob("run/*/student.safetensors")
        assert model.load(student).cfg.sigmas == (1.0, 0.0)  # one pass
