"""ODE regression: levels by block, states at those levels, and what is supervised."""

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
from toy.source import TOY_PROMPTS, TrainingSource, toy_captions

CFG = tiny(PAPER, num_sinks=4)
SIGMAS, BLOCKS = CFG.sigmas, 6
CLEAN = len(SIGMAS) - 1
SPAN = clip_span(BLOCKS, CFG)
load_or_draw = partial(ode.load_or_draw_trajectories, prompts=TOY_PROMPTS)


@pytest.fixture
def walk():
    """Straight trajectories of three clips: captions, states of video and of audio."""
    torch.manual_seed(0)
    ends, noise = (random_clip(CFG, BLOCKS, clips=3, dtype=torch.float32) for _ in range(2))
    states = [torch.stack([(1 - s) * x + s * n for s in SIGMAS], 1) for x, n in zip(ends, noise)]
    return toy_captions(torch.tensor([[1, 5, 7]] * 3)), *states


@pytest.fixture
def levels():
    """Independent levels of three clips, every level among them, one clip with a clean past."""
    drawn = ode.draw_levels(3, BLOCKS, len(SIGMAS), torch.Generator().manual_seed(3))
    drawn[2] = torch.tensor([CLEAN] * 4 + [1, 0])
    assert set(drawn.flatten().tolist()) == set(range(len(SIGMAS)))
    return drawn


class Student(PerfectNet):
    """Velocity that leads to the given end; at sigma = 0 anything will do, here 1000."""

    def __call__(self, *args):
        velocities = super().__call__(*args)
        return [torch.where(v.isfinite(), v, 1000.0) for v in velocities]


def ends(walk):
    return [x[:, -1] for x in walk[1:]]


def losses(net, walk, levels, masks=None):
    return ode.regression_losses(net, walk, levels, SIGMAS, MaskedView(masks))


# ---- levels ----


def block_of(frame, per_block):
    """Counted by hand: the first frame is block 0, then so many to a block."""
    block = 0
    while frame >= 1 + block * per_block:
        block += 1
    return block


def test_a_blocks_level_is_shared_by_its_video_and_its_own_audio(walk, levels):
    """Frame by frame of both streams, the student is told the level of that frame's second."""
    net = Student(ends(walk), CFG)
    losses(net, walk, levels)
    ((_, _, sigma_video, sigma_audio, _, span, _),) = net.calls
    assert (sigma_video.shape, sigma_audio.shape) == ((3, 16), (3, 126))
    for sigma, frames, per_block in ((sigma_video, span.video, 3), (sigma_audio, span.audio, 25)):
        for b in range(3):
            for f in frames:
                expected = SIGMAS[levels[b, block_of(f, per_block)]]
                assert float(sigma[b, f]) == pytest.approx(expected)


