"""The rules of a clipper and the parameters that each is for: read, checked, followed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _arguments, _ops
from gradclip_ext.thresholds import (
    AGC,
    FixedThreshold,
    Rule,
    StatelessRule,
    Threshold,
    takes_numbers,
)

__all__ = [
    "Group",
    "name_of",
    "places_of",
    "read_rules",
    "require_length",
    "require_limit",
    "require_whole",
]


@dataclass(frozen=True)
class Group:
    """Parameters that share a rule."""

    rule: Threshold
    names: tuple[str, ...]
    parameters: list[Tensor]

    @functools.cached_property
    def caller(self) -> _ops.Caller:
        """How messages name the parameters."""
        return _ops.Caller("GradClipper", names=self.names)

    @functools.cached_property
    def library_rule(self) -> Rule | StatelessRule | None:
        """The rule if it is one of ours, which can be asked by ``limit_for``."""
        return self.rule if takes_numbers(self.rule) else None


def read_rules(max_norm: Any, groups: int) -> list[Threshold]:
    """``max_norm`` of a clipper as rules: one for all, or one for each of the groups."""
    if not isinstance(max_norm, (list, tuple)):
        return [_rule(max_norm, "max_norm")]
    if len(max_norm) != groups:
        raise ValueError(
            f"GradClipper: max_norm has to have one entry for each of the {groups} parameter "
            f"groups, found {len(max_norm)}"
        )
    rules = [_rule(rule, f"max_norm[{place}]") for place, rule in enumerate(max_norm)]
    places: dict[int, int] = {}
    for place, rule in enumerate(rules):
        first = places.setdefault(id(rule), place)
        if first != place and not isinstance(rule, StatelessRule):
            raise ValueError(
                f"GradClipper: max_norm[{first}] and max_norm[{place}] are the same "
                f"{name_of(rule)} object, which would mix the histories of two groups; pass one "
                "object for each"
            )
    return rules


def _rule(value: Any, argument: str) -> Threshold:
    if isinstance(value, Threshold):
        return value
    return FixedThreshold(_arguments.clip_bound(value, "GradClipper", argument))


def name_of(rule: Threshold) -> str:
    """What messages call a rule."""
    return "float" if isinstance(rule, FixedThreshold) else type(rule).__name__


def places_of(known: Group, group: Group) -> list[int | None]:
    """For each parameter of a group the place it had before, None for a new one.

    Another object under a known name and of the same shape is taken for the same parameter. Places
    in a list are no names; there the object alone counts.
    """
    by_object = {id(parameter): place for place, parameter in enumerate(known.parameters)}
    by_name = {name: place for place, name in enumerate(known.names) if not name.endswith("]")}
    places = []
    for name, parameter in zip(group.names, group.parameters, strict=True):
        place = by_object.get(id(parameter))
        if place is None and name in by_name:
            named = by_name[name]
            place = named if _same_shape(known.parameters[named], parameter) else None
        places.append(place)
    return places


def _same_shape(one: Tensor, other: Tensor) -> bool:
    is_lazy = torch.nn.parameter.is_lazy(one) or torch.nn.parameter.is_lazy(other)
    return not is_lazy and one.shape == other.shape


def require_limit(limit: Any, rule: Threshold, norms: Tensor, is_observed: bool) -> None:
    """Refuse what a user's own rule must not give; only numbers on the host are looked at."""
    name = f"GradClipper: the rule {type(rule).__name__}"
    if not isinstance(limit, Tensor):
        raise TypeError(
            f"{name} has to give its limits as a tensor, found {_arguments.describe(limit)}"
        )
    if limit.dtype not in (torch.float64, torch.float32) or limit.layout != torch.strided:
        raise TypeError(
            f"{name} has to give its limits as a dense float64 tensor, found {limit.dtype}, "
            f"{limit.layout}"
        )
    shape = tuple(norms.shape) if rule.per_parameter else ()
    if tuple(limit.shape) != shape:
        raise ValueError(
            f"{name} has to give limits of shape {shape}, found shape {tuple(limit.shape)}"
        )
    if limit.device != norms.device:
        raise ValueError(
            f"{name} has to give limits on {norms.device}, found them on {limit.device}"
        )
    # What it makes of the NaN that stands for a skipped step is not used.
    if limit.device.type != "cpu" or not is_observed:
        return
    wrong = limit.reshape(-1)[~(limit.reshape(-1) >= 0.0)]
    if wrong.numel() > 0:
        raise ValueError(
            f"{name} has to give limits that are not negative, found {wrong[0].item()}"
        )


def require_whole(rules: Sequence[Threshold]) -> None:
    """Refuse rules that need the norm of each whole parameter, of which a rank may hold a part."""
    for rule in rules:
        if rule.per_parameter or isinstance(rule, AGC):
            raise ValueError(
                f"GradClipper: {name_of(rule)} needs whole parameters and cannot be combined with "
                "process_groups, whose ranks may hold parts of them; use DTensors or another rule"
            )


def require_length(group: Group) -> None:
    """Refuse a loaded state of a rule that is for another number of parameters."""
    found = getattr(group.rule, "parameter_count", None)
    if found is not None and group.names and found != len(group.names):
        raise ValueError(
            f"GradClipper: the state of {name_of(group.rule)} is for {found} parameters, expected "
            f"{len(group.names)}, those of its group"
        )
