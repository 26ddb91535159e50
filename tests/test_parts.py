"""The other parts of LTX-2: whole, of the right class, and read exactly."""

import json
import shutil

import pytest
import torch
from helpers import random_decoders, save_text_path
from safetensors.torch import load_file, save_file

from benchmarks import bench_decode
from full_size import decoders, memory, parts
from full_size import text as captions

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
NETWORKS = ("text_encoder", "connectors", *decoders.PARTS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """LTX-2's folder with tiny networks."""
    folder = tmp_path_factory.mktemp("ltx2")
    save_text_path(folder, 16)
    for net, name in zip(random_decoders(), decoders.PARTS):
        net.save_pretrained(folder / name)
    return folder


@pytest.fixture
def folder(whole, tmp_path, monkeypatch):
    """A copy that a test may damage."""
    classes = bench_decode.tiny_decoder_classes()
    monkeypatch.setattr(decoders, "decoder_classes", lambda: classes)
    return shutil.copytree(whole, tmp_path / "LTX-2")


def check(folder):
    captions.check_folder(folder, 16)
    decoders.check_folder(folder)


def weights_of(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    return file, load_file(file)


def refused(folder, message, monkeypatch):
    """Check that a folder is refused in one line, before a network is loaded."""
    monkeypatch.setattr(parts, "load_part", None)
    with pytest.raises(ValueError, match=message) as error:
        check(folder)
    assert "\n" not in str(error.value)


# ---- tensors ----

FIRST = {  # a tensor of each part, as its file calls it, and as the network does
    "text_encoder": (
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.0.self_attn.q_proj.weight",
    ),
    "connectors": ("text_proj_in.weight",) * 2,
    "vae": ("decoder.conv_out.conv.weight",) * 2,
    "audio_vae": ("latents_std",) * 2,
    "vocoder": ("conv_out.bias",) * 2,
}
DAMAGES = {
    "missing": (lambda t, key: t.pop(key), "has no tensor {}: download this folder again"),
    "renamed": (lambda t, key: t.update({f"{key}_old": t.pop(key)}), "has no tensor {}: download"),
    "more": (lambda t, _: t.update(x=torch.ones(1)), "has an unexpected tensor x: download this"),
    "LTX-2.3": (
        lambda t, _: t.update({"a.to_gate_logits.bias": torch.ones(1)}),
        r"has an unexpected tensor a.to_gate_logits.bias: weights of LTX-2.3 or later",
    ),
    "shape": (
        lambda t, key: t.update({key: torch.ones(1, 2)}),
        r"of shape \(1, 2\), but its config.json asks for \(.*\); download",
    ),
    "int8": (lambda t, key: t.update({key: t[key].to(torch.int8)}), "holds I8 .* quantised weig"),
    "fp8": (
        lambda t, key: t.update({key: t[key].to(torch.float8_e4m3fn)}),
        "holds F8_E4M3 numbers, so these are quantised weights",
    ),
    "scales": (
        lambda t, key: t.update({f"{key}_scale": torch.ones(1)}),
        "has an unexpected tensor .*_scale: quantised weights",
    ),
}


@pytest.mark.parametrize("part", NETWORKS)
@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES.keys())
def test_other_tensors_are_refused_by_part_class_and_name(
    folder, monkeypatch, part, damage, message
):
    """One too few, renamed, too many, of another shape or kind: from the headers alone."""
    check(folder)
    file, tensors = weights_of(folder, part)
    key, name = FIRST[part]
    damage(tensors, key)
    save_file(tensors, file, {"format": "pt"})
    networks = {**captions.networks(), **decoders.networks()}
    kind = networks[part].network.__name__ if "holds" not in message else "tensor"
    refused(folder, f"^{folder / part}: {kind} .*{message.format(name)}", monkeypatch)


def test_tensors_that_nobody_reads_may_be_missing(folder):
    """Encoders of the VAEs, and the head of the language model, in either direction."""
    for part in ("vae", "audio_vae"):
        file, tensors = weights_of(folder, part)
        kept = {name: x for name, x in tensors.items() if not name.startswith("encoder.")}
        assert len(kept) < len(tensors)
        save_file(kept, file, {"format": "pt"})
    file, tensors = weights_of(folder, "text_encoder")
    save_file(tensors | {"lm_head.weight": torch.ones(128, 16)}, file, {"format": "pt"})
    check(folder)
    assert len(decoders.load(folder)) == 3


@pytest.mark.parametrize("kind", ["missing_keys", "unexpected_keys", "mismatched_keys"])
def test_what_the_library_could_not_use_is_refused(folder, monkeypatch, kind):
    """Our check of names and shapes may pass where a version of the library renames tensors."""
    part = decoders.networks()["vocoder"]
    report = dict(missing_keys=[], unexpected_keys=[], mismatched_keys=[]) | {kind: ["x.bias"]}
    monkeypatch.setattr(part.network, "from_pretrained", lambda *_, **__: (None, report))
    with pytest.raises(ValueError, match="vocoder: x.bias has no place in LTX2Vocoder"):
        parts.load_part(folder / "vocoder", part, torch.float32)


VERSIONS = {  # of transformers, and how each calls the same tensors
    "4.50": {},
    "4.50, with vision_model": {"vision_tower": "vision_tower.vision_model"},
    "4.52": {"language_model.model": "model.language_model", "vision_tower": "model.vision_tower",
             "multi_modal_projector": "model.multi_modal_projector"},
    "4.57": {"language_model.model": "model.language_model",
             "vision_tower": "model.vision_tower.vision_model",
             "multi_modal_projector": "model.multi_modal_projector"},
}  # fmt: skip


@pytest.mark.parametrize("renames", VERSIONS.values(), ids=VERSIONS.keys())
def test_the_text_encoder_may_have_names_of_several_versions(folder, renames):
    """Its features are the same bits. A buffer of old versions may be there as well."""
    file, tensors = weights_of(folder, "text_encoder")
    renamed = {"vision_tower.embeddings.position_ids": torch.arange(4)[None]}
    for name, x in tensors.items():
        for ours, theirs in renames.items():
            name = name.replace(ours, theirs)
        renamed[name] = x
    expected = captions.encode_and_free(folder, ["rain"])[0]["rain"]
    save_file(renamed, file, {"format": "pt"})
    captions.check_folder(folder)
    found = captions.encode_and_free(folder, ["rain"])[0]["rain"]
    assert all(torch.equal(x, y) for x, y in zip(found, expected))


# ---- configs ----

CONFIGS = {
    "vocoder of 2.3": ("vocoder", {"_class_name": "LTX2VocoderWithBWE"},
                       "class LTX2VocoderWithBWE, expected LTX2Vocoder: it belongs to LTX-2.3"),
    "connectors of 2.3": ("connectors", {"per_modality_projections": True},
                          "per_modality_projections=True, .* it belongs to LTX-2.3"),
    "gates of 2.3": ("connectors", {"video_gated_attn": True}, "it belongs to LTX-2.3, this proj"),
    "encoder of 2.5": ("text_encoder", {"architectures": ["Gemma4ForConditionalGeneration"]},
                       "it belongs to LTX-2.5"),
    "another VAE": ("vae", {"_class_name": "AutoencoderKL"}, "class AutoencoderKL, expected Auto"),
    "no class": ("vae", {"_class_name": None}, "of the class None, expected AutoencoderKLLTX2Vid"),
    "causal": ("vae", {"decoder_causal": True}, "decoder_causal=True, expected False"),
    "padding": ("vae", {"decoder_spatial_padding_mode": "zeros"}, "padding_mode=zeros, expected r"),
    "causality": ("audio_vae", {"causality_axis": "width"}, "causality_axis=width, expected heig"),
    "rate": ("vocoder", {"output_sampling_rate": 48000}, "rate=48000, expected 24000"),
    "dilations": ("vocoder", {"resnet_dilations": [[1, 3, 5]] * 2 + [[1, 3, 7]]}, "dilations="),
    "rope": ("connectors", {"rope_type": "interleaved"}, "rope_type=interleaved, expected split"),
    "quantised": ("text_encoder", {"quantization_config": {"load_in_8bit": True}}, "quantised"),
    "nonsense": ("vae", {"block_out_channels": "x"}, "vae/config.json: makes no AutoencoderKL"),
    "deeper": ("text_encoder", {"text_config": {"model_type": "gemma3_text", "hidden_size": 8}},
               "has no tensor|asks for|has an unexp"),
}  # fmt: skip


@pytest.mark.parametrize("part, change, message", CONFIGS.values(), ids=CONFIGS.keys())
def test_other_classes_and_switches_are_refused(folder, monkeypatch, part, change, message):
    """Also where every name and shape would fit."""
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change))
    refused(folder, message, monkeypatch)


