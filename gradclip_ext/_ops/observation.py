"""Whether anything observes operations, so that the native engine must not bypass the dispatcher.

A compiler that traces, a dispatch mode, a function mode, functorch and a jit trace all expect to
see torch's own operations. Other modules ask through the names here, never torch itself.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch.autograd.profiler import record_function

# Not wrapped in a function, whose cost every call would pay.
from torch.compiler import is_compiling as compiling

from gradclip_ext import _C

__all__ = ["compiling", "observed", "profiler_range"]


def observed() -> bool:
    """Whether anything on this thread expects to see every operation."""
    return compiling() or _C.observed()


def profiler_range(function: str) -> contextlib.AbstractContextManager[Any]:
    """The range of one of our functions in a profile; none where a mode or a trace would see it.

    It consists of two operations.
    """
    if observed():
        return contextlib.nullcontext()
    return record_function(f"gradclip_ext::{function}")
