"""The operations on gradients of which each rank holds a part: local passes, one exchange.

Each rank measures what it holds by the native kernels, contributes it where it is counted, and all
get the same norm, to the bit. One small all-reduce for each mesh dimension and process group does
it, whatever the number of gradients; those that have yet to be added up over ranks (Partial) take
one more of their own size. The algebra is that of docs/distributed.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradclip_ext._ops import dtensor, torch_ops
from gradclip_ext._ops.algebra import Algebra
from gradclip_ext._ops.exchange import Exchange
from gradclip_ext._ops.failures import (
    nonfinite_everywhere,
    nonfinite_here,
    publish,
    raise_if_failed,
    raise_unread,
)
from gradclip_ext._ops.gradients import Caller
from gradclip_ext._ops.observation import profiler_range
from gradclip_ext._ops.process_groups import Group
from gradclip_ext._ops.shares import Shares

__all__ = [
    "GlobalNorms",
    "clip_grad_norm_",
    "get_total_norm",
    "global_norms",
    "grad_norms",
    "measured",
    "project_",
    "raise_together",
    "scale_native_",
    "smallest_over_ranks",
]


class GlobalNorms(NamedTuple):
    """Norms over all ranks.

    Attributes:
        totals: that of each section of the list, 1-D and float64.
        each: that of each gradient, 1-D and float64; with process groups of what the meshes of this
            rank hold of it. Empty unless they were asked for.
        failed: whether a rank has failed, a 0-dim tensor that has not been read; None where the
            host knows that none has.
        shares: what this rank holds.
    """

    totals: Tensor
    each: Tensor
    failed: Tensor | None
    shares: Shares

    def scale_(self, coefficient: Tensor, foreach: bool | None) -> None:
        """Multiply what this rank holds, unless a rank has failed."""
        if self.failed is not None:
            coefficient = torch.where(self.failed, 1.0, coefficient)
        self.shares.scale_(coefficient, foreach)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Sequence[Any],
    max_norm: float | Tensor,
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
    dtype: torch.dtype | None,
    groups: Sequence[Group],
    caller: Caller,
) -> Tensor:
    shares = Shares(parameters, True, groups, caller)
    if isinstance(max_norm, Tensor) and max_norm.is_meta:
        # Or other ranks would have clipped before this one finds no number.
        shares.fail(
            ValueError(f"{caller.function}: max_norm is on the meta device and has no value")
        )
    with profiler_range(caller.function):
        norms = measure(
            shares,
            groups,
            norm_type,
            dtype,
            foreach=foreach,
            writes=True,
            refuses_nonfinite=error_if_nonfinite,
        )
        norm = norms.totals[0]
        if isinstance(max_norm, Tensor):
            max_norm = dtensor.whole(max_norm)
        if isinstance(max_norm, Tensor) or max_norm != math.inf:
            norms.scale_(torch_ops.clip_coefficient(max_norm, norm), foreach)
        else:
            shares.bump_versions(of_parts=True)
    return _returned(norm, shares, parameters, groups, dtype)


@torch.no_grad()
def get_total_norm(
    tensors: Sequence[Any],
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
    dtype: torch.dtype | None,
    groups: Sequence[Group],
    caller: Caller,
) -> Tensor:
    shares = Shares(tensors, False, groups, caller)
    with profiler_range(caller.function):
        norms = measure(
            shares,
            groups,
            norm_type,
            dtype,
            foreach=foreach,
            writes=False,
            refuses_nonfinite=error_if_nonfinite,
        )
    return _returned(norms.totals[0], shares, tensors, groups, dtype)


@torch.no_grad()
def grad_norms(
    parameters: Sequence[Any],
    norm_type: float,
    dtype: torch.dtype | None,
    groups: Sequence[Group],
    caller: Caller,
) -> tuple[Tensor, Tensor]:
    """The norm of all gradients and of each: 0-dim and 1-D, float64, on the first one's device."""
    shares = Shares(parameters, True, groups, caller)
    with profiler_range(caller.function):
        norms = measure(
            shares, groups, norm_type, dtype, sections=[len(parameters)], gives_each=True
        )
    device = _device(shares, norms.totals)
    return norms.totals[0].to(device), norms.each.to(device)


@torch.no_grad()
def measured(
    parameters: Sequence[Any], norm_type: float, caller: Caller
) -> tuple[Tensor, torch.dtype]:
    """The norm of all gradients, 0-dim and float64, and the dtype that it is to be returned in."""
    shares = Shares(parameters, True, (), caller)
    with profiler_range(caller.function):
        norms = measure(shares, (), norm_type, None)
    norm = norms.totals[0]
    return norm.to(_device(shares, norm)), _result_dtype(shares, parameters)


