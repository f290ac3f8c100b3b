"""Reads the gradients of a list, refuses those that cannot be clipped, and sorts the others.

Every error in a list is found here, before the first gradient is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradclip_ext import _C, _arguments
from gradclip_ext._ops import dtensor, memory, torch_ops, torch_private
from gradclip_ext._ops.observation import compiling, observed

NATIVE_NORM_TYPES = (1.0, 2.0, float("inf"))
NATIVE_REAL_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# For the L2 norm and for scaling.
NATIVE_COMPLEX_DTYPES = (torch.complex64, torch.complex128)

# As in csrc/core/norm.h: a smaller one would lose bits in float32, or underflow to 0.
SMALLEST_FLOAT32_COEFFICIENT = 2.0**-100


@dataclass(frozen=True)
class Caller:
    """How messages name the public function and the entries of its list.

    Attributes:
        function: the name of the function.
        argument: the name of the argument that holds the list.
        names: the name of each entry, if entries have names of their own.
    """

    function: str
    argument: str = "parameters"
    names: tuple[str, ...] | None = None

    def entry(self, index: int) -> str:
        """The name of an entry of the list."""
        return self.names[index] if self.names is not None else f"{self.argument}[{index}]"


class Gradients:
    """Gradients, sorted by what measures and what writes them.

    Everything is written in place: if copies were scaled and written back, a gradient that is
    listed twice, or two views of the same memory, would be scaled only once.

    Attributes:
        given: the gradients as passed, 0 or more tensors of any shape, dtype and device.
        names: the name of each in messages.
        measured: flat memory for the native engine to read: gradients, copies of strided views
            with gaps, or the coalesced values of a sparse gradient.
        native: flat memory for the native engine to write.
        fallback: tensors for torch's operations to read.
        in_place: tensors for torch's operations to write.
    """

    def __init__(self, given: list[Tensor], names: list[str], norm_type: float = 2.0) -> None:
        self.given = given
        self.names = names
        self.measured: list[Tensor] = []
        self.native: list[Tensor] = []
        self.fallback: list[Tensor] = []
        self.in_place: list[Tensor] = []
        native_allowed = norm_type in NATIVE_NORM_TYPES and not observed()
        for gradient in given:
            stored = values = stored_values(gradient)
            if gradient.layout == torch.sparse_coo and not gradient.is_coalesced():
                values = stored_values(gradient.coalesce())
            if not native_allowed or not _C.is_native(values):
                self.fallback.append(values)
                self.in_place.append(stored)
                continue
            self.measured.append(values if _C.is_flat(values) else values.contiguous())
            (self.native if _C.is_flat(stored) else self.in_place).append(stored)

    def total_norm(
        self, norm_type: float, foreach: bool | None, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """The norm as it is returned, and the same before rounding to its dtype."""
        if not self.measured:
            norm = torch_ops.total_norm(self.fallback, norm_type, foreach, dtype)
            return norm, norm
        torch_ops.require_foreach_support(self.fallback, foreach)
        # Only the L2 norm can treat a complex number as two real ones.
        measured = [
            t.to(torch.complex128).abs() if t.is_complex() and norm_type != 2.0 else t
            for t in self.measured
        ]
        norms = [
            _finish(norm_type, _C.power_sum(group, norm_type))
            for group in _by_device(measured).values()
        ]
        if self.fallback:
            norm = torch_ops.total_norm(self.fallback, norm_type, None, torch.float64)
            norms.append(dtensor.whole(norm))
        # One number per device is copied to the device of the result.
        device = self.given[0].device
        exact = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]), norm_type)
        result_dtype = dtype or torch_ops.norm_dtype(self.given)
        return exact.to(result_dtype), exact

    def require_scalable(self, foreach: bool | None) -> None:
        """Raise what :meth:`scale_` would raise, before anything is written."""
        one = torch.ones((), dtype=torch.float64, device="cpu")
        rehearse(self.in_place, lambda probes: torch_ops.scale_(probes, one, foreach))

    def require_clampable(self, clip_value: float, foreach: bool | None) -> None:
        """Raise what :meth:`clamp_` would raise, before anything is written."""
        rehearse(self.in_place, lambda probes: torch_ops.clamp_(probes, clip_value, foreach))

    def scale_(self, coefficient: Tensor, foreach: bool | None) -> None:
        """Multiply every gradient by a 0-dim tensor; 1 on the CPU writes nothing."""
        is_plain = not observed() and type(coefficient) is Tensor
        known = coefficient.item() if is_plain and coefficient.device.type == "cpu" else None
        if known == 1.0:
            self.bump_versions()
            return
        # First, because torch's operations may fail, and the native ones cannot.
        if known is not None and abs(known) < SMALLEST_FLOAT32_COEFFICIENT:
            torch_ops.scale_in_float64_(self.in_place, coefficient)
        else:
            torch_ops.scale_(self.in_place, coefficient, foreach)
        for device, group in _by_device(self.native).items():
            if known is not None:
                _C.scale_tensors_(group, known)
            elif device.type == "cpu":
                _C.scale_tensors_(group, coefficient.item())
            else:
                _C.scale_tensors_(group, coefficient.to(device))
        self._bump_versions_of_wholes()

    def clamp_(self, clip_value: float, foreach: bool | None) -> None:
        """Clamp every element of every gradient to ``[-clip_value, clip_value]``."""
        torch_ops.clamp_(self.in_place, clip_value, foreach)
        for group in _by_device(self.native).values():
            _C.clamp_tensors_(group, clip_value)
        self._bump_versions_of_wholes()
        self._bump_versions_of_wholes()

    def bump_versions(self) -> None:
        """Bump the versions without a write, since torch's functions always write."""
        if compiling():
            return
        for gradient in self.given:
            if not gradient.is_inference():
                torch.autograd.graph.increment_version(gradient)

    def _bump_versions_of_wholes(self) -> None:
        # The values of a sparse one and the local part of a DTensor have counters of their own.
        for gradient in self.given:
            is_whole = gradient.layout == torch.sparse_coo or dtensor.is_dtensor(gradient)
            if is_whole and not gradient.is_inference():
                torch.autograd.graph.increment_version(gradient)


