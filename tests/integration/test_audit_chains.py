"""Audit events of a running service: what was done to its SQLite file behind its back shows."""

import asyncio
import itertools
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.servers import running

from agent360.audit.v1 import audit_pb2 as pb
from agent360.client import AuditEvent, InvalidRequestError, Mesh, MeshError
from agent360.mesh.metrics.audit.chain import day_of, digest
from agent360.mesh.metrics.ports import AuditEvent as Stored
from agent360.mesh.metrics.ports import ChainKey, EventFilter, LogFilter, Position
from agent360.mesh.metrics.stores.sqlite import logs as sqlite_logs
from agent360.mesh.metrics.stores.sqlite import open_sqlite
from agent360.mesh.metrics.stores.sqlite.events import list_statement
from agent360.mesh.runtime.policies.authentication import hash_key

REMOVED, CHANGED = pb.CHAIN_FAULT_REMOVED, pb.CHAIN_FAULT_CHANGED
INSERTED, DETACHED = pb.CHAIN_FAULT_INSERTED, pb.CHAIN_FAULT_DETACHED


@asynccontextmanager
async def recorded(path: Path, count: int = 30, **settings: Any) -> AsyncIterator[Mesh]:
    """A service on a file to which a tenant's events were recorded."""
    async with (
        running("metrics", store=f"sqlite:///{path}", **settings) as server,
        Mesh.connect(metrics=server.address, tenant="acme", api_key="") as mesh,
    ):
        for number in range(count):
            await mesh.audit.record(AuditEvent("plans.approve", f"plans/{number}", actor="ana"))
        yield mesh


async def checked(mesh: Mesh, tenant: str | None = None, **options: Any) -> list[Any]:
    return [each async for each in mesh.audit.verify(tenant=tenant, **options)]


def forge(db: sqlite3.Connection, statement: str, *values: Any) -> None:
    assert db.execute(statement, values).rowcount > 0


def insert_after(db: sqlite3.Connection, tenant: str, sequence: int) -> None:
    """A row that follows the one before it as it should."""
    row = db.execute(
        "SELECT day, writer, hash FROM audit_events WHERE tenant = 'acme' AND sequence = ?",
        (sequence,),
    ).fetchone()
    event = Stored(tenant, str(uuid.uuid4()), 1, "eve", "plans.approve", "plans/x", b"")
    key = ChainKey(tenant, row[0], row[1])
    own = digest(row[2], key, sequence + 1, event)
    db.execute(
        "INSERT INTO audit_events (tenant, day, writer, sequence, previous, hash, id, time, actor, "
        "action, resource, body) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*key, sequence + 1, row[2], own, *event[1:]),
    )


FORGERIES: dict[str, tuple[Callable[[sqlite3.Connection], object], int, int]] = {
    "an actor is another": (
        lambda db: forge(db, "UPDATE audit_events SET actor = 'eve' WHERE sequence = 7"),
        CHANGED,
        7,
    ),
    "a body is another": (
        lambda db: forge(db, "UPDATE audit_events SET body = body || x'00' WHERE sequence = 1"),
        CHANGED,
        1,
    ),
    "an action is no text": (
        lambda db: forge(db, "UPDATE audit_events SET action = x'ff00' WHERE sequence = 3"),
        CHANGED,
        3,
    ),
    "a time is another": (
        lambda db: forge(db, "UPDATE audit_events SET time = time + 1 WHERE sequence = 30"),
        CHANGED,
        30,
    ),
    "one is gone": (
        lambda db: forge(db, "DELETE FROM audit_events WHERE sequence = 12"),
        REMOVED,
        12,
    ),
    "the last is gone": (
        lambda db: forge(db, "DELETE FROM audit_events WHERE sequence = 30"),
        REMOVED,
        30,
    ),
    "the last is gone, with its trace in the head": (
        lambda db: [
            forge(db, "DELETE FROM audit_events WHERE sequence = 30"),
            forge(db, "UPDATE audit_heads SET sequence = 29"),
        ],
        CHANGED,
        29,
    ),
    "all are gone": (lambda db: forge(db, "DELETE FROM audit_events"), REMOVED, 1),
    "two changed places": (
        lambda db: [
            forge(db, "UPDATE audit_events SET sequence = 99 WHERE sequence = 5"),
            forge(db, "UPDATE audit_events SET sequence = 5 WHERE sequence = 6"),
            forge(db, "UPDATE audit_events SET sequence = 6 WHERE sequence = 99"),
        ],
        CHANGED,
        5,
    ),
    "one moved up after another went": (
        lambda db: [
            forge(db, "DELETE FROM audit_events WHERE sequence = 5"),
            forge(db, "UPDATE audit_events SET sequence = 5 WHERE sequence = 6"),
        ],
        CHANGED,
        5,
    ),
    "one was added": (lambda db: insert_after(db, "acme", 30), INSERTED, 31),
    "the head is gone": (lambda db: forge(db, "DELETE FROM audit_heads"), INSERTED, 1),
}


