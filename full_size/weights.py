"""Published weights: the names and files of LTX-2 and OmniForcing, and ours.

Our model has the parameters of LTX-2, tensor by tensor, under names that follow our classes. LTX-2
writes every name twice, once for video and once for audio; we have one class per modality. Only the
tables below know both:

    layers.7.video.self_attn.q_norm  <->  transformer_blocks.7.attn1.q_norm.weight
    layers.7.audio.mlp_in.bias       <->  transformer_blocks.7.audio_ff.net.0.proj.bias

`ltx-2-19b-dev.safetensors` has LTX-2's names after the prefix `model.diffusion_model.`; released
OmniForcing generators use them too. None of these files contains sinks, only our model does.

Caution: names and shapes do not tell a teacher's file from a student's. RoPE layout, grid precision
and gate scale differ (config.py). A weight file may store these three flags. If it does, they win
over the config. LTX-2's file and our files store them. So a student that was trained here from
LTX-2's split pairs runs with split pairs, also under `--config full`. Released students store none,
so `--config` decides. A file whose flags cannot be determined is refused (`check_flags`).

    python -m full_size.weights                             prints some names
    python -m full_size.weights FILE --config released      checks a file and prints its flags
    python -m full_size.weights FILE --interleaved OUT      converts to the students' RoPE layout
    python -m full_size.weights FILE --split OUT            converts to LTX-2's RoPE layout
    python -m full_size.weights FILE.pt --config full --out OUT        converts a file of the
        official training, and so every other checkpoint that can be read: shards, prefixes, the
        transformer/ folder of diffusers
"""

import json
from dataclasses import replace

import torch
from safetensors.torch import save_file

import config
from full_size import fp8, hub
from full_size.checkpoint import Checkpoint
from model import OmniTransformer, build
from plumbing import cli, contents, files
from sink_tokens import init_sinks

# ---- names ----

# ours, behind "video." or "audio."; LTX-2's for video; LTX-2's for audio
STREAM = [
    ("proj_in", "patchify_proj", "audio_patchify_proj"),
    ("proj_out", "proj_out", "audio_proj_out"),
    ("table", "scale_shift_table", "audio_scale_shift_table"),
    ("caption_1", "caption_projection.linear_1", "audio_caption_projection.linear_1"),
    ("caption_2", "caption_projection.linear_2", "audio_caption_projection.linear_2"),
    ("adaln", "adaln_single", "audio_adaln_single"),
    ("adaln_cross", "av_ca_video_scale_shift_adaln_single", "av_ca_audio_scale_shift_adaln_single"),
    # A gate belongs to the stream that listens: audio to video (a2v) writes to video.
    ("adaln_gate", "av_ca_a2v_gate_adaln_single", "av_ca_v2a_gate_adaln_single"),
]
# the same after "layers.7.video." or "layers.7.audio.", and "transformer_blocks.7."
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
    """Translate one of our parameter names into LTX-2's.

    >>> ltx2_name("layers.7.audio.cross_attn.to_out.bias")
    'transformer_blocks.7.video_to_audio_attn.to_out.0.bias'
    >>> ltx2_name("video.adaln_gate.linear_1.weight")
    'av_ca_a2v_gate_adaln_single.emb.timestep_embedder.linear_1.weight'
    """
    first, *path = key.split(".")
    if first != "layers":
        outside, _ = MODULES[first]
        return _joined(outside, *path)
    index, stream, *path = path
    _, inside = MODULES[stream]
    return f"transformer_blocks.{index}.{_joined(inside, *path)}"


def _joined(modules, module, *rest):
    return ".".join([modules[module], *(INSIDE.get(part, part) for part in rest)])


def key_table(model) -> dict[str, str]:
    """Return our name -> LTX-2's name, for all parameters of a model except the sinks."""
    return {key: ltx2_name(key) for key in model.state_dict() if not key.startswith("sinks.")}


def to_ltx2(weights, model) -> dict:
    """Rename our weights to LTX-2's names; leave out the sinks, which LTX-2 does not have."""
    return {theirs: weights[ours] for ours, theirs in key_table(model).items()}


# ---- files ----

