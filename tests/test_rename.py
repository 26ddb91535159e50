"""Weight files of the earlier version: refused with the command that renames them, then read."""

import json

import pytest
import torch
from helpers import PAPER, random_model, run_here, tiny
from safetensors.torch import save_file

import model
from plumbing import rename

CFG = tiny(PAPER, num_sinks=2)


def old_name(name):
    """The earlier name of a tensor, written down independently of `rename.new_name`."""
    first, *path = name.split(".")
    if first == "layers":
        index, stream, *path = path
        return ".".join([stream, "layers", index, *path])
    old = {"proj_in": "patchify", "proj_out": "unpatchify"}
    return ".".join([first, *(old.get(part, part) for part in path)])


@pytest.fixture
def old_file(tmp_path):
    """A model as the earlier version wrote it, and its tensors under today's names."""
    tensors = random_model(CFG, torch.float32).state_dict()
    cfg = CFG.to_dict()
    cfg["rope_dealing"] = {"contiguous": "bands", "round_robin": "turns"}[cfg.pop("rope_heads")]
    metadata = {"config": json.dumps(cfg), "made_by": json.dumps({"steps": 3})}
    path = tmp_path / "old.safetensors"
    save_file({old_name(n): x for n, x in tensors.items()}, path, metadata)
    return path, tensors


def test_an_old_file_is_refused_with_the_command_that_renames_it(old_file):
    """One line that says how."""
    path, _ = old_file
    with pytest.raises(ValueError, match=f"^{path}: .* python -m plumbing.rename {path}$"):
        model.load(path)


def test_a_renamed_file_has_the_same_numbers(old_file, monkeypatch, capsys):
    """Every tensor bit by bit, the config too; a second time changes nothing."""
    path, tensors = old_file
    assert run_here(rename, [path], monkeypatch, capsys)[0] == 0
    net = model.load(path)
    assert net.cfg == CFG
    assert all(torch.equal(x, tensors[n]) for n, x in net.state_dict().items())
    before = path.read_bytes()
    assert run_here(rename, [path], monkeypatch, capsys)[0] == 0
    assert path.read_bytes() == before


def test_a_file_that_is_no_weight_file_is_refused(tmp_path, monkeypatch, capsys):
    """One line, exit status 2, and the file stays as it is."""
    (tmp_path / "x").write_text("no weights")
    status, _, err = run_here(rename, [tmp_path / "x"], monkeypatch, capsys)
    assert status == 2 and err.count("\n") == 1 and "not a whole safetensors file" in err
    assert (tmp_path / "x").read_text() == "no weights"
