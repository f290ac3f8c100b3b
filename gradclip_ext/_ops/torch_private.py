"""Every private or version-dependent name of torch that this package relies on, in one place.

Each was checked against torch 2.6 and 2.13. A future torch that moves one of them breaks this file,
visibly, and nothing else.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.utils._device import DeviceContext
from torch.utils._foreach_utils import _device_has_foreach_support, _has_foreach_support
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "DeviceContext",
    "device_has_foreach_support",
    "dispatches_itself",
    "foreach_add_",
    "foreach_clamp_",
    "foreach_mul_",
    "has_foreach_support",
    "is_wrapped",
    "is_zero_tensor",
    "negated",
    "parts",
    "stored_values",
    "unobserved",
]


def device_has_foreach_support(device: torch.device) -> bool:
    """Whether ``foreach=True`` is allowed for tensors on this device."""
    return bool(_device_has_foreach_support(device))


def has_foreach_support(tensors: list[torch.Tensor], device: torch.device) -> bool:
    """Whether ``foreach=None`` chooses the multi-tensor operations for these tensors."""
    return bool(_has_foreach_support(tensors, device))


def foreach_add_(tensors: list[torch.Tensor], others: list[torch.Tensor], factor: float) -> None:
    """Add to every tensor, in place, the one at the same index in ``others`` times a number."""
    torch._foreach_add_(tensors, others, alpha=factor)


def foreach_mul_(tensors: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply every tensor in place by one 0-dim tensor on the same device."""
    torch._foreach_mul_(tensors, factor)


def foreach_clamp_(tensors: list[torch.Tensor], clip_value: float) -> None:
    """Clamp every element of every tensor to ``[-clip_value, clip_value]`` in place."""
    torch._foreach_clamp_min_(tensors, -clip_value)
    torch._foreach_clamp_max_(tensors, clip_value)


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether functorch holds another tensor in this one, as vmap and grad do."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_zero_tensor(tensor: torch.Tensor) -> bool:
    """Whether the tensor is 0 throughout without having memory, as some derivatives are."""
    return bool(tensor._is_zerotensor())


def negated(tensor: torch.Tensor) -> torch.Tensor:
    """A view whose elements are negated when they are read."""
    return torch._neg_view(tensor)


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a tensor consists of: values and indices of a sparse one, else itself."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._values(), tensor._indices()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.values(), tensor.crow_indices(), tensor.col_indices()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.values(), tensor.ccol_indices(), tensor.row_indices()]
    return [tensor]


@contextlib.contextmanager
def unobserved() -> Iterator[None]:
    """No dispatch mode and no function mode sees what is done inside."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def dispatches_itself(tensor: torch.Tensor) -> bool:
    """Whether the tensor's class has operations of its own, as DTensor has."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def stored_values(sparse: torch.Tensor) -> torch.Tensor:
    """The values of a sparse COO tensor as they are stored, coalesced or not, sharing memory."""
    return sparse._values()
