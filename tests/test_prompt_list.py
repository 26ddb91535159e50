"""Many films from one list: reading it, making its films, going on, and what fails."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers import SMALL, run_here, save_small_student
from PIL import Image
from tape import Tape

import config
import generate
from film import prompt_list
from full_size import memory
from full_size import source as full_source
from full_size.faster import Recorded
from toy import source as toy_source


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_small_student(tmp_path_factory.mktemp("weights") / "student.safetensors")


@pytest.fixture
def run(student, tmp_path, monkeypatch, capsys):
    """Write a list, and run the command line on it here: -> exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(config.CONFIGS, "toy", SMALL)
    monkeypatch.setitem(toy_source.WEIGHTS, "toy", student)

    def main(*lines, options=("--prompts", "list", "--out-dir", "films", "--seconds", "1")):
        Path("list").write_text("\n".join(lines), "utf-8")
        return run_here(generate, ("--config", "toy", *options), monkeypatch, capsys)

    return main


def films():
    return {path.stem: path.read_bytes() for path in sorted(Path("films").glob("*.mp4"))}


def line(**values):
    return json.dumps(values)


# ---- the list ----


def entries(tmp_path, data):
    path = tmp_path / "list"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return prompt_list.read_list(path)


@pytest.mark.parametrize(
    "data",
    [
        "\n red fast \n\nblue\n",
        "\ufeff\nred fast\r\n\t\r\nblue",
        "\rred fast\r\rblue\r",
        "\nred fast\n\n\ufeffblue\n".encode("utf-16"),
    ],
)
def test_a_line_of_text_is_a_prompt_and_its_number_the_id(tmp_path, data):
    """Whatever the line endings, blank lines and byte order marks."""
    found = entries(tmp_path, data)
    assert [(e.line, e.id, e.prompt) for e in found] == [
        (2, "00002", ["red fast"]),
        (4, "00004", ["blue"]),
    ]


def test_a_prompt_may_hold_other_separators(tmp_path):
    """A form feed and U+2028 are characters of a prompt."""
    assert entries(tmp_path, "a\u2028b\x0cc")[0].prompt == ["a\u2028b\x0cc"]


def test_a_json_line_says_what_it_wants(tmp_path):
    """A missing key and null mean the default; an image lies beside the list."""
    first, second = entries(
        tmp_path,
        line(id=7, prompt=["red", "1: blue"], seed=3, seconds=2.0, image="a/b.png")
        + "\n"
        + line(prompt="red", id=None, seed=None),
    )
    assert first == (1, "7", ["red", "1: blue"], 3, 2.0, str(tmp_path / "a/b.png"))
    assert second == (2, "00002", ["red"], None, None, None)


BAD = {
    "nothing": ("\ufeff \n\n", "list: no prompts; expected one a line, or JSON lines"),
    "not UTF-8": (b"red\nblue\nca\xe9\n", "list: expected text in UTF-8 (.* in line 3)"),
    "not JSON": ('{"prompt": "red"}\n{"prompt":', r"list: line 2: not JSON \("),
    "no object": ('{"prompt": "red"}\nblue', r"list: line 2: not JSON \("),
    "a list": ('{"prompt": "red"}\n["blue"]', "list: line 2: expected a JSON object in every"),
    "deep": ('{"prompt":' + "[" * 99999, "list: line 1: not JSON"),
    "unknown key": (line(prompt="red", secnds=3), "line 1: unknown key 'secnds'; expected id, p"),
    "no prompt": (line(id="a"), 'line 1: "prompt" must be a text, or a list of texts'),
    "no texts": (line(prompt=["red", 3]), 'line 1: "prompt" must be a text'),
    "empty list": (line(prompt=[]), 'line 1: "prompt" must be a text'),
    "seed": (line(prompt="red", seed=2**32), '"seed" 4294967296: expected a whole number from 0'),
    "seed true": (line(prompt="red", seed=True), '"seed" True: expected a whole number'),
    "seconds": (line(prompt="red", seconds="5"), "\"seconds\" '5': expected a number"),
    "image": (line(prompt="red", image=3), '"image" 3: expected the name of a file'),
    "id": (line(prompt="red", id=True), '"id" True: expected a text or a whole number'),
    "twice": (
        line(prompt="red", id="é") + "\n\n" + line(prompt="red", id="E\u0301"),
        "line 3: id 'É' is also that of line 1",
    ),
}
BAD |= {
    f"id {name!r}": (line(prompt="red", id=name), "line 1: id .*: no safe file name")
    for name in ("", "a/b", "a\\b", "..", ".a", "-a", "a.", "a b", "a:b", "a\n", "\0", "NUL")
    + ("com1.x", "a" * 101)
}


