"""Learnable audio sink tokens (attention sinks) with identity RoPE.

The problem.  Under the causal mask, the first audio token can attend to very little. In the paper's
layout, block 0 holds a single audio latent, A0. In self-attention, A0 attends only to itself, and
a softmax over one key is always 1. (Video has 384 keys there.) The paper reports that
training under the mask (its stage II, ode_regression.py) then diverges: NaN for S <= 2. With S = 16
sinks it is stable (largest gradient norm 9.23).

The remedy.  S learnable vectors are placed before the audio tokens, after the input projection.

  * They belong to block 0, so no later block masks them as keys. As queries they attend to
    themselves, A0 and V0, the first video latent (masks.py).
  * Identity RoPE: cos = 1, sin = 0, in audio self-attention and in both cross-modal directions.
    Angle 0 is the time rope_max_seconds / 2 (rope.py). All sinks have this one time, so they
    have no order. After an eviction, the cache moves all pinned keys in time, so the keys of
    the sinks are rotated then, too.
  * They get the noise level of A0. All other operations treat them as audio tokens.
  * They are removed before the output layer, and no loss is computed on them.

The later release.  The released checkpoint puts the first second into block 0. Its first audio
token attends to 26 keys, and it trains without sinks. This fits our guess that sinks are needed
for a block 0 of one audio latent. (The toy needs none, and more keys do not do what sinks do there:
results/README.md.)

    S      paper's stage II, 3000 steps: largest gradient norm, loss at sigma = 0.5
    24     9.15   0.110
    16     9.23   0.081      (with incremental positions instead of identity: 0.402)
    8     21.95   0.129
    4     49.71   0.141
    <= 2   NaN

    python sink_tokens.py    checks that rotation leaves the sinks as they are
"""

import torch
from torch import nn

import config
import rope


def init_sinks(num_sinks, width, generator=None) -> torch.Tensor:
    """Initial sinks (1, S, C_a): small random vectors."""
    return 0.02 * torch.randn(1, num_sinks, width, generator=generator)


class SinkTokens(nn.Module):
    """S learnable vectors of the audio width.  LTX-2's weights contain none."""

    def __init__(self, num_sinks, width):
        super().__init__()
        self.tokens = nn.Parameter(init_sinks(num_sinks, width))

    def prepend(self, x):
        """(B, F_a, C_a) audio tokens -> (B, S + F_a, C_a).

        >>> SinkTokens(16, 96).prepend(torch.zeros(2, 25, 96)).shape
        torch.Size([2, 41, 96])
        """
        return torch.cat([self.tokens.expand(len(x), -1, -1).to(x.dtype), x], dim=1)

    def prepend_sigma(self, sigma):
        """Noise levels of sinks and tokens: (B, F_a) -> (B, S + F_a); sinks get the level of A0.

        One level for the whole clip, (B, 1), is returned unchanged.

        >>> SinkTokens(2, 96).prepend_sigma(torch.tensor([[.1, .7, .7]]))
        tensor([[0.1000, 0.1000, 0.1000, 0.7000, 0.7000]])
        """
        if sigma.shape[1] == 1:
            return sigma
        return torch.cat([sigma[:, :1].expand(-1, self.tokens.shape[1]), sigma], dim=1)

    def remove(self, x):
        """(B, S + F_a, C_a) -> (B, F_a, C_a)."""
        return x[:, self.tokens.shape[1] :]


def sink_angles(cfg) -> torch.Tensor:
    """(S, audio_width/2) rotation angles of the sinks: zero, except in the ablation.

    >>> sink_angles(config.TOY).abs().max()
    tensor(0., dtype=torch.float64)
    """
    if cfg.sink_positions == "incremental":
        # Paper: it only says "incremental RoPE". Our reading: the sinks get the times of S audio
        # frames before A0, and A0 keeps its own time, like V0.
        frames = torch.arange(-cfg.num_sinks, 0, dtype=torch.float64)
        return rope.time_angles((cfg.audio_stride * frames - 1) / cfg.mel_rate, cfg)
    return torch.zeros(cfg.num_sinks, cfg.audio_width // 2, dtype=torch.float64)


if __name__ == "__main__":
    cfg = config.TOY
    heads = (cfg.num_heads, cfg.audio_width // cfg.num_heads)
    x = torch.randn(1, cfg.num_sinks, *heads)
    assert torch.equal(rope.rotate(x, rope.cos_sin(sink_angles(cfg), cfg)), x)
    print(f"{cfg.num_sinks} sinks: rotation leaves them as they are")
