"""Cassandra is killed, paused and restarted under a metrics service that goes on taking samples."""

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest
from support.cassandra_server import CassandraServer
from support.polling import eventually_async
from support.redis_servers import free_port

from agent360.client import Mesh
from agent360.client.errors import MeshError
from agent360.metrics.v1 import metrics_pb2 as pb

BACK_S = 60.0
"""Within this time after Cassandra is back the service must have stored everything."""


class Sent(NamedTuple):
    """What was acknowledged."""

    count: int
    total: float


class Service:
    """A metrics service in a process of its own."""

    def __init__(self, directory: Path, store: str) -> None:
        self.port = free_port()
        self.http_port = free_port()
        self._process: asyncio.subprocess.Process | None = None
        self._config = directory / "mesh.toml"
        self._config.write_text(
            f"""
            [metrics]
            port = {self.port}
            http_port = {self.http_port}
            store = "{store}"
            quota = {{ enabled = false }}
            log = {{ level = "error" }}
            cassandra = {{ request_timeout_s = 2.0, max_reconnect_s = 1.0 }}

            [metrics.intake]
            commit_every_s = 0.1
            journal = "{directory}/journal"
            max_memory_bytes = 300_000
            """
        )

    async def start(self, *, wait: bool = True) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "from agent360.mesh.cli.app import main; main()"),
            *("serve", "metrics", "--config", str(self._config)),
        )
        if wait:
            await eventually_async(self.is_ready, 60.0)

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            os.kill(self._process.pid, signal.SIGKILL)
            await self._process.wait()

    async def is_ready(self) -> bool:
        return (await self.ready())[0] == 200

    async def ready(self) -> tuple[int, str]:
        """Status and text of /readyz; 0 while nobody listens."""
        try:
            return await self._get("readyz")
        except aiohttp.ClientError:
            return 0, ""

    async def metric(self, name: str) -> float:
        """A Prometheus metric without labels."""
        _, text = await self._get("metrics")
        (value,) = [line.split()[1] for line in text.splitlines() if line.split()[0] == name]
        return float(value)

    async def _get(self, path: str) -> tuple[int, str]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.http_port}/{path}") as response,
        ):
            return response.status, await response.text()


@pytest.fixture(scope="module")
def cassandra() -> Iterator[CassandraServer]:
    with CassandraServer() as server:
        yield server


@asynccontextmanager
async def serving(
    directory: Path, cassandra: CassandraServer, tenant: str
) -> AsyncIterator[tuple[Service, Mesh]]:
    """A service and a client of a tenant that no other test has; they share the tables."""
    service = Service(directory, cassandra.url("metrics"))
    await service.start()
    try:
        async with Mesh.connect(
            metrics=f"127.0.0.1:{service.port}", tenant=tenant, api_key=""
        ) as mesh:
            yield service, mesh
    finally:
        await service.kill()


async def send(mesh: Mesh, chance: random.Random, rounds: int) -> Sent:
    """Reports samples; returns when they are acknowledged."""
    count, total = 0, 0.0
    for _ in range(rounds):
        for _ in range(chance.randrange(1, 200)):
            value = chance.randrange(8_000) / 8
            mesh.metrics.observe("seconds", value, unit="s")
            count, total = count + 1, total + value
        await asyncio.wait_for(mesh.metrics.flush(), 30)
    return Sent(count, total)


async def stored(mesh: Mesh) -> Sent:
    """What a query says."""

    async def asked(aggregation: pb.Aggregation) -> float:
        request = pb.QueryRequest(name="seconds", aggregation=aggregation)
        groups = [group async for group in mesh.metrics.query(request, timeout=20)]
        return sum(point.value for group in groups for point in group.points)

    return Sent(int(await asked(pb.AGGREGATION_COUNT)), await asked(pb.AGGREGATION_SUM))


async def everything_is_stored(service: Service) -> bool:
    return (
        await service.metric("metrics_store_failing") == 0
        and await service.metric("metrics_memory_bytes") == 0
    )


def both(first: Sent, second: Sent) -> Sent:
    return Sent(first.count + second.count, first.total + second.total)


async def test_killed_under_load_and_restarted_it_has_all_that_was_acknowledged(
    tmp_path: Path, cassandra: CassandraServer
) -> None:
    chance = random.Random(1)
    async with serving(tmp_path, cassandra, "acme") as (service, mesh):
        sending = asyncio.create_task(send(mesh, chance, 60))
        await eventually_async(lambda: committed(service, 2), 30.0)
        await cassandra.kill()
        sent = await sending
        during = await send(mesh, chance, 5)
        sent = both(sent, during)
        await eventually_async(lambda: failing(service), 30.0)
        with pytest.raises(MeshError) as caught:
            await stored(mesh)
        assert caught.value.reason == "STORE_AWAY"
        status, text = await service.ready()
        assert status == 200
        assert "store" in text

        await cassandra.start()
        await eventually_async(lambda: everything_is_stored(service), BACK_S)
        assert await service.ready() == (200, "ready\n")
        assert await stored(mesh) == sent
        sent = both(sent, await send(mesh, chance, 3))
        await service.kill()
        await service.start()
        assert await stored(mesh) == sent


async def test_a_service_killed_while_it_is_away_stores_everything_when_both_are_back(
    tmp_path: Path, cassandra: CassandraServer
) -> None:
    chance = random.Random(2)
    async with serving(tmp_path, cassandra, "globex") as (service, mesh):
        sent = await send(mesh, chance, 5)
        await cassandra.kill()
        sent = both(sent, await send(mesh, chance, 10))
        await service.kill()
        await service.start(wait=False)
        await eventually_async(lambda: listens(service), 30.0)
        assert (await service.ready())[0] == 503, "it waits for its store"
        await cassandra.start()
        await eventually_async(service.is_ready, BACK_S)
        sent = both(sent, await send(mesh, chance, 2))
        assert await stored(mesh) == sent
        assert mesh.metrics.dropped == 0


async def test_samples_are_acknowledged_while_it_answers_nothing_until_there_is_no_room(
    tmp_path: Path, cassandra: CassandraServer
) -> None:
    chance = random.Random(3)
    async with serving(tmp_path, cassandra, "initech") as (service, mesh):
        sent = await send(mesh, chance, 5)
        cassandra.pause()
        try:
            sent = both(sent, await send(mesh, chance, 5))
            await eventually_async(lambda: failing(service), 30.0)
            sent = both(sent, await send(mesh, chance, 5))
            for number in range(5_000):
                mesh.metrics.count("many", labels={"number": str(number)})
            filling = asyncio.create_task(mesh.metrics.flush())
            await eventually_async(lambda: is_full(service), 30.0)
        finally:
            cassandra.resume()
        await asyncio.wait_for(filling, BACK_S)
        await eventually_async(lambda: everything_is_stored(service), BACK_S)
        assert await stored(mesh) == sent


async def committed(service: Service, times: int) -> bool:
    return await service.metric("metrics_commits_total") >= times


async def failing(service: Service) -> bool:
    return await service.metric("metrics_store_failing") == 1


async def is_full(service: Service) -> bool:
    status, text = await service.ready()
    return status == 503 and "no room" in text


async def listens(service: Service) -> bool:
    return (await service.ready())[0] != 0
