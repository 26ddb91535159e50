"""Caption features: the published text path, tiny and random, in our order."""

import weakref

import pytest
import torch
from helpers import save_text_path
from safetensors.torch import load_file

from full_size import text as captions

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

WIDTH, LENGTH = 16, captions.TOKENS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """LTX-2's folder, its text path tiny and random."""
    folder = tmp_path_factory.mktemp("ltx2")
    save_text_path(folder, WIDTH)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return captions.load_text_path(folder, torch.float32)


def test_every_prompt_has_features_for_both_streams(pipeline):
    """One entry a different prompt, as long as the registers make it, one row each for a stream."""
    found = captions.encode(pipeline, ["a dog barks", "rain", "a dog barks"], "cpu")
    assert list(found) == ["a dog barks", "rain"]
    for features in found.values():
        assert features.video.shape == features.audio.shape == (1, LENGTH, WIDTH)
        assert all(x.isfinite().all() for x in features)
        assert not torch.equal(features.video, features.audio)


def test_a_prompt_does_not_depend_on_its_neighbours(pipeline):
    """Encoded singly: alone or among longer ones, the same bits."""
    alone = captions.encode(pipeline, ["rain"], "cpu")["rain"]
    among = captions.encode(pipeline, ["a long story about a dog", "rain"], "cpu")["rain"]
    assert all(torch.equal(a, b) for a, b in zip(alone, among))


def test_the_text_path_is_read_from_its_folder(folder, pipeline):
    """Gemma, tokenizer and connectors are those that were saved; the parts beside them stay out."""
    for part in ("text_encoder", "connectors"):
        (file,) = (folder / part).glob("*.safetensors")
        saved, found = load_file(file), getattr(pipeline, part).state_dict()
        assert saved and all(any(torch.equal(x, y) for y in found.values()) for x in saved.values())
    assert pipeline.tokenizer("dog").input_ids == [ord(letter) for letter in "dog"]
    assert pipeline.vae is pipeline.transformer is pipeline.vocoder is None


def test_prompts_are_encoded_and_the_encoder_is_gone(folder, pipeline, monkeypatch):
    """From the folder to features of every prompt, those of the loaded pipeline; no Gemma stays."""
    real, alive = captions.load_text_path, []

    def watched(*args):
        loaded = real(*args)
        alive.append(weakref.ref(loaded.text_encoder))
        return loaded

    monkeypatch.setattr(captions, "load_text_path", watched)
    found, seconds = captions.encode_and_free(folder, ["a dog barks", "rain"], "cpu", torch.float32)
    assert len(alive) == 1 and alive[0]() is None and seconds > 0
    for prompt, features in captions.encode(pipeline, ["a dog barks", "rain"], "cpu").items():
        assert all(torch.equal(a, b) for a, b in zip(found[prompt], features))


def test_features_have_the_dtype_asked_for(folder):
    """bfloat16 unless told otherwise, whatever the folder's weights are."""
    found = captions.encode_and_free(folder, ["rain"])[0]["rain"]
    assert [x.dtype for x in found] == [torch.bfloat16] * 2


def test_a_folder_without_text_path_is_refused(tmp_path):
    """One line that says what is missing."""
    with pytest.raises(ValueError, match="no text_encoder/; expected LTX-2's folder in diffusers'"):
        captions.encode_and_free(tmp_path, ["rain"])


def test_features_equal_those_of_the_libraries(folder):
    """From a prompt to features with transformers and diffusers alone, in LTX-2's own order: the
    difference is 0, for short and long prompts."""
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from transformers import AutoTokenizer, Gemma3ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", padding_side="left")
    gemma = Gemma3ForConditionalGeneration.from_pretrained(folder / "text_encoder").eval()
    connectors = LTX2TextConnectors.from_pretrained(folder / "connectors").eval()
    prompts = "a dog barks at the waves", " rain\n", LENGTH * "ab"
    ours, _ = captions.encode_and_free(folder, prompts, "cpu", torch.float32)
    for prompt in prompts:
        words = tokenizer(
            prompt.strip(), padding="max_length", max_length=LENGTH, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            states = gemma(**words, output_hidden_states=True).hidden_states
            states = torch.stack(states, dim=-1)
            video, audio, _ = connectors(states, words.attention_mask, padding_side="left")
        assert torch.equal(ours[prompt].video, video) and torch.equal(ours[prompt].audio, audio)


def test_the_end_of_a_long_prompt_is_said_to_be_unread(pipeline, capsys):
    """From the first token that does not fit; a prompt of exactly 1024 tokens is read whole."""
    fitting = "x" * LENGTH
    captions.encode(pipeline, [fitting, " rain "], "cpu")
    assert capsys.readouterr().err == ""
    captions.encode(pipeline, [fitting + "red door"], "cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"'{40 * 'x'}'...: only 1024 tokens") and "r e d   d o o r" in line
    captions.encode(pipeline, [fitting + "y" * 200], "cpu")
    assert "y...'" not in (line := capsys.readouterr().err) and line.endswith("...\n")
