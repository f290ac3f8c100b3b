"""What a rank holds of gradients that are distributed over several, sorted by how they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _C, _arguments
from gradclip_ext._ops import dtensor, torch_ops
from gradclip_ext._ops.gradients import (
    Caller,
    Gradients,
    norm_of_one,
    refuse_integers,
    refuse_unwritable,
    require_storage,
)
from gradclip_ext._ops.meshes import Dimension, Mesh, read_mesh
from gradclip_ext._ops.observation import observed
from gradclip_ext._ops.process_groups import Group

__all__ = ["Share", "Shares"]

_PARTIAL_OPERATIONS = ("sum", "avg")


@dataclass
class Share:
    """Gradients that are distributed alike.

    Attributes:
        mesh: over which; None for gradients that are no DTensors where there is no mesh.
        placements: for each mesh dimension "shard", "replicate", "sum" or "avg".
        is_replicated: for each process group whether all its ranks hold the same.
        places: where each stands in the list.
        given: the gradients themselves.
        tensors: what this rank holds of them.
        decayed: copies after the weight decay of those that are partial, if there is one.
    """

    mesh: Mesh | None
    placements: tuple[str, ...]
    is_replicated: tuple[bool, ...]
    places: list[int] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    decayed: list[Tensor] | None = None

    @property
    def summands(self) -> list[Tensor]:
        """What has to be added up over ranks: :attr:`tensors`, or what stands for them."""
        return self.tensors if self.decayed is None else self.decayed

    @property
    def summand_sizes(self) -> list[tuple[str, int]]:
        """Of each dtype that is added up, how many elements the gradients have, as wholes."""
        sizes: dict[str, int] = {}
        for gradient in self.given:
            dtype = str(torch_ops.summed_dtype(gradient.dtype))
            sizes[dtype] = sizes.get(dtype, 0) + gradient.numel()
        return sorted(sizes.items())

    @property
    def partial(self) -> tuple[int, ...]:
        """The mesh dimensions over which the gradients have yet to be added up."""
        dimensions = self.mesh.dimensions if self.mesh is not None else ()
        return tuple(
            place
            for place, (placement, dimension) in enumerate(
                zip(self.placements, dimensions, strict=True)
            )
            if placement in _PARTIAL_OPERATIONS and dimension is not None
        )

    @property
    def partial_dimensions(self) -> list[Dimension]:
        """The same as dimensions."""
        found = [self.mesh.dimensions[place] for place in self.partial] if self.mesh else []
        return [dimension for dimension in found if dimension is not None]

    @property
    def average_factor(self) -> float:
        """What makes an average of a sum over the partial dimensions."""
        factor = 1.0
        for place, dimension in zip(self.partial, self.partial_dimensions, strict=True):
            if self.placements[place] == "avg":
                factor /= len(dimension.ranks)
        return factor

    def counts(self, bits: int, groups: Sequence[Group]) -> bool:
        """Whether this rank's part is counted, and not the same part on another rank."""
        for placement, dimension in zip(
            self.placements, self.mesh.dimensions if self.mesh is not None else (), strict=True
        ):
            if placement == "replicate" and dimension is not None and not dimension.is_first:
                return False
        return not any(
            same and not group.is_first and bits >> place & 1
            for place, (same, group) in enumerate(zip(self.is_replicated, groups, strict=True))
        )


