"""LTX-2's key names: one to one, complete, strict."""

import contextlib
import functools
import json
from dataclasses import replace
from unittest import mock

import pytest
import torch
from helpers import PAPER, random_clip, random_model, random_text, run_here, tiny
from safetensors.torch import save_file

import config
from full_size import weights as ltx2
from kv_cache import MaskedView
from masks import clip_span
from model import build
from plumbing import files

V, A = 4096, 2048


@functools.cache
def full_size():
    return build(config.LTX2, device="meta")


def test_every_tensor_has_its_own_ltx2_name():
    """3510 keys of ours, 3510 different keys of theirs."""
    table = ltx2.key_table(full_size())
    assert len(table) == len(set(table.values())) == 3510


@pytest.mark.parametrize(
    "key, shape",
    [
        ("patchify_proj.weight", (V, 128)),
        ("audio_proj_out.weight", (128, A)),
        ("audio_scale_shift_table", (2, A)),
        ("caption_projection.linear_1.weight", (V, 3840)),
        ("audio_caption_projection.linear_2.bias", (A,)),
        ("adaln_single.emb.timestep_embedder.linear_1.weight", (V, 256)),
        ("audio_adaln_single.linear.weight", (6 * A, A)),
        ("av_ca_audio_scale_shift_adaln_single.linear.weight", (4 * A, A)),
        ("av_ca_video_scale_shift_adaln_single.linear.weight", (4 * V, V)),
        ("av_ca_a2v_gate_adaln_single.linear.weight", (V, V)),
        ("av_ca_v2a_gate_adaln_single.linear.weight", (A, A)),
        ("transformer_blocks.0.scale_shift_table", (6, V)),
        ("transformer_blocks.47.scale_shift_table_a2v_ca_audio", (5, A)),
        ("transformer_blocks.47.attn1.q_norm.weight", (V,)),
        ("transformer_blocks.3.audio_attn2.to_k.weight", (A, A)),
        ("transformer_blocks.3.audio_to_video_attn.to_q.weight", (A, V)),
        ("transformer_blocks.3.audio_to_video_attn.to_out.0.weight", (V, A)),
        ("transformer_blocks.3.video_to_audio_attn.to_k.weight", (A, V)),
        ("transformer_blocks.3.video_to_audio_attn.k_norm.weight", (A,)),
        ("transformer_blocks.3.ff.net.0.proj.weight", (4 * V, V)),
        ("transformer_blocks.3.audio_ff.net.2.weight", (A, 4 * A)),
    ],
)
def test_shapes_are_those_of_the_published_file(key, shape):
    """The tensor under LTX-2's name has LTX-2's shape."""
    theirs = ltx2.to_ltx2(full_size().state_dict(), full_size())
    assert theirs[key].shape == shape


def test_sinks_stay_out_of_ltx2_files():
    """A student with sinks has the same 3510 names."""
    student = build(config.FULL, device="meta")
    assert "sinks.tokens" in student.state_dict()
    assert ltx2.key_table(student) == ltx2.key_table(full_size())


# ---- files ----

TEACHER = tiny(PAPER, num_sinks=0)  # split, float64, 1000
STUDENT_FLAGS = dict(rope_layout="interleaved", rope_float64=False, gate_timestep_scale=1.0)
CFG = replace(TEACHER, **STUDENT_FLAGS)
LTX2_FLAGS = {
    "rope_type": "split",
    "frequencies_precision": "float64",
    "av_ca_timestep_scale_multiplier": 1000,
}


def theirs(seed=1):
    """Weights of a tiny model under LTX-2's names."""
    net = random_model(CFG, torch.float32, seed)
    return ltx2.to_ltx2(net.state_dict(), net)


