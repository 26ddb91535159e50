"""Names on the Hub: a cache that the test makes, and a Hub that is not asked or not there."""

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file
from test_ltx2 import CFG, TEACHER, assert_holds, sharded, theirs

from full_size import hub
from full_size import weights as ltx2

pytest.importorskip("huggingface_hub")
NAME = "Exploration/omniforcing"
LTX2 = "Lightricks/LTX-2"
PARTS = hub.wanted_parts("text_encoder", "tokenizer", "vae")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "hub"


def snapshot(cache, name):
    """Make the folder of a repository's files, as the Hub's own program does."""
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    (home / "snapshots" / "abc").mkdir(parents=True)
    return home / "snapshots" / "abc"


def test_weights_are_found_in_the_cache(cache):
    """By the name of the repository, offline."""
    weights = theirs()
    sharded(snapshot(cache, NAME), weights)
    assert_holds(ltx2.Source(NAME, CFG).load(dtype=torch.float32), weights)


def test_a_file_of_a_repository_is_found_in_the_cache(cache):
    """By OWNER/NAME/FILE, where the repository has several models."""
    weights, folder = theirs(), snapshot(cache, LTX2)
    for name in ("dev", "fp8"):
        save_file({n: x.contiguous() for n, x in weights.items()}, folder / f"{name}.safetensors")
    assert_holds(ltx2.Source(f"{LTX2}/dev.safetensors", CFG).load(dtype=torch.float32), weights)
    assert hub.local(f"{LTX2}/dev.safetensors", hub.WEIGHTS) == folder / "dev.safetensors"


def test_a_path_that_exists_wins(cache, tmp_path):
    """Over a name in the cache; so does a folder of the owner's name."""
    snapshot(cache, NAME)
    here = tmp_path / "work" / NAME
    here.mkdir(parents=True)
    assert hub.local(NAME, hub.WEIGHTS).resolve() == here
    with pytest.raises(ValueError, match="Exploration/other: no such file or folder$"):
        ltx2.Source("Exploration/other", CFG)


@pytest.mark.parametrize("path", ["x", "a/x.safetensors", "./a/b", "../a/b", "/a/b", "~/a"])
def test_paths_are_no_names(cache, monkeypatch, path):
    """Nothing is asked of the Hub."""
    monkeypatch.setattr(hub, "_hub", None)
    assert "no such file or folder" in str(pytest.raises(ValueError, ltx2.Source, path, CFG).value)


