"""What should come before stage III? Regression, causal flow matching or consistency.

    python -m studies.first_teachers    three trainings and stage III behind each, two seeds; 90 min
    python -m studies.first_teachers --only "consistency, seed 0" --clips 16

Stage III needs a student that streams at all (results/README.md). Each of these trainings makes one
from a bidirectional model, in about equal minutes, with the recipe of stage II:

regression             as stage II: the student of stage I learns the end points of its own
                       trajectories, under block-causal masks (ode_regression.py)
causal flow matching   the teacher goes on to learn flow matching of real clips, under block-causal
                       masks, with one noise level per block (diffusion forcing). Needs no stage I
consistency            the teacher learns, behind true blocks, to predict the same clean block from
                       two neighbouring noise levels of the student. At the lowest level, the
                       prediction is compared with the real block. Needs no stage I

Expected, from the literature: causal flow matching wins, since a causal student of few steps should
start from a causal model of many. Refuted if, behind stage III, its F1 or identity does not exceed
those of regression by more than the 95 % intervals, in both seeds.

All streams take four passes a block; before stage III that is too few for a model of flow matching.
Metrics are those of compare.py. Trainings resume, and finished rows are kept.
"""

from functools import partial
from pathlib import Path
from typing import Callable

import torch

import config
import model
import ode_regression
import teacher
from kv_cache import CachedView
from masks import block_span, clip_span, frame_blocks, num_blocks
from plumbing import cli, files, trainer
from rollout import block_of, refresh
from studies import ablations, compare, evaluate, pasts, plots
from toy import codec as toy_codec
from toy.source import TOY_PROMPTS, load_bidirectional, student_from
from toy.training import TrainingClips

CFG, BLOCKS = config.TOY, num_blocks(config.CLIP_SECONDS, config.TOY)


# ---- losses: each returns {"loss": ...} for a step ----


def real_clips(recipe):
    """Return a function: step -> generator, latents and captions of real clips."""
    examples = TrainingClips()

    def draw(step):
        g = trainer.generator(recipe.seed, step)
        first = ode_regression.FIRST_SEED + (recipe.seed * recipe.steps + step) * recipe.batch
        return g, *examples(range(first, first + recipe.batch), g)

    return draw


def regression(net, recipe, args):
    """As in stage II, on trajectories of the student of stage I."""
    few_step, path = load_bidirectional(args.few_step), f"{args.run}/trajectories.safetensors"
    data = ode_regression.load_or_draw_trajectories(
        path, few_step, args.walks, guidance=(1, 1), between=1, prompts=TOY_PROMPTS
    )
    return ode_regression.make_losses(net, data, recipe, TOY_PROMPTS)


def flow_matching(net, recipe, args):
    """Velocities of real clips under block-causal masks, one noise level per block."""
    draw, view = real_clips(recipe), ode_regression.masked_view(CFG, BLOCKS)
    span, of_frames = clip_span(BLOCKS, CFG), frame_blocks(BLOCKS, CFG)

    def losses(step):
        g, latents, captions = draw(step)
        by_block = teacher.draw_training_sigmas(recipe.batch * BLOCKS, g).view(-1, BLOCKS)
        sigmas = [by_block[:, blocks] for blocks in of_frames]  # (B, F) of either stream
        noise = [model.noise_like(x, g) for x in latents]
        noisy = [
            model.add_noise(x, n, model.per_token(s, x)) for x, n, s in zip(latents, noise, sigmas)
        ]
        v = net(*noisy, *sigmas, net.project_text(*captions.features), span, view)
        errors = [(p - (n - x)).square().mean() for p, n, x in zip(v, noise, latents)]
        return {"loss": sum(errors)}

    return losses


