"""Stage II: add the causal mask; the student regresses the end points of ODE trajectories.

A bidirectional model cannot simply run causally, because its attention has always used the future.
Here it learns to work without it. The student of dmd.py makes whole clips from noise, by Euler
steps without fresh noise. We keep the states at its noise levels. The last one, x_0, is the
regression target:

    noise = x_1 --> x_.91 --> x_.73 --> x_.42 --> x_0        one trajectory of its ODE

The student sees such a clip with **one noise level per block**, drawn independently (as in
Diffusion Forcing), under the block-causal masks of masks.py, and must predict the clean end:

    block        0      1      2      3
    level       .42     0     .91    .42        loss = mean |x0(x_level) - x_0|^2, noisy blocks only

Independent levels teach every mixture of noisy and clean blocks at once. Each block is clean with
probability 1/4 (CLEAN_SHARE), so most pasts contain a clean block. A long past is rarely clean as
a whole, although it always is in streaming. (Official code: uniform over all levels, so 1/4 in the
first release and 1/5 in the later one.)

A block's video **and its own audio** share a level. `masks.frame_blocks` gives the block of each
frame. (Differs from the paper: the official code spreads the levels over the audio by rounding
126 / 16 frames, not by block edges. Its edges are 8, 32, 55, 79, 102 instead of 1, 26, 51, 76, 101,
so a few audio tokens of every block carry their neighbour's level.)

In a clip of five seconds no block is evicted, so no example forces a student to use block 0, the
only block that a long stream keeps. With `--windows 0 1 2 3`, each batch draws one of these
windows, and blocks between block 0 and the window are masked (not in the paper; alone it brought no
gain: results/README.md). Block 0 keeps its position there; in a stream it moves.

Trajectories can also come from the many-step teacher, as in the later release, which has no stage
I. Then use guidance and several Euler steps per kept level:

    python ode_regression.py         from the stage I student; see --help
    python ode_regression.py --teacher weights/toy_teacher.safetensors --guidance 3 5 --between 4
"""

import time
from pathlib import Path

import torch
from tqdm import tqdm

import model
import teacher
from config import CLIP_SECONDS
from kv_cache import MaskedView
from masks import clip_span, four_masks, frame_blocks, num_blocks
from plumbing import cli, files, processes, stages, trainer

STEPS = 2500, 3000  # training steps: toy, full size (paper)
CLEAN_SHARE = 0.25  # probability that a block is clean
# first seed of captions that the teacher was not trained on
FIRST_SEED = teacher.SEEDS * teacher.CLIPS_PER_SEED


# ---- trajectories ----


