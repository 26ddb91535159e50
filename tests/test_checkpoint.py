"""Checkpoints as people have them: wrapped, averaged, quantised, in shards, in other formats."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import ROOT, random_model, run_here
from order import ORDER
from safetensors.torch import load_file, save_file
from test_ltx2 import CFG, LTX2_FLAGS, TEACHER, assert_holds, load, sharded, single_file, theirs

import config
from full_size import checkpoint
from full_size import weights as ltx2
from plumbing import contents

NAME = "transformer_blocks.1.attn1.to_q.weight"


def saved(path, tensors, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata)
    return path


def refused(path, message, cfg=CFG):
    """Check that a checkpoint is refused in one line, before a tensor is read."""
    with pytest.raises(ValueError, match=message) as error:
        ltx2.Source(path, cfg)
    assert "\n" not in str(error.value)


# ---- names ----

PREFIXES = [
    "module.", "_orig_mod.", "_fsdp_wrapped_module.", "generator.", "generator_ema.", "ema.",
    "diffusion_model.", "transformer.", "generator_ema.model.", "model._fsdp_wrapped_module.",
    "model.diffusion_model._orig_mod.", "module.generator.model._orig_mod.velocity_model.",
]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrappers_at_the_beginning_are_taken_off(tmp_path, prefix):
    """Every tensor arrives, whatever wrapped the model."""
    weights = theirs()
    path = saved(tmp_path / "x.safetensors", {prefix + n: x for n, x in weights.items()})
    assert_holds(load(path), weights)


@pytest.mark.parametrize("wrapper", ["_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
def test_wrappers_inside_a_name_are_taken_off(tmp_path, wrapper):
    """Around every layer, and twice around the first."""
    inside, weights = ".".join(["transformer_blocks.0", wrapper, wrapper, ""]), theirs()
    named = {n.replace("transformer_blocks.0.", inside): x for n, x in weights.items()}
    named = {n.replace("blocks.1.", f"blocks.1.{wrapper}."): x for n, x in named.items()}
    assert_holds(load(saved(tmp_path / "x.safetensors", named)), weights)


def test_averaged_weights_are_taken_and_it_is_said(tmp_path, capsys):
    """Beside raw ones and a critic, in either order; a gap among them is not filled with raw."""
    raw, averaged = theirs(1), theirs(2)
    tensors = {f"generator.{n}": x for n, x in raw.items()}
    tensors |= {f"generator_ema.{n}": x for n, x in averaged.items()}
    tensors |= {f"critic.{n}": x for n, x in theirs(3).items()}
    assert_holds(load(saved(tmp_path / "x.safetensors", tensors)), averaged)
    assert "raw and averaged weights; the averaged ones are taken" in capsys.readouterr().out
    del tensors[f"generator_ema.{NAME}"]
    refused(saved(tmp_path / "x.safetensors", tensors), f"has no {NAME}")


def test_two_models_in_one_file_are_refused(tmp_path):
    """Neither wins silently; both names are shown."""
    tensors = theirs(1) | {f"model.{n}": x for n, x in theirs(2).items()}
    path = saved(tmp_path / "x.safetensors", tensors)
    refused(path, r"more than once, as (\S+) of x.safetensors and model.\1 of x.safetensors; expec")


# ---- kinds of numbers ----

KINDS = {
    "int8": lambda x: (64 * x).to(torch.int8),
    "int32": lambda x: (64 * x).to(torch.int32),
    "fp8": lambda x: x.to(torch.float8_e4m3fn),
    "fp8 e5m2": lambda x: x.to(torch.float8_e5m2),
    "fp4, packed": lambda x: (64 * x[:, ::2]).to(torch.uint8),
    "bool": lambda x: x > 0,
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_quantised_numbers_are_refused_by_name(tmp_path, kind):
    """Of one tensor, without any scale beside it."""
    weights = theirs()
    weights[NAME] = kind(weights[NAME])
    path = saved(tmp_path / "x.safetensors", weights)
    refused(path, f"tensor {NAME} holds \\w+ numbers, .* quantised weights.*; take the file in bf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ordinary_numbers_are_read(tmp_path, dtype):
    """Of every width."""
    weights = {name: x.to(dtype) for name, x in theirs().items()}
    path = saved(tmp_path / "x.safetensors", weights)
    assert_holds(load(path), {name: x.float() for name, x in weights.items()})


# ---- what a file is ----

LORA = {"diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 32)}
SCALES = {"transformer_blocks.0.attn1.to_q.weight_scale": torch.ones(1)}
STRANGERS = {
    "a LoRA": (LORA, "a LoRA, .*'.*to_q.lora_A.weight'.; merge it"),
    "scales": (
        theirs() | SCALES,
        "quantised weights .'.*weight_scale'.; take the file in bfloat16",
    ),
    "GPTQ": ({"transformer_blocks.0.attn1.to_q.qweight": torch.ones(1)}, "quantised weights"),
    "bitsandbytes": (theirs() | {f"{NAME}.quant_state.x": torch.ones(1)}, "quantised weights"),
    "a text encoder": ({"model.embed_tokens.weight": torch.ones(2)}, "a text encoder"),
    "a VAE": ({"decoder.conv_in.conv.bias": torch.ones(2)}, "a VAE .*; it belongs in --ltx2"),
    "a vocoder": ({"upsamplers.0.bias": torch.ones(2)}, "a vocoder"),
    "connectors": ({"video_connector.learnable_registers": torch.ones(2)}, "text connectors"),
    "no sound": ({n: x for n, x in theirs().items() if "audio" not in n}, "video without sound"),
    "a toy": (random_model(CFG).state_dict(), "a model of the toy .*; it needs --config toy"),
    "features": ({"video": torch.ones(2), "audio": torch.ones(2)}, "features of one prompt"),
    "unknown": ({"x.y": torch.ones(2)}, r"has no \w+\S* \(\d+ such keys\): expected the"),
}


@pytest.mark.parametrize("tensors, message", STRANGERS.values(), ids=STRANGERS.keys())
def test_a_refusal_says_what_the_file_is(tmp_path, tensors, message):
    """With one of its keys, and what to do."""
    refused(saved(tmp_path / "x.safetensors", tensors), message)


FORMATS = {
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
    "GGUF": (b"GGUF" + bytes(99), "quantised weights in the format GGUF; take the .safetensors"),
    "a page": (b"<!DOCTYPE html><html>", "a web page; the download went wrong"),
    "JSON": (b'{"weight_map": {}}', "JSON, not weights; an index of shards must be called"),
    "macOS": (b"\0\5\x16\7" + bytes(99), "a note that macOS keeps"),
    "empty": (b"", "an empty file; download it again"),
    "reserved": (bytes(999), "only zeros so far"),
    "old pickle": (b"\x80\2}q\0.", "a pickle, which may run code"),
    "archive": (b"\x1f\x8b\x08", "a compressed archive; unpack it"),
    "words": (b"weights", "not a whole safetensors file; download it again"),
}  # fmt: skip


@pytest.mark.parametrize("data, message", FORMATS.values(), ids=FORMATS.keys())
def test_other_formats_are_named(tmp_path, data, message):
    """By their first bytes."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    refused(path, f"^{path}: {message}")


