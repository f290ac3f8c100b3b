"""What a ``GradScaler`` is told: that gradients are unscaled, and whether one is not finite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from gradclip_ext import _arguments, _ops
from gradclip_ext._ops import Caller, Scalar, torch_private

__all__ = [
    "Unscaling",
    "read_scaler",
    "refuse_closure",
    "report_overflow",
    "require_unscalable",
    "undone_on_error",
    "unscale",
    "unscales_by_itself",
]


def read_scaler(scaler: Any, function: str) -> GradScaler | None:
    """The scaler, or None for one that is disabled and so does nothing.

    Raises:
        TypeError: it is no scaler.
    """
    if isinstance(scaler, GradScaler):
        return scaler if scaler.is_enabled() else None
    remedy = ""
    if isinstance(scaler, torch.optim.Optimizer):
        remedy = "; the scaler comes before the optimizer"
    raise TypeError(
        f"{function}: scaler has to be a torch.amp.GradScaler, "
        f"found {_arguments.describe(scaler)}{remedy}"
    )


def unscales_by_itself(scaler: GradScaler) -> bool:
    """Whether the class or the object has another way to unscale, which is not to be bypassed."""
    return torch_private.replaces_unscaling(scaler)


def refuse_closure(scaler: GradScaler | None) -> None:
    """Raise what torch raises for a closure in a step that an enabled scaler takes."""
    if scaler is not None:
        raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")


def require_unscalable(
    scaler: GradScaler, optimizers: Sequence[Any], parameters: Sequence[Tensor], caller: Caller
) -> None:
    """Raise what the scaler's own pass over several optimizers would raise halfway through."""
    if unscales_by_itself(scaler):
        return
    Unscaling(scaler, optimizers, rehearses=True)
    _ops.require_writable(parameters, caller)


def unscale(scaler: GradScaler, optimizers: Sequence[Any]) -> bool | Tensor:
    """Let the scaler unscale the gradients itself; returns whether one was NaN or infinite.

    An overflow in one optimizer skips the steps of all, whose gradients share a norm.
    """
    flags = []
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        flags += torch_private.found_inf_flags(scaler, optimizer)
    if not flags:
        return False
    largest = torch.stack([flag.reshape(()).to(flags[0].device) for flag in flags]).max()
    if len(flags) > 1:
        for flag in flags:
            flag.copy_(largest)
    found = _ops.known(largest.to(torch.float64))
    return found != 0.0


class Unscaling:
    """Makes a scaler take the gradients of some optimizers to be unscaled from here on.

    Torch's own ``unscale_`` makes the checks and keeps the records; only its pass over the
    gradients is left out, because ours does its work. A scaler with another way to unscale does it
    all by itself.

    Attributes:
        inverse: what the gradients have yet to be multiplied by: the reciprocal of the scale as
            torch rounds it, 1 if they have been.
        overflow: whether the scaler, which has unscaled them itself, has found NaN or infinity;
            None if it is for us to look.

    Args:
        rehearses: only raise what torch raises; the scaler takes no note of it.
    """

    def __init__(
        self, scaler: GradScaler, optimizers: Sequence[Any], rehearses: bool = False
    ) -> None:
        self.inverse: Scalar = 1.0
        self.overflow: bool | Tensor | None = None
        self._scaler = scaler
        self._flags: list[Tensor] = []
        if unscales_by_itself(scaler):
            self.overflow = unscale(scaler, optimizers)
            return
        for optimizer in optimizers:
            torch_private.unscale_with(scaler, optimizer, self._unscale_grads, rehearses)

    def _unscale_grads(
        self, optimizer: Any, inverse: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """Stands in for the scaler's pass, and touches no gradient."""
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if not allow_fp16 and any(gradient.dtype == torch.float16 for gradient in gradients):
            torch_private.refuse_float16(self._scaler, optimizer, inverse, found_inf)
        self.inverse = _ops.known(inverse.to(torch.float64))
        if not gradients:
            return {}
        self._flags.append(found_inf)
        # A single flag for all devices: fused optimizers skip a step when their sum is exactly 1.
        return {found_inf.device: found_inf}

    def report_overflow(self, found: bool | Tensor) -> None:
        """Tell the scaler, for every optimizer, whether a gradient is NaN or infinite."""
        _raise_flags(self._flags, found)


def report_overflow(scaler: GradScaler, optimizers: Sequence[Any], found: bool | Tensor) -> None:
    """The same, of gradients that it has unscaled itself."""
    for optimizer in optimizers:
        _raise_flags(torch_private.found_inf_flags(scaler, optimizer), found)


def _raise_flags(flags: Sequence[Tensor], found: bool | Tensor) -> None:
    for flag in flags:
        if isinstance(found, Tensor):
            flag.fill_(found.to(flag.device))
        elif found:
            flag.fill_(1.0)


@contextlib.contextmanager
def undone_on_error(scaler: GradScaler | None, optimizers: Sequence[Any]) -> Iterator[None]:
    """After an error the scaler knows of the optimizers what it knew before.

    Not if it has unscaled their gradients by itself, which cannot be undone.
    """
    if scaler is None or unscales_by_itself(scaler):
        yield
        return
    with torch_private.unscaling_undone_on_error(scaler, optimizers):
        yield
