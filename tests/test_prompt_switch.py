"""The study of changing prompts: its ways to switch do what their names say."""

import json
from collections import Counter

import pytest
import torch
from helpers import (
    MERGED,
    PAPER,
    assert_same,
    differ,
    random_model,
    random_text,
    run_here,
    save_small_student,
    tiny,
)
from test_kv_cache import BLOCKS, Case, EvictingView

from rollout import rollout, whole_clip
from studies import prompt_switch as study
from toy import detectors
from toy import world as toy_world
from toy.switch import BELOW, GUIDED_BLOCKS, SCALE

SHIPPED = study.NEWEST._replace(guided=GUIDED_BLOCKS, scale=SCALE, below=BELOW)
FINISHED = 4  # blocks before the switch


@torch.no_grad()
def past(cfg=PAPER, window=4):
    """A small student, and the past of one stream."""
    net = random_model(tiny(cfg, num_layers=1))
    texts = {name: random_text(net, net.cfg) for name in ("old", "new", "empty")}
    g = torch.Generator().manual_seed(0)
    view = study.View(net.cfg, FINISHED, window)
    blocks = rollout(net, lambda k: texts["old"], FINISHED, net.cfg.sigmas, g, view=view)
    return study.Past(net, window, list(blocks), texts)


def after(start, method):
    return whole_clip(study.continue_stream(start, method, 0))


def remembered(start, method):
    """Keys and values of all caches before the first block after the switch."""
    view = study.remember(start, method, torch.Generator())
    visible = [slice(c.first_visible, c.num_filled - c.block_tokens) for c in view.caches]
    return [x[:, seen] for c, seen in zip(view.caches, visible) for x in (c.k, c.v)]


@pytest.mark.parametrize("cfg, window", [(PAPER, 4), (PAPER, 2), (MERGED, 1)])
def test_two_ways_to_the_shipped_method_agree(cfg, window):
    """The study's own loop forgets and guides as toy/switch.py does; without either, it differs."""
    start = past(cfg, window)
    shipped = after(start, study.Method(shipped=True))
    assert_same(after(start, SHIPPED), shipped)
    for other in (study.NEWEST, SHIPPED._replace(blocks=None, block_0=True)):
        assert differ(after(start, other), shipped)


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("cfg", [PAPER, MERGED])
def test_block_0_moves_to_the_blocks_that_are_kept(cfg, kept):
    """What is pinned stands as if the forgotten blocks had been evicted, also later."""

    class Spec(EvictingView):
        def seen(self, block, key_blocks):
            usual = super().seen(block, key_blocks)
            return usual & ((key_blocks == 0) | (key_blocks >= 5 - kept)) if block >= 5 else usual

        def later(self, keys, site, block):
            if block < 5:
                return super().later(keys, site, block)
            # from the first block that is still seen back to block 1
            first = max(5 - kept, block - self.window)
            return super().later(keys, site, first + self.window)

    case = Case(cfg, window=3)
    view = study.View(case.cfg, BLOCKS, 3)
    for k in range(BLOCKS):
        if k == 5:
            view.keep(kept)
        assert_same(case.streamed(k, view, case.sigmas[k]), case.masked(k, Spec(case.cfg, 7, 3)))
        case.refresh(k, view)
        view.next_block()


def test_re_caching_changes_what_is_remembered_and_not_how_much():
    """Under the old prompt, the refresh of the same blocks gives the same keys."""
    start = past()
    plain, again = (remembered(start, study.Method(recache=r)) for r in (False, True))
    assert [x.shape for x in plain] == [x.shape for x in again]
    assert differ(plain[-1:], again[-1:])
    start.texts["new"] = start.texts["old"]
    assert_same(plain, remembered(start, study.Method(recache=True)))
    assert differ(plain[-1:], remembered(start, study.Method(repaint=True))[-1:])


@pytest.mark.parametrize("name", study.METHODS)
def test_a_method_costs_what_the_table_says(name):
    """Passes of the rows, counted; what only sets up the past is left out."""
    method, passes = study.METHODS[name], []
    start = past()

    def count(*_):
        passes.append(1)

    set_up = FINISHED if not (method.recache or method.repaint) else 0
    hook = start.net.register_forward_hook(count)
    study.continue_stream(start, method, 0)
    hook.remove()
    steps = len(start.net.cfg.sigmas) - 1
    # the past has three blocks besides block 0, so a window of 3 is full
    more = len(passes) - set_up - study.AFTER * (steps + 1)
    assert more == study.more_passes(method, 3)


def test_switches_are_all_pairs_of_colours_with_all_other_changes():
    """Twelve pairs, each four times; speed and material change in half of them."""
    old, new = study.switches()
    pairs = Counter(zip(old[:, 0].tolist(), new[:, 0].tolist()))
    assert len(pairs) == 12 and set(pairs.values()) == {4} and all(a != b for a, b in pairs)
    assert (old != new).sum(0).tolist() == [48, 24, 24]
    assert (old[:, 1:].sum(0) == 24).all()


def test_colours_of_true_clips_are_their_words():
    """In every frame."""
    clips = toy_world.draw_clips(range(toy_world.HELD_OUT, toy_world.HELD_OUT + 16))
    ball = detectors.see_ball(toy_world.render_video(clips, 2))
    assert (study.colours(ball) == clips.words[:, :1]).all()


def test_equal_rows_are_measured_once():
    """With a window of one, to keep the newest block and block 0 is to keep everything."""
    names = study.rows()
    assert "toy, forget all but block 0 and the newest" in names
    assert "4+3k, window 1, forget all but block 0 and the newest" not in names
    assert all(f"{s}, {m}" in names for s in study.STUDENTS for m in study.FEW)


def test_the_study_runs_from_start_to_end(tmp_path, monkeypatch, capsys):
    """The row of the other borders comes from the streams in which nothing is done."""
    path = save_small_student(tmp_path / "tiny.safetensors")
    few = [words[:4] for words in study.switches()]
    monkeypatch.setattr(study, "switches", lambda: few)
    monkeypatch.setattr(study, "WEIGHTS", {"toy": path})
    monkeypatch.setattr(study, "RESAMPLES", 3)
    study.past.cache_clear()
    names = ["toy, nothing", "toy, as shipped"]
    words = "--only", *names, "--run", tmp_path / "run", "--out", tmp_path / "x"
    status, _, err = run_here(study, words, monkeypatch, capsys)
    study.past.cache_clear()
    assert status == 0, err
    lines = (tmp_path / "x.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [
        f"| {n}" for n in ("toy, elsewhere", *names)
    ]
    assert lines[1].endswith("| 0 |") and lines[2].endswith("| 4 |")
    result = json.loads((tmp_path / "x.json").read_text())["result"]
    assert list(result) == names and (tmp_path / "x.png").exists()
    found = result[names[1]]
    assert (
        set(study.COLUMNS) < set(found) and 0 <= found["colour_1"][1] <= found["colour_1"][2] <= 1
    )
