"""Prompts encoded once to a folder: resumed, checked, and read by number."""

from dataclasses import replace

import pytest
import torch

import config
from full_size import text as captions

CFG = replace(config.FULL, caption_width=6)
PROMPTS = ["a dog barks", "rain", "a long train"]


def reader(asked, width=6):
    """Made-up features that tell prompts apart."""

    def read(prompt):
        asked.append(prompt)
        x = torch.full((1, 4, width), float(len(prompt)), dtype=torch.bfloat16)
        return captions.Features(x, -x)

    return read


@pytest.fixture
def folder(tmp_path):
    captions.encode_to_folder(reader([]), PROMPTS, "", tmp_path / "features")
    return tmp_path / "features"


def test_prompts_are_read_by_number_with_the_negative_one_beside(folder):
    """Features of both streams in float32, those of saying nothing once a caption."""
    prompts = captions.EncodedPrompts(folder, CFG)
    found = prompts.captions(torch.tensor([2, 0]))
    assert len(prompts) == 3 and len(found) == 2
    for sign, x, nothing in zip((1, -1), found.features, found.nothing):
        assert x.shape == nothing.shape == (2, 4, 6) and x.dtype == torch.float32
        assert x[:, 0, 0].tolist() == [sign * len(PROMPTS[n]) for n in (2, 0)]
        assert not nothing.any()
    assert [x.shape[0] for x in found.with_nothing()] == [4, 4]


def test_draws_follow_the_generator_and_find_every_prompt(folder):
    """The same seed, the same captions; all are met."""
    prompts = captions.EncodedPrompts(folder, CFG)
    one, same = (
        prompts.draw(50, torch.Generator().manual_seed(0))[1].features[0] for _ in range(2)
    )
    assert torch.equal(one, same)
    assert set(one[:, 0, 0].tolist()) == {float(len(p)) for p in PROMPTS}


def test_other_prompts_have_another_identity(folder, tmp_path):
    """What trajectories remember of their prompts tells one folder from another, not its path."""
    for name, prompts in (("same", PROMPTS), ("fewer", PROMPTS[:2])):
        captions.encode_to_folder(reader([]), prompts, "", tmp_path / name)
    identity, same, fewer = (
        captions.EncodedPrompts(path, CFG).identity
        for path in (folder, tmp_path / "same", tmp_path / "fewer")
    )
    assert identity == same != fewer


def test_a_killed_encoding_goes_on_where_it_was(folder):
    """Only what is missing is read again; a folder of other prompts is refused."""
    (folder / "000001.safetensors").unlink()
    with pytest.raises(
        ValueError, match="000001.safetensors is missing .1 of 4.; run full_size/text.py"
    ):
        captions.EncodedPrompts(folder, CFG)
    asked = []
    captions.encode_to_folder(reader(asked), PROMPTS, "", folder)
    assert asked == ["rain"]
    for other in ((PROMPTS[:2], ""), (PROMPTS, "blurry")):
        with pytest.raises(ValueError, match="holds features of other prompts; remove it"):
            captions.encode_to_folder(reader(asked), *other, folder)


def test_foreign_folders_and_files_are_refused(folder, tmp_path):
    """No index or a foreign one, half a file, features of another encoder: a line that names it."""
    with pytest.raises(ValueError, match="no prompts.json; full_size/text.py makes such a folder"):
        captions.EncodedPrompts(tmp_path, CFG)
    with pytest.raises(ValueError, match="features of width 6; config full reads 3840"):
        captions.EncodedPrompts(folder, config.FULL)
    (folder / "000001.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="000001.safetensors: not a whole file of features"):
        captions.EncodedPrompts(folder, CFG).captions(torch.tensor([1]))
    for index in ("{}", "[]", "{"):
        (folder / "prompts.json").write_text(index)
        with pytest.raises(ValueError, match="prompts.json: not an index of prompts"):
            captions.EncodedPrompts(folder, CFG)


def test_a_text_file_holds_one_prompt_a_line(tmp_path):
    """Empty lines, empty files and other encodings than UTF-8 are refused by number and name."""
    path = tmp_path / "prompts.txt"
    path.write_text("a dog barks\n rain \n")
    assert captions.read_lines(path) == ["a dog barks", "rain"]
    path.write_text("a dog barks\n\nrain\n")
    with pytest.raises(ValueError, match="prompts.txt: line 2 is empty"):
        captions.read_lines(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no prompts; expected one a line"):
        captions.read_lines(path)
    path.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match="prompts.txt: expected text in UTF-8"):
        captions.read_lines(path)
