"""The dimensions of device meshes, in an order that all ranks agree on.

What identifies a dimension are the ranks of the root mesh and the way in which its groups lie among
these. Objects do not: FSDP2 makes a new mesh for each module, and a submesh holds other ranks on
every rank.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from gradclip_ext._ops import torch_distributed, torch_private

if TYPE_CHECKING:
    # Of torch as it may be built without them.
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Dimension", "Mesh", "read_mesh"]


class Dimension(NamedTuple):
    """A mesh dimension of more than one rank.

    Attributes:
        key: the same on all ranks, and sortable.
        ranks: the global ranks of this rank's group.
        is_first: whether this rank is the first of its group.
        order: which of several groups of the same ranks all ranks choose: that of the least order.
        group: what the collectives take.
    """

    key: tuple[tuple[int, ...], tuple[int, ...]]
    ranks: tuple[int, ...]
    is_first: bool
    order: tuple[int, str]
    group: ProcessGroup


class Mesh(NamedTuple):
    """What is known of a device mesh.

    Attributes:
        key: the same on all ranks, and sortable.
        dimensions: one for each mesh dimension, None for one of a single rank.
        ranks: the global ranks of this rank's mesh.
        device_type: where the collectives of its groups take place.
        is_member: whether this rank belongs to the mesh.
    """

    key: tuple[Any, ...]
    dimensions: tuple[Dimension | None, ...]
    ranks: frozenset[int]
    device_type: str
    is_member: bool


# By identity: meshes that are equal may have other roots.
_known: dict[int, tuple[weakref.ref[DeviceMesh], Mesh]] = {}


def read_mesh(mesh: DeviceMesh) -> Mesh:
    """A mesh as described above; read once."""
    known = _known.get(id(mesh))
    if known is not None and known[0]() is mesh:
        return known[1]
    # Under a fake tensor mode the tensor of its ranks could not be read.
    with torch_private.unobserved():
        read = _read(mesh)
    place = id(mesh)
    _known[place] = (weakref.ref(mesh, lambda _: _known.pop(place, None)), read)
    return read


def _read(mesh: DeviceMesh) -> Mesh:
    ranks = frozenset(mesh.mesh.flatten().tolist())
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return Mesh((), (), ranks, mesh.device_type, False)
    root = torch_distributed.root_mesh_ranks(mesh)
    dimensions: list[Dimension | None] = []
    for place, size in enumerate(mesh.mesh.shape):
        own: list[Any] = list(coordinate)
        own[place] = slice(None)
        group_ranks = tuple(mesh.mesh[tuple(own)].tolist())
        if size == 1:
            dimensions.append(None)
            continue
        # Relative to the first, so that all groups of the dimension have the same key.
        places = [root.index(rank) for rank in group_ranks]
        key = (root, tuple(place - places[0] for place in places))
        is_first = coordinate[place] == 0
        group = mesh.get_group(place)
        # The name under which its ranks have met.
        order = (len(group.group_name), group.group_name)
        dimensions.append(Dimension(key, group_ranks, is_first, order, group))
    own_key = (root, tuple(() if d is None else d.key[1] for d in dimensions))
    return Mesh(own_key, tuple(dimensions), ranks, mesh.device_type, True)
