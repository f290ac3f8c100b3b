"""What GradClipper, grad_norms and the rules do, written by hand in torch: the baselines.

They are written as in training scripts and agree with ours up to rounding. Nothing here uses
gradclip_ext. All parameters must have gradients.
"""

from __future__ import annotations

import collections
import math

import numpy
import torch
from torch import Tensor

Parameters = list[torch.nn.Parameter]

# What torch adds to a norm before it divides by it. Our rules add nothing, as in their papers.
TORCH_EPSILON = 1e-6
# How many norms a history keeps.
HISTORY = 1000


def norms_one_by_one(parameters: Parameters) -> tuple[Tensor, Tensor]:
    """The norm of all gradients, and that of each."""
    norms = torch.stack([parameter.grad.norm() for parameter in parameters])
    return norms.norm(), norms


def norms_by_foreach(parameters: Parameters) -> tuple[Tensor, Tensor]:
    """The same with torch's fastest operations."""
    norms = torch.stack(torch._foreach_norm([parameter.grad for parameter in parameters]))
    return norms.norm(), norms


def total_norm_on_host(parameters: Parameters) -> float:
    """As in many scripts, with a device sync per gradient."""
    return math.sqrt(sum(parameter.grad.norm().item() ** 2 for parameter in parameters))


class Clipper:
    """Clips to a number, and keeps norms and counts without a device sync."""

    def __init__(self, parameters: Parameters, max_norm: float, foreach: bool = False) -> None:
        """With `foreach`, measures only once and with torch's fastest operations."""
        self.parameters = parameters
        self.max_norm = max_norm
        self.foreach = foreach
        self.totals: collections.deque[Tensor] = collections.deque(maxlen=HISTORY)
        self.clipped = torch.zeros((), dtype=torch.int64, device=parameters[0].device)

    def clip_(self) -> tuple[Tensor, Tensor]:
        if self.foreach:
            total, norms = norms_by_foreach(self.parameters)
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_norm, total)
        else:
            norms = torch.stack([parameter.grad.norm() for parameter in self.parameters])
            total = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.totals.append(total)
        self.clipped += total > self.max_norm
        return total, norms


class AutoClip:
    """Clips to a percentile of the norms so far."""

    def __init__(self, parameters: Parameters, percentile: float) -> None:
        self.parameters = parameters
        self.percentile = percentile
        self.history: list[float] = []

    def clip_(self) -> float:
        total = total_norm_on_host(self.parameters)
        self.history.append(total)
        limit = float(numpy.percentile(self.history, self.percentile))
        torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        return total


class ZClip:
    """Clips outliers against exponential moving averages, which are Python floats."""

    def __init__(self, parameters: Parameters, alpha: float, z_threshold: float) -> None:
        self.parameters = parameters
        self.alpha = alpha
        self.z_threshold = z_threshold
        self.mean = self.variance = 0.0

    def clip_(self) -> float:
        total = clipped = total_norm_on_host(self.parameters)
        deviation = math.sqrt(self.variance)
        score = (total - self.mean) / (deviation + 1e-6)
        if score > self.z_threshold:
            clipped = self.mean + self.z_threshold**2 / score * deviation
            coefficient = clipped / (total + TORCH_EPSILON)
            for parameter in self.parameters:
                parameter.grad.mul_(coefficient)
        self.mean = self.alpha * self.mean + (1 - self.alpha) * clipped
        self.variance = self.alpha * self.variance + (1 - self.alpha) * (clipped - self.mean) ** 2
        return total


class AdaGC:
    """Clips each gradient to a multiple of the moving average of its own norm."""

    def __init__(self, parameters: Parameters, beta: float, relative_limit: float) -> None:
        self.parameters = parameters
        self.beta = beta
        self.relative_limit = relative_limit
        self.gammas = [0.0] * len(parameters)

    def clip_(self) -> list[float]:
        norms = []
        for index, parameter in enumerate(self.parameters):
            norm = parameter.grad.norm().item()
            limit = self.relative_limit * self.gammas[index]
            if norm > limit:
                parameter.grad.mul_(limit / norm)
            average = self.beta * self.gammas[index]
            self.gammas[index] = average + (1 - self.beta) * min(norm, limit)
            norms.append(norm)
        return norms


def unit_norms(tensor: Tensor) -> Tensor:
    """Of each row, filter and so on; a tensor of one dimension or none is a single unit."""
    if tensor.dim() < 2:
        return tensor.norm()
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.dim())), keepdim=True)


@torch.no_grad()
def adaptive_clip_grad_(parameters: Parameters, clip_factor: float) -> None:
    """Clips each unit's gradient to a multiple of the norm of its weights."""
    for parameter in parameters:
        gradient = parameter.grad
        limits = unit_norms(parameter).clamp(min=1e-3) * clip_factor
        norms = unit_norms(gradient)
        clipped = gradient * (limits / norms.clamp(min=1e-6))
        gradient.copy_(torch.where(norms > limits, clipped, gradient))


@torch.no_grad()
def add_weight_decay_(parameters: Parameters, weight_decay: float) -> None:
    for parameter in parameters:
        parameter.grad.add_(parameter, alpha=weight_decay)
