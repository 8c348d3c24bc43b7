"""How long rows are kept, and in which windows of time their files are compacted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from agent360.mesh.metrics.resolution import FINE, HOUR, MINUTE, Resolution, Retention

_HOUR_S: Final = 3_600
_DAY_S: Final = 86_400
_LEAST_S: Final = 60
_LAST_EXPIRY_S: Final = 2**31 - 2
"""The last second at which Cassandra lets a row expire while it can still be downgraded."""
_WINDOWS: Final = 24
"""Files of a table are dropped whole, a window at a time: about so many windows make a lifetime."""
_MONTH_S: Final = 32 * _DAY_S


class Layout(NamedTuple):
    """Where rollups of a resolution are. All numbers are seconds."""

    resolution: Resolution
    table: str
    partition_s: int
    """Time in a partition of one series."""
    row_s: int
    """Time in a row of it."""


LAYOUTS: Final = {
    FINE: Layout(FINE, "rollups_10s", _DAY_S, 60),
    MINUTE: Layout(MINUTE, "rollups_1m", _DAY_S, _HOUR_S),
    HOUR: Layout(HOUR, "rollups_1h", _MONTH_S, _HOUR_S),
}


class Window(NamedTuple):
    """A window of TimeWindowCompactionStrategy."""

    size: int
    unit: str


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """Turns retention into what Cassandra takes: seconds to live.

    Example:
        >>> Lifetimes(retention, marks_s=86_400, late_s=3 * 86_400).default_s(FINE)
        432000
    """

    retention: Retention
    marks_s: float
    """How long a mark that does not move is kept."""
    late_s: float
    """Rollups are kept for so much longer than their retention."""
    now: Callable[[], float] = time.time

    def default_s(self, resolution: Resolution) -> int:
        """Seconds to live of rows that were written in time."""
        return self._capped(self.retention.of(resolution) + self.late_s)

    def of_rollups(self, resolution: Resolution, time_s: float) -> int:
        """Seconds to live from now on of rollups of a time."""
        kept_s = self.retention.of(resolution) + self.late_s
        return self._capped(time_s + kept_s - self.now())

    def of_series(self, time_s: float) -> int:
        """Seconds to live from now on of a series with rollups up to a time."""
        return self._capped(time_s + self.longest_s + self.late_s + _DAY_S - self.now())

    def of_mark(self, time_s: float) -> int:
        """Seconds to live from now on of a mark that moved at a time."""
        return self._capped(time_s + self.marks_s + _DAY_S - self.now())

    @property
    def longest_s(self) -> float:
        """Retention of what is kept longest."""
        return max(self.retention.fine_s, self.retention.minute_s, self.retention.hour_s)

    def window(self, resolution: Resolution) -> Window:
        """The window of compaction of a resolution's table."""
        window_s = self.default_s(resolution) / _WINDOWS
        if window_s < _DAY_S:
            return Window(max(1, round(window_s / _HOUR_S)), "HOURS")
        return Window(round(window_s / _DAY_S), "DAYS")

    def _capped(self, seconds: float) -> int:
        return int(max(_LEAST_S, min(seconds, _LAST_EXPIRY_S - self.now())))


def ttl_until(time_s: float | None) -> int:
    """Seconds to live from now until a time; 0, which means no end, for None."""
    if time_s is None:
        return 0
    now_s = time.time()
    return int(max(_LEAST_S, min(time_s, _LAST_EXPIRY_S) - now_s))
