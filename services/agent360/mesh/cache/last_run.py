"""The entries that were read most when a service with a store of its own stopped, in a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import structlog

from agent360.mesh.cache.entry import Entry, Payload
from agent360.mesh.cache.ports import Clock

_MAX_BYTES: Final = 64 * 2**20


class _Row(msgspec.Struct, array_like=True, gc=False):
    """One entry."""

    tenant: str
    namespace: str
    key: str
    value: bytes
    content_type: str
    tags: list[str]
    ends_us: int
    """When its TTL ends, on the computer's clock."""
    stale_ttl_s: float


class LastRun:
    """Reads such a file, and writes the next one."""

    def __init__(self, file: Path, clock: Clock, log: structlog.stdlib.BoundLogger) -> None:
        """Reads the file if there is one; one that cannot be read counts as none, and is logged.

        Args:
            file: where it is.
            clock: says what is over.
            log: of the service.
        """
        self._file = file
        self._clock = clock
        self._rows: dict[tuple[str, str], dict[str, _Row]] = {}
        try:
            rows = msgspec.msgpack.decode(file.read_bytes(), type=list[_Row])
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError) as error:
            log.warning("the last run's entries cannot be read", file=str(file), error=str(error))
            return
        for row in rows:
            self._rows.setdefault((row.tenant, row.namespace), {})[row.key] = row

    def keys(self, tenant: str, namespace: str) -> Sequence[str]:
        """The keys of a namespace, the hottest first."""
        return list(self._rows.get((tenant, namespace), ()))

    def payload(self, tenant: str, namespace: str, key: str) -> Payload | None:
        """An entry as it would be written now; None if there is none that is still fresh."""
        row = self._rows.get((tenant, namespace), {}).get(key)
        if row is None:
            return None
        ttl_s = (row.ends_us - self._clock.wall_us()) / 1e6
        if ttl_s <= 0:
            return None
        return Payload(row.value, ttl_s, row.stale_ttl_s, row.content_type, tuple(row.tags))

    def save(self, entries: Iterable[Entry]) -> None:
        """Replaces the file by these entries, as many as 64 MiB hold.

        Raises:
            OSError: it cannot be written.
        """
        now, wall_us = self._clock.now(), self._clock.wall_us()
        rows, size = [], 0
        for entry in entries:
            size += entry.size_bytes
            if size > _MAX_BYTES:
                break
            rows.append(
                _Row(
                    entry.space.tenant,
                    entry.space.name,
                    entry.key,
                    entry.value,
                    entry.content_type,
                    list(entry.tags),
                    wall_us + round((entry.fresh_until - now) * 1e6),
                    entry.stale_until - entry.fresh_until,
                )
            )
        self._file.parent.mkdir(parents=True, exist_ok=True)
        part = self._file.with_suffix(f"{self._file.suffix}.part")
        part.write_bytes(msgspec.msgpack.encode(rows))
        part.replace(self._file)
