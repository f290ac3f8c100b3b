"""The general way: lists that are not wholly native, and every error.

The native functions of ``_C`` decline a list, with nothing changed, as soon as anything in it is
out of the ordinary. It is then sorted here: what is native after all (sparse values, strided views
with gaps) goes back to ``_C``, the rest to torch's operations, and the two meet in one norm.
Everything that can be wrong is found before the first gradient is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _C, _arguments, _torch_ops, _torch_private

_NATIVE_ORDERS = (1.0, 2.0, float("inf"))

# As in csrc/cpu/kernels_body.h: a smaller one would lose bits, or vanish, in float32.
_SMALLEST_FLOAT32_COEFFICIENT = 2.0**-100


class _Gradients:
    """Gradients, sorted by who measures and who writes them.

    Everything is written in place, where it lies: with copies that are written back, a gradient
    that is listed twice, or two views of one memory, would be scaled once.

    Attributes:
        given: the gradients as they came, 0 or more tensors of any shape, dtype and device.
        names: what to call each of them in a message.
        measured: flat memory for the native engine to read: gradients, or copies of strided views
            with gaps, or the sums that an uncoalesced sparse gradient stands for.
        native: flat memory for the native engine to write.
        foreign: tensors for torch's operations to read.
        in_place: tensors for torch's operations to write.
    """

    def __init__(self, given: list[Tensor], names: list[str], norm_type: float = 2.0) -> None:
        self.given = given
        self.names = names
        self.measured: list[Tensor] = []
        self.native: list[Tensor] = []
        self.foreign: list[Tensor] = []
        self.in_place: list[Tensor] = []
        native_allowed = norm_type in _NATIVE_ORDERS and not _observed()
        for gradient in given:
            stored = values = _stored(gradient)
            if gradient.layout == torch.sparse_coo and not gradient.is_coalesced():
                values = gradient.coalesce().values()
            if not native_allowed or not _C.is_native(values):
                self.foreign.append(values)
                self.in_place.append(stored)
                continue
            self.measured.append(values if _C.is_flat(values) else values.contiguous())
            (self.native if _C.is_flat(stored) else self.in_place).append(stored)

    def total_norm(
        self, norm_type: float, foreach: bool | None, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """The norm as it is returned, and the same before it was rounded to its dtype."""
        if not self.measured:
            norm = _torch_ops.total_norm(self.foreign, norm_type, foreach, dtype)
            return norm, norm
        _torch_ops.require_foreach_support(self.foreign, foreach)
        # Only the L2 norm takes a complex number as two real ones.
        measured = [
            t.to(torch.complex128).abs() if t.is_complex() and norm_type != 2.0 else t
            for t in self.measured
        ]
        norms = [
            _finish(norm_type, _C.power_sum(group, norm_type))
            for group in _by_device(measured).values()
        ]
        if self.foreign:
            foreign = _torch_ops.total_norm(self.foreign, norm_type, None, torch.float64)
            norms.append(_whole(foreign))
        # One number of each device travels to where the result has to be.
        device = self.given[0].device
        exact = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]), norm_type)
        result_dtype = dtype or _torch_ops.norm_dtype(self.given)
        return exact.to(result_dtype), exact

    def scale_(self, coefficient: Tensor, foreach: bool | None) -> None:
        """Multiply every gradient by a 0-dim tensor; 1 on the CPU writes nothing."""
        known = coefficient.item() if _is_plain_cpu(coefficient) else None
        if known == 1.0:
            self.bump_versions()
            return
        # First, because torch's operations may fail, and the native ones cannot.
        if known is not None and abs(known) < _SMALLEST_FLOAT32_COEFFICIENT:
            _torch_ops.scale_in_float64_(self.in_place, coefficient)
        else:
            _torch_ops.scale_(self.in_place, coefficient, foreach)
        for device, group in _by_device(self.native).items():
            if known is not None:
                _C.scale_tensors_(group, known)
            elif device.type == "cpu":
                _C.scale_tensors_(group, coefficient.item())
            else:
                _C.scale_tensors_(group, coefficient.to(device))
        self._bump_versions_of_sparse()

    def clamp_(self, bound: float, foreach: bool | None) -> None:
        """Limit every element of every gradient to ``[-bound, bound]``."""
        _torch_ops.clamp_(self.in_place, bound, foreach)
        for group in _by_device(self.native).values():
            _C.clamp_tensors_(group, bound)
        self._bump_versions_of_sparse()

    def bump_versions(self) -> None:
        """Count as written, without writing: torch's functions always write."""
        for gradient in self.given:
            if not gradient.is_inference():
                torch.autograd.graph.increment_version(gradient)

    def _bump_versions_of_sparse(self) -> None:
        # Their values have a version of their own.
        for gradient in self.given:
            if gradient.layout == torch.sparse_coo and not gradient.is_inference():
                torch.autograd.graph.increment_version(gradient)


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor)
    return groups


