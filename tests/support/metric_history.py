"""A metrics history on a real SQLite file and a real journal, whose time tests set."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from support.rollup_frames import columns_of

from agent360.mesh.metrics.history import History
from agent360.mesh.metrics.intake import Intake, IntakeLimits
from agent360.mesh.metrics.journal import Journal
from agent360.mesh.metrics.queries.engine import QueryEngine, QueryLimits
from agent360.mesh.metrics.queries.kept import KeptBlocks
from agent360.mesh.metrics.queries.query import Group
from agent360.mesh.metrics.queries.reading import read_query
from agent360.mesh.metrics.resolution import Retention
from agent360.mesh.metrics.series import Kind, SeriesId
from agent360.mesh.metrics.series_table import SeriesTable
from agent360.mesh.metrics.stores.sqlite import Database, SqliteRollupStore, SqliteRuleStore
from agent360.metrics.v1 import metrics_pb2 as pb

NOON_S = 1_800_014_400
"""An hour's start."""
DAY_S = 86_400
LIMITS = QueryLimits(max_rollups=5_000_000, max_points=1_000_000, at_once=4, settled_s=10.0)


@dataclass(eq=False)
class Clock:
    """Unix time that a test sets."""

    now_s: float = NOON_S

    def __call__(self) -> float:
        return self.now_s


@dataclass(eq=False)
class MetricHistory:
    """What the metrics service has of a history, and a clock."""

    clock: Clock
    database: Database
    store: SqliteRollupStore
    rules: SqliteRuleStore
    table: SeriesTable
    intake: Intake
    history: History
    kept: KeptBlocks
    engine: QueryEngine

    async def add(
        self,
        name: str,
        samples: Sequence[tuple[float, float]],
        labels: Mapping[str, str] | None = None,
        *,
        tenant: str = "acme",
        kind: Kind = Kind.COUNTER,
        unit: str = "1",
    ) -> None:
        """Takes samples (time, value) of a series."""
        series = SeriesId(tenant, name, tuple(sorted((labels or {}).items())), kind, unit)
        number = self.table.number(series)
        await self.intake.room()
        await self.intake.take(columns_of([(number, t, v, 1) for t, v in samples]), {})

    async def ask(self, request: pb.QueryRequest, tenant: str | None = "acme") -> list[Group]:
        """The groups of a query."""
        return await self.engine.answer(read_query(tenant, request, self.clock()))

    def another_engine(self, **limits: Any) -> QueryEngine:
        """One that has nothing in its cache."""
        kept = KeptBlocks(max_bytes=0, max_tenant_bytes=0)
        given = {name: getattr(LIMITS, name) for name in LIMITS.__slots__} | limits
        return QueryEngine(self.history, kept, QueryLimits(**given), self.clock)


@asynccontextmanager
async def metric_history(
    directory: Path, clock: Clock | None = None
) -> AsyncIterator[MetricHistory]:
    """Opened, and closed in the end; the same directory has the same history."""
    clock = clock or Clock()
    database = Database(str(directory / "m.db"))
    store, rules = SqliteRollupStore(database), SqliteRuleStore(database)
    table = SeriesTable(10_000)
    limits = IntakeLimits(3_600, 1 << 25, 1 << 28)
    journal = Journal(directory / "journal")
    intake = Intake(store, table, journal, limits, structlog.get_logger(), clock)
    await intake.start()
    retention = Retention(2 * DAY_S, 14 * DAY_S, 400 * DAY_S)
    history = History(store, table, intake, retention, clock)
    kept = KeptBlocks(max_bytes=1 << 26, max_tenant_bytes=1 << 24, now=clock)
    intake.told.append(kept.taken)
    engine = QueryEngine(history, kept, LIMITS, clock)
    yield MetricHistory(clock, database, store, rules, table, intake, history, kept, engine)
    await intake.close()
    await database.close()
