"""Which series there are, by tenant: partitions of a bounded size, read by tenant or by name.

A row says until which day its series has rollups, and lives for as long as these do: it is written
again on every day on which the series is active, and else goes by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Final, NamedTuple
from zlib import crc32

from agent360.mesh.metrics.series import Kind, SeriesId
from agent360.mesh.metrics.stores.cassandra.lifetimes import Lifetimes
from agent360.mesh.metrics.stores.cassandra.schema import SHARDS
from agent360.mesh.metrics.stores.cassandra.session import Row, Session, Statement

DAY_S: Final = 86_400

_KEY_BYTES: Final = 16
_WRITE_TENANT: Final = (
    "INSERT INTO tenants (shard, tenant, last_day) VALUES (?, ?, ?) USING TIMESTAMP ? AND TTL ?"
)
_WRITE_SERIES: Final = (
    "INSERT INTO series (tenant, shard, name, id, labels, kind, unit, last_day) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?) USING TIMESTAMP ? AND TTL ?"
)
_TENANTS: Final = "SELECT tenant FROM tenants WHERE shard = ?"
_ALL: Final = (
    "SELECT tenant, name, id, labels, kind, unit, last_day FROM series "
    "WHERE tenant = ? AND shard = ?"
)
_NAMED: Final = _ALL + " AND name = ?"


class Known(NamedTuple):
    """A series in the registry."""

    series: SeriesId
    key: bytes
    """Its part in the keys of the tables."""
    last_day: int
    """The last day, from 1970 on, that it has rollups of."""


class Registry:
    """The series of all tenants.

    Example:
        >>> await registry.note([(series, 20_833)])
        >>> await registry.read("acme")
    """

    def __init__(self, session: Session, lifetimes: Lifetimes) -> None:
        self._session = session
        self._lifetimes = lifetimes
        self._noted: dict[SeriesId, int] = {}
        self._tenants: dict[str, int] = {}
        self._floor_day = 0

    async def note(self, days: Iterable[tuple[SeriesId, int]]) -> None:
        """Notes series, each with a day that it has rollups of.

        Raises:
            StoreError: it failed; it is to be repeated.
        """
        newest: dict[SeriesId, int] = {}
        for series, day in days:
            if day > max(self._noted.get(series, -1), newest.get(series, -1)):
                newest[series] = day
        tenants: dict[str, int] = {}
        for series, day in newest.items():
            if day > max(self._tenants.get(series.tenant, -1), tenants.get(series.tenant, -1)):
                tenants[series.tenant] = day
        requests = [
            Statement(_WRITE_TENANT, (shard_of(tenant), tenant, day, day, self._ttl(day)))
            for tenant, day in tenants.items()
        ]
        requests += [self._written(series, day) for series, day in newest.items()]
        await self._session.run_all(requests)
        self._tenants.update(tenants)
        self._noted.update(newest)

    async def read(self, tenant: str | None = None, name: str = "") -> list[Known]:
        """The series of a tenant, or of all; all names if ``name`` is empty."""
        tenants = [tenant] if tenant is not None else await self._all_tenants()
        answers = await self._session.run_all(
            [
                Statement(_NAMED, (each, shard, name)) if name else Statement(_ALL, (each, shard))
                for each in tenants
                for shard in range(SHARDS)
            ]
        )
        found = [_known(row) for rows in answers for row in rows]
        return [each for each in found if each.last_day >= self._floor_day]

    async def forget_before(self, day: int) -> list[SeriesId]:
        """Hides series that have no rollups from a day on; gives those it did not hide before."""
        gone = [each.series for each in await self.read() if each.last_day < day]
        self._floor_day = max(self._floor_day, day)
        self._noted = {s: last for s, last in self._noted.items() if last >= day}
        self._tenants.clear()
        return gone

    def _written(self, series: SeriesId, day: int) -> Statement:
        key = key_of(series)
        values = (
            series.tenant,
            key[0] % SHARDS,
            series.name,
            key,
            json.dumps(series.labels),
            int(series.kind),
            series.unit,
            day,
            day,
            self._ttl(day),
        )
        return Statement(_WRITE_SERIES, values)

    def _ttl(self, day: int) -> int:
        return self._lifetimes.of_series((day + 1) * DAY_S)

    async def _all_tenants(self) -> list[str]:
        answers = await self._session.run_all(
            [Statement(_TENANTS, (shard,)) for shard in range(SHARDS)]
        )
        return [row[0] for rows in answers for row in rows]


def key_of(series: SeriesId) -> bytes:
    """The same for ever: a hash (BLAKE2b) of all that identifies a series within its tenant."""
    identity: Sequence[object] = (series.name, series.labels, int(series.kind), series.unit)
    return blake2b(json.dumps(identity).encode(), digest_size=_KEY_BYTES).digest()


def shard_of(name: str) -> int:
    """Which of the partitions has something, by its name."""
    return crc32(name.encode()) % SHARDS


def _known(row: Row) -> Known:
    tenant, name, key, labels, kind, unit, last_day = row
    pairs = tuple((label, value) for label, value in json.loads(labels))
    return Known(SeriesId(tenant, name, pairs, Kind(kind), unit), key, last_day)
