"""Graded: prompts with times, and a stream of blocks.

The network is a stand-in that records every pass and its prompt.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

import config
import generate
from toy import world as toy_world

CFG = replace(config.TOY, num_layers=1)


@pytest.mark.points(1, "parse_seconds")
def test_seconds_are_positive_numbers():
    """Anything else is a ValueError that names the option."""
    assert generate.parse_seconds("5") == 5.0, "5 seconds are 5.0"
    for text in ("abc", "0", "-1", "nan", "inf"):
        try:
            found = generate.parse_seconds(text)
        except ValueError as error:
            assert f"--seconds {text}" in str(error), f"the message should name --seconds {text}"
        else:
            pytest.fail(f"--seconds {text} is accepted as {found}: expected a ValueError")


@pytest.mark.points(2, "parse_cues")
def test_cues_are_sorted_by_time_and_their_words_stripped():
    """A prompt without a second begins at 0."""
    found = [tuple(cue) for cue in generate.parse_cues(["red fast", "5: blue", "2.5:wood "], 10)]
    assert {start for start, _ in found} == {0, 2.5, 5}, f"prompts begin at {found}"
    assert [start for start, _ in found] == [0, 2.5, 5], "prompts are not sorted by time"
    assert [words for _, words in found] == ["red fast", "wood", "blue"], f"words are {found}"


@pytest.mark.points(1, "parse_cues")
def test_impossible_cues_are_rejected():
    """One must begin at 0, no two together, all before the end; words must be known."""
    reasons = {
        "none begins at 0": ["5: red"],
        "two begin together": ["red", "0: blue"],
        "one begins at the end": ["red", "10: blue"],
        "a word is unknown": ["red", "2: dog"],
    }
    for reason, prompts in reasons.items():
        try:
            generate.parse_cues(prompts, 10)
        except ValueError:
            continue
        pytest.fail(f"{prompts} are accepted for 10 seconds, although {reason}")


class Net(nn.Module):
    """Predicts velocity 0, and records every pass and every projected prompt."""

    def __init__(self):
        super().__init__()
        self.cfg, self.passes, self.projected = CFG, [], []
        self.weight = nn.Parameter(torch.ones(()))

    def project_text(self, features):
        self.projected.append(features)
        return features

    def forward(self, video, audio, sigma_video, sigma_audio, text, span, view):
        block = 0 if span.video.start == 0 else 1 + (span.video.start - 1) // 3
        self.passes.append((block, text, view.window, float(sigma_video[0]), video))
        return self.weight * 0 * video, self.weight * 0 * audio


def prompt_of(text):
    """Return the words of caption features (1, words, vocabulary)."""
    return " ".join(toy_world.VOCABULARY[i] for i in text[0].argmax(-1).tolist()).strip()


def streamed(*cues, seconds=4, **options):
    """Run a stream to its end: the network, and the blocks."""
    net = Net()
    blocks = list(generate.stream(net, [generate.Cue(*c) for c in cues], seconds, **options))
    return net, blocks


@pytest.mark.points(2, "stream")
def test_a_prompt_applies_from_the_first_block_that_begins_at_its_time_or_later():
    """Block k begins at second k - 1; a new prompt inside a block waits for the next block."""
    net, _ = streamed((0, "red fast metal"), (1.5, "blue slow wood"), (3, "green slow wood"))
    right = ["red fast metal"] * 3 + ["blue slow wood"] + ["green slow wood"]
    for block, text, *_ in net.passes:
        which, found = f"block {block}, which begins at second {max(0, block - 1)}", prompt_of(text)
        assert found == right[block], f"{which}, reads {found!r}; its prompt is {right[block]!r}"


@pytest.mark.points(1, "stream")
def test_a_prompt_is_projected_once_and_only_when_its_time_has_come():
    """Not for every block, and not before the first block."""
    net, _ = streamed((0, "red fast metal"), (2, "blue slow wood"))
    times = len(net.projected)
    assert times == 2, f"two prompts are projected {times} times: keep their keys and values"
    net = Net()
    blocks = generate.stream(net, [generate.Cue(0, "red"), generate.Cue(2, "blue")], 4)
    assert not net.passes, "the stream runs before a block is asked for: return a generator"
    next(blocks)
    assert len(net.projected) == 1, "a later prompt is projected before its time has come"
    has_gradients = torch.is_grad_enabled()
    blocks.close()  # or they might stay disabled for the next test
    assert has_gradients, (
        "gradients stay disabled for the caller between two blocks: decorate `rollout` instead of "
        "yielding inside of a `with` statement"
    )


@pytest.mark.points(1, "stream")
def test_the_seed_fixes_the_stream_and_options_are_passed_on():
    """Same seed, same noise; window, steps and batch have an effect; no gradient is recorded."""
    runs = [streamed((0, "red"), seed=s, window=7, steps=3, batch=2) for s in (3, 3, 4)]
    one, same, other = ([p[4] for p in net.passes] for net, _ in runs)
    assert all(map(torch.equal, one, same)), "the same seed gives another stream"
    assert not torch.equal(one[0], other[0]), "another seed gives the same stream"
    assert not torch.equal(one[4], one[8]), "blocks 1 and 2 get the same noise: use one generator"
    net, blocks = runs[0]
    assert len(blocks) == 5, f"4 seconds are 5 blocks, not {len(blocks)}"
    assert {p[2] for p in net.passes} == {7}, "the window is not passed on to the cache"
    assert len([p for p in net.passes if p[0] == 1 and p[3]]) == 3, "steps=3 is not 3 passes"
    assert len(blocks[0].video) == 2, "batch=2 is not two clips"
    assert not blocks[0].video.requires_grad, "the stream records a gradient that nobody needs"
