"""A multiple of a rule's limit, above which a step is skipped instead of clipped."""

from __future__ import annotations

from torch import Tensor

from gradclip_ext import _arguments
from gradclip_ext._ops import Scalar

__all__ = ["TimesLimit"]


class TimesLimit:
    """For ``GradClipper(skip_above=...)``: a factor of the rule's limit before each step.

    That is the limit which the rule draws from earlier steps alone, as for a total that is not
    finite: the norm that is judged does not raise it.

    Args:
        factor: how many times its limit a norm may be before the step is skipped, at least 1.

    Raises:
        TypeError: ``factor`` is not a number.
        ValueError: it is below 1 or NaN.

    >>> TimesLimit(4.0).is_exceeded(9.0, 2.0)
    True
    """

    def __init__(self, factor: float) -> None:
        self.factor = _arguments.at_least(factor, 1, "TimesLimit", "factor")

    def is_exceeded(self, norm: Scalar, limit: Scalar) -> bool | Tensor:
        """Whether a norm, or one of several, is above that many times its limit; without a sync."""
        exceeded = norm > limit * self.factor
        return exceeded.any() if isinstance(exceeded, Tensor) else exceeded
