"""Counts the calls of torch's functions that :mod:`.patch` leads here, and words the report."""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from gradclip_ext import _ops

Function = Callable[..., Any]


class Calls:
    """How often the functions were called, and what became of the calls.

    Attributes:
        processes: how many processes the calls are from.
        counts: the calls of each function.
        declined: why the native engine declined, and how often.
        seconds: the time that the calls took the host.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forget all calls."""
        self.processes = 1
        self.counts: Counter[str] = Counter()
        self.declined: Counter[str] = Counter()
        self.seconds = 0.0

    def counted(self, name: str, function: Function) -> Function:
        """A function that does the same and is counted under a name, except by a compiler."""

        @functools.wraps(function)
        def counting(*args: Any, **kwargs: Any) -> Any:
            # A compiler traces the function alone.
            if _ops.compiling():
                return function(*args, **kwargs)
            start = time.perf_counter()
            _ops.start_watching()
            try:
                return function(*args, **kwargs)
            finally:
                reason = _ops.stop_watching()
                seconds = time.perf_counter() - start
                with self._lock:
                    self.counts[name] += 1
                    self.seconds += seconds
                    if reason is not None:
                        self.declined[reason] += 1

        return counting

    def as_dict(self) -> dict[str, Any]:
        """What :meth:`add` takes, of types that JSON has."""
        return {
            "counts": dict(self.counts),
            "declined": dict(self.declined),
            "seconds": self.seconds,
        }

    def add(self, other: Mapping[str, Any]) -> None:
        """Add the calls of another process."""
        # A process that only started others has none of its own.
        self.processes = self.processes + 1 if self.counts else 1
        self.counts.update(other["counts"])
        self.declined.update(other["declined"])
        self.seconds += other["seconds"]

    def report(self) -> list[str]:
        """The lines of the report, one or more if there were calls."""
        total = self.counts.total()
        declined = self.declined.total()
        where = "" if self.processes == 1 else f" in {self.processes} processes"
        share = 100.0 * (total - declined) / total
        lines = [
            f"{total} calls{where}, {_percent(share)} native, "
            f"{self.seconds:.3g} s in all, {1e6 * self.seconds / total:.3g} us each",
            ", ".join(f"{name} {count}" for name, count in self.counts.most_common()),
        ]
        if declined:
            lines.append(f"{declined} went through torch's operations:")
            lines += [f"  {count}: {reason}" for reason, count in self.declined.most_common()]
        return lines


def _percent(share: float) -> str:
    """A share of 100 alone is all of them, and one of 0 none."""
    return f"{min(max(share, 0.1), 99.9):.3g} %" if 0.0 < share < 100.0 else f"{share:.0f} %"
