"""ODE regression: noise levels per block, states at these levels, supervision, trajectories."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import PAPER, random_clip, random_model, run_here, tiny
from test_teacher import PerfectNet

import config
import model
import ode_regression as ode
from kv_cache import MaskedView
from masks import clip_span, four_masks, frame_blocks
from plumbing import files, trainer
from toy import source as toy_source
from toy.source import TOY_PROMPTS, toy_captions
from toy.training import TrainingSource

CFG = tiny(PAPER, num_sinks=4)
SIGMAS, BLOCKS = CFG.sigmas, 6
CLEAN = len(SIGMAS) - 1
SPAN = clip_span(BLOCKS, CFG)
load_or_draw = partial(ode.load_or_draw_trajectories, prompts=TOY_PROMPTS)


@pytest.fixture
def trajectories():
    """Straight trajectories of three clips: captions, states of video, states of audio."""
    torch.manual_seed(0)
    ends, noise = (random_clip(CFG, BLOCKS, clips=3, dtype=torch.float32) for _ in range(2))
    states = [torch.stack([(1 - s) * x + s * n for s in SIGMAS], 1) for x, n in zip(ends, noise)]
    return toy_captions(torch.tensor([[1, 5, 7]] * 3)), *states


@pytest.fixture
def levels():
    """Levels of three clips; every level occurs, and one clip has a clean past."""
    drawn = ode.draw_levels(3, BLOCKS, len(SIGMAS), torch.Generator().manual_seed(3))
    drawn[2] = torch.tensor([CLEAN] * 4 + [1, 0])
    assert set(drawn.flatten().tolist()) == set(range(len(SIGMAS)))
    return drawn


class Student(PerfectNet):
    """A perfect net, except that its velocity is 1000 where sigma is 0."""

    def __call__(self, *args):
        velocities = super().__call__(*args)
        return [torch.where(v.isfinite(), v, 1000.0) for v in velocities]


def ends(trajectories):
    return [x[:, -1] for x in trajectories[1:]]


def first_two(trajectories):
    """Return two trajectories in the form in which a training reads them."""
    _, video, audio = trajectories
    return {"tokens": torch.tensor([[1, 5, 7]] * 2), "video": video[:2], "audio": audio[:2]}


def losses(net, trajectories, levels, masks=None):
    return ode.regression_losses(net, trajectories, levels, SIGMAS, MaskedView(masks))


# ---- levels ----


def block_of(frame, per_block):
    """Return the block of a frame: frame 0 is block 0, later blocks have `per_block` frames."""
    block = 0
    while frame >= 1 + block * per_block:
        block += 1
    return block


def test_a_blocks_level_is_shared_by_its_video_and_its_own_audio(trajectories, levels):
    """Every frame of both streams has the level of its block."""
    net = Student(ends(trajectories), CFG)
    losses(net, trajectories, levels)
    ((_, _, sigma_video, sigma_audio, _, span, _),) = net.calls
    assert (sigma_video.shape, sigma_audio.shape) == ((3, 16), (3, 126))
    for sigma, frames, per_block in ((sigma_video, span.video, 3), (sigma_audio, span.audio, 25)):
        for b in range(3):
            for f in frames:
                expected = SIGMAS[levels[b, block_of(f, per_block)]]
                assert float(sigma[b, f]) == pytest.approx(expected)


def test_the_student_sees_each_block_as_it_was_at_its_level(trajectories, levels):
    """Every input token is the state of the trajectory at the level of its block."""
    net = Student(ends(trajectories), CFG)
    losses(net, trajectories, levels)
    tokens = CFG.tokens_per_frame
    for seen, states, per_block, per_frame in (
        (net.calls[0][0], trajectories[1], 3, tokens),
        (net.calls[0][1], trajectories[2], 25, 1),
    ):
        for b in range(3):
            for t in range(seen.shape[1]):
                level = levels[b, block_of(t // per_frame, per_block)]
                assert torch.equal(seen[b, t], states[b, level, t])


def test_the_official_rounding_would_give_some_audio_its_neighbours_level():
    """Spreading 16 video frames over 126 audio frames by rounding puts edges at 8, 32, 55, 79, 102.
    Our edges are at 1, 26, 51, 76, 101, where the seconds begin."""
    of_video, of_audio = frame_blocks(BLOCKS, CFG)
    edges_v, edges_a = ((x[1:] != x[:-1]).nonzero()[:, 0] + 1 for x in (of_video, of_audio))
    assert [round(e * 126 / 16) for e in edges_v.tolist()] == [8, 32, 55, 79, 102]
    assert edges_a.tolist() == [1, 26, 51, 76, 101]


def test_a_quarter_of_the_blocks_is_clean_and_the_rest_evenly_noisy():
    """Blocks are drawn independently: 25 % are clean, the four noisy levels are equally likely."""
    drawn = ode.draw_levels(4000, BLOCKS, len(SIGMAS), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn.flatten()) / drawn.numel()
    assert shares.tolist() == pytest.approx([0.1875] * 4 + [0.25], abs=0.01)
    assert (drawn[:, 0] == drawn[:, 1]).float().mean() < 0.25  # .2031 if independent


# ---- supervision ----


def test_a_perfect_student_has_no_loss(trajectories, levels):
    """A student that predicts the end of the trajectory at every level has loss 0."""
    assert max(losses(Student(ends(trajectories), CFG), trajectories, levels)) < 1e-9


def test_a_student_that_is_off_by_2_in_every_block_has_a_loss_of_4(trajectories, levels):
    """The mean is over noisy blocks only: clean blocks do not make it smaller."""
    off = [x + 2 for x in ends(trajectories)]
    for loss in losses(Student(off, CFG), trajectories, levels):
        assert float(loss) == pytest.approx(4, rel=1e-4)


def test_clean_blocks_are_not_supervised(trajectories, levels):
    """A student that is wrong only in clean blocks has no loss; in noisy blocks it has one."""
    of_video, of_audio = frame_blocks(BLOCKS, CFG)
    clean_v = (levels == CLEAN)[:, of_video].repeat_interleave(CFG.tokens_per_frame, dim=1)
    clean = clean_v, (levels == CLEAN)[:, of_audio]
    wrong = [torch.where(c[..., None], 9.0, x) for c, x in zip(clean, ends(trajectories))]
    assert max(losses(Student(wrong, CFG), trajectories, levels)) < 1e-9
    wrong = [torch.where(c[..., None], x, 9.0) for c, x in zip(clean, ends(trajectories))]
    assert min(losses(Student(wrong, CFG), trajectories, levels)) > 1


def test_a_clip_that_is_all_clean_has_a_loss_of_0(trajectories):
    """Without noisy blocks there is no division by zero."""
    net, all_clean = Student(ends(trajectories), CFG), torch.full((3, BLOCKS), CLEAN)
    assert [float(x) for x in losses(net, trajectories, all_clean)] == [0, 0]


def test_the_causal_mask_is_on(trajectories):
    """Training passes the four block-causal masks of the whole clip to the student."""
    net = Student([x[:2] for x in ends(trajectories)], CFG)
    recipe = trainer.Recipe(steps=1, batch=2)
    ode.make_losses(net, first_two(trajectories), recipe, TOY_PROMPTS)(0)
    expected = four_masks(CFG, BLOCKS)
    assert net.calls[0][-1].masks.keys() == expected.keys()
    assert all(torch.equal(m, expected[n]) for n, m in net.calls[0][-1].masks.items())


def test_windows_are_drawn_batch_by_batch(trajectories):
    """Each batch has the masks of one window, and every window is drawn."""
    net, data = Student([x[:2] for x in ends(trajectories)], CFG), first_two(trajectories)
    windows, recipe = (0, 2, None), trainer.Recipe(steps=1, batch=2)
    losses = ode.make_losses(net, data, recipe, TOY_PROMPTS, windows=windows)
    masks = [four_masks(CFG, BLOCKS, window)["a2v"] for window in windows]
    drawn = []
    for step in range(24):
        losses(step)
        seen = net.calls[-1][-1].masks["a2v"]
        drawn += [i for i, mask in enumerate(masks) if torch.equal(mask, seen)]
    assert len(drawn) == 24 and set(drawn) == {0, 1, 2}


def test_each_stream_has_its_weight_in_the_loss(trajectories):
    """With weights 1 and 0.16 (first release), the loss is the weighted sum of both losses."""
    net, data = Student([x[:2] + 2 for x in ends(trajectories)], CFG), first_two(trajectories)
    recipe = trainer.Recipe(steps=1, batch=2)
    values = ode.make_losses(net, data, recipe, TOY_PROMPTS, weights=(1, 0.16))(0)
    assert float(values["loss"]) == pytest.approx(values["video"] + 0.16 * values["audio"])
    assert values["video"] > 1 and values["audio"] > 1


def test_the_loss_teaches_both_output_layers_and_the_sinks(trajectories):
    """The gradient of a random student reaches all three."""
    net = random_model(CFG, dtype=torch.float32).requires_grad_(True)
    noisy = torch.zeros(3, BLOCKS, dtype=torch.long)
    sum(losses(net, trajectories, noisy, four_masks(CFG, BLOCKS))).backward()
    for name in ("sinks.tokens", "video.proj_out.weight", "audio.proj_out.weight"):
        assert net.get_parameter(name).grad.abs().max() > 0


# ---- trajectories ----


def test_fine_levels_contain_the_students_levels():
    """Every fourth level is a level of the student; the others are evenly spaced between."""
    fine = ode.fine_sigmas(SIGMAS, 4)
    assert len(fine) == 17 and fine[::4] == pytest.approx(SIGMAS)
    steps = torch.tensor(fine).diff().unflatten(0, (4, 4))
    torch.testing.assert_close(steps, steps[:, :1].expand(-1, 4))


def test_trajectories_keep_exactly_the_states_at_the_students_levels():
    """The first state is noise, the last is clean; between them are levels .91, .73 and .42."""
    x0 = random_clip(CFG, BLOCKS, clips=2, dtype=torch.float32)
    seeds = range(ode.FIRST_SEED, ode.FIRST_SEED + 2)
    tokens, video, audio = ode.draw_trajectories(
        PerfectNet(x0, CFG), SIGMAS, seeds, (1, 1), 1, TOY_PROMPTS
    )
    noise = model.draw_noise(2, SPAN, CFG, torch.Generator().manual_seed(ode.FIRST_SEED))
    assert tokens.shape == (2, 3) and video.shape[1] == audio.shape[1] == 5
    for states, x, n in zip((video, audio), x0, noise):
        for i, s in enumerate(SIGMAS):
            torch.testing.assert_close(states[:, i], (1 - s) * x + s * n, atol=1e-5, rtol=0)


@pytest.fixture
def fake_teacher(monkeypatch):
    """A teacher with small made-up trajectories, which records the seeds of every draw."""
    asked = []

    def draw(net, sigmas, seeds, guidance, between, prompts):
        asked.append(seeds)
        rows = (torch.tensor(list(seeds)) - ode.FIRST_SEED).float()[:, None, None, None]
        return torch.ones(len(seeds), 3, dtype=torch.long), rows.expand(-1, 5, 4, 2), rows + 1

    monkeypatch.setattr(ode, "draw_trajectories", draw)
    weights = {"w": torch.zeros(3)}
    return SimpleNamespace(cfg=config.TOY_TEACHER, asked=asked, state_dict=lambda: weights)


def test_trajectories_are_drawn_once_and_then_read(tmp_path, fake_teacher):
    """The batches draw every clip once; the second call only reads the file."""
    path = tmp_path / "trajectories.safetensors"
    first = load_or_draw(path, fake_teacher, 20, (1.5, 1.5), 4, batch=8)
    assert [len(seeds) for seeds in fake_teacher.asked] == [8, 8, 4]
    assert first["tokens"].shape == (20, 3) and len(first["video"][:, 0, 0, 0].unique()) == 20
    again = load_or_draw(path, fake_teacher, 20, (1.5, 1.5), 4)
    assert len(fake_teacher.asked) == 3
    assert all(torch.equal(first[n], again[n]) for n in ("tokens", "video", "audio"))


@pytest.mark.parametrize(
    "kind, told",
    [
        ((21, (1.5, 1.5), 4), "--clips was 20, now 21"),
        ((20, (2.0, 2.0), 4), "--guidance was [1.5, 1.5], now [2.0, 2.0]"),
        ((20, (1.5, 1.5), 1), "--between was 4, now 1"),
    ],
)
def test_trajectories_of_another_kind_are_refused(tmp_path, fake_teacher, kind, told):
    """An old file with another number, guidance or step is not used silently."""
    path = tmp_path / "trajectories.safetensors"
    load_or_draw(path, fake_teacher, 20, (1.5, 1.5), 4)
    with pytest.raises(ValueError) as error:
        load_or_draw(path, fake_teacher, *kind)
    expected = f"{path}: made with other settings ({told}); remove it to start anew"
    assert str(error.value) == expected


@pytest.mark.parametrize(
    "other", [dict(sigmas=(1.0, 0.5, 0.0)), dict(prompts=SimpleNamespace(identity="others"))]
)
def test_trajectories_of_other_levels_or_prompts_are_refused(tmp_path, fake_teacher, other):
    """Levels and prompts are stored with trajectories, and compared."""
    path, how = tmp_path / "trajectories.safetensors", (20, (1.5, 1.5), 4)
    load_or_draw(path, fake_teacher, *how)
    with pytest.raises(ValueError, match="made with"):
        load_or_draw(path, fake_teacher, *how, **other)


def test_trajectories_of_another_teacher_are_refused(tmp_path, fake_teacher):
    """If the teacher has other weights now, its old trajectories are not used silently."""
    path = tmp_path / "trajectories.safetensors"
    load_or_draw(path, fake_teacher, 20, (1.5, 1.5), 4)
    fake_teacher.state_dict()["w"] += 1
    with pytest.raises(ValueError, match="made with"):
        load_or_draw(path, fake_teacher, 20, (1.5, 1.5), 4)


# ---- the start ----


def test_a_student_starts_as_the_teacher_with_sinks_of_its_own():
    """Every weight is copied from the teacher; only the sinks are new, and not zero."""
    parent = model.build(tiny(PAPER, num_sinks=0), seed=1)
    net = toy_source.student_from(parent.state_dict(), CFG)
    ours = net.state_dict()
    assert ours.keys() - parent.state_dict().keys() == {"sinks.tokens"}
    assert all(torch.equal(ours[n], t) for n, t in parent.state_dict().items())
    assert ours["sinks.tokens"].abs().max() > 0


def test_a_teacher_that_does_not_fit_is_refused_by_tensor():
    """A missing weight is named instead of staying random."""
    weights = model.build(tiny(PAPER, num_sinks=0)).state_dict()
    del weights["video.table"]
    with pytest.raises(ValueError, match="tensor video.table is missing"):
        toy_source.student_from(weights, CFG)


def test_weights_that_do_not_fit_are_refused_by_file(tmp_path):
    """A teacher with too few layers: the message begins with the path that was given."""
    path = tmp_path / "flat.safetensors"
    flat = tiny(config.TOY_TEACHER)
    files.save_weights(path, model.build(flat).state_dict(), flat, {})
    with pytest.raises(ValueError, match=f"^{path}: tensor .* is missing"):
        TrainingSource(config.TOY).open(path, config.TOY)


def test_the_teachers_config_is_no_students(tmp_path, monkeypatch, capsys):
    """`--config toy_teacher` would make a student that the next stage takes for a teacher."""
    options = ["--config", "toy_teacher", "--run", tmp_path, "--out", tmp_path / "x.safetensors"]
    status, _, err = run_here(ode, options, monkeypatch, capsys)
    message = "--config toy_teacher has no blocks; expected toy or toy_released"
    assert (status, err) == (2, f"ode_regression.py: {message}\n")
