"""One step of a clipper: measure every group, decide, write.

Everything that can raise does so before the first gradient is written, and a rule that has taken in
the norms of a step that then fails gets its state back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from gradclip_ext import _ops
from gradclip_ext._ops import Scalar
from gradclip_ext._rules import Group, require_limit
from gradclip_ext._settings import Settings
from gradclip_ext.thresholds import (
    AGC,
    StatelessRule,
    TimesLimit,
)

__all__ = ["Step", "raise_together"]

# A group; its norm, as a number where the host knows it, and as a tensor; those of its gradients.
_Measured = tuple[Group, Scalar, Tensor, Tensor]


class Step:
    """What a step measured and decided: numbers known on the host, or tensors on the device.

    Attributes:
        groups: all groups, those without parameters included.
        total: the norm of all gradients together.
        norms: the norm of each gradient, a 1-D tensor.
        is_finite: whether the total is finite.
        skips: whether the update is to be skipped.
        limits: for each group with parameters, one for all its gradients together, or a 1-D tensor
            with one each.
        coefficients: likewise, with the policy applied; after :meth:`write` also the smallest ones
            of units and elements.
    """

    __slots__ = (
        "_decays_late",
        "_failed",
        "_groups",
        "_inverse",
        "_measured",
        "_settings",
        "coefficients",
        "groups",
        "is_finite",
        "limits",
        "norms",
        "returned",
        "skips",
        "total",
    )

    def __init__(self, settings: Settings, groups: Sequence[Group], inverse: Scalar = 1.0) -> None:
        self._settings = settings
        # What the gradients are still to be multiplied by, but not by this step.
        self._inverse = inverse
        self.groups = groups
        # A group whose parameters are all left out has nothing to measure, and its rule no limit;
        # but other ranks of process groups may have some.
        self._groups = [group for group in groups if self.has_limit(group)]
        self._decays_late = settings.decays_late
        # Whether another rank has failed, a tensor where the host does not know.
        self._failed: Tensor | None = None
        self.limits: list[Scalar] = []
        self.coefficients: list[Scalar] = []
        self._measured = self._measure()
        # The tensor is returned to the caller, who may write into it; a number or a copy is kept.
        self.returned: Tensor
        self.total: Scalar
        if len(self._measured) == 1:
            _, self.total, self.returned, self.norms = self._measured[0]
        else:
            self.returned, self.norms = self._together()
            self.total = _ops.known(self.returned)
        if not isinstance(self.total, float):
            self.total = self.total.clone()
        self.is_finite = _ops.isfinite(self.total)
        self.skips: bool | Tensor = False
        if settings.nonfinite == "raise" and not self.is_finite:
            raise self._nonfinite_error()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all parameters."""
        return tuple(name for group in self._groups for name in group.names)

    def has_limit(self, group: Group) -> bool:
        """Whether the group's rule takes part in the step."""
        return bool(group.names or self._settings.process_groups)

    def decide(self) -> None:
        """Ask the rules for their limits, and make the coefficients of them."""
        settings = self._settings
        skips_nonfinite = settings.nonfinite == "skip"
        if settings.skip_above is not None:
            self.skips = self._is_spike(settings.skip_above) & self.is_finite
            skips_nonfinite = skips_nonfinite or settings.nonfinite == "propagate"
        if skips_nonfinite:
            self.skips = self.skips | (self.is_finite ^ True)
        for group, number, total, norms in self._measured:
            rule = group.rule
            limit = self._limits(group, number, total, norms)
            measured = norms if rule.per_parameter else number
            self.limits.append(limit)
            self.coefficients.append(_ops.clip_coefficient(limit, measured, rule.epsilon))
        if settings.nonfinite == "zero":
            self.coefficients = [_ops.select(self.is_finite, c, 0.0) for c in self.coefficients]
        if self.skips is not False:
            self.coefficients = [_ops.select(self.skips, 1.0, c) for c in self.coefficients]
        if self._failed is not None:
            self.coefficients = [_ops.select(self._failed, 1.0, c) for c in self.coefficients]

    def _is_spike(self, above: float | TimesLimit) -> bool | Tensor:
        """Whether the norm is above ``skip_above``; no rule learns of the step by this."""
        if isinstance(above, float):
            return self.total > above
        spike: bool | Tensor = False
        for group, number, total, norms in self._measured:
            # The limit of the steps before: a NaN is no observation.
            norms_before = torch.full_like(norms, math.nan)
            rule = group.rule
            if group.library_rule is not None and isinstance(number, float):
                # Known on the host, nothing that a rule holds is changed, only replaced.
                limit = copy.copy(group.library_rule).limit_for(math.nan, norms_before)
            else:
                # A copy is asked, because a rule of the user's own may take it for a norm.
                total_before = torch.full_like(total, math.nan)
                limit = _ops.known(copy.deepcopy(rule).limits(total_before, norms_before))
            exceeds = above.is_exceeded(norms if rule.per_parameter else number, limit)
            if isinstance(exceeds, Tensor):
                exceeds = exceeds.to(self.returned.device)
            spike = spike | exceeds
        known = _ops.known(spike) if isinstance(spike, Tensor) else spike
        return known if isinstance(known, Tensor) else bool(known)

    def _limits(self, group: Group, number: Scalar, total: Tensor, norms: Tensor) -> Scalar:
        """A rule's limits; to a step that is skipped it is blind, as to a NaN."""
        rule = group.rule
        if self.skips is not False:
            skips = torch.as_tensor(self.skips, device=total.device)
            total, norms = total.masked_fill(skips, math.nan), norms.masked_fill(skips, math.nan)
            number = _ops.known(total)
        if group.library_rule is not None:
            return group.library_rule.limit_for(number, norms)
        # Copies, which a rule of the user's own may write to.
        limits = rule.limits(total.clone(), norms.clone())
        # What it makes of a norm that is not finite is its own affair.
        is_finite = self.is_finite
        if isinstance(is_finite, Tensor) and is_finite.is_cpu:
            is_finite = bool(is_finite)
        require_limit(limits, rule, norms, self.skips is False and is_finite is True)
        return limits if rule.per_parameter else _ops.known(limits)

    def write(self) -> None:
        """Scale the gradients, and add the weight decay if that has not been done yet."""
        settings = self._settings
        if self._decays_late:
            keeps = self.skips ^ True
            for group in self._groups:
                _ops.add_weight_decay_(group.parameters, settings.weight_decay, group.caller, keeps)
        for index, group in enumerate(self._groups):
            if isinstance(group.rule, AGC):
                named = zip(group.names, group.parameters, strict=True)
                self._include(index, group.rule.clip_(named))
            self._scale(group, self.coefficients[index])
            if settings.clip_value is not None:
                self._include(index, self._clamp(group, settings.clip_value))

    def clips(self) -> bool | Tensor:
        """Whether the total is finite and a gradient was made smaller."""
        clips: bool | Tensor = False
        for coefficient in self.coefficients:
            if not isinstance(coefficient, float):
                coefficient = _ops.smallest(coefficient, self.returned.device)
            clips = clips | (coefficient < 1.0)
        return clips & self.is_finite

    def _measure(self) -> list[_Measured]:
        """The norms of every group, once it is clear that every group can be written."""
        settings, groups = self._settings, self._groups
        if settings.process_groups:
            return self._measured_over_ranks()
        # Several groups, or a decay that waits, are looked at first.
        waits = settings.weight_decay > 0.0 and (len(groups) > 1 or settings.decays_late)
        try:
            found = [None if waits else self._measured_natively(group) for group in groups]
        except Exception as error:
            # What a `grad` property has raised.
            raise_together(error, settings, groups)
            raise
        if None not in found:
            return cast(list[_Measured], found)
        if any(_ops.are_distributed(group.parameters) for group in groups):
            return self._measured_over_ranks()
        self._require_writable(
            [group for group, measured in zip(groups, found, strict=True) if measured is None]
        )
        return [
            measured or self._measured_in_any_way(group)
            for group, measured in zip(groups, found, strict=True)
        ]

    def _require_writable(self, groups: Sequence[Group]) -> None:
        """Raise what writing these groups would raise."""
        settings = self._settings
        _ops.refuse_meta([group.parameters for group in self._groups], self.names)
        for group in groups:
            _ops.require_writable(
                group.parameters,
                group.caller,
                weight_decay=settings.weight_decay,
                clip_value=settings.clip_value,
                by_units=isinstance(group.rule, AGC),
            )

    def _measured_over_ranks(self) -> list[_Measured]:
        """The norms of every group over all ranks that hold a part of it, in one exchange."""
        settings, groups = self._settings, self._groups
        # Nothing may be written before it is clear that no other rank has failed.
        self._decays_late = settings.weight_decay > 0.0
        totals, each, self._failed = _ops.global_norms(
            [parameter for group in groups for parameter in group.parameters],
            [len(group.parameters) for group in groups],
            settings.norm_type,
            settings.process_groups,
            _ops.Caller("GradClipper", names=self.names),
            prepare=lambda: self._require_writable(groups),
            only_scales=(
                settings.weight_decay == 0.0
                and settings.clip_value is None
                and not any(isinstance(group.rule, AGC) for group in groups)
            ),
            weight_decay=settings.weight_decay,
            refuses_nonfinite=settings.nonfinite == "raise",
        )
        parts = torch.split(each, [len(group.parameters) for group in groups])
        return [
            self._unscaled(group, total, norms)
            for group, total, norms in zip(groups, totals, parts, strict=True)
        ]

    def _measured_natively(self, group: Group) -> _Measured | None:
        settings = self._settings
        if isinstance(group.rule, AGC) and not _ops.have_native_units(group.parameters):
            return None
        if settings.clip_value is not None and _ops.are_complex(group.parameters):
            return None
        norms = _ops.native_grad_norms(
            group.parameters, settings.norm_type, None, settings.weight_decay
        )
        return norms and self._unscaled(group, *norms)

    def _unscaled(self, group: Group, total: Tensor, norms: Tensor) -> _Measured:
        inverse = self._inverse
        # The norm of order 0 counts elements, whatever they are multiplied by.
        if not (isinstance(inverse, float) and inverse == 1.0) and self._settings.norm_type != 0.0:
            if isinstance(inverse, Tensor):
                inverse = inverse.to(total.device)
            total, norms = total * inverse, norms * inverse
        return group, _ops.known(total), total, norms

    def _measured_in_any_way(self, group: Group) -> _Measured:
        settings = self._settings
        parameters, caller = group.parameters, group.caller
        norm_type, weight_decay = settings.norm_type, settings.weight_decay
        if settings.decays_late:
            norms = _ops.decayed_grad_norms(parameters, norm_type, weight_decay, caller)
        else:
            norms = _ops.grad_norms(parameters, norm_type, None, caller, weight_decay)
        return self._unscaled(group, *norms)

    def _together(self) -> tuple[Tensor, Tensor]:
        """The norm of all groups and the norms of all gradients, on the device of the first."""
        device = self._measured[0][2].device
        totals = [total.to(device) for _, _, total, _ in self._measured]
        norms = torch.cat([norms.to(device) for _, _, _, norms in self._measured])
        norm_type = self._settings.norm_type
        if norm_type < 0.0:
            # A group without gradients would count with the smallest norm there is.
            totals = [
                total
                for total, group in zip(totals, self._groups, strict=True)
                if any(parameter.grad is not None for parameter in group.parameters)
            ] or totals
        stacked = torch.stack(totals)
        if norm_type == 0.0:
            return stacked.sum(), norms
        return torch.linalg.vector_norm(stacked, norm_type), norms

    def _scale(self, group: Group, coefficient: Scalar) -> None:
        clears = self._settings.nonfinite == "zero"
        rule = group.rule
        if not clears and isinstance(rule, StatelessRule) and rule.only_measures:
            return
        if not isinstance(coefficient, float) and coefficient.dim() == 1:
            _ops.scale_each_(group.parameters, coefficient, group.caller)
        elif clears and (not isinstance(coefficient, float) or coefficient == 0.0):
            # One coefficient for each, because a scaled NaN stays NaN, where 0 clears.
            each = torch.as_tensor(coefficient, dtype=torch.float64, device=self.returned.device)
            each = each.expand(len(group.parameters)).contiguous()
            _ops.scale_each_(group.parameters, each, group.caller)
        else:
            _ops.scale_(group.parameters, coefficient, group.caller)

    def _clamp(self, group: Group, clip_value: float) -> Scalar:
        """Limit the elements; for each gradient, what its largest one was multiplied by."""
        _, largest = _ops.grad_norms(
            group.parameters, math.inf, None, group.caller, groups=self._settings.process_groups
        )
        _ops.clip_grad_value_(group.parameters, clip_value, None, group.caller)
        return _ops.clip_coefficient(clip_value, largest, 0.0)

    def _include(self, index: int, coefficient: Scalar | None) -> None:
        """Let a coefficient of units or elements count in that of the group."""
        if coefficient is not None:
            self.coefficients[index] = _ops.known(coefficient) * self.coefficients[index]

    def _nonfinite_error(self) -> RuntimeError:
        pairs = [
            (name, parameter.grad)
            for group in self._groups
            for name, parameter in zip(group.names, group.parameters, strict=True)
            if parameter.grad is not None
        ]
        return _ops.nonfinite_error(
            self._settings.norm_type, [grad for _, grad in pairs], [name for name, _ in pairs]
        )


def raise_together(error: Exception, settings: Settings, groups: Sequence[Group]) -> None:
    """Raise an error of this rank on all that would wait for its step; else nothing."""
    names = tuple(name for group in groups for name in group.names)
    _ops.raise_together(
        error,
        [parameter for group in groups for parameter in group.parameters],
        settings.process_groups,
        _ops.Caller("GradClipper", names=names),
        settings.norm_type,
        [len(group.parameters) for group in groups],
    )
