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
# the grid and scale of the gates differ (config.py). LTX-2's file states its own in its metadata,
# which is believed; a student's file states nothing, and the config's are taken.

    python ltx2.py                             some names
    python ltx2.py FILE --config released      is it whole, and what does it state?
    python ltx2.py FILE --interleaved OUT      the same in the students' rotary layout
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import cli
import config
import files
from model import OmniTransformer, build
from sink_tokens import fresh_sinks

# ---- names ----

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


# ---- files ----

PREFIXES = ("model.diffusion_model.", "model.velocity_model.", "model.")  # ComfyUI's, and trainers'
OTHER_PARTS = ("vae.", "audio_vae.", "vocoder.", "text_embedding_projection.")
CONNECTORS = ("video_embeddings_connector.", "audio_embeddings_connector.")
SINKS = "audio_sink_tokens"  # paper-era students carry them, (1, S, 2048)

# In the metadata: name -> our field, and how its value is written in ours
FLAGS = {
    "rope_type": ("rope_layout", str),
    "frequencies_precision": ("rope_float64", lambda value: value == "float64"),
    "av_ca_timestep_scale_multiplier": ("gate_timestep_scale", float),
}
LATER = {  # switches of LTX-2.3 and 2.5, and the value each has in LTX-2
    "apply_gated_attention": False,
    "cross_attention_adaln": False,
    "caption_proj_before_connector": False,
    "ff_bias": True,
    "use_keyframes_abs_pos_embedding": False,
}


def shards(path) -> list[Path]:
    """The files of a checkpoint: one `.safetensors`, an index of many, or a folder of either.

    Raises ValueError for anything else, and for a shard that the index names but that is not there.
    """
    path = Path(path)
    if path.is_dir():
        index = sorted(path.glob("*.safetensors.index.json"))
        found = index or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise ValueError(f"{path}: expected one .safetensors file or index, found {len(found)}")
        return shards(found[0])
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    if path.suffix != ".json":
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: not an index of shards (it has no weight_map)") from None
    parts = [path.parent / Path(name).name for name in names]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ValueError(f"{path}: {missing[0]} is missing ({len(missing)} of {len(parts)} shards)")
    return parts


def transformer_name(key) -> str | None:
    """LTX-2's name of a transformer tensor without prefix; None for decoders and connectors.

    >>> transformer_name("model.diffusion_model.patchify_proj.bias")
    'patchify_proj.bias'
    >>> transformer_name("vae.decoder.conv_in.bias"), transformer_name("vocoder.ups.0.bias")
    (None, None)
    """
    if key.startswith(OTHER_PARTS):
        return None
    prefix = next((p for p in PREFIXES if key.startswith(p)), "")
    name = key[len(prefix) :]
    return None if name.startswith(CONNECTORS) else name


class Checkpoint:
    """Where the transformer's tensors lie; they are read one at a time, straight to the device."""

    def __init__(self, path):
        """Raises ValueError for a file that is cut short or no safetensors."""
        self.path, self.metadata, self.where = path, {}, {}  # LTX-2's name -> (file, key)
        for file in shards(path):
            try:
                with safe_open(file, "pt") as f:
                    self.metadata |= f.metadata() or {}
                    names = {transformer_name(key): (file, key) for key in f.keys()}
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
            self.where |= {name: place for name, place in names.items() if name}

    def flags(self) -> dict:
        """The flags that the file states, as fields of Config.

        Raises ValueError for a later generation of LTX-2, naming the switch that tells.
        """
        stated = json.loads(self.metadata.get("config", "{}")).get("transformer", {})
        for switch, ours in LATER.items():
            if stated.get(switch, ours) != ours:
                raise ValueError(
                    f"{self.path}: {switch}={stated[switch]} belongs to a later LTX than this "
                    f"project implements; expected an LTX-2 19B file"
                )
        return {
            field: read(stated[name]) for name, (field, read) in FLAGS.items() if name in stated
        }

    def read(self, device, dtype):
        """Yield (LTX-2's name, tensor), file by file.  Raises ValueError for NaN or infinity."""
        for file in sorted({file for file, _ in self.where.values()}):
            with safe_open(file, "pt", device=str(device)) as f:
                for name, (place, key) in self.where.items():
                    if place != file:
                        continue
                    tensor = f.get_tensor(key).to(dtype)
                    if not torch.isfinite(tensor).all():
                        raise ValueError(f"{file}: tensor {key} holds NaN or infinity")
                    yield name, tensor


