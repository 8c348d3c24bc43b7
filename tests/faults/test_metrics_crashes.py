"""The metrics service is killed while it takes samples in: none is lost, none counts twice."""

import asyncio
import random
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from support.crashing_metrics import POINTS, CrashingMetrics
from support.polling import eventually_async

from agent360.client import Mesh
from agent360.metrics.v1 import metrics_pb2 as pb


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def reviving(
    directory: Path, port: int, point: str, hits: Sequence[int]
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """A service that dies at a point, is started again and dies, and then lives.

    Args:
        directory: of its store and journal.
        port: that it serves on every time.
        point: where it dies.
        hits: how often each of its lives comes to the point.

    Yields:
        A wait for the last start.
    """
    lives = [await CrashingMetrics.start(directory, port, point, hits[0])]

    async def revive() -> None:
        for next_hit in hits[1:]:
            assert await lives[-1].ended() == 9
            lives.append(await CrashingMetrics.start(directory, port, point, next_hit))
        assert await lives[-1].ended() == 9
        lives.append(await CrashingMetrics.start(directory, port))

    reviver = asyncio.create_task(revive())
    try:
        yield lambda: asyncio.wait_for(asyncio.shield(reviver), 60)
    finally:
        reviver.cancel()
        await asyncio.gather(reviver, return_exceptions=True)
        await lives[-1].kill()


async def answer(mesh: Mesh, name: str, aggregation: pb.Aggregation) -> float:
    request = pb.QueryRequest(name=name, aggregation=aggregation)
    groups = [group async for group in mesh.metrics.query(request, timeout=20)]
    return sum(point.value for group in groups for point in group.points)


async def assert_exact(mesh: Mesh, count: int, total: float, counted: float) -> None:
    assert await answer(mesh, "seconds", pb.AGGREGATION_COUNT) == count
    assert await answer(mesh, "seconds", pb.AGGREGATION_SUM) == total
    assert await answer(mesh, "plans", pb.AGGREGATION_SUM) == counted


@pytest.mark.parametrize("point", POINTS)
async def test_a_death_at_any_point_loses_and_doubles_nothing(tmp_path: Path, point: str) -> None:
    port = free_port()
    chance = random.Random(point)
    count, total, counted = 0, 0.0, 0
    async with (
        reviving(tmp_path, port, point, hits=(1, 5)) as revived,
        Mesh.connect(metrics=f"127.0.0.1:{port}", tenant="acme", api_key="") as mesh,
    ):
        revival = asyncio.ensure_future(revived())
        rounds_after = 0
        while rounds_after < 3:
            for _ in range(chance.randrange(1, 30)):
                value = chance.randrange(1_000) / 8
                mesh.metrics.observe("seconds", value, unit="s")
                mesh.metrics.count("plans", 2)
                count, total, counted = count + 1, total + value, counted + 2
            await asyncio.wait_for(mesh.metrics.flush(), 60)
            rounds_after += revival.done()
        await revival
        await assert_exact(mesh, count, total, counted)
        assert mesh.metrics.dropped == 0
    again = await CrashingMetrics.start(tmp_path, port)
    try:
        async with Mesh.connect(metrics=f"127.0.0.1:{port}", tenant="acme", api_key="") as mesh:
            await assert_exact(mesh, count, total, counted)
    finally:
        await again.kill()


async def test_kill_during_a_hundred_thousand_samples_leaves_count_and_sum_exact(
    tmp_path: Path,
) -> None:
    port = free_port()
    process = await CrashingMetrics.start(tmp_path, port)
    chance = random.Random(5)
    total = 0.0
    async with Mesh.connect(metrics=f"127.0.0.1:{port}", tenant="acme", api_key="") as mesh:
        for number in range(100_000):
            value = chance.randrange(8_000_000) / 8
            total += value
            mesh.metrics.observe("seconds", value, unit="s")
            if number % 5_000 == 0:
                mesh.metrics.count("plans")
                flushing = asyncio.create_task(mesh.metrics.flush())
                await asyncio.sleep(0)
            if number % 33_000 == 20_000:
                await asyncio.wait((flushing,), timeout=chance.uniform(0.005, 0.05))
                await process.kill()
                process = await CrashingMetrics.start(tmp_path, port)
        await asyncio.wait_for(mesh.metrics.flush(), 60)
        try:
            await assert_exact(mesh, 100_000, total, 20)
            assert mesh.metrics.dropped == 0
        finally:
            await process.kill()


async def page(port: int) -> str:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/metrics") as response,
    ):
        return await response.text()


async def test_a_full_disk_is_told_nothing_is_acknowledged_and_it_goes_on_with_space(
    tmp_path: Path,
) -> None:
    port = free_port()
    process = await CrashingMetrics.start(tmp_path, port)
    try:
        async with Mesh.connect(metrics=f"127.0.0.1:{port}", tenant="acme", api_key="") as mesh:
            mesh.metrics.observe("seconds", 1.5, unit="s")
            mesh.metrics.count("plans", 2)
            await asyncio.wait_for(mesh.metrics.flush(), 30)
            no_limit = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, no_limit[1]))
            mesh.metrics.observe("seconds", 2.5, unit="s")
            flushing = asyncio.create_task(mesh.metrics.flush())

            async def told() -> bool:
                return "metrics_journal_failing 1.0" in await page(process.http_port)

            await eventually_async(told, 20)
            assert not flushing.done()
            await assert_exact(mesh, 1, 1.5, 2)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, no_limit)
            await asyncio.wait_for(flushing, 30)
            assert "metrics_journal_failing 0.0" in await page(process.http_port)
            await assert_exact(mesh, 2, 4.0, 2)
            assert mesh.metrics.dropped == 0
    finally:
        await process.kill()
