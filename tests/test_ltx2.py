"""LTX-2's key names: one to one, complete, strict."""

import functools

import pytest
import torch
from helpers import PAPER, random_model, tiny

import config
import ltx2
from model import build

V, A = 4096, 2048


@functools.cache
def full_size():
    return build(config.LTX2, device="meta")


def test_every_tensor_has_its_own_ltx2_name():
    """3510 keys of ours, 3510 different keys of theirs."""
    table = ltx2.key_table(full_size())
    assert len(table) == len(set(table.values())) == 3510


def test_names_come_back():
    """from_ltx2 undoes to_ltx2 for every key, and the tensors are the same objects."""
    ours = full_size().state_dict()
    back = ltx2.from_ltx2(ltx2.to_ltx2(ours, full_size()), full_size())
    assert set(back) == set(ours)
    assert all(back[key] is ours[key] for key in ours)


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
    """A student with sinks has the same 3510 names, and can be loaded but for the sinks."""
    student = build(config.FULL, device="meta")
    assert "sinks.tokens" in student.state_dict()
    assert ltx2.key_table(student) == ltx2.key_table(full_size())


def test_renamed_weights_load_strictly():
    """A model filled through LTX-2's names equals their source; only the sinks are missing."""
    cfg = tiny(PAPER, num_sinks=4)
    source, target = random_model(cfg, seed=1), random_model(cfg, seed=2)
    renamed = ltx2.from_ltx2(ltx2.to_ltx2(source.state_dict(), source), target)
    result = target.load_state_dict(renamed, strict=False)
    assert result.missing_keys == ["sinks.tokens"] and not result.unexpected_keys
    for key in renamed:
        assert torch.equal(source.state_dict()[key], target.state_dict()[key])


@pytest.mark.parametrize(
    "extra", ["transformer_blocks.0.attn1.to_gate_logits.weight", "prompt_scale_shift_table"]
)
def test_an_unknown_key_is_refused_by_name(extra):
    """Later LTX generations and other models' files do not load by accident."""
    weights = ltx2.to_ltx2(full_size().state_dict(), full_size())
    with pytest.raises(ValueError, match=f"has an unexpected {extra}: expected the 3510 tensors"):
        ltx2.from_ltx2({**weights, extra: None}, full_size())


def test_missing_keys_are_refused_by_name():
    """A truncated file is refused in one line: its first missing key, and how many are missing."""
    weights = ltx2.to_ltx2(full_size().state_dict(), full_size())
    lost = "transformer_blocks.5.attn1.to_q.weight"
    del weights[lost]
    with pytest.raises(ValueError, match=f"has no {lost}: expected"):
        ltx2.from_ltx2(weights, full_size())
    with pytest.raises(ValueError, match=r"^[^\n]*\(3510 such keys\)[^\n]*$"):
        ltx2.from_ltx2({}, full_size())
