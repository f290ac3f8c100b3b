"""What a clipper counts at each step, without reading numbers that are on a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _arguments

__all__ = ["Counters", "keys", "read"]

# A number that the host knows, or a 0-dim tensor.
_Count = int | Tensor

# The key of each counter in a saved state, and its value in a state saved before it existed.
_KEYS: dict[str, int | None] = {
    "steps": None,
    "clipped_steps": None,
    "nonfinite_steps": None,
    "skipped_steps": 0,
    "skips_in_a_row": 0,
    "last_norm_is_finite": 1,
}


class Counters:
    """Steps, and how many of them were clipped, not finite, or skipped.

    Attributes:
        steps: all steps.
        clipped_steps: those that made a gradient smaller.
        nonfinite_steps: those with a NaN or infinite norm.
        skipped_steps: those whose update the optimizer was told to skip.
        skips_in_a_row: how many steps up to the last were skipped, one right after another.
        last_norm_is_finite: 0 if the norm of the last step was NaN or infinite, else 1.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.clipped_steps: _Count = 0
        self.nonfinite_steps: _Count = 0
        self.skipped_steps: _Count = 0
        self.skips_in_a_row: _Count = 0
        self.last_norm_is_finite: _Count = 1

    def count(self, clips: bool | Tensor, is_finite: bool | Tensor, skips: bool | Tensor) -> None:
        """Count one step; each flag is known on the host, or a 0-dim tensor that is not read."""
        self.steps += 1
        if not isinstance(is_finite, bool):
            self._move_to(is_finite.device)
        self.clipped_steps = self.clipped_steps + clips
        self.nonfinite_steps = self.nonfinite_steps + (is_finite ^ True)
        self.skipped_steps = self.skipped_steps + skips
        # 0 after a step that was not skipped.
        self.skips_in_a_row = (self.skips_in_a_row + 1) * skips
        self.last_norm_is_finite = is_finite * 1

    def state_dict(self) -> dict[str, int]:
        """All of them as numbers, with a device sync if they are on one."""
        return {key: int(getattr(self, key)) for key in _KEYS}

    def load_state_dict(self, numbers: Mapping[str, int]) -> None:
        """Resume from what :func:`read` returned."""
        for key, number in numbers.items():
            setattr(self, key, number)

    def _move_to(self, device: torch.device) -> None:
        """Tensors on two devices could not be added."""
        for key in _KEYS:
            value = getattr(self, key)
            if isinstance(value, Tensor) and value.device != device:
                setattr(self, key, value.to(device))


def keys() -> tuple[set[str], set[str]]:
    """The keys that a saved state must have, and those that it may lack."""
    required = {key for key, default in _KEYS.items() if default is None}
    return required, set(_KEYS) - required


def read(state: Mapping[str, Any], function: str) -> dict[str, int]:
    """The numbers of a saved state, if they can be those of a clipper.

    Raises:
        TypeError: one of them is not a whole number.
        ValueError: one is missing or negative, or larger than the number of steps.
    """
    numbers: dict[str, int] = {}
    for key, default in _KEYS.items():
        largest = 1 if key == "last_norm_is_finite" else numbers.get("steps")
        value = state.get(key, default)
        numbers[key] = _arguments.whole_number(value, function, f"state[{key!r}]", 0, largest)
    skipped, in_a_row = numbers["skipped_steps"], numbers["skips_in_a_row"]
    if (
        numbers["clipped_steps"] + numbers["nonfinite_steps"] > numbers["steps"]
        or in_a_row > skipped
        or (numbers["last_norm_is_finite"] == 0 and numbers["nonfinite_steps"] == 0)
    ):
        raise ValueError(
            f"{function}: the counters of the state have to agree with one another, found "
            f"{', '.join(f'{key} {number}' for key, number in numbers.items())}"
        )
    return numbers
