"""The timeline cut into one-second blocks, and who may attend to whom.

A causal generator must know what "earlier" means for two streams with different rates: 3 video
latents per second (LTX-2: 384 tokens each) and 25 audio latents (one token each). OmniForcing
cuts both streams at the same times. In both VAEs the first latent (V0, A0) covers a single input
frame. V0 and A0 therefore stand at time 0, and every later second holds exactly 3 video and 25
audio latents:

    seconds       0        1        2        3
    video      V0 | V1..V3 | V4..V6 | V7..V9 |
    audio      A0 | A1..25 | 26..50 | 51..75 |         paper: 1 + 3k, 1 + 25k up to block k
    block       0 |    1   |    2   |    3   |         (block 0 is the "global prefix")

    released checkpoint: the first second is in block 0, so 4 + 3k and 26 + 25k up to block k

One rule gives all four masks: **a query may attend to a key if the key's block is not later than
the query's block.** Inside a block, attention goes both ways; between blocks, only backwards in
time. Sink tokens (sink_tokens.py) stand at the start of the audio stream and belong to block 0:
every query of audio self-attention and A2V attends to them; they attend to block 0 only.  (The
paper's names: asymmetric block-causal alignment, global prefix.)

In a boolean mask, True means "may attend", as in torch's scaled_dot_product_attention. Here are
blocks 0 and 1 of the toy, 16 and 48 video tokens, of which every eighth is drawn:

>>> print(mask_to_text(four_masks(config.TOY, 2, sinks=False)["video_self"][::8, ::8]))
##......
##......
########
########
########
########
########
########

    python masks.py                  prints all four masks as text, every sixth token
    python -m studies.plots masks    draws them, like the figure of the paper
"""

from dataclasses import dataclass
from fractions import Fraction

import torch

import config

# The four attentions of a layer. In "a2v" (audio to video), the queries come from video, the keys
# and values from audio.
SITES = ("video_self", "audio_self", "a2v", "v2a")


@dataclass(frozen=True)
class Span:
    """The latent frames of both streams that one pass of the transformer works on."""

    video: range  # video latent frames, counted from the start of the clip
    audio: range  # audio latent frames, likewise

    @property
    def has_sinks(self) -> bool:
        """True if the span starts with block 0, to which the sinks belong."""
        return self.audio.start == 0


def num_blocks(seconds, cfg) -> int:
    """Number of blocks of a clip of `seconds`.  (Paper layout: N seconds have N + 1 blocks.)

    Raises ValueError, naming durations that fit, if the clip would end inside a block.

    >>> num_blocks(5, config.TOY), num_blocks(5, config.RELEASED)
    (6, 5)
    >>> num_blocks(2.5, config.TOY)
    Traceback (most recent call last):
    ValueError: 2.5 seconds end inside a block: blocks end at 0, 1, 2, ... seconds
    """
    first_end = Fraction(cfg.prefix_video_frames - 1) / cfg.video_rate
    step = Fraction(cfg.block_seconds)
    later = (Fraction(seconds) - first_end) / step
    if later < 0 or later.denominator != 1:
        ends = ", ".join(f"{float(first_end + k * step):g}" for k in range(3))
        raise ValueError(
            f"{seconds:g} seconds end inside a block: blocks end at {ends}, ... seconds"
        )
    return 1 + int(later)


def full_window(blocks) -> int:
    """Smallest window that lets the last of `blocks` blocks attend to all of them.

    >>> bool(may_attend(torch.tensor([5]), torch.arange(6), full_window(6)).all())
    True
    >>> bool(may_attend(torch.tensor([5]), torch.arange(6), full_window(6) - 1).all())
    False
    """
    return blocks - 2  # block 0 is pinned, and the query's own block is not counted


def trained_window(cfg, seconds=config.CLIP_SECONDS) -> int:
    """Smallest window that hides nothing in a training clip; longer ones harm a stream.

    >>> trained_window(config.TOY), trained_window(config.RELEASED)
    (4, 3)
    """
    return full_window(num_blocks(seconds, cfg))


def block_span(k, cfg) -> Span:
    """Latent frames of block k.

    >>> block_span(2, config.TOY)
    Span(video=range(4, 7), audio=range(26, 51))
    >>> block_span(1, config.RELEASED)
    Span(video=range(4, 7), audio=range(26, 51))
    """
    return Span(
        _block_frames(k, cfg.prefix_video_frames, cfg.video_frames_per_block),
        _block_frames(k, cfg.prefix_audio_frames, cfg.audio_frames_per_block),
    )


def _block_frames(k, prefix, step) -> range:
    return range(prefix) if k == 0 else range(prefix + (k - 1) * step, prefix + k * step)


