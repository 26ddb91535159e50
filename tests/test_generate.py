"""Streaming from the command line: files, prompts, errors, and files after a kill.

Most tests run in this process, with a tiny random student in place of the toy's student. Where a
signal must end a process, the test starts a real one, with a random student of the toy's size.
"""

import base64
import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers import NASTY, SMALL, random_model, run_here
from safetensors.torch import save_file

import config
import generate
import model
from film import decoders, sheet, writer
from film.mp4 import Movie
from masks import block_interval, full_window
from plumbing import cli, files
from toy import codec as toy_codec
from toy import source as toy_source
from toy import world as toy_world

ROOT = Path(generate.__file__).parent
OLD = b"an older film"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with a tiny random student and broken weight files."""
    folder = tmp_path_factory.mktemp("weights")
    tensors = random_model(SMALL, torch.float32).state_dict()
    files.save_weights(folder / "good", tensors, SMALL, {})
    other = replace(SMALL, num_sinks=8)
    files.save_weights(folder / "other_config", model.build(other).state_dict(), other, {})
    files.save_weights(folder / "another_tensor", {**tensors, "more": torch.zeros(1)}, SMALL, {})
    bad = {**tensors, "video.table": tensors["video.table"] * float("nan")}
    files.save_weights(folder / "nan", bad, SMALL, {})
    (folder / "truncated").write_bytes((folder / "good").read_bytes()[:-1000])
    (folder / "text").write_text("no weights at all")
    save_file(tensors, folder / "foreign")
    return folder


@pytest.fixture
def run(weights, tmp_path, monkeypatch, capsys):
    """Run the command line here, in an empty folder: -> exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(config.CONFIGS, "toy", SMALL)
    monkeypatch.setitem(toy_source.WEIGHTS, "toy", weights / "good")

    def main(*args):
        return run_here(generate, ("--config", "toy", *args), monkeypatch, capsys)

    return main


def play(path):
    """Decode a film: -> pictures (P, H, W, 3), samples (n,), codec names."""
    with av.open(str(path)) as film:
        pictures = [f.to_ndarray(format="rgb24") for f in film.decode(video=0)]
    with av.open(str(path)) as film:
        names = [film.streams.video[0].codec.name, film.streams.audio[0].codec.name]
        samples = [f.to_ndarray()[0] for f in film.decode(audio=0)]
    return np.stack(pictures), np.concatenate(samples), names


def correlation(x, y):
    return np.corrcoef(np.ravel(x), np.ravel(y))[0, 1]


def left_in(folder):
    return sorted(p.name for p in folder.iterdir())


# ---- the files ----


def test_a_film_of_n_seconds_has_24_n_plus_1_frames_and_n_seconds_of_sound(run, tmp_path):
    """H.264 of 320 x 320, AAC, mono, 24 kHz; the only other file is the contact sheet."""
    status, _, _ = run("--seconds", 3)
    assert status == 0 and left_in(tmp_path) == ["out.mp4", "out.png"]
    pictures, samples, names = play("out.mp4")
    assert names == ["h264", "aac"] and pictures.shape == (73, 320, 320, 3)
    # AAC comes in packets of 1024 samples, one of them ahead
    assert 3 * 24000 <= len(samples) <= 3 * 24000 + 3 * 1024
    with av.open("out.mp4") as film:
        assert float(film.streams.video[0].average_rate) == 24
        assert film.streams.audio[0].rate == toy_codec.SAMPLE_RATE
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")


def test_the_film_shows_and_sounds_what_was_generated(run):
    """Pictures and sound of the file equal the decoded blocks, up to the loss of the codecs."""
    run("--seconds", 2, "--seed", 4, "--prompt", "blue slow wood")
    net = toy_source.load_student(toy_source.WEIGHTS["toy"], SMALL)
    decoder = decoders.ToyDecoder(toy_codec.load(SMALL))
    pieces = map(decoder.decode, generate.stream(net, "blue slow wood", 2, seed=4))
    frames, _, samples = zip(*pieces)
    frames, samples = torch.cat(frames), torch.cat(samples, 1)[0]
    pictures, heard, _ = play("out.mp4")
    shown = torch.from_numpy(pictures[:, 5::10, 5::10].copy()).permute(0, 3, 1, 2) / 255
    # H.264 stores colours more coarsely than brightness, and random pictures compress badly.
    same, backwards = (correlation(shown, x) for x in (frames, frames.flip(0)))
    assert same > 0.85 and same > backwards + 0.2
    assert float(shown.mean()) == pytest.approx(float(frames.mean()), abs=0.02)
    assert correlation(heard[:48000], samples) > 0.95


