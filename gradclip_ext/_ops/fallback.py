"""The operations on lists that the native engine declined, and every error they can end with.

The native functions of ``_C`` decline a list, with nothing changed, as soon as anything in it is
out of the ordinary. It is then sorted: what is native after all (sparse values, strided views with
gaps) goes back to ``_C``, the rest to torch's operations, and the two meet in one norm. Everything
that can be wrong is found before the first gradient is written.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _arguments
from gradclip_ext._ops import dtensor, torch_ops, torch_private
from gradclip_ext._ops.gradients import (
    Caller,
    Gradients,
    overlaps_itself,
    read_each_grad,
    read_grads,
    read_tensors,
    refuse_integers,
    refuse_unwritable,
    require_storage,
    stored_values,
)
from gradclip_ext._ops.observation import observed


@torch.no_grad()
def clip_grad_norm_(
    parameters: Sequence[Any],
    max_norm: float | Tensor,
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
    dtype: torch.dtype | None,
    caller: Caller,
) -> Tensor:
    given, names = read_grads(parameters, caller)
    if not given:
        return torch.tensor(0.0, dtype=dtype)
    refuse_integers(given, names, caller.function)
    gradients = Gradients(given, names, norm_type)
    refuse_unwritable(given, names, caller.function)
    with _profiler_range(caller):
        norm, exact = _measured(gradients, norm_type, error_if_nonfinite, foreach, dtype)
        _clip(gradients, max_norm, exact, foreach)
    return norm


@torch.no_grad()
def get_total_norm(
    tensors: Sequence[Any],
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
    dtype: torch.dtype | None,
    caller: Caller,
) -> Tensor:
    given, names = read_tensors(tensors, caller)
    if not given:
        return torch.tensor(0.0, dtype=dtype)
    refuse_integers(given, names, caller.function)
    gradients = Gradients(given, names, norm_type)
    with _profiler_range(caller):
        norm, _ = _measured(gradients, norm_type, error_if_nonfinite, foreach, dtype)
    return norm


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Sequence[Any],
    max_norm: float | Tensor,
    total_norm: float | Tensor,
    foreach: bool | None,
    caller: Caller,
) -> None:
    given, names = read_grads(parameters, caller)
    if not given:
        return
    refuse_integers(given, names, caller.function)
    gradients = Gradients(given, names)
    refuse_unwritable(given, names, caller.function)
    torch_ops.require_foreach_support(gradients.in_place, foreach)
    if isinstance(total_norm, Tensor):
        norm = dtensor.whole(total_norm).detach().reshape(())
    else:
        # Named, because a default device may be set that has no number to read.
        norm = torch.tensor(total_norm, dtype=torch.float64, device="cpu")
    if gradients.native:
        # Without rounding to a 16-bit norm's dtype on the way.
        norm = norm.to(torch.float64)
    with _profiler_range(caller):
        _clip(gradients, max_norm, norm, foreach)


@torch.no_grad()
def clip_grad_value_(
    parameters: Sequence[Any], clip_value: float, foreach: bool | None, caller: Caller
) -> None:
    given, names = read_grads(parameters, caller)
    for gradient, name in zip(given, names, strict=True):
        if gradient.is_complex():
            raise NotImplementedError(
                f"{caller.function}: {name}: clamp is not supported for complex types"
            )
        if gradient.layout not in (torch.strided, torch.sparse_coo):
            raise NotImplementedError(
                f"{caller.function}: {name}: clamp is not supported for the layout "
                f"{gradient.layout}"
            )
    refuse_integers(given, names, caller.function)
    refuse_unwritable(given, names, caller.function)
    for gradient in given:
        # What an element is, is known only after the values at one place are added up.
        if gradient.layout == torch.sparse_coo and not gradient.is_coalesced():
            gradient.copy_(gradient.coalesce())
    gradients = Gradients(given, names)
    torch_ops.require_foreach_support(gradients.in_place, foreach)
    with _profiler_range(caller):
        gradients.clamp_(clip_value, foreach)


@torch.no_grad()
def grad_norms(
    parameters: Sequence[Any], norm_type: float, caller: Caller
) -> tuple[Tensor, Tensor]:
    found = read_each_grad(parameters, caller)
    given = [gradient for gradient in found if gradient is not None]
    if not given:
        zeros = torch.zeros(len(found), dtype=torch.float64)
        return zeros.sum(), zeros
    names = [
        f"{caller.entry(index)}.grad"
        for index, gradient in enumerate(found)
        if gradient is not None
    ]
    refuse_integers(given, names, caller.function)
    with _profiler_range(caller):
        # As a whole, like get_total_norm; the norms of the parts do not add up for every order.
        gradients = Gradients(given, names, norm_type)
        total = gradients.total_norm(norm_type, None, torch.float64)[0]
        nothing = torch.zeros_like(total)
        each = [
            nothing
            if gradient is None
            else _norm_of_one(gradient, caller.entry(index), norm_type).to(total.device)
            for index, gradient in enumerate(found)
        ]
        return total, torch.stack(each)


def _norm_of_one(gradient: Tensor, name: str, norm_type: float) -> Tensor:
    gradients = Gradients([gradient], [name], norm_type)
    if gradients.measured:
        return gradients.total_norm(norm_type, None, torch.float64)[0]
    # Not get_total_norm's, which is the norm of its norm: for order 0 that is 1, whatever it holds.
    return torch_ops.tensor_norm(gradients.fallback[0], norm_type)


@torch.no_grad()
def scale_(parameters: Sequence[Any], coefficient: float | Tensor, caller: Caller) -> None:
    given, names = read_grads(parameters, caller)
    if not given:
        return
    gradients = Gradients(given, names)
    refuse_unwritable(given, names, caller.function)
    if not isinstance(coefficient, Tensor):
        coefficient = torch.tensor(coefficient, dtype=torch.float64, device="cpu")
    gradients.scale_(coefficient, None)


@torch.no_grad()
def scale_each_(parameters: Sequence[Any], coefficients: Tensor, caller: Caller) -> None:
    given, names = read_grads(parameters, caller)
    refuse_unwritable(given, names, caller.function)
    for index, parameter in enumerate(parameters):
        if parameter.grad is None:
            continue
        stored = stored_values(parameter.grad)
        coefficient = coefficients[index].to(stored.device)
        wide = stored.to(torch_ops.widened_dtype(stored, torch.float64)) * coefficient
        stored.copy_(torch.where(coefficient == 0, torch.zeros_like(wide), wide))


@torch.no_grad()
def project_(parameters: Sequence[Any], max_norm: float, caller: Caller) -> Tensor:
    given, names = read_grads(parameters, caller)
    if not given:
        return torch.tensor(0.0)
    refuse_integers(given, names, caller.function)
    gradients = Gradients(given, names)
    refuse_unwritable(given, names, caller.function)
    with _profiler_range(caller):
        _, norm = gradients.total_norm(2.0, None, torch.float64)
        # As a tensor, because torch divides a number by multiplying with a rounded reciprocal.
        radius = torch.full_like(norm, max_norm)
        # A comparison, not a clamped quotient: that would be NaN for 0 / 0, and for a norm of NaN.
        coefficient = torch.where(norm > radius, radius / norm, torch.ones_like(norm))
        gradients.scale_(coefficient, None)
    # Real dtypes are left out of to_real(), which torch.compile cannot trace.
    dtype = functools.reduce(torch.promote_types, [gradient.dtype for gradient in given])
    return norm.to(dtype.to_real() if dtype.is_complex else dtype)


@torch.no_grad()
def add_weight_decay_(parameters: Sequence[Any], weight_decay: float, caller: Caller) -> None:
    given, names = read_grads(parameters, caller)
    if weight_decay == 0.0:
        return
    decayed = [parameter for parameter in parameters if parameter.grad is not None]
    refuse_integers(given, names, caller.function)
    for parameter, gradient, name in zip(decayed, given, names, strict=True):
        _refuse_to_decay(parameter, gradient, weight_decay, name, caller.function)
    refuse_unwritable(given, names, caller.function)

    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    # As keys, so that no multi-tensor operation writes the same memory from two sides at once.
    for parameter in dict.fromkeys(decayed):
        gradient = parameter.grad
        # Not a Parameter any more, which would count as a subclass below.
        weight = parameter.detach()
        kind = (gradient.device, gradient.dtype)
        if (weight.device, weight.dtype) == kind:
            gradients, weights = groups.setdefault(kind, ([], []))
            gradients.append(gradient)
            weights.append(weight)
        else:
            gradient.add_(weight.to(*kind), alpha=weight_decay)
    for (device, _), (gradients, weights) in groups.items():
        if torch_ops.use_multi_tensor([*gradients, *weights], device, None):
            torch_private.foreach_add_(gradients, weights, weight_decay)
        else:
            for gradient, weight in zip(gradients, weights, strict=True):
                gradient.add_(weight, alpha=weight_decay)


def _refuse_to_decay(
    parameter: Tensor, gradient: Tensor, weight_decay: float, name: str, function: str
) -> None:
    if gradient.layout != torch.strided:
        raise TypeError(
            f"{function}: {name}: weight_decay option is not compatible with sparse gradients, "
            f"found the layout {gradient.layout}"
        )
    if gradient.shape != parameter.shape:
        raise ValueError(
            f"{function}: {name} has to have the shape of its parameter, "
            f"{tuple(parameter.shape)}, found {tuple(gradient.shape)}"
        )
    if parameter.is_complex() and not gradient.is_complex():
        raise TypeError(
            f"{function}: {name} has to be complex like its parameter, found {gradient.dtype}"
        )
    # torch raises for such a number, but only once it comes to this gradient.
    if torch.finfo(gradient.dtype).max < weight_decay < math.inf:
        raise ValueError(
            f"{function}: weight_decay has to be a number that the dtype of {name}, "
            f"{gradient.dtype}, can hold, found {weight_decay}"
        )
    require_storage(parameter, name.removesuffix(".grad"), function)


@torch.no_grad()
def clip_units_(parameters: Sequence[Any], clip_factor: float, eps: float, caller: Caller) -> None:
    # A copy, because what computes a gradient may also change the list.
    parameters = tuple(parameters)
    found = read_each_grad(parameters, caller)
    pairs = [
        (parameter, gradient, caller.entry(index))
        for index, (parameter, gradient) in enumerate(zip(parameters, found, strict=True))
        if gradient is not None
    ]
    # All before the first is written, so that an error changes nothing.
    for _, gradient, name in pairs:
        _refuse_units(gradient, name, caller.function)
    for parameter, gradient, _ in pairs:
        torch_ops.clip_units_(parameter, gradient, clip_factor, eps)


def _refuse_units(gradient: Tensor, name: str, function: str) -> None:
    if gradient.layout != torch.strided:
        raise NotImplementedError(
            f"{function}: the gradient of {name} has to be dense, found layout {gradient.layout}"
        )
    if overlaps_itself(gradient):
        raise RuntimeError(
            f"{function}: the gradient of {name} has to have memory for each element, found shape "
            f"{tuple(gradient.shape)} with strides {gradient.stride()}; clone() it first"
        )


def _measured(
    gradients: Gradients,
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    norm, exact = gradients.total_norm(norm_type, foreach, dtype)
    if error_if_nonfinite and torch.logical_or(exact.isnan(), exact.isinf()):
        raise _arguments.nonfinite_error(norm_type, gradients.given, gradients.names)
    return norm, exact


def _clip(
    gradients: Gradients, max_norm: float | Tensor, norm: Tensor, foreach: bool | None
) -> None:
    if not isinstance(max_norm, Tensor) and max_norm == math.inf:
        gradients.bump_versions()
        return
    gradients.scale_(torch_ops.clip_coefficient(max_norm, norm), foreach)


def _profiler_range(caller: Caller) -> contextlib.AbstractContextManager[Any]:
    # The range is made of two operations, which a mode or a trace would see.
    if observed():
        return contextlib.nullcontext()
    return torch.profiler.record_function(f"gradclip_ext::{caller.function}")
