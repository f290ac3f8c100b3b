"""AdaGC: clips each parameter by its own recent norms (Wang et al., 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _arguments
from gradclip_ext.thresholds.rule import Rule

__all__ = ["AdaGC"]


class AdaGC(Rule):
    r"""Each parameter's limit follows a moving average of its own clipped norms.

    During warm-up all gradients are clipped together, and the smallest norm of each parameter
    after that is kept:

    .. math:: h = \min\left(\frac{\text{absolute\_limit}}{\lVert g \rVert}, 1\right), \qquad
        \gamma_i \leftarrow \min(\gamma_i, h \lVert g_i \rVert)

    Afterwards parameter :math:`i` is clipped on its own:

    .. math:: \text{limit}_i = \text{relative\_limit} \cdot \gamma_i, \qquad
        \gamma_i \leftarrow \beta \gamma_i
            + (1 - \beta) \min(\lVert g_i \rVert, \text{limit}_i)

    The method is that of Wang et al., "AdaGC: Improving Training Stability for Large Language
    Model Pretraining" (2025), arXiv 2502.11034.

    A norm of 0, as without a gradient, leaves :math:`\gamma_i` unchanged. A parameter that has its
    first gradient after the warm-up is not clipped in that step, and its norm becomes
    :math:`\gamma_i`. A step with a non-finite total leaves the state unchanged and does not count
    as a warm-up step; its limits are those of the second formula.

    Args:
        relative_limit: how far a norm may exceed its average, as a factor greater than 0.
        beta: weight of the previous average, from 0 to 1.
        warmup_steps: steps with a finite total in which all gradients are clipped together, not
            negative.
        absolute_limit: limit of the total norm in these steps, greater than 0.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is outside its range; in :meth:`limits`, the number of parameters
            differs from that of earlier steps.
    """

    per_parameter: bool = True

    def __init__(
        self,
        relative_limit: float = 1.05,
        beta: float = 0.98,
        warmup_steps: int = 100,
        absolute_limit: float = 1.0,
    ) -> None:
        super().__init__()
        self.relative_limit = _arguments.positive(relative_limit, "AdaGC", "relative_limit")
        self.beta = _arguments.between(beta, 0, 1, "AdaGC", "beta")
        self.warmup_steps = _arguments.whole_number(warmup_steps, "AdaGC", "warmup_steps", 0)
        self.absolute_limit = _arguments.positive(absolute_limit, "AdaGC", "absolute_limit")

    def _initial(self, parameter_count: int, device: torch.device) -> dict[str, Tensor]:
        return {
            "count": torch.zeros((), dtype=torch.float64, device=device),
            "gamma": torch.full((parameter_count,), math.inf, dtype=torch.float64, device=device),
        }

    def _advance(
        self, state: dict[str, Tensor], total: Tensor, norms: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        count, gamma = state["count"], state["gamma"]
        if norms.shape != gamma.shape:
            raise ValueError(
                f"AdaGC: norms has to hold one for each of the {gamma.numel()} parameters of the "
                f"steps before, found shape {tuple(norms.shape)}"
            )
        finite = total.isfinite()
        warming = count < self.warmup_steps
        # A total of 0 makes the quotient infinite, and the coefficient 1.
        together = norms * (self.absolute_limit / total).clamp(max=1.0)
        limits = torch.where(warming & finite, together, self.relative_limit * gamma)

        clipped = torch.minimum(norms, limits)
        average = self.beta * gamma + (1.0 - self.beta) * clipped
        late = torch.where(gamma.isinf(), clipped, average)
        updated = torch.where(warming, torch.minimum(gamma, clipped), late)
        counts = finite & norms.isfinite() & (norms > 0.0)
        return limits, {"count": count + finite, "gamma": torch.where(counts, updated, gamma)}

    def _check(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        found = tensors["gamma"].numel()
        if self._state and found and found != self._state["gamma"].numel():
            raise ValueError(
                f"AdaGC: state['gamma'] has to hold one norm for each of "
                f"{self._state['gamma'].numel()} parameters, found {found}"
            )

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        # A rule that was saved before its first step does not know the number of parameters.
        super()._restore(tensors if tensors["gamma"].numel() else {})
