"""When Redis is away: memory serves, everything says so, and nothing that is over comes back."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import pytest
import pytest_asyncio
from support.cutting_proxy import CuttingProxy
from support.redis_servers import RedisClusterServers, RedisServer
from support.replicas import CacheReplica, connected, two_replicas

from agent360.client import Entry, Lookup, Mesh, MeshError

pytestmark = pytest.mark.asyncio(loop_scope="module")

RECOVERY_S: Final = 2.0
SETTLED_S: Final = 0.6
"""After an outage nothing older is believed for half a second."""
OUTAGE_S: Final = 2.0

_numbers = itertools.count(1)

POLICIES: Final = [
    {"namespaces": ["strict"], "when_away": "error"},
    {"namespaces": ["safe"], "fail_safe_s": 60, "ttl_jitter": 0},
]


async def refilled(mesh: Mesh, namespace: str) -> None:
    """Removes an entry and fills it anew by a claim."""
    await mesh.cache.delete("k/0", namespace=namespace)
    claim = await mesh.cache.claim("k/0", namespace=namespace)
    await mesh.cache.fill(claim.fill_token, "k/0", b"new", namespace=namespace)


CHANGES: Final[dict[str, Any]] = {
    "deleted": lambda mesh, ns: mesh.cache.delete("k/0", namespace=ns),
    "key": lambda mesh, ns: mesh.cache.invalidate(namespace=ns, keys=["k/0"]),
    "prefix": lambda mesh, ns: mesh.cache.invalidate(namespace=ns, prefix="k/"),
    "tag": lambda mesh, ns: mesh.cache.invalidate(namespace=ns, tags=["t"]),
    "all": lambda mesh, ns: mesh.cache.invalidate(namespace=ns),
    "written": lambda mesh, ns: mesh.cache.set("k/0", b"new", namespace=ns),
    "filled": refilled,
}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def redis() -> AsyncIterator[RedisServer]:
    """A server that survives what the tests do to it."""
    async with RedisServer(persistent=True) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def replicas(redis: RedisServer) -> AsyncIterator[tuple[CacheReplica, CacheReplica]]:
    """Two replicas that survive it as well."""
    async with two_replicas(redis.url, policies=POLICIES) as pair:
        yield pair


@pytest_asyncio.fixture(loop_scope="module")
async def pair(
    redis: RedisServer, replicas: tuple[CacheReplica, CacheReplica]
) -> tuple[CacheReplica, CacheReplica]:
    """The two replicas, with the last test's outage behind them, however that test ended."""
    if redis.running:
        redis.resume()
    else:
        await redis.start()
    async with connected(*replicas) as (a, b):
        await asyncio.gather(until_shared(a), until_shared(b))
        await asyncio.sleep(SETTLED_S)
    return replicas


@dataclass
class Load:
    """Traffic through one replica, and everything about it that a caller sees."""

    mesh: Mesh
    name: str
    hit_s: list[float] = field(default_factory=list)
    miss_s: list[float] = field(default_factory=list)
    lost: list[Lookup] = field(default_factory=list)
    misses: list[Lookup] = field(default_factory=list)
    writes: list[bool] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    usual_hit_s: float = 0.0
    numbers: Any = field(default_factory=itertools.count)

    @property
    def slow_hit_s(self) -> float:
        """The 99th percentile of hits."""
        return sorted(self.hit_s)[int(len(self.hit_s) * 0.99)]

    @property
    def allowed_hit_s(self) -> float:
        """5 ms, and what a call takes on this machine while nothing is wrong."""
        return 0.005 + self.usual_hit_s

    def forget(self) -> None:
        """Begins a new period."""
        self.hit_s, self.miss_s, self.writes = [], [], []
        self.lost, self.misses, self.errors = [], [], []

    async def hit(self) -> None:
        """Reads what is in memory."""
        began = time.perf_counter()
        lookup = await self.mesh.cache.get("warm", namespace="hits")
        self.hit_s.append(time.perf_counter() - began)
        if lookup.value != b"v":
            self.lost.append(lookup)

    async def miss(self) -> None:
        """Reads what is nowhere."""
        began = time.perf_counter()
        self.misses.append(await self.mesh.cache.get(f"gone/{next(self.numbers)}"))
        self.miss_s.append(time.perf_counter() - began)

    async def write(self) -> None:
        """Writes something new."""
        stored = await self.mesh.cache.set(f"{self.name}/{next(self.numbers)}", b"v")
        self.writes.append(stored.shared)

    async def strict(self) -> None:
        """Reads what is nowhere, where that is an error while the store is away."""
        await self.mesh.cache.get("gone", namespace="strict")

    async def run(self, what: Callable[[], Any], pause_s: float) -> None:
        """Does one thing again and again."""
        while True:
            try:
                await what()
            except MeshError as error:
                self.errors.append(f"{error.code.name} {error.reason}")
            await asyncio.sleep(pause_s)


