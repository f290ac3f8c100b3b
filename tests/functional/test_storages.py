"""Every function refuses a storage that holds less than its tensor needs, and changes nothing."""

from __future__ import annotations

import contextlib

import pytest
import reference as ref
import torch
from models import Watching
from torch import nn

import gradclip_ext
from gradclip_ext import AGC, AutoClip, GradClipper

# FSDP1 resizes to 0; the others hold a part of the elements, or all but the last byte.
SIZES = {"none": 0, "a part": 40, "all but one byte": 400 * 4 - 1}


def shrunk(layout, size):
    """A tensor of 20 x 10 elements whose storage was resized after it was made."""
    memory = torch.arange(400.0) - 7.0
    tensor = {
        "flat": memory[200:].view(20, 10),
        "transposed": memory[200:].view(10, 20).t(),
        "strided": memory.view(20, 20)[:, 10:],
    }[layout]
    memory.untyped_storage().resize_(size)
    return tensor


CALLS = {
    "clip_grad_norm_": lambda p: gradclip_ext.clip_grad_norm_(p, 1.0),
    "clip_grad_norm_, L3": lambda p: gradclip_ext.clip_grad_norm_(p, 1.0, 3.0),
    "get_total_norm": lambda p: gradclip_ext.get_total_norm([x.grad for x in p]),
    "clip_grads_with_norm_": lambda p: gradclip_ext.clip_grads_with_norm_(p, 1.0, 5.0),
    "clip_grad_value_": lambda p: gradclip_ext.clip_grad_value_(p, 0.5),
    "grad_norms": lambda p: gradclip_ext.grad_norms(p),
    "add_weight_decay_": lambda p: gradclip_ext.add_weight_decay_(p, 0.1),
    "adaptive_clip_grad_": lambda p: gradclip_ext.adaptive_clip_grad_(p),
    "GradClipper": lambda p: GradClipper(p, 1.0).clip_(),
    "GradClipper, decay": lambda p: GradClipper(p, 1.0, weight_decay=0.1).clip_(),
    "GradClipper, AutoClip": lambda p: GradClipper(p, AutoClip()).clip_(),
    "GradClipper, AGC": lambda p: GradClipper(p, AGC()).clip_(),
    "GradClipper, value": lambda p: GradClipper(p, clip_value=0.1).clip_(),
}


by_watching = pytest.mark.parametrize(
    "watching", [contextlib.nullcontext, Watching], ids=["native", "watched"]
)


@by_watching
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("layout", ["flat", "transposed", "strided"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_gradient(call, layout, size, watching):
    good = ref.parameter(torch.full((20, 10), 3.0))
    bad = nn.Parameter(torch.ones(20, 10))
    bad.grad = torch.ones(20, 10)
    bad.grad = shrunk(layout, size)
    with watching(), pytest.raises(RuntimeError) as caught:
        call([good, bad])
    assert "[1]" in str(caught.value)
    assert ("has no memory" if size == 0 else f"found one of {size}") in str(caught.value)
    assert (good.grad == 3.0).all()


READS_PARAMETERS = ["add_weight_decay_", "adaptive_clip_grad_", "GradClipper, decay"]


@by_watching
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("layout", ["flat", "transposed", "strided"])
@pytest.mark.parametrize("call", [*READS_PARAMETERS, "GradClipper, AGC"])
def test_parameter(call, layout, size, watching):
    good = ref.parameter(torch.full((20, 10), 3.0))
    bad = nn.Parameter(shrunk(layout, 400 * 4))
    bad.grad = torch.ones(20, 10)
    bad.untyped_storage().resize_(size)
    with watching(), pytest.raises(RuntimeError) as caught:
        CALLS[call]([good, bad])
    assert ("has no memory" if size == 0 else f"found one of {size}") in str(caught.value)
    assert (good.grad == 3.0).all()
    assert (bad.grad == 1.0).all()


def test_a_storage_that_is_just_large_enough():
    memory = torch.full((400,), 2.0)
    gradient = memory[200:300]
    memory.untyped_storage().resize_(300 * 4)
    assert gradclip_ext.clip_grad_norm_(ref.parameter(gradient), 1.0).item() == 20.0
    assert gradient.tolist() == pytest.approx([0.1] * 100, rel=1e-6)
