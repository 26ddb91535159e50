"""Checkpoints: where their files are, which tensors count, and whether they hold a transformer.

A checkpoint is a file, an index of shards, or a folder. `members` lists its files. `Checkpoint`
finds a transformer's tensors in them, whatever wrapped their names. For this it reads only headers,
so a wrong file is refused before anything slow begins.
"""

import json
import pickle
import re
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import torch

from plumbing import contents, files, texts

# ---- files ----

INDEX = ".safetensors.index.json"
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
OTHER_FORMATS = (".pt", ".pth", ".bin", ".ckpt", ".gguf")


def members(path) -> dict:
    """Return {file: names of its tensors that count, or None for all} of a checkpoint."""
    path = Path(path)
    if path.is_dir():
        path = _snapshot(path)
        found = [p for p in (*path.glob("*"), *path.glob("transformer/*")) if p.is_file()]
        chosen = one_checkpoint([p.relative_to(path).as_posix() for p in found], path)
        return _members_of(path, chosen)
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    if path.name.endswith(INDEX):
        return _members_of_index(path)
    if (shard := SHARD.fullmatch(path.name)) and int(shard[3]) > 1:
        raise ValueError(f"{path}: shard {int(shard[2])} of {int(shard[3])}; name its folder")
    return {path: None}


def one_checkpoint(names, folder="") -> list[str]:
    """Choose the files of the one checkpoint among all names in a folder, here or on the Hub.

    >>> one_checkpoint(["x.safetensors.index.json", "x-00001-of-00001.safetensors", "._x.bin"])
    ['x-00001-of-00001.safetensors', 'x.safetensors.index.json']
    """
    names = sorted(n for n in names if not PurePosixPath(n).name.startswith("."))
    for place in ("", "transformer/"):  # the latter: LTX-2's folder in the format of diffusers
        stems = {_stem(n.removeprefix(place)): n for n in names if n.startswith(place)}
        found = {stem: n for stem, n in stems.items() if stem and "/" not in stem}
        # An index states that its shards are the model; a file beside it is something else.
        indexed = {stem for stem in found if f"{place}{stem}{INDEX}" in names}
        if len(models := indexed or found) == 1:
            return _files_of_model(names, place, *models)
        if models:
            raise ValueError(
                f"{folder}: expected one .safetensors file or index, found {len(models)}; name one "
                f"of them: {', '.join(found[stem] for stem in sorted(models))}"
            )
    for name in names:
        if name.endswith(OTHER_FORMATS) and (file := Path(folder, name)).is_file():
            raise ValueError(f"{file}: {contents.described(file)}")
    raise ValueError(f"{folder}: expected one .safetensors file or index, found 0")


def _files_of_model(names, place, stem) -> list[str]:
    """Return index and shards, or the one file, of a model; and the config beside it."""
    files_of_it = [n for n in names if _stem(PurePosixPath(n).name) == stem]
    # shards may lie in a folder that the index names
    found = [n for n in files_of_it if n == place + PurePosixPath(n).name]
    found = files_of_it if found == [f"{place}{stem}{INDEX}"] else found
    return found + [n for n in names if n == f"{place}config.json"]


def _stem(name) -> str | None:
    """Return the name of the model that a file belongs to; None for other files."""
    if shard := SHARD.fullmatch(name):
        return shard[1]
    return next((name.removesuffix(x) for x in (INDEX, ".safetensors") if name.endswith(x)), None)


def _snapshot(folder) -> Path:
    """Return the folder of the files if this is a folder models--OWNER--NAME of the Hub's cache."""
    found = sorted(folder.glob("snapshots/*"))
    main = folder / "refs" / "main"
    if len(found) > 1 and main.is_file():
        found = [folder / "snapshots" / texts.read_text(main).strip()]
    return found[0] if len(found) == 1 else folder