@asynccontextmanager
async def loaded(*meshes: Mesh) -> AsyncIterator[list[Load]]:
    """Traffic as long as the block lasts."""
    loads = [Load(mesh, f"replica{place}") for place, mesh in enumerate(meshes)]
    for load in loads:
        await load.mesh.cache.set("warm", b"v", namespace="hits", ttl=600)
    tasks = [
        asyncio.create_task(load.run(what, pause_s))
        for load in loads
        for what, pause_s in (
            (load.hit, 0.004),
            (load.miss, 0.01),
            (load.write, 0.01),
            (load.strict, 0.02),
        )
    ]
    try:
        await asyncio.sleep(0.2)
        for load in loads:
            load.forget()
        await asyncio.sleep(0.6)
        for load in loads:
            load.usual_hit_s = load.slow_hit_s
        yield loads
        assert not [task for task in tasks if task.done()], "the traffic failed"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until_shared(mesh: Mesh, timeout_s: float = 10.0) -> float:
    """Writes until a write is shared; returns how long that took."""
    began = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while not (await mesh.cache.set("probe", b"p", namespace="probes")).shared:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return time.monotonic() - began


async def change(mesh: Mesh, name: str) -> None:
    """Makes the change that a namespace is named after."""
    await CHANGES[name.partition(".")[0]](mesh, name)


async def prepared(a: Mesh, b: Mesh) -> list[str]:
    """One namespace for each change, with an old entry that both replicas hold."""
    number = next(_numbers)
    names = [f"{name}.{number}" for name in CHANGES]
    for name in names:
        await a.cache.set("k/0", b"old", namespace=name, tags=["t"], ttl=600)
        for mesh in (a, b, b):
            assert (await mesh.cache.get("k/0", namespace=name)).value == b"old"
    return names


async def watched(mesh: Mesh, names: list[str], stop: asyncio.Event) -> list[tuple[float, str]]:
    """When an old entry was served of which namespace."""
    seen = []
    while not stop.is_set():
        for name in names:
            asked_at = time.monotonic()
            if (await mesh.cache.get("k/0", namespace=name, timeout=3)).value == b"old":
                seen.append((asked_at, name))
        await asyncio.sleep(0.001)
    return seen


