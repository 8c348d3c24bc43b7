"""Samples on their way: queries see each once, disks fill up, restarts find everything."""

import asyncio
import errno
import itertools
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from support.polling import eventually
from support.rollup_frames import columns_of, series_named

from agent360.mesh.metrics.frame import Frame
from agent360.mesh.metrics.history import History
from agent360.mesh.metrics.intake import Intake, IntakeLimits
from agent360.mesh.metrics.journal import Journal
from agent360.mesh.metrics.ports import Commit, Mark, StoreError
from agent360.mesh.metrics.resolution import Retention
from agent360.mesh.metrics.series import Kind, SeriesId
from agent360.mesh.metrics.series_table import SeriesTable, TooManySeriesError
from agent360.mesh.metrics.stores.sqlite import Database, SqliteRollupStore

NOW_S = 1_800_000_000.0
DAY_S = 86_400
(SECONDS,) = series_named("seconds")


class SlowStore(SqliteRollupStore):
    """A store whose commits wait until they may end, or fail."""

    gate: asyncio.Event
    landed: Callable[[], None]
    fails = False

    async def commit(self, commit: Commit) -> None:
        if self.fails:
            raise StoreError("no space")
        await super().commit(commit)
        self.landed()
        await self.gate.wait()


class Bench:
    """An intake with its store, journal and history."""

    def __init__(self, directory: Path, commit_every_s: float = 3_600) -> None:
        self.database = Database(str(directory / "m.db"))
        self.store = SlowStore(self.database)
        self.store.gate = asyncio.Event()
        self.store.gate.set()
        self.store.landed = lambda: None
        self.table = SeriesTable(100)
        self.journal = Journal(directory / "journal", segment_bytes=2_000)
        limits = IntakeLimits(commit_every_s, 1 << 20, 1 << 24)
        log = structlog.get_logger()
        self.intake = Intake(self.store, self.table, self.journal, limits, log, lambda: NOW_S)
        retention = Retention(2 * DAY_S, 14 * DAY_S, 400 * DAY_S)
        self.history = History(self.store, self.table, self.intake, retention, lambda: NOW_S)

    async def add(self, *values: float, **marks: bytes) -> None:
        number = self.table.number(SECONDS)
        columns = columns_of([(number, NOW_S, value, 1) for value in values])
        stamped = {name: Mark(value, NOW_S) for name, value in marks.items()}
        await self.intake.room()
        await self.intake.take(columns, stamped)

    async def total(self) -> tuple[int, float]:
        frame = await self.history.read([SECONDS], NOW_S - 3_600, NOW_S + 10, 10.0)
        return int(frame.count.sum()), float(frame.total.sum())


@asynccontextmanager
async def bench(directory: Path, commit_every_s: float = 3_600) -> AsyncIterator[Bench]:
    made = Bench(directory, commit_every_s)
    await made.intake.start()
    try:
        yield made
    finally:
        made.store.gate.set()
        await made.intake.close()
        await made.database.close()


async def test_queries_see_every_sample_once_before_during_and_after_a_commit(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path) as its:
        await its.add(1, 2)
        assert await its.total() == (2, 3)
        landed = asyncio.Event()
        its.store.landed = landed.set
        its.store.gate.clear()
        committing = asyncio.create_task(its.intake.commit())
        await landed.wait()
        assert await its.total() == (2, 3), "its rows are in the store and in memory"
        await its.add(4)
        assert await its.total() == (3, 7)
        its.store.gate.set()
        await committing
        assert await its.total() == (3, 7)
        await its.intake.commit()
        assert await its.total() == (3, 7)


async def test_reads_that_race_with_commits_and_compactions_never_see_half(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, commit_every_s=0.002) as its:
        added = 0
        settled = 0
        for _ in range(150):
            reading = asyncio.create_task(its.total())
            await its.add(1, 1, 1)
            added += 3
            seen, _ = await reading
            assert seen in (added - 3, added)
            assert (await its.total())[0] == added
            await its.store.compact(NOW_S + DAY_S, its.intake.writer, settled)
            settled = its.intake.origin


