"""Names on the Hugging Face Hub, wherever a path of weights is expected.

A path that exists wins. A name, OWNER/NAME or OWNER/NAME/FILE, is looked up in the local cache of
the Hub, and downloaded if it is not there: only the files that are needed.
"""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from full_size.checkpoint import OTHER_FORMATS, members, one_checkpoint
from full_size.parts import REQUIRED, part_files

ABOUT_LTX2 = "LTX-2's folder in diffusers' format, or its name on the Hub: Lightricks/LTX-2"
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?")  # OWNER/NAME, or OWNER/NAME/FILE


class Wanted(NamedTuple):
    """The files of a repository that are needed."""

    choose: callable  # all names -> the names of these files
    check: callable  # raises ValueError for a local copy without them
    options: str  # of `hf download`


def local(place, wanted) -> Path:
    """Return the path of a file or folder; a name on the Hub becomes a folder in its cache."""
    path, name = Path(place).expanduser(), HUB_NAME.fullmatch(str(place))
    # weights/x.safetensors is a missing file, not OWNER/NAME; so is a name in an existing folder
    is_file = path.suffix in (".safetensors", ".json", *OTHER_FORMATS)
    if path.exists() or not name or (is_file and not name[2]) or Path(path.parts[0]).is_dir():
        return path
    repo, file = name[1], name[2] or ""
    if file:
        wanted = Wanted(lambda _: [file], members, file)
    return _cached(repo, file, wanted) or _fetched(repo, file, wanted)


def _cached(repo, file, wanted) -> Path | None:
    """Return the copy in the cache if it has all that is needed."""
    try:
        # No patterns: return the folder of the copy, whatever it holds. `check` looks into it.
        path = Path(_hub().snapshot_download(repo, local_files_only=True, allow_patterns=[]), file)
        wanted.check(path)
    except (OSError, ValueError):
        return None
    return path


def _fetched(repo, file, wanted) -> Path:
    """Download what is needed, with the Hub's own progress bars."""
    hub = _hub()
    try:
        names = [f.rfilename for f in hub.HfApi().model_info(repo, timeout=10).siblings]
    except Exception as error:  # of the connection, the account, the repository
        raise ValueError(_not_fetched(repo, wanted, error)) from None
    chosen = wanted.choose(names)
    try:
        return Path(hub.snapshot_download(repo, allow_patterns=chosen), file)
    except Exception as error:
        raise ValueError(_not_fetched(repo, wanted, error)) from None


def _hub():
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(REQUIRED) from None
    return huggingface_hub


def _not_fetched(repo, wanted, error) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        reason = f"accept its licence on https://huggingface.co/{repo}, then run: hf auth login"
    elif "RepositoryNotFoundError" in kinds:
        reason = "the Hub has no such name, or it is private"
    elif "OfflineModeIsEnabled" in kinds:
        reason = "HF_HUB_OFFLINE is set"
    else:
        reason = f"{type(error).__name__}, is this machine online?"
    return (
        f"{repo}: no such file or folder, and not fetched from the Hub ({reason}); where it can be "
        f"reached, run: hf download {repo} {wanted.options}"
    )


WEIGHTS = Wanted(one_checkpoint, members, "--include '*.safetensors*'")


def wanted_parts(*parts) -> Wanted:
    """Return which files of LTX-2's repository belong to these parts."""
    second_copy = "text_encoder/diffusion_pytorch_model*"

    def choose(names):
        return [n for n in names if n.split("/")[0] in parts and not fnmatch(n, second_copy)]

    def check(folder):
        for part in parts:
            if part == "tokenizer" and not (folder / part).is_dir():
                raise ValueError
            if part != "tokenizer":
                part_files(folder / part)

    included = " ".join(f"--include '{part}/*'" for part in parts)
    return Wanted(choose, check, f"{included} --exclude '{second_copy}'")
