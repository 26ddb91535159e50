"""Queries, keys and values by one product: the same numbers, the same weights, no second copy."""

import pytest
import torch
from helpers import PAPER, block_rows, random_clip, random_model, random_text, tiny
from tape import Operators

from full_size import faster
from kv_cache import CachedView, MaskedView
from masks import block_span
from plumbing import files

CFG = tiny(PAPER, num_sinks=2)
PRODUCTS = "aten::addmm", "aten::mm", "aten::linear", "aten::bmm", "aten::baddbmm"


def two_models():
    """The same random model twice; the second one joined."""
    plain, joined = random_model(CFG), random_model(CFG)
    faster.join_projections(joined)
    return plain, joined


def velocities(net, view, sigma=0.4):
    """A pass over block 0 of a clip."""
    torch.manual_seed(1)
    clip, text = random_clip(CFG, 1, clips=2), random_text(net, CFG, clips=2)
    tokens = [x[:, rows] for x, rows in zip(clip, block_rows(0, CFG))]
    level = torch.full((2,), sigma, dtype=tokens[0].dtype)
    return net(*tokens, level, level, text, block_span(0, CFG), view)


@pytest.mark.parametrize("view", [MaskedView, lambda: CachedView(CFG, 3)])
def test_joined_weights_give_the_same_velocities(view):
    """In float64, with and without a cache, by fewer products."""
    plain, joined = two_models()
    counts = []
    with torch.no_grad():
        outputs = []
        for net in (plain, joined):
            with Operators() as seen:
                outputs.append(velocities(net, view()))
            counts.append(sum(seen.counts[name] for name in PRODUCTS))
    for one, other in zip(*outputs):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)
    # per layer: self attention of two streams 6 -> 2, the two listening ones 6 -> 4, text 4 -> 2
    assert counts[0] - counts[1] == CFG.num_layers * (4 + 2 + 2)


def test_names_values_and_memory_stay_as_they_were(tmp_path):
    """The state dict is bitwise the same, can be saved, and holds no byte more."""
    plain, joined = (net.state_dict() for net in two_models())
    assert list(plain) == list(joined)
    assert all(torch.equal(plain[key], joined[key]) for key in plain)
    files.save_weights(tmp_path / "x.safetensors", joined, CFG, {})
    read, _, _ = files.read_weights(tmp_path / "x.safetensors")
    assert all(torch.equal(plain[key], read[key]) for key in plain)
    held = [{t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in d.values()}
            for d in (plain, joined)]  # fmt: skip
    assert sum(held[0].values()) == sum(held[1].values()) and len(held[1]) < len(held[0])


@pytest.mark.parametrize("change", ["moved", "loaded", "assigned"])
def test_weights_that_change_later_are_the_ones_used(change):
    """Another dtype or other values: no stale copy answers, whether still joined or not."""
    nets = two_models()
    for net in nets:
        if change == "moved":
            net.to(torch.float32).to(torch.float64)
        else:
            other = {key: 1.1 * w for key, w in net.state_dict().items()}
            net.load_state_dict(other, assign=change == "assigned")
    with torch.no_grad():
        pairs = zip(*(velocities(net, MaskedView()) for net in nets))
        assert all((x - y).abs().max() < 1e-9 for x, y in pairs)


def test_a_gradient_reaches_each_weight():
    """With gradients, the layers are called one by one."""
    _, joined = two_models()
    joined.requires_grad_(True)
    sum(v.square().sum() for v in velocities(joined, MaskedView())).backward()
    for name, p in joined.named_parameters():
        if name.endswith(("to_q.weight", "to_k.bias", "to_v.weight")):
            assert p.grad is not None and p.grad.shape == p.shape, name


def test_the_values_of_a_prompt_do_not_keep_the_whole_product():
    """Keys and values of a prompt take their own bytes and no more, joined or not."""
    for net in two_models():
        with torch.no_grad():
            text = random_text(net, CFG)
        for x in (x for stream in (text.video, text.audio) for pair in stream for x in pair):
            assert x.untyped_storage().nbytes() == x.nbytes
