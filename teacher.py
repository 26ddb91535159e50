"""Flow matching: train the bidirectional toy teacher, and sample from it.

The paper starts from LTX-2, a model that turns noise into a whole clip at once in 40 steps, every
token seeing every other, past and future alike. This is its counterpart for the toy world.

    x_sigma = (1 - sigma) x0 + sigma noise         noise a clip, by as much as sigma says
    loss    = | v(x_sigma, sigma) - (noise - x0) |^2     and learn which way it was moved

Sampling walks the other way: start at sigma = 1, follow -v in small Euler steps. Guidance pushes
the prediction away from what an empty caption would give: x0_u + s (x0_c - x0_u).

One sigma per clip, shared by video and audio: they are one thing, and at no noise level may one
stream know more about the clip than the other.

    python teacher.py                train from scratch, an hour and a half on two CPU cores
    python teacher.py --help
"""

import torch

import config
import model
from full_size.text import toy_captions
from kv_cache import MaskedView
from masks import clip_span, num_blocks, whole_window
from plumbing import cli, files
from plumbing import trainer as training
from toy import codec as toy_codec
from toy import world as toy_world

SECONDS = 5  # length of a training clip, as in the paper
DROP_CAPTION, DROP_WORD = 0.10, 0.05  # shares of captions and words hidden while training
SHIFT = 8.0  # of the sampler's noise levels towards noise, where motion is decided; LTX-2: e^2.05
GUIDANCE = 3.0, 5.0  # for video and for audio (OmniForcing's stages I and III); 1 is none
SEEDS, CLIPS_PER_SEED = 10, 10**7  # of the teacher: every seed has clips of its own to train on


def whole_span(cfg, seconds=SECONDS):
    """All latent frames of a clip of so many seconds.

    >>> whole_span(config.TOY)
    Span(video=range(0, 16), audio=range(0, 126))
    """
    return clip_span(num_blocks(seconds, cfg), cfg)


def trained_window(cfg, seconds=SECONDS) -> int:
    """How far back the last block of a training clip sees: with more, a stream falls apart.

    >>> trained_window(config.TOY), trained_window(config.RELEASED)
    (4, 3)
    """
    return whole_window(num_blocks(seconds, cfg))


# ---- noise levels ----


