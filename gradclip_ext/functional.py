"""Drop-in replacements for the gradient clipping functions of :mod:`torch.nn.utils`.

Same names, positional order, defaults, warnings and error texts; what is added is keyword-only.
Each function checks its arguments here and leaves the work to :mod:`gradclip_ext._ops`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _arguments, _ops

__all__ = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]

_CLIP_GRAD_NORM_ = _ops.Caller("clip_grad_norm_")
_GET_TOTAL_NORM = _ops.Caller("get_total_norm", "tensors")
_CLIP_GRADS_WITH_NORM_ = _ops.Caller("clip_grads_with_norm_")
_CLIP_GRAD_VALUE_ = _ops.Caller("clip_grad_value_")


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    dtype: torch.dtype | None = None,
    process_groups: Any = None,
) -> Tensor:
    r"""Clip the gradient norm of an iterable of parameters.

    Drop-in for :func:`torch.nn.utils.clip_grad_norm_`. The norm is taken over all gradients
    together, as if they were concatenated into one vector, and the gradients are scaled in place
    by

    .. math:: \min\left(1, \frac{\text{max\_norm}}{\text{norm} + 10^{-6}}\right)

    computed in float64 from the unrounded norm. When that is 1 no gradient is written.
    Gradients of any shape, dtype and memory layout may be mixed. The method is that of Pascanu,
    Mikolov and Bengio, "On the difficulty of training recurrent neural networks" (2013).

    Args:
        parameters: the tensors whose ``.grad`` is clipped, or a single one. Those without a
            gradient are skipped.
        max_norm: largest norm the gradients may keep, not negative. With ``inf`` the norm is only
            measured. A one-element tensor is not checked: negative or NaN there makes the
            gradients NaN.
        norm_type: type of the p-norm: ``2.0``, ``1.0``, ``inf`` (also as ``'inf'``), or any other
            number.
        error_if_nonfinite: raise, with every gradient unchanged, when the norm is NaN or infinite.
        foreach: accepted for compatibility; chooses between torch's operations for the tensors
            that take the fallback.
        dtype: ``torch.float32`` or ``torch.float64`` for a result that is not rounded to the
            gradients' own dtype.
        process_groups: groups over whose ranks gradients that are no DTensors are split: a
            ``ProcessGroup``, a 1-D ``DeviceMesh``, a :class:`gradclip_ext.ShardGroup`, or a
            sequence of these in the same order on all ranks. The norm is over all of them; a rank
            without parameters takes part with an empty list.

    DTensors may be distributed over any meshes, several in one call and beside plain tensors,
    which count as copies on all ranks of the largest mesh. All ranks get the same norm, to the bit,
    from one small all-reduce for each mesh dimension and process group. What fails on one rank
    raises on all of them.

    Returns:
        The norm before clipping: a 0-dim tensor on the first gradient's device, in the promoted
        dtype of the gradients (real for complex ones). ``torch.tensor(0.)`` without gradients. A
        replicated DTensor where all gradients are DTensors of one mesh, unless there are
        ``process_groups``.

    Raises:
        NotImplementedError: a gradient is ``Partial`` with another operation than a sum or an
            average.
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set; or a gradient
            cannot be written to, because its elements share memory (``expand``); or another rank
            has failed, which is named with its reason.
        TypeError: an argument or an element of ``parameters`` has the wrong type.
        ValueError: ``max_norm`` is negative or NaN.
    """
    function = "clip_grad_norm_"
    read: list[Any] = []
    parameter_list: Sequence[Any] = read
    try:
        parameter_list = _arguments.tensor_list(parameters, function, "parameters", read)
        max_norm = _arguments.max_norm(max_norm, function)
        norm_type = _arguments.norm_type(norm_type, function)
        error_if_nonfinite = bool(error_if_nonfinite)
        if dtype is not None:
            _arguments.result_dtype(dtype, function)
        groups = _ops.read_process_groups(process_groups, function)
    except Exception as error:
        _ops.raise_together(error, parameter_list, process_groups, _CLIP_GRAD_NORM_, norm_type)
        raise
    return _ops.clip_grad_norm_(
        parameter_list,
        max_norm,
        norm_type,
        error_if_nonfinite,
        foreach,
        dtype,
        _CLIP_GRAD_NORM_,
        groups,
    )


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    dtype: torch.dtype | None = None,
    process_groups: Any = None,
) -> Tensor:
    """Compute the norm of an iterable of tensors, as if they were concatenated into one vector.

    Drop-in for :func:`torch.nn.utils.get_total_norm`.

    Args:
        tensors: tensors of any shape, dtype and memory layout, or a single one. The tensors
            themselves are measured: pass gradients, not parameters.
        norm_type: type of the p-norm, as in :func:`clip_grad_norm_`.
        error_if_nonfinite: raise when the norm is NaN or infinite.
        foreach: as in :func:`clip_grad_norm_`.
        dtype: as in :func:`clip_grad_norm_`.
        process_groups: as in :func:`clip_grad_norm_`.

    Returns:
        A 0-dim tensor, as in :func:`clip_grad_norm_`.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set; or another rank has
            failed.
        TypeError: an argument or an element of ``tensors`` has the wrong type.
    """
    function = "get_total_norm"
    read: list[Any] = []
    tensor_list: Sequence[Any] = read
    try:
        tensor_list = _arguments.tensor_list(tensors, function, "tensors", read)
        norm_type = _arguments.norm_type(norm_type, function)
        error_if_nonfinite = bool(error_if_nonfinite)
        if dtype is not None:
            _arguments.result_dtype(dtype, function)
        groups = _ops.read_process_groups(process_groups, function)
    except Exception as error:
        _ops.raise_together(error, tensor_list, process_groups, _GET_TOTAL_NORM, norm_type)
        raise
    return _ops.get_total_norm(
        tensor_list, norm_type, error_if_nonfinite, foreach, dtype, _GET_TOTAL_NORM, groups
    )


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float | Tensor,
    total_norm: float | Tensor,
    foreach: bool | None = None,
) -> None:
    r"""Scale the gradients of an iterable of parameters by a norm that is already known.

    Drop-in for :func:`torch.nn.utils.clip_grads_with_norm_`: the second half of
    :func:`clip_grad_norm_`, for a norm from :func:`get_total_norm` or from elsewhere, such as one
    reduced over ranks.

    Args:
        parameters: the tensors whose ``.grad`` is scaled, or a single one.
        max_norm: as in :func:`clip_grad_norm_`.
        total_norm: the norm, used as it is: a number or a tensor of one element, of any dtype, on
            any device.
        foreach: as in :func:`clip_grad_norm_`.

    Raises:
        RuntimeError: a gradient cannot be written to, because its elements share memory.
        TypeError: an argument or an element of ``parameters`` has the wrong type.
        ValueError: ``max_norm`` is negative or NaN, or a tensor has more than one element.
    """
    function = "clip_grads_with_norm_"
    parameter_list = _arguments.tensor_list(parameters, function, "parameters")
    max_norm = _arguments.max_norm(max_norm, function)
    total_norm = _arguments.total_norm(total_norm, function)
    _ops.clip_grads_with_norm_(
        parameter_list, max_norm, total_norm, foreach, _CLIP_GRADS_WITH_NORM_
    )


def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor],
    clip_value: float,
    foreach: bool | None = None,
) -> None:
    r"""Clamp each element of the gradients to :math:`[-\text{clip\_value}, \text{clip\_value}]`.

    Drop-in for :func:`torch.nn.utils.clip_grad_value_`. NaN stays NaN. Does nothing when there is
    no gradient.

    Args:
        parameters: the tensors whose ``.grad`` is clamped in place, or a single one.
        clip_value: largest magnitude an element may keep, not negative.
        foreach: as in :func:`clip_grad_norm_`.

    Raises:
        NotImplementedError: a gradient is complex.
        RuntimeError: a gradient cannot be written to, because its elements share memory.
        TypeError: an argument or an element of ``parameters`` has the wrong type.
        ValueError: ``clip_value`` is negative or NaN.
    """
    function = "clip_grad_value_"
    parameter_list = _arguments.tensor_list(parameters, function, "parameters")
    clip_value = _arguments.clip_value(clip_value, function)
    _ops.clip_grad_value_(parameter_list, clip_value, foreach, _CLIP_GRAD_VALUE_)
