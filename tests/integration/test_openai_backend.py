"""The OpenAI backend against the simulator, over HTTP."""

import asyncio
import time
from contextlib import asynccontextmanager

import grpc
import pytest
from support.polling import eventually

from agent360.client.errors import MeshError
from agent360.mesh.inference.answers import merge, whole_calls
from agent360.mesh.inference.backends.openai import OpenAIBackend
from agent360.mesh.inference.conversation import (
    EmbeddingInputs,
    Message,
    Prompt,
    Sampling,
    Tool,
    ToolChoice,
)
from agent360.mesh.inference.settings import BackendSettings
from agent360.mesh.simulator import Simulator, SimulatorSettings

FAST = {"port": 0, "first_token_s": 0.0, "inter_token_s": 0.0}


@asynccontextmanager
async def connected(simulator: Simulator, **more):
    backend = OpenAIBackend(BackendSettings(name="sim", url=simulator.url, **more))
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


@pytest.fixture
async def simulator():
    async with Simulator(SimulatorSettings(**FAST)) as running:
        yield running


@pytest.fixture
async def backend(simulator):
    async with connected(simulator) as opened:
        yield opened


def prompt(content: str, **more) -> Prompt:
    return Prompt(model="sim-small", messages=(Message("user", content),), **more)


async def run(backend: OpenAIBackend, asked: Prompt, *, streamed: bool):
    pieces = []
    ending = await backend.generate(asked, "sim-small", pieces.extend, streamed=streamed)
    return merge(pieces), ending


async def failure(backend: OpenAIBackend, content: str, *, streamed: bool = True) -> MeshError:
    with pytest.raises(MeshError) as caught:
        await run(backend, prompt(content), streamed=streamed)
    return caught.value


async def test_a_streamed_answer_is_the_whole_answer_in_pieces(backend):
    whole, whole_ending = await run(backend, prompt("Name three rivers"), streamed=False)
    streamed, streamed_ending = await run(backend, prompt("Name three rivers"), streamed=True)
    assert whole == streamed
    assert whole.content.startswith("This is a simulated answer")
    assert whole_ending == streamed_ending
    assert whole_ending.usage.output_tokens > 0


@pytest.mark.parametrize("streamed", [True, False])
async def test_tool_calls_are_read(backend, streamed):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    asked = prompt(
        "Weather in Rome", tools=(Tool("weather", "Tells the weather", schema),),
        tool_choice=ToolChoice("required", "weather"),
    )  # fmt: skip
    said, ending = await run(backend, asked, streamed=streamed)
    (call,) = whole_calls(said)
    assert (call.name, ending.finish_reason) == ("weather", "tool_calls")
    assert call.id
    assert '"city"' in call.arguments


async def test_a_bounded_answer_ends_by_length(backend):
    said, ending = await run(
        backend, prompt("Go on", sampling=Sampling(max_tokens=3)), streamed=True
    )
    assert said.content == "This is a"
    assert ending.finish_reason == "length"
    assert ending.usage.output_tokens == 3


async def test_an_answer_without_usage_says_so(backend):
    for streamed in (True, False):
        _, ending = await run(backend, prompt("Hi [[sim:no_usage]]"), streamed=streamed)
        assert ending.usage is None


@pytest.mark.parametrize("streamed", [True, False])
async def test_errors_have_canonical_codes_and_say_when_to_come_back(backend, streamed):
    error = await failure(backend, "[[sim:error=429]][[sim:retry_after=2.5]]", streamed=streamed)
    assert (error.code, error.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "UPSTREAM_RATE_LIMITED",
    )
    assert error.retry_after_s == 2.5
    error = await failure(backend, "[[sim:error=503]]", streamed=streamed)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "UPSTREAM_FAILED")


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_break_in_the_middle_is_told_at_once(backend, streamed):
    began = time.monotonic()
    error = await failure(backend, "[[sim:break=10]]", streamed=streamed)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "UPSTREAM_BROKE")
    assert time.monotonic() - began < 1.0


@pytest.mark.parametrize("streamed", [True, False])
async def test_garbage_is_told_apart(backend, streamed):
    error = await failure(backend, "[[sim:malformed=3]]", streamed=streamed)
    assert error.reason == "UPSTREAM_MALFORMED"


async def test_a_silent_server_is_given_up_after_the_stall_timeout(simulator):
    async with connected(simulator, stall_timeout_s=0.2) as backend:
        for where in ("stall=30", "stall=30@5"):
            error = await failure(backend, f"[[sim:{where}]]")
            assert (error.code, error.reason) == (
                grpc.StatusCode.UNAVAILABLE,
                "UPSTREAM_STALLED",
            )
    await eventually(lambda: simulator.load.running == 0)


async def test_a_slow_answer_is_given_up_after_the_try_timeout(simulator):
    async with connected(simulator, try_timeout_s=0.3) as backend:
        error = await failure(backend, "[[sim:itl=0.05]][[sim:tokens=100]]")
        assert error.reason == "UPSTREAM_TIMEOUT"


async def test_a_server_that_is_not_there_is_unreachable():
    backend = OpenAIBackend(BackendSettings(url="http://127.0.0.1:9/v1"))
    await backend.start()
    try:
        assert (await failure(backend, "Hi")).reason == "UPSTREAM_UNREACHABLE"
    finally:
        await backend.close()


async def test_cancelling_stops_the_server(simulator, backend):
    task = asyncio.create_task(run(backend, prompt("[[sim:stall=60@3]]"), streamed=True))
    await eventually(lambda: simulator.load.running == 1)
    task.cancel()
    await eventually(lambda: simulator.load.running == 0)
    assert simulator.load.cancelled == 1


async def test_the_key_is_sent_and_a_wrong_one_is_not_shown():
    async with Simulator(SimulatorSettings(**FAST, api_key="sk-right")) as simulator:
        async with connected(simulator, api_key="sk-right") as backend:
            said, _ = await run(backend, prompt("Hi"), streamed=False)
            assert said.content
        async with connected(simulator, api_key="sk-wrong") as backend:
            error = await failure(backend, "Hi")
    assert (error.code, error.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "UPSTREAM_UNAUTHENTICATED",
    )
    assert "sk-" not in repr(error)


async def test_connections_are_kept_and_bounded(simulator):
    async with connected(simulator, max_connections=2) as backend:
        await asyncio.gather(
            *(run(backend, prompt(f"[[sim:ttft=0.05]] {n}"), streamed=n % 2 == 0) for n in range(8))
        )
    assert simulator.load.requests == 8
    assert simulator.load.peak <= 2


async def test_a_restarted_server_is_reached_again_without_an_error():
    async with Simulator(SimulatorSettings(**FAST)) as first, connected(first) as backend:
        await run(backend, prompt("Hi"), streamed=False)
        await first.close()
        port = int(first.url.rsplit(":", 1)[1].removesuffix("/v1"))
        async with Simulator(SimulatorSettings(**{**FAST, "port": port})):
            said, _ = await run(backend, prompt("Hi"), streamed=False)
            assert said.content


async def test_models_are_listed(backend):
    assert await backend.list_models() == ["sim-small", "sim-large", "sim-embed"]


async def test_vectors_come_in_the_order_of_the_texts(backend):
    request = EmbeddingInputs("sim-embed", ("one text", "another", "one text"), dimensions=16)
    vectors, usage = await backend.embed(request, "sim-embed")
    assert [len(vector) for vector in vectors] == [16, 16, 16]
    assert vectors[0] == vectors[2] != vectors[1]
    assert usage.input_tokens == 5
