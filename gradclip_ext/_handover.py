"""Clipping without a pass of its own: the coefficient goes into the step of a fused optimizer.

torch's fused optimizers divide each gradient by ``optimizer.grad_scale`` in the pass that steps,
and do nothing where ``optimizer.found_inf`` is 1. Not every optimizer does so, and not with every
gradient; :func:`obstacles` says what is in the way. Then the gradients are scaled first.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from gradclip_ext import _ops
from gradclip_ext._ops import Scalar, torch_private
from gradclip_ext._owners import Owner, listed

__all__ = [
    "Factors",
    "Steps",
    "obstacles",
    "require_gradients",
]

_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
# Those whose fused kernels are registered for DTensors.
_FUSED_FOR_DTENSORS = (torch.optim.Adam, torch.optim.AdamW)
_GRAD_SCALE, _FOUND_INF = "grad_scale", "found_inf"
# Of a smaller one the reciprocal would not always be finite in float32 either.
_SMALLEST_FACTOR = _ops.SMALLEST_FLOAT32_COEFFICIENT
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def require_gradients(owners: Sequence[Owner], function: str) -> None:
    """Raise what ``GradScaler.step`` raises for an optimizer without gradients, before any step."""
    for index, owner in enumerate(owners):
        has_gradients = any(p.grad is not None for p in listed(owner.optimizer))
        if not has_gradients and not _is_called_with_flags(owner.optimizer):
            name = f"optimizer[{index}]" if len(owners) > 1 else "optimizer"
            raise AssertionError(
                "No inf checks were recorded for this optimizer. "
                f"{function}: {name} has to have gradients for the scaler, found none"
            )


def _is_called_with_flags(optimizer: Any) -> bool:
    """Whether a scaler calls the step after an overflow too, and the step looks at ``found_inf``.

    A wrapper may say so and then call another optimizer, which has not been told.
    """
    return torch_private.reads_flags(optimizer) and torch_private.has_torch_step(optimizer, _FUSED)


def obstacles(owners: Sequence[Owner], scaler: GradScaler | None = None) -> list[str | None]:
    """For each optimizer, why its step cannot scale its gradients; None where it can."""
    if scaler is not None and torch_private.replaces_step(scaler):
        return [f"{type(scaler).__name__}.step may replace grad_scale" for _ in owners]
    found = [_obstacle(owner.optimizer) for owner in owners]
    if len(owners) > 1 and None in found:
        # Each was looked at alone; what one scales must not be another's as well.
        shared = _ops.shared_memory([p for owner in owners for p in listed(owner.optimizer)])
        if shared is not None:
            return [reason or shared for reason in found]
    return found


def _obstacle(optimizer: Any) -> str | None:
    if not torch_private.has_torch_step(optimizer, _FUSED):
        return (
            f"{type(optimizer).__name__}.step is not that of torch's Adam, AdamW, SGD or Adagrad, "
            "and may ignore grad_scale"
        )
    for index, group in enumerate(optimizer.param_groups):
        if not group.get("fused"):
            return f"param_groups[{index}] is not fused"
    if torch_private.has_step_pre_hooks(optimizer):
        return "a step pre-hook would see gradients that are not clipped yet"
    own = _attribute(optimizer, _GRAD_SCALE)
    if own is not None and not (type(own) is Tensor and own.numel() == 1):
        return "its own grad_scale is not a tensor of one element"
    takes_dtensors = torch_private.has_torch_step(optimizer, _FUSED_FOR_DTENSORS)
    return _ops.fused_obstacle(listed(optimizer), takes_dtensors)


@dataclass(frozen=True)
class Factors:
    """What the gradients of a step are multiplied by.

    Attributes:
        coefficient: that of clipping.
        inverse: the reciprocal of a scaler's scale, 1 without one.
        skips: whether parameters and gradients stay as they are; with a scaler, after an overflow.
    """

    coefficient: Scalar
    inverse: Scalar = 1.0
    skips: bool | Tensor = False

    def for_clipped(self) -> Scalar:
        """What the gradients that are clipped are multiplied by if the step is not skipped."""
        return _ops.product(self.coefficient, self.inverse)


class Steps:
    """The steps of some optimizers, ready to be taken: what they do not multiply is multiplied.

    Args:
        owners: the optimizers, in the order in which they are stepped.
        factors: what their gradients are multiplied by.
        caller: how messages name the function.
        scaler: calls the steps; for it the gradients count as unscaled.
    """

    def __init__(
        self,
        owners: Sequence[Owner],
        factors: Factors,
        caller: _ops.Caller,
        scaler: GradScaler | None = None,
    ) -> None:
        self._owners = owners
        self._scaler = scaler
        self._values: list[dict[str, Tensor]] = [{} for _ in owners]
        factor, skips = factors.for_clipped(), factors.skips
        is_one = not isinstance(factor, Tensor) and factor == 1.0
        found: list[str | None] = ["nothing is to be handed over"] * len(owners)
        if skips is not True and (not is_one or (isinstance(skips, Tensor) and scaler is None)):
            found = obstacles(owners, scaler)
        if isinstance(skips, Tensor) and scaler is None and _has_to_read(owners, found):
            # The one device sync.
            skips = bool(skips)
        self._skips = skips
        if skips is True:
            return
        if not is_one:
            self._values = [
                _grad_scale(owner, factors, factor) if reason is None else {}
                for owner, reason in zip(owners, found, strict=True)
            ]
            _write(owners, self._values, factors, factor, skips, caller)
        if isinstance(skips, Tensor) and scaler is None:
            for owner, values in zip(owners, self._values, strict=True):
                values[_FOUND_INF] = _flag(owner.optimizer, skips)

    def take(self) -> None:
        """Take the steps, or none of them if they are known to be skipped."""
        for owner, values in zip(self._owners, self._values, strict=True):
            if self._skips is not True or self._scaler is not None:
                _step(owner, self._scaler, values, self._skips)


def _has_to_read(owners: Sequence[Owner], found: Sequence[str | None]) -> bool:
    """Whether a step without a scaler that a flag on the device skips has to be known on the host.

    Steps that do not look at the flag would be taken, and others do harm.
    """
    return any(
        reason is not None or _would_keep_uninitialized(owner.optimizer)
        for owner, reason in zip(owners, found, strict=True)
    )


def _would_keep_uninitialized(optimizer: Any) -> bool:
    """Whether a fused step that is skipped by its flag would leave memory that nothing was put in.

    That of SGD creates all momentum buffers before it looks at the flag.
    """
    if not torch_private.has_torch_step(optimizer, (torch.optim.SGD,)):
        return False
    for group in optimizer.param_groups:
        if not group.get("fused") or group["momentum"] == 0:
            continue
        stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
        state = optimizer.state
        if stepped and all(
            parameter not in state or state[parameter].get("momentum_buffer") is None
            for parameter in stepped
        ):
            return True
    return False


def _grad_scale(owner: Owner, factors: Factors, factor: Scalar) -> dict[str, Tensor]:
    """The attribute that makes a fused step multiply by the factor; empty where it cannot."""
    spares = len(owner.spared) > 0
    if spares and (isinstance(factors.coefficient, Tensor) or factors.coefficient != 1.0):
        return {}
    parameters = owner.clipped or owner.spared
    if not parameters:
        return {}
    own = _attribute(owner.optimizer, _GRAD_SCALE)
    device = parameters[0].device if own is None else own.device
    if isinstance(factor, Tensor):
        # What is too small for it has been multiplied already.
        rounded = torch.where(factor < _SMALLEST_FACTOR, 1.0, factor).float().double().to(device)
        scale: Scalar = rounded.reciprocal()
    elif factor >= _SMALLEST_FACTOR:
        # Rounded as where gradients are multiplied, so that both ways agree to one ulp.
        scale = 1.0 / ctypes.c_float(factor).value
    else:
        return {}
    if own is not None:
        scale = scale * _ops.known(own.detach().reshape(()).double())
    if not isinstance(scale, Tensor):
        if not 0.0 < scale <= _LARGEST_FLOAT32:
            return {}
        return {_GRAD_SCALE: torch.full((), scale, dtype=torch.float32, device=device)}
    return {_GRAD_SCALE: scale.float()}


def _write(
    owners: Sequence[Owner],
    handed: Sequence[dict[str, Tensor]],
    factors: Factors,
    factor: Scalar,
    skips: bool | Tensor,
    caller: _ops.Caller,
) -> None:
    """Multiply the gradients of those optimizers whose steps do not."""
    pairs = list(zip(owners, handed, strict=True))
    clipped = [p for owner, values in pairs if not values for p in owner.clipped]
    spared = [p for owner, values in pairs if not values for p in owner.spared]
    inverse = factors.inverse
    if spared and (isinstance(inverse, Tensor) or inverse != 1.0):
        # Before anything is written.
        _ops.require_writable(spared, caller)
        _ops.require_writable(clipped, caller)
        _ops.scale_(spared, _ops.select(skips, 1.0, inverse), caller)
    if clipped:
        _ops.scale_(clipped, _ops.select(skips, 1.0, factor), caller)
    in_steps = [p for owner, values in pairs if values for p in (*owner.clipped, *owner.spared)]
    if in_steps and isinstance(factor, Tensor):
        too_small = (factor < _SMALLEST_FACTOR) & (torch.as_tensor(skips) ^ True).to(factor.device)
        # On a GPU, a factor of 1 is a launch that reads and writes no gradient.
        _ops.scale_(in_steps, torch.where(too_small, factor, 1.0), caller)


def _flag(optimizer: Any, skips: Tensor) -> Tensor:
    """``found_inf`` for a step without a scaler, which the optimizer's own flag is part of."""
    flag = skips.to(torch.float32)
    own = _attribute(optimizer, _FOUND_INF)
    if isinstance(own, Tensor):
        flag = torch.maximum(flag, own.detach().reshape(()).to(flag.device, torch.float32))
    return flag


