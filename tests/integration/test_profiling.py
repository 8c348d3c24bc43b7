"""Profiles of a running service: of its time, its memory and its event loop."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from support.servers import running

from agent360.client import Mesh, MeshError
from agent360.mesh.runtime.policies.authentication import hash_key
from agent360.mesh.runtime.profiling import waits


def spin_for_the_profile(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        sum(range(1_000))


def hoard_for_the_profile() -> list[bytes]:
    return [bytes(10_000) for _ in range(1_000)]


async def test_a_cpu_profile_shows_where_the_time_goes() -> None:
    async with profiled_cache() as mesh:
        task = asyncio.create_task(mesh.profiling.profile("cache", "cpu", seconds=0.6))
        while not task.done():
            spin_for_the_profile(0.01)
            await asyncio.sleep(0.005)
        profile = await task
    assert profile.content_type == "application/json"
    document = json.loads(profile.content)
    assert document["$schema"].endswith("file-format-schema.json")
    assert "spin_for_the_profile" in {frame["name"] for frame in document["shared"]["frames"]}


async def test_a_memory_profile_shows_who_allocated_what() -> None:
    kept: list[list[bytes]] = []
    async with profiled_cache() as mesh:
        task = asyncio.create_task(mesh.profiling.profile("cache", "memory", seconds=0.6))
        while not task.done():
            kept.append(hoard_for_the_profile())
            await asyncio.sleep(0.05)
        profile = await task
    document = json.loads(profile.content)
    frames = document["shared"]["frames"]
    left = next(part for part in document["profiles"] if part["name"] == "left at the end")
    hoarded = sum(
        weight
        for stack, weight in zip(left["samples"], left["weights"], strict=True)
        if any(frames[place]["name"] == "hoard_for_the_profile" for place in stack)
    )
    assert hoarded >= 10_000_000
    assert left["unit"] == "bytes"


async def test_a_profile_of_the_loop_counts_operations_and_times_waits() -> None:
    async def step_for_the_profile() -> None:
        await asyncio.sleep(0)
        spin_for_the_profile(0.002)

    task = asyncio.create_task(waits.watch(0.5))
    steps = 0
    while not task.done():
        await asyncio.gather(step_for_the_profile(), step_for_the_profile())
        steps += 2
        await asyncio.sleep(0.01)
    found = await task
    (operation,) = (each for each in found.operations if "step_for_the_profile" in each.name)
    assert operation.count >= steps
    assert operation.total_s >= 0.002 * (steps - 2)
    assert 0 < found.waited_s < found.seconds
    assert found.lag_s(1.0) >= 0.002
    assert sum(each.total_s for each in found.operations) + found.waited_s <= found.seconds * 1.05


async def test_after_a_profile_of_the_loop_nothing_is_timed_any_more() -> None:
    before = asyncio.Handle._run
    await waits.watch(0.05)
    assert asyncio.Handle._run is before
    assert "select" not in vars(asyncio.get_running_loop()._selector)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["cpu", "memory", "io"])
async def test_every_kind_comes_as_a_page_too(kind) -> None:
    async with profiled_cache() as mesh:
        profile = await mesh.profiling.profile("cache", kind, seconds=0.3, output="html")
    assert profile.content_type.startswith("text/html")
    assert b"<html" in profile.content.lower() or b"<!doctype html" in profile.content.lower()


async def test_one_profile_at_a_time() -> None:
    async with profiled_cache() as mesh:
        first = asyncio.create_task(mesh.profiling.profile("cache", "io", seconds=0.5))
        await asyncio.sleep(0.1)
        with pytest.raises(MeshError) as caught:
            await mesh.profiling.profile("cache", "io", seconds=0.1)
        assert caught.value.reason == "PROFILE_RUNNING"
        await first
        await mesh.profiling.profile("cache", "io", seconds=0.1)


async def test_a_caller_that_leaves_ends_its_profile() -> None:
    async with profiled_cache() as mesh:
        task = asyncio.create_task(mesh.profiling.profile("cache", "io", seconds=60))
        await asyncio.sleep(0.2)
        task.cancel()
        async with asyncio.timeout(5):
            while True:
                try:
                    await mesh.profiling.profile("cache", "io", seconds=0.1)
                except MeshError as error:
                    assert error.reason == "PROFILE_RUNNING"  # noqa: PT017 - others would fail
                    await asyncio.sleep(0.01)
                else:
                    break


@pytest.mark.parametrize("seconds", [0, -1, 60.5])
async def test_a_duration_that_cannot_be_is_refused(seconds) -> None:
    async with profiled_cache() as mesh:
        with pytest.raises(MeshError, match="duration"):
            await mesh.profiling.profile("cache", "cpu", seconds=seconds)


async def test_a_profile_needs_no_tenant() -> None:
    async with (
        running("ratelimit") as server,
        Mesh.connect(ratelimit=server.address, api_key="") as mesh,
    ):
        assert (await mesh.profiling.profile("ratelimit", "io", seconds=0.1)).content


async def test_only_admins_may_profile() -> None:
    key = "a-key-of-a-tenant"
    keys = [{"name": "acme", "sha256": hash_key(key), "tenants": ["acme"]}]
    async with (
        running("cache", authentication={"keys": keys}) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key=key) as mesh,
    ):
        with pytest.raises(MeshError) as caught:
            await mesh.profiling.profile("cache", "cpu", seconds=0.1)
        assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED


@asynccontextmanager
async def profiled_cache() -> AsyncIterator[Mesh]:
    """A cache service in this process, and a client of it."""
    async with (
        running("cache") as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        yield mesh
