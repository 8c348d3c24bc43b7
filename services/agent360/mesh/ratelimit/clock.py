"""The time that counts go by."""

from __future__ import annotations

import time
from collections.abc import Callable


def wall_clock() -> Callable[[], int]:
    """Microseconds since 1970 as they were at the start, carried on by the monotonic clock.

    A wall clock that is set while the process runs changes nothing.
    """
    offset_ns = time.time_ns() - time.monotonic_ns()
    monotonic_ns = time.monotonic_ns

    def now() -> int:
        return (monotonic_ns() + offset_ns) // 1_000

    return now
