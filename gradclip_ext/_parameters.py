"""Parameters, their names and their groups, collected once from whatever the caller passes."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _C, _arguments


@functools.lru_cache(maxsize=16)
def default_names(count: int) -> tuple[str, ...]:
    """Names for parameters that were passed without any."""
    return tuple(f"parameters[{index}]" for index in range(count))


class Collection:
    """Parameters collected from a module, from named or plain parameters, or from groups.

    Walking ``module.parameters()`` at each step would take longer than clipping, so the result is
    cached, together with the containers it was read from: while these hold the same objects,
    nothing has changed.

    Attributes:
        names: the name of each parameter.
        parameters: the parameters, in the order of the source.
        groups: the range of each group's parameters; a single range if there are no groups.
    """

    def __init__(self, source: Any, function: str) -> None:
        self._function = function
        # Made a list, since an iterator can be read only once.
        self._source = source if _is_watched(source) else _listed(source, function)
        self._collect()

    def refresh(self) -> bool:
        """Read the source again if it has changed; return whether its parameters have."""
        if _C.hold_exactly(self._containers, self._expected) and self._groups_are_the_same():
            return False
        before = self.parameters
        self._collect()
        return len(before) != len(self.parameters) or any(
            one is not other for one, other in zip(before, self.parameters, strict=True)
        )

    def _collect(self) -> None:
        self._containers: list[Any] = []
        self._group_lists: list[list[Any]] = []
        source = self._source
        if isinstance(source, torch.nn.Module):
            pairs: list[tuple[str, Tensor]] = list(source.named_parameters())
            self.groups = [range(len(pairs))]
            for module in source.modules():
                self._containers += [module._parameters, module._modules]
        elif isinstance(source, torch.optim.Optimizer):
            pairs = self._collect_groups(source.param_groups)
        elif source and isinstance(source[0], dict):
            pairs = self._collect_groups(source)
        else:
            pairs = [self._pair(item, index) for index, item in enumerate(source)]
            self.groups = [range(len(pairs))]
        self._expected = tuple(
            item
            for container in self._containers
            for item in (container.values() if isinstance(container, dict) else container)
        )
        self.names = tuple(name for name, _ in pairs)
        self.parameters = [parameter for _, parameter in pairs]
        if not self.parameters:
            raise ValueError(f"{self._function}: there are no parameters in what was passed")

    def _collect_groups(self, groups: list[dict[str, Any]]) -> list[tuple[str, Tensor]]:
        pairs: list[tuple[str, Tensor]] = []
        self.groups = []
        self._containers.append(groups)
        for number, group in enumerate(groups):
            if not isinstance(group, dict) or "params" not in group:
                raise TypeError(
                    f"{self._function}: groups[{number}] has to be a dict with the key 'params', "
                    f"found {_arguments.describe(group)}"
                )
            # Turned into a list, as optimizers do.
            parameters = group["params"]
            if isinstance(parameters, Tensor):
                parameters = [parameters]
            elif not isinstance(parameters, list):
                parameters = group["params"] = list(parameters)
            if not parameters:
                raise ValueError(f"{self._function}: groups[{number}] has no parameters")
            if isinstance(group["params"], list):
                self._containers.append(parameters)
            self._group_lists.append(group["params"])
            names = group.get("param_names")
            begin = len(pairs)
            for index, item in enumerate(parameters):
                name, parameter = self._pair(item, index, f"groups[{number}]['params']")
                pairs.append((names[index] if names else name, parameter))
            self.groups.append(range(begin, len(pairs)))
        return pairs

    def _groups_are_the_same(self) -> bool:
        """Whether no group was given a new list: the old one would still look unchanged."""
        if not self._group_lists:
            return True
        source = self._source
        groups = source.param_groups if isinstance(source, torch.optim.Optimizer) else source
        return all(
            group["params"] is known for group, known in zip(groups, self._group_lists, strict=True)
        )

    def _pair(self, item: Any, index: int, argument: str = "parameters") -> tuple[str, Tensor]:
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
            name, item = item
        else:
            name = f"{argument}[{index}]"
        if not isinstance(item, Tensor):
            raise _arguments.item_error(item, self._function, argument, index)
        return name, item


def _is_watched(source: Any) -> bool:
    """Whether the source may hold other parameters later, and can be read again."""
    if isinstance(source, (torch.nn.Module, torch.optim.Optimizer)):
        return True
    return isinstance(source, list) and bool(source) and isinstance(source[0], dict)


def _listed(source: Any, function: str) -> list[Any]:
    if isinstance(source, Tensor):
        return [source]
    if isinstance(source, (str, dict)) or not isinstance(source, Iterable):
        raise TypeError(
            f"{function}: expected a module, named or plain parameters, an optimizer or its "
            f"parameter groups, found {_arguments.describe(source)}"
        )
    return list(source)
