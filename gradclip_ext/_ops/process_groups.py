"""Process groups over which gradients that are no DTensors are split: the argument, read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _arguments
from gradclip_ext._ops.compiled import outside_graphs

__all__ = ["Group", "ShardGroup", "read_process_groups"]


@dataclass(frozen=True)
class ShardGroup:
    """A process group whose ranks hold different gradients, or different parts of them.

    For the argument ``process_groups`` of :func:`gradclip_ext.clip_grad_norm_`,
    :func:`gradclip_ext.get_total_norm`, :func:`gradclip_ext.grad_norms` and
    :class:`gradclip_ext.GradClipper`.

    Args:
        group: a ``torch.distributed.ProcessGroup``, or a 1-D ``DeviceMesh``.
        replicated: a function of a parameter (in :func:`gradclip_ext.get_total_norm` of a tensor).
            Where it returns True all ranks of the group hold the same gradient, which is counted
            once, on the first rank. It has to give the same answer on all of them.
    """

    group: Any
    replicated: Callable[[Tensor], bool] | None = None


@dataclass(frozen=True)
class Group:
    """A process group of more than one rank, as the exchange needs it.

    Attributes:
        group: what the collectives take.
        ranks: its global ranks, in the group's order.
        is_first: whether this rank is the first of them.
        replicated: see :class:`ShardGroup`.
        device_types: where its collectives can take place, by preference.
    """

    group: Any
    ranks: tuple[int, ...]
    is_first: bool
    replicated: Callable[[Tensor], bool] | None
    device_types: tuple[str, ...]


def read_process_groups(process_groups: Any, function: str) -> tuple[Group, ...]:
    """The argument of that name, without groups of a single rank.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized.
        TypeError: it is not a group, a 1-D mesh, a :class:`ShardGroup` or a sequence of these.
        ValueError: this rank is not in a group, a mesh has several dimensions, or a group of
            several ranks is listed twice.
    """
    if process_groups is None:
        return ()
    if (
        isinstance(process_groups, tuple)
        and process_groups
        and all(isinstance(group, Group) for group in process_groups)
    ):
        # Read before.
        return process_groups
    return _read_all(process_groups, function)


@outside_graphs
def _read_all(process_groups: Any, function: str) -> tuple[Group, ...]:
    is_sequence = isinstance(process_groups, Sequence) and not isinstance(process_groups, str)
    given = list(process_groups) if is_sequence else [process_groups]
    if not given:
        raise ValueError(f"{function}: process_groups has to name at least one group, found none")
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        raise RuntimeError(
            f"{function}: process_groups needs torch.distributed, which is not initialized; call "
            "torch.distributed.init_process_group() first"
        )
    groups = [
        _read(entry, f"process_groups[{place}]" if is_sequence else "process_groups", function)
        for place, entry in enumerate(given)
    ]
    for place, group in enumerate(groups):
        for earlier, other in enumerate(groups[:place]):
            if len(group.ranks) > 1 and set(group.ranks) == set(other.ranks):
                raise ValueError(
                    f"{function}: process_groups[{earlier}] and process_groups[{place}] have the "
                    f"same ranks, {_ranks(group)}, which would count twice"
                )
    return tuple(group for group in groups if len(group.ranks) > 1)


def _read(entry: Any, name: str, function: str) -> Group:
    from torch.distributed.device_mesh import DeviceMesh

    replicated = None
    if isinstance(entry, ShardGroup):
        if entry.replicated is not None and not callable(entry.replicated):
            raise TypeError(
                f"{function}: {name}.replicated has to be a function of a parameter, found "
                f"{_arguments.describe(entry.replicated)}"
            )
        entry, replicated = entry.group, entry.replicated
    group = entry
    if isinstance(entry, DeviceMesh):
        if entry.ndim != 1:
            raise ValueError(
                f"{function}: {name} has to be a mesh of one dimension, found one of {entry.ndim}; "
                "pass one for each dimension, such as mesh['pp']"
            )
        if entry.get_coordinate() is None:
            raise ValueError(f"{function}: {name} has to contain this rank, {_this_rank()}")
        group = entry.get_group()
    if group is torch.distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{function}: {name} has to contain this rank, {_this_rank()}")
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"{function}: {name} has to be a ProcessGroup, a DeviceMesh or a ShardGroup, found "
            f"{_arguments.describe(group)}"
        )
    ranks = tuple(torch.distributed.get_process_group_ranks(group))
    own = torch.distributed.get_rank()
    if own not in ranks:
        raise ValueError(f"{function}: {name} has to contain this rank, {own}")
    return Group(group, ranks, ranks[0] == own, replicated, _device_types(group))


def _device_types(group: Any) -> tuple[str, ...]:
    """As in "cpu:gloo,cuda:nccl"; gloo names both, but would copy from a GPU through the host."""
    config = torch.distributed.get_backend_config(group)
    pairs = [pair.split(":") for pair in config.split(",")]
    return tuple(device for device, backend in pairs if device == "cpu" or backend != "gloo")


def _this_rank() -> int:
    return int(torch.distributed.get_rank())


def _ranks(group: Group) -> str:
    return ", ".join(map(str, group.ranks))
