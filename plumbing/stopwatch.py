"""Measure speed: seconds per block and per stage, without slowing down the stream.

    TTFC        time to first chunk: from loaded weights and encoded prompt until the first second
                of frames and sound is written
    passes      the transformer alone, including the refresh
    end to end  with decoding and writing

A GPU works through a queue, and the clock of the CPU only tells when work was queued. So events in
the queue mark the stages. They are read after the stream. The CPU waits for the GPU only where the
passes or the decoding of a block end (`lap`), never inside them.
"""

import itertools
import math
import statistics
import sys
import time
from collections import Counter, defaultdict

import torch

from masks import block_interval

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None


class Stopwatch:
    """The times of one stream."""

    def __init__(self, device=torch.device("cpu")):
        self.on_gpu = device.type == "cuda"
        self.marks = defaultdict(list)  # stage -> (block, begin, end) of every call
        self.passes, self.decoding = [], []  # seconds per block, on the clock of the CPU
        self.more_passes = [0]  # per block, the current one included: with another prompt, too
        self.written = []  # seconds from the start until each block was in the file
        self.ttfc = self.ttfc_passes = None
        self.peaks = []  # peak memory after each block, in MB
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        self.start = self.last = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        if self.on_gpu:
            torch.cuda.synchronize()  # the lap ends when the queue is empty
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds

    def block_made(self):
        """Note that the passes of a block are done: decoding starts."""
        self.passes.append(self.lap())
        self.more_passes.append(0)

    def block_decoded(self):
        """Note that a block waits to be written: the passes of the next one start."""
        self.decoding.append(self.lap())
        self.peaks.append(self._peak_memory_mb())

    def block_written(self, has_first_second):
        """Note that a block is in the file, and whether the file has its first second."""
        # Called by the thread that writes: it must not use the laps of the main thread.
        self.written.append(time.perf_counter() - self.start)
        if has_first_second and self.ttfc is None:
            self.ttfc, self.ttfc_passes = self.written[-1], sum(self.passes[: len(self.written)])

    def watch(self, stage, function, by_cpu=False):
        """Return a function that does the same, and times its calls as a stage of a block."""
        # by_cpu: writing the film, in a thread of its own; it may lag behind the decoding.
        mark, done = (time.perf_counter, self.written) if by_cpu else (self._mark, self.decoding)

        def watched(*args, **kwargs):
            block, begin = len(done), mark()  # all blocks before it are done
            result = function(*args, **kwargs)
            self.marks[stage].append((block, begin, mark()))
            return result

        return watched

    def watch_passes(self, net, steps):
        """Time every pass of a model by hooks: `steps` passes per block, then a refresh.

        The hooks of an earlier stopwatch are removed.
        """
        passes, begin = Counter(), []  # passes of each block, by its last latent frame
        latents = None  # of the pass before

        def before(net, inputs):
            begin.append(self._mark())

        def after(net, inputs, velocities):
            nonlocal latents
            last_frame = inputs[5].video.stop  # of the pass's span
            is_repeated = inputs[0] is latents  # guided after a new prompt, see toy/switch.py
            self.more_passes[-1] += is_repeated
            passes[last_frame] += not is_repeated
            latents = inputs[0]
            stage = "denoise" if passes[last_frame] <= steps else "refresh"
            self.marks[stage].append((len(self.decoding), begin.pop(), self._mark()))

        for hook in vars(net).get("timed_by", ()):
            hook.remove()
        net.timed_by = net.register_forward_pre_hook(before), net.register_forward_hook(after)

    def _mark(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _peak_memory_mb(self):
        return torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else peak_memory_mb()

    def stages(self) -> dict:
        """Return the median seconds per block of every stage."""
        if self.on_gpu:
            torch.cuda.synchronize()  # an event has no time before the GPU has reached it
        medians = {}
        for stage, calls in self.marks.items():
            blocks = defaultdict(float)
            for block, begin, end in calls:
                by_cpu = isinstance(begin, float)
                blocks[block] += end - begin if by_cpu else begin.elapsed_time(end) / 1000  # ms
            medians[stage] = settled_median(list(blocks.values()))
        return medians

    def report(self, frames, cfg) -> dict:
        """Return rates of the whole stream, rates of its median block, and memory."""
        passes, whole, fps = sum(self.passes), self.written[-1], cfg.fps
        block = settled_median(self.passes)
        # `written` also has the packet of the end, which is no block.
        intervals = [b - a for a, b in itertools.pairwise([0.0, *self.written])][: len(self.passes)]
        report = {
            "frames": frames,
            "ttfc_seconds": self.ttfc,
            "ttfc_passes_seconds": self.ttfc_passes,
            "passes_fps": frames / passes,
            "passes_times_real_time": frames / passes / fps,
            "end_to_end_fps": frames / whole,
            "end_to_end_times_real_time": frames / whole / fps,
            "settled_passes_fps": fps * cfg.block_seconds / block,
            "settled_end_to_end_fps": fps * cfg.block_seconds / settled_median(intervals),
            "median_block_seconds": block,
            "stage_seconds": self.stages(),
            "passes_seconds": self.passes,
            "more_passes": self.more_passes[: len(self.passes)],
            "decoding_seconds": self.decoding,
            "written_seconds": self.written,
            "interval_95_seconds": percentile_95(intervals[2:] or intervals),
            "viewer_waits": viewer_waits(self.written[: len(self.passes)], cfg),
            "peak_memory_mb": self._peak_memory_mb(),
        }
        if self.on_gpu:
            # CUDA graphs (full_size/faster.py) reserve memory that no tensor uses between replays.
            report["peak_reserved_memory_mb"] = torch.cuda.max_memory_reserved() / 2**20
            report["peak_host_memory_mb"] = peak_memory_mb()
        return report


def settled_median(seconds) -> float:
    """Return the median of the blocks from the third one on; of all if there are at most two.

    >>> settled_median([9.0, 5.0, 1.0, 2.0, 3.0])
    2.0
    """
    # The first blocks include one-time costs.
    return statistics.median_high(seconds[2:] or seconds)


def percentile_95(seconds) -> float:
    """Return the smallest of the values that is at least as large as 95 % of them.

    >>> percentile_95(range(1, 101)), percentile_95([3.0])
    (95, 3.0)
    """
    return sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1]


def viewer_waits(written, cfg) -> int:
    """Count the blocks that are written too late for a viewer who starts with the first second.

    >>> from config import TOY
    >>> viewer_waits([0.1, 0.5, 1.4, 2.6, 3.4], TOY)  # block 3 begins at 2 s, is due at 2.5
    1
    """
    starts = [block_interval(k, cfg)[0] for k in range(len(written))]
    # Block 0 may be a single frame: the first second is then complete with block 1.
    first = next((k for k in range(len(starts)) if block_interval(k, cfg)[1] >= 1), 0)
    playing_since, waits = written[first], 0
    for time_written, start in list(zip(written, starts))[first + 1 :]:
        if time_written > playing_since + start:
            playing_since, waits = time_written - start, waits + 1
    return waits


def peak_memory_mb() -> float:
    """Return the peak resident memory of this process, in MB; 0 where it is not counted."""
    if not resource:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)  # bytes there, else KB
