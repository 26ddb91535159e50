"""The command line and the set-up of the three stages, for the toy and for the full size.

Both sizes run the same code. They differ in:

                 toy                          full size
    weights      files of this repository     files of LTX-2 and of earlier stages
    prompts      words of random clips        a folder of features (full_size/text.py)
    precision    float32                      layers in bfloat16, trained weights in float32
    activations  kept                         recomputed in the backward pass
    processes    one, or several by torchrun  one per GPU, by torchrun
"""

import contextlib

import config
from plumbing import cli, processes, trainer

BATCH = 8, 32  # clips: toy, full size (paper)


def add_options(p, steps, name):
    """Add the options that all stages have; `steps` is a pair: toy, full size."""
    # No defaults for numbers that depend on the size: `parse` fills them in.
    about = f"training steps; default {steps[0]}, at full size {steps[1]}"
    p.add_argument("--steps", type=trainer.STEPS, help=about)
    cli.add_seed(p, "random seed of the training", trainer.SEEDS - 1)
    p.add_argument(
        "--config", help="config of the student: toy (default), toy_released, ltx2, full, ..."
    )
    p.add_argument("--prompts", help="at full size: a folder made by full_size/text.py")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default cpu; cuda: under torchrun")
    p.add_argument(
        "--batch", type=cli.whole(1, 1024),
        help=f"clips, of all processes together; default {BATCH[0]}, at full size {BATCH[1]}",
    )  # fmt: skip
    p.add_argument("--run", default=f"runs/{name}", help="folder to save in and to resume from")
    p.add_argument("--out", help=f"{trainer.ABOUT_OUT}; default RUN.safetensors")


def parse(p, steps):
    args = p.parse_args()
    cfg = cli.find_config(args.config or "toy")
    args.steps = steps[not cfg.is_toy] if args.steps is None else args.steps
    args.batch = BATCH[not cfg.is_toy] if args.batch is None else args.batch
    args.out = args.out or f"{args.run.rstrip('/')}.safetensors"
    return args


def settings(args, source, **weights_ids) -> dict:
    """Return all that decides what a training does besides its recipes, for `trainer.Run`."""
    # Values as they are used: no paths, and defaults as if they had been given.
    leave_out = "steps", "batch", "seed", "device", "run", "out", "teacher", "student"
    used = {"--config": args.config or "toy", "--prompts": source.prompts.identity}
    return {**cli.options(args, leave_out), **used, **trainer.hashes(**weights_ids)}


@contextlib.contextmanager
def set_up(args, is_causal):
    """Check the places of a training, join its processes, open the source of its weights."""
    trainer.check_places(args.run, args.out)  # before hours of training
    with processes.joined(args.device or "cpu"):
        yield open_source(args, is_causal)


def open_source(args, is_causal):
    """Return the source of weights and prompts: `TrainingSource` of the toy or of the full size.

    is_causal   the student has blocks and sinks; False: it has the config of its teacher
    """
    cfg, prompts = cli.find_config(args.config or "toy"), args.prompts
    if cfg.is_toy:
        from toy.training import TrainingSource

        # Reject options that would be ignored, and configs that the student cannot have.
        name = cfg.name
        if prompts:
            raise ValueError(f"--prompts {prompts}: the toy draws its own; expected --config full")
        if not is_causal and cfg != config.TOY:
            raise ValueError(f"--config {name}: stage I uses its teacher's config; leave it out")
        if is_causal and cfg == config.TOY_TEACHER:
            raise ValueError(f"--config {name} has no blocks; expected toy or toy_released")
        return TrainingSource(cfg if is_causal else None)
    if not processes.is_sharded():
        raise ValueError(f"--config {cfg.name}: start it by torchrun, even on a single GPU")
    if not prompts:
        raise ValueError(f"--config {cfg.name} needs --prompts: a folder made by full_size/text.py")
    from full_size.source import TrainingSource

    return TrainingSource(cfg, prompts)
