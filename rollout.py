"""The one loop of inference and of stage III: block after block, each in a few denoising steps.

One block, with the noise levels 1 > s1 > s2 > s3 > 0:

    noise --pass(1)--> x0 --noise to s1--pass--> x0 --noise to s2--pass--> x0 ... --pass--> x0
                                                                                           |
    rolling cache  <-------------------- pass(0), the refresh <------ finished block <-----+

  * Every pass predicts the clean block x0. Fresh noise then takes it back to the next level.
  * The last pass ends at x0: no noise is added after it.
  * The refresh is one more pass, at sigma = 0. Later blocks then attend to keys and values of the
    clean block, not to those of its last noisy state.
  * Only the loop moves the cache on to the next block; no layer does.

`generate.py` runs the loop without gradients, `self_forcing.py` trains through it, and `dmd.py`
uses `denoise` alone, on whole clips.
"""

from typing import NamedTuple

import torch

import config
import model
from kv_cache import CachedView
from masks import block_span


class Block(NamedTuple):
    """One finished block of B clips."""

    index: int
    video: torch.Tensor  # (B, T_v, C_v) clean latents
    audio: torch.Tensor  # (B, F_a, C_a)


def rollout(
    net, text_at, num_blocks, sigmas, generator,
    batch=1, view=None, exit_steps=None, history=None,
):  # fmt: skip
    """Yield the blocks of B clips, each as soon as it is finished.

    text_at     function from block index to `model.TextKV`: the prompt may change between blocks
    sigmas      noise levels from 1 to 0: len(sigmas) - 1 passes per block, and the refresh
    generator   torch.Generator on the CPU, or a list with one per clip: the only randomness
    view        the cache; default: a CachedView that evicts nothing
    exit_steps  for each block, the index of its last pass, see `denoise`; None: all passes
    history     clean (video, audio) of a real clip, cached instead of the generated blocks
                (teacher forcing, an ablation)
    """
    cfg, like = net.cfg, next(net.parameters())
    view = view or CachedView(cfg, num_blocks)
    for k in range(num_blocks):
        span, text = block_span(k, cfg), text_at(k)
        noise = model.draw_noise(batch, span, cfg, generator, like.device, like.dtype)
        exit_step = exit_steps[k] if exit_steps else None
        x0 = denoise(net, noise, sigmas, text, span, view, generator, exit_step)
        yield Block(k, *x0)  # the caller decodes and writes while the loop waits here
        if k + 1 < num_blocks:  # no block reads the keys of the last one
            refresh(net, block_of(history, k, cfg) if history else x0, text, span, view)
            view.next_block()


def denoise(net, x, sigmas, text, span, view, generator, exit_step=None):
    """Few-step generation of a block or a clip: pure noise -> x0, for x = (video, audio).

    exit_step   index of the pass whose x0 is returned; default: the last pass. Only this pass may
                carry a gradient: the passes before it only produce its input.
    """
    last = len(sigmas) - 2 if exit_step is None else exit_step
    in_training, like = torch.is_grad_enabled(), x[0]
    for i in range(last + 1):
        sigma = like.new_full((len(like),), sigmas[i])  # (B,), one level for both streams
        with torch.set_grad_enabled(in_training and i == last):
            x0 = model.predict_x0(net, *x, sigma, sigma, text, span, view)
        if i < last:
            noise = model.draw_noise(len(like), span, net.cfg, generator, like.device, like.dtype)
            lower = like.new_full((1, 1), sigmas[i + 1])
            x = [model.add_noise(c, n, lower) for c, n in zip(x0, noise)]
    return x0


@torch.no_grad()  # the cache keeps no gradient, so this pass needs none
def refresh(net, x0, text, span, view):
    """Write the keys and values of a finished block again, from its clean (video, audio)."""
    zero = x0[0].new_zeros(len(x0[0]))
    net(*x0, zero, zero, text, span, view)


def few_step_sigmas(cfg, steps=None) -> tuple[float, ...]:
    """Noise levels of `steps` passes: those of the training, or some of them.

    Raises ValueError for no pass, and for more passes than it was trained on.

    >>> few_step_sigmas(config.TOY, 2)
    (1.0, 0.7265238, 0.0)
    """
    trained = len(cfg.sigmas) - 1
    steps = trained if steps is None else steps
    if not 1 <= steps <= trained:
        raise ValueError(
            f"{steps} steps: the student was trained on {trained}; expected 1 to {trained}"
        )
    return (*(cfg.sigmas[i * trained // steps] for i in range(steps)), 0.0)


def whole_clip(blocks):
    """Concatenate blocks in order: video (B, T_v, C_v) and audio (B, F_a, C_a) of the clip."""
    _, video, audio = zip(*blocks)
    return torch.cat(video, 1), torch.cat(audio, 1)


def block_of(clip, k, cfg):
    """Video and audio latents of block k of a whole clip; inverse of `whole_clip`."""
    (video, audio), span, per_frame = clip, block_span(k, cfg), cfg.tokens_per_frame
    video = video[:, span.video.start * per_frame : span.video.stop * per_frame]
    return video, audio[:, span.audio.start : span.audio.stop]


if __name__ == "__main__":
    net = model.build(config.TOY)
    text = net.project_text(torch.eye(9)[None, 1:4])
    passes = []
    net.register_forward_pre_hook(lambda net, inputs: passes.append(f"{inputs[2].item():.2f}"))
    with torch.no_grad():
        for block in rollout(net, lambda k: text, 3, config.TOY.sigmas, torch.Generator()):
            print(f"block {block.index}: passes at {', '.join(passes)}")
            passes.clear()  # the refresh runs after the yield: printed with the next block
