"""AGC: clips each unit by the norm of its weights (Brock et al., 2021)."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from gradclip_ext import _arguments, _ops
from gradclip_ext.thresholds.rule import StatelessRule

__all__ = ["AGC", "adaptive_clip_grad_"]


def adaptive_clip_grad_(
    parameters: Tensor | Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3
) -> None:
    r"""Clip each unit of the gradients by the norm of its weights.

    A unit is what computes one output: a row of a linear layer's weight, a filter of a
    convolution, in general all elements with the same first index. A tensor of one dimension or
    none is a single unit. If the gradient :math:`G_i` of a unit with weights :math:`W_i` is larger
    than

    .. math:: \text{limit}_i = \text{clip\_factor} \cdot \max(\lVert W_i \rVert, \text{eps})

    it is scaled in place by :math:`\text{limit}_i / \max(\lVert G_i \rVert, 10^{-6})`. The norms
    are computed in float32, or float64 for float64 tensors, and a 16-bit gradient is rounded once.
    A unit whose gradient norm is not finite is left unchanged. The method is that of Brock, De,
    Smith and Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization"
    (2021), arXiv 2102.06171.

    Args:
        parameters: the tensors whose ``.grad`` is clipped, or a single one. Those without a
            gradient are skipped. Leave out the last linear layer, as the paper does;
            :class:`AGC` does that by name.
        clip_factor: how large a gradient may be, relative to its weights; greater than 0.
        eps: lower bound on the norm of the weights, so that weights that start at zero can grow;
            greater than 0.

    Raises:
        NotImplementedError: a gradient is sparse.
        RuntimeError: a gradient cannot be written to, because its elements share memory.
        TypeError: an argument or an element of ``parameters`` has the wrong type.
        ValueError: ``clip_factor`` or ``eps`` is not greater than 0.

    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    >>> weight.grad = torch.tensor([[0.0, 2.0], [0.0, 0.001]])
    >>> adaptive_clip_grad_(weight, clip_factor=0.1)
    >>> weight.grad
    tensor([[0.0000, 0.5000],
            [0.0000, 0.0010]])
    """
    function = "adaptive_clip_grad_"
    caller = _ops.Caller(function)
    read: list[Any] = []
    items: Sequence[Any] = read
    try:
        items = _arguments.tensor_list(parameters, function, "parameters", read)
        clip_factor = _arguments.positive(clip_factor, function, "clip_factor")
        eps = _arguments.positive(eps, function, "eps")
        for index, item in enumerate(items):
            if not isinstance(item, Tensor):
                raise _arguments.item_error(item, function, "parameters", index)
    except Exception as error:
        _ops.raise_together_for_units(error, items, caller)
        raise
    _ops.clip_units_(items, clip_factor, eps, caller)


class AGC(StatelessRule):
    """Adaptive gradient clipping that excludes parameters by name.

    The method of :func:`adaptive_clip_grad_`, which also names the source. It has no history, so
    there is no state to save.

    Args:
        clip_factor: as in :func:`adaptive_clip_grad_`.
        eps: as in :func:`adaptive_clip_grad_`.
        exclude: shell-style patterns (``*``, ``?``, ``[...]``; case-sensitive) for the names of
            parameters whose gradients are left unchanged: ``("head.*",)`` for the classifier.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``clip_factor`` or ``eps`` is not greater than 0.
    """

    only_measures: bool = True

    def __init__(
        self, clip_factor: float = 0.01, eps: float = 1e-3, exclude: Iterable[str] = ()
    ) -> None:
        self.clip_factor = _arguments.positive(clip_factor, "AGC", "clip_factor")
        self.eps = _arguments.positive(eps, "AGC", "eps")
        self.exclude = _arguments.patterns(exclude, "AGC", "exclude")

    def limit_for(self, total: _ops.Scalar, norms: Tensor) -> _ops.Scalar:
        """Infinite: :meth:`clip_` limits the norms of units, not those of whole gradients."""
        return math.inf

    def clip_(self, named_parameters: Iterable[tuple[str, Tensor]]) -> Tensor | None:
        """Clip the gradients in place, except those of excluded names.

        Args:
            named_parameters: pairs of a name and a tensor, as ``module.named_parameters()`` yields
                them.

        Returns:
            The smallest coefficient of a unit, a 0-dim float64 tensor on the first gradient's
            device; None if there was no gradient to clip.

        Raises:
            NotImplementedError: a gradient is sparse.
            RuntimeError: a gradient cannot be written to, because its elements share memory.
            TypeError: ``named_parameters`` is not made of pairs.
        """
        pairs = _arguments.named_parameters(named_parameters, "AGC")
        chosen = [pair for pair in pairs if not self._excludes(pair[0])]
        caller = _ops.Caller("AGC", names=tuple(name for name, _ in chosen))
        return _ops.clip_units_(
            [tensor for _, tensor in chosen], self.clip_factor, self.eps, caller
        )

    def _excludes(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude)
