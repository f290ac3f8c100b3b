"""DTensors: gradients that are distributed over several ranks.

torch's own operations measure and scale them, with the collectives that this needs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["are_placed_alike", "local", "whole"]


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


def local(tensor: Any) -> Tensor:
    """What this rank holds of a DTensor."""
    return tensor.to_local()  # type: ignore[no-any-return]
