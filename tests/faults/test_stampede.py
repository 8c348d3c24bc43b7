"""One load over all replicas and clients, whatever becomes of the one that loads."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import grpc
import pytest
import pytest_asyncio
from support.loading_client import LoadingClient, Report
from support.redis_servers import RedisClusterServers, RedisServer
from support.replicas import CacheReplica, connected, two_replicas

from agent360.client import Mesh, MeshError

pytestmark = pytest.mark.asyncio(loop_scope="module")

Invalidate = Callable[[Mesh, str], Awaitable[object]]
Pair = tuple[CacheReplica, CacheReplica]

CALLERS: Final = 200
LOAD_FAILED: Final = MeshError(grpc.StatusCode.UNKNOWN, "LOAD_FAILED", "it failed")
_numbers = itertools.count(1)


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=["redis", "cluster"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    """Two replicas of one store."""
    servers = RedisServer() if request.param == "redis" else RedisClusterServers()
    async with servers as redis, two_replicas(redis.url) as replicas:
        yield replicas


@pytest.fixture
def key() -> str:
    """A key that no other test uses."""
    return f"key/{next(_numbers)}"


async def asked_at_once(clients: tuple[LoadingClient, ...]) -> list[Report]:
    """Lets clients begin at once; returns their reports."""
    for client in clients:
        client.go()
    return await asyncio.gather(*(client.report() for client in clients))


async def test_of_400_who_miss_a_key_through_two_replicas_one_loads(pair: Pair, key: str) -> None:
    async with (
        LoadingClient(address=pair[0].address, key=key, count=CALLERS) as first,
        LoadingClient(address=pair[1].address, key=key, count=CALLERS) as second,
    ):
        reports = await asked_at_once((first, second))
    assert sum(report.loads for report in reports) == 1
    assert [report.errors for report in reports] == [{}, {}]
    assert [report.values for report in reports] == [{"loaded": CALLERS}] * 2


async def test_get_or_load_loads_once_for_two_processes(pair: Pair, key: str) -> None:
    async with (
        LoadingClient(address=pair[0].address, key=key, count=CALLERS, claims=False) as first,
        LoadingClient(address=pair[1].address, key=key, count=CALLERS, claims=False) as second,
    ):
        reports = await asked_at_once((first, second))
    assert sum(report.loads for report in reports) == 1
    assert [report.values for report in reports] == [{"loaded": CALLERS}] * 2


async def test_when_the_call_that_loads_is_cancelled_the_other_399_get_the_value(
    pair: Pair, key: str
) -> None:
    job = {"key": key, "count": CALLERS, "claims": False, "load_s": 0.3}
    async with (
        LoadingClient(address=pair[0].address, cancels_first=True, **job) as first,
        LoadingClient(address=pair[1].address, **job) as second,
    ):
        first.go()
        await first.until("loading")
        second.go()
        reports = await asyncio.gather(first.report(), second.report())
    assert sum(report.loads for report in reports) == 1
    assert [report.errors for report in reports] == [{}, {}]
    assert [report.cancelled for report in reports] == [1, 0]
    assert [report.values for report in reports] == [
        {"loaded": CALLERS - 1},
        {"loaded": CALLERS},
    ]


async def test_a_filler_that_forgets_its_claim_is_followed_by_one_other(
    pair: Pair, key: str
) -> None:
    job = {"key": key, "count": CALLERS, "fill_timeout_s": 0.5}
    async with (
        LoadingClient(address=pair[0].address, forgets=1, **job) as first,
        LoadingClient(address=pair[1].address, **job) as second,
    ):
        first.go()
        await first.until("loading")
        began = time.monotonic()
        second.go()
        reports = await asyncio.gather(first.report(), second.report())
        took_s = time.monotonic() - began
    assert sum(report.loads for report in reports) == 2
    assert [report.errors for report in reports] == [{}, {}]
    assert sum(report.values["loaded"] for report in reports) == 2 * CALLERS - 1
    assert took_s < 0.5 + 1.0


async def test_a_filler_that_is_killed_is_followed_by_one_other_after_its_time(
    pair: Pair, key: str
) -> None:
    job = {"key": key, "fill_timeout_s": 1.0}
    async with (
        LoadingClient(address=pair[0].address, count=1, load_s=60.0, **job) as filler,
        LoadingClient(address=pair[0].address, count=100, **job) as first,
        LoadingClient(address=pair[1].address, count=100, **job) as second,
    ):
        filler.go()
        await filler.until("loading")
        began = time.monotonic()
        first.go()
        second.go()
        await filler.kill()
        reports = await asyncio.gather(first.report(), second.report())
        took_s = time.monotonic() - began
    assert sum(report.loads for report in reports) == 1
    assert [report.values for report in reports] == [{"loaded": 100}] * 2
    assert 0.5 < took_s < 2.0


@pytest.mark.parametrize("how", ["fails", "comes too late"])
async def test_a_claim_that_ends_through_the_other_replica_falls_to_who_waits_at_the_first(
    pair: Pair, key: str, how: str
) -> None:
    async with connected(*pair) as (a, b):
        claim = await a.cache.claim(key, fill_timeout=30)
        waiting = [asyncio.create_task(a.cache.claim(key, timeout=5)) for _ in range(2)]
        await asyncio.sleep(0.1)
        if how == "fails":
            await b.cache.fail(claim.fill_token, LOAD_FAILED)
        else:
            await b.cache.invalidate(tags=[key])
            assert not (await b.cache.fill(claim.fill_token, key, b"old", tags=[key])).stored
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        token = done.pop().result().fill_token
        assert token not in {"", claim.fill_token}
        assert (await a.cache.fill(token, key, b"new")).stored
        values = {each.result().lookup.value for each in (await asyncio.wait(waiting))[0]}
        assert values == {b"", b"new"}


async def test_a_claim_survives_the_replica_that_gave_it(key: str) -> None:
    async with RedisServer() as redis, two_replicas(redis.url) as (a, b), connected(a, b) as meshes:
        claim = await meshes[0].cache.claim(key, fill_timeout=20)
        waiting = asyncio.create_task(meshes[1].cache.claim(key, timeout=15))
        await meshes[1].cache.get(key)
        await a.kill()
        assert (await meshes[1].cache.fill(claim.fill_token, key, b"filled elsewhere")).stored
        answer = await waiting
        assert (answer.lookup.value, answer.fill_token) == (b"filled elsewhere", "")


async def test_claims_that_are_cancelled_at_any_moment_leave_the_key_to_the_others(
    pair: Pair,
) -> None:
    async with connected(*pair) as (a, b):

        async def claimed(mesh: Mesh, key: str) -> bytes:
            claim = await mesh.cache.claim(key, fill_timeout=20, timeout=5)
            if not claim.fill_token:
                return claim.lookup.value
            await asyncio.sleep(0.002)
            await asyncio.shield(mesh.cache.fill(claim.fill_token, key, b"v"))
            return b"v"

        async def attempt(number: int) -> None:
            key = f"left/{next(_numbers)}"
            leaves = asyncio.create_task(a.cache.claim(key, fill_timeout=20))
            others = [asyncio.create_task(claimed(mesh, key)) for mesh in (a, b, a, b)]
            await asyncio.sleep(number % 10 * 0.0004)
            if leaves.done():
                token = leaves.result().fill_token
                if token:
                    await a.cache.fill(token, key, b"v")
            leaves.cancel()
            got = await asyncio.gather(*others, return_exceptions=True)
            ended = await asyncio.gather(leaves, return_exceptions=True)
            if not isinstance(ended[0], BaseException) and ended[0].fill_token:
                return  # it was answered in the moment in which it left
            assert got == [b"v"] * 4, (number, got, ended)

        for number in range(0, 200, 20):
            await asyncio.gather(*(attempt(number + each) for each in range(20)))


INVALIDATIONS: Final[dict[str, Invalidate]] = {
    "keys": lambda mesh, ns: mesh.cache.invalidate(
        namespace=ns, keys=[f"x/{n}" for n in range(50)]
    ),
    "delete": lambda mesh, ns: asyncio.gather(
        *(mesh.cache.delete(f"x/{n}", namespace=ns) for n in range(50))
    ),
    "prefix": lambda mesh, ns: mesh.cache.invalidate(namespace=ns, prefix="x/"),
    "tags": lambda mesh, ns: mesh.cache.invalidate(namespace=ns, tags=["other", "tag"]),
    "all": lambda mesh, ns: mesh.cache.invalidate(namespace=ns),
}


@pytest.mark.parametrize("how", INVALIDATIONS)
@pytest.mark.parametrize("by", ["claims", "get_or_load"])
async def test_what_was_loaded_before_an_invalidation_is_never_cached(
    pair: Pair, how: str, by: str
) -> None:
    namespace = f"late-{how}-{by}-{next(_numbers)}"
    invalidate = INVALIDATIONS[how]
    async with connected(*pair) as (a, b):
        keys = [f"x/{n}" for n in range(50)]
        source = {"value": b"v1"}

        async def load() -> bytes:
            value = source["value"]
            await asyncio.sleep(0.1)
            return value

        async def fill(key: str) -> None:
            if by == "get_or_load":
                await a.cache.get_or_load(key, load, namespace=namespace, tags=["tag"])
                return
            claim = await a.cache.claim(key, namespace=namespace)
            if claim.fill_token:
                await a.cache.fill(
                    claim.fill_token, key, await load(), namespace=namespace, tags=["tag"]
                )

        for _ in range(2):
            source["value"] = b"v1"
            fills = [asyncio.create_task(fill(key)) for key in keys]
            await asyncio.sleep(0.05)
            source["value"] = b"v2"
            await invalidate(b, namespace)
            await asyncio.gather(*fills)
            for mesh in (a, b):
                lookups = await mesh.cache.get_many(keys, namespace=namespace)
                stale = [each for each in lookups if each.value == b"v1"]
                assert not stale
            await asyncio.gather(*(fill(key) for key in keys))
            for mesh in (b, a):
                lookups = await mesh.cache.get_many(keys, namespace=namespace)
                assert {each.value for each in lookups} == {b"v2"}
            await b.cache.invalidate(namespace=namespace)
            await asyncio.sleep(0.02)
