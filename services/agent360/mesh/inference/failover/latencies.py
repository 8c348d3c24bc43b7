"""How long recent tries took, and the quantiles of that."""

from __future__ import annotations

import bisect
from collections import deque
from typing import Final

_KEPT: Final = 256


class Latencies:
    """The times of the last 256 tries, in order of time and of size.

    Example:
        >>> latencies = Latencies()
        >>> for each in (0.3, 0.1, 0.2):
        ...     latencies.add(each)
        >>> latencies.quantile(0.5)
        0.2
    """

    __slots__ = ("_recent", "_sorted")

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, seconds: float) -> None:
        """Adds a time; for a try that was given up, the least it would have taken."""
        if len(self._recent) == _KEPT:
            oldest = self._recent.popleft()
            del self._sorted[bisect.bisect_left(self._sorted, oldest)]
        self._recent.append(seconds)
        bisect.insort(self._sorted, seconds)

    def quantile(self, share: float) -> float:
        """The time that this share of tries did not exceed; there must be any."""
        return self._sorted[min(len(self._sorted) - 1, int(share * len(self._sorted)))]
