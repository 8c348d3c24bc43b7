"""How often something is done in a second, by so many tasks, round after round."""

from __future__ import annotations

import asyncio
import statistics
import time
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

MESSAGE_ITEMS: Final = 1_000
"""Items of a message where many calls go out together."""


@dataclass(slots=True)
class Series:
    """Rounds of one measurement."""

    per_s: list[float] = field(default_factory=list)
    """Calls a second, one figure a round."""
    latencies_s: array[float] = field(default_factory=lambda: array("d"))
    """Of single calls, over all rounds; empty where calls go out together.

    Not a list: garbage collection would walk through a million latencies again and again.
    """

    @property
    def median_per_s(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.per_s)

    def quantile_ms(self, quantile: float) -> float | None:
        """A latency quantile in milliseconds; None where there is none."""
        if not self.latencies_s:
            return None
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] * 1e3


async def run_tasks(
    call: Callable[[int], Awaitable[object]], tasks: int, seconds: float, series: Series
) -> None:
    """Runs ``tasks`` tasks that call one after another, for a while and at least once."""
    done = 0
    latencies = array("d")
    end = time.perf_counter() + seconds

    async def work(first: int) -> None:
        nonlocal done
        number, started = first, time.perf_counter()
        while True:
            await call(number)
            ended = time.perf_counter()
            latencies.append(ended - started)
            done += 1
            if ended >= end:
                return
            number, started = number + tasks, ended

    started = time.perf_counter()
    await asyncio.gather(*(work(first) for first in range(tasks)))
    series.per_s.append(done / (time.perf_counter() - started))
    series.latencies_s += latencies


async def run_many(
    many: Callable[[int], Awaitable[object]], seconds: float, series: Series
) -> None:
    """Has 20 messages' worth of calls made at once, again and again, for a while."""
    done, count = 0, 20 * MESSAGE_ITEMS
    started = time.perf_counter()
    while not done or time.perf_counter() - started < seconds:
        await many(count)
        done += count
    series.per_s.append(done / (time.perf_counter() - started))
