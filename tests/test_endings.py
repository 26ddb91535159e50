"""However a stream ends, the film of its finished blocks is kept, and one line says why it ended.

The streams run in this process, with a tiny random student. Where the process itself must end, the
test starts a real one.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, run_here, save_small_student

import config
import generate
from film import filming, mp4, page, sheet, writer
from film.decoders import Chunk
from film.mp4 import Movie
from model import OmniTransformer
from plumbing import files
from toy import source as toy_source

OLD = b"an older film"
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The file of a tiny random student."""
    return save_small_student(tmp_path_factory.mktemp("weights") / "student")


@pytest.fixture
def run(student, tmp_path, monkeypatch, capsys):
    """Run the command line in an empty folder: -> exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(config.CONFIGS, "toy", SMALL)
    monkeypatch.setitem(toy_source.WEIGHTS, "toy", student)
    before = {kind: signal.getsignal(kind) for kind in SIGNALS}
    for kind in SIGNALS:  # a shell may have started the tests with signals ignored
        signal.signal(kind, signal.default_int_handler)
    yield lambda *args: run_here(generate, ("--config", "toy", *args), monkeypatch, capsys)
    for kind, handler in before.items():
        assert signal.getsignal(kind) == signal.default_int_handler  # the stream put it back
        signal.signal(kind, handler)


def left_in(folder):
    return sorted(p.name for p in folder.iterdir())


def frames_of(path) -> int:
    with av.open(str(path)) as film:
        return sum(1 for _ in film.decode(video=0))


def seconds_in_head(path):
    """Duration that the head of an mp4 states, if the index of all frames is in it, too."""
    data = Path(path).read_bytes()
    kinds, place = [], 0
    while place < len(data):
        kinds.append(data[place + 4 : place + 8])
        place += int.from_bytes(data[place : place + 4], "big")
    assert kinds == [b"ftyp", b"moov", b"free", b"mdat"]
    head = data.index(b"mvhd") + 4
    scale, duration = np.frombuffer(data, ">u4", 2, head + 12)
    return duration / scale


def assert_kept(folder, film="out.mp4", sheet=True):
    """The film is whole, with its index, and nothing else is left but the sheet."""
    assert left_in(folder) == [film, *(["out.png"] if sheet else [])]
    frames = frames_of(folder / film)
    assert frames % 24 == 1 and seconds_in_head(folder / film) == pytest.approx(
        frames / 24, abs=1e-3
    )
    return frames


def break_at(monkeypatch, owner, name, call, error):
    """Let a function raise an error when it is called for the n-th time."""
    function, calls = getattr(owner, name), []

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)


# ---- the finished file ----


def test_a_finished_film_states_its_duration_and_can_be_sought(run, tmp_path):
    """The index of all frames is in its head; packets are those of the growing file."""
    assert run("--seconds", 4)[0] == 0
    assert assert_kept(tmp_path) == 97
    with av.open("out.mp4") as film:
        film.seek(3_000_000)  # microseconds
        assert next(film.decode(video=0)).time <= 3


def test_films_are_stereo_and_need_not_be_square(tmp_path):
    """Height, width and channels arrive in the file."""
    movie = Movie(tmp_path / "film.mp4", (64, 96), 24, 48000, channels=2)
    sound = np.stack([np.zeros(48000), np.sin(np.arange(48000) / 20)]).astype(np.float32)
    movie.add(*writer.to_planes(torch.zeros(24, 3, 64, 96), halve=True), sound)
    movie.close()
    with av.open(str(movie.path)) as film:
        assert (film.streams.video[0].height, film.streams.video[0].width) == (64, 96)
    with av.open(str(movie.path)) as film:
        heard = np.concatenate([f.to_ndarray() for f in film.decode(audio=0)], 1)
    assert abs(heard[0]).max() < 0.01 < 0.9 < abs(heard[1]).max()


def test_a_broken_fragment_is_cut_off(tmp_path):
    """Of a file that ends anywhere, whole fragments remain, and all of their frames."""
    movie = Movie(tmp_path / "film.mp4", (32, 32), 24, 24000)
    pictures = torch.rand(96, 3, 32, 32)
    movie.add(*writer.to_planes(pictures, halve=True), np.zeros((1, 96000), np.float32))
    movie.file.close()
    data, cut = movie.partial.read_bytes(), tmp_path / "cut.mp4"
    counts = []
    for end in range(0, len(data), len(data) // 40):
        cut.write_bytes(data[:end])
        counts.append(mp4.keep_whole_fragments(cut))
        assert cut.stat().st_size <= end
        assert counts[-1] == (frames_of(cut) if counts[-1] else 0)
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] > 80
    assert mp4.keep_whole_fragments(cut) == counts[-1]  # now it ends where a fragment ends


# ---- signals ----


def interrupt_after(monkeypatch, block, *kinds):
    """Send signals while a block is being computed."""
    stream = generate.stream

    def interrupted(*args, **how):
        for made in stream(*args, **how):
            if made.index == block:
                for kind in kinds:
                    signal.raise_signal(kind)
            yield made

    monkeypatch.setattr(generate, "stream", interrupted)


@pytest.mark.filterwarnings("error")  # they would stand on stderr
@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("block", [1, 3])
def test_a_signal_keeps_every_finished_block(run, monkeypatch, tmp_path, block, kind):
    """Even after block 0 alone: a film, its sheet, and a message on a line of its own."""
    interrupt_after(monkeypatch, block, kind)
    status, out, err = run("--seconds", 600)
    frames = 24 * (block - 1) + 1
    assert status == 0 and f"\ninterrupted: {frames} frames are kept in out.mp4\n" in err
    assert f"\n{frames} frames: " in out
    assert assert_kept(tmp_path) == frames


@pytest.mark.parametrize("kind", SIGNALS)
def test_a_signal_while_a_block_is_decoded_or_written_waits_for_its_end(run, monkeypatch, kind):
    """No half second: the block is finished, the next one not begun."""
    calls = []

    def to_planes_or_signal(frames, halve, to_planes=writer.to_planes):
        calls.append(1)
        if len(calls) == 3:  # block 2
            signal.raise_signal(kind)
            signal.raise_signal(kind)
        return to_planes(frames, halve)

    monkeypatch.setattr(writer, "to_planes", to_planes_or_signal)
    status, _, err = run("--seconds", 600)
    assert status == 0 and "interrupted: 49 frames are kept" in err
    assert frames_of("out.mp4") == 49


@pytest.mark.parametrize("seed", range(50))
def test_signals_at_any_moment_leave_a_whole_film(run, monkeypatch, tmp_path, seed):
    """Up to five signals of any kind, from the first pass to the last line; some runs break too."""
    draw = random.Random(seed)
    stream, senders = generate.stream, []

    def send():
        time.sleep(draw.uniform(0, 0.4))
        for _ in range(draw.randint(1, 5)):
            if not senders[0].is_over:
                os.kill(os.getpid(), draw.choice(SIGNALS))
            time.sleep(draw.choice([0, 1e-4, 1e-3, 0.01, 0.1]))

    def with_signals(*args, **how):
        senders.append(threading.Thread(target=send))
        senders[0].is_over = False
        senders[0].start()
        return stream(*args, **how)

    end = filming.StopRequest.__exit__

    def no_more_signals(self, *error):
        senders[0].is_over = True
        senders[0].join()
        end(self, *error)

    monkeypatch.setattr(filming.StopRequest, "__exit__", no_more_signals)
    monkeypatch.setattr(generate, "stream", with_signals)
    status, out, err = run("--seconds", 600)
    if "nothing was written" in err:
        assert status == 2 and left_in(tmp_path) == []
    else:
        assert status == 0 and f"interrupted: {assert_kept(tmp_path)} frames are kept" in err


def test_a_signal_before_the_first_block_leaves_the_old_film(run, monkeypatch, tmp_path):
    """The error is one line."""
    interrupt_after(monkeypatch, 0, signal.SIGINT)
    Path("out.mp4").write_bytes(OLD)
    status, _, err = run("--seconds", 600)
    assert status == 2 and err.splitlines()[-1].endswith("nothing was written")
    assert left_in(tmp_path) == ["out.mp4"] and Path("out.mp4").read_bytes() == OLD


def test_an_ignored_signal_stays_ignored(run, monkeypatch, tmp_path):
    """A stream under nohup survives the end of its terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt_after(monkeypatch, 1, signal.SIGHUP)
    assert run("--seconds", 3)[0] == 0 and assert_kept(tmp_path) == 73
    signal.signal(signal.SIGHUP, signal.default_int_handler)


