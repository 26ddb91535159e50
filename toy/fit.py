"""Fit the linear codec, train the network that corrects its pictures, and measure both.

    python -m toy.fit            quality of both on fast balls: held-out clips, and clips that the
                                 shipped student streams; draws results/decoder.png, or --out
    python -m toy.fit codec      fits another linear codec and writes it to runs/, or to --out
    python -m toy.fit decoder    trains another network, for minutes, and writes it likewise

The ball should move from frame to frame as far at the border of two latents as inside of one.
"""

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

import config
import generate
from film import sheet
from plumbing import cli, files, trainer
from rollout import whole_clip
from toy import codec as toy_codec
from toy import decoder, detectors, source, world

FIT_CLIPS, FIT_SECONDS = 384, 5  # the linear codec is fitted on the clips of seeds 0 to 383
STEPS, BATCH, SECONDS = 1200, 12, 2  # training of the network, on clips of 2 seconds
NOISE = 0.1  # most noise on its latents: the latents of a model are not exact, either
SQUARES = 30  # weight of the squared error, which is large where the ball is misplaced
JUMP = 2.5  # pixels; a fast ball moves 1.1 from frame to frame


# ---- quality ----


def ball_steps(video, cfg=config.TOY):
    """Return how far the ball moves between frames, in pixels: at borders of latents, and inside.

    >>> border, inside = ball_steps(world.render_video(world.draw_clips([0]), 5))
    >>> border.shape, inside.shape
    (torch.Size([1, 15]), torch.Size([1, 105]))
    """
    steps = detectors.see_ball(video).place.diff(dim=1).norm(dim=-1)  # (B, P - 1)
    is_border = torch.arange(steps.shape[1]) % cfg.video_stride == 0
    return steps[:, is_border], steps[:, ~is_border]


def row(name, shown, truth=None) -> str:
    """Return a row of the table; without the true pictures, no error can be measured."""
    border, inside = ball_steps(shown)
    error = psnr = "–"
    if truth is not None:
        error = f"{(shown - truth).abs().mean():.4f}"
        psnr = f"{-10 * (shown - truth).square().mean().log10():.1f} dB"
    border, inside, jumps = border.mean(), inside.mean(), (border > JUMP).float().mean()
    steps = f"{border:.2f} px | {inside:.2f} px | {border / inside:.2f} | {jumps:.1%}"
    return f"| {name} | {error} | {psnr} | {steps} |"


def fast_clips(n):
    """Return the first n held-out clips with a fast ball."""
    clips = world.draw_clips(range(world.HELD_OUT, world.HELD_OUT + 4 * n))
    return world.Clips(*(x[clips.words[:, 1] == 1][:n] for x in clips))


def streamed_latents(each=6, seconds=5):
    """Return video latents that the student `toy` streams: `each` fast balls of every colour."""
    net = source.load_student(source.WEIGHTS["toy"], config.TOY)
    prompts = [f"{colour} fast" for colour in world.COLOURS]
    made = [list(generate.stream(net, words, seconds, batch=each)) for words in prompts]
    return torch.cat([whole_clip(blocks)[0] for blocks in made])


def measure(codecs, n=48):
    """Print the table of {name: codec}; return the pictures of one clip by name."""
    clips, linear = fast_clips(n), toy_codec.load()
    video, sound = (f(clips, FIT_SECONDS) for f in (world.render_video, world.render_sound))
    (tokens, audio), streamed = linear.encode(video, sound), streamed_latents()
    print(f"| fast balls | error | PSNR | step at borders | inside | ratio | over {JUMP} px |")
    print("|---|---|---|---|---|---|---|")
    shown = {"rendered": video}
    print(row("rendered", video))
    for name, codec in codecs.items():
        shown[name] = codec.decode_video(tokens, True)
        print(row(f"held-out clips, {name}", shown[name], video))
    for name, codec in codecs.items():
        print(row(f"streamed clips, {name}", codec.decode_video(streamed, True)))
    error = linear.decode_audio(audio, True) - sound
    print(f"sound: PSNR {-10 * error.square().mean().log10():.1f} dB")
    return {name: video[:1] for name, video in shown.items()}


