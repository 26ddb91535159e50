"""Flow matching: train the bidirectional toy teacher, and sample from it.

The paper starts from LTX-2, which denoises all tokens of a clip together, in 40 steps. Every token
attends to every other one, in the past and in the future. This file does the same for the toy, in
32 steps (`schedule(32)`).

    x_sigma = (1 - sigma) x0 + sigma noise               noise a clip, to a random level sigma
    loss    = | v(x_sigma, sigma) - (noise - x0) |^2     learn the direction of the noise

Sampling goes the other way: start at sigma = 1 and follow -v in small Euler steps. Classifier-free
guidance of scale s moves the prediction c for the caption away from u, that for an empty caption:
u + s (c - u).

Each clip has one sigma for video and audio, so that no stream is cleaner than the other and tells
it about the clip.

    python teacher.py                trains from scratch, an hour and a half on two CPU cores
    python teacher.py --help
"""

import torch

import config
import model
from kv_cache import MaskedView
from masks import clip_of_seconds
from plumbing import cli, files, trainer

# Timestep shift of the sampler, and of the scores in dmd.py: more weight on high noise, where we
# think that motion is decided. LTX-2 uses e^2.05.
SHIFT = 8.0
GUIDANCE = 3.0, 5.0  # scales for video and audio (OmniForcing, stages I and III); 1: no guidance
SEEDS, CLIPS_PER_SEED = 10, 10**7  # every training seed has its own clips


# ---- noise levels ----


