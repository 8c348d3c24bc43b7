"""The near cache when its watch breaks: what may be outdated is not served."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from support.cutting_proxy import CuttingProxy
from support.polling import eventually
from support.redis_servers import RedisServer
from support.servers import running

from agent360.client import Invalidation, Mesh, NearCache, Reset, UnavailableError
from agent360.mesh.runtime.server import Server

OPTIONS = NearCache(replica_lag=0.0, max_silence=1.0)


@asynccontextmanager
async def behind_a_proxy() -> AsyncIterator[tuple[CuttingProxy, Mesh, Mesh, Server]]:
    """A client with a near cache behind a proxy, and one without either."""
    async with (
        running("cache", watch={"heartbeat_s": 0.2}) as server,
        CuttingProxy(server.address) as proxy,
        Mesh.connect(
            cache=proxy.address, tenant="acme", api_key="", near_cache=OPTIONS, patience=0.5
        ) as near,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as other,
    ):
        yield proxy, near, other, server


async def until_kept(mesh: Mesh, key: str) -> None:
    """Reads until a lookup is answered near."""
    before = mesh.cache.near_stats.hits
    async with asyncio.timeout(10):
        while mesh.cache.near_stats.hits == before:
            await mesh.cache.get(key)
            await asyncio.sleep(0.005)


async def test_copies_are_dropped_when_the_watch_is_cut_and_kept_again_when_it_is_back() -> None:
    async with behind_a_proxy() as (proxy, near, other, _):
        await other.cache.set("k", b"old")
        await until_kept(near, "k")
        await proxy.go_away()
        await eventually(lambda: near.cache.near_stats.entries == 0)
        await other.cache.set("k", b"new")
        await proxy.come_back()
        async with asyncio.timeout(10):
            while True:
                try:
                    assert (await near.cache.get("k")).value == b"new"
                    break
                except UnavailableError:
                    await asyncio.sleep(0.05)
        await until_kept(near, "k")
        assert (await near.cache.get("k")).value == b"new"


async def test_a_copy_is_not_used_beyond_the_longest_silence() -> None:
    async with behind_a_proxy() as (proxy, near, other, _):
        await other.cache.set("k", b"old")
        await until_kept(near, "k")
        proxy.hold_answers()
        held_at = time.monotonic()
        await other.cache.set("k", b"new")
        reads = 0
        async with asyncio.timeout(10):
            while near.cache.near_stats.entries:
                try:
                    await near.cache.get("k", timeout=0.1)
                except TimeoutError:
                    break
                reads += 1
                await asyncio.sleep(0.01)
        assert time.monotonic() - held_at < OPTIONS.max_silence + 0.5
        assert reads > 0
        await eventually(lambda: near.cache.near_stats.entries == 0)
        proxy.release()
        proxy.cut()
        async with asyncio.timeout(10):
            while True:
                try:
                    assert (await near.cache.get("k", timeout=1.0)).value == b"new"
                    break
                except (UnavailableError, TimeoutError):
                    await asyncio.sleep(0.05)


async def test_a_restarted_service_leaves_no_copies_of_its_last_run() -> None:
    async with running("cache") as server:
        port = server.port
        near = Mesh.connect(cache=server.address, tenant="acme", api_key="", near_cache=OPTIONS)
        await near.cache.set("k", b"v")
        await until_kept(near, "k")
    await eventually(lambda: near.cache.near_stats.entries == 0)
    async with running("cache", port=port):
        async with asyncio.timeout(10):
            while True:
                try:
                    assert not (await near.cache.get("k")).hit
                    break
                except UnavailableError:
                    await asyncio.sleep(0.05)
        await near.close()


async def test_a_reader_near_sees_anothers_writes_soon_and_never_goes_back_in_time() -> None:
    async with behind_a_proxy() as (_, near, other, _server):
        keys = [f"k{n}" for n in range(5)]
        written = dict.fromkeys(keys, 0)
        for key in keys:
            await other.cache.set(key, b"0")
        done = asyncio.Event()

        async def write() -> None:
            for number in range(1, 300):
                key = random.choice(keys)
                await other.cache.set(key, b"%d" % number)
                written[key] = number
                if number % 10 == 0:
                    await asyncio.sleep(0.002)
            done.set()

        async def read() -> None:
            seen = dict.fromkeys(keys, 0)
            while not done.is_set():
                for key in keys:
                    value = int((await near.cache.get(key)).value)
                    assert value >= seen[key]
                    seen[key] = value
                await asyncio.sleep(0)

        await asyncio.gather(write(), read(), read())
        async with asyncio.timeout(5):
            for key in keys:
                while int((await near.cache.get(key)).value) != written[key]:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
        assert near.cache.near_stats.hits > 0
        assert near.cache.near_stats.invalidated > 0


async def test_what_is_written_through_one_replica_reaches_copies_of_another() -> None:
    async with RedisServer() as redis:
        store = f"redis://127.0.0.1:{redis.port}/0"
        async with (
            running("cache", store=store) as one,
            running("cache", store=store) as two,
            Mesh.connect(
                cache=f"{one.address},{two.address}",
                tenant="acme",
                api_key="",
                near_cache=NearCache(replica_lag=0.2),
            ) as near,
            Mesh.connect(cache=one.address, tenant="acme", api_key="") as first,
            Mesh.connect(cache=two.address, tenant="acme", api_key="") as second,
        ):
            for number in range(4):
                writer = (first, second)[number % 2]
                await writer.cache.set("k", b"%d" % number)
                async with asyncio.timeout(10):
                    while (await near.cache.get("k")).value != b"%d" % number:  # noqa: ASYNC110
                        await asyncio.sleep(0.005)
                await until_kept(near, "k")
                assert (await near.cache.get("k")).value == b"%d" % number
            await second.cache.invalidate()
            await eventually(lambda: near.cache.near_stats.entries == 0)
            assert not (await near.cache.get("k")).hit


async def test_no_copy_survives_changes_that_were_made_while_the_watch_was_cut() -> None:
    async with behind_a_proxy() as (proxy, near, other, _):
        for number in range(8):
            await other.cache.set("k", b"%d" % number)
            async with asyncio.timeout(10):
                while True:
                    try:
                        value = (await near.cache.get("k", timeout=1.0)).value
                    except (UnavailableError, TimeoutError):
                        continue
                    if value == b"%d" % number:
                        break
                    await asyncio.sleep(0.005)
            await until_kept(near, "k")
            cuts = near.cache.near_stats.invalidated
            proxy.cut()
            await eventually(lambda cuts=cuts: near.cache.near_stats.invalidated > cuts)  # type: ignore[misc]


async def test_a_watch_goes_on_where_it_was_cut_and_says_nothing_of_it() -> None:
    async with (
        behind_a_proxy() as (proxy, near, other, _),
        near.cache.watch(namespaces=["default"]) as events,
    ):
        await other.cache.set("a", b"")
        first = await anext(events)
        assert isinstance(first, Invalidation)
        assert first.keys == ("a",)
        await proxy.go_away()
        await other.cache.set("b", b"")
        await other.cache.invalidate(prefix="c")
        await other.cache.set("elsewhere", b"", namespace="other")
        await proxy.come_back()
        async with asyncio.timeout(10):
            second, third = await anext(events), await anext(events)
        assert isinstance(second, Invalidation)
        assert second.keys == ("b",)
        assert isinstance(third, Invalidation)
        assert third.prefix == "c"


async def test_a_watch_says_when_events_may_have_been_missed() -> None:
    async with running("cache") as server:
        port = server.port
        mesh = Mesh.connect(cache=server.address, tenant="acme", api_key="")
        watch = mesh.cache.watch()
        events = await watch.__aenter__()
    async with running("cache", port=port):
        async with asyncio.timeout(10):
            event = await anext(events)
        assert isinstance(event, Reset)
        assert event.reason
        await watch.__aexit__(None, None, None)
        await mesh.close()
