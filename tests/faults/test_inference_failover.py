"""Model servers that die, stall, refuse or are slow, as a caller over gRPC sees them."""

import asyncio
import math
import time
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import grpc
import pytest
from support.polling import eventually, eventually_async
from support.simulator_process import SimulatorProcess

from agent360.client import Mesh, MeshError, UnavailableError
from agent360.mesh.inference import InferenceServicer, InferenceSettings
from agent360.mesh.runtime.server import Server
from agent360.mesh.simulator import Simulator, SimulatorSettings

NOBODY = "127.0.0.1:9"
ALONE = {
    "cache": {"enabled": False},
    "limits": {"enabled": False},
    "mesh": {"cache": NOBODY, "ratelimit": NOBODY, "metrics": NOBODY},
}
ALONE_EACH = {"batch": {"enabled": False}}
EMBEDDER = {"upstream_model": "sim-embed", "capabilities": ["embeddings"]}
FAST = {"port": 0, "first_token_s": 0.0, "inter_token_s": 0.0}
UNLIMITED = {"breaker": {"enabled": False}}


@asynccontextmanager
async def served(
    backends: dict[str, str], models: list[dict], *, seen: list[Server] | None = None, **settings
):
    """The service in front of backends, by their names and URLs; a client of it.

    Args:
        backends: URLs by name.
        models: the catalogue.
        seen: gets the server.
        settings: of the service, and of the backend NAME as ``backend_NAME``.
    """
    values = {
        "ephemeral_ports": True,
        "grace_s": 0.5,
        "backends": [
            {"name": name, "url": url, **settings.pop(f"backend_{name}", {})}
            for name, url in backends.items()
        ],
        "models": models,
        **ALONE,
        **settings,
    }
    server = Server(InferenceSettings.model_validate(values), InferenceServicer)
    await server.start()
    if seen is not None:
        seen.append(server)
    try:
        async with Mesh.connect(
            inference=server.address, metrics=NOBODY, tenant="acme", patience=0.2
        ) as mesh:
            yield mesh
    finally:
        await server.stop()


@asynccontextmanager
async def simulators(**simulated: dict):
    """Simulators in this process, by the names of their backends."""
    async with AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(Simulator(SimulatorSettings(**{**FAST, **more})))
            for name, more in simulated.items()
        }


def urls(running: dict[str, Simulator]) -> dict[str, str]:
    return {name: simulator.url for name, simulator in running.items()}


def model(name: str, *backends: str, **more) -> dict:
    return {"name": name, "backends": list(backends), "upstream_model": "sim-small", **more}


async def hear(mesh: Mesh, text: str, **more):
    """The text of a streamed answer, and the answer."""
    stream = mesh.inference.stream(text, **more)
    said = [delta.text async for delta in stream]
    return "".join(said), stream.answer


async def whole(mesh: Mesh, text: str, **more):
    answer = await mesh.inference.generate(text, **more)
    return answer.text, answer


async def vectors(mesh: Mesh, text: str, **more):
    found = await mesh.inference.embed([text], **more)
    return found.vectors[0], found


async def prometheus(server: Server) -> str:
    """What the service tells Prometheus."""
    address = f"http://127.0.0.1:{server.http_port}/metrics"
    async with aiohttp.ClientSession() as session, session.get(address) as response:
        return await response.text()


async def failure(asked) -> MeshError:
    with pytest.raises(MeshError) as caught:
        await asked
    return caught.value


@pytest.mark.parametrize("ask", [hear, whole])
async def test_nobody_notices_a_server_that_is_killed_before_its_first_word(ask):
    async with (
        SimulatorProcess(ttft=0.7) as dying,
        simulators(spare={}) as others,
        served(
            {"dying": dying.url, **urls(others)},
            [model("m", "dying", fallbacks=["n"]), model("n", "spare")],
        ) as mesh,
    ):
        asked = [
            asyncio.create_task(ask(mesh, f"question {n}", model="m", timeout=30))
            for n in range(50)
        ]

        async def all_running() -> bool:
            return (await dying.load())["running"] == 50

        await eventually_async(all_running)
        await dying.kill()
        answers = await asyncio.gather(*asked)
        later = await asyncio.gather(*(ask(mesh, f"later {n}", model="m") for n in range(20)))
    assert len(answers) == 50
    for text, answer in [*answers, *later]:
        assert text.startswith("This is a simulated answer")
        assert answer.text == text
        assert (answer.model, answer.backend, answer.rule) == ("n", "spare", "fallback:n")


async def test_another_backend_of_the_model_takes_over_from_one_that_is_killed():
    async with (
        SimulatorProcess(ttft=1.0) as dying,
        simulators(spare={"first_token_s": 1.0}) as others,
        served({"dying": dying.url, **urls(others)}, [model("m", "dying", "spare")]) as mesh,
    ):
        asked = [
            asyncio.create_task(hear(mesh, f"question {n}", model="m", timeout=30))
            for n in range(50)
        ]

        async def half_running() -> bool:
            running = (await dying.load())["running"]
            return running >= 20 and running + others["spare"].load.running == 50

        await eventually_async(half_running)
        await dying.kill()
        answers = await asyncio.gather(*asked)
    assert {(answer.backend, answer.rule) for _, answer in answers} == {("spare", "explicit")}


