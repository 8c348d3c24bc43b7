"""Deadlines of callers who wait for the same answer, before a simulated model server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from support.polling import eventually, eventually_async

from agent360.client import Answer, GenerateRequest, Mesh, MeshError
from agent360.client.errors import DeadlineExceededError
from agent360.mesh.inference import InferenceServicer, InferenceSettings
from agent360.mesh.runtime.server import Server
from agent360.mesh.simulator import Simulator, SimulatorSettings

NOBODY = "127.0.0.1:9"


def even(first_token_s: float, max_concurrent: int = 0) -> SimulatorSettings:
    """A model that takes the same time for every answer."""
    return SimulatorSettings(
        port=0,
        first_token_s=first_token_s,
        first_token_growth=0.0,
        inter_token_s=0.0,
        inter_token_growth=0.0,
        max_concurrent=max_concurrent,
    )


@asynccontextmanager
async def served(simulator: Simulator) -> AsyncIterator[Mesh]:
    """A service whose one backend gets one request at a time."""
    settings = InferenceSettings.model_validate(
        {
            "ephemeral_ports": True,
            "grace_s": 0.5,
            "backends": [
                {"url": simulator.url, "concurrency": {"mode": "fixed", "maximum": 1}},
            ],
            "models": [{"name": "small", "upstream_model": "sim-small"}],
            "cache": {"enabled": False},
            "limits": {"enabled": False},
            "mesh": {"cache": NOBODY, "ratelimit": NOBODY, "metrics": NOBODY},
        }
    )
    server = Server(settings, InferenceServicer)
    await server.start()
    try:
        async with Mesh.connect(
            inference=server.address, metrics=NOBODY, tenant="acme", patience=0.2
        ) as mesh:
            yield mesh
    finally:
        await server.stop()


async def in_line(mesh: Mesh, count: int) -> None:
    async def queued() -> bool:
        (model,) = [each async for each in mesh.inference.list_models()]
        return model.queued == count

    await eventually_async(queued)


async def test_who_joins_with_a_later_deadline_is_not_given_up_at_an_earlier_one() -> None:
    async with Simulator(even(0.9, max_concurrent=1)) as simulator, served(simulator) as mesh:
        url = f"{simulator.url}/chat/completions"
        busy = {"model": "sim-small", "messages": [{"role": "user", "content": "somebody else"}]}
        async with aiohttp.ClientSession() as http:
            other = asyncio.create_task(http.post(url, json=busy))
            await eventually(lambda: simulator.load.running == 1)
            # The backend asks both to come back in a second, which is too late for one of them.
            hasty, patient = await asyncio.gather(
                mesh.inference.generate("the same", model="small", timeout=0.6),
                mesh.inference.generate("the same", model="small", timeout=10.0),
                return_exceptions=True,
            )
            (await other).close()
        assert isinstance(hasty, DeadlineExceededError)
        assert isinstance(patient, Answer)
        assert simulator.load.refused == 1
        assert simulator.load.requests == 3


async def test_who_waits_in_line_longer_than_the_first_is_answered_all_the_same() -> None:
    async with Simulator(even(0.4)) as simulator, served(simulator) as mesh:
        running = asyncio.create_task(mesh.inference.generate("first", model="small"))
        await eventually(lambda: simulator.load.running == 1)
        hasty = asyncio.create_task(mesh.inference.generate("same", model="small", timeout=0.2))
        await in_line(mesh, 1)
        patient = asyncio.create_task(mesh.inference.generate("same", model="small", timeout=10.0))
        with pytest.raises(DeadlineExceededError):
            await hasty
        assert (await patient).text
        await running
        assert simulator.load.requests == 2


async def test_a_hopeless_call_is_refused_on_arrival_and_a_later_one_of_its_kind_is_not() -> None:
    async with Simulator(even(0.2)) as simulator, served(simulator) as mesh:
        for number in range(5):
            await mesh.inference.generate(f"warm {number}", model="small")
        waiting = [
            asyncio.create_task(mesh.inference.generate(f"prompt {number}", model="small"))
            for number in range(6)
        ]
        await in_line(mesh, 5)
        with pytest.raises(MeshError) as refused:
            await mesh.inference.generate("the same", model="small", timeout=0.25)
        assert refused.value.reason == "QUEUE_DEADLINE"
        assert refused.value.metadata["when"] == "arrival"
        assert (await mesh.inference.generate("the same", model="small", timeout=20.0)).text
        await asyncio.gather(*waiting)


async def test_who_would_wait_longer_for_a_turn_is_not_given_up_with_one_who_would_not() -> None:
    async with Simulator(even(0.6)) as simulator, served(simulator) as mesh:
        running = asyncio.create_task(mesh.inference.generate("first", model="small"))
        await eventually(lambda: simulator.load.running == 1)
        short = GenerateRequest("same", model="small", queue_timeout=0.2)
        hasty = asyncio.create_task(mesh.inference.generate(short))
        await in_line(mesh, 1)
        alike = asyncio.create_task(mesh.inference.generate(short))
        patient = asyncio.create_task(mesh.inference.generate("same", model="small"))
        for each in (hasty, alike):
            with pytest.raises(MeshError) as refused:
                await each
            assert refused.value.reason == "QUEUE_DEADLINE"
        assert (await patient).text
        await running
        assert simulator.load.requests == 2
