"""The study of the refresh: passes read the blocks that they should, and no others."""

import json

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

import masks
from kv_cache import CachedView
from rollout import rollout, whole_clip
from studies import compare
from studies import refresh as study

SIGMAS = (1.0, 0.5, 0.0)


def stream(net, window, pinned=True, blocks=7):
    """The clip of a rollout, always from the same noise."""
    view, g = CachedView(net.cfg, blocks, window, pinned), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    text = random_text(getattr(net, "net", net), net.cfg)
    with torch.no_grad():
        return whole_clip(rollout(net, lambda k: text, blocks, SIGMAS, g, view=view))


@pytest.mark.parametrize("cfg, window", [(PAPER, 4), (PAPER, 2), (MERGED, 1)])
def test_two_ways_to_see_are_known_already(cfg, window):
    """All passes see everything: a usual stream. None sees the prefix: nothing is pinned."""
    net = random_model(tiny(cfg, num_sinks=2))
    everything = stream(study.Selective(net, "everything", "everything"), window)
    no_prefix = stream(study.Selective(net, "no prefix", "no prefix"), window)
    assert_same(everything, stream(net, window))
    assert_same(no_prefix, stream(net, window, pinned=False))
    assert differ(everything, no_prefix)


@pytest.mark.parametrize("refresh", list(study.REACH)[1:])
def test_a_refresh_that_sees_less_changes_the_blocks_after_it(refresh):
    """The refresh of block 1 sees less than usual only if it sees itself alone."""
    net = random_model(tiny(PAPER, num_sinks=2))
    video, audio = stream(net, 1)
    changed = stream(study.Selective(net, refresh, "everything"), 1)
    same = masks.clip_span(2 if refresh == "itself" else 3, net.cfg)
    v, a = len(same.video) * net.cfg.tokens_per_frame, len(same.audio)
    assert_same((video[:, :v], audio[:, :a]), (changed[0][:, :v], changed[1][:, :a]))
    assert differ((video[:, v:], audio[:, a:]), (changed[0][:, v:], changed[1][:, a:]))


@pytest.mark.parametrize("what, window, pinned", [
    ("everything", 3, True), ("no prefix", 3, False), ("newest block", 1, False),
    ("itself", 0, False),
])  # fmt: skip
def test_the_blocks_that_are_seen_are_a_row_of_a_mask(what, window, pinned):
    """`masks.may_attend` with another window; the cache has a window of 3."""
    mask = masks.may_attend(torch.arange(9), torch.arange(9), window, pinned)
    for block, row in enumerate(mask):
        assert study.blocks_seen(what, block, 3) == row.nonzero()[:, 0].tolist()


def test_a_block_is_found_where_it_was_written():
    """As long as it is in the ring."""
    view = CachedView(tiny(PAPER), 9, 2)
    cache, written = view.layers[0]["a2v"], []
    for block in range(9):
        written.append(cache.slots)
        for seen in study.blocks_seen("everything", block, 2):
            assert study.slots_of(cache, seen) == written[seen]
        cache.next_block()


def test_only_the_pass_at_sigma_0_is_a_refresh(monkeypatch):
    """Two denoising passes a block, then the refresh; the last block has none."""
    net, seen = random_model(tiny(PAPER)), []
    selected = study.Selected

    def watch(view, what):
        seen.append((view.block, what))
        return selected(view, what)

    monkeypatch.setattr(study, "Selected", watch)
    stream(study.Selective(net, "itself", "no prefix"), 2, blocks=3)
    one = ["no prefix", "no prefix", "itself"]
    assert seen == [(k, what) for k in range(3) for what in one][:-1]


def test_no_stream_is_measured_twice():
    """With a window of one block, "newest block" and "no prefix" see the same."""
    seen = set()
    for student, *passes in study.streams().values():
        rows = [study.blocks_seen(what, k, student.window) for what in passes for k in range(9)]
        seen.add((student, str(rows)))
    assert len(seen) == len(study.streams()) == 14


def test_the_study_runs_from_start_to_end_and_goes_on(tmp_path, monkeypatch, capsys):
    """Rows of both ends of a stream; killed after the first, it measures the second only."""
    path = save_small_student(tmp_path / "tiny.safetensors")
    student = compare.Student(str(path.with_suffix("")), 2, "")
    monkeypatch.setattr(study, "STUDENTS", {"1+3k": student})
    monkeypatch.setattr(study.evaluate, "RESAMPLES", 3)
    made, streamed = [], study.evaluate.from_stream

    def from_stream(net, *others, window):
        made.append((net.refresh, net.denoising, window))
        if len(made) == 2:
            raise ValueError("end")
        return streamed(net, *others, window=window)

    monkeypatch.setattr(study.evaluate, "from_stream", from_stream)
    names = [f"1+3k, refresh: {r}, denoising: everything" for r in ("everything", "itself")]
    words = "--clips", 2, "--seconds", 10, "--only", *names
    words += "--run", tmp_path / "run", "--out", tmp_path / "x"
    assert run_here(study, words, monkeypatch, capsys)[0] == 2
    status, _, err = run_here(study, words, monkeypatch, capsys)
    assert status == 0, err
    assert made == [("everything", "everything", 2)] + 2 * [("itself", "everything", 2)]
    result = json.loads((tmp_path / "x.json").read_text())["result"]
    assert list(result) == [f"{n}, {t} s" for n in names for t in ("0-5", "5-10")]
    assert names[1] in (tmp_path / "x.md").read_text() and (tmp_path / "x.png").exists()