async def test_vectors_of_a_server_that_is_killed_come_from_the_fallback():
    async with (
        SimulatorProcess(ttft=0.7) as dying,
        simulators(spare={}) as others,
        served(
            {"dying": dying.url, **urls(others)},
            [
                model("m", "dying", fallbacks=["n"], **EMBEDDER),
                model("n", "spare", **EMBEDDER),
            ],
        ) as mesh,
    ):
        asked = [
            asyncio.create_task(mesh.inference.embed([f"text {n}"], model="m", timeout=30))
            for n in range(50)
        ]

        async def some_running() -> bool:
            return (await dying.load())["running"] > 0

        await eventually_async(some_running)
        await dying.kill()
        answers = await asyncio.gather(*asked)
    assert [answer.model for answer in answers] == ["n"] * 50


async def test_a_server_that_is_killed_in_the_middle_is_told_within_100_ms_with_what_it_said():
    async with (
        SimulatorProcess(itl=0.02) as dying,
        simulators(spare={}) as others,
        served(
            {"dying": dying.url, **urls(others)},
            [model("m", "dying", fallbacks=["n"]), model("n", "spare")],
        ) as mesh,
    ):
        said: list[str] = []
        told_at = math.nan

        async def listen() -> None:
            nonlocal told_at
            try:
                async for delta in mesh.inference.stream("[[sim:tokens=5000]]", model="m"):
                    said.append(delta.text)  # noqa: PERF401 - it is looked at meanwhile
            except UnavailableError:
                told_at = time.monotonic()
                raise

        listening = asyncio.create_task(listen())
        await eventually(lambda: len(said) >= 10)
        killed_at = time.monotonic()
        await dying.kill()
        error = await failure(listening)
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "STREAM_BROKEN")
        assert told_at - killed_at < 0.1
        text = "".join(said)
        assert error.metadata["partial_text"] == text[:2048]
        assert error.metadata["produced_bytes"] == str(len(text))
        assert int(error.metadata["produced_tokens_estimate"]) == len(text.split())
        assert error.metadata["backend"] == "dying"
        assert others["spare"].load.requests == 0


@pytest.mark.parametrize(
    ("ask", "more"),
    [(hear, {}), (whole, {}), (vectors, EMBEDDER)],
    ids=["stream", "whole", "embed"],
)
async def test_a_stalled_server_is_left_at_the_deadline_of_a_try(ask, more):
    limit = "first_token_timeout_s" if ask is hear else "try_timeout_s"
    retry = {"retry": {limit: 0.3}}
    async with (
        simulators(stalled={"stall_rate": 1.0, "stall_s": 60}, spare={}) as both,
        served(
            urls(both),
            [model("m", "stalled", fallbacks=["n"], **retry, **more), model("n", "spare", **more)],
        ) as mesh,
    ):
        if ask is vectors:
            both["stalled"]._settings = SimulatorSettings(**{**FAST, "first_token_s": 60})
        began = time.monotonic()
        _, answer = await ask(mesh, "Hi", model="m")
        took_s = time.monotonic() - began
        assert answer.model == "n"
        assert 0.3 <= took_s < 2.0
        await eventually(lambda: both["stalled"].load.running == 0)
        assert both["stalled"].load.cancelled == 1


async def test_a_stall_in_the_middle_is_cut_at_the_deadline_of_a_try():
    retry = {"retry": {"try_timeout_s": 0.5}}
    async with (
        simulators(only={}) as running,
        served(urls(running), [model("m", "only", **retry)]) as mesh,
    ):
        began = time.monotonic()
        error = await failure(hear(mesh, "[[sim:stall=60@5]]", model="m"))
        assert error.reason == "STREAM_BROKEN"
        assert error.metadata["cause"] == "UPSTREAM_TIMEOUT"
        assert error.metadata["partial_text"] == "This is a simulated answer,"
        assert 0.5 <= time.monotonic() - began < 2.0
        await eventually(lambda: running["only"].load.running == 0)


@pytest.mark.parametrize(
    ("ask", "more"),
    [(hear, {}), (whole, {}), (vectors, EMBEDDER)],
    ids=["stream", "whole", "embed"],
)
async def test_a_server_that_says_when_to_come_back_is_not_asked_before(ask, more):
    limited = {"error_first": 1, "error_status": 429, "error_retry_after_s": 1.0}
    seen: list[Server] = []
    async with (
        simulators(only=limited) as running,
        served(urls(running), [model("m", "only", **more)], seen=seen) as mesh,
    ):
        load, began = running["only"].load, time.monotonic()
        first = asyncio.create_task(ask(mesh, "first", model="m", timeout=20))

        async def refusal_is_known() -> bool:
            return 'outcome="UPSTREAM_RATE_LIMITED"' in await prometheus(seen[0])

        await eventually_async(refusal_is_known)
        refused = load.requests
        others = [asyncio.create_task(ask(mesh, f"{n}", model="m", timeout=20)) for n in range(20)]
        while time.monotonic() - began < 0.95:
            assert load.requests == refused
            await asyncio.sleep(0.01)
        answers = await asyncio.gather(first, *others)
        assert len(answers) == 21
        assert load.refused == 1


