"""Latents to frames and sound, block by block: chunked decoding, and the toy's decoder.

The toy's pictures depend on the latent and the one before. The decoders of LTX-2
(full_size/decoders.py) were made for whole clips: pictures and samples depend on later latents,
too, which do not exist yet. `ChunkedDecoder` runs each of them on a growing sequence:

    latents    ... 4 5 6 | 7 8 9 | 10        one chunk: context, new inputs, look-ahead
    written              | 7 8 9 |           the part of the result that is kept

With more context and look-ahead, the result is closer to decoding the whole clip at once.
Look-ahead also delays the output. One rule gives the number of outputs of every decoder: the first
of T inputs gives `first` outputs, every other input gives `stride`:

    video decoder   8 (T - 1) + 1 frames      audio decoder   4 (T - 1) + 1 mel frames
    vocoder         240 T samples

    python -m film.decoders    decodes noise by a filter with look-ahead 0, 1 and 2
"""

from typing import NamedTuple

import torch

from toy import codec as toy_codec
from toy import world as toy_world


class ChunkedDecoder:
    """Decode a growing sequence, time on axis 2, in chunks that overlap.

    decode       (B, C, T, ...) -> (B, C', first + stride (T - 1), ...)
    context      earlier inputs decoded again with each chunk; at least 1 unless first == stride
    look_ahead   later inputs that a chunk waits for
    """

    def __init__(self, decode, stride, first, context, look_ahead=0):
        if context < 1 and first != stride:
            raise ValueError(
                f"context={context}: expected 1 or more, because the first input of a chunk gives "
                f"{first} outputs instead of {stride}"
            )
        self.decode, self.stride, self.first = decode, stride, first
        self.context, self.look_ahead = context, look_ahead
        self.kept = None  # the last inputs, (B, C, <= context + look_ahead, ...)
        self.given = self.done = 0  # inputs received, and inputs whose outputs were returned

    def add(self, x):
        """Take new inputs (B, C, T, ...); return the outputs that are now final, or None."""
        self.given += x.shape[2]
        self.kept = x if self.kept is None else torch.cat([self.kept, x], dim=2)
        return self._decode_until(max(self.done, self.given - self.look_ahead))

    def finish(self):
        """Return the outputs that waited for later inputs, or None."""
        return None if self.kept is None else self._decode_until(self.given)

    def _decode_until(self, ready):
        """Return the outputs of inputs `done` to `ready`, and drop inputs that are not needed."""
        x, start = self.kept, self.given - self.kept.shape[2]  # start: index of x's first input
        low, high = self._num_outputs(self.done - start), self._num_outputs(ready - start)
        out = self.decode(x)[:, :, low:high] if high > low else None
        self.done = ready
        self.kept = x[:, :, max(0, self.done - self.context - start) :]
        return out

    def _num_outputs(self, inputs):
        """Return the number of outputs of the first `inputs` inputs of a chunk."""
        return 0 if inputs <= 0 else self.first + self.stride * (inputs - 1)


class Chunk(NamedTuple):
    """A decoded piece of a stream; empty while the decoder waits for later latents."""

    frames: torch.Tensor  # (P, 3, H, W) in [0, 1]
    levels: torch.Tensor  # (M, bands) loudness of the sound, for pictures
    samples: torch.Tensor  # (channels, n) in [-1, 1]


class ToyDecoder:
    """Decode the blocks of one toy stream, without look-ahead."""

    channels, scale, sample_rate = 1, 10, toy_codec.SAMPLE_RATE  # 32 pixels become 320

    def __init__(self, codec, watch=lambda _, f: f):
        """codec: `ToyCodec` or `LearnedCodec`; watch: `Stopwatch.watch`, to time three parts."""
        self.codec, self.cfg = codec, codec.cfg
        # One latent more than the codec looks back to, because the first of a chunk is decoded as
        # if it were the first of the clip: the frames that depend on it are dropped, too.
        stride, context = self.cfg.video_stride, 1 + codec.look_back
        self.chunks = ChunkedDecoder(self._decode_chunk, stride, 1, context)
        self.decode_video = watch("video decoder", self._decode_next)
        self.decode_audio = watch("audio decoder", codec.decode_audio)
        self.synthesise = watch("vocoder", toy_codec.synthesise)
        self.levels = torch.zeros(0, toy_world.BANDS)  # the last mel frame, once there is one
        self.mel_frames = 0

    @torch.inference_mode()
    def decode(self, block) -> Chunk:
        """Return the frames and the sound of a `rollout.Block`."""
        first = block.index == 0
        frames = self.decode_video(block.video.float().cpu(), first)[0]
        levels = self.decode_audio(block.audio.float().cpu(), first)[0]
        # samples lie between two mel frames: put the last frame of the previous block in front
        heard = torch.cat([self.levels, levels])
        samples = self.synthesise(heard, self.mel_frames - len(self.levels), self.cfg)
        self.levels, self.mel_frames = levels[-1:], self.mel_frames + len(levels)
        return Chunk(frames, levels, samples[None])

    def _decode_next(self, tokens, starts_clip):
        """Decode the next block's video tokens (B, T, 48) to frames (B, P, 3, H, W)."""
        latents = tokens.unflatten(1, (-1, self.cfg.tokens_per_frame)).transpose(1, 2)
        return self.chunks.add(latents).transpose(1, 2)  # the first chunk starts the clip

    def _decode_chunk(self, latents):
        tokens = latents.transpose(1, 2).flatten(1, 2)
        return self.codec.decode_video(tokens, True).transpose(1, 2)

    def finish(self) -> Chunk:
        """Return an empty chunk: `decode` has returned everything."""
        size = self.cfg.height, self.cfg.width
        return Chunk(torch.zeros(0, 3, *size), self.levels[:0], torch.zeros(self.channels, 0))


if __name__ == "__main__":
    torch.manual_seed(0)
    blur = torch.nn.Conv1d(1, 1, 5, padding=2)
    x = torch.randn(1, 1, 30)
    at_once = blur(x)
    for look_ahead in (0, 1, 2):
        chunked = ChunkedDecoder(blur, 1, 1, context=2, look_ahead=look_ahead)
        parts = [*map(chunked.add, x.split(3, dim=2)), chunked.finish()]
        error = (torch.cat([p for p in parts if p is not None], 2) - at_once).abs().max()
        print(f"a filter that looks 2 ahead, given {look_ahead}: off by {error.detach():.2f}")
