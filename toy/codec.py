"""Pixels and sound to latents and back: a linear codec, and a vocoder that makes it audible.

It stands in for LTX-2's two VAEs and keeps what matters of them: the rates (3 video and 25 audio
latents a second) and the first-frame rule. The first latent of either stream covers one frame, so
that a stream can begin at once; every later one covers 8 frames or 4 mel frames.

    video   8 x 8 pixel patches: (1 or 8 frames) x 3 x 8 x 8 numbers -> 48 channels
    audio   (1 or 4 mel frames) x 16 bands -> 20 channels

Each of these four kinds of patch has its own principal components, x ~ mean + basis (scale z). They
are half whitened: a component is divided by the root of its standard deviation, not by all of it.
So components keep an order of size, and noise in z hides the small ones before the large ones. Then
all are scaled by one factor to E[z^2] = 1, as flow matching expects.

# Simpler: LTX-2's VAEs are convolutional and see neighbouring latents; here a latent decodes alone,
# so a block can be decoded as soon as it exists, without look-ahead.

# Trap: a component has no sign of its own. A fit with another number of threads, or on another
# machine, may turn some around (the shipped one was made with two), and then models trained on the
# old latents do not understand the new ones: train them anew as well.

    python -m toy.codec             how well the shipped one keeps pictures and sound
    python -m toy.codec --fit       fits it anew, over weights/toy_codec.safetensors or to --out
"""

from pathlib import Path

import torch
from torch import nn

import config
from plumbing import cli, files
from toy import world as toy_world

FILE = Path(__file__).parent.parent / "weights" / "toy_codec.safetensors"
FIT_CLIPS, FIT_SECONDS = 384, 5  # what it is fitted on: the clips of seeds 0 to 383

SAMPLE_RATE = 24000  # samples per second, as LTX-2's vocoder
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
        """(..., numbers) -> (..., channels)."""
        return (x - self.mean) @ self.basis / self.scale

    def decode(self, z):
        """(..., channels) -> (..., numbers)."""
        return self.mean + (z * self.scale) @ self.basis.T

    def fit(self, x):
        """Principal components of (..., numbers); channels beyond `numbers` stay 0."""
        x = x.flatten(0, -2)
        self.mean.copy_(x.mean(0))
        x = x - self.mean
        variance, basis = torch.linalg.eigh((x.T @ x / len(x)).double())
        n = min(self.basis.shape)
        variance, basis = variance.flip(0)[:n].clamp(min=1e-12), basis.flip(1)[:, :n]
        half_white = variance**0.25
        unit = (variance / half_white**2).mean().sqrt()
        self.basis[:, :n], self.scale[:n] = basis.float(), (half_white * unit).float()


