"""Versions of the SQLite tables: the unversioned ones are taken over, later ones are refused."""

import asyncio
import json
import sqlite3
from pathlib import Path

import pytest
from support.rollup_frames import frame_of
from support.servers import running

from agent360.client import Mesh
from agent360.mesh.metrics.frame import Frame
from agent360.mesh.metrics.ports import Commit, StoreError
from agent360.mesh.metrics.resolution import RESOLUTIONS
from agent360.mesh.metrics.series import Kind, SeriesId
from agent360.mesh.metrics.stores.sqlite import Database, SqliteRollupStore, open_sqlite
from agent360.mesh.metrics.stores.sqlite.migrations import migrate, script

T0 = 1_800_000_000 // 86_400 * 86_400

UNVERSIONED = """
CREATE TABLE series (
    id INTEGER PRIMARY KEY, tenant TEXT NOT NULL, name TEXT NOT NULL, labels TEXT NOT NULL,
    kind INTEGER NOT NULL, unit TEXT NOT NULL, UNIQUE (tenant, name, labels, kind));
CREATE TABLE rollups (
    series INTEGER NOT NULL, bucket INTEGER NOT NULL, count INTEGER NOT NULL, total REAL NOT NULL,
    least REAL NOT NULL, most REAL NOT NULL, last REAL NOT NULL, last_time REAL NOT NULL,
    sketch BLOB NOT NULL, PRIMARY KEY (series, bucket)) WITHOUT ROWID;
CREATE INDEX rollups_by_bucket ON rollups (bucket);
CREATE TABLE reporters (reporter TEXT PRIMARY KEY, sequence INTEGER NOT NULL);
CREATE TABLE events (
    tenant TEXT NOT NULL, id TEXT NOT NULL, time INTEGER NOT NULL, actor TEXT NOT NULL,
    action TEXT NOT NULL, resource TEXT NOT NULL, body BLOB NOT NULL, PRIMARY KEY (tenant, id));
"""
SECONDS = SeriesId("acme", "seconds", (("model", "a"),), Kind.DISTRIBUTION, "s")
PLANS = SeriesId("globex", "plans", (), Kind.COUNTER, "1")