def norm_of_one(gradient: Tensor, name: str, norm_type: float) -> Tensor:
    """The norm of one gradient as a plain 0-dim float64 tensor."""
    gradients = Gradients([gradient], [name], norm_type)
    if gradients.measured:
        return gradients.total_norm(norm_type, None, torch.float64)[0]
    # Not get_total_norm's, which is the norm of its norm: for order 0 that is 1, whatever it holds.
    return dtensor.whole(torch_ops.tensor_norm(gradients.fallback[0], norm_type))


def read_tensors(tensors: Sequence[Any], caller: Caller) -> tuple[list[Tensor], list[str]]:
    """The tensors and the name of each."""
    names = []
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise _arguments.item_error(tensor, caller.function, caller.argument, index)
        names.append(caller.entry(index))
        require_storage(tensor, names[-1], caller.function)
    return list(tensors), names


def read_grads(parameters: Sequence[Any], caller: Caller) -> tuple[list[Tensor], list[str]]:
    """The gradients of those parameters that have one, and what to call each of them."""
    found = read_each_grad(parameters, caller)
    gradients = [gradient for gradient in found if gradient is not None]
    names = [
        f"{caller.entry(index)}.grad"
        for index, gradient in enumerate(found)
        if gradient is not None
    ]
    return gradients, names


def read_each_grad(parameters: Sequence[Any], caller: Caller) -> list[Tensor | None]:
    """The gradient of each parameter, read once: a subclass may compute another each time."""
    gradients: list[Tensor | None] = []
    # A copy, because what computes a gradient may also change the list.
    for index, parameter in enumerate(tuple(parameters)):
        if not isinstance(parameter, Tensor):
            raise _arguments.item_error(parameter, caller.function, caller.argument, index)
        gradient: Any = parameter.grad
        if gradient is not None and not isinstance(gradient, Tensor):
            raise TypeError(
                f"{caller.function}: {caller.entry(index)}.grad has to be a torch.Tensor or None, "
                f"found {_arguments.describe(gradient)}"
            )
        gradients.append(gradient)
    # After the last one was read, which may have resized the memory of those before.
    for index, gradient in enumerate(gradients):
        if gradient is not None:
            require_storage(gradient, f"{caller.entry(index)}.grad", caller.function)
    return gradients


def require_storage(tensor: Tensor, name: str, function: str) -> None:
    """Refuse a tensor whose storage holds less than it needs, which torch would read all the same.

    FSDP1 resizes storages to 0 bytes between uses; other sizes come from resizing by hand.
    """
    if compiling():
        return
    tensor = dtensor.local(tensor)
    if not (type(tensor) in (Tensor, Parameter) or _C.is_native(tensor)):
        return
    if torch_private.is_wrapped(tensor):
        # By functorch: what it stands for has a storage, and it has not.
        return
    for stored in torch_private.parts(tensor):
        _require_part(tensor, stored, name, function)


def _require_part(tensor: Tensor, stored: Tensor, name: str, function: str) -> None:
    if stored.layout != torch.strided or stored.numel() == 0:
        return
    needed = (stored.storage_offset() + memory.extent(stored)) * stored.element_size()
    found = stored.untyped_storage().nbytes()
    if found == 0:
        raise RuntimeError(
            f"{function}: {name} of shape {tuple(tensor.shape)} has no memory: "
            "its storage was resized to 0 bytes"
        )
    if found < needed:
        raise RuntimeError(
            f"{function}: {name} of shape {tuple(tensor.shape)} needs a storage of {needed} bytes, "
            f"found one of {found}"
        )


