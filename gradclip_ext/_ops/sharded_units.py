"""Unit-wise clipping of gradients that are distributed over ranks.

A row of a matrix lies on one rank, or on several as copies, and is clipped there. A tensor of one
dimension is a single unit, of which each rank may hold a part: its norms are exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip_ext._ops import dtensor, sharded, units
from gradclip_ext._ops.gradients import Caller
from gradclip_ext._ops.shares import Shares

__all__ = ["clip_units_", "raise_together"]


@torch.no_grad()
def clip_units_(
    parameters: Sequence[Any], clip_factor: float, eps: float, caller: Caller
) -> Tensor | None:
    """See :func:`gradclip_ext.adaptive_clip_grad_`.

    Returns:
        The smallest coefficient on all ranks, 0-dim and float64; None if there is no gradient.
    """
    split = _split_units(parameters)
    given: list[tuple[Tensor, Tensor]] = []

    def read() -> None:
        given.extend(units.read_pairs(parameters, caller))

    gradients = _norms_of(parameters, split, True, caller, read)
    weights = _norms_of(parameters, split, False, caller, None)
    limits = weights.clamp(min=eps) * clip_factor
    whole = units.coefficients_of(gradients, limits)
    of_split = {id(parameters[place]): number for place, number in zip(split, whole, strict=True)}
    smallest = []
    for parameter, gradient in given:
        local = dtensor.local(gradient)
        own = of_split.get(id(parameter))
        if own is None:
            own = units.coefficients(dtensor.local(parameter), local, clip_factor, eps)
        else:
            own = own.to(local.device).reshape((1,) * max(1, local.dim()))
        units.multiply_(local, own)
        if dtensor.is_dtensor(gradient):
            torch.autograd.graph.increment_version(gradient)
        if own.numel() > 0:
            smallest.append(own.min())
    found = [number.to(smallest[0].device) for number in smallest]
    least = torch.stack(found).min() if found else None
    return sharded.smallest_over_ranks(parameters, least, caller)


@torch.no_grad()
def raise_together(error: Exception, parameters: Sequence[Any], caller: Caller) -> None:
    """Raise an error of this rank's arguments on all ranks, which have called the above."""

    def fail() -> None:
        raise error

    _norms_of(parameters, _split_units(parameters), True, caller, fail)


def _split_units(parameters: Sequence[Any]) -> list[int]:
    """Where units stand that are split; by the parameters alone, so that all ranks agree."""
    return [place for place, p in enumerate(parameters) if dtensor.is_split_unit(p)]


def _norms_of(
    parameters: Sequence[Any], places: list[int], of_grads: bool, caller: Caller, read: Any
) -> Tensor:
    """The norms over all ranks of the units that are split, of their gradients or of themselves.

    What ``read`` raises reaches all ranks of the parameters' meshes.
    """
    shares = Shares([parameters[place] for place in places], of_grads, (), caller)
    if read is not None:
        # Also the meshes of parameters that are not split, whose gradients may be what is wrong.
        shares.meshes += Shares(parameters, False, (), caller).meshes

    def measures() -> Tensor:
        if read is not None:
            read()
        return shares.norms(2.0, torch.float64, None, False)

    norms = sharded.measure(
        shares, (), 2.0, None, sections=[len(places)], gives_each=True, measures=measures
    )
    if norms.failed is not None:
        # Such units are left unchanged.
        return torch.where(norms.failed, math.nan, norms.each)
    return norms.each
