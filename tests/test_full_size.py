"""The full-size path of generate.py, end to end, with the smallest networks of the same classes."""

import functools
import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from helpers import random_model, run_here, save_text_path
from PIL import Image
from safetensors.torch import save_file
from tape import Tape

import config
import generate
from benchmarks import bench_decode
from film import live
from full_size import decoders, faster, memory
from full_size import text as captions
from full_size import weights as ltx2

pytest.importorskip("diffusers")
SIZES = dict(num_layers=2, num_heads=2, video_width=32, audio_width=16, height=64, width=64)
FULL = replace(config.FULL, caption_width=16, **SIZES)
RELEASED = replace(config.RELEASED, caption_width=16, **SIZES)

DECODER_ROWS = functools.cache(memory.decoder_rows)  # the same in every run here
FLOAT32 = ["--dtype", "float32"]  # for speed: processors emulate bfloat16; other tests have it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """LTX-2's folder with a tiny text path and tiny decoders, and a generator's file."""
    folder = tmp_path_factory.mktemp("ltx2")
    save_text_path(folder, RELEASED.caption_width)
    for net, name in zip(bench_decode.tiny_decoders(), ("vae", "audio_vae", "vocoder")):
        net.save_pretrained(folder / name)
    net = random_model(RELEASED, torch.bfloat16)
    save_file(ltx2.to_ltx2(net.state_dict(), net), folder / "generator.safetensors")
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command line here with the tiny sizes: -> exit status, stdout, stderr."""
    kinds = bench_decode.tiny_decoder_classes()
    monkeypatch.setattr(memory, "decoder_rows", DECODER_ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(config.CONFIGS, "full", FULL)
    monkeypatch.setitem(config.CONFIGS, "released", RELEASED)
    monkeypatch.setattr(decoders, "decoder_classes", lambda: kinds)

    encode_and_free = captions.encode_and_free

    def read(folder, prompts, *at):
        print("read", *prompts, sep="|")
        return encode_and_free(folder, prompts, *at)

    monkeypatch.setattr(captions, "encode_and_free", read)

    def main(*args):
        return run_here(generate, args, monkeypatch, capsys)

    signals = signal.SIGTERM, signal.SIGINT
    handlers = [signal.getsignal(kind) for kind in signals]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a script's background
    yield main
    for kind, handler in zip(signals, handlers):
        signal.signal(kind, handler)


def properties(path):
    """Frames, size, channels and rate of the sound, its seconds."""
    with av.open(str(path)) as film:
        frames = sum(1 for _ in film.decode(video=0))
        video, audio = film.streams.video[0], film.streams.audio[0]
        size, sound = (video.height, video.width), (audio.channels, audio.rate)
    with av.open(str(path)) as film:
        samples = sum(f.samples for f in film.decode(audio=0))
    return frames, size, sound, samples / sound[1]


def test_random_weights_make_a_film_and_its_timings(run):
    """No file is needed; a plan is printed; every stage is timed."""
    args = "--config", "full", "--weights", "random", "--seconds", 3, "--report", "r.json"
    status, out, _ = run(*args, *FLOAT32)
    assert status == 0
    *found, seconds = properties("out.mp4")
    assert found == [73, (64, 64), (2, 24000)]
    assert seconds == pytest.approx(3, abs=0.15)
    assert "GB  transformer: " in out and "in all, of" in out
    report = json.loads(Path("r.json").read_text())
    stages = {"denoise", "refresh", "video decoder", "audio decoder", "vocoder"}
    assert stages <= report["stage_seconds"].keys()
    assert report["stage_seconds"]["denoise"] < sum(report["passes_seconds"])
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")


def test_a_film_at_full_speed(run, monkeypatch):
    """Recorded passes and fused kernels, with stand-ins for a GPU: as many frames and samples."""
    monkeypatch.setattr(faster, "find_speedups", lambda names, device: ("graph", "fuse"))
    monkeypatch.setattr(faster, "cuda_recorder", lambda: Tape.record)
    monkeypatch.setattr(faster, "fused", lambda function: function)
    args = "--config", "full", "--weights", "random", "--seconds", 1, "--report", "r.json"
    status, out, err = run(*args, "--speed-up", "all")
    assert status == 0, err
    assert properties("out.mp4")[0] == 25
    report = json.loads(Path("r.json").read_text())
    assert report["speed_up"] == ["graph", "fuse"]
    assert {"denoise", "refresh"} <= report["stage_seconds"].keys()


def test_a_prompt_becomes_a_film(run, folder):
    """Text, transformer file and decoders' folder; a switch of prompts; twice the same bytes."""
    args = ["--config", "released", "--weights", folder / "generator.safetensors"]
    args += ["--ltx2", folder, "--seconds", 3, "--prompt", "a dog barks", "--prompt", "2: rain"]
    args += FLOAT32
    status, out, err = run(*args, "--out", "a.mp4")
    assert status == 0, err
    assert "read|a dog barks|rain" in out
    assert "rope_layout=interleaved (of config released; not in the file)" in out
    assert "before all that: the text encoder" in out
    assert properties("a.mp4")[0] == 73
    run(*args, "--out", "b.mp4")
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