PREFIX = "model.diffusion_model."  # as in LTX-2's file
SINKS = "audio_sink_tokens"  # paper-era students carry them, (1, S, 2048)

# In the metadata: name -> our field, the values expected there, and how to read them
LAYOUTS = {"split": "split", "interleaved": "interleaved"}
PRECISIONS = {"float64": True, "float32": False}
FLAGS = {
    "rope_type": ("rope_layout", " or ".join(LAYOUTS), LAYOUTS.__getitem__),
    "frequencies_precision": ("rope_float64", " or ".join(PRECISIONS), PRECISIONS.__getitem__),
    "av_ca_timestep_scale_multiplier": ("gate_timestep_scale", "a number", float),
}
LATER = {  # switches of LTX-2.3 and 2.5, and the value each has in LTX-2
    "apply_gated_attention": False,
    "cross_attention_adaln": False,
    "caption_proj_before_connector": False,
    "ff_bias": True,
    "use_keyframes_abs_pos_embedding": False,
}


def flags(path, stated) -> dict:
    """Return the flags among the settings that a file states, as fields of Config."""
    for switch, ours in LATER.items():
        if stated.get(switch, ours) != ours:
            raise ValueError(
                f"{path}: {switch}={stated[switch]} belongs to a later LTX (2.3 or 2.5); "
                f"{contents.LTX_2}"
            )
    found = {}
    for name, (field, expected, read) in FLAGS.items():
        if name not in stated:
            continue
        try:
            found[field] = read(stated[name])
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{path}: its metadata have {name}={stated[name]!r}; expected {expected}; "
                f"take the file as it was published"
            ) from None
    return found


def check_flags(path, stated, cfg):
    """Raise ValueError for flags that neither the file nor the config determines.

    stated   flags that the file stores, as fields of Config; they win over the config
    """
    # The config determines the other flags, unless the file contradicts it: then it describes other
    # weights.
    # A file without any flag is a released student (LTX-2's own file stores all three), so only
    # the flags of a student fit.
    # Trap: a file of LTX-2 that was saved again without its metadata is taken for a student.
    unstated = [field for field, *_ in FLAGS.values() if field not in stated]
    others = [field for field in stated if stated[field] != getattr(cfg, field)]
    if unstated and others:
        raise ValueError(
            f"{path}: states {others[0]}={stated[others[0]]}, unlike config {cfg.name}, and no "
            f"{unstated[0]}; expected a config that agrees with it, or a file that states all three"
        )
    if not stated and cfg.rope_layout != "interleaved":
        raise ValueError(
            f"{path}: states no {', '.join(unstated)}, as LTX-2's own file does, so "
            f"config {cfg.name} cannot read it; a student's file needs --config full or released"
        )


def told(cfg, stated) -> str:
    """Describe each flag and its source.

    >>> told(config.FULL, {"rope_layout": "split"})[:71]
    'rope_layout=split (stated by the file, over interleaved of config full)'
    """

    def of(field):
        ours, theirs = getattr(cfg, field), stated.get(field)
        if theirs is None:
            return f"{field}={ours} (of config {cfg.name}; not in the file)"
        over = f", over {ours} of config {cfg.name}" if theirs != ours else ""
        return f"{field}={theirs} (stated by the file{over})"

    return ", ".join(of(field) for field, *_ in FLAGS.values())


