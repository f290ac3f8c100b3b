"""ZClip: clips spikes, found by their z-score against a moving average (Kumar et al., 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _arguments, _ops
from gradclip_ext._ops import Scalar
from gradclip_ext.thresholds.rule import LARGEST_COUNT, Rule, is_observation

__all__ = ["ZClip"]

# What the variance of norms above 1e154 is taken for, whose squares leave the range of float64.
_LARGEST = torch.finfo(torch.float64).max


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

    A norm that is 0, as without a gradient, or not finite enters neither average and does not count
    as a warm-up step, unlike in the paper, where every norm counts. After the warm-up, the limit of
    a non-finite norm is :math:`\mu`, which the limit of a growing finite norm approaches.

    Args:
        alpha: weight of the previous averages, from 0 to 1.
        z_threshold: score above which a norm is a spike, greater than 0.
        warmup_steps: norms to collect first, finite ones above 0; at least 1.
        max_norm: an additional limit for every step, greater than 0; None for none. The averages
            see the norm before this limit.

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
        self, state: dict[str, Any], total: Scalar, norms: Tensor
    ) -> tuple[Scalar, dict[str, Any]]:
        count, mean, variance = state["count"], state["mean"], state["variance"]
        observed = is_observation(total)
        # Whether the warm-up is over may be known on the device only, so both ways are computed.
        warming = count < min(self.warmup_steps, LARGEST_COUNT)

        deviation = _ops.square_root(variance)
        score = (total - mean) / (deviation + 1e-6)
        # In this order nothing leaves the range of float64 where the score is above the threshold,
        # as the square of the threshold may.
        excess = _ops.quotient(self.z_threshold * deviation, score / self.z_threshold)
        reached = mean + _ops.select(observed, excess, 0.0)
        ordinary = (score <= self.z_threshold) & observed
        limit = _ops.select(warming | ordinary, math.inf, reached)
        norm = _ops.select(observed, _ops.minimum(total, limit), mean)

        # In the warm-up mean and population variance of the norms up to now come from those of the
        # ones before (Welford 1962): the norms themselves need not be kept. Both averages are the
        # same step towards the norm, of another length. A mean of positive norms stays positive,
        # because lerp rounds to between its ends, as a sum of products does not.
        step = _ops.select(warming, 1.0 / (count + 1.0), 1.0 - self.alpha)
        step = _ops.select(observed, step, 0.0)
        new_mean = _ops.lerp(mean, norm, step)
        distance = norm - new_mean
        square = distance * _ops.select(warming, norm - mean, distance)
        new_variance = _ops.lerp(variance, _ops.minimum(square, _LARGEST), step)

        if self.max_norm is not None:
            limit = _ops.minimum(limit, self.max_norm)
        return limit, {"count": count + observed, "mean": new_mean, "variance": new_variance}

    def _check(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        super()._check(tensors, state)
        count, mean, variance = (tensors[name].item() for name in ("count", "mean", "variance"))
        for name, number in (("mean", mean), ("variance", variance)):
            expected = "be a finite number that is not negative"
            self._require(0.0 <= number < math.inf, name, expected, number)
        expected = "be 0, as state['count'] is"
        self._require(count > 0.0 or mean == 0.0, "mean", expected, mean)
        expected = "be 0, as state['mean'] is"
        self._require(mean > 0.0 or variance == 0.0, "variance", expected, variance)

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        # A mean of 0 is that of norms of 0 alone, which count no more.
        never = tensors["mean"] == 0.0
        super()._restore({name: tensor.masked_fill(never, 0.0) for name, tensor in tensors.items()})
