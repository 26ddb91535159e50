"""Latents to pictures and sound, block by block: the toy's codec, and the published decoders.

The toy's codec takes every latent by itself. LTX-2's decoders were made for whole clips: the video
decoder looks both ways in time, so the pixels of a latent depend on latents that do not exist yet;
the vocoder looks both ways too, the audio decoder only back. `Piecewise` runs any of them on a
growing sequence:

    latents    ... 4 5 6 | 7 8 9 | 10        what is decoded together: context, new, look-ahead
    written              | 7 8 9 |           what of the result is kept

More context and look-ahead bring the result closer to decoding everything at once; look-ahead also
makes the viewer wait. All three decoders keep one rule of lengths: the first of T inputs gives
`first` outputs, every other one `stride`:

    video decoder   8 (T - 1) + 1 frames      audio decoder   4 (T - 1) + 1 mel frames
    vocoder         240 T samples

The networks are those of Hugging Face diffusers. They do not undo the normalisation of latents
(trap: the reference's do), so it is undone here.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch

from toy import codec as toy_codec
from toy import world as toy_world

PARTS = ("vae", "audio_vae", "vocoder")  # folders
STEREO, MEL_LATENT_BINS, MEL_BINS = 2, 16, 64


class Piecewise:
    """Decode a growing sequence, time on axis 2, by pieces that overlap.

    decode       (B, C, T, ...) -> (B, C', first + stride (T - 1), ...)
    context      earlier inputs decoded again with each piece; at least 1 unless first == stride,
                 since the first input of a piece gives `first` outputs only
    look_ahead   later inputs that a piece waits for
    """

    def __init__(self, decode, stride, first, context, look_ahead=0):
        if context < 1 and first != stride:
            raise ValueError(f"context={context}: the first of several inputs is decoded short")
        self.decode, self.stride, self.first = decode, stride, first
        self.context, self.look_ahead = context, look_ahead
        self.kept = None  # the last inputs, (B, C, <= context + look_ahead, ...)
        self.given = self.done = 0  # inputs so far: received, and decoded for good

    def add(self, x):
        """New inputs (B, C, T, ...) -> outputs that are final now, or None."""
        self.given += x.shape[2]
        self.kept = x if self.kept is None else torch.cat([self.kept, x], dim=2)
        return self._decode_until(max(self.done, self.given - self.look_ahead))

    def finish(self):
        """Nothing more will come -> the outputs that were held back, or None."""
        return None if self.kept is None else self._decode_until(self.given)

    def _decode_until(self, ready):
        x, start = self.kept, self.given - self.kept.shape[2]  # start: index of x's first input
        low, high = self._end(self.done - start), self._end(ready - start)
        out = self.decode(x)[:, :, low:high] if high > low else None
        self.done = ready
        self.kept = x[:, :, max(0, self.done - self.context - start) :]
        return out

    def _end(self, inputs):
        """Outputs of the first so many inputs of a piece."""
        return 0 if inputs <= 0 else self.first + self.stride * (inputs - 1)


class Overlap(NamedTuple):
    """Context and look-ahead of each decoder, in its own inputs."""

    video: tuple[int, int] = (4, 0)  # latent frames
    audio: tuple[int, int] = (8, 0)  # latent frames
    vocoder: tuple[int, int] = (16, 4)  # mel frames


class Piece(NamedTuple):
    """What a stream's decoder gives back for a block; empty while it waits for what comes next."""

    frames: torch.Tensor  # (P, 3, H, W) in [0, 1]
    levels: torch.Tensor  # (M, bands) loudness of the sound, to be drawn
    samples: torch.Tensor  # (channels, n) in [-1, 1]


class ToyDecoder:
    """Blocks of the toy -> frames and samples of one stream; nothing is ever held back."""

    channels, scale, sample_rate = 1, 10, toy_codec.SAMPLE_RATE  # 32 pixels become 320

    def __init__(self, codec, watch=lambda _, f: f):
        self.codec, self.cfg = codec, codec.cfg
        self.pictures = watch("video decoder", codec.decode_video)
        self.sound = watch("audio decoder", codec.decode_audio)
        self.synthesise = watch("vocoder", toy_codec.synthesise)
        self.levels = torch.zeros(0, toy_world.BANDS)  # the last mel frame, once there is one
        self.mel_frames = 0

    @torch.inference_mode()
    def decode(self, block) -> Piece:
        first = block.index == 0
        frames = self.pictures(block.video.float().cpu(), first)[0]
        levels = self.sound(block.audio.float().cpu(), first)[0]
        # sound lies between mel frames: each block begins at the last frame of the one before
        heard = torch.cat([self.levels, levels])
        samples = self.synthesise(heard, self.mel_frames - len(self.levels), self.cfg)
        self.levels, self.mel_frames = levels[-1:], self.mel_frames + len(levels)
        return Piece(frames, levels, samples[None])

    def finish(self) -> Piece:
        rows = self.cfg.height, self.cfg.width
        return Piece(torch.zeros(0, 3, *rows), self.levels[:0], torch.zeros(self.channels, 0))


class Decoder:
    """Blocks of LTX-2's latents -> frames and samples of one stream."""

    channels, scale = STEREO, 1  # of the sound; of the film's pixels

    def __init__(self, vae, audio_vae, vocoder, cfg, overlap=Overlap(), watch=lambda _, f: f):
        """The three networks of diffusers; the vocoder runs in float32 whatever its weights'.

        watch   `Stopwatch.watch`, to know where time goes
        """
        self.vae, self.audio_vae, self.vocoder, self.cfg = vae, audio_vae, vocoder.float(), cfg
        self.size = cfg.height, cfg.width
        self.sample_rate = vocoder.config.output_sampling_rate
        samples, decode = self.sample_rate // cfg.mel_rate, watch("video decoder", self._frames)
        self.video = Piecewise(decode, cfg.video_stride, 1, *overlap.video)
        decode = watch("audio decoder", self._mel)
        self.mel = Piecewise(decode, cfg.audio_stride, 1, *overlap.audio)
        decode = watch("vocoder", self._sound)
        self.sound = Piecewise(decode, samples, samples, *overlap.vocoder)

    @torch.inference_mode()
    def decode(self, block) -> Piece:
        """What is final once a `self_forcing.Block` is known."""
        rows, columns = self.cfg.grid
        like = next(self.vae.parameters())
        video = block.video.to(like).unflatten(1, (-1, rows, columns)).permute(0, 4, 1, 2, 3)
        audio = block.audio.to(like).unflatten(2, (-1, MEL_LATENT_BINS)).transpose(1, 2)
        frames, mel = self.video.add(video), self.mel.add(audio)
        return self._piece(frames, mel, self.sound.add(mel) if mel is not None else None)

    @torch.inference_mode()
    def finish(self) -> Piece:
        """What was held back for the look-ahead."""
        frames, mel = self.video.finish(), self.mel.finish()
        parts = [self.sound.add(mel)] if mel is not None else []
        parts = [p for p in (*parts, self.sound.finish()) if p is not None]
        return self._piece(frames, mel, torch.cat(parts, 2) if parts else None)

    def _piece(self, frames, mel, samples):
        nothing = next(self.vae.parameters()).new_zeros  # on the same device
        frames = nothing(1, 3, 0, *self.size) if frames is None else frames / 2 + 0.5
        levels = nothing(1, STEREO, 0, MEL_BINS) if mel is None else mel
        samples = nothing(1, STEREO, 0) if samples is None else samples
        return Piece(frames[0].transpose(0, 1).clamp(0, 1), levels[0].mean(0), samples[0])

    def _frames(self, latents):
        """(B, C, F, h, w) normalised latents -> (B, 3, P, H, W) in [-1, 1]."""
        return self.vae.decode(denormalised(latents, self.vae, (-1, 1, 1, 1)), return_dict=False)[0]

    def _mel(self, latents):
        """(B, 8, F, 16) normalised latents -> (B, 2, M, 64) log-mel frames."""
        shape = (latents.shape[1], 1, latents.shape[3])  # statistics are by channel and bin
        return self.audio_vae.decode(denormalised(latents, self.audio_vae, shape), False)[0]

    def _sound(self, mel):
        """(B, 2, M, 64) -> (B, 2, samples)."""
        with whole_float32():
            return self.vocoder(mel.float())


@contextmanager
def whole_float32():
    """A context in which convolutions of float32 numbers read all of their bits.

    # Trap: on a GPU they do not by default, but round what they read to 10 bits (TF32).
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def denormalised(latents, vae, shape):
    """Latents as the decoder wants them, by the statistics that its weights carry."""
    mean, std = (x.view(shape).to(latents) for x in (vae.latents_mean, vae.latents_std))
    return latents * std + mean


def kinds() -> dict:
    """Folder name -> the class of diffusers and what LTX-2 sets apart from its defaults.

    Raises ValueError if diffusers is not installed.
    """
    try:
        from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
        from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
    except (ImportError, RuntimeError):
        raise ValueError(
            "decoding at full size needs diffusers: pip install -r requirements-full.txt"
        ) from None
    return {
        "vae": (AutoencoderKLLTX2Video, dict(decoder_causal=False)),
        "audio_vae": (AutoencoderKLLTX2Audio, {}),
        "vocoder": (LTX2Vocoder, {}),
    }


def load(folder, device="cpu", dtype=torch.bfloat16) -> list:
    """The three networks of a local folder in diffusers' format (vae/, audio_vae/, vocoder/).

    dtype   of the first two; the vocoder's weights are read as float32

    Raises ValueError if diffusers is not installed or the folder lacks one of them.
    """

    def part(name, kind):
        own = torch.float32 if name == "vocoder" else dtype
        options = dict(subfolder=name, dtype=own, local_files_only=True)
        try:
            found = kind.from_pretrained(folder, **options)
        except OSError:
            raise ValueError(f"{folder}: no decoders in diffusers' format ({name}/)") from None
        return without_encoder(found).to(device).eval().requires_grad_(False)

    return [part(name, kind) for name, (kind, _) in kinds().items()]


def without_encoder(net):
    """A stream only decodes; the video encoder alone is 1.4 GB."""
    if hasattr(net, "encoder"):
        net.encoder = None
    return net


def channels_last(nets, layout=torch.channels_last_3d):
    """Lay the video decoder's weights out with channels innermost; what it is given follows.

    layout   torch.contiguous_format takes it back

    cuDNN's convolutions on tensor cores work in this layout, and otherwise convert into it and
    back. The numbers stay, but for rounding. The other two networks are small.
    """
    for p in nets[0].parameters():
        if p.dim() == 5:  # a kernel (C', C, frames, rows, columns)
            p.data = p.data.contiguous(memory_format=layout)


def empty(dtype=torch.bfloat16) -> list:
    """The three networks at their published size on the meta device: shapes without contents."""
    with torch.device("meta"):
        nets = [without_encoder(kind(**options)) for kind, options in kinds().values()]
    return [torch.nn.Module.to(net, dtype).eval() for net in nets]  # diffusers' own `to` warns


def random_weights(device="cpu", dtype=torch.bfloat16) -> list:
    """The three networks full of noise: for measuring speed and memory."""
    nets = [net.to_empty(device=device).requires_grad_(False) for net in empty(dtype)]
    for tensor in (t for net in nets for t in net.state_dict().values()):
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.02)
    return nets


if __name__ == "__main__":
    blur = torch.nn.Conv1d(1, 1, 5, padding=2)
    x = torch.randn(1, 1, 30)
    whole = blur(x)
    for look_ahead in (0, 1, 2):
        piecewise = Piecewise(blur, 1, 1, context=2, look_ahead=look_ahead)
        parts = [*map(piecewise.add, x.split(3, dim=2)), piecewise.finish()]
        error = (torch.cat([p for p in parts if p is not None], 2) - whole).abs().max()
        print(f"a filter that looks 2 ahead, given {look_ahead}: off by {error.detach():.2f}")
