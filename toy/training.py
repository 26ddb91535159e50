"""What the trainings of the toy start at and learn from.

teacher.py needs `TrainingClips`, the three stages need `TrainingSource`. full_size/source.py has a
`TrainingSource` for LTX-2.
"""

import copy
from typing import NamedTuple

import torch

import config
import model
from plumbing import files
from toy import world
from toy.source import (
    TOY_PROMPTS,
    codec_of_clips,
    drop_caption_words,
    load_bidirectional,
    student_from,
    toy_captions,
    true_latents,
)


class TrainingClips:
    """Real clips to train the teacher on: latents and captions, by seed."""

    def __init__(self):
        self.codec_id = files.fingerprint(codec_of_clips().state_dict())

    def __call__(self, seeds, generator):
        clips = world.draw_clips(seeds)
        tokens = drop_caption_words(world.caption_tokens(clips), generator)
        return true_latents(clips), toy_captions(tokens)


class ToyWeights(NamedTuple):
    """Weights that a training may start at."""

    net: model.OmniTransformer
    weights_id: str  # hash of the weights

    @property
    def cfg(self):
        return self.net.cfg

    def load(self, learns):
        """Return a copy of the net to train (learns) or to freeze, sharded under torchrun."""
        net = copy.deepcopy(self.net).requires_grad_(learns)
        if torch.distributed.is_initialized():
            from full_size import sharding

            sharding.shard(net, torch.float32)
        return net


class TrainingSource:
    """Weights and prompts for a training of the toy."""

    is_toy, prompts = True, TOY_PROMPTS
    write, dtype = staticmethod(files.save_weights), torch.float16

    def __init__(self, cfg=None):
        self.cfg = cfg  # of the student; None: the config in its weight file

    def open(self, path, cfg=None, seed=0) -> ToyWeights:
        """Read a bidirectional model, or with `cfg` the start of a student with this config."""
        net = model.load(path) if cfg else load_bidirectional(path)
        if cfg:
            # A student must have the blocks of `cfg`. A teacher has no blocks and fits any config.
            if net.cfg.name != config.TOY_TEACHER.name:
                files.check_config(path, net.cfg, cfg)
            net = student_from(net.state_dict(), cfg, seed, path)
        return ToyWeights(net, files.fingerprint(net.state_dict()))
