"""Stage II: the causal mask is put on, and the student regresses the teacher's trajectories.

A bidirectional model cannot simply be run causally: its attention has always been spread over the
future too. Here it learns to do without. The four-step student of dmd.py denoises whole clips from
noise; of each walk we keep the states at the noise levels, whose common end is the answer:

    noise = x_1 --> x_.91 --> x_.73 --> x_.42 --> x_0        one trajectory of its ODE

The student sees such a clip with **one noise level per block**, drawn independently, under the
block-causal masks of masks.py, and must name the clean end:

    block        0      1      2      3
    level       .42     0     .91    .42        loss = mean |x0(x_level) - x_0|^2, noisy blocks only

Independent levels teach every mixture of noisy and clean at once. A quarter of the blocks are clean
(CLEAN_SHARE), so that most pasts have a clean block in them; all of a long past is clean, as it is
in streaming, seldom. # Paper: uniform over all levels, the clean one included.

A block's level is shared by its video **and its own** audio. # Paper: the official code spreads
levels over audio by rounding 126 / 16 frames instead of by block edges (edges at 8, 32, 55, 79, 102
instead of 1, 26, 51, 76, 101), so a few audio tokens of every block carry their neighbour's level.
Both streams take the level of `masks.frame_blocks` here.

In a clip of five seconds the blocks just before tell all that the past has to say, so nothing
teaches a student to look back at block 0, the only one that a long stream never forgets. With
`--windows 0 1 2 3` every batch hides another part of what lies between (not in the paper).

The walk may as well be the many-step teacher's own, as in the later release of the paper's code,
which left stage I out; then it needs guidance, and small steps in between:

    python ode_regression.py         from the stage I student, see --help
    python ode_regression.py --teacher weights/toy_teacher.safetensors --guidance 3 5 --between 4
"""

import time
from pathlib import Path

import torch
from tqdm import tqdm

import config
import model
import teacher
from full_size import sharding, training_plan
from full_size.text import TOY_PROMPTS
from kv_cache import MaskedView
from masks import clip_span, four_masks, frame_blocks, num_blocks
from plumbing import cli, files
from plumbing import stages as training_parts
from plumbing import trainer as training

STEPS = 2500, 3000  # the toy's, and at full size (paper)
CLEAN_SHARE = 0.25  # share of blocks shown clean
# trajectories begin from captions the teacher was not trained on
FIRST_SEED = teacher.SEEDS * teacher.CLIPS_PER_SEED


# ---- trajectories ----


def fine_sigmas(sigmas, steps_between) -> list[float]:
    """The student's noise levels with more, evenly spaced, in between.

    >>> fine_sigmas((1.0, 0.5, 0.0), 2)
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    fine = [sigmas[0]]
    for high, low in zip(sigmas, sigmas[1:]):
        fine += [high + (low - high) * (i + 1) / steps_between for i in range(steps_between)]
    return fine


def draw_trajectories(net, sigmas, seeds, guidance=(1, 1), between=1, prompts=TOY_PROMPTS):
    """Teacher states at exactly the levels `sigmas`, for the captions of these seeds.

    # Simpler: evenly spaced steps, plain guidance. Both releases take 40 steps of LTX-2's schedule.
    The later one, whose walker is LTX-2 itself, also pushes away from what it says without the
    self-attention of layer 29 (by 1) and without listening to the other stream (by 3), and rescales
    the result (0.7). What the ends of walks lose by that is not measured.

    between   Euler steps from one kept level to the next
    ->        tokens (B, 3), video (B, len(sigmas), T_v, C_v), audio (B, len(sigmas), F_a, C_a);
              at full size the tokens are numbers of prompts, (B,)
    """
    tokens = prompts.numbers(seeds)
    captions = prompts.captions(sharding.rows(tokens))
    fine = fine_sigmas(sigmas, between)
    keep = range(0, len(fine), between)
    with sharding.shared_draws():
        _, states = teacher.sample(net, captions, fine, guidance=guidance, seed=seeds[0], keep=keep)
    return tokens, *(sharding.gathered(x).cpu() for x in states)


def load_trajectories(
    path, net, count, guidance, between, batch=16, sigmas=config.TOY.sigmas, prompts=TOY_PROMPTS,
    mark=None,
) -> dict:  # fmt: skip
    """Trajectories from a file, or drawn and written there: "tokens", "video", "audio".

    mark   tells the walker from others; by default a hash of its weights

    Raises ValueError for a file that is not whole, or whose trajectories are others.
    """
    # others in any of these, other trajectories
    about = {"count": count, "guidance": list(guidance), "between": between}
    about |= {"sigmas": list(sigmas), "prompts": prompts.mark}
    about["teacher"] = mark or files.fingerprint(net.state_dict())
    if Path(path).exists():
        tensors, _, made_by = files.read_weights(path)
        if made_by != about:
            raise ValueError(
                f"{path}: made with {made_by}, wanted {about}; remove it to start anew"
            )
        return tensors
    parts = []
    shown = dict(desc="trajectories", mininterval=5, disable=not sharding.is_first())
    with tqdm(total=count, unit="clip", **shown) as bar:
        for first in range(FIRST_SEED, FIRST_SEED + count, batch):
            seeds = range(first, min(first + batch, FIRST_SEED + count))
            parts.append(draw_trajectories(net, sigmas, seeds, guidance, between, prompts))
            bar.update(len(seeds))
    tensors = dict(zip(("tokens", "video", "audio"), map(torch.cat, zip(*parts))))
    if sharding.is_first():
        files.save_weights(path, tensors, net.cfg, about)
    return tensors


# ---- regression ----


def draw_levels(batch, blocks, levels, generator) -> torch.Tensor:
    """(B, N) index of every block's noise level; the last level is clean."""
    noisy = torch.randint(levels - 1, (batch, blocks), generator=generator)
    is_clean = torch.rand(batch, blocks, generator=generator) < CLEAN_SHARE
    return noisy.masked_fill(is_clean, levels - 1)


