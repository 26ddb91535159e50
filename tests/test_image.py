"""A first picture: image files of all kinds, the frame that is given, the encoder of LTX-2."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers import LAYOUTS, SMALL, layout_name, random_model, run_here, save_small_student
from PIL import Image
from tape import Tape

import config
import generate
import rollout
from film import picture
from film.picture import WithPicture, read_picture
from full_size import decoders, memory, source
from full_size.faster import Recorded
from kv_cache import CachedView
from plumbing import texts
from studies import image as study
from toy import codec as toy_codec
from toy import source as toy_source
from toy import world as toy_world

# ---- image files ----


def colours(rows=32, columns=48):
    """A picture whose left half is red and whose right half is blue."""
    pixels = np.zeros((rows, columns, 3), np.uint8)
    pixels[:, : columns // 2, 0] = pixels[:, columns // 2 :, 2] = 200
    return Image.fromarray(pixels)


def save(image, path, **options):
    image.save(path, **options)
    return str(path)


def test_the_middle_of_a_picture_is_read(tmp_path):
    """Wide or tall, large or small: scaled to the frame, cut at both sides alike."""
    for rows, columns in ((32, 64), (320, 640)):
        wide = read_picture(save(colours(rows, columns), tmp_path / "a.png"), 32, 32)
        assert wide.shape == (3, 32, 32) and wide.dtype == torch.float32
        half = torch.tensor([1.0, 0, 0])[:, None, None] * 200 / 255
        torch.testing.assert_close(wide[:, :, :14], half.expand(3, 32, 14), atol=0.02, rtol=0)
        torch.testing.assert_close(
            wide[:, :, 18:], half.flip(0).expand(3, 32, 14), atol=0.02, rtol=0
        )
    pixels = np.zeros((64, 32, 3), np.uint8)
    pixels[16:48] = 255
    assert read_picture(save(Image.fromarray(pixels), tmp_path / "b.png"), 32, 32).min() == 1


def test_a_frame_need_not_be_square(tmp_path):
    assert read_picture(save(colours(), tmp_path / "a.png"), 20, 60).shape == (3, 20, 60)


GREY = Image.fromarray(np.full((32, 32), 51, np.uint8))
KINDS = {
    "grey": (GREY, "png", {}, (0.2, 0.2, 0.2)),
    "black and white": (GREY.point(lambda _: 255).convert("1"), "png", {}, (1, 1, 1)),
    "16 bits": (Image.fromarray(np.full((32, 32), 13107, np.uint16)), "png", {}, (0.2, 0.2, 0.2)),
    "palette": (colours(32, 96).crop((0, 0, 32, 32)).quantize(4), "png", {}, (200 / 255, 0, 0)),
    "CMYK": (Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "jpg", {}, (1, 0, 0)),
    "alpha": (Image.new("RGBA", (32, 32), (255, 255, 255, 51)), "png", {}, (0.2, 0.2, 0.2)),
    "grey with alpha": (Image.new("LA", (32, 32), (255, 51)), "png", {}, (0.2, 0.2, 0.2)),
    "palette with a hole": (
        Image.new("P", (32, 32), 3),
        "gif",
        {"transparency": 3},
        (0, 0, 0),
    ),
    "animation": (
        Image.new("RGB", (32, 32), "red"),
        "gif",
        {"save_all": True, "append_images": [Image.new("RGB", (32, 32), "blue")]},
        (1, 0, 0),
    ),
    "webp": (Image.new("RGB", (32, 32), "blue"), "webp", {"lossless": True}, (0, 0, 1)),
}


@pytest.mark.parametrize("image, kind, options, colour", KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_image_becomes_rgb(tmp_path, image, kind, options, colour):
    """Transparent parts are black, an animation is its first picture, 16 bits are scaled."""
    found = read_picture(save(image, tmp_path / f"a.{kind}", **options), 32, 32)
    expected = torch.tensor(colour, dtype=torch.float32)[:, None, None].expand(3, 32, 32)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_a_photograph_is_turned_as_it_was_taken(tmp_path):
    """EXIF 6: the first row of the file is the right edge of the picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = save(colours(32, 32), tmp_path / "a.png", exif=exif)
    found, plain = read_picture(turned, 32, 32), np.asarray(colours(32, 32)) / 255
    assert np.allclose(found.permute(1, 2, 0), np.rot90(plain, -1), atol=1e-6)


