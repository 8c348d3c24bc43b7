"""A metrics service in a process of its own that dies at a chosen point: no handler, no flush.

Run as ``python -m support.crashing_metrics DIRECTORY PORT POINT HIT``: it dies the HIT-th time it
comes to POINT; POINT ``never`` serves on. It writes ``ready`` and its HTTP port to its standard
output.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

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


async def main(directory: str, port: str, point: str, hit: str) -> None:
    settings = MetricsSettings.model_validate(
        {
            "port": int(port),
            "ephemeral_ports": True,
            "store": f"sqlite:///{directory}/metrics.db",
            "intake": {"commit_every_s": 0.05},
            "log": {"level": "error"},
            "mesh": dict.fromkeys(("inference", "cache", "ratelimit", "metrics"), "127.0.0.1:1"),
            "quota": {"enabled": False},
        }
    )
    configure_logging(settings.log, settings.redaction, settings.service)
    death = Death(point, int(hit))

    def servicer(settings: MetricsSettings, context: ServiceContext) -> MetricsServicer:
        made = DyingServicer(settings, context, DyingOpeners(death))
        made.death = death
        return made

    server = Server(settings, servicer)
    await server.start()
    sys.stdout.write(f"ready {server.http_port}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
