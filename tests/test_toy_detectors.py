"""The detectors agree with the truth, also after the codec, and notice errors."""

import pytest
import torch

from toy import codec as toy_codec
from toy import detectors, world

N, SECONDS = 64, 5
INSIDE = detectors.MARGIN, SECONDS - detectors.MARGIN  # where reflections can be seen
CLIPS = world.draw_clips(range(world.HELD_OUT, world.HELD_OUT + N))


class Observed:
    """A batch of clips and what the detectors find in it."""

    def __init__(self, video, sound):
        self.video, self.sound = video, sound
        self.ball = detectors.see_ball(video)
        self.seen, self.heard = detectors.find_impacts(self.ball), detectors.find_onsets(sound)


@pytest.fixture(scope="module")
def truth():
    return Observed(world.render_video(CLIPS, SECONDS), world.render_sound(CLIPS, SECONDS))


@pytest.fixture(scope="module")
def after_codec(truth):
    codec = toy_codec.load()
    video, audio = codec.encode(truth.video, truth.sound)
    return Observed(codec.decode_video(video, True), codec.decode_audio(audio, True))


def total(seen, heard):
    """Counts of all clips, added up."""
    matches = [detectors.match(s, h, *INSIDE) for s, h in zip(seen, heard)]
    return detectors.Match(*map(sum, zip(*matches)))


def f1(m):
    return m.hits / (m.impacts + m.onsets)


def desync_ms(m):
    return 1000 * m.offsets / m.near


def true_events(b):
    """The analytic impacts of a clip."""
    real = world.impacts(world.Clips(*(x[b : b + 1] for x in CLIPS)), 0, SECONDS)
    return detectors.Events(real.times[0].float(), real.walls[0])


# ---- truth ----


def test_real_clips_are_in_sync(truth):
    """F1 of at least .99 and DeSync of at most 5 ms on 64 held-out clips, always the right wall."""
    m = total(truth.seen, truth.heard)
    assert m.impacts > 250 and m.right_wall == m.pairs
    assert f1(m) >= 0.99 and desync_ms(m) <= 5


def test_the_codec_costs_little(after_codec):
    """F1 of at least .97 and DeSync of at most 17 ms after encoding and decoding both streams."""
    m = total(after_codec.seen, after_codec.heard)
    assert f1(m) >= 0.97 and desync_ms(m) <= 17


def test_shuffled_pairs_are_out_of_sync(truth):
    """Video with the sound of another clip has an F1 of at most .2, and often the wrong wall."""
    m = total(truth.seen, truth.heard[1:] + truth.heard[:1])
    assert f1(m) <= 0.2 and m.right_wall < 0.6 * m.pairs


def test_impacts_are_seen_when_they_happen(truth):
    """Away from the ends, the impacts in the video are the analytic ones, within 20 ms."""
    for b, seen in enumerate(truth.seen):
        m = detectors.match(seen, true_events(b), *INSIDE)
        assert m.hits == m.impacts + m.onsets and m.right_wall == m.pairs
        assert m.offsets <= 0.020 * m.near


def test_onsets_are_heard_when_they_happen(truth):
    """Away from the ends, the onsets are the analytic impacts, 3 ms apart on average."""
    m = total(map(true_events, range(N)), truth.heard)
    assert f1(m) >= 0.99 and desync_ms(m) <= 3


def test_caption_words_are_read_off_the_clip(truth, after_codec):
    """Colour, speed and material are all read correctly, before and after the codec."""
    for clips in (truth, after_codec):
        words = detectors.read_words(clips.ball, clips.sound, clips.heard)
        assert torch.equal(words, CLIPS.words)


def test_the_ball_persists(truth, after_codec):
    """Every frame shows exactly one ball; after the codec, 99 % of the frames."""
    assert detectors.persistence(truth.ball).all()
    assert detectors.persistence(after_codec.ball).float().mean() > 0.99


@pytest.mark.parametrize("part", [0, 1, 2], ids=["hue", "radius", "pitch"])
def test_identity_is_measured(truth, after_codec, part):
    """The facts outside the caption are measured: correlation with the truth above .95."""
    for clips in (truth, after_codec):
        measured = detectors.identity(clips.ball, clips.sound, clips.heard)[:, part].double()
        pair = torch.stack([measured, CLIPS.identity[:, part]])
        pair = pair[:, pair.isfinite().all(0)]
        assert pair.shape[1] > 0.9 * N and torch.corrcoef(pair)[0, 1] > 0.95