async def test_a_restart_finds_what_was_committed_and_what_was_only_in_the_journal(
    tmp_path: Path,
) -> None:
    its = Bench(tmp_path)
    await its.intake.start()
    await its.add(1, 2, a=b"1", c=b"7")
    await its.intake.commit()
    await its.add(4, a=b"2", b=b"9")
    its.journal.close()  # as a crash does: nothing else is finished
    await its.database.close()
    async with bench(tmp_path) as again:
        assert await again.total() == (3, 7)
        assert {name: mark.value for name, mark in again.intake.marks.items()} == {
            "a": b"2",
            "b": b"9",
            "c": b"7",
        }
        await again.add(8)
        await again.intake.commit()
        assert await again.total() == (4, 15)


async def test_a_store_that_fails_is_tried_again_and_memory_and_journal_hold_meanwhile(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, commit_every_s=0.01) as its:
        its.store.fails = True
        await its.add(1, 2)
        await eventually(lambda: its.intake.commit_fault)
        await its.add(4)
        assert await its.total() == (3, 7)
        its.store.fails = False
        await eventually(lambda: not its.intake.commit_fault and its.intake.commits)
        assert await its.total() == (3, 7)


class FullDisk(Journal):
    """A journal on a disk without space."""

    full = False

    def write(self, parts: tuple[bytes, ...]) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(parts)


async def test_samples_wait_while_the_journal_cannot_be_written(tmp_path: Path) -> None:
    its = Bench(tmp_path)
    its.journal.close()
    journal = FullDisk(tmp_path / "journal")
    limits = IntakeLimits(3_600, 1 << 20, 1 << 24)
    intake = Intake(its.store, its.table, journal, limits, structlog.get_logger(), lambda: NOW_S)
    its.intake = intake
    await intake.start()
    journal.full = True
    adding = asyncio.create_task(its.add(1, 2))
    await eventually(lambda: intake.fault)
    assert "space" in intake.fault
    assert not adding.done()
    journal.full = False
    await asyncio.wait_for(adding, 5)
    assert intake.fault == ""
    await intake.close()
    await its.database.close()


@pytest.mark.parametrize(
    ("step_s", "start_s", "resolutions"),
    [
        (10, NOW_S - 3_600, "10s"),
        (60, NOW_S // 3_600 * 3_600 - 7_200, "1m"),
        (60, NOW_S // 3_600 * 3_600 - 7_190, "10s"),
        (7_200, NOW_S // 3_600 * 3_600 - 7_200, "1h"),
        (10, NOW_S // 3_600 * 3_600 - 20 * DAY_S, "10s 1m 1h"),
        (60, NOW_S // 3_600 * 3_600 - 20 * DAY_S, "1m 1h"),
    ],
)
async def test_a_query_reads_the_coarsest_resolution_that_fits_its_steps_and_is_kept(
    tmp_path: Path, step_s: float, start_s: float, resolutions: str
) -> None:
    async with bench(tmp_path) as its:
        asked: list[tuple[str, float, float]] = []
        read = its.store.read

        async def noting(series: Any, begin_s: float, end_s: float, at: Any, **rest: Any) -> Any:
            asked.append((at.name, begin_s, end_s))
            return await read(series, begin_s, end_s, at, **rest)

        its.store.read = noting  # type: ignore[method-assign]
        await its.history.read([SECONDS], start_s, NOW_S, step_s)
        assert [name for name, _, _ in asked] == resolutions.split()
        oldest_first = sorted(asked, key=lambda part: part[1])
        assert oldest_first[0][1] == start_s
        assert oldest_first[-1][2] == NOW_S
        for earlier, later in itertools.pairwise(oldest_first):
            assert earlier[2] == later[1]


async def test_too_many_series_are_refused_and_room_comes_back_when_some_are_forgotten() -> None:
    table = SeriesTable(2)
    names = series_named("a", "b", "c")
    assert [table.number(each) for each in names[:2]] == [0, 1]
    with pytest.raises(TooManySeriesError, match="acme has 2 series"):
        table.number(names[2])
    assert table.number(SeriesId("globex", "a", (), Kind.COUNTER, "")) == 2
    table.forget(names[:1])
    assert table.number(names[2]) == 3
    assert sorted(each.name for each in table.of("acme")) == ["b", "c"]
    assert isinstance(table.frame_of(names, Frame.empty(table.all)), Frame)