async def test_memory_serves_and_everything_says_so_while_redis_is_killed_under_load(
    redis: RedisServer, pair: tuple[CacheReplica, CacheReplica]
) -> None:
    async with connected(*pair) as (a, b), loaded(a, b) as loads:
        await a.cache.set("old", b"stale", namespace="safe", ttl=0.5)
        await b.cache.get("old", namespace="safe")
        before = [(load.errors, all(load.writes)) for load in loads]
        assert before == [([], True), ([], True)]
        await redis.kill()
        for load in loads:
            load.forget()
        await asyncio.sleep(OUTAGE_S)
        for load in loads:
            assert not load.lost
            assert set(load.errors) == {"UNAVAILABLE STORE_AWAY"}
            assert not any(load.writes[5:])
            assert all(each.degraded for each in load.misses[5:])
            assert max(load.miss_s) < 0.5
            assert load.slow_hit_s < load.allowed_hit_s
        for mesh in (a, b):
            stale = await mesh.cache.get("old", namespace="safe")
            assert (stale.value, stale.fail_safe, stale.degraded) == (b"stale", True, True)
        await redis.start()
        began = time.monotonic()
        took_s = await asyncio.gather(until_shared(a), until_shared(b))
        assert max(took_s) < RECOVERY_S
        await asyncio.sleep(max(0.0, began + RECOVERY_S - time.monotonic()))
        for load in loads:
            load.forget()
        await asyncio.sleep(0.5)
        for load in loads:
            assert load.errors == []
            assert all(load.writes)
            assert not any(each.degraded for each in load.misses)
        await a.cache.set("again", b"v", namespace="hits")
        assert (await b.cache.get("again", namespace="hits")).value == b"v"
        lookup = await b.cache.get("warm", namespace="hits")
        assert (lookup.value, lookup.degraded) == (b"v", False)


async def test_what_was_changed_while_redis_was_dead_is_never_served_afterwards(
    redis: RedisServer, pair: tuple[CacheReplica, CacheReplica]
) -> None:
    async with connected(*pair) as (a, b):
        names = await prepared(a, b)
        await redis.kill()
        await asyncio.sleep(0.3)
        for name in names:
            await change(a, name)
        for name in names:
            assert (await a.cache.get("k/0", namespace=name)).value != b"old"
        stop = asyncio.Event()
        watches = [asyncio.create_task(watched(mesh, names, stop)) for mesh in (a, a, b, b)]
        await asyncio.sleep(0.2)
        await redis.start()
        await until_shared(b)
        back_at = time.monotonic()
        assert await until_shared(a) < RECOVERY_S
        await asyncio.sleep(RECOVERY_S + 0.5)
        stop.set()
        seen = await asyncio.gather(*watches)
        assert seen[0] + seen[1] == []
        assert [name for at, name in seen[2] + seen[3] if at > back_at] == []
        for mesh in (a, b):
            for name in names:
                lookup = await mesh.cache.get("k/0", namespace=name)
                assert lookup.value in {b"", b"new"}


async def test_what_was_changed_by_a_replica_that_alone_was_cut_off_reaches_the_others(
    redis: RedisServer,
) -> None:
    async with (
        CuttingProxy(redis.address) as proxy,
        CacheReplica(f"redis://{proxy.address}", policies=POLICIES) as first,
        CacheReplica(redis.url, policies=POLICIES) as second,
        connected(first, second) as (a, b),
    ):
        names = await prepared(a, b)
        await proxy.go_away()
        await asyncio.sleep(0.3)
        for name in names:
            await change(a, name)
        await proxy.come_back()
        came_back_at = time.monotonic()
        stop = asyncio.Event()
        watches = [asyncio.create_task(watched(mesh, names, stop)) for mesh in (a, b)]
        await asyncio.sleep(RECOVERY_S + 0.5)
        stop.set()
        seen_by_a, seen_by_b = await asyncio.gather(*watches)
        assert seen_by_a == []
        assert [name for at, name in seen_by_b if at > came_back_at + RECOVERY_S] == []


async def test_a_write_that_was_shared_after_an_outage_is_not_taken_back(
    redis: RedisServer, pair: tuple[CacheReplica, CacheReplica]
) -> None:
    async with connected(*pair) as (a, b):
        number = next(_numbers)
        names = [f"n{n}.{number}" for n in range(10)]
        left = [(f"k{n}", name) for name in names for n in range(20)]
        await redis.kill()
        await asyncio.sleep(0.3)
        for key, name in left:
            assert not (await a.cache.set(key, b"alone", namespace=name)).shared

        async def write_until_shared(name: str) -> None:
            async with asyncio.timeout(10):
                for n in range(20):
                    while True:
                        stored = await a.cache.set(f"k{n}", b"shared", namespace=name)
                        if stored.shared:
                            break
                        await asyncio.sleep(0.02)  # more than clocks are uncertain by

        writes = [asyncio.create_task(write_until_shared(name)) for name in names]
        await redis.start()
        await asyncio.gather(*writes)
        await asyncio.sleep(1.0)
        for mesh in (a, b):
            lookups = [await mesh.cache.get(key, namespace=name) for key, name in left]
            assert {each.value for each in lookups} == {b"shared"}