def consistency(net, recipe, args):
    """Predictions from two neighbouring levels should agree, behind the true past."""
    draw, levels = real_clips(recipe), torch.tensor(net.cfg.sigmas)

    def losses(step):
        g, latents, captions = draw(step)
        text, view, total = net.project_text(*captions.features), CachedView(CFG, BLOCKS), 0
        for k in range(BLOCKS):
            clean, span = block_of(latents, k, CFG), block_span(k, CFG)
            index = torch.randint(len(levels) - 1, (recipe.batch,), generator=g)
            high, low = levels[index], levels[index + 1]
            noise = [model.noise_like(x, g) for x in clean]

            def predicted(sigma):
                noisy = [model.add_noise(x, n, sigma[:, None]) for x, n in zip(clean, noise)]
                return model.predict_x0(net, *noisy, sigma, sigma, text, span, view)

            with torch.no_grad():  # at level 0, the prediction is its input: the real block
                goal = predicted(low)
            errors = [(p - x).square().mean() for p, x in zip(predicted(high), goal)]
            total = total + sum(errors) / BLOCKS
            refresh(net, clean, text, span, view)
            view.next_block()
        return {"loss": total}

    return losses


# ---- trainings ----

# losses, whether it starts at the teacher, and its steps in about equal minutes
TRAININGS = {
    "regression": (regression, False, 400),
    "causal flow matching": (flow_matching, True, 400),
    "consistency": (consistency, True, 250),
}
ARMS = {f"{name}, seed {seed}": (name, seed) for seed in range(2) for name in TRAININGS}


def first_student(name, seed, args):
    """Return the student of a training before stage III; train it if its weights are missing."""
    folder = Path(args.run) / f"{name.replace(' ', '_')}_{seed}"
    weights = folder / "student.safetensors"
    if not weights.exists():
        losses, from_teacher, steps = TRAININGS[name]
        start = load_bidirectional(args.real if from_teacher else args.few_step).state_dict()
        recipe = ode_regression.make_recipe(args.steps or steps, seed)
        learner = trainer.Learner(student_from(start, CFG, seed), recipe)
        hashes = trainer.hashes(start=files.fingerprint(start))
        run = trainer.Run({"student": learner}, args.command, folder, hashes)
        print(f"{name}, seed {seed}: from step {run.step}")
        run.train(trainer.descent(learner, losses(learner.model, recipe, args)), 50, 50)
        run.write_student(weights)
    return model.load(weights)


def measure(args) -> Callable:
    """Return a function: name of an arm -> train it, return its rows {"NAME, 0-5 s": metrics}."""
    codec, seeds = toy_codec.load(), evaluate.held_out(args.clips)
    times = [(0, 5), (args.seconds - 5, args.seconds)]
    truth = evaluate.measure_truth(args.seconds, seeds, times)

    def rows(arm):
        name, seed = ARMS[arm]
        first, found = first_student(name, seed, args), {}
        folder = Path(args.run) / f"{name.replace(' ', '_')}_{seed}_III"
        again = first_student(name, seed, args)  # another copy: stage III changes it
        last = pasts.distilled(folder, again, pasts.Arm(seed=seed), args.distil, args)
        for how, net in (("before", first), ("behind", last)):
            make = partial(evaluate.from_stream, net, codec, args.seconds)
            full = f"{name}, {how} stage III, seed {seed}"
            found |= compare.by_interval(full, make, seeds, times, truth)
        return found

    return rows


def main():
    p = cli.parser(__doc__)
    evaluate.add_sizes(p, clips=48, seconds=20)
    about = "steps of each first training; default: equal minutes"
    p.add_argument("--steps", type=trainer.STEPS, help=about)
    p.add_argument("--distil", type=trainer.STEPS, default=50, help="steps of stage III")
    about = "trajectories of the regression"
    p.add_argument("--walks", type=cli.whole(8, 10**5), default=384, help=about)
    cli.add_weights(p, "--few-step", "weights/toy_dmd.safetensors", "student of stage I")
    cli.add_weights(p, "--real", "weights/toy_teacher.safetensors", "the teacher")
    p.add_argument("--only", nargs="*", metavar="NAME", help="only these trainings")
    p.add_argument("--run", default="runs/first_teachers", help="trainings and finished rows")
    p.add_argument("--out", default="results/first_teachers", help="writes .json, .md and .png")
    args = p.parse_args()
    names, args.command = cli.chosen(args.only, ARMS), cli.command(p, args, ("out", "run"))
    args.ablation = "first_teachers"  # the name of the file of finished rows
    evaluate.check(args.seconds, args.out)
    results = ablations.measure_variants(names, measure(args), args)
    last = {name: row for name, row in results.items() if name.endswith(f"-{args.seconds} s")}
    evaluate.write(args, {"result": results}, evaluate.table(results), plots.draw_rows(last))


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
