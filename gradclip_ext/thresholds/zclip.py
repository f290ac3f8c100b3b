"""ZClip: clips spikes, found by their z-score against a moving average (Kumar et al., 2025)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradclip_ext import _arguments
from gradclip_ext.thresholds.rule import Rule

__all__ = ["ZClip"]


class ZClip(Rule):
    r"""The limit applies when the norm is many standard deviations above its moving average.

    With the mean :math:`\mu` and the variance :math:`\sigma^2` of earlier steps, a norm :math:`g`
    has the score

    .. math:: z = \frac{g - \mu}{\sigma + 10^{-6}}, \qquad
        g^* = \begin{cases}
            \mu + \dfrac{\text{z\_threshold}^2}{z} \, \sigma & z > \text{z\_threshold} \\
            g & \text{otherwise}
        \end{cases}

    In the first case :math:`g^*` is the limit, in the second there is none. Then

    .. math:: \mu \leftarrow \alpha \mu + (1 - \alpha) g^*, \qquad
        \sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha) (g^* - \mu)^2

    with the new :math:`\mu`. During warm-up only ``max_norm`` clips; at its end :math:`\mu` and
    :math:`\sigma^2` are the mean and the population variance of its norms. The method is that of
    Kumar, Owen, Roy Chowdhury and Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training"
    (2025), arXiv 2504.02507.

    A non-finite norm does not count as a warm-up step. After the warm-up its limit is :math:`\mu`,
    which the limit of a finite norm approaches as the norm grows.

    Args:
        alpha: weight of the previous averages, from 0 to 1.
        z_threshold: score above which a norm is a spike, greater than 0.
        warmup_steps: finite norms to collect first, at least 1.
        max_norm: an additional limit in every step, greater than 0, or None. The averages use the
            norm before this limit is applied.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        alpha: float = 0.97,
        z_threshold: float = 2.5,
        warmup_steps: int = 25,
        max_norm: float | None = None,
    ) -> None:
        super().__init__()
        self.alpha = _arguments.between(alpha, 0, 1, "ZClip", "alpha")
        self.z_threshold = _arguments.positive(z_threshold, "ZClip", "z_threshold")
        self.warmup_steps = _arguments.whole_number(warmup_steps, "ZClip", "warmup_steps", 1)
        self.max_norm = (
            None if max_norm is None else _arguments.positive(max_norm, "ZClip", "max_norm")
        )

    def _initial(self, parameter_count: int, device: torch.device) -> dict[str, Tensor]:
        return {
            name: torch.zeros((), dtype=torch.float64, device=device)
            for name in ("count", "mean", "variance")
        }

    def _advance(
        self, state: dict[str, Tensor], total: Tensor, norms: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        count, mean, variance = state["count"], state["mean"], state["variance"]
        finite = total.isfinite()
        # Whether the warm-up is over is known only on the device, so both branches are computed.
        warming = count < self.warmup_steps

        # Mean and population variance of the norms so far, updated as by Welford (1962), so that
        # the norms themselves need not be kept.
        distance = total - mean
        early_mean = mean + distance / (count + 1.0)
        early_variance = variance + (distance * (total - early_mean) - variance) / (count + 1.0)

        deviation = variance.sqrt()
        score = (distance / (deviation + 1e-6)).masked_fill(finite.logical_not(), math.inf)
        spike = score > self.z_threshold
        reached = mean + self.z_threshold * self.z_threshold / score * deviation
        clipped = torch.where(spike, reached, total)
        late_mean = self.alpha * mean + (1.0 - self.alpha) * clipped
        late_variance = self.alpha * variance + (1.0 - self.alpha) * (clipped - late_mean).square()

        limit = reached.masked_fill(warming | spike.logical_not(), math.inf)
        if self.max_norm is not None:
            limit = limit.clamp(max=self.max_norm)
        return limit, {
            "count": count + finite,
            "mean": torch.where(finite, torch.where(warming, early_mean, late_mean), mean),
            "variance": torch.where(
                finite, torch.where(warming, early_variance, late_variance), variance
            ),
        }