async def test_a_write_that_redis_carries_out_late_does_not_undo_what_came_after_it(
    redis: RedisServer, pair: tuple[CacheReplica, CacheReplica]
) -> None:
    async with connected(*pair) as (a, b):
        number = next(_numbers)
        names = [f"{later}.late.{number}" for later in CHANGES if later != "filled"]
        for name in names:
            await a.cache.set("first", b"v", namespace=name)
        redis.pause()
        writes = [a.cache.set("k/0", b"old", namespace=name, tags=["t"]) for name in names]
        assert not any(each.shared for each in await asyncio.gather(*writes))
        for name in names:
            await change(a, name)
        redis.resume()
        await asyncio.gather(until_shared(a), until_shared(b))
        await asyncio.sleep(1.0)
        for mesh in (a, b):
            values = [(await mesh.cache.get("k/0", namespace=name)).value for name in names]
            assert b"old" not in values


async def test_a_redis_that_answers_nothing_slows_no_call_once_it_counts_as_away(
    redis: RedisServer, pair: tuple[CacheReplica, CacheReplica]
) -> None:
    async with connected(*pair) as (a, b), loaded(a, b) as loads:
        names = await prepared(a, b)
        redis.pause()
        await asyncio.sleep(1.5)
        for load in loads:
            load.forget()
        await asyncio.sleep(1.5)
        for name in names:
            await change(a, name)
        for load in loads:
            assert not load.lost
            assert set(load.errors) == {"UNAVAILABLE STORE_AWAY"}
            assert not any(load.writes)
            assert all(each.degraded for each in load.misses)
            assert load.miss_s
            slow_miss_s = sorted(load.miss_s)[int(len(load.miss_s) * 0.99)]
            assert slow_miss_s < 0.05, f"{load.name}: {sorted(load.miss_s)[-10:]}"
            assert load.slow_hit_s < load.allowed_hit_s
        stop = asyncio.Event()
        watches = [asyncio.create_task(watched(mesh, names, stop)) for mesh in (a, b)]
        redis.resume()
        assert await until_shared(b) < RECOVERY_S
        back_at = time.monotonic()
        assert await until_shared(a) < RECOVERY_S
        await asyncio.sleep(RECOVERY_S)
        stop.set()
        seen_by_a, seen_by_b = await asyncio.gather(*watches)
        assert seen_by_a == []
        assert [name for at, name in seen_by_b if at > back_at] == []


@pytest.mark.parametrize("paused_s", [0.5, 1.2])
async def test_a_short_pause_of_redis_brings_nothing_back(
    redis: RedisServer, pair: tuple[CacheReplica, CacheReplica], paused_s: float
) -> None:
    async with connected(*pair) as (a, b):
        names = await prepared(a, b)
        redis.pause()
        try:
            changes = [asyncio.create_task(change(a, name)) for name in names]
            reads = [asyncio.create_task(b.cache.get(f"gone/{n}")) for n in range(5)]
            await asyncio.sleep(paused_s)
        finally:
            redis.resume()
        await asyncio.gather(*changes, *reads)
        changed_at = time.monotonic()
        stop = asyncio.Event()
        watches = [asyncio.create_task(watched(mesh, names, stop)) for mesh in (a, b)]
        await asyncio.sleep(RECOVERY_S + 0.5)
        stop.set()
        seen_by_a, seen_by_b = await asyncio.gather(*watches)
        assert seen_by_a == []
        assert [name for at, name in seen_by_b if at > changed_at + RECOVERY_S] == []
        for name in names:
            values = [(await mesh.cache.get("k/0", namespace=name)).value for mesh in (a, b)]
            assert values[0] == values[1]