def test_output_is_a_line_a_block_and_a_summary(run):
    """Times of every block, then frames, TTFC, both speeds and memory, then the files."""
    _, out, err = run("--seconds", 2)
    *blocks, summary, files_written = out.splitlines()
    line = r"block +{} +{} - {} +s +passes +\d+ ms +decode +\d+ ms"
    for k, (low, high) in enumerate([(0, 0), (0, 1), (1, 2)]):
        assert re.fullmatch(line.format(k, low, high), blocks[k])
    assert len(blocks) == 3
    speed = r"passes \d+ FPS = \d+\.\dx real time, end to end \d+ FPS = \d+\.\dx"
    assert re.fullmatch(rf"49 frames: TTFC \d+\.\d\d s, {speed}, peak memory \d+ MB", summary)
    assert files_written == "wrote out.mp4 and out.png"
    assert "2/2 s" in err


def test_the_report_holds_the_timings(run, monkeypatch):
    """JSON with the times of every block, rates and medians."""
    monkeypatch.setattr(toy_source.StreamSource, "text_seconds", 2.5)  # as if the toy had to encode
    run("--seconds", 3, "--report", "report.json")
    report = json.loads(Path("report.json").read_text())
    assert report["frames"] == 73
    how = {"config": "toy", "device": "cpu", "dtype": "float32", "window": 4, "passes_a_block": 4}
    assert report.items() >= how.items() and report["torch"] == torch.__version__
    assert len(report["passes_seconds"]) == len(report["decoding_seconds"]) == 4
    assert report["median_block_seconds"] in report["passes_seconds"][2:]
    assert report["passes_fps"] == pytest.approx(73 / sum(report["passes_seconds"]))
    assert report["passes_times_real_time"] == pytest.approx(report["passes_fps"] / 24)
    assert report["end_to_end_fps"] < report["passes_fps"]
    assert 0 < report["ttfc_passes_seconds"] < report["ttfc_seconds"]
    assert report["ttfc_seconds"] < 73 / report["end_to_end_fps"]
    assert report["text_seconds"] == 2.5
    assert report["ttfc_with_text_seconds"] == report["ttfc_seconds"] + 2.5
    assert report["written_seconds"] == sorted(report["written_seconds"])
    assert report["stage_seconds"]["write"] < report["written_seconds"][-1]
    assert report["ended_by"] == []


@pytest.mark.parametrize("steps", [1, 3])
def test_a_block_is_timed_as_its_passes_and_a_refresh(run, monkeypatch, steps):
    """The stopwatch is told how many passes of a block are no refresh."""
    told = []
    monkeypatch.setattr(generate.Stopwatch, "watch_passes", lambda *given: told.append(given[-1]))
    run("--seconds", 1, "--steps", steps)
    assert told == [steps]


def test_the_page_holds_the_film(run):
    """--html writes one file that contains the bytes of the film."""
    _, out, _ = run("--seconds", 2, "--html", "page.html")
    film = base64.b64encode(Path("out.mp4").read_bytes()).decode()
    assert film in Path("page.html").read_text() and out.endswith("out.png and page.html\n")


def test_the_page_shows_the_passes_and_leaves_the_film_alone(run):
    """A picture for every block; the film is that of a run without a page."""
    run("--seconds", 2, "--html", "page.html", "--out", "a.mp4")
    run("--seconds", 2, "--out", "b.mp4")
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    data = json.loads(re.search(r"const data = (.*?);\n", Path("page.html").read_text())[1])
    strips = [base64.b64decode(strip.partition("base64,")[2]) for strip in data["strips"]]
    assert len({*strips}) == 3 and all(strip.startswith(b"\x89PNG") for strip in strips)


