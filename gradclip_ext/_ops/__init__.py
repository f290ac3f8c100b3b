"""The operations on gradients: by the native engine, else by torch's own operations.

This is the only place that knows of both. Each operation offers its list to ``_C``, or in a graph
of a compiler to :mod:`.compiled`, which takes it as a whole or returns None with nothing changed.
What is declined goes to :mod:`.fallback`, which finds every error before the first write. The
public modules check the arguments; here they are known to have the right types.

An operation on ``parameters`` works on their ``.grad``, one on ``tensors`` on the tensors
themselves; both are lists or tuples, whose elements are checked here. ``caller`` says how messages
name the function and its list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _C
from gradclip_ext._ops import compiled, fallback, fused, gradients, sharded, sharded_units, units
from gradclip_ext._ops import weight_decay as by_hand
from gradclip_ext._ops.compiled import outside_graphs
from gradclip_ext._ops.declined import start_watching, stop_watching
from gradclip_ext._ops.dtensor import any_in as are_distributed
from gradclip_ext._ops.dtensor import is_dtensor as is_distributed
from gradclip_ext._ops.failures import raise_unread
from gradclip_ext._ops.gradients import (
    SMALLEST_FLOAT32_COEFFICIENT,
    Caller,
    are_complex,
    have_float64,
    nonfinite_error,
)
from gradclip_ext._ops.observation import compiling
from gradclip_ext._ops.process_groups import Group, ShardGroup, read_process_groups
from gradclip_ext._ops.scalars import (
    Scalar,
    clip_coefficient,
    floor,
    in_tensor,
    isfinite,
    known,
    lerp,
    minimum,
    product,
    quotient,
    select,
    smallest,
    square_root,
)
from gradclip_ext._ops.sharded import global_norms
from gradclip_ext._ops.together import raise_together, raise_together_for_units
from gradclip_ext._ops.torch_ops import NORM_EPSILON, promoted_dtype

__all__ = [
    "SMALLEST_FLOAT32_COEFFICIENT",
    "Caller",
    "Scalar",
    "ShardGroup",
    "add_weight_decay_",
    "are_complex",
    "are_distributed",
    "clip_coefficient",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "clip_units_",
    "compiling",
    "decayed_grad_norms",
    "floor",
    "fused_obstacle",
    "get_total_norm",
    "global_norms",
    "grad_norms",
    "have_float64",
    "have_native_units",
    "holds_twice",
    "in_tensor",
    "is_distributed",
    "isfinite",
    "known",
    "lerp",
    "measure",
    "minimum",
    "native_grad_norms",
    "native_grad_norms_of_each",
    "nonfinite_error",
    "norm_coefficient",
    "outside_graphs",
    "product",
    "project_",
    "quotient",
    "raise_together",
    "raise_together_for_units",
    "raise_unread",
    "read_process_groups",
    "refuse_meta",
    "require_writable",
    "scale_",
    "scale_each_",
    "select",
    "shared_memory",
    "smallest",
    "square_root",
    "start_watching",
    "stop_watching",
]

# Ranks tell one another by what they read, in Python.
_clip_over_ranks_ = outside_graphs(sharded.clip_grad_norm_)
_measure_over_ranks = outside_graphs(sharded.get_total_norm)


def clip_grad_norm_(
    parameters: Sequence[Any],
    max_norm: Scalar,
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
    dtype: torch.dtype | None,
    caller: Caller,
    groups: Sequence[Group] = (),
) -> Tensor:
    """See :func:`gradclip_ext.clip_grad_norm_`."""
    if type(max_norm) is not float:
        max_norm = _known_max_norm(max_norm)
    if not groups:
        native = compiled if compiling() else _C
        try:
            norm: Tensor | None = native.clip_grad_norm_(
                parameters, max_norm, norm_type, error_if_nonfinite, dtype
            )
        except Exception as error:
            # What a `grad` property has raised.
            raise_together(error, parameters, None, caller, norm_type)
            raise
        if norm is not None:
            return norm
    if groups or are_distributed(parameters):
        return _clip_over_ranks_(
            parameters, max_norm, norm_type, error_if_nonfinite, foreach, dtype, groups, caller
        )
    return fallback.clip_grad_norm_(
        parameters, max_norm, norm_type, error_if_nonfinite, foreach, dtype, caller
    )


def get_total_norm(
    tensors: Sequence[Any],
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
    dtype: torch.dtype | None,
    caller: Caller,
    groups: Sequence[Group] = (),
) -> Tensor:
    """See :func:`gradclip_ext.get_total_norm`."""
    if not groups:
        native = compiled if compiling() else _C
        norm: Tensor | None = native.get_total_norm(tensors, norm_type, error_if_nonfinite, dtype)
        if norm is not None:
            return norm
    if groups or are_distributed(tensors):
        return _measure_over_ranks(
            tensors, norm_type, error_if_nonfinite, foreach, dtype, groups, caller
        )
    return fallback.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach, dtype, caller)


def clip_grads_with_norm_(
    parameters: Sequence[Any],
    max_norm: Scalar,
    total_norm: Scalar,
    foreach: bool | None,
    caller: Caller,
) -> None:
    """See :func:`gradclip_ext.clip_grads_with_norm_`."""
    max_norm = _known_max_norm(max_norm)
    total_norm = known(total_norm)
    native = compiled if compiling() else _C
    if native.clip_grads_with_norm_(parameters, max_norm, total_norm) is None:
        fallback.clip_grads_with_norm_(parameters, max_norm, total_norm, foreach, caller)


def clip_grad_value_(
    parameters: Sequence[Any], clip_value: float, foreach: bool | None, caller: Caller
) -> None:
    """See :func:`gradclip_ext.clip_grad_value_`."""
    native = compiled if compiling() else _C
    if native.clip_grad_value_(parameters, clip_value) is None:
        fallback.clip_grad_value_(parameters, clip_value, foreach, caller)


def grad_norms(
    parameters: Sequence[Any],
    norm_type: float,
    dtype: torch.dtype | None,
    caller: Caller,
    weight_decay: float = 0.0,
    groups: Sequence[Group] = (),
) -> tuple[Tensor, Tensor]:
    """The norm of all gradients and of each: 0-dim and 1-D, float64, on the first one's device.

    The second has an entry for each parameter, 0 where it has no gradient. With ``weight_decay``,
    that multiple of its parameter is added to each gradient first, in the same pass if native.
    ``dtype`` is what the caller rounds the norms to, None for that of the gradients; they are
    measured only as accurately as it requires.
    """
    if groups:
        return sharded.grad_norms(parameters, norm_type, dtype, groups, caller)
    try:
        norms = native_grad_norms(parameters, norm_type, dtype, weight_decay)
    except Exception as error:
        raise_together(error, parameters, None, caller, norm_type, [len(parameters)])
        raise
    if norms is None and are_distributed(parameters) and weight_decay == 0.0:
        return sharded.grad_norms(parameters, norm_type, dtype, groups, caller)
    if norms is None and weight_decay > 0.0:
        add_weight_decay_(parameters, weight_decay, Caller("add_weight_decay_"))
        norms = native_grad_norms(parameters, norm_type, dtype)
    return norms or fallback.grad_norms(parameters, norm_type, caller)


def native_grad_norms(
    parameters: Sequence[Any],
    norm_type: float,
    dtype: torch.dtype | None,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor] | None:
    """As :func:`grad_norms`; None, with nothing changed, unless the whole list is native."""
    # The native engine does not look whether every dtype can hold the factor.
    if compiling() or weight_decay > by_hand.LARGEST_NATIVE_FACTOR:
        return None
    return _C.grad_norms(parameters, norm_type, dtype, weight_decay)


def native_grad_norms_of_each(
    parameters: Sequence[Any], norm_type: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor] | None:
    """As :func:`native_grad_norms`; None also where a parameter is listed more than once."""
    if compiling() or _C.holds_twice(parameters):
        return None
    return _C.grad_norms(parameters, norm_type, dtype, 0.0)


def measure(
    parameters: Sequence[Any], norm_type: float, caller: Caller
) -> tuple[Tensor, torch.dtype]:
    """The norm of all gradients, 0-dim and float64, and the dtype that it is to be returned in.

    It is measured as accurately as that dtype requires. 0 in float32 if there is no gradient.
    """
    try:
        norms = native_grad_norms(parameters, norm_type, None)
    except Exception as error:
        raise_together(error, parameters, None, caller, norm_type)
        raise
    if norms is None:
        if are_distributed(parameters):
            return sharded.measured(parameters, norm_type, caller)
        return fallback.measure(parameters, norm_type, caller)
    gradients = [parameter.grad for parameter in parameters]
    dtypes = {gradient.dtype for gradient in gradients if gradient is not None}
    return norms[0], promoted_dtype(dtypes) if dtypes else torch.float32


def norm_coefficient(max_norm: Scalar, norm: Scalar) -> Scalar:
    """What :func:`clip_grad_norm_` multiplies by, in float64; see there."""
    max_norm = _known_max_norm(max_norm)
    if isinstance(max_norm, Tensor):
        checked = torch.where(max_norm >= 0.0, max_norm, math.nan)
        max_norm = known(checked.detach().reshape(()).to(torch.float64))
    return clip_coefficient(max_norm, norm, NORM_EPSILON)


def fused_obstacle(parameters: Sequence[Any], takes_dtensors: bool) -> str | None:
    """Why a fused step could not scale the gradients of these parameters; None if it can."""
    return fused.obstacle(parameters, takes_dtensors)


def shared_memory(parameters: Sequence[Any]) -> str | None:
    """Which two of the parameters and their gradients share memory; None if none do."""
    return fused.shared_memory(parameters)


def scale_(parameters: Sequence[Any], coefficient: Scalar, caller: Caller) -> None:
    """Multiply every gradient by a number, or by a 0-dim tensor without a device sync."""
    done = not compiling() and _C.scale_(parameters, coefficient) is not None
    if not done and are_distributed(parameters):
        done = sharded.scale_native_(parameters, coefficient, caller)
    if not done:
        fallback.scale_(parameters, coefficient, caller)


def scale_each_(parameters: Sequence[Any], coefficients: Tensor, caller: Caller) -> None:
    """Multiply each gradient by its own entry of a 1-D float64 tensor.

    1 leaves it unchanged, 0 clears it, non-finite elements included.
    """
    if compiling() or _C.scale_each_(parameters, coefficients) is None:
        fallback.scale_each_(parameters, coefficients, caller)


def add_weight_decay_(
    parameters: Sequence[Any],
    weight_decay: float,
    caller: Caller,
    condition: bool | Tensor = True,
) -> None:
    """See :func:`gradclip_ext.add_weight_decay_`; nothing where the condition does not hold."""
    if isinstance(condition, Tensor):
        by_hand.add_weight_decay_where_(parameters, weight_decay, condition, caller)
    elif condition and not _added_natively(parameters, weight_decay):
        by_hand.add_weight_decay_(parameters, weight_decay, caller)


def _added_natively(parameters: Sequence[Any], weight_decay: float) -> bool:
    # The native engine does not look whether every dtype can hold the factor.
    if compiling() or not 0.0 < weight_decay <= by_hand.LARGEST_NATIVE_FACTOR:
        return False
    return _C.add_weight_decay_(parameters, weight_decay) is not None


def decayed_grad_norms(
    parameters: Sequence[Any], norm_type: float, weight_decay: float, caller: Caller
) -> tuple[Tensor, Tensor]:
    """What :func:`grad_norms` would measure after the weight decay, with nothing written yet.

    It takes a copy of one gradient at a time, or of all where they share a storage.
    """

    def norm_of(gradient: Tensor) -> Tensor:
        return gradients.norm_of_one(gradient, "gradient", norm_type)

    norms = by_hand.decayed_grad_norms(parameters, norm_type, weight_decay, caller, norm_of)
    return norms or fallback.grad_norms(parameters, norm_type, caller)


def project_(parameters: Sequence[Any], max_norm: float, caller: Caller) -> Tensor:
    """Project the gradients onto the ball of radius ``max_norm``; see ``grad_clipping``."""
    if are_distributed(parameters):
        return sharded.project_(parameters, max_norm, caller)
    norm = compiled.project_(parameters, max_norm) if compiling() else None
    return fallback.project_(parameters, max_norm, caller) if norm is None else norm


def clip_units_(
    parameters: Sequence[Any], clip_factor: float, eps: float, caller: Caller
) -> Tensor | None:
    """See :func:`gradclip_ext.adaptive_clip_grad_`; gives the smallest coefficient."""
    if not compiling():
        smallest = _C.clip_units_(parameters, clip_factor, eps)
        if smallest is not None:
            return smallest
    if are_distributed(parameters):
        return sharded_units.clip_units_(parameters, clip_factor, eps, caller)
    return units.clip_units_(parameters, clip_factor, eps, caller)


def have_native_units(parameters: Sequence[Any]) -> bool:
    """Whether :func:`clip_units_` can refuse none of the gradients."""
    return not compiling() and _C.have_clippable_units(parameters)


def require_writable(
    parameters: Sequence[Any],
    caller: Caller,
    *,
    weight_decay: float = 0.0,
    clip_value: float | None = None,
    by_units: bool = False,
) -> None:
    """Raise what one of these operations would raise, before any of them writes."""
    fallback.require_writable(parameters, clip_value, caller)
    by_hand.require_decayable(parameters, weight_decay, caller)
    if by_units:
        units.require_units(parameters, caller)


def refuse_meta(groups: Sequence[Sequence[Any]], names: Sequence[str]) -> None:
    """Raise if a gradient of the groups is on the meta device, where there is nothing to clip."""
    listed = [parameter for group in groups for parameter in group]
    given, own = gradients.read_grads(listed, Caller("GradClipper", names=tuple(names)))
    gradients.refuse_meta(given, own, "GradClipper")


def holds_twice(parameters: Sequence[Any]) -> bool:
    """Whether an object is listed more than once."""
    return _C.holds_twice(parameters)


def _known_max_norm(max_norm: Scalar) -> Scalar:
    """As :func:`known`; a negative number in a tensor counts as NaN, as it does on a GPU."""
    number = known(max_norm)
    return math.nan if type(number) is float and number < 0.0 else number
