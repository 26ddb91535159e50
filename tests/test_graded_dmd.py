"""Graded: exit steps, the gradient of distribution matching, and the order of updates.

Networks are stand-ins that return known clean estimates and record every pass.
"""

import functools
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from grading import check, check_dtype, close, random_tensor, watched
from torch import nn

import config
import dmd
import model
from masks import clip_span
from plumbing import trainer
from toy.source import toy_captions

CFG = replace(
    config.TOY_TEACHER, height=8, width=8, video_channels=6, audio_channels=4
)  # one video token per frame
SPAN = clip_span(6, CFG)
STREAMS, CLIPS = ("video", "audio"), 3


@pytest.mark.points(1, "draw_exit_step")
def test_every_pass_is_trained_equally_often():
    """Indices 0 to 3 of four passes; sigma = 0 is where they end, not a pass."""
    for sigmas in (CFG.sigmas, config.THREE_STEPS, (1.0, 0.0)):
        passes = len(sigmas) - 1

        def draw(seed=0, sigmas=sigmas):
            g = torch.Generator().manual_seed(seed)
            with watched():
                return [dmd.draw_exit_step(sigmas, g) for _ in range(600)]

        drawn = draw()
        is_int = all(type(i) is int for i in drawn)
        assert is_int, f"an exit step is an int, not {type(drawn[0]).__name__}"
        is_pass = max(drawn) < passes
        wrong = f"sigma = 0 was drawn, but it is no pass: {passes} passes are 0 to {passes - 1}"
        assert is_pass, f"{wrong}, and {max(drawn)} was drawn"
        counts = [drawn.count(i) for i in range(passes)]
        is_even = min(counts) > 500 / passes - 20
        assert is_even, f"600 draws fell on the {passes} passes {counts} times"
        assert draw() == drawn, "the same generator draws other exit steps the second time"
        assert passes == 1 or draw(1) != drawn, "another seed of the generator draws the same"


@pytest.mark.points(2, "surrogate")
def test_the_surrogate_has_the_given_gradient():
    """d loss / d x = gradient / numel, for every x, also if the gradient depends on x."""
    for shape, depends in (((3, 4, 2), 0), ((1, 3), 1)):
        x = random_tensor(*shape, requires_grad=True)
        gradient = random_tensor(*shape, seed=1) * (1 + depends * x.abs())
        with watched(x, gradient):
            loss = dmd.surrogate(x, gradient)
        assert loss.dim() == 0, f"a loss is a scalar, not {tuple(loss.shape)}"
        assert loss.requires_grad, "the loss has no gradient at all"
        (found,) = torch.autograd.grad(loss, x)
        constant = "no gradient is left: x - gradient is a constant, detach it as a whole"
        assert found.any(), constant
        right = gradient.detach() / x.numel()
        suspects = {
            "the sign is wrong: descent goes uphill": -right,
            "twice the gradient: the derivative of a square is 2 x": 2 * right,
            "the gradient is not divided by the number of elements": gradient,
            "the gradient is divided by the number of clips": gradient / len(x),
        }
        numel = f"the gradient over {x.numel()} elements is not gradient / {x.numel()}"
        check(found, right, f"{numel}: detach the target as a whole", suspects)


def gradient_by_hand(x, real, fake):
    """Compute it clip by clip: fake - real over the mean distance of x and real."""
    rows = []
    for a, r, f in zip(x, real, fake):
        distance = sum(abs(float(d)) for d in (a - r).flatten()) / a.numel()
        rows.append((f - r) / distance)
    return torch.stack(rows)


@pytest.mark.points(1, "dmd_gradient")
def test_descent_moves_a_clip_from_fake_to_real():
    """The gradient is fake - real, and descent goes against it."""
    x, real, fake = torch.zeros(2, 2, 3), torch.full((2, 2, 3), 2.0), torch.full((2, 2, 3), -1.0)
    with watched(x, real, fake):
        found = dmd.dmd_gradient(x, real, fake)
    assert found.shape == x.shape, f"{tuple(x.shape)} became {tuple(found.shape)}"
    assert (found < 0).all(), "the sign is wrong: descent would move clips from real to fake"


