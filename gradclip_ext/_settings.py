"""What a clipper is told once: its arguments, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradclip_ext import _arguments
from gradclip_ext._rules import require_whole
from gradclip_ext.thresholds import AGC, Threshold, TimesLimit, takes_numbers

__all__ = ["POLICIES", "Settings", "read_settings"]

_FUNCTION = "GradClipper"

# What to do with a norm that is not finite, and the coefficient that does it, if one does.
POLICIES = {"propagate": None, "raise": None, "zero": 0.0, "skip": 1.0}


@dataclass(frozen=True, slots=True)
class Settings:
    """See the arguments of ``GradClipper``."""

    norm_type: float
    nonfinite: str
    clip_value: float | None
    weight_decay: float
    skip_above: float | TimesLimit | None
    # Whether the weight decay has to wait until it is clear that the step will not be dropped.
    decays_late: bool
    # Over whose ranks the norms are taken, beside those of DTensors.
    process_groups: tuple[Any, ...]


def read_settings(
    rules: Sequence[Threshold],
    *,
    norm_type: Any,
    nonfinite: Any,
    clip_value: Any,
    weight_decay: Any,
    skip_above: Any,
    process_groups: tuple[Any, ...],
) -> Settings:
    """Check the arguments, alone and against the rules.

    Raises:
        TypeError: one has the wrong type.
        ValueError: one is out of range, or some do not go together.
    """
    norm_type = _arguments.norm_type(norm_type, _FUNCTION)
    _arguments.one_of(nonfinite, tuple(POLICIES), _FUNCTION, "nonfinite")
    if process_groups:
        require_whole(rules)
    if clip_value is not None:
        clip_value = _arguments.clip_bound(clip_value, _FUNCTION, "clip_value")
    weight_decay = _arguments.weight_decay(weight_decay, _FUNCTION)
    if skip_above is not None and not isinstance(skip_above, TimesLimit):
        skip_above = _arguments.positive(skip_above, _FUNCTION, "skip_above")
    skipping = "nonfinite='skip'" if nonfinite == "skip" else "skip_above"
    may_skip = nonfinite == "skip" or skip_above is not None
    if may_skip and (clip_value is not None or any(isinstance(rule, AGC) for rule in rules)):
        raise ValueError(
            f"{_FUNCTION}: {skipping} cannot be combined with clip_value or AGC, which "
            "would change the gradients before the host knows whether to skip the step"
        )
    may_drop = may_skip or nonfinite == "raise" or not all(map(takes_numbers, rules))
    return Settings(
        norm_type,
        nonfinite,
        clip_value,
        weight_decay,
        skip_above,
        decays_late=weight_decay > 0.0 and may_drop,
        process_groups=process_groups,
    )
