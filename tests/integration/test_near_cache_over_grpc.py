"""The near cache against a real service: what is near is true, and is the caller's own."""

import asyncio
import gc
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from support.polling import eventually
from support.servers import NOBODY, running

from agent360.client import (
    Entry,
    Lookup,
    Mesh,
    MeshError,
    NearCache,
    Outcome,
    UnavailableError,
    call_scope,
)
from agent360.client.near import NearStats
from agent360.mesh.runtime.server import Server

LEFT_BEHIND = ("was destroyed but it is pending", "was never retrieved", "was never awaited")

PROMPT = NearCache(replica_lag=0.0)
"""A near cache for a service of one replica, which has no others to hear from."""


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running("cache") as server:
        yield server


@pytest.fixture
async def near(server: Server) -> AsyncIterator[Mesh]:
    """A client with a near cache whose watch is live."""
    async with connected(server) as mesh:
        yield mesh


@pytest.fixture
async def other(server: Server) -> AsyncIterator[Mesh]:
    """A client without one, as in another process."""
    async with Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh:
        yield mesh


@asynccontextmanager
async def connected(server: Server, options: NearCache = PROMPT) -> AsyncIterator[Mesh]:
    async with Mesh.connect(
        cache=server.address, tenant="acme", api_key="", near_cache=options
    ) as mesh:
        await mesh.cache.get("first")
        await live(mesh)
        yield mesh


async def live(mesh: Mesh, tenant: str = "acme") -> None:
    """Waits until the watch of a tenant is live."""
    near = mesh.cache._near
    assert near is not None
    await eventually(
        lambda: tenant in near._tenants and near.now() < near._tenants[tenant].trusted_until
    )


async def get_twice(mesh: Mesh, key: str, **more: object) -> tuple[Lookup, bool]:
    """The second of two lookups, and whether it was answered near."""
    await mesh.cache.get(key, **more)  # type: ignore[arg-type]
    before = mesh.cache.near_stats.hits
    found = await mesh.cache.get(key, **more)  # type: ignore[arg-type]
    return found, mesh.cache.near_stats.hits > before


def value_of(found: Lookup | MeshError) -> bytes:
    assert isinstance(found, Lookup)
    return found.value


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(5):
        while not await condition():  # noqa: ASYNC110 - every look is a call of its own
            await asyncio.sleep(0.005)


async def test_what_was_read_before_is_answered_near_with_what_remains_of_its_ttl(
    near: Mesh, other: Mesh
) -> None:
    await other.cache.set("k", b"v", ttl=100, content_type="text/plain", tags=["x"])
    first = await near.cache.get("k")
    found = await near.cache.get("k")
    assert (found.outcome, found.value, found.content_type) == (Outcome.HIT, b"v", "text/plain")
    assert found.version == first.version
    assert 90 < found.ttl_s <= first.ttl_s
    stats = near.cache.near_stats
    assert (stats.hits, stats.misses, stats.stored, stats.entries) == (1, 2, 1, 1)
    assert stats.bytes > 1


async def test_tags_are_given_to_those_who_asked_alone(near: Mesh, other: Mesh) -> None:
    await other.cache.set("k", b"v", tags=["x", "y"])
    assert (await near.cache.get("k")).tags == ()
    assert (await near.cache.get("k")).tags == ()
    assert (await near.cache.get("k", include_tags=True)).tags == ("x", "y")
    assert near.cache.near_stats.hits == 2


async def test_an_empty_value_is_a_hit_near_too(near: Mesh) -> None:
    await near.cache.set("k", b"")
    found, was_near = await get_twice(near, "k")
    assert was_near
    assert found.hit
    assert found.value == b""


async def test_a_miss_and_a_stale_value_are_asked_for_each_time(near: Mesh) -> None:
    assert (await get_twice(near, "gone"))[1] is False
    await near.cache.set("k", b"v", ttl=0.01, stale_ttl=60)

    async def is_stale() -> bool:
        return (await near.cache.get("k", allow_stale=True)).outcome is Outcome.STALE

    await until(is_stale)
    found, was_near = await get_twice(near, "k", allow_stale=True)
    assert found.outcome is Outcome.STALE
    assert not was_near


async def test_a_copy_ends_with_its_entry(near: Mesh) -> None:
    await near.cache.set("k", b"v", ttl=0.2)
    await get_twice(near, "k")

    async def is_gone() -> bool:
        return not (await near.cache.get("k")).hit

    await until(is_gone)
    assert near.cache.near_stats.entries == 0
    assert near.cache.near_stats.expired == 1


