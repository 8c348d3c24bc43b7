"""``bench profiling``: how fast a busy event loop is while it is profiled, by kind of profile."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Mapping
from typing import Final

from rich.console import Console

from agent360.mesh.runtime.profiling.allocations import profile_allocations
from agent360.mesh.runtime.profiling.cpu import profile_cpu
from agent360.mesh.runtime.profiling.service import Take
from agent360.mesh.runtime.profiling.waits import profile_waits

_KINDS: Final[Mapping[str, Take]] = {
    "cpu": profile_cpu,
    "memory": profile_allocations,
    "io": profile_waits,
}
_AT_ONCE: Final = 50
_OBJECTS: Final = 20


async def measure(
    rounds: int, seconds: float, report: Callable[[str], None]
) -> dict[str, list[float]]:
    """The loop's speed while it is profiled beside that just before, by kind, one figure a round.

    The loop does what is hardest on profilers: short tasks that call and allocate all the time.

    Args:
        rounds: how often every measurement is taken; the kinds take turns within a round.
        seconds: how long one measurement takes.
        report: told of progress.
    """
    shares: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    for take in _KINDS.values():
        await take(0.05, html=False)  # what it imports is not what is measured
    for number in range(1, rounds + 1):
        report(f"profiling: round {number} of {rounds}")
        for kind, take in _KINDS.items():
            alone = await _steps(seconds)
            profile = asyncio.ensure_future(take(seconds, html=False))
            await asyncio.sleep(0)
            shares[kind].append(await _steps(seconds) / alone)
            await profile
    return shares


def flatten(shares: Mapping[str, list[float]]) -> dict[str, float]:
    """Medians by name."""
    return {f"{kind}_speed": round(statistics.median(each), 3) for kind, each in shares.items()}


def print_profiling_figures(flat: Mapping[str, float], console: Console) -> None:
    """Prints the shares."""
    for name, value in flat.items():
        console.print(f"{name} = {value:.2f}")


async def _steps(seconds: float) -> int:
    """How many short tasks the loop runs in a while."""
    loop = asyncio.get_running_loop()
    end, done = loop.time() + seconds, 0
    while loop.time() < end:
        await asyncio.gather(*(_step() for _ in range(_AT_ONCE)))
        done += _AT_ONCE
    return done


async def _step() -> int:
    made = {str(number): [number] for number in range(_OBJECTS)}
    await asyncio.sleep(0)
    return len(made)
