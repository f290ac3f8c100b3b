"""Unscaling and clipping in one pass, for training with a ``GradScaler``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from gradclip_ext import _arguments, _ops
from gradclip_ext._measured import has_nonfinite, measure
from gradclip_ext._owners import raising_together, read_optimizers, read_owners, takes_part
from gradclip_ext._scaler import Unscaling, read_scaler, undone_on_error

__all__ = ["unscale_and_clip_grad_norm_"]


@_ops.outside_graphs
def unscale_and_clip_grad_norm_(
    scaler: GradScaler,
    optimizer: Optimizer | Sequence[Optimizer],
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    *,
    parameters: Tensor | Iterable[Tensor] | None = None,
) -> Tensor:
    r"""Unscale the gradients of an optimizer and clip their norm.

    The same as ``scaler.unscale_(optimizer)`` and then
    :func:`gradclip_ext.clip_grad_norm_`, in two passes instead of four: one measures the scaled
    gradients and finds infinities and NaN, the other multiplies by coefficient and reciprocal of
    the scale together. After an overflow nothing is written.

    Afterwards the scaler stands as after ``unscale_``: ``scaler.step(optimizer)`` and
    ``scaler.update()`` follow as ever, and a second call before ``update()`` is refused. A scaler
    whose class or object has an ``unscale_`` of its own, such as ``ShardedGradScaler``, unscales by
    itself; then the gradients are clipped.

    Args:
        scaler: the ``GradScaler`` whose ``scale`` the loss was multiplied by. One that is disabled
            leaves clipping alone.
        optimizer: the optimizer whose gradients are unscaled, or several that are clipped by the
            norm of all their gradients together. After an overflow in one of these, none of them is
            stepped.
        max_norm: as in :func:`gradclip_ext.clip_grad_norm_`.
        norm_type: as in :func:`gradclip_ext.clip_grad_norm_`.
        parameters: what to clip, each of them once; by default the parameters of the optimizer but
            for groups with ``"clip_grad": False``. Others of the optimizer are unscaled only; those
            that it does not have are taken to be unscaled, and clipped only.

    Returns:
        The norm before clipping, without the scale, as from
        :func:`gradclip_ext.clip_grad_norm_`. NaN or infinity after an overflow.

    Raises:
        AssertionError: the loss was not scaled.
        RuntimeError: the gradients are unscaled already, or one cannot be written to. Then nothing
            is changed.
        TypeError: an argument or an element of ``parameters`` has the wrong type.
        ValueError: a gradient of the optimizer is float16, or ``max_norm`` is negative or NaN.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    >>> scaler.scale(weight @ torch.tensor([30.0, 40.0])).backward()
    >>> unscale_and_clip_grad_norm_(scaler, optimizer, max_norm=5.0)
    tensor(50.)
    >>> weight.grad
    tensor([3., 4.])
    >>> scaler.step(optimizer)
    >>> scaler.update()
    """
    function = "unscale_and_clip_grad_norm_"
    if isinstance(optimizer, GradScaler):
        # Where both are in each other's place, the error is that of the first.
        read_scaler(scaler, function)
    optimizers = read_optimizers(optimizer, function)
    caller = _ops.Caller(function)
    with raising_together(optimizers, norm_type, caller):
        known_scaler = read_scaler(scaler, function)
        max_norm = _arguments.max_norm(max_norm, function)
        norm_type = _arguments.norm_type(norm_type, function)
        owners = read_owners(optimizers, function)
        clipped = [parameter for owner in owners for parameter in owner.clipped]
        spared = [parameter for owner in owners for parameter in owner.spared]
        others: list[Tensor] = []
        if parameters is not None:
            given = _arguments.tensor_list(parameters, function, "parameters")
            clipped, spared, others = _divide(given, [*clipped, *spared], function)
    with torch.no_grad(), undone_on_error(known_scaler, optimizers):
        with raising_together(optimizers, norm_type, caller):
            unscaling = None if known_scaler is None else Unscaling(known_scaler, optimizers)
        inverse = 1.0 if unscaling is None else unscaling.inverse
        measured = measure([(clipped, inverse), (others, 1.0)], norm_type, caller)
        skips: bool | Tensor = False
        if unscaling is not None and unscaling.overflow is not None:
            skips = unscaling.overflow
        elif unscaling is not None:
            alone = None if others else measured.norm
            skips = has_nonfinite(clipped, alone, norm_type, caller)
            for part in (spared, others):
                skips = skips | has_nonfinite(part, None, norm_type, caller)
            unscaling.report_overflow(skips)
        if skips is not True:
            coefficient = _ops.norm_coefficient(max_norm, measured.norm)
            factors = (_ops.product(coefficient, inverse), inverse, coefficient)
            parts = list(zip((clipped, spared, others), factors, strict=True))
            _scale(parts, skips, caller)
    return measured.returned


def _divide(
    given: Sequence[Tensor], owned: Sequence[Tensor], function: str
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The owned parameters that are given and those that are not, and those that are only given."""
    wanted: dict[int, Tensor] = {}
    for index, parameter in enumerate(given):
        if not isinstance(parameter, Tensor):
            raise _arguments.item_error(parameter, function, "parameters", index)
        if takes_part(parameter):
            wanted[id(parameter)] = parameter
    own = {id(parameter) for parameter in owned}
    return (
        [parameter for key, parameter in wanted.items() if key in own],
        [parameter for parameter in owned if id(parameter) not in wanted],
        [parameter for key, parameter in wanted.items() if key not in own],
    )


def _scale(
    parts: Sequence[tuple[Sequence[Tensor], _ops.Scalar]],
    skips: bool | Tensor,
    caller: _ops.Caller,
) -> None:
    """Multiply the gradients of each list by a number of its own, unless the step is skipped."""
    written = [
        (parameters, factor)
        for parameters, factor in parts
        if parameters and (isinstance(factor, Tensor) or factor != 1.0)
    ]
    if len(written) > 1:
        # Before the first one is written.
        for parameters, _ in written:
            _ops.require_writable(parameters, caller)
    for parameters, factor in written:
        _ops.scale_(parameters, _ops.select(skips, 1.0, factor), caller)
