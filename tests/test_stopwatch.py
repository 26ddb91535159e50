"""Speed is counted as it says."""

from types import SimpleNamespace

import pytest
import torch
from helpers import PAPER, random_model, random_text, tiny

import config
from plumbing import stopwatch
from plumbing.stopwatch import Stopwatch, settled_median, viewer_waits
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
        watch.block_decoded()
    assert watch.stages()["sleep"] == watch.passes[2] == 3


def test_stages_of_the_writer_are_counted_by_what_it_has_written(clock):
    """It lags behind: its second call belongs to block 1, although three blocks are decoded."""
    watch = Stopwatch()
    write = watch.watch("write", lambda: None, by_cpu=True)
    for _ in range(3):
        watch.block_decoded()
    write()
    watch.block_written(False)
    write()
    assert [block for block, _, _ in watch.marks["write"]] == [0, 1]


def test_rates_are_frames_over_seconds():
    """Passes alone, and from the start until the end of the film is written."""
    watch = Stopwatch()
    watch.passes, watch.written = [1.0, 3.0], [2.0, 5.9, 6.0]
    report = watch.report(48, config.TOY)
    assert (report["passes_fps"], report["end_to_end_fps"]) == (12, 8)
    assert report["passes_times_real_time"] == 0.5
    assert report["median_block_seconds"] == settled_median([1.0, 3.0]) == 3


def test_settled_rates_are_of_the_median_block_from_the_third_on():
    """However slow the first two are; the end of the film is no block."""
    watch = Stopwatch()
    watch.passes, watch.written = [9.0, 9.0, 1.0, 2.0, 3.0], [9.0, 18.0, 20.0, 23.0, 29.0, 29.5]
    report = watch.report(97, config.TOY)
    assert report["settled_passes_fps"] == 24 / 2 and report["settled_end_to_end_fps"] == 24 / 3
    assert report["interval_95_seconds"] == 6


@pytest.mark.parametrize("cfg, first", [(config.TOY, 1), (config.TOY_RELEASED, 0)])
def test_a_viewer_waits_where_a_block_is_late(cfg, first):
    """He starts with the first second, in block 1 or 0; a wait delays all that follows."""
    on_time = [5.0 + max(0, k - first) for k in range(9)]
    assert viewer_waits(on_time, cfg) == 0
    late = [t + 0.5 * (k >= 4) for k, t in enumerate(on_time)]
    assert viewer_waits(late, cfg) == 1
    assert viewer_waits([2 * t for t in on_time], cfg) == 8 - first


def test_the_first_second_is_timed_with_its_passes_apart(clock):
    """TTFC until it is written, and of that the passes; later blocks change nothing."""
    watch = Stopwatch()
    for is_first_second in (False, True, True):
        clock.pass_by(2)
        watch.block_made()
        clock.pass_by(1)
        watch.block_decoded()
        watch.block_written(is_first_second)
    assert (watch.ttfc, watch.ttfc_passes) == (6, 4) and len(watch.peaks) == 3


def test_passes_after_the_first_second_do_not_count_for_it(clock):
    """The writer lags behind: block 2 is made before block 1, with the first second, is written."""
    watch = Stopwatch()
    for _ in range(3):
        clock.pass_by(2)
        watch.block_made()
    for has_first_second in (False, True):
        watch.block_written(has_first_second)
    assert watch.ttfc_passes == 4


def test_events_of_a_gpu_are_read_in_milliseconds():
    """Two calls of 1500 ms in one block are a stage of three seconds."""
    event = SimpleNamespace(elapsed_time=lambda end: 1500.0)
    watch = Stopwatch()
    watch.marks["denoise"] = [(0, event, event), (0, event, event)]
    assert watch.stages() == {"denoise": 3.0}


@pytest.mark.parametrize("platform, peak", [("linux", 3 * 2**10), ("darwin", 3 * 2**20)])
def test_peak_memory_is_in_megabytes(platform, peak, monkeypatch):
    """Linux counts KB, macOS bytes."""
    usage = SimpleNamespace(ru_maxrss=peak)
    resource = SimpleNamespace(getrusage=lambda who: usage, RUSAGE_SELF=0)
    monkeypatch.setattr(stopwatch, "resource", resource)
    monkeypatch.setattr(stopwatch.sys, "platform", platform)
    assert stopwatch.peak_memory_mb() == 3


def test_the_first_two_blocks_are_settled_only_if_there_are_no_others():
    """They include one-time costs; of an even number, the higher of the two in the middle."""
    assert settled_median([9.0, 5.0]) == 9
    assert settled_median([9.0, 9.0, 1.0]) == 1
    assert settled_median([9.0, 9.0, 1.0, 2.0]) == 2
