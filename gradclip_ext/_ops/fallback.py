"""The operations on lists that the native engine declined, and every error they can raise.

The native functions of ``_C`` decline a list, with nothing changed, as soon as anything in it is
unusual. It is then sorted: what is native after all (sparse values, strided views with gaps) goes
back to ``_C``, the rest to torch's operations, and both are combined into one norm. Every error is
found before the first gradient is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip_ext._ops import declined, dtensor, torch_ops
from gradclip_ext._ops.gradients import (
    Caller,
    Gradients,
    nonfinite_error,
    norm_of_one,
    read_each_grad,
    read_grads,
    read_tensors,
    refuse_integers,
    refuse_unwritable,
    stored_values,
)
from gradclip_ext._ops.observation import profiler_range


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
    declined.note_gradients(parameters, norm_type, error_if_nonfinite)
    gradients = _writable(parameters, caller, foreach, norm_type)
    if not gradients.given:
        return torch.tensor(0.0, dtype=dtype)
    with profiler_range(caller.function):
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
    declined.note_tensors(tensors, norm_type, error_if_nonfinite)
    given, names = read_tensors(tensors, caller)
    if not given:
        return torch.tensor(0.0, dtype=dtype)
    refuse_integers(given, names, caller.function)
    gradients = Gradients(given, names, norm_type)
    with profiler_range(caller.function):
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
    declined.note_gradients(parameters)
    gradients = _writable(parameters, caller, foreach)
    if not gradients.given:
        return
    if isinstance(total_norm, Tensor):
        norm = dtensor.whole(total_norm).detach().reshape(())
    else:
        # The device is explicit, because a default device such as meta has no number to read.
        norm = torch.tensor(total_norm, dtype=torch.float64, device="cpu")
    if gradients.measured:
        # So that nothing is rounded to the norm's own dtype in between.
        norm = norm.to(torch.float64)
    with profiler_range(caller.function):
        _clip(gradients, max_norm, norm, foreach)


@torch.no_grad()
def clip_grad_value_(
    parameters: Sequence[Any], clip_value: float, foreach: bool | None, caller: Caller
) -> None:
    declined.note_gradients(parameters)
    given, names = read_grads(parameters, caller)
    gradients = _clampable(given, names, clip_value, foreach, caller)
    if any(gradient.layout == torch.sparse_coo for gradient in given):
        for gradient in given:
            # The value of an element is known only once the entries at its index are summed.
            if gradient.layout == torch.sparse_coo and not gradient.is_coalesced():
                gradient.copy_(gradient.coalesce())
        gradients = Gradients(given, names)
    with profiler_range(caller.function):
        gradients.clamp_(clip_value, foreach)


@torch.no_grad()
def grad_norms(
    parameters: Sequence[Any], norm_type: float, caller: Caller
) -> tuple[Tensor, Tensor]:
    found = read_each_grad(parameters, caller)
    given = [gradient for gradient in found if gradient is not None]
    if not given:
        # Where the parameters are, unless nothing is stored there.
        device = parameters[0].device if len(parameters) > 0 else torch.device("cpu")
        device = torch.device("cpu") if device.type == "meta" else device
        zeros = torch.zeros(len(found), dtype=torch.float64, device=device)
        return torch.zeros((), dtype=torch.float64, device=device), zeros
    names = [
        f"{caller.entry(index)}.grad"
        for index, gradient in enumerate(found)
        if gradient is not None
    ]
    refuse_integers(given, names, caller.function)
    with profiler_range(caller.function):
        # As a whole, like get_total_norm: norms of parts do not combine for every norm_type.
        gradients = Gradients(given, names, norm_type)
        total = dtensor.whole(gradients.total_norm(norm_type, None, torch.float64)[0])
        nothing = torch.zeros_like(total)
        each = [
            nothing
            if gradient is None
            else norm_of_one(gradient, caller.entry(index), norm_type).to(total.device)
            for index, gradient in enumerate(found)
        ]
        return total, torch.stack(each)


@torch.no_grad()
def measure(
    parameters: Sequence[Any], norm_type: float, caller: Caller
) -> tuple[Tensor, torch.dtype]:
    given, names = read_grads(parameters, caller)
    if not given:
        return torch.zeros((), dtype=torch.float64, device="cpu"), torch.float32
    refuse_integers(given, names, caller.function)
    with profiler_range(caller.function):
        norm, _ = Gradients(given, names, norm_type).total_norm(norm_type, None, torch.float64)
    return dtensor.whole(norm), torch_ops.norm_dtype(given)


@torch.no_grad()
def scale_(parameters: Sequence[Any], coefficient: float | Tensor, caller: Caller) -> None:
    gradients = _writable(parameters, caller, None)
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
    Gradients(given, names).bump_versions()


@torch.no_grad()
def project_(parameters: Sequence[Any], max_norm: float, caller: Caller) -> Tensor:
    gradients = _writable(parameters, caller, None)
    given = gradients.given
    if not given:
        return torch.tensor(0.0)
    with profiler_range(caller.function):
        _, norm = gradients.total_norm(2.0, None, torch.float64)
        radius = torch.full_like(norm, max_norm)
        coefficient = torch_ops.projection_coefficient(radius, norm)
        gradients.scale_(coefficient, None)
    return norm.to(torch_ops.norm_dtype(given))


@torch.no_grad()
def require_writable(parameters: Sequence[Any], clip_value: float | None, caller: Caller) -> None:
    """Raise what scaling, and limiting elements if ``clip_value`` is given, would raise."""
    gradients = _writable(parameters, caller, None)
    if clip_value is not None:
        _clampable(gradients.given, gradients.names, clip_value, None, caller)


def _writable(
    parameters: Sequence[Any], caller: Caller, foreach: bool | None, norm_type: float = 2.0
) -> Gradients:
    """The gradients of a list, once it is clear that all of them can be scaled."""
    given, names = read_grads(parameters, caller)
    refuse_integers(given, names, caller.function)
    gradients = Gradients(given, names, norm_type)
    refuse_unwritable(given, names, caller.function)
    torch_ops.require_foreach_support(gradients.in_place, foreach)
    gradients.require_scalable(foreach)
    return gradients


def _clampable(
    given: list[Tensor],
    names: list[str],
    clip_value: float,
    foreach: bool | None,
    caller: Caller,
) -> Gradients:
    """The same for limiting the elements."""
    for gradient, name in zip(given, names, strict=True):
        if dtensor.is_partial(gradient):
            raise NotImplementedError(
                f"{caller.function}: {name} has to be added up over its ranks before its elements "
                f"can be limited, found the placements {dtensor.placements(gradient)}"
            )
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
    gradients = Gradients(given, names)
    torch_ops.require_foreach_support(gradients.in_place, foreach)
    gradients.require_clampable(clip_value, foreach)
    return gradients


def _measured(
    gradients: Gradients,
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    norm, exact = gradients.total_norm(norm_type, foreach, dtype)
    if error_if_nonfinite and torch.logical_or(exact.isnan(), exact.isinf()):
        raise nonfinite_error(norm_type, gradients.given, gradients.names)
    return norm, exact


def _clip(
    gradients: Gradients, max_norm: float | Tensor, norm: Tensor, foreach: bool | None
) -> None:
    if not isinstance(max_norm, Tensor) and max_norm == math.inf:
        gradients.bump_versions()
        return
    gradients.scale_(torch_ops.clip_coefficient(max_norm, norm), foreach)
