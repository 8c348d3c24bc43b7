"""Puts the service together from its settings."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from agent360.mesh.metrics.audit.recording import Recorder
from agent360.mesh.metrics.audit.servicing import AuditService
from agent360.mesh.metrics.history import History
from agent360.mesh.metrics.intake import Intake, IntakeLimits
from agent360.mesh.metrics.journal import Journal
from agent360.mesh.metrics.logs.servicing import LogService
from agent360.mesh.metrics.measurements import LocalMeasurements
from agent360.mesh.metrics.ports import Stores
from agent360.mesh.metrics.series_table import SeriesTable
from agent360.mesh.metrics.settings import MetricsSettings
from agent360.mesh.metrics.stores.urls import journal_beside, open_stores
from agent360.mesh.metrics.upkeep import Upkeep
from agent360.mesh.runtime.redaction import Redactor

_LAST_FLUSH_S: Final = 2.0


class Openers:
    """How the disk is reached; a subclass may put something before it.

    Example:
        >>> MetricsServicer(settings, context, Openers())
    """

    async def stores(self, settings: MetricsSettings, log: structlog.stdlib.BoundLogger) -> Stores:
        """Opens the store; waits for one on other machines that is away.

        Raises:
            StoreError: it cannot be used.
        """
        return await open_stores(
            settings.store,
            settings.cassandra,
            settings.retention.policy(),
            settings.intake.reporter_memory_s,
            log,
        )

    def journal(self, directory: Path) -> Journal:
        """Opens the journal in a directory.

        Raises:
            JournalInUseError: another process has it open.
            OSError: the directory cannot be used.
        """
        return Journal(directory)


@dataclass(frozen=True, slots=True)
class Parts:
    """The service, started."""

    stores: Stores
    intake: Intake
    history: History
    recorder: Recorder
    audit: AuditService
    logs: LogService
    upkeep: Upkeep
    _remove_journal: Callable[[], None]

    async def close(self, measurements: LocalMeasurements) -> None:
        """Ends everything in order; what was acknowledged is in the store or the journal."""
        await self.upkeep.close()
        await self.recorder.close()
        with contextlib.suppress(TimeoutError):  # the journal may be failing
            async with asyncio.timeout(_LAST_FLUSH_S):
                await measurements.flush(self.intake)
        await self.intake.close()
        await self.stores.close()
        self._remove_journal()


async def assemble(
    settings: MetricsSettings,
    table: SeriesTable,
    measurements: LocalMeasurements,
    log: structlog.stdlib.BoundLogger,
    openers: Openers,
) -> Parts:
    """Opens store and journal, and starts what works in the background.

    Raises:
        StoreError: the store cannot be used.
        JournalInUseError: another process has the journal open.
        OSError: the journal cannot be used.
    """
    stores = await openers.stores(settings, log)
    try:
        return await _assemble(settings, table, measurements, log, openers, stores)
    except BaseException:
        await stores.close()
        raise


async def _assemble(
    settings: MetricsSettings,
    table: SeriesTable,
    measurements: LocalMeasurements,
    log: structlog.stdlib.BoundLogger,
    openers: Openers,
    stores: Stores,
) -> Parts:
    directory, remove = _journal_directory(settings)
    journal = await asyncio.to_thread(openers.journal, directory)
    bounds = settings.intake
    limits = IntakeLimits(bounds.commit_every_s, bounds.max_waiting_bytes, bounds.max_memory_bytes)
    intake = Intake(stores.rollups, table, journal, limits, log)
    await intake.start()
    redactor = Redactor(settings.redaction)
    keep = settings.retention
    recorder = Recorder(stores.events, journal.writer, keep_days=keep.audit_days, log=log)
    recorder.start()
    logs = LogService(stores.logs, redactor, keep_s=keep.logs_s)
    retention = keep.policy()
    history = History(stores.rollups, table, intake, retention)
    upkeep = Upkeep(
        stores.rollups,
        intake,
        table,
        measurements,
        retention,
        marks_s=bounds.reporter_memory_s,
        others=(recorder.expire, logs.expire),
        log=log,
    )
    upkeep.start()
    audit = AuditService(stores.events, recorder, redactor)
    return Parts(stores, intake, history, recorder, audit, logs, upkeep, remove)


def _journal_directory(settings: MetricsSettings) -> tuple[Path, Callable[[], None]]:
    """Where the journal is, and what removes it at the end if it does not outlive the store."""
    if settings.intake.journal is not None:
        return settings.intake.journal, _keep
    beside = journal_beside(settings.store)
    if beside is None:
        temporary = tempfile.TemporaryDirectory(prefix="agent360-journal-")
        return Path(temporary.name), temporary.cleanup
    return beside, _keep


def _keep() -> None:
    pass
