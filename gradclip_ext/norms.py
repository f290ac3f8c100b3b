"""The norm of each gradient and of all gradients together, in one pass."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradclip_ext import _arguments, _ops
from gradclip_ext._names import default_names
from gradclip_ext._parameters import Collection

__all__ = ["GradNorms", "grad_norms"]


class GradNorms(NamedTuple):
    """What :func:`grad_norms` returns.

    Attributes:
        total: the norm of all gradients together, a 0-dim tensor.
        norms: the norm of each gradient, a 1-D tensor with an entry for each parameter; 0 where a
            parameter has no gradient.
        names: the names of the parameters, in the same order.
    """

    total: Tensor
    norms: Tensor
    names: tuple[str, ...]


def grad_norms(
    source: Any,
    norm_type: float = 2.0,
    *,
    dtype: torch.dtype | None = None,
    process_groups: Any = None,
) -> GradNorms:
    """Compute the norm of each gradient of a model and of all together, in one pass.

    The norms stay on the gradients' device, without a device sync.

    Args:
        source: a module, its ``named_parameters()``, parameters, an optimizer, a list of several
            optimizers, or parameter groups. A parameter that comes twice counts once.
        norm_type: order of the norm, as in :func:`gradclip_ext.clip_grad_norm_`.
        dtype: ``torch.float32`` or ``torch.float64``, what the results are rounded to. Without it
            they are float64 tensors, as accurate as the gradients' own dtype asks for.
        process_groups: as in :func:`gradclip_ext.clip_grad_norm_`. The total is over all ranks of
            these groups, the norm of each gradient is that of what this rank holds of it.

    Returns:
        The total norm, the norm of each gradient and the names, see :class:`GradNorms`. Those of
        DTensors are over all ranks.

    Raises:
        RuntimeError: another rank has failed.
        TypeError: an argument or a parameter has the wrong type.
        ValueError: there are no parameters, and no process groups.

    >>> model = torch.nn.Linear(2, 1)
    >>> model(torch.tensor([3.0, 4.0])).backward()
    >>> grad_norms(model, dtype=torch.float32)
    GradNorms(total=tensor(5.0990), norms=tensor([5., 1.]), names=('weight', 'bias'))
    """
    function = "grad_norms"
    try:
        norm_type = _arguments.norm_type(norm_type, function)
        if dtype is not None:
            _arguments.result_dtype(dtype, function)
        groups = _ops.read_process_groups(process_groups, function)
    except Exception as error:
        _raise_together(error, source, process_groups, norm_type)
        raise
    # A list of parameters is not walked in Python, which takes longer than measuring it.
    is_list = (type(source) is list or type(source) is tuple) and not groups
    try:
        measured = _ops.native_grad_norms_of_each(source, norm_type, dtype) if is_list else None
    except Exception as error:
        # What a `grad` property has raised.
        _raise_together(error, source, process_groups, norm_type)
        raise
    if measured is not None:
        # As many as were measured: a computed `grad` may change the list while it is read.
        names = default_names(measured[1].numel())
    else:
        try:
            collection = Collection(source, function, may_be_empty=bool(groups))
        except Exception as error:
            _raise_together(error, source, groups, norm_type)
            raise
        names = collection.names
        caller = _ops.Caller(function, names=names)
        measured = _ops.grad_norms(collection.parameters, norm_type, dtype, caller, groups=groups)
    total, norms = measured
    if dtype is not None:
        total, norms = total.to(dtype), norms.to(dtype)
    return GradNorms(total, norms, names)


def _raise_together(error: Exception, source: Any, process_groups: Any, norm_type: Any) -> None:
    """Raise an error of the arguments on all ranks, if there are others."""
    function = "grad_norms"
    # A source that is wrong names no other ranks, but process groups may.
    names: tuple[str, ...] = ()
    parameters: list[Tensor] = []
    with contextlib.suppress(Exception):
        collection = Collection(source, function, may_be_empty=True)
        names, parameters = collection.names, collection.parameters
    caller = _ops.Caller(function, names=names)
    sections = [len(parameters)]
    _ops.raise_together(error, parameters, process_groups, caller, norm_type, sections)