async def test_a_rest_that_is_too_long_for_the_caller_is_told_at_once():
    limited = {"error_rate": 1.0, "error_status": 429, "error_retry_after_s": 30.0}
    async with (
        simulators(only=limited) as running,
        served(urls(running), [model("m", "only")]) as mesh,
    ):
        first = await failure(whole(mesh, "first", model="m"))
        assert first.reason == "UPSTREAM_RATE_LIMITED"
        assert first.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        second = await failure(whole(mesh, "second", model="m"))
        assert second.reason == "BACKENDS_RESTING"
        assert all(25 < error.retry_after_s <= 30.5 for error in (first, second))
        assert running["only"].load.requests == 1


@pytest.mark.parametrize(
    ("ask", "more"),
    [(hear, {}), (whole, {}), (vectors, EMBEDDER)],
    ids=["stream", "whole", "embed"],
)
async def test_the_retry_budget_bounds_the_tries_during_an_outage(ask, more):
    retry = {"max_tries": 6, "backoff_s": 0.002, "budget": 0.1, "budget_burst": 10}
    async with (
        simulators(down={"error_rate": 1.0}) as running,
        served(
            urls(running),
            [model("m", "down", retry=retry, **ALONE_EACH, **more)],
            backend_down=UNLIMITED,
        ) as mesh,
    ):
        for n in range(6):
            errors = await asyncio.gather(
                *(failure(ask(mesh, f"{n} {k}", model="m")) for k in range(50))
            )
            assert {error.reason for error in errors} == {"UPSTREAM_FAILED"}
        tries = running["down"].load.by_path
        assert 300 < sum(tries.values()) <= 300 + 0.1 * 300 + 10


@pytest.mark.parametrize("ask", [hear, whole])
async def test_a_hedge_cuts_a_slow_try_and_stays_within_its_extra_load(ask):
    hedge = {"enabled": True, "quantile": 0.9, "min_delay_s": 0.1, "budget": 0.05}
    slow = {"stall_rate": 0.05, "stall_s": 60.0, "seed": 11}
    async with (
        simulators(one=slow, two={}) as both,
        served(urls(both), [model("m", "one", "two", hedge=hedge)]) as mesh,
    ):
        loads = [simulator.load for simulator in both.values()]
        for n in range(80):
            await ask(mesh, f"[[sim:stall=0]] {n}", model="m")
        longest, hedged = 0.0, 0
        for n in range(120):
            began = time.monotonic()
            _, answer = await ask(mesh, f"{n}", model="m", timeout=30)
            longest = max(longest, time.monotonic() - began)
            hedged += answer.rule == "hedge"
        assert hedged >= 1
        assert longest < 5.0
        assert sum(load.requests for load in loads) - 2 <= 200 * 1.05
        await eventually(lambda: all(load.running == 0 for load in loads))
        assert loads[0].cancelled == hedged


async def test_a_hedge_answers_when_the_slow_server_is_killed():
    hedge = {"enabled": True, "quantile": 0.5, "min_delay_s": 0.05, "budget": 1.0}
    async with (
        SimulatorProcess() as one,
        SimulatorProcess() as two,
        served({"one": one.url, "two": two.url}, [model("m", "one", "two", hedge=hedge)]) as mesh,
    ):
        for n in range(25):
            await hear(mesh, f"{n}", model="m")
        asked = asyncio.create_task(hear(mesh, "[[sim:ttft=2]]", model="m", timeout=20))

        async def both_running() -> bool:
            return all([(await each.load())["running"] for each in (one, two)])

        await eventually_async(both_running)
        await one.kill()
        text, answer = await asked
        assert text
        assert answer.backend == "two"


@pytest.mark.parametrize("status", [400, 422])
async def test_a_request_at_fault_is_asked_once_and_told_as_that(status):
    async with (
        simulators(one={}, two={}) as both,
        served(urls(both), [model("m", "one", "two", fallbacks=["n"]), model("n", "two")]) as mesh,
    ):
        error = await failure(whole(mesh, f"[[sim:error={status}]]", model="m"))
        assert (error.code, error.reason) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "UPSTREAM_REFUSED",
        )
        assert sum(simulator.load.refused for simulator in both.values()) == 1


async def test_a_killed_server_is_used_again_when_it_is_back():
    async with (
        SimulatorProcess() as dying,
        simulators(spare={}) as others,
        served(
            {"dying": dying.url, **urls(others)},
            [model("m", "dying", fallbacks=["n"]), model("n", "spare")],
            backend_dying={"breaker": {"open_s": 0.2}},
            probe_interval_s=0.2,
        ) as mesh,
    ):
        assert (await hear(mesh, "before", model="m"))[1].model == "m"
        await dying.kill()
        for n in range(10):
            assert (await hear(mesh, f"while {n}", model="m"))[1].model == "n"
        await dying.start()

        async def back() -> bool:
            return (await hear(mesh, "after", model="m"))[1].model == "m"

        await eventually_async(back)
