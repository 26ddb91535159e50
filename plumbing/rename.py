"""Rename the tensors of weight files that an earlier version of this project wrote.

    python -m plumbing.rename weights/toy_dmd.safetensors ...

Earlier, each stream held its halves of the layers (`video.layers.7.mlp_in.weight`). Now each layer
holds both halves (`layers.7.video.mlp_in.weight`). Input and output projections and one field of
the config also have new names. No number changes.
"""

import json
import re

from safetensors.torch import save_file

from plumbing import cli, files

RULES = [
    (r"^(video|audio)\.layers\.(\d+)\.", r"layers.\2.\1."),
    (r"^(video|audio)\.patchify\.", r"\1.proj_in."),
    (r"^(video|audio)\.unpatchify\.", r"\1.proj_out."),
]
HEADS = {"bands": "contiguous", "turns": "round_robin"}  # values of rope_dealing, now rope_heads


def new_name(name) -> str:
    """Return today's name of a tensor.

    >>> new_name("audio.layers.3.mlp_in.bias"), new_name("video.unpatchify.weight")
    ('layers.3.audio.mlp_in.bias', 'video.proj_out.weight')
    """
    for old, new in RULES:
        name = re.sub(old, new, name)
    return name


def rename(path) -> bool:
    """Rewrite one file in place; return whether it had old names."""
    tensors, metadata = files.read_tensors(path)
    cfg = json.loads(metadata["config"])
    if "rope_dealing" not in cfg:  # the names are new already
        return False
    cfg["rope_heads"] = HEADS[cfg.pop("rope_dealing")]
    tensors = {new_name(name): x for name, x in tensors.items()}
    metadata = {**metadata, "config": json.dumps(cfg)}
    files.write_beside(path, lambda p: save_file(tensors, p, metadata))
    return True


def main():
    p = cli.parser(__doc__)
    p.add_argument("files", nargs="+", help="weight files, rewritten in place")
    for path in p.parse_args().files:
        print(f"{path}: {'renamed' if rename(path) else 'has the new names already'}")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
