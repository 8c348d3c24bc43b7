"""The recorder on a real store that fails: what is acknowledged is stored once, in sound chains."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import structlog
from support.audit_events import event
from support.polling import eventually, eventually_async

from agent360.client import MeshError
from agent360.mesh.metrics.audit.chain import DAY_S
from agent360.mesh.metrics.audit.recording import Recorder
from agent360.mesh.metrics.audit.verifying import Verifier
from agent360.mesh.metrics.ports import Append, EventFilter, StoreError
from agent360.mesh.metrics.stores.sqlite import Database, SqliteEventStore

MIDNIGHT = 20_000 * DAY_S


class Unsteady(SqliteEventStore):
    """Fails when it is told to: before an append, or after it was done."""

    before = False
    after = False
    attempts = 0

    async def append(self, append: Append) -> None:
        self.attempts += 1
        if self.before:
            raise StoreError("no space left")
        await super().append(append)
        if self.after:
            raise StoreError("the answer was lost")


@dataclass
class Recording:
    """A recorder on a file, and the clock that it sees."""

    store: Unsteady
    now_s: float = MIDNIGHT + 10.0
    recorder: Recorder = field(init=False)

    def __post_init__(self) -> None:
        self.recorder = self.new("w")

    def new(self, writer: str, keep_days: int | None = None) -> Recorder:
        recorder = Recorder(
            self.store,
            writer,
            keep_days=keep_days,
            log=structlog.get_logger(),
            now=lambda: self.now_s,
        )
        recorder.start()
        return recorder

    async def bodies(self, tenant: str = "acme") -> list[bytes]:
        page = await self.store.events(EventFilter(tenant, None, None, "", "", ""), None, 1_000)
        return [row.event.body for row in page.events][::-1]

    async def chains(self) -> dict[tuple[str, int], int]:
        """Tenants and days with the number of their events; all of them sound."""
        found = {}
        async for checked in Verifier(self.store).verify(None, 0, 30_000, {}):
            assert checked.fault is None, checked
            found[checked.chain.tenant, checked.chain.day] = checked.good
        return found


@asynccontextmanager
async def recording(path: Path) -> AsyncIterator[Recording]:
    database = Database(str(path / "m.db"))
    its = Recording(Unsteady(database))
    try:
        yield its
    finally:
        await its.recorder.close()
        await database.close()


@pytest.mark.parametrize("lost", [False, True], ids=["not done", "done, but not told"])
async def test_an_append_that_fails_is_repeated_until_it_is_done_and_callers_are_told(
    tmp_path: Path, lost: bool
) -> None:
    async with recording(tmp_path) as its:
        await its.recorder.record([event(0)])
        its.store.before, its.store.after = not lost, lost
        with pytest.raises(MeshError) as told:
            await its.recorder.record([event(1), event(2)])
        assert told.value.reason == "AUDIT_STORE_FAILING"
        assert told.value.retry_after_s
        with pytest.raises(MeshError):
            await its.recorder.record([event(3)])
        await eventually(lambda: its.store.attempts >= 3)
        its.store.before = its.store.after = False

        async def works() -> bool:
            try:
                await its.recorder.record([event(1), event(3)])
            except MeshError:
                return False
            return True

        await eventually_async(works, timeout_s=20)
        assert await its.bodies() == [f"body {n}".encode() for n in range(4)]
        assert await its.chains() == {("acme", 20_000): 4}


async def test_events_that_many_record_at_once_share_appends(tmp_path: Path) -> None:
    async with recording(tmp_path) as its:
        tenants = ("acme", "globex", "initech")
        await asyncio.gather(
            *(its.recorder.record([event(n, tenant)]) for n in range(300) for tenant in tenants)
        )
        assert await its.chains() == {(tenant, 20_000): 300 for tenant in tenants}
        assert its.store.attempts < 30


async def test_a_caller_that_gives_up_loses_nothing(tmp_path: Path) -> None:
    async with recording(tmp_path) as its:
        impatient = asyncio.create_task(its.recorder.record([event(1)]))
        await asyncio.sleep(0)
        impatient.cancel()
        await its.recorder.record([event(2)])
        assert await its.bodies() == [b"body 1", b"body 2"]
        assert impatient.cancelled()


async def test_a_day_follows_the_one_before_also_when_the_clock_is_set_back(
    tmp_path: Path,
) -> None:
    async with recording(tmp_path) as its:
        for number, now_s in enumerate((-5.0, 5.0, -5.0, 3 * DAY_S + 1.0)):
            its.now_s = MIDNIGHT + now_s
            await its.recorder.record([event(number)])
        await its.recorder.close()
        its.recorder = its.new("w")
        await its.recorder.record([event(4)])
        assert await its.chains() == {
            ("acme", 19_999): 1,
            ("acme", 20_000): 2,
            ("acme", 20_003): 2,
        }
        await its.store.drop_days(20_001)
        assert await its.chains() == {("acme", 20_003): 2}


async def test_a_day_that_is_gone_from_the_middle_shows(tmp_path: Path) -> None:
    async with recording(tmp_path) as its:
        for day in range(3):
            its.now_s = MIDNIGHT + day * DAY_S
            await its.recorder.record([event(day)])
        database = its.store._database
        await database.write(lambda db: db.execute("DELETE FROM audit_events WHERE day = 20001"))
        await database.write(lambda db: db.execute("DELETE FROM audit_heads WHERE day = 20001"))
        found = [each async for each in Verifier(its.store).verify("acme", 0, 30_000, {})]
        assert [(each.chain.day, each.fault is None) for each in found] == [
            (20_000, True),
            (20_002, False),
        ]
        assert "a day in between, is missing" in found[1].description


async def test_two_writers_have_chains_of_their_own_and_one_set_of_ids(tmp_path: Path) -> None:
    async with recording(tmp_path) as its:
        other = its.new("another")
        await its.recorder.record([event(n) for n in range(5)])
        await other.record([event(n) for n in range(3, 9)])
        await other.close()
        assert await its.bodies() == [f"body {n}".encode() for n in range(9)]
        chains = await its.store.chains("acme", 0, 30_000, None, 10)
        assert {key.writer: head.sequence for key, head in chains if head} == {
            "w": 5,
            "another": 4,
        }
        await its.chains()


async def test_retention_drops_days_once_they_are_over_for_so_long(tmp_path: Path) -> None:
    async with recording(tmp_path) as its:
        await its.recorder.record([event(0)])
        keeping = its.new("another", keep_days=2)
        for days, left in ((1, 1), (2, 1), (3, 0)):
            its.now_s = MIDNIGHT + days * DAY_S
            await its.recorder.expire()
            await keeping.expire()
            assert len(await its.bodies()) == left
        await keeping.close()
