"""Distribution matching distillation: many steps become four (stage I).

A teacher needs some 30 steps because each may only look a little ahead: from pure noise it sees the
mean of all clips that could come of it, a grey blur. A few-step student has to name one clip. None
is *the* right answer, so there is nothing to regress; but whole distributions can be compared:

    make   clips x with the student                                 x = few_step_clips(...)
    noise  them                                                     x_sigma = (1-sigma) x + sigma e
    ask    the teacher what clip that was, as real clips go         r = x0_real(x_sigma)
    ask    a critic the same, as the student's clips go             f = x0_fake(x_sigma)
    move   x from f to r: less like its kind, more like real        x <- x - eta (f - r)

(f - r) is, up to a factor that depends on sigma only, the gradient of the Kullback-Leibler
divergence between noised clips of the student and noised real ones (DMD, Yin et al. 2024, eq. 7):
a score is ((1-sigma) x0(x_sigma) - x_sigma) / sigma^2, so scores differ as the x0 predictions do.

Three networks, all of the teacher's shape, all starting at the teacher's weights:

    generator   trained: few-step student
    real        frozen: the teacher, with guidance, of which video and audio have one strength each
    fake        trained: the critic, which follows what the generator makes, by flow matching

The critic must stay close behind, so each generator update is followed by five critic updates.

    python dmd.py            distil the shipped teacher, see --help
"""

import functools
from typing import NamedTuple

import torch

import model
import teacher
from full_size import sharding, training_plan
from full_size.text import toy_captions
from kv_cache import MaskedView, MergedView
from masks import Span
from plumbing import cli
from plumbing import stages as training_parts
from plumbing import trainer as training
from toy import world as toy_world

# Paper: 2000 steps. One of the official loop updates the critic, and only every fifth the generator
# too; one of ours is an update of the generator and five of its critic.
STEPS = 150, 400  # of the toy, and at full size; stage III's too
CRITIC_UPDATES = 5  # for each update of the generator (OmniForcing, as Self-Forcing)
LEAST_TIME, MOST_TIME = 0.02, 0.98  # of the schedule, for the scores (DMD2, OmniForcing)


# ---- the few-step generator ----


