"""What parameters are called: each name once, and the same in a model and in its wrappers."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

__all__ = ["agree", "default_names", "unique", "without_wrappers"]

# What torch.compile, FSDP and activation checkpointing call the module that they wrap. Nobody else
# uses these names, so they can be left out wherever they stand.
_WRAPPED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# What DataParallel and DistributedDataParallel call it, as may anybody.
_MODULE = "module"


@functools.lru_cache(maxsize=16)
def default_names(count: int) -> tuple[str, ...]:
    """What to call parameters that came without names."""
    return tuple(f"parameters[{index}]" for index in range(count))


def without_wrappers(names: Sequence[str]) -> tuple[str, ...]:
    """The names of a model's parameters as if nothing wrapped it.

    ``module.`` is left out at the beginning and only if all names begin with it: elsewhere it may
    be a submodule of the user. Names that would become equal stay as they are, as do lists with
    anything but text.
    """
    if not _are_names(names):
        return tuple(names)
    shorter = [_without(name, _WRAPPED) for name in names]
    prefix = f"{_MODULE}."
    while shorter and all(name.startswith(prefix) for name in shorter):
        shorter = [name[len(prefix) :] for name in shorter]
    return _unless_equal(shorter, names)


def unique(names: Sequence[str]) -> tuple[str, ...]:
    """The names, those that came before numbered: ``weight``, ``weight[1]``, ``weight[2]``."""
    taken = set(names)
    if len(taken) == len(names):
        return tuple(names)
    result = []
    numbers: dict[str, int] = {}
    for name in names:
        number = numbers.get(name, 0)
        chosen = f"{name}[{number}]" if number else name
        while number and chosen in taken:
            number += 1
            chosen = f"{name}[{number}]"
        numbers[name] = number + 1
        taken.add(chosen)
        result.append(chosen)
    return tuple(result)


def agree(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two lists name the parameters of one model, wrapped or not.

    A part ``module`` in the middle may be a wrapper of a submodule or the user's own; here it does
    not count, as long as all names stay apart without it.
    """
    one, other = without_wrappers(names), without_wrappers(others)
    return one == other or _without_inner_module(one) == _without_inner_module(other)


def _without_inner_module(names: Sequence[str]) -> tuple[str, ...]:
    if not _are_names(names):
        return tuple(names)
    shorter = []
    for name in names:
        # Not the first part: a wrapper of everything has been left out before.
        first, dot, rest = name.partition(".")
        shorter.append(first + dot + _without(rest, frozenset({_MODULE})))
    return tuple(shorter if len(set(shorter)) == len(shorter) else names)


def _without(name: str, parts: frozenset[str]) -> str:
    path, _, last = name.rpartition(".")
    if not path:
        return name
    # Never the last part, which is the parameter itself.
    return ".".join([*(part for part in path.split(".") if part not in parts), last])


def _are_names(names: Sequence[Any]) -> bool:
    return all(isinstance(name, str) for name in names)


def _unless_equal(shorter: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    counts = Counter(shorter)
    return tuple(
        short if counts[short] == 1 else name for short, name in zip(shorter, names, strict=True)
    )
