"""Coupled L2 regularization through torch's operations: a multiple of each parameter is added."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _C
from gradclip_ext._ops import dtensor, torch_ops, torch_private
from gradclip_ext._ops.gradients import (
    Caller,
    read_each_grad,
    refuse_integers,
    refuse_unwritable,
    rehearse,
    require_shape,
    require_storage,
)
from gradclip_ext._ops.observation import compiling

# The largest factor that every dtype of the native engine can hold: that of float16.
LARGEST_NATIVE_FACTOR = 65504.0


@torch.no_grad()
def add_weight_decay_(parameters: Sequence[Any], weight_decay: float, caller: Caller) -> None:
    """See :func:`gradclip_ext.add_weight_decay_`."""
    pairs = _read(parameters, weight_decay, caller)
    if weight_decay == 0.0:
        return
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for gradient, weight in _parts(pairs):
        gradients, weights = groups.setdefault((gradient.device, gradient.dtype), ([], []))
        gradients.append(gradient)
        # Converted before the first gradient is written, since that can fail. Detached, because a
        # Parameter would count as a subclass.
        weights.append(weight.detach().to(gradient.device, gradient.dtype))
    for (device, _), (gradients, weights) in groups.items():
        if torch_ops.use_multi_tensor([*gradients, *weights], device, None):
            torch_private.foreach_add_(gradients, weights, weight_decay)
        else:
            for gradient, weight in zip(gradients, weights, strict=True):
                gradient.add_(weight, alpha=weight_decay)
    _bump_versions_of_dtensors(pairs)


@torch.no_grad()
def require_decayable(parameters: Sequence[Any], weight_decay: float, caller: Caller) -> None:
    """Raise what :func:`add_weight_decay_` would raise, with nothing changed."""
    _read(parameters, weight_decay, caller)


@torch.no_grad()
def add_weight_decay_where_(
    parameters: Sequence[Any], weight_decay: float, condition: Tensor, caller: Caller
) -> None:
    """As :func:`add_weight_decay_` if a 0-dim tensor, which is not read, holds True."""
    pairs = _read(parameters, weight_decay, caller)
    for gradient, weight in _parts(pairs):
        added = _added(gradient, weight, weight_decay)
        gradient.copy_(torch.where(condition.to(gradient.device), added, gradient))
    _bump_versions_of_dtensors(pairs)


@torch.no_grad()
def decayed_grad_norms(
    parameters: Sequence[Any],
    norm_type: float,
    weight_decay: float,
    caller: Caller,
    norm_of: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor] | None:
    """The norms after the weight decay, with nothing written: None if there is no gradient.

    ``norm_of`` measures a copy of one gradient after another; of all at once where they share
    memory, in which the decay of one is part of another.
    """
    pairs = _read(parameters, weight_decay, caller)
    if not pairs:
        return None
    owners = {id(parameter): index for index, parameter in enumerate(parameters)}
    if _share_storages(pairs):
        found = [norm_of(gradient) for gradient in _decayed_together(pairs, weight_decay)]
    else:
        found = [norm_of(_added(gradient, weight, weight_decay)) for gradient, weight in pairs]
    measured = torch.stack([norm.to(found[0].device) for norm in found])
    total = measured.sum() if norm_type == 0.0 else torch.linalg.vector_norm(measured, norm_type)
    each = measured.new_zeros(len(parameters))
    for (_, weight), norm in zip(pairs, measured, strict=True):
        each[owners[id(weight)]] = norm
    return total, each


def _parts(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """What this rank holds of DTensors; torch distributes a parameter anew where it has to."""
    return [dtensor.decay_pair(*pair) or pair for pair in pairs]


def _bump_versions_of_dtensors(pairs: list[tuple[Tensor, Tensor]]) -> None:
    written = [gradient for gradient, _ in pairs if dtensor.is_dtensor(gradient)]
    if written:
        torch.autograd.graph.increment_version(written)


def _share_storages(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether a gradient lies in the storage of another gradient or of a parameter."""
    if compiling() or not all(_C.is_native(g) and _C.is_native(w) for g, w in pairs):
        return False
    gradients = [gradient.untyped_storage().data_ptr() for gradient, _ in pairs]
    weights = {weight.untyped_storage().data_ptr() for _, weight in pairs}
    return len(set(gradients)) < len(gradients) or not weights.isdisjoint(gradients)


