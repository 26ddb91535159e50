"""Prompts encoded once to a folder: resumed, checked, and read by number."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import config
from full_size import text as captions

CFG = replace(config.FULL, caption_width=6)
PROMPTS = ["a dog barks", "rain", "a long train"]
OTHER_PROMPTS = [
    (PROMPTS[:2], "", "prompt 3 was 'a long train', is now missing"),
    (PROMPTS, "blurry", "the negative prompt was '', is now 'blurry'"),
    (["a dog barks", "snow", "a long train", "wind"], "", "prompt 2 was 'rain', is now 'snow'"),
]


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
    for prompts, negative, message in OTHER_PROMPTS:
        with pytest.raises(ValueError, match=f"features of other prompts: {message}; add prompts"):
            captions.encode_to_folder(reader(asked), prompts, negative, folder)
    assert asked == ["rain"]


def test_a_folder_grows(folder):
    """Prompts that were added at the end are encoded; the rest stays; a killed growth goes on."""
    asked, before = [], (folder / "000001.safetensors").read_bytes()
    captions.encode_to_folder(reader(asked), [*PROMPTS, "snow", "wind"], "", folder)
    assert asked == ["snow", "wind"]
    assert (folder / "000001.safetensors").read_bytes() == before
    prompts = captions.EncodedPrompts(folder, CFG)
    assert len(prompts) == 5
    assert prompts.captions(torch.tensor([3])).features[0][0, 0, 0] == len("snow")
    (folder / "000004.safetensors").unlink()
    captions.encode_to_folder(reader(asked), [*PROMPTS, "snow", "wind"], "", folder)
    assert asked == ["snow", "wind", "wind"]


def test_foreign_folders_and_files_are_refused(folder, tmp_path):
    """No index or a foreign one, half a file, features of another encoder: a line that names it."""
    with pytest.raises(ValueError, match="no prompts.json; full_size/text.py makes such a folder"):
        captions.EncodedPrompts(tmp_path, CFG)
    with pytest.raises(ValueError, match="features of width 6; config full reads 3840"):
        captions.EncodedPrompts(folder, config.FULL)
    (folder / "000001.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="000001.safetensors: not a whole safetensors file"):
        captions.EncodedPrompts(folder, CFG).captions(torch.tensor([1]))
    save_file({"video": torch.zeros(4, 6)}, folder / "000001.safetensors")
    with pytest.raises(ValueError, match="000001.safetensors: not a file of features"):
        captions.EncodedPrompts(folder, CFG).captions(torch.tensor([1]))
    for index in ("{}", "[]", "{", '{"prompts": "rain", "negative": ""}', '{"prompts": [1]}'):
        (folder / "prompts.json").write_text(index)
        with pytest.raises(ValueError, match="prompts.json: not an index of prompts"):
            captions.EncodedPrompts(folder, CFG)
        with pytest.raises(ValueError, match="prompts.json: not an index of prompts"):
            captions.encode_to_folder(reader([]), PROMPTS, "", folder)


TWO = ["a dog barks", "rain"]
TEXTS = {  # as editors and exports write them
    "plain": (b"a dog barks\n rain \n", TWO),
    "byte order mark": (b"\xef\xbb\xbfa dog barks\nrain\n", TWO),
    "two files in one": (b"a dog barks\n\xef\xbb\xbfrain\n", TWO),
    "UTF-16": ("a dog barks\nrain\n".encode("utf-16"), TWO),
    "Windows": (b"a dog barks\r\nrain\r\n", TWO),
    "old Mac": (b"a dog barks\rrain\r", TWO),
    "no newline at the end": (b"a dog barks\nrain", TWO),
    "blank lines at the end": (b"a dog barks\nrain\n\n \n", TWO),
    "line separator": ("a\u2028b\nc".encode(), ["a\u2028b", "c"]),
    "form feed and next line": ("a\x0cb\x85c\x1cd\ne".encode(), ["a\x0cb\x85c\x1cd", "e"]),
    "other scripts": ("犬が吠える\nдождь\n".encode(), ["犬が吠える", "дождь"]),
    "twice": (b"rain\nrain\n", ["rain", "rain"]),
}


@pytest.mark.parametrize("data, lines", TEXTS.values(), ids=TEXTS.keys())
def test_a_text_file_holds_one_prompt_a_line(tmp_path, data, lines):
    """A line ends where an editor ends it, and nowhere else."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    assert captions.read_lines(path) == lines


NO_TEXTS = {
    "a gap": (b"a dog barks\n\nrain\n", "prompts.txt: line 2 is empty"),
    "a gap first": (b"\nrain\n", "prompts.txt: line 1 is empty"),
    "nothing": (b"", "no prompts; expected one a line"),
    "blanks": (b" \n\n", "no prompts; expected one a line"),
    "Latin-1": ("caf\xe9".encode("latin-1"), "prompts.txt: expected text in UTF-8"),
    "half of UTF-16": (b"\xff\xfea", "prompts.txt: expected text in UTF-8"),
}


@pytest.mark.parametrize("data, message", NO_TEXTS.values(), ids=NO_TEXTS.keys())
def test_other_text_files_are_refused(tmp_path, data, message):
    """By name and number of the line."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        captions.read_lines(path)


def test_a_missing_text_file_is_named(tmp_path):
    """In words, without a number; a folder as well."""
    for path, reason in ((tmp_path / "no", "No such file or directory"), (tmp_path, "directory")):
        with pytest.raises(ValueError, match=f"^{path}: cannot be read .*{reason}.$"):
            captions.read_lines(path)