@pytest.mark.parametrize("first", [b"\x80", b"{", b"<", b"PK", b"\x1f\x8b\x08"])
def test_half_a_safetensors_file_is_not_taken_for_another_format(tmp_path, first):
    """It begins with a length, whose bytes may be those of another format."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(first.ljust(8, b"\0") + b'{"a": ')
    refused(path, f"^{path}: not a whole safetensors file; download it again$")


@pytest.mark.parametrize("ending", [".pt", ".bin", ".ckpt"])
def test_a_pickle_is_not_opened_but_its_conversion_is_shown(tmp_path, ending):
    """Alone and in a folder; the command has the path, quoted."""
    path = tmp_path / "my folder" / f"model{ending}"
    path.parent.mkdir()
    torch.save({"generator": theirs()}, path)
    for place in (path, path.parent):
        refused(place, f"{path}: a pickle of PyTorch, .* full_size.weights '{path}' --out X.safet")


def test_no_row_fits_a_model_that_is_read():
    """Names of LTX-2's transformer and of the toy fit only their own row."""
    rows = [*contents.CHANGED, *contents.OTHERS]
    full = ltx2.key_table(ltx2.build(config.LTX2, device="meta"))
    assert contents.named([f"model.{name}" for name in full.values()], rows) is None
    assert contents.named(full, rows) is None
    assert "a model of the toy" in contents.named(full, [contents.LTX, contents.TOY])
    assert "a transformer of LTX-2" in contents.named(full.values(), [contents.TOY, contents.LTX])


# ---- files and folders ----


def test_the_index_decides_which_shard_counts(tmp_path):
    """A stale copy in another shard, and a tensor that no index names, are not read."""
    weights, index = theirs(), sharded(tmp_path, theirs())
    where = json.loads(index.read_text())["weight_map"]
    key = f"model.{NAME}"
    (other,) = set(where.values()) - {where[key]}
    stale = load_file(tmp_path / other) | {key: theirs(2)[NAME], "model.x.y": torch.ones(1)}
    save_file(stale, tmp_path / other)
    save_file(theirs(2), tmp_path / "consolidated.safetensors")
    for path in (index, tmp_path):
        assert_holds(load(path), weights)


