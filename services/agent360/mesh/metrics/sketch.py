"""A quantile sketch with 1% relative error that merges without loss (DDSketch, VLDB 2019)."""

from __future__ import annotations

import json
import math
from typing import Final

RELATIVE_ERROR: Final = 0.01
_GAMMA: Final = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_LOG_GAMMA: Final = math.log(_GAMMA)
_SMALLEST: Final = 1e-12


class Sketch:
    """Counts of values in bins whose bounds grow by 2%.

    Example:
        >>> sketch = Sketch()
        >>> sketch.add(3.0, 10)
        >>> sketch.quantile(0.5)
        3.0016...
    """

    __slots__ = ("_negative", "_positive", "_zeros")

    def __init__(self) -> None:
        self._positive: dict[int, int] = {}
        self._negative: dict[int, int] = {}
        self._zeros = 0

    def add(self, value: float, count: int = 1) -> None:
        """Adds ``count`` observations of a finite value."""
        if abs(value) < _SMALLEST:
            self._zeros += count
            return
        bins = self._positive if value > 0 else self._negative
        index = math.ceil(math.log(abs(value)) / _LOG_GAMMA)
        bins[index] = bins.get(index, 0) + count

    def merge(self, other: Sketch) -> None:
        """Adds all that another sketch holds."""
        self._zeros += other._zeros
        for mine, theirs in (
            (self._positive, other._positive),
            (self._negative, other._negative),
        ):
            for index, count in theirs.items():
                mine[index] = mine.get(index, 0) + count

    def quantile(self, q: float) -> float:
        """The value at a quantile, within 1%; NaN if nothing was added."""
        rows = [(-_middle(index), n) for index, n in sorted(self._negative.items(), reverse=True)]
        rows.append((0.0, self._zeros))
        rows += [(_middle(index), n) for index, n in sorted(self._positive.items())]
        total = sum(count for _, count in rows)
        if not total:
            return math.nan
        rank, seen = q * (total - 1), 0
        for value, count in rows:
            seen += count
            if count and seen > rank:
                return value
        return rows[-1][0]

    def to_bytes(self) -> bytes:
        """A compact form."""
        bins = [self._zeros, list(self._positive.items()), list(self._negative.items())]
        return json.dumps(bins, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Sketch:
        """Reads the compact form."""
        sketch = cls()
        sketch._zeros, positive, negative = json.loads(data)
        sketch._positive, sketch._negative = dict(positive), dict(negative)
        return sketch


def _middle(index: int) -> float:
    return 2 * math.pow(_GAMMA, index) / (_GAMMA + 1)