def test_the_same_seed_gives_the_same_bytes(run):
    """Film and sheet are equal byte by byte; another seed gives another film."""
    run("--seconds", 1, "--out", "a.mp4")
    run("--seconds", 1, "--out", "b.mp4")
    run("--seconds", 1, "--out", "c.mp4", "--seed", 1)
    a, b, c = (Path(f"{x}.mp4").read_bytes() for x in "abc")
    assert a == b != c
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize("more", [("--window", "1"), ("--steps", "2"), ("--prompt", "blue")])
def test_window_steps_and_prompt_matter(run, more):
    """Each of these options changes the film."""
    run("--seconds", 3, "--out", "a.mp4")
    run("--seconds", 3, "--out", "b.mp4", *more)
    assert Path("a.mp4").read_bytes() != Path("b.mp4").read_bytes()


def test_a_long_stream_draws_its_first_minute_only(run, monkeypatch):
    """The contact sheet stops at SHEET_SECONDS (here 2), the film goes on."""
    monkeypatch.setattr(writer, "SHEET_SECONDS", 2)
    drawn = []
    monkeypatch.setattr(sheet, "draw_clip", lambda *args: drawn.append(args))
    monkeypatch.setattr(sheet, "save", lambda *args: None)
    run("--seconds", 4)
    assert len(drawn[0][0]) == 49 and len(drawn[0][1]) == 201
    assert len(play("out.mp4")[0]) == 97


def test_a_flash_and_a_click_are_in_time(tmp_path):
    """At 500 ms they are played at 500 ms, the click within 5 ms: no encoder delay is left."""
    movie = Movie(tmp_path / "click.mp4", (32, 32), 24, 24000)
    pictures, samples = torch.zeros(25, 3, 32, 32), np.zeros((1, 24000), np.float32)
    pictures[12], samples[0, 12000:12024] = 1, 0.9
    movie.add(*writer.to_planes(pictures, halve=True), samples)
    movie.close()
    with av.open(str(movie.path)) as film:
        shown = [(f.to_ndarray(format="rgb24").mean(), f.time) for f in film.decode(video=0)]
    with av.open(str(movie.path)) as film:
        heard = [(f.time, np.abs(f.to_ndarray()[0])) for f in film.decode(audio=0)]
    start, loudest = max(heard, key=lambda packet: packet[1].max())
    assert max(shown)[1] == pytest.approx(0.5, abs=1e-3)
    assert start + loudest.argmax() / 24000 == pytest.approx(0.5, abs=0.005)
    assert [t for _, t in shown] == pytest.approx([p / 24 for p in range(25)], abs=1e-3)


@pytest.mark.parametrize("scale", [1, 3])
def test_a_film_has_the_colours_of_its_frames(tmp_path, scale):
    """Red, green, blue, grey and others, in patches; a player is told how they are stored."""
    patches = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5], [1, 0.8, 0.1]])
    frames = patches.T.repeat_interleave(16, 1).expand(2, 32, 3, 80).transpose(1, 2)
    movie = Movie(tmp_path / "colours.mp4", (32, 80), 24, 24000, scale=scale)
    movie.add(*writer.to_planes(frames, halve=scale == 1), np.zeros((1, 2000), np.float32))
    movie.close()
    with av.open(str(movie.path)) as film:
        about = film.streams.video[0].codec_context
        shown = next(film.decode(video=0)).to_ndarray(format="rgb24")
    assert (about.colorspace, about.color_range) == (5, 1)  # BT.601, from 16 to 235
    middles = shown[16 * scale, 8 * scale :: 16 * scale] / 255
    np.testing.assert_allclose(middles, patches, atol=0.03)


