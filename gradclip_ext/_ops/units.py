"""Unit-wise clipping through torch's operations: a coefficient for each row of a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip_ext._ops import dtensor
from gradclip_ext._ops.gradients import (
    Caller,
    overlaps_itself,
    read_each_grad,
    refuse_integers,
    refuse_unwritable,
    rehearse,
    require_shape,
    require_storage,
)


@torch.no_grad()
def clip_units_(
    parameters: Sequence[Any], clip_factor: float, eps: float, caller: Caller
) -> Tensor | None:
    """See :func:`gradclip_ext.adaptive_clip_grad_`.

    Returns:
        The smallest coefficient, 0-dim and float64 on the first gradient's device; None if there is
        no unit.
    """
    pairs = read_pairs(parameters, caller)
    # All before the first write: norms of a parameter on another device cannot be compared.
    all_coefficients = [
        coefficients(parameter, gradient, clip_factor, eps) for parameter, gradient in pairs
    ]
    for (_, gradient), own in zip(pairs, all_coefficients, strict=True):
        multiply_(gradient, own)
    smallest = [own.min() for own in all_coefficients if own.numel() > 0]
    if not smallest:
        return None
    return torch.stack([number.to(smallest[0].device) for number in smallest]).min()


@torch.no_grad()
def require_units(parameters: Sequence[Any], caller: Caller) -> None:
    """Raise what :func:`clip_units_` would raise of the gradients, with nothing changed."""
    read_pairs(parameters, caller)


def read_pairs(parameters: Sequence[Any], caller: Caller) -> list[tuple[Tensor, Tensor]]:
    """Each parameter with its gradient; all that can be wrong is found here."""
    # A copy, because what computes a gradient may also change the list.
    parameters = tuple(parameters)
    found = read_each_grad(parameters, caller)
    pairs = [
        (parameter, gradient, caller.entry(index))
        for index, (parameter, gradient) in enumerate(zip(parameters, found, strict=True))
        if gradient is not None
    ]
    for parameter, gradient, name in pairs:
        _refuse(parameter, gradient, name, caller.function)
    given = [gradient for _, gradient, _ in pairs]
    names = [f"{name}.grad" for _, _, name in pairs]
    refuse_integers(given, names, caller.function)
    refuse_unwritable(given, names, caller.function)

    def multiply(probes: list[Tensor]) -> None:
        for probe in probes:
            multiply_(probe, torch.ones(1, dtype=torch.float64, device=probe.device))

    rehearse(given, multiply)

    def measure(probes: list[Tensor]) -> None:
        for probe in probes:
            coefficients(probe, probe, 1.0, 1.0)

    rehearse([*given, *(parameter for parameter, _, _ in pairs)], measure)
    return [(parameter, gradient) for parameter, gradient, _ in pairs]


def _refuse(parameter: Tensor, gradient: Tensor, name: str, function: str) -> None:
    if gradient.layout != torch.strided:
        raise NotImplementedError(
            f"{function}: the gradient of {name} has to be dense, found layout {gradient.layout}"
        )
    if overlaps_itself(gradient):
        raise RuntimeError(
            f"{function}: the gradient of {name} has to have memory for each element, found shape "
            f"{tuple(gradient.shape)} with strides {gradient.stride()}; clone() it first"
        )
    require_shape(parameter, gradient, f"the gradient of {name}", function)
    obstacle = dtensor.unit_obstacle(parameter, gradient)
    if obstacle is not None:
        raise NotImplementedError(f"{function}: the gradient of {name} {obstacle}")
    require_storage(parameter, name, function)


def coefficients(parameter: Tensor, gradient: Tensor, clip_factor: float, eps: float) -> Tensor:
    """What to multiply each unit of a gradient by, in a shape that broadcasts with it."""
    limits = _unit_norms(parameter).clamp(min=eps) * clip_factor
    return coefficients_of(_unit_norms(gradient), limits)


def coefficients_of(norms: Tensor, limits: Tensor) -> Tensor:
    """The same from the norms of gradients and their limits; 1 where a norm is not finite."""
    exceeds = (norms > limits) & norms.isfinite()
    return (limits / norms.clamp(min=1e-6)).masked_fill(exceeds.logical_not(), 1.0)


def multiply_(gradient: Tensor, coefficients: Tensor) -> None:
    """Multiply each unit of a gradient in place by its coefficient, with one rounding."""
    wide = gradient.dtype in (torch.float64, torch.complex128)
    # At least one dimension, and float32 for 16 bits: torch would round a 0-dim coefficient to the
    # gradient's dtype before it multiplies.
    whole = gradient if gradient.dim() else gradient.unsqueeze(0)
    whole.mul_(coefficients.to(torch.float64 if wide else torch.float32))


def _unit_norms(tensor: Tensor) -> Tensor:
    """The norm of each unit in float64, in a shape that broadcasts with the tensor's."""
    if tensor.dim() == 0:
        tensor = tensor.unsqueeze(0)
    dimensions = tuple(range(1, tensor.dim())) if tensor.dim() > 1 else (0,)
    # In 16 bits a sum of many squares would lose most of them.
    wide = torch.promote_types(tensor.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(tensor, 2, dimensions, keepdim=True, dtype=wide)
    return norms.to(torch.float64)
