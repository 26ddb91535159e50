"""A linear codec between clips and latents, and a vocoder that turns band levels into a waveform.

The codec replaces the two VAEs of LTX-2 and keeps two of their properties: the rates (3 video and
25 audio latents per second) and the first-frame rule. The first latent of each stream covers one
frame, so that a stream can begin at once. Every later latent covers 8 frames or 4 mel frames.

    video   8 x 8 pixel patches: (1 or 8 frames) x 3 x 8 x 8 numbers -> 48 channels
    audio   (1 or 4 mel frames) x 16 bands -> 20 channels

Each of these four kinds of patch has its own principal components, x ~ mean + basis (scale z). They
are half whitened: large components stay larger than small ones. Noise in z therefore hides the
small components first.

    python -m toy.fit codec         fits a new codec; without "codec": quality of the shipped one
"""

from pathlib import Path

import torch
from torch import nn

import config
from plumbing import files
from toy import world

FILE = Path(__file__).parent.parent / "weights" / "toy_codec.safetensors"

SAMPLE_RATE = 24000  # samples per second, as in LTX-2
LOWEST_PITCH = 196.0  # Hz, band 0
BANDS_PER_OCTAVE = 5
LOUDNESS = 0.25  # amplitude of a band at level 1


# ---- principal components ----


class Components(nn.Module):
    """Half-whitened principal components of one kind of patch."""

    def __init__(self, numbers, channels):
        super().__init__()
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("basis", torch.zeros(numbers, channels))  # orthonormal columns
        self.register_buffer("scale", torch.ones(channels))

    def encode(self, x):
        """Map patches (..., numbers) to channels (..., channels)."""
        return (x - self.mean) @ self.basis / self.scale

    def decode(self, z):
        """Map channels (..., channels) back to patches (..., numbers)."""
        return self.mean + (z * self.scale) @ self.basis.T

    def fit(self, x):
        """Fit the components to patches (..., numbers); channels beyond `numbers` stay 0."""
        # Trap: the sign of a component is arbitrary. A fit on another machine, or with another
        # number of threads (the shipped codec: two), may flip some. Models that were trained on the
        # old latents cannot use the new ones and must be trained again.
        x = x.flatten(0, -2)
        self.mean.copy_(x.mean(0))
        x = x - self.mean
        variance, basis = torch.linalg.eigh((x.T @ x / len(x)).double())  # in ascending order
        n = min(self.basis.shape)
        variance, basis = variance.flip(0)[:n].clamp(min=1e-12), basis.flip(1)[:, :n]
        half_white = variance**0.25  # half whitening: divide by the root of the std only
        unit = (variance / half_white**2).mean().sqrt()  # makes E[z^2] = 1, for flow matching
        self.basis[:, :n], self.scale[:n] = basis.float(), (half_white * unit).float()


