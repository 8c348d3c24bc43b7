"""All limits in force: those of the file, which is read again when it changes, and those set."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol

import structlog

from agent360.mesh.ratelimit.failures import limit_from_file, limit_unknown, store_away
from agent360.mesh.ratelimit.limits import Limit, LimitsError, LimitSet, Source
from agent360.mesh.ratelimit.limits_file import read_limits

LimitKey = tuple[str, str, str]
_LOOK_EVERY_S: Final = 0.3


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
        self._file = file
        self._table = table
        self._log = log
        self._on_load = on_load
        self._of_file = read_limits(file) if file else LimitSet(())
        self._stamp = self._look()
        self._set: Mapping[LimitKey, Limit] = {}
        self._adopt: Callable[[LimitSet], None] = lambda _: None
        self._watcher: asyncio.Task[None] | None = None
        self.limits = self._of_file
        """In force."""

    async def start(self, adopt: Callable[[LimitSet], None]) -> None:
        """Has ``adopt`` told of all limits whenever they change."""
        self._adopt = adopt
        await self._table.start(self._on_table)
        if self._file:
            self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Watches no more."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait((self._watcher,))
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

    def _on_table(self, limits: Mapping[LimitKey, Limit]) -> None:
        self._set = dict(limits)
        self._put_together()

    def _put_together(self) -> None:
        both = {**self._set, **{limit.key: limit for limit in self._of_file}}
        self.limits = LimitSet(both.values(), self._of_file.plans)
        self._adopt(self.limits)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            stamp = await asyncio.to_thread(self._look)
            if stamp != self._stamp:
                self._stamp = stamp
                await self._read_again()

    async def _read_again(self) -> None:
        if self._file is None:
            return
        try:
            self._of_file = await asyncio.to_thread(read_limits, self._file)
        except LimitsError as error:
            self._log.error("the limits file is wrong; the old limits stay", error=str(error))
            self._on_load(str(error))
            return
        self._log.info("limits read", file=str(self._file))
        self._put_together()
        self._on_load("")

    def _look(self) -> tuple[int, int, int]:
        """Changes when the file does."""
        try:
            stat = self._file.stat() if self._file else None
        except OSError:
            stat = None
        return (stat.st_mtime_ns, stat.st_size, stat.st_ino) if stat else (0, 0, 0)