def test_blocks_decode_to_their_own_seconds(weights):
    """Block 0 gives one frame and no sound, later blocks give 24 frames and 24000 samples."""
    net = toy_source.load_student(weights / "good", SMALL)
    decoder = decoders.ToyDecoder(toy_codec.load(SMALL))
    pieces = [*map(decoder.decode, generate.stream(net, "red", 3)), decoder.finish()]
    sizes = [(len(p.frames), len(p.levels), *p.samples.shape) for p in pieces]
    assert sizes == [(1, 1, 1, 0)] + 3 * [(24, 100, 1, 24000)] + [(0, 0, 1, 0)]


# ---- the prompt ----


def blocks_of(net, *cues, seconds=4):
    return list(generate.stream(net, [generate.Cue(*c) for c in cues], seconds))


def test_a_prompt_switch_changes_only_what_comes_after_it(weights):
    """At second 2: blocks 0 to 2 (which end at 2) are bitwise equal, 3 and 4 are not."""
    net = toy_source.load_student(weights / "good", SMALL)
    plain = blocks_of(net, (0, "red fast metal"))
    switched = blocks_of(net, (0, "red fast metal"), (2, "blue slow wood"))
    same = [all(map(torch.equal, a[1:], b[1:])) for a, b in zip(plain, switched)]
    assert same == [True, True, True, False, False]


def test_a_switch_inside_a_block_waits_for_the_next(weights):
    """At second 1.5: block 2 begins at 1 and has the old prompt, block 3 has the new one."""
    net = toy_source.load_student(weights / "good", SMALL)
    plain = blocks_of(net, (0, "red fast metal"), seconds=3)
    switched = blocks_of(net, (0, "red fast metal"), (1.5, "blue slow wood"), seconds=3)
    same = [all(map(torch.equal, a[1:], b[1:])) for a, b in zip(plain, switched)]
    assert same == [True, True, True, False]


def test_a_switch_to_the_same_words_is_none(weights):
    """Neither the order of the words nor the number of cues matters."""
    net = toy_source.load_student(weights / "good", SMALL)
    plain = blocks_of(net, (0, "red fast"))
    switched = blocks_of(net, (0, "red fast"), (2, "fast red"))
    assert all(all(map(torch.equal, a[1:], b[1:])) for a, b in zip(plain, switched))


def test_blocks_come_one_by_one(weights):
    """The stream is a generator: it computes a block when the block is requested."""
    net = toy_source.load_student(weights / "good", SMALL)
    passes = []
    net.register_forward_pre_hook(lambda *_: passes.append(1))
    stream = generate.stream(net, "red", 3600)
    assert not passes
    next(stream)
    assert len(passes) == 4


def test_clips_side_by_side_have_seeds_of_their_own(weights):
    """In a batch of two from seed 3, clip 0 is the clip of seed 3 alone, clip 1 that of seed 4."""
    net = toy_source.load_student(weights / "good", SMALL)
    both = list(generate.stream(net, "red", 2, seed=3, batch=2))
    for row in (0, 1):
        for block, alone in zip(both, generate.stream(net, "red", 2, seed=3 + row), strict=True):
            for x, y in zip(block[1:], alone[1:]):  # larger products may round differently
                torch.testing.assert_close(x[row : row + 1], y, atol=1e-5, rtol=0)
    assert not torch.allclose(*both[0].video, atol=0.1)


@pytest.mark.parametrize(
    "prompts, message",
    [
        (["5: red"], 'the first prompt begins at second 5, not at 0; if .* write "0: 5: ..."'),
        (["red", "0: blue"], 'two prompts begin at the same second; expected "5: text"'),
        (["red", "7: blue"], 'a prompt begins at second 7 of 5; if .* write "0: 5: ..."'),
        (["red", "5: blue"], "a prompt begins at second 5 of 5"),
        (["red", f"{'9' * 400}: blue"], "a prompt begins at second inf of 5"),
        (["red", "2:"], "says nothing"),
        (["red", "2: "], "says nothing"),
        (["red", "2:blue"], "unknown word '2:blue'"),
        (["red", "-1: blue"], "unknown word '-1:'"),
        (["red", "1.2.3: blue"], "1.2.3"),
    ],
)
def test_impossible_cues_are_refused(prompts, message):
    """Every prompt needs words and a second of its own within the clip."""
    with pytest.raises(ValueError, match=message):
        generate.parse_cues(prompts, 5)


