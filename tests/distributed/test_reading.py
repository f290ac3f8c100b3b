"""How the DTensors of a list are sorted natively, on a single rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import Parameter

from gradclip_ext import _C


def sorted_list(worked_on: str) -> Any:
    """The list of all kinds on this rank as (indices, are the gradients, are their parts)."""
    # Meshes that are equal may be exchanged for one another by torch.
    one, other = (init_device_mesh("cpu", (1, 1), mesh_dim_names=n) for n in (None, ("a", "b")))

    def parameter(mesh: Any, placements: list[Any], *, grad_mesh: Any = None, grad: bool = True):
        made = Parameter(DTensor.from_local(torch.zeros(4), mesh, placements, run_check=False))
        if grad:
            made.grad = DTensor.from_local(
                torch.ones(4), grad_mesh or mesh, placements, run_check=False
            )
        return made

    plain = Parameter(torch.zeros(4))
    plain.grad = torch.ones(4)
    items: list[Any] = [
        parameter(one, [Shard(0), Shard(0)]),
        plain,
        parameter(one, [Replicate(), Shard(0)]),
        parameter(other, [Shard(0), Shard(0)]),
        parameter(one, [Shard(0), Shard(0)]),
        parameter(one, [Shard(0), Shard(0)], grad=False),
        parameter(one, [Shard(0), Shard(0)], grad_mesh=other),
        parameter(one, [Replicate(), Partial()]),
        3,
        parameter(one, [Replicate(), Shard(0)]),
    ]
    of_grads = worked_on == "grads"
    if not of_grads:
        items = [getattr(item, "grad", item) for item in items]
    kinds, others = _C.read_dtensors(items, of_grads, DTensor)
    found = []
    for indices, gradients, local in kinds:
        wanted = [items[i].grad if of_grads else items[i] for i in indices]
        found.append(
            (
                indices,
                all(map(lambda a, b: a is b, gradients, wanted)) and len(gradients) == len(wanted),
                [id(part) for part in local] == [id(each._local_tensor) for each in wanted],
            )
        )
    return found, others


@pytest.mark.parametrize(
    "worked_on,expected",
    [
        ("grads", ([[0, 4], [2, 9], [3], [6], [7]], [1, 5, 8])),
        ("tensors", ([[0, 4], [2, 9], [3, 6], [7]], [1, 5, 8])),
    ],
)
def test_dtensors_are_sorted_by_mesh_and_placements(world, worked_on, expected) -> None:
    kinds, others = world(1).run(sorted_list, worked_on)[0]
    assert kinds == [(indices, True, True) for indices in expected[0]]
    assert others == expected[1]


def test_other_sequences_are_refused() -> None:
    with pytest.raises(TypeError, match="expected a list or a tuple"):
        _C.read_dtensors(iter([]), True, DTensor)
