"""The toy on a CPU: the same stream by fewer operators, each noise level once, on one thread."""

import pytest
import torch
from helpers import LAYOUTS, PAPER, layout_name, random_model, random_text, tiny
from tape import Operators

import config
import generate
import rollout
from kv_cache import CachedView
from model import HalfLayer
from toy import faster, source

LEVELS = (1.0, 0.6, 0.0)  # two passes a block, and the refresh


def two_models(cfg):
    """The same random model twice; the second one sped up."""
    plain, fast = random_model(cfg), random_model(cfg)
    faster.speed_up(fast)
    return plain, fast


@torch.inference_mode()
def streamed(net, blocks=5, clips=2):
    """A stream of random captions that evicts blocks: its latents."""
    torch.manual_seed(1)
    text, noise = random_text(net, net.cfg, clips=clips), torch.Generator().manual_seed(2)
    view = CachedView(net.cfg, blocks, window=1)
    made = rollout.rollout(net, lambda k: text, blocks, LEVELS, noise, clips, view)
    return rollout.whole_clip(list(made))


@pytest.mark.parametrize("cfg", LAYOUTS, ids=layout_name)
def test_a_stream_is_the_same_but_for_rounding(cfg):
    """In float64, with sinks and without, over evictions."""
    plain, fast = two_models(tiny(cfg))
    for one, other in zip(streamed(plain), streamed(fast), strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=0)


def test_a_stream_takes_fewer_operators():
    """Less than 80 %, although F.rms_norm counts as one."""
    counts = []
    for net in two_models(config.TOY):
        with Operators() as seen:
            streamed(net)
        counts.append(sum(seen.counts.values()))
    assert counts[1] < 0.8 * counts[0]


def test_each_noise_level_is_computed_once():
    """Three levels, in five blocks, for two streams."""
    _, fast = two_models(tiny(PAPER))
    seen = []
    for stream in (fast.video, fast.audio):
        stream.adaln.register_forward_hook(lambda net, inputs, rows: seen.append(inputs[0]))
    streamed(fast)
    assert len(seen) == 2 * len(LEVELS)


def opened(*arguments):
    """The source that generate.py opens for a command line."""
    request = generate.check_args(generate.options().parse_args(arguments))
    return source.StreamSource(request)


@pytest.mark.parametrize(
    "options, half",
    [([], faster.FastHalf), (["--dtype", "bfloat16"], HalfLayer)],
    ids=["plain", "bfloat16"],
)
def test_what_a_stream_runs(options, half):
    """The faster layers, unless the command line asks for others."""
    assert type(opened(*options).net.layers[0].audio) is half


@pytest.mark.parametrize("by_user, threads", [(None, [1]), ("2", [])])
def test_a_stream_takes_one_thread_unless_the_user_says_so(by_user, threads, monkeypatch):
    """By OMP_NUM_THREADS, as everywhere in PyTorch."""
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if by_user:
        monkeypatch.setenv("OMP_NUM_THREADS", by_user)
    opened()
    assert seen == threads
