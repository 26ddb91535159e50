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
from benchmarks import page
from full_size import memory
from masks import trained_window
from plumbing import cli

GPUS = 8, 16, 32


def stages() -> dict:
    """Return {stage: (networks, loss)}, as `memory.activation_bytes` takes them."""
    generator, critic = dmd.make_recipes(1, seed=0, is_toy=False)

    def matching(cfg, make):
        nets = [("teacher", config.LTX2, None), ("generator", cfg, generator)]
        loss = functools.partial(dmd.generator_loss, teacher.GUIDANCE, make)
        return [*nets, ("critic", config.LTX2, critic)], loss

    roll_out = functools.partial(self_forcing.rollout_clip, window=trained_window(config.FULL))
    student = "student", config.FULL, ode_regression.make_recipe(1, is_toy=False)
    return {
        "stage I: generator and critic, teacher": matching(config.LTX2, dmd.backward_simulation),
        "stage II: student": ([student], ode_regression.trial_loss),
        "stage III: as stage I, and a rollout": matching(config.FULL, roll_out),
    }


def main():
    cli.parser(__doc__).parse_args()
    rows = []
    for name, (nets, loss) in stages().items():
        activations = memory.activation_bytes(nets, loss, batch=1)
        sizes = [memory.total(memory.training_rows(nets, activations, n)) for n in GPUS]
        rows.append([name, *(f"{size / memory.GB:.1f} GB" for size in sizes)])
    print(page.table(["memory of each GPU, by number of GPUs", *map(str, GPUS)], rows))


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
