"""Write frames and sound into an mp4 while they are being made.

The file is fragmented: its index is written in parts, so an incomplete file can be played. It grows
as NAME.partial.mp4 and gets its final name at the end, or when the stream is interrupted. After a
kill it keeps the partial name and lacks at most its last quarter second.
"""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from plumbing import files

try:
    import av
except ImportError:  # benchmarks need no av: they do not write the film
    av = None

# Trap: without delay_moov, the header is written before the delay of the audio encoder (43 ms of
# AAC) is known. Sound and all frames but the first then play 43 ms late.
OPTIONS = {
    "movflags": "frag_keyframe+delay_moov+default_base_moof",
    "frag_duration": "250000",  # microseconds per fragment
    "flush_packets": "1",
}


class Movie:
    """An mp4 (H.264, AAC) to which frames and samples can be appended."""

    def __init__(self, path, size, fps, sample_rate, channels=1, scale=1):
        """Open the file.

        size       (height, width) of the frames in pixels
        channels   1 or 2
        scale      integer factor by which frames are enlarged
        """
        self.path, self.scale = Path(path), scale
        check_film(self.path)
        self.partial = self.path.with_suffix(".partial.mp4")
        self.file = av.open(str(self.partial), "w", format="mp4", options=OPTIONS)
        self.video = self.file.add_stream("libx264", rate=fps)
        # zerolatency: the encoder keeps no frame back to compare it with later frames
        self.video.options = {"preset": "veryfast", "crf": "16", "tune": "zerolatency"}
        self.video.pix_fmt = "yuv420p"
        self.video.height, self.video.width = (n * scale for n in size)
        self.layout = {1: "mono", 2: "stereo"}[channels]
        self.audio = self.file.add_stream("aac", rate=sample_rate, layout=self.layout)
        self.frames = self.samples = 0

    def add(self, frames, samples):
        """Append frames (P, H, W, 3) of uint8 and samples (channels, n) of float32."""
        if samples.size:
            sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", self.layout)
            sound.sample_rate, sound.pts = self.audio.rate, self.samples
            sound.time_base = Fraction(1, self.audio.rate)
            self.samples += samples.shape[1]
            self.file.mux(self.audio.encode(sound))
        for frame in frames:
            large = np.kron(frame, np.ones((self.scale, self.scale, 1), np.uint8))  # repeat pixels
            picture = av.VideoFrame.from_ndarray(large, "rgb24")
            picture.pts, picture.time_base = self.frames, Fraction(1, self.video.codec_context.rate)
            self.frames += 1
            self.file.mux(self.video.encode(picture))

    def close(self):
        """Finish the file and give it its final name.  Without frames, leave no file."""
        if self.frames:
            self.file.mux(self.video.encode(None))  # None: flush the encoder
            self.file.mux(self.audio.encode(None))
            self.file.close()
            os.replace(self.partial, self.path)
        self.discard()

    def discard(self):
        """Remove the partial file."""
        self.file.close()
        self.partial.unlink(missing_ok=True)


def check_film(path):
    """Raise ValueError if no mp4 can be written to this path, or av is not installed."""
    if av is None:
        raise ValueError("a film needs the package av: pip install -r requirements.txt")
    files.check_writable(path)
    if Path(path).suffix != ".mp4":
        raise ValueError(f"{path}: expected a name that ends in .mp4")
