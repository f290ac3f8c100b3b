"""Norm, scale and clamp made of torch's own operations.

For tensors whose memory the native engine must not touch (subclasses, other devices, other
layouts), for a norm_type it does not support, and whenever something has to see real operations
(dispatch modes, functorch, jit.trace, torch.compile). Same results as :mod:`torch.nn.utils`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gradclip_ext._ops import memory, torch_private
from gradclip_ext._ops.observation import compiling, observed

# What the norm is increased by before it divides, as in torch.
NORM_EPSILON = 1e-6


# Not by to_real(), which torch.compile cannot trace.
_REAL_DTYPES = {
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}


def total_norm(
    tensors: Sequence[Tensor],
    norm_type: float,
    foreach: bool | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The norm that :func:`torch.nn.utils.get_total_norm` gives.

    Empty tensors contribute nothing; torch raises for some norm types. With ``dtype`` the norm
    is accumulated in that dtype (float32 or float64) instead of the tensors' own.
    """
    filled = [tensor for tensor in tensors if tensor.numel() > 0]
    if not filled:
        result = torch.zeros((), dtype=norm_dtype(tensors), device=tensors[0].device)
    elif dtype is None:
        result = torch_private.get_total_norm(filled, norm_type, False, foreach)
        if len(filled) < len(tensors):
            result = result.to(tensors[0].device, norm_dtype(tensors))
    else:
        require_foreach_support(filled, foreach)
        norms = [
            torch.linalg.vector_norm(t, norm_type, dtype=widened_dtype(t, dtype)) for t in filled
        ]
        device = norms[0].device
        result = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]), norm_type)
        result = result.to(tensors[0].device)
    return result if dtype is None else result.to(dtype)


def summed_dtype(dtype: torch.dtype) -> torch.dtype:
    """What tensors are added up in over ranks: in 16 bits they would be rounded for each rank."""
    return torch.promote_types(dtype, torch.float32)


def tensor_norm(tensor: Tensor, norm_type: float) -> Tensor:
    """The norm of one tensor, accumulated in float64; 0 where it is empty."""
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=tensor.device)
    norm: Tensor = torch.linalg.vector_norm(
        tensor, norm_type, dtype=widened_dtype(tensor, torch.float64)
    )
    return norm.to(torch.float64)


def norm_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the norm of these tensors: their promoted dtype, real for complex."""
    return promoted_dtype([tensor.dtype for tensor in tensors])


def promoted_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype of the norm of tensors of these dtypes, of which there is at least one."""
    dtype = functools.reduce(torch.promote_types, dtypes)
    return _REAL_DTYPES.get(dtype, dtype)


def widened_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or wider if it could not hold the tensor; complex for a complex tensor."""
    return torch.promote_types(tensor.dtype, dtype)


def clip_coefficient(max_norm: float | Tensor, norm: Tensor) -> Tensor:
    """``min(1, max_norm / (norm + 1e-6))``, on the norm's device and without reading it.

    A ``max_norm`` tensor that is negative or NaN gives NaN: raising would need a device sync.
    """
    if isinstance(max_norm, Tensor):
        # In its own dtype: the comparison must not depend on the norm's.
        checked = torch.where(max_norm >= 0, max_norm, torch.nan).reshape(()).to(norm.device)
        coefficient = torch.clamp(checked / (norm + NORM_EPSILON), max=1.0)
        return torch.where(checked == torch.inf, torch.ones_like(coefficient), coefficient)
    return torch.clamp(max_norm / (norm + NORM_EPSILON), max=1.0)


def projection_coefficient(radius: Tensor, norm: Tensor) -> Tensor:
    """``min(1, radius / norm)``; 1 where both are 0, or the norm is NaN.

    The radius is a tensor, because torch divides a number by multiplying it by a rounded
    reciprocal; and it is compared, since a clamped quotient would be NaN for 0 / 0 and a NaN norm.
    """
    return torch.where(norm > radius, radius / norm, torch.ones_like(norm))


def scale_(tensors: Sequence[Tensor], coefficient: Tensor, foreach: bool | None) -> None:
    """Multiply every tensor in place by a 0-dim tensor on any device, without a device sync."""
    for device, group, multi_tensor in _groups(tensors, foreach):
        factor = _on(device, coefficient)
        if _may_be_rounded(factor, group[0]):
            scale_in_float64_(group, factor)
        elif multi_tensor:
            torch_private.foreach_mul_(group, factor)
        else:
            for tensor in group:
                tensor.mul_(factor)


def scale_in_float64_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """As :func:`scale_`, for a coefficient that the tensors' own dtype could not hold."""
    for tensor in tensors:
        wide = tensor.to(widened_dtype(tensor, torch.float64))
        tensor.copy_(wide.mul_(_on(tensor.device, coefficient)))