def clip_span(blocks, cfg) -> Span:
    """Latent frames of a clip of `blocks` blocks.

    >>> clip_span(6, config.FULL)
    Span(video=range(0, 16), audio=range(0, 126))
    """
    last = block_span(blocks - 1, cfg)
    return Span(range(last.video.stop), range(last.audio.stop))


def clip_of_seconds(cfg, seconds=config.CLIP_SECONDS) -> Span:
    """Latent frames of a clip of `seconds`, by default of a training clip.

    >>> clip_of_seconds(config.TOY)
    Span(video=range(0, 16), audio=range(0, 126))
    """
    return clip_span(num_blocks(seconds, cfg), cfg)


def block_interval(k, cfg) -> tuple[float, float]:
    """Start and end of block k in seconds, counted from the first pixel frame.

    In the paper's layout, block 0 is that frame alone: it starts and ends at 0.

    >>> block_interval(0, config.TOY), block_interval(3, config.TOY)
    ((0.0, 0.0), (2.0, 3.0))
    """
    end = Fraction(block_span(k, cfg).video.stop - 1) / cfg.video_rate
    start = Fraction(0) if k == 0 else end - Fraction(cfg.block_seconds)
    return float(start), float(end)


def block_of_frame(frame, prefix, step):
    """Block of a latent frame (number or tensor): 0 in the prefix, then one per `step` frames.

    Each stream calls this with its own prefix and step. Video and audio frames of the same second
    therefore get the same block index.

    >>> [block_of_frame(f, 1, 3) for f in range(8)]
    [0, 1, 1, 1, 2, 2, 2, 3]
    """
    later = 1 + (frame - prefix) // step
    return later * (frame >= prefix)


def frame_blocks(blocks, cfg) -> tuple[torch.Tensor, torch.Tensor]:
    """Block index of every latent frame of a clip: (F_v,) and (F_a,)."""
    span = clip_span(blocks, cfg)
    video, audio = torch.tensor(span.video), torch.tensor(span.audio)
    return (
        block_of_frame(video, cfg.prefix_video_frames, cfg.video_frames_per_block),
        block_of_frame(audio, cfg.prefix_audio_frames, cfg.audio_frames_per_block),
    )


def video_token_blocks(blocks, cfg) -> torch.Tensor:
    """(T_v,) block index of every video token of a clip; order: frame, then row, then column."""
    return frame_blocks(blocks, cfg)[0].repeat_interleave(cfg.tokens_per_frame)


def audio_token_blocks(blocks, cfg, sinks=True) -> torch.Tensor:
    """(S + F_a,) block index of every audio token of a clip; sinks come first, in block 0."""
    per_frame = frame_blocks(blocks, cfg)[1]
    return torch.cat([per_frame.new_zeros(cfg.num_sinks if sinks else 0), per_frame])


def may_attend(query_blocks, key_blocks, window=None, pinned=True) -> torch.Tensor:
    """The rule.  (Q,) and (K,) block indices -> (Q, K) booleans.

    window   number of blocks, before its own, that a query attends to; None: all of them
    pinned   block 0 (prefix and sinks) stays visible for ever; False is an ablation

    >>> may_attend(torch.arange(4), torch.arange(4), window=1).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 0, 1, 1]], dtype=torch.int32)
    """
    q, k = query_blocks[:, None], key_blocks[None, :]
    allowed = k <= q
    if window is not None:
        allowed &= (k >= q - window) | ((k == 0) & pinned)
    return allowed


def four_masks(cfg, blocks, window=None, sinks=True) -> dict[str, torch.Tensor]:
    """The masks of all four attentions of a layer, for a whole clip.

    video_self (T_v, T_v)   audio_self (S+F_a, S+F_a)   a2v (T_v, S+F_a)   v2a (S+F_a, T_v)

    Caption attention has no block mask: the prompt is known before the first frame.
    """
    video = video_token_blocks(blocks, cfg)
    audio = audio_token_blocks(blocks, cfg, sinks)
    return {
        "video_self": may_attend(video, video, window),
        "audio_self": may_attend(audio, audio, window),
        "a2v": may_attend(video, audio, window),
        "v2a": may_attend(audio, video, window),
    }


def mask_to_text(mask) -> str:
    """Draw a mask as text: '#' where the query (row) may attend to the key (column)."""
    return "\n".join("".join("#" if allowed else "." for allowed in row) for row in mask.tolist())


if __name__ == "__main__":
    for site, mask in four_masks(config.TOY, 3).items():
        print(
            f"{site}: {mask.shape[0]} queries x {mask.shape[1]} keys, {mask.float().mean():.0%} on"
        )
        print(mask_to_text(mask[::6, ::6]), end="\n\n")
