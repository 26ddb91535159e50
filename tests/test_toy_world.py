"""The toy world: exact motion, sound at impacts, captions that tell some facts and not others."""

from dataclasses import replace

import pytest
import torch

import config
import ode_regression
import teacher
from toy import world

CLIPS = world.draw_clips(range(world.HELD_OUT, world.HELD_OUT + 32))
STEP = 1e-3  # seconds of the slow simulation


def some(clips, rows):
    """The clips of a slice of the batch."""
    return world.Clips(*(x[rows] for x in clips))


FEW = some(CLIPS, slice(8))


# ---- seeds ----


def test_a_seed_is_the_same_clip_alone_and_in_a_batch():
    """The other clips of a batch change nothing about a clip: no fact, no pixel, no sound."""
    batch, alone = world.draw_clips([3, 7, 11]), world.draw_clips([7])
    assert all(torch.equal(x[1:2], y) for x, y in zip(batch, alone))
    for render in (world.render_video, world.render_sound):
        assert torch.equal(render(batch, 2)[1:2], render(alone, 2))


def test_different_seeds_give_different_clips():
    """No two of a thousand seeds have the same start and velocity."""
    clips = world.draw_clips(range(1000))
    assert len(torch.cat([clips.start, clips.velocity], 1).unique(dim=0)) == 1000


def test_every_word_is_drawn_about_equally_often():
    """In a thousand clips, the share of each word is right within 5 percentage points."""
    words = world.draw_clips(range(1000)).words
    for slot, names in enumerate(world.SLOTS):
        shares = torch.bincount(words[:, slot], minlength=len(names)) / 1000
        assert (shares - 1 / len(names)).abs().max() < 0.05


def test_training_never_reaches_the_held_out_seeds():
    """Trajectories start after the clips of the last teacher seed, and 900 million of them fit."""
    assert ode_regression.FIRST_SEED == teacher.SEEDS * teacher.CLIPS_PER_SEED
    assert ode_regression.FIRST_SEED + 9 * 10**8 <= world.HELD_OUT


# ---- motion ----


def slow_flight(clips, seconds):
    """Simulate small steps: positions (B, steps + 1, 2), (clip, time, wall, speed) per impact."""
    low = world.radii(clips)[:, None]
    high = 32 - low
    x, v = low + clips.start * (high - low), clips.velocity.clone()
    path, hits = [x], []
    for i in range(round(seconds / STEP)):
        x = x + v * STEP
        for clip, axis in ((x < low) | (x > high)).nonzero().tolist():
            wall = 2 * axis + int(v[clip, axis] > 0)
            hits.append((clip, i * STEP, wall, float(v[clip, axis].abs())))
        x, v = torch.where(x < low, 2 * low - x, x), torch.where((x < low) | (x > high), -v, v)
        x = torch.where(x > high, 2 * high - x, x)
        path.append(x)
    return torch.stack(path, 1), hits


@pytest.fixture(scope="module")
def slow():
    return slow_flight(FEW, 5)


def test_analytic_flight_equals_a_slow_simulation(slow):
    """Folding gives the place of a ball that is moved in steps of 1 ms and reflected."""
    path, _ = slow
    times = torch.arange(path.shape[1], dtype=torch.float64) * STEP
    torch.testing.assert_close(world.ball_positions(FEW, times), path, atol=1e-9, rtol=0)


def test_analytic_impacts_equal_a_slow_simulation(slow):
    """Every impact happens within the step in which the simulation reflects the ball."""
    _, hits = slow
    for b in range(8):
        expected = sorted((t, wall, speed) for clip, t, wall, speed in hits if clip == b)
        found = world.impacts(some(FEW, slice(b, b + 1)), 0, 5)
        found = list(zip(*(x[0].tolist() for x in found)))
        assert len(found) == len(expected) > 0
        for (t, wall, speed), (step, slow_wall, slow_speed) in zip(found, expected):
            assert -1e-9 <= t - step <= STEP + 1e-9
            assert (wall, pytest.approx(speed)) == (slow_wall, slow_speed)


