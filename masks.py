"""The timeline cut into one-second blocks, and who may attend to whom.

A causal generator has to know what "earlier" means for two streams that tick at different rates:
3 video latents a second (of 384 tokens each) against 25 audio latents (of one token each).
OmniForcing cuts both at the same instants. Both VAEs give their first latent, V0 and A0, a single
input frame; so these two sit at time 0, and every later second is exactly 3 video and 25 audio
latents:

    seconds       0        1        2        3
    video      V0 | V1..V3 | V4..V6 | V7..V9 |
    audio      A0 | A1..25 | 26..50 | 51..75 |         paper: 1 + 3k and 1 + 25k latents
    block       0 |    1   |    2   |    3   |         (block 0 is the "global prefix")

    released checkpoint: the first second joins the prefix, 4 + 3k and 26 + 25k latents

One rule makes all four masks: **a query may see a key if the key's block is not later than its
own.** Inside a block everything sees everything, in both directions; across blocks time flows one
way. Sink tokens (sink_tokens.py) stand in front of the audio and count as block 0, so everyone
sees them and they see only block 0.  (Paper: asymmetric block-causal alignment, global prefix.)

A boolean mask is named for what True means: `may_attend[q, k]`, as in torch's
scaled_dot_product_attention. Here is every eighth token of the toy's video, 16 tokens in block 0
and 48 in block 1:

>>> print(text_picture(four_masks(config.TOY, 2, sinks=False)["video_self"][::8, ::8]))
##......
##......
########
########
########
########
########
########

    python masks.py    prints all four masks as text, every sixth token of a stream
    python -m studies.plots    draws them, as the paper's figure does
"""

from dataclasses import astuple, dataclass
from fractions import Fraction

import torch

import config

# Where the model attends, named listener last: "a2v" is audio to video, i.e. video queries.
SITES = ("video_self", "audio_self", "a2v", "v2a")
# the attention of a site's listener to itself
LISTENER = {"video_self": "video_self", "audio_self": "audio_self"}
LISTENER |= {"a2v": "video_self", "v2a": "audio_self"}


@dataclass(frozen=True)
class Span:
    """A stretch of latent frames of both streams; a pass of the transformer works on one."""

    video: range  # global indices of the video latent frames
    audio: range  # global indices of the audio latent frames

    @property
    def has_sinks(self) -> bool:
        """Sinks belong to block 0: they are part of every pass that starts at the beginning."""
        return self.audio.start == 0

    def then(self, later: "Span") -> "Span":
        """This stretch and the one right behind it.

        >>> block_span(1, config.TOY).then(block_span(2, config.TOY))
        Span(video=range(1, 7), audio=range(1, 51))
        """
        return Span(*(range(a.start, b.stop) for a, b in zip(astuple(self), astuple(later))))


def num_blocks(seconds, cfg) -> int:
    """Blocks that make up a clip of `seconds`.  (Paper layout: N seconds are N + 1 blocks.)

    Raises ValueError, with the durations that would fit, if the last block would be cut short.

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


def whole_window(blocks) -> int:
    """The least window with which the last of so many blocks still sees them all.

    Block 0 is pinned, and its own does not count as past.

    >>> bool(may_attend(torch.tensor([5]), torch.arange(6), whole_window(6)).all())
    True
    >>> bool(may_attend(torch.tensor([5]), torch.arange(6), whole_window(6) - 1).all())
    False
    """
    return blocks - 2


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
    """Latent frames of a whole clip of that many blocks.

    >>> clip_span(6, config.FULL)
    Span(video=range(0, 16), audio=range(0, 126))
    """
    last = block_span(blocks - 1, cfg)
    return Span(range(last.video.stop), range(last.audio.stop))


def block_seconds(k, cfg) -> tuple[float, float]:
    """When block k begins and ends, in seconds, counted from the first pixel frame.

    (Block 0 of the paper's layout is that frame alone: it begins and ends at 0.)

    >>> block_seconds(0, config.TOY), block_seconds(3, config.TOY)
    ((0.0, 0.0), (2.0, 3.0))
    """
    end = Fraction(block_span(k, cfg).video.stop - 1) / cfg.video_rate
    start = Fraction(0) if k == 0 else end - Fraction(cfg.block_seconds)
    return float(start), float(end)


def block_of_frame(frame, prefix, step):
    """Block of a latent frame index (number or tensor): 0 in the prefix, then one per `step`.

    Both streams use this with their own numbers, which is what aligns them: frames of the same
    second get the same block, however many there are.

    >>> [block_of_frame(f, 1, 3) for f in range(8)]
    [0, 1, 1, 1, 2, 2, 2, 3]
    """
    later = 1 + (frame - prefix) // step
    return later * (frame >= prefix)


def frame_blocks(blocks, cfg) -> tuple[torch.Tensor, torch.Tensor]:
    """Block of every latent frame of a clip: (F_v,) and (F_a,)."""
    span = clip_span(blocks, cfg)
    video, audio = torch.tensor(span.video), torch.tensor(span.audio)
    return (
        block_of_frame(video, cfg.prefix_video_frames, cfg.video_frames_per_block),
        block_of_frame(audio, cfg.prefix_audio_frames, cfg.audio_frames_per_block),
    )


def video_token_blocks(blocks, cfg) -> torch.Tensor:
    """(T_v,) block of every video token of a clip; tokens are frame-major, then row, column."""
    return frame_blocks(blocks, cfg)[0].repeat_interleave(cfg.tokens_per_frame)


def audio_token_blocks(blocks, cfg, sinks=True) -> torch.Tensor:
    """(S + F_a,) block of every audio token of a clip; the sinks come first, in block 0."""
    per_frame = frame_blocks(blocks, cfg)[1]
    return torch.cat([per_frame.new_zeros(cfg.num_sinks if sinks else 0), per_frame])


def may_attend(query_blocks, key_blocks, window=None, pinned=True) -> torch.Tensor:
    """The rule.  (Q,) and (K,) block indices -> (Q, K) booleans.

    window   how many blocks before its own a query remembers; None never forgets.  Block 0 (prefix
             and sinks) is pinned: it stays visible for ever, unless `pinned` is False (a control).

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

    Text attention is never masked by block: the prompt is known before the first frame.
    """
    video = video_token_blocks(blocks, cfg)
    audio = audio_token_blocks(blocks, cfg, sinks)
    return {
        "video_self": may_attend(video, video, window),
        "audio_self": may_attend(audio, audio, window),
        "a2v": may_attend(video, audio, window),
        "v2a": may_attend(audio, video, window),
    }


def text_picture(mask) -> str:
    """A mask as text: '#' where the query (row) may attend to the key (column)."""
    return "\n".join("".join("#" if allowed else "." for allowed in row) for row in mask.tolist())


if __name__ == "__main__":
    for site, mask in four_masks(config.TOY, 3).items():
        print(
            f"{site}: {mask.shape[0]} queries x {mask.shape[1]} keys, {mask.float().mean():.0%} on"
        )
        print(text_picture(mask[::6, ::6]), end="\n\n")
