"""What the service promises on every store, asked of replicas that share it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support.redis_servers import RedisClusterServers, RedisServer
from support.replicas import Replica
from support.servers import running

from agent360.client import CheckRequest, Mesh, MeshError
from agent360.ratelimit.v1 import ratelimit_pb2

LIMITS = """
[[limits]]
id = "strict-thousand"
name = "thousand"
algorithm = "fixed_window"
amount = 1000
period = "10h"
strict = true

[[limits]]
id = "everybody"
name = "shared"
algorithm = "fixed_window"
amount = 30
period = "10h"
per = []

[[limits]]
id = "each"
name = "shared"
algorithm = "fixed_window"
amount = 20
period = "10h"

[[limits]]
id = "tenant-ten"
name = "nested"
amount = 10
period = "10h"

[[limits]]
id = "user-hundred"
name = "nested"
amount = 100
period = "10h"
per = ["tenant", "user"]

[[limits]]
id = "budget"
name = "tokens"
amount = 1000
period = "10h"

[[limits]]
id = "slots"
name = "run"
algorithm = "concurrency"
amount = 8

[[limits]]
id = "leased"
name = "leased"
algorithm = "fixed_window"
amount = 1000
period = "10h"

[[limits]]
id = "short"
name = "short"
algorithm = "sliding_window"
amount = 10
period = "2s"

[[limits]]
id = "leaky"
name = "leaky"
amount = 3
period = "1s"

