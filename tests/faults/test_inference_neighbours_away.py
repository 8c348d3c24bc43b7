"""The inference service while its neighbours die and come back: answers, true charges, no leaks."""

import asyncio
from pathlib import Path

import pytest
from support.inference_mesh import MODELS
from support.polling import eventually_async
from support.replicas import Replica
from support.servers import running

from agent360.client import AnswerSource, GenerateRequest, Mesh, MeshError, UnavailableError
from agent360.mesh.simulator import Simulator, SimulatorSettings

LIMITS = """
[[limits]]
id = "tokens"
name = "inference.tokens"
algorithm = "sliding_window"
amount = 100000
period = "10m"
"""


@pytest.fixture
async def simulator():
    async with Simulator(
        SimulatorSettings(port=0, first_token_s=0.01, inter_token_s=0.0)
    ) as started:
        yield started


def settings(simulator: Simulator, **more):
    return {
        "backends": [{"url": simulator.url}],
        "models": MODELS,
        "cache": {"timeout_s": 1.0},
        "limits": {"timeout_s": 1.0},
        **more,
    }


async def ask(mesh: Mesh, text: str):
    return await mesh.inference.generate(GenerateRequest(text, model="small", max_tokens=100))


async def test_answers_go_on_without_the_cache_and_are_kept_again_when_it_is_back(simulator):
    async with (
        Replica("cache") as cache,
        running("inference", **settings(simulator, mesh={"cache": cache.address})) as server,
        Mesh.connect(inference=server.address, tenant="acme", api_key="") as mesh,
    ):
        await ask(mesh, "one")
        assert (await ask(mesh, "one")).source is AnswerSource.CACHE
        await cache.kill()
        answers = await asyncio.gather(*(ask(mesh, f"away {n}") for n in range(20)))
        assert {each.source for each in answers} == {AnswerSource.MODEL}
        await cache.start()

        async def kept_again() -> bool:
            await ask(mesh, "two")
            return (await ask(mesh, "two")).source is AnswerSource.CACHE

        await eventually_async(kept_again, 20)


async def test_where_limits_are_closed_nothing_runs_without_them_and_all_runs_when_they_are_back(
    simulator, tmp_path: Path
):
    file = tmp_path / "limits.toml"
    file.write_text(LIMITS)
    async with (
        Replica("ratelimit", limits=str(file)) as limiter,
        running(
            "inference",
            **settings(
                simulator,
                cache={"enabled": False},
                limits={"timeout_s": 1.0, "when_away": "closed"},
                mesh={"ratelimit": limiter.address},
            ),
        ) as server,
        Mesh.connect(
            inference=server.address, ratelimit=limiter.address, tenant="acme", api_key=""
        ) as mesh,
    ):
        await ask(mesh, "one")
        await limiter.kill()

        async def refused() -> bool:
            # Leased requests may be spent for a while; tokens never without the service.
            with pytest.raises(MeshError) as caught:
                await ask(mesh, "two")
            return caught.value.reason == "RATELIMIT_UNAVAILABLE"

        await eventually_async(refused, 20)
        calls = simulator.load.by_path["/v1/chat/completions"]
        assert calls == 1
        await limiter.start()

        async def served() -> bool:
            try:
                return bool((await ask(mesh, "three")).text)
            except UnavailableError:
                return False

        await eventually_async(served, 20)
        before = (await mesh.ratelimit.get_usage("tokens")).used
        answer = await ask(mesh, "four")
        spent = answer.usage.input_tokens + answer.usage.output_tokens

        async def settled() -> bool:
            return (await mesh.ratelimit.get_usage("tokens")).used == before + spent

        await eventually_async(settled)
