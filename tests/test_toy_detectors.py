"""Eyes and ears: they agree with the truth, survive the codec, and notice what is wrong."""

import pytest
import torch

from toy import codec as toy_codec
from toy import detectors, world

N, SECONDS = 64, 5
INSIDE = detectors.MARGIN, SECONDS - detectors.MARGIN  # where reflections can be seen
CLIPS = world.draw_clips(range(world.HELD_OUT, world.HELD_OUT + N))


class Observed:
    """What the detectors make of a batch of clips."""

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


def f1(seen, heard):
    m = total(seen, heard)
    return m.hits / (m.impacts + m.onsets)


def desync_ms(seen, heard):
    m = total(seen, heard)
    return 1000 * m.offsets / m.near


def shifted(events, seconds):
    return [e._replace(times=e.times + seconds) for e in events]


# ---- truth ----


def test_the_true_world_is_in_sync(truth):
    """F1 of at least .99 and DeSync of at most 5 ms on 64 held-out clips, always the right wall."""
    m = total(truth.seen, truth.heard)
    assert m.impacts > 250
    assert f1(truth.seen, truth.heard) >= 0.99 and desync_ms(truth.seen, truth.heard) <= 5
    assert m.right_wall == m.pairs


def test_the_codec_costs_little(truth, after_codec):
    """F1 of at least .97 and DeSync of at most 17 ms after encoding and decoding both streams."""
    assert f1(after_codec.seen, after_codec.heard) >= 0.97
    assert desync_ms(after_codec.seen, after_codec.heard) <= 17


def test_shuffled_pairs_are_out_of_sync(truth):
    """Pictures with the sound of another clip score at most .2 and rarely the right wall."""
    m = total(truth.seen, truth.heard[1:] + truth.heard[:1])
    assert m.hits / (m.impacts + m.onsets) <= 0.2
    assert m.right_wall < 0.6 * m.pairs


def test_impacts_are_seen_when_they_happen(truth):
    """Away from the ends, picture and analytic truth have the same impacts within 20 ms."""
    for b, seen in enumerate(truth.seen):
        real = world.impacts(world.Clips(*(x[b : b + 1] for x in CLIPS)), 0, SECONDS)
        events = detectors.Events(real.times[0].float(), real.walls[0])
        m = detectors.match(seen, events, *INSIDE)
        assert m.hits == m.impacts + m.onsets and m.right_wall == m.pairs
        assert m.offsets <= 0.020 * m.near


def test_onsets_are_heard_when_they_happen(truth):
    """Away from the ends, sound and analytic truth have the same events, 3 ms apart on average."""
    real = []
    for b in range(N):
        hits = world.impacts(world.Clips(*(x[b : b + 1] for x in CLIPS)), 0, SECONDS)
        real.append(detectors.Events(hits.times[0].float(), hits.walls[0]))
    assert f1(real, truth.heard) >= 0.99
    assert desync_ms(real, truth.heard) <= 3


def test_caption_words_are_read_off_the_clip(truth, after_codec):
    """Colour, speed and material are all read correctly, on truth and after the codec."""
    for o in (truth, after_codec):
        assert torch.equal(detectors.read_words(o.ball, o.sound, o.heard), CLIPS.words)


def test_the_ball_persists(truth, after_codec):
    """There is one whole ball in every frame of the truth and of the codec's clips."""
    assert detectors.persistence(truth.ball).all()
    assert detectors.persistence(after_codec.ball).float().mean() > 0.99


@pytest.mark.parametrize("part", [0, 1, 2], ids=["hue", "radius", "pitch"])
def test_identity_is_measured(truth, after_codec, part):
    """What the caption does not tell is read off the clip: correlation with the truth above .95."""
    for o in (truth, after_codec):
        measured = detectors.identity(o.ball, o.sound, o.heard)[:, part].double()
        pair = torch.stack([measured, CLIPS.identity[:, part]])
        pair = pair[:, pair.isfinite().all(0)]
        assert pair.shape[1] > 0.9 * N and torch.corrcoef(pair)[0, 1] > 0.95


# ---- what is wrong is noticed ----


