"""The linear codec with a small network that corrects its pictures: smooth motion, no patches.

`ToyCodec` decodes every latent alone. Its ball is too slow within a latent and jumps to the next
one, three times a second, and the borders of its patches show. The network sees each patch with its
neighbours, in this latent and in the one before, and predicts the error of the linear decoder:

    96 channels on the 4 x 4 grid -> three 3 x 3 convolutions -> 1536 numbers a patch, 8 frames

Encoder, latents and sound are those of `ToyCodec`, so that all models can be used as they are.
toy/fit.py trains the network and measures both codecs.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import config
from plumbing import files
from toy import codec as toy_codec

FILE = Path(__file__).parent.parent / "weights" / "toy_decoder.safetensors"
WIDTH = 192  # channels of the network


class LearnedCodec(toy_codec.ToyCodec):
    """A `ToyCodec` whose pictures are corrected by a network; it looks back one latent."""

    look_back = 1

    def __init__(self, cfg=config.TOY):
        super().__init__(cfg)
        channels = 2 * cfg.video_channels, WIDTH, WIDTH
        self.convolutions = nn.ModuleList(nn.Conv2d(n, WIDTH, 3, padding=1) for n in channels)
        self.correction = nn.Linear(WIDTH, len(self.video_later.mean))
        nn.init.zeros_(self.correction.weight)  # begin at the linear decoder
        nn.init.zeros_(self.correction.bias)

    def decode_patches(self, tokens, starts_clip):
        """Decode as the linear codec does, and correct all latents but the first of a clip."""
        n = int(starts_clip)
        first, later = super().decode_patches(tokens, starts_clip)
        # The first latent covers one frame. The network reads it as a latent of 8 equal frames.
        still = self.video_later.encode(first.repeat(1, 1, 1, self.cfg.video_stride))
        z = torch.cat([still, tokens.unflatten(1, (-1, self.cfg.tokens_per_frame))[:, n:]], 1)
        return first, later + self.predict_error(z)[:, n:]

    def predict_error(self, z):
        """Map latents (B, F, rows * columns, 48) to corrections (B, F, rows * columns, 1536)."""
        scale = self.video_later.scale
        z = z / scale * scale.square().mean().sqrt()  # all channels equally large
        before = torch.cat([z[:, :1], z[:, :-1]], 1)  # nothing lies before the first latent
        x = torch.cat([z, before], -1).flatten(0, 1).mT.unflatten(2, self.cfg.grid)
        for i, convolution in enumerate(self.convolutions):
            y = F.gelu(convolution(x))
            x = x + y if i else y
        # corrections are small: with this factor, all weights learn at the same rate
        return 0.3 * self.correction(x.flatten(2).mT).unflatten(0, z.shape[:2])


def load(cfg=config.TOY) -> LearnedCodec:
    """Load the linear codec and the shipped network."""
    codec = LearnedCodec(cfg).requires_grad_(False)
    linear, network = (files.read_weights(path)[0] for path in (toy_codec.FILE, FILE))
    files.load_into(codec, {**linear, **network}, FILE)
    return codec