class Source:
    """A published transformer whose every name and flag has been checked, ready to be read."""

    def __init__(self, path, cfg, say=print):
        """Reads no weights yet, so that a wrong file is refused in the first second.

        cfg   shape, blocks and sinks; the three flags are the file's, where it states them
        say   is told the flags that are used

        Raises ValueError for a file that is not whole, lacks a tensor, or has one too many.
        """
        self.path, self.checkpoint, self.say = path, Checkpoint(path), say
        stated = self.checkpoint.flags()
        self.cfg = replace(cfg, **stated)
        source = "stated by the file" if stated else f"of config {cfg.name}; the file states none"
        flags = ", ".join(f"{field}={getattr(self.cfg, field)}" for field, _ in FLAGS.values())
        say(f"{path}: {flags} ({source})")
        self.table = {theirs: ours for ours, theirs in key_table(self._empty()).items()}
        where = self.checkpoint.where
        for name in [name for name in where if SINKS in name]:
            if cfg.num_sinks:
                self.table[name] = "sinks.tokens"
            else:
                del where[name]
        _renamed(where, self.table)  # complains by name

    def _empty(self):
        return build(self.cfg, device="meta")

    def fingerprint(self) -> str:
        """A short hash of the exits, which every training moves."""
        exits, found = [n for n, ours in self.table.items() if "unpatchify" in ours], {}
        for name in exits:
            file, key = self.checkpoint.where[name]
            with safe_open(file, "pt") as f:
                found[name] = f.get_tensor(key).float()
        return files.fingerprint(found)

    def tensors(self, device="cpu", dtype=torch.bfloat16):
        """Yield (our name, tensor) of every parameter, fresh sinks among them if it has none."""
        for name, tensor in self.checkpoint.read(device, dtype):
            yield self.table[name], tensor
        if self.cfg.num_sinks and "sinks.tokens" not in self.table.values():
            self.say(f"{self.path}: no sinks; {self.cfg.num_sinks} fresh ones take their place")
            g = torch.Generator().manual_seed(0)
            sinks = fresh_sinks(self.cfg.num_sinks, self.cfg.audio_width, g)
            yield "sinks.tokens", sinks.to(device, dtype)

    def load(self, device="cpu", dtype=torch.bfloat16) -> OmniTransformer:
        """Read once, tensor by tensor to where it belongs: there is no second copy in memory."""
        net = self._empty()
        files.load_into(net, dict(self.tensors(device, dtype)), self.path, assign=True)
        return net.requires_grad_(False).eval()


def load(path, cfg, device="cpu", dtype=torch.bfloat16, say=print) -> OmniTransformer:
    """The transformer of a published file; see `Source`."""
    return Source(path, cfg, say).load(device, dtype)


def save(path, tensors, cfg, made_by):
    """Write weights under LTX-2's names and with their flags, as `Source` reads them."""
    table = {ours: f"{PREFIXES[0]}{ltx2_name(ours)}" for ours in tensors if ours != "sinks.tokens"}
    named = {table.get(ours, SINKS): x.contiguous() for ours, x in tensors.items()}
    flags = {  # in the words of LTX-2's metadata
        "rope_type": cfg.rope_layout,
        "frequencies_precision": "float64" if cfg.rope_float64 else "float32",
        "av_ca_timestep_scale_multiplier": cfg.gate_timestep_scale,
    }
    metadata = {"config": json.dumps({"transformer": flags}), "made_by": json.dumps(made_by)}
    files.write_beside(path, lambda p: save_file(named, p, metadata))


def random_weights(cfg, device="cpu", dtype=torch.bfloat16) -> OmniTransformer:
    """A model of that size full of noise, drawn on the device: for measuring speed and memory."""
    net = build(cfg, device="meta").to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    for name, p in net.named_parameters():
        if name.endswith(("q_norm", "k_norm")):
            torch.nn.init.ones_(p)
        else:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.dim() == 2 else 0.02)
    return net.requires_grad_(False).eval()


# ---- the two rotary layouts ----


def to_interleaved(weights, cfg) -> dict:
    """Our weights of a `split` model -> those of an `interleaved` model that computes the same.

    Attention does not care how channels are ordered inside a head, if queries and keys agree. So
    a teacher's weights can start a student exactly where the teacher stands. (The official code
    copies them as they are, and training has to absorb the difference.) At the command line:
    `python ltx2.py FILE --interleaved OUT`.
    """
    rotated = (".self_attn.", ".cross_attn.")
    moved = (".to_q.weight", ".to_q.bias", ".to_k.weight", ".to_k.bias", ".q_norm", ".k_norm")
    return {
        name: _interleave_rows(w, cfg.num_heads)
        if any(part in name for part in rotated) and name.endswith(moved)
        else w
        for name, w in weights.items()
    }


def _interleave_rows(w, heads):
    """Row i and row i + half of every head become rows 2i and 2i + 1.

    >>> _interleave_rows(torch.arange(8), 2)
    tensor([0, 2, 1, 3, 4, 6, 5, 7])
    """
    return w.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def show_names():
    """What the tables say, at a glance."""
    for cfg in (config.LTX2, config.FULL, config.RELEASED):
        table = key_table(build(cfg, device="meta"))
        assert len(set(table.values())) == len(table) == 3510
        print(f"{cfg.name}: {len(table)} tensors have a name in LTX-2's files")
    for ours in ("video.layers.0.self_attn.to_q.weight", "audio.adaln_gate.linear.bias"):
        print(f"    {ours:40} {table[ours]}")


def interleave(source, path):
    """Write a split transformer as an interleaved one that computes the same."""
    if source.cfg.rope_layout != "split":
        raise ValueError(f"{source.path}: its pairs are {source.cfg.rope_layout} already")
    weights = to_interleaved(dict(source.tensors()), source.cfg)
    cfg = replace(source.cfg, rope_layout="interleaved")
    save(path, weights, cfg, {"command": f"python ltx2.py {source.path} --interleaved {path}"})
    print(f"wrote {path}")


def main():
    p = cli.parser(__doc__)
    p.add_argument("file", nargs="?", help="a transformer to be checked; none: names are shown")
    p.add_argument("--config", default="ltx2", help="its shape and sinks: ltx2, full, released")
    p.add_argument("--interleaved", metavar="OUT", help="write it in the students' rotary layout")
    args = p.parse_args()
    if not args.file:
        return show_names()
    source = Source(args.file, cli.find_config(args.config))
    print(f"{args.file}: {len(source.table)} tensors, each with its place in the model")
    if args.interleaved:
        interleave(source, args.interleaved)


if __name__ == "__main__":
    cli.run(main)