def states_at(trajectory, levels):
    """Each frame's state at its level: (B, L, F, ...), (B, F) indices -> (B, F, ...).

    >>> walk = torch.tensor([[[10, 20], [11, 21], [12, 22]]])            # 3 levels of 2 frames
    >>> states_at(walk, torch.tensor([[2, 0]]))
    tensor([[12, 20]])
    """
    index = levels.view(len(levels), 1, -1, *[1] * (trajectory.dim() - 3))
    return trajectory.gather(1, index.expand(-1, -1, -1, *trajectory.shape[3:])).squeeze(1)


def regression_losses(net, trajectories, levels, sigmas, view):
    """Mean squared error of x0 over the noisy elements of video and of audio.

    trajectories   `Captions`, video (B, L, T_v, C_v), audio (B, L, F_a, C_a)
    levels         (B, N) index into sigmas, one per block
    view           what may be attended to: a MaskedView of the block-causal masks
    """
    captions, video, audio = trajectories
    span = clip_span(levels.shape[1], net.cfg)
    level_v, level_a = (levels[:, blocks] for blocks in frame_blocks(levels.shape[1], net.cfg))
    table = torch.tensor(sigmas, device=levels.device)
    sigma_v, sigma_a = table[level_v], table[level_a]
    video = video.unflatten(2, (len(span.video), -1))  # (B, L, F_v, rows * columns, C_v)
    noisy = states_at(video, level_v).flatten(1, 2), states_at(audio, level_a)
    text = net.project_text(*captions.features)
    x0 = model.predict_x0(net, *noisy, sigma_v, sigma_a, text, span, view)
    ends = video[:, -1].flatten(1, 2), audio[:, -1]
    return [
        masked_mean((p - end).square().mean(-1), model.per_token(s, p) > 0)
        for p, end, s in zip(x0, ends, (sigma_v, sigma_a))
    ]


def masked_mean(x, mask):
    """Mean of x where mask; 0 where there is nothing.

    Several processes divide by what they have on average: the mean of theirs is then the batch's.
    """
    return (x * mask).sum() / sharding.averaged(mask.sum()).clamp(min=1)


def losses_of(
    net, data, recipe, prompts=TOY_PROMPTS, seconds=teacher.SECONDS, weights=(1, 1),
    windows=(None,),
):  # fmt: skip
    """The function that `training.Run.train` minimises.

    weights   of video's loss and of audio's  # Paper: the first release has 1 and 0.16
    windows   of the masks (masks.may_attend), of which every batch draws one
    """
    blocks = num_blocks(seconds, net.cfg)
    views = [masked_view(net.cfg, blocks, window) for window in windows]
    batch = sharding.share_of(recipe.batch)

    def losses(step):
        g = training.generator(recipe.seed, step)
        rows = torch.randint(len(data["tokens"]), (batch,), generator=g).cpu()
        levels = draw_levels(batch, blocks, len(net.cfg.sigmas), g)
        view = views[torch.randint(len(views), (), generator=g)]
        states = [data[name][rows].to(sharding.device()) for name in ("video", "audio")]
        chosen = prompts.captions(data["tokens"][rows]), *states
        video, audio = regression_losses(net, chosen, levels, net.cfg.sigmas, view)
        loss = weights[0] * video + weights[1] * audio
        return {"loss": loss, "video": video, "audio": audio}

    return losses


