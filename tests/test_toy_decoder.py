"""The network that corrects the codec's pictures: what it sees, what it is worth, its training."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import run_here

import config
import generate
from film.decoders import ToyDecoder
from film.mp4 import enlarged
from plumbing import files
from rollout import Block
from toy import codec as toy_codec
from toy import decoder, detectors, fit, world
from toy import source as toy_source


@pytest.fixture(scope="module")
def codec():
    return decoder.load()


@pytest.fixture(scope="module")
def tokens():
    """Random latents of two clips of three seconds."""
    return torch.randn(2, 16 * 10, 48, generator=torch.Generator().manual_seed(0))


def slow_reference(codec, tokens):
    """Decode a clip latent by latent, and each patch with its own 3 x 3 neighbours."""
    linear, z = toy_codec.load(), tokens.unflatten(1, (-1, 16))
    frame = linear.decode_patches(tokens[:, :16], True)[0]
    latents = [linear.video_later.encode(frame.repeat(1, 1, 1, 8))[:, 0], *z[:, 1:].unbind(1)]
    size = linear.video_later.scale / linear.video_later.scale.square().mean().sqrt()
    shown = []
    for k, latent in enumerate(latents):
        x = torch.cat([latent / size, latents[max(0, k - 1)] / size], -1).unflatten(1, (4, 4))
        for i, layer in enumerate(codec.convolutions):
            y = F.gelu(convolved(x, layer))
            x = x + y if i else y
        error = 0.3 * codec.correction(x.flatten(1, 2))[:, None]
        later = linear.decode_patches(z[:, k], False)[1] + error
        shown.append(toy_codec.video_from_patches(later, 8, 8, (4, 4)).clamp(0, 1))
    shown[0] = linear.decode_video(tokens[:, :16], True)
    return torch.cat(shown, 1)


def convolved(x, layer):
    """Apply a 3 x 3 convolution to (B, 4, 4, C), place by place."""
    padded, y = F.pad(x, (0, 0, 1, 1, 1, 1)), []
    for row, column in itertools.product(range(4), range(4)):
        seen = padded[:, row : row + 3, column : column + 3]  # (B, 3, 3, C)
        y.append(torch.einsum("bijc,ocij->bo", seen, layer.weight) + layer.bias)
    return torch.stack(y, 1).unflatten(1, (4, 4))


def test_the_network_begins_at_the_linear_decoder(tokens):
    """Untrained, it corrects nothing: the pictures of both codecs are bitwise equal."""
    codec, linear = decoder.LearnedCodec(), toy_codec.load()
    codec.load_state_dict(linear.state_dict(), strict=False)
    for starts_clip in (True, False):
        shown = codec.decode_video(tokens, starts_clip)
        assert torch.equal(shown, linear.decode_video(tokens, starts_clip))


def test_pictures_equal_a_slow_reference(codec, tokens):
    """The first frame is not corrected; later latents look back, and at their neighbours."""
    shown, right = codec.decode_video(tokens, True), slow_reference(codec, tokens)
    torch.testing.assert_close(shown, right, atol=1e-4, rtol=0)
    assert (shown - toy_codec.load().decode_video(tokens, True)).abs().max() > 0.05


def test_a_picture_depends_on_its_latent_and_the_one_before(codec, tokens):
    """A changed latent 5 leaves all frames bitwise equal but those of latents 5 and 6."""
    changed = tokens.clone()
    changed[:, 80:96] += 1
    before, after = (codec.decode_video(x, True) for x in (tokens, changed))
    same = [torch.equal(*pair) for pair in zip(before.unbind(1), after.unbind(1))]
    assert same == [True] * 33 + [False] * 16 + [True] * 24


@pytest.mark.parametrize("cfg", [config.TOY, config.TOY_RELEASED], ids=lambda cfg: cfg.name)
def test_block_by_block_equals_the_whole_clip(codec, tokens, cfg):
    """In both layouts of block 0; the frames of a block are final before the next one exists."""
    first, audio = cfg.prefix_video_frames, torch.zeros(2, 26, 20)
    blocks = [tokens[:, : 16 * first], *tokens[:, 16 * first :].split(48, dim=1)]
    stream = ToyDecoder(codec)
    chunks = [stream.decode(Block(k, video, audio)) for k, video in enumerate(blocks)]
    shown = torch.cat([chunk.frames for chunk in chunks])
    whole = codec.decode_video(tokens, True)[0]
    torch.testing.assert_close(shown, whole, atol=1e-5, rtol=0)  # chunks differ in their size


# ---- what it is worth ----


@pytest.fixture(scope="module")
def clips():
    """The rendered pictures and the latents of fast held-out clips."""
    fast = fit.fast_clips(24)
    video = world.render_video(fast, 5)
    return video, toy_codec.encode_clips(toy_codec.load(), fast, 5)[0]


def test_the_ball_moves_evenly(codec, clips):
    """Its step at the border of two latents is at most 1.3 times that inside, and never long."""
    border, inside = fit.ball_steps(codec.decode_video(clips[1], True))
    assert border.mean() <= 1.3 * inside.mean()
    assert (border < 2.5).all()
    border, inside = fit.ball_steps(toy_codec.load().decode_video(clips[1], True))
    assert border.mean() > 1.8 * inside.mean()  # without the network


def test_the_error_is_halved(codec, clips):
    """Mean absolute error of held-out clips, beside the linear codec."""
    errors = [
        (x.decode_video(clips[1], True) - clips[0]).abs().mean() for x in (codec, toy_codec.load())
    ]
    assert errors[0] <= errors[1] / 2


def test_impacts_are_seen_when_they_happen(codec):
    """F1 of at least .99 and DeSync of at most 10 ms with the true sound (linear: 14 ms)."""
    some = world.draw_clips(range(world.HELD_OUT, world.HELD_OUT + 64))
    tokens = toy_codec.encode_clips(codec, some, 5)[0]
    seen = detectors.find_impacts(detectors.see_ball(codec.decode_video(tokens, True)))
    heard = detectors.find_onsets(world.render_sound(some, 5))
    found = [detectors.match(s, h, 0.25, 4.75) for s, h in zip(seen, heard)]
    found = detectors.Match(*map(sum, zip(*found)))
    assert found.hits / (found.impacts + found.onsets) >= 0.99
    assert 1000 * found.offsets / found.near <= 10


# ---- the film ----


def test_films_are_decoded_with_the_network():
    """The source of generate.py makes such a decoder, for the shipped codec and network."""
    stream = toy_source.StreamSource(generate.check_args(generate.options().parse_args([])))
    assert isinstance(stream.decoder(lambda _, f: f).codec, decoder.LearnedCodec)


def test_frames_are_enlarged_without_hard_edges():
    """A step of brightness becomes a slope; means stay; its own size changes nothing."""
    planes = torch.full((2, 1, 4, 6), 50, dtype=torch.uint8)
    planes[..., 3:] = 200
    large = enlarged(planes, (40, 60))
    assert large.shape == (2, 1, 40, 60)
    steps = large[0, 0, 20].int().diff()
    assert 0 < steps.max() < 30 and steps[25:34].min() > 0  # 150 in one step before
    assert abs(large.float().mean() - 125) < 1
    assert torch.equal(enlarged(planes, (4, 6)), planes)


# ---- the command line ----


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run toy/fit.py in an empty folder, with few clips and steps: -> status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"FIT_CLIPS": 8, "STEPS": 2, "BATCH": 2}.items():
        monkeypatch.setattr(fit, name, value)
    monkeypatch.setattr(fit, "streamed_latents", lambda: torch.zeros(1, 256, 48))
    return lambda *arguments: run_here(fit, arguments, monkeypatch, capsys)


def test_quality_is_a_table_and_a_picture(run, tmp_path):
    """Rows for both decoders on real and streamed latents; no weights are written."""
    status, shown, _ = run()
    assert status == 0
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith("| ")]
    assert [r[0] for r in rows[1:]] == [
        "| rendered", "| held-out clips, linear", "| held-out clips, corrected",
        "| streamed clips, linear", "| streamed clips, corrected",
    ]  # fmt: skip
    psnr = [float(r[2].removesuffix(" dB")) for r in rows[2:4]]
    assert psnr[0] == pytest.approx(33.5, abs=1) and psnr[1] > psnr[0] + 5
    assert float(shown.split("sound: PSNR ")[1].split(" dB")[0]) > 40
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["decoder.png"]
    assert run("--help")[0] == 0 and run("picture")[0] == 2


@pytest.mark.parametrize("part, shipped", [("codec", toy_codec.FILE), ("decoder", decoder.FILE)])
def test_only_when_asked_a_part_is_fitted(run, part, shipped, monkeypatch):
    """It is written to runs/, or to --out, with the names of the shipped one; never over it."""
    before = shipped.read_bytes()
    for arguments, name in (([], f"runs/toy_{part}.safetensors"), (["--out", "mine"], "mine")):
        assert run(part, *arguments)[0] == 0
        made, old = (files.read_weights(path)[0] for path in (name, shipped))
        assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in old.items()}
    assert shipped.read_bytes() == before


def test_the_same_seed_trains_the_same_network(run):
    """Two trainings of two steps, bitwise; clips and noise depend on the step alone."""
    run("decoder", "--out", "a")
    run("decoder", "--out", "b")
    a, b = (files.read_weights(path)[0] for path in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_place_that_cannot_be_written_is_refused_before_the_fit(run, tmp_path, monkeypatch):
    """A file where a folder should be: an error in one line, before any clip is drawn."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(world, "draw_clips", None)
    out = tmp_path / "file" / "x.safetensors"
    reason = "not writable (Not a directory); choose another place"
    for part in ["codec"], ["decoder"], []:
        assert run(*part, "--out", out)[::2] == (2, f"toy/fit.py: {out}: {reason}\n")
