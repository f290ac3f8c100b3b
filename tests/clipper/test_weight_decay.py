"""Weight decay in the pass that measures: the same checks and results as the two steps by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradclip_ext import GradClipper, add_weight_decay_


def pair(dtype, value=0.5, gradient=2.0, size=100):
    parameter = nn.Parameter(torch.full((size,), value, dtype=dtype))
    parameter.grad = torch.full((size,), gradient, dtype=dtype)
    return parameter


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("factor", [7e4, 1e38, 1e39, 1e300], ids=str)
def test_a_factor_that_a_dtype_cannot_hold(dtype, factor):
    by_hand, ours = pair(dtype, 1e-5), pair(dtype, 1e-5)
    other = pair(torch.float32)
    try:
        add_weight_decay_([other, by_hand], factor)
    except ValueError as error:
        with pytest.raises(ValueError) as caught:
            GradClipper([pair(torch.float32), ours], math.inf, weight_decay=factor).clip_()
        assert "weight_decay has to be a number that the dtype of" in str(error)
        assert "weight_decay has to be a number that the dtype of" in str(caught.value)
        assert (ours.grad == 2.0).all()
        assert factor > torch.finfo(dtype).max
        return
    GradClipper([pair(torch.float32), ours], math.inf, weight_decay=factor).clip_()
    torch.testing.assert_close(ours.grad, by_hand.grad, equal_nan=True)


@pytest.mark.parametrize("shift", [0, 1, 40, 99])
def test_a_gradient_that_shares_memory_with_its_parameter(shift):
    def made():
        memory = torch.arange(1.0, 301.0)
        parameter = nn.Parameter(memory[100:200])
        parameter.grad = memory[100 + shift : 200 + shift]
        return memory, parameter

    memory, parameter = made()
    expected, other = made()
    error = None
    try:
        add_weight_decay_([other], 0.5)
    except RuntimeError as caught:
        error = caught
    if error is None:
        GradClipper([parameter], math.inf, weight_decay=0.5).clip_()
    else:
        with pytest.raises(RuntimeError) as caught:
            GradClipper([parameter], math.inf, weight_decay=0.5).clip_()
        assert str(caught.value).splitlines()[0].split(": ")[-1] in str(error)
    assert torch.equal(memory, expected)


def test_the_gradient_of_one_is_the_parameter_of_another():
    memory = torch.arange(1.0, 201.0)
    first, second = nn.Parameter(memory[:100]), nn.Parameter(torch.ones(100))
    first.grad = torch.ones(100)
    second.grad = memory[:100]
    GradClipper([first, second], math.inf, weight_decay=0.5).clip_()
    # One after the other: the second gradient is written after the first parameter was read.
    assert first.grad.tolist() == [1.0 + 0.5 * (i + 1) for i in range(100)]
    assert memory[:100].tolist() == [i + 1.5 for i in range(100)]


@pytest.mark.parametrize("policy", ["propagate", "raise", "zero", "skip"])
def test_every_policy_decays_a_finite_step(policy):
    parameter = pair(torch.float32)
    clipper = GradClipper([parameter], math.inf, nonfinite=policy, weight_decay=0.5)
    assert clipper.clip_().item() == pytest.approx(22.5, rel=1e-6)
    assert parameter.grad.tolist() == [2.25] * 100


def test_nan_in_a_parameter_raises_with_nothing_changed():
    parameter, other = pair(torch.float32), pair(torch.float32)
    with torch.no_grad():
        parameter[7] = math.nan
    clipper = GradClipper([other, parameter], 1.0, nonfinite="raise", weight_decay=0.5)
    with pytest.raises(RuntimeError, match="non-finite"):
        clipper.clip_()
    assert (parameter.grad == 2.0).all()
    assert (other.grad == 2.0).all()


@pytest.mark.parametrize("policy", ["propagate", "raise"])
def test_a_partial_overlap_after_another_gradient_changes_nothing(policy):
    first = pair(torch.float32)
    memory = torch.arange(1.0, 9.0)
    second = nn.Parameter(memory[0:4])
    second.grad = memory[2:6]
    before = memory.clone()
    for clip in (
        lambda: GradClipper([first, second], 1.0, nonfinite=policy, weight_decay=0.5).clip_(),
        lambda: add_weight_decay_([first, second], 0.5),
    ):
        with pytest.raises(RuntimeError, match="refer to a single memory location"):
            clip()
        assert (first.grad == 2.0).all()
        assert torch.equal(memory, before)


def shared(kind):
    memory = torch.arange(3.0, 11.0)
    first, second = nn.Parameter(torch.ones(4)), nn.Parameter(torch.full((4,), 2.0))
    first.grad = memory[:4]
    if kind == "one gradient for two":
        second.grad = first.grad
    elif kind == "overlapping views":
        second.grad = memory[2:6]
    else:
        second.grad = torch.ones(4)
        first.grad = second.data
    return [first, second]


@pytest.mark.parametrize("policy", ["propagate", "raise", "skip", "zero"])
@pytest.mark.parametrize("kind", ["one gradient for two", "overlapping views", "a parameter"])
def test_gradients_that_share_memory(kind, policy):
    expected, ours = shared(kind), shared(kind)
    add_weight_decay_(expected, 0.5)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in expected])
    clipper = GradClipper(ours, math.inf, nonfinite=policy, weight_decay=0.5)
    assert clipper.clip_().item() == pytest.approx(norm.item(), rel=1e-6)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one.grad, other.grad)
