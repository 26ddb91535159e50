"""Caption features: the published text path, tiny and random, in our order."""

from types import SimpleNamespace

import pytest
import torch

import captions

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

WIDTH, LAYERS, LENGTH = 16, 2, 128  # LENGTH is a multiple of the registers


class Tokenizer:
    """Letters as tokens, padded on the left."""

    padding_side, pad_token, model_max_length = "left", "0", LENGTH

    def __call__(self, prompts, max_length, **_):
        ids = torch.zeros(len(prompts), LENGTH, dtype=torch.long)
        for row, prompt in zip(ids, prompts):
            row[LENGTH - len(prompt) :] = torch.tensor([ord(c) % 64 for c in prompt])
        return SimpleNamespace(input_ids=ids, attention_mask=(ids > 0).long())


@pytest.fixture(scope="module")
def pipeline():
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    torch.manual_seed(0)
    gemma = transformers.Gemma3TextModel(
        transformers.Gemma3TextConfig(
            vocab_size=64,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )  # fmt: skip
    )
    sizes = {
        f"{stream}_connector_{what}": n
        for stream in ("video", "audio")
        for what, n in (("num_attention_heads", 2), ("attention_head_dim", 8), ("num_layers", 1))
    }
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=LAYERS + 1, rope_type="split", **sizes
    )
    absent = dict.fromkeys(("scheduler", "vae", "audio_vae", "transformer", "vocoder"))
    return diffusers.LTX2Pipeline(
        text_encoder=gemma.eval(), tokenizer=Tokenizer(), connectors=connectors.eval(), **absent
    )


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


def test_a_folder_without_text_path_is_refused(tmp_path):
    """One line that says what is missing."""
    with pytest.raises(ValueError, match="no text encoder in diffusers' format"):
        captions.encode_and_free(tmp_path, ["rain"])
