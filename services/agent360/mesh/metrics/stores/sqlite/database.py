"""One SQLite file: a thread that writes with group commit, and one that reads."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from agent360.mesh.metrics.ports import StoreError
from agent360.mesh.metrics.stores.sqlite.migrations import Migrations, migrate

T = TypeVar("T")

Work = Callable[[sqlite3.Connection], T]
"""Statements that belong together; runs on a thread of the database."""

_BUSY_S: Final = 10.0
_IN_MEMORY: Final = ":memory:"
_MAPPED_BYTES: Final = 1 << 30
"""Of the file, read without copying pages."""


class Database:
    """What the SQLite stores share.

    Writes that wait while a transaction is being committed share the next one; if that fails, each
    is tried in one of its own. A read sees one state of the file, that of its beginning.

    Example:
        >>> database = Database("/var/lib/agent360/metrics.db")
        >>> await database.write(lambda db: db.execute("DELETE FROM reporters"))
    """

    def __init__(self, path: str) -> None:
        """Opens the file, made if need be.

        Raises:
            StoreError: it cannot be used.
        """
        self.path = path
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sqlite-write")
        self._reader = self._writer
        with _told_plainly(path):
            if path != _IN_MEMORY:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._db: sqlite3.Connection = self._writer.submit(_open, path).result()
            self._reading = self._db
            if path != _IN_MEMORY:
                self._reader = ThreadPoolExecutor(1, thread_name_prefix="sqlite-read")
                self._reading = self._reader.submit(_open, path).result()
        self._waiting: list[tuple[Work[Any], asyncio.Future[Any]]] = []
        self._committer: asyncio.Task[None] | None = None

    def migrate(self, subject: str, migrations: Migrations) -> None:
        """Brings the tables of a subject up to date; for the constructors of stores.

        Raises:
            StoreError: they are of a later version, or the file cannot be used.
        """
        with _told_plainly(self.path):
            self._writer.submit(migrate, self._db, subject, migrations).result()

    async def read(self, work: Work[T]) -> T:
        """Runs statements that change nothing, all on the same state.

        Raises:
            StoreError: they failed.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._reader, self._in_transaction, self._reading, "BEGIN", work
        )

    async def write(self, work: Work[T]) -> T:
        """Runs statements in a transaction, perhaps together with others; durable when it returns.

        Raises:
            StoreError: they failed, and changed nothing.
        """
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((work, done))
        if self._committer is None:
            self._committer = asyncio.create_task(self._commit_all())
        return await asyncio.shield(done)

    async def close(self) -> None:
        """Finishes what was asked for."""
        while self._committer is not None:
            await asyncio.wait((self._committer,))
        loop = asyncio.get_running_loop()
        if self._reader is not self._writer:
            await loop.run_in_executor(self._reader, self._reading.close)
            self._reader.shutdown()
        await loop.run_in_executor(self._writer, self._db.close)
        self._writer.shutdown()

    # ---------------------------------------------------------------- group commit

    async def _commit_all(self) -> None:
        try:
            while self._waiting:
                group, self._waiting = self._waiting, []
                try:
                    await self._commit(group)
                except StoreError:
                    for each in group:
                        try:
                            await self._commit([each])
                        except StoreError as error:
                            if not each[1].done():
                                each[1].set_exception(error)
        finally:
            self._committer = None

    async def _commit(self, group: list[tuple[Work[Any], asyncio.Future[Any]]]) -> None:
        def work(db: sqlite3.Connection) -> list[Any]:
            return [one(db) for one, _ in group]

        results = await asyncio.get_running_loop().run_in_executor(
            self._writer, self._in_transaction, self._db, "BEGIN IMMEDIATE", work
        )
        for (_, done), result in zip(group, results, strict=True):
            if not done.done():
                done.set_result(result)

    def _in_transaction(self, db: sqlite3.Connection, begin: str, work: Work[T]) -> T:
        with _told_plainly(self.path):
            db.execute(begin)
            try:
                result = work(db)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            return result


@contextmanager
def _told_plainly(path: str) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"the SQLite store {path} failed: {error}") from error


def _open(path: str) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute(f"PRAGMA mmap_size = {_MAPPED_BYTES}")
    return database
