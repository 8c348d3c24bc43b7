"""What only the store on Cassandra promises: its tables, lifetimes, interruptions, connections."""

import asyncio
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from support.cassandra_server import CassandraServer
from support.polling import eventually
from support.rollup_frames import Sample, frame_of, reckoned, rows_of, series_named
from support.stores import (
    LIFETIMES,
    cassandra_stores,
    empty_tables,
    new_keyspace,
    session_of,
)

from agent360.mesh.metrics.frame import Frame
from agent360.mesh.metrics.ports import Commit, Mark, StoreError
from agent360.mesh.metrics.resolution import FINE, HOUR, MINUTE, RESOLUTIONS, Resolution, Retention
from agent360.mesh.metrics.stores.cassandra.exposition import CassandraCollector
from agent360.mesh.metrics.stores.cassandra.lease import Lease
from agent360.mesh.metrics.stores.cassandra.lifetimes import LAYOUTS, Lifetimes
from agent360.mesh.metrics.stores.cassandra.migrations import migrate
from agent360.mesh.metrics.stores.cassandra.opening import SUBJECTS
from agent360.mesh.metrics.stores.cassandra.rollups import CassandraRollupStore
from agent360.mesh.metrics.stores.cassandra.schema import follow_settings
from agent360.mesh.metrics.stores.cassandra.session import Batch, Row, Session, Statement

Cassandra = Callable[[], CassandraServer]

T0 = 1_800_000_000 // 86_400 * 86_400
DAY_S = 86_400
LATER = T0 + DAY_S
SERIES = series_named("seconds", "tokens")
SOURCES = Path(__file__).parents[2] / "services/agent360/mesh/metrics/stores/cassandra"


class Interrupted(Session):
    """Ends all work after a number of requests, as a process does that dies."""

    left = 1 << 40

    async def run(self, request: Statement | Batch) -> list[Row]:
        if self.left <= 0:
            raise StoreError("interrupted")
        self.left -= 1
        return await super().run(request)


def commit(origin: int, position: int, samples: list[Sample], writer: str = "w") -> Commit:
    marks = {f"reporter-{n}": Mark(b"%d" % position, T0) for n in range(3)}
    return Commit(writer, origin, position, frame_of(SERIES, samples), marks)


async def read(
    store: CassandraRollupStore, resolution: Resolution, before: int = 1 << 40
) -> dict[tuple[str, int], tuple[object, ...]]:
    frame = await store.read(SERIES, T0, T0 + 2 * DAY_S, resolution, writer="me", before=before)
    return rows_of(Frame.merged([frame]).coarser(resolution.length_s))


def some_samples(seed: int, count: int = 40) -> list[Sample]:
    chance = random.Random(seed)
    return [
        (n % 2, T0 + chance.randrange(7_200) + 0.5, chance.randrange(1, 800) / 8, 1)
        for n in range(count)
    ]


# -------------------------------------------------------------------- tables


async def test_tables_are_as_promised(cassandra: Cassandra) -> None:
    async with empty_tables(cassandra(), Session) as session:
        keyspace = session.target.keyspace
        for table in ("indexes", "views", "triggers"):
            statement = f"SELECT * FROM system_schema.{table} WHERE keyspace_name = ?"
            assert await session.run(Statement(statement, (keyspace,))) == []
        columns = await session.run(
            Statement(
                "SELECT table_name, column_name, clustering_order, kind, position "
                "FROM system_schema.columns WHERE keyspace_name = ?",
                (keyspace,),
            )
        )
        tables = await session.run(
            Statement(
                "SELECT table_name, default_time_to_live, compaction FROM system_schema.tables "
                "WHERE keyspace_name = ?",
                (keyspace,),
            )
        )
    options = {name: (ttl, dict(compaction)) for name, ttl, compaction in tables}
    for resolution, layout in LAYOUTS.items():
        mine = [each for each in columns if each[0] == layout.table]
        partition = sorted((each[4], each[1]) for each in mine if each[3] == "partition_key")
        assert [name for _, name in partition] == ["tenant", "series", "block_s"]
        assert ("time_s", "desc") in [each[1:3] for each in mine if each[3] == "clustering"]
        ttl, compaction = options[layout.table]
        assert ttl == LIFETIMES.retention.of(resolution) + 3 * DAY_S
        assert compaction["class"].endswith("TimeWindowCompactionStrategy")
        window = LIFETIMES.window(resolution)
        assert compaction["compaction_window_unit"] == window.unit
        assert compaction["compaction_window_size"] == str(window.size)
    assert [LIFETIMES.window(each) for each in RESOLUTIONS] == [
        (5, "HOURS"),
        (17, "HOURS"),
        (17, "DAYS"),
    ]