@pytest.mark.parametrize("name", FORGERIES)
async def test_verify_tells_what_is_wrong_and_where(tmp_path: Path, name: str) -> None:
    forgery, fault, sequence = FORGERIES[name]
    async with recorded(tmp_path / "m.db") as mesh:
        (sound,) = await checked(mesh)
        assert (sound.fault, sound.description, sound.head.sequence) == (0, "", 30)
        with sqlite3.connect(tmp_path / "m.db") as db:
            forgery(db)
        (found,) = await checked(mesh)
        assert (found.fault, found.sequence) == (fault, sequence)
        assert found.description
        assert found.head.sequence <= sequence or fault == INSERTED
        assert found.head.tenant == "acme"


async def test_a_chain_made_up_for_another_tenant_shows_as_inserted(tmp_path: Path) -> None:
    async with recorded(tmp_path / "m.db", 3) as mesh:
        with sqlite3.connect(tmp_path / "m.db") as db:
            insert_after(db, "globex", 1)
        assert [each.fault for each in await checked(mesh)] == [0]
        found = {each.head.tenant: each.fault for each in await checked(mesh, "*")}
        assert found.keys() == {"acme", "globex"}
        assert found["acme"] == 0
        assert found["globex"] in (REMOVED, INSERTED)


async def test_a_chain_that_was_written_anew_does_not_lead_through_an_anchor(
    tmp_path: Path,
) -> None:
    async with recorded(tmp_path / "m.db", 5) as mesh:
        anchors = [each.head for each in await checked(mesh)]
        await mesh.audit.record(AuditEvent("plans.approve", "plans/5"))
        assert [each.fault for each in await checked(mesh, anchors=anchors)] == [0]
        with sqlite3.connect(tmp_path / "m.db") as db:
            db.row_factory = sqlite3.Row
            previous = bytes(32)
            for row in db.execute("SELECT * FROM audit_events ORDER BY sequence").fetchall():
                event = Stored(
                    "acme", row["id"], row["time"], "eve", row["action"], row["resource"], b""
                )
                key = ChainKey("acme", row["day"], row["writer"])
                own = digest(previous, key, row["sequence"], event)
                db.execute(
                    "UPDATE audit_events SET actor = 'eve', body = x'', previous = ?, hash = ? "
                    "WHERE sequence = ?",
                    (previous, own, row["sequence"]),
                )
                previous = own
            db.execute("UPDATE audit_heads SET hash = ?", (previous,))
        assert [each.fault for each in await checked(mesh)] == [0]
        (found,) = await checked(mesh, anchors=anchors)
        assert (found.fault, found.sequence) == (DETACHED, 5)
        with sqlite3.connect(tmp_path / "m.db") as db:
            db.execute("DELETE FROM audit_events")
            db.execute("DELETE FROM audit_heads")
        assert await checked(mesh) == []
        assert [each.fault for each in await checked(mesh, anchors=anchors)] == [REMOVED]