@pytest.mark.parametrize("data, message", BAD.values(), ids=BAD.keys())
def test_a_bad_list_is_refused_by_file_and_line(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        entries(tmp_path, data)


# ---- the films ----


def test_every_film_is_that_of_its_own_command_line(run, monkeypatch, capsys):
    """Byte by byte; each film with a sheet and a report; the weights are read once."""
    loads, load = [], toy_source.load_student
    monkeypatch.setattr(toy_source, "load_student", lambda *a: loads.append(a) or load(*a))
    status, out, err = run(
        line(prompt="red fast metal"), line(id="b", prompt=["red", "1: blue"], seconds=2, seed=3)
    )
    assert status == 0 and len(loads) == 1 and "films: 100%" in err
    assert out.count("\nwrote ") == 2 and "wrote films/b.mp4 and films/b.png" in out
    names = [f"{film}.{kind}" for film in ("00001", "b") for kind in ("json", "mp4", "png")]
    assert sorted(os.listdir("films")) == names
    plain = ["--prompt", "red fast metal", "--seconds", "1", "--out", "a.mp4"]
    other = ["--prompt", "red", "--prompt", "1: blue", "--seconds", "2", "--seed", "3"]
    for options in (plain, [*other, "--out", "b.mp4"]):
        run_here(generate, ["--config", "toy", *options], monkeypatch, capsys)
    assert list(films().values()) == [Path("a.mp4").read_bytes(), Path("b.mp4").read_bytes()]
    reports = [json.loads(Path(f"films/{name}.json").read_text()) for name in ("00001", "b")]
    assert [len(report["passes_seconds"]) for report in reports] == [2, 3]
    assert [set(report["stage_seconds"]) for report in reports][0] >= {"denoise", "refresh"}


def test_passes_are_timed_by_the_stopwatch_of_their_own_film(run, monkeypatch):
    """The hooks of the film before are gone."""
    nets, stream = [], generate.stream
    monkeypatch.setattr(generate, "stream", lambda *a, **o: nets.append(a[0]) or stream(*a, **o))
    run("red", "blue", "green")
    assert len(nets) == 3 and len(nets[0]._forward_hooks) == len(nets[0]._forward_pre_hooks) == 1


def test_a_second_run_makes_what_is_missing(run):
    """A whole film with a report of the same request stays; without sheet or report it is made."""
    lines = "red", "blue", "green", "yellow"
    run(*lines)
    before = {path.name: path.stat().st_mtime_ns for path in Path("films").iterdir()}
    for name in "00002.mp4", "00003.json", "00004.png":
        Path("films", name).unlink()
    status, out, _ = run(*lines, "red fast")
    assert status == 0 and out.startswith("1 of 5 films are there already\n")
    now = {path.name: path.stat().st_mtime_ns for path in Path("films").iterdir()}
    assert {name[:5] for name in before if before[name] == now[name]} == {"00001"}
    assert sorted(films()) == ["00001", "00002", "00003", "00004", "00005"]
    status, out, _ = run(*lines, "red fast")
    assert status == 0 and out == "5 of 5 films are there already\n"


CHANGES = {
    "prompt": (["green", "blue"], [], "prompts ['0: red'], now ['0: green']"),
    "seconds": (["red", "blue"], ["--seconds", "2"], "seconds 1.0, now 2.0"),
    "seed": (["red", "blue"], ["--seed", "1"], "seed 0, now 1"),
    "window": (["red", "blue"], ["--window", "1"], "window 4, now 1"),
    "steps": (["red", "blue"], ["--steps", "1"], "passes_a_block 4, now 1"),
    "dtype": (["red", "blue"], ["--dtype", "bfloat16"], "dtype 'float32', now 'bfloat16'"),
}


@pytest.mark.parametrize("lines, more, message", CHANGES.values(), ids=CHANGES.keys())
def test_a_film_of_another_request_is_not_replaced(run, lines, more, message):
    """One line that says what differs and what to do; the films stay."""
    run("red", "blue")
    before = films()
    options = "--prompts", "list", "--out-dir", "films", "--seconds", "1", *more
    status, _, err = run(*lines, options=options)
    assert status == 2 and f"films/00001.json: tells of another request: {message}; delete" in err
    assert films() == before


def test_a_foreign_file_is_not_taken_for_a_report(run):
    Path("films").mkdir()
    Path("films/00001.json").write_text("[]")
    status, _, err = run("red")
    assert status == 2 and "films/00001.json: not whole; expected a JSON object" in err


def test_one_bad_prompt_does_not_end_the_others(run):
    """It is named at once and at the end; exit status 2; nothing else of it is there."""
    lines = line(prompt="red"), line(prompt="purple"), line(prompt="blue", id="x", seconds=1.5)
    status, out, err = run(*lines, line(prompt="blue"))
    assert status == 2 and sorted(films()) == ["00001", "00004"]
    first, second = (
        "00002: list: line 2: prompt: unknown word 'purple'",
        "x: list: line 3: 1.5 seconds end inside a block",
    )
    assert err.startswith(first) and err.count(second) == 2
    assert f"\nfailed: {first}" in err and f"\nfailed: {second}" in err
    counts = "generate.py: 2 of 4 films failed, 0 are left; "
    assert err.endswith(f"{counts}correct what failed; then the same command goes on\n")


def test_an_error_in_one_film_does_not_end_the_others(run, monkeypatch):
    """Of any kind; what was finished of it is kept, and the next run makes it anew."""
    stream = generate.stream

    def breaks(net, prompt, *args, **options):
        for block in stream(net, prompt, *args, **options):
            yield block
            if prompt == "blue":
                raise RuntimeError("no memory")

    monkeypatch.setattr(generate, "stream", breaks)
    status, _, err = run("red", "blue", "green")
    assert status == 2 and sorted(films()) == ["00001", "00002", "00003"]
    assert "failed: 00002: RuntimeError: no memory; 1 frames are kept in films/00002.mp4" in err
    monkeypatch.setattr(generate, "stream", stream)
    status, out, _ = run("red", "blue", "green")
    assert status == 0 and out.startswith("2 of 3 films are there already\n")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_finished_blocks_and_stops(run, monkeypatch, kind):
    """Ctrl-C during the second of three films: it is short, the third is not begun."""
    stream = generate.stream

    def interrupted(net, prompt, *args, **options):
        for block in stream(net, prompt, *args, **options):
            yield block
            if prompt == "blue":
                os.kill(os.getpid(), kind)

    monkeypatch.setattr(generate, "stream", interrupted)
    status, _, err = run("red", "blue", "green")
    assert status == 2 and sorted(films()) == ["00001", "00002"]
    assert "interrupted: 1 frames are kept in films/00002.mp4" in err
    assert err.endswith("0 of 3 films failed, 2 are left; the same command goes on\n")


CONTRADICTIONS = {
    "--prompt red": "--prompt does not go together with --prompts",
    "--out x.mp4": "--out does not go together with --prompts",
    "--html x.html": "--html does not go together with --prompts",
    "--report x.json": "--report does not go together with --prompts",
}


@pytest.mark.parametrize("more, message", CONTRADICTIONS.items(), ids=CONTRADICTIONS)
def test_options_of_one_film_are_refused(run, more, message):
    options = ["--prompts", "list", "--out-dir", "films", *more.split()]
    status, _, err = run("red", options=options)
    assert status == 2 and message in err and not Path("films").exists()


def test_a_list_needs_a_folder_and_a_folder_a_list(run):
    assert "--prompts needs --out-dir" in run("red", options=["--prompts", "list"])[2]
    assert "--out-dir x: needs --prompts" in run("red", options=["--out-dir", "x"])[2]
    _, _, err = run("red", options=["--prompts", "none", "--out-dir", "films"])
    assert "none: cannot be read (No such file" in err
    Path("file").write_text("")
    status, _, err = run("red", options=["--prompts", "list", "--out-dir", "file"])
    assert status == 2 and err.count("\n") == 1 and "file" in err


# ---- the full size ----


def test_the_full_size_loads_once_for_all(monkeypatch):
    """Every prompt is encoded once; the plan is for the longest film and the most prompts."""
    planned = []
    monkeypatch.setattr(memory, "check_stream", planned.append)
    monkeypatch.setattr(full_source.weights, "random_weights", lambda cfg, *_: SmallNet(cfg))
    monkeypatch.setattr(full_source.decoders, "random_weights", lambda *_: [])

    def request(*more):
        command = ["--config", "full", "--weights", "random", *more]
        return generate.check_args(generate.options().parse_args(command))

    requests = [
        request("--prompt", "a", "--prompt", "2: b", "--seconds", "3"),
        request("--prompt", "b", "--seconds", "9"),
    ]
    source = full_source.StreamSource(requests)
    assert source.features.keys() == {"a", "b"} and source.read("b").video.device.type == "cpu"
    assert (planned[0].seconds, len(planned[0].cues)) == (9, 2)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**6)
    with pytest.raises(ValueError, match="features of 2 prompts need 0.0 GB .* shorter ones"):
        full_source.StreamSource(requests)


