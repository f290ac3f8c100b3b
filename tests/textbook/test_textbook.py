"""Worked examples to check by hand or against a textbook, and torch's own test cases."""

from __future__ import annotations

import math

import pytest
import reference as ref
import torch

import gradclip_ext


def test_textbook_network():
    row = [-1.5650, -1.0272, -0.4034]
    gradients = [
        torch.tensor([row] * 4),
        torch.tensor(row),
        torch.tensor(
            [[-0.1358, -0.1905, -0.4474], [3.8544, 5.4059, 12.6960], [-0.0940, -0.1319, -0.3097]]
        ),
        torch.tensor([-0.1178, 3.3428, -0.0815]),
        torch.tensor([[-11.6470, -13.3479, 6.3779]]),
        torch.tensor([7.2874]),
    ]
    clipped_row = [-0.0617, -0.0405, -0.0159]
    expected = [
        torch.tensor([clipped_row] * 4),
        torch.tensor(clipped_row),
        torch.tensor(
            [[-0.0054, -0.0075, -0.0176], [0.1520, 0.2132, 0.5008], [-0.0037, -0.0052, -0.0122]]
        ),
        torch.tensor([-0.0047, 0.1319, -0.0032]),
        torch.tensor([[-0.4594, -0.5265, 0.2516]]),
        torch.tensor([0.2874]),
    ]
    gradclip_ext.clip_grad_norm_(ref.parameters(gradients), 1.0)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_clip_value_of_one_weight():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(1, 1)

    net = Net()
    net.linear.weight.grad = torch.tensor([[120.0]])
    assert net.linear.bias.grad is None
    gradclip_ext.clip_grad_value_(net.linear.weight, clip_value=1.1)
    assert net.linear.weight.grad.item() == torch.tensor(1.1).item()
    gradclip_ext.clip_grad_value_(net.linear.bias, clip_value=1.1)
    assert net.linear.bias.grad is None


def test_clip_then_step():
    weight = torch.nn.Parameter(torch.tensor([0.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (weight * 120.0).sum().backward()
        gradclip_ext.clip_grad_value_(weight, clip_value=1.1)
        optimizer.step()
    assert weight.item() == pytest.approx(-0.22, rel=1e-6)


# What torch's own tests of these functions check, on the same kinds of input.

by_foreach = pytest.mark.parametrize("foreach", [False, True], ids=lambda v: f"foreach={v}")
by_norm_type = pytest.mark.parametrize("norm_type", [0.5, 1.5, 2, 4, "inf"], ids=lambda v: f"L{v}")


def total(gradients, norm_type):
    norm_type = float(norm_type)
    if norm_type == math.inf:
        return max(gradient.abs().max().item() for gradient in gradients)
    return sum(gradient.abs().pow(norm_type).sum().item() for gradient in gradients) ** (
        1 / norm_type
    )


@by_foreach
@by_norm_type
def test_linear_layer_is_scaled_by_one_factor(norm_type, foreach):
    layer = torch.nn.Linear(10, 10)
    gradients = [torch.arange(1.0, 101.0).view(10, 10), torch.ones(10).div(1000)]
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    before = total(gradients, norm_type)
    norm = gradclip_ext.clip_grad_norm_(layer.parameters(), 2, norm_type, foreach=foreach)
    after = total([p.grad for p in layer.parameters()], norm_type)
    assert norm.item() == pytest.approx(before, rel=1e-5)
    assert after == pytest.approx(2.0, rel=1e-5)
    factors = torch.cat(
        [(p.grad / g).flatten() for p, g in zip(layer.parameters(), gradients, strict=True)]
    )
    assert factors.std().item() == pytest.approx(0.0, abs=1e-7)


@by_foreach
@by_norm_type
def test_small_gradients_are_left_alone(norm_type, foreach):
    layer = torch.nn.Linear(10, 10)
    gradients = [torch.full((10, 10), 1e-4), torch.ones(10).div(50_000)]
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    before = total(gradients, norm_type)
    assert before < 2.0
    norm = gradclip_ext.clip_grad_norm_(layer.parameters(), 2, norm_type, foreach=foreach)
    assert norm.item() == pytest.approx(before, rel=1e-5)
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


@by_foreach
@by_norm_type
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_non_finite_with_and_without_error(bad, norm_type, foreach):
    for where in range(3):
        gradients = [torch.full((10,), 2.0) for _ in range(3)]
        gradients[where][5] = bad
        originals = ref.copies(gradients)
        with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
            gradclip_ext.clip_grad_norm_(
                ref.parameters(gradients), 1.0, norm_type, error_if_nonfinite=True, foreach=foreach
            )
        for gradient, original in zip(gradients, originals, strict=True):
            assert torch.equal(gradient.nan_to_num(7.0), original.nan_to_num(7.0))
        ours, theirs = gradients, originals
        norm = gradclip_ext.clip_grad_norm_(ref.parameters(ours), 1.0, norm_type, foreach=foreach)
        torch_norm = torch.nn.utils.clip_grad_norm_(
            ref.parameters(theirs), 1.0, norm_type, foreach=foreach
        )
        torch.testing.assert_close(norm, torch_norm, equal_nan=True)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, equal_nan=True)


@by_foreach
def test_clip_value_of_a_linear_layer(foreach):
    layer = torch.nn.Linear(10, 10)
    gradients = [torch.arange(-50.0, 50).view(10, 10).div(5), torch.ones(10).mul(2)]
    for given in ([0, 1], [None, 1], [0, None], [None, None]):
        for parameter, which in zip(layer.parameters(), given, strict=True):
            parameter.grad = None if which is None else gradients[which].clone()
        gradclip_ext.clip_grad_value_(layer.parameters(), 2.5, foreach=foreach)
        for parameter in layer.parameters():
            if parameter.grad is not None:
                assert parameter.grad.max().item() <= 2.5
                assert parameter.grad.min().item() >= -2.5
    one, two = torch.randn(10, 10), None
    two = one.clone()
    weight = ref.parameter(one)
    gradclip_ext.clip_grad_value_(weight, 0.5, foreach=foreach)
    assert torch.equal(one, two.clamp(-0.5, 0.5))
