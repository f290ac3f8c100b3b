"""What this package needs of torch.distributed and cannot get by public names.

As in :mod:`.torch_private`. What is imported, each function imports: torch may be built without it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "all_reduce",
    "is_capturing",
    "local_tensor",
    "publish",
    "published",
    "root_mesh_ranks",
]


def all_reduce(tensor: Tensor, operation: str, group: Any) -> Tensor:
    """The tensor, reduced over a process group by "sum" or "max", in new memory.

    A functional collective: what counts communication sees it, and a fake tensor passes through.
    """
    from torch.distributed import _functional_collectives as collectives

    reduced = collectives.all_reduce(tensor, operation, group)
    return reduced.wait() if isinstance(reduced, collectives.AsyncCollectiveTensor) else reduced


def local_tensor(tensor: Any) -> Tensor:
    """What this rank holds of a DTensor; it waits for a collective that is still to give it."""
    local = tensor._local_tensor
    return local.wait() if hasattr(local, "trigger_wait") else local  # type: ignore[no-any-return]


def root_mesh_ranks(mesh: Any) -> tuple[int, ...]:
    """The ranks of the mesh that a mesh was sliced from, which is the mesh itself for most."""
    if hasattr(mesh, "_get_root_mesh"):
        root = mesh._get_root_mesh()
    else:
        # Up to torch 2.8.
        from torch.distributed.device_mesh import _mesh_resources

        root = _mesh_resources.get_root_mesh(mesh)
    return tuple(root.mesh.flatten().tolist())


def is_capturing(device: torch.device) -> bool:
    """Whether what is done on the device's current stream is captured in a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def publish(key: str, text: str) -> None:
    """Leave a text for other ranks, where the ranks first met."""
    with contextlib.suppress(Exception):
        _default_store().set(key, text)


def published(key: str) -> str | None:
    """What another rank has left; None if it has left nothing, or there is no such place."""
    with contextlib.suppress(Exception):
        store = _default_store()
        if store.check([key]):
            return str(store.get(key).decode())
    return None


def _default_store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()
