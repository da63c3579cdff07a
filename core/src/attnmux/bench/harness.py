"""Times of a function on one device."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Clock", "CpuClock", "CudaClock", "Timing", "make_clock", "measure", "quantile"]

_FLUSH_BYTES = 256 * 2**20
"""Written between launches; five times the second-level cache of an H100 (50 MiB)."""

_WARM_UP_SHARE = 0.2


@dataclass(frozen=True)
class Timing:
    """Times of one function.

    Attributes:
        median_ms: Median, in milliseconds.
        p20_ms: 20th percentile, in milliseconds.
        p80_ms: 80th percentile, in milliseconds.
        repetitions: Timed runs.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    repetitions: int

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Timing:
        """Return the statistics of times in milliseconds, at least one."""
        ordered = sorted(times_ms)
        return cls(statistics.median(ordered), quantile(ordered, 0.2), quantile(ordered, 0.8), len(ordered))


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """Return a quantile of ascending values by linear interpolation; `fraction` in [0, 1]."""
    place = fraction * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


class Clock(Protocol):
    """Times runs of a function."""

    def milliseconds(self, run: Callable[[], object], repetitions: int) -> list[float]:
        """Run it so many times and return the milliseconds of each."""
        ...


class CpuClock:
    """Wall time on the CPU.

    Args:
        now: Returns seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def milliseconds(self, run: Callable[[], object], repetitions: int) -> list[float]:
        """Run it so many times and return the milliseconds of each."""
        times = []
        for _ in range(repetitions):
            started = self._now()
            run()
            times.append((self._now() - started) * 1000)
        return times


class CudaClock:
    """Device time between two events, with the second-level cache overwritten before each run.

    Args:
        device: A CUDA device, made the current one by the caller.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._filler = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def milliseconds(self, run: Callable[[], object], repetitions: int) -> list[float]:
        """Run it so many times and return the milliseconds of each."""
        starts, ends = ([_timed_event() for _ in range(repetitions)] for _ in range(2))
        for start, end in zip(starts, ends, strict=True):
            self._filler.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def make_clock(device: torch.device) -> Clock:
    """Return the clock for a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def measure(
    run: Callable[[], object], clock: Clock, *, budget_s: float = 0.25, least: int = 3, most: int = 200
) -> Timing:
    """Time a function after a warm-up.

    Args:
        run: What is timed.
        clock: Times it.
        budget_s: About how long the timed runs may take, in seconds; a fifth more goes into the warm-up.
        least: Timed runs at least, whatever they take.
        most: Timed runs at most.

    Returns:
        The statistics of the timed runs.
    """
    # the first run compiles and allocates, and says nothing of the second
    clock.milliseconds(run, 1)
    estimate = max(min(clock.milliseconds(run, 2)), 1e-3)
    if (warm_ups := int(budget_s * 1000 * _WARM_UP_SHARE / estimate)) > 0:
        clock.milliseconds(run, min(warm_ups, most))
    repetitions = min(most, max(least, int(budget_s * 1000 / estimate)))
    return Timing.of(clock.milliseconds(run, repetitions))