def video_patches(video, patch, frames):
    """Cut (B, P, 3, H, W) into (B, P/frames, rows * columns, frames * 3 * patch * patch).

    >>> video_patches(torch.zeros(2, 24, 3, 32, 32), 8, 8).shape
    torch.Size([2, 3, 16, 1536])
    """
    B, P, C, H, W = video.shape
    x = video.reshape(B, P // frames, frames, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4).flatten(2, 3)


def video_from_patches(x, patch, frames, grid):
    """Invert `video_patches`; grid: (rows, columns)."""
    x = x.unflatten(-1, (frames, 3, patch, patch)).unflatten(2, grid)  # B F h w f C p p
    x = x.permute(0, 1, 4, 5, 2, 6, 3, 7)  # B F f C h p w p
    return x.flatten(6).flatten(4, 5).flatten(1, 2)


class ToyCodec(nn.Module):
    """The codecs of both streams.  Latents are tokens, in the order that the transformer reads."""

    look_back = 0  # earlier latents that a picture depends on

    def __init__(self, cfg=config.TOY):
        super().__init__()
        self.cfg = cfg
        pixels = 3 * cfg.pixel_stride**2
        self.video_first = Components(pixels, cfg.video_channels)
        self.video_later = Components(cfg.video_stride * pixels, cfg.video_channels)
        self.audio_first = Components(world.BANDS, cfg.audio_channels)
        self.audio_later = Components(cfg.audio_stride * world.BANDS, cfg.audio_channels)

    def cut_video(self, video):
        patch, stride = self.cfg.pixel_stride, self.cfg.video_stride
        return video_patches(video[:, :1], patch, 1), video_patches(video[:, 1:], patch, stride)

    def _audio_patches(self, sound):
        return sound[:, :1], sound[:, 1:].unflatten(1, (-1, self.cfg.audio_stride)).flatten(2)

    def encode(self, video, sound):
        """Encode frames and levels of clips; both begin with one frame at time 0."""
        first, later = self.cut_video(video)  # of (B, 8k + 1, 3, H, W)
        v = torch.cat([self.video_first.encode(first), self.video_later.encode(later)], 1)
        first, later = self._audio_patches(sound)  # of (B, 4m + 1, 16)
        a = torch.cat([self.audio_first.encode(first), self.audio_later.encode(later)], 1)
        return v.flatten(1, 2), a  # (B, (k + 1) rows columns, 48) and (B, m + 1, 20)

    def encode_picture(self, pictures):
        """Encode the first frames (B, 3, H, W) of clips to tokens (B, rows * columns, 48)."""
        patches = video_patches(pictures[:, None], self.cfg.pixel_stride, 1)
        return self.video_first.encode(patches).flatten(1, 2)

    def decode_video(self, tokens, starts_clip):
        """Decode the tokens of consecutive latent frames to (B, P, 3, H, W) in [0, 1].

        starts_clip   True if the first latent is the first of the clip, which covers one frame
        """
        # Simpler: the VAEs of LTX-2 are convolutional and see neighbouring latents. Here a latent
        # is decoded alone, so a block can be decoded as soon as it exists, without look-ahead.
        cfg = self.cfg
        first, later = self.decode_patches(tokens, starts_clip)
        first = video_from_patches(first, cfg.pixel_stride, 1, cfg.grid)
        later = video_from_patches(later, cfg.pixel_stride, cfg.video_stride, cfg.grid)
        return torch.cat([first, later], 1).clamp(0, 1)

    def decode_patches(self, tokens, starts_clip):
        """Decode to patches (B, 0 or 1, 16, 192) of the first frame and (B, F, 16, 1536) of 8."""
        n, z = int(starts_clip), tokens.unflatten(1, (-1, self.cfg.tokens_per_frame))
        return self.video_first.decode(z[:, :n]), self.video_later.decode(z[:, n:])

    def decode_audio(self, tokens, starts_clip):
        """Decode the tokens (B, F_a, 20) of consecutive latents to levels (B, M, 16), all >= 0."""
        n = int(starts_clip)
        first = self.audio_first.decode(tokens[:, :n])
        later = self.audio_later.decode(tokens[:, n:]).unflatten(-1, (-1, world.BANDS))
        return torch.cat([first, later.flatten(1, 2)], 1).clamp(min=0)

    @torch.no_grad()
    def fit(self, video, sound):
        """Fit all four kinds of patches to real clips, shaped as for `encode`."""
        kinds = self.video_first, self.video_later, self.audio_first, self.audio_later
        patches = *self.cut_video(video), *self._audio_patches(sound)
        for components, x in zip(kinds, patches):
            components.fit(x)


def load(cfg=config.TOY) -> ToyCodec:
    """Load the codec that the shipped models were trained with."""
    codec = ToyCodec(cfg)
    files.load_into(codec, files.read_weights(FILE)[0], FILE)
    return codec


def encode_clips(codec, clips, seconds):
    """Render clips and encode them: latents (B, T_v, 48) and (B, F_a, 20)."""
    video = world.render_video(clips, seconds, codec.cfg)
    return codec.encode(video, world.render_sound(clips, seconds, codec.cfg))


# ---- vocoder ----


def synthesise(levels, first_frame=0, cfg=config.TOY):
    """Turn band levels into a waveform by additive synthesis: one sine per band.

    levels        (M + 1, 16) of the mel frames `first_frame` to `first_frame + M`
    ->            (240 M,) samples in [-1, 1] between the first and the last of these frames
    """
    # Levels change linearly between frames, and phases follow absolute time. So there is no seam
    # between two blocks if the later one is synthesised from the last frame of the earlier one on.
    hop = SAMPLE_RATE // cfg.mel_rate
    ramp = torch.arange(hop)[:, None] / hop
    amplitude = levels[:-1, None] + ramp * (levels[1:] - levels[:-1])[:, None]  # (M, hop, 16)
    samples = torch.arange(hop * (len(levels) - 1)) + hop * first_frame
    # In float64, phases are exact for hours.
    periods = (samples.double() / SAMPLE_RATE)[:, None] * pitches().double()
    sines = torch.sin(2 * torch.pi * periods.frac().float())
    return torch.tanh(LOUDNESS * (amplitude.flatten(0, 1) * sines).sum(1))


def pitches() -> torch.Tensor:
    """Return the frequency of each band in Hz, (16,), five bands per octave."""
    return LOWEST_PITCH * 2 ** (torch.arange(world.BANDS) / BANDS_PER_OCTAVE)
