"""How much memory does each GPU need in the three stages at full size?  Computed, without a GPU.

    python -m benchmarks.training_memory     one clip on each of 8, 16 and 32 GPUs

Prints the table of full_size/README.md; full_size/memory.py tells how bytes are counted.
"""

import functools

import config
import dmd
import ode_regression
import self_forcing
import teacher
from full_size import memory
from masks import trained_window
from plumbing import cli

GPUS = 8, 16, 32


def stages() -> dict:
    """Return {stage: (networks, loss)}, as `memory.activation_bytes` takes them."""
    roll_out = functools.partial(self_forcing.rollout_clip, window=trained_window(config.FULL))
    regression = ode_regression.make_recipe(1, is_toy=False)
    return {
        "stage I: generator and critic, teacher": matching(config.LTX2, dmd.backward_simulation),
        "stage II: student": (
            [("student", config.FULL, regression)],
            ode_regression.trial_loss,
        ),
        "stage III: as stage I, and a rollout": matching(config.FULL, roll_out),
    }


def matching(cfg, make):
    """Networks and loss of distribution matching, for a student of this config."""
    generator, critic = dmd.make_recipes(1, seed=0, is_toy=False)
    nets = [
        ("teacher", config.LTX2, None),
        ("generator", cfg, generator),
        ("critic", config.LTX2, critic),
    ]
    return nets, functools.partial(dmd.generator_loss, teacher.GUIDANCE, make)


def main():
    cli.parser(__doc__).parse_args()
    print("| memory of each GPU, by number of GPUs | " + " | ".join(map(str, GPUS)) + " |")
    print("|---" * (len(GPUS) + 1) + "|")
    for name, (nets, loss) in stages().items():
        activations = memory.activation_bytes(nets, loss, batch=1)
        sizes = [memory.total(memory.training_rows(nets, activations, n)) for n in GPUS]
        print(f"| {name} | " + " | ".join(f"{size / memory.GB:.1f} GB" for size in sizes) + " |")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
