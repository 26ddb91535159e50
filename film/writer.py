"""Write the blocks of a stream in a thread of its own, so that the model does not wait for x264.

    main thread      passes 0 | decode 0 | passes 1 | decode 1 | passes 2 | decode 2 | ...
    writer thread                        | write 0             | write 1             | ...

The main thread converts frames to the colours of a film, on the device where they are. It queues
their copy to the CPU and does not wait; the writer waits. Flags are copied, too: is a tensor free
of NaN and infinity? An error of the writer is raised by the next `add` or `close`.
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
    planes: list  # brightness (P, 1, H, W) and colour (P, 2, h, w) of the frames, uint8
    samples: torch.Tensor  # (channels, n) float32
    picture: tuple  # small frames (P, 3, h, w) and levels (M, bands), for the contact sheet
    is_finite: dict  # name of a tensor -> bool tensor
    copied: torch.cuda.Event | None  # None on the CPU


def packet(name, chunk, scale, latents={}) -> Packet:
    """Make a packet of a `film.decoders.Chunk` and its latents, without waiting for the GPU.

    scale   factor by which the frames will be enlarged
    """
    checked = {**latents, "frames": chunk.frames, "samples": chunk.samples}
    is_finite = {key: to_host(torch.isfinite(x).all()) for key, x in checked.items()}
    planes = [to_host(plane) for plane in to_planes(chunk.frames, halve=scale == 1)]
    picture = to_host(thumbnails(chunk.frames)), to_host(chunk.levels.float())
    samples = to_host(chunk.samples.float())
    return Packet(name, planes, samples, picture, is_finite, event_after(checked.values()))


def to_host(x):
    """Queue the copy of a tensor to the CPU; PyTorch makes the copy in pinned memory."""
    return x.to("cpu", non_blocking=x.is_cuda)


def event_after(tensors):
    """Return an event after all that is queued on the GPU of the tensors; None on the CPU."""
    devices = {x.device for x in tensors if x.is_cuda}
    return torch.cuda.current_stream(*devices).record_event() if devices else None


# offset, red, green, blue -> brightness, and how much bluer and redder than grey (ITU-R BT.601)
TO_FILM = [16, 65.481, 128.553, 24.966], [128, -37.797, -74.203, 112], [128, 112, -93.786, -18.214]


def to_planes(frames, halve):
    """Frames (P, 3, H, W) in [0, 1] -> bytes: brightness (P, 1, H, W), colour (P, 2, H, W).

    halve   colour (P, 2, H/2, W/2), as a film stores it; not for frames that will be enlarged

    >>> black_white_blue = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 0, 1]]).view(3, 3, 1, 1)
    >>> [plane.flatten(1).tolist() for plane in to_planes(black_white_blue, halve=False)]
    [[[16], [235], [41]], [[128, 128], [128, 128], [240, 110]]]
    """
    # For one frame of 512 x 768 on a CPU, PyAV took 4 ms to convert it, x264 2 ms to encode it.
    red, green, blue = frames.float().unbind(1)
    planes = [offset + r * red + g * green + b * blue for offset, r, g, b in TO_FILM]
    brightness, colour = torch.stack(planes, 1).split([1, 2], dim=1)
    colour = F.avg_pool2d(colour, 2) if halve and len(colour) else colour
    return [plane.round().clamp(0, 255).byte() for plane in (brightness, colour)]


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
        self.movie.add(*packet.planes, packet.samples.numpy())
        if self.movie.frames <= SHEET_SECONDS * self.movie.fps + 1:
            self.pictures.append(packet.picture)
        self.watch.block_written(self.movie.frames > self.movie.fps)  # frame 0 and one second
        self.is_broken = False
