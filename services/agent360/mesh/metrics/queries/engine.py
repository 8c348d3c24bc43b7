"""Answers queries: finds the series, bounds the cost, reads in portions, puts together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import grpc
import numpy as np

from agent360.client.errors import InvalidRequestError, MeshError, Violation
from agent360.mesh.metrics.bins import Ints
from agent360.mesh.metrics.frame import BUCKET_S, Frame
from agent360.mesh.metrics.history import History
from agent360.mesh.metrics.queries.evaluation import evaluate
from agent360.mesh.metrics.queries.kept import KeptBlocks, Shape
from agent360.mesh.metrics.queries.query import Aggregation, Group, Query, labels_of
from agent360.mesh.metrics.resolution import FINE, HOUR, MINUTE
from agent360.mesh.metrics.series import Kind, SeriesId

_RUN_CELLS: Final = 300_000
_RUN_CELLS_WITH_BINS: Final = 60_000
"""Rollups that are read and merged at once: some ten to thirty milliseconds of one core."""
_STEPS_OF_LONG_BLOCKS: Final = 24
_DISTRIBUTIONS: Final = frozenset({Kind.DISTRIBUTION})
_FITTING: Final = {
    Aggregation.QUANTILES: _DISTRIBUTIONS,
    Aggregation.SHARE_ABOVE: _DISTRIBUTIONS,
    Aggregation.INCREASE: frozenset({Kind.COUNTER}),
}
"""Which kinds of series have it; the others have all kinds."""


@dataclass(frozen=True, slots=True)
class QueryLimits:
    """Bounds of what a query may cost."""

    max_rollups: int
    """Series times buckets that one query may read."""
    max_points: int
    """Groups times steps that one answer may have."""
    at_once: int
    """Queries that are worked on at a time; others wait."""
    settled_s: float
    """A step counts as over so long after its end: what is kept of it is rarely changed then."""


class _Grouping(NamedTuple):
    """Which group each series belongs to."""

    series: Sequence[SeriesId]
    group_of: Ints
    """Of each series, its place in ``groups``."""
    groups: Sequence[SeriesId]
    """What stands for a group: its labels, with the kind and unit that its series share."""


class QueryEngine:
    """Answers queries about the history.

    Example:
        >>> engine = QueryEngine(history, KeptBlocks(...), limits)
        >>> groups = await engine.answer(query)
    """

    def __init__(
        self,
        history: History,
        kept: KeptBlocks,
        limits: QueryLimits,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._history = history
        self._kept = kept
        self._limits = limits
        self._now = now
        self._turns = asyncio.Semaphore(limits.at_once)
        self.settled_s = limits.settled_s
        """How long after its end a step counts as over."""

    async def answer(self, query: Query) -> list[Group]:
        """The groups of a query, in the order of labels; with ``top_k`` the largest first.

        Raises:
            MeshError: RESOURCE_EXHAUSTED QUERY_TOO_LARGE; the message says what to narrow.
            InvalidRequestError: the series are of a kind that does not have the aggregation.
            StoreError: the store cannot be read now.
        """
        async with self._turns:
            series = await self._history.find(query.tenant, query.name, query.matchers)
            series = _fitting(query, series)
            grouping = await asyncio.to_thread(_grouped, query, series)
            self._bound(query, grouping)
            frame = await self._merged(query, grouping, 0)
            earlier = {
                offset_s: await self._merged(query, grouping, offset_s)
                for offset_s in query.offsets_s
            }
            return await asyncio.to_thread(evaluate, query, self._now(), frame, earlier)

    def _bound(self, query: Query, grouping: _Grouping) -> None:
        times = 1 + len(query.offsets_s)
        buckets = sum(-(-(end - start) // _bucket_s(step)) for start, end, step in _pieces(query))
        rollups = len(grouping.series) * buckets * times
        if rollups > self._limits.max_rollups:
            raise _too_large(
                f"{len(grouping.series):,} series x {buckets:,} buckets"
                + (f" x {times} times" if times > 1 else "")
                + f" are {rollups:,} rollups; a query may read {self._limits.max_rollups:,} "
                "(query.max_rollups): narrow it by matchers, ask for a shorter range, or for steps "
                "of whole minutes or hours"
            )
        points = len(grouping.groups) * query.steps * times
        if points > self._limits.max_points:
            raise _too_large(
                f"{len(grouping.groups):,} groups x {query.steps:,} steps are {points:,} points; "
                f"an answer may have {self._limits.max_points:,} (query.max_points): group by "
                "fewer labels, or ask for longer steps or a shorter range"
            )

    # ---------------------------------------------------------------- reading

    async def _merged(self, query: Query, grouping: _Grouping, offset_s: int) -> Frame:
        """One row for each group and step, in buckets that begin where the steps do."""
        if not grouping.series:
            return Frame.empty(grouping.groups)
        frames = []
        for start_s, end_s, step_s in _pieces(query, offset_s):
            frames += await self._piece(query, grouping, start_s, end_s, step_s)
        first_s = query.start_s - offset_s

        def put_together() -> Frame:
            filled = [frame for frame in frames if len(frame)]
            if not filled:
                return Frame.empty(grouping.groups)
            whole = Frame.joined(filled)
            if len(filled) == 1 and query.steps > 1:
                return whole
            steps = first_s + (whole.bucket_s - first_s) // query.step_s * query.step_s
            return whole.regrouped(whole.row_series, steps, whole.series)

        return await asyncio.to_thread(put_together)

    async def _piece(
        self, query: Query, grouping: _Grouping, start_s: int, end_s: int, step_s: int
    ) -> list[Frame]:
        """A part of the range in steps of one length: what is kept, and what has to be read."""
        shape = Shape(
            query.tenant,
            query.name,
            query.matchers,
            query.group_by,
            query.by_series,
            step_s,
            query.aggregation.needs_bins,
        )
        block_s = _block_s(step_s)
        over_s = self._now() - self._limits.settled_s
        frames: list[Frame] = []
        missing: list[tuple[int, int]] = []
        for block in range(start_s // block_s * block_s, end_s, block_s):
            if block + block_s > over_s:
                missing.append((max(block, start_s), end_s))
                break
            kept = self._kept.get(shape, block)
            if kept is None:
                missing.append((block, block + block_s))
            else:
                frames.append(kept.within(start_s, end_s))
        for first_s, last_s in _runs(missing, _run_s(shape, grouping)):
            with self._kept.filling(shape, first_s, last_s) as filling:
                frame = await self._read(shape, grouping, first_s, last_s)
                over = range(first_s, int(min(last_s, over_s)) - block_s + 1, block_s)
                if first_s % block_s == 0:
                    parts = await asyncio.to_thread(_split_up, frame, over, block_s)
                    for block, part in zip(over, parts, strict=True):
                        self._kept.put(filling, block, block + block_s, part)
            frames.append(frame.within(start_s, end_s))
        return frames

    async def _read(self, shape: Shape, grouping: _Grouping, start_s: int, end_s: int) -> Frame:
        """One row for each group and step; read series by series where these are many."""
        step_s = shape.step_s
        places = dict(zip(grouping.series, grouping.group_of.tolist(), strict=True))

        def put_together(frame: Frame) -> Frame:
            if not len(frame):
                return Frame.empty(grouping.groups)
            moved = np.zeros(len(frame.series), np.int64)
            for number in np.flatnonzero(np.bincount(frame.row_series)).tolist():
                moved[number] = places[frame.series[number]]
            steps = frame.bucket_s // step_s * step_s
            return frame.regrouped(moved[frame.row_series], steps, grouping.groups)

        at_once = max(1, _run_cells(shape) * _bucket_s(step_s) // (end_s - start_s))
        parts = []
        for first in range(0, len(grouping.series), at_once):
            series = grouping.series[first : first + at_once]
            read = await self._history.read(series, start_s, end_s, step_s, bins=shape.bins)
            parts.append(await asyncio.to_thread(put_together, read))
        return await asyncio.to_thread(Frame.merged, parts) if len(parts) > 1 else parts[0]


def _fitting(query: Query, series: list[SeriesId]) -> list[SeriesId]:
    kinds = _FITTING.get(query.aggregation)
    if kinds is None:
        return series
    found = [each for each in series if each.kind in kinds]
    if series and not found:
        (wanted,) = kinds
        text = f"{query.aggregation.value} needs a {wanted.name.lower()}; {query.name} is a "
        raise InvalidRequestError([Violation("aggregation", text + series[0].kind.name.lower())])
    return found


def _grouped(query: Query, series: list[SeriesId]) -> _Grouping:
    places: dict[SeriesId, int] = {}
    group_of = np.zeros(len(series), np.int64)
    for number, each in enumerate(series):
        labels = labels_of(each, query.tenant)
        if query.by_series:
            key = tuple(sorted(labels.items()))
        else:
            key = tuple((label, labels.get(label, "")) for label in query.group_by)
        group = SeriesId(query.tenant or "", query.name, key, each.kind, each.unit)
        group_of[number] = places.setdefault(group, len(places))
    return _Grouping(series, group_of, list(places))


def _pieces(query: Query, offset_s: int = 0) -> Iterator[tuple[int, int, int]]:
    """Parts of the range, each with the length of the steps that it is read in.

    A single step that is no multiple of hours has hours in its middle.
    """
    start_s, end_s = query.start_s - offset_s, query.end_s - offset_s
    if query.steps > 1:
        yield start_s, end_s, query.step_s
        return
    yield from _split(start_s, end_s, (FINE.length_s, MINUTE.length_s, HOUR.length_s))


def _split(start_s: int, end_s: int, lengths: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    *finer, length_s = lengths
    first_s, last_s = -(-start_s // length_s) * length_s, end_s // length_s * length_s
    if first_s >= last_s:
        first_s = last_s = end_s
    else:
        yield first_s, last_s, length_s
    if finer:
        for begin_s, finish_s in ((start_s, first_s), (last_s, end_s)):
            if begin_s < finish_s:
                yield from _split(begin_s, finish_s, tuple(finer))


def _bucket_s(step_s: int) -> int:
    """Length of the buckets that steps are made of."""
    fitting = [each.length_s for each in (FINE, MINUTE, HOUR) if step_s % each.length_s == 0]
    return fitting[-1] if fitting else BUCKET_S


def _block_s(step_s: int) -> int:
    """Length of the blocks that are kept: whole steps, about an hour of short ones."""
    if step_s < HOUR.length_s:
        return step_s * (HOUR.length_s // step_s)
    return step_s * _STEPS_OF_LONG_BLOCKS


def _split_up(frame: Frame, starts_s: Sequence[int], length_s: int) -> list[Frame]:
    """The rows of each block."""
    return [frame.within(start_s, start_s + length_s) for start_s in starts_s]


def _run_cells(shape: Shape) -> int:
    return _RUN_CELLS_WITH_BINS if shape.bins else _RUN_CELLS


def _run_s(shape: Shape, grouping: _Grouping) -> int:
    """How much time is read at once."""
    return max(1, _run_cells(shape) // len(grouping.series)) * _bucket_s(shape.step_s)


def _runs(parts: Sequence[tuple[int, int]], run_s: int) -> Iterator[tuple[int, int]]:
    """Puts neighbouring parts together as long as they are not longer than ``run_s``."""
    current: tuple[int, int] | None = None
    for start_s, end_s in parts:
        if current is not None and current[1] == start_s and end_s - current[0] <= run_s:
            current = (current[0], end_s)
            continue
        if current is not None:
            yield current
        current = (start_s, end_s)
    if current is not None:
        yield current


def _too_large(text: str) -> MeshError:
    return MeshError(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUERY_TOO_LARGE", text)
