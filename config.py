"""The sizes of model, latents and blocks in one frozen dataclass, with units and sources.

The same code runs a toy on two CPU cores and a model of 19 billion parameters on one GPU. The
sizes are here; plumbing/stages.py lists what else differs.

    TOY           the default: bouncing balls with impact sounds, about 3 M parameters
    TOY_TEACHER   TOY without sinks: the bidirectional teacher of the toy world
    TOY_RELEASED  TOY with the block layout of RELEASED
    FULL          the paper: k blocks after block 0 end at 1+3k video, 1+25k audio latents; 16 sinks
    RELEASED      the released OmniForcing generator: they end at 4+3k and 26+25k; no sinks
    LTX2          the bidirectional teacher LTX-2; FULL and RELEASED start from its weights

Derived values are properties, so no value is stored twice. `python config.py` prints all six.

>>> FULL.video_tokens_per_block, FULL.audio_frames_per_block
(1152, 25)
>>> TOY.video_tokens_per_block, TOY.audio_frames_per_block
(48, 25)
"""

from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction

CLIP_SECONDS = 5  # length of a training clip (paper)


@dataclass(frozen=True)
class Config:
    """Sizes of the model, the latents and the blocks.  The defaults are those of LTX-2 (19B).

    Raises ValueError, with the reason, for values that do not fit together.
    """

    name: str = "ltx2"

    # --- transformer (Lightricks/LTX-2, transformer/config.json) ---
    num_layers: int = 48
    num_heads: int = 32  # in every attention, of both streams
    video_width: int = 4096  # channels of a video token inside the transformer
    audio_width: int = 2048  # ... and of an audio token; also the width of cross-modal attention
    video_channels: int = 128  # channels of one video latent token
    audio_channels: int = 128  # channels of one audio latent token (8 channels x 16 mel bins)
    caption_width: int = 3840  # channels of one caption feature (Gemma 3 12B)
    norm_eps: float = 1e-6  # epsilon of every normalisation

    # --- rotary positions (LTX-2; the angle of position p is g * (2 p / max - 1)) ---
    rope_theta: float = 10000.0  # ratio of the highest to the lowest frequency
    rope_max_seconds: float = 20.0  # over this time the slowest channel pair rotates by pi
    rope_max_pixels: float = 2048.0  # the same for rows and columns
    rope_heads: str = "contiguous"  # | "round_robin": which head gets which pairs (rope.py)

    # --- flags in which LTX-2 and its students differ; no weight name or shape shows them ---
    rope_layout: str = "split"  # "split" | "interleaved": which channels of a head rotate together
    rope_float64: bool = True  # frequency grid in float64 | float32
    gate_timestep_scale: float = 1000.0  # times sigma: timestep of the cross-modal gates (model.py)

    # --- latent rates (VAEs of LTX-2; the first latent of each stream covers one frame only) ---
    fps: int = 24  # pixel frames per second
    video_stride: int = 8  # pixel frames per video latent, except the first
    pixel_stride: int = 32  # pixels per latent row or column
    height: int = 512  # pixels
    width: int = 768  # pixels
    mel_rate: int = 100  # mel frames per second (16 kHz / hop 160)
    audio_stride: int = 4  # mel frames per audio latent, except the first

    # --- blocks and sinks (OmniForcing) ---
    block_seconds: float = 1  # length of a block; must hold whole latents of both streams
    prefix_video_frames: int = 1  # latent frames in block 0; paper 1, released 4
    prefix_audio_frames: int = 1  # paper 1, released 26
    num_sinks: int = 0  # S, learnable tokens at the start of the audio stream; paper 16
    sink_positions: str = "identity"  # "identity" (paper) | "incremental" (ablation of the paper)

    # --- few-step generation ---
    sigmas: tuple[float, ...] = ()  # noise levels from 1 to 0; one pass per level above 0

    # ---- derived ----

    @property
    def grid(self) -> tuple[int, int]:
        """Latent rows and columns of one video frame."""
        return self.height // self.pixel_stride, self.width // self.pixel_stride

    @property
    def tokens_per_frame(self) -> int:
        """Video tokens of one latent frame: rows x columns."""
        return self.grid[0] * self.grid[1]

    @property
    def video_rate(self) -> Fraction:
        """Video latent frames per second."""
        return Fraction(self.fps, self.video_stride)

    @property
    def audio_rate(self) -> Fraction:
        """Audio latent frames (= tokens) per second."""
        return Fraction(self.mel_rate, self.audio_stride)

    @property
    def video_frames_per_block(self) -> int:
        """Latent frames of every block after the first."""
        return int(Fraction(self.block_seconds) * self.video_rate)

    @property
    def audio_frames_per_block(self) -> int:
        """Audio latents of every block after the first."""
        return int(Fraction(self.block_seconds) * self.audio_rate)

    @property
    def video_tokens_per_block(self) -> int:
        """Video tokens of every block after the first."""
        return self.video_frames_per_block * self.tokens_per_frame

    def __post_init__(self):
        self._check_size()
        self._check_blocks()
        self._check_widths()

    def _check_size(self):
        """Reject frame sizes that are not a whole number of latents."""
        for side, pixels in (("height", self.height), ("width", self.width)):
            if pixels < self.pixel_stride or pixels % self.pixel_stride:
                raise ValueError(
                    f"{side}={pixels}: a latent covers {self.pixel_stride} x {self.pixel_stride} "
                    f"pixels; expected a multiple of {self.pixel_stride}"
                )

    def _check_blocks(self):
        """Reject blocks that cut a latent, and a block 0 whose streams end at different times."""
        for stream, rate in (("video", self.video_rate), ("audio", self.audio_rate)):
            latents = Fraction(self.block_seconds) * rate
            if latents < 1 or latents.denominator != 1:
                raise ValueError(
                    f"block_seconds={self.block_seconds}: a block would hold {float(latents):g} "
                    f"{stream} latents; expected a whole number "
                    f"(video {self.video_rate}/s, audio {self.audio_rate}/s)"
                )
        video, audio = self.prefix_video_frames - 1, self.prefix_audio_frames - 1
        if video < 0 or audio < 0 or video / self.video_rate != audio / self.audio_rate:
            raise ValueError(
                f"block 0 of {self.prefix_video_frames} video and {self.prefix_audio_frames} audio "
                f"latents: without the first latent of each, both must last equally long "
                f"(1+1 and 4+26 do)"
            )

    def _check_widths(self):
        """Reject widths that do not divide evenly among the heads, and unknown options."""
        for width in (self.video_width, self.audio_width):
            if width % (2 * self.num_heads):
                raise ValueError(
                    f"width {width} does not split into {self.num_heads} heads of even width"
                )
        if self.rope_layout not in ("split", "interleaved"):
            raise ValueError(f"rope_layout={self.rope_layout!r}: expected 'split' or 'interleaved'")
        if self.rope_heads not in ("contiguous", "round_robin"):
            raise ValueError(
                f"rope_heads={self.rope_heads!r}: expected 'contiguous' or 'round_robin'"
            )
        if self.sink_positions not in ("identity", "incremental"):
            raise ValueError(
                f"sink_positions={self.sink_positions!r}: expected 'identity' or 'incremental'"
            )

    @property
    def is_toy(self) -> bool:
        """True for toy configs (toy clips, captions, weight files); False for LTX-2-size ones."""
        return self.name.startswith("toy")

    def to_dict(self) -> dict:
        """Return plain values, as weight files store them in their metadata."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """Inverse of `to_dict`.

        Raises ValueError for a missing or unknown field, naming it.
        """
        known = {f.name for f in fields(cls)}
        if wrong := known.symmetric_difference(values):
            raise ValueError(f"config fields missing or unknown: {', '.join(sorted(wrong))}")
        return cls(**{**values, "sigmas": tuple(values["sigmas"])})


# Noise levels of the few-step students. The official code lists 1000 sigma and takes, for each, the
# nearest level of LTX-2's 40-step schedule (OmniForcing/OmniForcing, ltx-distillation).
# The later release lists 1000, 909, 725, 421, 0: four passes. The first release lists 1000, 757,
# 522, 0: three passes.
FOUR_STEPS = (1.0, 0.9062290, 0.7265238, 0.4207186, 0.0)
THREE_STEPS = (1.0, 0.7506967, 0.5447712, 0.0)

LTX2 = Config(sigmas=THREE_STEPS)  # sigmas: for its stage I student; LTX-2 takes 40 steps

# FULL and RELEASED rotate interleaved pairs, compute the frequency grid in float32 and do not scale
# the gate's sigma (OmniForcing/OmniForcing, ltx-causal). LTX-2's weights, from which they start,
# were trained with split pairs, float64 and a scale of 1000.
# Trap: names and shapes are the same, so a wrong flag loads silently and gives wrong output.
_STUDENT_FLAGS = dict(rope_layout="interleaved", rope_float64=False, gate_timestep_scale=1.0)
FULL = replace(LTX2, name="full", num_sinks=16, sigmas=THREE_STEPS, **_STUDENT_FLAGS)
RELEASED = replace(
    LTX2,
    name="released",
    prefix_video_frames=4,
    prefix_audio_frames=26,
    sigmas=FOUR_STEPS,
    **_STUDENT_FLAGS,
)

# The toy keeps the latent rates of LTX-2 (3 and 25 per second). It has 48 video tokens per second
# and 25 audio tokens (LTX-2: 1152 and 25).
TOY = replace(
    LTX2,
    name="toy",
    num_layers=4,
    num_heads=4,
    video_width=160,
    audio_width=96,
    video_channels=48,
    audio_channels=20,
    caption_width=9,  # one-hot over the closed vocabulary of toy/world.py
    rope_theta=128.0,  # with the next two: 0.31 to 40 rad/s, 0.02 to 3.1 rad/pixel
    rope_max_seconds=10.0,
    rope_max_pixels=128.0,
    rope_heads="round_robin",  # Simpler: with four heads, contiguous frequencies train slower
    pixel_stride=8,
    height=32,
    width=32,
    num_sinks=16,
    sigmas=FOUR_STEPS,
)
TOY_TEACHER = replace(TOY, name="toy_teacher", num_sinks=0)
TOY_RELEASED = replace(
    TOY, name="toy_released", prefix_video_frames=4, prefix_audio_frames=26, num_sinks=0
)

CONFIGS = {c.name: c for c in (TOY, TOY_TEACHER, TOY_RELEASED, FULL, RELEASED, LTX2)}

if __name__ == "__main__":
    row = "{:12} {:18} {:9} {:9} {:12} {:>5} {:>7}  {}".format
    print(row("", "layers x widths", "block 0", "block k", "its tokens", "sinks", "passes", "RoPE"))
    for c in CONFIGS.values():
        widths = f"{c.num_layers} x {c.video_width}, {c.audio_width}"
        prefix = f"{c.prefix_video_frames} + {c.prefix_audio_frames}"
        later = f"{c.video_frames_per_block} + {c.audio_frames_per_block}"
        tokens = f"{c.video_tokens_per_block} + {c.audio_frames_per_block}"
        passes = len(c.sigmas) - 1 if c.sigmas else "-"
        print(row(c.name, widths, prefix, later, tokens, c.num_sinks, passes, c.rope_layout))