def test_a_switch_that_a_config_leaves_out_has_the_default_of_its_class(folder, monkeypatch):
    """The video decoder would be causal."""
    path = folder / "vae" / "config.json"
    settings = json.loads(path.read_text("utf-8"))
    del settings["decoder_causal"]
    path.write_text(json.dumps(settings))
    refused(folder, "decoder_causal=True, expected False", monkeypatch)


def test_text_encoder_connectors_and_transformer_fit_each_other(folder, tmp_path):
    """An encoder of another size, and a config that reads another width."""
    with pytest.raises(ValueError, match="makes features of width 16, the config reads 3840"):
        captions.check_folder(folder, 3840)
    save_text_path(tmp_path / "wide", 24)
    shutil.rmtree(folder / "connectors")
    shutil.copytree(tmp_path / "wide" / "connectors", folder / "connectors")
    with pytest.raises(
        ValueError, match="makes 3 states of width 16, connectors/ read 3 of width 24"
    ):
        captions.check_folder(folder)


# ---- files ----


def in_two_shards(folder, part, stem):
    """Split the weights of a part into two files with an index; return the files."""
    file, tensors = weights_of(folder, part)
    names, where = sorted(tensors), {}
    file.unlink()
    for number, half in enumerate((names[::2], names[1::2]), 1):
        shard = f"{stem}-{number:05}-of-00002.safetensors"
        save_file({n: tensors[n] for n in half}, folder / part / shard, {"format": "pt"})
        where |= dict.fromkeys(half, shard)
    index = folder / part / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sorted((folder / part).glob("*-of-*"))


