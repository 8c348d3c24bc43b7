"""Which records of a noisy pattern are written: the first of an interval, then one of many."""

from __future__ import annotations

import time
from collections.abc import Callable

from agent360.mesh.runtime.settings import LogSamplingSettings


class _Window:
    __slots__ = ("count", "end", "suppressed")

    def __init__(self) -> None:
        self.end = 0.0
        self.count = 0
        self.suppressed = 0


class Sampler:
    """Decides for each record; knows how many were left out since the last that was written.

    Example:
        >>> sampler = Sampler(LogSamplingSettings(first=1, then_every=10))
        >>> [sampler.admit("warning", "lost") for _ in range(11)][-1]
        9
    """

    def __init__(
        self, settings: LogSamplingSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begins with nothing counted.

        Args:
            settings: how many are written.
            clock: seconds.
        """
        self._settings = settings
        self._clock = clock
        self._windows: dict[tuple[str, str], _Window] = {}

    def admit(self, level: str, pattern: str) -> int | None:
        """How many were left out before this one; None: it is left out, too.

        There are as many windows as levels and patterns, both of which are few.
        """
        settings, now = self._settings, self._clock()
        window = self._windows.get((level, pattern))
        if window is None:
            window = self._windows[level, pattern] = _Window()
        if now >= window.end:
            window.end = now + settings.interval_s
            window.count = 0
        window.count += 1
        beyond = window.count - settings.first
        if beyond > 0 and beyond % settings.then_every:
            window.suppressed += 1
            return None
        suppressed, window.suppressed = window.suppressed, 0
        return suppressed
