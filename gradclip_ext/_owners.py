"""Optimizers as arguments, and which of their parameters are clipped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.amp import GradScaler

from gradclip_ext import _arguments, _ops
from gradclip_ext._sources import CLIP_KEY

__all__ = [
    "Owner",
    "listed",
    "raising_together",
    "read_optimizers",
    "read_owners",
    "takes_part",
]


class Owner:
    """An optimizer and those of its parameters that take part in a step, each of them once.

    Attributes:
        optimizer: the optimizer.
        clipped: the parameters whose gradients are measured and clipped.
        spared: those of groups with ``"clip_grad": False``, whose gradients are not.
    """

    def __init__(self, optimizer: Any, clipped: list[Tensor], spared: list[Tensor]) -> None:
        self.optimizer = optimizer
        self.clipped = clipped
        self.spared = spared


def read_optimizers(value: Any, function: str) -> list[Any]:
    """One optimizer or a sequence of them, as a list.

    Raises:
        TypeError: something is no optimizer.
        ValueError: there is none, or one is listed twice.
    """
    optimizers = list(value) if isinstance(value, (list, tuple)) else [value]
    if not optimizers:
        raise ValueError(f"{function}: optimizer has to be at least one optimizer, found none")
    for index, optimizer in enumerate(optimizers):
        name = f"optimizer[{index}]" if isinstance(value, (list, tuple)) else "optimizer"
        if not hasattr(optimizer, "param_groups") or not callable(getattr(optimizer, "step", None)):
            remedy = ""
            if isinstance(optimizer, GradScaler):
                remedy = "; the scaler goes to the argument of that name"
            raise TypeError(
                f"{function}: {name} has to be a torch.optim.Optimizer, "
                f"found {_arguments.describe(optimizer)}{remedy}"
            )
        for first, other in enumerate(optimizers[:index]):
            if other is optimizer:
                raise ValueError(
                    f"{function}: optimizer[{first}] and {name} are the same object, which would "
                    "be stepped twice"
                )
    return optimizers


def read_owners(optimizers: Sequence[Any], function: str) -> list[Owner]:
    """What each optimizer owns; a parameter of several belongs to the first of them.

    Raises:
        TypeError: ``"clip_grad"`` of a group is neither True nor False.
    """
    owners = []
    for number, optimizer in enumerate(optimizers):
        place = f"optimizer[{number}]" if len(optimizers) > 1 else "optimizer"
        owner = Owner(optimizer, [], [])
        for index, group in enumerate(optimizer.param_groups):
            wish = group.get(CLIP_KEY)
            where = f"{place}.param_groups[{index}]['{CLIP_KEY}']"
            clips = wish is None or _arguments.yes_or_no(wish, function, where)
            parameters = owner.clipped if clips else owner.spared
            parameters += [p for p in group["params"] if takes_part(p)]
        owners.append(owner)
    if _ops.holds_twice([p for owner in owners for p in (*owner.clipped, *owner.spared)]):
        _keep_first(owners)
    return owners


def takes_part(parameter: Tensor) -> bool:
    """Whether there is a gradient here, or there may be one on other ranks, which wait for this."""
    return parameter.grad is not None or _ops.is_distributed(parameter)


def _keep_first(owners: Sequence[Owner]) -> None:
    """Leave every parameter to the first of its owners, and there to what is clipped."""
    seen: set[int] = set()
    for owner in owners:
        for parameters in (owner.clipped, owner.spared):
            first = {id(parameter): parameter for parameter in parameters}
            parameters[:] = [first[key] for key in first if key not in seen]
            seen.update(first)


@contextlib.contextmanager
def raising_together(
    optimizers: Sequence[Any], norm_type: Any, caller: _ops.Caller
) -> Iterator[None]:
    """Errors inside are raised on all ranks that would wait for this one to measure."""
    try:
        yield
    except Exception as error:
        parameters = [parameter for optimizer in optimizers for parameter in listed(optimizer)]
        _ops.raise_together(error, parameters, None, caller, norm_type)
        raise


def listed(optimizer: Any) -> list[Tensor]:
    """The parameters of all its groups, each as often as it is there."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
