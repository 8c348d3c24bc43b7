"""A service short of memory: caches shrink first, then new calls are refused."""

from typing import Any

import aiohttp
import grpc
import pytest
from support.polling import eventually
from support.servers import running

from agent360.client import Mesh, MeshError
from agent360.mesh.runtime.memory import MemoryGuard
from agent360.mesh.runtime.resources import resident_bytes
from agent360.mesh.runtime.settings import MemorySettings

MB = 2**20
FAR = 2**50


def guard_of(server: Any) -> MemoryGuard:
    return server._memory


async def test_above_the_soft_limit_the_cache_shrinks_and_goes_on_serving() -> None:
    limits = {"soft_bytes": FAR, "hard_bytes": FAR}
    async with (
        running("cache", memory=limits, max_bytes=400 * MB) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        for number in range(120):
            await mesh.cache.set(f"k{number}", bytes(MB))
        held = await size_bytes(mesh)
        guard_of(server)._soft = resident_bytes() - 40 * MB
        await eventually(lambda: resident_bytes() <= guard_of(server)._soft)
        assert 0 < await size_bytes(mesh) < held - 30 * MB
        await mesh.cache.set("after", b"served")
        assert (await mesh.cache.get("after")).value == b"served"


async def test_above_the_hard_limit_new_calls_are_refused_until_there_is_room() -> None:
    async with (
        running("cache", memory={"soft_bytes": FAR, "hard_bytes": FAR}) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        guard = guard_of(server)
        await mesh.cache.set("k", b"v")
        guard._hard = 1
        await eventually(lambda: guard.short)
        with pytest.raises(MeshError) as caught:
            await mesh.cache.set("k", b"w")
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.reason == "OUT_OF_MEMORY"
        assert caught.value.retry_after_s
        guard._hard = FAR
        await eventually(lambda: not guard.short)
        assert (await mesh.cache.get("k")).value == b"v"


def test_a_soft_limit_above_the_hard_one_is_refused() -> None:
    with pytest.raises(ValueError, match="soft_bytes"):
        MemorySettings(soft_bytes=2, hard_bytes=1)


async def test_every_service_exposes_what_its_process_uses() -> None:
    async with running("ratelimit") as server:
        text = await scraped(server.http_port)
    for name in (
        "process_resident_memory_bytes",
        "process_open_fds",
        "mesh_cpu_seconds_total",
        "mesh_disk_free_bytes",
        "mesh_event_loop_lag_seconds_bucket",
        "mesh_gc_pause_seconds_bucket",
        'mesh_memory_limit_bytes{kind="hard"}',
    ):
        assert name in text


async def size_bytes(mesh: Mesh) -> int:
    """What the cache holds."""
    return sum([each.bytes async for each in mesh.cache.stats()])


async def scraped(port: int) -> str:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/metrics") as response,
    ):
        return await response.text()