def test_a_film_from_names_on_the_hub(run, folder, tmp_path, monkeypatch):
    """Both names are found in the local cache; no network is needed."""
    home = tmp_path / "hub" / "models--Lightricks--LTX-2"
    (home / "snapshots").mkdir(parents=True)
    (home / "snapshots" / "abc").symlink_to(folder)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    args = "--config", "released", "--weights", "Lightricks/LTX-2", "--ltx2", "Lightricks/LTX-2"
    status, out, err = run(*args, "--seconds", 1, *FLOAT32)
    assert status == 0, err
    assert "wrote out.mp4" in out and properties("out.mp4")[0] == 25


def test_the_released_layout_is_a_second_long_at_once(run):
    """Block 0 holds 4 + 26 latents: 25 frames, so the time to the first second is its time."""
    args = "--config", "released", "--weights", "random", "--seconds", 2, "--report", "r.json"
    run(*args, *FLOAT32)
    report = json.loads(Path("r.json").read_text())
    assert report["ttfc_seconds"] == report["written_seconds"][0]


def test_what_was_held_back_is_written_after_an_interruption(run, monkeypatch):
    """Ctrl-C with a decoder that waits for two latents: still 24 frames for every block done."""
    stream = generate.stream

    def interrupted(*args, **how):
        for block in stream(*args, **how):
            if block.index == 3:
                signal.raise_signal(signal.SIGINT)
            yield block

    monkeypatch.setattr(generate, "stream", interrupted)
    args = "--config", "full", "--weights", "random", "--seconds", 60, "--video-look-ahead", 2
    status, _, _ = run(*args, *FLOAT32)
    assert status == 0 and properties("out.mp4")[0] == 49


def test_the_overlap_of_the_video_decoder_arrives(run, monkeypatch):
    """Context and look-ahead, in the memory plan and in the decoder."""
    planned, used, make = [], [], decoders.ChunkedDecoder
    monkeypatch.setattr(memory, "decoder_rows", lambda *args: planned.append(args[2]) or [])
    monkeypatch.setattr(decoders, "ChunkedDecoder", lambda *args: used.append(args) or make(*args))
    args = "--config", "full", "--weights", "random", "--seconds", 1, *FLOAT32
    run(*args, "--video-context", 2, "--video-look-ahead", 1)
    run(*args)
    assert planned == [(2, 1), (4, 0)]
    assert [parts[3:] for parts in used[::3]] == planned  # for each film: video, mel, sound


BAD = {
    "no weights": ([], "--config full needs --weights"),
    "no folder": (["--weights", "x"], "--config full needs --ltx2"),
    "not a folder": (["--weights", "x", "--ltx2", "y"], "y: no text_encoder/"),
    "no file": (["--weights", "x", "--ltx2", "{}"], "x: no such file or folder"),
    "other weights": (["--weights", "{}/vae", "--ltx2", "{}"], "a VAE ('decoder."),
    "empty prompt": (["--weights", "random", "--prompt", " "], "the prompt says nothing"),
    "bytes": (["--weights", "random", "--prompt", "caf\udce9"], "'caf\\udce9': not in UTF-8"),
    "window": (["--weights", "random", "--window", "0"], "--window 0: expected a whole number"),
}


@pytest.mark.parametrize("args, message", BAD.values(), ids=BAD.keys())
def test_bad_input_ends_in_one_line_before_anything_is_loaded(
    run, folder, tmp_path, monkeypatch, args, message
):
    """Exit status 2, the reason, no file; nothing was read or drawn."""
    monkeypatch.setattr(ltx2.Source, "load", None)
    monkeypatch.setattr(ltx2, "random_weights", None)
    status, _, err = run("--config", "full", *(a.format(folder) for a in args))
    assert status == 2 and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", [*captions.TEXT_PARTS, *decoders.PARTS])
