"""Graded: prompts with times, and a stream of blocks.

The network is a stand-in that records every pass and its prompt.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from grading import check_rejected, fill, watched
from torch import nn

import config
import generate
import model
from masks import block_span
from toy import world as toy_world

CFG = replace(config.TOY, num_layers=1, height=8, width=8)  # 1 token per video frame
RELEASED = replace(config.TOY_RELEASED, num_layers=1, height=8, width=8)


@pytest.mark.points(1, "parse_seconds")
def test_seconds_are_positive_numbers():
    """Whole or not, up to MOST_SECONDS; anything else is a ValueError that names the input."""
    for text in ("5", "2.5", "0.5", "1", "1e2", "86400"):
        try:
            found = generate.parse_seconds(text)
        except ValueError as error:
            pytest.fail(f"--seconds {text} is refused ({error}), but it is a positive number")
        assert found == float(text), f"--seconds {text} is {float(text)} seconds, not {found}"
        assert isinstance(found, float), f"seconds are a float, not {type(found).__name__}"
    for text in ("abc", "0", "-1", "nan", "inf", "1e99", "86401", ""):
        check_rejected(lambda: generate.parse_seconds(text), text, f"--seconds {text}")


def cues_of(prompts, seconds=10, check=lambda words: None):
    """Parse prompts that are right, and return plain pairs."""
    try:
        return [tuple(cue) for cue in generate.parse_cues(prompts, seconds, check)]
    except ValueError as error:
        pytest.fail(f"{prompts} are refused: {error}")


@pytest.mark.points(2, "parse_cues")
def test_cues_are_sorted_by_time_and_their_words_stripped():
    """A prompt without a second begins at 0; a colon in the words belongs to the words."""
    prompts = ["red fast", "5: blue", "2.5: wood "]
    found = cues_of(prompts)
    assert {start for start, _ in found} == {0, 2.5, 5}, f"prompts begin at {found}"
    assert [start for start, _ in found] == [0, 2.5, 5], "prompts are not sorted by time"
    assert [words for _, words in found] == ["red fast", "wood", "blue"], f"words are {found}"
    assert prompts == ["red fast", "5: blue", "2.5: wood "], "the list of prompts is changed"
    (cue,) = cues_of(["0:30 at night"])
    assert cue == (0, "0:30 at night"), f"'0:30' has no space after its colon; found {cue}"
    for prompt, right in (
        ("Night: a train", (0, "Night: a train")),
        ("0: Night: a train", (0, "Night: a train")),
        ("at 5: a train", (0, "at 5: a train")),
        ("0: two\nlines: here", (0, "two\nlines: here")),
    ):
        (cue,) = cues_of([prompt])
        assert cue == right, f"{prompt!r} is the cue {right}, not {cue}"
    found = cues_of(["10: b", "9: a", "0: c"], 60)
    assert [start for start, _ in found] == [0, 9, 10], f"seconds are numbers, not text: {found}"


@pytest.mark.points(1, "parse_cues")
def test_impossible_cues_are_rejected():
    """One must begin at 0, no two together, all before the end; all words are checked."""
    reasons = {
        "none begins at 0": ["5: red"],
        "two begin together": ["red", "0: blue"],
        "two begin together later": ["red", "3: blue", "3.0: green"],
        "one begins at the end": ["red", "10: blue"],
        "one begins after the end": ["11: blue", "red"],
        "a word is unknown": ["red", "2: dog"],
    }
    for reason, prompts in reasons.items():
        try:
            generate.parse_cues(prompts, 10)
        except ValueError:
            continue
        pytest.fail(f"{prompts} are accepted for 10 seconds, although {reason}")
    checked = []
    cues_of(["3: second", "first"], check=checked.append)
    words = sorted(text.strip() for text in checked)
    assert words == ["first", "second"], f"check is called with {checked}, expected all words"


class Net(nn.Module):
    """Predicts velocity 0, and records every pass and every projected prompt."""

    def __init__(self, cfg=CFG, dtype=torch.float32):
        super().__init__()
        self.cfg, self.passes, self.projected = cfg, [], []
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))

    def project_text(self, video_features, audio_features=None, mask=None):
        audio_features = video_features if audio_features is None else audio_features
        self.projected.append((video_features, audio_features))
        video, audio = (self.weight * x[:, :, None] for x in (video_features, audio_features))
        return model.TextKV(((video, video),), ((audio, audio),), mask)

    def forward(self, video, audio, sigma_video, sigma_audio, text, span, view, ropes=None):
        block = [block_span(k, self.cfg) for k in range(12)].index(span)
        sigma = float(sigma_video.flatten()[0])
        self.passes.append((block, text, view.window, sigma, video, audio))
        fill(view)
        return self.weight * 0 * video, self.weight * 0 * audio


def prompt_of(keys_values):
    """Return the words of the features of clip 0 in keys and values."""
    features = keys_values[0][0][0, :, 0]
    return " ".join(toy_world.VOCABULARY[i] for i in features.argmax(-1).tolist()).strip()


def streamed(*cues, seconds=4, cfg=CFG, dtype=torch.float32, **options):
    """Run a stream to its end: the network, and the blocks."""
    net = Net(cfg, dtype)
    prompt = cues[0] if isinstance(cues[0], str) else [generate.Cue(*c) for c in cues]
    given = prompt[:]
    with watched():
        blocks = list(generate.stream(net, prompt, seconds, **options))
    assert prompt == given, "the list of cues is changed: the caller still needs it"
    return net, blocks


@pytest.mark.points(2, "stream")
def test_a_prompt_applies_from_the_first_block_that_begins_at_its_time_or_later():
    """A new prompt inside a block waits for the next block; in both layouts."""
    cues = (0, "red fast metal"), (1.5, "blue slow wood"), (3, "green slow wood")
    skipped = cues[0], (1.2, "green slow wood"), (1.5, "blue slow wood")  # no block reads the first
    begins_of = {CFG: [0, 0, 1, 2, 3], RELEASED: [0, 1, 2, 3]}
    for cues, (cfg, begins) in itertools.product((cues, skipped), begins_of.items()):
        net, blocks = streamed(*cues, cfg=cfg)
        layout = f"with {cfg.prefix_video_frames} video latents in block 0"
        count = f"{layout}, 4 seconds are {len(begins)} blocks, not {len(blocks)}"
        assert len(blocks) == len(begins), count
        right = [[words for start, words in cues if start <= begin][-1] for begin in begins]
        # The last pass of a block. Others may run with the old prompt, too (toy/switch.py).
        for block, text in {block: text for block, text, *_ in net.passes}.items():
            which = f"{layout}, block {block}, which begins at second {begins[block]}"
            found = prompt_of(text.video)
            assert found == right[block], f"{which}, reads {found!r}, not {right[block]!r}"
    net, blocks = streamed("blue slow wood", seconds=1)
    found = {prompt_of(text.video) for _, text, *_ in net.passes}
    assert found == {"blue slow wood"}, f"a prompt of words alone: the blocks read {found}"


@pytest.mark.points(1, "stream")
def test_a_prompt_is_projected_once_for_all_its_blocks_and_clips():
    """The features of video and of audio, for every clip, in the dtype of the network."""

    def read(words):
        features = generate.toy_source.toy_features(words)[0]
        return features, features.flip(1)

    cues = (0, "red fast metal"), (2, "blue slow wood")
    net, _ = streamed(*cues, batch=3, read=read, dtype=torch.float64)
    times = len(net.projected)
    assert times == 2, f"two prompts are projected {times} times: keep their keys and values"
    for features, (_, words) in zip(net.projected, cues):
        for name, x, right in zip(("video", "audio"), features, read(words)):
            clips = f"{len(x)} captions of {name} for 3 clips"
            assert len(x) in (1, 3), clips
            is_right = torch.equal(x.float(), right.expand_as(x))
            assert is_right, f"{name} does not get its own features of {words!r}"
            dtype = f"the network computes in float64, but {name} gets features in {x.dtype}"
            assert x.dtype == torch.float64, dtype


@pytest.mark.points(1, "stream")
def test_a_stream_runs_block_by_block_and_without_gradients():
    """Nothing runs before a block is asked for; the caller's gradients stay enabled."""
    net = Net()
    blocks = generate.stream(net, [generate.Cue(0, "red"), generate.Cue(2, "blue")], 4)
    assert not net.passes, "the stream runs before a block is asked for: return a generator"
    first = next(blocks)
    found = {block for block, *_ in net.passes}
    assert found == {0}, f"blocks {sorted(found)} have run when block 0 is yielded"
    has_gradients = torch.is_grad_enabled()
    blocks.close()  # or they might stay disabled for the next test
    assert has_gradients, (
        "gradients stay disabled for the caller between two blocks: decorate `rollout` instead of "
        "yielding inside of a `with` statement"
    )
    assert not first.video.requires_grad, "the stream records a gradient that nobody needs"