def test_an_interval_has_the_impacts_of_a_longer_one():
    """[2, 4) has exactly the impacts of [-1, 6) from 2 to 4: none is lost at the ends."""
    for b in range(len(CLIPS.words)):
        clip = some(CLIPS, slice(b, b + 1))
        all_of_it, part = (world.impacts(clip, *ends).times[0] for ends in ((-1, 6), (2, 4)))
        assert torch.equal(part, all_of_it[(all_of_it >= 2) & (all_of_it < 4)])


@pytest.mark.parametrize("cfg", [config.TOY, replace(config.TOY, width=48)], ids=["32", "48"])
def test_the_ball_never_leaves_the_room(cfg):
    """For a minute the ball stays inside, and it reaches all four walls."""
    times = torch.linspace(0, 60, 6001, dtype=torch.float64)
    places, radius = world.ball_positions(CLIPS, times, cfg), world.radii(CLIPS)[:, None]
    for axis, size in enumerate((cfg.width, cfg.height)):
        low, high = places[..., axis].aminmax(dim=1)
        assert (low >= radius[:, 0]).all() and (high <= size - radius[:, 0]).all()
        assert (low < radius[:, 0] + 0.5).all() and (high > size - radius[:, 0] - 0.5).all()


# ---- picture and sound ----


def test_pixels_lie_in_range_and_the_ball_is_where_it_should_be():
    """Values lie in [0, 1]; the centre of brightness is the analytic position."""
    video = world.render_video(some(CLIPS, slice(4)), 2)
    assert video.min() >= 0 and video.max() <= 1
    light = (video.amax(2) - world.BACKGROUND).double()
    grid = torch.arange(32) + 0.5
    x = (light.sum(-2) * grid).sum(-1) / light.sum((-1, -2))
    y = (light.sum(-1) * grid).sum(-1) / light.sum((-1, -2))
    times = torch.arange(49, dtype=torch.float64) / 24
    places = world.ball_positions(some(CLIPS, slice(4)), times)
    # At a wall, a part of the soft edge is cut off, which moves the centre by some tenths.
    torch.testing.assert_close(torch.stack([x, y], -1), places, atol=0.3, rtol=0)


def test_there_is_silence_until_the_first_impact_and_sound_right_after():
    """Exactly 0 before the first impact (from 1 s before the clip on), loud 20 ms after it."""
    sound, hits = world.render_sound(CLIPS, 5), world.impacts(CLIPS, -1, 5).times[:, 0]
    waits = (hits > 0.1).nonzero()[:, 0]
    assert len(waits) > 5
    for b in waits.tolist():
        frame = int(hits[b] * 100)
        assert sound[b, : frame + 1].max() == 0
        assert sound[b, frame + 2].max() > 0.3


def test_every_impact_raises_the_bands_of_its_wall():
    """20 ms after an impact, the loudest band of its wall is louder than just before."""
    sound, hits = world.render_sound(CLIPS, 5), world.impacts(CLIPS, 0, 4.9)
    bands = world.wall_profiles(CLIPS).argmax(-1)  # (B, 4)
    for b, e in hits.times.isfinite().nonzero().tolist():
        band, frame = bands[b, hits.walls[b, e]], int(hits.times[b, e] * 100)
        assert sound[b, frame + 2, band] > sound[b, frame, band] + 0.2


def test_levels_stay_between_0_and_1_point_2():
    """A level is never negative, and little above 1, the level of 28 pixels per second."""
    sound = world.render_sound(world.draw_clips(range(256)), 5)
    assert sound.min() == 0 and 0.8 < sound.max() < 1.2


def test_metal_rings_longer_than_wood():
    """The level of an impact falls to 1/e in 60 ms for wood, and in 180 ms for metal."""
    clip = world.Clips(*(x[:1].clone() for x in CLIPS))
    hit = next(t for t in world.impacts(clip, 0, 4).times[0].tolist() if t > 1)
    for material, seconds in enumerate(world.MATERIALS.values()):
        clip.words[0, 2] = material
        level = world.render_sound(clip, 5)[0].amax(1)
        start = int(hit * 100) + 2
        kept = level[start + round(100 * seconds)] / level[start]
        assert kept == pytest.approx(0.37, abs=0.06)


