"""Where a namespace's keys are: in its shards, each of which is in one slot of a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final
from urllib.parse import quote, unquote
from zlib import crc32

_PLAIN: Final = "/-_.~ "
_MAX_NAMESPACES: Final = 50_000
"""Namespaces whose shards are remembered; one that was forgotten is learnt anew."""


class Shard:
    """One part of a namespace: all its keys share a hash tag, so that one script may touch them.

    ``version`` is the namespace's version as last seen here, None where that is not known;
    ``asked`` then tells whether the store has none. ``last`` is the last version that a change of
    the shard was given, 0 where that is not known, and ``newest`` the newest that was heard of.
    """

    __slots__ = ("asked", "base", "last", "meta", "namespace", "newest", "tenant", "version")

    def __init__(self, base: str, tenant: str, namespace: str) -> None:
        self.base = base
        self.meta = f"{base}:meta".encode()
        self.tenant = tenant
        self.namespace = namespace
        self.version: str | None = None
        self.asked = False
        self.last = 0
        self.newest = 0

    def entry_key(self, key: str, version: str) -> str:
        """Where an entry of a version of the namespace is."""
        return f"{self.base}:e:{key}:v{version}"

    @property
    def seq(self) -> str:
        """Where the last version is that was given."""
        return f"{self.base}:seq"

    @property
    def hot_key(self) -> str:
        """Where the keys that were read most are remembered."""
        return f"{self.base}:hot"


class Shards:
    """The shards of all namespaces. Their number is part of every key's name: replicas that do not
    agree on it share nothing, instead of sharing wrongly.
    """

    def __init__(self, prefix: str, count: int) -> None:
        """Makes none yet.

        Args:
            prefix: of all keys.
            count: of the shards of each namespace.
        """
        self._prefix = prefix
        self._count = count
        self._by_namespace: dict[tuple[str, str], tuple[Shard, ...]] = {}
        self._by_base: dict[str, Shard] = {}

    def of(self, tenant: str, namespace: str) -> tuple[Shard, ...]:
        """The shards of a namespace."""
        shards = self._by_namespace.get((tenant, namespace))
        if shards is None:
            name = f"{tenant}:{quote(namespace, safe=_PLAIN)}"
            shards = tuple(
                Shard(
                    f"{self._prefix}:{{{name}:{number}.{self._count}}}",
                    tenant,
                    namespace,
                )
                for number in range(self._count)
            )
            if len(self._by_namespace) >= _MAX_NAMESPACES:
                oldest = self._by_namespace.pop(next(iter(self._by_namespace)))
                for shard in oldest:
                    del self._by_base[shard.base]
            self._by_namespace[tenant, namespace] = shards
            self._by_base.update((shard.base, shard) for shard in shards)
        return shards

    def of_key(self, tenant: str, namespace: str, key: str) -> Shard:
        """The shard that a key is in."""
        shards = self.of(tenant, namespace)
        if self._count == 1:
            return shards[0]
        return shards[crc32(key.encode()) % self._count]

    def at(self, base: str) -> Shard | None:
        """The shard of a base; None if it is not one of ours."""
        shard = self._by_base.get(base)
        if shard is None:
            head = f"{self._prefix}:{{"
            if not base.startswith(head) or not base.endswith(f".{self._count}}}"):
                return None
            tenant, _, rest = base[len(head) :].partition(":")
            self.of(tenant, unquote(rest.rpartition(":")[0]))
            shard = self._by_base.get(base)
        return shard

    def all(self) -> Iterator[Shard]:
        """All shards that were ever asked for."""
        return iter(list(self._by_base.values()))