# ---- errors ----

STAGES = {  # what breaks, at which call, and how many frames are kept
    "passes": (OmniTransformer, "forward", 5 * 3 + 2, 49),
    "decoding": ("decoder", "decode", 4, 49),
    "bytes": (writer, "to_planes", 4, 49),
    "writing": (Movie, "add", 4, 49),
    "end of decoding": ("decoder", "finish", 1, 97),
    "index": (mp4, "copy_with_index", 1, 97),
}
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines."),
    OSError(28, "No space left on device"),
    MemoryError(),
    KeyError("a bug"),
]


@pytest.mark.parametrize(
    "stage, error", [*zip(STAGES, 2 * ERRORS), *(("passes", error) for error in ERRORS[1:])]
)
def test_an_error_keeps_the_finished_blocks(run, monkeypatch, tmp_path, stage, error):
    """Exit status 2; the last line names the error and what is kept; there is a sheet."""
    owner, name, call, kept = STAGES[stage]
    owner = generate.toy_source.ToyDecoder if owner == "decoder" else owner
    break_at(monkeypatch, owner, name, call, error)
    status, _, err = run("--seconds", 4)
    last = err.splitlines()[-1]
    assert status == 2 and last.startswith(f"generate.py: {type(error).__name__}")
    assert last.endswith(f"; {kept} frames are kept in out.mp4")
    if stage != "index":
        assert assert_kept(tmp_path) == kept
    assert frames_of("out.mp4") == kept and left_in(tmp_path) == ["out.mp4", "out.png"]