def test_no_statement_filters_or_uses_an_index() -> None:
    sources = {path.name: path.read_text() for path in SOURCES.glob("*.py")}
    assert len(sources) > 10
    for name, source in sources.items():
        assert not re.search(r"(?i)ALLOW\s+FILTERING|CREATE\s+(CUSTOM\s+)?INDEX", source), name


def test_rollups_are_never_deleted_row_by_row() -> None:
    deleting = {
        path.name for path in SOURCES.glob("*.py") if re.search(r"\bDELETE\b", path.read_text())
    }
    assert deleting == {"lease.py", "rules.py"}


async def test_rows_live_as_long_as_their_retention(cassandra: Cassandra) -> None:
    async with empty_tables(cassandra(), Session) as session:
        lifetimes = Lifetimes(LIFETIMES.retention, DAY_S, 3 * DAY_S, now=lambda: T0 + 7_200.0)
        store = CassandraRollupStore(session, lifetimes)
        await store.commit(commit(0, 1, [(0, T0 + 5.0, 1.0, 1)]))
        await store.compact(LATER, "w", 1)
        for resolution, layout in LAYOUTS.items():
            # The key is not given: a scan, which only tests do.
            statement = f"SELECT time_s, TTL(rows) FROM {layout.table}"
            ((time_s, ttl),) = await session.run(Statement(statement))
            promised = T0 + lifetimes.retention.of(resolution) + 3 * DAY_S
            assert time_s == T0
            assert promised - 60 <= T0 + 7_200 + ttl <= promised
        for table, column in (("series", "labels"), ("marks", "value"), ("hours", "stamp")):
            statement = f"SELECT TTL({column}) FROM {table}"
            assert all(ttl for (ttl,) in await session.run(Statement(statement)))


async def test_a_change_of_retention_changes_the_tables_when_the_store_is_opened(
    cassandra: Cassandra,
) -> None:
    async with empty_tables(cassandra(), Session) as session:
        longer = Lifetimes(Retention(20 * DAY_S, 40 * DAY_S, 800 * DAY_S), DAY_S, 0.0)
        await follow_settings(session, longer)
        rows = await session.run(
            Statement(
                "SELECT table_name, default_time_to_live FROM system_schema.tables "
                "WHERE keyspace_name = ?",
                (session.target.keyspace,),
            )
        )
        ttls = dict(rows)
        assert [ttls[layout.table] for layout in LAYOUTS.values()] == [
            20 * DAY_S,
            40 * DAY_S,
            800 * DAY_S,
        ]


# -------------------------------------------------------------------- migrations


async def test_replicas_that_start_at_once_on_a_new_keyspace_share_its_tables(
    cassandra: Cassandra,
) -> None:
    url = cassandra().url(new_keyspace())
    stores = await asyncio.gather(*(cassandra_stores(url) for _ in range(3)))
    try:
        for number, each in enumerate(stores):
            await each.rollups.commit(commit(0, 1, [(0, T0 + 5.0, 1.0, 1)], f"w{number}"))
        for each in stores:
            frame = await each.rollups.read(SERIES, T0, LATER, FINE, writer="", before=0)
            assert frame.count.sum() == 3
    finally:
        for each in stores:
            await each.close()


async def test_migrations_may_be_repeated_and_a_later_version_is_refused(
    cassandra: Cassandra,
) -> None:
    async with session_of(cassandra(), new_keyspace(), Session) as session:
        await migrate(session, SUBJECTS)
        await migrate(session, SUBJECTS)
        step = ("CREATE TABLE IF NOT EXISTS extra (name text PRIMARY KEY)",)
        more = {**SUBJECTS, "rules": (*SUBJECTS["rules"], step, step)}
        await migrate(session, more)
        await session.run(Statement("INSERT INTO extra (name) VALUES ('kept')"))
        await migrate(session, more)
        assert await session.run(Statement("SELECT name FROM extra WHERE name = 'kept'"))
        with pytest.raises(StoreError, match=r"rules .* version 3; this service knows 1"):
            await migrate(session, SUBJECTS)


# -------------------------------------------------------------------- interruptions


