"""The scalars of a step: numbers known on the host, or tensors that have not been read.

Python's operators work on both, and the functions here do the rest, so that a formula is written
once. On the CPU a scalar is read and computed with directly; on a GPU it stays a tensor, without a
device sync. What runs in each step asks for Python's own types first: to ask for a tensor takes
longer than the arithmetic.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.nn import Parameter

from gradclip_ext import _C
from gradclip_ext._ops.observation import compiling

__all__ = [
    "Scalar",
    "clip_coefficient",
    "floor",
    "in_tensor",
    "isfinite",
    "known",
    "lerp",
    "minimum",
    "product",
    "quotient",
    "select",
    "smallest",
    "square_root",
]

# A number known on the host, or a tensor: 0-dim, or 1-D where each parameter has its own number.
Scalar = float | Tensor


def known(number: Scalar) -> Scalar:
    """The number in a one-element tensor, if reading it needs no device sync and is not observed.

    Anything else is returned as it is.
    """
    # Exact types: a subclass may store its number elsewhere.
    if (type(number) is Tensor or type(number) is Parameter) and not compiling():
        value = _C.known_number(number)
        return number if value is None else value
    return number


def in_tensor(number: Scalar, device: torch.device) -> Tensor:
    """A number as a 0-dim float64 tensor on a device; a tensor is returned as it is."""
    if isinstance(number, Tensor):
        return number
    return torch.full((), number, dtype=torch.float64, device=device)


def isfinite(number: Scalar) -> bool | Tensor:
    """Whether the number is neither NaN nor infinite."""
    return math.isfinite(number) if isinstance(number, float) else number.isfinite()


def smallest(number: Scalar, device: torch.device) -> Scalar:
    """The smallest number in a tensor, copied to a device; a number is returned as it is."""
    return known(number.min().to(device)) if isinstance(number, Tensor) else number


def select(condition: bool | Tensor, number: Scalar, other: Scalar) -> Scalar:
    """The number if the condition holds, else the other."""
    if isinstance(condition, bool):
        return number if condition else other
    if isinstance(other, Tensor):
        return torch.where(condition.to(other.device), number, other)
    if not isinstance(number, Tensor):
        number = torch.full_like(condition, number, dtype=torch.float64)
    return torch.where(condition.to(number.device), number, other)


def minimum(number: Scalar, other: Scalar) -> Scalar:
    """The smaller one; NaN where the first is."""
    if not isinstance(number, Tensor):
        return other.clamp(max=number) if isinstance(other, Tensor) else min(number, other)
    return torch.minimum(number, other) if isinstance(other, Tensor) else number.clamp(max=other)


def square_root(number: Scalar) -> Scalar:
    """Of a number that is not negative."""
    return number.sqrt() if isinstance(number, Tensor) else math.sqrt(number)


def floor(number: Scalar) -> Scalar:
    """The largest whole number that is not above a finite one."""
    return number.floor() if isinstance(number, Tensor) else float(math.floor(number))


def lerp(start: Scalar, end: Scalar, weight: Scalar) -> Scalar:
    """As :func:`torch.lerp`: from the nearer end, so that it rounds to between the two."""
    if isinstance(start, Tensor):
        return torch.lerp(start, cast(Tensor, end), weight)
    if weight < 0.5:
        return start + weight * (end - start)
    return end - (end - start) * (1.0 - weight)


def quotient(dividend: Scalar, divisor: Scalar) -> Scalar:
    """As IEEE 754 defines it for a divisor of 0, where Python raises ZeroDivisionError."""
    if isinstance(divisor, float) and divisor == 0.0:
        return dividend * math.inf
    return dividend / divisor


def product(number: Scalar, other: Scalar) -> Scalar:
    """Of two numbers, on the device of the first that is a tensor."""
    if isinstance(number, Tensor) and isinstance(other, Tensor):
        other = other.to(number.device)
    return number * other


def clip_coefficient(limit: Scalar, norm: Scalar, epsilon: float) -> Scalar:
    """``min(1, limit / (norm + epsilon))``; 1 for an infinite limit, whatever the norm.

    One number for all norms where the host knows that each coefficient is 1.
    A NaN norm gives NaN; 1 if norm, limit and epsilon are all 0.
    """
    total = norm + epsilon if epsilon > 0.0 else norm
    coefficient = quotient(limit, total)
    if not isinstance(coefficient, float) and coefficient.dim() == 1:
        least = _least_on_host(coefficient)
        if least >= 1.0:
            return 1.0
        if least < 1.0:
            return coefficient.clamp(max=1.0)
    return select((total <= limit) | (limit == math.inf), 1.0, coefficient)


def _least_on_host(numbers: Tensor) -> float:
    """The smallest of several; NaN if one is NaN or the host does not know them."""
    if not numbers.is_cpu or numbers.numel() == 0:
        return math.nan
    least = known(numbers.min())
    return least if isinstance(least, float) else math.nan
