"""Graded: one noise level per block, the states at these levels, and which blocks have a loss.

Blocks are counted by hand. The student is a stand-in that predicts the given ends.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from test_graded_masks import block_of

import config
import ode_regression as ode
from toy.source import toy_captions

CFG = replace(config.TOY, height=16, width=16)  # 4 tokens per video frame
SIGMAS, BLOCKS, CLEAN = CFG.sigmas, 3, 4  # CLEAN: index of the clean level
FRAMES = {"video": (7, 3, 4), "audio": (51, 25, 1)}  # frames, frames per later block, tokens each
LEVELS = torch.tensor([[0, 3, CLEAN], [CLEAN, 2, 1]])  # of two clips


@pytest.mark.points(1, "fine_sigmas")
def test_fine_levels_lie_evenly_between_the_levels_of_the_student():
    """Every third one is a level of the student; none is left out or repeated."""
    found = ode.fine_sigmas((1.0, 0.4, 0.1), 3)
    assert len(found) == 7, f"3 levels with 3 steps between neighbours are 7, not {len(found)}"
    third = found[::3]
    assert third == pytest.approx([1.0, 0.4, 0.1]), f"off by one step: every third one is {third}"
    assert found == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1]), f"not even: {found}"


@pytest.mark.points(1, "masked_mean")
def test_the_mean_counts_only_what_the_mask_keeps():
    """Other elements change neither sum nor count; the mean of nothing is 0."""
    x, mask = torch.tensor([[2.0, 100.0, 4.0, 100.0]]), torch.tensor([[True, False, True, False]])
    found = float(ode.masked_mean(x, mask))
    assert found != 1.5, "divided by the number of all elements: count only what the mask keeps"
    assert found == 3, f"the mean of 2 and 4 is {found}"
    assert float(ode.masked_mean(x, mask & False)) == 0, "the mean of nothing should be 0"


@pytest.mark.points(2, "gather_states")
def test_every_frame_is_in_the_state_of_its_own_level():
    """Frame by frame, for frames of any shape."""
    states = torch.arange(2 * 5 * 3 * 4.0).view(2, 5, 3, 2, 2)  # (B, L, F, tokens, C)
    levels = torch.tensor([[0, 4, 2], [1, 1, 3]])
    found = ode.gather_states(states, levels)
    assert found.shape == (2, 3, 2, 2), f"(B, F, ...) is (2, 3, 2, 2), not {tuple(found.shape)}"
    for b, f in itertools.product(range(2), range(3)):
        level = int(levels[b, f])
        is_right = torch.equal(found[b, f], states[b, level, f])
        assert is_right, f"clip {b}, frame {f} is not in its state at level {level}"


@pytest.mark.points(2, "draw_levels")
def test_every_block_has_a_level_of_its_own():
    """A quarter of the blocks is clean; the others have uniform levels; all are independent."""
    drawn = ode.draw_levels(4000, BLOCKS, 5, torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, BLOCKS), f"(B, N) is (4000, 3), not {tuple(drawn.shape)}"
    shares = [float((drawn == level).float().mean()) for level in range(5)]
    alike = float((drawn[:, 0] == drawn[:, 1]).float().mean())
    assert alike < 0.5, f"blocks 0 and 1 share their level in {alike:.0%} of the clips"
    assert shares[CLEAN] == pytest.approx(0.25, abs=0.02), (
        f"{shares[CLEAN]:.0%} of the blocks are clean, but CLEAN_SHARE is 25 %: draw whether a "
        f"block is clean separately, not as a fifth level"
    )
    assert shares[:4] == pytest.approx([0.1875] * 4, abs=0.02), f"shares of the levels: {shares}"


@pytest.mark.points(1, "draw_levels")
def test_clean_blocks_are_drawn_block_by_block():
    """A clean block says nothing about the next one."""
    clean = ode.draw_levels(4000, BLOCKS, 5, torch.Generator().manual_seed(0)) == CLEAN
    both = float((clean[:, 0] & clean[:, 1]).float().mean())
    assert both < 0.1, f"blocks 0 and 1 are both clean in {both:.0%} of the clips, not in 6 %"


class Student:
    """Returns the velocities that lead to the given ends, and records its input."""

    def __init__(self, ends):
        self.cfg, self.ends = CFG, ends

    def project_text(self, features):
        return features

    def __call__(self, video, audio, sigma_video, sigma_audio, text, span, view):
        self.seen, self.sigmas = (video, audio), (sigma_video, sigma_audio)
        velocities = []
        for x, end, sigma in zip(self.seen, self.ends, self.sigmas):
            s = sigma.repeat_interleave(x.shape[1] // sigma.shape[1], 1)[..., None]
            velocities.append(torch.where(s > 0, (x - end) / s, 0.0))
        return velocities


def regress(off=0.0):
    """Compute the losses of a student that is `off` the ends: losses, student, trajectories."""
    g = torch.Generator().manual_seed(0)
    shape = dict(video=(28, CFG.video_channels), audio=(51, CFG.audio_channels))
    states = {name: torch.randn(2, 5, *shape[name], generator=g) for name in FRAMES}
    student = Student([states[name][:, -1] + off for name in FRAMES])
    captions = toy_captions(torch.tensor([[1, 5, 7]] * 2))
    trajectories = captions, states["video"], states["audio"]
    return ode.regression_losses(student, trajectories, LEVELS, SIGMAS, None), student, states


@pytest.mark.points(2, "regression_losses")
def test_video_and_audio_of_a_block_share_its_level():
    """The student gets, for every frame of both streams, the level of that frame's block."""
    _, student, _ = regress()
    for (name, (frames, step, _)), sigma in zip(FRAMES.items(), student.sigmas):
        per_frame = sigma[:, :: sigma.shape[1] // frames]  # (B, F), also from (B, T)
        for b, f in itertools.product(range(2), range(frames)):
            found, block = float(per_frame[b, f]), block_of(f, 1, step)
            right = pytest.approx(SIGMAS[LEVELS[b, block]])
            wrong = f"{name} frame {f} (block {block}) has level {found:.3f}, not that of its block"
            assert found == right, f"{wrong}: video and audio of a block share one level"


@pytest.mark.points(1, "regression_losses")
def test_the_student_sees_the_state_at_its_level():
    """Token by token, the input is the trajectory's state at the level of the token's block."""
    _, student, states = regress()
    for (name, (_, step, tokens)), x in zip(FRAMES.items(), student.seen):
        for b, t in itertools.product(range(2), range(x.shape[1])):
            level = int(LEVELS[b, block_of(t // tokens, 1, step)])
            found = [i for i in range(5) if torch.equal(x[b, t], states[name][b, i, t])]
            place = f"that at level {found[0]}" if found else "none of the trajectory"
            right = f"{name} token {t} should be in its state at level {level}"
            assert found == [level], f"{right}, but it is in {place}"


@pytest.mark.points(1, "regression_losses")
def test_the_target_is_the_clean_end_of_the_trajectory():
    """A student that predicts it at every level has no loss."""
    losses, _, _ = regress()
    assert len(losses) == 2, f"one loss for video and one for audio, not {len(losses)}"
    for name, loss in zip(FRAMES, losses):
        found = f"{name}: a student that predicts the clean end has a loss of {float(loss):.2f}"
        assert loss < 1e-6, f"{found}, not 0: the target is the end of the trajectory"


@pytest.mark.points(1, "regression_losses")
def test_clean_blocks_do_not_count():
    """An error of 2 is a loss of 4, however many blocks are clean."""
    for name, loss in zip(FRAMES, regress(off=2.0)[0]):
        found = float(loss)
        rule = "clean blocks, where nothing is to be learnt, must not count in the mean"
        assert found == pytest.approx(4, rel=1e-3), f"{name}: {found:.2f} instead of 4: {rule}"