async def test_a_commit_interrupted_anywhere_and_repeated_with_more_counts_once(
    cassandra: Cassandra,
) -> None:
    first, more = some_samples(1), some_samples(2)
    async with empty_tables(cassandra(), Interrupted, max_in_flight=1) as session:
        needed = await _requests_of_a_commit(session, first)
    async with empty_tables(cassandra(), Interrupted, max_in_flight=1) as session:
        chance = random.Random(7)
        for left in sorted(chance.sample(range(needed), 6)):
            writer = f"writer-{left}"
            store = CassandraRollupStore(session, LIFETIMES)
            session.left = left
            with pytest.raises(StoreError, match="interrupted"):
                await store.commit(commit(0, 5, first, writer))
            session.left = 1 << 40
            store = CassandraRollupStore(session, LIFETIMES)
            assert (await store.checkpoint(writer)).position == 0
            await store.commit(commit(0, 9, [*first, *more], writer))
            checkpoint = await store.checkpoint(writer)
            assert checkpoint.position == 9
            assert checkpoint.marks["reporter-0"] == (b"9", T0)
        expected = reckoned(SERIES, [*first, *more] * 6)
        assert await read(store, FINE) == expected


async def test_an_old_attempt_that_arrives_late_changes_nothing(cassandra: Cassandra) -> None:
    async with empty_tables(cassandra(), Session) as session:
        store = CassandraRollupStore(session, LIFETIMES)
        samples = some_samples(3)
        await store.commit(commit(0, 9, samples))
        await store.commit(commit(0, 5, samples[:15]))
        assert await read(store, FINE) == reckoned(SERIES, samples)
        assert (await store.checkpoint("w")).position == 9


async def test_a_compaction_interrupted_anywhere_leaves_exact_rollups(
    cassandra: Cassandra,
) -> None:
    samples = some_samples(4)
    async with empty_tables(cassandra(), Interrupted, max_in_flight=1) as session:
        store = CassandraRollupStore(session, LIFETIMES)
        await store.commit(commit(0, 1, samples))
        done = 0
        for left in range(0, 400, 9):
            session.left = left
            try:
                done += await store.compact(LATER, "w", 1)
            except StoreError:
                session.left = 1 << 40
                await session.run(Statement("DELETE FROM leases WHERE name = 'compaction'"))
            session.left = 1 << 40
            for resolution in (MINUTE, HOUR):
                expected = reckoned(SERIES, samples, resolution.length_s)
                assert await read(store, resolution) == expected
            if done:
                break
        assert done


async def _requests_of_a_commit(session: Interrupted, samples: list[Sample]) -> int:
    before = session.left
    await CassandraRollupStore(session, LIFETIMES).commit(commit(0, 5, samples))
    return before - session.left


# -------------------------------------------------------------------- replicas


async def test_an_hour_waits_for_what_another_replica_is_still_committing(
    cassandra: Cassandra,
) -> None:
    async with empty_tables(cassandra(), Session) as session:
        mine = CassandraRollupStore(session, LIFETIMES)
        other = CassandraRollupStore(session, LIFETIMES)
        await mine.commit(commit(0, 1, some_samples(5), "mine"))
        await other.commit(commit(0, 1, some_samples(6), "other"))
        soon = T0 + 3 * 3_600.0
        assert await mine.compact(soon, "mine", 1) == 0
        assert await other.compact(soon, "other", 0) == 0
        assert await other.compact(soon, "other", 1) == 2
        assert await mine.compact(soon, "mine", 1) == 0
        both = [*some_samples(5), *some_samples(6)]
        assert await read(mine, MINUTE) == reckoned(SERIES, both, 60)


async def test_an_hour_does_not_wait_for_ever_for_a_replica_that_is_gone(
    cassandra: Cassandra,
) -> None:
    async with empty_tables(cassandra(), Session) as session:
        store = CassandraRollupStore(session, LIFETIMES)
        await store.commit(commit(0, 1, some_samples(5), "gone"))
        assert await store.compact(T0 + 7 * 3_600.0, "mine", 1) == 0
        assert await store.compact(T0 + 9 * 3_600.0, "mine", 1) == 2
        await store.commit(commit(0, 3, [*some_samples(5), (0, T0 + 9.0, 3.0, 1)], "gone"))
        expected = [*some_samples(5), (0, T0 + 9.0, 3.0, 1)]
        assert await read(store, HOUR) == reckoned(SERIES, expected, 3_600)
        assert await store.compact(T0 + 9 * 3_600.0, "mine", 1) == 2
        assert await read(store, HOUR) == reckoned(SERIES, expected, 3_600)


