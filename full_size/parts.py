"""What a stream is made of: everything between a prompt and a film, for the toy or the full size.

The toy needs a file of this repository. The full size needs a text encoder, a transformer and three
decoders, which do not all fit a GPU at once: they come one after the other, and the text encoder is
gone before the transformer arrives. What can be refused is refused before anything is read.

"random" weights take the place of any file, to measure speed and memory.
"""

from pathlib import Path
from typing import Callable, NamedTuple

import torch

import config
import model
from dmd import few_step_sigmas
from film import decoders
from full_size import faster as graphs
from full_size import memory, memory_plan
from full_size import text as captions
from full_size import weights as ltx2
from kernel import cache_append_attention as kernel
from masks import num_blocks
from plumbing import cli, files
from toy import codec as toy_codec

# what makes the same stream faster: benchmarks/README.md says how, and what each is worth
SPEEDUPS = {
    "qkv": "queries, keys and values by one matrix product",
    "merge": "a block's refresh in the first pass of the next",
    "graph": "passes recorded once and replayed, on a GPU",
    "beside": "audio beside video, on a GPU",
    "channels-last": "the video decoder's channels innermost in memory, at full size",
}

# of the students that are shipped
WEIGHTS = {
    name: Path(__file__).parent.parent / "weights" / f"{name}_self_forcing.safetensors"
    for name in ("toy", "toy_released")
}


class Order(NamedTuple):
    """What was asked for, checked."""

    cfg: config.Config
    cues: list
    seconds: float
    window: int
    steps: int | None
    weights: str | None
    ltx2: str | None
    device: torch.device
    dtype: torch.dtype
    speedups: tuple = ()  # names of SPEEDUPS

    @property
    def num_blocks(self):
        return num_blocks(self.seconds, self.cfg)

    def about(self) -> dict:
        """What a measurement must say besides its numbers."""
        return {
            **cli.machine(self.device),
            "config": self.cfg.name,
            "attention": kernel.path(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "window": self.window,
            "passes_a_block": len(few_step_sigmas(self.cfg, self.steps)) - 1,
            "speed_up": self.speedups,
        }


class Parts(NamedTuple):
    """Everything between a prompt and a film."""

    net: model.OmniTransformer
    read: Callable  # words -> caption features
    make_decoder: Callable  # Stopwatch.watch -> decoder
    text_seconds: float = 0.0  # of encoding the prompts


def parts_for(order) -> Parts:
    """Load them.  Raises ValueError, in one line, for what is missing, foreign or too large."""
    parts = toy_parts(order) if order.cfg.is_toy else full_parts(order)
    if order.device.type == "cuda":  # where there is a kernel, it is compiled now
        print(f"attention by {kernel.path(order.device)}")
    return parts._replace(net=sped_up(parts.net, order.speedups, order.device))


def find_speedups(names, cfg, device) -> tuple:
    """The speed-ups of these names; of "all", those that can run here.

    Raises ValueError for an unknown one, or one that cannot run on this device or config.
    """
    impossible = {} if device.type == "cuda" else dict.fromkeys(("graph", "beside"), "a GPU")
    if cfg.is_toy:
        impossible["channels-last"] = "a full-size config"
    if "all" in names:
        return tuple(name for name in SPEEDUPS if name not in impossible)
    for name in names:
        if name not in SPEEDUPS:
            raise ValueError(f"--speed-up {name}: unknown; expected all, {', '.join(SPEEDUPS)}")
        if name in impossible:
            raise ValueError(
                f"--speed-up {name} needs {impossible[name]}; leave it out, or say all"
            )
    return tuple(names)


def sped_up(net, speedups, device):
    """The transformer with its share of them."""
    if "qkv" in speedups:
        model.join_projections(net)
    if "beside" in speedups:
        net.fork = graphs.SideStream(device)
    return graphs.Recorded(net, graphs.cuda_recorder) if "graph" in speedups else net


def toy_parts(order) -> Parts:
    """A shipped student, or another of this project, and the toy's codec."""
    if order.weights == "random":
        net = ltx2.random_weights(order.cfg, order.device, order.dtype)
    else:
        path = order.weights or WEIGHTS[order.cfg.name]
        net = load_student(path, order.cfg, order.device, order.dtype)
    codec = toy_codec.load(order.cfg)
    return Parts(net, captions.toy_features, lambda watch: decoders.ToyDecoder(codec, watch))


def full_parts(order) -> Parts:
    """LTX-2's text path, a student's transformer and LTX-2's decoders, loaded in this order.

    The text encoder has left the memory before the transformer comes.
    """
    is_random = order.weights == "random"
    if not is_random:  # complain before anything slow begins
        captions.check_folder(order.ltx2, captions.TEXT_PARTS + decoders.PARTS)
        source = ltx2.Source(order.weights, order.cfg)
    check_memory(order)
    prompts, at = [cue.prompt for cue in order.cues], (order.device, order.dtype)
    if is_random:
        features, seconds = captions.random_features(prompts, order.cfg, *at), 0.0
    else:
        features, seconds = captions.encode_and_free(order.ltx2, prompts, *at)
    net = ltx2.random_weights(order.cfg, *at) if is_random else source.load(*at)
    nets = decoders.random_weights(*at) if is_random else decoders.load(order.ltx2, *at)
    if "channels-last" in order.speedups:
        decoders.channels_last(nets)

    def make_decoder(watch, overlap=decoders.Overlap()):
        return decoders.Decoder(*nets, net.cfg, overlap, watch)

    return Parts(net, features.__getitem__, make_decoder, seconds)


def check_memory(order):
    """Print what the stream will need.  Raises ValueError if it does not fit."""
    cfg, blocks, dtype = order.cfg, order.num_blocks, order.dtype
    how = dict(speedups=order.speedups, prompts=len(order.cues))
    rows = memory_plan.film_rows(cfg, blocks, order.window, dtype, **how)
    free = memory.free_bytes(order.device)
    print(memory.shown(rows, free))
    memory_plan.check(rows, free, cfg, blocks, dtype)
    if order.ltx2:
        memory_plan.check_text(order.ltx2, free)


def load_student(path, cfg, device="cpu", dtype=torch.float32):
    """A student for this config.  Raises ValueError for a file that does not fit it."""
    net = model.load(path)
    files.check_config(path, net.cfg, cfg)
    return net.to(device, dtype)