@pytest.mark.parametrize("broken", [(sheet, "save"), (page, "write"), (files, "write_json")])
def test_an_error_after_the_film_keeps_the_film(run, monkeypatch, tmp_path, broken):
    """Each of sheet, page and report is said to have failed."""
    break_at(monkeypatch, *broken, 1, RuntimeError("broken"))
    status, _, err = run("--seconds", 1, "--html", "page.html", "--report", "report.json")
    assert status == 2 and err.endswith("RuntimeError: broken; 25 frames are kept in out.mp4\n")
    assert frames_of("out.mp4") == 25


def test_signals_after_an_error_do_not_cost_the_film(run, monkeypatch, tmp_path):
    """The passes break in block 3; a signal comes while the film is being finished."""
    close = Movie.close

    def close_or_signal(self):
        signal.raise_signal(signal.SIGINT)
        close(self)

    monkeypatch.setattr(Movie, "close", close_or_signal)
    break_at(monkeypatch, OmniTransformer, "forward", 5 * 3 + 2, MemoryError())
    status, _, err = run("--seconds", 4)
    assert status == 2 and "MemoryError" in err and "49 frames are kept" in err
    assert assert_kept(tmp_path) == 49


def test_an_error_in_the_first_block_leaves_the_old_film(run, monkeypatch, tmp_path):
    """Nothing half-written."""
    break_at(monkeypatch, OmniTransformer, "forward", 2, RuntimeError("broken"))
    Path("out.mp4").write_bytes(OLD)
    status, _, err = run("--seconds", 4)
    assert status == 2 and err.endswith("generate.py: RuntimeError: broken; nothing was written\n")
    assert left_in(tmp_path) == ["out.mp4"] and Path("out.mp4").read_bytes() == OLD


