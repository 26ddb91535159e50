"""Config: derived numbers, refusals that say why, and models of the published size."""

from dataclasses import replace

import pytest
from helpers import ROOT

import config
from model import build
from plumbing import files


def test_full_blocks_hold_1152_video_and_25_audio_tokens():
    """At full size a second is 3 frames of 384 video tokens, and 25 audio tokens."""
    assert (config.FULL.tokens_per_frame, config.FULL.video_frames_per_block) == (384, 3)
    assert config.FULL.video_tokens_per_block == 1152
    assert config.FULL.audio_frames_per_block == 25


def test_half_second_blocks_work_at_other_rates():
    """Blocks of half a second are fine when both streams have whole latents in them."""
    cfg = replace(config.TOY, block_seconds=0.5, fps=32, mel_rate=80)
    assert (cfg.video_frames_per_block, cfg.audio_frames_per_block) == (2, 10)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(block_seconds=0.5), "block_seconds=0.5: a block would hold 1.5 video latents"),
        (dict(block_seconds=1 / 3), "expected a whole number"),
        (dict(block_seconds=1, mel_rate=90), "a block would hold 22.5 audio latents"),
        (dict(block_seconds=0), "a block would hold 0 video latents"),
        (dict(prefix_video_frames=4), "block 0 of 4 video and 1 audio latents"),
        (dict(prefix_video_frames=4, prefix_audio_frames=25), "1\\+1 and 4\\+26 do"),
        (dict(prefix_video_frames=0, prefix_audio_frames=0), "block 0 of 0 video"),
        (dict(audio_width=92), "width 92 does not split into 4 heads of even width"),
        (dict(rope_layout="halves"), "rope_layout='halves': expected 'split' or 'interleaved'"),
        (dict(sink_positions="none"), "sink_positions='none': expected 'identity' or"),
    ],
)
def test_impossible_configs_are_refused_with_the_reason(change, message):
    """A config that would cut a latent, misalign block 0 or name no layout says so at once."""
    with pytest.raises(ValueError, match=message):
        replace(config.TOY, **change)


@pytest.mark.parametrize(
    "cfg, change, message",
    [
        (config.FULL, dict(height=500), "height=500: a latent covers 32 x 32 pixels; expected a"),
        (config.FULL, dict(width=700), "width=700: .* expected a multiple of 32"),
        (config.LTX2, dict(height=16), "height=16: "),
        (config.LTX2, dict(width=0), "width=0: "),
        (config.TOY, dict(width=36), "width=36: .* expected a multiple of 8"),
    ],
)
def test_a_resolution_must_be_whole_latents(cfg, change, message):
    """Multiples of 32 pixels at full size and of 8 in the toy; anything else is one line."""
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        replace(cfg, **change)


def test_any_whole_number_of_latents_is_a_resolution():
    """480 x 704 pixels are 15 x 22 latents, although neither is a power of two."""
    assert replace(config.FULL, height=480, width=704).grid == (15, 22)


@pytest.mark.parametrize("cfg", config.CONFIGS.values(), ids=lambda c: c.name)
def test_config_survives_a_round_trip_through_plain_values(cfg):
    """from_dict undoes to_dict, also after a list has replaced the tuple, as in JSON."""
    values = cfg.to_dict()
    assert config.Config.from_dict(values) == cfg
    assert config.Config.from_dict({**values, "sigmas": list(cfg.sigmas)}) == cfg


def test_missing_and_unknown_fields_are_named():
    """A dictionary of another version is refused, naming the fields."""
    values = config.TOY.to_dict()
    values["sinks"] = values.pop("num_sinks")
    with pytest.raises(ValueError, match="missing or unknown: num_sinks, sinks"):
        config.Config.from_dict(values)


@pytest.mark.parametrize("name, sinks", [("ltx2", 0), ("released", 0), ("full", 32_768)])
def test_full_size_models_have_the_published_number_of_parameters(name, sinks):
    """LTX-2's transformer has 18,876,174,592 parameters; 16 sinks of width 2048 add 32,768."""
    model = build(config.CONFIGS[name], device="meta")
    assert model.num_parameters() == 18_876_174_592 + sinks


# LTX-2: transformer/config.json, vae/config.json, audio_vae/config.json of Lightricks/LTX-2
PUBLISHED = dict(
    name="ltx2", num_layers=48, num_heads=32, video_width=4096, audio_width=2048,
    video_channels=128, audio_channels=128, caption_width=3840, norm_eps=1e-6,
    rope_theta=10000.0, rope_max_seconds=20.0, rope_max_pixels=2048.0, rope_heads="contiguous",
    rope_layout="split", rope_float64=True, gate_timestep_scale=1000.0,
    fps=24, video_stride=8, pixel_stride=32, height=512, width=768, mel_rate=100, audio_stride=4,
    block_seconds=1, prefix_video_frames=1, prefix_audio_frames=1, num_sinks=0,
    sink_positions="identity", sigmas=(1.0, 0.7506967, 0.5447712, 0.0),
)  # fmt: skip
STUDENT = dict(rope_layout="interleaved", rope_float64=False, gate_timestep_scale=1.0)
BLOCK_0 = dict(prefix_video_frames=4, prefix_audio_frames=26)
RELEASED = dict(STUDENT, **BLOCK_0, sigmas=(1.0, 0.9062290, 0.7265238, 0.4207186, 0.0))


@pytest.mark.parametrize(
    "name, changes",
    [("ltx2", {}), ("full", dict(STUDENT, num_sinks=16)), ("released", RELEASED)],
)
def test_full_size_configs_are_the_published_ones(name, changes):
    """Every field, since most flags change neither the names nor the shapes of weights."""
    assert config.CONFIGS[name].to_dict() == {**PUBLISHED, **changes, "name": name}


@pytest.mark.parametrize(
    "name, file",
    [("toy", "toy_self_forcing"), ("toy_teacher", "toy_teacher"),
     ("toy_released", "toy_released_self_forcing")],
)  # fmt: skip
def test_toys_are_those_of_the_shipped_weights(name, file):
    """A file holds the config that it was trained with."""
    _, cfg, _ = files.read_weights(ROOT / "weights" / f"{file}.safetensors")
    assert cfg == config.CONFIGS[name]
    assert config.CLIP_SECONDS == 5
