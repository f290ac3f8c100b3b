"""How calls are timed: interleaved, on restored gradients, on CUDA with a cold L2 cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Call = Callable[[], object]
FEWEST_CALLS = 7


class Clock(Protocol):
    """Times one call."""

    def times(self, restore: Call, call: Call) -> dict[str, float]:
        """Returns seconds: "time", which is compared, and others where the device has them."""


class CpuClock:
    """Times a call on restored gradients."""

    def times(self, restore: Call, call: Call) -> dict[str, float]:
        restore()
        start = time.perf_counter()
        call()
        return {"time": time.perf_counter() - start}


class CudaClock:
    """Times a call on restored gradients that are not in the L2 cache."""

    # One cycle lasts at least half a nanosecond on any GPU so far.
    CYCLES_PER_SECOND = 2e9

    def __init__(self, device: torch.device) -> None:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        # Never written again: lines of it that are in the cache need not be written back.
        self.other_data = torch.ones(max(4 * cache, 2**28) // 4, device=device)
        # Kept, because creating an event takes host time.
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def times(self, restore: Call, call: Call) -> dict[str, float]:
        self._prepare(restore)
        self.start.record()
        before = time.perf_counter()
        call()
        host = time.perf_counter() - before
        self.end.record()
        self.end.synchronize()
        elapsed = self.start.elapsed_time(self.end) / 1e3

        self._prepare(restore)
        # Keeps the GPU busy until the call has queued all its work. A device sync, as in
        # `norm > max_norm`, cannot be hidden and shows; so do launches beyond the thousand or so
        # that a stream can hold.
        torch.cuda._sleep(int((2 * host + 50e-6) * self.CYCLES_PER_SECOND))
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        return {
            "time": elapsed,
            "device": self.start.elapsed_time(self.end) / 1e3,
            "host": host,
        }

    def _prepare(self, restore: Call) -> None:
        restore()
        # A read evicts what was restored, and leaves clean lines. After a write the cache would be
        # full of dirty ones, which the timed call had to write back before it could read.
        self.other_data.sum()
        torch.cuda.synchronize()


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def measured(
    calls: dict[str, tuple[Call, Call]], clock: Clock, seconds: float
) -> dict[str, dict[str, Any]]:
    """Statistics by name, of calls that take turns for so many seconds."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in calls}
    for restore, call in calls.values():
        clock.times(restore, call)
    rounds = 0
    end = time.perf_counter() + seconds
    while rounds < FEWEST_CALLS or time.perf_counter() < end:
        for name, (restore, call) in calls.items():
            for what, value in clock.times(restore, call).items():
                times[name].setdefault(what, []).append(value)
        rounds += 1
    result = {}
    for name, by_what in times.items():
        result[name] = quantiles(by_what.pop("time"))
        result[name].update({what: quantiles(values) for what, values in by_what.items()})
    return result


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median and the 20 % and 80 % quantiles, in microseconds."""
    cuts = statistics.quantiles(seconds, n=5)
    return {
        "median_us": statistics.median(seconds) * 1e6,
        "q20_us": cuts[0] * 1e6,
        "q80_us": cuts[3] * 1e6,
        "calls": len(seconds),
    }


def launches(restore: Call, call: Call) -> int:
    """How many kernels a call launches; memory copies and fills do not count."""
    restore()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith("Mem")
        # The ranges of record_function, as long as the kernels in them, are also reported.
        and not event.is_user_annotation
        for event in profile.events()
    )