def write_unversioned(path: Path) -> None:
    """A file as the first version of the service wrote it."""
    database = sqlite3.connect(path)
    database.executescript(UNVERSIONED)
    for number, series in ((4, SECONDS), (7, PLANS)):
        database.execute(
            "INSERT INTO series VALUES (?, ?, ?, ?, ?, ?)",
            (
                number,
                series.tenant,
                series.name,
                json.dumps(series.labels),
                int(series.kind),
                series.unit,
            ),
        )
    # 90 observations of 2.0 (gamma ** 35 is the bin's end), 5 of zero, 5 of -2.0.
    sketch = json.dumps([5, [[35, 90]], [[35, 5]]]).encode()
    empty = json.dumps([0, [], []]).encode()
    for bucket in range(0, 3 * 86_400, 7_200):
        row = (T0 + bucket, 100, 170.0, -2.0, 2.0, 2.0, T0 + bucket + 1.5, sketch)
        database.execute("INSERT INTO rollups VALUES (4, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    database.execute("INSERT INTO rollups VALUES (7, ?, 3, 6, 1, 3, 2, ?, ?)", (T0, T0, empty))
    database.execute("INSERT INTO reporters VALUES ('r', 9)")
    database.execute("INSERT INTO events VALUES ('acme', 'e', 5, 'ana', 'plans.drop', 'p', x'')")
    database.commit()
    database.close()


async def test_what_the_unversioned_tables_had_is_kept_in_all_resolutions(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    write_unversioned(path)
    for _ in range(2):  # the second time there is nothing to do
        stores = open_sqlite(str(path))
        assert set(await stores.rollups.series()) == {SECONDS, PLANS}
        await stores.rollups.compact(T0 + 9 * 86_400, "w", 0)
        for resolution in RESOLUTIONS:
            frame = await stores.rollups.read(
                [SECONDS, PLANS], T0, T0 + 4 * 86_400, resolution, writer="w", before=0
            )
            whole = Frame.merged([frame]).coarser(100 * 86_400)
            assert whole.count.tolist() == [3_600, 3]
            assert whole.total.tolist() == [36 * 170.0, 6.0]
            assert whole.last_time_s[0] == T0 + 35 * 7_200 + 1.5
            found = whole.quantiles([0.0, 0.07, 0.5])[0]
            assert found == pytest.approx([-2.0, 0.0, 2.0], rel=0.01)
        await stores.close()
    with sqlite3.connect(path) as database:
        names = {row[0] for row in database.execute("SELECT name FROM sqlite_schema")}
        assert not names & {"rollups", "old_series", "reporters"}
        assert dict(database.execute("SELECT * FROM schema_version"))["rollups"] >= 1
        assert database.execute("SELECT count(*) FROM audit_events").fetchone() == (1,)


async def test_a_service_takes_over_the_file_of_its_forerunner(tmp_path: Path) -> None:
    write_unversioned(tmp_path / "m.db")
    async with (
        running("metrics", store=f"sqlite:///{tmp_path}/m.db") as server,
        Mesh.connect(metrics=server.address, tenant="acme", api_key="") as mesh,
    ):
        assert [each.name async for each in mesh.metrics.list_series()] == ["seconds"]
        mesh.metrics.count("plans")
        await mesh.metrics.flush()


def test_a_migration_that_fails_leaves_the_tables_as_they_were(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "m.db", isolation_level=None)
    steps = [script("CREATE TABLE a (x INTEGER)")]
    migrate(database, "things", steps)
    broken = [*steps, script("ALTER TABLE a ADD COLUMN y INTEGER; CREATE TABLE a (x INTEGER)")]
    with pytest.raises(sqlite3.OperationalError):
        migrate(database, "things", broken)
    assert [row[1] for row in database.execute("PRAGMA table_info(a)")] == ["x"]
    migrate(database, "things", [*steps, script("ALTER TABLE a ADD COLUMN y INTEGER")])
    assert [row[1] for row in database.execute("PRAGMA table_info(a)")] == ["x", "y"]
    database.close()


async def test_tables_of_a_later_version_are_refused_with_what_to_do(tmp_path: Path) -> None:
    path = str(tmp_path / "m.db")
    await open_sqlite(path).close()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE schema_version SET version = 99 WHERE subject = 'rollups'")
    with pytest.raises(StoreError, match=r"rollups are of version 99.*use the newer service"):
        open_sqlite(path)


async def test_a_write_that_fails_does_not_fail_those_it_shares_a_transaction_with(
    tmp_path: Path,
) -> None:
    database = Database(str(tmp_path / "m.db"))
    await database.write(lambda db: db.execute("CREATE TABLE t (x INTEGER PRIMARY KEY)"))

    def insert(x: int) -> "asyncio.Task[object]":
        return asyncio.create_task(
            database.write(lambda db: db.execute("INSERT INTO t VALUES (?)", (x,)))
        )

    done = await asyncio.gather(*map(insert, (1, 2, 1, 3)), return_exceptions=True)
    assert [isinstance(each, StoreError) for each in done] == [False, False, True, False]
    rows = await database.read(lambda db: db.execute("SELECT x FROM t ORDER BY x").fetchall())
    assert rows == [(1,), (2,), (3,)]
    await database.close()


async def test_a_commit_whose_transaction_failed_with_anothers_write_finds_its_series_when_repeated(
    tmp_path: Path,
) -> None:
    database = Database(str(tmp_path / "m.db"))
    store = SqliteRollupStore(database)
    await database.write(lambda db: db.execute("CREATE TABLE t (x INTEGER PRIMARY KEY)"))
    await database.write(lambda db: db.execute("INSERT INTO t VALUES (1)"))
    frame = frame_of([SECONDS], [(0, T0 + 1.0, 2.0, 1)])
    done = await asyncio.gather(
        store.commit(Commit("w", 0, 1, frame)),
        database.write(lambda db: db.execute("INSERT INTO t VALUES (1)")),
        return_exceptions=True,
    )
    assert [isinstance(each, StoreError) for each in done] == [False, True]
    await store.commit(Commit("w", 1, 2, frame))
    assert await store.series() == [SECONDS]
    read = await store.read([SECONDS], T0, T0 + 60, RESOLUTIONS[0], writer="w", before=9)
    assert read.count.sum() == 2
    await database.close()
