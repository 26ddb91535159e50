"""Graded: one noise level per block, the states at these levels, and which blocks have a loss.

Blocks are counted by hand. The student is a stand-in that predicts the given ends.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from grading import check, check_dtype, close, random_tensor, watched
from test_graded_masks import block_of
from torch import nn

import config
import model
import ode_regression as ode
from kv_cache import MaskedView
from masks import clip_span

CFG = replace(config.TOY, height=8, width=16, video_channels=6, audio_channels=5)  # 2 tokens/frame
RELEASED = replace(CFG, prefix_video_frames=4, prefix_audio_frames=26, num_sinks=0)
SIGMAS = 1.0, 0.8, 0.5, 0.3, 0.0  # not those of the config: they are an argument
CLIPS, BLOCKS, CLEAN = 3, 4, 4  # CLEAN: index of the clean level
STREAMS = {"video": (3, 2), "audio": (25, 1)}  # frames of a later block, tokens of a frame
LEVELS = torch.tensor([[0, 3, CLEAN, 2], [CLEAN, 2, 1, 0], [CLEAN, CLEAN, 3, CLEAN]])


@pytest.mark.points(1, "fine_sigmas")
def test_fine_levels_lie_evenly_between_the_levels_of_the_student():
    """Every third one is a level of the student; none is left out or repeated."""
    for sigmas, between in (((1.0, 0.4, 0.1), 3), ((1.0, 0.0), 4), (CFG.sigmas, 1)):
        found, count = ode.fine_sigmas(sigmas, between), 1 + between * (len(sigmas) - 1)
        given = f"{len(sigmas)} levels with {between} steps between neighbours"
        assert len(found) == count, f"{given} are {count}, not {len(found)}"
        kept = list(found[::between])
        off = f"off by one step: every {between}. one is {kept}, not {sigmas}"
        assert kept == pytest.approx(list(sigmas)), off
        right = [
            high + (low - high) * i / between
            for high, low in itertools.pairwise(sigmas)
            for i in range(between)
        ]
        even = [float(s) for s in found]
        assert even == pytest.approx([*right, sigmas[-1]]), f"{given}: not even: {even}"


@pytest.mark.points(1, "masked_mean")
def test_the_mean_counts_only_what_the_mask_keeps():
    """All kept elements of all clips alike; others change neither sum nor count; nothing is 0."""
    x = torch.tensor([[2.0, 100.0, 4.0, 100.0], [9.0, 50.0, 70.0, 80.0]], requires_grad=True)
    mask = torch.tensor([[True, False, True, False], [True, False, False, False]])
    with watched(x, mask):
        found = ode.masked_mean(x, mask)
    assert found.dim() == 0, f"the mean is one number, not {tuple(found.shape)}"
    suspects = {
        "divided by the number of all elements: count only what the mask keeps": 15 / 8,
        "the mean of the means of the rows: all kept elements count alike": (3 + 9) / 2,
        "the sum is not divided": 15,
    }
    check(found, torch.tensor(5.0), "the mean of 2, 4 and 9", suspects)
    assert found.requires_grad, "the mean has no gradient: nothing would be learnt"
    (gradient,) = torch.autograd.grad(found, x)
    check(gradient, mask / 3, "the gradient of every kept element is 1 / 3")
    one = torch.zeros(2, 4, dtype=torch.bool).index_fill(1, torch.tensor(2), True)
    one[1] = False
    found = float(ode.masked_mean(x.detach(), one))
    assert found == 4, f"the mean of 4 alone should be 4, not {found}"
    nothing = float(ode.masked_mean(x, mask & False).detach())
    assert nothing == 0, f"the mean of nothing should be 0, not {nothing}"
    assert float(ode.masked_mean(x.detach(), mask | True)) == 51.875, "the mean of everything"


@pytest.mark.points(2, "gather_states")
def test_every_frame_is_in_the_state_of_its_own_level():
    """Frame by frame, for frames of any shape."""
    for frame in ((2, 2), (3,), ()):
        for B, L, F in ((2, 5, 3), (3, 3, 3), (1, 4, 6)):
            states = random_tensor(B, L, F, *frame, requires_grad=True)
            levels = torch.arange(B * F).view(B, F) * 7 % L
            with watched(states, levels):
                found = ode.gather_states(states, levels)
            shape = (B, F, *frame)
            assert found.shape == shape, f"(B, F, ...) is {shape}, not {tuple(found.shape)}"
            for b, f in itertools.product(range(B), range(F)):
                level = int(levels[b, f])
                is_right = torch.equal(found[b, f], states[b, level, f])
                assert is_right, f"clip {b}, frame {f} is not in its state at level {level}"
            assert found.requires_grad, "no gradient passes on to the states"


def drawn(clips=6000, blocks=3, levels=5, seed=0):
    with watched():
        return ode.draw_levels(clips, blocks, levels, torch.Generator().manual_seed(seed))


@pytest.mark.points(2, "draw_levels")
def test_every_block_has_a_level_of_its_own():
    """A quarter of the blocks is clean; the others have uniform levels; all are independent."""
    for levels in (5, 4):
        found = drawn(levels=levels)
        assert found.shape == (6000, 3), f"(B, N) is (6000, 3), not {tuple(found.shape)}"
        assert not found.is_floating_point(), "levels are indices, so whole numbers"
        clean, shares = levels - 1, [float((found == i).float().mean()) for i in range(levels)]
        alike = float((found[:, 0] == found[:, 1]).float().mean())
        assert alike < 0.5, f"blocks 0 and 1 share their level in {alike:.0%} of the clips"
        assert shares[clean] == pytest.approx(0.25, abs=0.02), (
            f"{shares[clean]:.0%} of the blocks are clean, but CLEAN_SHARE is 25 %: draw whether a "
            f"block is clean separately, not as level {clean} of {levels}"
        )
        uniform = [0.75 / clean] * clean
        assert shares[:clean] == pytest.approx(uniform, abs=0.02), f"shares of the levels: {shares}"
        for k, level in itertools.product(range(3), range(levels)):
            share = float((found[:, k] == level).float().mean())
            own = f"block {k} has level {level} in {share:.0%} of the clips, all blocks together"
            independent = f"{own} in {shares[level]:.0%}: the levels of a clip are not independent"
            assert share == pytest.approx(shares[level], abs=0.03), independent


@pytest.mark.points(1, "draw_levels")
def test_clean_blocks_are_drawn_block_by_block():
    """A clean block says nothing about the next one, nor a level; all is from the generator."""
    found = drawn()
    clean = found == CLEAN
    both = float((clean[:, 0] & clean[:, 1]).float().mean())
    assert both < 0.1, f"blocks 0 and 1 are both clean in {both:.0%} of the clips, not in 6 %"
    for j, k in ((0, 1), (1, 2), (0, 2)):
        for a, b in itertools.product(range(5), repeat=2):
            share = float(((found[:, j] == a) & (found[:, k] == b)).float().mean())
            right = [0.25 if level == CLEAN else 0.1875 for level in (a, b)]
            pair = f"blocks {j} and {k} have levels {a} and {b} in {share:.0%} of the clips"
            is_right = abs(share - right[0] * right[1]) < 0.02
            assert is_right, f"{pair}, expected {right[0] * right[1]:.0%}: draw them independently"
    assert torch.equal(drawn(40), drawn(40)), "the same generator draws other levels"
    assert not torch.equal(drawn(40), drawn(40, seed=1)), "another seed draws the same levels"


class Student(nn.Module):
    """Returns the velocities that lead to the given ends, and records its input."""

    def __init__(self, cfg, ends):
        super().__init__()
        self.cfg, self.ends = cfg, ends
        self.weight = nn.Parameter(torch.ones(()))

    def project_text(self, video_features, audio_features=None, mask=None):
        audio_features = video_features if audio_features is None else audio_features
        video, audio = (self.weight * x[:, :, None] for x in (video_features, audio_features))
        return model.TextKV(((video, video),), ((audio, audio),), mask)

    def forward(self, video, audio, sigma_video, sigma_audio, text, span, view, ropes=None):
        sigmas = [s.view(len(s), -1) for s in (sigma_video, sigma_audio)]
        self.seen, self.sigmas = (video, audio), sigmas
        self.text, self.span, self.view = text, span, view
        velocities = []
        for x, end, s in zip(self.seen, self.ends, sigmas):
            assert x.shape == end.shape, f"the student sees {tuple(x.shape)}, not {end.shape}"
            s = s.repeat_interleave(x.shape[1] // s.shape[1], 1)[..., None]
            velocities.append(torch.where(s > 0, (x - self.weight * end) / s, 0.0))
        return velocities


CAPTIONS = model.Captions(*(
    tuple(random_tensor(CLIPS, 2, 9, seed=seed + i) for i in range(2)) for seed in (40, 50)
))  # fmt: skip
VIEW = MaskedView({"a2v": torch.ones(1, 1, dtype=torch.bool)})


def block_of_tokens(name, cfg):
    """Count the block of every token of a stream."""
    step, tokens = STREAMS[name]
    prefix = cfg.prefix_video_frames if name == "video" else cfg.prefix_audio_frames
    frames = prefix + (BLOCKS - 1) * step
    return [block_of(f, prefix, step) for f in range(frames) for _ in range(tokens)]


def regress(cfg=CFG, off=(0.0, 0.0), scale=0.0, sigmas=SIGMAS):
    """Compute the losses of a student whose clean estimates are wrong.

    off     its error in every element of video and of audio, plus `scale` times random numbers
    ->      losses, student, trajectories, and the squared error (B, T) of every token
    """
    states, errors, channels = {}, {}, (cfg.video_channels, cfg.audio_channels)
    for i, (name, C) in enumerate(zip(STREAMS, channels)):
        T = len(block_of_tokens(name, cfg))
        states[name] = random_tensor(CLIPS, len(sigmas), T, C, seed=i)
        errors[name] = off[i] + scale * random_tensor(CLIPS, T, C, seed=10 + i)
    student = Student(cfg, [states[name][:, -1] + errors[name] for name in STREAMS])
    trajectories = CAPTIONS, states["video"], states["audio"]
    levels = LEVELS.where(LEVELS < CLEAN, len(sigmas) - 1)
    with watched(trajectories[1:], levels, CAPTIONS.features):
        losses = ode.regression_losses(student, trajectories, levels, sigmas, VIEW)
    assert len(losses) == 2, f"one loss for video and one for audio, not {len(losses)}"
    squares = {name: x.square().mean(-1) for name, x in errors.items()}
    return losses, student, states, squares


@pytest.mark.points(2, "regression_losses")
def test_video_and_audio_of_a_block_share_its_level():
    """The student gets, for every frame of both streams, the level of that frame's block."""
    for cfg in (CFG, RELEASED):
        _, student, *_ = regress(cfg)
        for name, sigma in zip(STREAMS, student.sigmas):
            blocks, tokens = block_of_tokens(name, cfg), STREAMS[name][1]
            frames = len(blocks) // tokens
            fits = sigma.shape in ((CLIPS, frames), (CLIPS, frames * tokens))
            shape = tuple(sigma.shape)
            assert fits, f"{name} has levels {shape}, expected one for each frame or token"
            per_frame = sigma[:, :: sigma.shape[1] // frames]  # (B, F), also from (B, T)
            for b, f in itertools.product(range(CLIPS), range(frames)):
                found, block = float(per_frame[b, f]), blocks[f * tokens]
                right = pytest.approx(SIGMAS[LEVELS[b, block]])
                where = f"{name} frame {f} (block {block}) has level {found:.3f}"
                wrong = f"{where}, not that of its block"
                assert found == right, f"{wrong}: video and audio of a block share one level"


@pytest.mark.points(1, "regression_losses")
def test_the_student_sees_the_state_at_its_level():
    """Token by token, the input is the trajectory's state at the level of the token's block."""
    for cfg in (CFG, RELEASED):
        _, student, states, _ = regress(cfg)
        for name, x in zip(STREAMS, student.seen):
            blocks = block_of_tokens(name, cfg)
            for b, t in itertools.product(range(CLIPS), range(x.shape[1])):
                level = int(LEVELS[b, blocks[t]])
                if torch.equal(x[b, t], states[name][b, level, t]):
                    continue
                found = [i for i in range(5) if torch.equal(x[b, t], states[name][b, i, t])]
                place = f"that at level {found[0]}" if found else "none of the trajectory"
                right = f"{name} token {t} should be in its state at level {level}"
                pytest.fail(f"{right}, but it is in {place}")


@pytest.mark.points(1, "regression_losses")
def test_the_student_gets_view_span_and_captions():
    """The given masks, all blocks of the clip, and the caption of every clip for both streams."""
    for cfg in (CFG, RELEASED):
        _, student, *_ = regress(cfg)
        is_given = student.view is VIEW
        assert is_given, "the given view is ignored: without its masks the student sees the future"
        span = clip_span(BLOCKS, cfg)
        assert student.span == span, f"the span is {student.span}, not {span}"
        both = student.text.video, student.text.audio
        for name, text, features in zip(STREAMS, both, CAPTIONS.features):
            found = text[0][0][:, :, 0]
            is_own = close(found, features)
            assert is_own, f"{name} does not read its own features of the captions, clip by clip"


@pytest.mark.points(1, "regression_losses")
def test_the_target_is_the_clean_end_of_the_trajectory():
    """A student that predicts it has no loss, with 5 and with 6 levels; video comes first."""
    for sigmas in (SIGMAS, (1.0, 0.8, 0.5, 0.3, 0.1, 0.0)):
        for name, loss in zip(STREAMS, regress(sigmas=sigmas)[0]):
            found = f"{name}: a student that predicts the clean end has a loss of"
            end = f"the target is the end of the trajectory, here state {len(sigmas) - 1}"
            assert loss.detach() < 1e-6, f"{found} {float(loss.detach()):.2f}, not 0: {end}"
    video, audio = (float(loss.detach()) for loss in regress(off=(0.0, 2.0))[0])
    swapped = "the losses are swapped: video comes first, then audio"
    assert video < 1e-4 < audio, f"{swapped}; with an error in audio alone they are {video, audio}"


@pytest.mark.points(1, "regression_losses")
def test_clean_blocks_do_not_count():
    """An error of 2 is a loss of 4, however many blocks are clean; all noisy tokens count alike."""
    channels = CFG.video_channels, CFG.audio_channels
    for name, loss, C in zip(STREAMS, regress(off=(2.0, 2.0))[0], channels):
        suspects = {
            f"{name}: the error is not squared, or the root of its square is taken": 2,
            f"{name}: the sum over the channels, not their mean": 4 * C,
        }
        rule = (
            "every noisy block has the same weight, and clean blocks, where nothing is to be "
            "learnt, must not count in the mean"
        )
        wrong = f"{name}: an error of 2 is a loss of {float(loss.detach()):.2f} instead of 4"
        check(loss, torch.tensor(4.0), f"{wrong}: {rule}", suspects, 1e-3)
    for cfg in (CFG, RELEASED):
        losses, student, _, squares = regress(cfg, scale=1.0)
        for name, loss in zip(STREAMS, losses):
            noisy = LEVELS[:, block_of_tokens(name, cfg)] < CLEAN
            right = squares[name][noisy].mean()
            rows = [s[n].mean() for s, n in zip(squares[name], noisy)]
            suspects = {
                f"{name}: the mean of the means of the clips": torch.stack(rows).mean(),
                f"{name}: the sum over the channels, not their mean": right * 6,
            }
            what = f"{name}: not the mean squared error over the tokens of noisy blocks"
            check(loss, right, what, suspects, 1e-4)


@pytest.mark.points(1, "regression_losses")
def test_both_losses_train_the_student():
    """A gradient of each reaches its weights; the trajectories are given and get none."""
    losses, student, *_ = regress(scale=1.0)
    for name, loss in zip(STREAMS, losses):
        assert loss.requires_grad, f"{name}: the loss has no gradient, so nothing is learnt"
        (g,) = torch.autograd.grad(loss, student.weight, retain_graph=True, allow_unused=True)
        assert g is not None and g.any(), f"{name}: no gradient reaches the student"
        check_dtype(loss, torch.float32, f"{name}: the loss has the dtype of the latents")
    for name, text in zip(STREAMS, (student.text.video, student.text.audio)):
        learns = text[0][0].requires_grad
        assert learns, f"{name}: captions are projected without gradient: their layers learn too"
