"""Stage II: the causal mask is put on, and the student regresses the teacher's trajectories.

A bidirectional model cannot simply be run causally: its attention has always been spread over the
future too. Here it learns to do without. The four-step student of dmd.py denoises whole clips from
noise; of each walk we keep the states at the noise levels, whose common end is the answer:

    noise = x_1 --> x_.91 --> x_.73 --> x_.42 --> x_0        one trajectory of its ODE

The student sees such a clip with **one noise level per block**, drawn independently, under the
block-causal masks of masks.py, and must name the clean end:

    block        0      1      2      3
    level       .42     0     .91    .42        loss = mean |x0(x_level) - x_0|^2, noisy blocks only

Independent levels teach every situation of streaming at once; the case that streaming meets, a
clean past before a noisy block, gets a share of its own (CLEAN_SHARE).

A block's level is shared by its video **and its own** audio. # Paper: the official code spreads
levels over audio by rounding 126 / 16 frames instead of by block edges (edges at 8, 32, 55, 79, 102
instead of 1, 26, 51, 76, 101), so a few audio tokens of every block carry their neighbour's level.
Both streams take the level of `masks.frame_blocks` here.

The walk may as well be the many-step teacher's own, as in the later release of the paper's code,
which left stage I out; then it needs guidance, and small steps in between:

    python ode_regression.py         from the stage I student, see --help
    python ode_regression.py --teacher weights/toy_teacher.safetensors --guidance 3 5 --between 4
"""

import time
from pathlib import Path

import torch
from tqdm import tqdm

import cli
import config
import files
import model
import teacher
import toy_world
import training
from kv_cache import MaskedView
from masks import clip_span, four_masks, frame_blocks, num_blocks

CLEAN_SHARE = 0.25  # share of blocks shown clean
FIRST_SEED = 10**8  # trajectories begin from captions the teacher was not trained on


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


def draw_trajectories(net, sigmas, seeds, guidance=(1, 1), between=1):
    """Teacher states at exactly the levels `sigmas`, for the captions of these seeds.

    between   Euler steps from one kept level to the next
    ->        tokens (B, 3), video (B, len(sigmas), T_v, C_v), audio (B, len(sigmas), F_a, C_a)
    """
    tokens = toy_world.caption_tokens(toy_world.draw_clips(seeds))
    fine = fine_sigmas(sigmas, between)
    keep = range(0, len(fine), between)
    _, (video, audio) = teacher.sample(
        net, tokens, fine, guidance=guidance, seed=seeds[0], keep=keep
    )
    return tokens, video, audio


def load_trajectories(path, net, count, guidance, between, batch=16) -> dict:
    """Trajectories from a file, or drawn and written there: "tokens", "video", "audio"."""
    about = {"count": count, "guidance": list(guidance), "between": between}
    about["teacher"] = files.fingerprint(net.state_dict())  # another teacher, other trajectories
    if Path(path).exists():
        tensors, _, made_by = files.read_weights(path)
        if made_by != about:
            raise ValueError(
                f"{path}: made with {made_by}, wanted {about}; remove it to start anew"
            )
        return tensors
    parts = []
    with tqdm(total=count, unit="clip", desc="trajectories", mininterval=5) as bar:
        for first in range(FIRST_SEED, FIRST_SEED + count, batch):
            seeds = range(first, min(first + batch, FIRST_SEED + count))
            parts.append(draw_trajectories(net, config.TOY.sigmas, seeds, guidance, between))
            bar.update(len(seeds))
    tensors = dict(zip(("tokens", "video", "audio"), map(torch.cat, zip(*parts))))
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

    trajectories   tokens (B, 3), video (B, L, T_v, C_v), audio (B, L, F_a, C_a)
    levels         (B, N) index into sigmas, one per block
    view           what may be attended to: a MaskedView of the block-causal masks
    """
    tokens, video, audio = trajectories
    span = clip_span(levels.shape[1], net.cfg)
    level_v, level_a = (levels[:, blocks] for blocks in frame_blocks(levels.shape[1], net.cfg))
    sigma_v, sigma_a = (torch.tensor(sigmas)[level] for level in (level_v, level_a))
    video = video.unflatten(2, (len(span.video), -1))  # (B, L, F_v, rows * columns, C_v)
    noisy = states_at(video, level_v).flatten(1, 2), states_at(audio, level_a)
    text = net.project_text(toy_world.caption_features(tokens))
    x0 = model.predict_x0(net, *noisy, sigma_v, sigma_a, text, span, view)
    ends = video[:, -1].flatten(1, 2), audio[:, -1]
    return [
        masked_mean((p - end).square().mean(-1), model.per_token(s, p) > 0)
        for p, end, s in zip(x0, ends, (sigma_v, sigma_a))
    ]


def masked_mean(x, mask):
    """Mean of x where mask; 0 where there is nothing."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def recipe_of(steps, seed=0):
    """How stage II is trained."""
    return training.Recipe(steps, batch=8, seed=seed, muon_lr=0.005, adam_lr=5e-4, ema=0.98)


def losses_of(net, data, recipe, seconds=teacher.SECONDS):
    """The function that `training.Run.train` minimises."""
    blocks = num_blocks(seconds, net.cfg)
    view = MaskedView(four_masks(net.cfg, blocks))

    def losses(step):
        g = training.generator(recipe.seed, step)
        rows = torch.randint(len(data["tokens"]), (recipe.batch,), generator=g)
        levels = draw_levels(recipe.batch, blocks, len(net.cfg.sigmas), g)
        chosen = [data[name][rows] for name in ("tokens", "video", "audio")]
        video, audio = regression_losses(net, chosen, levels, net.cfg.sigmas, view)
        return {"loss": video + audio, "video": video, "audio": audio}

    return losses


def student_from(tensors, cfg, seed=0):
    """A student that starts as the teacher; its sinks are new and keep their initial values."""
    net = model.build(cfg, seed)
    files.load_into(net, {**_own_sinks(net), **tensors}, "teacher")
    return net


def _own_sinks(net):
    return {n: p for n, p in net.state_dict().items() if n.startswith("sinks.")}


def main():
    p = cli.parser(__doc__)
    p.add_argument(
        "--teacher",
        default="weights/toy_dmd.safetensors",
        help="walks; weights to start at",
    )
    p.add_argument("--clips", type=int, default=768, help="walks to draw")
    cli.add_guidance(p, (1.0, 1.0), "of the walks")
    p.add_argument("--between", type=int, default=1, help="Euler steps from one level to the next")
    p.add_argument("--steps", type=int, default=500, help="training steps")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--run", default="runs/ode", help="folder of walks and state; resumed if there")
    p.add_argument("--out", default="weights/toy_ode_regression.safetensors", help="to write")
    args = p.parse_args()
    bidirectional, start = model.load(args.teacher), time.perf_counter()
    walks = f"{args.run}/trajectories.safetensors"
    data = load_trajectories(walks, bidirectional, args.clips, args.guidance, args.between)
    print(f"trajectories ready after {time.perf_counter() - start:.0f} s")
    net = student_from(bidirectional.state_dict(), config.TOY, args.seed)
    learner = training.Learner(net, recipe_of(args.steps, args.seed))
    run = training.Run({"student": learner}, cli.command(p, args), args.run)
    run.train(training.descent(learner, losses_of(net, data, learner.recipe)))
    run.ship(args.out)


if __name__ == "__main__":
    cli.run(main)