def shifted(sigma, shift):
    """Move noise levels towards the noisy end: shift sigma / (1 + (shift - 1) sigma).

    >>> [round(1000 * shifted(s, 5.0), 1) for s in (1.0, 0.75, 0.5, 0.25)]     # Self-Forcing's list
    [1000.0, 937.5, 833.3, 625.0]
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def schedule(steps, shift=SHIFT) -> list[float]:
    """Noise levels of `steps` passes: steps + 1 numbers from 1 to 0.

    >>> [round(s, 3) for s in schedule(4)]
    [1.0, 0.96, 0.889, 0.727, 0.0]
    """
    return [shifted(1 - i / steps, shift) for i in range(steps + 1)]


def draw_training_sigmas(n, generator) -> torch.Tensor:
    """Draw (n,) noise levels to train on: 90 % sigmoid of N(0.4, 1), 10 % uniform in [0, 1]."""
    sigma = torch.sigmoid(0.4 + torch.randn(n, generator=generator))
    uniform = torch.rand(n, generator=generator)
    return torch.where(torch.rand(n, generator=generator) < 0.1, uniform, sigma)


# ---- training ----


def velocity_losses(net, latents, captions, sigma, generator):
    """Squared error of the velocities: (B,) for video and (B,) for audio, mean over elements."""
    text = net.project_text(*captions.features)
    noise = [model.noise_like(x, generator) for x in latents]
    noisy = [model.add_noise(x, n, sigma[:, None]) for x, n in zip(latents, noise)]
    v = net(*noisy, sigma, sigma, text, clip_of_seconds(net.cfg), MaskedView())
    return [(p - (n - x)).square().mean((1, 2)) for p, n, x in zip(v, noise, latents)]


def training_seeds(recipe) -> range:
    """Seeds of the training clips, in order.

    Raises ValueError for more than CLIPS_PER_SEED clips, and for a seed whose clips are kept for
    ode_regression.py or for the evaluation.

    >>> training_seeds(trainer.Recipe(steps=6000, seed=1))
    range(10000000, 10096000)
    """
    if recipe.seed >= SEEDS:
        raise ValueError(f"--seed {recipe.seed}: expected 0 to {SEEDS - 1}")
    if (count := recipe.steps * recipe.batch) > CLIPS_PER_SEED:
        raise ValueError(f"--steps {recipe.steps}: {count} clips; a seed has {CLIPS_PER_SEED}")
    first = recipe.seed * CLIPS_PER_SEED
    return range(first, first + count)


def make_losses(net, examples, recipe):
    """Make the loss function that `trainer.Run.train` minimises, with new clips at every step.

    examples   (seeds, generator) -> latents (video, audio) and `Captions` of their clips
    """
    seeds, batch = training_seeds(recipe), recipe.batch

    def losses(step):
        g = trainer.generator(recipe.seed, step)
        latents, captions = examples(seeds[step * batch : (step + 1) * batch], g)
        sigma = draw_training_sigmas(batch, g)
        video, audio = velocity_losses(net, latents, captions, sigma, g)
        return {"loss": video.mean() + audio.mean(), **losses_by_noise(video, audio, sigma)}

    return losses


def losses_by_noise(video, audio, sigma) -> dict:
    """Losses to log: video, audio, and video at low, middle, high noise (no such clip: all)."""
    values = {"video": video.mean(), "audio": audio.mean()}
    # At high noise the model must decide where the ball flies, at low noise only pixel details.
    for name, low, high in (("low", 0, 0.4), ("mid", 0.4, 0.7), ("high", 0.7, 1.01)):
        inside = (sigma >= low) & (sigma < high)
        values[name] = video[inside].mean() if inside.any() else video.mean()
    return {name: value.item() for name, value in values.items()}


# ---- sampling ----


class Guided:
    """x0 predictions of a model with classifier-free guidance, for one batch of captions."""

    def __init__(self, net, captions, guidance=(1, 1)):
        """captions: `Captions` of B clips; guidance: scales for video and audio, 1: no guidance."""
        self.net, self.guidance = net, guidance
        self.is_guided = tuple(guidance) != (1, 1)
        features = captions.with_nothing() if self.is_guided else captions.features
        self.text = net.project_text(*features)

    def x0(self, video, audio, sigma, span, view):
        """Noisy (B, T, C) latents at (B,) sigma -> clean estimates of both."""
        copies = 2 if self.is_guided else 1  # with and without caption, in one pass
        x = [x.repeat(copies, 1, 1) for x in (video, audio)]
        s = sigma.repeat(copies)
        x0 = model.predict_x0(self.net, *x, s, s, self.text, span, view)
        if not self.is_guided:
            return x0
        pairs = [x.chunk(2) for x in x0]
        return [u + w * (c - u) for (c, u), w in zip(pairs, self.guidance)]


@torch.no_grad()
def sample(net, captions, sigmas, seconds=config.CLIP_SECONDS, guidance=GUIDANCE, seed=0, keep=()):
    """Sample whole clips by Euler steps, all tokens at once.

    captions `Captions` of B clips
    sigmas   noise levels from 1 to 0; one pass for each except the last
    guidance scales for video and audio
    keep     indices into sigmas of states to return as well
    ->       video (B, T_v, C_v) and audio (B, F_a, C_a) latents; with `keep` also these states:
             (B, len(keep), T_v, C_v) and (B, len(keep), F_a, C_a)
    """
    span = clip_of_seconds(net.cfg, seconds)
    x = model.draw_noise(len(captions), span, net.cfg, torch.Generator().manual_seed(seed))
    guided, kept = Guided(net, captions, guidance), {0: x}
    for i, (sigma, lower) in enumerate(zip(sigmas, sigmas[1:])):
        x0 = guided.x0(*x, x[0].new_full((len(captions),), sigma), span, MaskedView())
        # Euler step x + (lower - sigma) v, with v = (x - x0) / sigma, written in terms of x0
        x = [x0 + lower / sigma * (x - x0) for x, x0 in zip(x, x0)]
        kept[i + 1] = x
    if not keep:
        return x
    return x, [torch.stack(states, 1) for states in zip(*(kept[i] for i in keep))]


def main():
    from toy import training  # only the toy's teacher is trained here

    p = cli.parser(__doc__)
    p.add_argument("--steps", type=trainer.STEPS, default=6000, help="training steps of 16 clips")
    cli.add_seed(p, "random seed of the training", SEEDS - 1)
    cli.add_weights(p, "--init", None, "weights to start at, instead of a new model")
    p.add_argument("--run", default="runs/teacher", help="folder of the run, to resume it")
    p.add_argument("--out", default="runs/toy_teacher.safetensors", help=trainer.ABOUT_OUT)
    args = p.parse_args()
    trainer.check_places(args.run, args.out)
    recipe, examples = trainer.Recipe(args.steps, seed=args.seed), training.TrainingClips()
    net = model.build(config.TOY_TEACHER, args.seed)
    if args.init:
        net = training.load_bidirectional(args.init)
    losses = make_losses(net, examples, recipe)
    learner = trainer.Learner(net, recipe)
    settings = trainer.hashes(codec=examples.codec_id)
    if args.init:
        settings |= trainer.hashes(start=files.fingerprint(net.state_dict()))
    run = trainer.Run({"teacher": learner}, cli.command(p, args), args.run, settings)
    print(f"{net.num_parameters():,} parameters, from step {run.step}")
    run.train(trainer.descent(learner, losses))
    run.write_student(args.out)


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
