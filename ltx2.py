"""Real weights: everything that ties this code to the published LTX-2 and OmniForcing files.

Our model has LTX-2's parameters, tensor by tensor, under names that follow our classes: one class
per modality, where LTX-2 writes every name twice, once for video and once for audio. The tables
below are the only place that knows both.

    video.layers.7.self_attn.q_norm  <->  transformer_blocks.7.attn1.q_norm.weight
    audio.layers.7.mlp_in.bias       <->  transformer_blocks.7.audio_ff.net.0.proj.bias

LTX-2's names are those behind `model.diffusion_model.` in `ltx-2-19b-dev.safetensors`; released
OmniForcing generators use them too. Sinks are in none of these files, only in our model.

Translation is strict. A key too few or too many is refused by name: a model with one matrix left
at its initial value still runs, and only looks a little worse.

# Trap: names and shapes do not tell a teacher's file from a student's. Rotary layout, precision of
# the grid and scale of the gates differ (config.py): choose the config that belongs to the file.
"""

import config
from model import build

# ours, behind "video." or "audio."; LTX-2's for video; LTX-2's for audio
STREAM = [
    ("patchify", "patchify_proj", "audio_patchify_proj"),
    ("unpatchify", "proj_out", "audio_proj_out"),
    ("table", "scale_shift_table", "audio_scale_shift_table"),
    ("caption_1", "caption_projection.linear_1", "audio_caption_projection.linear_1"),
    ("caption_2", "caption_projection.linear_2", "audio_caption_projection.linear_2"),
    ("adaln", "adaln_single", "audio_adaln_single"),
    ("adaln_cross", "av_ca_video_scale_shift_adaln_single", "av_ca_audio_scale_shift_adaln_single"),
    # A gate belongs to the stream that listens: audio to video (a2v) writes to video.
    ("adaln_gate", "av_ca_a2v_gate_adaln_single", "av_ca_v2a_gate_adaln_single"),
]
# the same behind "video.layers.7." or "audio.layers.7.", and "transformer_blocks.7."
LAYER = [
    ("table", "scale_shift_table", "audio_scale_shift_table"),
    ("cross_table", "scale_shift_table_a2v_ca_video", "scale_shift_table_a2v_ca_audio"),
    ("self_attn", "attn1", "audio_attn1"),
    ("text_attn", "attn2", "audio_attn2"),
    ("cross_attn", "audio_to_video_attn", "video_to_audio_attn"),
    ("mlp_in", "ff.net.0.proj", "audio_ff.net.0.proj"),
    ("mlp_out", "ff.net.2", "audio_ff.net.2"),
]
# inside an attention or an adaptive norm: ours, LTX-2's; anything else keeps its name
INSIDE = {
    "q_norm": "q_norm.weight",
    "k_norm": "k_norm.weight",
    "to_out": "to_out.0",
    "linear_1": "emb.timestep_embedder.linear_1",
    "linear_2": "emb.timestep_embedder.linear_2",
}
MODULES = {  # "video", "audio" -> our module's name -> LTX-2's, outside and inside the layers
    stream: ({row[0]: row[column] for row in STREAM}, {row[0]: row[column] for row in LAYER})
    for column, stream in ((1, "video"), (2, "audio"))
}


def ltx2_name(key) -> str:
    """LTX-2's name of one of our parameters.

    >>> ltx2_name("audio.layers.7.cross_attn.to_out.bias")
    'transformer_blocks.7.video_to_audio_attn.to_out.0.bias'
    >>> ltx2_name("video.adaln_gate.linear_1.weight")
    'av_ca_a2v_gate_adaln_single.emb.timestep_embedder.linear_1.weight'
    """
    stream, *path = key.split(".")
    outside, inside = MODULES[stream]
    if path[0] != "layers":
        return _joined(outside, *path)
    return f"transformer_blocks.{path[1]}.{_joined(inside, *path[2:])}"


def _joined(modules, module, *rest):
    return ".".join([modules[module], *(INSIDE.get(part, part) for part in rest)])


def key_table(model) -> dict[str, str]:
    """Our name -> LTX-2's, for every parameter of a model but the sinks."""
    return {key: ltx2_name(key) for key in model.state_dict() if not key.startswith("sinks.")}


def from_ltx2(weights, model) -> dict:
    """Weights under LTX-2's names (without prefix) -> under ours.  The model's sinks are not in it.

    Raises ValueError, naming the first key that is missing or that has no place in the model.
    """
    ours = {theirs: key for key, theirs in key_table(model).items()}
    return _renamed(weights, ours)


def to_ltx2(weights, model) -> dict:
    """Inverse of `from_ltx2`; the sinks, which LTX-2 does not have, are left out."""
    without_sinks = {key: w for key, w in weights.items() if not key.startswith("sinks.")}
    return _renamed(without_sinks, key_table(model))


def _renamed(weights, names):
    for trouble, keys in (
        ("has no", [k for k in names if k not in weights]),
        ("has an unexpected", [k for k in weights if k not in names]),
    ):
        if keys:
            more = f" ({len(keys)} such keys)" if len(keys) > 1 else ""
            raise ValueError(
                f"the weight file {trouble} {keys[0]}{more}: expected the {len(names)} tensors "
                f"of an LTX-2 transformer of this config"
            )
    return {names[key]: w for key, w in weights.items()}


if __name__ == "__main__":
    for cfg in (config.LTX2, config.FULL, config.RELEASED):
        table = key_table(build(cfg, device="meta"))
        assert len(set(table.values())) == len(table) == 3510
        print(f"{cfg.name}: {len(table)} tensors have a name in LTX-2's files")
    for ours in ("video.layers.0.self_attn.to_q.weight", "audio.adaln_gate.linear.bias"):
        print(f"    {ours:40} {table[ours]}")
