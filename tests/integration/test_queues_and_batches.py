"""Queues and batches of the real service, before a simulated model server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from support.polling import eventually, eventually_async

from agent360.client import GenerateRequest, Mesh, MeshError, Priority, call_scope
from agent360.mesh.inference import InferenceServicer, InferenceSettings
from agent360.mesh.runtime.server import Server
from agent360.mesh.simulator import Simulator, SimulatorSettings

NOBODY = "127.0.0.1:9"


@asynccontextmanager
async def served(simulator: Simulator, **settings: object) -> AsyncIterator[tuple[Server, Mesh]]:
    values: dict[str, object] = {
        "ephemeral_ports": True,
        "grace_s": 0.5,
        "backends": [{"url": simulator.url}],
        "models": [
            {"name": "small", "upstream_model": "sim-small"},
            {"name": "embedder", "upstream_model": "sim-embed", "capabilities": ["embeddings"]},
        ],
        "cache": {"enabled": False},
        "limits": {"enabled": False},
        "mesh": {"cache": NOBODY, "ratelimit": NOBODY, "metrics": NOBODY},
        **settings,
    }
    server = Server(InferenceSettings.model_validate(values), InferenceServicer)
    await server.start()
    try:
        async with Mesh.connect(
            inference=server.address, metrics=NOBODY, tenant="acme", patience=0.2
        ) as mesh:
            yield server, mesh
    finally:
        await server.stop()


def embedder(**batch: object) -> list[dict[str, object]]:
    return [
        {
            "name": "embedder",
            "upstream_model": "sim-embed",
            "capabilities": ["embeddings"],
            "batch": batch,
        }
    ]


async def metrics_of(server: Server) -> dict[str, float]:
    url = f"http://127.0.0.1:{server.http_port}/metrics"
    async with aiohttp.ClientSession() as http, http.get(url) as response:
        lines = (await response.text()).splitlines()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
    }


# -------------------------------------------------------------------- batches


async def test_texts_of_many_callers_share_calls_and_each_gets_its_own_vector() -> None:
    options = SimulatorSettings(port=0, first_token_s=0.02, text_s=0.001, embedding_workers=1)
    async with (
        Simulator(options) as simulator,
        served(simulator, models=embedder(max_size=32, max_in_flight=1)) as (server, mesh),
    ):
        texts = [f"text number {number}" for number in range(200)]
        found = await asyncio.gather(
            *(mesh.inference.embed([text], model="embedder") for text in texts)
        )
        calls = simulator.load.by_path["/v1/embeddings"]
        assert calls <= 200 // 32 + 3
        together = await mesh.inference.embed(texts, model="embedder")
        assert [list(each.vectors[0]) for each in found] == list(map(list, together.vectors))
        metrics = await metrics_of(server)
        assert metrics['inference_request_success_total{model="embedder"}'] == 200 + 7
        assert metrics['inference_count_total{model="embedder"}'] == 400
        assert metrics['inference_exec_count_total{model="embedder"}'] == calls + 7
        assert metrics['inference_batch_size_count{model="embedder"}'] == calls + 7
        assert metrics['inference_batch_size_sum{model="embedder"}'] == 400
        assert not [name for name in metrics if "acme" in name and "inference_" in name]


async def test_callers_that_come_back_fill_95_percent_of_the_batches() -> None:
    options = SimulatorSettings(port=0, first_token_s=0.03, text_s=0.001, embedding_workers=1)
    async with (
        Simulator(options) as simulator,
        served(simulator, models=embedder(max_size=32, max_in_flight=1)) as (_, mesh),
    ):

        async def caller(number: int) -> None:
            for turn in range(10):
                await mesh.inference.embed([f"{number} {turn}"], model="embedder")

        await asyncio.gather(*map(caller, range(96)))
        calls = simulator.load.by_path["/v1/embeddings"]
    # What the backend spent, over what it would spend if every batch were full.
    best_s = 960 / 32 * (0.03 + 32 * 0.001)
    assert (calls * 0.03 + 960 * 0.001) * 0.95 <= best_s


async def test_usage_is_divided_among_those_who_shared_a_call() -> None:
    async with (
        Simulator(SimulatorSettings(port=0, first_token_s=0.03)) as simulator,
        served(simulator, models=embedder(max_in_flight=1)) as (_, mesh),
    ):
        texts = ["a", "a few more words " * 20, "and some " * 5]
        alone = [await mesh.inference.embed([text], model="embedder") for text in texts]
        simulator.load.by_path.clear()
        together = await asyncio.gather(
            *(mesh.inference.embed([text], model="embedder") for text in texts)
        )
        assert simulator.load.by_path["/v1/embeddings"] < 3
        total = sum(each.input_tokens for each in together)
        assert total == sum(each.input_tokens for each in alone)
        assert together[1].input_tokens > together[2].input_tokens


async def test_a_text_that_the_backend_refuses_fails_alone() -> None:
    async with (
        Simulator(SimulatorSettings(port=0, first_token_s=0.01)) as simulator,
        served(simulator, models=embedder(max_in_flight=1)) as (_, mesh),
    ):
        texts = [f"text {number}" for number in range(20)]
        texts[11] += " [[sim:error=400]]"
        results = await asyncio.gather(
            *(mesh.inference.embed([text], model="embedder") for text in texts),
            return_exceptions=True,
        )
        refused = [at for at, result in enumerate(results) if isinstance(result, MeshError)]
        assert refused == [11]


async def test_a_request_of_more_texts_than_a_batch_takes_is_divided() -> None:
    async with (
        Simulator(SimulatorSettings(port=0, first_token_s=0.0)) as simulator,
        served(simulator, models=embedder(max_size=16)) as (_, mesh),
    ):
        texts = [f"text {number}" for number in range(100)]
        found = await mesh.inference.embed(texts, model="embedder")
        assert simulator.load.by_path["/v1/embeddings"] == 7
        single = await mesh.inference.embed(texts[50:51], model="embedder")
        assert list(found.vectors[50]) == list(single.vectors[0])
        assert len(found.vectors) == 100


# -------------------------------------------------------------------- queues


def small(**queue: object) -> list[dict[str, object]]:
    return [{"name": "small", "upstream_model": "sim-small", "queue": queue}]


def backend(simulator: Simulator, slots: int) -> list[dict[str, object]]:
    return [{"url": simulator.url, "concurrency": {"mode": "fixed", "maximum": slots}}]


SLOW = {"first_token_growth": 0.0, "inter_token_growth": 0.0, "inter_token_s": 0.0}


async def test_a_backend_gets_its_limit_of_requests_and_the_rest_shows_as_queued() -> None:
    async with (
        Simulator(SimulatorSettings(port=0, first_token_s=0.3, **SLOW)) as simulator,
        served(simulator, models=small(), backends=backend(simulator, 3)) as (_, mesh),
    ):
        asked = [
            asyncio.create_task(mesh.inference.generate(f"prompt {n}", model="small"))
            for n in range(9)
        ]

        async def shown() -> bool:
            (model,) = [each async for each in mesh.inference.list_models()]
            return (model.running, model.queued) == (3, 6)

        await eventually_async(shown)
        await asyncio.gather(*asked)
        assert simulator.load.peak == 3


async def test_an_urgent_caller_that_joins_a_waiting_request_moves_it_up() -> None:
    async with (
        Simulator(SimulatorSettings(port=0, first_token_s=0.3, **SLOW)) as simulator,
        served(simulator, models=small(), backends=backend(simulator, 1)) as (_, mesh),
    ):
        answered: list[str] = []

        async def ask(prompt: str, priority: Priority) -> None:
            with call_scope(priority=priority):
                await mesh.inference.generate(prompt, model="small")
            answered.append(f"{prompt} {priority.name}")

        async def queued(count: int) -> None:
            async def shown() -> bool:
                (model,) = [each async for each in mesh.inference.list_models()]
                return (model.running, model.queued) == (1, count)

            await eventually_async(shown)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ask("first", Priority.NORMAL))
            await queued(0)
            tasks.create_task(ask("shared", Priority.LOW))
            await queued(1)
            tasks.create_task(ask("other", Priority.NORMAL))
            await queued(2)
            tasks.create_task(ask("shared", Priority.HIGH))
        assert answered[0] == "first NORMAL"
        assert set(answered[1:3]) == {"shared LOW", "shared HIGH"}
        assert simulator.load.requests == 3


async def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    async with (
        Simulator(SimulatorSettings(port=0, first_token_s=0.2, **SLOW)) as simulator,
        served(simulator, models=small(max_items=2), backends=backend(simulator, 1)) as (_, mesh),
    ):
        for number in range(5):
            await mesh.inference.generate(f"warm {number}", model="small", timeout=5.0)
        results = await asyncio.gather(
            *(mesh.inference.generate(f"prompt {n}", model="small") for n in range(6)),
            return_exceptions=True,
        )
        refused = [result for result in results if isinstance(result, MeshError)]
        assert [error.reason for error in refused] == ["QUEUE_FULL"] * 3
        assert all(error.retry_after_s and error.retry_after_s > 0 for error in refused)


async def test_a_request_can_shorten_its_wait_in_the_queue() -> None:
    async with (
        Simulator(SimulatorSettings(port=0, first_token_s=1.0, **SLOW)) as simulator,
        served(simulator, models=small(), backends=backend(simulator, 1)) as (_, mesh),
    ):
        running = asyncio.create_task(mesh.inference.generate("first", model="small"))
        await eventually(lambda: simulator.load.running == 1)
        with pytest.raises(MeshError) as refused:
            await mesh.inference.generate(
                GenerateRequest("second", model="small", queue_timeout=0.1)
            )
        assert refused.value.reason == "QUEUE_DEADLINE"
        assert refused.value.metadata["when"] == "waiting"
        assert not running.done()
        await running


async def test_a_deadline_that_the_queue_cannot_meet_is_refused_on_arrival() -> None:
    async with (
        Simulator(SimulatorSettings(port=0, first_token_s=0.2, **SLOW)) as simulator,
        served(simulator, models=small(), backends=backend(simulator, 1)) as (_, mesh),
    ):
        for number in range(5):
            await mesh.inference.generate(f"warm {number}", model="small")
        waiting = [
            asyncio.create_task(mesh.inference.generate(f"prompt {n}", model="small"))
            for n in range(20)
        ]

        async def queued() -> bool:
            (model,) = [each async for each in mesh.inference.list_models()]
            return model.queued == 19

        await eventually_async(queued)
        # It is due before the nineteen that wait, and would be late all the same.
        with pytest.raises(MeshError) as refused:
            await mesh.inference.generate("hasty", model="small", timeout=0.25)
        assert refused.value.reason == "QUEUE_DEADLINE"
        assert refused.value.metadata["when"] == "arrival"
        assert refused.value.retry_after_s
        assert simulator.load.running <= 1
        await asyncio.gather(*waiting)


async def test_a_caller_that_leaves_makes_room_at_once() -> None:
    async with (
        Simulator(SimulatorSettings(port=0, first_token_s=0.5, **SLOW)) as simulator,
        served(simulator, models=small(), backends=backend(simulator, 1)) as (server, mesh),
    ):
        running = asyncio.create_task(mesh.inference.generate("first", model="small"))
        await eventually(lambda: simulator.load.running == 1)
        waiting = [
            asyncio.create_task(mesh.inference.generate(f"prompt {n}", model="small"))
            for n in range(20)
        ]

        async def pending(count: int) -> bool:
            metrics = await metrics_of(server)
            return metrics['inference_pending_requests{model="small"}'] == count

        await eventually_async(lambda: pending(20))
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        await eventually_async(lambda: pending(0))
        assert not running.done()
        await running
        assert simulator.load.requests == 1


@pytest.mark.parametrize("slots", [4, 8])
async def test_beside_a_flood_of_50_to_1_the_p99_of_another_tenant_at_most_doubles(
    slots: int,
) -> None:
    async def latencies(mesh: Mesh, count: int) -> list[float]:
        taken = []
        for number in range(count):
            began = time.monotonic()
            # About 25 tokens of 6 ms each.
            await mesh.inference.generate(
                f"calm {number} [[sim:tokens=25]]", model="small", max_tokens=30, tenant="calm"
            )
            taken.append(time.monotonic() - began)
        return sorted(taken)

    async with (
        Simulator(
            SimulatorSettings(port=0, first_token_s=0.02, **{**SLOW, "inter_token_s": 0.006})
        ) as simulator,
        served(simulator, models=small(), backends=backend(simulator, slots)) as (_, mesh),
    ):
        alone = await latencies(mesh, 20)
        stop = asyncio.Event()

        async def flood(number: int) -> None:
            # Some a tenth, some ten times as long as those of the calm tenant.
            while not stop.is_set():
                tokens = (2, 5, 10, 50, 250)[number % 5]
                await mesh.inference.generate(
                    f"flood {number} {time.monotonic()} [[sim:tokens={tokens}]]",
                    model="small",
                    max_tokens=tokens + 5,
                    tenant="flood",
                )

        tasks = [asyncio.create_task(flood(number)) for number in range(50)]
        await eventually(lambda: simulator.load.running >= slots - 1)
        beside = await latencies(mesh, 20)
        stop.set()
        await asyncio.gather(*tasks)
    assert beside[-1] <= 2 * alone[-1]


@pytest.mark.parametrize("mode", ["aimd", "gradient"])
async def test_every_mode_of_the_limit_serves(mode: str) -> None:
    async with (
        Simulator(SimulatorSettings(port=0, first_token_s=0.005, **SLOW)) as simulator,
        served(
            simulator,
            models=small(),
            backends=[{"url": simulator.url, "concurrency": {"mode": mode, "maximum": 16}}],
        ) as (_, mesh),
    ):
        answers = await asyncio.gather(
            *(mesh.inference.generate(f"prompt {n}", model="small") for n in range(100))
        )
        assert len(answers) == 100
        assert simulator.load.peak <= 16
