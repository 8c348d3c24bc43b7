"""The time that the service goes by."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from agent360.mesh.cache.ports import Timer


class LoopClock:
    """The port ``Clock``: the event loop's clock, and the computer's."""

    def __init__(self) -> None:
        self._call_at = asyncio.get_running_loop().call_at
        self.now = asyncio.get_running_loop().time

    def wall_us(self) -> int:
        """See ``Clock.wall_us``."""
        return time.time_ns() // 1_000

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """See ``Clock.call_at``."""
        return self._call_at(when, callback)
