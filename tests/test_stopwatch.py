"""Speed is counted as it says."""

from types import SimpleNamespace

import pytest
import torch
from helpers import PAPER, random_model, random_text, tiny

import config
from plumbing import stopwatch
from plumbing.stopwatch import Stopwatch, settled_median
from rollout import rollout


def test_passes_are_told_apart():
    """Three blocks of two passes; the last block needs no refresh."""
    cfg = tiny(PAPER, num_layers=1)
    net, watch = random_model(cfg), Stopwatch()
    text, g = random_text(net, cfg), torch.Generator().manual_seed(0)
    watch.watch_passes(net, steps=2)
    with torch.no_grad():
        list(rollout(net, lambda k: text, 3, (1.0, 0.5, 0.0), g))
    calls = {stage: len(calls) for stage, calls in watch.marks.items()}
    assert calls == {"denoise": 6, "refresh": 2}


def test_a_watched_function_answers_as_before():
    """Arguments and result go through."""
    assert Stopwatch().watch("x", lambda a, b=0: a - b)(5, b=2) == 3


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is told how much time passes by."""
    clock = SimpleNamespace(now=100.0)
    clock.pass_by = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: clock.now)
    return clock


def test_stages_are_medians_of_blocks_and_calls_of_a_block_add_up(clock):
    """Blocks of 1, 2 and 3 calls of a second; the first two are not counted."""
    watch = Stopwatch()
    sleep = watch.watch("sleep", lambda: clock.pass_by(1))
    for calls in (1, 2, 3):
        for _ in range(calls):
            sleep()
        watch.block_made()
        watch.block_written(False)
    assert watch.stages()["sleep"] == watch.passes[2] == 3


def test_rates_are_frames_over_seconds():
    """Passes alone, and from the start to the last lap."""
    watch = Stopwatch()
    watch.passes, watch.output, watch.start, watch.last = [1.0, 3.0], [1.0, 1.0], 10.0, 16.0
    report = watch.report(48, config.TOY)
    assert (report["passes_fps"], report["end_to_end_fps"]) == (12, 8)
    assert report["passes_times_real_time"] == 0.5
    assert report["median_block_seconds"] == settled_median([1.0, 3.0]) == 3


def test_settled_rates_are_of_the_median_block_from_the_third_on():
    """However slow the first two are."""
    watch = Stopwatch()
    watch.passes, watch.output = [9.0, 9.0, 1.0, 2.0, 3.0], [0.0, 0.0, 1.0, 1.0, 3.0]
    watch.start, watch.last = 0.0, 29.0
    report = watch.report(97, config.TOY)
    assert report["settled_passes_fps"] == 24 / 2 and report["settled_end_to_end_fps"] == 24 / 3


def test_the_first_second_is_timed_with_its_passes_apart(clock):
    """TTFC until it is written, and of that the passes; later blocks change nothing."""
    watch = Stopwatch()
    for is_first_second in (False, True, True):
        clock.pass_by(2)
        watch.block_made()
        clock.pass_by(1)
        watch.block_written(is_first_second)
    assert (watch.ttfc, watch.ttfc_passes) == (6, 4) and len(watch.peaks) == 3
