"""Write frames and sound into an mp4 while they are being made.

The growing file is fragmented: its index is written in parts, so that an incomplete file can be
played. It is called NAME.TOKEN.partial.mp4, with a token of its own for every run. `close` copies
the encoded packets into a file whose head has the duration and the whole index, so that players can
seek. Only a kill leaves the partial file, which lacks at most its last quarter second.
"""

import os
import secrets
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from plumbing import files

try:
    import av
    from av.video.reformatter import ColorRange, Colorspace
except ImportError:  # benchmarks need no av: they do not write the film
    av = None

# Trap: without delay_moov, the header is written before the delay of the audio encoder (43 ms of
# AAC) is known. Sound and all frames but the first then play 43 ms late.
GROWING = {
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
        scale      integer factor by which frames are enlarged, smoothly
        """
        self.path, self.fps = Path(path), fps
        check_film(self.path)
        self.token = secrets.token_hex(3)
        self.old_film = stamp(self.path)  # tells in `close` if another run has replaced the film
        self.partial = self.path.with_suffix(f".{self.token}.partial.mp4")
        self.file = av.open(str(self.partial), "w", format="mp4", options=GROWING)
        self.video = self.file.add_stream("libx264", rate=fps)
        # zerolatency: the encoder keeps no frame back to compare it with later frames
        # ultrafast: half the time of "veryfast" with crf 16, in the toy for equal size and quality
        self.video.options = {"preset": "ultrafast", "crf": "14", "tune": "zerolatency"}
        self.video.pix_fmt = "yuv420p"
        self.video.height, self.video.width = (n * scale for n in size)
        self.video.codec_context.colorspace = Colorspace.ITU601  # see film/writer.py
        self.video.codec_context.color_range = ColorRange.MPEG
        self.layout = {1: "mono", 2: "stereo"}[channels]
        self.audio = self.file.add_stream("aac", rate=sample_rate, layout=self.layout)
        self.frames = self.samples = 0

    def add(self, brightness, colour, samples):
        """Append frames, see `film.writer.to_planes`, and samples (channels, n) of float32."""
        if samples.size:
            sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", self.layout)
            sound.sample_rate, sound.pts = self.audio.rate, self.samples
            sound.time_base = Fraction(1, self.audio.rate)
            self.samples += samples.shape[1]
            self.file.mux(self.audio.encode(sound))
        height, width = self.video.height, self.video.width
        brightness = enlarged(brightness, (height, width)).flatten(1)
        colour = enlarged(colour, (height // 2, width // 2)).flatten(1)
        for frame in torch.cat([brightness, colour], 1).view(-1, height * 3 // 2, width).numpy():
            picture = av.VideoFrame.from_ndarray(frame, "yuv420p")
            picture.pts, picture.time_base = self.frames, Fraction(1, self.fps)
            self.frames += 1
            self.file.mux(self.video.encode(picture))

    def close(self):
        """Finish the file and give it its final name.  Without frames, leave no file.

        If that fails, for example on a full disk, keep what the partial file holds, set `frames` to
        its number of frames, and raise the error.
        """
        if stamp(self.path) != self.old_film:  # do not replace the film of another run
            self.path = self.path.with_suffix(f".{self.token}.mp4")
        try:
            if not self.frames:
                return self.file.close()
            self.file.mux(self.video.encode(None))  # None: flush the encoder
            self.file.mux(self.audio.encode(None))
            self.file.close()
            files.write_beside(self.path, lambda path: copy_with_index(self.partial, path))
        except Exception:
            self.frames = 0  # until it is clear what is left
            self.frames = keep_whole_fragments(self.partial)
            if self.frames:
                os.replace(self.partial, self.path)
            raise
        finally:
            self.partial.unlink(missing_ok=True)


def enlarged(planes, size):
    """Enlarge planes (P, C, h, w) of uint8 smoothly to a size (H, W)."""
    if planes.shape[2:] == size or not len(planes):
        return planes
    # antialias changes nothing in a larger picture, but chooses the softer of two bicubic curves;
    # bytes are much faster than floats
    return F.interpolate(planes, size, mode="bicubic", antialias=True)


def copy_with_index(film, path):
    """Copy the encoded packets of a film into an mp4 whose head has the duration and the index."""
    options = {"movflags": "faststart"}
    with av.open(str(film)) as old, av.open(str(path), "w", "mp4", options) as new:
        copies = {stream: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in old.demux():
            if packet.dts is not None:  # None: the empty packet that ends a stream
                packet.stream = copies[packet.stream]
                new.mux(packet)


def keep_whole_fragments(film) -> int:
    """Cut a broken fragment off the end of a film; return the number of frames left."""
    with open(film, "r+b") as f:
        size, end = os.fstat(f.fileno()).st_size, 0
        # An mp4 is a row of boxes: 4 bytes of length, 4 of kind. A fragment ends in an mdat.
        while len(head := f.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if length < 8 or f.seek(length - 8, os.SEEK_CUR) > size:
                break
            end = f.tell() if kind == b"mdat" else end
        f.truncate(end)
    if not end:
        return 0
    with av.open(str(film)) as whole:
        return sum(packet.dts is not None for packet in whole.demux(video=0))


def stamp(path):
    """Return numbers that change when a file is written again; None if there is no file."""
    return (os.stat(path).st_ino, os.stat(path).st_mtime_ns) if Path(path).exists() else None


def partial_films(path) -> list[Path]:
    """List the partial files of other runs that write, or wrote, the same film."""
    path = Path(path).resolve()
    names = (p for p in path.parent.iterdir() if p.name.endswith(".partial.mp4"))
    return sorted(p for p in names if p.name.startswith(f"{path.stem}."))


def check_film(path):
    """Raise ValueError if no mp4 can be written to this path, or av is not installed."""
    if av is None:
        raise ValueError("a film needs the package av: pip install -r requirements.txt")
    files.check_writable(path, suffix=".mp4")
