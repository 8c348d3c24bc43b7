"""Which hours have something that the coarser resolutions lack.

For every hour and writer there is a stamp: what the writer has committed to the hour. A commit
writes it before its rows and, one higher, after them; a compaction notes the stamps of which it has
computed everything. An hour is open while a stamp is above what was computed: reads take the finest
rollups of it then. Both only grow: each write has its own number as its timestamp, so that the
highest stays, whoever wrote last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from agent360.mesh.metrics.ports import Commit
from agent360.mesh.metrics.resolution import FINE
from agent360.mesh.metrics.stores.cassandra.lifetimes import Lifetimes
from agent360.mesh.metrics.stores.cassandra.registry import DAY_S
from agent360.mesh.metrics.stores.cassandra.session import Session, Statement

GRACE_S: Final = 300
"""How long after its end an hour waits for what comes late, before it is computed."""
GONE_S: Final = 6 * 3_600
"""A writer that was not heard of for as long is not waited for."""

_WRITE_DAY: Final = "INSERT INTO days (one, day) VALUES (0, ?) USING TIMESTAMP ? AND TTL ?"
_DAYS: Final = "SELECT day FROM days WHERE one = 0 AND day >= ? AND day <= ?"
_TOUCH: Final = (
    "INSERT INTO hours (day, hour_s, writer, origin, stamp) VALUES (?, ?, ?, ?, ?) "
    "USING TIMESTAMP ? AND TTL ?"
)
_COMPUTED: Final = (
    "INSERT INTO hours (day, hour_s, writer, computed) VALUES (?, ?, ?, ?) "
    "USING TIMESTAMP ? AND TTL ?"
)
_HOURS: Final = "SELECT hour_s, writer, origin, stamp, computed FROM hours WHERE day = ?"
_SETTLE: Final = "INSERT INTO writers (writer, settled) VALUES (?, ?) USING TIMESTAMP ? AND TTL ?"
_SEEN: Final = "INSERT INTO writers (writer, seen_s) VALUES (?, ?) USING TIMESTAMP ? AND TTL ?"
_SETTLED: Final = "SELECT settled, seen_s FROM writers WHERE writer = ?"
_LAST_DAY: Final = 1 << 40


class Touch(NamedTuple):
    """What a writer has committed to an hour."""

    origin: int
    """Of its last commit with rows in the hour."""
    stamp: int


@dataclass(frozen=True, slots=True)
class OpenHour:
    """An hour that is to be computed, as it was when it was looked at."""

    start_s: int
    touches: Mapping[str, Touch]
    """By writer."""

    @property
    def version(self) -> int:
        """Grows with everything that is committed to the hour."""
        return sum(touch.stamp for touch in self.touches.values())

    def has(self, writer: str, origin: int) -> bool:
        """Whether a row of a commit belongs to it as it was."""
        touch = self.touches.get(writer)
        return touch is not None and origin <= touch.origin


class _Other(NamedTuple):
    """What another writer let us know."""

    settled: int
    seen_s: int


class Hours:
    """The open hours.

    Example:
        >>> await hours.touch(commit, starts, done=False)
        >>> for hour in await hours.due(now_s, writer, settled): ...
    """

    def __init__(self, session: Session, lifetimes: Lifetimes) -> None:
        self._session = session
        self._lifetimes = lifetimes
        self._days: set[int] = set()

    async def touch(self, commit: Commit, hours: Iterable[int], *, done: bool) -> None:
        """Opens the hours of a commit's rows.

        Args:
            commit: whose.
            hours: their starts, Unix time.
            done: whether all rows are written; else they are about to be.
        """
        stamp = 2 * commit.position + done
        starts = list(hours)
        fresh = {start // DAY_S for start in starts} - self._days
        requests = [
            Statement(_WRITE_DAY, (day, day, self._ttl((day + 1) * DAY_S))) for day in fresh
        ]
        requests += [
            Statement(
                _TOUCH,
                (
                    *(start // DAY_S, start, commit.writer),
                    *(commit.origin, stamp, stamp, self._ttl(start)),
                ),
            )
            for start in starts
        ]
        await self._session.run_all(requests)
        self._days = {day for day in self._days | fresh if day > max(self._days | fresh) - 7}

    async def settle(self, now_s: float, writer: str, settled: int) -> None:
        """Lets the other processes know up to where no read has rows of a writer in memory."""
        lifetime, seen_s = self._lifetimes.of_series(now_s), int(now_s)
        await self._session.run_all(
            [
                Statement(_SETTLE, (writer, settled, settled, lifetime)),
                Statement(_SEEN, (writer, seen_s, seen_s, lifetime)),
            ]
        )

    async def open_within(self, start_s: float, end_s: float) -> list[OpenHour]:
        """The open hours that have something of a range of time, the oldest first."""
        days = await self._session.run(
            Statement(_DAYS, (int(start_s // DAY_S), min(int(end_s // DAY_S), _LAST_DAY)))
        )
        answers = await self._session.run_all([Statement(_HOURS, (day,)) for (day,) in days])
        found = []
        rows = itertools.chain.from_iterable(answers)
        for start, writers in itertools.groupby(rows, key=lambda row: int(row[0])):
            touches, is_open = {}, False
            for _, writer, origin, stamp, computed in writers:
                if stamp is not None:
                    touches[writer] = Touch(origin, stamp)
                    is_open |= stamp > (computed or 0)
            if is_open and start_s - FINE.block_s < start < end_s:
                found.append(OpenHour(start, touches))
        return sorted(found, key=lambda hour: hour.start_s)

    async def due(self, now_s: float, writer: str, settled: int) -> list[OpenHour]:
        """The open hours that are over and that nothing is on its way to any more.

        Args:
            now_s: Unix time.
            writer: the caller's ...
            settled: ... and up to where its commits are settled, see ``RollupStore.compact``.
        """
        over = [
            hour
            for hour in await self.open_within(0, now_s)
            if hour.start_s <= now_s - FINE.block_s - GRACE_S
        ]
        others = await self._others({name for hour in over for name in hour.touches} - {writer})

        def is_settled(hour: OpenHour, name: str) -> bool:
            origin = hour.touches[name].origin
            if name == writer:
                return origin < settled
            other = others.get(name, _Other(0, 0))
            heard_s = max(other.seen_s, hour.start_s + FINE.block_s)
            return origin < other.settled or heard_s < now_s - GONE_S

        return [hour for hour in over if all(is_settled(hour, name) for name in hour.touches)]

    async def note_computed(self, hour: OpenHour) -> None:
        """Closes an hour, unless it was touched since it was looked at."""
        day, lifetime = hour.start_s // DAY_S, self._ttl(hour.start_s)
        await self._session.run_all(
            [
                Statement(_COMPUTED, (day, hour.start_s, name, touch.stamp, touch.stamp, lifetime))
                for name, touch in hour.touches.items()
            ]
        )

    async def _others(self, writers: Iterable[str]) -> dict[str, _Other]:
        names = sorted(writers)
        answers = await self._session.run_all([Statement(_SETTLED, (name,)) for name in names])
        return {
            name: _Other(rows[0][0] or 0, rows[0][1] or 0)
            for name, rows in zip(names, answers, strict=True)
            if rows
        }

    def _ttl(self, time_s: float) -> int:
        """Not longer than the rows of an hour: it is never computed from some of them."""
        return self._lifetimes.of_rollups(FINE, time_s)