def fine_sigmas(sigmas, steps_between) -> list[float]:
    """The student's noise levels, with `steps_between` even steps from each level to the next.

    >>> fine_sigmas((1.0, 0.5, 0.0), 2)
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    fine = [sigmas[0]]
    for high, low in zip(sigmas, sigmas[1:]):
        fine += [high + (low - high) * (i + 1) / steps_between for i in range(steps_between)]
    return fine


def draw_trajectories(net, sigmas, seeds, guidance, between, prompts):
    """A model's states at exactly the levels `sigmas`, for the captions of these seeds.

    between   Euler steps from one kept level to the next
    ->        tokens (B, 3), video (B, len(sigmas), T_v, C_v), audio (B, len(sigmas), F_a, C_a);
              at full size the tokens are indices of prompts, (B,)
    """
    # Simpler: even steps and plain guidance. Both releases take 40 steps of LTX-2's schedule. The
    # later one, which starts from LTX-2, also uses STG (layer 29, scale 1), modality guidance
    # (scale 3) and guidance rescale (0.7). The effect of leaving them out is not measured.
    tokens = prompts.numbers(seeds)
    captions = prompts.captions(processes.rows(tokens))
    fine = fine_sigmas(sigmas, between)
    keep = range(0, len(fine), between)
    with processes.shared_draws():
        _, states = teacher.sample(net, captions, fine, guidance=guidance, seed=seeds[0], keep=keep)
    return tokens, *(processes.gathered(x).cpu() for x in states)


def load_or_draw_trajectories(
    path, net, count, guidance, between, prompts, batch=16, sigmas=None, weights_id=None
) -> dict:
    """Read the trajectories of a file, or draw and write them: "tokens", "video", "audio".

    sigmas       levels to keep; default: those of the model that draws
    weights_id   identifies the weights of that model; default: a hash of them

    Raises ValueError for a file that is incomplete, or was made with other settings.
    """
    sigmas = sigmas or net.cfg.sigmas
    settings = {"--clips": count, "--guidance": list(guidance), "--between": between}
    settings |= {"sigmas": list(sigmas), "prompts": prompts.identity}
    settings["teacher"] = weights_id or files.fingerprint(net.state_dict())
    if Path(path).exists():
        tensors, _, made_with = files.read_weights(path)
        if wrong := trainer.differences(made_with, settings):
            raise ValueError(f"{path}: made with other settings ({wrong}); remove it to start anew")
        return tensors
    parts = []
    shown = dict(desc="trajectories", mininterval=5, disable=not processes.is_first())
    with tqdm(total=count, unit="clip", **shown) as bar:
        for first in range(FIRST_SEED, FIRST_SEED + count, batch):
            seeds = range(first, min(first + batch, FIRST_SEED + count))
            parts.append(draw_trajectories(net, sigmas, seeds, guidance, between, prompts))
            bar.update(len(seeds))
    tensors = dict(zip(("tokens", "video", "audio"), map(torch.cat, zip(*parts))))
    if processes.is_first():
        files.save_weights(path, tensors, net.cfg, settings)
    return tensors


# ---- regression ----


def draw_levels(batch, blocks, levels, generator) -> torch.Tensor:
    """Draw (B, N) noise level indices, one per block; the last of `levels` levels is clean."""
    noisy = torch.randint(levels - 1, (batch, blocks), generator=generator)
    is_clean = torch.rand(batch, blocks, generator=generator) < CLEAN_SHARE
    return noisy.masked_fill(is_clean, levels - 1)


def gather_states(trajectory, levels):
    """State of each frame at its level: (B, L, F, ...), (B, F) indices -> (B, F, ...).

    >>> trajectory = torch.tensor([[[10, 20], [11, 21], [12, 22]]])      # 3 levels of 2 frames
    >>> gather_states(trajectory, torch.tensor([[2, 0]]))
    tensor([[12, 20]])
    """
    index = levels.view(len(levels), 1, -1, *[1] * (trajectory.dim() - 3))
    return trajectory.gather(1, index.expand(-1, -1, -1, *trajectory.shape[3:])).squeeze(1)


def regression_losses(net, trajectories, levels, sigmas, view):
    """Mean squared error of x0 over the tokens of noisy blocks, for video and audio.

    trajectories   `Captions`, video (B, L, T_v, C_v), audio (B, L, F_a, C_a)
    levels         (B, N) indices into sigmas, one per block
    view           MaskedView of the block-causal masks
    """
    captions, video, audio = trajectories
    span = clip_span(levels.shape[1], net.cfg)
    level_v, level_a = (levels[:, blocks] for blocks in frame_blocks(levels.shape[1], net.cfg))
    sigma_of_level = torch.tensor(sigmas, device=levels.device)
    sigma_v, sigma_a = sigma_of_level[level_v], sigma_of_level[level_a]
    video = video.unflatten(2, (len(span.video), -1))  # (B, L, F_v, rows * columns, C_v)
    noisy = gather_states(video, level_v).flatten(1, 2), gather_states(audio, level_a)
    text = net.project_text(*captions.features)
    x0 = model.predict_x0(net, *noisy, sigma_v, sigma_a, text, span, view)
    ends = video[:, -1].flatten(1, 2), audio[:, -1]
    return [
        masked_mean((p - end).square().mean(-1), model.per_token(s, p) > 0)
        for p, end, s in zip(x0, ends, (sigma_v, sigma_a))
    ]


def masked_mean(x, mask):
    """Mean of x where the mask is True; 0 if it is nowhere True."""
    # With several processes, each divides by the mean count of all processes. The average of their
    # results is then the mean over the whole batch.
    return (x * mask).sum() / processes.averaged(mask.sum()).clamp(min=1)


def make_losses(net, data, recipe, prompts, seconds=CLIP_SECONDS, weights=(1, 1), windows=(None,)):
    """Make the loss function that `trainer.Run.train` minimises.

    weights   weights of the losses of video and audio
    windows   windows of the masks (masks.may_attend); every batch draws one
    """
    # Paper: the first release weights the two losses 1 and 0.16.
    blocks = num_blocks(seconds, net.cfg)
    views = [masked_view(net.cfg, blocks, window) for window in windows]
    batch = processes.share_of(recipe.batch)

    def losses(step):
        g = trainer.generator(recipe.seed, step)
        rows = torch.randint(len(data["tokens"]), (batch,), generator=g).cpu()
        levels = draw_levels(batch, blocks, len(net.cfg.sigmas), g)
        view = views[torch.randint(len(views), (), generator=g)]
        states = [data[name][rows].to(processes.device()) for name in ("video", "audio")]
        chosen = prompts.captions(data["tokens"][rows]), *states
        video, audio = regression_losses(net, chosen, levels, net.cfg.sigmas, view)
        loss = weights[0] * video + weights[1] * audio
        return {"loss": loss, "video": video, "audio": audio}

    return losses


def masked_view(cfg, blocks, window=None) -> MaskedView:
    """The block-causal view of a clip, on the device of this process."""
    masks = four_masks(cfg, blocks, window)
    return MaskedView({site: mask.to(processes.device()) for site, mask in masks.items()})


def make_recipe(steps, seed=0, batch=8, is_toy=True):
    """Recipe of the student."""
    if is_toy:
        return trainer.Recipe(steps, batch, seed, muon_lr=0.005, adam_lr=5e-4, ema=0.98)
    # Paper: AdamW at 2e-5; betas, and constant after a warm-up of 100 steps, as in the first
    # release. Gradients are clipped at 1, as in the later one; the first clips at 10. Neither
    # averages weights here, as far as we know; we write an average of about the last 100 steps.
    return trainer.Recipe(
        steps, batch, seed,
        muon_lr=0, adam_lr=2e-5, betas=(0.9, 0.999), warmup=100, decay=0.0, ema=0.99,
    )  # fmt: skip


def trial_loss(net, captions, generator):
    """Loss on random trajectories; full_size/memory.py runs it on meta tensors."""
    cfg, batch = net.cfg, len(captions)
    blocks, levels = num_blocks(CLIP_SECONDS, cfg), len(cfg.sigmas)
    ends = model.draw_noise(batch, clip_span(blocks, cfg), cfg, generator)
    trajectories = [x[:, None].expand(-1, levels, -1, -1) for x in ends]
    drawn = draw_levels(batch, blocks, levels, generator)
    view = MaskedView(four_masks(cfg, blocks))
    return sum(regression_losses(net, (captions, *trajectories), drawn, cfg.sigmas, view))


def options():
    """The command line."""
    p = cli.parser(__doc__)
    about = "weights of the model that draws the trajectories; the student starts at them too"
    cli.add_weights(p, "--teacher", "weights/toy_dmd.safetensors", about)
    p.add_argument("--clips", type=cli.whole(1, 10**5), default=768, help="trajectories to draw")
    cli.add_guidance(p, (1.0, 1.0), "guidance scale of the trajectories")
    about = "weights of the losses of video and audio"
    cli.add_pair(p, "--loss-weights", (1.0, 1.0), about, cli.real(0, 1000))
    p.add_argument(
        "--windows", nargs="+", type=cli.whole(0, 1000), metavar="W",
        help="attention windows in blocks, besides block 0 and the block itself; one is drawn per "
        "batch; default: no limit",
    )  # fmt: skip
    about = "Euler steps per kept noise level"
    p.add_argument("--between", type=cli.whole(1, 100), default=1, help=about)
    stages.add_options(p, STEPS, "ode_regression")
    return p


def regress(args, command):
    """Draw the trajectories, train on them, write the student."""
    start = time.perf_counter()
    with stages.set_up(args, is_causal=True) as source:
        recipe = make_recipe(args.steps, args.seed, args.batch, source.is_toy)
        drawing = source.open(args.teacher)
        student = source.open(args.teacher, source.cfg, args.seed)
        if not source.is_toy:
            from full_size import memory

            share = processes.share_of(recipe.batch)
            memory.check_training([("student", student.cfg, recipe)], trial_loss, share)
        data = load_or_draw_trajectories(
            f"{args.run}/trajectories.safetensors", drawing.load(learns=False), args.clips,
            args.guidance, args.between, source.prompts,
            sigmas=student.cfg.sigmas, weights_id=drawing.weights_id,
        )  # fmt: skip
        print(f"trajectories ready after {time.perf_counter() - start:.0f} s")
        learner = trainer.Learner(student.load(learns=True), recipe)
        settings = stages.settings(args, source, teacher=drawing.weights_id)
        run = trainer.Run({"student": learner}, command, args.run, settings)
        losses = make_losses(
            learner.model, data, recipe, source.prompts,
            weights=args.loss_weights, windows=args.windows or [None],
        )  # fmt: skip
        run.train(trainer.descent(learner, losses))
        run.write_student(args.out, source.write, source.dtype)


def main():
    p = options()
    args = stages.parse(p, STEPS)
    if not any(args.loss_weights):
        raise ValueError("--loss-weights 0 0: nothing would be learnt; expected one above 0")
    regress(args, cli.command(p, args))


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