async def test_the_service_goes_on_after_a_row_in_its_way_and_verify_still_finds_it(
    tmp_path: Path,
) -> None:
    async with recorded(tmp_path / "m.db", 5) as mesh:
        with sqlite3.connect(tmp_path / "m.db") as db:
            insert_after(db, "acme", 5)
            forge(db, "UPDATE audit_events SET actor = 'mallory' WHERE sequence = 6")
        await mesh.audit.record(AuditEvent("plans.approve", "plans/after"))
        listed = [each async for each in mesh.audit.list_events(resource="plans/after")]
        assert [each.place.sequence for each in listed] == [7]
        (found,) = await checked(mesh)
        assert (found.fault, found.sequence) == (CHANGED, 6)


async def test_a_restarted_service_continues_its_chain(tmp_path: Path) -> None:
    for _ in range(3):
        async with recorded(tmp_path / "m.db", 4) as mesh:
            found = await checked(mesh)
    assert [(each.fault, each.head.sequence) for each in found] == [(0, 12)]


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(
    "chosen", list(itertools.product((0, 1), repeat=5)), ids=lambda each: "".join(map(str, each))
)
def test_every_list_of_events_is_a_search_of_one_index_in_its_order(
    tmp_path: Path, chosen: tuple[int, ...], paged: bool
) -> None:
    actor, action, resource, start, end = chosen
    wanted = EventFilter(
        "acme",
        5 if start else None,
        9 if end else None,
        "a" * actor,
        "b" * action,
        "c" * resource,
    )
    statement = list_statement(wanted, Position(7, "x") if paged else None, 100)
    plan = explained(tmp_path, *statement)
    best = "resource" if resource else "actor" if actor else "action" if action else "time"
    (step,) = plan
    assert step.startswith(f"SEARCH audit_events USING INDEX audit_by_{best} (tenant=?")
    assert ("time" in step.partition("(")[2]) == bool(start or end or paged)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(
    "chosen", list(itertools.product((0, 1), repeat=4)), ids=lambda each: "".join(map(str, each))
)
def test_every_list_of_log_records_reads_one_index_in_its_order(
    tmp_path: Path, chosen: tuple[int, ...], paged: bool
) -> None:
    tenant, service, trace, times = chosen
    wanted = LogFilter(
        "acme" if tenant else None,
        5 if times else None,
        9 if times else None,
        30,
        "cache" * service,
        "any",
        "f" * trace,
    )
    statement = sqlite_logs.list_statement(0, wanted, Position(7, "x") if paged else None, 100)
    (step,) = explained(tmp_path, *statement)
    narrowed = tenant or service or trace or times or paged
    assert step.startswith("SEARCH" if narrowed else "SCAN")
    assert "TEMP B-TREE" not in step
    index = {(1, 1): "by_tenant_service", (1, 0): "by_tenant", (0, 1): "by_service"}
    if trace or tenant or service:
        name = "by_trace" if trace else index[tenant, service]
        assert f"USING INDEX logs_19700101_{name} (" in step


def explained(directory: Path, sql: str, values: Any) -> list[str]:
    path = directory / "plan.db"
    stores = open_sqlite(str(path))
    with sqlite3.connect(path) as db:
        sqlite_logs._ensure(db, 0)
        steps = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
    asyncio.run(stores.close())
    return steps


async def test_one_id_makes_one_event_however_often_and_at_once_it_is_sent(
    tmp_path: Path,
) -> None:
    async with recorded(tmp_path / "m.db", 1) as mesh:
        events = [
            AuditEvent("plans.drop", f"plans/{n}", event_id=str(uuid.UUID(int=n % 10)))
            for n in range(200)
        ]
        ids = await asyncio.gather(*(mesh.audit.record(each) for each in events))
        assert set(ids) == {str(uuid.UUID(int=n)) for n in range(10)}
        listed = [each.event_id async for each in mesh.audit.list_events(action="plans.drop")]
        assert sorted(listed) == sorted(set(ids))
        await mesh.audit.record(events[3], tenant="globex")
        assert len([each async for each in mesh.audit.list_events(tenant="globex")]) == 1
        assert [each.fault for each in await checked(mesh, "*")] == [0, 0]


