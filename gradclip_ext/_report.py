"""What a clipper reports: plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from gradclip_ext._ops import Scalar
from gradclip_ext._step import Step

__all__ = ["ClipReport", "report_of"]


@dataclass(frozen=True)
class ClipReport:
    """What :meth:`GradClipper.report` returns: plain numbers, of the last step and of all steps.

    Attributes:
        names: the names of the parameters.
        norms: the norm of each gradient before the last step's clipping; 0 without a gradient.
        total_norm: the norm of all gradients together.
        coefficient: the smallest coefficient of the last step; 1 if no limit took effect.
        limits: the limits of the last step, one for each group, ``inf`` for one that is left out;
            the smallest one of a rule with a limit for each parameter.
        steps: calls of :meth:`GradClipper.clip_` and :meth:`GradClipper.step`.
        clipped_steps: those with a finite norm and a coefficient below 1.
        nonfinite_steps: those whose norm was NaN or infinite.
    """

    names: tuple[str, ...]
    norms: tuple[float, ...]
    total_norm: float
    coefficient: float
    limits: tuple[float, ...]
    steps: int
    clipped_steps: int
    nonfinite_steps: int
    skipped_steps: int = 0

    def as_dict(self, prefix: str = "gradients/") -> dict[str, float]:
        """Numbers by name, for a logger such as TensorBoard's or Weights & Biases'."""
        limits = {f"{prefix}limit[{i}]": limit for i, limit in enumerate(self.limits)}
        if len(self.limits) == 1:
            limits = {f"{prefix}limit": self.limits[0]}
        return {
            f"{prefix}total_norm": self.total_norm,
            f"{prefix}coefficient": self.coefficient,
            **limits,
            f"{prefix}clipped_share": self.clipped_steps / max(1, self.steps),
            f"{prefix}nonfinite_steps": float(self.nonfinite_steps),
            f"{prefix}skipped_steps": float(self.skipped_steps),
            **{
                f"{prefix}norm/{name}": norm
                for name, norm in zip(self.names, self.norms, strict=True)
            },
        }


def report_of(step: Step, numbers: Mapping[str, int]) -> ClipReport:
    """What a step and the counters say, with a device sync where they are on a GPU."""
    limits = iter(step.limits)
    return ClipReport(
        names=step.names,
        norms=tuple(step.norms.tolist()),
        total_norm=float(step.total),
        coefficient=_smallest_of([_smallest(c) for c in step.coefficients]),
        limits=tuple(
            _smallest(next(limits)) if step.has_limit(g) else math.inf for g in step.groups
        ),
        steps=numbers["steps"],
        clipped_steps=numbers["clipped_steps"],
        nonfinite_steps=numbers["nonfinite_steps"],
        skipped_steps=numbers["skipped_steps"],
    )


def _smallest_of(numbers: list[float]) -> float:
    """NaN if any is: Python's min would depend on their order."""
    return math.nan if any(math.isnan(number) for number in numbers) else min(numbers)


def _smallest(number: Scalar) -> float:
    return number.min().item() if isinstance(number, Tensor) else number