def test_the_student_sees_each_block_as_it_was_at_its_level(walk, levels):
    """Token by token, the input is the trajectory's state at the level of the token's block."""
    net = Student(ends(walk), CFG)
    losses(net, walk, levels)
    tokens = CFG.tokens_per_frame
    for seen, states, per_block, per_frame in (
        (net.calls[0][0], walk[1], 3, tokens),
        (net.calls[0][1], walk[2], 25, 1),
    ):
        for b in range(3):
            for t in range(seen.shape[1]):
                level = levels[b, block_of(t // per_frame, per_block)]
                assert torch.equal(seen[b, t], states[b, level, t])


def test_the_official_rounding_would_give_some_audio_its_neighbours_level():
    """Spreading 16 frames over 126 by rounding puts edges at 8, 32, 55, 79, 102; ours lie at
    1, 26, 51, 76, 101, where the seconds begin."""
    of_video, of_audio = frame_blocks(BLOCKS, CFG)
    edges_v, edges_a = ((x[1:] != x[:-1]).nonzero()[:, 0] + 1 for x in (of_video, of_audio))
    assert [round(e * 126 / 16) for e in edges_v.tolist()] == [8, 32, 55, 79, 102]
    assert edges_a.tolist() == [1, 26, 51, 76, 101]


def test_a_quarter_of_the_blocks_is_clean_and_the_rest_evenly_noisy():
    """Levels are drawn for every block by itself: 25 % clean, the four noisy ones alike."""
    drawn = ode.draw_levels(4000, BLOCKS, len(SIGMAS), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn.flatten()) / drawn.numel()
    assert shares.tolist() == pytest.approx([0.1875] * 4 + [0.25], abs=0.01)
    assert (drawn[:, 0] == drawn[:, 1]).float().mean() < 0.25  # .2031 if independent


# ---- what is supervised ----


def test_a_perfect_student_has_no_loss(walk, levels):
    """Naming the end of the trajectory at every level costs nothing."""
    assert max(losses(Student(ends(walk), CFG), walk, levels)) < 1e-9


def test_a_student_off_by_2_has_a_loss_of_4_whatever_the_share_of_clean_blocks(walk, levels):
    """The mean is over noisy elements only: clean ones neither count nor dilute."""
    off = [x + 2 for x in ends(walk)]
    for loss in losses(Student(off, CFG), walk, levels):
        assert float(loss) == pytest.approx(4, rel=1e-4)


def test_clean_blocks_are_not_supervised(walk, levels):
    """A student that is wrong about clean blocks only has no loss; wrong about noisy ones, some."""
    of_video, of_audio = frame_blocks(BLOCKS, CFG)
    clean_v = (levels == CLEAN)[:, of_video].repeat_interleave(CFG.tokens_per_frame, dim=1)
    clean = clean_v, (levels == CLEAN)[:, of_audio]
    wrong = [torch.where(c[..., None], 9.0, x) for c, x in zip(clean, ends(walk))]
    assert max(losses(Student(wrong, CFG), walk, levels)) < 1e-9
    wrong = [torch.where(c[..., None], x, 9.0) for c, x in zip(clean, ends(walk))]
    assert min(losses(Student(wrong, CFG), walk, levels)) > 1


def test_a_clip_that_is_all_clean_has_a_loss_of_0(walk):
    """Nothing to supervise is no division by zero."""
    all_clean = torch.full((3, BLOCKS), CLEAN)
    assert [float(x) for x in losses(Student(ends(walk), CFG), walk, all_clean)] == [0, 0]


def test_the_causal_mask_is_on(walk):
    """Training passes the four block-causal masks of the whole clip to the student."""
    net = Student(ends(walk)[:1], CFG)
    net.x0 = [x[[0, 0]] for x in ends(walk)]
    data = {n: x[[0, 0]] for n, x in zip(("video", "audio"), walk[1:])}
    data["tokens"] = torch.tensor([[1, 5, 7]] * 2)
    ode.make_losses(net, data, trainer.Recipe(steps=1, batch=2), TOY_PROMPTS)(0)
    expected = four_masks(CFG, BLOCKS)
    assert net.calls[0][-1].masks.keys() == expected.keys()
    assert all(torch.equal(m, expected[n]) for n, m in net.calls[0][-1].masks.items())


def test_windows_are_drawn_batch_by_batch(walk):
    """Each batch has the masks of one of the windows, and every window has its turn."""
    net = Student([x[:2] for x in ends(walk)], CFG)
    data = {"tokens": torch.tensor([[1, 5, 7]] * 2), "video": walk[1][:2], "audio": walk[2][:2]}
    windows = 0, 2, None
    losses = ode.make_losses(
        net, data, trainer.Recipe(steps=1, batch=2), TOY_PROMPTS, windows=windows
    )
    masks = [four_masks(CFG, BLOCKS, window)["a2v"] for window in windows]
    drawn = []
    for step in range(24):
        losses(step)
        seen = net.calls[-1][-1].masks["a2v"]
        drawn += [i for i, mask in enumerate(masks) if torch.equal(mask, seen)]
    assert len(drawn) == 24 and set(drawn) == {0, 1, 2}


def test_each_stream_has_its_weight_in_the_loss(walk):
    """1 and 0.16, as in the first release: the sum, and the two losses as they are."""
    net = Student([x[:2] + 2 for x in ends(walk)], CFG)
    data = {"tokens": torch.tensor([[1, 5, 7]] * 2), "video": walk[1][:2], "audio": walk[2][:2]}
    recipe = trainer.Recipe(steps=1, batch=2)
    values = ode.make_losses(net, data, recipe, TOY_PROMPTS, weights=(1, 0.16))(0)
    assert float(values["loss"]) == pytest.approx(values["video"] + 0.16 * values["audio"])
    assert values["video"] > 1 and values["audio"] > 1


def test_the_loss_teaches_both_exits_and_the_sinks(walk):
    """With a real student, its gradient reaches what only one stream or only the sinks have."""
    net = random_model(CFG, dtype=torch.float32).requires_grad_(True)
    noisy = torch.zeros(3, BLOCKS, dtype=torch.long)
    sum(losses(net, walk, noisy, four_masks(CFG, BLOCKS))).backward()
    for name in ("sinks.tokens", "video.proj_out.weight", "audio.proj_out.weight"):
        assert net.get_parameter(name).grad.abs().max() > 0


# ---- trajectories ----


def test_fine_levels_contain_the_students_levels():
    """Every fourth of the teacher's levels is one of the student's, the others evenly between."""
    fine = ode.fine_sigmas(SIGMAS, 4)
    assert len(fine) == 17 and fine[::4] == pytest.approx(SIGMAS)
    steps = torch.tensor(fine).diff().unflatten(0, (4, 4))
    torch.testing.assert_close(steps, steps[:, :1].expand(-1, 4))


def test_trajectories_keep_exactly_the_states_at_the_students_levels():
    """First noise, last the teacher's answer, and between them the states at .91, .73 and .42."""
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
    """Draws small made-up trajectories and counts how often it was asked."""
    asked = []

    def draw(net, sigmas, seeds, guidance, between, prompts):
        asked.append(seeds)
        rows = (torch.tensor(list(seeds)) - ode.FIRST_SEED).float()[:, None, None, None]
        return torch.ones(len(seeds), 3, dtype=torch.long), rows.expand(-1, 5, 4, 2), rows + 1

    monkeypatch.setattr(ode, "draw_trajectories", draw)
    weights = {"w": torch.zeros(3)}
    return SimpleNamespace(cfg=config.TOY_TEACHER, asked=asked, state_dict=lambda: weights)


def test_trajectories_are_drawn_once_and_then_read(tmp_path, fake_teacher, capsys):
    """Batches make up the count, each clip once; the second time the file is enough."""
    path = tmp_path / "trajectories.safetensors"
    first = load_or_draw(path, fake_teacher, 20, (1.5, 1.5), 4, batch=8)
    assert [len(seeds) for seeds in fake_teacher.asked] == [8, 8, 4]
    assert first["tokens"].shape == (20, 3) and len(first["video"][:, 0, 0, 0].unique()) == 20
    again = load_or_draw(path, fake_teacher, 20, (1.5, 1.5), 4)
    assert len(fake_teacher.asked) == 3
    assert all(torch.equal(first[n], again[n]) for n in ("tokens", "video", "audio"))


@pytest.mark.parametrize("kind", [(21, (1.5, 1.5), 4), (20, (2.0, 2.0), 4), (20, (1.5, 1.5), 1)])
def test_trajectories_of_another_kind_are_refused(tmp_path, fake_teacher, kind, capsys):
    """Another number, guidance or step does not silently use the old file."""
    path = tmp_path / "trajectories.safetensors"
    load_or_draw(path, fake_teacher, 20, (1.5, 1.5), 4)
    with pytest.raises(ValueError, match="trajectories.safetensors: made with .* remove it"):
        load_or_draw(path, fake_teacher, *kind)


@pytest.mark.parametrize(
    "other", [dict(sigmas=(1.0, 0.5, 0.0)), dict(prompts=SimpleNamespace(identity="others"))]
)
def test_trajectories_of_other_levels_or_prompts_are_refused(tmp_path, fake_teacher, other, capsys):
    """What a walk's places and captions stand for is part of what it is."""
    path, how = tmp_path / "trajectories.safetensors", (20, (1.5, 1.5), 4)
    load_or_draw(path, fake_teacher, *how)
    with pytest.raises(ValueError, match="made with"):
        load_or_draw(path, fake_teacher, *how, **other)


def test_trajectories_of_another_teacher_are_refused(tmp_path, fake_teacher, capsys):
    """After the teacher was trained on, its old trajectories are not used silently."""
    path = tmp_path / "trajectories.safetensors"
    load_or_draw(path, fake_teacher, 20, (1.5, 1.5), 4)
    fake_teacher.state_dict()["w"] += 1
    with pytest.raises(ValueError, match="made with"):
        load_or_draw(path, fake_teacher, 20, (1.5, 1.5), 4)


@pytest.mark.parametrize("option", ["--between", "--clips"])
@pytest.mark.parametrize("value", [0, -1])
def test_walks_without_steps_or_clips_are_refused(option, value, tmp_path, monkeypatch, capsys):
    """One line, and nothing is drawn or written."""
    options = [option, value, "--run", tmp_path / "run", "--out", tmp_path / "x.safetensors"]
    status, _, err = run_here(ode, options, monkeypatch, capsys)
    assert (status, err) == (2, f"ode_regression.py: {option} {value}: expected 1 or more\n")
    assert not list(tmp_path.iterdir())


# ---- the start ----


def test_a_student_starts_as_the_teacher_with_sinks_of_its_own():
    """Every weight is the teacher's; only the sinks are new, and they are not zero."""
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