def shifted(sigma, shift):
    """Move noise levels towards the noisy end: shift sigma / (1 + (shift - 1) sigma).

    >>> [round(1000 * shifted(s, 5.0), 1) for s in (1.0, 0.75, 0.5, 0.25)]     # Self-Forcing's list
    [1000.0, 937.5, 833.3, 625.0]
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def schedule(steps, shift=SHIFT) -> list[float]:
    """steps + 1 noise levels from 1 to 0 for as many passes.

    >>> [round(s, 3) for s in schedule(4)]
    [1.0, 0.96, 0.889, 0.727, 0.0]
    """
    return [shifted(1 - i / steps, shift) for i in range(steps + 1)]


def draw_sigmas(n, generator) -> torch.Tensor:
    """(n,) noise levels to train on: sigmoid of N(0.4, 1), with 10 % uniform for the two ends."""
    sigma = torch.sigmoid(0.4 + torch.randn(n, generator=generator))
    uniform = torch.rand(n, generator=generator)
    return torch.where(torch.rand(n, generator=generator) < 0.1, uniform, sigma)


# ---- training ----


def hide_words(tokens, generator):
    """Blank whole captions and single words, so that guidance and partial prompts have meaning."""
    B, words = tokens.shape
    hide = torch.rand(B, 1, generator=generator) < DROP_CAPTION
    hide = hide | (torch.rand(B, words, generator=generator) < DROP_WORD)
    return tokens.masked_fill(hide.to(tokens.device), 0)


def velocity_losses(net, latents, captions, sigma, generator):
    """Squared error of the velocities: (B,) for video and (B,) for audio, mean over elements."""
    text = net.project_text(*captions.features)
    noise = [model.noise_like(x, generator) for x in latents]
    noisy = [model.add_noise(x, n, sigma[:, None]) for x, n in zip(latents, noise)]
    span = whole_span(net.cfg)
    v = net(*noisy, sigma, sigma, text, span, MaskedView())
    return [(p - (n - x)).square().mean((1, 2)) for p, n, x in zip(v, noise, latents)]


def clips_of(recipe) -> range:
    """Seeds of the clips that a training will see, in order.

    Raises ValueError for more than CLIPS_PER_SEED, and for a seed that would train on clips which
    are kept for ode_regression.py or for the evaluation.

    >>> clips_of(training.Recipe(steps=6000, seed=1))
    range(10000000, 10096000)
    """
    if recipe.seed >= SEEDS:
        raise ValueError(f"--seed {recipe.seed}: the teacher has clips for 0 to {SEEDS - 1}")
    if (count := recipe.steps * recipe.batch) > CLIPS_PER_SEED:
        raise ValueError(f"--steps {recipe.steps}: {count} clips; a seed has {CLIPS_PER_SEED}")
    first = recipe.seed * CLIPS_PER_SEED
    return range(first, first + count)


def losses_of(net, codec, recipe):
    """The function that `training.Run.train` minimises: fresh clips at every step."""
    seeds, batch = clips_of(recipe), recipe.batch

    def losses(step):
        g = training.generator(recipe.seed, step)
        clips = toy_world.draw_clips(seeds[step * batch : (step + 1) * batch])
        latents = toy_codec.encode_clips(codec, clips, SECONDS)
        captions = toy_captions(hide_words(toy_world.caption_tokens(clips), g))
        sigma = draw_sigmas(batch, g)
        video, audio = velocity_losses(net, latents, captions, sigma, g)
        return {"loss": video.mean() + audio.mean(), **by_level(video, audio, sigma)}

    return losses


def by_level(video, audio, sigma) -> dict:
    """Teaching readout: both losses, and video's at low, middle and high noise.

    Where the loss is high is where the model still has something to decide: at high noise where the
    ball will fly, at low noise only its pixels.
    """
    values = {"video": video.mean(), "audio": audio.mean()}
    for name, low, high in (("low", 0, 0.4), ("mid", 0.4, 0.7), ("high", 0.7, 1.01)):
        inside = (sigma >= low) & (sigma < high)
        values[name] = video[inside].mean() if inside.any() else video.mean()
    return {name: value.item() for name, value in values.items()}


# ---- sampling ----


class Guided:
    """x0 predictions of a model with classifier-free guidance, for one batch of captions."""

    def __init__(self, net, captions, guidance=(1, 1)):
        """`Captions` of B clips; guidance of video and of audio, 1 is none."""
        self.net, self.guidance = net, guidance
        self.is_guided = tuple(guidance) != (1, 1)
        features = captions.with_nothing() if self.is_guided else captions.features
        self.text = net.project_text(*features)

    def x0(self, video, audio, sigma, span, view):
        """Noisy (B, T, C) latents at (B,) sigma -> clean estimates of both."""
        copies = 2 if self.is_guided else 1
        x = [x.repeat(copies, 1, 1) for x in (video, audio)]
        s = sigma.repeat(copies)
        x0 = model.predict_x0(self.net, *x, s, s, self.text, span, view)
        if not self.is_guided:
            return x0
        pairs = [x.chunk(2) for x in x0]
        return [u + w * (c - u) for (c, u), w in zip(pairs, self.guidance)]


@torch.no_grad()
def sample(net, captions, sigmas, seconds=SECONDS, guidance=GUIDANCE, seed=0, keep=()):
    """Whole clips by Euler steps, everything at once.

    captions `Captions` of B clips
    sigmas   noise levels from 1 to 0; one pass for each but the last
    guidance of video and of audio
    keep     indices into sigmas whose states are to be returned as well
    ->       video (B, T_v, C_v) and audio (B, F_a, C_a) latents; and, if `keep`, the kept states:
             (B, len(keep), T_v, C_v) and (B, len(keep), F_a, C_a)
    """
    span = whole_span(net.cfg, seconds)
    x = model.draw_noise(len(captions), span, net.cfg, torch.Generator().manual_seed(seed))
    guided, kept = Guided(net, captions, guidance), {0: x}
    for i, (sigma, lower) in enumerate(zip(sigmas, sigmas[1:])):
        x0 = guided.x0(*x, x[0].new_full((len(captions),), sigma), span, MaskedView())
        # the same straight line seen from its clean end: at `lower`, this share of x is left
        x = [x0 + lower / sigma * (x - x0) for x, x0 in zip(x, x0)]
        kept[i + 1] = x
    if not keep:
        return x
    return x, [torch.stack(states, 1) for states in zip(*(kept[i] for i in keep))]


def main():
    p = cli.parser(__doc__)
    p.add_argument("--steps", type=int, default=6000, help="training steps of 16 clips")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--init", help="weights to go on from instead of a fresh model")
    p.add_argument("--run", default="runs/teacher", help="folder for the state; resumed if there")
    p.add_argument("--out", default="weights/toy_teacher.safetensors", help=training.ABOUT_OUT)
    args = p.parse_args()
    training.check_places(args.run, args.out)
    recipe, codec = training.Recipe(args.steps, seed=args.seed), toy_codec.load()
    net = model.load(args.init) if args.init else model.build(config.TOY_TEACHER, args.seed)
    losses = losses_of(net, codec, recipe)
    learner = training.Learner(net, recipe)
    marks = {toy_codec.FILE.name: files.fingerprint(codec.state_dict())}
    if args.init:
        marks[args.init] = files.fingerprint(net.state_dict())
    run = training.Run({"teacher": learner}, cli.command(p, args), args.run, marks)
    print(f"{net.num_parameters():,} parameters, from step {run.step}")
    run.train(training.descent(learner, losses))
    run.ship(args.out)


if __name__ == "__main__":
    cli.run(main)
