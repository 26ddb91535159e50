"""Prompts to caption features: the toy's words, and at full size Gemma 3, which then makes room.

The toy has eight words, each a unit vector. LTX-2 reads prompts through Gemma 3 12B: all 49 hidden
states of every token, normalised together, projected to one vector, and passed through two small
transformers ("connectors"), one for video and one for audio, that put learned registers where a
prompt has no tokens. So a prompt has 1024 tokens whatever its length, and no text mask is needed.

The encoder is two thirds the size of the video model, and no block of the stream needs it again:
every prompt of a stream is encoded before it starts, and the encoder is freed.

All of it is the published pipeline of Hugging Face diffusers; what is ours is the order.
"""

import gc
from pathlib import Path
from typing import NamedTuple

import torch

import toy_world

REQUIRED = "reading prompts at full size needs: pip install -r requirements-full.txt"
TEXT_PARTS = ("text_encoder", "tokenizer", "connectors")
TOKENS = 1024  # of the features of every prompt


def toy_features(prompt) -> tuple:
    """The toy's features (1, 3, 9), the same for both streams.

    Raises ValueError for words that it does not know, listing those that it knows.
    """
    return (toy_world.caption_features(toy_world.parse_prompt(prompt)),)


class Features(NamedTuple):
    """What the two streams read of one prompt."""

    video: torch.Tensor  # (1, L, C_text)
    audio: torch.Tensor  # (1, L, C_text)


def check(prompt):
    """Any text will do.  Raises ValueError for none."""
    if not prompt.strip():
        raise ValueError("the prompt says nothing; describe what is to be seen and heard")


def check_folder(folder):
    """Raises ValueError for a folder that lacks a part of the text path."""
    for part in TEXT_PARTS:
        if not Path(folder, part).is_dir():
            raise ValueError(f"{folder}: no {part}/; expected LTX-2's folder in diffusers' format")


def random_features(prompts, cfg, device="cpu", dtype=torch.bfloat16) -> dict[str, Features]:
    """Noise in place of what the text path makes: for measuring speed and memory."""
    shape = 1, TOKENS, cfg.caption_width
    made = {p: [torch.randn(shape, device=device, dtype=dtype) for _ in "va"] for p in prompts}
    return {prompt: Features(*pair) for prompt, pair in made.items()}


@torch.inference_mode()
def encode(pipeline, prompts, device) -> dict[str, Features]:
    """Features of every different prompt, one at a time: padding is then nobody else's.

    pipeline   diffusers' LTX2Pipeline with tokenizer, text_encoder and connectors
    """
    found = {}
    for prompt in dict.fromkeys(prompts):
        states, mask, _, _ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, device=device
        )
        side = pipeline.tokenizer.padding_side
        video, audio, _ = pipeline.connectors(states, mask, padding_side=side)
        found[prompt] = Features(video, audio)
    return found


def encode_and_free(folder, prompts, device="cpu", dtype=torch.bfloat16) -> dict[str, Features]:
    """Load the text path of a folder in diffusers' format, encode, and give its memory back.

    Raises ValueError if a package is missing or the folder has no text path.
    """
    try:
        from diffusers import LTX2Pipeline
    except (ImportError, RuntimeError):
        raise ValueError(REQUIRED) from None
    absent = dict.fromkeys(("transformer", "vae", "audio_vae", "vocoder", "scheduler"))
    try:
        pipeline = LTX2Pipeline.from_pretrained(
            folder, dtype=dtype, local_files_only=True, **absent
        )
    except OSError as error:
        raise ValueError(f"{folder}: no text encoder in diffusers' format ({error})") from None
    features = encode(pipeline.to(device), prompts, device)
    del pipeline
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return features
