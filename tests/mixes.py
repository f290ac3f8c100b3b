"""Lists of parameters, distributed in many ways, and their gradients as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

FLAT, GRID, OTHER = "flat", "grid", "other"
_meshes: dict[tuple[str, int], DeviceMesh] = {}


def device_type() -> str:
    """Where the gradients of the ranks are."""
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"


def mesh_of(name: str) -> DeviceMesh:
    """All ranks in one dimension; in two; in two of another root; or a dimension of the second."""
    size = torch.distributed.get_world_size()
    if (name, size) not in _meshes:
        shape = (size // 2, 2)
        if name == FLAT:
            mesh = init_device_mesh(device_type(), (size,), mesh_dim_names=("all",))
        elif name == GRID:
            mesh = init_device_mesh(device_type(), shape, mesh_dim_names=("dp", "tp"))
        elif name == OTHER:
            mesh = init_device_mesh(device_type(), shape, mesh_dim_names=("edp", "ep"))
        else:
            mesh = mesh_of(GRID)[name]
        _meshes[name, size] = mesh
    return _meshes[name, size]


@dataclass
class Entry:
    """A parameter, or the shape of one, and how its gradient is distributed.

    Attributes:
        shape: of the whole.
        mesh: one of :func:`mesh_of`, "" for a plain tensor.
        placements: of the gradient; those of the parameter are the same, replicated where these are
            partial.
        dtype: of both.
    """

    shape: tuple[int, ...]
    mesh: str = ""
    placements: tuple[Placement, ...] = ()
    dtype: torch.dtype = torch.float32


R, P, A = Replicate(), Partial(), Partial("avg")
S0, S1 = Shard(0), Shard(1)


def _all(mesh: str, placements: tuple[Placement, ...], *shapes: tuple[int, ...]) -> list[Entry]:
    return [Entry(shape, mesh, placements) for shape in shapes]


# By name, the entries and the smallest world that they need.
MIXES: dict[str, list[Entry]] = {
    "fsdp": _all(FLAT, (S0,), (8, 3), (7, 5), (9,), (16, 2, 2)),
    "empty shards": _all(FLAT, (S0,), (1, 4), (1,), (2, 3), (0, 3)),
    "second dimension": _all(FLAT, (S1,), (3, 8), (2, 5)),
    "replicated": _all(FLAT, (R,), (3, 4), (5,)),
    "hsdp": _all(GRID, (R, S0), (6, 3), (5,), (1, 2)),
    "tensor parallel": [
        *_all("tp", (S0,), (6, 4)),
        *_all("tp", (S1,), (4, 6)),
        *_all("tp", (R,), (4,)),
    ],
    "sequence parallel": [*_all("tp", (S0,), (6, 4)), *_all("tp", (P,), (8,), (4, 2))],
    "fsdp and tensor parallel": [
        *_all(GRID, (S0, S1), (4, 6), (5, 3)),
        *_all(GRID, (S0, R), (6,)),
        *_all(GRID, (S1, S0), (6, 4)),
        *_all(GRID, (_StridedShard(0, split_factor=2), S0), (8, 3)),
    ],
    "partial": [
        *_all(GRID, (S0, P), (8, 2), (6,)),
        *_all(GRID, (P, R), (3, 3)),
        *_all(GRID, (P, P), (4,)),
        *_all(GRID, (R, A), (4, 2)),
        *_all(GRID, (A, S0), (4, 2)),
        # Of which the ranks hold different numbers of elements.
        *_all(GRID, (S0, P), (5, 2), (1,)),
        *_all(GRID, (P, S0), (3, 2)),
    ],
    "partial only": _all(FLAT, (P,), (4, 3), (5,)),
    "beside plain tensors": [*_all(FLAT, (S0,), (8, 3)), Entry((5, 2)), Entry((3,))],
    "crossing meshes": [
        *_all(FLAT, (S0,), (8, 3), (3, 2)),
        *_all(OTHER, (S0, S1), (4, 6)),
        *_all(GRID, (R, S0), (6,)),
        Entry((4,)),
    ],
    "expert parallel beside data parallel": [
        *_all(FLAT, (S0,), (8, 4), (8,)),
        *_all(OTHER, (S1, S0), (4, 6, 2)),
        *_all(OTHER, (S0, S0), (8, 2)),
    ],
    "submeshes": [
        *_all("dp", (S0,), (6, 2)),
        *_all("tp", (S0,), (4, 2)),
        *_all(GRID, (S0, S0), (8,)),
    ],
    "dtypes": [
        Entry((8, 4), FLAT, (S0,), torch.bfloat16),
        Entry((5, 3), FLAT, (S0,), torch.float16),
        Entry((4, 3), FLAT, (S0,), torch.float32),
        Entry((6,), FLAT, (P,), torch.bfloat16),
    ],
    "bfloat16": [
        Entry((64, 8), FLAT, (S0,), torch.bfloat16),
        Entry((33,), FLAT, (P,), torch.bfloat16),
    ],
    "float64": [Entry((6, 4), FLAT, (S0,), torch.float64), Entry((5,), FLAT, (P,), torch.float64)],
    "complex": [
        Entry((6, 4), FLAT, (S0,), torch.complex64),
        Entry((5,), FLAT, (R,), torch.complex64),
    ],
}


def _device() -> str:
    # Unless a process group exists, for the process that the ranks are compared with.
    return device_type() if torch.distributed.is_initialized() else "cpu"


def whole_gradients(entries: Sequence[Entry], seed: int = 0) -> list[Tensor]:
    """The same on all ranks: multiples of 4, which all dtypes and partial sums hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (4.0 * (torch.randn(entry.shape, generator=generator) * 6.0).round()).to(
            _device(), entry.dtype
        )
        for entry in entries
    ]