def _observed() -> bool:
    return torch.compiler.is_compiling() or _C.observed()


def _refuse_unwritable(given: list[Tensor], names: list[str], function: str) -> None:
    """Raise, before anything is written, what torch would raise in the midst of writing."""
    if torch.compiler.is_compiling():
        return
    for gradient, name in zip(given, names, strict=True):
        stored = _stored(gradient)
        if stored.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{function}: {name}: Inplace update to inference tensor outside "
                "InferenceMode is not allowed."
            )
        if stored.layout == torch.strided and _overlaps_itself(stored):
            raise RuntimeError(
                f"{function}: {name}: unsupported operation: more than one element of the "
                "written-to tensor refers to a single memory location. Please clone() the "
                "tensor before performing the operation."
            )


def _is_plain_cpu(tensor: Tensor) -> bool:
    """Whether reading the number in it is free, and nobody is watching."""
    return not _observed() and type(tensor) is Tensor and tensor.device.type == "cpu"


def _stored(gradient: Tensor) -> Tensor:
    if gradient.layout == torch.sparse_coo:
        return _torch_private.stored_values(gradient)
    return gradient


def _overlaps_itself(tensor: Tensor) -> bool:
    """What torch's in-place operations refuse: a stretched dimension, as ``expand`` makes."""
    return tensor.numel() > 0 and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _finish(norm_type: float, power_sum: Tensor) -> Tensor:
    return power_sum.sqrt() if norm_type == 2.0 else power_sum


def _whole(norm: Tensor) -> Tensor:
    """A DTensor's norm may be a partial one until it is gathered."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _require_storage(tensor: Tensor, name: str, function: str) -> None:
    """Refuse a gradient whose memory is gone, which torch would read all the same."""
    if _observed():
        return
    stored = _stored(tensor)
    if not _C.is_native(stored) or stored.numel() == 0:
        return
    if stored.untyped_storage().nbytes() == 0:
        raise RuntimeError(
            f"{function}: {name} of shape {tuple(tensor.shape)} has no memory: "
            "its storage was resized to 0 bytes"
        )


def _read_tensors(tensors: Sequence[Any], function: str) -> tuple[list[Tensor], list[str]]:
    names = []
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise _arguments.item_error(tensor, function, "tensors", index)
        names.append(f"tensors[{index}]")
        _require_storage(tensor, names[-1], function)
    return list(tensors), names


def _read_grads(parameters: Sequence[Any], function: str) -> tuple[list[Tensor], list[str]]:
    gradients = []
    names = []
    for index, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor):
            raise _arguments.item_error(parameter, function, "parameters", index)
        gradient = parameter.grad
        if gradient is not None:
            gradients.append(gradient)
            names.append(f"parameters[{index}].grad")
            _require_storage(gradient, names[-1], function)
    return gradients, names


def _refuse_integers(gradients: list[Tensor], names: list[str], function: str) -> None:
    for gradient, name in zip(gradients, names, strict=True):
        if not gradient.is_floating_point() and not gradient.is_complex():
            raise TypeError(
                f"{function}: {name} has to have a floating point or complex dtype, "
                f"found {gradient.dtype}"
            )


def _measured(
    gradients: _Gradients,
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    norm, exact = gradients.total_norm(norm_type, foreach, dtype)
    if error_if_nonfinite and torch.logical_or(exact.isnan(), exact.isinf()):
        raise _arguments.nonfinite_error(norm_type, gradients.given, gradients.names)
    return norm, exact


@torch.no_grad()
def clip_grad_norm_(
    parameters: Sequence[Any],
    max_norm: float | Tensor,
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """See :func:`gradclip_ext.clip_grad_norm_`."""
    function = "clip_grad_norm_"
    given, names = _read_grads(parameters, function)
    if not given:
        return torch.tensor(0.0, dtype=dtype)
    _refuse_integers(given, names, function)
    gradients = _Gradients(given, names, norm_type)
    _refuse_unwritable(given, names, function)
    with _profiler_range(function):
        norm, exact = _measured(gradients, norm_type, error_if_nonfinite, foreach, dtype)
        _clip(gradients, max_norm, exact, foreach)
    return norm


@torch.no_grad()
def get_total_norm(
    tensors: Sequence[Any],
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """See :func:`gradclip_ext.get_total_norm`."""
    function = "get_total_norm"
    given, names = _read_tensors(tensors, function)
    if not given:
        return torch.tensor(0.0, dtype=dtype)
    _refuse_integers(given, names, function)
    gradients = _Gradients(given, names, norm_type)
    with _profiler_range(function):
        norm, _ = _measured(gradients, norm_type, error_if_nonfinite, foreach, dtype)
    return norm


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Sequence[Any],
    max_norm: float | Tensor,
    total_norm: float | Tensor,
    foreach: bool | None,
) -> None:
    """See :func:`gradclip_ext.clip_grads_with_norm_`."""
    function = "clip_grads_with_norm_"
    given, names = _read_grads(parameters, function)
    if not given:
        return
    _refuse_integers(given, names, function)
    gradients = _Gradients(given, names)
    _refuse_unwritable(given, names, function)
    _torch_ops.require_foreach_support(gradients.in_place, foreach)
    if isinstance(total_norm, Tensor):
        norm = _whole(total_norm).detach().reshape(())
    else:
        # Named, because a default device may be set that has no number to read.
        norm = torch.tensor(total_norm, dtype=torch.float64, device="cpu")
    if gradients.native:
        # Without rounding to a 16-bit norm's dtype on the way.
        norm = norm.to(torch.float64)
    with _profiler_range(function):
        _clip(gradients, max_norm, norm, foreach)


@torch.no_grad()
def clip_grad_value_(parameters: Sequence[Any], clip_value: float, foreach: bool | None) -> None:
    """See :func:`gradclip_ext.clip_grad_value_`."""
    function = "clip_grad_value_"
    given, names = _read_grads(parameters, function)
    for gradient, name in zip(given, names, strict=True):
        if gradient.is_complex():
            raise NotImplementedError(
                f"{function}: {name}: clamp is not supported for complex types"
            )
        if gradient.layout not in (torch.strided, torch.sparse_coo):
            raise NotImplementedError(
                f"{function}: {name}: clamp is not supported for the layout {gradient.layout}"
            )
    _refuse_integers(given, names, function)
    _refuse_unwritable(given, names, function)
    for gradient in given:
        # What an element is, is known only after the values at one place are added up.
        if gradient.layout == torch.sparse_coo and not gradient.is_coalesced():
            gradient.copy_(gradient.coalesce())
    gradients = _Gradients(given, names)
    _torch_ops.require_foreach_support(gradients.in_place, foreach)
    with _profiler_range(function):
        gradients.clamp_(clip_value, foreach)


@torch.no_grad()
def grad_norms(parameters: Sequence[Any], norm_type: float, function: str) -> tuple[Tensor, Tensor]:
    """The norm of all gradients and of each, 0 without one: float64, on the first one's device."""
    given, _ = _read_grads(parameters, function)
    if not given:
        zeros = torch.zeros(len(parameters), dtype=torch.float64)
        return zeros.sum(), zeros
    # As a whole, like get_total_norm; the norms of the parts do not add up for every order.
    total = get_total_norm(given, norm_type, False, None, torch.float64)
    measured = {
        index: get_total_norm([parameter.grad], norm_type, False, None, torch.float64)
        for index, parameter in enumerate(parameters)
        if parameter.grad is not None
    }
    nothing = torch.zeros_like(total)
    each = [measured.get(index, nothing).to(total.device) for index in range(len(parameters))]
    return total, torch.stack(each)


