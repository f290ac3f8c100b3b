"""What clip.py compares: implementations of clipping by norm and by value."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gradclip_ext

Parameters = list[torch.nn.Parameter]
# Both clip in place; the first returns the norm before clipping.
ClipNorm = Callable[[Parameters, float], Tensor]
ClipValue = Callable[[Parameters, float], None]

OURS, REFERENCE = "gradclip_ext", "torch"
# Of distributed gradients.
CLIPPER, TITAN = "GradClipper.clip_", "torch, as torchtitan"


@dataclass(frozen=True)
class Implementation:
    """One library or loop; a function that it lacks is None."""

    name: str
    clip_norm: ClipNorm | None
    clip_value: ClipValue | None


def textbook_norm(parameters: Parameters, max_norm: float) -> Tensor:
    """The loop of "Dive into Deep Learning", copied into many repositories."""
    norm = torch.sqrt(sum(torch.sum(p.grad**2) for p in parameters))
    if norm > max_norm:
        for parameter in parameters:
            # Not `grad[:]`, which fails for 0-dim tensors.
            parameter.grad[...] *= max_norm / norm
    return norm


def textbook_value(parameters: Parameters, clip_value: float) -> None:
    for parameter in parameters:
        parameter.grad.clamp_(-clip_value, clip_value)


def apex() -> Implementation | None:
    """NVIDIA Apex, whose clip_grad_norm_ is another drop-in for torch's."""
    try:
        from apex.contrib.clip_grad import clip_grad_norm_
    except ImportError:
        return None
    return Implementation("apex", clip_grad_norm_, None)


def transformer_engine() -> Implementation | None:
    """Transformer Engine's multi-tensor kernels, combined as in Megatron-LM."""
    try:
        import transformer_engine.pytorch  # noqa: F401  (loads the library of the next line)
        import transformer_engine_torch as kernels
    except ImportError:
        return None
    chunk = 2048 * 32

    def clip_norm(parameters: Parameters, max_norm: float) -> Tensor:
        # A launch takes tensors of one dtype.
        groups: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            groups.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        overflow = torch.zeros(1, dtype=torch.int, device=parameters[0].grad.device)
        norms = [
            kernels.multi_tensor_l2norm(chunk, overflow, [gradients], False)[0]
            for gradients in groups.values()
        ]
        norm = torch.linalg.vector_norm(torch.cat(norms))
        coefficient = max_norm / (norm.item() + 1e-6)
        if coefficient < 1:
            for gradients in groups.values():
                kernels.multi_tensor_scale(chunk, overflow, [gradients, gradients], coefficient)
        return norm

    return Implementation("transformer_engine", clip_norm, None)


def compiled() -> list[Implementation]:
    """torch.compile of torch's functions and of ours, with an empty cache."""
    torch._dynamo.reset()
    functions = {"torch.compile": torch.nn.utils, "gradclip_ext, torch.compile": gradclip_ext}
    return [
        Implementation(
            name, torch.compile(module.clip_grad_norm_), torch.compile(module.clip_grad_value_)
        )
        for name, module in functions.items()
    ]


def implementations(device: torch.device, with_compile: bool) -> list[Implementation]:
    """All that run on the device, torch's and ours first; call anew for each list of gradients."""
    norm, value = torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_

    def with_foreach(foreach: bool) -> Implementation:
        arguments: dict[str, Any] = {"foreach": foreach}
        return Implementation(
            f"torch foreach={foreach}",
            functools.partial(norm, **arguments),
            functools.partial(value, **arguments),
        )

    found: list[Implementation | None] = [
        Implementation(REFERENCE, norm, value),
        Implementation(OURS, gradclip_ext.clip_grad_norm_, gradclip_ext.clip_grad_value_),
        with_foreach(False),
        with_foreach(True),
        Implementation("textbook loop", textbook_norm, textbook_value),
    ]
    if device.type == "cuda":
        found += [apex(), transformer_engine()]
    if with_compile:
        found += compiled()
    return [implementation for implementation in found if implementation is not None]
