"""A metrics service in a process of its own that dies at a chosen point: no handler, no flush.

Each process is forked from one that has already imported what the service needs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
import os
import sqlite3
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Final

import structlog

from agent360.mesh.metrics import MetricsServicer, MetricsSettings
from agent360.mesh.metrics.assembly import Openers
from agent360.mesh.metrics.journal import Journal
from agent360.mesh.metrics.ports import Commit, Stores
from agent360.mesh.metrics.stores.sqlite import SqliteRollupStore
from agent360.mesh.metrics.stores.sqlite.rollups import Written
from agent360.mesh.runtime.call import Call
from agent360.mesh.runtime.logs import configure_logging
from agent360.mesh.runtime.server import Server
from agent360.mesh.runtime.service import ServiceContext

_PROCESSES: Final = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["agent360.mesh.metrics", "agent360.mesh.runtime.server"])

_START_S: Final = 30.0

POINTS = (
    "half a record is written",
    "a record is written",
    "a record is synced",
    "a commit begins",
    "a commit's rows are written",
    "a commit is done",
    "a message is stored and not acknowledged",
    "a segment is removed",
)
"""Where it can die: every step from a message's arrival to the end of its life in the journal."""


class Death:
    """Ends the process at a point."""

    def __init__(self, point: str, hit: int) -> None:
        self._point = point
        self._left = hit

    def at(self, point: str) -> bool:
        """Whether this is the time; counts it."""
        if point != self._point:
            return False
        self._left -= 1
        return self._left <= 0

    def comes(self, point: str) -> None:
        """Dies if this is the time."""
        if self.at(point):
            os._exit(9)


class DyingJournal(Journal):
    """Dies while it writes, syncs or removes."""

    death: Death

    def write(self, parts: tuple[bytes, ...]) -> None:
        if self.death.at("half a record is written"):
            whole = b"".join(parts)
            super().write((whole[: len(whole) // 2],))
            os._exit(9)
        super().write(parts)
        self.death.comes("a record is written")

    def sync(self) -> None:
        super().sync()
        self.death.comes("a record is synced")

    def release(self, position: int) -> None:
        segments = len(list(self._directory.glob("*.journal")))
        super().release(position)
        if len(list(self._directory.glob("*.journal"))) < segments:
            self.death.comes("a segment is removed")


class DyingStore(SqliteRollupStore):
    """Dies before, in and after a transaction."""

    death: Death

    async def commit(self, commit: Commit) -> None:
        self.death.comes("a commit begins")
        await super().commit(commit)
        self.death.comes("a commit is done")

    def write(self, db: sqlite3.Connection, commit: Commit) -> Written:
        written = super().write(db, commit)
        self.death.comes("a commit's rows are written")
        return written


class DyingServicer(MetricsServicer):
    """Dies when all that a message brought is in the store and its sender does not know."""

    death: Death

    async def report(self, call: Call, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for response in super().report(call, requests):
            if self.death.at("a message is stored and not acknowledged"):
                await self.started.parts.intake.commit()
                os._exit(9)
            yield response


class DyingOpeners(Openers):
    """Opens what dies."""

    def __init__(self, death: Death) -> None:
        self._death = death

    async def stores(self, settings: MetricsSettings, log: structlog.stdlib.BoundLogger) -> Stores:
        opened = await super().stores(settings, log)
        assert isinstance(opened.rollups, SqliteRollupStore)
        rollups = DyingStore(opened.rollups.database)
        rollups.death = self._death
        return dataclasses.replace(opened, rollups=rollups)

    def journal(self, directory: Path) -> Journal:
        journal = DyingJournal(directory, segment_bytes=4_000)
        journal.death = self._death
        return journal


class CrashingMetrics:
    """A process of the service.

    Attributes:
        http_port: of its pages; 0: it died before it served.
        pid: of the process.
    """

    def __init__(self, process: ForkServerProcess, http_port: int) -> None:
        assert process.pid is not None
        self._process = process
        self.pid: Final = process.pid
        self.http_port: Final = http_port

    @classmethod
    async def start(
        cls, directory: Path, port: int, point: str = "never", hit: int = 0
    ) -> CrashingMetrics:
        """Starts one that dies the ``hit``-th time it comes to ``point``; ``never``: serves on.

        Returns when it serves, or has died.
        """
        return await asyncio.to_thread(cls._start, directory, port, point, hit)

    @classmethod
    def _start(cls, directory: Path, port: int, point: str, hit: int) -> CrashingMetrics:
        receiver, sender = _PROCESSES.Pipe(duplex=False)
        process = _PROCESSES.Process(target=_run, args=(directory, port, point, hit, sender))
        process.start()
        sender.close()
        with receiver:
            assert receiver.poll(_START_S), "it neither serves nor has died"
            try:
                return cls(process, receiver.recv())
            except EOFError:
                return cls(process, 0)

    async def ended(self) -> int:
        """Waits for its end; returns its exit code, negative for a signal."""
        await asyncio.to_thread(wait, [self._process.sentinel])
        code = self._process.exitcode
        assert code is not None
        return code

    async def kill(self) -> None:
        """Kills it (SIGKILL) unless it has ended, and waits for its end."""
        self._process.kill()
        await self.ended()


def _run(directory: Path, port: int, point: str, hit: int, ready: Connection) -> None:
    asyncio.run(_serve(directory, port, Death(point, hit), ready))


async def _serve(directory: Path, port: int, death: Death, ready: Connection) -> None:
    settings = MetricsSettings.model_validate(
        {
            "port": port,
            "ephemeral_ports": True,
            "store": f"sqlite:///{directory}/metrics.db",
            "intake": {"commit_every_s": 0.05},
            "log": {"level": "error"},
            "mesh": dict.fromkeys(("inference", "cache", "ratelimit", "metrics"), "127.0.0.1:1"),
            "quota": {"enabled": False},
        }
    )
    configure_logging(settings.log, settings.redaction, settings.service)

    def servicer(settings: MetricsSettings, context: ServiceContext) -> MetricsServicer:
        made = DyingServicer(settings, context, DyingOpeners(death))
        made.death = death
        return made

    server = Server(settings, servicer)
    await server.start()
    ready.send(server.http_port)
    await asyncio.Event().wait()