def _may_be_rounded(factor: Tensor, tensor: Tensor) -> bool:
    """Whether ``tensor.mul_(factor)`` may multiply by another number than the factor.

    torch converts a 0-dim operand, except for one on the CPU, to the dtype of the result: to 16
    bits, or to a float32 that a small one vanishes in. How small it is a GPU alone knows.
    """
    return (
        factor.device.type != "cpu"
        and factor.dtype == torch.float64
        and tensor.dtype not in (torch.float64, torch.complex128)
    )


def _on(device: torch.device, number: Tensor) -> Tensor:
    """A 0-dim tensor on a device. From the CPU by a fill, since a copy would wait for the GPU."""
    if number.device.type != "cpu" or device.type == "cpu" or type(number) is not Tensor:
        return number.to(device)
    if observed():
        return number.to(device)
    return torch.full((), number.item(), dtype=number.dtype, device=device)


def clamp_(tensors: Sequence[Tensor], clip_value: float, foreach: bool | None) -> None:
    """Clamp every element of every tensor to ``[-clip_value, clip_value]`` in place."""
    for _, group, multi_tensor in _groups(tensors, foreach):
        if not group[0].is_complex() and clip_value > torch.finfo(group[0].dtype).max:
            # No finite element exceeds it, and torch refuses a number that the dtype cannot hold.
            continue
        if multi_tensor:
            torch_private.foreach_clamp_(group, clip_value)
        else:
            for tensor in group:
                tensor.clamp_(min=-clip_value, max=clip_value)


def require_foreach_support(tensors: Sequence[Tensor], foreach: bool | None) -> None:
    """Raise what torch raises for ``foreach=True`` on a device without foreach operations."""
    if not foreach:
        return
    for tensor in tensors:
        if not torch_private.device_has_foreach_support(tensor.device):
            raise RuntimeError(
                "foreach=True was passed, but can't use the foreach API on "
                f"{tensor.device.type} tensors"
            )


def _groups(
    tensors: Sequence[Tensor], foreach: bool | None
) -> list[tuple[torch.device, list[Tensor], bool]]:
    """Tensors by device and dtype, and whether to use multi-tensor operations on the group."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return [
        (device, group, use_multi_tensor(group, device, foreach))
        for (device, _), group in by_kind.items()
    ]


def use_multi_tensor(group: list[Tensor], device: torch.device, foreach: bool | None) -> bool:
    """Whether to write these tensors by multi-tensor operations, as torch's functions would.

    Not if two of them share memory, in which these operations would race on a GPU.
    """
    if foreach is not None:
        wanted = foreach and torch_private.device_has_foreach_support(device)
    # They refuse to write tensors that are lazily negated or conjugated.
    elif not compiling() and any(t.is_neg() or t.is_conj() for t in group):
        return False
    else:
        wanted = torch_private.has_foreach_support(group, device)
    return wanted and not _share_memory(group)


def _share_memory(tensors: list[Tensor]) -> bool:
    """Whether a tensor is listed twice, or two of them overlap in memory."""
    if compiling():
        return False
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        return True
    return memory.first_shared(tensors) is not None
