"""Usage as the whole mesh has seen it: each replica tells in the background what it has seen."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

import structlog

from agent360.mesh.ratelimit.counts import CountKey
from agent360.mesh.ratelimit.decisions import Usage
from agent360.mesh.ratelimit.failures import store_away
from agent360.mesh.ratelimit.limits import TENANT, Algorithm, Limit, LimitSet
from agent360.mesh.ratelimit.sharing import AWAY, UsageRow, UsageTable
from agent360.mesh.ratelimit.windows import Windows

_TELL_EVERY_S: Final = 1.0
_MAX_ROWS: Final = 100_000
_MAX_RECORDS: Final = 100_000
_MAX_PERIODS: Final = 10_000


class _Seen:
    """What was seen of one count in one period and not told yet."""

    __slots__ = ("charged", "count", "denied", "end", "highest", "peak", "start", "tenant")

    def __init__(self, count: Any, tenant: str, start: int, end: int) -> None:
        self.count = count
        self.tenant = tenant
        self.start = start
        self.end = end
        self.denied = self.peak = self.charged = self.highest = 0

    def charge(self, hits: int) -> None:
        """Notes what the tenant was charged, or given back if below 0."""
        self.charged += hits
        self.highest = max(self.highest, self.charged)


class SharedUsage:
    """Gathers what this replica sees of counts, and adds it to what the others have.

    Noting is in memory; what was noted is told once a second, in batches, and at the end. What a
    replica that is killed has not told is lost.
    """

    def __init__(self, table: UsageTable, log: structlog.stdlib.BoundLogger) -> None:
        """Makes one that has seen nothing.

        Args:
            table: adds up.
            log: of the service.
        """
        self._table = table
        self._log = log
        self._seen: dict[tuple[str, str], _Seen] = {}
        self._records: OrderedDict[str, None] = OrderedDict()
        """The latest reservations: the answer to a repeated request charges nothing again."""
        self._periods: dict[tuple[str, ...], Windows] = {}
        self._task: asyncio.Task[None] | None = None
        self._telling = asyncio.Lock()
        self.lost = 0
        """Rows that could not be added, and are not in the log yet."""

    def start(self) -> None:
        """Tells from now on."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Tells what is left."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        await self.tell()

    # ---------------------------------------------------------------- noting

    def now_us(self) -> int:
        """See ``UsageTable.now_us``."""
        return self._table.now_us()

    def note(
        self,
        tenant: str,
        counts: Sequence[Any],
        granted: int,
        denied: Sequence[str],
        tightest_id: str = "",
        used: int = 0,
        record_id: str = "",
        now_us: int = 0,
    ) -> None:
        """Notes decisions on a request.

        Args:
            tenant: whose it was.
            counts: that it is charged to.
            granted: hits that were charged to them, over all decisions.
            denied: ids of the limits that denied or would have, one for each time.
            tightest_id: the limit of which ``used`` is known.
            used: what is used of it.
            record_id: the reservation that was made, or found where the request was repeated.
            now_us: see ``now_us``; 0: not asked for yet.
        """
        if record_id:
            if record_id in self._records:
                granted = 0
            self._records[record_id] = None
            if len(self._records) > _MAX_RECORDS:
                self._records.popitem(last=False)
        now = now_us or self._table.now_us()
        for count in counts:
            limit = count.limit
            apart = limit.tenants_apart
            seen = self._row(count, "" if apart else tenant, now)
            if seen is None:
                continue
            limit_id = limit.limit_id
            if denied:
                seen.denied += sum([each == limit_id for each in denied])
            if limit_id == tightest_id and used > seen.peak:
                seen.peak = used
            if not apart and limit.algorithm is not Algorithm.CONCURRENCY:
                seen.charge(granted)

    def note_adjustment(
        self, limits: LimitSet, tenant: str, name: str, at_us: int, hits: int
    ) -> None:
        """Notes that a count of several tenants was charged more, or less if below 0.

        Args:
            limits: in force.
            tenant: that was charged.
            name: of the count in the store.
            at_us: when it was charged first.
            hits: how many more.
        """
        key = self._table.key(name)
        limit = limits.find(*key[:3])
        if limit is None or limit.kind != key[3]:
            return
        seen = self._row(self._table.count(limit, key, tenant), tenant, self._table.now_us())
        if seen is not None and (hits > 0 or at_us >= seen.start):
            seen.charge(hits)

    def _row(self, count: Any, tenant: str, now: int) -> _Seen | None:
        key = (count.key, tenant)
        seen = self._seen.get(key)
        if seen is not None and seen.start <= now < seen.end:
            return seen
        if seen is None and len(self._seen) >= _MAX_ROWS:
            self.lost += 1
            return None
        start, end = self._periods_of(count.limit).at(now)
        before, seen = seen, _Seen(count, tenant, start, end)
        self._seen[key] = seen
        if before is not None:  # nobody asks for the peak of a period that is over
            seen.denied = before.denied
        return seen

    def _periods_of(self, limit: Limit) -> Windows:
        key = (*limit.key, limit.kind)
        periods = self._periods.get(key)
        if periods is None:
            if len(self._periods) >= _MAX_PERIODS:
                self._periods.clear()
            periods = self._periods[key] = limit.periods()
        return periods

    # ---------------------------------------------------------------- telling

    async def tell(self) -> None:
        """Adds what was seen to what the others have; waits while the store is away."""
        async with self._telling:
            if not self._table.available:
                return
            seen, self._seen = self._seen, {}
            rows = [
                UsageRow(
                    each.count,
                    each.tenant,
                    each.start,
                    each.end - each.start,
                    each.denied,
                    each.peak,
                    each.charged,
                    each.highest,
                )
                for each in seen.values()
            ]
            if rows and await self._table.add(rows) is AWAY:
                self.lost += len(rows)
            if self.lost:
                self._log.warning("some usage was not added up", rows=self.lost)
                self.lost = 0

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_TELL_EVERY_S)
            await self.tell()

    # ---------------------------------------------------------------- reading

    async def usage(
        self, limits: LimitSet, tenant: str, key: CountKey | None, together: bool
    ) -> Sequence[Usage]:
        """The usage of counts; see ``CountTable.usage``.

        Raises:
            MeshError: the store is away.
        """
        table = self._table
        if not table.available:
            raise store_away()
        await self.tell()
        if key is not None:
            keys: Sequence[CountKey] = [key]
        else:
            listed = await (
                table.listed_together(limits) if together else table.listed(limits, tenant)
            )
            if listed is AWAY:
                raise store_away()
            keys = listed
        now = table.now_us()
        asked = []
        for each in keys:
            limit = limits.find(*each[:3])
            if limit is not None:
                asked.append((limit, each, self._periods_of(limit).at(now).start))
        rows = await table.read(asked, tenant, together=together)
        if rows is AWAY:
            raise store_away()
        found = []
        for (limit, counted, _), row in zip(asked, rows, strict=True):
            used = limit.size - row.room
            if not together and not limit.tenants_apart:
                used = row.held if limit.algorithm is Algorithm.CONCURRENCY else row.charged
            by = zip(limit.per, counted[4:], strict=True)
            found.append(
                Usage(
                    limit.limit_id,
                    tuple(each for each in by if each[0] != TENANT),
                    used,
                    max(0, row.room),
                    limit.size,
                    row.denied,
                    max(used, row.peak),
                    row.reset_us / 1e6,
                )
            )
        return found
