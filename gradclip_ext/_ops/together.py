"""Errors of arguments that all ranks raise, of which only one has found them.

The others are in the collectives of the same call, so this rank goes through these as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from gradclip_ext._ops import sharded, sharded_units
from gradclip_ext._ops.dtensor import any_in as are_distributed
from gradclip_ext._ops.gradients import Caller
from gradclip_ext._ops.process_groups import Group, read_process_groups

__all__ = ["raise_together", "raise_together_for_units"]


def raise_together(
    error: Exception,
    tensors: Sequence[Any],
    process_groups: Any,
    caller: Caller,
    norm_type: Any = 2.0,
    sections: Sequence[int] | None = None,
) -> None:
    """Raise an error of an argument on all ranks, if others would wait for this one; else nothing.

    The others cannot be reached over ``process_groups`` if that is what is wrong.

    Args:
        norm_type: what was passed, right or wrong.
        sections: of :func:`global_norms` or the single one of :func:`grad_norms`, if the others
            have called one of these.
    """
    groups: Sequence[Group] = ()
    with contextlib.suppress(Exception):
        groups = read_process_groups(process_groups, caller.function)
    if not (groups or are_distributed(tensors)):
        return
    order = 2.0
    with contextlib.suppress(Exception):
        order = float(norm_type)
    sharded.raise_together(error, tensors, groups, caller, order, sections)


def raise_together_for_units(error: Exception, parameters: Sequence[Any], caller: Caller) -> None:
    """As :func:`raise_together`, where the others have called :func:`clip_units_`."""
    if are_distributed(parameters):
        sharded_units.raise_together(error, parameters, caller)
