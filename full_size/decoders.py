"""The decoders of LTX-2: latents to frames and sound, block by block.

The three networks come from Hugging Face diffusers: the video VAE, the audio VAE and the vocoder.
`Decoder` runs them on a stream in overlapping chunks (film/decoders.py).
"""

import math
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from film.decoders import Chunk, ChunkedDecoder
from full_size import parts
from full_size.checkpoint import check_numbers

PARTS = ("vae", "audio_vae", "vocoder")  # folders
STEREO, MEL_LATENT_BINS, MEL_BINS = 2, 16, 64


class Overlap(NamedTuple):
    """Context and look-ahead of each network, in its own inputs; None: as far as it reaches."""

    video: tuple[int, int] = (4, 0)  # latent frames; it reaches 22 both ways
    audio: tuple[int, int] | None = None  # latent frames
    vocoder: tuple[int, int] | None = None  # mel frames


class Decoder:
    """Decodes the blocks of one stream of LTX-2's latents."""

    channels, scale = STEREO, 1  # audio channels; factor from decoded to written pixels

    def __init__(self, vae, audio_vae, vocoder, cfg, overlap=Overlap(), watch=lambda _, f: f):
        """Take the three networks; watch: `Stopwatch.watch`, to time each of them."""
        self.vae, self.audio_vae, self.vocoder, self.cfg = vae, audio_vae, vocoder.float(), cfg
        self.size = cfg.height, cfg.width
        self.sample_rate = vocoder.config.output_sampling_rate
        samples = self.sample_rate // cfg.mel_rate  # of one mel frame
        decode_video = watch("video decoder", self._decode_video)
        decode_audio = watch("audio decoder", self._decode_audio)
        synthesise = watch("vocoder", self._synthesise)
        self.video = ChunkedDecoder(decode_video, cfg.video_stride, 1, *overlap.video)
        self.mel = ChunkedDecoder(
            decode_audio, cfg.audio_stride, 1, *(overlap.audio or audio_reach(audio_vae.decoder))
        )
        self.sound = ChunkedDecoder(
            synthesise, samples, samples, *(overlap.vocoder or vocoder_reach(vocoder))
        )

    @torch.inference_mode()
    def decode(self, block) -> Chunk:
        """Return the part of the stream that is final once this `rollout.Block` is known."""
        rows, columns = self.cfg.grid
        like = next(self.vae.parameters())
        video = block.video.to(like).unflatten(1, (-1, rows, columns)).permute(0, 4, 1, 2, 3)
        audio = block.audio.to(like).unflatten(2, (-1, MEL_LATENT_BINS)).transpose(1, 2)
        frames, mel = self.video.add(video), self.mel.add(audio)
        return self._chunk(frames, mel, self.sound.add(mel) if mel is not None else None)

    @torch.inference_mode()
    def finish(self) -> Chunk:
        """Return the end of the stream, which waited for later latents."""
        frames, mel = self.video.finish(), self.mel.finish()
        parts = [self.sound.add(mel)] if mel is not None else []
        parts = [p for p in (*parts, self.sound.finish()) if p is not None]
        return self._chunk(frames, mel, torch.cat(parts, 2) if parts else None)

    def _chunk(self, frames, mel, samples):
        empty = next(self.vae.parameters()).new_zeros  # on the same device
        frames = empty(1, 3, 0, *self.size) if frames is None else frames / 2 + 0.5
        levels = empty(1, STEREO, 0, MEL_BINS) if mel is None else mel
        samples = empty(1, STEREO, 0) if samples is None else samples
        return Chunk(frames[0].transpose(0, 1).clamp(0, 1), levels[0].mean(0), samples[0])

    def _decode_video(self, latents):
        """(B, C, F, h, w) normalised latents -> (B, 3, P, H, W) in [-1, 1]."""
        new = self.video.given - self.video.done  # the others are context
        return decode_video(self.vae.decoder, denormalised(latents, self.vae, (-1, 1, 1, 1)), new)

    def _decode_audio(self, latents):
        """(B, 8, F, 16) normalised latents -> (B, 2, M, 64) log-mel frames."""
        shape = (latents.shape[1], 1, latents.shape[3])  # statistics are by channel and bin
        return self.audio_vae.decode(denormalised(latents, self.audio_vae, shape), False)[0]

    def _synthesise(self, mel):
        """(B, 2, M, 64) -> (B, 2, samples)."""
        with no_tf32():
            return self.vocoder(mel.float())


