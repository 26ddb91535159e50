"""Matrix products in fp8: half the bytes of bfloat16, and almost twice its speed on a GPU.

An e4m3 number has 1 bit for the sign, 4 for the exponent and 3 for the mantissa. Between two powers
of two there are 8 numbers, and the largest is 448. So each row gets a scale of its own, which moves
its largest number to 448:

    weights       a row is an output channel; rounded once, while they are read
    activations   a row is a token; rounded in every pass, as they come

    x (T, C) = scale_x (T, 1) * values_x        w (N, C) = scale_w (N, 1) * values_w
    x w^T    = scale_x (values_x values_w^T) scale_w^T

The product in the brackets reads fp8 and sums in a wider type. The result is bfloat16 again.

Products inside the layers become fp8 if their rows are tokens of video or of its captions: 14.5 of
18.9 billion weights, see `reads_video`. As in the fp8 files of LTX-2, the entrance, the exit,
adaptive norms, captions, tables, biases and norms stay as they are. Attention itself stays in
bfloat16.
"""

import functools
from typing import NamedTuple

import torch
from torch import nn

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448


def check_device(device):
    """Raise ValueError for a device that cannot multiply in fp8; a CPU can, slowly."""
    is_gpu = device.type == "cuda"
    if is_gpu and torch.cuda.get_device_capability(device) < (8, 9) or device.type == "mps":
        name = torch.cuda.get_device_name(device) if is_gpu else device
        raise ValueError(
            f"--dtype fp8: {name} has no fp8; expected a GPU of compute capability 8.9 or more; "
            f"use --dtype bfloat16"
        )


class Rounded(NamedTuple):
    """Rows whose numbers are values * scale."""

    values: torch.Tensor  # (..., C) in fp8
    scale: torch.Tensor  # (..., 1) in float32


def rounded(x) -> Rounded:
    """Round rows x (..., C); the largest number of a row becomes 448 or -448.

    >>> values, scale = rounded(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
    >>> values.float() * scale
    tensor([[ 1., -2.],
            [ 0.,  0.]])
    """
    largest = x.abs().amax(-1, keepdim=True).float()
    scale = largest.clamp(min=1e-30) / LARGEST  # a row of zeros must not be divided by zero
    return Rounded((x.float() / scale).to(FP8), scale)


@functools.cache
def in_one_kernel(function):
    """Return the function as one kernel, compiled anew for each shape."""
    # Rounding 1152 x 4096 on an H100 takes 8 us so; a kernel for all shapes takes 14.
    torch._dynamo.config.recompile_limit = 64  # by default PyTorch gives up silently after 8
    return torch.compile(function, dynamic=False)


def product(x, weight, bias, scale):
    """x (..., C), tensor or Rounded, times weight^T, plus bias -> (..., N) in the dtype of bias.

    weight (N, C) in fp8   bias (N,)   scale (N, 1) of weight
    """
    if torch.is_tensor(x):
        x = (in_one_kernel(rounded) if x.is_cuda else rounded)(x)
    values, scale_x = (t.flatten(0, -2) for t in x)
    if values.device.type == "cpu":  # the formula above
        sums = values.float() @ weight.float().t()
        out = (sums * scale_x * scale.t() + bias).to(bias.dtype)
    else:
        out = torch._scaled_mm(
            values, weight.t(), scale_x, scale.t(), bias, out_dtype=bias.dtype, use_fast_accum=True
        )
    return out.unflatten(0, x.values.shape[:-1])


class Fp8Linear(nn.Module):
    """A linear layer whose weight is stored and multiplied in fp8."""

    def __init__(self, linear):
        super().__init__()
        check_device(linear.weight.device)
        values, scale = rounded(linear.weight.detach())
        self.weight = nn.Parameter(values, requires_grad=False)
        self.bias = linear.bias
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x):
        return product(x, self.weight, self.bias, self.scale)


def reads_video(name) -> bool:
    """Tell from the name of a product inside a layer if its rows are tokens of video.

    >>> [reads_video(f"7.{x}") for x in ("video.mlp_in", "audio.mlp_in", "audio.cross_attn.to_k")]
    [True, False, True]
    """
    # A second of audio is 25 rows. On an H100 fp8 loses there, rounding included: 11.4 us against
    # 7.0 for 2048 -> 2048, 16.2 against 13.2 for 2048 -> 6144. cuBLAS refuses 8192 -> 2048.
    reads_other = name.endswith(("cross_attn.to_k", "cross_attn.to_v"))
    return ("video" in name) != reads_other


def quantise(layers, chosen=reads_video):
    """Let the linear layers inside a module multiply in fp8, in place.

    chosen   function of a name, e.g. "7.video.self_attn.to_q": whether this one changes
    """
    for path, parent in layers.named_modules():
        for name, linear in parent.named_children():
            if isinstance(linear, nn.Linear) and chosen(f"{path}.{name}"):
                setattr(parent, name, Fp8Linear(linear))  # frees the old weight


def while_read(net, tensors):
    """Let a model on `meta` multiply in fp8; return its (name, tensor) pairs, rounded as read.

    tensors   pairs of name and tensor in a wider type
    """
    # Not a generator itself: the model must change now, not when the first tensor is read.
    quantise(net.layers)
    in_fp8 = {name for name, p in net.named_parameters() if p.dtype == FP8}
    return _rounded_pairs(in_fp8, tensors)


def _rounded_pairs(in_fp8, tensors):
    for name, tensor in tensors:
        if name not in in_fp8:
            yield name, tensor
            continue
        values, scale = rounded(tensor)
        yield name, values
        yield name.removesuffix("weight") + "scale", scale
