"""Takes samples in: durable in the journal, rolled up in memory, later committed to the store.

What is acknowledged is in the journal. What is in memory is what the journal has beyond the last
commit, and a commit stores rollups, marks and the position in the journal together. So after a
crash, reading the journal from that position makes the same memory again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

import numpy as np
import structlog

from agent360.mesh.metrics.entries import Entry, EntryReader, EntryWriter
from agent360.mesh.metrics.frame import Columns, Frame
from agent360.mesh.metrics.journal import Journal
from agent360.mesh.metrics.ports import Commit, Mark, RollupStore, StoreError
from agent360.mesh.metrics.series_table import SeriesTable

T = TypeVar("T")

_GROUP_SAMPLES: Final = 1 << 18
_RETRY_S: Final = 1.0
_SETTLE_S: Final = 5.0
_MERGE_FRAMES: Final = 64


class Snapshot(NamedTuple):
    """What is in memory and not, or not surely, in the store."""

    frames: Sequence[Frame]
    """Their ``row_series`` are numbers of the series table."""
    writer: str
    before: int
    """Rows of the writer with this origin or a higher one are to be left out of the store's."""


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """Bounds of the intake."""

    commit_every_s: float
    """How often memory goes to the store."""
    max_waiting_bytes: int
    """Samples that wait for the journal; beyond that their senders wait."""
    max_memory_bytes: int
    """Rollups in memory: at half of it they are committed early, at all of it senders wait."""


class _Waiting(NamedTuple):
    entry: Entry
    durable: asyncio.Future[None]


class _Recovered(NamedTuple):
    """What the journal had beyond the store."""

    frame: Frame
    marks: Mapping[str, Mark]
    samples: int