def single_file(path, weights, prefix="model.diffusion_model.", flags=None, **more):
    """A file as LTX-2's: the transformer behind a prefix, other parts beside it."""
    tensors = {prefix + name: w.contiguous() for name, w in weights.items()}
    tensors |= {"vae.decoder.conv_in.bias": torch.zeros(3), "vocoder.ups.0.bias": torch.zeros(3)}
    tensors |= {"model.diffusion_model.audio_embeddings_connector.x": torch.zeros(3), **more}
    metadata = {"config": json.dumps({"transformer": flags})} if flags else None
    save_file(tensors, path, metadata)
    return path


def sharded(folder, weights):
    """An index beside two files, as the released generator."""
    names, where = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"g-0000{number}-of-00002.safetensors"
        save_file({"model." + n: weights[n].contiguous() for n in part}, folder / file)
        where |= {"model." + n: file for n in part}
    index = folder / "g.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def load(path, cfg=CFG):
    return ltx2.Source(path, cfg).load(dtype=torch.float32)


def assert_holds(net, weights):
    found = ltx2.to_ltx2(net.state_dict(), net)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[n], weights[n]) for n in weights)


@pytest.mark.parametrize(
    "prefix", ["model.diffusion_model.", "model.velocity_model.", "model.", ""]
)
def test_the_transformer_is_read_out_of_a_single_file(tmp_path, prefix):
    """Whatever the prefix, every tensor arrives; connectors, VAE and vocoder stay out."""
    weights = theirs()
    assert_holds(load(single_file(tmp_path / "x.safetensors", weights, prefix)), weights)


@pytest.mark.parametrize("by", ["index", "folder"])
def test_a_sharded_checkpoint_is_read_by_index_or_folder(tmp_path, by):
    """Both shards together are the model."""
    weights = theirs()
    index = sharded(tmp_path, weights)
    assert_holds(load(index if by == "index" else tmp_path), weights)


STATED = "(stated by the file, over"
PAPERS, NOT_STATED = "of config paper", "(of config paper; not in the file)"
SOURCES = [
    # a student that was trained from LTX-2 has LTX-2's flags, whatever the config
    (CFG, LTX2_FLAGS, TEACHER, f"rope_layout=split {STATED} interleaved {PAPERS}), "
     f"rope_float64=True {STATED} False {PAPERS}), "
     f"gate_timestep_scale=1000.0 {STATED} 1.0 {PAPERS})"),
    # a released student's file states none and has the flags of its config
    (CFG, None, CFG, f"rope_layout=interleaved {NOT_STATED}, rope_float64=False {NOT_STATED}, "
     f"gate_timestep_scale=1.0 {NOT_STATED}"),
    (TEACHER, LTX2_FLAGS, TEACHER, "rope_layout=split (stated by the file), "
     "rope_float64=True (stated by the file), gate_timestep_scale=1000.0 (stated by the file)"),
    # the file states one, and the config agrees with it
    (TEACHER, {"rope_type": "split"}, TEACHER, "rope_layout=split (stated by the file), "
     f"rope_float64=True {NOT_STATED}, gate_timestep_scale=1000.0 {NOT_STATED}"),
]  # fmt: skip


@pytest.mark.parametrize("cfg, flags, found, told", SOURCES)
def test_flags_of_the_file_win_and_each_is_told_with_its_source(
    tmp_path, capsys, cfg, flags, found, told
):
    """From the file or from the config, and whether they agree."""
    path = single_file(tmp_path / "x.safetensors", theirs(), flags=flags)
    assert load(path, cfg).cfg == found
    assert capsys.readouterr().out == f"{path}: {told}\n"


UNDETERMINED = [
    (TEACHER, None, "states no rope_layout, .*; a student's file needs --config full or released"),
    (CFG, {"rope_type": "split"}, "states rope_layout=split, unlike .* no rope_float64"),
    (TEACHER, {"rope_type": "interleaved"}, "expected a config that agrees with it, or a file"),
    (CFG, {"av_ca_timestep_scale_multiplier": 1000}, "states gate_timestep_scale=1000.0"),
]


