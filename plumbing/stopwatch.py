"""How speed is counted: seconds by block and by stage, without slowing down what is measured.

    TTFC        time to first chunk: from having weights and prompt to the first second of picture
                and sound written
    passes      the transformer alone, refresh included
    end to end  with decoding and writing

Rates are frames over seconds, of the whole stream and again of the median block from the third on,
when the first ones have paid for everything that is only paid once.

On a GPU work is queued, and the clock of the CPU says when it was queued. So stages are marked by
events in the GPU's own queue, read after the stream; the CPU waits for the GPU once a block, when
the finished block is wanted, and never inside one.
"""

import resource
import statistics
import sys
import time
from collections import Counter, defaultdict

import torch

from kv_cache import MergedView


class Stopwatch:
    """Seconds of one stream."""

    def __init__(self, device=torch.device("cpu")):
        self.on_gpu = device.type == "cuda"
        self.marks = defaultdict(list)  # stage -> (block, begin, end) of every call
        self.passes, self.output = [], []  # seconds a block, by the CPU's clock
        self.ttfc = self.ttfc_passes = None
        self.peaks = []  # largest memory in use so far, in MB, block by block
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        self.start = self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, everything queued until now included."""
        if self.on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds

    def block_made(self):
        """The passes of a block are done; decoding and writing it begins."""
        self.passes.append(self.lap())

    def block_written(self, is_first_second):
        """And now it is in the file; with `is_first_second`, it can be seen and heard from here."""
        self.output.append(self.lap())
        self.peaks.append(self._peak_memory_mb())
        if is_first_second and self.ttfc is None:
            self.ttfc, self.ttfc_passes = self.last - self.start, sum(self.passes)

    def watch(self, stage, function, by_cpu=False):
        """The same function, its calls marked as a stage of the block in work.

        by_cpu   what it does is done by the CPU, also where there is a GPU
        """
        mark = time.perf_counter if by_cpu else self._mark

        def watched(*args, **kwargs):
            begin = mark()
            result = function(*args, **kwargs)
            self.marks[stage].append((len(self.output), begin, mark()))
            return result

        return watched

    def watch_passes(self, net, steps):
        """Mark every pass of a model: the first `steps` of a block denoise it, one refreshes it.

        The first pass may also refresh the block before: that is a stage of its own, "both".
        """
        stages = {name: self.watch(name, net.forward) for name in ("denoise", "refresh", "both")}
        passes = Counter()  # of each block, by its last latent frame

        def watched(*inputs):
            *_, span, view = inputs
            passes[span.video.stop] += 1
            stage = "denoise" if passes[span.video.stop] <= steps else "refresh"
            return stages["both" if isinstance(view, MergedView) else stage](*inputs)

        net.forward = watched

    def _mark(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin, end):
        return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000

    def _peak_memory_mb(self):
        return torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else peak_memory_mb()

    def stages(self) -> dict:
        """Median seconds a block of every stage."""
        if self.on_gpu:
            torch.cuda.synchronize()
        medians = {}
        for stage, calls in self.marks.items():
            blocks = defaultdict(float)
            for block, begin, end in calls:
                blocks[block] += self._between(begin, end)
            medians[stage] = settled_median(list(blocks.values()))
        return medians

    def report(self, frames, cfg) -> dict:
        """Frames per second by every convention, medians, memory."""
        passes, whole, fps = sum(self.passes), self.last - self.start, cfg.fps
        block = settled_median(self.passes)
        both = settled_median([sum(pair) for pair in zip(self.passes, self.output)])
        return {
            "frames": frames,
            "ttfc_seconds": self.ttfc,
            "ttfc_passes_seconds": self.ttfc_passes,
            "passes_fps": frames / passes,
            "passes_times_real_time": frames / passes / fps,
            "end_to_end_fps": frames / whole,
            "end_to_end_times_real_time": frames / whole / fps,
            "settled_passes_fps": fps * cfg.block_seconds / block,
            "settled_end_to_end_fps": fps * cfg.block_seconds / both,
            "median_block_seconds": block,
            "stage_seconds": self.stages(),
            "passes_seconds": self.passes,
            "output_seconds": self.output,
            "peak_memory_mb": self._peak_memory_mb(),
            **(held_memory() if self.on_gpu else {}),
        }


def settled_median(seconds) -> float:
    """Median from the third block on, if there is one.

    >>> settled_median([9.0, 5.0, 1.0, 2.0, 3.0])
    2.0
    """
    return statistics.median_high(seconds[2:] or seconds)


def held_memory() -> dict:
    """What PyTorch held at most, to have the peak in use; and the host's memory.

    Recorded passes (full_size/faster.py) hold memory between replays that is not in use.
    """
    return {
        "peak_reserved_memory_mb": torch.cuda.max_memory_reserved() / 2**20,
        "peak_host_memory_mb": peak_memory_mb(),
    }


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
