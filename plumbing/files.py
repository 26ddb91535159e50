"""Weight files: written beside their target and renamed, checked when read, never unpickled.

A `.safetensors` file holds tensors and a few strings. Ours carry the config under "config" and, in
"made_by", what produced them (command, steps, minutes, versions), both as JSON.
"""

import hashlib
import json
import os
import tempfile
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from config import Config


def write_beside(path, write):
    """Call `write(temporary path)`, then rename: a reader never meets half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path, makes_folders=False):
    """Raises ValueError if no file can be written there.

    makes_folders   those that are missing will be made, as `write_beside` does
    """
    folder = Path(path).resolve().parent
    while makes_folders and not folder.exists():
        folder = folder.parent
    if not folder.exists():
        raise ValueError(f"{path}: folder {folder} does not exist; create it first")
    try:  # permissions do not tell: root has them all, in /proc too
        with tempfile.TemporaryFile(dir=folder):
            is_writable = not Path(path).is_dir()
    except OSError:
        is_writable = False
    if not is_writable:
        raise ValueError(f"{path}: not writable; choose another place")


def write_json(path, value):
    """Write a value as JSON, indented, with `write_beside`."""
    write_beside(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))


def fill_in(path, name, text):
    """Replace what stands between two marks of a Markdown file, <!-- name --> twice.

    Raises ValueError for a file without these marks.
    """
    mark, old = f"<!-- {name} -->", Path(path).read_text()
    if old.count(mark) != 2:
        raise ValueError(
            f"{path}: expected the mark {mark} twice, found it {old.count(mark)} times"
        )
    before, _, after = old.split(mark)
    new = f"{before}{mark}\n{text}\n{mark}{after}"
    write_beside(path, lambda p: p.write_text(new))


def save_weights(path, tensors, cfg, made_by):
    """Write a dict of tensors with its config and a dict that says how it was made."""
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    metadata = {"config": json.dumps(cfg.to_dict()), "made_by": json.dumps(made_by)}
    write_beside(path, lambda p: save_file(tensors, p, metadata))


def read_weights(path, device="cpu") -> tuple[dict, Config, dict]:
    """Tensors, config and made_by of a file that `save_weights` wrote.

    Raises ValueError, in one line that names it, for a file that is missing, incomplete, not a
    safetensors file, not of this project or of an earlier version, or that contains a NaN.
    """
    tensors, metadata = read_tensors(path, device)
    if '"rope_dealing"' in metadata["config"]:  # a field of the earlier version's config
        raise ValueError(
            f"{path}: has the names of an earlier version; rename them: "
            f"python -m plumbing.rename {path}"
        )
    for name, t in tensors.items():
        if not torch.isfinite(t).all():
            raise ValueError(f"{path}: tensor {name} holds NaN or infinity")
    try:
        cfg, made_by = read_config(metadata["config"]), json.loads(metadata.get("made_by", "{}"))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: its metadata is not this project's ({error})") from None
    return tensors, cfg, made_by


def read_tensors(path, device="cpu") -> tuple[dict, dict]:
    """Tensors and metadata of a file of this project, of any version; errors as in `read_weights`."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, "pt", device=str(device)) as f:
            metadata = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    if "config" not in metadata:
        raise ValueError(
            f"{path}: its metadata has no config, so it was not written by this project"
        )
    return tensors, metadata


def read_config(text) -> Config:
    """A config from its JSON.  Raises ValueError, which names no file yet, if it is none.

    >>> read_config('{"num_layers": "four"}')
    Traceback (most recent call last):
    ValueError: num_layers='four'
    """
    if not isinstance(values := json.loads(text), dict):
        raise ValueError(f"a config of {values!r}")
    kinds = {float: (int, float), tuple[float, ...]: list}  # as JSON has them
    for f in fields(Config):
        if f.name in values and not isinstance(values[f.name], kinds.get(f.type, f.type)):
            raise ValueError(f"{f.name}={values[f.name]!r}")
    return Config.from_dict(values)


def check_config(path, theirs, ours):
    """Raises ValueError, naming a field, if a file's config is not `ours`; names may differ."""
    for name, value in ours.to_dict().items():
        if name != "name" and getattr(theirs, name) != value:
            raise ValueError(
                f"{path}: made for config {theirs.name!r} with {name}={getattr(theirs, name)!r}; "
                f"--config {ours.name} needs {name}={value!r}"
            )


def fingerprint(tensors) -> str:
    """A short hash of a dict of tensors, to notice that they are others.

    >>> fingerprint({"x": torch.zeros(3)}) == fingerprint({"x": torch.ones(3)})
    False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def load_into(module, tensors, path, assign=False):
    """Fill a module with exactly these tensors; `assign` takes them over instead of copying.

    Raises ValueError that names the first tensor that is missing, unexpected or of another shape.
    """
    want = module.state_dict()
    for name in sorted(want.keys() ^ tensors.keys()):
        raise ValueError(f"{path}: tensor {name} is {'missing' if name in want else 'unexpected'}")
    for name, t in tensors.items():
        if t.shape != want[name].shape:
            raise ValueError(
                f"{path}: tensor {name} is {tuple(t.shape)}, expected {tuple(want[name].shape)}"
            )
    module.load_state_dict(tensors, assign=assign)
