"""Usage in Redis: what replicas have seen of counts, added up beside the counts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import structlog

from agent360.mesh.ratelimit.counts import CountKey
from agent360.mesh.ratelimit.limits import Limit, LimitSet
from agent360.mesh.ratelimit.sharing import AWAY, Away, CountUsage, UsageRow
from agent360.mesh.ratelimit.stores.redis.keys import Count, Keys, counted_in, spec_of
from agent360.mesh.ratelimit.stores.redis.scripts import usage_source
from agent360.mesh.runtime.redis import Command, Redis

_AT_ONCE: Final = 200
"""Rows of one run of the script, which holds everything else up."""
_MAX_LISTED: Final = 10_000
_KEPT_S: Final = 86_400
"""What was denied is forgotten so long after the count was last used, or after two periods."""
_COUNT_KEY_SIZE: Final = 4
"""Parts of a count's key before the values of facts."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


class RedisUsageTable:
    """The port ``UsageTable``."""

    def __init__(self, redis: Redis, prefix: str, log: structlog.stdlib.BoundLogger) -> None:
        """Makes one.

        Args:
            redis: a client, started and closed by the store.
            prefix: of all keys.
            log: of the service.
        """
        self._redis = redis
        self._log = log
        self._keys = Keys(prefix)
        self._script = redis.script(usage_source())
        self._clustered = redis.topology.clustered

    def now_us(self) -> int:
        """See ``UsageTable.now_us``."""
        return self._redis.now_us()

    @property
    def available(self) -> bool:
        """See ``UsageTable.available``."""
        return self._redis.available

    def count(self, limit: Limit, key: CountKey, tenant: str) -> Count:
        """See ``UsageTable.count``."""
        return self._keys.count(limit, key, tenant)

    def key(self, name: str) -> CountKey:
        """See ``UsageTable.key``."""
        return counted_in(name)

    async def add(self, rows: Sequence[UsageRow]) -> Away | None:
        """See ``UsageTable.add``; a few rows at a time, so that checks come in between."""
        for command, _ in self._commands([(row.count, _row_of(row)) for row in rows]):
            (reply,) = await self._redis.run([command])
            if self._failed(reply):
                return AWAY
        return None

    async def listed(self, limits: LimitSet, tenant: str) -> Sequence[CountKey] | Away:
        """See ``UsageTable.listed``."""
        shared = [limit for limit in limits.of(tenant).values() if not limit.tenants_apart]
        tags = {self._keys.count(limit, limit.key, tenant).tag for limit in shared}
        found = await self._names(
            [self._keys.index(tenant), *(self._keys.shares(tag, tenant) for tag in sorted(tags))]
        )
        if found is AWAY:
            return AWAY
        of = limits.of(tenant)
        return [key for key in found if _is_of(of.get(key[0]), key)]

    async def listed_together(self, limits: LimitSet) -> Sequence[CountKey] | Away:
        """See ``UsageTable.listed_together``."""
        shared = [limit for limit in limits if not limit.tenants_apart]
        tags = {self._keys.count(limit, limit.key, "").tag for limit in shared}
        found = await self._names([self._keys.index(tag) for tag in sorted(tags)])
        if found is AWAY:
            return AWAY
        return [
            key
            for key in found
            if (limit := limits.find(*key[:3])) is not None
            and not limit.tenants_apart
            and _is_of(limit, key)
        ]

    async def read(
        self, counts: Sequence[tuple[Limit, CountKey, int]], tenant: str, *, together: bool
    ) -> Sequence[CountUsage] | Away:
        """See ``UsageTable.read``."""
        rows = []
        for limit, key, start in counts:
            share = "" if together or limit.tenants_apart else tenant
            rows.append((self._keys.count(limit, key, tenant), (share, start)))
        found: dict[int, CountUsage] = {}
        batches = self._commands(rows)
        replies = await asyncio.gather(
            *(self._redis.run([command], repeatable=True) for command, _ in batches)
        )
        for (_, places), (reply,) in zip(batches, replies, strict=True):
            if self._failed(reply):
                return AWAY
            for place, row in zip(places, _decode(reply), strict=True):
                found[place] = CountUsage(*row)
        return [found[place] for place in range(len(rows))]

    def _failed(self, reply: Any) -> bool:
        if not isinstance(reply, Exception):
            return False
        error = f"{type(reply).__name__}: {reply}"
        self._log.warning("the shared store does not serve usage", error=error)
        return True

    async def _names(self, indexes: Sequence[str]) -> list[CountKey] | Away:
        listing = [
            Command(index.encode(), ("ZREVRANGE", index, 0, _MAX_LISTED - 1)) for index in indexes
        ]
        replies = await self._redis.run(listing, repeatable=True)
        if any(self._failed(reply) for reply in replies):
            return AWAY
        keys = [counted_in(name.decode()) for reply in replies for name in reply]
        return list(dict.fromkeys(key for key in keys if len(key) >= _COUNT_KEY_SIZE))

    def _commands(
        self, rows: Sequence[tuple[Count, tuple[Any, ...]]]
    ) -> list[tuple[Command, list[int]]]:
        """Runs of the script, each with the places of its rows; in a cluster by slot."""
        by_tag: dict[str, list[int]] = {}
        for place, (count, _) in enumerate(rows):
            by_tag.setdefault(count.tag if self._clustered else "", []).append(place)
        commands = []
        for places in by_tag.values():
            for first in range(0, len(places), _AT_ONCE):
                chunk = places[first : first + _AT_ONCE]
                commands.append((self._command([rows[place] for place in chunk]), chunk))
        return commands

    def _command(self, rows: Sequence[tuple[Count, tuple[Any, ...]]]) -> Command:
        at: dict[str, int] = {}
        specs = []
        packed = []
        for count, row in rows:
            if count.key not in at:
                at[count.key] = len(at) + 1
                specs.append(count.spec or spec_of(count.limit, self._redis.now_us()))
            packed.append((at[count.key], *row))
        keys = [key.encode() for key in at]
        return self._script.command(keys, [_encode((specs, packed, int(self._clustered)))])


def _row_of(row: UsageRow) -> tuple[Any, ...]:
    kept_ms = max(_KEPT_S * 1_000, 2 * row.length // 1_000)
    seen = row.denied, row.peak, row.charged, row.highest
    return row.tenant, row.start, row.length, *seen, kept_ms


def _is_of(limit: Limit | None, key: CountKey) -> bool:
    """Whether a count is of a limit, and not of one that has changed since."""
    return (
        limit is not None
        and limit.key == key[:3]
        and limit.kind == key[3]
        and len(key) == _COUNT_KEY_SIZE + len(limit.per)
    )
