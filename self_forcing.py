"""Self-forcing: train on what you generate yourself, block by block, as at inference (stage III).

In stage II, the past of a block is from a trajectory of the stage I student: right, but at other
noise levels. When the student streams, its past is its own output. It is clean because of the
refresh, but it has errors that training never showed. This mismatch is exposure bias. Self-forcing
trains the student on its own rollout (rollout.py).

One training step:

    1  draw captions, and the exit pass at which all blocks of this rollout will end
    2  roll out 5 seconds with the same caches as at inference; only the exit pass of each block
       carries a gradient, and none crosses from block to block: the cache returns detached history
    3  score the whole clip by the two bidirectional scores of dmd.py, as in stage I; backward pass
    4  update the critic on five new rollouts

No real clip is needed, captions are enough. The ablation `--history true` does use real clips:
every block is then conditioned on the real past (teacher forcing). Loss, steps and cost are the
same, so the difference measures the effect of self-forcing (small here: results/README.md).

Caption layers get a gradient: keys and values are computed once per rollout, and every exit pass
reads them. (Differs from the paper: the official code caches them detached, so its caption layers
learn nothing in this stage.)

    python self_forcing.py           from the stage II student; see --help
"""

import functools

import dmd
from config import CLIP_SECONDS
from kv_cache import CachedView
from masks import num_blocks
from plumbing import cli, stages
from rollout import rollout, whole_clip


def rollout_clip(net, clips, captions, generator, window=None, history=None, share_exit=True):
    """Training clips of stage III: the student's rollout; each block is the x0 of a random pass.

    window       blocks kept in the cache, besides block 0; None: all
    history      clips -> clean latents of the real clips, to be cached instead (teacher forcing)
    share_exit   False: every block ends after a random pass of its own
    """
    blocks, sigmas = num_blocks(CLIP_SECONDS, net.cfg), net.cfg.sigmas
    # One exit pass for all blocks: the blocks of the past are then equally far denoised
    # (Self-Forcing; same_step_across_blocks in OmniForcing).
    draws = 1 if share_exit else blocks
    exits = [dmd.draw_exit_step(sigmas, generator) for _ in range(draws)]
    text = net.project_text(*captions.features)
    rolled = rollout(
        net, lambda k: text, blocks, sigmas, generator,
        batch=len(captions),
        view=CachedView(net.cfg, blocks, window),
        exit_steps=exits * blocks if share_exit else exits,
        history=history(clips) if history else None,
    )  # fmt: skip
    return whole_clip(rolled)


def main():
    p = dmd.options(__doc__, "self_forcing")
    path = "weights/toy_ode_regression.safetensors"
    cli.add_weights(p, "--student", path, "weights to start at")
    about = "blocks kept in the cache in the rollouts"
    p.add_argument("--window", type=cli.whole(1, 1000), default=4, help=about)
    p.add_argument(
        "--history", choices=("own", "true"), default="own",
        help="what the cache holds: own = generated blocks, true = real clips (teacher forcing)",
    )  # fmt: skip
    p.add_argument(
        "--exit", choices=("shared", "own"), default="shared",
        help="the random pass that ends a block: one for all blocks of a rollout, or one per block",
    )  # fmt: skip
    args = stages.parse(p, dmd.STEPS)
    history = None
    if args.history == "true":
        if not cli.find_config(args.config or "toy").is_toy:
            raise ValueError(
                f"--history true: --config {args.config} has prompts, but no true clips"
            )
        from toy.source import true_latents as history
    make = functools.partial(
        rollout_clip, window=args.window, history=history, share_exit=args.exit == "shared"
    )
    dmd.distil(p, args, args.student, True, make)


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
