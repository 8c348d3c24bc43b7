"""Resolutions: how long the buckets are in which rollups are kept, and for how long they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

_MINUTE_S: Final = 60
_HOUR_S: Final = 3_600
_DAY_S: Final = 86_400


class Resolution(NamedTuple):
    """Buckets of one length. All numbers are seconds."""

    name: str
    """As in the names of tables."""
    length_s: int
    """Length of a bucket."""
    block_s: int
    """Buckets of a series that are stored and read together: as many as this holds."""
    partition_s: int
    """Time that a store keeps in one partition and drops at once."""


FINE: Final = Resolution("10s", 10, _HOUR_S, _DAY_S)
MINUTE: Final = Resolution("1m", _MINUTE_S, _HOUR_S, _DAY_S)
HOUR: Final = Resolution("1h", _HOUR_S, _DAY_S, 32 * _DAY_S)
RESOLUTIONS: Final = (FINE, MINUTE, HOUR)
"""All, the finest first. What is acknowledged is kept in the first at once; the others are computed
from it when an hour is over, and again if something comes late."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long rollups are kept, in seconds, by resolution.

    Example:
        >>> Retention(fine_s=86_400, minute_s=14 * 86_400, hour_s=400 * 86_400).of(HOUR)
        34560000
    """

    fine_s: float
    minute_s: float
    hour_s: float

    def of(self, resolution: Resolution) -> float:
        """How long rollups of a resolution are kept, in seconds."""
        return {FINE.name: self.fine_s, MINUTE.name: self.minute_s, HOUR.name: self.hour_s}[
            resolution.name
        ]