def cut(data):
    return data[: len(data) // 2]


def png(image):
    out = io.BytesIO()
    image.save(out, "png")
    return out.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
BAD = {
    "missing": (None, "No such file or directory"),
    "empty": (b"", "no whole image of a known kind, such as PNG"),
    "text": (b"red fast metal", "no whole image of a known kind"),
    "cut off": (cut(png(NOISE)), "no whole image of a known kind"),
    "tiny": (png(colours(15, 99)), "99 x 15 pixels; expected 16 x 16 or more"),
}


@pytest.mark.parametrize("data, message", BAD.values(), ids=BAD.keys())
def test_what_is_no_picture_is_refused_by_name(tmp_path, data, message):
    path = tmp_path / "picture.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match="picture.png: ") as caught:
        read_picture(str(path), 32, 32)
    assert message in str(caught.value)


def test_pixels_of_an_unknown_range_are_refused(tmp_path):
    """Floating point numbers have no white."""
    path = save(Image.fromarray(np.zeros((32, 32), np.float32)), tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="a.tiff: pixels of mode F; expected 8 or 16 bits"):
        read_picture(path, 32, 32)


def test_a_picture_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    """Its library's limit against files that would fill the memory."""
    path = save(colours(64, 64), tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="large.png: not read as an image"):
        read_picture(path, 32, 32)


# ---- the given frame ----


def test_the_codec_encodes_a_picture_as_the_first_frame_of_a_clip():
    codec, clips = toy_codec.load(), toy_world.draw_clips([3, 4])
    video, sound = toy_world.render_video(clips, 1), toy_world.render_sound(clips, 1)
    tokens = codec.encode_picture(video[:, 0])
    torch.testing.assert_close(tokens, codec.encode(video, sound)[0][:, :16])


def blocks_of(net, first, cfg, blocks=3):
    text = net.project_text(torch.eye(9, dtype=torch.float64)[None, 1:4].expand(2, -1, -1))
    given = net if first is None else WithPicture(net, first)
    g, view = torch.Generator().manual_seed(0), CachedView(cfg, blocks)
    with torch.no_grad():
        return list(rollout.rollout(given, lambda k: text, blocks, cfg.sigmas, g, 2, view))


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_the_first_latent_frame_is_the_picture_and_the_rest_answers_to_it(layout):
    """Also if block 0 is a whole second; another picture changes sound and all later blocks."""
    cfg = replace(layout, num_layers=1, num_heads=2, video_width=16, audio_width=16)
    net, n = random_model(cfg), cfg.tokens_per_frame
    first = torch.randn(2, n, cfg.video_channels, dtype=torch.float64)
    streams = [blocks_of(net, x, cfg) for x in (first, 2 * first, None)]
    torch.testing.assert_close(streams[0][0].video[:, :n], first)
    torch.testing.assert_close(streams[1][0].video[:, :n], 2 * first)
    for other in streams[1:]:
        for one, two in zip(streams[0], other):
            assert (one.video - two.video).abs().max() > 1e-3
            assert (one.audio - two.audio).abs().max() > 1e-3


def test_passes_of_block_0_see_a_clean_frame_at_level_0():
    """A slow specification: the noise level of every token, in every pass of every block."""
    cfg = replace(LAYOUTS[2], num_layers=1, num_heads=2, video_width=16, audio_width=16)
    net, seen = random_model(cfg), []
    net.register_forward_pre_hook(lambda net, inputs: seen.append([x for x in inputs[:4]]))
    first = torch.randn(2, cfg.tokens_per_frame, cfg.video_channels, dtype=torch.float64)
    made = blocks_of(net, first, cfg, blocks=2)
    assert cfg.prefix_video_frames == 4 and len(seen) == 9  # 4 passes, refresh, 4 passes
    for i, sigma in enumerate(cfg.sigmas[:-1]):
        video, _, level_v, level_a = seen[i]
        assert torch.equal(video[:, : cfg.tokens_per_frame], first)
        levels = [0.0] * 16 + [sigma] * 48
        expected = torch.tensor(levels, dtype=torch.float64).expand(2, 64)
        torch.testing.assert_close(level_v, expected, atol=1e-6, rtol=0)
        assert (level_a - sigma).abs().max() < 1e-6
        assert seen[5 + i][2].shape == (2,)  # block 1
    assert torch.equal(seen[4][0], made[0].video) and not seen[4][2].any()


@pytest.mark.parametrize("name", ["toy", "toy_released"])
def test_the_faster_toy_follows_a_picture_in_the_same_way(name, tmp_path):
    """What generate.py streams, and the plain student, agree up to rounding."""
    path = save(colours(), tmp_path / "a.png")
    command = ["--config", name, "--image", path, "--out", str(tmp_path / "x.mp4")]
    request = generate.check_args(generate.options().parse_args(command))
    fast = generate.open_source([request])
    plain = toy_source.load_student(toy_source.WEIGHTS[name], request.cfg)
    first = fast.picture(path)
    pair = (generate.stream(net, "red", 2, picture=first) for net in (fast.net, plain))
    for one, other in zip(*pair, strict=True):
        for x, y in zip(one[1:], other[1:]):
            torch.testing.assert_close(x, y, atol=1e-3, rtol=0)


def test_recorded_passes_with_a_picture_are_the_plain_ones(tmp_path):
    """Bit by bit, after a stream without one and before another."""
    net = toy_source.load_student(save_small_student(tmp_path / "s"), SMALL)
    recorded, first = Recorded(net, lambda: Tape.record), torch.randn(1, 16, 48)
    for given in (None, first, 2 * first, None):
        pair = (generate.stream(m, "red", 2, picture=given) for m in (net, recorded))
        for one, other in zip(*pair, strict=True):
            assert all(map(torch.equal, one[1:], other[1:]))


# ---- the command line ----


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(config.CONFIGS, "toy", SMALL)
    monkeypatch.setitem(toy_source.WEIGHTS, "toy", save_small_student(tmp_path / "student"))
    return lambda *args: run_here(generate, ("--config", "toy", *args), monkeypatch, capsys)


def first_frame(path):
    with av.open(path) as film:
        return next(film.decode(video=0)).to_ndarray(format="rgb24")[5::10, 5::10] / 255


def test_a_film_begins_with_the_picture(run):
    """Frame 0 is the picture of a ball, up to the codecs; the report names the file."""
    ball = toy_world.render_video(toy_world.draw_clips([5]), 1)[0, 0]
    pixels = (ball.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    save(Image.fromarray(pixels), "ball.png")
    status, _, err = run("--seconds", 1, "--image", "ball.png", "--report", "r.json")
    assert status == 0, err
    assert np.abs(first_frame("out.mp4") - pixels / 255).mean() < 0.03
    assert texts.read_json("r.json")["image"] == str(Path("ball.png").resolve())
    run("--seconds", 1, "--out", "plain.mp4")
    assert np.abs(first_frame("plain.mp4") - pixels / 255).mean() > 0.06


def test_a_picture_that_cannot_be_read_is_noticed_before_anything_is_loaded(run):
    Path("a.png").write_text("no picture")
    status, out, err = run("--image", "a.png", "--weights", "none")
    assert status == 2 and out == "" and err.count("\n") == 1
    assert "generate.py: a.png: not read as an image (" in err


def test_a_list_has_a_picture_for_each_film(run):
    """Beside the list; a film with a bad one fails, the others are made."""
    Path("lists").mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        save(Image.new("RGB", (32, 32), colour), f"lists/{name}.png")
    lines = ['{"prompt": "red", "image": "%s"}' % name for name in ("a.png", "b.png", "c.png")]
    Path("lists/x.jsonl").write_text("\n".join(lines))
    status, _, err = run("--prompts", "lists/x.jsonl", "--out-dir", "films", "--seconds", 1)
    assert status == 2 and "line 3: lists/c.png: not read as an image (No such file" in err
    a, b = (first_frame(f"films/0000{n}.mp4").mean((0, 1)) for n in (1, 2))
    assert a.argmax() == 0 and b.argmax() == 2


# ---- the full size ----


@pytest.fixture(scope="module")
def vae():
    pytest.importorskip("diffusers")
    from benchmarks import bench_decode

    return bench_decode.tiny_decoders()[0]


def test_tokens_are_those_of_the_library(vae):
    """As its pipeline from picture to video conditions LTX-2: clean, normalised, row by row."""
    from diffusers import LTX2ImageToVideoPipeline

    parts = ("scheduler", "audio_vae", "text_encoder", "tokenizer", "connectors", "transformer")
    pipeline = LTX2ImageToVideoPipeline(vae=vae, vocoder=None, **dict.fromkeys(parts))
    image = torch.rand(3, 64, 96)
    latents, mask = pipeline.prepare_latents(
        image=2 * image[None] - 1, num_channels_latents=128, height=64, width=96, num_frames=9,
        dtype=torch.float32, device=torch.device("cpu"), generator=torch.Generator(),
    )  # fmt: skip
    tokens = decoders.encode_picture(vae, image)
    assert tokens.shape == (1, 6, 128)
    torch.testing.assert_close(tokens, latents[:, :6])


def test_the_encoder_is_read_from_its_folder_without_the_decoder(vae, tmp_path, monkeypatch):
    """And its result is on the CPU, one for each file."""
    from benchmarks import bench_decode

    kinds = bench_decode.tiny_decoder_classes()
    monkeypatch.setattr(decoders, "decoder_classes", lambda: kinds)
    vae.save_pretrained(tmp_path / "vae")
    loaded = decoders.load_encoder(tmp_path, dtype=torch.float32)
    assert loaded.decoder is None
    path = save(colours(), tmp_path / "a.png")
    cfg = replace(config.FULL, height=64, width=96)
    request = generate.Request(
        cfg, [], 1, 0, 1, None, "x.mp4", None, None, "w", tmp_path, torch.device("cpu"),
        torch.float32,
    )  # fmt: skip
    found = source.encode_pictures(request, [path])
    expected = decoders.encode_picture(vae, read_picture(path, 64, 96))
    torch.testing.assert_close(found, {path: expected})


def test_another_encoder_is_refused(vae, tmp_path):
    """A setting that changes the numbers, and no name or shape."""
    import json

    vae.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "encoder_causal": False}))
    with pytest.raises(ValueError, match="encoder_causal=False, expected True"):
        decoders.load_encoder(tmp_path)