class Source:
    """A published transformer, with all names, shapes and flags checked, ready to be read."""

    def __init__(self, path, cfg, may_unpickle=False):
        """Read the headers, so that a wrong file is refused in the first second.

        path           a file, an index, a folder, or a name on the Hub
        cfg            shape, blocks and sinks; the three flags, unless the file stores them
        may_unpickle   also read a .pt file
        """
        path = hub.local(path, hub.WEIGHTS)
        self.path, self.checkpoint = path, Checkpoint(path, may_unpickle)
        stated = flags(path, self.checkpoint.settings())
        self.cfg = replace(cfg, **stated)
        net = build(self.cfg, device="meta")
        self.table = self._places(net)
        self._check_shapes(net)
        check_flags(path, stated, cfg)
        print(f"{path}: {told(cfg, stated)}")

    def _places(self, net) -> dict[str, str]:
        """Return LTX-2's name -> our name, for every tensor of the file."""
        table = {theirs: ours for ours, theirs in key_table(net).items()}
        where = self.checkpoint.where
        for name in [name for name in where if SINKS in name]:
            if self.cfg.num_sinks:
                table[name] = "sinks.tokens"
            else:
                print(f"{self.path}: its sinks stay out, config {self.cfg.name} has none")
                del where[name]
        for trouble, keys in (
            ("has no", [name for name in table if name not in where]),
            ("has an unexpected", [name for name in where if name not in table]),
        ):
            if keys:
                more = f" ({len(keys)} such keys)" if len(keys) > 1 else ""
                strange = [contents.TOY, *contents.OTHERS]
                rows = contents.CHANGED + strange * (not where.keys() & table.keys())
                if what := contents.named(self.checkpoint.keys, rows):
                    raise ValueError(f"{self.path}: {what}")
                raise ValueError(
                    f"{self.path} {trouble} {keys[0]}{more}: expected the {len(table)} tensors "
                    f"of an LTX-2 transformer of this config"
                )
        return table

    def _check_shapes(self, net):
        shapes = {name: tuple(x.shape) for name, x in net.state_dict().items()}
        for name, ours in self.table.items():
            if (found := self.checkpoint.shapes[name]) != shapes[ours]:
                raise ValueError(
                    f"{self.path}: tensor {name} is {found}, expected {shapes[ours]}; choose the "
                    f"config that the file was made for, config {self.cfg.name} is not"
                )

    def fingerprint(self) -> str:
        """Return a short hash of the output projections, which every training changes."""
        exits, found = [n for n, ours in self.table.items() if "proj_out" in ours], {}
        for name in exits:
            file, key = self.checkpoint.where[name]
            with files.opened(file) as f:
                found[name] = f.get_tensor(key).float()
        return files.fingerprint(found)

    def stored(self, device="cpu", dtype=torch.bfloat16):
        """Yield (our name, tensor) for every tensor of the file."""
        for name, tensor in self.checkpoint.read(device, dtype):
            yield self.table[name], tensor

    def tensors(self, device="cpu", dtype=torch.bfloat16):
        """Yield (our name, tensor) for every parameter; new sinks if the file has none."""
        yield from self.stored(device, dtype)
        if self.cfg.num_sinks and "sinks.tokens" not in self.table.values():
            print(f"{self.path}: no sinks; {self.cfg.num_sinks} fresh ones take their place")
            g = torch.Generator().manual_seed(0)
            sinks = init_sinks(self.cfg.num_sinks, self.cfg.audio_width, g)
            yield "sinks.tokens", sinks.to(device, dtype)

    def load(self, device="cpu", dtype=torch.bfloat16, in_fp8=False) -> OmniTransformer:
        """Read the whole file into a model; in_fp8: whose layers multiply in fp8."""
        net, tensors = build(self.cfg, device="meta"), self.tensors(device, dtype)
        tensors = fp8.while_read(net, tensors) if in_fp8 else tensors
        # assign: the tensors become the parameters, so there is no second copy in memory
        files.load_into(net, dict(tensors), self.path, assign=True)
        return net.requires_grad_(False).eval()


def save(path, tensors, cfg, made_by):
    """Write weights under LTX-2's names and with flags, as `Source` reads them."""
    table = {ours: f"{PREFIX}{ltx2_name(ours)}" for ours in tensors if ours != "sinks.tokens"}
    named = {table.get(ours, SINKS): x.contiguous() for ours, x in tensors.items()}
    flags = {  # in the words of LTX-2's metadata
        "rope_type": cfg.rope_layout,
        "frequencies_precision": "float64" if cfg.rope_float64 else "float32",
        "av_ca_timestep_scale_multiplier": cfg.gate_timestep_scale,
    }
    metadata = {"config": json.dumps({"transformer": flags}), "made_by": json.dumps(made_by)}
    files.write_beside(path, lambda p: save_file(named, p, metadata))


