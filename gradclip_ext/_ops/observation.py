"""Who is watching: whether the native engine may run behind the dispatcher's back.

A compiler that traces, a dispatch mode, a function mode, functorch and a jit trace all expect to
see torch's own operations. The names here are how the other modules ask; no other asks torch.
"""

from __future__ import annotations

# Without a function around it, which every call would pay for.
from torch.compiler import is_compiling as compiling

from gradclip_ext import _C

__all__ = ["compiling", "observed"]


def observed() -> bool:
    """Whether anything on this thread expects to see every operation."""
    return compiling() or _C.observed()
