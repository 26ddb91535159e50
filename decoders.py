"""Latents to pictures and sound at full size, block by block, with the published decoders.

LTX-2's decoders were made for whole clips. The video decoder looks both ways in time, so the pixels
of a latent depend on latents that do not exist yet; the vocoder looks both ways too, the audio
decoder only back. `Piecewise` runs any of them on a growing sequence:

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

from typing import NamedTuple

import torch

STEREO, MEL_LATENT_BINS = 2, 16


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

    def add(self, x, last=False):
        """New inputs (B, C, T, ...) -> outputs that are final now; all that is left if `last`."""
        self.given += x.shape[2]
        x = x if self.kept is None else torch.cat([self.kept, x], dim=2)
        start = self.given - x.shape[2]  # index of x's first input
        ready = self.given if last else max(self.done, self.given - self.look_ahead)
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


class Decoder:
    """Blocks of clean latents -> frames and samples of one stream."""

    def __init__(self, vae, audio_vae, vocoder, cfg, overlap=Overlap()):
        """The three networks of diffusers; the vocoder runs in float32 whatever its weights'."""
        self.vae, self.audio_vae, self.vocoder, self.cfg = vae, audio_vae, vocoder.float(), cfg
        self.sample_rate = vocoder.config.output_sampling_rate
        samples = self.sample_rate // cfg.mel_rate
        self.video = Piecewise(self._frames, cfg.video_stride, 1, *overlap.video)
        self.mel = Piecewise(self._mel, cfg.audio_stride, 1, *overlap.audio)
        self.sound = Piecewise(self._sound, samples, samples, *overlap.vocoder)

    @torch.inference_mode()
    def decode(self, block, last=False):
        """A `self_forcing.Block` -> frames (P, 3, H, W) in [0, 1] and samples (2, n) in [-1, 1].

        Either is empty while a decoder waits for what comes next.
        """
        rows, columns = self.cfg.grid
        video = block.video.unflatten(1, (-1, rows, columns)).permute(0, 4, 1, 2, 3)
        audio = block.audio.unflatten(2, (-1, MEL_LATENT_BINS)).transpose(1, 2)
        frames = self.video.add(video, last)
        mel = self.mel.add(audio, last)
        sound = self.sound.add(mel, last) if mel is not None else None
        empty = block.video.new_zeros(0, 3, *(n * self.cfg.pixel_stride for n in self.cfg.grid))
        return (
            empty if frames is None else (frames[0].transpose(0, 1) / 2 + 0.5).clamp(0, 1),
            block.video.new_zeros(STEREO, 0) if sound is None else sound[0],
        )

    def _frames(self, latents):
        """(B, C, F, h, w) normalised latents -> (B, 3, P, H, W) in [-1, 1]."""
        return self.vae.decode(denormalised(latents, self.vae, (-1, 1, 1, 1)), return_dict=False)[0]

    def _mel(self, latents):
        """(B, 8, F, 16) normalised latents -> (B, 2, M, 64) log-mel frames."""
        shape = (latents.shape[1], 1, latents.shape[3])  # statistics are by channel and bin
        return self.audio_vae.decode(denormalised(latents, self.audio_vae, shape), False)[0]

    def _sound(self, mel):
        """(B, 2, M, 64) -> (B, 2, samples)."""
        return self.vocoder(mel.float())


def denormalised(latents, vae, shape):
    """Latents as the decoder wants them, by the statistics that its weights carry."""
    mean, std = (x.view(shape).to(latents) for x in (vae.latents_mean, vae.latents_std))
    return latents * std + mean


def load(folder, cfg, device="cpu", dtype=torch.bfloat16, overlap=Overlap()) -> Decoder:
    """The decoders of a local folder in diffusers' format (vae/, audio_vae/, vocoder/).

    Raises ValueError if diffusers is not installed or the folder lacks one of them.
    """
    try:
        from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
        from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
    except ImportError:
        raise ValueError(
            "decoding at full size needs diffusers: pip install -r requirements-full.txt"
        ) from None

    def part(kind, name):
        options = dict(subfolder=name, torch_dtype=dtype, local_files_only=True)
        try:
            found = kind.from_pretrained(folder, **options)
        except OSError:
            raise ValueError(f"{folder}: no decoders in diffusers' format ({name}/)") from None
        return found.to(device).eval().requires_grad_(False)

    vae, audio_vae = part(AutoencoderKLLTX2Video, "vae"), part(AutoencoderKLLTX2Audio, "audio_vae")
    return Decoder(vae, audio_vae, part(LTX2Vocoder, "vocoder"), cfg, overlap)


if __name__ == "__main__":
    blur = torch.nn.Conv1d(1, 1, 5, padding=2)
    x = torch.randn(1, 1, 30)
    whole = blur(x)
    for look_ahead in (0, 1, 2):
        piecewise = Piecewise(blur, 1, 1, context=2, look_ahead=look_ahead)
        parts = [piecewise.add(piece, last=i == 9) for i, piece in enumerate(x.split(3, dim=2))]
        error = (torch.cat([p for p in parts if p is not None], 2) - whole).abs().max()
        print(f"a filter that looks 2 ahead, given {look_ahead}: off by {error.detach():.2f}")
