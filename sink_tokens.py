"""Learnable audio sinks: tokens that carry no position, for attention to rest on.

The problem.  After the causal mask is put on, the first audio token may attend to very little: in
the paper's layout block 0 holds a single audio latent, A0, whose softmax over one key is constant,
whatever the key says. Video has 384 tokens there. The paper reports that training under the mask
(its stage II, ode_regression.py) then diverges (NaN for S <= 2), and that S = 16 sinks calm it
(largest gradient norm 9.23).

The remedy.  S learnable vectors stand in front of the audio tokens, behind the input projection.

  * they belong to block 0: every token sees them; they see themselves, A0 and V0, the first video
    latent (masks.py)
  * identity RoPE: cos = 1, sin = 0, in audio self-attention and in both cross-modal directions.
    (By the formula of rope.py, angle 0 is the time max/2: all sinks stand at that one moment, so
    there is no order among them. In a stream longer than the window the cache moves all pinned
    keys along in time, the sinks' too.)
  * their noise level is that of A0, and every other operation treats them as audio tokens
  * they are removed before the output layer and never supervised

What happened later.  The released checkpoint merges the first second into block 0, so that its
first audio tokens see 26 keys, and has no sinks: it trains without them. That fits our reading:
it is the one-token prefix that needs them.

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


def fresh_sinks(num_sinks, width, generator=None) -> torch.Tensor:
    """(1, S, C_a) sinks that no training has touched."""
    return 0.02 * torch.randn(1, num_sinks, width, generator=generator)


class SinkTokens(nn.Module):
    """S learnable vectors of the audio width; LTX-2 lacks them, so they keep their init."""

    def __init__(self, num_sinks, width):
        super().__init__()
        self.tokens = nn.Parameter(fresh_sinks(num_sinks, width))

    def prepend(self, x):
        """(B, F_a, C_a) audio tokens -> (B, S + F_a, C_a).

        >>> SinkTokens(16, 96).prepend(torch.zeros(2, 25, 96)).shape
        torch.Size([2, 41, 96])
        """
        return torch.cat([self.tokens.expand(len(x), -1, -1).to(x.dtype), x], dim=1)

    def prepend_sigma(self, sigma):
        """Noise levels for sinks and tokens: sinks share A0's, or the clip's if there is just one.

        (B, 1) -> (B, 1)     (B, F_a) -> (B, S + F_a)

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
    """(S, audio_width/2) rotation of the sinks: none, unless the ablation asks for positions.

    # Paper: the ablation says "incremental RoPE" and no more; here the sinks then stand at the
    # times just before A0, as S further audio frames, so that A0 itself stays in sync with V0.

    >>> sink_angles(config.TOY).abs().max()
    tensor(0., dtype=torch.float64)
    """
    if cfg.sink_positions == "incremental":
        frames = torch.arange(-cfg.num_sinks, 0, dtype=torch.float64)
        return rope.time_angles((cfg.audio_stride * frames - 1) / cfg.mel_rate, cfg)
    return torch.zeros(cfg.num_sinks, cfg.audio_width // 2, dtype=torch.float64)


if __name__ == "__main__":
    cfg = config.TOY
    heads = (cfg.num_heads, cfg.audio_width // cfg.num_heads)
    x = torch.randn(1, cfg.num_sinks, *heads)
    assert torch.equal(rope.rotate(x, rope.tables(sink_angles(cfg), cfg)), x)
    print(f"{cfg.num_sinks} sinks: rotation leaves them as they are")