def test_only_metal_shimmers():
    """Above band 13, metal has .4 of its level and wood none."""
    sound = world.render_sound(CLIPS, 5)
    high, rest = sound[..., 14:].amax((1, 2)), sound[..., :13].amax((1, 2))
    is_metal, is_heard = CLIPS.words[:, 2] == 1, rest > 0.3
    share = (high / rest)[is_heard & is_metal]
    assert len(share) > 5 and ((share > 0.2) & (share < 0.6)).all()
    assert high[~is_metal].max() < 0.05


def test_an_impact_before_the_clip_still_rings_at_its_beginning():
    """An impact 10 to 50 ms before time 0 is heard in the first mel frame."""
    clips = world.draw_clips(range(300))
    times = world.impacts(clips, -0.1, 0).times
    just_before = ((times > -0.05) & (times < -0.01)).any(1)
    assert just_before.sum() > 3
    assert (world.render_sound(clips, 0)[just_before, 0].amax(1) > 0.1).all()


def test_both_streams_begin_with_one_frame_at_time_0():
    """N seconds are 24 N + 1 frames and 100 N + 1 mel frames, and 0 seconds are one of each."""
    for seconds in (0, 1, 5):
        assert world.render_video(some(CLIPS, slice(1)), seconds).shape[1] == 24 * seconds + 1
        assert world.render_sound(some(CLIPS, slice(1)), seconds).shape[1] == 100 * seconds + 1


# ---- captions ----


def test_captions_survive_a_round_trip_through_words():
    """All 16 captions, in any order and case; words that are left out have token 0."""
    words = torch.cartesian_prod(torch.arange(4), torch.arange(2), torch.arange(2))
    for row, tokens in zip(words, world.caption_tokens(CLIPS._replace(words=words))):
        names = [world.SLOTS[slot][i] for slot, i in enumerate(row)]
        for text in (" ".join(names), ", ".join(reversed(names)).upper()):
            assert torch.equal(world.parse_prompt(text)[0], tokens)
        assert world.parse_prompt(f"a {names[1]} ball").tolist() == [[0, tokens[1], 0]]


@pytest.mark.parametrize("text", ["purple", "red fast glass", "red metall", "5: red", "", " a"])
def test_bad_prompts_are_refused_with_the_vocabulary(text):
    """The message always lists all words."""
    with pytest.raises(ValueError) as error:
        world.parse_prompt(text)
    assert all(word in str(error.value) for word in world.VOCABULARY)


@pytest.mark.parametrize("text", ["red blue", "fast slow red", "wood metal", "red red"])
def test_two_words_for_one_thing_are_refused(text):
    """A prompt has at most one colour, one speed and one material."""
    with pytest.raises(ValueError, match="exclude each other"):
        world.parse_prompt(text)


def test_features_are_one_hot():
    """Every token becomes a vector with a single one, at its index."""
    tokens = world.caption_tokens(CLIPS)
    features = world.caption_features(tokens)
    assert features.shape == (32, 3, config.TOY.caption_width)
    assert torch.equal(features.argmax(-1), tokens) and (features.sum(-1) == 1).all()


# ---- identity ----


@pytest.mark.parametrize("part, heard", [(0, False), (1, False), (2, True)])
def test_identity_is_in_pixels_or_sound_but_not_in_the_caption(part, heard):
    """Hue and radius change the picture, pitch the sound; the caption does not change."""
    identity = CLIPS.identity.clone()
    identity[:, part] = -identity[:, part]
    other = CLIPS._replace(identity=identity)
    assert torch.equal(world.caption_tokens(CLIPS), world.caption_tokens(other))
    if part != 1:  # another radius also moves the impacts, so it is heard as well
        same, changed = (world.render_sound, world.render_video)[:: -1 if heard else 1]
        assert torch.equal(same(CLIPS, 2), same(other, 2))
    else:
        changed = world.render_video
    per_clip = (changed(CLIPS, 2) - changed(other, 2)).flatten(1).abs().amax(1)
    visible = identity[:, part].abs() > 0.1
    if heard:
        visible &= changed(CLIPS, 2).flatten(1).amax(1) > 0.2
    assert visible.sum() > 10 and (per_clip[visible] > 0.01).all()
