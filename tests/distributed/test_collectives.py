"""How many collectives a call takes, and that these are all."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import mixes
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import gradclip_ext
from gradclip_ext import AGC, AutoClip, GradClipper

# In a world of four ranks: one for each mesh dimension of more than one rank, whatever the number
# of gradients. Partial gradients take one for each mesh dimension and dtype, and one more for each
# of the other dimensions of their mesh.
COUNTS = {
    "fsdp": 1,
    "empty shards": 1,
    "replicated": 1,
    "hsdp": 2,
    "tensor parallel": 1,
    "fsdp and tensor parallel": 2,
    "beside plain tensors": 1,
    # The two dimensions of "other" have the ranks and the layout of those of "grid".
    "crossing meshes": 3,
    "expert parallel beside data parallel": 3,
    "submeshes": 2,
    "dtypes": 2,
    "partial only": 2,
    "sequence parallel": 2,
    # Two dimensions; some are added up over the first, some over the second, each of them with a
    # vector over the other one; and (P, P) over both.
    "partial": 2 + (1 + 1) + (1 + 1) + 2,
}
# Every way to measure takes the same.
WAYS = ["clip_grad_norm_", "get_total_norm", "grad_norms", "GradClipper", "grad_clipping"]


def count(name: str, way: str, copies: int, norm_type: float) -> Any:
    entries = mixes.MIXES[name] * copies
    parameters = mixes.parameters_of(entries, mixes.whole_gradients(entries))
    clipper = GradClipper(parameters, AutoClip(), norm_type=norm_type)
    with CommDebugMode() as counter:
        if way == "clip_grad_norm_":
            gradclip_ext.clip_grad_norm_(parameters, 1.0, norm_type)
        elif way == "get_total_norm":
            gradclip_ext.get_total_norm([parameter.grad for parameter in parameters], norm_type)
        elif way == "grad_norms":
            gradclip_ext.grad_norms(parameters, norm_type)
        elif way == "GradClipper":
            clipper.clip_()
        else:
            gradclip_ext.grad_clipping(SimpleNamespace(params=parameters), 1.0)
    return {str(name): count for name, count in counter.get_comm_counts().items()}


def count_none(name: str) -> Any:
    entries = mixes.MIXES[name]
    wholes = mixes.whole_gradients(entries)
    parameters = mixes.parameters_of(entries, wholes)
    norm = gradclip_ext.get_total_norm([parameter.grad for parameter in parameters])
    found = []
    for total in (10.0, torch.tensor(10.0, dtype=torch.float64), norm):
        with CommDebugMode() as counter:
            gradclip_ext.clip_grads_with_norm_(parameters, 5.0, total)
            if not name.startswith("partial"):
                gradclip_ext.clip_grad_value_(parameters, 1e6)
        found.append(counter.get_total_counts())
    value = norm.full_tensor() if isinstance(norm, DTensor) else norm
    factor = 0.25 * min(1.0, 5.0 / (value.item() + 1e-6))
    for parameter, whole in zip(parameters, wholes, strict=True):
        expected = (whole.double() * factor).to(whole.dtype)
        torch.testing.assert_close(mixes.whole_of(parameter.grad), expected, rtol=1e-2, atol=1e-6)
    return found


def unwatched(name: str) -> Any:
    """As many calls of the process group's collective as a mode counts."""
    from gradclip_ext._ops import torch_distributed

    calls = []
    reduce = torch_distributed.all_reduce

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return reduce(*arguments)

    torch_distributed.all_reduce = counted
    try:
        entries = mixes.MIXES[name]
        parameters = mixes.parameters_of(entries, mixes.whole_gradients(entries))
        gradclip_ext.clip_grad_norm_(parameters, 1.0)
    finally:
        torch_distributed.all_reduce = reduce
    return len(calls)


def units() -> Any:
    entries = mixes.MIXES["fsdp"]
    parameters = mixes.parameters_of(entries, mixes.whole_gradients(entries))
    clipper = GradClipper(parameters, AGC(0.5))
    with CommDebugMode() as counter:
        clipper.clip_()
    return counter.get_total_counts()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", COUNTS)
def test_counts(world, name, way):
    for counts in world(4).run(count, name, way, 1, 2.0):
        assert counts == {"c10d_functional.all_reduce": COUNTS[name]}


@pytest.mark.parametrize("norm_type", [1.0, math.inf, 0.0, 3.0])
@pytest.mark.parametrize("name", ["fsdp", "hsdp", "crossing meshes", "partial"])
def test_counts_of_other_norms(world, name, norm_type):
    for counts in world(4).run(count, name, "clip_grad_norm_", 1, norm_type):
        assert counts == {"c10d_functional.all_reduce": COUNTS[name]}


@pytest.mark.parametrize("name", ["fsdp", "crossing meshes"])
def test_counts_do_not_grow_with_the_list(world, name):
    for counts in world(4).run(count, name, "GradClipper", 50, 2.0):
        assert counts == {"c10d_functional.all_reduce": COUNTS[name]}


@pytest.mark.parametrize("name", ["fsdp", "hsdp", "crossing meshes", "partial only"])
def test_without_a_mode(world, name):
    assert world(4).run(unwatched, name) == [COUNTS[name]] * 4


@pytest.mark.parametrize("name", ["fsdp", "hsdp", "crossing meshes", "partial only"])
def test_a_known_norm_takes_none(world, name):
    assert world(4).run(count_none, name) == [[0, 0, 0]] * 4


def test_units_take_three_more(world):
    # Beside the norm: those of split units, of the parameters, and the smallest coefficient.
    assert world(4).run(units) == [1 + 3] * 4