@pytest.mark.parametrize("cfg, flags, message", UNDETERMINED)
def test_flags_that_cannot_be_determined_are_refused(tmp_path, cfg, flags, message):
    """Interleaved weights under a teacher's config, and gaps that a config of others would fill:
    one line, before a weight is read."""
    path = single_file(tmp_path / "x.safetensors", theirs(), flags=flags)
    with pytest.raises(ValueError, match=f"^{path}: [^\n]*{message}[^\n]*$"):
        ltx2.Source(path, cfg)


METADATA = {
    "no JSON": ("nonsense", "the config 'nonsense'; expected JSON with a dictionary"),
    "list": ("[]", "the config '.*'; expected JSON with a dictionary under 'transformer'"),
    "null": ('{"transformer": null}', "expected JSON with a dictionary under 'transformer'"),
    "words": ('{"transformer": "ltx"}', "expected JSON with a dictionary under 'transformer'"),
    "layout": ('{"transformer": {"rope_type": 3}}', "rope_type=3; expected split or interleaved"),
    "precision": (
        '{"transformer": {"frequencies_precision": "half"}}',
        "frequencies_precision='half'; expected float64 or float32",
    ),
    "multiplier": (
        '{"transformer": {"av_ca_timestep_scale_multiplier": null}}',
        "av_ca_timestep_scale_multiplier=None; expected a number",
    ),
}


@pytest.mark.parametrize("config, message", METADATA.values(), ids=METADATA.keys())
def test_foreign_metadata_are_refused(tmp_path, config, message):
    """One line with the file, what it says, what was expected and what to do."""
    path = tmp_path / "x.safetensors"
    save_file({f"model.{n}": w.contiguous() for n, w in theirs().items()}, path, {"config": config})
    with pytest.raises(ValueError, match=f"^{path}: [^\n]*{message}[^\n]*as it was published$"):
        load(path)


INDICES = "", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'


@pytest.mark.parametrize("index", INDICES)
def test_a_foreign_index_is_refused(tmp_path, index):
    """No JSON, or JSON that does not say in which file a tensor is."""
    path = tmp_path / "g.safetensors.index.json"
    path.write_text(index)
    with pytest.raises(ValueError, match=f"^{path}: not an index of shards; expected JSON with a"):
        load(path)


@pytest.mark.parametrize(
    "switch, value",
    [("apply_gated_attention", True), ("ff_bias", False), ("cross_attention_adaln", True)],
)
def test_later_generations_are_refused(tmp_path, switch, value):
    """A file of LTX-2.3 or 2.5 says so in its metadata."""
    path = single_file(tmp_path / "x.safetensors", theirs(), flags={**LTX2_FLAGS, switch: value})
    with pytest.raises(ValueError, match=f"{switch}={value} belongs to a later LTX .2.3 or 2.5.; "):
        load(path)


NAME, EXPECTED = "transformer_blocks.1.attn1.to_q.bias", "expected the [0-9]+ tensors of an LTX-2"
GATE = "transformer_blocks.1.attn1.to_gate_logits.bias"  # of later generations
WRONG = {  # weights that are replaced, None: removed
    "missing": ({NAME: None}, f"has no {NAME}: {EXPECTED}"),
    "two missing": (
        {NAME: None, "proj_out.bias": None},
        rf"has no proj_out.bias \(2 such keys\): {EXPECTED}",
    ),
    "unexpected": ({"x.y": torch.zeros(3)}, f"has an unexpected x.y: {EXPECTED}"),
    "later": ({GATE: torch.zeros(3)}, rf"weights of LTX-2.3 or later \('.*{GATE}'\); this project"),
    "shape": ({NAME: torch.zeros(3)}, rf"tensor {NAME} is \(3,\), expected \(32,\); "),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG.keys())