def masked_view(cfg, blocks, window=None) -> MaskedView:
    """What a clip of so many blocks may attend to, where this process computes."""
    masks = four_masks(cfg, blocks, window)
    return MaskedView({site: mask.to(sharding.device()) for site, mask in masks.items()})


def recipe_of(steps, seed=0, batch=8, is_toy=True):
    """How the student learns.

    # Paper: AdamW at 2e-5; betas, and constant after a warm-up of 100 steps, as in the first
    release. Gradients are clipped at 1, as in the later one; the first clips at 10. Neither
    averages weights here, as far as we know; we ship a mean of the last hundred steps or so.
    """
    if is_toy:
        return training.Recipe(steps, batch, seed, muon_lr=0.005, adam_lr=5e-4, ema=0.98)
    full = dict(muon_lr=0, adam_lr=2e-5, betas=(0.9, 0.999), warmup=100, decay=0.0, ema=0.99)
    return training.Recipe(steps, batch, seed, **full)


def trial_loss(net, captions, generator):
    """The loss of made-up walks, to see what it takes (full_size/memory.py)."""
    cfg, batch = net.cfg, len(captions)
    blocks, levels = num_blocks(teacher.SECONDS, cfg), len(cfg.sigmas)
    ends = model.draw_noise(batch, clip_span(blocks, cfg), cfg, generator)
    walks = [x[:, None].expand(-1, levels, -1, -1) for x in ends]
    drawn = draw_levels(batch, blocks, levels, generator)
    view = MaskedView(four_masks(cfg, blocks))
    return sum(regression_losses(net, (captions, *walks), drawn, cfg.sigmas, view))


def options():
    """The command line."""
    p = cli.parser(__doc__)
    p.add_argument(
        "--teacher",
        default="weights/toy_dmd.safetensors",
        help="walks; weights to start at",
    )
    p.add_argument("--clips", type=int, default=768, help="walks to draw")
    cli.add_guidance(p, (1.0, 1.0), "of the walks")
    cli.add_pair(p, "--loss-weights", (1.0, 1.0), "of the two streams")
    p.add_argument(
        "--windows", nargs="+", type=int, metavar="W",
        help="blocks that may be seen besides block 0 and one's own, one of these for every batch; "
        "default all",
    )  # fmt: skip
    p.add_argument("--between", type=int, default=1, help="Euler steps from one level to the next")
    p.add_argument("--run", default="runs/ode", help="folder of walks and state; resumed if there")
    out = "weights/toy_ode_regression.safetensors"
    p.add_argument("--out", default=out, help=training.ABOUT_OUT)
    training_parts.add_options(p, STEPS)
    return p


def regress(p, args):
    """Draw the walks, train on them, ship the student."""
    parts, start = training_parts.parts_for(args, is_causal=True), time.perf_counter()
    recipe = recipe_of(args.steps, args.seed, args.batch, parts.is_toy)
    walker = parts.find(args.teacher)
    student = parts.find(args.teacher, parts.cfg, args.seed)
    if not parts.is_toy:
        share = sharding.share_of(recipe.batch)
        training_plan.check([("student", student.cfg, recipe)], trial_loss, share)
    data = load_trajectories(
        f"{args.run}/trajectories.safetensors", walker.load(learns=False),
        count=args.clips, guidance=args.guidance, between=args.between,
        sigmas=student.cfg.sigmas, prompts=parts.prompts, mark=walker.mark,
    )  # fmt: skip
    print(f"trajectories ready after {time.perf_counter() - start:.0f} s")
    learner = training.Learner(student.load(learns=True), recipe)
    marks = {args.teacher: walker.mark}
    run = training.Run({"student": learner}, cli.command(p, args), args.run, marks)
    losses = losses_of(
        learner.model, data, recipe, parts.prompts,
        weights=args.loss_weights, windows=args.windows or [None],
    )  # fmt: skip
    run.train(training.descent(learner, losses))
    run.ship(args.out, parts.write, parts.dtype)


def main():
    p = options()
    args = training_parts.parse(p, STEPS)
    for name, value in (("--clips", args.clips), ("--between", args.between)):
        if value < 1:
            raise ValueError(f"{name} {value}: expected 1 or more")
    if args.windows and (least := min(args.windows)) < 0:
        raise ValueError(f"--windows {least}: expected 0 or more")
    training.check_places(args.run, args.out)
    with sharding.processes(args.device or "cpu"):
        regress(p, args)


if __name__ == "__main__":
    cli.run(main)