@torch.no_grad()
def scale_by_(parameters: Sequence[Any], coefficient: Tensor, function: str) -> None:
    """Multiply every gradient by a 0-dim float64 tensor, which nobody waits for on a GPU."""
    given, names = _read_grads(parameters, function)
    if given:
        gradients = _Gradients(given, names)
        _refuse_unwritable(given, names, function)
        gradients.scale_(coefficient, None)


@torch.no_grad()
def scale_each_(parameters: Sequence[Any], coefficients: Tensor, function: str) -> None:
    """Multiply each gradient by its own; 0 clears what is not finite, too."""
    given, names = _read_grads(parameters, function)
    _refuse_unwritable(given, names, function)
    for index, parameter in enumerate(parameters):
        if parameter.grad is None:
            continue
        stored = _stored(parameter.grad)
        coefficient = coefficients[index].to(stored.device)
        wide = stored.to(_torch_ops.widened_dtype(stored, torch.float64)) * coefficient
        stored.copy_(torch.where(coefficient == 0, torch.zeros_like(wide), wide))


def _clip(
    gradients: _Gradients, max_norm: float | Tensor, norm: Tensor, foreach: bool | None
) -> None:
    if _is_infinite(max_norm):
        if not torch.compiler.is_compiling():
            gradients.bump_versions()
        return
    gradients.scale_(_torch_ops.clip_coefficient(max_norm, norm), foreach)


def _profiler_range(function: str) -> contextlib.AbstractContextManager[Any]:
    # The range is made of two operations, which a mode or a trace would see.
    if _observed():
        return contextlib.nullcontext()
    return torch.profiler.record_function(f"gradclip_ext::{function}")


def _is_infinite(max_norm: float | Tensor) -> bool:
    return not isinstance(max_norm, Tensor) and max_norm == float("inf")