def _members_of(folder, names) -> dict:
    """Return what `members` does, for the names that `one_checkpoint` chose in a folder."""
    if index := [name for name in names if name.endswith(INDEX)]:
        return _members_of_index(folder / index[0])
    names = [name for name in names if name.endswith(".safetensors")]
    if shard := SHARD.fullmatch(names[0]):  # no index: all shards must be there
        stem, total = shard[1], int(shard[3])
        names = [f"{stem}-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
    return _existing({folder / name: None for name in names}, folder)


def _members_of_index(path) -> dict:
    found = {}
    try:
        for key, name in texts.read_json(path)["weight_map"].items():
            if ".." in Path(name).parts or Path(name).is_absolute() or not Path(name).name:
                raise ValueError  # outside of this folder, or the folder itself
            found.setdefault(path.parent / name, []).append(key)
        if not found:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(
            f"{path}: not an index of shards; expected JSON with a weight_map from tensors to "
            f"files of the same folder; download it again"
        ) from None
    return _existing(found, path)


def _existing(found, path) -> dict:
    if missing := [file.name for file in found if not file.is_file()]:
        raise ValueError(f"{path}: {missing[0]} is missing ({len(missing)} of {len(found)} shards)")
    return found


# ---- a transformer ----

# Wrappers of PyTorch add a word anywhere in a name; programs add words at its beginning.
WRAPPER = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
AVERAGED = "generator_ema", "model_ema", "ema_model", "ema"
OUTER = *AVERAGED, "generator", "model", "diffusion_model", "velocity_model", "transformer"
# beginnings of names beside the transformer
OTHERS = (
    "vae.", "audio_vae.", "vocoder.", "text_embedding_projection.", "text_encoders.", "critic.",
    "video_embeddings_connector.", "audio_embeddings_connector.",
)  # fmt: skip
FLOATS = "F16", "BF16", "F32", "F64"  # as headers call them
DIFFUSERS = [  # names in diffusers and in LTX-2's file; a name before those that it contains
    ("video_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_video"),
    ("audio_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_audio"),
    ("av_cross_attn_video_scale_shift", "av_ca_video_scale_shift_adaln_single"),
    ("av_cross_attn_audio_scale_shift", "av_ca_audio_scale_shift_adaln_single"),
    ("av_cross_attn_video_a2v_gate", "av_ca_a2v_gate_adaln_single"),
    ("av_cross_attn_audio_v2a_gate", "av_ca_v2a_gate_adaln_single"),
    ("time_embed.", "adaln_single."),
    ("proj_in.", "patchify_proj."),
    ("norm_q.", "q_norm."),
    ("norm_k.", "k_norm."),
]


def transformer_name(key) -> tuple[str | None, bool]:
    """Return LTX-2's name of a tensor, None outside the transformer, and whether it is an average.

    >>> transformer_name("model.diffusion_model.patchify_proj.bias")
    ('patchify_proj.bias', False)
    >>> transformer_name("generator_ema._fsdp_wrapped_module.audio_time_embed.linear.bias")
    ('audio_adaln_single.linear.bias', True)
    >>> transformer_name("vae.decoder.conv_in.bias")
    (None, False)
    """
    name, averaged = WRAPPER.sub("", key), False
    while (word := name.split(".", 1)[0]) in OUTER and word != name:
        name, averaged = name.split(".", 1)[1], averaged or word in AVERAGED
    if name.startswith(OTHERS):
        return None, averaged
    for theirs, ours in DIFFUSERS:
        name = name.replace(theirs, ours)
    return name, averaged


class Checkpoint:
    """Where the transformer's tensors are; they are read one by one, straight to the device."""

    def __init__(self, path, may_unpickle=False):
        """may_unpickle: also read a .pt file, which only the conversion does."""
        self.path, self.metadata, self.may_unpickle = path, {}, may_unpickle
        self.where, self.shapes = {}, {}  # LTX-2's name -> (file, key); LTX-2's name -> shape
        self.keys, found = [], {True: {}, False: {}}  # found: averaged and raw weights
        self.files = members(path)
        for file, listed in self.files.items():
            with self._opened(file) as f:
                self.metadata |= f.metadata() or {}
                keys = set(f.keys())
                if lost := sorted(set(listed or ()) - keys):
                    raise ValueError(f"{path}: {lost[0]} is not in {file.name}; download it again")
                for key in sorted(keys if listed is None else listed):
                    name, averaged = transformer_name(key)
                    self.keys.append(key)
                    if name:
                        found[averaged].setdefault(name, []).append((file, key))
        if found[True] and found[False]:
            (_, key), *_ = next(iter(found[True].values()))
            print(f"{path}: raw and averaged weights; the averaged ones are taken ({key}, ...)")
        self._take(found[True] or found[False])

    def _take(self, found):
        """Keep file, key and shape of each tensor.  Raises ValueError for doubles and integers."""
        for name, places in found.items():
            if len(places) > 1:
                said = " and ".join(f"{key} of {file.name}" for file, key in places)
                raise ValueError(
                    f"{self.path}: holds {name} more than once, as {said}; expected one model"
                )
            self.where[name] = places[0]
        for file in self.files:
            with self._opened(file) as f:
                for name, (place, key) in self.where.items():
                    if place == file:
                        header = f.get_slice(key)  # reads no weights
                        self.shapes[name] = tuple(header.get_shape())
                        check_float(self.path, key, header.get_dtype())

    def _opened(self, file, device="cpu"):
        if self.may_unpickle and file.suffix in OTHER_FORMATS[:-1]:
            return Pickled(file)
        return files.opened(file, device)

    def settings(self) -> dict:
        """Return the settings of the transformer that the file states, in LTX-2's words."""
        text = self.metadata.get("config")
        beside = next(iter(self.files)).with_name("config.json")
        if text is None and beside.is_file():
            return _from_diffusers(texts.read_json(beside))
        try:
            return dict(**json.loads(text or "{}").get("transformer", {}))
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f"{self.path}: its metadata have the config {text[:40]!r}; expected JSON with a "
                f"dictionary under 'transformer'; take the file as it was published"
            ) from None

    def read(self, device, dtype):
        """Yield (LTX-2's name, tensor), file by file."""
        for file in self.files:
            with self._opened(file, device) as f:
                for name, (place, key) in self.where.items():
                    if place == file:
                        tensor = f.get_tensor(key).to(device, dtype)
                        check_numbers(file, key, tensor)
                        yield name, tensor


