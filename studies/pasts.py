"""Which past should stage III train behind? Own or true blocks, with or without a refresh.

    python -m studies.pasts past       12 trainings of 6 to 9 minutes: what should the cache hold?
    python -m studies.pasts refresh    4 trainings of 8 minutes: can the refresh go?
    python -m studies.pasts past --only "1 pass, own past, seed 0" --clips 16

All students start from the shipped one of stage II. They differ in the rollouts that stage III
trains on (self_forcing.py). A seed is that of stage III: captions, noise, exit passes.

past       The cache holds the blocks that the student has made itself (self-forcing), those of a
           real clip (teacher forcing), or real blocks that the student has denoised again from the
           level .73, each behind the blocks resampled before it (self-resampling; a student of one
           pass does not train at this level). With four passes a block F1 hardly drifts, and in
           one seed own and true past had the same F1 (results/README.md). With one pass it drifts.
           Expected: then the own past pays. Refuted if, after 15 seconds, both F1 and identity of
           the students with own and with true past have overlapping 95 % intervals, in both seeds,
           for one pass as for two.
refresh    Every block takes four passes, then the refresh writes the keys and values of the clean
           block: a fifth of all passes. Without it the cache keeps those of the last pass. Students
           trained with and without the refresh are streamed with and without it.
           Expected: a student trained without the refresh streams as well without it as the other
           one with it. Refuted if, in both seeds, its F1 is lower, and the intervals do not
           overlap.

Training ends a block at a random pass, but a stream always ends at the last one and keeps its keys.
So training without the refresh runs one pass at the last level in its place, with fresh noise.

Metrics are those of compare.py. Trainings resume, and finished rows are kept.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import nn

import config
import dmd
import model
import self_forcing
import teacher
from kv_cache import CachedView
from masks import block_span, num_blocks
from plumbing import cli, files, trainer
from rollout import Block, block_of, denoise, few_step_sigmas, refresh, whole_clip
from studies import ablations, compare, evaluate
from toy import codec as toy_codec
from toy.source import TOY_PROMPTS, load_bidirectional, true_latents

LEVEL = config.FOUR_STEPS[2]  # .73, from which real blocks are denoised again


# ---- rollouts to train on ----


@torch.no_grad()
def resampled(net, captions, generator, clips):
    """Denoise the blocks of real clips again, from LEVEL, each behind those resampled before it."""
    truth, cfg, made = true_latents(clips), net.cfg, []
    blocks, text = num_blocks(config.CLIP_SECONDS, cfg), net.project_text(*captions.features)
    view, level = CachedView(cfg, blocks), torch.full((len(captions), 1), LEVEL)
    for k in range(blocks):
        span, clean = block_span(k, cfg), block_of(truth, k, cfg)
        noisy = [model.add_noise(x, model.noise_like(x, generator), level) for x in clean]
        x0 = denoise(net, noisy, (LEVEL, 0.0), text, span, view, generator)
        refresh(net, x0, text, span, view)
        view.next_block()
        made.append(Block(k, *x0))
    return whole_clip(made)


class LastLevelKept(nn.Module):
    """A student in training whose refresh is replaced by a pass at its last noise level."""

    def __init__(self, net, generator):
        super().__init__()
        self.net, self.cfg, self.project_text = net, net.cfg, net.project_text
        self.generator = generator

    def forward(self, video, audio, sigma_video, sigma_audio, *others):
        if not sigma_video.any():  # a refresh
            sigma_video = sigma_audio = torch.full_like(sigma_video, self.cfg.sigmas[-2])
            level, clean = sigma_video[:, None], (video, audio)
            noise = [model.noise_like(x, self.generator) for x in clean]
            video, audio = (model.add_noise(x, n, level) for x, n in zip(clean, noise))
        return self.net(video, audio, sigma_video, sigma_audio, *others)


class Arm(NamedTuple):
    """A training of stage III."""

    passes: int = 4  # per block
    past: str = "own"  # own, true, resampled
    has_refresh: bool = True
    seed: int = 0

    def make(self, net, clips, captions, generator):
        """Make training clips, for `dmd.make_update`."""
        again = partial(resampled, net, captions, generator)
        history = {"own": None, "true": true_latents, "resampled": again}[self.past]
        student = net if self.has_refresh else LastLevelKept(net, generator)
        return self_forcing.rollout_clip(student, clips, captions, generator, history=history)


# ---- training ----


def distilled(folder, student, arm, steps, args):
    """Return the student after stage III, from weights in the folder or trained to the end.

    student   the one to start at; it changes
    """
    real, critic = (load_bidirectional(args.real) for _ in range(2))
    ids = {"student": student, "real": real}
    hashes = trainer.hashes(**{k: files.fingerprint(x.state_dict()) for k, x in ids.items()})
    student.cfg = replace(student.cfg, sigmas=few_step_sigmas(student.cfg, arm.passes))
    learners = dmd.make_learners(student, critic, dmd.make_recipes(steps, arm.seed))
    run = trainer.Run(learners, args.command, folder, {**arm._asdict(), **hashes})
    print(f"{folder.name}: from step {run.step}")
    make, draw = arm.make, TOY_PROMPTS.draw
    real.requires_grad_(False)
    update = dmd.make_update(*learners.values(), real, teacher.GUIDANCE, make, draw)
    run.train(update, print_every=10, save_every=10)
    return written(run, folder)


def written(run, folder):
    """Write the averaged student of a finished training; return it."""
    weights = folder / "student.safetensors"
    run.write_student(weights)
    return model.load(weights)


# ---- experiments ----

SEEDS = 2
PASTS = {  # one seed after the other
    f"{n} pass{'es' * (n > 1)}, {past} past, seed {seed}": Arm(n, past, seed=seed)
    for seed in range(SEEDS)
    for n in (1, 2)
    for past in ("own", "true", "resampled")
}
REFRESHES = {
    f"trained {word} refresh, seed {seed}": Arm(has_refresh=word == "with", seed=seed)
    for seed in range(SEEDS)
    for word in ("with", "without")
}
EXPERIMENTS = {"past": PASTS, "refresh": REFRESHES}
TITLES = {"f1": "F1", "whole": "whole balls", "kept": "identity kept", "onsets_rate": "onsets"}


def measure(args) -> Callable:
    """Return a function: name of an arm -> train it, return its rows {"NAME, 0-5 s": metrics}."""
    codec, measured = toy_codec.load(), compare.both_ends(args.clips, args.seconds)

    def rows(name):
        arm, found = EXPERIMENTS[args.experiment][name], {}
        folder = Path(args.run) / name.replace(", ", "_").replace(" ", "_")
        net = distilled(folder, model.load(args.student), arm, args.steps, args)
        streamed = {"": net}
        if args.experiment == "refresh":
            streamed = {", streamed with": net, ", streamed without": compare.WithoutRefresh(net)}
        training, _, seed = name.rpartition(", ")
        for how, student in streamed.items():
            make = partial(evaluate.from_stream, student, codec, args.seconds)
            found |= measured(f"{training}{how}, {seed}", make)
        return found

    return rows


def main():
    p = cli.parser(__doc__)
    p.add_argument("experiment", choices=tuple(EXPERIMENTS))
    evaluate.add_sizes(p, clips=48, seconds=20)
    about = "steps of each training; the released student has 150"
    p.add_argument("--steps", type=trainer.STEPS, default=50, help=about)
    about = "student of stage II, at which all start"
    cli.add_weights(p, "--student", "weights/toy_ode_regression.safetensors", about)
    cli.add_weights(p, "--real", "weights/toy_teacher.safetensors", "the teacher")
    p.add_argument("--only", nargs="*", metavar="NAME", help="only these trainings")
    p.add_argument("--run", default="runs/pasts", help="trainings and finished rows")
    p.add_argument("--out", help="default: results/EXPERIMENT_in_training")
    args = p.parse_args()
    names = cli.chosen(args.only, EXPERIMENTS[args.experiment])
    args.command = cli.command(p, args, ("experiment", "out", "run")) + f" -- {args.experiment}"
    args.out = args.out or f"results/{args.experiment}_in_training"
    evaluate.check(args.seconds, args.out)
    ablations.measure_streams(names, measure(args), args, args.experiment, TITLES)


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