def test_wrong_tensors_are_refused_by_name(tmp_path, change, message):
    """One tensor too few, too many, or of another shape: one line, before a weight is read."""
    weights = {name: x for name, x in (theirs() | change).items() if x is not None}
    path = single_file(tmp_path / "x.safetensors", weights)
    with pytest.raises(ValueError, match=rf"^{path}:? [^\n]*{message}[^\n]*$"):
        ltx2.Source(path, CFG)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    """NaN in one tensor."""
    weights = theirs()
    weights[NAME] *= torch.nan
    with pytest.raises(ValueError, match=f"x.safetensors: tensor .*{NAME} holds NaN or infinity"):
        load(single_file(tmp_path / "x.safetensors", weights))


def test_the_rest_of_a_reserved_file_is_noticed(tmp_path):
    """An interrupted downloader leaves zeros where a matrix should be; a bias may be zero."""
    weights = theirs()
    weights[NAME] *= 0
    load(single_file(tmp_path / "x.safetensors", weights))
    weights["proj_out.weight"] *= 0
    with pytest.raises(ValueError, match="tensor .*proj_out.weight holds only zeros; download it"):
        load(single_file(tmp_path / "x.safetensors", weights))


def test_the_fingerprint_is_that_of_the_output_projections(tmp_path):
    """Another number there gives another hash; a copy of the file has the same."""
    weights, found = theirs(), []
    for name in ("", "", "proj_out.weight", "audio_proj_out.bias"):
        if name:
            weights[name] = weights[name] + 1
        path = single_file(tmp_path / f"{len(found)}.safetensors", weights)
        found.append(ltx2.Source(path, CFG).fingerprint())
    assert found[0] == found[1] and len(set(found)) == 3


def test_files_that_are_not_whole_are_refused(tmp_path):
    """No file, half a file, an empty folder, a lost shard: one line each."""
    with pytest.raises(ValueError, match="no such file or folder"):
        load(tmp_path / "no.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected one .safetensors file or index, found 0"):
        load(tmp_path / "empty")
    whole = single_file(tmp_path / "x.safetensors", theirs()).read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="half.safetensors: not a whole safetensors file"):
        load(tmp_path / "half.safetensors")
    index = sharded(tmp_path, theirs())
    (tmp_path / "g-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="g-00002-of-00002.safetensors is missing .1 of 2 shards"):
        load(index)


def test_sinks_of_a_student_are_its_own_and_of_a_teacher_fresh(tmp_path, capsys):
    """A paper-era student's file holds them; a model without sinks leaves them where they are."""
    with_sinks = replace(CFG, num_sinks=4)
    own = {"model.audio_sink_tokens": torch.rand(1, 4, CFG.audio_width)}
    path = single_file(tmp_path / "x.safetensors", theirs(), "model.", **own)
    assert torch.equal(load(path, with_sinks).sinks.tokens, own["model.audio_sink_tokens"])
    assert load(path).sinks is None
    assert "its sinks stay out, config paper has none" in capsys.readouterr().out
    path = single_file(tmp_path / "x.safetensors", theirs())
    assert load(path, with_sinks).sinks.tokens.std() == pytest.approx(0.02, rel=0.2)
    assert "4 fresh ones take their place" in capsys.readouterr().out


def test_fresh_sinks_are_the_same_in_every_process(tmp_path):
    """Each process of a training reads the file by itself, whatever it has drawn before."""
    path = single_file(tmp_path / "x.safetensors", theirs())
    one, two = (load(path, replace(CFG, num_sinks=4)).sinks.tokens for _ in range(2))
    assert torch.equal(one, two)


def test_only_the_transformer_is_read(tmp_path, monkeypatch):
    """No tensor of another part is touched: 43 GB need not fit where 38 do."""
    read, real = [], files.opened

    @contextlib.contextmanager
    def watched(*args, **options):
        with real(*args, **options) as file:
            watching = mock.Mock(wraps=file)
            yield watching
        read.extend(call.args[0] for call in watching.get_tensor.call_args_list)

    monkeypatch.setattr(files, "opened", watched)
    weights = theirs()
    load(single_file(tmp_path / "x.safetensors", weights))
    assert sorted(read) == sorted("model.diffusion_model." + name for name in weights)


@pytest.mark.parametrize("layouts", [("split", "interleaved"), ("interleaved", "split")])
def test_a_model_can_start_as_one_of_the_other_layout(layouts):
    """Reordered rows under the other layout: the same velocities in float64; as they are, not. The
    way back gives the same bits."""
    old, new = (replace(CFG, rope_layout=layout) for layout in layouts)
    source, target = random_model(old), build(new).double()
    clip, text, half = random_clip(CFG, 2), random_text(source, CFG), torch.full((1,), 0.5).double()
    rest = (half, half, text, clip_span(2, CFG), MaskedView())
    wanted = source(*clip, *rest)
    moved = ltx2.to_layout(source.state_dict(), layouts[1], old)
    target.load_state_dict(moved)
    for a, b in zip(target(*clip, *rest), wanted):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    target.load_state_dict(source.state_dict())
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(target(*clip, *rest), wanted))
    back = ltx2.to_layout(moved, layouts[0], new)
    assert all(torch.equal(back[name], x) for name, x in source.state_dict().items())