@torch.no_grad()
def project_(parameters: Sequence[Any], max_norm: float, caller: Caller) -> Tensor:
    """See :func:`gradclip_ext.grad_clipping`."""
    shares = Shares(parameters, True, (), caller)
    with profiler_range(caller.function):
        norms = measure(shares, (), 2.0, None, writes=True)
        norm = norms.totals[0]
        radius = torch.full_like(norm, max_norm)
        norms.scale_(torch_ops.projection_coefficient(radius, norm), None)
    return _returned(norm, shares, parameters, (), None)


@torch.no_grad()
def global_norms(
    parameters: Sequence[Any],
    sections: Sequence[int],
    norm_type: float,
    groups: Sequence[Group],
    caller: Caller,
    *,
    prepare: Callable[[], None],
    only_scales: bool,
    weight_decay: float,
    refuses_nonfinite: bool,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """The norms of several lists that follow one another, and of each of their gradients.

    Args:
        sections: how long each of the lists is.
        prepare: raises what is wrong with this rank's gradients beside what is looked at here.
        only_scales: whether the gradients are going to be multiplied and nothing else, of which
            nothing can be wrong where all of them are native.
        weight_decay: the norms are those after this was added, with nothing written yet.
        refuses_nonfinite: raise where the norm of a list is NaN or infinite.

    Returns:
        The norm of each list, 0-dim; the norm of each gradient, 1-D; both float64 on the device of
        the first gradient. And whether a rank has failed, as :attr:`GlobalNorms.failed`.
    """
    shares = Shares(parameters, True, groups, caller)

    def measures() -> Tensor:
        if not (only_scales and shares.are_native()):
            prepare()
        norms = shares.norms(norm_type, None, None, False)
        return shares.decayed_norms(norm_type, weight_decay) if weight_decay > 0.0 else norms

    with profiler_range(caller.function):
        norms = measure(
            shares,
            groups,
            norm_type,
            None,
            sections=sections,
            gives_each=True,
            refuses_nonfinite=refuses_nonfinite,
            measures=measures,
        )
    device = _device(shares, norms.totals)
    return list(norms.totals.to(device).unbind()), norms.each.to(device), norms.failed


@torch.no_grad()
def scale_native_(parameters: Sequence[Any], coefficient: float | Tensor, caller: Caller) -> bool:
    """Multiply what this rank holds; False, with nothing changed, unless all of it is native."""
    shares = Shares(parameters, True, (), caller)
    if shares.error is not None or shares.is_outside or not shares.are_native():
        return False
    shares.scale_native_(coefficient)
    return True


@torch.no_grad()
def smallest_over_ranks(parameters: Sequence[Any], number: Tensor | None, caller: Caller) -> Tensor:
    """The smallest of a positive number of each rank that has one, 0-dim; 1 if none has."""
    shares = Shares(parameters, False, (), caller)
    exchange = Exchange(shares.meshes, (), _exchange_device(shares, ()), -math.inf)
    algebra = Algebra(exchange, shares, -math.inf, False, [1])
    if number is not None:
        # For each mesh, since all of them are combined in the end.
        algebra.contribute_everywhere(number.to(exchange.device).reshape(1))
    exchange.over_meshes(algebra.values)
    smallest = algebra.finished()[0][0]
    # 0 stands for none at all.
    smallest = torch.where(smallest == 0.0, 1.0, smallest)
    return smallest if number is None else smallest.to(number.device)


@torch.no_grad()
def raise_together(
    error: Exception,
    parameters: Sequence[Any],
    groups: Sequence[Group],
    caller: Caller,
    norm_type: float,
    sections: Sequence[int] | None,
) -> None:
    """Raise an error of this rank's arguments on all ranks that would else wait for this one.

    ``norm_type`` and ``sections`` are those of :func:`measure`, which the others call.
    """
    shares = Shares(parameters, caller.argument == "parameters", groups, caller)
    shares.error = error
    measure(shares, groups, norm_type, None, sections=sections, gives_each=sections is not None)


def measure(
    shares: Shares,
    groups: Sequence[Group],
    norm_type: float,
    dtype: torch.dtype | None,
    *,
    sections: Sequence[int] | None = None,
    gives_each: bool = False,
    foreach: bool | None = None,
    writes: bool = False,
    refuses_nonfinite: bool = False,
    measures: Callable[[], Tensor] | None = None,
) -> GlobalNorms:
    """Measure what this rank holds and exchange it; raises on all ranks if anything is wrong.

    Args:
        sections: how many entries of the list belong to each total; all to one by default.
        writes: whether the gradients are going to be written, and have to allow it.
        refuses_nonfinite: raise where a total is NaN or infinite.
        measures: gives the norms of ``shares.tensors`` instead of their own measuring.
    """
    raise_unread(shares.caller.function)
    has_each = gives_each or norm_type == 0.0 or (sections is not None and len(sections) > 1)
    try:
        if shares.error is None:
            local = measures() if measures else shares.norms(norm_type, dtype, foreach, writes)
    except Exception as error:
        shares.fail(error)
    if shares.error is not None:
        local = torch.zeros(len(shares.tensors), dtype=torch.float64, device="cpu")
    device = _exchange_device(shares, groups)
    partial = [
        (share.mesh.key, (share.partial, *share.summand_sizes))
        for share in shares.shares
        if share.mesh is not None and share.partial
    ]
    exchange = Exchange(shares.meshes, groups, device, norm_type, partial)
    algebra = Algebra(exchange, shares, norm_type, has_each, sections or [shares.count])
    if shares.error is not None:
        exchange.has_failed = True
        publish(exchange, str(shares.error))
    elif refuses_nonfinite and not _all_finite(local):
        exchange.holds_nonfinite = True
        publish(exchange, nonfinite_here(shares, norm_type))
    algebra.contribute(local.to(device))
    exchange.over_meshes(algebra.values)
    if partial and not (exchange.flags and exchange.flags.is_known_to_fail):
        algebra.add_partial()
    totals, each = algebra.finished()
    failed = raise_if_failed(exchange, shares, reads=refuses_nonfinite)
    if failed is not None:
        totals = torch.where(failed, math.nan, totals)
    if refuses_nonfinite and not _all_finite(totals):
        raise nonfinite_everywhere(exchange, shares, norm_type)
    return GlobalNorms(totals, each, failed, shares)


def _all_finite(norms: Tensor) -> bool:
    return bool(norms.isfinite().all())


def _exchange_device(shares: Shares, groups: Sequence[Group]) -> torch.device:
    """Where vectors travel, with no copy from a GPU to the host."""
    function = shares.caller.function
    own = {device.type for device in shares.devices} or {"cpu"}
    wanted = {mesh.device_type for mesh in shares.meshes}
    for group in groups:
        both = [kind for kind in group.device_types if kind in (wanted or own)]
        wanted.add(both[0] if both else group.device_types[0])
    if len(wanted) > 1 or (wanted == {"cpu"} and own - {"cpu", "meta"}):
        raise RuntimeError(
            f"{function}: the meshes and process groups communicate on "
            f"{' and '.join(sorted(wanted))}, with gradients on {' and '.join(sorted(own))}, which "
            "cannot be reduced without a copy through the host; use meshes of one device type, "
            "such as init_device_mesh('cuda', ...)"
        )
    kind = wanted.pop() if wanted else next(iter(own))
    first = [device for device in shares.devices if device.type == kind]
    if first:
        return first[0]
    index = torch.get_device_module(kind).current_device() if kind != "cpu" else None
    return torch.device(kind, index) if index is not None else torch.device("cpu")


def _device(shares: Shares, other: Tensor) -> torch.device:
    for share in shares.shares:
        return share.tensors[0].device
    return other.device


def _returned(
    norm: Tensor,
    shares: Shares,
    listed: Sequence[Any],
    groups: Sequence[Group],
    dtype: torch.dtype | None,
) -> Tensor:
    """The norm in torch's dtype; replicated over the mesh that all gradients share, as in torch."""
    norm = norm.to(_device(shares, norm), dtype or _result_dtype(shares, listed))
    meshes = list(shares.mesh_objects.values())
    if groups or not meshes or any(mesh is None for mesh in meshes) or shares.is_outside:
        return norm
    if len({mesh.key for mesh in shares.meshes}) != 1 or not shares.meshes[0].is_member:
        return norm
    from torch.distributed.tensor import DTensor, Replicate

    mesh = meshes[0]
    placements = [Replicate()] * mesh.ndim
    return DTensor.from_local(norm, mesh, placements, run_check=False)


def _result_dtype(shares: Shares, listed: Sequence[Any]) -> torch.dtype:
    """Torch's for these gradients; without any, that of the parameters."""
    found = {tensor.dtype for tensor in shares.tensors} or {
        tensor.dtype for tensor in listed if tensor.is_floating_point() or tensor.is_complex()
    }
    return torch_ops.promoted_dtype(found) if found else torch.float32