def test_shards_may_lie_in_a_subfolder_and_beside_notes_of_macos(tmp_path):
    """As the index says; names with umlauts and spaces; ._ files do not count."""
    folder = tmp_path / "mein Ordner ä"
    folder.mkdir()
    weights, index = theirs(), sharded(folder, theirs())
    listing = json.loads(index.read_text())
    (folder / "shards").mkdir()
    for file in set(listing["weight_map"].values()):
        shutil.move(folder / file, folder / "shards" / file)
    where = {key: f"shards/{file}" for key, file in listing["weight_map"].items()}
    index.write_text(json.dumps({"weight_map": where}))
    (folder / "._g.safetensors").write_bytes(b"\0\5\x16\7")
    (folder / "._g.safetensors.index.json").write_bytes(b"\0\5\x16\7")
    assert_holds(load(folder), weights)
    refused(index.parent / "shards" / "g-00001-of-00002.safetensors", "shard 1 of 2; name its fol")
    index.write_text(json.dumps({"weight_map": {"x": "../g.safetensors"}}))
    refused(folder, "not an index of shards")


def test_shards_without_an_index_are_read_if_all_are_there(tmp_path):
    """Their names say how many there are; a tensor in two of them is refused."""
    weights, index = theirs(), sharded(tmp_path, theirs())
    index.unlink()
    assert_holds(load(tmp_path), weights)
    first, second = sorted(tmp_path.iterdir())
    double = next(iter(load_file(first)))
    save_file(load_file(second) | {double: torch.ones(1)}, second)
    refused(tmp_path, f"more than once, as {double} of {first.name} and {double} of {second.name}")
    second.unlink()
    refused(tmp_path, r"g-00002-of-00002.safetensors is missing \(1 of 2 shards\)")


def test_a_single_shard_is_a_whole_model(tmp_path):
    """It may be named itself, or by its folder."""
    weights = theirs()
    file = saved(tmp_path / "g-00001-of-00001.safetensors", weights)
    for path in (file, tmp_path):
        assert_holds(load(path), weights)


def test_a_tensor_that_the_index_names_must_be_in_its_shard(tmp_path):
    """Otherwise the shard is of another version."""
    index = sharded(tmp_path, theirs())
    key = f"model.{NAME}"
    shard = tmp_path / json.loads(index.read_text())["weight_map"][key]
    save_file({name: x for name, x in load_file(shard).items() if name != key}, shard)
    refused(index, f"{key} is not in {shard.name}; download it again")


def test_several_models_in_a_folder_are_listed(tmp_path):
    """As in the root of LTX-2's repository."""
    for name in ("ltx-dev", "ltx-fp8"):
        saved(tmp_path / f"{name}.safetensors", theirs())
    refused(tmp_path, "found 2; name one of them: ltx-dev.safetensors, ltx-fp8.safetensors$")


@pytest.mark.parametrize("place", ["snapshots/abc", "snapshots/abc/g.safetensors.index.json", ""])
def test_the_cache_of_the_hub_is_a_folder_of_links(tmp_path, place):
    """The snapshot, the index in it, and the folder of the repository."""
    weights, source = theirs(), tmp_path / "source"
    source.mkdir()
    sharded(source, weights)
    home = tmp_path / "models--x--y"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots" / "abc").mkdir(parents=True)
    for number, file in enumerate(source.iterdir()):
        shutil.move(file, home / "blobs" / str(number))
        (home / "snapshots" / "abc" / file.name).symlink_to(home / "blobs" / str(number))
    assert_holds(load(home / place), weights)


def test_of_several_snapshots_the_main_one_counts(tmp_path):
    """As the cache's own reference says; without it the folder is refused."""
    for name in ("old", "new"):
        saved(tmp_path / "snapshots" / name / f"{name}.safetensors", theirs())
    refused(tmp_path, "expected one .safetensors file or index, found 0")
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("new")
    assert [file.name for file in checkpoint.members(tmp_path)] == ["new.safetensors"]


# ---- diffusers ----


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory):
    """The transformer/ folder of diffusers, in two shards, and its weights by our names."""
    from test_model import in_diffusers

    module = pytest.importorskip("diffusers.models.transformers.transformer_ltx2")
    folder = tmp_path_factory.mktemp("ltx2")
    model = random_model(TEACHER, torch.float32)
    in_diffusers(model, module).save_pretrained(folder / "transformer", max_shard_size="300KB")
    assert len(list(folder.glob("transformer/*.safetensors"))) > 1
    return folder, model


