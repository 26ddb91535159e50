"""A first picture: from an image file to the first latent frame of a stream.

    image file --read_picture--> (3, H, W) --encoder of the source--> tokens --WithPicture--> stream

LTX-2 is conditioned on a picture in this way, too: in all passes of block 0 the tokens of the
first latent frame are clean and have the noise level 0. Everything else, also the sound of this
moment, is generated. Students were not trained with pictures: results/README.md tells how well
they follow one.
"""

import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

SMALLEST = 16  # pixels of a side
MODES = "1", "L", "P", "RGB", "CMYK", "YCbCr"  # after transparency is gone


def read_picture(path, height, width) -> torch.Tensor:
    """Read an image file as (3, height, width) in [0, 1]: its middle, scaled.

    Turned as its EXIF data say; of an animation the first picture; transparent parts become black.

    Raises ValueError for anything else that cannot be shown.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except Exception as error:  # its library raises anything for a broken file
        reason = getattr(error, "strerror", None) or "no whole image of a known kind, such as PNG"
        raise ValueError(f"{path}: not read as an image ({reason})") from None
    if min(image.size) < SMALLEST:
        columns, rows = image.size
        raise ValueError(
            f"{path}: {columns} x {rows} pixels; expected {SMALLEST} x {SMALLEST} or more"
        )
    image = ImageOps.fit(in_rgb(image, path), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def in_rgb(image, path):
    """Convert an image of any mode to RGB with 8 bits."""
    if image.mode.startswith("I"):  # grey, 16 bits; conversion by the library would only clip it
        grey = (np.asarray(image) // 256).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    if image.mode not in MODES:
        raise ValueError(f"{path}: pixels of mode {image.mode}; expected 8 or 16 bits a channel")
    return image.convert("RGB")


class WithPicture(nn.Module):
    """A student whose denoising passes of block 0 are given the first latent frame."""

    def __init__(self, net, picture):
        """picture: clean tokens (1 or B, rows * columns, C_v)."""
        super().__init__()
        self.net, self.cfg, self.project_text = net, net.cfg, net.project_text
        self.picture = picture

    def forward(self, video, audio, sigma_video, sigma_audio, text, span, view):
        if span.video.start or not sigma_video.any():  # a later block, or the refresh
            return self.net(video, audio, sigma_video, sigma_audio, text, span, view)
        picture = self.picture.to(video).expand(len(video), -1, -1)
        n, levels = picture.shape[1], sigma_video[:, None].repeat(1, video.shape[1])
        levels[:, :n] = 0  # (B, T), one level for each token
        given = torch.cat([picture, video[:, n:]], 1)
        v, a = self.net(given, audio, levels, sigma_audio, text, span, view)
        # the velocity from the picture to the noise, with which x0 is the picture
        known = (video[:, :n] - picture) / sigma_video[:, None, None]
        return torch.cat([known, v[:, n:]], 1), a