def denormalised(latents, vae, shape):
    """Return latents in the decoder's units, by the mean and std stored with its weights."""
    # Trap: the decoders of the reference code do this themselves, the networks of diffusers do not
    mean, std = (x.view(shape).to(latents) for x in (vae.latents_mean, vae.latents_std))
    return latents * std + mean


@contextmanager
def no_tf32():
    """Compute float32 convolutions in full precision."""
    # Trap: on a GPU, cuDNN by default rounds the inputs of a convolution to 10 bits (TF32)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# ---- a first picture ----


@torch.inference_mode()
def encode_picture(vae, picture):
    """Encode a picture (3, H, W) in [0, 1] by LTX-2's video encoder: tokens (1, h * w, 128)."""
    x = (2 * picture - 1)[None, :, None].to(next(vae.parameters()))  # (B, 3, 1, H, W) in [-1, 1]
    latents = vae.encode(x).latent_dist.mode()  # (B, 128, 1, h, w)
    shape = (-1, 1, 1, 1)
    mean, std = (x.view(shape).to(latents) for x in (vae.latents_mean, vae.latents_std))
    return ((latents - mean) / std).flatten(2).mT


def load_encoder(folder, device="cpu", dtype=torch.bfloat16):
    """Load the video VAE of a local folder in diffusers' format, without its decoder."""
    place = Path(folder, "vae")
    vae = parts.load_part(place, encoder(), dtype)
    vae.decoder = None
    for key, parameter in vae.named_parameters():
        check_numbers(place, key, parameter)
    return vae.eval().requires_grad_(False).to(device)


def encoder() -> parts.Part:
    """Return what the video VAE must be for a picture to be encoded."""
    network, _ = decoder_classes()["vae"]
    return parts.Part(network, {**SWITCHES["vae"], **ENCODER_SWITCHES}, ("decoder.",))


def meta_encoder(dtype=torch.bfloat16):
    """Build the encoder at its published size on the meta device, without contents."""
    network, options = decoder_classes()["vae"]
    with torch.device("meta"):
        vae = network(**options)
    vae.decoder = None
    return torch.nn.Module.to(vae, dtype).eval()


# ---- how far the decoders of sound reach ----


def audio_reach(decoder) -> tuple[int, int]:
    """Return how many latents before and after its own a mel frame depends on; none after it."""
    latents, rate = num_neighbours(decoder.conv_in) + num_neighbours(decoder.mid), 1
    for stage in reversed(decoder.up):  # the first one to run is the last one in the list
        latents += num_neighbours(stage.block) / rate
        if hasattr(stage, "upsample"):
            rate *= 2  # frames of a latent
            latents += num_neighbours(stage.upsample) / rate
    return math.ceil(latents + num_neighbours(decoder.conv_out) / rate), 0


def vocoder_reach(net) -> tuple[int, int]:
    """Return how many mel frames before and after its own a sample depends on."""
    before = after = num_neighbours(net.conv_in) / 2  # half of them on either side
    rate, parallel = 1, net.resnets_per_upsample
    for i, up in enumerate(net.upsamplers):
        # input t of a transposed convolution adds to the outputs t * stride - padding and later
        (kernel,), (padding,), (stride,) = up.kernel_size, up.padding, up.stride
        before += (kernel - 1 - padding) / (stride * rate)
        after += padding / (stride * rate)
        rate *= stride  # samples of a mel frame
        blocks = net.resnets[i * parallel : (i + 1) * parallel]  # added up: the widest one counts
        widest = max(map(num_neighbours, blocks)) / 2 / rate
        before, after = before + widest, after + widest
    last = num_neighbours(net.conv_out) / 2 / rate
    # `before` counts for the first sample of a mel frame, `after` for its last one
    return math.floor(before + last), math.floor(after + last + (rate - 1) / rate)


def num_neighbours(module) -> int:
    """Return how many inputs besides its own an output of a chain of convolutions depends on."""
    convs = (m for m in module.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d)))
    return sum((conv.kernel_size[0] - 1) * conv.dilation[0] for conv in convs)  # axis 0: time


# ---- the video decoder ----


