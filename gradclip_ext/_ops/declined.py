"""Why the native engine declined a list, for those who ask: the engine gives no reasons.

Only a thread that has asked pays for an answer, and only for a list that goes to the fallback.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradclip_ext import _C
from gradclip_ext._ops.gradients import (
    NATIVE_COMPLEX_DTYPES,
    NATIVE_NORM_TYPES,
    NATIVE_REAL_DTYPES,
)
from gradclip_ext._ops.observation import compiling, observed

__all__ = ["note_gradients", "note_tensors", "start_watching", "stop_watching"]


class _Thread(threading.local):
    is_watched = False
    reason: str | None = None


_thread = _Thread()


def start_watching() -> None:
    """From now on, remember why the first list of this thread is declined."""
    _thread.is_watched = True
    _thread.reason = None


def stop_watching() -> str | None:
    """Why the first list since :func:`start_watching` was declined; None if none was."""
    _thread.is_watched = False
    return _thread.reason


def note_gradients(
    parameters: Sequence[Any], norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> None:
    """Remember why the gradients of these parameters were declined, if anybody asked."""
    # First, so that a compiler traces nothing of this.
    if compiling() or not _thread.is_watched:
        return
    tensors = [_own_gradient(parameter) for parameter in parameters]
    _note([tensor for tensor in tensors if tensor is not None], norm_type, error_if_nonfinite)


def note_tensors(
    tensors: Sequence[Any], norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> None:
    """Remember why these tensors were declined, if anybody asked."""
    if not compiling() and _thread.is_watched:
        _note(tensors, norm_type, error_if_nonfinite)


def _note(tensors: Sequence[Any], norm_type: float, error_if_nonfinite: bool) -> None:
    # An empty list is left to the fallback because there is nothing to do.
    if _thread.reason is None and tensors:
        _thread.reason = _reason(tensors, norm_type, error_if_nonfinite)


def _reason(tensors: Sequence[Any], norm_type: float, error_if_nonfinite: bool) -> str:
    """What is unusual about a list, or about the first tensor in it that is."""
    if observed():
        return "a dispatch mode, a function mode, functorch or a trace was active"
    if norm_type not in NATIVE_NORM_TYPES:
        return f"norm_type {norm_type:g}"
    for tensor in tensors:
        reason = _reason_of_one(tensor, norm_type)
        if reason is not None:
            return reason
    if len({tensor.device for tensor in tensors}) > 1:
        return "several devices"
    if error_if_nonfinite:
        return "a norm that is not finite, and an error then"
    return "a number in a tensor of another device or type, or something else"


def _reason_of_one(tensor: Any, norm_type: float) -> str | None:
    if not isinstance(tensor, Tensor):
        return f"an element of type {type(tensor).__name__}"
    if type(tensor).grad is not Tensor.grad:
        return f"gradients that {type(tensor).__name__} computes"
    if type(tensor) not in (Tensor, Parameter) and not _C.is_native(tensor):
        return f"type {type(tensor).__name__}"
    if tensor.layout != torch.strided:
        return f"layout {_short(tensor.layout)}"
    if tensor.dtype in NATIVE_COMPLEX_DTYPES and norm_type != 2.0:
        return f"dtype {_short(tensor.dtype)} with norm_type {norm_type:g}"
    if tensor.dtype not in NATIVE_REAL_DTYPES + NATIVE_COMPLEX_DTYPES:
        return f"dtype {_short(tensor.dtype)}"
    if not _C.is_native(tensor):
        if tensor.device.type != "cpu":
            return f"device {tensor.device.type}, which this build has no engine for"
        return "a forward-mode derivative, an inference tensor, or other state of autograd"
    if not _C.is_flat(tensor):
        return "strides with gaps"
    return None


def _own_gradient(parameter: Any) -> Any:
    """Its gradient; itself if that is no tensor, or if the gradient is another on each reading."""
    if not isinstance(parameter, Tensor):
        return parameter
    if type(parameter).grad is not Tensor.grad:
        return parameter
    return parameter.grad


def _short(name: object) -> str:
    return str(name).removeprefix("torch.")