def test_a_full_disk_keeps_what_fits(run, tmp_path):
    """Here no file may become larger than 600 KB: a film of some seconds, and its sheet."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, before[1]))
    try:
        status, _, err = run("--seconds", 600)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    frames = frames_of("out.mp4")
    assert status == 2 and "File too large" in err
    assert err.endswith(f"; {frames} frames are kept in out.mp4\n")
    assert frames > 24 and left_in(tmp_path) == ["out.mp4", "out.png"]


@pytest.mark.parametrize("stream", ["video", "audio"])
@pytest.mark.parametrize("number", ["nan", "inf"])
def test_nan_and_infinity_end_the_stream_at_their_block(run, monkeypatch, tmp_path, stream, number):
    """The line names block and stream; the blocks before it are kept."""
    made = generate.stream

    def bad(*args, **how):
        for block in made(*args, **how):
            latents = getattr(block, stream).clone()
            latents.view(-1)[-1] = float(number)
            yield block._replace(**{stream: latents}) if block.index == 2 else block

    monkeypatch.setattr(generate, "stream", bad)
    status, _, err = run("--seconds", 9, "--report", "report.json")
    said = f"block 2 has NaN or infinity in its {stream} latents"
    assert status == 2 and err.endswith(f"generate.py: {said}; 25 frames are kept in out.mp4\n")
    report = Path("report.json")
    assert json.loads(report.read_text())["ended_by"] == [said]
    report.unlink()
    assert assert_kept(tmp_path) == 25


@pytest.mark.parametrize("part", ["frames", "samples"])
def test_nan_of_a_decoder_is_noticed(run, monkeypatch, part):
    """Also if the latents are fine."""
    decode = toy_source.ToyDecoder.decode

    @torch.inference_mode()
    def bad(self, block):
        chunk = decode(self, block)
        if block.index == 3:
            getattr(chunk, part).view(-1)[5] = float("nan")
        return chunk

    monkeypatch.setattr(toy_source.ToyDecoder, "decode", bad)
    status, _, err = run("--seconds", 9)
    assert status == 2 and f"block 3 has NaN or infinity in its {part}; 49 frames" in err


# ---- the writer ----


def test_the_model_waits_only_if_it_is_far_ahead():
    """While the writer is stuck, AHEAD blocks can be added; the next one waits."""
    may_go = threading.Event()
    movie = SimpleNamespace(add=lambda *_: may_go.wait(), frames=1, fps=24)
    slow = writer.Writer(movie, SimpleNamespace(block_written=lambda *_: None))
    chunk, added = Chunk(torch.zeros(0, 3, 8, 8), torch.zeros(0, 4), torch.zeros(1, 0)), []

    def add():
        for k in range(writer.AHEAD + 3):
            slow.add(writer.packet(f"block {k}", chunk, 1))
            added.append(k)

    thread = threading.Thread(target=add)
    thread.start()
    time.sleep(0.2)
    assert len(added) == writer.AHEAD
    may_go.set()
    thread.join()
    slow.close()
    assert len(added) == writer.AHEAD + 3


@pytest.mark.parametrize("size, small", [((512, 768), (64, 96)), ((320, 768), (64, 153))])
def test_the_height_decides_how_far_a_sheet_reduces_frames(size, small):
    """To about 64 pixels, in a wide picture and in one without frames."""
    assert writer.thumbnails(torch.zeros(2, 3, *size)).shape == (2, 3, *small)
    assert writer.thumbnails(torch.zeros(0, 3, *size)).shape == (0, 3, *size)


# ---- two runs, closed pipes, kills ----


def test_two_runs_with_one_target_keep_both_films(run, tmp_path, monkeypatch):
    """The film that is finished later gets a name of its own, which is printed."""
    stream = generate.stream

    def other_run_ends(*args, **how):
        for block in stream(*args, **how):
            if block.index == 1:
                Path("out.mp4").write_bytes(OLD)
            yield block

    monkeypatch.setattr(generate, "stream", other_run_ends)
    status, out, _ = run("--seconds", 2)
    assert status == 0 and Path("out.mp4").read_bytes() == OLD
    film = out.split()[-3]
    assert film.startswith("out.") and frames_of(film) == 49
    assert left_in(tmp_path) == sorted(["out.mp4", film, film.replace("mp4", "png")])


def start(folder, *args, **how):
    """Start `python generate.py ...` in a folder, with unbuffered output."""
    command = [sys.executable, "-u", str(ROOT / "generate.py"), "--config", "toy", *map(str, args)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def default():
        for kind in SIGNALS:
            signal.signal(kind, signal.SIG_DFL)

    return subprocess.Popen(command, cwd=folder, env=env, preexec_fn=default, **{**pipes, **how})


def wait_for_block(process, index):
    for line in process.stdout:
        if line.startswith(f"block {index:3}"):
            return
    raise AssertionError(process.stderr.read())


def test_a_real_signal_to_a_real_process(tmp_path):
    """Two SIGTERM, of which the second comes at once: exit status 0, and the film."""
    process = start(tmp_path, "--seconds", 600)
    wait_for_block(process, 2)
    process.terminate()
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert assert_kept(tmp_path) >= 49


def test_closed_output_is_no_reason_to_stop_a_film(tmp_path):
    """The reader of stdout and stderr goes after one line, as `head` does: the film is finished."""
    process = start(tmp_path, "--seconds", 3, stderr=subprocess.STDOUT)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert assert_kept(tmp_path) == 73


def test_only_parts_of_the_same_film_are_those_of_another_run(tmp_path):
    """Other films in the folder may have names that begin with the same letters."""
    for name in ("out.1a.partial.mp4", "outer.2b.partial.mp4", "out.3c.mp4"):
        (tmp_path / name).touch()
    assert [path.name for path in mp4.partial_films(tmp_path / "out.mp4")] == ["out.1a.partial.mp4"]


def test_output_that_was_never_open_is_no_reason_either(tmp_path):
    """As after `generate.py >&- 2>&-`."""
    command = [sys.executable, ROOT / "generate.py", "--config", "toy", "--seconds", "1"]
    shell = ["sh", "-c", '"$@" >&- 2>&-', "sh", *command]
    assert subprocess.run(shell, cwd=tmp_path, timeout=60).returncode == 0
    assert assert_kept(tmp_path) == 25


def test_a_partial_file_that_somebody_removes_is_not_said_to_be_kept(run, monkeypatch, tmp_path):
    """Nothing is left of the film, so nothing else is said."""
    decode = toy_source.ToyDecoder.decode

    def removed(self, block):
        for partial in tmp_path.glob("*.partial.mp4"):
            partial.unlink()
        return decode(self, block)

    monkeypatch.setattr(toy_source.ToyDecoder, "decode", removed)
    status, _, err = run("--seconds", 2)
    assert status == 2 and err.endswith("; nothing was written\n") and "are kept" not in err


def test_sigkill_leaves_a_playable_part_and_the_next_run_says_so(tmp_path):
    """It lacks at most its last half second; the old film is unchanged."""
    (tmp_path / "out.mp4").write_bytes(OLD)
    process = start(tmp_path, "--seconds", 600)
    wait_for_block(process, 8)  # so the writer has finished block 8 - 1 - AHEAD, at least
    process.kill()
    process.communicate(timeout=60)
    (partial,) = set(left_in(tmp_path)) - {"out.mp4"}
    assert partial.startswith("out.") and partial.endswith(".partial.mp4")
    assert (tmp_path / "out.mp4").read_bytes() == OLD
    assert frames_of(tmp_path / partial) >= 24 * (7 - writer.AHEAD) + 1 - 12
    _, err = start(tmp_path, "--seconds", 1).communicate(timeout=60)
    assert f"{partial} is there: another run still writes it, or was killed" in err
