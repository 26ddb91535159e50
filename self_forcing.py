"""Self-forcing: generate block by block, as at inference, also while training.

A model trained on true pasts meets, when it streams, pasts of its own making, with errors it never
saw. Self-forcing trains it on exactly what it will meet: its own rollout.

One block, with the noise levels 1 > s1 > s2 > s3 > 0:

    noise --pass(1)--> x0 --re-noise to s1--pass--> x0 --re-noise to s2--pass--> x0 ... --> x0
                                                                                   |
    rolling cache  <-------------------- pass(0), the refresh -- finished block <--+

  * every pass predicts the whole way to clean (x0); fresh noise takes it back to the next level
  * the last pass ends at x0: nothing is re-noised after it
  * the refresh runs once more at sigma = 0: the keys and values that later blocks will attend to
    must come from the clean block, as they did in training, not from its last noisy state
  * the loop, not a layer, moves the cache on to the next block

`rollout` is the only such loop of the project: `generate.py` runs it without gradient; training
(stage III) runs it with one. Then only the exit pass of each block carries a gradient, and none
crosses from block to block, because the cache hands out history as data.
"""

from typing import NamedTuple

import torch

import config
import model
from kv_cache import CachedView
from masks import block_span


class Block(NamedTuple):
    """One finished block of B streams."""

    index: int
    video: torch.Tensor  # (B, T_v, C_v) clean latents
    audio: torch.Tensor  # (B, F_a, C_a)


def few_step_sigmas(cfg, steps=None) -> tuple[float, ...]:
    """The noise levels of `steps` passes, evenly taken from those that the student was trained on.

    Raises ValueError for more passes than that.

    >>> few_step_sigmas(config.TOY, 2)
    (1.0, 0.7265238, 0.0)
    """
    trained = len(cfg.sigmas) - 1
    steps = trained if steps is None else steps
    if not 1 <= steps <= trained:
        raise ValueError(
            f"{steps} steps: the student knows {trained} noise levels, so 1 to {trained}"
        )
    return (*(cfg.sigmas[i * trained // steps] for i in range(steps)), 0.0)


def denoise(net, noise, sigmas, text, span, view, generator, exit_step=None):
    """Few-step generation of one block: noise -> x0, for (video, audio) pairs.

    exit_step   index of the pass whose x0 is the answer; default the last. Only this pass may carry
                a gradient: the earlier ones are how its input came about.
    """
    last = len(sigmas) - 2 if exit_step is None else exit_step
    x, wants_gradient = noise, torch.is_grad_enabled()
    for i in range(last + 1):
        with torch.set_grad_enabled(wants_gradient and i == last):
            x0 = at_sigma(net, x, sigmas[i], text, span, view)
        if i < last:
            fresh = model.draw_noise(
                len(x0[0]), span, net.cfg, generator, x0[0].device, x0[0].dtype
            )
            level = x0[0].new_full((1, 1), sigmas[i + 1])
            x = [model.add_noise(c, n, level) for c, n in zip(x0, fresh)]
    return x0


def at_sigma(net, x, sigma, text, span, view):
    """One pass with one noise level for both streams: clean estimates of x = (video, audio)."""
    level = x[0].new_full((len(x[0]),), sigma)
    return model.predict_x0(net, *x, level, level, text, span, view)


def rollout(net, text_at, num_blocks, sigmas, generator, batch=1, window=None, exit_step=None):
    """Yield the blocks of B streams, each as soon as it exists.

    text_at     function from block index to `model.Text`: the prompt may change between blocks
    sigmas      from 1 to 0; len(sigmas) - 1 passes a block, and the refresh
    generator   torch.Generator on the CPU, the only source of randomness
    window      blocks remembered besides prefix and sinks; None: all
    exit_step   see `denoise`; one for all blocks, so that each block is refreshed from an equally
                good clip (Self-Forcing; OmniForcing's same_step_across_blocks)

    The refresh happens when the next block is asked for: a finished block is not kept waiting.
    """
    view = CachedView(net.cfg, num_blocks, window)
    like = next(net.parameters())
    for k in range(num_blocks):
        span, text = block_span(k, net.cfg), text_at(k)
        noise = model.draw_noise(batch, span, net.cfg, generator, like.device, like.dtype)
        x0 = denoise(net, noise, sigmas, text, span, view, generator, exit_step)
        yield Block(k, *x0)
        if k + 1 < num_blocks:
            with torch.no_grad():  # the cache holds data; a gradient would reach across blocks
                at_sigma(net, [x.detach() for x in x0], 0.0, text, span, view)
            view.next_block()


def whole_clip(blocks):
    """Blocks in order -> video and audio latents of the whole clip."""
    _, video, audio = zip(*blocks)
    return torch.cat(video, 1), torch.cat(audio, 1)


if __name__ == "__main__":
    cfg = config.TOY
    net = model.build(cfg)
    text = net.project_text(torch.eye(cfg.caption_width)[None, :3])
    with torch.inference_mode():
        blocks = rollout(net, lambda k: text, 4, cfg.sigmas, torch.Generator().manual_seed(0))
        for block in blocks:
            print(f"block {block.index}: video {tuple(block.video.shape)}, audio", end=" ")
            print(tuple(block.audio.shape))
