"""The native operations inside a graph of torch.compile, where ``_C`` cannot be called.

Like the functions of ``_C``, these take a list as a whole or return None, which here is decided
while the graph is traced. The graph then holds operators that are registered in C++
(``csrc/binding/torch_operators.cpp``): one that measures, and one that multiplies by a number in a
tensor. Torch's operations compute the coefficient in between, so that another ``max_norm`` needs no
other graph. An exported program holds torch's operations only and can be run without this package.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.torch_version import TorchVersion

# Loads the library that registers the operators.
from gradclip_ext import _C  # noqa: F401
from gradclip_ext._ops import torch_ops, torch_private
from gradclip_ext._ops.gradients import (
    NATIVE_COMPLEX_DTYPES,
    NATIVE_NORM_TYPES,
    NATIVE_REAL_DTYPES,
)
from gradclip_ext._ops.observation import compiling

__all__ = [
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "outside_graphs",
    "project_",
]

_TOTAL_NORM = torch.ops.gradclip_ext.total_norm.default
# Declared to write its first argument, and does not: a compiler drops what neither writes nor is
# used, and with it the error.
_FINITE_TOTAL_NORM_ = torch.ops.gradclip_ext.finite_total_norm_.default
_SCALE_ = torch.ops.gradclip_ext.scale_.default
_CLAMP_ = torch.ops.gradclip_ext.clamp_.default

_DEVICE_TYPES = tuple(
    name for name in ("cpu", "cuda") if torch_private.is_implemented(_SCALE_, name)
)

# In torch 2.6 Inductor loses what an operator that is not torch's own writes to a tensor which
# shares its storage with another input. Releases in between were not tried.
_MAY_WRITE_PARTS = TorchVersion(torch.__version__) >= "2.13"

# The functions that break a graph, by name, and the same once no compiler traces them.
_OUTSIDE_GRAPHS: dict[str, Callable[..., Any]] = {}
_DISABLED: dict[str, Callable[..., Any]] = {}

_P = ParamSpec("_P")
_R = TypeVar("_R")


@torch.no_grad()
def clip_grad_norm_(
    parameters: Sequence[Any],
    max_norm: float | Tensor,
    norm_type: float,
    error_if_nonfinite: bool,
    dtype: torch.dtype | None,
) -> Tensor | None:
    given, names = _grads(parameters)
    if not _are_native(given, norm_type, accept_complex=not error_if_nonfinite):
        return None
    exact = _measured(given, names, norm_type, error_if_nonfinite, dtype)
    _clip(given, max_norm, exact)
    return exact.to(dtype or torch_ops.norm_dtype(given))


@torch.no_grad()
def get_total_norm(
    tensors: Sequence[Any], norm_type: float, error_if_nonfinite: bool, dtype: torch.dtype | None
) -> Tensor | None:
    given = list(tensors)
    if not _are_native(given, norm_type, accept_complex=not error_if_nonfinite):
        return None
    names = [f"tensors[{index}]" for index in range(len(given))]
    exact = _measured(given, names, norm_type, error_if_nonfinite, dtype)
    return exact.to(dtype or torch_ops.norm_dtype(given))


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Sequence[Any], max_norm: float | Tensor, total_norm: float | Tensor
) -> int | None:
    given, _ = _grads(parameters)
    if not _are_native(given, 2.0):
        return None
    device = given[0].device
    if not isinstance(total_norm, Tensor):
        norm = _in_tensor(total_norm, device)
    elif type(total_norm) in (Tensor, Parameter):
        norm = total_norm.reshape(()).to(device, torch.float64)
    else:
        return None
    _clip(given, max_norm, norm)
    return len(given)


@torch.no_grad()
def clip_grad_value_(parameters: Sequence[Any], clip_value: float) -> int | None:
    """On the CPU. Torch makes fast kernels of its own operations on a GPU, and CUDA graphs of them.

    The bound would have to be known on the host, and no CUDA graph can hold a tensor of the CPU.
    """
    given, _ = _grads(parameters)
    if not _are_native(given, 2.0, accept_complex=False) or given[0].device.type != "cpu":
        return None
    _clamp(given, _in_tensor(clip_value, given[0].device))
    return len(given)


@torch.no_grad()
def project_(parameters: Sequence[Any], max_norm: float) -> Tensor | None:
    given, _ = _grads(parameters)
    if not _are_native(given, 2.0):
        return None
    norm = _TOTAL_NORM(given, 2.0, torch.float64)
    radius = _in_tensor(max_norm, norm.device)
    _scale(given, torch_ops.projection_coefficient(radius, norm))
    return norm.to(torch_ops.norm_dtype(given))  # type: ignore[no-any-return]


def outside_graphs(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have a compiler break its graph at a function, which then runs as it does without one."""
    name = f"{function.__module__}.{function.__qualname__}"
    _OUTSIDE_GRAPHS[name] = function

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if compiling():
            _fill_disabled()
        # Also where no compiler traces, as after a graph break, but may start to with the function.
        if _DISABLED:
            return _DISABLED[name](*args, **kwargs)  # type: ignore[no-any-return]
        return function(*args, **kwargs)

    return wrapper