TEXTS = "16:9 shot", "12:30 at night", "2:rain", "1 : 1", "-1: x", ".5: x", "1e1: x", "1.2.3: x"


@pytest.mark.parametrize("text", [*TEXTS, "", ":", "at 3: rain", "3：雨", *NASTY.values()])
def test_any_text_is_a_prompt(text):
    """Only a number, a colon and white space change the prompt; "0: " keeps even those as text."""
    words = text.strip()
    assert generate.parse_cues([text], 5, str) == [(0, words)]
    assert generate.parse_cues([f"0: {text}"], 5, str) == [(0, words)]
    assert generate.parse_cues([f"0: 3: {text}"], 5, str) == [(0, f"3: {words}".strip())]
    assert generate.parse_cues([text, f" 3.5:\t{text}"], 5, str) == [(0, words), (3.5, words)]


@pytest.mark.parametrize("blocks", [5, 10**12])
@pytest.mark.parametrize("cfg", [SMALL, config.TOY_RELEASED], ids=lambda cfg: cfg.name)
def test_a_prompt_is_used_if_a_block_starts_between_it_and_the_next(cfg, blocks):
    """As going through all blocks says, but a stream of many years is checked at once, too."""
    draw, refused = random.Random(0), 0
    for _ in range(200):
        later = sorted(draw.sample(range(1, 50), draw.randint(0, 4)))
        cues = [generate.Cue(second / 10, "red") for second in (0, *later)]
        starts = [block_interval(k, cfg)[0] for k in range(min(blocks, 7))]
        used = {generate.prompt_at(start, cues) for start in starts}
        try:
            generate.check_prompts_used(cues, blocks, cfg)
        except ValueError as error:
            unused = min(set(range(len(cues))) - used)
            assert f"no block uses the prompt at second {cues[unused].seconds:g}:" in str(error)
            refused += 1
        else:
            assert len(used) == len(cues)
    assert 20 < refused < 180


@pytest.mark.parametrize("words", NASTY.values(), ids=NASTY.keys())
def test_any_prompt_gives_a_film_a_sheet_and_a_page(run, monkeypatch, words):
    """With a reader of any text, as at full size: status 0, and nothing on stderr but the bar."""
    features = toy_source.toy_features("red")
    monkeypatch.setattr(toy_source, "toy_features", lambda _: features)
    monkeypatch.setattr(toy_source.StreamSource, "read", lambda self, _: features)
    args = "--prompt", words, "--prompt", f"1: {words}", "--seconds", 2, "--html", "page.html"
    status, out, err = run(*args)
    assert status == 0 and out.endswith("wrote out.mp4 and out.png and page.html\n")
    assert re.fullmatch(r"(\s*video [012]/2 s[ █▏▎▍▌▋▊▉]*)*\s*", err)
    assert "</script></body></html>" in Path("page.html").read_text("utf-8")


def test_the_page_of_a_stream_that_ended_early_is_as_long_as_the_film(run, monkeypatch):
    """Three blocks of 601 are there: two seconds."""
    stream = generate.stream
    monkeypatch.setattr(generate, "stream", lambda *a, **options: islice(stream(*a, **options), 3))
    run("--seconds", 600, "--html", "page.html")
    page = Path("page.html").read_text("utf-8")
    assert '"seconds": 2.0' in page and '"blocks": [[0.0, 0.0], [0.0, 1.0], [1.0, 2.0]]' in page


@pytest.mark.parametrize("cfg", ["toy", "toy_released"])
def test_a_page_shows_an_eviction_unless_told_otherwise(cfg):
    """A film is 5 seconds long, in which toy evicts nothing; with --html 10; --seconds decides."""

    def request(*args):
        return generate.check_args(generate.options().parse_args(["--config", cfg, *args]))

    page = "--html", "x.html"
    plain, long, short = request(), request(*page), request(*page, "--seconds", "1")
    assert [plain.seconds, long.seconds, short.seconds] == [5, 10, 1]
    assert long.window < full_window(long.num_blocks)
    assert cfg == "toy_released" or full_window(plain.num_blocks) <= plain.window