@pytest.mark.points(2, "dmd_gradient")
def test_every_clip_has_a_gradient_of_the_same_scale():
    """Divided by the mean |x - real| of each clip, far or near; never by zero."""
    x, real, fake = random_tensor(3, 3, 6, 3)
    real[1] *= 10
    real[2] = x[2] + real[2] / 100
    found = dmd.dmd_gradient(x, real, fake)

    def divided(a, b, *axes):
        return (fake - real) / (a - b).abs().mean(axes, keepdim=True)

    suspects = {
        "the divisor is wrong: it must not depend on the fake score": divided(x, fake, 1, 2),
        "the divisor is wrong: not the distance of the two scores": divided(real, fake, 1, 2),
        "the divisor is the mean of the batch: each clip has its own distance": divided(
            x, real, 0, 1, 2
        ),
        "the divisor is the mean of a token: a clip has one distance": divided(x, real, 2),
        "the divisor is the mean of a channel: a clip has one distance": divided(x, real, 1),
        "the divisor is missing": fake - real,
        "the divisor is limited to 1, so that a clip near real has a smaller gradient": (
            (fake - real) / (x - real).abs().mean((1, 2), keepdim=True).clamp(min=1)
        ),
    }
    what = "not (fake - real) / mean |x - real|"
    check(found, gradient_by_hand(x, real, fake), what, suspects, 1e-4)
    for other in (x, fake):
        is_finite = dmd.dmd_gradient(x, x, other).isfinite().all()
        assert is_finite, "division by zero where x equals real"
    wide = dmd.dmd_gradient(x.double(), real.double(), fake.double())
    check_dtype(wide, torch.float64, "the gradient has the dtype of x")