def test_random_weights_fill_every_tensor():
    """Finite everywhere, in the dtype asked for, and no matrix at zero: timings mean something."""
    net = ltx2.random_weights(CFG)
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in net.parameters())
    assert all(p.float().std() > 0 for n, p in net.named_parameters() if p.dim() == 2)


def test_what_is_saved_is_read_as_a_published_file(tmp_path):
    """Names, sinks and the three flags come back, over those of another config."""
    cfg = replace(CFG, num_sinks=4, rope_layout="split", gate_timestep_scale=1000.0)
    weights = random_model(cfg, torch.float32).state_dict()
    ltx2.save(tmp_path / "student.safetensors", weights, cfg, {"steps": 3})
    net = load(tmp_path / "student.safetensors", replace(CFG, num_sinks=4))
    assert net.cfg == replace(cfg, name=CFG.name)
    assert all(torch.equal(x, weights[name]) for name, x in net.state_dict().items())


def test_a_file_is_checked_and_converted_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Flags are told; each copy states its layout, there and back is the same file but for who
    made it; twice is refused, and so is a place where nothing can be written."""
    monkeypatch.setitem(config.CONFIGS, "ltx2", TEACHER)
    weights = random_model(TEACHER, torch.bfloat16).state_dict()
    file, inter, back = (tmp_path / f"{name}.safetensors" for name in ("old", "inter", "back"))
    ltx2.save(file, weights, TEACHER, {})
    status, said, _ = run_here(ltx2, [file, "--interleaved", inter], monkeypatch, capsys)
    assert status == 0 and "rope_layout=split" in said
    assert f"{len(weights)} tensors, each with its place" in said
    net = ltx2.Source(inter, TEACHER).load()
    assert net.cfg == replace(TEACHER, rope_layout="interleaved")
    for name, x in ltx2.to_layout(weights, "interleaved", TEACHER).items():
        assert torch.equal(net.state_dict()[name], x)
    status, *_ = run_here(ltx2, [inter, "--split", back], monkeypatch, capsys)
    assert status == 0
    one, two = (ltx2.Source(path, TEACHER).load() for path in (file, back))
    assert one.cfg == two.cfg
    assert all(torch.equal(x, two.state_dict()[name]) for name, x in one.state_dict().items())
    for path, layout in ((inter, "interleaved"), (back, "split")):
        status, _, err = run_here(ltx2, [path, f"--{layout}", file], monkeypatch, capsys)
        assert status == 2 and f"its pairs are {layout} already" in err
    lost = tmp_path / "no" / "x.safetensors"
    status, _, err = run_here(ltx2, [file, "--interleaved", lost], monkeypatch, capsys)
    assert status == 2 and "does not exist; create it first" in err
