"""DTensors: gradients that are distributed over several ranks, and what this rank holds of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor
from torch.nn import Parameter

from gradclip_ext._ops import torch_distributed
from gradclip_ext._ops.observation import compiling

__all__ = [
    "any_in",
    "are_placed_alike",
    "decay_pair",
    "dtensor_type",
    "is_dtensor",
    "is_partial",
    "is_split_unit",
    "local",
    "placements",
    "unit_obstacle",
    "whole",
]


def dtensor_type() -> Any:
    """The class, if it was imported: it takes a second, and without it there are no DTensors."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_dtensor(tensor: Any) -> bool:
    """Whether it is distributed, and its local part may be worked on."""
    of_class = dtensor_type()
    return of_class is not None and isinstance(tensor, of_class) and not compiling()


def any_in(tensors: Sequence[Any]) -> bool:
    """Whether any of these parameters, or a gradient of theirs, is a DTensor.

    False for a compiler that traces, which sees torch's operations on DTensors.
    """
    of_class = dtensor_type()
    if of_class is None or compiling():
        return False
    for tensor in tensors:
        kind = type(tensor)
        if kind is of_class:
            return True
        # The attribute of another class may compute a gradient, and is read only once.
        is_plain = kind is Parameter or kind is Tensor
        if is_plain and tensor.is_leaf and isinstance(tensor.grad, of_class):
            return True
        if not is_plain and isinstance(tensor, of_class):
            return True
    return False


def whole(norm: Tensor) -> Tensor:
    """A norm as a plain tensor: that of DTensors may be partial until it is reduced over ranks."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def are_placed_alike(one: Any, other: Any) -> bool:
    """Whether both are DTensors, distributed over the same ranks in the same way.

    Partial ones, whose elements are sums over ranks, do not count.
    """
    if not (hasattr(one, "full_tensor") and hasattr(other, "full_tensor")):
        return False
    return bool(
        one.device_mesh == other.device_mesh
        and one.placements == other.placements
        and not any(placement.is_partial() for placement in other.placements)
    )


def placements(tensor: Any) -> Any:
    """How a DTensor is distributed; None for another tensor."""
    return getattr(tensor, "placements", None)


def is_partial(tensor: Any) -> bool:
    """Whether it is a DTensor whose elements have yet to be added up over ranks."""
    return is_dtensor(tensor) and any(placement.is_partial() for placement in tensor.placements)


def decay_pair(gradient: Any, parameter: Any) -> tuple[Tensor, Tensor] | None:
    """What this rank holds of both, for a multiple of the second to be added to the first.

    None if they are distributed in different ways. Of a partial gradient, the elements of which
    are sums over ranks, a single rank gets the parameter added and the others zeros.
    """
    if not (is_dtensor(gradient) or is_dtensor(parameter)):
        return gradient, parameter
    if not (is_dtensor(gradient) and is_dtensor(parameter)):
        return None
    if gradient.device_mesh != parameter.device_mesh:
        return None
    coordinate = gradient.device_mesh.get_coordinate()
    adds = True
    for place, (own, other) in enumerate(
        zip(gradient.placements, parameter.placements, strict=True)
    ):
        if own.is_partial() and other.is_replicate():
            if own.reduce_op == "sum":
                adds = adds and coordinate is not None and coordinate[place] == 0
            elif own.reduce_op != "avg":
                return None
        elif own != other:
            return None
    weight = local(parameter)
    return local(gradient), weight if adds else weight.new_zeros(weight.shape)


def is_split_unit(parameter: Any) -> bool:
    """Whether it is a DTensor of one dimension, a single unit, of which ranks hold parts."""
    return (
        is_dtensor(parameter)
        and parameter.dim() <= 1
        and any(not placement.is_replicate() for placement in parameter.placements)
    )


def unit_obstacle(parameter: Any, gradient: Any) -> str | None:
    """Why the units of a gradient cannot be clipped on the ranks that hold them; None if they can.

    A row of a matrix has to lie on one rank, and a parameter where its gradient lies.
    """
    if not (is_dtensor(parameter) or is_dtensor(gradient)):
        return None
    if not (is_dtensor(parameter) and is_dtensor(gradient)):
        return "has to be a DTensor like its parameter, or both plain tensors"
    if not are_placed_alike(parameter, gradient):
        return (
            "has to be distributed like its parameter, and not partial, expected "
            f"{parameter.placements}, found {gradient.placements}"
        )
    if gradient.dim() > 1 and any(
        not placement.is_replicate() and placement.dim % gradient.dim() != 0
        for placement in gradient.placements
    ):
        return (
            "has units that are split over ranks, expected it to be distributed along its first "
            f"dimension, found {gradient.placements}"
        )
    return None


def local(tensor: Any) -> Tensor:
    """What this rank holds of a DTensor; any other tensor is returned as it is."""
    return torch_distributed.local_tensor(tensor) if is_dtensor(tensor) else cast(Tensor, tensor)