def decode_video(decoder, latents, new=None):
    """Run the video decoder of diffusers.  (B, 128, F, h, w) -> (B, 3, 8 (F - 1) + 1, 32 h, 32 w)

    new   latents at the end whose frames are needed; earlier frames may be zeros. Default: all
    """
    # diffusers keeps channels outermost, (B, C, T, H, W). The convolutions of a GPU want them
    # innermost, so each of them would copy its input and its output. Here x is (B, T, H, W, C).
    stages = [(*stage.upsamplers, *stage.resnets) for stage in decoder.up_blocks]
    steps = [*decoder.mid_block.resnets, *sum(stages, ())]
    num_frames, p = 8 * (latents.shape[2] - 1) + 1, decoder.patch_size
    needed = num_frames if new is None else min(num_frames, 8 * new)
    x = convolve(decoder.conv_in, padded(latents.permute(0, 2, 3, 4, 1)))
    for step, frames in zip(steps, needed_frames(steps, needed)):
        x = (upsample if hasattr(step, "upscale_factor") else add_residual)(step, x[:, -frames:])
    x = convolve(decoder.conv_out, activate(x))
    # each output is a patch of p x p pixels, columns before rows
    x = x.unflatten(-1, (3, p, p)).permute(0, 4, 1, 2, 6, 3, 5).flatten(5, 6).flatten(3, 4)
    return F.pad(x, (0, 0, 0, 0, num_frames - x.shape[2], 0))


def needed_frames(steps, frames) -> list[int]:
    """Return how many of the last frames each step must read, to get the last `frames` right."""
    # The first frame that a convolution reads stands in for those before, so its output is wrong.
    frames, counts = frames + 1, []  # one more: the last convolution
    for step in reversed(steps):
        is_upsampler = hasattr(step, "upscale_factor")
        frames = (frames + 1) // 2 + 1 if is_upsampler else frames + 2  # two convolutions
        counts.append(frames)
    return counts[::-1]


def add_residual(block, x):
    """Add what a residual block computes."""
    first, second = block.conv1, block.conv2
    # nested, so that no name keeps the features between the two convolutions longer than needed
    return convolve(second, activate(convolve(first, activate(x)))).add_(x)


def activate(x):
    """RMSNorm over the channels, SiLU, padding: (B, T, H, W, C) -> (B, T + 2, H + 2, W + 2, C)."""
    x = F.rms_norm(x, x.shape[-1:], eps=1e-8)
    # one kernel: F.silu can only write to new memory, which would then be copied
    return padded(x, lambda middle, x: torch.ops.aten.silu.out(x, out=middle))


def convolve(layer, x):
    """Apply a 3 x 3 x 3 convolution to (B, T + 2, H + 2, W + 2, C) -> (B, T, H, W, C')."""
    conv = layer.conv
    # a view with the order of axes that PyTorch wants; in memory, channels stay innermost
    return F.conv3d(x.permute(0, 4, 1, 2, 3), conv.weight, conv.bias).permute(0, 2, 3, 4, 1)


def padded(x, write=torch.Tensor.copy_):
    """Add a copy of the first and of the last frame; reflect one pixel at every edge.

    write(middle, x)   fills the rest; by default with x

    >>> padded(torch.tensor([[1, 2, 3], [4, 5, 6]]).view(1, 1, 2, 3, 1))[0, 0, :, :, 0]
    tensor([[5, 4, 5, 6, 5],
            [2, 1, 2, 3, 2],
            [5, 4, 5, 6, 5],
            [2, 1, 2, 3, 2]])
    """
    b, t, h, w, c = x.shape
    out = x.new_empty(b, t + 2, h + 2, w + 2, c)
    write(out[:, 1:-1, 1:-1, 1:-1], x)
    for axis, inwards in (3, 2), (2, 2), (1, 1):  # an axis includes the edges of those before it
        for edge, inside in (0, inwards), (-1, -1 - inwards):
            out.select(axis, edge).copy_(out.select(axis, inside))
    return out


def upsample(layer, x):
    """Double frames, rows and columns, drop the first frame: T frames become 2 T - 1."""
    x, same = to_space(convolve(layer.conv, padded(x))), to_space(x)
    copies = x.shape[-1] // same.shape[-1]
    x.unflatten(-1, (copies, -1)).add_(same.unsqueeze(-2))  # one residual for several channels
    return x[:, 1:]