def random_weights(cfg, device="cpu", dtype=torch.bfloat16, in_fp8=False) -> OmniTransformer:
    """Return a model with random weights, to measure speed and memory; in_fp8: as in `load`."""
    net = build(cfg, device="meta")
    tensors = random_tensors(dict(net.named_parameters()), device, dtype)
    tensors = fp8.while_read(net, tensors) if in_fp8 else tensors
    net.load_state_dict(dict(tensors), assign=True)
    return net.requires_grad_(False).eval()


def random_tensors(parameters, device, dtype):
    """Yield (name, tensor) with random contents for every parameter."""
    torch.manual_seed(0)
    for name, p in parameters.items():
        tensor = torch.ones(p.shape, device=device, dtype=dtype)
        if not name.endswith(("q_norm", "k_norm")):
            tensor.normal_(std=p.shape[-1] ** -0.5 if p.dim() == 2 else 0.02)
        yield name, tensor


# ---- the two rotary layouts ----

# (outer, inner) axes of the rows of a head under the other layout: half by half, or pair by pair
REORDER = {"interleaved": (2, -1), "split": (-1, 2)}


def to_layout(weights, layout, cfg) -> dict:
    """Convert weights of a model to the other RoPE layout; the model computes the same."""
    # The order of channels inside a head does not matter if queries and keys have the same one, so
    # a student can start exactly as its teacher. (The official code copies the weights unchanged,
    # and training has to absorb the difference.) Only what is rotated moves.
    rotated = (".self_attn.", ".cross_attn.")
    moved = (".to_q.weight", ".to_q.bias", ".to_k.weight", ".to_k.bias", ".q_norm", ".k_norm")
    return {
        name: reordered(w, layout, cfg.num_heads)
        if any(part in name for part in rotated) and name.endswith(moved)
        else w
        for name, w in weights.items()
    }


def reordered(w, layout, heads):
    """Reorder the rows of every head: i and i + half become 2i and 2i + 1, or the inverse.

    >>> reordered(torch.arange(8), "interleaved", 2)
    tensor([0, 2, 1, 3, 4, 6, 5, 7])
    >>> reordered(torch.tensor([0, 2, 1, 3, 4, 6, 5, 7]), "split", 2)
    tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """
    return w.unflatten(0, (heads, *REORDER[layout])).transpose(1, 2).flatten(0, 2)


def show_names():
    """Print how many tensors have a name in LTX-2's files, and two of the names."""
    for cfg in (config.LTX2, config.FULL, config.RELEASED):
        table = key_table(build(cfg, device="meta"))
        print(f"{cfg.name}: {len(table)} tensors have a name in LTX-2's files")
    for ours in ("layers.0.video.self_attn.to_q.weight", "audio.adaln_gate.linear.bias"):
        print(f"    {ours:40} {table[ours]}")


def convert(source, path, layout=None):
    """Write a transformer in bfloat16 as one file, under LTX-2's names and with its flags.

    layout   RoPE layout to write; None: the layout it has
    """
    if source.cfg.rope_layout == layout:
        raise ValueError(f"{source.path}: its pairs are {layout} already; nothing to convert")
    files.check_writable(path)
    weights = dict(source.stored())
    if layout:
        weights = to_layout(weights, layout, source.cfg)
    option = f"--{layout or 'out'}"
    made_by = {"command": f"python -m full_size.weights {source.path} {option} {path}"}
    save(path, weights, replace(source.cfg, rope_layout=layout or source.cfg.rope_layout), made_by)
    print(f"wrote {path}")


def main():
    p = cli.parser(__doc__)
    p.add_argument("file", nargs="?", help="transformer to check; without it, names are printed")
    about = "config of its shape and sinks: ltx2, full, released"
    p.add_argument("--config", default="ltx2", help=about)
    p.add_argument("--out", help="write it as one file; the only way to read a .pt file")
    p.add_argument("--interleaved", metavar="OUT", help="write it in the students' RoPE layout")
    p.add_argument("--split", metavar="OUT", help="write it in LTX-2's RoPE layout")
    args = p.parse_args()
    if not args.file:
        return show_names()
    source = Source(args.file, cli.find_config(args.config), may_unpickle=args.out is not None)
    print(f"{args.file}: {len(source.table)} tensors, each with its place in the model")
    for layout in (None, *REORDER):
        if path := getattr(args, layout or "out"):
            convert(source, path, layout)


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
