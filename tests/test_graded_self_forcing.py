"""Graded: the clips that stage III trains on, made by the student's own rollout.

The network is the stand-in of test_graded_rollout.py, which records every pass.
"""

import pytest
import torch
from grading import close, random_tensor, watched
from test_graded_rollout import (
    CFG,
    CLIPS,
    RELEASED,
    STREAMS,
    Net,
    clean_clips,
    is_related,
    levels,
    places,
)  # fmt: skip

import model
import self_forcing

CAPTIONS = model.Captions(*(
    tuple(random_tensor(CLIPS, 2, 3, seed=seed + i) for i in range(2)) for seed in (0, 5)
))  # fmt: skip


def rolled(seed=0, cfg=CFG, clips="clips", **options):
    """Make three clips of five seconds: the network, and the clips."""
    net, generator = Net(cfg), torch.Generator().manual_seed(seed)
    with watched(CAPTIONS.features):
        return net, self_forcing.rollout_clip(net, clips, CAPTIONS, generator, **options)


def passes_per_block(net, blocks=6):
    """Return the number of passes of each block, without the refresh."""
    return [len([s for s in levels(net, k) if s]) for k in range(blocks)]


@pytest.mark.points(1, "rollout_clip")
def test_all_blocks_end_at_one_random_pass():
    """Drawn once from the generator, for all blocks and clips; another seed draws another pass."""
    seen = []
    for seed in range(12):
        net, clip = rolled(seed)
        found = set(passes_per_block(net))
        assert len(found) == 1, f"exit steps differ between blocks: {sorted(found)} passes"
        seen += found
    assert len(set(seen)) > 1, f"the exit step is never drawn: there are always {seen[0]} passes"
    assert max(seen) <= 4 and {1, 4} <= set(seen), f"numbers of passes drawn: {sorted(set(seen))}"
    again, same = rolled(seed)
    is_same = passes_per_block(again)[0] == seen[-1] and all(map(torch.equal, clip, same))
    assert is_same, "the same generator makes other clips the second time"


@pytest.mark.points(1, "rollout_clip")
def test_there_is_a_whole_clip_for_every_caption():
    """Five seconds of both streams in either layout, one prompt for all blocks."""
    for cfg, blocks in ((CFG, 6), (RELEASED, 5)):
        net, clip = rolled(3, cfg)
        for name, x, right, place in zip(STREAMS, clip, clean_clips(cfg), places(blocks - 1, cfg)):
            shape = CLIPS, place.stop, right.shape[2]
            layout = f"with {cfg.prefix_video_frames} video frames in block 0"
            wrong = f"{layout} {name} is {tuple(x.shape)}, not {shape}"
            assert x.shape == shape, f"{wrong}: five seconds are {blocks} blocks"
        assert net.projected == 1, f"captions are projected {net.projected} times, once is enough"
        text = net.passes[0].text
        assert all(p.text is text for p in net.passes), "the blocks read different captions"
        for name, kv, features in zip(STREAMS, (text.video, text.audio), CAPTIONS.features):
            is_read = close(kv[0][0], features[:, :, None])
            assert is_read, f"{name} does not read its own captions, clip by clip"
    first = next(p.x[0] for p in net.passes if p.block == 1)
    assert not is_related(*first[:2]), "two clips start from the same noise"


@pytest.mark.points(1, "rollout_clip")
def test_every_block_and_the_captions_get_a_gradient():
    """The exit pass of each block trains the network; caption layers learn through all of them."""
    for options in ({}, {"share_exit": False}):
        net, clip = rolled(**options)
        for name, x in zip(STREAMS, clip):
            assert x.requires_grad, f"{name} carries no gradient, so nothing would be learnt"
            for k in range(6):
                place = places(k, CFG)[STREAMS.index(name)]
                weights = {"network": net.weight, "caption layers": net.caption_weight}
                for learns, weight in weights.items():
                    loss = x[:, place].square().sum()
                    (g,) = torch.autograd.grad(loss, weight, retain_graph=True, allow_unused=True)
                    is_there = g is not None and g.any()
                    assert is_there, f"{name} of block {k} gives no gradient to the {learns}"


@pytest.mark.points(1, "rollout_clip")
def test_the_window_reaches_the_cache():
    """The given number of blocks; None keeps all of them."""
    for window, kept in ((20, 20), (2, 2), (None, 6)):
        net, _ = rolled(window=window)
        found = {p.window for p in net.passes}
        is_kept = found == {window} if window else min(found) >= 4
        wrong = f"window={window}: the cache keeps {sorted(found)} blocks, not {kept}"
        assert is_kept, f"{wrong}: the window is not passed on to the cache"
        assert len({id(p.view) for p in net.passes}) == 1, "all blocks share one cache"


@pytest.mark.points(1, "rollout_clip")
def test_the_ablations_change_exit_steps_and_history():
    """share_exit=False draws a pass for every block; a history of the clips is cached instead."""
    found = passes_per_block(rolled(share_exit=False)[0])
    assert len(set(found)) > 1, f"share_exit=False, but all blocks have {found[0]} passes"
    given = []

    def history(clips):
        given.append(clips)
        return [x + 5 for x in clean_clips(CFG)]

    try:
        net, clip = rolled(history=history)
    except (TypeError, ValueError) as error:
        pytest.fail(f"`history` is a function: the rollout needs history(clips); {error}")
    assert given, "the history of the clips is ignored: its blocks must be cached"
    is_of_clips = all(isinstance(x, str) and x == "clips" for x in given)
    assert is_of_clips, "the history is made of something else: expected history(clips)"
    assert len(given) == 1, f"the history of the clips is made {len(given)} times, once is enough"
    for p in net.passes:
        if p.sigma == 0 and p.block < 5:
            right = [x[:, place] + 5 for x, place in zip(clean_clips(CFG), places(p.block, CFG))]
            is_cached = all(map(torch.equal, p.x, right))
            assert is_cached, "the history of the clips is ignored: its blocks must be cached"
    is_own = all(close(x, y, 0.5) for x, y in zip(clip, clean_clips(CFG)))
    assert is_own, "with a history, the clips must still be the generated ones"
