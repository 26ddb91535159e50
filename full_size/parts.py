"""The other parts of LTX-2: text encoder, connectors, two VAEs, vocoder.

The libraries transformers and diffusers would replace a missing tensor by random numbers, and
ignore an unknown one. So `check_part` first compares config and headers with the class that a part
must have, without reading weights.
"""

import inspect
import json
from pathlib import Path
from typing import NamedTuple

import torch

from full_size.checkpoint import INDEX, OTHER_FORMATS, check_float, members
from plumbing import contents, files, texts

REQUIRED = "the full size needs: pip install -r requirements-full.txt"


class Part(NamedTuple):
    """What a part of LTX-2 must be."""

    network: type  # class of diffusers or transformers
    switches: dict  # settings that change its numbers, but neither names nor shapes
    unread: tuple = ()  # prefixes of tensors that may be missing, because nobody uses them


LATER = {  # class or setting -> the first LTX that has it
    "LTX2VocoderWithBWE": "LTX-2.3",
    "per_modality_projections": "LTX-2.3",
    "video_gated_attn": "LTX-2.3",
    "audio_gated_attn": "LTX-2.3",
    "Gemma4ForConditionalGeneration": "LTX-2.5",
    "Gemma4UnifiedForConditionalGeneration": "LTX-2.5",
}


def part_files(folder) -> dict:
    """Return the files of a part that its library reads, as `members` does."""
    # Trap: the published text_encoder/ has a second copy, diffusion_pytorch_model*, which nobody
    # reads. If there are an index and a file, diffusers takes the index, transformers the file.
    folder = Path(folder)
    stem, order = "diffusion_pytorch_model", (INDEX, ".safetensors")
    if folder.name == "text_encoder":
        stem, order = "model", (".safetensors", INDEX)
    for path in (folder / f"{stem}{ending}" for ending in order):
        if path.is_file():
            return members(path)
    for path in (p for ending in OTHER_FORMATS for p in folder.glob(f"[!.]*{ending}")):
        raise ValueError(f"{path}: {contents.described(path)}")
    raise ValueError(f"{folder}: no {stem}.safetensors and no index of it; download it again")


def check_folders(folder, parts):
    """Raise ValueError unless LTX-2's folder has folders of these names."""
    for name in parts:
        if not Path(folder, name).is_dir():
            raise ValueError(f"{folder}: no {name}/; expected LTX-2's folder in diffusers' format")


def check_parts(folder, parts) -> dict:
    """Raise ValueError unless these parts, {name: Part}, are whole; return their configs."""
    return {name: check_part(Path(folder, name), part) for name, part in parts.items()}


def check_part(folder, part) -> object:
    """Return the config of a part, as its library reads it.

    Raises ValueError unless the folder holds what the part must be, by its config and headers.
    """
    check_folders(folder.parent, [folder.name])
    config, name = texts.read_json(folder / "config.json"), part.network.__name__
    kind = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    if kind != name:
        raise ValueError(f"{folder}: of the class {kind}, expected {name}{_later(kind)}")
    if config.get("quantization_config"):
        raise ValueError(f"{folder}: {name} with quantised weights; take the part in bfloat16")
    for switch, value in part.switches.items():
        default = inspect.signature(part.network.__init__).parameters[switch].default
        if not _same(found := config.get(switch, default), value):
            raise ValueError(
                f"{folder}: {name} with {switch}={found}, expected {value}{_later(switch)}"
            )
    net = _without_contents(folder, part.network, config)
    _check_tensors(folder, part, net)
    return net.config


def _same(a, b) -> bool:
    return json.loads(json.dumps([a])) == json.loads(json.dumps([b]))  # JSON has no tuples


def _later(word) -> str:
    return f": it belongs to {LATER[word]}, {contents.LTX_2}" if word in LATER else ""


def _without_contents(folder, network, config):
    """Build a network on the meta device."""
    try:
        with torch.device("meta"):
            is_diffusers = hasattr(network, "load_config")
            given = config if is_diffusers else network.config_class.from_dict(config)
            return network.from_config(given) if is_diffusers else network(given)
    except Exception as error:  # libraries raise anything for a foreign value
        raise ValueError(f"{folder}/config.json: makes no {network.__name__} ({error})") from None


def _check_tensors(folder, part, net):
    """Raise ValueError unless the files hold the tensors of `net`, by name, shape and type."""
    own = {_plain(name): name for name in net.state_dict()}
    # Older files also hold buffers that the state dict leaves out.
    buffers = {_plain(name) for name, _ in net.named_buffers()}
    found, where = {}, f"{folder}: {part.network.__name__}"
    for file in part_files(folder):
        with files.opened(file) as f:
            for key in f.keys():
                header, name = f.get_slice(key), _plain(key)
                if name in found:
                    raise ValueError(f"{where} has {key} twice; download this folder again")
                found[name] = key, tuple(header.get_shape())
                if name in own or name not in buffers:
                    check_float(folder, key, header.get_dtype())
    missing = [own[name] for name in own if name not in found]
    odd = sorted(found[name][0] for name in found.keys() - own.keys() - buffers)
    for keys, what in ((missing, "no tensor"), (odd, "an unexpected tensor")):
        if keys := [key for key in keys if not key.startswith(part.unread)]:
            others = f" ({len(keys)} such)" if len(keys) > 1 else ""
            advice = contents.named(odd, contents.CHANGED) or "download this folder again"
            raise ValueError(f"{where} has {what} {keys[0]}{others}: {advice}")
    state = net.state_dict()
    for name, (key, shape) in found.items():
        if name in own and shape != (wanted := tuple(state[own[name]].shape)):
            raise ValueError(
                f"{where} has {key} of shape {shape}, but its config.json asks for {wanted}; "
                f"download this folder again"
            )


def load_part(folder, part, dtype):
    """Check a part, and load it by its library, from safetensors files only."""
    check_part(folder, part)
    options = dict(dtype=dtype, local_files_only=True, use_safetensors=True)
    if hasattr(part.network, "load_config"):  # of diffusers, which would warn
        from diffusers.utils import is_accelerate_available

        options["low_cpu_mem_usage"] = is_accelerate_available()
    try:
        net, report = part.network.from_pretrained(folder, output_loading_info=True, **options)
    except OSError as error:
        raise ValueError(f"{folder}: not read ({error})") from None
    # The library may rename tensors, so ask it as well.
    lost = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if lost := sorted(str(name) for name in lost if not str(name).startswith(part.unread)):
        raise ValueError(f"{folder}: {lost[0]} has no place in {part.network.__name__}")
    return net


def _plain(name) -> str:
    """Return the name of a tensor without words that versions of transformers move around.

    >>> _plain("language_model.model.norm.weight"), _plain("model.language_model.norm.weight")
    ('norm.weight', 'norm.weight')
    """
    words = "model", "language_model", "vision_model"
    return ".".join(word for word in name.split(".") if word not in words)
