"""What is changed through one replica is seen through the other, in order, also after a cut."""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Final

import pytest
import pytest_asyncio
from support.cutting_proxy import CuttingProxy
from support.redis_servers import RedisClusterServers, RedisServer
from support.replicas import CacheReplica, connected, two_replicas

from agent360.client import Entry, Lookup, Mesh, NearCache

pytestmark = pytest.mark.asyncio(loop_scope="module")

Pair = tuple[CacheReplica, CacheReplica]

WRITES: Final = 200
TRAFFIC_S: Final = 10.0
_numbers = itertools.count(1)


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=["redis", "cluster"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    """Two replicas of one store."""
    servers = RedisServer() if request.param == "redis" else RedisClusterServers()
    async with servers as redis, two_replicas(redis.url) as replicas:
        yield replicas


@pytest.fixture
def namespace() -> str:
    """A namespace that no other test uses."""
    return f"ns{next(_numbers)}"


async def test_the_other_replica_serves_a_write_within_100_ms_and_nothing_older_after_it(
    pair: Pair, namespace: str
) -> None:
    written_at: dict[int, float] = {}
    seen_at: dict[int, float] = {}
    done = asyncio.Event()

    async def poll(mesh: Mesh) -> None:
        last = -1
        while not done.is_set():
            value = int((await mesh.cache.get("k", namespace=namespace)).value)
            assert value >= last, f"{value} was served after {last}"
            if value > last:
                seen_at.setdefault(value, time.monotonic())
                last = value
            await asyncio.sleep(0)  # a near hit waits for nothing

    async with (
        connected(*pair) as (a, b),
        pair[1].connect(near_cache=NearCache(replica_lag=0.0)) as near,
    ):
        await a.cache.set("k", b"0", namespace=namespace)
        async with asyncio.TaskGroup() as tasks:
            for mesh in (b, b, b, near):
                tasks.create_task(poll(mesh))
            for number in range(1, WRITES + 1):
                assert (await a.cache.set("k", str(number).encode(), namespace=namespace)).shared
                written_at[number] = time.monotonic()
                await asyncio.sleep(random.uniform(0.0, 0.02))
            await asyncio.sleep(0.2)
            done.set()
        assert (await near.cache.get("k", namespace=namespace)).value == str(WRITES).encode()
    waits = []
    for number, at in written_at.items():
        later = [seen for value, seen in seen_at.items() if value >= number]
        assert later, f"write {number} was never seen"
        waits.append(min(later) - at)
    assert sorted(waits)[int(WRITES * 0.99) - 1] <= 0.1


Change = Callable[[Mesh, str, int], Awaitable[object]]

CHANGES: Final[dict[str, Change]] = {
    "written": lambda mesh, ns, n: mesh.cache.set(f"k{n}", b"new", namespace=ns),
    "deleted": lambda mesh, ns, n: mesh.cache.delete(f"k{n}", namespace=ns),
    "keys": lambda mesh, ns, n: mesh.cache.invalidate(namespace=ns, keys=[f"k{n}"]),
    "prefix": lambda mesh, ns, n: mesh.cache.invalidate(namespace=ns, prefix=f"k{n}"),
    "tags": lambda mesh, ns, n: mesh.cache.invalidate(namespace=ns, tags=[f"t{n}"]),
}


async def test_what_was_changed_while_replicas_were_cut_off_is_not_served_once_they_are_back() -> (
    None
):
    names = [f"n{number}" for number in range(20)]
    keys = [f"k{n}" for n in range(5)]
    changes = list(CHANGES.values())
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(RedisServer())
        cut, mute, deaf = [
            await stack.enter_async_context(CuttingProxy(redis.address)) for _ in range(3)
        ]
        stores = [redis.url, *(f"redis://{proxy.address}" for proxy in (cut, mute, deaf))]
        replicas = [CacheReplica(store) for store in stores]
        await asyncio.gather(*(stack.enter_async_context(each) for each in replicas))
        a, *others = await stack.enter_async_context(connected(*replicas))

        async def stale(mesh: Mesh) -> int:
            """How many entries that are over a replica serves."""
            count = 0
            for name in (*names, "moved"):
                lookups = await mesh.cache.get_many(keys, namespace=name)
                count += sum(each.value == b"old" for each in lookups)
            return count

        for name in (*names, "moved"):
            entries = [Entry(f"k{n}", b"old", tags=(f"t{n}",)) for n in range(5)]
            await a.cache.set_many(entries, namespace=name)
        for mesh in (*others, *others):
            assert await stale(mesh) == 105
        await cut.go_away()
        mute.hold_answers()
        deaf.hold_requests()
        cut_at = time.monotonic()
        for number, name in enumerate(names):
            for n in range(5):
                await changes[(number + n) % 5](a, name, n)
        await a.cache.invalidate(namespace="moved")
        assert await stale(a) == 0
        for mesh in others[:2]:  # the third still hears
            assert (await mesh.cache.get("k0", namespace="moved", timeout=2)).value == b"old"
        await asyncio.sleep(max(0.0, cut_at + 5.0 - time.monotonic()))
        await cut.come_back()
        mute.release()
        deaf.release()
        await asyncio.sleep(1.0)
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            assert await asyncio.gather(*(stale(mesh) for mesh in others)) == [0, 0, 0]
            await asyncio.sleep(0.02)
        for number, name in enumerate(names):
            written = next(n for n in range(5) if (number + n) % 5 == 0)
            for mesh in others:
                assert (await mesh.cache.get(f"k{written}", namespace=name)).value == b"new"


class Reader:
    """Reads keys through one replica and remembers the newest version of each."""

    def __init__(self, name: str, mesh: Mesh) -> None:
        self.name = name
        self.mesh = mesh
        self.newest: dict[str, int] = {}
        self.missed: dict[str, bool] = {}
        self.hits = 0
        self.degraded = 0

    def note(self, key: str, lookup: Lookup) -> None:
        """Checks that nothing that was seen has been undone."""
        self.degraded += lookup.degraded
        if not lookup.hit:
            self.missed[key] = True
            return
        self.hits += 1
        newest = self.newest.get(key, 0)
        assert lookup.version >= newest, f"{self.name}: {key} went back"
        if self.missed.pop(key, False):
            assert lookup.version > newest, f"{self.name}: {key} came back after it was gone"
        self.newest[key] = lookup.version


class Traffic:
    """Random calls for some keys, until a time."""

    def __init__(self, namespace: str, chance: random.Random) -> None:
        self.namespace = namespace
        self.chance = chance
        self.keys = [f"{part}/{n}" for part in ("a", "b") for n in range(6)]
        self.until = time.monotonic() + TRAFFIC_S

    async def goes_on(self) -> bool:
        """Pauses a little; returns whether there is time left."""
        await asyncio.sleep(self.chance.random() * 0.003)
        return time.monotonic() < self.until

    async def read(self, reader: Reader) -> None:
        """Reads one key or several."""
        cache = reader.mesh.cache
        while await self.goes_on():
            some = self.chance.sample(self.keys, self.chance.choice([1, 4]))
            if len(some) == 1:
                lookups = [await cache.get(some[0], namespace=self.namespace)]
            else:
                lookups = await cache.get_many(some, namespace=self.namespace)
            for key, lookup in zip(some, lookups, strict=True):
                reader.note(key, lookup)

    async def load(self, reader: Reader) -> None:
        """Fills what is missing."""
        cache, namespace = reader.mesh.cache, self.namespace
        while await self.goes_on():
            key = self.chance.choice(self.keys)
            claim = await cache.claim(key, namespace=namespace, fill_timeout=0.5, timeout=5.0)
            if claim.fill_token:
                await self.goes_on()
                tags = [self.chance.choice("tu")]
                await cache.fill(claim.fill_token, key, b"f", namespace=namespace, tags=tags)
            else:
                reader.note(key, claim.lookup)

    async def change(self, mesh: Mesh) -> None:
        """Writes and removes."""
        cache, namespace, chance = mesh.cache, self.namespace, self.chance
        while await self.goes_on():
            key = chance.choice(self.keys)
            what = chance.choices(
                ["set", "delete", "keys", "prefix", "tag", "all", "warm"], [70, 10, 6, 5, 5, 2, 2]
            )[0]
            match what:
                case "set":
                    tags = [chance.choice("tu")]
                    stored = await cache.set(key, b"w", namespace=namespace, tags=tags)
                    assert stored.shared
                    lookup = await cache.get(key, namespace=namespace)
                    assert not lookup.hit or lookup.version >= stored.version
                case "delete":
                    await cache.delete(key, namespace=namespace)
                case "keys":
                    await cache.invalidate(namespace=namespace, keys=chance.sample(self.keys, 3))
                case "prefix":
                    await cache.invalidate(namespace=namespace, prefix=chance.choice(["a/", "b"]))
                case "tag":
                    await cache.invalidate(namespace=namespace, tags=[chance.choice("tu")])
                case "all":
                    await cache.invalidate(namespace=namespace)
                case "warm":
                    await cache.invalidate(namespace=namespace, warm=[Entry(key, b"m")])


async def test_no_reader_sees_a_key_go_back_under_random_changes_through_both_replicas(
    pair: Pair, namespace: str
) -> None:
    seed = random.randrange(1 << 30)
    traffic = Traffic(namespace, random.Random(seed))
    async with connected(*pair) as meshes:
        readers = [
            Reader(f"reader {n} of replica {place}, seed {seed}", mesh)
            for place, mesh in enumerate(meshes)
            for n in range(4)
        ]
        async with asyncio.timeout(TRAFFIC_S + 20), asyncio.TaskGroup() as tasks:
            for place, mesh in enumerate(meshes):
                *reading, loading = readers[place * 4 : place * 4 + 4]
                for reader in reading:
                    tasks.create_task(traffic.read(reader))
                tasks.create_task(traffic.load(loading))
                tasks.create_task(traffic.change(mesh))
        assert sum(reader.hits for reader in readers) > 1_000
        assert sum(reader.degraded for reader in readers) == 0
        await asyncio.sleep(0.1)
        seen = [
            [
                (each.outcome, each.version, each.value)
                for each in await mesh.cache.get_many(traffic.keys, namespace=namespace)
            ]
            for mesh in (*meshes, *meshes)
        ]
        assert seen[0] == seen[1] == seen[2] == seen[3]


async def test_a_key_that_is_written_without_pause_is_read_all_the_same(
    pair: Pair, namespace: str
) -> None:
    until = time.monotonic() + 2.0
    degraded = 0

    async def write(mesh: Mesh) -> None:
        while time.monotonic() < until:
            await mesh.cache.set("hot", b"v", namespace=namespace)

    async def read(reader: Reader) -> None:
        nonlocal degraded
        while time.monotonic() < until:
            lookup = await reader.mesh.cache.get("hot", namespace=namespace, timeout=2.0)
            assert lookup.hit
            reader.note("hot", lookup)
            degraded += lookup.degraded

    async with connected(*pair) as (a, b):
        await a.cache.set("hot", b"v", namespace=namespace)
        async with asyncio.TaskGroup() as tasks:
            for mesh in (a, a, b, b):
                tasks.create_task(write(mesh))
            for mesh in (a, b):
                tasks.create_task(read(Reader("reader", mesh)))
    assert degraded == 0