# ---- errors are noticed ----


@pytest.mark.parametrize("ms", [-40, 40])
def test_a_sound_40_ms_off_is_measured_as_40_ms(truth, ms):
    """Sound that is shifted by 4 mel frames has a DeSync of 40 ms, up to the 3 ms of the truth."""
    late = torch.roll(truth.sound, ms // 10, dims=1)
    late[:, : max(0, ms // 10)] = 0
    m = total(truth.seen, detectors.find_onsets(late))
    assert desync_ms(m) == pytest.approx(40, abs=3)
    assert f1(m) > 0.95  # 40 ms is still a match


def test_a_sound_100_ms_off_is_no_match(truth):
    """Events more than 60 ms apart are no pairs, but DeSync still measures the 100 ms."""
    m = total(truth.seen, [e._replace(times=e.times + 0.1) for e in truth.heard])
    assert f1(m) < 0.1 and desync_ms(m) == pytest.approx(100, abs=10)


def test_silence_lowers_the_number_of_events_and_not_f1(truth):
    """With the last two seconds silent, onsets are missing: fewer events, more misses."""
    quiet = truth.sound.clone()
    quiet[:, 300:] = 0
    full, less = total(truth.seen, truth.heard), total(truth.seen, detectors.find_onsets(quiet))
    assert less.onsets < 0.75 * full.onsets
    assert less.impacts == full.impacts and less.missed > 0.25 * full.onsets
    none = total(truth.seen, detectors.find_onsets(torch.zeros_like(quiet)))
    assert (none.onsets, none.pairs, none.missed) == (0, 0, full.impacts)


def test_the_sound_of_the_wrong_wall_is_noticed(truth):
    """With left and right exchanged in the sound, times agree but those walls do not."""
    swap = torch.tensor([1, 0, 2, 3])
    m = total(truth.seen, [e._replace(walls=swap[e.walls]) for e in truth.heard])
    sideways = float((torch.cat([e.walls for e in truth.seen]) < 2).double().mean())
    assert f1(m) >= 0.99 and m.right_wall / m.pairs == pytest.approx(1 - sideways, abs=0.1)


def test_a_static_video_has_no_impacts(truth):
    """A frame that is repeated for the whole clip shows no impact."""
    still = truth.video[:, :1].expand(-1, 121, -1, -1, -1)
    assert all(len(e.times) == 0 for e in detectors.find_impacts(detectors.see_ball(still)))


def test_an_empty_room_has_no_ball_and_no_impacts():
    """Background alone: no frame shows a ball, and no wall is hit."""
    ball = detectors.see_ball(torch.full((2, 121, 3, 32, 32), world.BACKGROUND))
    assert not detectors.persistence(ball).any()
    assert all(len(e.times) == 0 for e in detectors.find_impacts(ball))


@pytest.mark.parametrize("frames", [1, 3, 7])
def test_a_clip_too_short_for_lines_has_no_impacts(truth, frames):
    """A stream that was stopped after its first frames gives no error."""
    seen = detectors.find_impacts(detectors.see_ball(truth.video[:, :frames]))
    assert len(seen) == N and all(len(e.times) == 0 for e in seen)


def test_a_reversal_in_mid_air_is_no_impact(truth):
    """Played forwards, then backwards, the ball reverses far from any wall: no impact is seen."""
    there = truth.video[:, :13]
    back_and_forth = torch.cat([there, there.flip(1)[:, 1:]], 1)
    places = detectors.see_ball(there).place[:, -1]
    in_the_air = ((places > 10) & (places < 22)).all(1)
    assert in_the_air.sum() > 5
    for e in detectors.find_impacts(detectors.see_ball(back_and_forth[in_the_air])):
        assert ((e.times - 0.5).abs() > 0.1).all()


@pytest.fixture(scope="module")
def second_ball(truth):
    """A video with the ball elsewhere, and the frames in which the two are far apart."""
    other = truth.video.flip(-1, -2)
    return other, (truth.ball.place - detectors.see_ball(other).place).norm(dim=-1) > 12


def test_two_balls_are_not_persistent(truth, second_ball):
    """A second ball far from the first: too much mass, widely spread."""
    other, apart = second_ball
    assert apart.sum() > 1000
    both = detectors.see_ball(torch.maximum(truth.video, other))
    assert not detectors.persistence(both)[apart].any()


def test_two_half_balls_are_not_persistent(truth, second_ball):
    """The mass of one ball in two places: only its spread differs."""
    other, apart = second_ball
    ball = detectors.see_ball((truth.video + other) / 2)
    apart = apart & (ball.mass > 0.6) & (ball.mass < 1.5)
    assert apart.sum() > 1000
    assert not detectors.persistence(ball)[apart].any()


@pytest.mark.parametrize("strength", [0.2, 3.0])
def test_a_ball_that_fades_or_grows_is_not_persistent(truth, strength):
    """A ball with a fifth of the brightness does not count, nor one with three times the area."""
    clips = world.Clips(*(x[:4].clone() for x in CLIPS))
    if strength < 1:
        video = world.BACKGROUND + strength * (truth.video[:4] - world.BACKGROUND)
    else:
        clips.identity[:, 1] = (strength**0.5 - 1) / world.RADIUS_RANGE
        video = world.render_video(clips, 1)
    assert not detectors.persistence(detectors.see_ball(video)).any()


# ---- how events are paired ----


def events(*times, wall=0):
    return detectors.Events(torch.tensor(times), torch.full((len(times),), wall))


def test_each_event_has_at_most_one_partner():
    """One onset between two impacts belongs to the nearer one; the other impact is a miss."""
    m = detectors.match(events(1.00, 1.04), events(1.03), 0, 2)
    assert (m.pairs, m.impacts, m.onsets, m.hits, m.missed) == (1, 2, 1, 2, 1)
    assert m.offsets == pytest.approx(0.01, abs=1e-6)


def test_in_a_corner_the_wall_decides():
    """Two impacts 10 ms apart are paired with the onsets of their walls, not with the nearest."""
    seen = detectors.Events(torch.tensor([1.000, 1.010]), torch.tensor([0, 2]))
    heard = detectors.Events(torch.tensor([1.001, 1.011]), torch.tensor([2, 0]))
    assert detectors.match(seen, heard, 0, 2).right_wall == 2


def test_events_outside_the_interval_need_no_partner_but_may_be_one():
    """In [1, 2): events before and after are no misses, but an onset at 0.99 can match 1.01."""
    m = detectors.match(events(0.1, 0.9, 2.0), events(0.4), 1, 2)
    assert (m.impacts, m.onsets, m.missed) == (0, 0, 0)
    m = detectors.match(events(1.01), events(0.99), 1, 2)
    assert (m.pairs, m.impacts, m.onsets, m.hits) == (1, 1, 0, 1)


def test_hues_are_averaged_round_the_circle():
    """The median of 350, 10 and 0 degrees is 0, not 10."""
    median = detectors.circular_median(torch.tensor([[350.0, 10.0, 0.0]]))
    assert float((median + 180) % 360 - 180) == pytest.approx(0, abs=1e-3)


# ---- thresholds, just inside and just outside ----


@pytest.mark.parametrize(
    "ms, pairs, near", [(59, 1, 1), (61, 0, 1), (249, 0, 1), (251, 0, 0)]
)  # fmt: skip
def test_partners_are_60_ms_apart_and_near_ones_250(ms, pairs, near):
    """On either side of both limits."""
    for later in (ms, -ms):
        m = detectors.match(events(1.0), events(1 + later / 1000), 0, 2)
        assert (m.pairs, m.hits, m.near, m.missed) == (pairs, 2 * pairs, near, 2 - 2 * near)
        assert m.offsets == pytest.approx(near * ms / 1000, abs=1e-6)


def test_a_pair_across_the_edge_is_near_on_either_side():
    """An impact at 0.99 and an onset at 1.01: each is in one of two intervals, with its partner."""
    for start, impacts in ((0, 1), (1, 0)):
        m = detectors.match(events(0.99), events(1.01), start, start + 1)
        assert (m.impacts, m.onsets, m.pairs) == (impacts, 1 - impacts, impacts)
        assert (m.hits, m.near, m.missed) == (1, 1, 0)
        assert m.offsets == pytest.approx(0.02, abs=1e-6)


@pytest.mark.parametrize("ms, right_wall", [(19, 1), (21, 0)])
def test_another_wall_costs_20_ms(ms, right_wall):
    """An impact prefers the onset on its own wall, up to 20 ms further away."""
    heard = detectors.Events(torch.tensor([1.0, 1 + ms / 1000]), torch.tensor([1, 0]))
    m = detectors.match(events(1.0), heard, 0, 2)
    assert (m.pairs, m.right_wall) == (1, right_wall)


@pytest.mark.parametrize(
    "mass, spread, is_whole",
    [
        (0.5, 1, False), (0.59, 1, False), (0.61, 1, True),
        (1.49, 1, True), (1.51, 1, False), (1.6, 1, False),
        (1, 0.69, False), (1, 0.71, True), (1, 1.34, True), (1, 1.36, False),
    ],
)  # fmt: skip
def test_a_whole_ball_has_about_the_normal_mass_and_spread(mass, spread, is_whole):
    """Mass .6 to 1.5, spread .7 to 1.35."""
    one = torch.ones(1, 1)
    ball = detectors.Ball(torch.zeros(1, 1, 2), mass * one, spread * one, one)
    assert bool(detectors.persistence(ball)) == is_whole


@pytest.mark.parametrize("brighter, mass", [(0.11, 0), (0.13, 1)])
def test_what_is_12_percent_brighter_than_the_background_is_a_ball(brighter, mass):
    """Less is noise of the decoder."""
    frame = torch.full((1, 1, 3, 32, 32), world.BACKGROUND)
    frame[..., 8:16, 8:16] += brighter
    assert bool(detectors.see_ball(frame).mass > 0.01) == mass


def flying(track):
    """A ball of normal size whose x is `track`, and whose y is in mid-air."""
    x = torch.as_tensor(track, dtype=torch.float)[None]
    one = torch.ones_like(x)
    return detectors.Ball(torch.stack([x, 16 * one], -1), one, one, 0 * one)


def bounce(slope, turn):
    """Towards the left wall, `slope` pixels a frame, back at x = `turn` after 20.3 frames."""
    return [turn + slope * abs(frame - 20.3) for frame in range(41)]


@pytest.mark.parametrize("slope, count", [(0.11, 0), (0.13, 1)])
def test_a_slow_reflection_is_ignored(slope, count):
    """Slower than .12 pixels a frame."""
    (seen,) = detectors.find_impacts(flying(bounce(slope, world.RADIUS)))
    assert len(seen.times) == count


@pytest.mark.parametrize("apart, count", [(-3.9, 1), (3.9, 1), (4.1, 0)])
def test_a_reflection_is_within_4_pixels_of_a_wall(apart, count):
    """Of the edge of the ball; its time is that of the turn, on the left wall."""
    (seen,) = detectors.find_impacts(flying(bounce(1.0, world.RADIUS + apart)))
    assert len(seen.times) == count
    if count:
        assert seen.times.tolist() == pytest.approx([20.3 / 24], abs=1e-3) and seen.walls[0] == 0


@pytest.mark.parametrize("speed, word", [(19.5, 0), (20.5, 1)])
def test_fast_is_above_20_pixels_a_second(speed, word):
    """The unit is a second, not a frame."""
    ball = flying([speed / 24 * frame for frame in range(24)])
    assert detectors.speeds(ball).tolist() == pytest.approx([speed], rel=1e-4)
    silence = [detectors.Events(torch.zeros(0), torch.zeros(0, dtype=torch.long))]
    assert detectors.read_words(ball, torch.zeros(1, 100, 16), silence)[0, 1] == word


def knocks(*levels):
    """Sound (1, M, 16) in the first band, at pairs of frame and level."""
    sound = torch.zeros(1, 80, 16)
    for frame, level in levels:
        sound[0, frame, 0] = level
    return sound


@pytest.mark.parametrize("later, word", [(0.23, 0), (0.25, 1)])
def test_metal_still_rings_after_130_ms(later, word):
    """With more than .24 of its peak, 13 mel frames after the attack."""
    onset = [detectors.Events(torch.tensor([0.2 - world.ATTACK]), torch.tensor([0]))]
    sound = knocks((20, 1.0), (33, later))
    assert detectors.read_words(flying([0.0] * 24), sound, onset)[0, 2] == word


@pytest.mark.parametrize("rise, count", [(0.24, 0), (0.26, 1)])
def test_an_onset_is_a_rise_of_a_quarter(rise, count):
    """Of a wall's level, within two mel frames."""
    (heard,) = detectors.find_onsets(knocks((20, rise)))
    assert len(heard.times) == count


@pytest.mark.parametrize("frames, count", [(6, 1), (8, 2)])
def test_two_onsets_on_one_wall_are_7_frames_apart(frames, count):
    """Within 6 mel frames, only the louder one counts."""
    (heard,) = detectors.find_onsets(knocks((20, 1.0), (20 + frames, 0.8)))
    assert len(heard.times) == count
