"""Usage is that of the whole mesh, whichever replica is asked, and each tenant sees its own."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio
from support.polling import eventually_async
from support.redis_servers import RedisClusterServers, RedisServer
from support.replicas import Replica
from support.servers import running

from agent360.client import Mesh, MeshError
from agent360.ratelimit.v1 import ratelimit_pb2

LIMITS = """
[[limits]]
id = "each"
name = "each"
algorithm = "fixed_window"
amount = 10
period = "10h"

[[limits]]
id = "budget"
name = "tokens"
algorithm = "sliding_window"
amount = 1000
period = "10h"

[[limits]]
id = "everybody"
name = "shared"
algorithm = "fixed_window"
amount = 30
period = "10h"
per = ["model"]

[[limits]]
id = "all-slots"
name = "run"
algorithm = "concurrency"
amount = 8
per = []

[[limits]]
id = "short"
name = "short"
algorithm = "fixed_window"
amount = 10
period = "2s"
"""

pytestmark = pytest.mark.asyncio(loop_scope="module")
_numbers = itertools.count()
_PATIENT = {"answer_s": 2, "redis.timeout_s": 2, "redis.wait_timeout_s": 2}
STORES = ["memory", "redis", "cluster"]


async def _store(kind: str, stack: AsyncExitStack) -> str:
    if kind == "memory":
        return "memory://"
    servers: Any = RedisServer() if kind == "redis" else RedisClusterServers()
    url: str = (await stack.enter_async_context(servers)).url
    return url


@pytest_asyncio.fixture(params=STORES, scope="module", loop_scope="module")
async def replicas(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[list[Replica]]:
    """Two replicas of one store; one where the store is its own memory."""
    file = tmp_path_factory.mktemp("limits") / "limits.toml"
    _ = file.write_text(LIMITS)
    async with AsyncExitStack() as stack:
        store = await _store(request.param, stack)
        count = 1 if request.param == "memory" else 2
        started = [Replica("ratelimit", store=store, limits=file, **_PATIENT) for _ in range(count)]
        for replica in started:
            await stack.enter_async_context(replica)
        yield started


@pytest.fixture
def tenant() -> str:
    """A tenant that no other test uses."""
    return f"tenant-{next(_numbers)}"


@pytest_asyncio.fixture(loop_scope="module")
async def meshes(replicas: list[Replica], tenant: str) -> AsyncIterator[tuple[Mesh, Mesh]]:
    """A client of each replica; both of the one where there is one."""
    async with (
        Mesh.connect(ratelimit=replicas[0].address, tenant=tenant, api_key="") as first,
        Mesh.connect(ratelimit=replicas[-1].address, tenant=tenant, api_key="") as second,
    ):
        yield first, second


async def test_what_replicas_denied_is_added_up(meshes: tuple[Mesh, Mesh], tenant: str) -> None:
    first, second = meshes
    decisions = [await mesh.ratelimit.check("each") for mesh in (first, second) * 8]
    assert sum(each.allowed for each in decisions) == 10
    for mesh in meshes:

        async def all_is_told(mesh: Mesh = mesh) -> bool:
            usage = await mesh.ratelimit.get_usage("each")
            return (usage.used, usage.remaining, usage.denied, usage.peak) == (10, 0, 6, 10)

        await eventually_async(all_is_told)
    other = await first.ratelimit.get_usage("each", tenant=f"{tenant}-other")
    assert (other.used, other.remaining, other.denied, other.peak) == (0, 10, 0, 0)
    assert [each async for each in first.ratelimit.list_usage(tenant=f"{tenant}-other")] == []


async def test_the_peak_stays_when_what_was_used_is_given_back(meshes: tuple[Mesh, Mesh]) -> None:
    first, second = meshes
    reserved = await first.ratelimit.reserve("tokens", 600)
    await first.ratelimit.settle(reserved.reservation_id, 100)

    async def peaked() -> bool:
        usage = await second.ratelimit.get_usage("budget")
        return (usage.used, usage.peak) == (100, 600)

    await eventually_async(peaked)


async def test_the_peak_is_that_of_the_present_period(meshes: tuple[Mesh, Mesh]) -> None:
    first, second = meshes
    assert (await first.ratelimit.check("short", hits=7)).allowed

    async def over() -> bool:
        usage = await second.ratelimit.get_usage("short")
        return (usage.used, usage.peak) == (0, 0)

    await eventually_async(over, timeout_s=10)


async def test_a_tenant_sees_its_share_of_a_limit_of_all_and_operators_the_whole(
    meshes: tuple[Mesh, Mesh], tenant: str
) -> None:
    first, second = meshes
    facts = {"model": tenant}
    others = f"{tenant}-other"
    for mesh, who, hits in ((first, tenant, 5), (second, tenant, 6), (second, others, 12)):
        assert (
            await mesh.ratelimit.check("shared", hits=hits, descriptor=facts, tenant=who)
        ).allowed
    assert not (
        await second.ratelimit.check("shared", hits=9, descriptor=facts, tenant=others)
    ).allowed

    def figures(usage: ratelimit_pb2.Usage) -> tuple[int, ...]:
        return usage.used, usage.remaining, usage.limit, usage.denied, usage.peak

    async def told() -> bool:
        own = await first.ratelimit.get_usage("everybody", counted_by=facts)
        theirs = await first.ratelimit.get_usage("everybody", counted_by=facts, tenant=others)
        whole = await first.ratelimit.get_usage("everybody", counted_by=facts, all_tenants=True)
        return [figures(each) for each in (own, theirs, whole)] == [
            (11, 7, 30, 0, 11),
            (12, 7, 30, 1, 12),
            (23, 7, 30, 1, 23),
        ]

    await eventually_async(told)
    nobody = await first.ratelimit.get_usage("everybody", counted_by=facts, tenant=f"{tenant}-no")
    assert (nobody.used, nobody.denied, nobody.peak) == (0, 0, 0)
    listed = {each.limit_id: each async for each in first.ratelimit.list_usage()}
    assert listed["everybody"].used == 11
    assert dict(listed["everybody"].counted_by) == facts
    rows = [each async for each in first.ratelimit.list_usage(all_tenants=True)]
    (row,) = [each for each in rows if each.counted_by.get("model") == tenant]
    assert (row.limit_id, row.used) == ("everybody", 23)
    assert {each.limit_id for each in rows} <= {"everybody", "all-slots"}


async def test_a_tenant_sees_the_slots_that_it_holds_itself(
    meshes: tuple[Mesh, Mesh], tenant: str
) -> None:
    first, second = meshes
    mine = await first.ratelimit.acquire("run", slots=2, ttl=30)
    theirs = await second.ratelimit.acquire("run", slots=3, ttl=30, tenant=f"{tenant}-other")
    try:
        assert (await second.ratelimit.get_usage("all-slots")).used == 2
        whole = await second.ratelimit.get_usage("all-slots", all_tenants=True)
        assert (whole.used, whole.remaining) == (5, 3)
    finally:
        await first.ratelimit.release(mine.slot_id)
        await second.ratelimit.release(theirs.slot_id, tenant=f"{tenant}-other")
    assert (await second.ratelimit.get_usage("all-slots")).used == 0


async def test_tokens_that_come_back_are_not_used_by_the_tenant(
    meshes: tuple[Mesh, Mesh], tenant: str
) -> None:
    first, second = meshes
    facts = {"model": f"{tenant}-reserved"}
    reserved = await first.ratelimit.reserve("shared", 20, descriptor=facts)
    await first.ratelimit.settle(reserved.reservation_id, 4)

    async def told() -> bool:
        usage = await first.ratelimit.get_usage("everybody", counted_by=facts)
        return (usage.used, usage.peak) == (4, 20)

    await eventually_async(told)
    for _ in range(2):
        reserved = await first.ratelimit.reserve(
            "shared", 20, descriptor=facts, request_id="5f0c1a52-9a43-4b8e-8f3e-3a0a3a1f7d11"
        )
    await second.ratelimit.settle(reserved.reservation_id, 3)

    async def added() -> bool:
        usage = await first.ratelimit.get_usage("everybody", counted_by=facts)
        return usage.used == 7

    await eventually_async(added)


async def test_what_a_replica_told_outlives_its_kill(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    file = tmp_path_factory.mktemp("limits") / "limits.toml"
    _ = file.write_text(LIMITS)
    async with (
        RedisServer() as redis,
        Replica("ratelimit", store=redis.url, limits=file, **_PATIENT) as killed,
        Replica("ratelimit", store=redis.url, limits=file, **_PATIENT) as other,
        Mesh.connect(ratelimit=killed.address, tenant="acme", api_key="") as asking,
        Mesh.connect(ratelimit=other.address, tenant="acme", api_key="") as mesh,
    ):
        for _ in range(15):
            await asking.ratelimit.check("each")

        async def told() -> bool:
            return (await mesh.ratelimit.get_usage("each")).denied == 5

        await eventually_async(told)
        await killed.kill()
        assert await told()


@pytest.mark.parametrize("kind", ["redis", "cluster"])
async def test_what_a_replica_saw_is_there_after_it_stopped(
    kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("limits") / "limits.toml"
    _ = file.write_text(LIMITS)
    async with AsyncExitStack() as stack:
        store = await _store(kind, stack)
        settings = {"store": store, "limits": file, "answer_s": 2, "redis": {"timeout_s": 2}}
        async with (
            running("ratelimit", **settings) as server,
            Mesh.connect(ratelimit=server.address, tenant="acme", api_key="") as mesh,
        ):
            for _ in range(13):
                await mesh.ratelimit.check("each")
        async with (
            running("ratelimit", **settings) as server,
            Mesh.connect(ratelimit=server.address, tenant="acme", api_key="") as mesh,
        ):
            usage = await mesh.ratelimit.get_usage("each")
            assert (usage.used, usage.denied, usage.peak) == (10, 3, 10)


async def test_only_operators_see_what_all_tenants_use(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    file = tmp_path_factory.mktemp("limits") / "limits.toml"
    _ = file.write_text(LIMITS)

    def key(name: str, *tenants: str) -> dict[str, Any]:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return {"name": name, "sha256": digest, "tenants": tenants}

    keys = [key("ana", "acme"), key("operator", "*")]
    async with running("ratelimit", limits=file, authentication={"keys": keys}) as server:
        facts = {"model": "m"}
        async with Mesh.connect(ratelimit=server.address, tenant="acme", api_key="ana") as mesh:
            await mesh.ratelimit.check("shared", hits=3, descriptor=facts)
            assert (await mesh.ratelimit.get_usage("everybody", counted_by=facts)).used == 3
            with pytest.raises(MeshError, match="ADMIN_ONLY"):
                await mesh.ratelimit.get_usage("everybody", counted_by=facts, all_tenants=True)
            with pytest.raises(MeshError, match="ADMIN_ONLY"):
                _ = [each async for each in mesh.ratelimit.list_usage(all_tenants=True)]
            with pytest.raises(MeshError):
                await mesh.ratelimit.get_usage("everybody", counted_by=facts, tenant="globex")
        async with Mesh.connect(
            ratelimit=server.address, tenant="globex", api_key="operator"
        ) as mesh:
            whole = await mesh.ratelimit.get_usage("everybody", counted_by=facts, all_tenants=True)
            assert whole.used == 3
            assert (await mesh.ratelimit.get_usage("everybody", counted_by=facts)).used == 0


async def test_checks_do_not_wait_for_usage_to_be_told(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    file = tmp_path_factory.mktemp("limits") / "limits.toml"
    _ = file.write_text(LIMITS)
    async with (
        RedisServer() as redis,
        running("ratelimit", store=redis.url, limits=file, answer_s=2) as server,
        Mesh.connect(ratelimit=server.address, tenant="acme", api_key="") as mesh,
    ):
        await asyncio.gather(*(mesh.ratelimit.check("each") for _ in range(300)))
        stats = await redis.info("commandstats")
        assert "cmdstat_hincrby" not in stats
        usage = await mesh.ratelimit.get_usage("each")
        assert (usage.denied, usage.peak) == (290, 10)
        keys = await redis.command("KEYS", "*")
        assert [key for key in keys if await redis.command("PTTL", key) < 0] == []
