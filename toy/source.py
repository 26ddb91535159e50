"""The sources of the toy's weights, prompts, clips and decoder: all are in this repository.

generate.py needs `StreamSource`. toy/training.py has what trainings need, full_size/source.py has
the sources of LTX-2.
"""

import functools
import os
from pathlib import Path

import torch

import config
import model
from film.decoders import ToyDecoder
from plumbing import files
from toy import codec as toy_codec
from toy import decoder as toy_decoder
from toy import world

FOLDER = Path(__file__).parent.parent / "weights"
# students that generate.py loads by default
WEIGHTS = {name: FOLDER / f"{name}_self_forcing.safetensors" for name in ("toy", "toy_released")}
WINDOWS = {"toy_released": 1}  # of stage III, where it differs from `masks.trained_window`
DROP_CAPTION, DROP_WORD = 0.10, 0.05  # probability that a caption, or a word, is hidden in training


# ---- prompts ----


def toy_features(prompt) -> tuple:
    """Return the caption features (1, 3, 9) of a prompt, the same for both streams."""
    return (world.caption_features(world.parse_prompt(prompt)),)


def toy_captions(tokens) -> model.Captions:
    """Return the captions of (B, 3) word tokens; token 0 means no word.

    >>> captions = toy_captions(torch.tensor([[1, 5, 7], [2, 0, 8]]))
    >>> len(captions), captions.with_nothing()[0].shape
    (2, torch.Size([4, 3, 9]))
    """
    empty = torch.zeros_like(tokens)
    return model.Captions(*((world.caption_features(words),) for words in (tokens, empty)))


def drop_caption_words(tokens, generator):
    """Hide whole captions (for guidance) and single words (for short prompts): (B, 3) -> (B, 3)."""
    B, words = tokens.shape
    hide = torch.rand(B, 1, generator=generator) < DROP_CAPTION
    hide = hide | (torch.rand(B, words, generator=generator) < DROP_WORD)
    return tokens.masked_fill(hide.to(tokens.device), 0)


class ToyPrompts:
    """The captions of random clips; every seed is one clip."""

    identity = "toy"  # stored with trajectories; a file for other prompts is refused

    def numbers(self, seeds) -> torch.Tensor:
        """Return the word tokens (B, 3) of the clips of these seeds."""
        return world.caption_tokens(world.draw_clips(seeds))

    def captions(self, numbers) -> model.Captions:
        return toy_captions(numbers)

    def draw(self, n, generator):
        """Draw n random clips and their captions; the clips are for teacher forcing."""
        seeds = torch.randint(world.HELD_OUT, (n,), generator=generator).tolist()
        clips = world.draw_clips(seeds)
        tokens = drop_caption_words(world.caption_tokens(clips), generator)
        return clips, toy_captions(tokens)


TOY_PROMPTS = ToyPrompts()


# ---- clips ----


codec_of_clips = functools.cache(toy_codec.load)  # read once, not at every step of a training


def true_latents(clips):
    """Return the latents (video, audio) of real clips of 5 seconds."""
    return toy_codec.encode_clips(codec_of_clips(), clips, config.CLIP_SECONDS)


# ---- weights ----


def load_student(path, cfg, device="cpu", dtype=torch.float32):
    """Load a student, and check that its file was made for this config."""
    net = model.load(path)
    files.check_config(path, net.cfg, cfg)
    return net.to(device, dtype)


def load_bidirectional(path):
    """Load a model that makes whole clips: a teacher, or the student of stage I."""
    net = model.load(path)
    if (name := net.cfg.name) != config.TOY_TEACHER.name:
        raise ValueError(f"{path}: a causal student, made for config {name!r}; expected a teacher")
    return net


def student_from(tensors, cfg, seed=0, path="teacher"):
    """Create a student that starts at these weights; path: the file to name in errors."""
    # A teacher has no sinks, so the sinks of the new model stay.
    net = model.build(cfg, seed)
    sinks = {n: p for n, p in net.state_dict().items() if n.startswith("sinks.")}
    files.load_into(net, {**sinks, **tensors}, path)
    return net


class StreamSource:
    """A student, its prompts and its decoder, for one stream."""

    text_seconds = 0.0  # words need no encoding
    read = staticmethod(toy_features)  # words -> caption features

    def __init__(self, request):
        """request: `generate.Request`."""
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # operators of 73 tokens are too small to be divided
        cfg, device, dtype = request.cfg, request.device, request.dtype
        if request.weights == "random":
            from full_size.weights import random_weights

            self.net = random_weights(cfg, device, dtype)
        else:
            self.net = load_student(request.weights or WEIGHTS[cfg.name], cfg, device, dtype)
        if device.type == "cpu" and dtype == torch.float32:
            from toy import faster

            faster.speed_up(self.net)
        if request.in_fp8:
            from full_size import fp8

            fp8.quantise(self.net.layers)
        self.codec = toy_decoder.load(cfg)

    def picture(self, image):
        """Return the tokens (1, 16, 48) of an image file; None without one."""
        if image:
            from film.picture import read_picture

            cfg = self.codec.cfg
            return self.codec.encode_picture(read_picture(image, cfg.height, cfg.width)[None])

    def decoder(self, watch):
        """Return a decoder for one stream; watch: `Stopwatch.watch`."""
        return ToyDecoder(self.codec, watch)
