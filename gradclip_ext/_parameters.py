"""Parameters, their names and their groups, collected once from whatever the caller passes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from gradclip_ext import _arguments, _names, _sources
from gradclip_ext._sources import CLIP_KEY, Entry, Reading

__all__ = ["Collection"]


class Collection:
    """Parameters collected from a module, from named or plain parameters, or from groups.

    Walking ``module.parameters()`` at each step would take longer than clipping, so the result is
    cached, together with the containers it was read from: while these hold the same objects,
    nothing has changed.

    Args:
        source: a module; named or plain parameters; an optimizer, an object that wraps one, or
            several of these; or parameter groups.
        function: what messages call the function.
        include: asked for each name and parameter whether it is wanted.
        obeys_groups: whether the parameters of groups with ``"clip_grad": False`` are left out.
        may_be_empty: whether there may be no parameters, because other ranks have some.

    Attributes:
        names: what to call each parameter, each name once, without the parts that wrappers add.
        parameters: the parameters, each of them once, where it came first.
        groups: for each group the range of its parameters, empty where all are left out or belong
            to groups before; a single one where there are no groups.
    """

    names: tuple[str, ...]
    parameters: list[Tensor]
    groups: list[range]

    def __init__(
        self,
        source: Any,
        function: str,
        *,
        include: Callable[[str, Tensor], bool] | None = None,
        obeys_groups: bool = False,
        may_be_empty: bool = False,
    ) -> None:
        self._may_be_empty = may_be_empty
        self._function = function
        self._include = include
        self._obeys_groups = obeys_groups
        self._source = _sources.prepare(source, function)
        self._collect()

    def refresh(self) -> bool:
        """Read the source anew if it has changed.

        Returns:
            Whether that gave other parameters, names or groups. After an error all are as before.
        """
        if self._reading.is_current():
            return False
        names, groups, parameters = self.names, self.groups, self.parameters
        self._collect()
        return (
            (names, groups) != (self.names, self.groups)
            or len(parameters) != len(self.parameters)
            or any(one is not other for one, other in zip(parameters, self.parameters, strict=True))
        )

    def _collect(self) -> None:
        reading = _sources.read(self._source, self._function)
        groups = _each_once(reading.groups)
        names = iter(_names_of([entry for group in groups for entry in group]))
        wanted: list[list[tuple[str, Tensor]]] = []
        for number, group in enumerate(groups):
            named = [(next(names), entry.parameter) for entry in group]
            wanted.append(self._wanted(named) if self._wants_group(reading, number) else [])
        pairs = [pair for group in wanted for pair in group]
        if not pairs and not self._may_be_empty:
            raise ValueError(
                f"{self._function}: all parameters are left out, by '{CLIP_KEY}': False in their "
                "groups or by include"
                if any(groups)
                else f"{self._function}: there are no parameters in what was passed"
            )
        # The first change is the last, so that an error leaves all as it was.
        ends = list(itertools.accumulate(map(len, wanted), initial=0))
        self.groups = [range(begin, end) for begin, end in itertools.pairwise(ends)]
        self.names = tuple(name for name, _ in pairs)
        self.parameters = [parameter for _, parameter in pairs]
        self._reading = reading

    def _wants_group(self, reading: Reading, number: int) -> bool:
        if not self._obeys_groups or not reading.wishes:
            return True
        place, wish = reading.wishes[number]
        return wish is None or _arguments.yes_or_no(wish, self._function, place)

    def _wanted(self, group: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        include = self._include
        return group if include is None else [pair for pair in group if include(*pair)]


def _each_once(groups: list[list[Entry]]) -> list[list[Entry]]:
    """The groups with each parameter only where it comes first."""
    seen: set[int] = set()
    result: list[list[Entry]] = []
    for group in groups:
        first: dict[int, Entry] = {}
        for entry in group:
            if id(entry.parameter) not in seen:
                first.setdefault(id(entry.parameter), entry)
        seen.update(first)
        result.append(list(first.values()))
    return result


def _names_of(entries: list[Entry]) -> tuple[str, ...]:
    named = iter(
        _names.without_wrappers([entry.name for entry in entries if entry.name is not None])
    )
    return _names.unique([entry.place if entry.name is None else next(named) for entry in entries])
