"""Streaming from the command line: files, prompts, errors, and files after a kill.

Most tests run in this process, with a tiny random student in place of the toy's student. Where a
signal must end a process, the test starts a real one, with a random student of the toy's size.
"""

import base64
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers import random_model, run_here
from safetensors.torch import save_file

import config
import generate
import model
from film import decoders
from film.mp4 import Movie
from full_size import faster
from plumbing import cli, files
from toy import codec as toy_codec
from toy import source as toy_source
from toy import world as toy_world

ROOT = Path(generate.__file__).parent
SMALL = replace(config.TOY, num_layers=1, num_heads=2, video_width=16, audio_width=16)
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
        return run_here(generate, args, monkeypatch, capsys)

    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield main
    for s, handler in handlers.items():
        signal.signal(s, handler)


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
    line = r"block +{} +{} - {} +s +passes +\d+ ms +decode and write +\d+ ms"
    for k, (low, high) in enumerate([(0, 0), (0, 1), (1, 2)]):
        assert re.fullmatch(line.format(k, low, high), blocks[k])
    assert len(blocks) == 3
    speed = r"passes \d+ FPS = \d+\.\dx real time, end to end \d+ FPS = \d+\.\dx"
    assert re.fullmatch(rf"49 frames: TTFC \d+\.\d\d s, {speed}, peak memory \d+ MB", summary)
    assert files_written == "wrote out.mp4 and out.png"
    assert "2/2 s" in err


def test_the_report_holds_the_timings(run):
    """JSON with the times of every block, rates and medians."""
    run("--seconds", 3, "--report", "report.json")
    report = json.loads(Path("report.json").read_text())
    assert report["frames"] == 73
    how = {"config": "toy", "device": "cpu", "dtype": "float32", "window": 4, "passes_a_block": 4}
    assert report.items() >= how.items() and report["torch"] == torch.__version__
    assert len(report["passes_seconds"]) == len(report["output_seconds"]) == 4
    assert report["median_block_seconds"] in report["passes_seconds"][2:]
    assert report["passes_fps"] == pytest.approx(73 / sum(report["passes_seconds"]))
    assert report["passes_times_real_time"] == pytest.approx(report["passes_fps"] / 24)
    assert report["end_to_end_fps"] < report["passes_fps"]
    assert 0 < report["ttfc_passes_seconds"] < report["ttfc_seconds"]
    assert report["ttfc_seconds"] < 73 / report["end_to_end_fps"]
    assert report["ttfc_with_text_seconds"] == report["ttfc_seconds"] + report["text_seconds"]
    assert report["stage_seconds"]["write"] < max(report["output_seconds"])


def test_the_page_holds_the_film(run):
    """--html writes one file that contains the bytes of the film."""
    _, out, _ = run("--seconds", 2, "--html", "page.html")
    film = base64.b64encode(Path("out.mp4").read_bytes()).decode()
    assert film in Path("page.html").read_text() and out.endswith("out.png and page.html\n")


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
    monkeypatch.setattr(generate, "SHEET_SECONDS", 2)
    drawn = []
    monkeypatch.setattr(generate.sheet, "draw_clip", lambda *args: drawn.append(args))
    monkeypatch.setattr(generate.sheet, "save", lambda *args: None)
    run("--seconds", 4)
    assert len(drawn[0][0]) == 49 and len(drawn[0][1]) == 201
    assert len(play("out.mp4")[0]) == 97


def test_a_flash_and_a_click_are_in_time(tmp_path):
    """At 500 ms they are played at 500 ms, the click within 5 ms: no encoder delay is left."""
    movie = Movie(tmp_path / "click.mp4", (32, 32), 24, 24000)
    pictures, samples = np.zeros((25, 32, 32, 3), np.uint8), np.zeros((1, 24000), np.float32)
    pictures[12], samples[0, 12000:12024] = 255, 0.9
    movie.add(pictures, samples)
    movie.close()
    with av.open(str(movie.path)) as film:
        shown = [(f.to_ndarray(format="rgb24").mean(), f.time) for f in film.decode(video=0)]
    with av.open(str(movie.path)) as film:
        heard = [(f.time, np.abs(f.to_ndarray()[0])) for f in film.decode(audio=0)]
    start, loudest = max(heard, key=lambda packet: packet[1].max())
    assert max(shown)[1] == pytest.approx(0.5, abs=1e-3)
    assert start + loudest.argmax() / 24000 == pytest.approx(0.5, abs=0.005)
    assert [t for _, t in shown] == pytest.approx([p / 24 for p in range(25)], abs=1e-3)


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
    plain, switched = (
        blocks_of(net, (0, "red fast")),
        blocks_of(net, (0, "red fast"), (2, "fast red")),
    )
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


