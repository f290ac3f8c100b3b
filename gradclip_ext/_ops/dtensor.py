"""DTensors: gradients that are spread over several ranks.

torch's own operations measure and scale them, with the collectives that takes.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["whole"]


def whole(norm: Tensor) -> Tensor:
    """A norm as a plain tensor: that of DTensors may be a partial one until it is gathered."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