def parameters_of(
    entries: Sequence[Entry], wholes: Sequence[Tensor], missing: Callable[[int], bool] | None = None
) -> list[nn.Parameter]:
    """Parameters with such gradients, except where one is missing."""
    result = []
    for place, (entry, whole) in enumerate(zip(entries, wholes, strict=True)):
        weight = torch.full_like(whole, 0.5)
        if not entry.mesh:
            parameter = nn.Parameter(weight)
            gradient = whole.clone()
        else:
            mesh = mesh_of(entry.mesh)
            still = [R if p.is_partial() else p for p in entry.placements]
            parameter = nn.Parameter(_distributed(weight, mesh, still))
            share = whole.clone()
            for dimension, placement in enumerate(entry.placements):
                if placement.is_partial():
                    share = share * _weight(mesh, dimension, placement)
            local = _distributed(share, mesh, still).to_local()
            gradient = DTensor.from_local(
                local,
                mesh,
                entry.placements,
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
        if missing is None or not missing(place):
            parameter.grad = gradient
        result.append(parameter)
    return result


def _weight(mesh: DeviceMesh, dimension: int, placement: Placement) -> float:
    """What a rank holds of each element: different on all of them, and exact."""
    size, own = mesh.size(dimension), mesh.get_local_rank(dimension)
    own_weight = {1: [1.0], 2: [0.75, 0.25], 4: [0.5, 0.25, 0.5, -0.25]}[size][own]
    return own_weight * (size if placement.reduce_op == "avg" else 1)


def _distributed(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """As distribute_tensor, without a collective."""
    local = whole
    order = list(enumerate(placements))
    if any(isinstance(placement, _StridedShard) for placement in placements):
        # Sharded by the last dimension first, as tensor parallelism and then FSDP2 do it.
        order.reverse()
    for dimension, placement in order:
        if isinstance(placement, (Shard, _StridedShard)):
            size, own = mesh.size(dimension), mesh.get_local_rank(dimension)
            parts = local.chunk(size, placement.dim) if local.shape[placement.dim] else ()
            empty = local.narrow(placement.dim, 0, 0)
            local = parts[own] if own < len(parts) else empty
    return DTensor.from_local(
        local.contiguous(),
        mesh,
        placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def whole_of(gradient: Tensor) -> Tensor:
    """A gradient as a whole; that of a strided shard is put together by hand."""
    if not isinstance(gradient, DTensor):
        return gradient
    if any(isinstance(placement, _StridedShard) for placement in gradient.placements):
        mesh = gradient.device_mesh
        rows = torch.zeros(gradient.shape, dtype=gradient.dtype, device=gradient.device)
        count = gradient.shape[0] // mesh.size()
        begin = (mesh.get_local_rank(1) * mesh.size(0) + mesh.get_local_rank(0)) * count
        rows[begin : begin + count] = gradient.to_local()
        torch.distributed.all_reduce(rows)
        return rows
    return gradient.full_tensor()