class SmallNet:
    def __init__(self, cfg):
        self.cfg = cfg


def test_recorded_passes_serve_films_of_different_lengths(student):
    """After a warm-up for the longest film nothing is recorded, and every block is the same."""
    net, made = toy_source.load_student(student, SMALL), []
    recorded = Recorded(net, lambda: lambda function: made.append(1) or Tape.record(function))
    recorded.warm_up(toy_source.toy_features("red"), 7, 2)
    count = len(made)
    for seconds in (6, 1, 2, 3, 6):
        pair = (generate.stream(model, "blue", seconds, 5, 2) for model in (net, recorded))
        for one, other in zip(*pair, strict=True):
            assert all(map(torch.equal, one[1:], other[1:]))
    assert len(made) == count


def test_a_picture_or_a_list_is_never_overwritten(run):
    """The sheet of the film a would be a.png, the picture; the report of l would be the list."""
    Path("films").mkdir()
    for name, entry in (("a", {"id": "a", "image": "a.png"}), ("l", {"id": "l"})):
        Image.new("RGB", (32, 32)).save("films/a.png")
        before = Path("films/a.png").read_bytes()
        Path("films/l.json").write_text(json.dumps({"prompt": "red", **entry}))
        status, _, err = run("x", options=["--prompts", "films/l.json", "--out-dir", "films"])
        assert status == 2 and "would be overwritten, but is read" in err, name
        assert Path("films/a.png").read_bytes() == before
        assert left_in_films() == ["a.png", "l.json"]


def left_in_films():
    return sorted(path.name for path in Path("films").iterdir())


def test_json_in_a_plain_list_and_an_empty_film_are_noticed(run):
    """Neither is a prompt; a film of no bytes is made again."""
    assert "line 1: JSON in a list of plain prompts" in run('[{"prompt": "red"}]')[2]
    assert "line 2: JSON in a list of plain prompts" in run("red", '{"prompt": "red"}')[2]
    assert run("red")[0] == 0
    Path("films/00001.mp4").write_bytes(b"")
    assert run("red")[0] == 0 and Path("films/00001.mp4").stat().st_size


def test_a_folder_that_cannot_be_made_is_named(run):
    Path("file").write_text("x")
    status, _, err = run("red", options=["--prompts", "list", "--out-dir", "file"])
    assert status == 2 and "--out-dir file: no folder can be made" in err
