"""Files: written whole or not at all, read strictly, refused in one line."""

import json
import os

import pytest
import torch
from helpers import PAPER, random_model, run_here, tiny
from safetensors import SafetensorError
from safetensors.torch import save_file

import generate
import model
from full_size import weights as ltx2
from plumbing import files
from toy import codec

CFG = tiny(PAPER)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


def saved(path, tensors, **metadata):
    files.save_weights(path, tensors, CFG, {})
    if metadata:
        save_file(tensors, path, {"config": json.dumps(CFG.to_dict()), **metadata})
    return path


# ---- write ----

FULL = [
    OSError(28, "No space left on device", ".x.safetensors.1"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["of the system", "of safetensors"])
def test_a_full_disk_is_told_in_one_line(path, error):
    """With the file that was to be written; the old file stays, and no part of the new one."""
    path.write_text("old")

    def write(temporary):
        temporary.write_text("ne")
        raise error

    with pytest.raises(OSError, match="x.safetensors: could not be written .No space left on devi"):
        files.write_beside(path, write)
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_others_may_read_what_is_written(path):
    """Weights too, although safetensors lets only the owner of a file read it."""
    saved(path, {"x": torch.zeros(1)})
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path):
    """A file stands in its place."""
    (tmp_path / "x").write_text("")
    place = tmp_path / "x" / "y.json"
    with pytest.raises(OSError, match=f"^{place}: could not be written .(Not a dir|File exists)"):
        files.write_json(place, {})


# ---- read ----

KINDS = torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.int64


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_weights_of_another_kind_are_refused(path, dtype):
    """One tensor of whole numbers, or of fp8, in the file of a model."""
    tensors = random_model(CFG, torch.float32).state_dict()
    name = "layers.1.video.self_attn.to_q.weight"
    tensors[name] = tensors[name].to(dtype)
    with pytest.raises(
        ValueError, match=f"x.safetensors: tensor {name} holds {str(dtype)[6:]}, ex"
    ):
        model.load(saved(path, tensors))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(path, bad):
    """Each of them."""
    tensors = random_model(CFG, torch.float32).state_dict()
    tensors["video.proj_in.bias"][0] = bad
    with pytest.raises(ValueError, match="tensor video.proj_in.bias holds NaN or infinity"):
        model.load(saved(path, tensors))


def test_metadata_must_say_who_made_the_file(path):
    """As a dictionary in JSON."""
    tensors = random_model(CFG, torch.float32).state_dict()
    assert files.read_weights(saved(path, tensors, made_by='{"steps": 3}'))[2] == {"steps": 3}
    for made_by, message in (("[]", "have made_by"), ("{", "its metadata is not this project's")):
        with pytest.raises(ValueError, match=f"x.safetensors: .*{message}"):
            files.read_weights(saved(path, tensors, made_by=made_by))


def other_files(path):
    """Files that are not a model of the toy, and what is said about them."""
    yield codec.FILE, "the toy's codec .'audio_first.basis'.; name a model of the toy"
    folder = path.parent / "folder"
    folder.mkdir()
    yield folder, "a folder; name a file: none in it"
    save_file({"x": torch.ones(1)}, folder / "b.safetensors")
    (folder / "._a.safetensors").write_bytes(b"\0\5\x16\7")
    yield folder, f"a folder; name a file: {folder}/b.safetensors$"
    yield folder / "b.safetensors", "its metadata has no config, so this project did not write it"
    yield folder / "._a.safetensors", "a note that macOS keeps beside a file"
    yield folder / "no.safetensors", "no such file"
    full = random_model(CFG, torch.float32)
    ltx2.save(path, full.state_dict(), CFG, {})
    yield path, "a transformer of LTX-2 .'.*audio_attn1.*'.; it needs --config full or released"
    save_file({"a.lora_A.weight": torch.ones(1)}, path)
    yield path, "a LoRA, a change to other weights"
    trained = {f"student.model.{n}": x for n, x in full.state_dict().items()}
    save_file(trained | {"student.optimiser.0.0.exp_avg": torch.ones(1)}, path)
    yield path, "the saved state of a training"
    saved(path, {name: torch.ones(1) for name in ("tokens", "video", "audio")})
    yield path, "trajectories of stage II"
    save_file({"video": torch.ones(1), "audio": torch.ones(1)}, path)
    yield path, "features of one prompt"
    torch.save({}, path)
    yield path, "a pickle of PyTorch, which may run code"


def test_a_refusal_says_what_the_file_is(path, tmp_path, monkeypatch, capsys):
    """As --weights of a toy film: one line, status 2."""
    for place, message in other_files(path):
        with pytest.raises(ValueError, match=f"{place}: {message}"):
            model.load(place)
        args = "--weights", place, "--out", tmp_path / "out.mp4"
        status, _, err = run_here(generate, args, monkeypatch, capsys)
        assert status == 2 and err.count("\n") == 1 and "Traceback" not in err


def test_a_missing_tensor_of_a_model_is_named(path):
    """Although the rest of the file is a model of the toy."""
    tensors = random_model(CFG, torch.float32).state_dict()
    del tensors["video.proj_in.bias"]
    with pytest.raises(ValueError, match="x.safetensors: tensor video.proj_in.bias is missing$"):
        model.load(saved(path, tensors))


def test_the_fingerprint_depends_on_names_and_numbers():
    """And not on the order."""
    x, y = torch.zeros(3), torch.ones(3)
    pairs = {"x": x, "y": y}, {"y": y, "x": x}, {"x": y, "y": x}, {"x": x, "z": y}
    first, same, swapped, renamed = map(files.fingerprint, pairs)
    assert first == same and len({first, swapped, renamed}) == 3


def test_what_is_no_file_is_not_replaced(tmp_path):
    """A pipe (or a device, such as /dev/null) would be renamed away."""
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe: not writable \(not a file\)"):
        files.check_writable(pipe)
    with pytest.raises(ValueError, match=r"null: not writable"):
        files.check_writable("/dev/null")


def test_a_name_may_have_to_end_in_some_way(tmp_path):
    """So that a report does not overwrite weights by mistake."""
    files.check_writable(tmp_path / "x.json", suffix=".json")
    with pytest.raises(ValueError, match="x.safetensors: expected a name that ends in .json"):
        files.check_writable(tmp_path / "x.safetensors", suffix=".json")
