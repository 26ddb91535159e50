"""How much memory does a GPU need for each stage at full size?  Computed, without a GPU.

    python -m benchmarks.training_memory            on 8, 16 and 32 GPUs, one clip each

Prints the table of README.md; `full_size/memory.py` says how bytes are counted.
"""

import functools

import config
import dmd
import ode_regression
import self_forcing
import teacher
from full_size import (
    memory,
    training_plan,
)
from plumbing import cli

GPUS = 8, 16, 32


def stages() -> dict:
    """What is in memory in each stage, and what an update computes."""
    recipes = dmd.recipes_of(2, 0, is_toy=False)

    def matched(cfg, make):
        return dmd.trial_of(config.LTX2, cfg, recipes, teacher.GUIDANCE, make)

    student = [("student", config.FULL, ode_regression.recipe_of(2, is_toy=False))]
    rolled_out = functools.partial(self_forcing.rolled_out, window=4)
    return {
        "stage I: generator and critic, teacher": matched(config.LTX2, dmd.backward_simulation),
        "stage II: student": (student, ode_regression.trial_loss),
        "stage III: as stage I, and a rollout": matched(config.FULL, rolled_out),
    }


def main():
    cli.parser(__doc__).parse_args()
    print("| memory of a GPU, of so many | " + " | ".join(map(str, GPUS)) + " |")
    print("|---" * (len(GPUS) + 1) + "|")
    for name, (nets, loss) in stages().items():
        activations = training_plan.activation_bytes(nets, loss, batch=1)
        needed = [memory.total(training_plan.rows(nets, activations, n)) for n in GPUS]
        print(f"| {name} | " + " | ".join(f"{size / memory.GB:.1f} GB" for size in needed) + " |")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
