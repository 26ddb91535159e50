"""Distribution matching distillation: many steps become four (stage I).

From pure noise, the teacher's x0 prediction is the mean of all possible clips, which is blurred. So
it goes a short way, predicts again, and needs 30 to 40 steps. A student of few steps must make a
sharp clip, but many clips are right. Distribution matching (DMD) therefore gives it no target clip.
It compares distributions:

    make    clips x with the student
    noise   them                                 x_sigma = (1 - sigma) x + sigma noise
    real    x0 prediction of the teacher         r = x0_real(x_sigma), knows real clips
    fake    x0 prediction of a critic            f = x0_fake(x_sigma), knows the student's clips
    move    x from f towards r                   x <- x - eta (f - r)

Up to a factor that depends on sigma only, (f - r) is the gradient of the Kullback-Leibler
divergence between noised clips of the student and noised real clips (DMD, Yin et al. 2024, eq. 7).
A score is ((1-sigma) x0(x_sigma) - x_sigma) / sigma^2, so the difference of two scores is
(1-sigma) / sigma^2 times that of their x0 predictions.

Stage I has three networks of the teacher's shape. All start with the teacher's weights:

    generator   trained: the few-step student
    real        frozen: the teacher with classifier-free guidance, one scale for each stream
    fake        trained: the critic, which learns the generator's clips by flow matching

The critic must keep up with the generator's clips, so each generator update is followed by five
critic updates.

    python dmd.py            distils the shipped teacher; see --help
"""

import functools

import torch

import model
import teacher
from kv_cache import MaskedView
from masks import clip_of_seconds
from plumbing import cli, processes, stages, trainer
from rollout import denoise

# Training steps of stages I and III: toy, full size. Paper: 2000 steps. There, every step updates
# the critic and every fifth step also the generator. Here, one step is one generator update and
# five critic updates, so 400.
STEPS = 150, 400
CRITIC_UPDATES = 5  # per generator update (OmniForcing, as Self-Forcing)
MIN_TIME, MAX_TIME = 0.02, 0.98  # range of sigma before the shift (DMD2, OmniForcing)


# ---- clips of the few-step generator ----


def draw_exit_step(sigmas, generator) -> int:
    """Draw the index of the pass to train.  Its input comes from the passes before it."""
    # Paper: stage I of the first release draws one per clip, and may draw sigma = 0: no learning.
    return int(torch.randint(len(sigmas) - 1, (), generator=generator))


def few_step_clips(net, captions, generator, sigmas=None, exit_step=None):
    """Whole clips of a bidirectional few-step student: video (B, T_v, C_v), audio (B, F_a, C_a).

    captions   `model.Captions` of B clips
    """
    span = clip_of_seconds(net.cfg)
    text = net.project_text(*captions.features)
    noise = model.draw_noise(len(captions), span, net.cfg, generator)
    sigmas = sigmas or net.cfg.sigmas
    return denoise(net, noise, sigmas, text, span, MaskedView(), generator, exit_step)


def backward_simulation(net, clips, captions, generator):
    """Training clips of stage I: the x0 of a random pass, as in DMD2.  `clips` is unused."""
    exit_step = draw_exit_step(net.cfg.sigmas, generator)
    return few_step_clips(net, captions, generator, exit_step=exit_step)


# ---- the two losses, shared with stage III ----


def draw_score_sigmas(n, generator) -> torch.Tensor:
    """Draw (n,) noise levels at which to compare scores: uniform, then shifted to high noise.

    One level per clip, for video and audio: the scores judge whether the two belong together.
    """
    # Paper: the official noise schedule is also stretched so that its last level is 0.1. Levels
    # then range from .217 to .998, here from .140 to .997.
    time = MIN_TIME + (MAX_TIME - MIN_TIME) * torch.rand(n, generator=generator)
    return teacher.shifted(time, teacher.SHIFT)


def dmd_gradient(x, real, fake):
    """Gradient of the DMD loss: (fake - real) / mean |x - real|.

    x, real, fake (B, T, C): a clip, and the x0 predictions of both scores for its noised version
    """
    # The division removes the scale: one learning rate serves bright and dim clips, video and
    # audio, much noise and little (DMD eq. 8).
    distance = (x - real).abs().mean((1, 2), keepdim=True)
    return (fake - real) / (distance + 1e-8)


def surrogate(x, gradient):
    """A scalar whose gradient with respect to x is `gradient / x.numel()`.

    >>> x = torch.tensor([3.0, 5.0], requires_grad=True)
    >>> surrogate(x, torch.tensor([10.0, -4.0])).backward()
    >>> x.grad
    tensor([ 5., -2.])
    """
    # We know the gradient of the divergence, but not its value. Half the squared distance to the
    # detached target x - gradient has the same gradient.
    return 0.5 * (x - (x - gradient).detach()).square().mean()


def dmd_losses(clips, captions, real, fake, guidance, generator):
    """Surrogate losses for video and audio.  Only their gradients have a meaning.

    clips      video (B, T_v, C_v) and audio (B, F_a, C_a) that depend on the generator's weights
    guidance   scales of the real score for video and audio; the fake score has no guidance
    """
    span = clip_of_seconds(real.cfg)
    with torch.no_grad():
        sigma = draw_score_sigmas(len(captions), generator)
        noise = [model.noise_like(x, generator) for x in clips]
        noisy = [model.add_noise(x, n, sigma[:, None]) for x, n in zip(clips, noise)]
        r = teacher.Guided(real, captions, guidance).x0(*noisy, sigma, span, MaskedView())
        f = teacher.Guided(fake, captions).x0(*noisy, sigma, span, MaskedView())
    return [surrogate(x, dmd_gradient(x, *rf)) for x, *rf in zip(clips, r, f)]