def to_space(x):
    """Turn every 8 channels into 2 frames x 2 rows x 2 columns: (B, 2 T, 2 H, 2 W, C / 8)."""
    x = x.unflatten(-1, (-1, 2, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4)  # each axis beside its 2
    return x.flatten(5, 6).flatten(3, 4).flatten(1, 2)


# ---- the three networks ----


def decoder_classes() -> dict:
    """Return {folder: (class of diffusers, arguments that differ from the class's defaults)}."""
    try:
        from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
        from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
    except (ImportError, RuntimeError):
        raise ValueError(parts.REQUIRED) from None
    return {
        "vae": (AutoencoderKLLTX2Video, {"decoder_causal": False}),
        "audio_vae": (AutoencoderKLLTX2Audio, {}),
        "vocoder": (LTX2Vocoder, {}),
    }


# settings that change a network's results, but neither names nor shapes, as published
SWITCHES = {
    "vae": {
        "latent_channels": 128, "patch_size": 4, "patch_size_t": 1, "resnet_norm_eps": 1e-6,
        "decoder_causal": False, "decoder_spatial_padding_mode": "reflect",
        "decoder_spatio_temporal_scaling": (True, True, True), "timestep_conditioning": False,
        "upsample_residual": (True, True, True), "upsample_factor": (2, 2, 2),
    },
    "audio_vae": {
        "latent_channels": 8, "mel_bins": 64, "norm_type": "pixel", "causality_axis": "height",
        "mid_block_add_attention": False,
    },
    "vocoder": {
        "upsample_factors": (6, 5, 2, 2, 2), "resnet_dilations": ((1, 3, 5),) * 3,
        "act_fn": "leaky_relu", "leaky_relu_negative_slope": 0.1, "antialias": False,
        "final_act_fn": "tanh", "output_sampling_rate": 24000,
    },
}  # fmt: skip


ENCODER_SWITCHES = {  # of the video VAE, where a picture is encoded
    "encoder_causal": True, "encoder_spatial_padding_mode": "zeros",
    "spatio_temporal_scaling": (True, True, True, True),
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
}  # fmt: skip


def networks() -> dict:
    """Return what the three networks must be, to decode: their encoders are not read."""
    classes = decoder_classes().items()
    return {
        name: parts.Part(network, SWITCHES[name], ("encoder.",)) for name, (network, _) in classes
    }


def check_folder(folder):
    """Raise ValueError unless LTX-2's folder has whole decoders."""
    parts.check_folders(folder, PARTS)
    parts.check_parts(folder, networks())


def load(folder, device="cpu", dtype=torch.bfloat16) -> list:
    """Load the three networks from a local folder in diffusers' format (PARTS)."""
    nets = []
    for name, part in networks().items():
        place = Path(folder, name)
        kind = torch.float32 if name == "vocoder" else dtype  # see `no_tf32`
        net = without_encoder(parts.load_part(place, part, kind)).to(device)
        for key, parameter in net.named_parameters():
            check_numbers(place, key, parameter)
        nets.append(channels_innermost(net.eval().requires_grad_(False)))
    return nets


def without_encoder(net):
    """Remove the encoder, which a stream does not need."""
    if hasattr(net, "encoder"):
        net.encoder = None  # 1.4 GB for video alone
    return net


def meta_decoders(dtype=torch.bfloat16) -> list:
    """Build the three networks at their published size on the meta device, without contents."""
    with torch.device("meta"):
        classes = decoder_classes().values()
        nets = [without_encoder(network_class(**options)) for network_class, options in classes]
    # a network of diffusers would warn if its own `to` changed the dtype
    return [channels_innermost(torch.nn.Module.to(net, dtype).eval()) for net in nets]


def random_weights(device="cpu", dtype=torch.bfloat16) -> list:
    """Build the three networks with random weights, to measure speed and memory."""
    nets = [net.to_empty(device=device).requires_grad_(False) for net in meta_decoders(dtype)]
    for tensor in (t for net in nets for t in net.state_dict().values()):
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.02)
    return nets


def channels_innermost(net):
    """Store the kernels of the video decoder as `decode_video` stores its features."""
    for p in net.parameters():
        if p.dim() == 5:  # (C', C, frames, rows, columns); the other two networks have none
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
    return net