@pytest.mark.parametrize("cfg, window", [("toy", 4), ("toy_released", 1)])
def test_the_default_window_is_that_of_the_training(cfg, window):
    """Stage III of the shipped students: --window 4 (default), and --window 1."""
    request = generate.check_args(generate.options().parse_args(["--config", cfg]))
    command = files.read_weights(toy_source.WEIGHTS[cfg])[2]["command"]
    assert request.window == window and ("--window 1" in command) == (window == 1)


# ---- errors ----

BAD = {
    "unknown word": (["--prompt", "purple"], "red green blue yellow, slow fast, wood metal"),
    "unknown word later": (["--prompt", "red", "--prompt", "2: dog"], "unknown word 'dog'; known"),
    "empty prompt": (["--prompt", ""], "--prompt is empty; see --help"),
    "blank prompt": (["--prompt", " \t"], "says nothing; use some of: red green"),
    "bytes": (["--prompt", "caf\udce9"], "unknown word 'caf\\udce9'; known"),
    "seconds 0": (["--seconds", "0"], "--seconds 0: expected"),
    "seconds -1": (["--seconds", "-1"], "--seconds -1: expected"),
    "seconds 2.5": (["--seconds", "2.5"], "2.5 seconds end inside a block"),
    "seconds abc": (["--seconds", "abc"], "--seconds abc: expected a whole number of seconds"),
    "seconds nan": (["--seconds", "nan"], "--seconds nan: expected"),
    "unknown config": (["--config", "huge"], "--config huge: unknown; expected one of toy"),
    "no student": (
        ["--config", "toy_teacher"],
        "--config toy_teacher: not a student; expected toy, toy_released, full",
    ),
    "no weights": (["--weights", "none"], "none: no such file"),
    "truncated": (["--weights", "{}/truncated"], "truncated: not a whole safetensors file"),
    "no safetensors": (["--weights", "{}/text"], "text: not a whole safetensors file"),
    "foreign": (["--weights", "{}/foreign"], "foreign: its metadata has no config"),
    "other config": (
        ["--weights", "{}/other_config"],
        "num_sinks=8; --config toy needs num_sinks=16",
    ),
    "another tensor": (["--weights", "{}/another_tensor"], "tensor more is unexpected"),
    "NaN": (["--weights", "{}/nan"], "nan: tensor video.table holds NaN or infinity"),
    "no folder": (["--out", "no/such/out.mp4"], "does not exist; create it first"),
    "folder as film": (["--out", "."], "expected a name that ends in .mp4"),
    "folder as report": (["--report", "."], "expected a name that ends in .json"),
    "page nowhere": (["--html", "no/page.html"], "no/page.html: folder "),
    "sheet as film": (["--out", "out.png"], "out.png: expected a name that ends in .mp4"),
    "cuda": (["--device", "cuda"], "--device cuda: not usable here"),
    "unknown device": (["--device", "tpu9"], "--device tpu9: not usable here"),
    "meta device": (["--device", "meta"], "--device meta: not usable here"),
    "steps 9": (["--steps", "9"], "9 steps: the student was trained on 4; expected 1 to 4"),
    "steps 0": (["--steps", "0"], "--steps 0: expected a whole number from 1 to 1000"),
    "window 0": (["--window", "0"], "--window 0: expected a whole number from 1 to 86400"),
    "unknown flag": (["--fast"], "unrecognized arguments: --fast; see --help"),
    "seconds without a block": (
        ["--prompt", "red", "--prompt", "4.5: blue"],
        "no block uses the prompt at second 4.5: a block begins every 1 s, the last at 4",
    ),
    "prompt between blocks": (
        ["--prompt", "red", "--prompt", "1.2: blue", "--prompt", "1.8: green"],
        "no block uses the prompt at second 1.2",
    ),
    "page as film": (["--html", "out.mp4"], "expected a name that ends in .html"),
    "report as sheet": (["--report", "out.png"], "expected a name that ends in .json"),
    "decoders": (["--ltx2", "LTX-2"], "--ltx2 LTX-2: not used by --config toy; leave --ltx2 out"),
    "video context": (["--video-context", "4"], "--video-context 4: not used by --config toy"),
    "look-ahead": (["--video-look-ahead", "0"], "--video-look-ahead 0: not used by --config toy"),
    "negative seed": (["--seed", "-1"], "--seed -1: expected a whole number from 0 to 4294967295"),
    "long seed": (["--seed", str(2**32)], "expected a whole number from 0 to 4294967295"),
    "seed": (["--seed", "x"], "--seed x: expected a whole number from 0"),
    "speed-up": (["--speed-up", "x"], "--speed-up x: unknown; expected all, graph, "),
    "graph": (["--speed-up", "graph"], "--speed-up graph needs a GPU; leave it out"),
    "all speed-ups": (["--speed-up", "all"], "--speed-up all needs a GPU; leave it out"),
    "dtype": (["--dtype", "int8"], "invalid choice: 'int8'"),
}


