"""What the graded tests share: name the mistake behind a wrong result, and watch side effects."""

import contextlib
import random

import pytest
import torch
from torch.utils._pytree import tree_leaves


def close(found, right, atol=1e-5) -> bool:
    """Tell whether two tensors have the same shape and, up to rounding, the same numbers."""
    found, right = (torch.as_tensor(x).detach().double() for x in (found, right))
    return found.shape == right.shape and torch.allclose(found, right, rtol=atol, atol=atol)


def check(found, right, otherwise, suspects=None, atol=1e-5):
    """Fail unless a result is right; say which mistake it is if a known mistake gives this result.

    suspects   what the student reads -> the result of this mistake, or a function that computes it
    """
    assert torch.is_tensor(found), f"{otherwise}: found {type(found).__name__}, not a tensor"
    if close(found, right, atol):
        return
    for mistake, wrong in (suspects or {}).items():
        assert not close(found, wrong() if callable(wrong) else wrong, atol), mistake
    shapes = tuple(found.shape), tuple(right.shape)
    assert shapes[0] == shapes[1], f"{otherwise}: the shape is {shapes[0]}, not {shapes[1]}"
    pytest.fail(otherwise)


def check_dtype(found, right, rule):
    assert found.dtype == right, f"{rule}: expected {right}, not {found.dtype}"


def check_gradients(found, right, inputs, otherwise):
    """Fail unless the sums of two results have the same gradients; inputs by name."""
    for name, x in inputs.items():
        ours, theirs = (
            torch.autograd.grad(y.square().sum(), x, retain_graph=True, allow_unused=True)[0]
            for y in (right, found)
        )
        is_right = theirs is not None and close(theirs, ours, 1e-4)
        assert is_right, f"{otherwise}: the gradient that reaches {name} is not complete"


@contextlib.contextmanager
def watched(*inputs):
    """Fail if inputs are changed, if global random numbers are used, or if gradients stay off."""
    tensors = [x for x in tree_leaves(inputs) if torch.is_tensor(x)]
    copies = [x.detach().clone() for x in tensors]
    before = torch.get_rng_state(), random.getstate(), torch.is_grad_enabled()
    yield
    for x, copy in zip(tensors, copies):
        same = torch.equal(x.detach(), copy)
        assert same, "an argument is changed in place: the caller still needs it as it was"
    is_own = torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert is_own, "global random numbers are used or seeded: draw from the given generator alone"
    was_enabled = "gradients were enabled before the call, and are not any more"
    assert torch.is_grad_enabled() == before[2], was_enabled


def check_rejected(function, value, what):
    """Fail unless a call raises a ValueError that names the value."""
    try:
        found = function()
    except ValueError as error:
        assert value in str(error), f"the message of {what} should name {value}: {error}"
    except NotImplementedError:
        raise
    except Exception as error:
        pytest.fail(f"{what}: {type(error).__name__} instead of a ValueError")
    else:
        pytest.fail(f"{what}: accepted as {found}; expected a ValueError")


def random_tensor(*shape, seed=0, dtype=torch.float32, **options):
    """Draw a tensor of the standard normal distribution, without the global generator."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_(options.get("requires_grad", False))


def fill(view):
    """Allocate the caches of a view, as the first pass does: an eviction rotates their keys."""
    cfg = view.cfg
    for layer in view.layers:
        for site, cache in layer.items():
            width = cfg.video_width if site == "video_self" else cfg.audio_width
            if cache.k is None:
                heads = cfg.num_heads, width // cfg.num_heads
                cache.append(*torch.zeros(2, 1, cache.num_new, *heads))
