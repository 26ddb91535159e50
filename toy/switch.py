"""A change of the prompt that is obeyed soon.

A new prompt alone is obeyed late: the blocks in the cache show the old one, and the model goes on
with them. `Switching` does two things when the prompt changes:

  * The cache forgets all blocks but the newest, which tells where the ball is and where it flies.
    Block 0 is no longer pinned: it shows the old prompt, too.
  * Two blocks are guided away from the old prompt. Their passes below a noise level run with either
    prompt:

        x0 = x0_old + 2 (x0_new - x0_old)

    Probably the passes at more noise decide where the ball is, and these how it looks.

The price is four passes a switch. studies/prompt_switch.py compares other ways. Nothing of this was
trained or measured at full size. There, a new prompt is only read.
"""

import torch
from torch import nn

GUIDED_BLOCKS, SCALE, BELOW = 2, 2.0, 0.8


def guided(old, new, scale=SCALE):
    """Move a prediction for the new prompt further away from that for the old one."""
    return old + scale * (new - old)


class Switching(nn.Module):
    """A student for one stream, which forgets and is guided when its prompt changes."""

    def __init__(self, net):
        super().__init__()
        self.net, self.cfg, self.project_text = net, net.cfg, net.project_text
        self.old = self.text = None

    def forward(self, video, audio, sigma_video, sigma_audio, text, span, view):
        if text is not self.text:
            # the same words, in any order, have the same keys: no change
            is_new = self.text and not torch.equal(text.video[0][0], self.text.video[0][0])
            if is_new:
                self.old, self.since = self.text, span.video.start
                view.forget()
            self.text = text
        latents, sigmas = (video, audio), (sigma_video, sigma_audio)
        # at sigma = 0, the refresh predicts nothing that is used
        frames = GUIDED_BLOCKS * self.cfg.video_frames_per_block
        if self.old and span.video.start < self.since + frames and 0 < sigma_audio.max() < BELOW:
            away = self.net(*latents, *sigmas, self.old, span, view)
            # the second pass overwrites the keys of the first
            new = self.net(*latents, *sigmas, text, span, view)
            # the same for velocities, since x0 = x - sigma v
            return list(map(guided, away, new))
        return self.net(*latents, *sigmas, text, span, view)