@pytest.mark.parametrize("how", ["set", "delete", "fill", "keys", "prefix", "tags", "all", "many"])
async def test_a_caller_reads_its_own_writes(near: Mesh, how: str) -> None:
    cache = near.cache
    for round_ in range(30):
        await cache.set("k", b"old", tags=["x"])
        await get_twice(near, "k")
        new: bytes | None = b"%d" % round_
        if how == "set":
            await cache.set("k", new or b"")
        elif how == "many":
            await cache.set_many([Entry("a", b""), Entry("k", new or b"")])
        elif how == "delete":
            await cache.delete("k")
            new = None
        elif how == "fill":
            await cache.delete("k")
            token = (await cache.claim("k")).fill_token
            await cache.fill(token, "k", new or b"")
        else:
            scope = {"keys": {"keys": ["k"]}, "prefix": {"prefix": "k"}, "tags": {"tags": ["x"]}}
            await cache.invalidate(**scope.get(how, {}))  # type: ignore[arg-type]
            new = None
        for _ in range(3):
            found = await cache.get("k")
            assert (found.value if found.hit else None) == new


@pytest.mark.parametrize("how", ["set", "delete", "keys", "prefix", "tags", "all"])
async def test_anothers_change_reaches_the_copies(near: Mesh, other: Mesh, how: str) -> None:
    await other.cache.set("k", b"old", tags=["x"])
    await get_twice(near, "k")
    assert near.cache.near_stats.entries == 1
    if how == "set":
        await other.cache.set("k", b"new")
    elif how == "delete":
        await other.cache.delete("k")
    else:
        scope = {"keys": {"keys": ["k"]}, "prefix": {"prefix": "k"}, "tags": {"tags": ["x"]}}
        await other.cache.invalidate(**scope.get(how, {}))  # type: ignore[arg-type]
    await eventually(lambda: near.cache.near_stats.invalidated == 1)
    found = await near.cache.get("k")
    assert found.value == (b"new" if how == "set" else b"")


async def test_an_invalidation_by_tag_spares_entries_without_the_tag(
    near: Mesh, other: Mesh
) -> None:
    await other.cache.set("a", b"", tags=["x"])
    await other.cache.set("b", b"", tags=["y"])
    await near.cache.get_many(["a", "b"])
    await other.cache.invalidate(tags=["x"])
    await eventually(lambda: near.cache.near_stats.invalidated == 1)
    assert (await get_twice(near, "b"))[1]


async def test_what_a_claim_finds_is_kept_and_falls_with_any_tag(near: Mesh, other: Mesh) -> None:
    await other.cache.set("k", b"v", tags=["x"])
    await near.cache.claim("k")
    claim = await near.cache.claim("k")
    assert (claim.lookup.value, claim.fill_token) == (b"v", "")
    assert near.cache.near_stats.hits == 1
    assert (await near.cache.get("k", include_tags=True)).tags == ("x",)
    await other.cache.invalidate(tags=["z"])
    assert (await get_twice(near, "k"))[0].value == b"v"
    await other.cache.invalidate(tags=["x"])
    await eventually(lambda: near.cache.near_stats.entries == 0)


async def test_many_lookups_come_in_order_whether_near_or_not(server: Server, other: Mesh) -> None:
    keys = [f"k{n}" for n in range(6_000)]
    values = {key: key.encode() for key in keys if key != "k7"}
    await other.cache.set_many(Entry(key, value) for key, value in values.items())
    async with connected(server) as near:
        await near.cache.get_many(keys[::3])
        before = near.cache.near_stats
        assert before.stored == 2_000
        found = await near.cache.get_many(keys)
        assert [value_of(each) for each in found] == [values.get(key, b"") for key in keys]
        stats = near.cache.near_stats
        assert stats.hits - before.hits == 2_000
        assert stats.misses - before.misses == 4_000
        seen = {index: value_of(each) async for index, each in near.cache.get_many(keys)}
        assert seen == {index: values.get(key, b"") for index, key in enumerate(keys)}
        assert near.cache.near_stats.hits - stats.hits == 5_999


async def test_endless_lookups_that_are_all_near_are_handed_out(near: Mesh) -> None:
    await near.cache.set("k", b"v")
    await get_twice(near, "k")

    seen = 0
    async for _, each in near.cache.get_many(itertools.repeat("k")):
        assert isinstance(each, Lookup)
        seen += 1
        if seen == 20_000:
            break
    assert near.cache.near_stats.hits >= 20_000


async def test_copies_are_of_the_tenant_of_the_scope(near: Mesh, other: Mesh) -> None:
    await other.cache.set("k", b"of acme")
    await other.cache.set("k", b"of globex", tenant="globex")
    for _ in range(3):
        assert (await near.cache.get("k")).value == b"of acme"
        with call_scope(tenant="globex"):
            assert (await near.cache.get("k")).value == b"of globex"
            await live(near, "globex")
        assert (await near.cache.get("k", tenant="globex")).value == b"of globex"
    await other.cache.invalidate(tenant="globex")
    await eventually(lambda: near.cache.near_stats.invalidated == 1)
    assert (await get_twice(near, "k"))[1]
    assert not (await near.cache.get("k", tenant="globex")).hit


async def test_only_the_named_namespaces_are_kept_near(server: Server) -> None:
    options = NearCache(replica_lag=0.0, namespaces=("plans",))
    async with Mesh.connect(
        cache=server.address, tenant="acme", api_key="", near_cache=options
    ) as mesh:
        await mesh.cache.set("k", b"v")
        assert (await get_twice(mesh, "k"))[1] is False
        assert mesh.cache.near_stats == NearStats()
        await mesh.cache.set("k", b"v", namespace="plans")
        await mesh.cache.get("k", namespace="plans")
        await live(mesh)
        assert (await get_twice(mesh, "k", namespace="plans"))[1]


