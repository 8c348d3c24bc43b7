"""Rollups: what is kept of the samples of one series in one bucket of time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NamedTuple

from agent360.mesh.metrics.sketch import Sketch

BUCKET_S: Final = 10
"""Length of a bucket."""


class Kind(IntEnum):
    """What the numbers of a series mean; as in the contract."""

    COUNTER = 1
    GAUGE = 2
    DISTRIBUTION = 3


class SeriesId(NamedTuple):
    """What identifies a series."""

    tenant: str
    name: str
    labels: tuple[tuple[str, str], ...]
    kind: Kind
    unit: str


class Sample(NamedTuple):
    """Observations of one value."""

    series: SeriesId
    time_s: float
    value: float
    weight: int


@dataclass(slots=True)
class Rollup:
    """Samples of a bucket, put together."""

    count: int = 0
    total: float = 0.0
    least: float = math.inf
    most: float = -math.inf
    last: float = 0.0
    last_time_s: float = -math.inf
    sketch: Sketch = field(default_factory=Sketch)

    def add(self, sample: Sample) -> None:
        """Adds a sample."""
        self.count += sample.weight
        self.total += sample.value * sample.weight
        self.least = min(self.least, sample.value)
        self.most = max(self.most, sample.value)
        if sample.time_s >= self.last_time_s:
            self.last, self.last_time_s = sample.value, sample.time_s
        if sample.series.kind is Kind.DISTRIBUTION:
            self.sketch.add(sample.value, sample.weight)

    def merge(self, other: Rollup) -> None:
        """Adds all that another rollup holds."""
        self.count += other.count
        self.total += other.total
        self.least = min(self.least, other.least)
        self.most = max(self.most, other.most)
        if other.last_time_s >= self.last_time_s:
            self.last, self.last_time_s = other.last, other.last_time_s
        self.sketch.merge(other.sketch)


def roll_up(samples: list[Sample]) -> dict[tuple[SeriesId, int], Rollup]:
    """Samples by series and bucket; a bucket is named by its start in seconds."""
    rolled: dict[tuple[SeriesId, int], Rollup] = {}
    for sample in samples:
        key = (sample.series, int(sample.time_s // BUCKET_S) * BUCKET_S)
        rollup = rolled.get(key)
        if rollup is None:
            rollup = rolled[key] = Rollup()
        rollup.add(sample)
    return rolled
