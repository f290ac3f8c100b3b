"""Arguments that are numbers of some other type than Python's float."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from gradclip_ext import AGC, GradClipper, ZClip, clip_grad_norm_


def parameter():
    result = nn.Parameter(torch.ones(2))
    result.grad = torch.tensor([3.0, 4.0])
    return result


HALVES = [
    0.5,
    np.float32(0.5),
    np.float64(0.5),
    np.float16(0.5),
    np.array(0.5),
    Fraction(1, 2),
    Decimal("0.5"),
    torch.tensor(0.5, device="cpu"),
    torch.tensor([0.5], dtype=torch.float64, device="cpu", requires_grad=True),
]
TWOS = [2, np.int64(2), np.uint8(2), Fraction(2), torch.tensor(2, device="cpu")]
NO_NUMBERS = [
    None.__class__,
    "0.5",
    0.5j,
    np.complex64(0.5),
    np.array(0.5j),
    np.array([0.5, 0.5]),
    np.True_,
    torch.tensor(True),
    torch.tensor(0.5j),
    torch.tensor([0.5, 0.5]),
    torch.tensor(0.5, device="meta"),
    10**400,
]


def named(value):
    return f"{type(value).__name__} {value}"


@pytest.mark.parametrize("half", HALVES, ids=named)
class TestHalf:
    def test_max_norm(self, half):
        found, expected = parameter(), parameter()
        GradClipper([found], half).clip_()
        clip_grad_norm_([expected], half)
        assert torch.allclose(found.grad, torch.tensor([0.3, 0.4]), rtol=1e-5)
        assert torch.allclose(found.grad, expected.grad, rtol=1e-6)

    def test_max_norm_of_groups(self, half):
        one, two = parameter(), parameter()
        clipper = GradClipper([{"params": [one]}, {"params": [two]}], [half, 2 * half])
        clipper.clip_()
        assert clipper.report().limits == (0.5, 1.0)
        assert all(type(limit) is float for limit in clipper.report().limits)

    def test_clip_value(self, half):
        found = parameter()
        GradClipper([found], clip_value=half).clip_()
        assert found.grad.tolist() == [0.5, 0.5]

    def test_weight_decay(self, half):
        found = parameter()
        GradClipper([found], float("inf"), weight_decay=half).clip_()
        assert found.grad.tolist() == [3.5, 4.5]


@pytest.mark.parametrize("two", TWOS, ids=named)
def test_whole_numbers(two):
    assert GradClipper([parameter()], two, norm_type=two).clip_().item() == 5.0
    clipper = GradClipper([parameter()], two, norm_type=float("inf"))
    assert clipper.clip_().item() == 4.0
    assert clipper.report().limits == (2.0,)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=named)
def test_what_is_no_number(value):
    for argument in ("max_norm", "clip_value"):
        with pytest.raises(TypeError) as error:
            GradClipper([parameter()], **{argument: value})
        message = f"GradClipper: {argument} has to be a number or a rule such as AutoClip(), found"
        assert message in str(error.value)
    with pytest.raises(ValueError) as error:
        GradClipper([parameter()], 1.0, weight_decay=value)
    assert "weight_decay has to be a finite number that is not negative, found" in str(error.value)
    with pytest.raises(TypeError, match="alpha has to be a number from 0 to 1, found"):
        ZClip(value)


@pytest.mark.parametrize(
    "value", [Fraction(0), Fraction(1, 10**400), np.float32("nan"), Decimal(-1)]
)
def test_out_of_range(value):
    for argument in ("max_norm", "clip_value"):
        with pytest.raises(ValueError, match=f"{argument} has to be a positive number, found"):
            GradClipper([parameter()], **{argument: value})


def test_rules():
    assert AGC(Fraction(1, 100), np.float32(0.5)).eps == 0.5
    assert AGC(Decimal("0.01")).clip_factor == 0.01
