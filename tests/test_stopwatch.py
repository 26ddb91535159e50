"""Speed is counted as it says."""

import time

import pytest
import torch

from stopwatch import Stopwatch, settled_median


def test_the_refresh_is_the_last_pass_of_a_block():
    """Two passes and a refresh: four calls denoise, two refresh."""
    net, watch = torch.nn.Linear(2, 2), Stopwatch()
    watch.watch_passes(net, steps=2)
    for _ in range(6):
        net(torch.zeros(1, 2))
    assert {stage: len(calls) for stage, calls in watch.marks.items()} == {
        "denoise": 4,
        "refresh": 2,
    }


def test_a_watched_function_answers_as_before():
    """Arguments and result go through."""
    assert Stopwatch().watch("x", lambda a, b=0: a - b)(5, b=2) == 3


def test_stages_are_medians_of_blocks_and_calls_of_a_block_add_up():
    """Blocks of 1, 2 and 3 sleeps; the first two are not counted."""
    watch = Stopwatch()
    sleep = watch.watch("sleep", lambda: time.sleep(0.02))
    for calls in (1, 2, 3):
        for _ in range(calls):
            sleep()
        watch.passes.append(watch.lap())
        watch.output.append(watch.lap())
    assert 0.06 <= watch.stages()["sleep"] < 0.12
    assert watch.passes[2] == pytest.approx(watch.stages()["sleep"], abs=0.02)


def test_rates_are_frames_over_seconds():
    """Passes alone, and from the start to the last lap."""
    watch = Stopwatch()
    watch.passes, watch.output, watch.start, watch.last = [1.0, 3.0], [1.0, 1.0], 10.0, 16.0
    report = watch.report(frames=48, fps=24)
    assert (report["passes_fps"], report["end_to_end_fps"]) == (12, 8)
    assert report["passes_times_real_time"] == 0.5
    assert report["median_block_seconds"] == settled_median([1.0, 3.0]) == 3