def few_step_sigmas(cfg, steps=None) -> tuple[float, ...]:
    """The noise levels of `steps` passes, evenly taken from those that the student was trained on.

    Raises ValueError for more passes than that.

    >>> from config import TOY
    >>> few_step_sigmas(TOY, 2)
    (1.0, 0.7265238, 0.0)
    """
    trained = len(cfg.sigmas) - 1
    steps = trained if steps is None else steps
    if not 1 <= steps <= trained:
        raise ValueError(
            f"{steps} steps: the student knows {trained} noise levels, so 1 to {trained}"
        )
    return (*(cfg.sigmas[i * trained // steps] for i in range(steps)), 0.0)


class Finished(NamedTuple):
    """A block that is clean, and that later blocks will have to remember as such."""

    latents: list  # video (B, T_v, C_v) and audio (B, F_a, C_a), as data
    text: model.Text  # its prompt
    span: Span


def denoise(net, noise, sigmas, text, span, view, generator, exit_step=None, past=None):
    """Few-step generation of a block or a clip: noise -> x0, for (video, audio) pairs.

    Every pass predicts the whole way to clean; fresh noise takes it back to the next level.

    past        the block before, if the first pass is to refresh it along the way
    exit_step   index of the pass whose x0 is the answer; default the last. Only this pass may carry
                a gradient: the earlier ones are how its input came about.
    """
    last = len(sigmas) - 2 if exit_step is None else exit_step
    x, wants_gradient = noise, torch.is_grad_enabled()
    for i in range(last + 1):
        with torch.set_grad_enabled(wants_gradient and i == last):
            x0 = at_sigma(net, x, sigmas[i], text, span, view, past if i == 0 else None)
        if i < last:
            fresh = model.draw_noise(
                len(x0[0]), span, net.cfg, generator, x0[0].device, x0[0].dtype
            )
            level = x0[0].new_full((1, 1), sigmas[i + 1])
            x = [model.add_noise(c, n, level) for c, n in zip(x0, fresh)]
    return x0


def at_sigma(net, x, sigma, text, span, view, past=None):
    """One pass with one noise level for both streams: clean estimates of x = (video, audio).

    past   as in `denoise`: two passes in one
    """
    if past:
        return at_sigma_and_zero(net, x, sigma, view, past, span)
    level = x[0].new_full((len(x[0]),), sigma)
    return model.predict_x0(net, *x, level, level, text, span, view)


def at_sigma_and_zero(net, x, sigma, view, past, span):
    """The block before at 0, its refresh, and this one at sigma, in one pass; one prompt for both.

    Weights are read once for the two. -> clean estimates of x; the view has moved on to its block
    """
    tokens = [torch.cat(pair, 1) for pair in zip(past.latents, x)]
    frames = zip((past.span.video, past.span.audio), (span.video, span.audio))
    levels = [frame_levels(x[0], *map(len, pair), sigma) for pair in frames]
    both = past.span.then(span)
    x0 = model.predict_x0(net, *tokens, *levels, past.text, both, MergedView(view))
    return [c[:, -own.shape[1] :] for c, own in zip(x0, x)]


def frame_levels(like, clean, noisy, sigma):
    """(B, F) noise levels of `clean` frames at 0 and `noisy` ones at sigma."""
    levels = like.new_zeros(len(like), clean + noisy)
    levels[:, clean:] = sigma
    return levels


def draw_exit_step(sigmas, generator) -> int:
    """Which pass is trained: at inference each gets inputs made by those before it.

    # Paper: the official code draws one per clip, and may draw sigma = 0, where nothing is learnt.
    """
    return int(torch.randint(len(sigmas) - 1, (), generator=generator))


def few_step_clips(net, captions, generator, sigmas=None, exit_step=None):
    """Whole clips by a bidirectional few-step student, video (B, T_v, C_v) and audio (B, F_a, C_a).

    captions   `Captions` of B clips
    """
    span = teacher.whole_span(net.cfg)
    text = net.project_text(*captions.features)
    noise = model.draw_noise(len(captions), span, net.cfg, generator)
    sigmas = sigmas or net.cfg.sigmas
    return denoise(net, noise, sigmas, text, span, MaskedView(), generator, exit_step)


def backward_simulation(net, clips, captions, generator):
    """Clips to train stage I on, as they are after a random pass."""
    exit_step = draw_exit_step(net.cfg.sigmas, generator)
    return few_step_clips(net, captions, generator, exit_step=exit_step)


# ---- the two losses, shared with stage III ----


def draw_sigmas(n, generator) -> torch.Tensor:
    """(n,) noise levels to compare at: uniform in the time of the teacher's schedule.

    One per clip, for video and audio alike: the scores judge whether the two belong together.

    # Paper: the official table is stretched besides, to end at .1: .217 to .998, here .140 to .997.
    """
    time = LEAST_TIME + (MOST_TIME - LEAST_TIME) * torch.rand(n, generator=generator)
    return teacher.shifted(time, teacher.SHIFT)


def towards_fake(x, real, fake):
    """The direction in which x would look more like the generator's clips than like real ones.

    x, real, fake (B, T, C): a clip and what each score takes its noised version for.

    Fake minus real: descent moves *against* it. The division frees it of units: bright or dim,
    video or audio, much noise or little, one learning rate serves all (DMD eq. 8).
    """
    distance = (x - real).abs().mean((1, 2), keepdim=True)
    return (fake - real) / (distance + 1e-8)


def surrogate(x, gradient):
    """A scalar whose derivative by x is `gradient / x.numel()`.

    The divergence has a gradient that we know and a value that we do not. Half the squared distance
    to the fixed point `x - gradient` has the same gradient, and optimisers ask for nothing more.

    >>> x = torch.tensor([3.0, 5.0], requires_grad=True)
    >>> surrogate(x, torch.tensor([10.0, -4.0])).backward()
    >>> x.grad
    tensor([ 5., -2.])
    """
    return 0.5 * (x - (x - gradient).detach()).square().mean()


def matching_losses(clips, captions, real, fake, guidance, generator):
    """How far the generator's clips are from real ones: a loss for video and one for audio.

    clips      video (B, T_v, C_v) and audio (B, F_a, C_a) that depend on the generator's weights
    guidance   of the real score, for video and for audio; the fake one has none
    """
    span = teacher.whole_span(real.cfg)
    with torch.no_grad():
        sigma = draw_sigmas(len(captions), generator)
        noise = [model.noise_like(x, generator) for x in clips]
        noisy = [model.add_noise(x, n, sigma[:, None]) for x, n in zip(clips, noise)]
        r = teacher.Guided(real, captions, guidance).x0(*noisy, sigma, span, MaskedView())
        f = teacher.Guided(fake, captions).x0(*noisy, sigma, span, MaskedView())
    return [surrogate(x, towards_fake(x, *rf)) for x, *rf in zip(clips, r, f)]


def critic_losses(fake, clips, captions, generator):
    """Flow matching on the generator's clips, at the levels where the scores are compared."""
    sigma = draw_sigmas(len(captions), generator)
    video, audio = teacher.velocity_losses(fake, clips, captions, sigma, generator)
    return video.mean(), audio.mean()


# ---- training ----


def draw_prompts(n, generator):
    """n clips of the toy, of which only stage III's control looks at more than the captions."""
    seeds = torch.randint(toy_world.HELD_OUT, (n,), generator=generator).tolist()
    clips = toy_world.draw_clips(seeds)
    return clips, toy_captions(teacher.hide_words(toy_world.caption_tokens(clips), generator))


def updates_of(generator, critic, real, guidance, make, draw=draw_prompts):
    """The update that `training.Run.train` repeats: one of the generator, five of its critic.

    generator, critic               training.Learner, each with an optimiser of its own
    real                            the frozen teacher
    make(net, clips, captions, g)   clips (video, audio) by the generator, for these prompts
    draw(n, g)                      n prompts: clips, and their captions
    """
    batch, seed = sharding.share_of(generator.recipe.batch), generator.recipe.seed

    def update(step):
        g = training.generator(seed, step)
        clips, captions = draw(batch, g)
        made = make(generator.model, clips, captions, g)
        video, audio = matching_losses(made, captions, real, critic.model, guidance, g)
        norm = generator.update(video + audio, step)
        for _ in range(CRITIC_UPDATES):
            clips, captions = draw(batch, g)
            with torch.no_grad():  # clips of the moved generator, as data
                made = make(generator.model, clips, captions, g)
            critic_video, critic_audio = critic_losses(critic.model, made, captions, g)
            critic.update(critic_video + critic_audio, step)
        losses = {"video": video, "audio": audio}
        return {**losses, "critic v": critic_video, "critic a": critic_audio, "norm": norm}

    return update


# what generator and critic share, then what is each one's own
TOY_BOTH = dict(muon_lr=0, betas=(0.0, 0.95), ema=0.95)
TOY_EACH = dict(adam_lr=2e-4, warmup=10), dict(adam_lr=5e-4, warmup=1)
# Paper: both at 2e-5, constant; betas and clip of the later release's stage III. Its weight decay,
# 0.01, shrinks weights by 4e-4 in the critic's 2000 updates, and is left out. Its average begins at
# its step 200, our 40, by 0.99; ours begins at once, follows faster at first (training.Averaged),
# and has come to .98 by the end.
FULL_BOTH = dict(muon_lr=0, adam_lr=2e-5, betas=(0.0, 0.999), warmup=1, decay=0.0)
FULL_EACH = dict(ema=0.99), dict(ema=0.0)  # nobody looks at a critic's average, and it is 75 GB


def recipes_of(steps, seed, batch=8, is_toy=True):
    """How the generator learns, and how its critic."""
    both, each = (TOY_BOTH, TOY_EACH) if is_toy else (FULL_BOTH, FULL_EACH)
    return [training.Recipe(steps, batch, seed, **both, **own) for own in each]


def learners_of(net, critic, steps, seed, batch=8, is_toy=True) -> dict:
    """The generator, which starts as `net`, and its critic, which starts as the teacher."""
    recipes = recipes_of(steps, seed, batch, is_toy)
    return {
        name: training.Learner(learning, recipe)
        for name, learning, recipe in zip(("generator", "critic"), (net, critic), recipes)
    }


def options(doc, run, out):
    """The command line that stages I and III share."""
    p = cli.parser(doc)
    p.add_argument("--teacher", default="weights/toy_teacher.safetensors", help="the real score")
    cli.add_guidance(p, teacher.GUIDANCE, "of the real score")
    p.add_argument("--run", default=run, help="folder for the state; resumed if there")
    p.add_argument("--out", default=out, help=training.ABOUT_OUT)
    training_parts.add_options(p, STEPS)
    return p


def distil(p, args, start, is_causal, make):
    """Train by distribution matching on the clips that `make` has the student make; ship it.

    start       the student's weights at first
    is_causal   whether it has blocks, see `training_parts.parts_for`
    """
    training.check_places(args.run, args.out)
    with sharding.processes(args.device or "cpu"):
        parts = training_parts.parts_for(args, is_causal)
        how = dict(steps=args.steps, seed=args.seed, batch=args.batch, is_toy=parts.is_toy)
        recipes = recipes_of(**how)
        judge, student = parts.find(args.teacher), parts.find(start, parts.cfg, args.seed)
        if not parts.is_toy:
            planned = trial_of(judge.cfg, student.cfg, recipes, args.guidance, make)
            training_plan.check(*planned, sharding.share_of(recipes[0].batch))
        real, critic = judge.load(learns=False), judge.load(learns=True)
        learners = learners_of(student.load(learns=True), critic, **how)
        marks = {args.teacher: judge.mark, start: student.mark}
        run = training.Run(learners, cli.command(p, args), args.run, marks)
        draw = draw_prompts if parts.is_toy else parts.prompts.draw
        update = updates_of(*learners.values(), real, args.guidance, make, draw)
        run.train(update, print_every=5, save_every=20)
        run.ship(args.out, parts.write, parts.dtype)


def trial_of(teacher_cfg, student_cfg, recipes, guidance, make):
    """All nets, and what an update of the generator computes with them (full_size/memory.py)."""
    generator, critic = recipes
    nets = [
        ("teacher", teacher_cfg, None),
        ("generator", student_cfg, generator),
        ("critic", teacher_cfg, critic),
    ]
    return nets, functools.partial(generator_loss, guidance, make)


def generator_loss(guidance, make, real, net, critic, captions, generator):
    """What an update of the generator computes, to see what it takes (full_size/memory.py)."""
    made = make(net, None, captions, generator)
    return sum(matching_losses(made, captions, real, critic, guidance, generator))


def main():
    p = options(__doc__, "runs/dmd", "weights/toy_dmd.safetensors")
    args = training_parts.parse(p, STEPS)
    distil(p, args, args.teacher, False, backward_simulation)


if __name__ == "__main__":
    cli.run(main)
