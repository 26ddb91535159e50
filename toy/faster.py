"""The toy's transformer on a CPU: the same passes with fewer and cheaper operators.

A second of the toy is 73 tokens, so starting an operator often takes longer than its work.
`speed_up` changes a student in place, for streams: one noise level per clip, no gradients. Its
results differ by rounding.

  * Modulation depends on the noise level alone, and a stream has five levels. The sums of tables
    and rows are made once for each.
  * RMSNorm takes four operators instead of ten, rotation three instead of seven. Product and sum
    are one operator.
  * Weights are stored transposed: otherwise every product of few tokens rearranges them first.
"""

import functools

import torch
from torch import nn

from kv_cache import Heads
from model import Attention, HalfLayer


@torch.inference_mode()
def speed_up(net):
    """Speed up the passes of a toy student."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.T.contiguous().T
    for name in ("video", "audio"):
        stream, halves = getattr(net, name), [getattr(layer, name) for layer in net.layers]
        stream.modulate = remembered(stream.modulate, halves)
        for index, half in enumerate(halves):
            half.__class__ = FastHalf  # the same parameters, other methods
            half.index, half.eps = index, torch.tensor(half.eps)
            for attention in (half.self_attn, half.text_attn, half.cross_attn):
                attention.__class__, attention.eps = FastAttention, half.eps


def remembered(modulate, halves):
    """Return a function like `Modality.modulate` that computes each noise level once.

    Its Modulation has the `FastHalf.rows` of every layer in place of `main`.
    """
    known = {}

    def modulate_once(sigma):
        level = tuple(sigma.flatten().tolist())
        if level not in known:
            made = modulate(sigma)
            known[level] = made._replace(main=[half.rows(made) for half in halves])
        return known[level]

    return modulate_once


class FastHalf(HalfLayer):
    """A HalfLayer whose rows are ready for use: added to its tables, scales increased by 1."""

    def rows(self, modulation):
        """Return 6 rows as in Modulation.main, 4 as in .cross, 1 as in .gate: each (B, 1, C)."""
        main, cross = self.table + modulation.main, self.cross_table[:4] + modulation.cross
        main[:, :, [1, 4]] += 1
        cross[:, :, [0, 2]] += 1
        gate = self.cross_table[4:] + modulation.gate
        return torch.cat([main, cross, gate], 2).unbind(2)

    def attend_self(self, x, modulation, positions, attend):
        shift, scale, gate = modulation.main[self.index][:3]
        y = torch.addcmul(shift, rms_norm(x, self.eps), scale)
        return torch.addcmul(x, gate, self.self_attn(y, y, positions, positions, attend))

    def attend_captions(self, x, keys_values, mask):
        return x + self.text_attn.attend_captions(rms_norm(x, self.eps), *keys_values, mask)

    def cross_inputs(self, x, modulation):
        y, rows = rms_norm(x, self.eps), modulation.main[self.index]
        a2v, v2a = torch.addcmul(rows[7], y, rows[6]), torch.addcmul(rows[9], y, rows[8])
        return (a2v, v2a) if self.listen_row == 0 else (v2a, a2v)

    def attend_other(self, x, queries, context, modulation, q_rope, k_rope, attend):
        y = self.cross_attn(queries, context, q_rope, k_rope, attend)
        return torch.addcmul(x, modulation.main[self.index][10], y)

    def mlp(self, x, modulation):
        shift, scale, gate = modulation.main[self.index][3:6]
        y = self.mlp_in(torch.addcmul(shift, rms_norm(x, self.eps), scale))
        return torch.addcmul(x, gate, self.mlp_out(nn.functional.gelu(y, approximate="tanh")))


class FastAttention(Attention):
    """An Attention with `FastHeads`."""

    def heads(self, q_rope=None, k_rope=None):
        return FastHeads(*super().heads(q_rope, k_rope))


class FastHeads(Heads):
    """Heads with a cheaper norm and rotation; eps is a tensor."""

    def _normed(self, x, weight, table):
        x = self.split(rms_norm(x, self.eps) * weight)
        if table is None:
            return x
        cos, sin = whole_tables(table, self.count)
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)  # roll swaps the halves


@functools.lru_cache(maxsize=8)  # the passes of a block share their four tables
def whole_tables(table, heads):
    """Return cosines, and sines with their signs, of all channels of a token: both (T, H, D)."""
    cos, sin = (t.view(len(t), heads, -1) for t in (table.cos, table.sin))
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)  # for the toy's layout, "split"


def rms_norm(x, eps):
    """Return the same as `model.norm`; eps: a tensor without axes."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()