async def test_secrets_never_reach_the_file(tmp_path: Path) -> None:
    secret = "hunter2-" + uuid.uuid4().hex
    names = ("*password*", "ssn", "token", "*_token", "*authorization*")
    async with recorded(tmp_path / "m.db", 0, redaction={"names": names}) as mesh:
        await mesh.audit.record(
            AuditEvent(
                "logins.create",
                f"logins/7?next=/home&access_token={secret}&page=2",
                actor="ana",
                attributes={
                    "Password": secret,
                    "ssn": secret,
                    "Authorization": f"Bearer {secret}",
                    "header": f"authorization: Bearer {secret}",
                    "origin": f"https://ana:{secret}@example.org/x",
                    "tokens": "120",
                },
            )
        )
        (event,) = [each async for each in mesh.audit.list_events()]
    assert event.resource == "logins/7?next=/home&access_token=[redacted]&page=2"
    assert event.attributes["Password"] == event.attributes["ssn"] == "[redacted]"
    assert event.attributes["tokens"] == "120"
    assert event.attributes["origin"] == "https://ana:[redacted]@example.org/x"
    assert_nowhere(secret, tmp_path)


def assert_nowhere(secret: str, directory: Path) -> None:
    files = [file for file in directory.rglob("*") if file.is_file()]
    assert files
    for file in files:
        assert secret.encode() not in file.read_bytes()


async def test_days_past_their_retention_go_whole_and_the_rest_verifies(tmp_path: Path) -> None:
    async with recorded(tmp_path / "m.db", 3):
        pass
    with sqlite3.connect(tmp_path / "m.db") as db:
        assert db.execute("SELECT count(*) FROM audit_events").fetchone() == (3,)
    stores = open_sqlite(str(tmp_path / "m.db"))
    today = day_of(time.time())
    assert await stores.events.drop_days(today) == 0
    assert await stores.events.drop_days(today + 2) == 1
    await stores.close()
    with sqlite3.connect(tmp_path / "m.db") as db:
        assert db.execute("SELECT count(*) FROM audit_events").fetchone() == (0,)
        assert db.execute("SELECT count(*) FROM audit_heads").fetchone() == (0,)


async def test_what_events_may_be_asked_for(tmp_path: Path) -> None:
    keys = [
        {"name": "a", "sha256": hash_key("ka"), "tenants": ["acme"]},
        {"name": "root", "sha256": hash_key("kr"), "tenants": ["*"], "admin": True},
    ]
    async with (
        running(
            "metrics", store=f"sqlite:///{tmp_path}/m.db", authentication={"keys": keys}
        ) as server,
        Mesh.connect(metrics=server.address, api_key="ka") as acme,
        Mesh.connect(metrics=server.address, api_key="kr") as root,
    ):
        await acme.audit.record(AuditEvent("a", "b"))
        await root.audit.record(AuditEvent("a", "b"), tenant="globex")
        assert [each.head.tenant for each in await checked(acme)] == ["acme"]
        assert [each.head.tenant for each in await checked(root, "*")] == ["acme", "globex"]
        with pytest.raises(MeshError) as refused:
            await checked(acme, "*")
        assert refused.value.reason in ("ADMIN_ONLY", "TENANT_NOT_ALLOWED")
        with pytest.raises(MeshError) as refused:
            await checked(acme, "globex")
        assert refused.value.reason == "TENANT_NOT_ALLOWED"
        with pytest.raises(InvalidRequestError):
            await checked(
                acme, first_day=datetime.now(UTC).date(), last_day=datetime(2020, 1, 1, tzinfo=UTC)
            )
        tomorrow = datetime.now(UTC).date() + timedelta(days=2)
        assert await checked(acme, first_day=tomorrow, last_day=tomorrow) == []