def check_float(path, key, dtype):
    """Raise ValueError unless a header states an ordinary type of numbers for a tensor."""
    if dtype not in FLOATS:
        raise ValueError(
            f"{path}: tensor {key} holds {dtype} numbers, so these are quantised weights, or no "
            f"weights at all; this project reads neither; take the file in bfloat16"
        )


def check_numbers(path, name, tensor):
    """Raise ValueError for NaN, infinity, and a matrix of zeros."""
    largest = tensor.abs().amax()
    if not torch.isfinite(largest):
        raise ValueError(f"{path}: tensor {name} holds NaN or infinity")
    if tensor.dim() > 1 and largest == 0:
        # a downloader that reserves the whole file first leaves zeros when it is interrupted
        raise ValueError(f"{path}: tensor {name} holds only zeros; download it again")


def _from_diffusers(config) -> dict:
    """Return the settings in a config of diffusers, in LTX-2's words; none of another config."""
    if config.get("_class_name") != "LTX2VideoTransformer3DModel":
        return {}
    words = {
        "rope_type": "rope_type",
        "cross_attn_timestep_scale_multiplier": "av_ca_timestep_scale_multiplier",
        "gated_attn": "apply_gated_attention",
        "cross_attn_mod": "cross_attention_adaln",
        "ff_bias": "ff_bias",
        "use_keyframes_abs_pos_embedding": "use_keyframes_abs_pos_embedding",
    }
    found = {ours: config[theirs] for theirs, ours in words.items() if theirs in config}
    if "rope_double_precision" in config:
        is_double = config["rope_double_precision"]
        found["frequencies_precision"] = "float64" if is_double else "float32"
    return found


class Pickled:
    """A .pt file, with those methods of an open safetensors file that are used here."""

    def __init__(self, path):
        try:
            # weights_only: tensors and plain values; nothing in the file can run
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).split(". ")[0].splitlines()[0]
            raise ValueError(
                f"{path}: not opened ({reason}); expected a .pt file that holds only tensors"
            ) from None
        if isinstance(found, dict):  # leave out critic, optimisers and counters
            found = {k: found[k] for k in OUTER if isinstance(found.get(k), dict)} or found
        self.tensors = dict(_flat(found))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def keys(self):
        return self.tensors.keys()

    def metadata(self):
        return None

    def get_tensor(self, key):
        return self.tensors[key]

    def get_slice(self, key):
        """Return shape and type of a tensor, as a header states them."""
        names = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
        x = self.tensors[key]
        dtype = names.get(x.dtype, files.dtype_name(x))
        return SimpleNamespace(get_shape=lambda: x.shape, get_dtype=lambda: dtype)


def _flat(found, prefix=""):
    """Yield the tensors in dictionaries of dictionaries, with names like "generator.x.weight"."""
    for key, value in found.items() if isinstance(found, dict) else ():
        if torch.is_tensor(value):
            yield f"{prefix}{key}", value
        else:
            yield from _flat(value, f"{prefix}{key}.")
