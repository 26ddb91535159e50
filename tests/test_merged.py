"""A refresh merged with the next block's first pass is the two passes it replaces.

In float64, so that agreement within 1e-10 is agreement of the method.
"""

import pytest
import torch
from helpers import LAYOUTS, PAPER, layout_name, random_model, random_text, tiny

import self_forcing
from kv_cache import CachedView, MergedView, RollingCache
from masks import SITES

EXACT = dict(atol=1e-10, rtol=0)
SIGMAS = (1.0, 0.6, 0.0)


class Watched:
    """A random model that counts its passes, and streams with one view that is kept."""

    def __init__(self, cfg, blocks=5, window=1):
        self.cfg, self.blocks, self.window = tiny(cfg), blocks, window
        self.net, self.passes = random_model(self.cfg), []
        self.net.register_forward_hook(lambda net, args, out: self.passes.append(args[5:]))
        self.texts = [random_text(self.net, self.cfg, clips=2) for _ in range(2)]

    @torch.no_grad()
    def stream(self, merge, switch_at=99, **options):
        """Every block of a stream, and the view it leaves; another prompt from a block on."""
        self.passes.clear()
        view = CachedView(self.cfg, self.blocks, self.window, **options)
        g = torch.Generator().manual_seed(0)
        blocks = self_forcing.rollout(
            self.net, lambda k: self.texts[k >= switch_at], self.blocks, SIGMAS, g, 2,
            merge=merge, view=view,
        )  # fmt: skip
        return list(blocks), view


def assert_same_stream(one, other):
    """The same blocks, and the same keys and values in every slot that may be read."""
    for a, b in zip(one[0], other[0], strict=True):
        for x, y in zip(a[1:], b[1:]):
            torch.testing.assert_close(x, y, **EXACT)
    assert one[1].block == other[1].block
    for a, b in zip(one[1].layers, other[1].layers, strict=True):
        for site in SITES:
            assert a[site].block == b[site].block and a[site].first == b[site].first
            for x, y in zip(a[site].visible(), b[site].visible()):
                torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("window", [1, None])
@pytest.mark.parametrize("cfg", LAYOUTS, ids=layout_name)
def test_a_merged_stream_is_the_plain_one(cfg, window):
    """Both layouts, with and without sinks, past two evictions: every block and every slot."""
    case = Watched(cfg, window=window)
    assert_same_stream(case.stream(merge=True), case.stream(merge=False))


def test_also_when_even_the_prefix_is_forgotten():
    """The control without pinned keys."""
    case = Watched(PAPER)
    assert_same_stream(case.stream(True, pinned=False), case.stream(False, pinned=False))


def test_a_pass_is_saved_for_every_block_but_the_last():
    """Two passes a block; the one that begins a block holds two of them."""
    case = Watched(PAPER)
    case.stream(merge=True)
    assert len(case.passes) == 2 * case.blocks
    merged = [isinstance(view, MergedView) for _, view in case.passes]
    assert merged == [False, False] + [True, False] * (case.blocks - 1)
    case.stream(merge=False)
    assert len(case.passes) == 3 * case.blocks - 1


def test_a_new_prompt_separates_the_two():
    """A block is refreshed with its own prompt; the same numbers, one more pass."""
    case = Watched(PAPER)
    merged = case.stream(True, switch_at=3)
    assert len(case.passes) == 2 * case.blocks + 1
    assert_same_stream(merged, case.stream(False, switch_at=3))


def test_under_autograd_nothing_is_merged():
    """A gradient must not reach across blocks: bitwise the plain rollout, in the plain order."""
    case = Watched(PAPER, blocks=2)
    case.net.requires_grad_(True)

    def rolled(merge):
        g = torch.Generator().manual_seed(0)
        text = lambda k: case.texts[0]  # noqa: E731
        return self_forcing.whole_clip(
            self_forcing.rollout(case.net, text, 2, SIGMAS, g, 2, merge=merge)
        )

    for x, y in zip(rolled(True), rolled(False)):
        assert torch.equal(x, y) and x.requires_grad


def test_what_is_checked_is_not_trivial(monkeypatch):
    """Pinned keys that stay where they are would be noticed."""
    case = Watched(PAPER)
    right = case.stream(merge=True)[0][-1].video
    monkeypatch.setattr(RollingCache, "move_prefix", lambda self, by: None)
    assert (case.stream(merge=True)[0][-1].video - right).abs().max() > 1e-3
