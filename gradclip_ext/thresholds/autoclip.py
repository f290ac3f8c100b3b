"""AutoClip: clips at a percentile of the norms so far (Seetharaman et al., 2020)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _arguments, _ops
from gradclip_ext.thresholds.rule import Rule, is_observation

__all__ = ["AutoClip"]

# The most elements that torch.quantile and torch.nanquantile sort.
_LARGEST_WINDOW = 2**24

# Capacity of a history at its first step; it doubles from there.
_FIRST_CAPACITY = 64


class AutoClip(Rule):
    r"""The limit is a percentile of the norms so far, including this step's.

    .. math::
        G_t = (\lVert g_1 \rVert, \dots, \lVert g_t \rVert), \qquad
        \text{limit}_t = \text{percentile}_p(G_t)

    with linear interpolation between neighbours, as in :func:`numpy.percentile`. The method is that
    of Seetharaman, Wichern, Pardo and Le Roux, "AutoClip: Adaptive Gradient Clipping for Source
    Separation Networks" (2020), arXiv 2007.14469. The paper keeps every norm; here only the last
    ``window`` count, because they are sorted at each step.

    Norms that are 0, as without a gradient, or not finite do not enter the history, unlike in the
    paper, where every norm does. Before the first that enters, the limit is ``inf``.

    Args:
        percentile: the percentile, from 0 to 100. With 10, as in the paper, nine of ten steps are
            clipped.
        window: number of norms to keep, at most 2**24, the most that :func:`torch.nanquantile`
            takes. Memory is 8 bytes for each, and grows with the steps.

    Raises:
        TypeError: an argument is not a number.
        ValueError: ``percentile`` or ``window`` is outside its range.

    >>> rule = AutoClip(percentile=50.0)
    >>> for norm in (1.0, 2.0, 6.0):
    ...     total = torch.tensor(norm, dtype=torch.float64)
    ...     print(rule.limits(total, total.view(1)).item())
    1.0
    1.5
    2.0
    """

    def __init__(self, percentile: float = 10.0, window: int = 10_000) -> None:
        super().__init__()
        self.percentile = _arguments.between(percentile, 0, 100, "AutoClip", "percentile")
        self.window = _arguments.whole_number(window, "AutoClip", "window", 1, _LARGEST_WINDOW)
        # At least as many as there are norms in the history. How many steps brought one, the host
        # knows on the CPU; elsewhere every step may have.
        self._steps = 0

    def _settings(self) -> dict[str, Any]:
        # The order of the ring buffer, and where it continues, depend on its length.
        return {"window": self.window}

    def _initial(self, parameter_count: int, device: torch.device) -> dict[str, Tensor]:
        return {
            "count": torch.zeros((), dtype=torch.float64, device=device),
            "history": _unknown(min(self.window, _FIRST_CAPACITY), device),
        }

    def _advance(
        self, state: dict[str, Tensor], total: Tensor, norms: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        count, history = state["count"], self._grown(state["history"])
        observed = is_observation(total)
        # The place is computed on the device and moves on after observations only. Otherwise each
        # other step would push a good norm out of a full ring, and many of them all.
        place = count.remainder(self.window).to(torch.int64).view(1)
        kept = torch.where(observed, total, history.index_select(0, place))
        history.index_copy_(0, place, kept)
        number = _ops.known(total)
        if isinstance(number, Tensor) or 0.0 < number < math.inf:
            self._steps += 1
        # Places that are not taken yet hold NaN, which nanquantile passes over.
        limit = torch.nanquantile(history, self.percentile / 100.0).nan_to_num(math.inf)
        return limit, {"count": count + observed, "history": history}

    def _grown(self, history: Tensor) -> Tensor:
        """The history, with room for the norm of this step."""
        capacity = history.numel()
        needed = min(self._steps + 1, self.window)
        while capacity < needed:
            capacity = min(2 * capacity, self.window)
        if capacity == history.numel():
            return history
        return torch.cat([history, _unknown(capacity - history.numel(), history.device)])

    def _check(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        super()._check(tensors, state)
        window = state["window"]
        # True is no 1 here.
        same = isinstance(window, numbers.Integral) and not isinstance(window, bool)
        same = same and window == self.window
        self._require(same, "window", f"be {self.window}, as this object's", repr(window))

        history, count = tensors["history"], tensors["count"].item()
        capacity = history.numel()
        expected = f"hold 1 to {self.window} norms"
        self._require(1 <= capacity <= self.window, "history", expected, capacity)
        taken = int(min(count, self.window))
        expected = "have a place for each of state['count'] norms"
        self._require(taken <= capacity, "history", expected, f"{capacity} places for {count}")
        holds = (history >= 0.0) & (history < math.inf)
        expected = "be a finite norm greater than 0"
        self._require_each(holds[:taken], "history", expected, history)
        holds = torch.cat([holds[:taken], history[taken:].isnan()])
        expected = f"be nan, as each place after the {taken} norms of state['count']"
        self._require_each(holds, "history", expected, history)

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        history, count = tensors["history"], tensors["count"]
        if bool((history == 0.0).any()):
            # Norms of 0 count no more. Those that they pushed out of a full ring are gone.
            begin = int(count.remainder(self.window)) if count > self.window else 0
            norms = history.roll(-begin)
            norms = norms[norms > 0.0]
            count = torch.full_like(count, norms.numel())
            history = torch.cat([norms, _unknown(history.numel() - norms.numel(), norms.device)])
        super()._restore({"count": count, "history": history})
        self._steps = int(count)


def _unknown(size: int, device: torch.device) -> Tensor:
    return torch.full((size,), math.nan, dtype=torch.float64, device=device)
