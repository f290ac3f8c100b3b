"""DTensors: gradients that are distributed over several ranks.

torch's own operations measure and scale them, with the collectives that this needs.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["whole"]


def whole(norm: Tensor) -> Tensor:
    """A norm as a plain tensor: that of DTensors may be partial until it is reduced over ranks."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
