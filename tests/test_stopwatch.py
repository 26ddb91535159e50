"""Speed is counted as it says."""

import time

import pytest
import torch
from helpers import PAPER, random_model, random_text, tiny

from self_forcing import rollout
from stopwatch import Stopwatch, settled_median


@pytest.mark.parametrize(
    "merge, expected",
    [
        (False, {"denoise": 6, "refresh": 2}),
        (True, {"denoise": 5, "both": 1, "refresh": 1}),
    ],
)
def test_passes_are_told_apart(merge, expected):
    """Three blocks of two passes; the last needs no refresh, the second has another prompt, so
    that only the third one's first pass refreshes the block before as well."""
    cfg = tiny(PAPER, num_layers=1)
    net, watch = random_model(cfg), Stopwatch()
    texts, g = [random_text(net, cfg) for _ in range(2)], torch.Generator().manual_seed(0)
    watch.watch_passes(net, steps=2)
    with torch.no_grad():
        list(rollout(net, lambda k: texts[k > 0], 3, (1.0, 0.5, 0.0), g, merge=merge))
    assert {stage: len(calls) for stage, calls in watch.marks.items()} == expected


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
