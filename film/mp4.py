"""Frames and sound into an mp4 while they are being made.

The file is fragmented: its index is written piece by piece, so whatever has been written plays.
It grows beside its target as NAME.partial.mp4 and takes the target's name at the end, or when the
stream is interrupted. Only a kill leaves it under that name, playable but for its last quarter
second.
"""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from plumbing import files

try:
    import av
except ImportError:  # a stream can be measured without being written
    av = None

# Trap: without delay_moov the head is written before the encoder's delay (43 ms of AAC) is known,
# and then sound and all frames but the first come that much late.
OPTIONS = {
    "movflags": "frag_keyframe+delay_moov+default_base_moof",
    "frag_duration": "250000",  # microseconds a fragment
    "flush_packets": "1",
}


class Movie:
    """An mp4 (H.264, AAC) that can be added to, second after second."""

    def __init__(self, path, size, fps, sample_rate, channels=1, scale=1):
        """size (height, width) in pixels, each of which scale makes larger; 1 or 2 channels."""
        self.path, self.scale = Path(path), scale
        check_film(self.path)
        self.partial = self.path.with_suffix(".partial.mp4")
        self.file = av.open(str(self.partial), "w", format="mp4", options=OPTIONS)
        self.video = self.file.add_stream("libx264", rate=fps)
        # zerolatency: no frame waits in the encoder for later ones
        self.video.options = {"preset": "veryfast", "crf": "16", "tune": "zerolatency"}
        self.video.pix_fmt = "yuv420p"
        self.video.height, self.video.width = (n * scale for n in size)
        self.layout = {1: "mono", 2: "stereo"}[channels]
        self.audio = self.file.add_stream("aac", rate=sample_rate, layout=self.layout)
        self.frames = self.samples = 0

    def add(self, frames, samples):
        """(P, H, W, 3) uint8 frames and (channels, n) float32 samples, appended."""
        if samples.size:
            sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", self.layout)
            sound.sample_rate, sound.pts = self.audio.rate, self.samples
            sound.time_base = Fraction(1, self.audio.rate)
            self.samples += samples.shape[1]
            self.file.mux(self.audio.encode(sound))
        for frame in frames:
            large = np.kron(frame, np.ones((self.scale, self.scale, 1), np.uint8))
            picture = av.VideoFrame.from_ndarray(large, "rgb24")
            picture.pts, picture.time_base = self.frames, Fraction(1, self.video.codec_context.rate)
            self.frames += 1
            self.file.mux(self.video.encode(picture))

    def close(self):
        """Finish the file and give it its name; nothing at all if nothing was added."""
        if self.frames:
            self.file.mux(self.video.encode(None))
            self.file.mux(self.audio.encode(None))
            self.file.close()
            os.replace(self.partial, self.path)
        self.discard()

    def discard(self):
        """Leave nothing behind that has no name yet."""
        self.file.close()
        self.partial.unlink(missing_ok=True)


def check_film(path):
    """Raises ValueError if no film can be written there, or none at all."""
    if av is None:
        raise ValueError("a film needs the package av: pip install -r requirements.txt")
    files.check_writable(path)
    if Path(path).suffix != ".mp4":
        raise ValueError(f"{path}: expected a name that ends in .mp4")