@pytest.mark.parametrize("ms", [-40, 40])
def test_a_sound_40_ms_off_is_measured_as_40_ms(truth, ms):
    """Moving the sound by 4 mel frames is found as 40 ms, give or take the 3 ms of truth."""
    late = torch.roll(truth.sound, ms // 10, dims=1)
    late[:, : max(0, ms // 10)] = 0
    heard = detectors.find_onsets(late)
    assert desync_ms(truth.seen, heard) == pytest.approx(40, abs=3)
    assert f1(truth.seen, heard) > 0.95  # 40 ms still counts as in time


def test_a_sound_100_ms_off_does_not_count_as_in_time(truth):
    """Beyond 60 ms events are no pairs, but DeSync still measures the 100 ms."""
    heard = shifted(truth.heard, 0.1)
    assert f1(truth.seen, heard) < 0.1
    assert desync_ms(truth.seen, heard) == pytest.approx(100, abs=10)


def test_silence_lowers_the_number_of_events_and_not_f1(truth):
    """With the last two seconds silent, onsets go missing; F1 over what is left hardly tells."""
    quiet = truth.sound.clone()
    quiet[:, 300:] = 0
    full, less = total(truth.seen, truth.heard), total(truth.seen, detectors.find_onsets(quiet))
    assert less.onsets < 0.75 * full.onsets
    assert less.impacts == full.impacts and less.missed > 0.25 * full.onsets
    none = total(truth.seen, detectors.find_onsets(torch.zeros_like(quiet)))
    assert (none.onsets, none.pairs, none.missed) == (0, 0, full.impacts)


def test_the_sound_of_the_wrong_wall_is_noticed(truth):
    """Exchanging left and right in the sound keeps the times and loses those walls."""
    swap = torch.tensor([1, 0, 2, 3])
    heard = [e._replace(walls=swap[e.walls]) for e in truth.heard]
    m = total(truth.seen, heard)
    sideways = sum(int((e.walls < 2).sum()) for e in truth.seen) / sum(
        len(e.walls) for e in truth.seen
    )
    assert m.hits / (m.impacts + m.onsets) >= 0.99
    assert m.right_wall / m.pairs == pytest.approx(1 - sideways, abs=0.1)


def test_a_static_picture_has_no_impacts(truth):
    """A frame repeated for the whole clip shows a ball that never hits anything."""
    still = truth.video[:, :1].expand(-1, 121, -1, -1, -1)
    assert all(len(e.times) == 0 for e in detectors.find_impacts(detectors.see_ball(still)))


def test_an_empty_room_has_no_ball_and_no_impacts():
    """Background alone: nothing persists, nothing is hit."""
    ball = detectors.see_ball(torch.full((2, 121, 3, 32, 32), world.BACKGROUND))
    assert not detectors.persistence(ball).any()
    assert all(len(e.times) == 0 for e in detectors.find_impacts(ball))


@pytest.mark.parametrize("frames", [1, 3, 7])
def test_a_clip_too_short_for_lines_shows_no_impacts(truth, frames):
    """A stream that was stopped after its first frame can still be looked at."""
    seen = detectors.find_impacts(detectors.see_ball(truth.video[:, :frames]))
    assert len(seen) == N and all(len(e.times) == 0 for e in seen)


def test_a_turn_in_mid_air_is_no_impact(truth):
    """Played forwards and then backwards, the ball turns round in the air: no impact is seen."""
    there = truth.video[:, :13]
    back_and_forth = torch.cat([there, there.flip(1)[:, 1:]], 1)
    places = detectors.see_ball(there).place[:, -1]
    in_the_air = ((places > 10) & (places < 22)).all(1)
    assert in_the_air.sum() > 5
    for e in detectors.find_impacts(detectors.see_ball(back_and_forth[in_the_air])):
        assert ((e.times - 0.5).abs() > 0.1).all()


def test_two_balls_are_not_persistent(truth):
    """A second ball far from the first is too much mass, widely spread."""
    other = truth.video.flip(-1, -2)
    both = torch.maximum(truth.video, other)
    apart = (truth.ball.place - detectors.see_ball(other).place).norm(dim=-1) > 12
    assert apart.sum() > 1000
    assert not detectors.persistence(detectors.see_ball(both))[apart].any()


@pytest.mark.parametrize("strength", [0.2, 3.0])
def test_a_ball_that_fades_or_grows_is_not_persistent(truth, strength):
    """A fifth of the brightness is no whole ball, nor is one of three times the area."""
    clips = world.Clips(*(x[:4].clone() for x in CLIPS))
    if strength < 1:
        video = world.BACKGROUND + strength * (truth.video[:4] - world.BACKGROUND)
    else:
        clips.identity[:, 1] = (strength**0.5 - 1) / world.RADIUS_RANGE
        video = world.render_video(clips, 1)
    assert not detectors.persistence(detectors.see_ball(video)).any()


def test_two_half_balls_are_not_persistent(truth):
    """The mass of one ball, but in two places: only its spread tells."""
    other = truth.video.flip(-1, -2)
    halves = (truth.video + other) / 2
    apart = (truth.ball.place - detectors.see_ball(other).place).norm(dim=-1) > 12
    ball = detectors.see_ball(halves)
    apart &= (ball.mass > 0.6) & (ball.mass < 1.5)
    assert apart.sum() > 1000
    assert not detectors.persistence(ball)[apart].any()


# ---- how events are paired ----


def events(*times, wall=0):
    return detectors.Events(torch.tensor(times), torch.full((len(times),), wall))


def test_each_event_has_at_most_one_partner():
    """One onset between two impacts belongs to the nearer, the other is missed."""
    m = detectors.match(events(1.00, 1.04), events(1.03), 0, 2)
    assert (m.pairs, m.impacts, m.onsets, m.hits, m.missed) == (1, 2, 1, 2, 1)
    assert m.offsets == pytest.approx(0.01, abs=1e-6)


def test_in_a_corner_the_wall_decides():
    """Two impacts 10 ms apart go to the onsets of their own walls, not to the nearest ones."""
    seen = detectors.Events(torch.tensor([1.000, 1.010]), torch.tensor([0, 2]))
    heard = detectors.Events(torch.tensor([1.001, 1.011]), torch.tensor([2, 0]))
    assert detectors.match(seen, heard, 0, 2).right_wall == 2


def test_events_outside_the_stretch_need_no_partner_but_may_be_one():
    """Asked about [1, 2): events before and after are not missed, yet 0.99 can answer 1.01."""
    m = detectors.match(events(0.1, 0.9, 2.0), events(0.4), 1, 2)
    assert (m.impacts, m.onsets, m.missed) == (0, 0, 0)
    m = detectors.match(events(1.01), events(0.99), 1, 2)
    assert (m.pairs, m.impacts, m.onsets, m.hits) == (1, 1, 0, 1)


def test_hues_are_averaged_round_the_circle():
    """The median of 350 and 10 degrees and 0 is 0, not 10."""
    median = detectors.circular_median(torch.tensor([[350.0, 10.0, 0.0]]))
    assert float((median + 180) % 360 - 180) == pytest.approx(0, abs=1e-3)