STEMS = {"text_encoder": "model", "vae": "diffusion_pytorch_model"}


@pytest.mark.parametrize("part, stem", STEMS.items(), ids=STEMS.keys())
def test_shards_of_a_part_must_be_whole(folder, monkeypatch, part, stem):
    """Both are read; none may be missing, cut, or hold a tensor of the other."""
    expected = parts.load_part(folder / part, networks()[part], torch.float32).state_dict()
    first, second = in_two_shards(folder, part, stem)
    check(folder)
    found = parts.load_part(folder / part, networks()[part], torch.float32).state_dict()
    assert all(torch.equal(x, found[name]) for name, x in expected.items())
    data, (key, x) = second.read_bytes(), next(iter(load_file(first).items()))
    second.write_bytes(data[:-10])
    refused(folder, f"{second.name}: not a whole safetensors file", monkeypatch)
    second.unlink()
    refused(folder, f"{second.name} is missing .1 of 2 shards", monkeypatch)
    second.write_bytes(data)
    save_file(load_file(second) | {key: x}, second, {"format": "pt"})
    refused(folder, f"has {key} twice; download this folder again", monkeypatch)


def networks():
    return {**captions.networks(), **decoders.networks()}


@pytest.mark.parametrize(
    "part, stem, taken",
    [("text_encoder", "model", "model.safetensors"),
     ("vae", "diffusion_pytorch_model", "shard.safetensors")],
)  # fmt: skip
def test_beside_an_index_the_file_is_what_its_library_reads(tmp_path, part, stem, taken):
    """transformers takes the file, diffusers the index."""
    (tmp_path / part).mkdir()
    for name in (f"{stem}.safetensors", "shard.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / part / name)
    index = json.dumps({"weight_map": {"x": "shard.safetensors"}})
    (tmp_path / part / f"{stem}.safetensors.index.json").write_text(index)
    assert [file.name for file in parts.part_files(tmp_path / part)] == [taken]


def test_a_second_copy_of_the_text_encoder_is_not_read(folder, capsys):
    """As in the published folder: neither checked nor counted."""
    (folder / "text_encoder" / "diffusion_pytorch_model.safetensors").write_bytes(bytes(10**6))
    (folder / "text_encoder" / "._model.safetensors").write_bytes(b"\0\5\x16\7")
    check(folder)
    memory.check_text(folder, 10**9)
    size = sum(file.stat().st_size for part in ("text_encoder", "connectors")
               for file in parts.part_files(folder / part))  # fmt: skip
    assert size < 10**6 and f"{size / 1e9:.2f} GB" in capsys.readouterr().out


@pytest.mark.parametrize("part", NETWORKS)
def test_pickles_are_not_read(folder, monkeypatch, part):
    """The libraries would fall back to them."""
    file, tensors = weights_of(folder, part)
    file.unlink()
    pickled = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(tensors, folder / part / pickled)
    refused(folder, f"{pickled}: a pickle of PyTorch", monkeypatch)


@pytest.mark.parametrize("part", NETWORKS)
def test_a_pointer_of_lfs_is_named(folder, monkeypatch, part):
    """In place of weights, or of the config."""
    file, _ = weights_of(folder, part)
    data = file.read_bytes()
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(folder, f"{file}: a pointer of Git LFS", monkeypatch)
    file.write_bytes(data)
    config = folder / part / "config.json"
    config.write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(folder, f"{config}: not whole; expected a JSON object", monkeypatch)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_not_whole_is_refused(folder, name):
    """In one line."""
    (folder / "tokenizer" / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="LTX-2/tokenizer: no tokenizer .*; download it again"):
        captions.load_text_path(folder)


# ---- numbers ----


def test_decoders_equal_those_of_diffusers(folder):
    """Every tensor, and what they make of latents: the difference is 0."""
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    classes = AutoencoderKLLTX2Video, AutoencoderKLLTX2Audio, LTX2Vocoder
    theirs = [kind.from_pretrained(folder / name) for kind, name in zip(classes, decoders.PARTS)]
    ours = decoders.load(folder, dtype=torch.float32)
    latents = torch.randn(1, 128, 2, 2, 2), torch.randn(1, 8, 3, 16), torch.randn(1, 2, 5, 64)
    for one, other, x in zip(ours, theirs, latents):
        kept = {n: t for n, t in other.state_dict().items() if not n.startswith("encoder.")}
        assert kept.keys() == one.state_dict().keys()
        assert all(torch.equal(t, one.state_dict()[name]) for name, t in kept.items())
        run = [net.decode if hasattr(net, "decode") else net for net in (one, other.eval())]
        found, expected = (call(x) for call in run)
        found, expected = (getattr(y, "sample", y) for y in (found, expected))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("part, name", [("vae", "decoder.conv_in.conv.weight"),
                                        ("vocoder", "conv_in.weight")])  # fmt: skip
@pytest.mark.parametrize("factor, message", [(float("nan"), "NaN or infinity"), (0, "only zeros")])
def test_numbers_of_decoders_are_checked(folder, part, name, factor, message):
    """NaN would be noticed in the film only, zeros never."""
    file, tensors = weights_of(folder, part)
    tensors[name] *= factor
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{folder / part}: tensor {name} holds {message}"):
        decoders.load(folder)
