"""A shared store that loses what it had been told: restarted from an older copy, or evicting."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.polling import eventually_async
from support.redis_servers import RedisServer
from support.servers import running

from agent360.client import Mesh, UnavailableError
from agent360.mesh.runtime.server import Server

BASE = "agent360:cache:{acme:plans:0.1}"


@asynccontextmanager
async def replica(redis: RedisServer) -> AsyncIterator[tuple[Server, Mesh]]:
    async with (
        running("cache", store=redis.url) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        yield server, mesh


async def value(mesh: Mesh, key: str) -> bytes | None:
    lookup = await mesh.cache.get(key, namespace="plans")
    return lookup.value if lookup.hit else None


async def cut_off(redis: RedisServer) -> None:
    for kind in ("normal", "pubsub"):
        await redis.command("CLIENT", "KILL", "TYPE", kind)


async def test_a_redis_that_came_back_older_does_not_bring_back_what_was_invalidated() -> None:
    async with RedisServer() as redis, replica(redis) as (_, a), replica(redis) as (_, b):
        await a.cache.set("k", b"old", namespace="plans", ttl=600)
        assert await value(b, "k") == b"old"
        names = [f"{BASE}:meta", f"{BASE}:seq"]
        copy = [await redis.command("DUMP", name) for name in names]
        version = (await redis.command("GET", names[0])).decode()
        entry = f"{BASE}:e:k:v{version}"
        held = await redis.command("GET", entry)
        await a.cache.invalidate(namespace="plans")
        assert await value(a, "k") is None
        for name, dump in zip(names, copy, strict=True):
            await redis.command("RESTORE", name, 0, dump, "REPLACE")
        await redis.command("SET", entry, held, "PX", 600_000)
        await cut_off(redis)
        for mesh in (a, b):
            assert await value(mesh, "k") is None

        async def shared_again() -> bool:
            stored = await a.cache.set("k", b"new", namespace="plans", ttl=600)
            return stored.shared and await value(b, "k") == b"new"

        await eventually_async(shared_again)


async def test_a_redis_that_was_emptied_is_used_again_at_once() -> None:
    async with RedisServer() as redis, replica(redis) as (_, a), replica(redis) as (_, b):
        await a.cache.set("k", b"old", namespace="plans", ttl=600)
        await a.cache.invalidate(namespace="plans")
        await redis.command("FLUSHALL")
        await cut_off(redis)

        async def shared_again() -> bool:
            stored = await a.cache.set("k", b"new", namespace="plans", ttl=600)
            return stored.shared and await value(b, "k") == b"new"

        await eventually_async(shared_again)


async def test_an_index_that_was_evicted_makes_a_prefix_invalidate_more_and_not_less() -> None:
    async with RedisServer() as redis, replica(redis) as (_, a), replica(redis) as (_, b):
        await a.cache.set("p/1", b"v", namespace="plans", ttl=600)
        assert await value(b, "p/1") == b"v"
        version = (await redis.command("GET", f"{BASE}:meta")).decode()
        assert await redis.command("DEL", f"{BASE}:i:v{version}") == 1
        await a.cache.invalidate(namespace="plans", prefix="p/")
        assert await value(a, "p/1") is None

        async def gone() -> bool:
            return await value(b, "p/1") is None

        await eventually_async(gone)


async def test_replicas_on_two_databases_of_one_redis_share_nothing() -> None:
    async with (
        RedisServer() as redis,
        replica(redis) as (_, a),
        running("cache", store=f"{redis.url}/1") as other,
        Mesh.connect(cache=other.address, tenant="acme", api_key="") as b,
    ):
        for number in range(3):
            await a.cache.set("k", b"a%d" % number, namespace="plans")
            await b.cache.set("k", b"b%d" % number, namespace="plans")
            await a.cache.invalidate(namespace="plans")
            assert await value(b, "k") == b"b%d" % number
            assert await value(a, "k") is None


async def test_names_of_nothing_leave_no_keys_for_ever() -> None:
    async with RedisServer() as redis, replica(redis) as (_, a):
        for number in range(20):
            await a.cache.delete("k", namespace=f"made-up-{number}")
            await a.cache.get("k", namespace=f"read-{number}")
            await a.cache.invalidate(namespace=f"made-up-{number}", tags=["t"])
            token = (await a.cache.claim("k", namespace=f"claimed-{number}")).fill_token
            await a.cache.fail(token, UnavailableError("it cannot be loaded"))
        keys = await redis.command("KEYS", "*")
        for key in keys:
            assert await redis.command("PTTL", key) > 0, key


@pytest.mark.parametrize("admission", ["never", "tinylfu"])
async def test_a_fill_that_is_outdated_answers_nobody_who_waits(admission: str) -> None:
    async with (
        RedisServer() as redis,
        running("cache", store=redis.url, default_policy={"admission": admission}) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        outdated = (await mesh.cache.claim("k", namespace="plans")).fill_token
        await mesh.cache.invalidate(namespace="plans", keys=["k"])
        valid = (await mesh.cache.claim("k", namespace="plans", timeout=5)).fill_token
        waiting = asyncio.create_task(mesh.cache.claim("k", namespace="plans", timeout=5))
        stored = await mesh.cache.fill(outdated, "k", b"outdated", namespace="plans")
        assert not stored.stored
        await mesh.cache.fill(valid, "k", b"loaded", namespace="plans")
        found = await waiting
        assert found.lookup.value == b"loaded"