class Shares:
    """The gradients of a list as shares, and the first thing that is wrong with them.

    Nothing is raised here: what is wrong on one rank has to reach all others.

    Attributes:
        shares: those of meshes that this rank is in, and of plain tensors.
        tensors: what this rank holds of all gradients, share by share.
        meshes: all meshes that gradients and parameters of the list have, and this rank is in.
        error: what is to be raised once all ranks know, or None.
        is_outside: whether there are gradients of meshes that this rank is not in.
    """

    def __init__(
        self, parameters: Sequence[Any], reads_grads: bool, groups: Sequence[Group], caller: Caller
    ) -> None:
        self.caller = caller
        self.count = len(parameters)
        self.meshes: list[Mesh] = []
        self.error: Exception | None = None
        self.is_outside = False
        # Of this rank's gradients, or of its parameters if it has none: a DTensor's mesh or None.
        self.mesh_objects: dict[int, Any] = {}
        self._parameters = parameters
        self._reads_grads = reads_grads
        self._groups = groups
        self._predicates = [group.replicated for group in groups]
        self._by_kind: dict[tuple[Any, ...], Share] = {}
        self._meshes_of_parameters: dict[int, Any] = {}
        self._read()
        self.shares = self._sorted_out()
        self.tensors = [tensor for share in self.shares for tensor in share.tensors]
        self._native: list[Tensor] | None = None
        self._fallback: list[Gradients] = []

    def fail(self, error: Exception) -> None:
        """Take note of an error, the first of which is going to be raised."""
        self.error = self.error or error

    @property
    def devices(self) -> list[torch.device]:
        """Those of :attr:`tensors`, each once."""
        # What was measured natively is all on one.
        tensors = self.tensors if self._native is None else self._native[:1]
        return list(dict.fromkeys(tensor.device for tensor in tensors))

    def name(self, place: int) -> str:
        """What messages call a gradient."""
        return f"{self.caller.entry(place)}.grad" if self._reads_grads else self.caller.entry(place)

    def _read(self) -> None:
        for place in self._read_in_bulk():
            parameter = self._parameters[place]
            try:
                self._add(place, parameter, parameter.grad if self._reads_grads else parameter)
            except Exception as error:
                # What the user's code has raised, or the lack of an attribute.
                self.fail(error if isinstance(parameter, Tensor) else self._item_error(place))
                if dtensor.is_dtensor(parameter):
                    self._note_mesh(parameter)
        for share in self._by_kind.values():
            # Those of collectives that are still to give them are of another type.
            if not set(map(type, share.tensors)) <= {Tensor}:
                share.tensors = [dtensor.local(gradient) for gradient in share.given]

    def _read_in_bulk(self) -> Sequence[int]:
        """Take in the common case natively, and give the places of all other entries."""
        of_class: Any = dtensor.dtensor_type()
        if of_class is None or any(self._predicates):
            return range(self.count)
        kinds, others = _C.read_dtensors(self._parameters, self._reads_grads, of_class)
        for places, gradients, local in kinds:
            spec = gradients[0]._spec
            if any(placement.is_partial() for placement in spec.placements):
                others += places
                continue
            self._note_mesh(self._parameters[places[0]])
            names = self._names_of(places[0], spec.placements)
            share = self._share_of(spec, names, (False,) * len(self._groups))
            share.places += places
            share.given += gradients
            share.tensors += local
        return sorted(others)

    def _add(self, place: int, parameter: Any, gradient: Any) -> None:
        if not isinstance(parameter, Tensor):
            raise self._item_error(place)
        if dtensor.is_dtensor(parameter):
            self._note_mesh(parameter)
        if gradient is None:
            return
        if not isinstance(gradient, Tensor):
            raise TypeError(
                f"{self.caller.function}: {self.name(place)} has to be a torch.Tensor or None, "
                f"found {_arguments.describe(gradient)}"
            )
        replicated = tuple(bool(ask and ask(parameter)) for ask in self._predicates)
        if dtensor.is_dtensor(gradient):
            spec: Any = gradient._spec  # type: ignore[attr-defined]
            share = self._share_of(spec, self._names_of(place, spec.placements), replicated)
        else:
            self.mesh_objects[0] = None
            share = self._by_kind.setdefault((None, replicated), Share(None, (), replicated))
        share.places.append(place)
        share.given.append(gradient)
        share.tensors.append(dtensor.local(gradient))

    def _share_of(self, spec: Any, names: tuple[str, ...], replicated: tuple[bool, ...]) -> Share:
        """The share of a DTensor: of those on the same mesh, placed alike."""
        key = (id(spec.mesh), names, replicated)
        share = self._by_kind.get(key)
        if share is None:
            self.mesh_objects[id(spec.mesh)] = spec.mesh
            share = self._by_kind[key] = Share(read_mesh(spec.mesh), names, replicated)
        return share

    def _item_error(self, place: int) -> Exception:
        caller = self.caller
        item = self._parameters[place]
        return _arguments.item_error(item, caller.function, caller.argument, place)

    def _names_of(self, place: int, placements: Sequence[Any]) -> tuple[str, ...]:
        names = []
        for dimension, placement in enumerate(placements):
            if placement.is_replicate():
                names.append("replicate")
            elif placement.is_partial():
                names.append(placement.reduce_op)
                if placement.reduce_op not in _PARTIAL_OPERATIONS or type(placement).__name__ != (
                    "Partial"
                ):
                    self.fail(
                        NotImplementedError(
                            f"{self.caller.function}: {self.name(place)} is {placement} in mesh "
                            f"dimension {dimension}, expected Shard, Replicate, Partial('sum') or "
                            "Partial('avg'); redistribute it first"
                        )
                    )
            else:
                # Also of a strided shard, for which is_shard() is False.
                names.append("shard")
        return tuple(names)

    def _note_mesh(self, parameter: Any) -> None:
        mesh = parameter._spec.mesh
        self._meshes_of_parameters[id(mesh)] = mesh

    def _sorted_out(self) -> list[Share]:
        """The shares that this rank takes part in, those of plain tensors placed on a mesh."""
        if not self.mesh_objects:
            self.mesh_objects = dict(self._meshes_of_parameters)
        shares = sorted(self._by_kind.values(), key=lambda share: share.places[0])
        meshes = [share.mesh for share in shares if share.mesh is not None]
        meshes += [read_mesh(mesh) for mesh in self._meshes_of_parameters.values()]
        self.meshes = [mesh for mesh in meshes if mesh.is_member]
        outside = [share for share in shares if share.mesh and not share.mesh.is_member]
        self.is_outside = bool(outside) or any(not mesh.is_member for mesh in meshes)
        if outside and not self._groups and (self.meshes or len(outside) < len(shares)):
            mesh = outside[0].mesh
            ranks = ", ".join(map(str, sorted(mesh.ranks if mesh else ())))
            self.fail(
                ValueError(
                    f"{self.caller.function}: {self.name(outside[0].places[0])} lives on a mesh of "
                    f"the ranks {ranks}, which this rank is not part of, unlike other gradients"
                )
            )
        kept = [share for share in shares if share not in outside]
        reference = max(self.meshes, key=_order_among_references, default=None)
        for share in kept:
            if share.mesh is None and reference is not None:
                share.mesh = reference
                share.placements = self._plain_placements(reference, share.is_replicated)
        return kept

    def _plain_placements(self, mesh: Mesh, is_replicated: Sequence[bool]) -> tuple[str, ...]:
        """Copies on all ranks of the mesh, but for process groups that are part of it."""
        parts = [
            set(group.ranks)
            for group, same in zip(self._groups, is_replicated, strict=True)
            if not same and set(group.ranks) <= mesh.ranks
        ]
        return tuple(
            "shard"
            if dimension and any(set(dimension.ranks) <= part for part in parts)
            else "replicate"
            for dimension in mesh.dimensions
        )

    def are_native(self) -> bool:
        """Whether the native engine can write all of :attr:`tensors`, so that none is refused."""
        tensors = self.tensors
        return (
            not observed()
            and len(self.devices) == 1
            and all(map(_C.is_native, tensors))
            and all(map(_C.is_flat, tensors))
        )

    def norms(
        self, norm_type: float, dtype: torch.dtype | None, foreach: bool | None, writes: bool
    ) -> Tensor:
        """The norm of each of :attr:`tensors`, 1-D and float64; all that is wrong is raised."""
        tensors = self.tensors
        if not tensors:
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        norms = _C.tensor_norms(tensors, norm_type, dtype)
        if norms is not None:
            self._native = tensors
            return norms[1]
        names = [self.name(place) for share in self.shares for place in share.places]
        for tensor, name in zip(tensors, names, strict=True):
            require_storage(tensor, name, self.caller.function)
            if tensor.is_meta:
                raise RuntimeError(
                    f"{self.caller.function}: {name} is on the meta device and has no values"
                )
        refuse_integers(tensors, names, self.caller.function)
        sorted_ = Gradients(tensors, names, norm_type)
        if writes:
            refuse_unwritable(tensors, names, self.caller.function)
            torch_ops.require_foreach_support(sorted_.in_place, foreach)
            sorted_.require_scalable(foreach)
            self._fallback = [sorted_]
        each = [
            norm_of_one(tensor, name, norm_type)
            for tensor, name in zip(tensors, names, strict=True)
        ]
        return torch.stack([norm.to(each[0].device) for norm in each])

    def decayed_norms(self, norm_type: float, weight_decay: float) -> Tensor:
        """As :meth:`norms` after the weight decay, of a copy of one gradient after another."""
        norms = []
        for share in self.shares:
            copies = []
            for place, gradient, tensor in zip(
                share.places, share.given, share.tensors, strict=True
            ):
                name = self.name(place)
                pair = dtensor.decay_pair(gradient, self._parameters[place])
                if pair is None:
                    raise ValueError(
                        f"{self.caller.function}: {name} has to be distributed like its parameter "
                        "for a weight decay, or partial where that is replicated, found "
                        f"{getattr(gradient, 'placements', 'a plain tensor')} and "
                        f"{getattr(self._parameters[place], 'placements', 'a plain tensor')}"
                    )
                weight = pair[1].detach().to(tensor.device, tensor.dtype)
                copy = torch.add(tensor, weight, alpha=weight_decay)
                norms.append(norm_of_one(copy, name, norm_type))
                copies.append(copy if share.partial else tensor)
            share.decayed = copies
        if not norms:
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        return torch.stack([norm.to(norms[0].device) for norm in norms])

    def scale_(self, coefficient: Tensor, foreach: bool | None) -> None:
        """Multiply what this rank holds by a 0-dim tensor, once :meth:`norms` has looked at it."""
        if self._native is not None:
            self.scale_native_(coefficient)
        for gradients in self._fallback:
            gradients.scale_(coefficient, foreach)
            self.bump_versions()

    def scale_native_(self, coefficient: float | Tensor) -> None:
        """The same once :meth:`are_native` has said so; by a number or a 0-dim tensor."""
        if isinstance(coefficient, Tensor):
            device = self.tensors[0].device
            coefficient = coefficient.item() if device.type == "cpu" else coefficient.to(device)
        _C.scale_tensors_(self.tensors, coefficient)
        self.bump_versions()

    def bump_versions(self, of_parts: bool = False) -> None:
        """Of the DTensors, whose parts have counters of their own; of these as well if asked."""
        for share in self.shares:
            if share.given and share.given[0] is not share.tensors[0]:
                torch.autograd.graph.increment_version(share.given)
            if of_parts:
                torch.autograd.graph.increment_version(share.tensors)


def _order_among_references(mesh: Mesh) -> tuple[Any, ...]:
    """The largest mesh is the one on all of whose ranks plain tensors are copies.

    Of several of a size all ranks have to choose alike, also where each knows other ones: groups
    that were made into meshes are roots, which begin at a rank of their own.
    """
    first = min(mesh.ranks)
    return len(mesh.ranks), mesh.key[1], sorted(rank - first for rank in mesh.ranks), mesh.key
