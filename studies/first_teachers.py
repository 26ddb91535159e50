"""What should come before stage III? Regression, causal flow matching or consistency.

    python -m studies.first_teachers    three trainings and stage III after each, two seeds; 90 min
    python -m studies.first_teachers --only "consistency, seed 0" --clips 16

Stage III needs a student that streams at all (results/README.md). Each of these trainings makes one
from a bidirectional model, in about equal minutes, with the recipe of stage II:

regression             as stage II: the student of stage I learns the end points of its own
                       trajectories, under block-causal masks (ode_regression.py)
causal flow matching   the teacher goes on to learn flow matching of real clips, under block-causal
                       masks. Each block has a noise level of its own, and is clean with the same
                       probability as in stage II (diffusion forcing)
consistency            the teacher learns to predict the same clean block from two neighbouring
                       noise levels of the student, behind the real past (teacher forcing). From the
                       lowest level it predicts the real block. In the literature, a step of the
                       teacher leads to the next level, and an averaged student makes the goal

The last two need no stage I. They learn from new clips, the regression from 384 trajectories.

Expected, from the literature: causal flow matching wins, since a causal student of few steps should
start from a causal model of many. Refuted if, after stage III, neither its F1 nor its identity is
above that of regression by more than the 95 % intervals, in both seeds.

All streams take four passes a block, without guidance. Before stage III this is too little for a
model of flow matching. Metrics are those of compare.py. Trainings resume, and finished rows are
kept.
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
from studies import ablations, compare, evaluate, pasts
from toy import codec as toy_codec
from toy import world
from toy.source import TOY_PROMPTS, load_bidirectional, student_from, true_latents

CFG, BLOCKS = config.TOY, num_blocks(config.CLIP_SECONDS, config.TOY)


# ---- losses: each returns {"loss": ...} for a step ----


def real_clips(recipe, step):
    """Return latents (video, audio) and captions of the real clips of a step."""
    first = ode_regression.FIRST_SEED + (recipe.seed * recipe.steps + step) * recipe.batch
    seeds = range(first, first + recipe.batch)  # the teacher has not seen them
    clips = world.draw_clips(seeds)
    return true_latents(clips), TOY_PROMPTS.captions(world.caption_tokens(clips))


def regression(net, recipe, args):
    """As in stage II, on trajectories of the student of stage I."""
    few_step, path = load_bidirectional(args.few_step), f"{args.run}/trajectories.safetensors"
    data = ode_regression.load_or_draw_trajectories(
        path, few_step, args.walks, guidance=(1, 1), between=1, prompts=TOY_PROMPTS
    )
    return ode_regression.make_losses(net, data, recipe, TOY_PROMPTS)


def flow_matching(net, recipe, args):
    """Velocities of real clips under block-causal masks, one noise level per block."""
    span, of_frames = clip_span(BLOCKS, CFG), frame_blocks(BLOCKS, CFG)
    view, size = ode_regression.masked_view(CFG, BLOCKS), (recipe.batch, BLOCKS)

    def losses(step):
        (latents, captions), g = real_clips(recipe, step), trainer.generator(recipe.seed, step)
        by_block = teacher.draw_training_sigmas(recipe.batch * BLOCKS, g).view(size)
        is_clean = torch.rand(size, generator=g) < ode_regression.CLEAN_SHARE
        by_block = by_block.masked_fill(is_clean, 0)
        sigmas = [by_block[:, blocks] for blocks in of_frames]  # (B, F) of either stream
        noise = [model.noise_like(x, g) for x in latents]
        noisy = [
            model.add_noise(x, n, model.per_token(s, x)) for x, n, s in zip(latents, noise, sigmas)
        ]
        v = net(*noisy, *sigmas, net.project_text(*captions.features), span, view)
        errors = [
            ode_regression.masked_mean((p - (n - x)).square().mean(-1), model.per_token(s, x) > 0)
            for p, n, x, s in zip(v, noise, latents, sigmas)
        ]
        return {"loss": sum(errors)}

    return losses


def consistency(net, recipe, args):
    """Predictions from two neighbouring levels should agree, behind the real past."""
    levels = torch.tensor(net.cfg.sigmas)

    def losses(step):
        (latents, captions), g = real_clips(recipe, step), trainer.generator(recipe.seed, step)
        text, view, total = net.project_text(*captions.features), CachedView(CFG, BLOCKS), 0
        for k in range(BLOCKS):
            clean, span = block_of(latents, k, CFG), block_span(k, CFG)
            index = torch.randint(len(levels) - 1, (recipe.batch,), generator=g)
            high, low = levels[index], levels[index + 1]
            noise = [model.noise_like(x, g) for x in clean]

            def predicted(sigma):
                noisy = [model.add_noise(x, n, sigma[:, None]) for x, n in zip(clean, noise)]
                return model.predict_x0(net, *noisy, sigma, sigma, text, span, view)

            with torch.no_grad():  # at level 0 the prediction is its input, the real block
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
    "regression": (regression, False, 300),
    "causal flow matching": (flow_matching, True, 300),
    "consistency": (consistency, True, 190),
}
ARMS = {f"{name}, seed {seed}": (name, seed) for seed in range(2) for name in TRAININGS}


def first_student(name, seed, args):
    """Return the student of a training before stage III, from its state or trained to the end."""
    losses, from_teacher, steps = TRAININGS[name]
    folder = Path(args.run) / f"{name.replace(' ', '_')}_{seed}"
    start = load_bidirectional(args.real if from_teacher else args.few_step).state_dict()
    recipe = ode_regression.make_recipe(args.steps or steps, seed)
    learner = trainer.Learner(student_from(start, CFG, seed), recipe)
    settings = {"--walks": args.walks, **trainer.hashes(start=files.fingerprint(start))}
    run = trainer.Run({"student": learner}, args.command, folder, settings)
    print(f"{folder.name}: from step {run.step}")
    run.train(trainer.descent(learner, losses(learner.model, recipe, args)), 50, 50)
    return pasts.written(run, folder)


def measure(args) -> Callable:
    """Return a function: name of an arm -> train it, return its rows {"NAME, 0-5 s": metrics}."""
    codec, measured = toy_codec.load(), compare.both_ends(args.clips, args.seconds)

    def rows(arm):
        name, seed = ARMS[arm]
        student = first_student(name, seed, args)

        def streamed(when):
            make = partial(evaluate.from_stream, student, codec, args.seconds)
            return measured(f"{name}, {when} stage III, seed {seed}", make)

        found = streamed("before")  # first: stage III changes the student
        folder = Path(args.run) / f"{name.replace(' ', '_')}_{seed}_III"
        student = pasts.distilled(folder, student, pasts.Arm(seed=seed), args.distil, args)
        return {**found, **streamed("after")}

    return rows


def main():
    p = cli.parser(__doc__)
    evaluate.add_sizes(p, clips=48, seconds=20)
    about = "steps of each first training; default: equal minutes"
    p.add_argument("--steps", type=trainer.STEPS, help=about)
    p.add_argument("--distil", type=trainer.STEPS, default=40, help="steps of stage III")
    about = "trajectories of the regression"
    p.add_argument("--walks", type=cli.whole(8, 10**5), default=384, help=about)
    cli.add_weights(p, "--few-step", "weights/toy_dmd.safetensors", "student of stage I")
    cli.add_weights(p, "--real", "weights/toy_teacher.safetensors", "the teacher")
    p.add_argument("--only", nargs="*", metavar="NAME", help="only these trainings")
    p.add_argument("--run", default="runs/first_teachers", help="trainings and finished rows")
    p.add_argument("--out", default="results/first_teachers", help="writes .json, .md and .png")
    args = p.parse_args()
    names, args.command = cli.chosen(args.only, ARMS), cli.command(p, args, ("out", "run"))
    evaluate.check(args.seconds, args.out)
    ablations.measure_streams(names, measure(args), args, "first_teachers", pasts.TITLES)


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
