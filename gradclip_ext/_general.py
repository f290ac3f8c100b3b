"""The general way: lists that are not wholly native, and every error.

The native functions of ``_C`` decline a list, with nothing changed, as soon as anything in it is
out of the ordinary. It is then sorted here: what is native after all (sparse values, strided views
with gaps) goes back to ``_C``, the rest to torch's operations, and the two meet in one norm.
Everything that can be wrong is found before the first gradient is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _C, _arguments, _torch_ops

_NATIVE_ORDERS = (1.0, 2.0, float("inf"))


class _Gradients:
    """Gradients, sorted by who works on them.

    Attributes:
        given: the gradients as they came, 0 or more tensors of any shape, dtype and device.
        names: what to call each of them in a message.
        native: flat memory for the native engine.
        foreign: tensors for torch's operations.
        write_back: (gradient, tensor in ``native`` or ``foreign``) where the one that is worked on
            is a copy of the gradient's values.
    """

    def __init__(self, given: list[Tensor], names: list[str], norm_type: float = 2.0) -> None:
        self.given = given
        self.names = names
        self.native: list[Tensor] = []
        self.foreign: list[Tensor] = []
        self.write_back: list[tuple[Tensor, Tensor]] = []
        native_allowed = norm_type in _NATIVE_ORDERS and not _observed()
        for gradient in given:
            self._sort(gradient, native_allowed)

    def _sort(self, gradient: Tensor, native_allowed: bool) -> None:
        values = gradient
        if gradient.layout == torch.sparse_coo:
            coalesced = gradient.coalesce()
            values = coalesced.values()
            if coalesced is not gradient:
                self.write_back.append((gradient, coalesced))
        if not native_allowed or not _C.is_native(values):
            self.foreign.append(values)
            return
        if not _C.is_flat(values):
            flat = values.contiguous()
            self.write_back.append((values, flat))
            values = flat
        self.native.append(values)

    def refuse_unwritable(self, function: str) -> None:
        """Raise, before anything is written, what torch would raise in the midst of writing."""
        if torch.compiler.is_compiling():
            return
        for gradient, name in zip(self.given, self.names, strict=True):
            if gradient.is_inference() and not torch.is_inference_mode_enabled():
                raise RuntimeError(
                    f"{function}: {name}: Inplace update to inference tensor outside "
                    "InferenceMode is not allowed."
                )
            if gradient.layout == torch.strided and _overlaps_itself(gradient):
                raise RuntimeError(
                    f"{function}: {name}: unsupported operation: more than one element of the "
                    "written-to tensor refers to a single memory location. Please clone() the "
                    "tensor before performing the operation."
                )

    def total_norm(
        self, norm_type: float, foreach: bool | None, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """The norm as it is returned, and the same before it was rounded to its dtype."""
        if not self.native:
            norm = _torch_ops.total_norm(self.foreign, norm_type, foreach, dtype)
            return norm, norm
        _torch_ops.require_foreach_support(self.foreign, foreach)
        # Only the L2 norm takes a complex number as two real ones.
        measured = [
            t.to(torch.complex128).abs() if t.is_complex() and norm_type != 2.0 else t
            for t in self.native
        ]
        norms = [_finish(norm_type, _C.power_sum(measured, norm_type))]
        if self.foreign:
            foreign = _torch_ops.total_norm(self.foreign, norm_type, None, torch.float64)
            norms.append(_whole(foreign).to(norms[0].device))
        exact = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        result_dtype = dtype or _torch_ops.norm_dtype(self.given)
        return exact.to(self.given[0].device, result_dtype), exact

    def scale_(self, coefficient: Tensor, foreach: bool | None) -> None:
        """Multiply every gradient by a 0-dim tensor."""
        if self.native:
            _C.scale_(self.native, coefficient.item())
        _torch_ops.scale_(self.foreign, coefficient, foreach)
        self._write_back()

    def clamp_(self, bound: float, foreach: bool | None) -> None:
        """Limit every element of every gradient to ``[-bound, bound]``."""
        if self.native:
            _C.clamp_(self.native, bound)
        _torch_ops.clamp_(self.foreign, bound, foreach)
        self._write_back()

    def _write_back(self) -> None:
        # Values of a sparse gradient may themselves be such a copy: innermost first.
        for gradient, values in reversed(self.write_back):
            gradient.copy_(values)


def _observed() -> bool:
    return torch.compiler.is_compiling() or _C.observed()


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
    if _observed() or not _C.is_native(tensor) or tensor.numel() == 0:
        return
    if tensor.untyped_storage().nbytes() == 0:
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
    gradients.refuse_unwritable(function)
    norm, exact = _measured(gradients, norm_type, error_if_nonfinite, foreach, dtype)
    if not _is_infinite(max_norm):
        gradients.scale_(_torch_ops.clip_coefficient(max_norm, exact), foreach)
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
    gradients.refuse_unwritable(function)
    _torch_ops.require_foreach_support(gradients.foreign, foreach)
    if _is_infinite(max_norm):
        return
    if isinstance(total_norm, Tensor):
        norm = _whole(total_norm).detach().reshape(())
    else:
        norm = torch.tensor(total_norm, dtype=torch.float64)
    if gradients.native:
        # Without rounding to a 16-bit norm's dtype on the way.
        norm = norm.to(torch.float64)
    gradients.scale_(_torch_ops.clip_coefficient(max_norm, norm), foreach)


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
    gradients = _Gradients(given, names)
    gradients.refuse_unwritable(function)
    _torch_ops.require_foreach_support(gradients.foreign, foreach)
    gradients.clamp_(clip_value, foreach)


def _is_infinite(max_norm: float | Tensor) -> bool:
    return not isinstance(max_norm, Tensor) and max_norm == float("inf")
