"""AdaGC: clips each parameter by its own recent norms (Wang et al., 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gradclip_ext import _arguments, _ops
from gradclip_ext._ops import Scalar
from gradclip_ext.thresholds.rule import LARGEST_COUNT, Rule, is_observation, outside_inference

__all__ = ["AdaGC"]

# No limit is smaller, so that none becomes 0 where a product leaves the range of float64.
_SMALLEST_LIMIT = torch.finfo(torch.float64).tiny


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

    A norm of 0, as without a gradient, leaves :math:`\gamma_i` unchanged, whereas the paper's
    formulas would lower it to as little as 0; its limit is that of the second formula. A parameter
    that has its first gradient after the warm-up is not clipped in that step, and its norm becomes
    :math:`\gamma_i`. A step whose total is 0 or not finite changes nothing and does not count as a
    warm-up step; its limits are those of the second formula.

    Each average belongs to a parameter: when the parameters change, :meth:`rearrange` moves it with
    them.

    Args:
        relative_limit: how far a norm may exceed its average, as a factor greater than 0.
        beta: weight of the previous average, from 0 to 1.
        warmup_steps: steps with a finite total above 0 in which all gradients are clipped together,
            not negative.
        absolute_limit: limit of the total norm in these steps, greater than 0.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is outside its range; in :meth:`limits`, the number of parameters
            is another one than in the steps before, and :meth:`rearrange` was not called.
    """

    per_parameter: bool = True
    # The averages of the state where the host knows that each parameter has one. Of the class, so
    # that objects pickled before there was such an attribute have it.
    _complete: Tensor | None = None

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

    @outside_inference
    def rearrange(self, places: Sequence[int | None]) -> None:
        """Take the averages along to other places.

        Does nothing before the first step. The steps of the warm-up stay counted.

        Args:
            places: for each parameter of the steps to come, the index that it had in the steps
                before, or None for a new one. It starts afresh, as one that had no gradient yet.

        Raises:
            TypeError: an element of ``places`` is neither an index nor None.
            ValueError: an element is out of range, or there is none. Nothing is changed then.
        """
        if not self._state:
            return
        gamma = self._state["gamma"]
        count = gamma.numel()
        if not places:
            raise ValueError("AdaGC: places has to hold one for each parameter, found none")
        indices = [
            count
            if place is None
            else _arguments.whole_number(place, "AdaGC", f"places[{index}]", 0, count - 1)
            for index, place in enumerate(places)
        ]
        # Behind the averages lies that of all new parameters.
        extended = torch.cat([gamma, gamma.new_full((1,), math.inf)])
        chosen = torch.tensor(indices, dtype=torch.int64, device=gamma.device)
        self._state = {**self._state, "gamma": extended.index_select(0, chosen)}

    @property
    def parameter_count(self) -> int | None:
        """How many parameters the averages are for, None before the first step."""
        return self._state["gamma"].numel() if self._state else None

    def _initial(self, parameter_count: int, device: torch.device) -> dict[str, Tensor]:
        return {
            "count": torch.zeros((), dtype=torch.float64, device=device),
            "gamma": torch.full((parameter_count,), math.inf, dtype=torch.float64, device=device),
        }

    def _advance(
        self, state: dict[str, Any], total: Scalar, norms: Tensor
    ) -> tuple[Scalar, dict[str, Any]]:
        count, gamma = state["count"], state["gamma"]
        if norms.shape != gamma.shape:
            raise ValueError(
                f"AdaGC: norms has to hold one for each of the {gamma.numel()} parameters of the "
                f"steps before, found shape {tuple(norms.shape)}"
            )
        observed = is_observation(total)
        counts: bool | Tensor = observed is True and _are_observations(norms)
        if not counts:
            counts = is_observation(norms) & observed
        warming = count < min(self.warmup_steps, LARGEST_COUNT)
        limits = self.relative_limit * gamma
        if warming is not False:
            # A small total may make the quotient infinite, and the coefficient 1.
            factor = self.absolute_limit * _ops.quotient(1.0, total)
            together = norms * _ops.minimum(factor, 1.0)
            limits = _ops.select(counts & warming, together, limits)
        limits.clamp_(min=_SMALLEST_LIMIT)

        clipped = torch.minimum(norms, limits)
        # lerp rounds to between its ends, so that a positive average stays positive.
        # Known on the host, if at all: from the step before, else by reading one number.
        all_have_one = counts is True and (
            gamma is self._complete or _ops.known(gamma.max()) < math.inf
        )
        begin = gamma if all_have_one else torch.where(gamma.isinf(), clipped, gamma)
        updated: Scalar = torch.lerp(begin, clipped, 1.0 - self.beta)
        if warming is not False:
            updated = _ops.select(warming, torch.minimum(gamma, clipped), updated)
        updated = _ops.select(counts, updated, gamma)
        self._complete = cast(Tensor, updated) if counts is True else None
        return limits, {"count": count + observed, "gamma": updated}

    def _check(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        super()._check(tensors, state)
        count, gamma = tensors["count"].item(), tensors["gamma"]
        found = gamma.numel()
        if self._state and found:
            own = self._state["gamma"].numel()
            expected = f"hold one norm for each of {own} parameters"
            self._require(found == own, "gamma", expected, found)
        expected = f"hold one norm for each parameter of {count:.0f} steps"
        self._require(found > 0 or count == 0.0, "gamma", expected, found)
        expected = "be a norm greater than 0, or inf for none yet"
        self._require_each(gamma > 0.0, "gamma", expected, gamma)
        expected = "be inf, as state['count'] is 0"
        self._require_each(gamma.isinf() | (count > 0.0), "gamma", expected, gamma)

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        # A rule that was saved before its first step does not know the number of parameters.
        if tensors["gamma"].numel():
            super()._restore(tensors)
        else:
            self._state = {}


def _are_observations(norms: Tensor) -> bool:
    """Whether the host knows that each of them is one."""
    if norms.numel() == 0:
        return False
    smallest, largest = map(_ops.known, torch.aminmax(norms))
    return bool(smallest > 0.0 and largest < math.inf)
