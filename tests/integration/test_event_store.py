"""The ports ``EventStore`` and ``LogStore`` on real stores."""

import itertools

import pytest
from support.audit_events import TODAY, append, event

from agent360.mesh.metrics.audit.verifying import Verifier
from agent360.mesh.metrics.ports import (
    AuditEvent,
    ChainKey,
    EventFilter,
    EventStore,
    LogFilter,
    LogRecord,
    LogStore,
    Position,
    Stores,
)

ANY = EventFilter("acme", None, None, "", "", "")
DAY_US = 86_400_000_000
NOON_US = 20_000 * DAY_US + DAY_US // 2


@pytest.fixture
def events(stores: Stores) -> EventStore:
    return stores.events


@pytest.fixture
def logs(stores: Stores) -> LogStore:
    return stores.logs


async def listed(
    store: EventStore, wanted: EventFilter, limit: int = 7
) -> tuple[list[AuditEvent], int]:
    """All that a filter finds, and how many pages it took."""
    found: list[AuditEvent] = []
    before: Position | None = None
    for count in itertools.count(1):
        page = await store.events(wanted, before, limit)
        assert len(page.events) <= limit
        found += [row.event for row in page.events]
        if page.resume is None:
            return found, count
        before = page.resume
    raise AssertionError("unreachable")


async def test_every_combination_of_conditions_finds_what_meets_all_of_them(
    events: EventStore,
) -> None:
    recorded = [event(number) for number in range(120)]
    await append(events, recorded)
    await append(events, [event(number, "globex") for number in range(120)])
    start, end = recorded[20].time_us, recorded[111].time_us
    for actor, action, resource, first, last in itertools.product(
        ("", "actor-1"), ("", "plans.2"), ("", "plans/3"), (None, start), (None, end)
    ):
        wanted = EventFilter("acme", first, last, actor, action, resource)
        meeting = [
            each
            for each in reversed(recorded)
            if (first is None or each.time_us >= first)
            and (last is None or each.time_us < last)
            and actor in ("", each.actor)
            and action in ("", each.action)
            and resource in ("", each.resource)
        ]
        found, _ = await listed(events, wanted)
        assert found == meeting, wanted


async def test_events_of_the_same_time_are_paged_by_their_ids(events: EventStore) -> None:
    recorded = [event(number)._replace(time_us=1_700_000_000_000_000) for number in range(25)]
    await append(events, recorded[::2])
    await append(events, recorded[1::2], writer="another")
    found, pages = await listed(events, ANY)
    assert found == recorded[::-1]
    assert pages == 4


async def test_ids_are_known_to_their_tenant_alone(events: EventStore) -> None:
    await append(events, [event(1), event(2)])
    asked = [("acme", "acme-000001"), ("globex", "acme-000001"), ("acme", "acme-000003")]
    assert await events.known(asked) == {("acme", "acme-000001")}


async def test_an_append_that_is_repeated_changes_nothing_or_says_so(events: EventStore) -> None:
    head = await append(events, [event(1), event(2)])
    head_2 = await append(events, [event(3)])
    assert (await events.heads(["acme", "globex"], "w")) == {"acme": head_2}
    assert (head.sequence, head_2.sequence, head_2.chain) == (2, 3, head.chain)
    rows = await events.chain(head.chain, 1, 10)
    assert [row.sequence for row in rows] == [2, 3]
    assert rows[1].previous == rows[0].hash == head.hash
    assert rows[1].event == event(3)


async def test_chains_are_listed_by_tenant_and_days_in_pages(events: EventStore) -> None:
    keys = [
        ChainKey(tenant, day, writer)
        for tenant in ("acme", "globex")
        for day in (TODAY, TODAY + 1, TODAY + 5)
        for writer in ("a", "b")
    ]
    heads = {}
    for number, key in enumerate(keys):
        heads[key] = await append(
            events, [event(number, key.tenant)], writer=key.writer, day=key.day
        )
    assert dict(await events.chains(None, 0, TODAY + 9, None, 100)) == heads
    found = await events.chains("globex", TODAY + 1, TODAY + 4, None, 100)
    assert [key for key, _ in found] == keys[8:10]
    paged: list[ChainKey] = []
    while page := await events.chains(None, TODAY, TODAY + 9, paged[-1] if paged else None, 5):
        paged += [key for key, _ in page]
    assert paged == keys


async def test_days_that_follow_each_other_verify_also_once_the_first_is_dropped(
    events: EventStore,
) -> None:
    for day in range(4):
        await append(events, [event(10 * day + n) for n in range(3)], day=TODAY + day)
    assert await faults(events) == []
    await events.drop_days(TODAY + 2)
    left = [key.day for key, _ in await events.chains("acme", 0, TODAY + 9, None, 10)]
    assert left in ([TODAY + 2, TODAY + 3], [TODAY, TODAY + 1, TODAY + 2, TODAY + 3])
    assert await faults(events) == []


async def faults(events: EventStore) -> list[str]:
    return [
        each.description
        async for each in Verifier(events).verify(None, 0, TODAY + 99, {})
        if each.fault is not None
    ]


# ---------------------------------------------------------------- logs


def record(number: int, tenant: str = "acme", **columns: str) -> LogRecord:
    return LogRecord(
        tenant,
        f"{tenant}-{number:06}",
        NOON_US + number * 3_600_000_000,
        (20, 30, 40)[number % 3],
        columns.get("service", ("inference", "cache")[number % 2]),
        f"pattern {number % 5}",
        f"{number % 4:032x}" if number % 4 else "",
        f"body {number}".encode(),
    )


async def test_every_combination_of_conditions_finds_the_records_that_meet_all(
    logs: LogStore,
) -> None:
    written = [record(n, ("acme", "globex")[n % 7 == 0]) for n in range(72)]
    await logs.write(written[:50], 40 * 86_400.0)
    await logs.write(written[40:], 40 * 86_400.0)
    for tenant, (first, last), level, service, pattern, trace_id in itertools.product(
        (None, "acme"),
        ((None, None), (written[10].time_us, written[60].time_us)),
        (0, 30),
        ("", "cache"),
        ("", "pattern 3"),
        ("", f"{3:032x}"),
    ):
        wanted = LogFilter(tenant, first, last, level, service, pattern, trace_id)
        meeting = [
            each
            for number, each in reversed(list(enumerate(written)))
            if tenant in (None, each.tenant)
            and (first is None or 10 <= number < 60)
            and level <= each.level
            and service in ("", each.service)
            and pattern in ("", each.pattern)
            and trace_id in ("", each.trace_id)
        ]
        assert await matching(logs, wanted) == meeting, wanted


async def matching(logs: LogStore, wanted: LogFilter) -> list[LogRecord]:
    """All that a filter finds, page by page."""
    found: list[LogRecord] = []
    before: Position | None = None
    while True:
        page = await logs.records(wanted, before, 6)
        found += page.records
        if page.resume is None:
            return found
        before = page.resume
