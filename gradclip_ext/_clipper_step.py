"""A step of a clipper that is also one of optimizers, in which theirs may scale the gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.amp import GradScaler

from gradclip_ext import _ops
from gradclip_ext._handover import Factors, Steps, require_gradients
from gradclip_ext._measured import has_nonfinite
from gradclip_ext._ops import Scalar
from gradclip_ext._owners import read_optimizers, read_owners, takes_part
from gradclip_ext._rules import Group
from gradclip_ext._scaler import (
    Unscaling,
    read_scaler,
    report_overflow,
    require_unscalable,
    undone_on_error,
    unscale,
    unscales_by_itself,
)
from gradclip_ext._settings import Settings
from gradclip_ext._step import Step, raise_together
from gradclip_ext.thresholds import AGC

__all__ = ["ClipperStep"]

_FUNCTION = "GradClipper.step"


class ClipperStep:
    """What ``GradClipper.step`` does beside measuring, deciding and counting.

    Where one coefficient is all that the clipper does to the gradients, and these are the same as
    those that are stepped, it is handed to the optimizers. Else the gradients are unscaled by the
    scaler, clipped, and stepped.
    """

    def __init__(
        self, optimizer: Any, scaler: Any, settings: Settings, groups: Sequence[Group]
    ) -> None:
        self._optimizers = read_optimizers(optimizer, _FUNCTION)
        self._scaler = None if scaler is None else read_scaler(scaler, _FUNCTION)
        self._owners = read_owners(self._optimizers, _FUNCTION)
        self._settings = settings
        self._groups = groups
        self._caller = _ops.Caller(_FUNCTION)
        # For gradients that are handed over while they are scaled.
        self._unscaling: Unscaling | None = None
        # Whether one that is stepped is NaN or infinite, once it is known; with a scaler only.
        self._overflow: bool | Tensor = False
        self._hands_over = self._is_one_coefficient(groups)
        self._steps: Steps | None = None
        # Whether the norm is that of gradients on several ranks.
        self._shares_norm = bool(settings.process_groups) or any(
            _ops.are_distributed(group.parameters) for group in groups
        )

    @contextlib.contextmanager
    def unscaled(self) -> Iterator[Scalar]:
        """Give what the gradients have yet to be multiplied by; an error undoes all."""
        scaler = self._scaler
        if scaler is None:
            yield 1.0
            return
        with undone_on_error(scaler if self._hands_over else None, self._optimizers):
            try:
                inverse = self._unscale(scaler)
            except Exception as error:
                raise_together(error, self._settings, self._groups)
                raise
            yield inverse

    def _unscale(self, scaler: GradScaler) -> Scalar:
        require_gradients(self._owners, _FUNCTION)
        if self._hands_over:
            self._unscaling = Unscaling(scaler, self._optimizers)
            return self._unscaling.inverse
        stepped = [p for owner in self._owners for p in (*owner.clipped, *owner.spared)]
        require_unscalable(scaler, self._optimizers, stepped, self._caller)
        self._overflow = unscale(scaler, self._optimizers)
        return 1.0

    def write(self, step: Step) -> None:
        """Multiply the gradients where the optimizers do not, once it is decided by how much."""
        if self._unscaling is not None:
            self._overflow = self._found_overflow(step)
            self._unscaling.report_overflow(self._overflow)
        elif self._scaler is not None and self._shares_norm:
            # Of other ranks the scaler, which has unscaled by itself, may not know.
            self._overflow = self._overflow | (step.is_finite ^ True)
            report_overflow(self._scaler, self._optimizers, self._overflow)
        overflow = self._overflow
        skips = step.skips if self._scaler is None else overflow
        factors = Factors(1.0, 1.0, skips)
        if self._hands_over and not self._clears(step):
            inverse = 1.0 if self._unscaling is None else self._unscaling.inverse
            factors = Factors(step.coefficients[0], inverse, skips)
        else:
            step.write()
        # A scaler knows of infinities, but of no spike: with both, a GPU has to be asked.
        if not (self._may_drop() and bool(step.skips & (overflow ^ True))):
            self._steps = Steps(self._owners, factors, self._caller, self._scaler)
        elif self._unscaling is not None:
            # For the scaler they are unscaled from here on, as after its own pass.
            inverse = self._unscaling.inverse
            for owner in self._owners:
                _ops.scale_([*owner.clipped, *owner.spared], inverse, self._caller)

    def take(self) -> None:
        """Take the steps of the optimizers, unless they are to be skipped."""
        if self._steps is not None:
            self._steps.take()

    def _may_drop(self) -> bool:
        """Whether a step may be skipped for another reason than the one that a scaler knows."""
        settings = self._settings
        may_skip = settings.skip_above is not None or (
            settings.nonfinite == "skip"
            and (
                # The clipper may have gradients that are not stepped.
                not self._hands_over
                # Whose squares may overflow where no element is infinite.
                or any(_ops.have_float64(owner.clipped) for owner in self._owners)
            )
        )
        return may_skip and self._scaler is not None

    def _clears(self, step: Step) -> bool:
        """Whether gradients are to become 0, which no factor makes of a NaN."""
        return self._settings.nonfinite == "zero" and step.is_finite is not True

    def _found_overflow(self, step: Step) -> bool | Tensor:
        """Whether a gradient that is stepped is NaN or infinite."""
        norm_type = self._settings.norm_type
        clipped = [parameter for owner in self._owners for parameter in owner.clipped]
        spared = [parameter for owner in self._owners for parameter in owner.spared]
        found = has_nonfinite(clipped, step.total, norm_type, self._caller)
        return found | has_nonfinite(spared, None, norm_type, self._caller)

    def _is_one_coefficient(self, groups: Sequence[Group]) -> bool:
        settings, scaler = self._settings, self._scaler
        groups = [group for group in groups if group.names]
        if not groups:
            return False
        rule = groups[0].rule
        if len(groups) > 1 or rule.per_parameter or isinstance(rule, AGC):
            return False
        if settings.clip_value is not None or settings.decays_late:
            return False
        # Whether they are the same as those that are stepped may differ over the ranks of a group,
        # of which all measure before their scalers unscale, or none.
        if scaler is not None and settings.process_groups:
            return False
        if scaler is not None and (settings.weight_decay > 0.0 or unscales_by_itself(scaler)):
            return False
        # Their weight decay waits until no rank can fail.
        if settings.weight_decay > 0.0 and (
            settings.process_groups or _ops.are_distributed(groups[0].parameters)
        ):
            return False
        own = [parameter for parameter in groups[0].parameters if takes_part(parameter)]
        if settings.nonfinite == "zero" and not all(parameter.is_cpu for parameter in own):
            return False
        stepped = [parameter for owner in self._owners for parameter in owner.clipped]
        return _identities(own) == _identities(stepped)


def _identities(parameters: Sequence[Tensor]) -> set[int]:
    return {id(parameter) for parameter in parameters}