def video_patches(video, patch, frames):
    """(B, P, 3, H, W) -> (B, P/frames, rows * columns, frames * 3 * patch * patch).

    >>> video_patches(torch.zeros(2, 24, 3, 32, 32), 8, 8).shape
    torch.Size([2, 3, 16, 1536])
    """
    B, P, C, H, W = video.shape
    x = video.reshape(B, P // frames, frames, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4).flatten(2, 3)


def video_from_patches(x, patch, frames, grid):
    """Inverse of `video_patches`."""
    x = x.unflatten(-1, (frames, 3, patch, patch)).unflatten(2, grid)  # B F h w f C p p
    x = x.permute(0, 1, 4, 5, 2, 6, 3, 7)  # B F f C h p w p
    return x.flatten(6).flatten(4, 5).flatten(1, 2)


class ToyCodec(nn.Module):
    """Both codecs. Latents are tokens as the transformer wants them."""

    def __init__(self, cfg=config.TOY):
        super().__init__()
        self.cfg = cfg
        pixels = 3 * cfg.pixel_stride**2
        self.video_first = Components(pixels, cfg.video_channels)
        self.video_later = Components(cfg.video_stride * pixels, cfg.video_channels)
        self.audio_first = Components(toy_world.BANDS, cfg.audio_channels)
        self.audio_later = Components(cfg.audio_stride * toy_world.BANDS, cfg.audio_channels)

    def _video_kinds(self, video):
        patch, stride = self.cfg.pixel_stride, self.cfg.video_stride
        return video_patches(video[:, :1], patch, 1), video_patches(video[:, 1:], patch, stride)

    def _audio_kinds(self, sound):
        return sound[:, :1], sound[:, 1:].unflatten(1, (-1, self.cfg.audio_stride)).flatten(2)

    def encode(self, video, sound):
        """(B, 8k + 1, 3, H, W), (B, 4m + 1, 16) -> (B, (k+1) rows columns, 48), (B, m + 1, 20)."""
        first, later = self._video_kinds(video)
        v = torch.cat([self.video_first.encode(first), self.video_later.encode(later)], 1)
        first, later = self._audio_kinds(sound)
        a = torch.cat([self.audio_first.encode(first), self.audio_later.encode(later)], 1)
        return v.flatten(1, 2), a

    def decode_video(self, tokens, starts_clip):
        """Tokens of consecutive latent frames -> (B, P, 3, H, W) in [0, 1].

        starts_clip   is the clip's first latent, which covers one frame, among them?
        """
        cfg = self.cfg
        z = tokens.unflatten(1, (-1, cfg.tokens_per_frame))
        n = int(starts_clip)
        first = video_from_patches(self.video_first.decode(z[:, :n]), cfg.pixel_stride, 1, cfg.grid)
        later = self.video_later.decode(z[:, n:])
        later = video_from_patches(later, cfg.pixel_stride, cfg.video_stride, cfg.grid)
        return torch.cat([first, later], 1).clamp(0, 1)

    def decode_audio(self, tokens, starts_clip):
        """(B, F_a, 20) tokens of consecutive latents -> (B, M, 16) levels, not negative."""
        n = int(starts_clip)
        first = self.audio_first.decode(tokens[:, :n])
        later = self.audio_later.decode(tokens[:, n:]).unflatten(-1, (-1, toy_world.BANDS))
        return torch.cat([first, later.flatten(1, 2)], 1).clamp(min=0)

    @torch.no_grad()
    def fit(self, video, sound):
        """Fit all four kinds to true clips, shaped as for `encode`."""
        for components, x in zip((self.video_first, self.video_later), self._video_kinds(video)):
            components.fit(x)
        for components, x in zip((self.audio_first, self.audio_later), self._audio_kinds(sound)):
            components.fit(x)


def load(cfg=config.TOY) -> ToyCodec:
    """The codec that the shipped models were trained with, from FILE.

    Raises ValueError, in one line, if the file is not whole.
    """
    codec = ToyCodec(cfg)
    files.load_into(codec, files.read_weights(FILE)[0], FILE)
    return codec


def encode_clips(codec, clips, seconds):
    """Render and encode: (B, T_v, 48) and (B, F_a, 20) latents."""
    video = toy_world.render_video(clips, seconds, codec.cfg)
    return codec.encode(video, toy_world.render_sound(clips, seconds, codec.cfg))


# ---- vocoder ----


def synthesise(levels, first_frame=0, cfg=config.TOY):
    """Band levels to a waveform by additive synthesis: one sine per band.

    levels        (M + 1, 16) the mel frames `first_frame` .. `first_frame + M`
    ->            (240 M,) samples in [-1, 1] between the first and the last of them

    Levels change linearly from frame to frame and phases follow absolute time, so a stream that is
    synthesised block by block, each block from the last frame of the one before, has no seams:

    >>> x = torch.rand(31, 16)
    >>> parts = torch.cat([synthesise(x[:11]), synthesise(x[10:], first_frame=10)])
    >>> torch.equal(parts, synthesise(x))
    True
    """
    hop = SAMPLE_RATE // cfg.mel_rate
    ramp = torch.arange(hop)[:, None] / hop
    amplitude = levels[:-1, None] + ramp * (levels[1:] - levels[:-1])[:, None]  # (M, hop, 16)
    samples = torch.arange(hop * (len(levels) - 1)) + hop * first_frame
    turns = (samples.double() / SAMPLE_RATE)[:, None] * pitches().double()  # exact for hours
    sines = torch.sin(2 * torch.pi * (turns % 1)).float()
    return torch.tanh(LOUDNESS * (amplitude.flatten(0, 1) * sines).sum(1))


def pitches() -> torch.Tensor:
    """(16,) frequency of each band in Hz, five to the octave."""
    return LOWEST_PITCH * 2 ** (torch.arange(toy_world.BANDS) / BANDS_PER_OCTAVE)


def main():
    p = cli.parser(__doc__)
    p.add_argument("--fit", action="store_true", help="fit a new one")
    p.add_argument("--out", default=str(FILE), help="with --fit: weights to write")
    args = p.parse_args()
    if args.fit:
        files.check_writable(args.out, makes_folders=True)
    clips = toy_world.draw_clips(range(FIT_CLIPS))
    video, sound = (f(clips, FIT_SECONDS) for f in (toy_world.render_video, toy_world.render_sound))
    codec = ToyCodec() if args.fit else load()
    if args.fit:
        codec.fit(video, sound)
        made_by = {"command": "python -m toy.codec --fit"}
        files.save_weights(args.out, codec.state_dict(), config.TOY, made_by)
        print(f"wrote {args.out}")
    v, a = codec.encode(video, sound)
    for name, x, y in (
        ("video", video, codec.decode_video(v, True)),
        ("audio", sound, codec.decode_audio(a, True)),
    ):
        print(f"{name}: PSNR {-10 * (x - y).square().mean().log10():.1f} dB")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
