"""Every mix of distributions: totals, gradients and norms against a float64 reference."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import mixes
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import gradclip_ext

NORM_TYPES = [2.0, 1.0, math.inf, 3.0, 0.0, -1.0, -math.inf]
SIZES = [2, 4]


def norm_of(wholes: list[Tensor], norm_type: float) -> Tensor:
    """Of a list, as torch defines it, in float64."""
    wide = [w.to(torch.complex128 if w.is_complex() else torch.float64) for w in wholes]
    filled = [torch.linalg.vector_norm(w, norm_type) for w in wide if w.numel() > 0]
    return torch.linalg.vector_norm(torch.stack(filled), norm_type)


def watched(watches: bool) -> Any:
    return CommDebugMode() if watches else contextlib.nullcontext()


def hexadecimal(numbers: Any) -> list[str]:
    return [float(number).hex() for number in numbers]


# On the ranks.


def clip(name: str, watches: bool) -> dict[str, Any]:
    entries = mixes.MIXES[name]
    wholes = mixes.whole_gradients(entries)
    parameters = mixes.parameters_of(entries, wholes)
    with watched(watches):
        norm = gradclip_ext.clip_grad_norm_(parameters, 1.0, dtype=torch.float64)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    expected = norm_of(wholes, 2.0)
    errors = []
    for parameter, whole in zip(parameters, wholes, strict=True):
        found = mixes.whole_of(parameter.grad)
        wide = torch.complex128 if whole.is_complex() else torch.float64
        right = whole.to(wide) / (expected + 1e-6)
        unit = torch.finfo(whole.dtype).eps
        limit = 2 * unit * right.abs() + torch.finfo(whole.dtype).tiny
        errors.append(bool(((found.to(wide) - right).abs() <= limit).all()))
    return {"norm": norm.item(), "expected": expected.item(), "gradients": errors}


def measure(name: str, watches: bool) -> dict[str, Any]:
    entries = mixes.MIXES[name]
    wholes = mixes.whole_gradients(entries)
    parameters = mixes.parameters_of(entries, wholes)
    found: dict[str, Any] = {}
    for norm_type in NORM_TYPES:
        with watched(watches):
            total = gradclip_ext.get_total_norm(
                [p.grad for p in parameters], norm_type, dtype=torch.float64
            )
            norms = gradclip_ext.grad_norms(parameters, norm_type)
        total = total.full_tensor() if isinstance(total, DTensor) else total
        assert type(norms.total) is type(norms.norms) is Tensor
        each = [norm_of([whole], norm_type) if whole.numel() else 0.0 for whole in wholes]
        if norm_type == 0.0:
            each = [torch.linalg.vector_norm(whole.double().abs(), 0.0) for whole in wholes]
        found[str(norm_type)] = {
            "totals": hexadecimal([total, norms.total]),
            "norms": hexadecimal(norms.norms),
            "expected": [norm_of(wholes, norm_type).item(), *(float(norm) for norm in each)],
        }
    return found


# In the test process.


@pytest.mark.parametrize("watches", [False, True], ids=["", "CommDebugMode"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", mixes.MIXES)
def test_clip_grad_norm(world, name, size, watches):
    answers = world(size).run(clip, name, watches)
    assert len({answer["norm"].hex() for answer in answers}) == 1
    for answer in answers:
        assert answer["norm"] == pytest.approx(
            answer["expected"], rel=1e-6 if name != "float64" else 1e-15
        )
        assert all(answer["gradients"]), answer


@pytest.mark.parametrize("watches", [False, True], ids=["", "CommDebugMode"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", mixes.MIXES)
def test_every_norm(world, name, size, watches):
    answers = world(size).run(measure, name, watches)
    assert all(answer == answers[0] for answer in answers)
    for norm_type, found in answers[0].items():
        expected = found["expected"]
        totals = [float.fromhex(number) for number in found["totals"]]
        norms = [float.fromhex(number) for number in found["norms"]]
        assert totals == pytest.approx([expected[0]] * 2, rel=1e-6), norm_type
        assert norms == pytest.approx(expected[1:], rel=1e-6), norm_type