def require_shape(parameter: Tensor, gradient: Tensor, name: str, function: str) -> None:
    """Refuse a gradient whose elements do not belong to those of its parameter one by one."""
    if gradient.shape != parameter.shape:
        raise ValueError(
            f"{function}: {name} has to have the shape of its parameter, "
            f"{tuple(parameter.shape)}, found {tuple(gradient.shape)}"
        )


def refuse_meta(gradients: list[Tensor], names: list[str], function: str) -> None:
    """Raise for a gradient on the meta device, which has no values."""
    for gradient, name in zip(gradients, names, strict=True):
        if gradient.is_meta:
            raise RuntimeError(f"{function}: {name} is on the meta device and has no values")


def refuse_integers(gradients: list[Tensor], names: list[str], function: str) -> None:
    """Raise for a dtype that has no norm."""
    for gradient, name in zip(gradients, names, strict=True):
        if not gradient.is_floating_point() and not gradient.is_complex():
            raise TypeError(
                f"{function}: {name} has to have a floating point or complex dtype, "
                f"found {gradient.dtype}"
            )


def refuse_unwritable(given: list[Tensor], names: list[str], function: str) -> None:
    """Raise, before anything is written, what torch would raise halfway through."""
    if compiling():
        return
    for gradient, name in zip(given, names, strict=True):
        stored = stored_values(gradient)
        if stored.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{function}: {name}: Inplace update to inference tensor outside "
                "InferenceMode is not allowed."
            )
        if torch_private.is_zero_tensor(stored):
            raise RuntimeError(f"{function}: {name}: ZeroTensors are immutable. Please clone() it.")
        if stored.layout == torch.strided and overlaps_itself(stored):
            raise RuntimeError(
                f"{function}: {name}: unsupported operation: more than one element of the "
                "written-to tensor refers to a single memory location. Please clone() the "
                "tensor before performing the operation."
            )


def rehearse(tensors: Sequence[Tensor], write: Callable[[list[Tensor]], None]) -> None:
    """Run a writing operation on one element of each kind of tensor.

    What torch refuses to do to a dtype, a device or a lazily conjugated tensor it then refuses
    before the first gradient is written. Subclasses with operations of their own cannot be
    rehearsed. Nothing that watches sees it.
    """
    if compiling():
        return
    with torch_private.unobserved():
        probes: dict[tuple[Any, ...], Tensor] = {}
        for tensor in tensors:
            kind = (tensor.device, tensor.dtype, tensor.is_conj(), tensor.is_neg())
            if kind in probes or torch_private.dispatches_itself(tensor):
                continue
            probe = torch.ones(1, dtype=tensor.dtype, device=tensor.device)
            probe = torch_private.negated(probe) if tensor.is_neg() else probe
            probes[kind] = probe.conj() if tensor.is_conj() else probe
        if probes:
            write(list(probes.values()))


def stored_values(gradient: Tensor) -> Tensor:
    """What a gradient stores on this rank: the values of a sparse one, else the gradient itself."""
    gradient = dtensor.local(gradient)
    if gradient.layout == torch.sparse_coo:
        return torch_private.stored_values(gradient)
    return gradient


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether it has an expanded dimension, which torch's in-place operations refuse."""
    return tensor.numel() > 0 and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def have_float64(parameters: Sequence[Any]) -> bool:
    """Whether any gradient is float64, the squares of whose finite elements may overflow.

    Where there is none, another rank may have one, of the parameter's dtype.
    """
    wide = (torch.float64, torch.complex128)
    return any((p if p.grad is None else p.grad).dtype in wide for p in parameters)


def are_complex(parameters: Sequence[Any]) -> bool:
    """Whether any gradient is complex, and so has no elements to limit."""
    return any(p.grad is not None and p.grad.is_complex() for p in parameters)


def nonfinite_error(
    norm_type: float, gradients: Sequence[Tensor], names: Sequence[str]
) -> RuntimeError:
    """Torch's error for a non-finite norm, and the first gradient that is to blame."""
    message = (
        f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so "
        "it cannot be clipped. To disable this error and scale the gradients by the non-finite "
        "norm anyway, set `error_if_nonfinite=False`"
    )
    culprits = [
        f"{name} of shape {tuple(gradient.shape)}"
        for name, gradient in zip(names, gradients, strict=True)
        if not _is_finite(gradient)
    ]
    if culprits:
        message += (
            f". The first of {len(culprits)} non-finite gradients (out of {len(gradients)}) "
            f"is that of {culprits[0]}."
        )
    else:
        message += f". All {len(gradients)} gradients are finite, but their norm is not."
    return RuntimeError(message)


def _is_finite(gradient: Tensor) -> bool:
    values = gradient.coalesce().values() if gradient.layout == torch.sparse_coo else gradient
    return bool(torch.isfinite(values).all())


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor)
    return groups


def _finish(norm_type: float, power_sum: Tensor) -> Tensor:
    return power_sum.sqrt() if norm_type == 2.0 else power_sum
