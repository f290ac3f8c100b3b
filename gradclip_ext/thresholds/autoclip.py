"""AutoClip: clips at a percentile of the norms so far (Seetharaman et al., 2020)."""

from __future__ import annotations

import array
import bisect
import math
import numbers
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradclip_ext import _arguments, _ops
from gradclip_ext._ops import Scalar
from gradclip_ext.thresholds.rule import Rule, is_observation

__all__ = ["AutoClip"]

# The most elements that torch.quantile and torch.nanquantile sort.
_LARGEST_WINDOW = 2**24

# Capacity of a history at its first step; it doubles from there.
_FIRST_CAPACITY = 64

# Norms from the smallest to the largest.
Ordered: TypeAlias = "array.array[float] | Tensor"


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

    def _settings(self) -> dict[str, Any]:
        # The order of the ring buffer, and where it continues, depend on its length.
        return {"window": self.window}

    def _initial(self, parameter_count: int, device: torch.device) -> dict[str, Tensor]:
        return {
            "count": torch.zeros((), dtype=torch.float64, device=device),
            "history": _unknown(min(self.window, _FIRST_CAPACITY), device),
        }

    def _advance(
        self, state: dict[str, Any], total: Scalar, norms: Tensor
    ) -> tuple[Scalar, dict[str, Any]]:
        observed = is_observation(total)
        ordered = state["history"].take(total, observed, state["count"])
        count = state["count"] + observed
        taken = _ops.minimum(count, self.window)
        # Between the two neighbours of a rank that need not be whole.
        rank = self.percentile / 100.0 * (taken - 1.0)
        below = _ops.floor(rank)
        above = -_ops.floor(-rank)
        percentile = _ops.lerp(_at(ordered, below), _at(ordered, above), rank - below)
        limit = _ops.select(taken > 0.0, percentile, math.inf)
        return limit, {"count": count, "history": state["history"]}

    def _placed(self, place: torch.device | None, parameter_count: int) -> dict[str, Any]:
        most = self._state["history"].most if self._state else 0
        state = super()._placed(place, parameter_count)
        state["history"].most = most
        return state

    def _in_place(
        self, tensors: Mapping[str, Tensor], place: torch.device | None
    ) -> dict[str, Any]:
        state = super()._in_place(tensors, place)
        history = state["history"]
        if place is not None:
            return {**state, "history": _OnDevice(history, self.window)}
        taken = min(int(state["count"]), self.window)
        norms = history[:taken].tolist() if taken else []
        return {**state, "history": _OnHost(norms, history.numel(), self.window)}

    def _tensors(self, parameter_count: int) -> dict[str, Tensor]:
        if not self._state:
            return super()._tensors(parameter_count)
        history = self._state["history"].tensor()
        return {"count": _ops.in_tensor(self._state["count"], history.device), "history": history}

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
        self._state["history"].most = min(int(count), self.window)


class _OnHost:
    """The last norms, known on the host: in a ring, and in order beside it."""

    def __init__(self, norms: list[float], capacity: int, window: int) -> None:
        # How many places are taken.
        self.most = len(norms)
        self._ring = array.array("d", norms)
        self._ordered = array.array("d", sorted(norms))
        # Of the tensor that is saved.
        self._capacity = capacity
        self._window = window

    def take(self, total: float, observed: bool, count: float) -> Ordered:
        """Let a norm that is observed take the place of the oldest; all of them in order."""
        ring, ordered = self._ring, self._ordered
        if not observed:
            return ordered
        place = int(count % self._window)
        if place == len(ring):
            ring.append(total)
            self.most = len(ring)
            self._capacity = _grown(self._capacity, self.most, self._window)
        else:
            del ordered[bisect.bisect_left(ordered, ring[place])]
            ring[place] = total
        bisect.insort(ordered, total)
        return ordered

    def tensor(self) -> Tensor:
        """The ring; places that are not taken yet hold NaN."""
        norms = [*self._ring, *[math.nan] * (self._capacity - len(self._ring))]
        return torch.tensor(norms, dtype=torch.float64, device="cpu")


class _OnDevice:
    """The same where the host does not know the norms: at most ``most`` places are taken."""

    def __init__(self, history: Tensor, window: int) -> None:
        self.most = 0
        self._history = history
        self._window = window

    def take(self, total: Tensor, observed: Tensor, count: Tensor) -> Ordered:
        """As that on the host; NaN in places that are not taken come last."""
        self.most = min(self.most + 1, self._window)
        history = self._history
        missing = _grown(history.numel(), self.most, self._window) - history.numel()
        if missing > 0:
            history = self._history = torch.cat([history, _unknown(missing, history.device)])
        # The place is computed on the device and moves on after observations only. Otherwise each
        # other step would push a good norm out of a full ring, and many of them all.
        place = count.remainder(self._window).to(torch.int64).view(1)
        history.index_copy_(0, place, torch.where(observed, total, history.index_select(0, place)))
        return history.sort().values

    def tensor(self) -> Tensor:
        """The ring; places that are not taken yet hold NaN."""
        return self._history


def _at(ordered: Ordered, rank: Scalar) -> Scalar:
    """The norm of a rank; NaN or any norm if there is none."""
    if isinstance(ordered, Tensor):
        index = torch.as_tensor(rank).clamp(min=0.0).to(torch.int64).view(1)
        return ordered.index_select(0, index).view(())
    return ordered[int(rank)] if ordered else math.nan


def _grown(capacity: int, needed: int, window: int) -> int:
    """The capacity, doubled until it suffices."""
    while capacity < needed:
        capacity = min(2 * capacity, window)
    return capacity


def _unknown(size: int, device: torch.device) -> Tensor:
    return torch.full((size,), math.nan, dtype=torch.float64, device=device)
