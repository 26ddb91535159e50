"""Weight files: written under a temporary name and renamed, checked when read, never unpickled.

A `.safetensors` file holds tensors and a few strings. Files of this project hold two strings, as
JSON: "config", and "made_by", the origin of the file (command, steps, versions).
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from config import Config

FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


def dtype_name(tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def write_beside(path, write):
    """Call `write(temporary path)`, then rename the result to `path`; make missing folders."""
    path = Path(path)
    # Renaming is atomic: a reader never finds half a file, even if the process dies.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.chmod(0o644)  # safetensors makes files that only their owner may read
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        # Trap: on a full disk safetensors raises an error of its own, which is no OSError.
        raise OSError(f"{path}: could not be written ({reason_of(error)})") from None
    finally:
        with contextlib.suppress(OSError):  # its folder may be no folder
            temporary.unlink()


def reason_of(error) -> str:
    """Return the system's words for an error of a file, or else its message.

    >>> reason_of(OSError(28, "No space left on device", "x.safetensors"))
    'No space left on device'
    """
    message = getattr(error, "strerror", None) or str(error)
    return re.sub(r"^Error while \w+: |I/O error: | \(os error \d+\)", "", message)


def check_writable(path, makes_folders=False, suffix=""):
    """Raise ValueError if no file can be written at this path, or its name does not end so."""
    if not str(path).endswith(suffix):  # a report must not overwrite weights by mistake
        raise ValueError(f"{path}: expected a name that ends in {suffix}")
    folder = Path(path).resolve().parent
    while makes_folders and not folder.exists():  # `write_beside` will make the missing ones
        folder = folder.parent
    if not folder.exists():
        raise ValueError(f"{path}: folder {folder} does not exist; create it first")
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError(0, "not a file")  # renaming would replace a folder, a pipe, /dev/null
        # Try it. Permission bits would allow root to write everywhere, even in /proc.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = reason_of(error)
        raise ValueError(f"{path}: not writable ({reason}); choose another place") from None


def write_json(path, value):
    write_beside(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n", "utf-8"))


def save_weights(path, tensors, cfg, made_by):
    """Write a dict of tensors, with its config and the dict `made_by` (command, steps, ...)."""
    # safetensors writes contiguous tensors only.
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    metadata = {"config": json.dumps(cfg.to_dict()), "made_by": json.dumps(made_by)}
    write_beside(path, lambda p: save_file(tensors, p, metadata))


def opened(path, device="cpu"):
    """Open a safetensors file and read its header.  Raises ValueError, saying what else it is."""
    try:
        return safe_open(path, "pt", device=str(device))
    except (SafetensorError, OSError):
        from plumbing import contents  # here: few runs need it

        raise ValueError(f"{path}: {contents.described(path)}") from None


def read_weights(path) -> tuple[dict, Config, dict]:
    """Return tensors, config and made_by of a file that `save_weights` wrote.

    Raises ValueError, in one line with the path, for any other file.
    """
    tensors, metadata = read_tensors(path)
    if '"rope_dealing"' in metadata["config"]:  # this field of the config has a new name now
        command = f"python -m plumbing.rename {path}"
        raise ValueError(f"{path}: has the names of an earlier version; rename them: {command}")
    for name, t in tensors.items():
        if t.dtype not in (*FLOATS, torch.int64):  # int64: numbers of words, in trajectories
            raise ValueError(f"{path}: tensor {name} holds {dtype_name(t)}, expected float32")
        # Without this check, NaN in the weights would only be noticed in the film.
        if not torch.isfinite(t).all():
            raise ValueError(f"{path}: tensor {name} holds NaN or infinity")
    try:
        cfg, made_by = read_config(metadata["config"]), json.loads(metadata.get("made_by", "{}"))
    except (ValueError, ZeroDivisionError, RecursionError) as error:
        reason = f"its metadata is not this project's ({error})"
        raise _foreign(path, tensors, reason) from None
    if not isinstance(made_by, dict):
        raise ValueError(f"{path}: its metadata have made_by {made_by!r}; expected a dictionary")
    return tensors, cfg, made_by


def read_tensors(path) -> tuple[dict, dict]:
    """Return tensors and metadata of a file that any version of this project wrote."""
    with opened(path) as f:
        metadata = f.metadata() or {}
        tensors = {name: f.get_tensor(name) for name in f.keys()}
    if "config" not in metadata:
        reason = "its metadata has no config, so this project did not write it"
        raise _foreign(path, tensors, reason)
    return tensors, metadata


def _foreign(path, names, reason) -> ValueError:
    """Return an error that says what else these tensors are, or else the reason."""
    from plumbing import contents

    # `CHANGED` last: the toy's codec has a "scale"
    rows = [*contents.OTHERS, contents.LTX, *contents.CHANGED]
    return ValueError(f"{path}: {contents.named(names, rows) or reason}")


def read_config(text) -> Config:
    """Read a config from JSON.

    >>> read_config('{"num_layers": "four"}')
    Traceback (most recent call last):
    ValueError: num_layers='four'
    """
    if not isinstance(values := json.loads(text), dict):
        raise ValueError(f"a config of {values!r}")
    # In JSON, a tuple is a list, and 1.0 may be written as 1.
    kinds = {float: (int, float), tuple[float, ...]: list}
    for f in fields(Config):
        if f.name in values and not isinstance(values[f.name], kinds.get(f.type, f.type)):
            raise ValueError(f"{f.name}={values[f.name]!r}")
    return Config.from_dict(values)


def check_config(path, theirs, ours):
    """Raise ValueError, naming a field, if the config of a file is not `ours`."""
    for name, value in ours.to_dict().items():
        # The same config may have another name.
        if name != "name" and getattr(theirs, name) != value:
            raise ValueError(
                f"{path}: made for config {theirs.name!r} with {name}={getattr(theirs, name)!r}; "
                f"--config {ours.name} needs {name}={value!r}"
            )


def fingerprint(tensors) -> str:
    """Return a short hash of a dict of tensors.

    >>> fingerprint({"x": torch.zeros(3)}) == fingerprint({"x": torch.ones(3)})
    False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):  # the order of the dict must not matter
        digest.update(name.encode() + tensors[name].detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def load_into(module, tensors, path, assign=False):
    """Load exactly these tensors into a module; with `assign`, it uses them without copying."""
    # Check here: the error of PyTorch would list all tensors, on many lines, without the path.
    want = module.state_dict()
    if odd := sorted(want.keys() ^ tensors.keys()):
        reason = f"tensor {odd[0]} is {'missing' if odd[0] in want else 'unexpected'}"
        has_none = not want.keys() & tensors.keys()
        raise _foreign(path, tensors, reason) if has_none else ValueError(f"{path}: {reason}")
    for name, t in tensors.items():
        if t.is_floating_point() != want[name].is_floating_point():
            raise ValueError(
                f"{path}: tensor {name} holds {dtype_name(t)}, expected {dtype_name(want[name])}"
            )
        if t.shape != want[name].shape:
            raise ValueError(
                f"{path}: tensor {name} is {tuple(t.shape)}, expected {tuple(want[name].shape)}"
            )
    module.load_state_dict(tensors, assign=assign)