def test_the_encoder_is_in_the_plan_of_memory(monkeypatch, capsys):
    """Its weights are 1.3 GB in bfloat16; a device without room for it is refused."""
    row = memory.encoder_row(config.FULL, torch.bfloat16)
    assert 1e9 < row.num_bytes < 4e9
    request = generate.Request(
        config.FULL, [], 1, 0, 1, None, "x.mp4", None, None, "w", None, torch.device("cpu"),
        torch.bfloat16,
    )  # fmt: skip
    memory.check_encoder(request)
    assert "before all that: the video encoder, " in capsys.readouterr().out
    monkeypatch.setattr(memory, "free_bytes", lambda device: row.num_bytes - 1)
    with pytest.raises(ValueError, match="--image needs .* GB, .* GB are free"):
        memory.check_encoder(request)


# ---- the study ----


def test_follow_metrics_know_a_ball_that_stays_and_one_that_changes():
    """Clips of the world follow their first frame; clips whose frame 0 is another's do not."""
    clips = toy_world.draw_clips(range(24))
    video = toy_world.render_video(clips, 5)
    same = study.follow_metrics(*study.looks(video))
    video[:, 0] = video[:, 0].roll(1, 0)
    other = study.follow_metrics(*study.looks(video))
    for name in ("hue_early", "radius_early", "hue_late", "radius_late"):
        assert same[name] > 0.9 and other[name] < 0.4
    assert same["jump"] < 1.5 < 4 < other["jump"]


def test_both_ways_end_at_the_picture():
    """Renoised or clean, block 0 is the picture in its first latent frame."""
    net = random_model(SMALL, torch.float32)
    first = torch.randn(2, 16, 48)
    text = net.project_text(torch.eye(9)[None, 1:4].expand(2, -1, -1))
    for way in (study.Renoised, picture.WithPicture):
        made = rollout.rollout(
            way(net, first), lambda k: text, 1, SMALL.sigmas, torch.Generator(), 2
        )
        with torch.no_grad():
            torch.testing.assert_close(next(made).video, first, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cfg", ["toy", "toy_released"])
def test_the_page_of_a_film_with_a_picture_shows_its_passes(run, cfg, monkeypatch):
    """Block 0 has a noise level for each token, all other blocks have one."""
    pixels = np.full((32, 32, 3), 90, np.uint8)
    save(Image.fromarray(pixels), "p.png")
    status, _, err = run("--config", cfg, "--seconds", 2, "--image", "p.png", "--html", "p.html")
    assert status == 0, err
    strips = json.loads(re.search(r'"strips": (\[.*?\])', texts.read_text("p.html"))[1])
    assert all(strip.startswith("data:image/png") for strip in strips) and len(strips) > 1