def _step(
    owner: Owner,
    scaler: GradScaler | None,
    values: dict[str, Tensor],
    skips: bool | Tensor,
) -> None:
    """Take a step, or let the scaler skip it and take note of that."""
    optimizer = owner.optimizer
    # As GradScaler.step does with an optimizer that it tells of the scale.
    deletes = scaler is not None and torch_private.reads_flags(optimizer)
    with _attributes(optimizer, values, deletes), contextlib.ExitStack() as stack:
        if scaler is None:
            optimizer.step()
            return
        looks = skips is True or _would_keep_uninitialized(optimizer)
        if isinstance(skips, Tensor) and not looks:
            # What says it looks at the flag, and may have that from what it wraps.
            looks = not (
                _is_called_with_flags(optimizer) or torch_private.declares_to_read_flags(optimizer)
            )
        # Without gradients there is no flag to look at, and nothing to step.
        if looks and any(parameter.grad is not None for parameter in listed(optimizer)):
            stack.enter_context(torch_private.looks_at_flags_itself(optimizer))
        scaler.step(optimizer)


def _attribute(optimizer: Any, name: str) -> Any:
    """What was set on this object, and not on one that it passes attributes on from."""
    return getattr(optimizer, "__dict__", {}).get(name)


@contextlib.contextmanager
def _attributes(optimizer: Any, values: dict[str, Tensor], deletes: bool) -> Iterator[None]:
    """Set attributes for a step; afterwards they are as they were found.

    Or gone after a step that ``deletes`` them: with what was found before, a later step would be
    scaled once more.
    """
    own = getattr(optimizer, "__dict__", {})
    before = {name: own[name] for name in (_GRAD_SCALE, _FOUND_INF) if name in own}
    for name, value in values.items():
        setattr(optimizer, name, value)
    try:
        yield
        if deletes:
            before = {}
    finally:
        for name in (_GRAD_SCALE, _FOUND_INF):
            own.pop(name, None)
        own.update(before)
