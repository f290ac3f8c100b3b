"""Clipping and weight decay with the names and formulas of textbooks.

For code that follows a book or an old tutorial, unchanged; new code is better served by
:func:`gradclip_ext.clip_grad_norm_`. The same engines measure and scale the gradients, so what
holds there for dtypes, layouts and accuracy holds here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import deprecated  # torch itself requires it

from gradclip_ext import _arguments, _ops
from gradclip_ext.functional import clip_grad_norm_

__all__ = ["add_weight_decay_", "clip_grad_norm", "grad_clipping"]

_ADD_WEIGHT_DECAY_ = _ops.Caller("add_weight_decay_")


def grad_clipping(net: Any, theta: float) -> Tensor:
    r"""Clip the gradients of a network as in the book "Dive into Deep Learning".

    The function of that name in Zhang, Lipton, Li and Smola, "Dive into Deep Learning" (2023),
    from the chapter on recurrent networks. All gradients together are projected onto the ball of
    radius :math:`\theta`, that is, scaled in place by

    .. math:: \min\left(1, \frac{\theta}{\lVert\mathbf{g}\rVert}\right)

    computed in float64 from the unrounded norm. Nothing is added to the norm, unlike in
    :func:`gradclip_ext.clip_grad_norm_`. As in the book, a norm that is not above ``theta`` changes
    nothing, and neither does a NaN norm. Unlike in the book, parameters without a gradient are
    skipped, and the norm is returned, on a GPU without a device sync.

    Args:
        net: a module, whose parameters that require gradients are clipped; or any other object
            that holds its parameters in a list ``params``, like the networks that the book writes
            from scratch.
        theta: largest norm the gradients may keep, a number that is not negative.

    Returns:
        The norm before clipping: a 0-dim tensor on the first gradient's device, in the promoted
        dtype of the gradients (real for complex ones). ``torch.tensor(0.)`` without gradients.

    Raises:
        RuntimeError: a gradient cannot be written to, because its elements share memory.
        TypeError: ``net`` is neither of the two, ``theta`` is not a number, or an element of
            ``params`` is not a tensor.
        ValueError: ``theta`` is negative or NaN.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> net.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> grad_clipping(net, 2.5)
        tensor(5.)
        >>> net.weight.grad
        tensor([[1.5000, 2.0000]])
    """
    function = "grad_clipping"
    max_norm = _arguments.non_negative(theta, function, "theta")
    pairs = _parameters_of(net, function)
    caller = _ops.Caller(function, names=tuple(name for name, _ in pairs))
    return _ops.project_([parameter for _, parameter in pairs], max_norm, caller)


def _parameters_of(net: Any, function: str) -> list[tuple[str, Tensor]]:
    """The parameters of a network that the book clips, with their names in messages."""
    if isinstance(net, torch.nn.Module):
        return [(f"net.{name}", p) for name, p in net.named_parameters() if p.requires_grad]
    if not hasattr(net, "params"):
        raise TypeError(
            f"{function}: net has to be a torch.nn.Module or an object with an attribute params, "
            f"a list of tensors, found an object of type {type(net).__name__}; "
            "pass parameters themselves to gradclip_ext.clip_grad_norm_"
        )
    parameters = _arguments.tensor_list(net.params, function, "net.params")
    for index, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor):
            raise _arguments.item_error(parameter, function, "net.params", index)
    return [(f"net.params[{index}]", parameter) for index, parameter in enumerate(parameters)]


def add_weight_decay_(parameters: Tensor | Iterable[Tensor], weight_decay: float) -> None:
    r"""Add to each gradient, in place, its parameter times ``weight_decay``.

    That is the gradient of the L2 penalty :math:`\frac{\lambda}{2} \lVert\mathbf{w}\rVert^2`, as
    in Krogh and Hertz, "A Simple Weight Decay Can Improve Generalization" (1991), and what
    :class:`torch.optim.SGD` does with its ``weight_decay``, element for element. Call it before
    clipping, so that the penalty counts in the norm; an optimizer's own ``weight_decay`` comes
    after clipping and does not. The weight decay of :class:`torch.optim.AdamW` never enters the
    gradients, so there it is not needed.

    Args:
        parameters: the tensors whose ``.grad`` is added to, or a single one. Those without a
            gradient are skipped; one that is listed twice counts once.
        weight_decay: the factor, a number that is not negative. With 0 nothing is written.

    Raises:
        RuntimeError: a gradient cannot be written to, because its elements share memory.
        TypeError: an argument or an element of ``parameters`` has the wrong type; or a gradient is
            sparse, which would have to become dense.
        ValueError: ``weight_decay`` is negative, NaN or too large for a gradient's dtype; or a
            gradient does not have its parameter's shape.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([10.0, -20.0]))
        >>> weight.grad = torch.tensor([1.0, 1.0])
        >>> add_weight_decay_(weight, 0.1)
        >>> weight.grad
        tensor([ 2., -1.])
    """
    function = _ADD_WEIGHT_DECAY_.function
    parameter_list = _arguments.tensor_list(parameters, function, "parameters")
    weight_decay = _arguments.non_negative(weight_decay, function, "weight_decay")
    _ops.add_weight_decay_(parameter_list, weight_decay, _ADD_WEIGHT_DECAY_)


@deprecated(
    "`gradclip_ext.clip_grad_norm` is now deprecated in favor of `gradclip_ext.clip_grad_norm_`.",
    category=FutureWarning,
)
def clip_grad_norm(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clip the gradient norm of an iterable of parameters, under the old name.

    Drop-in for :func:`torch.nn.utils.clip_grad_norm`, and deprecated like it. Arguments, result and
    errors are those of :func:`gradclip_ext.clip_grad_norm_`, except that there is no ``dtype``.

    Example:
        >>> import torch, warnings
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> with warnings.catch_warnings(record=True):
        ...     clip_grad_norm(weight, max_norm=1.0)
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    return clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
