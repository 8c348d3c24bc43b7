"""The query cache: rollups put together by group and step, kept while nothing changes them.

What is kept are blocks of steps that are over. Only a sample that comes late changes those, and the
intake tells of every sample that it takes.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from agent360.mesh.metrics.frame import Frame
from agent360.mesh.metrics.queries.query import Matcher

_OVERHEAD_BYTES: Final = 2_000
"""Of a block, beside its columns."""


class Shape(NamedTuple):
    """What blocks are the same for, whatever the range and the aggregation."""

    tenant: str | None
    name: str
    matchers: tuple[Matcher, ...]
    group_by: tuple[str, ...]
    by_series: bool
    step_s: int
    bins: bool


class _Place(NamedTuple):
    shape: Shape
    start_s: int


@dataclass(slots=True)
class _Block:
    frame: Frame
    end_s: int
    size_bytes: int
    kept_s: float


@dataclass(eq=False, slots=True)
class Filling:
    """Blocks that are being read; late samples that come meanwhile spoil them."""

    shape: Shape
    start_s: int
    end_s: int
    spoiled: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of time with samples that may not be in what is read."""


class KeptBlocks:
    """Blocks of answers, the least recently used of a tenant leave first.

    Example:
        >>> kept = KeptBlocks(max_bytes=64 << 20, max_tenant_bytes=16 << 20)
        >>> with kept.filling(shape, start_s, end_s) as filling:
        ...     kept.put(filling, start_s, end_s, await read(...))
        >>> kept.get(shape, start_s)
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        max_tenant_bytes: int,
        max_age_s: float = math.inf,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes an empty cache.

        Args:
            max_bytes: of all blocks.
            max_tenant_bytes: of the blocks of one tenant.
            max_age_s: after which a block is read again: where other replicas, too, take late
                samples.
            now: a clock, in seconds.
        """
        self._max_bytes = max_bytes
        self._max_tenant_bytes = min(max_tenant_bytes, max_bytes)
        self._max_age_s = max_age_s
        self._now = now
        self._blocks: OrderedDict[_Place, _Block] = OrderedDict()
        self._by_name: dict[tuple[str | None, str], set[_Place]] = {}
        self._tenant_bytes: dict[str | None, int] = {}
        self._fillings: set[Filling] = set()
        self._horizon_s = 0
        self.size_bytes = 0
        """Of all blocks."""
        self.hits = 0
        """Blocks that were found."""
        self.misses = 0
        """Blocks that were not."""
        self.invalidated = 0
        """Blocks that late samples took away."""

    def get(self, shape: Shape, start_s: int) -> Frame | None:
        """A block, if it is kept."""
        place = _Place(shape, start_s)
        block = self._blocks.get(place)
        if block is not None and block.kept_s + self._max_age_s < self._now():
            self._drop(place)
            block = None
        if block is None:
            self.misses += 1
            return None
        self.hits += 1
        self._blocks.move_to_end(place)
        return block.frame

    @contextmanager
    def filling(self, shape: Shape, start_s: int, end_s: int) -> Iterator[Filling]:
        """To be entered before reading what will be ``put``."""
        filling = Filling(shape, start_s, end_s)
        self._fillings.add(filling)
        self._horizon_s = max(self._horizon_s, end_s)
        try:
            yield filling
        finally:
            self._fillings.discard(filling)

    def put(self, filling: Filling, start_s: int, end_s: int, frame: Frame) -> None:
        """Keeps a block, unless a sample for it came since the filling began."""
        if any(first < end_s and last >= start_s for first, last in filling.spoiled):
            return
        size_bytes = frame.size_bytes + _OVERHEAD_BYTES
        tenant = filling.shape.tenant
        if size_bytes > self._max_tenant_bytes:
            return
        place = _Place(filling.shape, start_s)
        if place in self._blocks:
            self._drop(place)
        self._blocks[place] = _Block(frame, end_s, size_bytes, self._now())
        self._by_name.setdefault((tenant, filling.shape.name), set()).add(place)
        self._tenant_bytes[tenant] = self._tenant_bytes.get(tenant, 0) + size_bytes
        self.size_bytes += size_bytes
        while self._tenant_bytes.get(tenant, 0) > self._max_tenant_bytes:
            self._drop(next(each for each in self._blocks if each.shape.tenant == tenant))
        self.shrink(self._max_bytes)

    def taken(self, frame: Frame) -> None:
        """Hears of samples; those of steps that are kept or being read take them away."""
        if not len(frame) or frame.bucket_s.min() >= self._horizon_s:
            return
        late = np.flatnonzero(frame.bucket_s < self._horizon_s)
        ranges: dict[tuple[str, str], tuple[int, int]] = {}
        rows = zip(frame.row_series[late].tolist(), frame.bucket_s[late].tolist(), strict=True)
        for number, bucket_s in rows:
            series = frame.series[number]
            key = (series.tenant, series.name)
            first, last = ranges.get(key, (bucket_s, bucket_s))
            ranges[key] = (min(first, bucket_s), max(last, bucket_s))
        for (tenant, name), (first, last) in ranges.items():
            self._invalidate(tenant, name, first, last)

    def shrink(self, size_bytes: int) -> int:
        """Lets blocks go until no more than so many bytes are kept; returns how many went."""
        before = self.size_bytes
        while self.size_bytes > size_bytes:
            self._drop(next(iter(self._blocks)))
        return before - self.size_bytes

    def _invalidate(self, tenant: str, name: str, first: int, last: int) -> None:
        for filling in self._fillings:
            if filling.shape.name == name and filling.shape.tenant in {tenant, None}:
                filling.spoiled.append((first, last))
        for key in ((tenant, name), (None, name)):
            for place in list(self._by_name.get(key, ())):
                if place.start_s <= last and self._blocks[place].end_s > first:
                    self._drop(place)
                    self.invalidated += 1

    def _drop(self, place: _Place) -> None:
        block = self._blocks.pop(place)
        shape = place.shape
        places = self._by_name[shape.tenant, shape.name]
        places.discard(place)
        if not places:
            del self._by_name[shape.tenant, shape.name]
        self.size_bytes -= block.size_bytes
        self._tenant_bytes[shape.tenant] -= block.size_bytes
        if not self._tenant_bytes[shape.tenant]:
            del self._tenant_bytes[shape.tenant]