def is_related(x, y):
    """Tell whether two arrays of noise are the same, or depend on each other."""
    return abs(float((x * y).mean())) > 0.4


@pytest.mark.points(1, "stream")
def test_the_seed_fixes_the_stream_and_options_are_passed_on():
    """Same seed, same noise; window, steps and batch have an effect."""
    runs = [streamed((0, "red"), seed=s, window=2, steps=3, batch=3) for s in (3, 3, 4)]
    net, blocks = runs[0]
    assert len(blocks[0].video) == 3, "batch=3 is not three clips"
    starts = [{p[0]: p[4:] for p in net.passes[::-1] if p[3] == 1} for net, _ in runs]
    for k in range(1, 5):
        for one, same, other in zip(*(start[k] for start in starts)):
            assert torch.equal(one, same), "the same seed gives another stream"
            assert not is_related(one, other), "another seed gives the same stream"
            alike = is_related(one[0], one[1]) or is_related(one[0], one[2])
            assert not alike, "two clips of a batch start from the same noise"
        for second, other in zip(starts[0][k], starts[2][k]):
            same = torch.equal(second[1], other[0])
            assert same, "clip 1 of a batch from seed 3 is not the clip of seed 4"
    is_new = not is_related(starts[0][1][0], starts[0][2][0])
    assert is_new, "blocks 1 and 2 get the same noise: use one generator"
    assert {p[2] for p in net.passes} == {2}, "the window is not passed on to the cache"
    assert len([p for p in net.passes if p[0] == 1 and p[3]]) == 3, "steps=3 is not 3 passes"
    net, blocks = streamed((0, "red"), seconds=6, window=None)
    assert min(p[2] for p in net.passes) >= 5, "window=None should keep all blocks"
    assert len([p for p in net.passes if p[0] == 1 and p[3]]) == 4, "the default is 4 passes"
    net, blocks = streamed((0, "red"))
    assert len(blocks[0].video) == 1, "the default is one clip"
    assert {p[2] for p in net.passes} == {4}, "the default window of 4 is not used"
