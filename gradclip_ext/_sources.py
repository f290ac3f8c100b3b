"""Reads parameters from whatever a caller has, and tells whether it still holds the same."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gradclip_ext import _C, _arguments

__all__ = ["CLIP_KEY", "Entry", "Reading", "prepare", "read"]

# A key of an optimizer's parameter group: with False its parameters are left out.
CLIP_KEY = "clip_grad"

_PARAMETERS_OF = operator.itemgetter("params")
# How far to look into objects that wrap an optimizer.
_DEEPEST_WRAPPER = 8


class Entry(NamedTuple):
    """A parameter as it was found; ``name`` is None where only its place is known."""

    name: str | None
    place: str
    parameter: Tensor


class Reading:
    """What a source held when it was read. A source that is read once is always current.

    Attributes:
        groups: for each group its parameters; a single one where there are no groups.
        wishes: for each group where it says whether it is to be clipped, and what it says there.
    """

    def __init__(self, groups: list[list[Entry]]) -> None:
        self.groups = groups
        self.wishes: list[tuple[str, Any]] = []

    def is_current(self) -> bool:
        """Whether the source still holds the same parameters in the same groups."""
        return True


def prepare(source: Any, function: str) -> Any:
    """The source in a form that can be read again: what cannot be read twice becomes a list."""
    if isinstance(source, torch.nn.Module) or _is_optimizer(source):
        return source
    if isinstance(source, list) and source and (_is_optimizer(source[0]) or _is_group(source[0])):
        return source
    if isinstance(source, Tensor):
        return [source]
    if isinstance(source, (str, dict)) or not isinstance(source, Iterable):
        raise TypeError(
            f"{function}: expected a module, named or plain parameters, an optimizer or its "
            f"parameter groups, found {_arguments.describe(source)}"
        )
    return list(source)


def read(source: Any, function: str) -> Reading:
    """Read a source that :func:`prepare` gave."""
    if isinstance(source, torch.nn.Module):
        return _ModuleReading(source, function)
    if not isinstance(source, list) or (source and _is_group(source[0])):
        return _GroupsReading([source], ["groups"], function)
    if source and _is_optimizer(source[0]):
        for index, item in enumerate(source):
            if not _is_optimizer(item):
                raise TypeError(
                    f"{function}: optimizers[{index}] has to be an optimizer like those before, "
                    f"found {_arguments.describe(item)}"
                )
        places = [f"optimizers[{index}].groups" for index in range(len(source))]
        return _SeveralReading(source, places, function)
    return Reading([_entries(source, "parameters", function)])


class _ModuleReading(Reading):
    """The parameters of a module, watched in the dicts that it and its submodules keep."""

    def __init__(self, module: torch.nn.Module, function: str) -> None:
        pairs = list(module.named_parameters())
        names = _without_parallel([name for name, _ in pairs], module)
        parameters = [parameter for _, parameter in pairs]
        super().__init__([_entries(zip(names, parameters, strict=True), "parameters", function)])
        self._containers: list[Any] = []
        for part in module.modules():
            self._containers += [part._parameters, part._modules]
        # Those of TorchScript are none that can be looked into; such a module is walked each time.
        self._walked = None if all(isinstance(one, dict) for one in self._containers) else module
        self._expected = () if self._walked is not None else _contents(self._containers)

    def is_current(self) -> bool:
        if self._walked is None:
            return _C.hold_exactly(self._containers, self._expected)
        return _same_objects(
            [parameter for _, parameter in self._walked.named_parameters()],
            [entry.parameter for entry in self.groups[0]],
        )


class _GroupsReading(Reading):
    """The parameter groups of optimizers, or of a list."""

    def __init__(self, owners: Sequence[Any], places: Sequence[str], function: str) -> None:
        super().__init__([])
        self._owners = list(owners)
        self._lists: list[Any] = []
        for owner, place in zip(owners, places, strict=True):
            for number, group in enumerate(_groups_of(owner) or ()):
                self._read_group(group, f"{place}[{number}]", function)
        said = [wish for _, wish in self.wishes]
        self._expected = _contents([self._lists, said, *self._lists])

    def is_current(self) -> bool:
        groups: Any = _groups_of(self._owners[0])
        if len(self._owners) > 1:
            groups = [group for owner in self._owners for group in _groups_of(owner) or ()]
        try:
            lists = list(map(_PARAMETERS_OF, groups))
            said = [group.get(CLIP_KEY) for group in groups]
        except (AttributeError, KeyError, TypeError):  # something that is no group
            return False
        # A group may have been given another list; the old one still holds the same.
        return _C.hold_exactly([lists, said, *self._lists], self._expected)

    def _read_group(self, group: Any, place: str, function: str) -> None:
        if not isinstance(group, dict) or "params" not in group:
            raise TypeError(
                f"{function}: {place} has to be a dict with the key 'params', "
                f"found {_arguments.describe(group)}"
            )
        # As optimizers do, which make lists of them.
        parameters = group["params"]
        if isinstance(parameters, Tensor):
            parameters = group["params"] = [parameters]
        elif not isinstance(parameters, list):
            if isinstance(parameters, str) or not isinstance(parameters, Iterable):
                raise TypeError(
                    f"{function}: {place}['params'] has to be parameters, "
                    f"found {_arguments.describe(parameters)}"
                )
            parameters = group["params"] = list(parameters)
        if not parameters:
            raise ValueError(f"{function}: {place} has no parameters")
        entries = _entries(parameters, f"{place}['params']", function)
        # Parameters that were added to the list by hand have no entry there.
        names = group.get("param_names")
        if not isinstance(names, (list, tuple)):
            names = ()
        for index, name in enumerate(names[: len(entries)]):
            if isinstance(name, str):
                entries[index] = entries[index]._replace(name=name)
        self.wishes.append((f"{place}['{CLIP_KEY}']", group.get(CLIP_KEY)))
        self.groups.append(entries)
        self._lists.append(parameters)


class _SeveralReading(_GroupsReading):
    """The groups of a list of optimizers, which may grow."""

    def __init__(self, optimizers: list[Any], places: Sequence[str], function: str) -> None:
        super().__init__(optimizers, places, function)
        self._optimizers = optimizers

    def is_current(self) -> bool:
        return _same_objects(self._optimizers, self._owners) and super().is_current()


def _is_optimizer(source: Any) -> bool:
    """Whether it has parameter groups, or wraps something that has."""
    return not isinstance(source, (list, tuple, dict, Tensor)) and _groups_of(source) is not None


def _is_group(item: Any) -> bool:
    return isinstance(item, dict)


def _groups_of(owner: Any) -> Sequence[Any] | None:
    """The parameter groups as they are now, None where there are none."""
    if isinstance(owner, list):
        return owner
    for _ in range(_DEEPEST_WRAPPER):
        groups = getattr(owner, "param_groups", None)
        if isinstance(groups, (list, tuple)):
            return groups
        if isinstance(groups, Iterable):
            return list(groups)
        owner = getattr(owner, "optimizer", None)
        if owner is None:
            break
    return None


def _entries(items: Iterable[Any], place: str, function: str) -> list[Entry]:
    return [_entry(item, place, index, function) for index, item in enumerate(items)]


def _entry(item: Any, place: str, index: int, function: str) -> Entry:
    name = None
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        name, item = item
    if not isinstance(item, Tensor):
        raise _arguments.item_error(item, function, place, index)
    return Entry(name, f"{place}[{index}]", item)


def _without_parallel(names: list[str], module: torch.nn.Module) -> list[str]:
    """The names without the part ``module`` where that is a parallel wrapper's, not the user's."""
    for path, part in reversed(list(module.named_modules())):
        if isinstance(part, (DataParallel, DistributedDataParallel)):
            before = f"{path}." if path else ""
            names = [
                before + name[len(before) :].removeprefix("module.")
                if name.startswith(before)
                else name
                for name in names
            ]
    return names


def _contents(containers: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(
        item
        for container in containers
        for item in (container.values() if isinstance(container, dict) else container)
    )


def _same_objects(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))
