"""Graded: the clips that stage III trains on, made by the student's own rollout.

The network is the stand-in of test_graded_rollout.py, which records every pass.
"""

import pytest
import torch
from test_graded_rollout import CFG, Net, levels

import self_forcing
from toy.source import toy_captions

CAPTIONS = toy_captions(torch.tensor([[1, 5, 7], [2, 6, 8]]))


def rolled(seed, clips=None, **options):
    """Make two clips of six blocks: the network, and the clips."""
    net = Net(blocks=6)
    generator = torch.Generator().manual_seed(seed)
    return net, self_forcing.rollout_clip(net, clips, CAPTIONS, generator, **options)


def passes_per_block(net):
    """Return the number of passes of each block, without the refresh."""
    return [len([s for s in levels(net, k) if s]) for k in range(6)]


@pytest.mark.points(1, "rollout_clip")
def test_all_blocks_end_at_one_random_pass():
    """Drawn once, for all blocks and clips; another seed draws another pass."""
    seen = set()
    for seed in range(12):
        found = set(passes_per_block(rolled(seed)[0]))
        assert len(found) == 1, f"exit steps differ between blocks: {sorted(found)} passes"
        seen |= found
    assert len(seen) > 1, f"the exit step is never drawn: there are always {seen} passes"
    assert max(seen) <= 4 and seen >= {1, 4}, f"numbers of passes drawn: {sorted(seen)}"


@pytest.mark.points(1, "rollout_clip")
def test_there_is_a_whole_clip_for_every_caption():
    """Five seconds of both streams, with gradient, one prompt for all blocks, the given window."""
    net, (video, audio) = rolled(0, window=20)
    assert video.shape == (2, 64, CFG.video_channels), f"video is {tuple(video.shape)}"
    assert audio.shape == (2, 126, CFG.audio_channels), f"audio is {tuple(audio.shape)}"
    assert video.requires_grad, "the clips carry no gradient, so nothing would be learnt"
    assert net.projected == 1, f"captions are projected {net.projected} times, once is enough"
    assert {p.window for p in net.passes} == {20}, "the window is not passed on to the cache"


@pytest.mark.points(1, "rollout_clip")
def test_the_ablations_change_exit_steps_and_history():
    """share_exit=False draws a pass for every block; a history of the clips is cached instead."""
    found = passes_per_block(rolled(0, share_exit=False)[0])
    assert len(set(found)) > 1, f"share_exit=False, but all blocks have {found[0]} passes"
    net, _ = rolled(0, clips=5, history=lambda clips: [x + clips for x in Net(blocks=6).clip])
    refresh = next(p for p in net.passes if p.sigma == 0)
    is_cached = all(torch.equal(x, y + 5) for x, y in zip(refresh.x, net.block(0)))
    assert is_cached, "the history of the clips is ignored: its blocks must be cached"
