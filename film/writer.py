"""Write the blocks of a stream in a thread of its own, so that the model does not wait for x264.

    main thread      passes 0 | decode 0 | passes 1 | decode 1 | passes 2 | decode 2 | ...
    writer thread                        | write 0             | write 1             | ...

A GPU turns frames into bytes itself, and the main thread only queues their copy to the CPU: the
writer waits for it. Flags are copied, too: is a tensor free of NaN and infinity? An error of the
writer is raised by the next `add` or `close`.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F

AHEAD = 3  # blocks that may wait for the writer
SHEET_SECONDS, SHEET_PIXELS = 60, 64  # contact sheet: first 60 s, frames reduced to about 64 pixels


class Packet(NamedTuple):
    """A decoded block in the memory of the CPU, or on its way there."""

    name: str  # "block 5", or "the end"
    frames: torch.Tensor  # (P, H, W, 3) uint8
    samples: torch.Tensor  # (channels, n) float32
    picture: tuple  # small frames (P, 3, h, w) and levels (M, bands), for the contact sheet
    is_finite: dict  # name of a tensor -> bool tensor
    copied: torch.cuda.Event | None  # None on the CPU


def packet(name, chunk, latents={}) -> Packet:
    """Make a packet of a `film.decoders.Chunk` and its latents, without waiting for the GPU."""
    checked = {**latents, "frames": chunk.frames, "samples": chunk.samples}
    is_finite = {key: to_host(torch.isfinite(x).all()) for key, x in checked.items()}
    frames = to_host(to_bytes(chunk.frames))
    picture = to_host(thumbnails(chunk.frames)), to_host(chunk.levels.float())
    samples = to_host(chunk.samples.float())
    return Packet(name, frames, samples, picture, is_finite, event_after(checked.values()))


def to_host(x):
    """Queue the copy of a tensor to the CPU; PyTorch makes the copy in pinned memory."""
    return x.to("cpu", non_blocking=x.is_cuda)


def event_after(tensors):
    """Return an event after all that is queued on the GPU of the tensors; None on the CPU."""
    devices = {x.device for x in tensors if x.is_cuda}
    return torch.cuda.current_stream(*devices).record_event() if devices else None


def to_bytes(frames):
    """Frames (P, 3, H, W) in [0, 1] -> (P, H, W, 3) from 0 to 255.

    >>> to_bytes(torch.tensor([0, 254.4, 254.6]).view(1, 3, 1, 1) / 255).flatten().tolist()
    [0, 254, 255]
    """
    return (frames * 255).round().byte().permute(0, 2, 3, 1).contiguous()


def thumbnails(frames):
    """Reduce frames (P, 3, H, W) by the factor H // SHEET_PIXELS if it is above 1."""
    factor = frames.shape[2] // SHEET_PIXELS
    return F.avg_pool2d(frames.float(), factor) if factor > 1 and len(frames) else frames.float()


class Writer:
    """Writes packets into a film, in order, in a thread."""

    def __init__(self, movie, watch):
        """movie: `film.mp4.Movie`; watch: `Stopwatch`."""
        self.movie, self.watch, self.pictures = movie, watch, []
        self.thread, self.waiting = ThreadPoolExecutor(1), deque()
        self.is_broken = False

    def add(self, packet):
        """Queue a packet; wait if AHEAD others are queued.  Raises the error of an earlier one."""
        self.waiting.append(self.thread.submit(self._write, packet))
        self._finish_all_but(AHEAD)

    def close(self):
        """Wait for all packets.  Raises the error of one that could not be written."""
        try:
            self._finish_all_but(0)
        finally:
            self.thread.shutdown()

    def _finish_all_but(self, number):
        while self.waiting and (len(self.waiting) > number or self.waiting[0].done()):
            self.waiting.popleft().result()  # waits, and raises the error of `_write`

    def _write(self, packet):
        if self.is_broken:  # the film ends before the first packet that failed: it has no holes
            return
        self.is_broken = True  # until everything below has succeeded
        if packet.copied:
            packet.copied.synchronize()
        for key, is_finite in packet.is_finite.items():
            if not is_finite:
                raise ValueError(f"{packet.name} has NaN or infinity in its {key}")
        self.movie.add(packet.frames.numpy(), packet.samples.numpy())
        if self.movie.frames <= SHEET_SECONDS * self.movie.fps + 1:
            self.pictures.append(packet.picture)
        self.watch.block_written(self.movie.frames > self.movie.fps)  # frame 0 and one second
        self.is_broken = False
