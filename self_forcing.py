"""Self-forcing: train on what you generate yourself, block by block, as at inference (stage III).

Stage II's pasts are pieces of a bidirectional model's walk, each at a noise level of its own, and
always right. When the student streams, its past is clean, for it is refreshed, but of its own
making, with errors that it never saw: exposure bias. Self-forcing trains it on exactly what it will
meet, its own rollout.

One block, with the noise levels 1 > s1 > s2 > s3 > 0:

    noise --pass(1)--> x0 --re-noise to s1--pass--> x0 --re-noise to s2--pass--> x0 ... --> x0
                                                                                   |
    rolling cache  <-------------------- pass(0), the refresh -- finished block <--+

  * every pass predicts the whole way to clean (x0); fresh noise takes it back to the next level
  * the last pass ends at x0: nothing is re-noised after it
  * the refresh runs once more at sigma = 0: the keys and values that later blocks will attend to
    must come from the clean block, as they did in training, not from its last noisy state
  * the loop, not a layer, moves the cache on to the next block
  * the refresh and the first pass of the next block may be one pass (`merge`, kv_cache.MergedView)

`rollout` is the only such loop of the project: `generate.py` runs it without gradient; training
runs it with one. A training step is then

    1  draw captions, and the exit pass that all blocks of this rollout will end at
    2  roll out 5 seconds with the same caches as at inference; only the exit pass of each block
       carries a gradient, and none crosses from block to block: the cache hands out history as data
    3  judge the whole clip by the two bidirectional scores of dmd.py, as in stage I; one backward
    4  let the critic follow, on five fresh rollouts

No true clip is shown: captions are enough. The control does show them (`--history true`): there
every block is generated behind the true past. It has the same loss, steps and cost, so what
self-forcing buys is the difference between the two.

Captions get a gradient: their keys and values are computed once per rollout, and every exit pass
reads them. # Paper: the official code caches them detached, so its caption layers learn nothing.

    python self_forcing.py           from the stage II student, see --help
"""

import functools
from typing import NamedTuple

import torch

import dmd
import model
import teacher
from full_size import sharding
from kv_cache import CachedView
from masks import block_span, num_blocks
from plumbing import cli
from plumbing import stages as training_parts
from toy import codec as toy_codec


class Block(NamedTuple):
    """One finished block of B streams."""

    index: int
    video: torch.Tensor  # (B, T_v, C_v) clean latents
    audio: torch.Tensor  # (B, F_a, C_a)


def rollout(
    net, text_at, blocks, sigmas, generator, batch=1, window=None, pinned=True,
    exit_step=None, history=None, merge=False, view=None,
):  # fmt: skip
    """Yield the blocks of B streams, each as soon as it exists.

    text_at     function from block index to `model.Text`: the prompt may change between blocks
    sigmas      from 1 to 0; len(sigmas) - 1 passes a block, and the refresh
    generator   torch.Generator on the CPU, the only source of randomness
    window      blocks remembered besides prefix and sinks; None: all
    pinned      False: prefix and sinks are forgotten as well (a control)
    exit_step   see `dmd.denoise`; one for all blocks, so that each block is refreshed from an
                equally good clip (Self-Forcing; OmniForcing's same_step_across_blocks), or a list
                with one for each
    history     clean (video, audio) of the whole clip, to be remembered instead of what is
                generated: teacher forcing, the control
    merge       refresh a block in the first pass of the next one, where both have the same prompt:
                the same numbers but for rounding, one pass less. Never under autograd
    view        what remembers the past, instead of a CachedView

    The refresh happens when the next block is asked for: a finished block is not kept waiting.
    """
    view = view or CachedView(net.cfg, blocks, window, pinned)
    like, past = next(net.parameters()), None
    exits = exit_step if isinstance(exit_step, list) else [exit_step] * blocks
    for k in range(blocks):
        span, text = block_span(k, net.cfg), text_at(k)
        if past and not (merge and past.text is text and not torch.is_grad_enabled()):
            with torch.no_grad():  # the cache holds data; a gradient would reach across blocks
                dmd.at_sigma(net, past.latents, 0.0, past.text, past.span, view)
            view.next_block()
            past = None
        noise = model.draw_noise(batch, span, net.cfg, generator, like.device, like.dtype)
        x0 = dmd.denoise(net, noise, sigmas, text, span, view, generator, exits[k], past)
        yield Block(k, *x0)
        clean = block_of(history, k, net.cfg) if history else x0
        past = dmd.Finished([x.detach() for x in clean], text, span)


def whole_clip(blocks):
    """Blocks in order -> video and audio latents of the whole clip."""
    _, video, audio = zip(*blocks)
    return torch.cat(video, 1), torch.cat(audio, 1)


def block_of(clip, k, cfg):
    """Video and audio latents of one block of a whole clip; inverse of `whole_clip`."""
    (video, audio), span, per_frame = clip, block_span(k, cfg), cfg.tokens_per_frame
    video = video[:, span.video.start * per_frame : span.video.stop * per_frame]
    return video, audio[:, span.audio.start : span.audio.stop]


# ---- training ----


def rolled_out(net, clips, captions, generator, window=None, codec=None, share_exit=True):
    """Clips to train stage III on: the student's own rollout, as it is after a random pass.

    codec        to remember the true clips instead: the control
    share_exit   False: every block ends after a random pass of its own
    """
    blocks, sigmas = num_blocks(teacher.SECONDS, net.cfg), net.cfg.sigmas
    draws = 1 if share_exit else blocks
    exits = [dmd.draw_exit_step(sigmas, generator) for _ in range(draws)]
    text = net.project_text(*captions.features)
    history = None
    if codec:
        true = toy_codec.encode_clips(codec, clips, teacher.SECONDS)
        history = [x.to(sharding.device()) for x in true]
    how = dict(window=window, exit_step=exits[0] if share_exit else exits, history=history)
    rolled = rollout(net, lambda k: text, blocks, sigmas, generator, len(captions), **how)
    return whole_clip(rolled)


def main():
    p = dmd.options(__doc__, "runs/self_forcing", "weights/toy_self_forcing.safetensors")
    p.add_argument(
        "--student", default="weights/toy_ode_regression.safetensors", help="weights to start at"
    )
    p.add_argument("--window", type=int, default=4, help="blocks remembered in the rollouts")
    p.add_argument("--history", choices=("own", "true"), default="own", help="true: the control")
    p.add_argument(
        "--exit", choices=("shared", "own"), default="shared",
        help="own: every block of a rollout ends after a random pass of its own",
    )  # fmt: skip
    args = training_parts.parse(p, dmd.STEPS)
    if args.history == "true" and not cli.find_config(args.config or "toy").is_toy:
        raise ValueError(f"--history true: --config {args.config} has prompts, but no true clips")
    codec = toy_codec.load() if args.history == "true" else None
    share_exit = args.exit == "shared"
    make = functools.partial(rolled_out, window=args.window, codec=codec, share_exit=share_exit)
    dmd.distil(p, args, args.student, True, make)


if __name__ == "__main__":
    cli.run(main)
