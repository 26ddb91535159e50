"""Does a stream follow its first picture? The ball's identity in it is in no caption.

    python -m studies.image      both shipped students of stage III, 4 minutes on one core

The first latent frame of a stream is given: that of a held-out clip of the ground truth, with its
caption. No student was trained for it. Three ways to stream:

    no picture   the caption alone
    renoised     after every pass, the estimate of this frame is replaced by the picture, and the
                 next pass sees it with fresh noise, like every other estimate
    clean        every pass of block 0 sees this frame without noise, at noise level 0, beside noisy
                 audio (and noisy later frames, if block 0 is a whole second): generate.py --image

Three columns are new; the others are those of evaluate.py:

    hue, radius   how well later frames follow frame 0 of their clip: 1 - d / D. d: difference to
                  frame 0, D: mean difference to frame 0 of the other clips. 1: the same ball,
                  0: any ball. In frames 1 to 48 ("early") and from 2.5 s on ("late")
    jump          pixels between the ball in frame 0 and in frame 1

Ground truth, in the toy's latents, and the teacher have no given picture: their rows say how well a
clip follows its own frame 0, which limits what a student can have learnt.

Expected: with a picture, hue and radius of a student are near its `kept`. Refuted if their 95 %
intervals include those without a picture.
"""

from functools import partial

import numpy as np
import torch
from torch import nn

import model
import teacher
from film.picture import WithPicture
from kv_cache import CachedView
from masks import num_blocks
from plumbing import cli
from rollout import few_step_sigmas, rollout, whole_clip
from studies import compare, evaluate, plots
from toy import codec as toy_codec
from toy import detectors
from toy import world as toy_world
from toy.source import load_bidirectional

STUDENTS = compare.SHIPPED
SECONDS = 5
ENDS = 2.5, 97.5  # percent: of the 95 % intervals
EARLY, LATE = slice(1, 49), slice(60, None)  # frames
COLUMNS = {
    "hue_early": "hue, early", "radius_early": "radius, early", "hue_late": "hue, late",
    "radius_late": "radius, late", "jump": "jump px", "f1": "F1", "whole": "whole", "kept": "kept",
}  # fmt: skip


# ---- ways to stream ----


class Renoised(nn.Module):
    """A student whose estimate of the first latent frame is a picture."""

    def __init__(self, net, picture):
        """picture: clean tokens (B, rows * columns, C_v)."""
        super().__init__()
        self.net, self.cfg, self.project_text = net, net.cfg, net.project_text
        self.picture = picture

    def forward(self, video, audio, sigma_video, *others):
        v, a = self.net(video, audio, sigma_video, *others)
        span = others[2]
        if span.video.start == 0 and sigma_video.any():  # sigma = 0: the refresh
            n = self.picture.shape[1]
            v[:, :n] = (video[:, :n] - self.picture) / sigma_video[:, None, None]
        return v, a


WAYS = {"no picture": lambda net, picture: net, "renoised": Renoised, "clean": WithPicture}


@torch.inference_mode()
def stream(net, codec, way, window, clips, seed):
    """Stream every clip's caption, from its first frame: video and sound."""
    text = net.project_text(toy_world.caption_features(toy_world.caption_tokens(clips)))
    picture = codec.encode_picture(toy_world.render_video(clips, 1)[:, 0])
    blocks, sigmas = num_blocks(SECONDS, net.cfg), few_step_sigmas(net.cfg)
    view, g = CachedView(net.cfg, blocks, window), torch.Generator().manual_seed(seed)
    made = rollout(
        WAYS[way](net, picture), lambda k: text, blocks, sigmas, g, batch=len(picture), view=view
    )
    return evaluate.decode(codec, whole_clip(made))


def makers(args) -> dict:
    """Return {row: function of clips and seed that makes video and sound}."""
    codec, real = toy_codec.load(), load_bidirectional(args.real)
    found = {
        "truth in latents": partial(evaluate.through_codec, codec, SECONDS),
        "teacher": partial(evaluate.from_teacher, real, codec, teacher.schedule(32)),
    }
    for blocks, student in STUDENTS.items():
        net = model.load(cli.weights_path(student.path))
        for way in WAYS:
            found[f"{blocks}, {way}"] = partial(stream, net, codec, way, student.window)
    return found


# ---- measuring ----


def looks(video):
    """Return hue and radius in frame 0, early and late (B, 3, 2), and the jump (B,)."""
    ball = detectors.see_ball(video)
    nothing = detectors.Events(torch.zeros(0), torch.zeros(0, dtype=torch.long))
    parts = [detectors.Ball(*(x[:, s] for x in ball)) for s in (slice(1), EARLY, LATE)]
    seen = [detectors.identity(part, video, [nothing] * len(video))[:, :2] for part in parts]
    return torch.stack(seen, 1).numpy(), (ball.place[:, 1] - ball.place[:, 0]).norm(dim=1).numpy()


def follow_metrics(looks, jump) -> dict:
    """Return the new columns."""
    found = {"jump": jump.mean()}
    for i, name in enumerate(("hue", "radius")):
        first, early, late = looks[:, :, [i]].swapaxes(0, 1)
        found[f"{name}_early"] = evaluate.identity_kept(first, early)
        found[f"{name}_late"] = evaluate.identity_kept(first, late)
    return found


def measure(name, make, seeds, truth) -> dict:
    """Return one row: every metric with its 95 % interval over the clips."""
    seen = []

    def make_and_look(clips, seed):
        video, sound = make(clips, seed)
        seen.append(looks(video))
        return video, sound

    w = evaluate.measure_all(make_and_look, seeds, [(0, SECONDS)], name)[0]
    both = [np.concatenate(x) for x in zip(*seen)]
    rng, n = np.random.default_rng(0), len(seeds)
    rows = [rng.integers(n, size=n) for _ in range(evaluate.RESAMPLES)]
    draws = [follow_metrics(*(x[r] for x in both)) for r in rows]
    own = {
        key: [round(float(x), 4) for x in (value, *np.percentile([d[key] for d in draws], ENDS))]
        for key, value in follow_metrics(*both).items()
    }
    return evaluate.with_intervals(w, truth, truth) | own


def table(rows) -> str:
    """Return a Markdown table of {name: metrics with intervals}."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name, values in rows.items():
        cells = [f"{v:.2f} ± {(high - low) / 2:.2f}" for v, low, high in map(values.get, COLUMNS)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- command line ----


def main():
    p = cli.parser(__doc__)
    p.add_argument("--clips", type=evaluate.CLIPS, default=48, help="held-out clips")
    cli.add_weights(p, "--real", "weights/toy_teacher.safetensors", "the teacher")
    p.add_argument("--out", default="results/image", help="writes .json, .md and .png")
    args = p.parse_args()
    args.command = cli.command(p, args)
    evaluate.check(SECONDS, args.out)
    seeds = evaluate.held_out(args.clips)
    truth = evaluate.measure_truth(SECONDS, seeds, [(0, SECONDS)])[0]
    rows = {name: measure(name, make, seeds, truth) for name, make in makers(args).items()}
    titles = {name: COLUMNS[name] for name in ("hue_early", "radius_early", "jump", "f1")}
    evaluate.write(args, {"result": rows}, table(rows), plots.draw_rows(rows, titles))
    print(table(rows))


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
