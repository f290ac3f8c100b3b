"""Who is watching: whether the native engine may run behind the dispatcher's back.

A compiler that traces, a dispatch mode, a function mode, functorch and a jit trace all expect to
see torch's own operations. The question is asked here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.compiler import is_compiling

from gradclip_ext import _C

__all__ = ["compiling", "observed", "offer"]

_Result = TypeVar("_Result")


def compiling() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` is tracing this call."""
    return is_compiling()


def observed() -> bool:
    """Whether anything on this thread expects to see every operation."""
    return is_compiling() or _C.observed()


def offer(function: Callable[..., _Result | None], *arguments: Any) -> _Result | None:
    """What a function of ``_C`` answers: None where it declines, with nothing changed.

    It is not asked while a compiler is tracing, which could not look inside.
    """
    return None if is_compiling() else function(*arguments)