def critic_losses(fake, clips, captions, generator):
    """Flow matching on the generator's clips, at the levels where the scores are compared."""
    sigma = draw_score_sigmas(len(captions), generator)
    video, audio = teacher.velocity_losses(fake, clips, captions, sigma, generator)
    return video.mean(), audio.mean()


# ---- training ----


def make_update(generator, critic, real, guidance, make, draw):
    """Make the update that `trainer.Run.train` repeats: one of the generator, five of the critic.

    generator, critic               trainer.Learner, each with its own optimiser
    real                            the frozen teacher
    make(net, clips, captions, g)   clips (video, audio) that the generator makes of these captions
    draw(n, g)                      n random training examples: clips (or None), and `Captions`
    """
    batch, seed = processes.share_of(generator.recipe.batch), generator.recipe.seed

    def update(step):
        g = trainer.generator(seed, step)
        clips, captions = draw(batch, g)
        made = make(generator.model, clips, captions, g)
        video, audio = dmd_losses(made, captions, real, critic.model, guidance, g)
        norm = generator.update(video + audio, step)
        for _ in range(CRITIC_UPDATES):
            clips, captions = draw(batch, g)
            with torch.no_grad():  # clips of the updated generator; only the critic learns here
                made = make(generator.model, clips, captions, g)
            critic_video, critic_audio = critic_losses(critic.model, made, captions, g)
            critic.update(critic_video + critic_audio, step)
        losses = {"video": video, "audio": audio}
        return {**losses, "critic v": critic_video, "critic a": critic_audio, "norm": norm}

    return update


def make_recipes(steps, seed, batch=8, is_toy=True):
    """Recipes of the generator and of the critic."""
    if is_toy:
        shared = functools.partial(
            trainer.Recipe, steps, batch, seed, muon_lr=0, betas=(0.0, 0.95), ema=0.95
        )
        return shared(adam_lr=2e-4, warmup=10), shared(adam_lr=5e-4, warmup=1)
    # Paper: learning rate 2e-5, constant. Betas and clip: stage III of the later release.
    # That has a weight decay of 0.01, which in 2000 critic updates would shrink weights by 4e-4; we
    # leave it out. It averages from its step 200 (our 40) on, with 0.99. We average from the first
    # step on; the decay grows (trainer.Averaged) and is .98 at the end.
    shared = functools.partial(
        trainer.Recipe, steps, batch, seed,
        muon_lr=0, adam_lr=2e-5, betas=(0.0, 0.999), warmup=1, decay=0.0,
    )  # fmt: skip
    return shared(ema=0.99), shared(ema=0.0)  # a critic's average, 75 GB, would have no use


def make_learners(net, critic, recipes) -> dict:
    """The generator, which starts as `net`, and its critic, which starts as the teacher."""
    return {
        "generator": trainer.Learner(net, recipes[0]),
        "critic": trainer.Learner(critic, recipes[1]),
    }


def options(doc, name):
    """The command line that stages I and III share."""
    p = cli.parser(doc)
    about = "weights of the teacher, which gives the real score"
    cli.add_weights(p, "--teacher", "weights/toy_teacher.safetensors", about)
    cli.add_guidance(p, teacher.GUIDANCE, "guidance scale of the real score")
    stages.add_options(p, STEPS, name)
    return p


def distil(p, args, start, is_causal, make):
    """Train by distribution matching on the clips that `make` returns; write the student.

    start       the weights the student starts at
    is_causal   whether the student has blocks, see `stages.open_source`
    """
    with stages.set_up(args, is_causal) as source:
        recipes = make_recipes(args.steps, args.seed, args.batch, source.is_toy)
        real, student = source.open(args.teacher), source.open(start, source.cfg, args.seed)
        if not source.is_toy:
            from full_size import memory

            nets = [
                ("teacher", real.cfg, None),
                ("generator", student.cfg, recipes[0]),
                ("critic", real.cfg, recipes[1]),
            ]
            loss = functools.partial(generator_loss, args.guidance, make)
            memory.check_training(nets, loss, processes.share_of(args.batch))
        frozen, critic = real.load(learns=False), real.load(learns=True)
        learners = make_learners(student.load(learns=True), critic, recipes)
        ids = {"teacher": real.weights_id, "student": student.weights_id}
        settings = stages.settings(args, source, **ids)
        run = trainer.Run(learners, cli.command(p, args), args.run, settings)
        update = make_update(*learners.values(), frozen, args.guidance, make, source.prompts.draw)
        run.train(update, print_every=5, save_every=20)
        run.write_student(args.out, source.write, source.dtype)


def generator_loss(guidance, make, real, net, critic, captions, generator):
    """Loss of one generator update; full_size/memory.py runs it on meta tensors."""
    made = make(net, None, captions, generator)
    return sum(dmd_losses(made, captions, real, critic, guidance, generator))


def main():
    p = options(__doc__, "dmd")
    args = stages.parse(p, STEPS)
    distil(p, args, args.teacher, False, backward_simulation)


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
