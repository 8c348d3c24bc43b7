"""Replicas spend leased tokens of hot limits: never more than the limit, come what may."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from support.polling import eventually, eventually_async
from support.redis_servers import RedisClusterServers, RedisServer
from support.replicas import Replica

from agent360.client import Mesh, MeshError

LIMITS = """
[[limits]]
id = "thousand"
name = "thousand"
algorithm = "fixed_window"
amount = 1000
period = "10h"

[[limits]]
id = "plenty"
name = "plenty"
algorithm = "sliding_window"
amount = 100000
period = "160h"

[[limits]]
id = "strict"
name = "strict"
algorithm = "fixed_window"
amount = 100000
period = "10h"
strict = true

[[limits]]
id = "tenant"
name = "nested"
algorithm = "fixed_window"
amount = 50000
period = "10h"

[[limits]]
id = "user"
name = "nested"
algorithm = "fixed_window"
amount = 600
period = "10h"
per = ["tenant", "user"]
"""
_PATIENT = {"answer_s": 2, "redis.timeout_s": 2, "redis.wait_timeout_s": 2}


@pytest.fixture(params=["redis", "cluster"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    servers: Any = RedisServer() if request.param == "redis" else RedisClusterServers()
    async with servers:
        yield servers


@pytest.fixture
def limits(tmp_path: Path) -> Path:
    file = tmp_path / "limits.toml"
    file.write_text(LIMITS)
    return file


def replica(store: Any, limits: Path, **settings: Any) -> Replica:
    return Replica("ratelimit", store=store.url, limits=limits, **_PATIENT, **settings)


def connect(*replicas: Replica) -> Mesh:
    return Mesh.connect(ratelimit=[each.address for each in replicas], tenant="acme", api_key="")


async def checks(mesh: Mesh, name: str, times: int, at_once: int = 50, **how: Any) -> int:
    """Makes so many checks, some at a time; returns how many were allowed."""
    allowed = 0
    for first in range(0, times, at_once):
        count = min(at_once, times - first)
        made = await asyncio.gather(
            *(mesh.ratelimit.check(name, timeout=30, **how) for _ in range(count))
        )
        allowed += sum(each.allowed for each in made)
    return allowed


async def remaining(mesh: Mesh, name: str, **how: Any) -> int:
    return (await mesh.ratelimit.check(name, hits=0, **how)).remaining


async def script_runs(store: Any) -> int:
    servers = getattr(store, "servers", [store])
    total = 0
    for server in servers:
        stats = (await server.info("commandstats")).get("cmdstat_evalsha", "calls=0,")
        total += int(stats.partition("calls=")[2].partition(",")[0])
    return total


async def test_never_more_than_the_limit_is_allowed_though_a_replica_is_killed(
    store: Any, limits: Path
) -> None:
    replicas = [replica(store, limits) for _ in range(3)]
    async with AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(each) for each in replicas))
        meshes = [await stack.enter_async_context(connect(each)) for each in replicas]
        allowed = offered = 0

        async def client(mesh: Mesh, times: int) -> None:
            nonlocal allowed, offered
            for _ in range(times):
                offered += 1
                try:
                    decision = await mesh.ratelimit.check("thousand", timeout=5)
                except MeshError:
                    continue
                assert not decision.degraded
                allowed += decision.allowed

        clients = [
            asyncio.create_task(client(mesh, 250 if mesh is not meshes[0] else 200))
            for mesh in meshes
            for _ in range(15)
        ]
        await eventually(lambda: allowed > 300, timeout_s=30)
        await replicas[1].kill()
        await asyncio.gather(*clients)
        assert offered >= 10_000
        assert allowed <= 1_000
        await replicas[2].stop()
        left = await remaining(meshes[0], "thousand")
        assert allowed + left <= 1_000
        assert allowed + left >= 1_000 - 1_000 // 16 - 50, "one lease, and what was under way"


async def test_checks_of_a_hot_limit_need_no_round_trip(store: Any, limits: Path) -> None:
    async with replica(store, limits) as only, connect(only) as mesh:
        assert await checks(mesh, "plenty", 1_000) == 1_000
        before = await script_runs(store)
        assert await checks(mesh, "plenty", 500, at_once=1) == 500
        assert await script_runs(store) - before < 250
        before = await script_runs(store)
        assert await checks(mesh, "strict", 200, at_once=1) == 200
        assert await script_runs(store) - before >= 200


async def test_a_graceful_stop_gives_everything_back_at_once(store: Any, limits: Path) -> None:
    first, second = replica(store, limits, lease_ttl_s=60), replica(store, limits)
    async with first, second:
        async with connect(first) as mesh:
            allowed = await checks(mesh, "plenty", 2_000)
        async with connect(second) as mesh:
            assert await remaining(mesh, "plenty") < 100_000 - allowed, "some are held"
            await first.stop()
            assert await remaining(mesh, "plenty") == 100_000 - allowed


async def test_what_an_idle_replica_holds_comes_back(store: Any, limits: Path) -> None:
    async with replica(store, limits, lease_ttl_s=0.5) as only, connect(only) as mesh:
        allowed = await checks(mesh, "plenty", 1_000)

        async def back() -> bool:
            return await remaining(mesh, "plenty") == 100_000 - allowed

        await eventually_async(back)


async def test_all_limits_of_a_request_are_leased_or_none(store: Any, limits: Path) -> None:
    async with replica(store, limits, lease_ttl_s=0.5) as only, connect(only) as mesh:
        facts = {"user": "ana"}
        allowed = await checks(mesh, "nested", 900, descriptor=facts)
        assert allowed == 600

        async def back() -> bool:
            usage = await mesh.ratelimit.get_usage("tenant")
            return (usage.used, usage.remaining) == (600, 49_400)

        await eventually_async(back)
        user = await mesh.ratelimit.get_usage("user", counted_by=facts)
        assert (user.used, user.peak) == (600, 600)


async def test_all_of_a_limit_is_admitted_though_replicas_hold_some_of_it(
    store: Any, limits: Path
) -> None:
    first, second = replica(store, limits, lease_ttl_s=0.5), replica(store, limits)
    async with first, second, connect(first) as one, connect(second) as other:
        allowed = await checks(one, "thousand", 400)
        allowed += await checks(other, "thousand", 1_000)
        assert allowed <= 1_000

        async def all_of_it() -> bool:
            nonlocal allowed
            allowed += await checks(other, "thousand", 20)
            return allowed == 1_000

        await eventually_async(all_of_it)
        assert await checks(other, "thousand", 20) == 0