def test_a_missing_part_is_noticed_before_prompts_are_read(run, folder, tmp_path, part):
    """Whichever of the six folders it is, text encoder or vocoder."""
    for other in {*captions.TEXT_PARTS, *decoders.PARTS} - {part}:
        (tmp_path / "ltx2" / other).mkdir(parents=True)
    weights = folder / "generator.safetensors"
    status, out, err = run("--config", "released", "--weights", weights, "--ltx2", "ltx2")
    assert status == 2 and f"ltx2: no {part}/" in err and "read" not in out


@pytest.mark.parametrize("part", ["text_encoder", *decoders.PARTS])
def test_half_a_file_is_noticed_before_prompts_are_read(run, folder, tmp_path, part):
    """Weights of any part that were cut short: one line, before the first of them is loaded."""
    copy = shutil.copytree(folder, tmp_path / "ltx2")
    (file,) = (copy / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    weights = folder / "generator.safetensors"
    status, out, err = run("--config", "released", "--weights", weights, "--ltx2", "ltx2")
    assert status == 2 and f"{file.name}: not a whole safetensors file" in err
    assert err.count("\n") == 1 and "read" not in out


def test_a_stream_that_does_not_fit_is_refused(run, monkeypatch, tmp_path):
    """The arithmetic, and a window that would fit."""
    rows = memory.film_rows(FULL, 61, 9, torch.bfloat16)
    monkeypatch.setattr(memory, "free_bytes", lambda _: memory.total(rows))
    args = ["--config", "full", "--weights", "random", "--seconds", 60]
    status, out, err = run(*args, "--window", 30)
    assert status == 2 and "--window 9 would fit" in err and "rolling caches" in out
    assert list(tmp_path.iterdir()) == []


# ---- prompts that come while a stream runs ----


def test_a_prompt_is_read_while_a_live_stream_runs(run, folder, monkeypatch):
    """Each new one loads the text encoder once; an empty one is refused; blocks obey the last."""
    args = ["--config", "released", "--weights", folder / "generator.safetensors", "--live"]
    args = generate.options().parse_args([*map(str, args), "--ltx2", str(folder), *FLOAT32])
    functions = generate.check_args, generate.open_source, generate.stream
    with live.open_server(args, *functions) as server:
        name, read = server.studio.start("a dog barks", 0)["id"], []
        encode = captions.encode_and_free
        monkeypatch.setattr(
            captions, "encode_and_free", lambda *given: read.append(given[1:3]) or encode(*given)
        )
        for words in ("a dog barks", "rain", "snow", "rain"):
            server.studio.answer("prompt", {"id": name, "words": words})
        with pytest.raises(ValueError, match="the prompt says nothing"):
            server.studio.answer("prompt", {"id": name, "words": " "})
        while not (blocks := server.studio.session.report(99, 0)["blocks"][5:]):
            assert server.studio.session.thread.is_alive()
            time.sleep(0.05)
        server.studio.end()
    cpu = torch.device("cpu")
    assert read == [(["rain"], cpu), (["snow"], cpu)]
    assert blocks[-1]["prompt"] == "rain" and blocks[-1]["strip"] == ""


def test_the_text_encoder_goes_where_there_is_room(folder, monkeypatch):
    """Beside a stream: on its GPU, else on the CPU, else nowhere."""
    size, free = memory.text_bytes(folder), {}
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[device.type])
    gpu = torch.device("cuda")
    for free["cuda"], free["cpu"], place in ((2 * size, 0, "cuda"), (size, 2 * size, "cpu")):
        assert memory.place_for_text(folder, gpu).type == place
    free.update(cuda=size, cpu=size)
    with pytest.raises(ValueError, match="a text encoder of 0.0 GB, 0.0 GB free"):
        memory.place_for_text(folder, gpu)


def test_a_picture_becomes_the_first_frame(run, folder):
    """LTX-2's own encoder is loaded for it, is in the plan, and changes the film."""
    Image.new("RGB", (64, 64), "white").save("white.png")
    args = ["--config", "released", "--weights", folder / "generator.safetensors"]
    args += ["--ltx2", folder, "--seconds", 1, "--prompt", "rain", *FLOAT32]
    status, out, err = run(*args, "--image", "white.png")
    assert status == 0, err
    assert "before all that: the video encoder" in out and properties("out.mp4")[0] == 25
    run(*args, "--out", "plain.mp4")
    assert Path("out.mp4").read_bytes() != Path("plain.mp4").read_bytes()
