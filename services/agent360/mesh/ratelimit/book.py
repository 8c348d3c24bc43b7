"""All limits in force: those of the file, which is read again when it changes, and those set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import structlog

from agent360.mesh.ratelimit.failures import limit_from_file, limit_unknown, store_away
from agent360.mesh.ratelimit.limits import Limit, LimitSet, Source
from agent360.mesh.ratelimit.limits_file import read_limits
from agent360.mesh.runtime.watched_file import WatchedFile

LimitKey = tuple[str, str, str]


class LimitTable(Protocol):
    """Where limits that were set are kept."""

    async def start(self, on_change: Callable[[Mapping[LimitKey, Limit]], None]) -> None:
        """Calls back with all limits now and whenever they have changed, wherever that was."""

    async def close(self) -> None:
        """Calls back no more."""

    async def put(self, limit: Limit) -> bool:
        """Keeps a limit; False where that cannot be said to have happened."""

    async def remove(self, key: LimitKey) -> bool:
        """Removes a limit; False where that cannot be said to have happened."""


class MemoryLimitTable:
    """Keeps limits as long as the process runs."""

    def __init__(self) -> None:
        self._limits: dict[LimitKey, Limit] = {}
        self._on_change: Callable[[Mapping[LimitKey, Limit]], None] = lambda _: None

    async def start(self, on_change: Callable[[Mapping[LimitKey, Limit]], None]) -> None:
        """See ``LimitTable``."""
        self._on_change = on_change

    async def close(self) -> None:
        """See ``LimitTable``."""

    async def put(self, limit: Limit) -> bool:
        """See ``LimitTable``."""
        self._limits[limit.key] = limit
        self._on_change(self._limits)
        return True

    async def remove(self, key: LimitKey) -> bool:
        """See ``LimitTable``."""
        self._limits.pop(key, None)
        self._on_change(self._limits)
        return True


class LimitBook:
    """Puts the limits of both sources together. What stands in the file wins."""

    def __init__(
        self,
        file: Path | None,
        table: LimitTable,
        log: structlog.stdlib.BoundLogger,
        on_load: Callable[[str], None],
    ) -> None:
        """Reads the file.

        Args:
            file: with limits; None: there is none.
            table: of limits that are set.
            log: where a wrong file is noted.
            on_load: told what was wrong, if anything, whenever the file was read again.

        Raises:
            LimitsError: the file is wrong.
        """
        self._file = WatchedFile(file, read_limits, log, on_load) if file else None
        self._table = table
        self._of_file = self._file.content if self._file else LimitSet(())
        self._set: Mapping[LimitKey, Limit] = {}
        self._adopt: Callable[[LimitSet], None] = lambda _: None
        self.limits = self._of_file
        """In force."""

    async def start(self, adopt: Callable[[LimitSet], None]) -> None:
        """Has ``adopt`` told of all limits whenever they change."""
        self._adopt = adopt
        await self._table.start(self._on_table)
        if self._file:
            self._file.start(self._on_file)

    async def close(self) -> None:
        """Watches no more."""
        if self._file:
            await self._file.close()
        await self._table.close()

    async def put(self, limit: Limit) -> Limit:
        """Sets a limit; returns it as it is in force.

        Raises:
            MeshError: it stands in the file, or the store is away.
        """
        if self._of_file.find(*limit.key) is not None:
            raise limit_from_file(limit.limit_id)
        limit = replace(limit, source=Source.API, updated=datetime.now(UTC))
        if not await self._table.put(limit):
            raise store_away()
        return limit

    async def remove(self, key: LimitKey) -> None:
        """Removes a limit that was set.

        Raises:
            MeshError: there is none, it stands in the file, or the store is away.
        """
        if self._of_file.find(*key) is not None:
            raise limit_from_file(key[0])
        if key not in self._set:
            raise limit_unknown(key[0])
        if not await self._table.remove(key):
            raise store_away()

    def _on_file(self, limits: LimitSet) -> None:
        self._of_file = limits
        self._put_together()

    def _on_table(self, limits: Mapping[LimitKey, Limit]) -> None:
        self._set = dict(limits)
        self._put_together()

    def _put_together(self) -> None:
        both = {**self._set, **{limit.key: limit for limit in self._of_file}}
        self.limits = LimitSet(both.values(), self._of_file.plans)
        self._adopt(self.limits)