def draw_motion(shown, start=20, count=10):
    """Draw `count` frames of every clip, and how far its ball moves between frames."""
    figure, axes = plt.subplots(
        len(shown) + 1, 1, figsize=(8, 0.8 * len(shown) + 2.2), layout="constrained",
        height_ratios=[1] * len(shown) + [2],
    )  # fmt: skip
    colours = "black", sheet.SINK, sheet.VIDEO
    for ax, (name, video), colour in zip(axes, shown.items(), colours):
        strip = torch.cat(list(video[0, start : start + count]), -1).permute(1, 2, 0)
        ax.imshow(strip.numpy(), interpolation="bicubic")
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(name, fontsize=8)
        steps = detectors.see_ball(video).place.diff(dim=1).norm(dim=-1)[0, :72]
        axes[-1].plot(range(1, 73), steps.numpy(), label=name, color=colour, lw=1.2)
    axes[-1].set_xlabel("frame (the numbered ones are the first of a latent)", fontsize=8)
    axes[-1].set_ylabel("step of the ball (pixels)", fontsize=8)
    axes[-1].set_xticks(range(1, 73, 8))
    axes[-1].legend(fontsize=8, frameon=False, ncols=3)
    return figure


# ---- fitting and training ----


def fit_codec() -> dict:
    """Fit the principal components of real clips; return the tensors of the codec."""
    clips, codec = world.draw_clips(range(FIT_CLIPS)), toy_codec.ToyCodec()
    codec.fit(world.render_video(clips, FIT_SECONDS), world.render_sound(clips, FIT_SECONDS))
    return codec.state_dict()


def train_decoder() -> dict:
    """Train the network on latents of the shipped linear codec; return its averaged weights."""
    recipe = trainer.Recipe(STEPS, BATCH, muon_lr=0, adam_lr=3e-3)
    torch.manual_seed(recipe.seed)
    codec = decoder.LearnedCodec()
    codec.load_state_dict(toy_codec.load().state_dict(), strict=False)
    learner, bar = trainer.Learner(codec, recipe), tqdm(range(STEPS), "decoder")
    for step in bar:
        loss = decoding_loss(codec, trainer.generator(recipe.seed, step))
        learner.update(loss, step)
        bar.set_postfix(loss=f"{loss.item():.4f}")
    return {n: learner.average.tensors[n].half() for n, _ in codec.named_parameters()}


def decoding_loss(codec, g):
    """Return the error of the pictures of new clips, decoded from noisy latents."""
    clips = world.draw_clips(torch.randint(world.HELD_OUT, (BATCH,), generator=g).tolist())
    video = world.render_video(clips, SECONDS)
    z, _ = codec.encode(video, world.render_sound(clips, SECONDS))
    noise = NOISE * torch.rand(BATCH, 1, 1, generator=g)
    z = z + noise * torch.randn(z.shape, generator=g)
    error = codec.decode_patches(z, True)[1] - codec.cut_video(video)[1]  # of later latents
    return error.abs().mean() + SQUARES * error.square().mean()


def main():
    p = cli.parser(__doc__)
    p.add_argument("part", nargs="?", choices=["codec", "decoder"], help="what to fit or train")
    p.add_argument("--out", help="file to write instead")
    args = p.parse_args()
    out = args.out or (f"runs/toy_{args.part}.safetensors" if args.part else "results/decoder.png")
    files.check_writable(out, makes_folders=True)
    if not args.part:
        shown = measure({"linear": toy_codec.load(), "corrected": decoder.load()})
        sheet.save(draw_motion(shown), out)
    else:
        tensors = fit_codec() if args.part == "codec" else train_decoder()
        made_by = {"command": f"python -m toy.fit {args.part}"}
        files.save_weights(out, tensors, config.TOY, made_by)
    print(f"wrote {out}")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