class Intake:
    """Samples on their way to the store.

    Example:
        >>> intake = Intake(store, table, journal, limits, log)
        >>> await intake.start()
        >>> await intake.room()
        >>> await intake.take(columns, {"report/ana/7f": mark})
    """

    def __init__(
        self,
        store: RollupStore,
        table: SeriesTable,
        journal: Journal,
        limits: IntakeLimits,
        log: structlog.stdlib.BoundLogger,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._table = table
        self._journal = journal
        self._limits = limits
        self._log = log
        self._now = now
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._writer = EntryWriter(table)
        self._waiting: list[_Waiting] = []
        self._waiting_bytes = 0
        self._room = asyncio.Event()
        self._work = asyncio.Event()
        self._hurry = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._frames: list[Frame] = []
        self._leaving: tuple[Frame, ...] = ()
        self._fresh_marks: dict[str, Mark] = {}
        self._committing: Commit | None = None
        self._commit_lock = asyncio.Lock()
        self._origin = 0
        self._position = 0
        self._last: asyncio.Future[None] | None = None
        self.marks: dict[str, Mark] = {}
        """How far each source has come; what it says may be on its way to the journal still."""
        self.fault = ""
        """Why nothing becomes durable at present; empty if it does."""
        self.commit_fault = ""
        """Why the store takes nothing at present; empty if it does."""
        self.memory_bytes = 0
        """Size of the rollups in memory."""
        self.samples = 0
        """Samples that were made durable since the start."""
        self.commits = 0
        """Commits since the start."""
        self.told: list[Callable[[Frame], None]] = []
        """Called with the rollups of all samples, in the step in which queries begin to see them;
        ``row_series`` are numbers of the series table."""

    async def start(self) -> None:
        """Reads what an earlier process left, and begins to work.

        Raises:
            StoreError: the store cannot be used.
            OSError: the journal cannot be read.
        """
        checkpoint = await self._store.checkpoint(self._journal.writer)
        for series in await self._store.series():
            self._table.enter(series)
        self.marks = dict(checkpoint.marks)
        self._origin = checkpoint.position
        recovered = await self._in_thread(lambda: self._recover(checkpoint.position))
        self._position = self._journal.next_position
        self._frames = [recovered.frame]
        self._fresh_marks = dict(recovered.marks)
        self.marks.update(recovered.marks)
        self._measure()
        if recovered.samples or self._journal.torn_bytes:
            self._log.info(
                "journal read", samples=recovered.samples, torn_bytes=self._journal.torn_bytes
            )
        self._tasks = [
            asyncio.create_task(self._keep_writing()),
            asyncio.create_task(self._keep_committing()),
        ]
        for task in self._tasks:
            task.add_done_callback(self._note_end)

    @property
    def has_room(self) -> bool:
        """Whether more can be taken at once."""
        return (
            self._waiting_bytes <= self._limits.max_waiting_bytes
            and self.memory_bytes <= self._limits.max_memory_bytes
        )

    async def room(self) -> None:
        """Waits while too much is on its way or in memory; to be awaited before ``take``."""
        while not self.has_room:
            self._room.clear()
            self._hurry.set()
            await self._room.wait()

    def take(self, columns: Columns, marks: Mapping[str, Mark]) -> asyncio.Future[None]:
        """Takes samples and the marks that they move.

        Returns:
            Done when they are durable and queries see them.
        """
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.marks.update(marks)
        self._waiting.append(_Waiting(Entry(columns, marks), durable))
        self._waiting_bytes += _size_of(columns)
        self._last = durable
        self._work.set()
        return durable

    async def settled(self) -> None:
        """Waits until everything taken so far is durable."""
        if self._last is not None:
            await asyncio.shield(self._last)

    @property
    def journal_bytes(self) -> int:
        """Size of the journal on disk."""
        return self._journal.size_bytes

    @property
    def writer(self) -> str:
        """Names the journal in the store."""
        return self._journal.writer

    @property
    def origin(self) -> int:
        """The position that the store has everything up to."""
        return self._origin

    def snapshot(self) -> Snapshot:
        """What the store does not have, or may not have, at this moment."""
        return Snapshot((*self._leaving, *self._frames), self._journal.writer, self._origin)

    async def commit(self) -> None:
        """Stores what is in memory.

        Raises:
            StoreError: it is not stored; it stays in memory and in the journal.
        """
        async with self._commit_lock:
            if self._committing is None:
                if self._position == self._origin:
                    return
                self._committing = await self._leave()
            await self._store.commit(self._committing)
            self._origin = self._committing.position
            self._committing, self._leaving = None, ()
            self._measure()
            self.commits += 1
            self._room.set()
        await self._in_thread(lambda: self._journal.release(self._origin))

    async def close(self) -> None:
        """Makes everything durable and stores it, as far as that is possible now."""
        for task in self._tasks[1:]:
            task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                await self.settled()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for waiting in self._waiting:
            waiting.durable.cancel()
        try:
            await self.commit()
        except (StoreError, OSError) as error:
            self._log.warning("not stored; it is read from the journal next time", error=str(error))
        await self._in_thread(self._journal.close)
        self._thread.shutdown()

    def forget_marks(self, before_s: float) -> None:
        """Forgets sources that have sent nothing since."""
        for name in [name for name, mark in self.marks.items() if mark.time_s < before_s]:
            del self.marks[name]

    # ---------------------------------------------------------------- in the background

    async def _keep_writing(self) -> None:
        while True:
            await self._work.wait()
            group, entry = self._next_group()
            position, frame = await self._written(entry)
            self._frames.append(frame)
            for tell in self.told:
                tell(frame)
            self.memory_bytes += frame.size_bytes
            self._fresh_marks.update(entry.marks)
            self._position = position + 1
            self.samples += len(entry.columns.series)
            for waiting in group:
                self._waiting_bytes -= _size_of(waiting.entry.columns)
                if not waiting.durable.done():
                    waiting.durable.set_result(None)
            self._room.set()
            if len(self._frames) >= _MERGE_FRAMES:
                await self._merge_frames()
            if self.memory_bytes > self._limits.max_memory_bytes // 2:
                self._hurry.set()

    async def _written(self, entry: Entry) -> tuple[int, Frame]:
        """Tries until the entry is in the journal."""
        while True:
            try:
                written = await self._in_thread(lambda: self._append(entry))
            except OSError as error:
                fault, self.fault = self.fault, str(error)
                if not fault:
                    self._tell("journal failing; nothing is acknowledged", error)
                await asyncio.sleep(_RETRY_S)
            else:
                if self.fault:
                    self.fault = ""
                    self._tell("journal written again")
                return written

    async def _keep_committing(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._limits.commit_every_s):
                    await self._hurry.wait()
            self._hurry.clear()
            try:
                await self.commit()
            except (StoreError, OSError) as error:
                fault, self.commit_fault = self.commit_fault, str(error)
                if not fault:
                    self._tell("store failing; the journal grows", error)
                await asyncio.sleep(_RETRY_S)
            else:
                if self.commit_fault:
                    self.commit_fault = ""
                    self._tell("store written again")

    def _note_end(self, task: asyncio.Task[None]) -> None:
        """Nothing becomes durable any more if a task ended by a bug: that must show."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fault = repr(error)
            self._log.error("the intake ended", exc_info=error)

    def _tell(self, event: str, error: Exception | None = None) -> None:
        """Logs; what is logged may go to the disk that is full."""
        with contextlib.suppress(OSError):
            if error is None:
                self._log.info(event)
            else:
                self._log.error(event, error=str(error))

    def _next_group(self) -> tuple[list[_Waiting], Entry]:
        """As many waiting entries as one record holds, put together."""
        samples, size = 0, 0
        for each in self._waiting:
            samples += len(each.entry.columns.series)
            size += 1
            if samples >= _GROUP_SAMPLES:
                break
        group, self._waiting = self._waiting[:size], self._waiting[size:]
        if not self._waiting:
            self._work.clear()
        if size == 1:
            return group, group[0].entry
        marks: dict[str, Mark] = {}
        for each in group:
            marks.update(each.entry.marks)
        columns = zip(*(each.entry.columns for each in group), strict=True)
        return group, Entry(Columns(*(np.concatenate(each) for each in columns)), marks)

    async def _leave(self) -> Commit:
        """Takes all that is in memory out for a commit; queries go on seeing it."""
        origin, position = self._origin, self._position
        self._leaving, self._frames = tuple(self._frames), []
        marks, self._fresh_marks = self._fresh_marks, {}
        frames = self._leaving
        frame = await self._in_thread(lambda: Frame.merged(frames))
        self._leaving = (frame,)
        return Commit(self._journal.writer, origin, position, frame, marks)

    async def _merge_frames(self) -> None:
        """Makes fewer frames of those in memory: one, or two if the first is much larger."""
        frames = self._frames
        first, others = frames[0].size_bytes, sum(frame.size_bytes for frame in frames[1:])
        kept = 1 if first > 2 * others else 0
        merging = frames[kept:]
        merged = await self._in_thread(lambda: Frame.merged(merging))
        if self._frames is frames:  # else a commit took them out meanwhile
            frames[kept:] = [merged]
            self._measure()

    def _measure(self) -> None:
        self.memory_bytes = sum(frame.size_bytes for frame in (*self._leaving, *self._frames))

    # ---------------------------------------------------------------- on the journal's thread

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _append(self, entry: Entry) -> tuple[int, Frame]:
        if self._journal.begins_segment:
            self._writer.begin_segment()
        position = self._journal.append(self._writer.encode(entry))
        return position, self._rolled(entry.columns)

    def _rolled(self, columns: Columns) -> Frame:
        return Frame.of_samples(self._table.all, columns, self._table.kinds_of(columns.series))

    def _recover(self, position: int) -> _Recovered:
        """Rolls up what the journal has beyond the store."""
        reader = EntryReader(self._table)
        frames = [Frame.empty(self._table.all)]
        marks: dict[str, Mark] = {}
        samples = 0
        for record in self._journal.recover(position):
            entry = reader.decode(record.payload)
            if not record.is_new:
                continue
            frames.append(self._rolled(entry.columns))
            marks.update(entry.marks)
            samples += len(entry.columns.series)
            if len(frames) >= _MERGE_FRAMES:
                frames = [Frame.merged(frames)]
        return _Recovered(Frame.merged(frames), marks, samples)


def _size_of(columns: Columns) -> int:
    return sum(column.nbytes for column in columns)