[[limits]]
id = "partly"
name = "partly"
amount = 10
period = "10h"
"""

Replicas = list[Replica]


pytestmark = pytest.mark.asyncio(loop_scope="module")
_numbers = itertools.count()


@pytest.fixture
def tenant() -> str:
    """A tenant that no other test uses."""
    return f"tenant-{next(_numbers)}"


@pytest_asyncio.fixture(params=["memory", "redis", "cluster"], scope="module", loop_scope="module")
async def replicas(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Replicas]:
    """Two replicas of one store; one where the store is its own memory."""
    file = tmp_path_factory.mktemp("limits") / "limits.toml"
    _ = file.write_text(LIMITS)
    async with AsyncExitStack() as stack:
        store = "memory://"
        if request.param == "redis":
            store = (await stack.enter_async_context(RedisServer())).url
        elif request.param == "cluster":
            store = (await stack.enter_async_context(RedisClusterServers())).url
        count = 1 if request.param == "memory" else 2
        # A starved machine is not what these tests are about; how fast a store that is away is
        # given up is tested with the default.
        started = [
            Replica("ratelimit", store=store, limits=file, answer_s=2, **_PATIENT)
            for _ in range(count)
        ]
        for replica in started:
            await stack.enter_async_context(replica)
        yield started


_PATIENT = {"redis.timeout_s": 2, "redis.wait_timeout_s": 2}


@pytest_asyncio.fixture(loop_scope="module")
async def mesh(replicas: Replicas, tenant: str) -> AsyncIterator[Mesh]:
    async with Mesh.connect(
        ratelimit=[each.address for each in replicas], tenant=tenant, api_key=""
    ) as mesh:
        yield mesh


async def at_once(count: int, ask: Callable[[int], Any]) -> list[Any]:
    return await asyncio.gather(*(ask(number) for number in range(count)))


async def test_a_strict_limit_is_exact_over_replicas(mesh: Mesh) -> None:
    async def client(_: int) -> int:
        decisions = [await mesh.ratelimit.check("thousand", timeout=60) for _ in range(50)]
        assert not any(decision.degraded for decision in decisions)
        return sum(decision.allowed for decision in decisions)

    assert sum(await at_once(200, client)) == 1_000


async def test_a_denied_parent_charges_no_child(mesh: Mesh) -> None:
    facts = {"user": "ana"}
    decisions = await at_once(50, lambda _: mesh.ratelimit.check("nested", descriptor=facts))
    assert sum(decision.allowed for decision in decisions) == 10
    assert {each.limit_id for each in decisions if not each.allowed} == {"tenant-ten"}
    usage = await mesh.ratelimit.get_usage("user-hundred", counted_by=facts)
    assert usage.remaining == 90


async def test_a_limit_of_all_tenants_together_is_exact(mesh: Mesh) -> None:
    tenants = ["acme", "globex", "initech"]
    decisions = await at_once(
        90, lambda number: mesh.ratelimit.check("shared", tenant=tenants[number % 3])
    )
    # In a cluster a denied request holds what it is about to give back for a moment, so that
    # others may be denied what is left; it never lets more through.
    assert sum(decision.allowed for decision in decisions) <= 30
    for tenant in tenants:
        for _ in range(20):
            decisions.append(await mesh.ratelimit.check("shared", tenant=tenant))
    assert sum(decision.allowed for decision in decisions) == 30
    assert decisions[-1].limit_id in {"everybody", "each"}


async def test_a_budget_is_reserved_and_settled_once(mesh: Mesh) -> None:
    reserved = await at_once(20, lambda _: mesh.ratelimit.reserve("tokens", 100))
    ids = [each.reservation_id for each in reserved if each.decision.allowed]
    assert len(ids) == 10
    for again in (False, True):
        settled = await at_once(10, lambda number: mesh.ratelimit.settle(ids[number], 40))
        assert {each.repeated for each in settled} == {again}
        assert {each.adjustment for each in settled} == ({0} if again else {-60})
        assert (await mesh.ratelimit.check("tokens", hits=0)).remaining == 600
    with pytest.raises(MeshError, match="RESERVATION_UNKNOWN"):
        await mesh.ratelimit.settle(ids[0], 1, tenant="globex")


async def test_a_reservation_of_the_same_request_is_made_once(mesh: Mesh) -> None:
    key = "4f0c1a52-9a43-4b8e-8f3e-3a0a3a1f7d11"
    made = [await mesh.ratelimit.reserve("tokens", 100, request_id=key) for _ in range(3)]
    assert len({each.reservation_id for each in made}) == 1
    assert (await mesh.ratelimit.check("tokens", hits=0)).remaining == 900


async def test_an_id_of_another_kind_is_refused_by_name(mesh: Mesh) -> None:
    reserved = await mesh.ratelimit.reserve("tokens", 100)
    acquired = await mesh.ratelimit.acquire("run", slots=2, ttl=30)
    unlimited = await mesh.ratelimit.acquire("nothing", ttl=30)
    for slot in (acquired, unlimited):
        with pytest.raises(MeshError, match=r"RECORD_OF_ANOTHER_KIND.*id of slots"):
            await mesh.ratelimit.settle(slot.slot_id, 0)
    for ask in (mesh.ratelimit.release, mesh.ratelimit.renew):
        with pytest.raises(MeshError, match=r"RECORD_OF_ANOTHER_KIND.*id of a reservation"):
            await ask(reserved.reservation_id)
    assert (await mesh.ratelimit.check("tokens", hits=0)).remaining == 900
    assert await mesh.ratelimit.release(acquired.slot_id)
    assert await mesh.ratelimit.release(unlimited.slot_id)


async def test_a_late_settle_charges_what_was_used_once(mesh: Mesh) -> None:
    reserved = await mesh.ratelimit.reserve("tokens", 100, ttl=0.05)
    await asyncio.sleep(0.2)
    assert (await mesh.ratelimit.settle(reserved.reservation_id, 150)).adjustment == 50
    assert (await mesh.ratelimit.settle(reserved.reservation_id, 150)).repeated
    assert (await mesh.ratelimit.check("tokens", hits=0)).remaining == 850


async def test_the_slots_of_holders_that_vanish_come_back_after_their_time(mesh: Mesh) -> None:
    async def acquire(_: int) -> Any:
        return await mesh.ratelimit.acquire("run", ttl=1.0)

    held = [each for each in await at_once(100, acquire) if each.decision.allowed]
    began = time.monotonic()
    assert len(held) == 8
    refused = await acquire(0)
    assert refused.decision.retry_after_s == pytest.approx(1.0, abs=0.3)
    for slot in held[:4]:
        assert await mesh.ratelimit.renew(slot.slot_id, ttl=30)
    while not (await mesh.ratelimit.acquire("run", slots=4, ttl=30)).decision.allowed:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert 0.5 <= time.monotonic() - began <= 1.5
    assert not await mesh.ratelimit.release(held[7].slot_id)
    assert not await mesh.ratelimit.renew(held[6].slot_id)
    assert await mesh.ratelimit.release(held[0].slot_id)
    assert (await acquire(0)).decision.allowed
    assert not await mesh.ratelimit.release(held[1].slot_id, tenant="globex")


async def test_waiting_as_told_admits_and_waiting_nine_tenths_does_not(mesh: Mesh) -> None:
    for name, most in (("leaky", 3), ("short", 10)):
        assert (await mesh.ratelimit.check(name, hits=most)).allowed
        asked_at = time.monotonic()
        denied = await mesh.ratelimit.check(name)
        assert denied.retry_after_s is not None
        await asyncio.sleep(max(0, asked_at + 0.9 * denied.retry_after_s - time.monotonic() - 0.02))
        early = await mesh.ratelimit.check(name)
        if early.allowed:  # the machine was too slow to ask early
            assert time.monotonic() - asked_at > denied.retry_after_s
            continue
        await asyncio.sleep(max(0, asked_at + denied.retry_after_s + 0.1 - time.monotonic()))
        assert (await mesh.ratelimit.check(name)).allowed


async def test_a_leaky_limit_admits_no_more_than_its_burst_and_rate(mesh: Mesh) -> None:
    began, allowed = time.monotonic(), 0
    for number in range(60):
        await asyncio.sleep(max(0, began + 0.1 * number - time.monotonic()))
        allowed += (await mesh.ratelimit.check("leaky")).allowed
    assert 18 <= allowed <= 3 + 3 * (time.monotonic() - began)


async def test_many_checks_are_decided_in_their_order_and_in_part(mesh: Mesh) -> None:
    requests = [CheckRequest("partly", hits=4, allow_partial=True)] * 4
    decisions = await mesh.ratelimit.check_many(requests)
    assert sorted(each.granted for each in decisions) == [0, 2, 4, 4]


async def test_leases_of_many_clients_never_exceed_the_limit(
    replicas: Replicas, tenant: str
) -> None:
    async def client() -> int:
        async with Mesh.connect(
            ratelimit=[each.address for each in replicas], tenant=tenant, api_key=""
        ) as mesh:
            decisions = [
                await mesh.ratelimit.check("leased", leased=True, timeout=30) for _ in range(400)
            ]
        return sum(decision.allowed for decision in decisions)

    first = sum(await asyncio.gather(*(client() for _ in range(5))))
    assert first <= 1_000
    async with Mesh.connect(ratelimit=replicas[0].address, tenant=tenant, api_key="") as mesh:
        rest = await mesh.ratelimit.check("leased", hits=0)
        assert first + rest.remaining == 1_000, "all that was not spent came back"


async def test_a_limit_that_is_set_reaches_every_replica_within_a_second(
    replicas: Replicas, tenant: str
) -> None:
    limit = ratelimit_pb2.Limit(
        limit_id="new", name="new", amount=5, algorithm=ratelimit_pb2.ALGORITHM_TOKEN_BUCKET
    )
    limit.period.seconds = 3_600
    async with AsyncExitStack() as stack:
        meshes = [
            await stack.enter_async_context(
                Mesh.connect(ratelimit=each.address, tenant=tenant, api_key="")
            )
            for each in replicas
        ]
        for mesh in meshes:
            assert (await mesh.ratelimit.check("new")).limit_id == ""
        await meshes[0].ratelimit.set_limit(limit)
        async with asyncio.timeout(1):
            for mesh in meshes:
                while (await mesh.ratelimit.check("new", hits=0)).limit != 5:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        await meshes[-1].ratelimit.delete_limit("new")
        async with asyncio.timeout(1):
            for mesh in meshes:
                while (await mesh.ratelimit.check("new", hits=0)).limit_id:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)


async def test_every_key_of_the_store_ends_by_itself(tmp_path: Path, tenant: str) -> None:
    file = tmp_path / "limits.toml"
    _ = file.write_text(LIMITS)
    async with (
        RedisServer() as redis,
        running("ratelimit", store=redis.url, limits=file) as server,
        Mesh.connect(ratelimit=server.address, tenant=tenant, api_key="") as mesh,
    ):
        for name in ("thousand", "shared", "nested", "leaky", "short", "partly"):
            await mesh.ratelimit.check(name, descriptor={"user": "ana"})
        reserved = await mesh.ratelimit.reserve("tokens", 10)
        await mesh.ratelimit.settle(reserved.reservation_id, 5)
        await mesh.ratelimit.acquire("run", slots=2)
        await mesh.ratelimit.check("leased", leased=True)
        keys = await redis.command("KEYS", "*")
        assert len(keys) >= 10
        lasting = [key for key in keys if await redis.command("PTTL", key) < 0]
        assert lasting == []
        used = {each.limit_id: each.used async for each in mesh.ratelimit.list_usage()}
        assert used["budget"] == 5
        assert used["slots"] == 2
        assert used["everybody"] == 1