async def test_100_000_events_of_50_tenants_are_paged_and_verified_while_writes_go_on(
    tmp_path: Path,
) -> None:
    tenants = [f"tenant-{number:02}" for number in range(50)]
    each_has = 2_000
    path = tmp_path / "m.db"
    async with (
        running("metrics", store=f"sqlite:///{path}") as server,
        Mesh.connect(metrics=server.address, tenant="acme", api_key="") as mesh,
    ):
        written: dict[str, set[str]] = {tenant: set() for tenant in tenants}

        async def write(tenant: str, start: int, stop: int) -> None:
            for number in range(start, stop):
                event = AuditEvent(
                    f"plans.{('approve', 'drop')[number % 2]}",
                    f"plans/{number % 100}",
                    actor=f"actor-{number % 10}",
                )
                written[tenant].add(await mesh.audit.record(event, timeout=50.0, tenant=tenant))

        half = each_has // 2
        step = half // 20
        async with asyncio.TaskGroup() as group:
            for tenant in tenants:
                for part in range(20):
                    group.create_task(write(tenant, part * step, (part + 1) * step))

        async with asyncio.TaskGroup() as group:
            before = {tenant: set(ids) for tenant, ids in written.items()}
            seen: dict[str, set[str]] = {}
            writers = [
                group.create_task(write(tenant, half + part * step, half + (part + 1) * step))
                for tenant in tenants
                for part in range(20)
            ]
            for tenant in tenants[:3]:
                listed = [
                    each.event_id
                    async for each in mesh.audit.list_events(
                        tenant=tenant, page_size=100, fields=["event_id"]
                    )
                ]
                assert len(listed) == len(set(listed)), "an event is on two pages"
                assert before[tenant] <= set(listed), "an event is missing"
                seen[tenant] = set(listed)
            assert not all(each.done() for each in writers), "the writes were over too early"

        assert all(ids <= written[tenant] for tenant, ids in seen.items())
        for tenant in tenants[3::7]:
            listed = [
                each.event_id
                async for each in mesh.audit.list_events(tenant=tenant, page_size=1_000)
            ]
            assert len(listed) == each_has
            assert set(listed) == written[tenant]
        found = [each async for each in mesh.audit.list_events(tenant=tenants[9], actor="actor-4")]
        assert len(found) == each_has // 10
        assert {each.actor for each in found} == {"actor-4"}

        with sqlite3.connect(path) as db:
            forge(
                db,
                "UPDATE audit_events SET resource = 'plans/0' "
                "WHERE tenant = 'tenant-31' AND sequence = 1234",
            )
        chains = await checked(mesh, "*")
        sound = [each.head for each in chains if not each.fault]
        assert {each.tenant for each in sound} == {*tenants} - {"tenant-31"}
        assert sum(each.sequence for each in sound) == 49 * each_has
        assert [(each.head.tenant, each.fault, each.sequence) for each in chains if each.fault] == [
            ("tenant-31", CHANGED, 1_234)
        ]

        page = await first_page(mesh, tenants[0])
        with pytest.raises(InvalidRequestError) as refused:
            await first_page(mesh, tenants[1], page.next_page_token)
        assert [each.field for each in refused.value.violations] == ["page_token"]


async def first_page(mesh: Mesh, tenant: str, token: str = "") -> Any:
    return await mesh._coalescers[3].unary(
        "ListEvents",
        pb.ListEventsRequest(page_token=token),
        pb.ListEventsResponse,
        tenant=tenant,
    )


async def test_an_event_says_when_it_was_recorded_and_its_place(tmp_path: Path) -> None:
    async with recorded(tmp_path / "m.db", 2) as mesh:
        done = datetime.now(UTC) - timedelta(hours=3)
        await mesh.audit.record(AuditEvent("plans.import", "plans/9", time=done))
        early = datetime.now(UTC) + timedelta(hours=1)
        with pytest.raises(InvalidRequestError) as refused:
            await mesh.audit.record(AuditEvent("plans.import", "plans/9", time=early))
        assert [each.field for each in refused.value.violations] == ["event.event_time"]
        newest, older, oldest = [each async for each in mesh.audit.list_events()]
        assert oldest.action == "plans.import"
        assert oldest.event_time.ToDatetime(UTC) == done
        assert oldest.record_time.ToDatetime(UTC) > done + timedelta(hours=2)
        assert [each.place.sequence for each in (older, newest, oldest)] == [1, 2, 3]
        assert oldest.place.previous_hash == newest.place.hash
        assert oldest.place.day == f"{datetime.now(UTC):%Y-%m-%d}"