@pytest.mark.parametrize("place", ["", "transformer"])
def test_the_transformer_of_diffusers_is_read(diffusers_folder, place):
    """From its folder or from the root; the three flags come from its config."""
    folder, model = diffusers_folder
    net = load(folder / place, replace(TEACHER, **dict(rope_layout="interleaved")))
    assert net.cfg == TEACHER
    assert all(torch.equal(x, net.state_dict()[n]) for n, x in model.state_dict().items())


OTHER_CONFIGS = {
    "gates": ({"gated_attn": True}, "apply_gated_attention=True belongs to a later LTX"),
    "modulation": ({"cross_attn_mod": True}, "cross_attention_adaln=True belongs to a later LTX"),
    "bias": ({"ff_bias": False}, "ff_bias=False belongs to a later LTX"),
    "rope": ({"rope_type": "x"}, "rope_type='x'; expected split or interleaved"),
}


@pytest.mark.parametrize("change, message", OTHER_CONFIGS.values(), ids=OTHER_CONFIGS.keys())
def test_other_configs_of_diffusers_are_refused(diffusers_folder, tmp_path, change, message):
    """A class or a switch that LTX-2 does not have."""
    folder = shutil.copytree(diffusers_folder[0] / "transformer", tmp_path / "transformer")
    settings = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(settings))
    refused(folder, message, TEACHER)


# ---- conversion ----


def convert(monkeypatch, capsys, *args):
    monkeypatch.setitem(config.CONFIGS, "full", CFG)
    return run_here(ltx2, args, monkeypatch, capsys)


def test_a_file_of_the_official_training_is_converted(tmp_path, monkeypatch, capsys):
    """The averaged generator, in bfloat16 and with flags, as one file; no critic, no sinks."""
    raw, averaged, out = theirs(1), theirs(2), tmp_path / "x.safetensors"
    found = {"generator": raw, "generator_ema": averaged, "critic": raw, "step": 3}
    found["optimizer"] = {"state": {0: {"exp_avg": torch.ones(3)}}, "lr": [1e-5]}
    torch.save(found, tmp_path / "model.pt")
    args = tmp_path / "model.pt", "--config", "full", "--out", out
    status, said, err = convert(monkeypatch, capsys, *args)
    assert status == 0, err
    assert "the averaged ones are taken" in said and f"wrote {out}" in said
    expected = {name: x.bfloat16().float() for name, x in averaged.items()}
    assert_holds(load(out, TEACHER), expected)  # its flags win over the config
    assert ltx2.Source(out, TEACHER).cfg == replace(CFG, name=TEACHER.name)


def test_shards_and_diffusers_are_converted_too(diffusers_folder, tmp_path, monkeypatch, capsys):
    """Everything that can be read becomes one file."""
    folder, model = diffusers_folder
    out = tmp_path / "x.safetensors"
    args = folder, "--config", "full", "--out", out
    assert convert(monkeypatch, capsys, *args)[0] == 0
    net = ltx2.Source(out, CFG).load(dtype=torch.float32)
    assert net.cfg.rope_layout == "split"
    for name, x in model.state_dict().items():
        assert torch.equal(x.bfloat16().float(), net.state_dict()[name])


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_code_in_a_pickle_never_runs(tmp_path, monkeypatch, capsys):
    """Converting refuses it in one line; a file that is no pickle as well."""
    torch.save({"generator": theirs(), "x": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "words.pt").write_text("weights")
    for name in ("evil", "words"):
        args = tmp_path / f"{name}.pt", "--config", "full", "--out", tmp_path / "x.safetensors"
        status, _, err = convert(monkeypatch, capsys, *args)
        assert status == 2 and f"{name}.pt: not opened (" in err and err.count("\n") == 1
    assert not (tmp_path / "x.safetensors").exists()


def test_nothing_else_unpickles():
    """`torch.load` stands in one place, with weights_only."""
    found = [
        (file, line.strip())
        for file in ORDER
        for line in (ROOT / file).read_text("utf-8").splitlines()
        if re.search(r"torch\.load\(|pickle\.loads?\(", line)
    ]
    ((file, line),) = found
    assert file == "full_size/checkpoint.py" and "weights_only=True, mmap=True)" in line


def test_weights_are_checked_without_reading_them(tmp_path):
    """A file whose numbers would be refused passes the check of its headers."""
    weights = theirs()
    weights[NAME] *= torch.nan
    source = ltx2.Source(single_file(tmp_path / "x.safetensors", weights, flags=LTX2_FLAGS), CFG)
    assert source.checkpoint.shapes[NAME] == (32, 32)