def test_clips_side_by_side_differ_in_their_noise(weights):
    """batch=2 gives two different streams of the same prompt."""
    net = toy_source.load_student(weights / "good", SMALL)
    block = next(generate.stream(net, "red", 1, batch=2))
    assert len(block.video) == 2 and not torch.equal(*block.video)


@pytest.mark.parametrize(
    "prompts, message",
    [
        (["5: red"], "the first prompt begins at second 5; one must begin at 0"),
        (["red", "0: blue"], "two prompts begin at the same second"),
        (["red", "7: blue"], "a prompt begins at second 7, the clip ends at 5"),
        (["red", "2:"], "says nothing"),
        (["red", "-1: blue"], "unknown word '-1:'"),
        (["red", "1.2.3: blue"], "1.2.3"),
    ],
)
def test_impossible_cues_are_refused(prompts, message):
    """Every prompt needs words and a second of its own within the clip."""
    with pytest.raises(ValueError, match=message):
        generate.parse_cues(prompts, 5)


# ---- errors ----

BAD = {
    "unknown word": (["--prompt", "purple"], "red green blue yellow, slow fast, wood metal"),
    "unknown word later": (["--prompt", "red", "--prompt", "2: dog"], "unknown word 'dog'; known"),
    "empty prompt": (["--prompt", ""], "says nothing; use some of: red green"),
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
    "folder as film": (["--out", "."], "not writable; choose another place"),
    "folder as report": (["--report", "."], "not writable; choose another place"),
    "page nowhere": (["--html", "no/page.html"], "no/page.html: folder "),
    "sheet as film": (["--out", "out.png"], "out.png: expected a name that ends in .mp4"),
    "cuda": (["--device", "cuda"], "--device cuda: not usable here"),
    "unknown device": (["--device", "tpu9"], "--device tpu9: not usable here"),
    "meta device": (["--device", "meta"], "--device meta: not usable here"),
    "steps 9": (["--steps", "9"], "9 steps: the student was trained on 4; expected 1 to 4"),
    "steps 0": (["--steps", "0"], "0 steps: the student was trained on"),
    "window 0": (["--window", "0"], "--window 0: expected 1 or more"),
    "unknown flag": (["--fast"], "unrecognized arguments: --fast; see --help"),
    "seconds without a block": (
        ["--prompt", "red", "--prompt", "4.5: blue"],
        "no block uses the prompt at second 4.5: a block begins every 1 s, the last at 4",
    ),
    "prompt between blocks": (
        ["--prompt", "red", "--prompt", "1.2: blue", "--prompt", "1.8: green"],
        "no block uses the prompt at second 1.2",
    ),
    "page as film": (["--html", "out.mp4"], "expected different files"),
    "report as sheet": (["--report", "out.png"], "expected different files"),
    "decoders": (["--ltx2", "LTX-2"], "--ltx2 LTX-2: not used by --config toy; leave --ltx2 out"),
    "negative seed": (["--seed", "-1"], "--seed -1: expected 0 or more"),
    "long seed": (["--seed", "9" * 30], "expected 0 or more, and less than 2^63"),
    "seed": (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
    "speed-up": (["--speed-up", "x"], "--speed-up x: unknown; expected all, qkv, graph, "),
    "graph": (["--speed-up", "qkv", "graph"], "--speed-up graph needs a GPU; leave it out"),
    "channels": (["--speed-up", "channels-last"], "needs a full-size config"),
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


def test_a_failure_in_the_middle_leaves_the_old_film(run, monkeypatch, tmp_path):
    """A full disk at block 2: one line, no half film; the old film stays."""
    add = Movie.add

    def full(movie, frames, samples):
        if movie.frames > 1:
            raise OSError("No space left on device")
        add(movie, frames, samples)

    monkeypatch.setattr(Movie, "add", full)
    Path("out.mp4").write_bytes(OLD)
    status, _, err = run("--seconds", 3)
    assert status == 2 and err.splitlines()[-1] == "generate.py: No space left on device"
    assert left_in(tmp_path) == ["out.mp4"] and Path("out.mp4").read_bytes() == OLD


# ---- interruptions ----


def interrupt_after(monkeypatch, blocks):
    """Send Ctrl-C while block number `blocks` is being computed."""
    stream = generate.stream

    def interrupted(*args, **how):
        for block in stream(*args, **how):
            if block.index == blocks:
                signal.raise_signal(signal.SIGINT)
            yield block

    monkeypatch.setattr(generate, "stream", interrupted)


@pytest.mark.filterwarnings("error")  # they would stand on stderr
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_ctrl_c_keeps_every_finished_block(run, monkeypatch, tmp_path, blocks):
    """Even after block 0 alone: a playable film, its sheet, and a message."""
    interrupt_after(monkeypatch, blocks)
    status, out, err = run("--seconds", 600)
    frames = 24 * (blocks - 1) + 1
    assert status == 0 and f"interrupted: {frames} frames are kept" in err
    assert f"\n{frames} frames: " in out
    assert left_in(tmp_path) == ["out.mp4", "out.png"]
    with av.open("out.mp4") as film:
        assert sum(1 for _ in film.decode(video=0)) == frames


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_block_is_written_waits_for_its_end(run, monkeypatch, kind):
    """No half second: the block being written is finished, the next one not begun."""
    kron, calls = np.kron, []

    def kron_or_signal(*args):
        calls.append(1)
        if len(calls) == 30:  # in the middle of block 2
            signal.raise_signal(kind)
        return kron(*args)

    monkeypatch.setattr(np, "kron", kron_or_signal)
    status, _, err = run("--seconds", 600)
    assert status == 0 and "interrupted: 49 frames are kept" in err
    pictures, samples, _ = play("out.mp4")
    assert len(pictures) == 49 and 48000 <= len(samples) <= 48000 + 3 * 1024


def test_ctrl_c_before_the_first_block_writes_nothing(run, monkeypatch, tmp_path):
    """The error is one line, and an old film stays."""
    interrupt_after(monkeypatch, 0)
    Path("out.mp4").write_bytes(OLD)
    status, _, err = run("--seconds", 600)
    assert status == 2 and err.splitlines()[-1].endswith("nothing was written")
    assert left_in(tmp_path) == ["out.mp4"] and Path("out.mp4").read_bytes() == OLD


# ---- real processes ----


@pytest.fixture(scope="module")
def toy_weights(tmp_path_factory):
    """The file of a random student of the toy's size."""
    path = tmp_path_factory.mktemp("toy") / "student.safetensors"
    files.save_weights(path, model.build(config.TOY).state_dict(), config.TOY, {})
    return path


def start(folder, *args):
    """Start `python generate.py ...` in a folder, with unbuffered output."""
    command = [sys.executable, "-u", str(ROOT / "generate.py"), *map(str, args)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes
    )


def wait_for_block(process, index):
    for line in process.stdout:
        if line.startswith(f"block {index:3}"):
            return
    raise AssertionError(process.stderr.read())


def test_sigterm_keeps_a_playable_film(toy_weights, tmp_path):
    """During a stream of 600 seconds: exit status 0, and all finished blocks."""
    process = start(tmp_path, "--seconds", 600, "--weights", toy_weights)
    wait_for_block(process, 2)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    kept = int(re.search(r"interrupted: (\d+) frames are kept", err)[1])
    pictures, samples, _ = play(tmp_path / "out.mp4")
    assert len(pictures) == kept >= 49 and kept % 24 == 1
    assert abs(len(samples) - 1000 * (kept - 1)) <= 3 * 1024
    assert left_in(tmp_path) == ["out.mp4", "out.png"]


def test_sigkill_leaves_a_playable_part_and_the_old_film(toy_weights, tmp_path):
    """out.partial.mp4 lacks at most its last half second; out.mp4 is unchanged."""
    (tmp_path / "out.mp4").write_bytes(OLD)
    process = start(tmp_path, "--seconds", 600, "--weights", toy_weights)
    wait_for_block(process, 3)
    process.kill()
    process.communicate(timeout=60)
    assert left_in(tmp_path) == ["out.mp4", "out.partial.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == OLD
    pictures, samples, _ = play(tmp_path / "out.partial.mp4")
    assert len(pictures) >= 73 - 12 and len(samples) >= 72000 - 12000


def test_generate_runs_from_any_folder(toy_weights, tmp_path):
    """`python path/to/generate.py` needs nothing but its arguments."""
    process = start(tmp_path, "--seconds", 1, "--weights", toy_weights, "--out", "x.mp4")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.splitlines()[-1] == "wrote x.mp4 and x.png"
    assert left_in(tmp_path) == ["x.mp4", "x.png"]
    assert len(play(tmp_path / "x.mp4")[0]) == 25


def test_a_faster_stream_is_the_same_but_for_rounding(weights):
    """With all speed-ups of a CPU, latents of order 1 agree within 1e-4 in float32."""
    net = toy_source.load_student(weights / "good", SMALL)
    plain = list(generate.stream(net, "red", 3, window=1))
    speedups = faster.find_speedups(["all"], config.TOY, torch.device("cpu"))
    assert speedups == ("qkv",)
    net = faster.sped_up(net, speedups, torch.device("cpu"))
    for one, other in zip(plain, generate.stream(net, "red", 3, window=1), strict=True):
        for x, y in zip(one[1:], other[1:]):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=0)


# ---- help and loading ----


def test_help_documents_every_option(run, monkeypatch):
    """Each option has a sentence, and the module's own text stands above them."""
    parsers, make = [], cli.parser
    monkeypatch.setattr(cli, "parser", lambda doc: parsers.append(make(doc)) or parsers[-1])
    status, out, _ = run("--help")
    assert status == 0 and generate.__doc__.splitlines()[0] in out
    options = [a for a in parsers[0]._actions if a.option_strings]
    assert len(options) == 15
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