def _decayed_together(pairs: list[tuple[Tensor, Tensor]], weight_decay: float) -> list[Tensor]:
    """The gradients after the decay, in copies of their storages that are shared as these are."""
    storages: dict[int, torch.UntypedStorage] = {}

    def copied(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            storages[storage.data_ptr()] = memory.clone().untyped_storage()
        copy = storages[storage.data_ptr()]
        view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        view.set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())
        view = torch_private.negated(view) if tensor.is_neg() else view
        return view.conj() if tensor.is_conj() else view

    copies = [(copied(gradient), copied(weight)) for gradient, weight in pairs]
    for gradient, weight in copies:
        gradient.add_(weight.to(gradient.device, gradient.dtype), alpha=weight_decay)
    return [gradient for gradient, _ in copies]


def _added(gradient: Tensor, weight: Tensor, weight_decay: float) -> Tensor:
    weight = weight.detach().to(gradient.device, gradient.dtype)
    return torch.add(gradient, weight, alpha=weight_decay)


def _read(
    parameters: Sequence[Any], weight_decay: float, caller: Caller
) -> list[tuple[Tensor, Tensor]]:
    """Each gradient with its parameter, once; all that can be wrong is found here."""
    # A copy, because what computes a gradient may also change the list.
    parameters = tuple(parameters)
    found = read_each_grad(parameters, caller)
    if weight_decay == 0.0:
        return []
    owners = []
    given = []
    names = []
    for index, (parameter, gradient) in enumerate(zip(parameters, found, strict=True)):
        if gradient is not None:
            owners.append(parameter)
            given.append(gradient)
            names.append(f"{caller.entry(index)}.grad")
    refuse_integers(given, names, caller.function)
    for parameter, gradient, name in zip(owners, given, names, strict=True):
        _refuse(parameter, gradient, weight_decay, name, caller.function)
    refuse_unwritable(given, names, caller.function)
    for owner, gradient, name in zip(owners, given, names, strict=True):
        _refuse_partial_overlap(owner, gradient, name, caller.function)

    def add(probes: list[Tensor]) -> None:
        for probe in probes:
            probe.add_(probe.resolve_conj().resolve_neg().clone(), alpha=weight_decay)

    rehearse(given, add)
    wanted = {gradient.dtype for gradient in given}

    def convert(probes: list[Tensor]) -> None:
        for probe in probes:
            for dtype in wanted:
                # A real gradient of a complex parameter was refused above.
                if dtype.is_complex or not probe.is_complex():
                    probe.to(dtype)

    rehearse(owners, convert)
    # Without duplicates, so that no multi-tensor operation writes the same memory twice at once.
    pairs = zip(owners, given, strict=True)
    return list({id(owner): (gradient, owner) for owner, gradient in pairs}.values())


def _refuse_partial_overlap(parameter: Tensor, gradient: Tensor, name: str, function: str) -> None:
    """Raise what torch raises where a gradient shares only a part of its parameter's memory."""
    if compiling() or not (_C.is_native(parameter) and _C.is_native(gradient)):
        return
    if not (_C.is_flat(parameter) and _C.is_flat(gradient)) or gradient.numel() == 0:
        return
    begin, other = gradient.data_ptr(), parameter.data_ptr()
    end = begin + gradient.numel() * gradient.element_size()
    other_end = other + parameter.numel() * parameter.element_size()
    if begin < other_end and other < end and (begin, end) != (other, other_end):
        raise RuntimeError(
            f"{function}: {name}: unsupported operation: some elements of the input tensor and the "
            "written-to tensor refer to a single memory location. Please clone() the tensor before "
            "performing the operation."
        )


def _refuse(
    parameter: Tensor, gradient: Tensor, weight_decay: float, name: str, function: str
) -> None:
    if gradient.layout != torch.strided:
        raise TypeError(
            f"{function}: {name}: weight_decay option is not compatible with sparse gradients, "
            f"found the layout {gradient.layout}"
        )
    require_shape(parameter, gradient, name, function)
    if parameter.is_meta and not gradient.is_meta:
        raise RuntimeError(
            f"{function}: the parameter of {name} is on the meta device and has no values"
        )
    if parameter.is_complex() and not gradient.is_complex():
        raise TypeError(
            f"{function}: {name} has to be complex like its parameter, found {gradient.dtype}"
        )
    # torch raises for such a number, but only when it reaches this gradient.
    if torch.finfo(gradient.dtype).max < weight_decay < math.inf:
        raise ValueError(
            f"{function}: weight_decay has to be a number that the dtype of {name}, "
            f"{gradient.dtype}, can hold, found {weight_decay}"
        )
    require_storage(parameter, name.removesuffix(".grad"), function)