def parts_of(folder):
    """Fill a folder with the least that counts as three parts."""
    for part, name in (("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        (folder / part).mkdir()
        save_file({"x": torch.ones(1)}, folder / part / f"{name}.safetensors")
    (folder / "tokenizer").mkdir()
    return folder


def test_the_folder_of_ltx2_is_found_in_the_cache(cache):
    """With all the parts that are asked for."""
    folder = parts_of(snapshot(cache, LTX2))
    assert hub.local(LTX2, PARTS) == folder
    for part in ("tokenizer", "vae"):
        (folder / part).rename(folder / "x")
        with pytest.raises(ValueError, match="not fetched from the Hub"):
            hub.local(LTX2, PARTS)
        (folder / "x").rename(folder / part)


class Hub:
    """A Hub with these files, which makes what it is asked for."""

    def __init__(self, folder, names):
        self.folder, self.names, self.asked = folder, names, None

    def model_info(self, repo, timeout):
        siblings = [type("", (), {"rfilename": name}) for name in self.names]
        return type("", (), {"siblings": siblings})

    def snapshot_download(self, repo, allow_patterns, local_files_only=False):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not here")
        self.asked = allow_patterns
        return str(self.folder)


@pytest.fixture
def online(cache, monkeypatch):
    def start(names):
        found = Hub(cache, names)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
        return found

    return start


TWO_SHARDS = ["g-00001-of-00002.safetensors", "g-00002-of-00002.safetensors"]
TRANSFORMER = ["transformer/m.safetensors", "transformer/config.json"]
REPOSITORIES = {  # place, files of the repository, those that are needed
    "shards": (NAME, ["README.md", "a.mp4", *TWO_SHARDS, "g.safetensors.index.json"],
               [*TWO_SHARDS, "g.safetensors.index.json"]),
    "shards in a folder": (NAME, ["g.safetensors.index.json", *(f"w/{n}" for n in TWO_SHARDS)],
                           ["g.safetensors.index.json", *(f"w/{n}" for n in TWO_SHARDS)]),
    "one file": (NAME, ["x.safetensors", "config.json", "vae/x.safetensors", ".gitattributes"],
                 ["x.safetensors", "config.json"]),
    "a named file": (f"{LTX2}/ltx-dev.safetensors", ["ltx-dev.safetensors", "ltx-8.safetensors"],
                     ["ltx-dev.safetensors"]),
    "diffusers": (LTX2, ["vae/m.safetensors", *TRANSFORMER], TRANSFORMER),
}  # fmt: skip


@pytest.mark.parametrize("place, names, needed", REPOSITORIES.values(), ids=REPOSITORIES.keys())
def test_only_what_is_needed_of_a_checkpoint_is_downloaded(online, cache, place, names, needed):
    """The Hub is asked for these files only."""
    found = online(names)
    path = hub.local(place, hub.WEIGHTS)
    assert found.asked == needed
    assert path == (cache / "ltx-dev.safetensors" if place.endswith("dev.safetensors") else cache)


def test_only_parts_of_ltx2_that_are_needed_are_downloaded(online):
    """Neither the transformer nor the second copy of the text encoder."""
    needed = ["text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/a", "vae/b"]
    others = ["text_encoder/diffusion_pytorch_model-1.safetensors", "transformer/x", "vae2/x", "x"]
    found = online(needed + others)
    hub.local(LTX2, PARTS)
    assert found.asked == needed


def test_a_repository_with_several_models_is_not_downloaded(online):
    """Its models are listed."""
    found = online(["a.safetensors", "b.safetensors"])
    with pytest.raises(ValueError, match="found 2; name one of them: a.safetensors, b.safetensors"):
        hub.local(LTX2, hub.WEIGHTS)
    assert found.asked is None


def test_part_of_a_copy_is_completed(cache, online, monkeypatch):
    """A cache that lacks a shard is not enough."""
    folder = snapshot(cache, NAME)
    sharded(folder, theirs())
    names = [file.name for file in folder.iterdir()]
    (folder / "g-00002-of-00002.safetensors").unlink()
    found, download = online(names), []

    def cached_first(repo, allow_patterns, local_files_only=False):
        download.append(local_files_only)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached_first)
    hub.local(NAME, hub.WEIGHTS)
    assert download == [True, False] and found.asked is None


def failing(kind):
    """A Hub that fails in this way."""

    def fail(*_, **__):
        error = kind.__new__(kind)
        Exception.__init__(error, "404 Client Error\nfor url")
        raise error

    return fail


FAILURES = {
    "offline": (None, "HF_HUB_OFFLINE is set"),
    "gated": (errors.GatedRepoError, f"accept its licence on https://huggingface.co/{LTX2}, then"),
    "unknown": (errors.RepositoryNotFoundError, "the Hub has no such name, or it is private"),
    "broken": (TimeoutError, "TimeoutError, is this machine online.*"),
}


@pytest.mark.parametrize("kind, reason", FAILURES.values(), ids=FAILURES.keys())
def test_what_cannot_be_fetched_is_told_with_the_command(cache, monkeypatch, kind, reason):
    """One line: the name, the reason, the command that fetches exactly what is needed."""
    if kind:
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", failing(kind))
    command = (
        f"hf download {LTX2} --include 'text_encoder/\\*' --include 'tokenizer/\\*' "
        "--include 'vae/\\*' --exclude 'text_encoder/diffusion_pytorch_model\\*'$"
    )
    with pytest.raises(ValueError, match=f"^{LTX2}: no such .* Hub .{reason}.*run: {command}") as e:
        hub.local(LTX2, PARTS)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=f"hf download {LTX2} dev.safetensors$"):
        hub.local(f"{LTX2}/dev.safetensors", hub.WEIGHTS)


def test_a_teacher_may_be_a_name(cache):
    """As for a training: the same class opens it."""
    sharded(snapshot(cache, NAME), theirs())
    with pytest.raises(ValueError, match="states no rope_layout"):  # so it was found
        ltx2.Source(NAME, TEACHER)