async def test_replicas_that_compact_at_once_leave_exact_rollups(cassandra: Cassandra) -> None:
    async with empty_tables(cassandra(), Session) as session:
        stores = [CassandraRollupStore(session, LIFETIMES) for _ in range(3)]
        for number, store in enumerate(stores):
            await store.commit(commit(0, 1, some_samples(number), f"w{number}"))
        for number, store in enumerate(stores):
            await store.compact(T0 + 100.0, f"w{number}", 1)
        await asyncio.gather(
            *(store.compact(LATER, f"w{number}", 1) for number, store in enumerate(stores))
        )
        samples = [each for number in range(3) for each in some_samples(number)]
        for resolution in RESOLUTIONS:
            expected = reckoned(SERIES, samples, resolution.length_s)
            assert await read(stores[0], resolution) == expected


# -------------------------------------------------------------------- connections


async def test_no_more_requests_are_on_their_way_than_are_allowed(cassandra: Cassandra) -> None:
    async with empty_tables(cassandra(), Session, max_in_flight=5) as session:
        statement = Statement("SELECT position FROM writers WHERE writer = ?", ("w",))
        seen: list[int] = []

        async def watch() -> None:
            while True:
                seen.append(session.in_flight)
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(session.run_all([statement] * 100) for _ in range(3)))
        watching.cancel()
        assert max(seen) == 5
        assert session.in_flight == session.waiting == 0


async def test_requests_are_sent_to_the_nodes_that_hold_their_rows(cassandra: Cassandra) -> None:
    async with empty_tables(cassandra(), Session) as session:
        store = CassandraRollupStore(session, LIFETIMES)
        await store.commit(commit(0, 1, some_samples(5)))
        await store.compact(LATER, "w", 1)
        await read(store, MINUTE)
        unrouted = {
            cql for cql, task in session._prepared.items() if not task.result().routing_key_indexes
        }
    assert {cql for cql in unrouted if "one = 0" not in cql and "VALUES (0," not in cql} == set()


async def test_a_list_longer_than_a_page_is_read_whole(cassandra: Cassandra) -> None:
    async with empty_tables(cassandra(), Session) as session:
        cql = "INSERT INTO hours (day, hour_s, writer, stamp) VALUES (1, ?, 'w', 1)"
        await session.run_all([Statement(cql, (n,)) for n in range(5_500)])
        rows = await session.run(Statement("SELECT hour_s FROM hours WHERE day = 1"))
        assert [hour for (hour,) in rows] == list(range(5_500))


async def test_connections_are_replaced_when_they_are_old_and_no_request_fails(
    cassandra: Cassandra,
) -> None:
    async with empty_tables(
        cassandra(), Session, max_lifetime_s=0.4, connections_per_host=2
    ) as session:
        statement = Statement("SELECT position FROM writers WHERE writer = ?", ("w",))
        while session.counts.recycled < 3:
            await session.run_all([statement] * 50)
        assert not session.counts.errors
        await eventually(lambda: session.connections == 2)


async def test_the_session_counts_what_it_does(cassandra: Cassandra) -> None:
    async with empty_tables(cassandra(), Session) as session:
        assert await Lease(session, "test", lasts_s=9).take()
        with pytest.raises(StoreError, match=r"refused the statement: .*nowhere does not exist"):
            await session.run(Statement("SELECT a FROM nowhere WHERE b = 1"))
        registry = CollectorRegistry()
        registry.register(CassandraCollector(session))
        text = generate_latest(registry).decode()
    for line in (
        "cassandra_connections 1.0",
        "cassandra_requests_in_flight 0.0",
        f'cassandra_node_up{{node="127.0.0.1:{cassandra().port}"}} 1.0',
        'cassandra_errors_total{kind="other"} 1.0',
        'cassandra_errors_total{kind="away"} 0.0',
        "cassandra_retries_total 0.0",
    ):
        assert line in text.splitlines(), text
    assert re.search(r'cassandra_request_seconds_count\{operation="conditional"\} [1-9]', text)
    assert re.search(r'cassandra_request_seconds_bucket\{le="\+Inf",operation="read"\} [1-9]', text)


async def test_a_keyspace_that_is_not_to_be_made_is_missed(cassandra: Cassandra) -> None:
    with pytest.raises(StoreError, match=r"has no keyspace test_.*create_keyspace"):
        await cassandra_stores(cassandra().url(new_keyspace()), create_keyspace=False)


async def test_copies_by_data_centre_make_the_keyspace(cassandra: Cassandra) -> None:
    keyspace = new_keyspace()
    replication = {"datacenter1": 1}
    async with session_of(cassandra(), keyspace, Session, replication=replication) as session:
        ((found,),) = await session.run(
            Statement(
                "SELECT replication FROM system_schema.keyspaces WHERE keyspace_name = ?",
                (keyspace,),
            )
        )
    assert found["class"].endswith("NetworkTopologyStrategy")
    assert found["datacenter1"] == "1"
