"""The passes of a block as pictures: what the model takes for the clean block after each of them.

A hook on the model keeps the clean estimates x0 of the last passes, of one latent frame each. When
the block is finished, they are decoded and put side by side, from noise to clean. Films without a
page have no hook.
"""

import base64
import io
from collections import deque

import torch
from PIL import Image

from model import to_x0
from toy import codec as toy_codec
from toy.switch import guided


class PassPictures:
    """Draws the passes of the blocks of a stream, as one picture a block."""

    def __init__(self, net, passes):
        """net: its passes are watched from now on; passes: of each block, besides the refresh."""
        # The linear codec, because it is the fastest. The decoders of LTX-2 are too slow for this:
        # at full size there are no pictures.
        self.codec = toy_codec.load(net.cfg) if net.cfg.is_toy else None
        self.estimates = deque(maxlen=passes)  # the refresh of the block before drops out
        self.latents = None  # of the pass before
        if self.codec:
            net.register_forward_hook(self._keep)

    def _keep(self, net, inputs, velocities):
        video, last = inputs[0], slice(-net.cfg.tokens_per_frame, None)  # the last latent frame
        sigma = inputs[2][:1].view(1, -1)[:, last]  # (1, 1), or with a first picture one a token
        x0 = to_x0(video[:1, last], sigma, velocities[0][:1, last])
        if video is self.latents:  # the same pass with the prompt before came first
            x0 = guided(self.estimates.pop(), x0)
        self.latents = video
        self.estimates.append(x0)

    def of_blocks(self, blocks, strips):
        """Yield the same blocks; append the picture of each to `strips` first."""
        for block in blocks:
            strips.append(self._strip(block) if self.codec else "")
            yield block

    @torch.inference_mode()
    def _strip(self, block) -> str:
        """Return the last picture of the block after each pass, side by side: a PNG's data URL."""
        tokens = torch.cat([*self.estimates]).float().cpu()
        is_one_frame = block.index == 0 and self.codec.cfg.prefix_video_frames == 1
        frames = self.codec.decode_video(tokens, is_one_frame)[:, -1]  # (passes, 3, H, W)
        file = io.BytesIO()
        strip = (torch.cat([*frames], -1) * 255).round().byte().permute(1, 2, 0)
        Image.fromarray(strip.numpy()).save(file, "png")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