async def test_forgotten_scripts_and_killed_connections_do_no_harm_under_load(
    redis: RedisServer, pair: tuple[CacheReplica, CacheReplica]
) -> None:
    async with connected(*pair) as (a, b), loaded(a, b) as loads:
        for _ in range(5):
            await redis.command("SCRIPT", "FLUSH")
            await asyncio.sleep(0.1)
        for load in loads:
            assert (load.errors, load.lost) == ([], [])
            assert all(load.writes)
            assert not any(each.degraded for each in load.misses)
        for kind in ("normal", "pubsub", "normal", "pubsub"):
            await redis.command("CLIENT", "KILL", "TYPE", kind)
            await asyncio.sleep(0.3)
        for load in loads:
            assert load.lost == []
            assert set(load.errors) <= {"UNAVAILABLE STORE_AWAY"}
        assert max(await asyncio.gather(until_shared(a), until_shared(b))) < RECOVERY_S
        await asyncio.sleep(1.0)
        for load in loads:
            load.forget()
        await asyncio.sleep(0.3)
        for load in loads:
            assert load.errors == []
            assert all(load.writes)
        for number in range(20):
            await a.cache.set("k", str(number).encode())
            await asyncio.sleep(0.02)
            assert (await b.cache.get("k")).value == str(number).encode()


async def test_the_keys_of_other_nodes_keep_working_when_a_cluster_node_is_killed() -> None:
    async with (
        RedisClusterServers("--cluster-require-full-coverage", "no") as cluster,
        two_replicas(cluster.url) as pair,
        connected(*pair) as (a, b),
    ):
        keys = [f"k{n}" for n in range(60)]
        await a.cache.set_many(Entry(key, b"old") for key in keys)
        await b.cache.get_many(keys)
        await cluster.servers[1].kill()
        await asyncio.sleep(2.0)
        stored = {key: await a.cache.set(key, b"new") for key in keys}
        healthy = [key for key in keys if stored[key].shared]
        assert 20 <= len(healthy) < len(keys)
        await asyncio.sleep(0.1)
        lookups = await b.cache.get_many(healthy)
        assert {each.value for each in lookups} == {b"new"}
        loads = 0

        async def load(mesh: Mesh, key: str) -> bytes:
            nonlocal loads
            claim = await mesh.cache.claim(key, timeout=5)
            if not claim.fill_token:
                return claim.lookup.value
            loads += 1
            await asyncio.sleep(0.05)
            assert (await mesh.cache.fill(claim.fill_token, key, b"loaded")).shared
            return b"loaded"

        for key in healthy[:5]:
            await b.cache.delete(key)
        await asyncio.sleep(0.1)
        asked = [load(mesh, key) for key in healthy[:5] for mesh in (a, b, a, b)]
        assert set(await asyncio.gather(*asked)) == {b"loaded"}
        assert loads == 5
        await cluster.servers[1].start()
        await cluster.until("ok")
        await asyncio.sleep(RECOVERY_S)
        assert all([(await a.cache.set(key, b"newer")).shared for key in keys])
        await asyncio.sleep(0.1)
        lookups = await b.cache.get_many(keys)
        assert {each.value for each in lookups} == {b"newer"}


async def test_where_the_policy_says_so_a_claim_fails_while_redis_is_away() -> None:
    async with (
        RedisServer() as redis,
        CacheReplica(redis.url, policies=POLICIES) as replica,
        replica.connect() as mesh,
    ):
        await redis.kill()
        await asyncio.sleep(0.5)
        with pytest.raises(MeshError, match="STORE_AWAY") as caught:
            await mesh.cache.claim("k", namespace="strict", timeout=2)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        claim = await mesh.cache.claim("k", timeout=2)
        assert claim.fill_token
        assert claim.lookup.degraded
        assert not (await mesh.cache.fill(claim.fill_token, "k", b"v")).shared
        assert (await mesh.cache.get("k")).value == b"v"
        value = await mesh.cache.get_or_load("other", lambda: asyncio.sleep(0, b"x"), timeout=2)
        assert value == b"x"