class Net(nn.Module):
    """Predicts the same clean estimates in every pass, times a weight, and plus its caption."""

    def __init__(self, x0):
        super().__init__()
        self.cfg, self.x0, self.passes = CFG, x0, []
        self.weight = nn.Parameter(torch.ones(()))

    def project_text(self, video_features, audio_features=None, mask=None):
        audio_features = video_features if audio_features is None else audio_features
        video, audio = (x[:, :, None] for x in (video_features, audio_features))
        return model.TextKV(((video, video),), ((audio, audio),), mask)

    def forward(self, video, audio, sigma_video, sigma_audio, text, span, view, ropes=None):
        sigmas = [s.view(len(s), -1) for s in (sigma_video, sigma_audio)]
        self.passes.append(
            SimpleNamespace(
                x=(video, audio), sigmas=sigmas, span=span, view=view, features=text.video[0][0],
                has_grad=torch.is_grad_enabled(),
            )
        )  # fmt: skip
        velocities = []
        for x, end, s in zip((video, audio), self.x0, sigmas):
            x0 = self.weight * end.repeat(len(x) // len(end), 1, 1) + told(text)
            velocities.append((x - x0) / s[..., None])
        return velocities


def told(text):
    """Return a number for each caption: the mean of some features."""
    return text.video[0][0].flatten(1)[:, ::5].mean(1)[:, None, None]


def captions_of(clips):
    """Return different captions of three words."""
    return toy_captions(torch.tensor([[1, 5, 7], [2, 6, 8], [3, 5, 8]]).repeat(clips // 3, 1))


def random_clips(seed, clips=CLIPS):
    sizes = (len(SPAN.video), CFG.video_channels), (len(SPAN.audio), CFG.audio_channels)
    return [1 + 2 * random_tensor(clips, *size, seed=seed + i) for i, size in enumerate(sizes)]


def matched(guidance=(1, 1), seed=3, clips=CLIPS):
    """Compute the losses of some clips; also return the clips and both stand-ins."""
    made = [x.requires_grad_() for x in random_clips(0, clips)]
    real, fake = (Net(random_clips(seed, clips)) for seed in (10, 20))
    g = torch.Generator().manual_seed(seed)
    with watched(made, real.x0, fake.x0):
        losses = dmd.dmd_losses(made, captions_of(clips), real, fake, guidance, g)
    return losses, made, real, fake


@pytest.mark.points(1, "dmd_losses")
def test_both_scores_judge_the_same_noised_clip():
    """One sigma per clip, for both streams and both scores; only the real score has guidance."""
    _, clips, real, fake = matched(guidance=(2.0, 3.0))
    (r,), (f,) = real.passes, fake.passes
    assert close(*f.sigmas), "video and audio of a clip have different noise levels"
    levels = set(f.sigmas[0][:, 0].tolist())
    assert len(levels) == CLIPS, "all clips share one noise level: draw one per clip"
    assert len(f.x[0]) == CLIPS, "the fake score is guided, but it has no guidance"
    guided = len(r.x[0]) == 2 * CLIPS
    assert guided, "the real score is not guided: it needs every clip without caption too"
    for x, y in zip(r.x, f.x):
        assert torch.equal(x[:CLIPS], y), "the two scores see different noised clips"
        assert not y.requires_grad, "the noised clips carry a gradient into the scores"
    assert not any(p.has_grad for p in (r, f)), "the scores only judge: no gradient through them"
    for name, p in (("real", r), ("fake", f)):
        assert p.span == SPAN, f"the {name} score judges {p.span}, not the whole clip"
        masks = getattr(p.view, "masks", "a cache")
        assert not masks, f"the {name} score is bidirectional: a MaskedView without masks"
    is_read = torch.equal(f.features[:, :, 0], captions_of(CLIPS).features[0])
    assert is_read, "the fake score does not read the captions of its clips"


def noise_of(net, clips):
    """Return the levels of a score's pass, and the noise (video, audio) of its input."""
    (p,) = net.passes
    noise = [
        ((x[: len(clip)] - (1 - s[..., None]) * clip) / s[..., None]).detach()
        for x, clip, s in zip(p.x, clips, (s[: len(clips[0])] for s in p.sigmas))
    ]
    return p.sigmas[0][:, 0], noise


@pytest.mark.points(1, "dmd_losses")
def test_levels_and_noise_come_from_the_generator():
    """Levels as of `draw_score_sigmas`, and noise of its own for every clip and stream."""
    _, clips, _, fake = matched(clips=96)
    sigma, noise = noise_of(fake, clips)
    mean = float(sigma.mean())
    levels = f"noise levels have a mean of {mean:.2f}, not about 0.81, and begin at"
    in_range = 0.75 < mean < 0.87 and 0.139 < sigma.min() and sigma.max() < 0.998
    assert in_range, f"{levels} {sigma.min():.2f}: draw them by `draw_score_sigmas`"
    for name, n in zip(STREAMS, noise):
        alike = any(close(a, b, 1e-3) for a, b in itertools.combinations(n[:6], 2))
        assert not alike, f"two clips get the same noise of {name}"
        is_noise = abs(float(n.std()) - 1) < 0.05 and abs(float(n.mean())) < 0.05
        assert is_noise, f"{name}: the scores do not see (1 - sigma) x + sigma noise"
    again, other = (noise_of(net, made) for _, made, _, net in map(matched_at, (3, 4)))
    first = noise_of(matched_at(3)[3], matched_at(3)[1])
    is_same = torch.equal(first[0], again[0]) and all(map(close, first[1], again[1]))
    assert is_same, "the same generator gives other levels or noise the second time"
    differs = not close(first[0], other[0]) and not close(first[1][0], other[1][0])
    assert differs, "another seed of the generator gives the same levels or noise"


@functools.cache
def matched_at(seed):
    return matched(seed=seed)


@pytest.mark.points(2, "dmd_losses")
def test_each_stream_gets_its_own_gradient():
    """dL/dx = (f - r) / mean |x - r| / numel, for each stream; r with its scale of guidance."""
    for guidance in ((1, 1), (2.0, 5.0)):
        losses, clips, real, fake = matched(guidance)
        assert len(losses) == 2, f"one loss for video and one for audio, not {len(losses)}"
        captions = captions_of(CLIPS)
        with torch.no_grad():
            c, u = (told(real.project_text(*x)) for x in (captions.features, captions.nothing))
        for name, loss, x, r, f, w in zip(STREAMS, losses, clips, real.x0, fake.x0, guidance):
            (found,) = torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True)
            order = f"the loss of {name} has no gradient for {name}: video comes first, then audio"
            assert found is not None, order
            (other,) = (other for other in clips if other is not x)
            (crossed,) = torch.autograd.grad(loss, other, retain_graph=True, allow_unused=True)
            mixed = crossed is not None and crossed.any()
            assert not mixed, f"the loss of {name} also depends on the other stream: return two"

            def gradient(w, swapped=False, f=f, r=r, x=x):
                ends = r + u + w * (c - u), f + c
                with torch.no_grad():
                    return gradient_by_hand(x, *(ends[::-1] if swapped else ends)) / x.numel()

            other = guidance[name == "video"]
            scales = f"{name}: guidance {guidance} is"
            suspects = {
                f"{name}: real and fake are swapped": gradient(w, swapped=True),
                f"{name}: the sign is wrong": -gradient(w),
                f"{scales} (video, audio), but this is the scale of the other stream": gradient(
                    other
                ),
                f"{scales} ignored": gradient(1),
            }
            if guidance == (1, 1):
                suspects = dict(list(suspects.items())[:2])
            check(found, gradient(w), f"{name}: not (f - r) / mean |x - r| / n", suspects)
        learns = [p.weight for p in (real, fake)]
        reached = torch.autograd.grad(sum(losses), learns, allow_unused=True)
        assert reached == (None, None), "a gradient reaches the weights of a score"


def run_updates(steps=(0,), seed=0):
    """Run updates of stand-ins: all events in order, and what the updates returned.

    Each event is a name and what is known of it; learners, stubs and `draw` record themselves.
    """
    events = []

    def record(name, **known):
        events.append(SimpleNamespace(name=name, has_grad=torch.is_grad_enabled(), **known))
        return events[-1]

    def learner(name):
        def update(loss, step):
            record("update", who=name, loss=float(loss.detach()), step=step)
            loss.backward()  # both of its parts must learn
            return 0.125

        recipe = SimpleNamespace(batch=2, seed=seed)
        net = nn.Linear(1, 1)
        return SimpleNamespace(recipe=recipe, model=net, update=update)

    def make(net, clips, captions, g):
        drawn = torch.rand(2, 1, 1, generator=g)
        made = [drawn + 0 * next(net.parameters()).sum() for _ in range(2)]
        record("make", net=net, clips=clips, captions=captions, drawn=drawn, made=made)
        return made

    def draw(n, g):
        features = torch.rand(n, 1, 3, generator=g)
        clips = [torch.full((n, 1, 1), -1.0) for _ in STREAMS]
        captions = model.Captions((features,), (0 * features,))
        record("draw", n=n, clips=clips, captions=captions)
        return clips, captions

    def dmd_losses(clips, captions, real, fake, guidance, generator):
        known = dict(made=clips, captions=captions, real=real, fake=fake, guidance=guidance)
        losses = [torch.tensor(x, requires_grad=True) for x in (1.0, 2.0)]
        record("dmd_losses", **known, g=generator, losses=losses)
        return losses

    def critic_losses(fake, clips, captions, generator):
        losses = [torch.tensor(x, requires_grad=True) for x in (3.0, 4.0)]
        known = dict(fake=fake, made=clips, captions=captions)
        record("critic_losses", **known, g=generator, losses=losses)
        return losses

    generator, critic, real = learner("generator"), learner("critic"), nn.Linear(1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmd, "dmd_losses", dmd_losses)
        patch.setattr(dmd, "critic_losses", critic_losses)
        update = dmd.make_update(generator, critic, real, (2, 3), make, draw)
        with watched():
            returned = [update(step) for step in steps]
    return SimpleNamespace(
        events=events, returned=returned, generator=generator, critic=critic, real=real
    )


def of(run, name):
    return [event for event in run.events if event.name == name]


@pytest.mark.points(1, "make_update")
def test_the_generator_steps_once_and_the_critic_five_times():
    """In this order, each with its own optimiser, on the sum of video and audio."""
    run = run_updates(steps=(7,))
    steps = of(run, "update")
    found = [step.who for step in steps]
    assert found == ["generator"] + 5 * ["critic"], f"the steps are: {', '.join(found)}"
    losses = [step.loss for step in steps]
    assert losses == [3.0] + 5 * [7.0], f"losses of the steps are {losses}: sum video and audio"
    told = {step.step for step in steps}
    assert told == {7}, f"update(7) tells the learners the steps {told}"
    for event in of(run, "dmd_losses") + of(run, "critic_losses"):
        for name, loss in zip(STREAMS, event.losses):
            learns = loss.grad is not None
            assert learns, f"{event.name}: the loss of {name} gets no gradient in the update"


@pytest.mark.points(1, "make_update")
def test_every_loss_gets_its_own_networks_clips_and_captions():
    """Teacher and critic, the guidance, and the captions that the clips were made of."""
    run = run_updates()
    (matching,), learning = of(run, "dmd_losses"), of(run, "critic_losses")
    swapped = matching.real is run.critic.model and matching.fake is run.real
    assert not swapped, "dmd_losses: real and fake are swapped: it drives clips from the teacher"
    assert matching.real is run.real, "dmd_losses: the real score is not the teacher"
    assert matching.fake is run.critic.model, "dmd_losses: the fake score is not the critic"
    given = matching.guidance
    assert given == (2, 3), f"dmd_losses: the guidance (2, 3) is not passed on, but {given}"
    wrong = "critic_losses: the critic learns, but another network is given"
    assert all(event.fake is run.critic.model for event in learning), wrong
    for k, (drawn, made, judged) in enumerate(
        zip(of(run, "draw"), of(run, "make"), [matching, *learning])
    ):
        step = "the generator's step" if k == 0 else f"critic step {k}"
        assert drawn.n == 2, f"{step}: the batch is 2, but {drawn.n} examples are drawn"
        assert made.net is run.generator.model, f"{step}: only the generator may make clips"
        assert made.clips is drawn.clips, f"{step}: `make` does not get the drawn clips"
        same = made.captions is drawn.captions
        assert same, f"{step}: `make` gets other captions than those drawn for this step"
        told = f"{step}: the clips are judged with other captions than they were made of"
        assert judged.captions is made.captions, told
        pairs = list(zip(judged.made, made.made))
        own = len(judged.made) == 2 and all(a is b or close(a, b) for a, b in pairs)
        assert own, f"{step}: the loss gets other clips than those made for this step"


@pytest.mark.points(1, "make_update")
def test_the_critic_learns_from_new_clips_without_gradient():
    """The updated generator makes new clips; only those of its own step have a gradient."""
    run = run_updates()
    made = of(run, "make")
    different = len({float(event.captions.features[0].sum()) for event in made})
    assert different == 6, f"six steps have {different} different batches: draw and make new ones"
    names = [event.name for event in run.events]
    first, makes = names.index("update"), [i for i, name in enumerate(names) if name == "make"]
    late = "clips of the critic are made before the generator's update: make them after it"
    assert all(i > first for i in makes[1:]), late
    has_grad = made[0].made[0].requires_grad
    assert has_grad, "the clips of the generator's step carry no gradient: it would learn nothing"
    for event in of(run, "critic_losses"):
        trains = any(x.requires_grad for x in event.made)
        assert not trains, "the critic's step trains through the generator: use no_grad"
        assert event.has_grad, "the critic's losses are computed without gradients"


def draws(run):
    return [float(event.captions.features[0].sum()) for event in of(run, "make")] + [
        float(event.drawn.sum()) for event in of(run, "make")
    ]


@pytest.mark.points(1, "make_update")
def test_a_step_draws_the_same_whenever_it_is_run():
    """trainer.generator(seed, step) is all its randomness, so an interrupted run can resume."""
    first, second, both = (draws(run_updates(steps)) for steps in ((0,), (1,), (0, 1)))
    later = [both[i] for half in (0, 12) for i in range(half + 6, half + 12)]
    resumed = "step 1 draws other numbers after step 0 than in a resumed run: one generator a step"
    assert later == second, resumed
    assert first != second, "steps 0 and 1 draw the same numbers: `step` is ignored"
    assert draws(run_updates(seed=1)) != first, "another seed draws the same: `seed` is ignored"
    run = run_updates((2,), seed=3)
    g = trainer.generator(3, 2)
    is_first = close(of(run, "draw")[0].captions.features[0], torch.rand(2, 1, 3, generator=g))
    assert is_first, "the numbers are not those of trainer.generator(seed, step)"
    matching = of(run, "dmd_losses")[0].g
    shared = all(event.g is matching for event in of(run, "critic_losses"))
    given = isinstance(matching, torch.Generator)
    assert given and shared, "the losses draw from another generator than the step"


@pytest.mark.points(1, "make_update")
def test_the_update_returns_what_the_training_logs():
    """Losses and the norm of the gradient, by name; `trainer.Run.train` writes them down."""
    (found,) = run_updates().returned
    assert isinstance(found, dict), f"the update returns {found}, expected losses by name"
    numbers = {name: float(torch.as_tensor(value).detach()) for name, value in found.items()}
    assert all(isinstance(name, str) for name in numbers), f"names are strings: {numbers}"
    right = {"video": 1.0, "audio": 2.0, "norm": 0.125}
    what = "generator's losses and norm by these names"
    assert right.items() <= numbers.items(), f"{numbers} does not hold the {what}: {right}"
