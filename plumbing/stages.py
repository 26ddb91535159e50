"""The command line and the set-up that the three stages share, for the toy and for the full size.

The stages are the same code at both sizes. These things differ:

                 toy                                      full size
    weights      files of this repository                 files of LTX-2, and those written here
    prompts      words of random clips                    a folder of features (full_size/text.py)
    precision    float32                                  layers in bfloat16, trained weights and
                                                          averages in float32
    activations  kept                                     recomputed in the backward pass
    steps        as released, batches of 8                as in the paper, batches of 32

A stage runs in one process or, under torchrun, in several.
"""

import contextlib

import config
from plumbing import cli, processes, trainer

BATCH = 8, 32  # clips: toy, full size (paper)


def add_options(p, steps, name):
    """Add the options that all stages have; `steps` is a pair: toy, full size."""
    p.add_argument(
        "--steps", type=int, help=f"training steps; default {steps[0]}, at full size {steps[1]}"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--config", help="config of the student: toy (default), toy_released, ltx2, full, ..."
    )
    p.add_argument("--prompts", help="at full size: a folder made by full_size/text.py")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default cpu; cuda: under torchrun")
    p.add_argument(
        "--batch", type=int,
        help=f"clips, of all processes together; default {BATCH[0]}, at full size {BATCH[1]}",
    )  # fmt: skip
    p.add_argument("--run", default=f"runs/{name}", help="folder of the state; resumed if there")
    p.add_argument("--out", help=f"{trainer.ABOUT_OUT}; default RUN.safetensors")


def parse(p, steps):
    """Parse the command line; fill in the defaults that depend on the size."""
    args = p.parse_args()
    cfg = cli.find_config(args.config or "toy")
    args.steps = steps[not cfg.is_toy] if args.steps is None else args.steps
    args.batch = BATCH[not cfg.is_toy] if args.batch is None else args.batch
    args.out = args.out or f"{args.run.rstrip('/')}.safetensors"
    return args


@contextlib.contextmanager
def set_up(args, is_causal):
    """Context of a training: check its places, join the processes, open the source of its parts.

    Raises ValueError, in one line, for anything missing or contradictory.
    """
    trainer.check_places(args.run, args.out)
    with processes.joined(args.device or "cpu"):
        yield open_source(args, is_causal)


def open_source(args, is_causal):
    """Where the weights and prompts of a training come from.

    is_causal   the student has blocks and sinks of its own; False: it has its teacher's shape
    """
    cfg = cli.find_config(args.config or "toy")
    if cfg.is_toy:
        from toy.source import TrainingSource

        _check_toy(cfg, args.prompts, is_causal)
        return TrainingSource(cfg if is_causal else None)
    if not processes.is_sharded():
        raise ValueError(f"--config {cfg.name}: start it by torchrun, even on a single GPU")
    if not args.prompts:
        raise ValueError(f"--config {cfg.name} needs --prompts: a folder made by full_size/text.py")
    from full_size.source import TrainingSource

    return TrainingSource(cfg, args.prompts)


def _check_toy(cfg, prompts, is_causal):
    """Reject options that would be ignored, and configs that no student has."""
    if prompts:
        raise ValueError(f"--prompts {prompts}: the toy draws its own; expected --config full")
    if not is_causal and cfg != config.TOY:
        raise ValueError(f"--config {cfg.name}: this student is as its teacher; leave --config out")
    if is_causal and cfg == config.TOY_TEACHER:
        raise ValueError(f"--config {cfg.name} has no blocks; expected toy or toy_released")