async def test_the_tenant_that_was_not_asked_for_the_longest_gives_way(server: Server) -> None:
    async with connected(server, NearCache(replica_lag=0.0, max_tenants=2)) as mesh:
        for tenant in ("acme", "b"):
            await mesh.cache.set("k", b"v", tenant=tenant)
            await mesh.cache.get("k", tenant=tenant)
            await live(mesh, tenant)
            await get_twice(mesh, "k", tenant=tenant)
        assert mesh.cache.near_stats.entries == 2
        near = mesh.cache._near
        assert near is not None

        async def moved_in() -> bool:
            # A watch that is in use is not closed: acme's is, c takes the place of b.
            await mesh.cache.get("k")
            await mesh.cache.get("k", tenant="c")
            return "c" in near._tenants

        await until(moved_in)
        assert sorted(near._tenants) == ["acme", "c"]
        assert mesh.cache.near_stats.entries == 1
        service = server._servicer._service  # type: ignore[attr-defined]
        await eventually(lambda: service._journals.of("b").watchers == 0)


async def test_a_service_that_refuses_to_be_watched_costs_only_the_near_cache() -> None:
    async with (
        running("cache", watch={"max_per_tenant": 1}) as server,
        connected(server) as first,
        Mesh.connect(cache=server.address, tenant="acme", api_key="", near_cache=PROMPT) as second,
    ):
        await second.cache.set("k", b"v")
        assert (await get_twice(second, "k"))[0].value == b"v"
        assert second.cache.near_stats.stored == 0
        assert (await get_twice(first, "k"))[1]


async def test_without_a_near_cache_nothing_is_watched_or_counted(
    server: Server, other: Mesh
) -> None:
    await other.cache.set("k", b"v")
    await get_twice(other, "k")
    assert other.cache.near_stats == NearStats()
    assert server._servicer._service._journals.of("acme").watchers == 0  # type: ignore[attr-defined]


async def test_a_closed_mesh_answers_nothing_near(server: Server) -> None:
    async with connected(server) as mesh:
        await mesh.cache.set("k", b"v")
        await get_twice(mesh, "k")
    assert mesh.cache.near_stats.entries == 0
    with pytest.raises(UnavailableError, match="CLIENT_CLOSED"):
        await mesh.cache.get("k")
    service = server._servicer._service  # type: ignore[attr-defined]
    await eventually(lambda: service._journals.of("acme").watchers == 0)


async def test_nothing_is_left_behind_whether_the_service_was_there_or_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gc.collect()  # what other tests have left is not this one's
    before = asyncio.all_tasks()
    loop = asyncio.get_running_loop()
    complaints: list[object] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    try:
        with caplog.at_level(logging.WARNING, "asyncio"):
            async with running("cache") as server, connected(server) as mesh:
                await mesh.cache.set("k", b"v")
            async with Mesh.connect(
                cache=NOBODY, tenant="acme", api_key="", near_cache=PROMPT, patience=0.1
            ) as mesh:
                with pytest.raises(MeshError):
                    await mesh.cache.get("k", timeout=0.3)
            await eventually(lambda: not asyncio.all_tasks() - before)
            gc.collect()
            await asyncio.sleep(0)
    finally:
        loop.set_exception_handler(None)
    assert complaints == []
    said = [record.getMessage() for record in caplog.records]
    assert [each for each in said if any(part in each for part in LEFT_BEHIND)] == []


async def test_a_watch_carries_nothing_of_the_call_that_opened_it(server: Server) -> None:
    async with Mesh.connect(
        cache=server.address, tenant="acme", api_key="", near_cache=PROMPT
    ) as mesh:
        with call_scope(timeout=0.3, request_id="first"):
            await mesh.cache.get("k")
        await live(mesh)
        near = mesh.cache._near
        assert near is not None
        task = near._tenants["acme"].task
        assert task is not None
        await mesh.cache.set("k", b"v")
        await asyncio.sleep(0.4)  # the first caller's deadline is over
        assert not task.done()
        assert (await get_twice(mesh, "k"))[1]


async def test_a_peek_sees_what_is_near_asks_nobody_and_is_counted_as_a_hit(
    near: Mesh, other: Mesh
) -> None:
    await other.cache.set("k", b"v")
    assert near.cache.peek("k") is None
    misses = near.cache.near_stats.misses
    assert near.cache.peek("k", tenant="globex") is None
    assert near.cache.near_stats.misses == misses
    await near.cache.get("k")
    hits = near.cache.near_stats.hits
    found = near.cache.peek("k")
    assert found is not None
    assert (found.value, near.cache.near_stats.hits) == (b"v", hits + 1)
    await near.cache.delete("k")
    assert near.cache.peek("k") is None
    assert other.cache.peek("k") is None
