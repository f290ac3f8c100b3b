"""Errors that all ranks raise, whichever of them has found one.

The vectors of an exchange tell which rank it was. Its text is found where the ranks first met, in
the store of their process group, since a vector of numbers could not hold it.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradclip_ext._ops import torch_distributed
from gradclip_ext._ops.exchange import PUBLICATIONS, Exchange, Flags
from gradclip_ext._ops.gradients import nonfinite_error
from gradclip_ext._ops.shares import Shares

__all__ = ["nonfinite_everywhere", "nonfinite_here", "publish", "raise_if_failed", "raise_unread"]

# What any rank has published last.
_LAST = "gradclip_ext/last"
# Of what this rank has published.
_numbers = itertools.count()


class _Unread(NamedTuple):
    """What a vector on a GPU has told, on its way to the host."""

    exchange: Exchange
    tail: Tensor
    arrived: Any


_unread: list[_Unread] = []


def raise_if_failed(exchange: Exchange, shares: Shares, reads: bool = False) -> Tensor | None:
    """Raise what has failed here or on another rank.

    On a GPU the host does not know of other ranks, unless it ``reads`` anyway. A flag is returned
    then, and :func:`raise_unread` raises later.
    """
    error, flags = shares.error, exchange.flags
    if error is not None:
        if flags is not None and len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (f"{error.args[0]} (on rank {exchange.rank})",)
        raise error
    if flags is None or exchange.tail is None:
        return None
    if not flags.is_known and reads and type(exchange.tail) is Tensor:
        flags = exchange.flags_in(exchange.tail)
    if not flags.is_known:
        _read_later(exchange, exchange.tail)
        failed: Tensor = flags.failed | flags.disagrees
        return failed
    _raise(flags, shares.caller.function)
    return None


def raise_unread(function: str) -> None:
    """Raise what another rank has told in an earlier call, once the host knows."""
    while _unread and (_unread[0].arrived is None or _unread[0].arrived.query()):
        earlier = _unread.pop(0)
        _raise(earlier.exchange.flags_in(earlier.tail), f"{function}, of an earlier call")


def _read_later(exchange: Exchange, tail: Tensor) -> None:
    # A fake tensor has no numbers, and a captured graph would copy them each time it is replayed.
    if type(tail) is not Tensor or torch_distributed.is_capturing(tail.device):
        return
    if tail.device.type == "cpu":
        _unread.append(_Unread(exchange, tail, None))
        return
    copy = torch.empty(tail.shape, dtype=tail.dtype, device="cpu", pin_memory=True)
    copy.copy_(tail, non_blocking=True)
    arrived = torch.get_device_module(tail.device).Event()
    arrived.record()
    _unread.append(_Unread(exchange, copy, arrived))


def _raise(flags: Flags, function: str) -> None:
    if flags.failed:
        who, text = "several ranks", torch_distributed.published(_LAST)
        if flags.failed_rank is not None:
            who, text = f"rank {flags.failed_rank[0]}", _published(*flags.failed_rank)
        raise RuntimeError(
            f"{function}: {who} failed, so no gradient was changed on any rank"
            f"{f': {text}' if text else ''}"
        )
    if flags.disagrees:
        raise RuntimeError(
            f"{function}: the ranks have called it differently, so no gradient was changed; "
            "norm_type, the list of parameters where each norm is asked for, the process groups "
            "in their order, and the gradients with Partial placements have to be the same on all "
            "ranks"
        )


def nonfinite_everywhere(exchange: Exchange, shares: Shares, norm_type: float) -> RuntimeError:
    """The error for a norm that is not finite, with the gradient of any rank that is to blame."""
    flags = exchange.flags
    text = nonfinite_here(shares, norm_type)
    if flags is None:
        return RuntimeError(text)
    rank = exchange.rank
    if not exchange.holds_nonfinite:
        if flags.nonfinite_rank is None:
            return RuntimeError(text)
        rank = flags.nonfinite_rank[0]
        text = _published(*flags.nonfinite_rank) or text
    return RuntimeError(f"{text} (On rank {rank}.)")


def nonfinite_here(shares: Shares, norm_type: float) -> str:
    """The same as a text, of what this rank holds."""
    names = [shares.name(place) for share in shares.shares for place in share.places]
    return str(nonfinite_error(norm_type, shares.tensors, names))


def publish(exchange: Exchange, text: str) -> None:
    """Leave a text for other ranks, which learn in the exchange where they find it."""
    exchange.publication = next(_numbers) % PUBLICATIONS
    torch_distributed.publish(f"gradclip_ext/{exchange.rank}/{exchange.publication}", text)
    torch_distributed.publish(_LAST, f"{text} (on rank {exchange.rank})")


def _published(rank: int, number: int) -> str | None:
    return torch_distributed.published(f"gradclip_ext/{rank}/{number}")
