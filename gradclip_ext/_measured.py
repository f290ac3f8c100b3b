"""The norm of gradients that a scaler may have scaled, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradclip_ext import _ops
from gradclip_ext._ops import Scalar

__all__ = ["Measured", "has_nonfinite", "measure"]

# Of these, a norm in float64 of gradients in float32 or less is finite if and only if all elements
# are: no square overflows, and no order hides an infinity.
_TELLING_NORM_TYPES = (1.0, 2.0, math.inf)


@dataclass(frozen=True)
class Measured:
    """The norm of all gradients together.

    Attributes:
        norm: the norm of the gradients without the scale, not rounded.
        returned: the same as a tensor, as :func:`gradclip_ext.clip_grad_norm_` returns it.
    """

    norm: Scalar
    returned: Tensor


def measure(
    parts: Sequence[tuple[Sequence[Tensor], Scalar]], norm_type: float, caller: _ops.Caller
) -> Measured:
    """The norm of lists of parameters, the gradients of each multiplied by a number first."""
    norms: list[Tensor] = []
    dtypes: list[torch.dtype] = []
    for parameters, factor in parts:
        if not parameters and len(parts) > 1:
            continue
        total, dtype = _ops.measure(parameters, norm_type, caller)
        # The norm of order 0 counts elements, whatever they are multiplied by.
        if norm_type != 0.0:
            total = total * (factor.to(total.device) if isinstance(factor, Tensor) else factor)
        norms.append(total)
        dtypes.append(dtype)
    if not norms:
        return Measured(0.0, torch.tensor(0.0))
    total, dtype = norms[0], dtypes[0]
    if len(norms) > 1:
        stacked = torch.stack([norm.to(total.device) for norm in norms])
        total = stacked.sum() if norm_type == 0.0 else torch.linalg.vector_norm(stacked, norm_type)
        dtype = torch.promote_types(*dtypes)
    return Measured(_ops.known(total), total.to(dtype))


def has_nonfinite(
    parameters: Sequence[Tensor], norm: Scalar | None, norm_type: float, caller: _ops.Caller
) -> bool | Tensor:
    """Whether an element of the gradients is NaN or infinite, read from their norm if it tells.

    Without a norm, or where the norm may be infinite for finite elements or the reverse, the
    largest magnitude is measured.
    """
    if not parameters:
        return False
    if norm is not None and norm_type in _TELLING_NORM_TYPES:
        is_finite = _ops.isfinite(norm)
        if is_finite is True or not _ops.have_float64(parameters):
            return is_finite ^ True
    largest, _ = _ops.measure(parameters, math.inf, caller)
    return _ops.isfinite(_ops.known(largest)) ^ True
