"""Failures of other ranks where the host does not read what a vector tells, as on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mixes
import pytest
import torch
from torch.distributed.tensor import DTensor
from worlds import Failure

import gradclip_ext
from gradclip_ext import GradClipper
from gradclip_ext._ops import exchange

BROKEN = 1


@contextmanager
def unread() -> Iterator[None]:
    """As if the vectors were on a GPU."""
    knows = exchange.host_knows
    exchange.host_knows = lambda tensor: False
    try:
        yield
    finally:
        exchange.host_knows = knows


def number(norm: Any) -> float:
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


# On the ranks.


def later(way: str, norm_type: float) -> Any:
    """What the call returns or raises, and what the next one does."""
    entries = mixes.MIXES["hsdp"]
    wholes = mixes.whole_gradients(entries)
    parameters = mixes.parameters_of(entries, wholes)
    clipper = GradClipper(parameters, 1.0, norm_type=norm_type)
    is_broken = torch.distributed.get_rank() == BROKEN
    listed = [*parameters, 3] if is_broken and way != "GradClipper" else parameters
    if is_broken and way == "GradClipper":
        parameters[0].grad.to_local().untyped_storage().resize_(0)
    before = [parameter.grad.to_local().clone() for parameter in parameters[1:]]
    found = []
    with unread():
        for call in range(2):
            try:
                if way == "GradClipper":
                    found.append(number(clipper.clip_()))
                elif way == "error_if_nonfinite":
                    found.append(
                        number(
                            gradclip_ext.clip_grad_norm_(
                                listed, 1.0, norm_type, error_if_nonfinite=True
                            )
                        )
                    )
                else:
                    found.append(number(gradclip_ext.clip_grad_norm_(listed, 1.0, norm_type)))
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")
            if call == 0:
                after = [parameter.grad.to_local() for parameter in parameters[1:]]
                assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
            if isinstance(found[-1], str):
                break
    gradclip_ext._ops.failures._unread.clear()
    return found


def report() -> Any:
    entries = mixes.MIXES["fsdp"]
    parameters = mixes.parameters_of(entries, mixes.whole_gradients(entries))
    clipper = GradClipper(parameters, 1.0)
    if torch.distributed.get_rank() == BROKEN:
        parameters[0].grad.to_local().untyped_storage().resize_(0)
    with unread():
        norm = clipper.clip_()
        assert math.isnan(norm.item())
        return clipper.report()


def sound(name: str) -> Any:
    """Without a failure nothing is raised later, and the norm is right."""
    entries = mixes.MIXES[name]
    wholes = mixes.whole_gradients(entries)
    found = []
    with unread():
        for norm_type in (2.0, math.inf):
            parameters = mixes.parameters_of(entries, wholes)
            norm = gradclip_ext.clip_grad_norm_(parameters, 1.0, norm_type)
            flat = torch.cat([whole.flatten().double() for whole in wholes])
            found.append((number(norm), torch.linalg.vector_norm(flat, norm_type).item()))
            left = torch.cat([mixes.whole_of(p.grad).flatten().double() for p in parameters])
            found.append((torch.linalg.vector_norm(left, norm_type).item(), 1.0))
    return found


# In the test process.


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_the_others_raise_at_the_next_call(world, norm_type):
    for rank, found in enumerate(world(4).run(later, "clip_grad_norm_", norm_type)):
        if rank == BROKEN:
            assert found == [found[0]] and found[0].startswith("TypeError: ")
        else:
            assert math.isnan(found[0])
            assert "of an earlier call: rank 1 failed" in found[1] and "found 3 (int)" in found[1]


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_the_others_raise_at_once_where_they_read_the_norm(world, norm_type):
    for rank, found in enumerate(world(4).run(later, "error_if_nonfinite", norm_type)):
        assert ("TypeError" if rank == BROKEN else "rank 1 failed") in found[0]
        assert "found 3 (int)" in found[0]


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_the_others_raise_at_the_next_step(world, norm_type):
    for rank, found in enumerate(world(4).run(later, "GradClipper", norm_type)):
        if rank == BROKEN:
            assert "has no memory" in found[0]
        else:
            assert math.isnan(found[0])
            assert "of an earlier call: rank 1 failed" in found[1] and "has no memory" in found[1]


def test_the_others_raise_in_a_report(world):
    for answer in world(2).outcomes(report):
        assert isinstance(answer, Failure) and "has no memory" in answer.text, answer


@pytest.mark.parametrize("name", ["fsdp", "crossing meshes", "partial"])
def test_without_a_failure(world, name):
    for found in world(4).run(sound, name):
        for number_found, expected in found:
            assert number_found == pytest.approx(expected, rel=1e-6)
