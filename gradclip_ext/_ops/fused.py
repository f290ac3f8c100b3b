"""Gradients that one of torch's fused optimizers can scale in the pass of its own step.

Its kernels walk parameters, gradients and state side by side through memory, whatever the strides,
and divide by a float32. So a gradient has to lie in memory exactly as its parameter does: one in
another order would be stepped wrongly, and of one with gaps memory behind it would be written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradclip_ext import _C
from gradclip_ext._ops import dtensor, memory
from gradclip_ext._ops.observation import compiling

__all__ = ["obstacle", "shared_memory"]

_TYPES = (Tensor, Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def obstacle(parameters: Sequence[Any], takes_dtensors: bool) -> str | None:
    """Why a fused step could not scale the gradients of these parameters; None if it can.

    ``parameters`` are all that are going to be stepped, as often as they are listed; those without
    a gradient may be among them. ``takes_dtensors`` is whether the kernel works on DTensors.
    """
    if compiling():
        return "a compiler is tracing"
    if _C.fit_fused_step(parameters) and _are_of_plain_types(parameters):
        return None
    # The native function gives no reasons, and takes neither DTensors nor several devices.
    for index, parameter in enumerate(parameters):
        gradient = parameter.grad
        if gradient is None:
            continue
        if takes_dtensors:
            parameter, gradient = _local(parameter, gradient)
        reason = _obstacle_of_one(parameter, gradient)
        if reason is not None:
            return f"the gradient of parameters[{index}] {reason}"
    return shared_memory(parameters)


@torch.no_grad()
def shared_memory(parameters: Sequence[Any]) -> str | None:
    """Which two of the parameters and their gradients share memory; None if none do."""
    if _C.fit_fused_step(parameters):
        return None
    tensors: list[Tensor] = []
    names: list[str] = []
    for index, parameter in enumerate(parameters):
        gradient = parameter.grad
        if gradient is None:
            continue
        name = f"parameters[{index}]"
        tensors += reversed(_local(parameter, gradient))
        names += [f"the gradient of {name}", name]
    shared = memory.first_shared(tensors)
    return None if shared is None else f"{names[shared[1]]} shares memory with {names[shared[0]]}"


def _local(parameter: Any, gradient: Any) -> tuple[Tensor, Tensor]:
    """What this rank holds of DTensors; others are returned as they are."""
    if dtensor.are_placed_alike(parameter, gradient):
        return dtensor.local(parameter), dtensor.local(gradient)
    return parameter, gradient


def _obstacle_of_one(parameter: Tensor, gradient: Tensor) -> str | None:
    if not (_is_plain(gradient) and _is_plain(parameter)):
        return (
            "is not a plain, dense tensor like its parameter, "
            f"but a {type(gradient).__name__} of layout {gradient.layout}"
        )
    if gradient.dtype not in _DTYPES:
        return f"is {gradient.dtype}, which a float32 would scale too coarsely"
    if gradient.dtype != parameter.dtype or gradient.device != parameter.device:
        return (
            f"is {gradient.dtype} on {gradient.device}, its parameter {parameter.dtype} "
            f"on {parameter.device}"
        )
    if not (_C.is_flat(gradient) and _lie_alike(parameter, gradient)):
        return (
            f"has shape {tuple(gradient.shape)} and strides {gradient.stride()}, its parameter "
            f"{tuple(parameter.shape)} and {parameter.stride()}"
        )
    return None


def _are_of_plain_types(parameters: Sequence[Any]) -> bool:
    """Whether no class of its own can make something else of the step's operation."""
    types = {type(parameter) for parameter in parameters}
    types |= {type(parameter.grad) for parameter in parameters}
    return types <= {*_TYPES, type(None)}


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in _TYPES
        and _C.is_native(tensor)
        and not tensor.is_neg()
        and not tensor.is_conj()
    )


def _lie_alike(parameter: Tensor, gradient: Tensor) -> bool:
    """Whether the elements lie in the same order, in which dimensions of size 1 have no say."""
    if gradient.shape != parameter.shape:
        return False
    sizes_and_strides = zip(gradient.shape, gradient.stride(), parameter.stride(), strict=True)
    return all(size == 1 or one == other for size, one, other in sizes_and_strides)
