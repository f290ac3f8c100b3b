"""Clipping and the step of an optimizer in one call, so that the step can do the scaling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from gradclip_ext import _arguments, _ops
from gradclip_ext._handover import Factors, Steps, require_gradients
from gradclip_ext._measured import has_nonfinite, measure
from gradclip_ext._owners import raising_together, read_optimizers, read_owners
from gradclip_ext._scaler import Unscaling, read_scaler, refuse_closure, undone_on_error

__all__ = ["clip_and_step"]


@_ops.outside_graphs
def clip_and_step(
    optimizer: Optimizer | Sequence[Optimizer],
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    *,
    scaler: GradScaler | None = None,
    closure: Callable[[], Any] | None = None,
    skip_nonfinite: bool = False,
) -> Tensor:
    r"""Clip the gradient norm of an optimizer's parameters, and step.

    The same as :func:`gradclip_ext.clip_grad_norm_` and then ``optimizer.step()``, or
    ``scaler.unscale_(optimizer)`` before and ``scaler.step(optimizer)`` after it. But the gradients
    are only read to measure them: one of torch's fused optimizers, Adam, AdamW, SGD or Adagrad with
    ``fused=True``, multiplies them in the pass that steps. With another optimizer, or gradients
    that its kernel could not scale, they are clipped first.

    Afterwards the gradients are clipped either way. Parameters without a gradient are left out, and
    so are groups with ``"clip_grad": False``, whose gradients are stepped as they are.

    Args:
        optimizer: an optimizer, or several that are clipped by the norm of all their gradients
            together and stepped one after another.
        max_norm: as in :func:`gradclip_ext.clip_grad_norm_`.
        norm_type: as in :func:`gradclip_ext.clip_grad_norm_`.
        scaler: the ``GradScaler`` whose ``scale`` the loss was multiplied by. After an overflow in
            one of several optimizers, none of them is stepped. Call ``scaler.update()`` after it.
        closure: called first, once, with gradients enabled; it computes them. Its result is not
            used.
        skip_nonfinite: take no step when the norm is NaN or infinite, and leave the gradients as
            they are. With a scaler that is always so. On a GPU fused optimizers need no device sync
            for it, others do.

    Returns:
        The norm before clipping, without the scale, as from
        :func:`gradclip_ext.clip_grad_norm_`.

    Raises:
        AssertionError: an optimizer has no gradients for the scaler to look at, or the loss was not
            scaled, in torch's words.
        RuntimeError: a gradient cannot be written to; with a scaler, also a closure, and gradients
            that are unscaled already. Then nothing is changed.
        TypeError: an argument has the wrong type.
        ValueError: ``max_norm`` is negative or NaN, the same optimizer is listed twice, or a
            scaler is to unscale float16 gradients.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    >>> weight.grad = torch.tensor([30.0, 40.0])
    >>> clip_and_step(optimizer, max_norm=5.0)
    tensor(50.)
    >>> weight.data
    tensor([-3., -4.])
    """
    function = "clip_and_step"
    optimizers = read_optimizers(optimizer, function)
    caller = _ops.Caller(function)
    with raising_together(optimizers, norm_type, caller):
        max_norm = _arguments.max_norm(max_norm, function)
        norm_type = _arguments.norm_type(norm_type, function)
        skip_nonfinite = _arguments.yes_or_no(skip_nonfinite, function, "skip_nonfinite")
        scaler = None if scaler is None else read_scaler(scaler, function)
        if closure is not None:
            _arguments.function_without_arguments(closure, function, "closure")
            refuse_closure(scaler)
    if closure is not None:
        # Not together: the collectives of a model that it calls are what other ranks wait in.
        with torch.enable_grad():
            closure()
    with raising_together(optimizers, norm_type, caller):
        owners = read_owners(optimizers, function)
    clipped = [parameter for owner in owners for parameter in owner.clipped]
    spared = [parameter for owner in owners for parameter in owner.spared]
    with torch.no_grad(), undone_on_error(scaler, optimizers):
        with raising_together(optimizers, norm_type, caller):
            unscaling = None if scaler is None else Unscaling(scaler, optimizers)
            if unscaling is not None and unscaling.overflow is None:
                require_gradients(owners, function)
        inverse = 1.0 if unscaling is None else unscaling.inverse
        measured = measure([(clipped, inverse)], norm_type, caller)
        skips: bool | Tensor = False
        if unscaling is None:
            skips = skip_nonfinite and _ops.isfinite(measured.norm) ^ True
        elif unscaling.overflow is not None:
            skips = unscaling.overflow
        else:
            skips = has_nonfinite(clipped, measured.norm, norm_type, caller)
            skips = skips | has_nonfinite(spared, None, norm_type, caller)
            unscaling.report_overflow(skips)
        coefficient = _ops.norm_coefficient(max_norm, measured.norm)
        steps = Steps(owners, Factors(coefficient, inverse, skips), caller, scaler)
    steps.take()
    return measured.returned