@torch_private.called_while_tracing
def _fill_disabled() -> None:
    """Fill ``_DISABLED``: not before a compiler traces, since this imports the compiler."""
    for name, function in _OUTSIDE_GRAPHS.items():
        reason = (
            f"{name} decides in Python what to do, and calls the native engine by itself; "
            "gradclip_ext.clip_grad_norm_ needs no graph break"
        )
        _DISABLED.setdefault(name, torch_private.disable_compiler(function, reason))


def _grads(parameters: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """The gradients of those that have one, and the name of each in messages."""
    given, names = [], []
    for index, parameter in enumerate(parameters):
        # Anything but a tensor is left to the fallback, which raises.
        gradient = parameter.grad if isinstance(parameter, Tensor) else parameter
        if gradient is not None or not isinstance(parameter, Tensor):
            given.append(gradient)
            names.append(f"parameters[{index}].grad")
    return given, names


def _are_native(tensors: Sequence[Any], norm_type: float, accept_complex: bool = True) -> bool:
    """Whether the operators take all of these."""
    if torch_private.is_exporting() or torch_private.is_in_transform():
        return False
    if len(tensors) == 0 or norm_type not in NATIVE_NORM_TYPES:
        return False
    dtypes = NATIVE_REAL_DTYPES + NATIVE_COMPLEX_DTYPES if accept_complex else NATIVE_REAL_DTYPES
    return all(
        type(tensor) in (Tensor, Parameter)
        and tensor.layout == torch.strided
        and tensor.dtype in dtypes
        and tensor.device == tensors[0].device
        and tensor.device.type in _DEVICE_TYPES
        for tensor in tensors
    )


def _measured(
    given: list[Tensor],
    names: list[str],
    norm_type: float,
    error_if_nonfinite: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    """The norm in float64, as accurate as a result in ``dtype`` needs."""
    if norm_type != 2.0:
        # Only the L2 norm can treat a complex number as two real ones.
        given = [t.to(torch.complex128).abs() if t.is_complex() else t for t in given]
    if error_if_nonfinite:
        return _FINITE_TOTAL_NORM_(given[0], given, norm_type, dtype, names)  # type: ignore[no-any-return]
    return _TOTAL_NORM(given, norm_type, dtype)  # type: ignore[no-any-return]


def _clip(given: list[Tensor], max_norm: float | Tensor, norm: Tensor) -> None:
    if not isinstance(max_norm, Tensor):
        if max_norm == math.inf:
            return
        max_norm = _in_tensor(max_norm, norm.device)
    _scale(given, torch_ops.clip_coefficient(max_norm.to(torch.float64), norm))


def _scale(given: list[Tensor], coefficient: Tensor) -> None:
    ours, others = _split(given)
    _write(_SCALE_, ours, coefficient)
    if others:
        # One by one, since they may overlap.
        torch_ops.scale_(others, coefficient, foreach=False)


def _clamp(given: list[Tensor], bound: Tensor) -> None:
    ours, others = _split(given)
    _write(_CLAMP_, ours, bound)
    for tensor in others:
        tensor.clamp_(min=-bound, max=bound)


def _split(given: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those that Inductor can let an operator write that is not torch's own, and the others."""
    ours: list[Tensor] = []
    others: list[Tensor] = []
    for tensor in given:
        # It refuses complex tensors (torch 2.13).
        is_ours = not tensor.is_complex() and (_MAY_WRITE_PARTS or not _is_part(tensor))
        (ours if is_ours else others).append(tensor)
    return ours, others


def _write(operator: Any, tensors: list[Tensor], number: Tensor) -> None:
    """Apply an operator to all tensors, in as few calls as need no copies."""
    # Inductor copies what shares a storage with another tensor that the same call writes, and all
    # that comes before it in the storage: of DDP's buckets, many times what they hold.
    alone = [tensor for tensor in tensors if not _is_part(tensor)]
    if alone:
        operator(alone, number)
    for tensor in tensors:
        if _is_part(tensor):
            operator([tensor], number)


def _is_part(tensor: Tensor) -> bool:
    """Whether a storage holds more than this tensor, perhaps other gradients."""
    return tensor.untyped_storage().size() > tensor.numel() * tensor.element_size()


def _in_tensor(number: float, device: torch.device) -> Tensor:
    # A product, since of a number that changes it is the only operation that makes a tensor and for
    # which torch.compile does not compile another graph for each.
    return torch.ones((), dtype=torch.float64, device=device) * number