@pytest.mark.parametrize("args, message", BAD.values(), ids=BAD.keys())
def test_bad_input_ends_in_one_line_and_leaves_no_file(run, weights, tmp_path, args, message):
    """Exit status 2, one line that names the value and what was expected; an old film stays."""
    if "cuda" in args and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    Path("out.mp4").write_bytes(OLD)
    status, out, err = run(*(a.format(weights) for a in args))
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and err.endswith("\n") and err.startswith("generate.py: ")
    assert message in err
    assert left_in(tmp_path) == ["out.mp4"] and Path("out.mp4").read_bytes() == OLD


def test_missing_shipped_weights_are_named(run, monkeypatch, tmp_path):
    """Without the file of the default student, the message names it."""
    monkeypatch.setitem(toy_source.WEIGHTS, "toy", tmp_path / "student.safetensors")
    status, _, err = run()
    assert status == 2 and "student.safetensors: no such file" in err and err.count("\n") == 1


# ---- real processes ----


@pytest.fixture(scope="module")
def toy_weights(tmp_path_factory):
    """The file of a random student of the toy's size."""
    path = tmp_path_factory.mktemp("toy") / "student.safetensors"
    files.save_weights(path, model.build(config.TOY).state_dict(), config.TOY, {})
    return path


def test_generate_runs_from_any_folder(toy_weights, tmp_path):
    """`python path/to/generate.py` needs nothing but its arguments."""
    command = [sys.executable, ROOT / "generate.py", "--config", "toy", "--seconds", "1"]
    command += ["--weights", toy_weights]
    out = subprocess.check_output([*command, "--out", "x.mp4"], cwd=tmp_path, text=True)
    assert out.splitlines()[-1] == "wrote x.mp4 and x.png"
    assert left_in(tmp_path) == ["x.mp4", "x.png"]
    assert len(play(tmp_path / "x.mp4")[0]) == 25


# ---- help and loading ----


def test_help_documents_every_option(run, monkeypatch):
    """Each option has a sentence, and the module's own text stands above them."""
    parsers, make = [], cli.parser
    monkeypatch.setattr(cli, "parser", lambda doc: parsers.append(make(doc)) or parsers[-1])
    status, out, _ = run("--help")
    assert status == 0 and generate.__doc__.splitlines()[0] in out
    options = [a for a in parsers[0]._actions if a.option_strings]
    assert len(options) == 24
    for action in options:
        assert action.help and action.option_strings[-1] in out, action.option_strings


def test_a_student_is_loaded_as_it_was_saved(weights):
    """Every tensor equals the tensor in the file, converted to the requested dtype."""
    tensors, _, _ = files.read_weights(weights / "good")
    net = toy_source.load_student(weights / "good", SMALL, dtype=torch.bfloat16)
    assert not net.training
    for name, t in net.state_dict().items():
        assert torch.equal(t, tensors[name].bfloat16())


def test_the_vocabulary_of_the_help_is_that_of_the_world():
    """All eight words stand in the module's text."""
    assert all(word in generate.__doc__ for word in toy_world.VOCABULARY)
