"""The simulator as an HTTP client sees it."""

import asyncio
import json
import time

import aiohttp
import pytest
from support.polling import eventually

from agent360.mesh.simulator import SimulatedModel, Simulator, SimulatorSettings

FAST = {"port": 0, "first_token_s": 0.0, "inter_token_s": 0.0}


def chat(content: str, **more: object) -> dict[str, object]:
    return {"model": "sim-small", "messages": [{"role": "user", "content": content}], **more}


@pytest.fixture
async def simulator():
    async with Simulator(SimulatorSettings(**FAST)) as running:
        yield running


@pytest.fixture
async def session():
    async with aiohttp.ClientSession() as opened:
        yield opened


async def test_every_answer_says_that_it_is_simulated(simulator, session):
    async with session.post(f"{simulator.url}/chat/completions", json=chat("Hi")) as response:
        found = await response.json()
    assert response.headers["X-Simulator"] == "simulator; no model was run"
    assert found["system_fingerprint"] == "simulator"
    assert found["model"].startswith("sim-")


async def test_a_stream_says_what_the_whole_answer_says(simulator, session):
    url = f"{simulator.url}/chat/completions"
    async with session.post(url, json=chat("Name three rivers")) as response:
        whole = (await response.json())["choices"][0]["message"]["content"]
    request = chat("Name three rivers", stream=True, stream_options={"include_usage": True})
    async with session.post(url, json=request) as response:
        assert response.content_type == "text/event-stream"
        assert response.headers["X-Simulator"]
        lines = (await response.text()).split("\n\n")
    assert lines[-2] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert said == whole
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == len(chunks) - 3


async def test_delays_are_kept_and_grow_with_load(session):
    settings = SimulatorSettings(
        port=0, first_token_s=0.1, first_token_growth=1.0, inter_token_s=0.0
    )
    async with Simulator(settings) as simulator:

        async def once() -> float:
            began = time.monotonic()
            request = chat("[[sim:tokens=5]]")
            async with session.post(f"{simulator.url}/chat/completions", json=request) as response:
                await response.read()
            return time.monotonic() - began

        lone = await once()
        together = await asyncio.gather(once(), once(), once())
    assert lone >= 0.1
    assert max(together) >= 0.25
    assert simulator.load.peak == 3


async def test_models_are_listed_and_unknown_ones_refused(simulator, session):
    async with session.get(f"{simulator.url}/models") as response:
        names = [model["id"] for model in (await response.json())["data"]]
    assert names == ["sim-small", "sim-large", "sim-embed"]
    request = chat("Hi", model="gpt-5")
    async with session.post(f"{simulator.url}/chat/completions", json=request) as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "model_not_found"


async def test_a_key_is_asked_for_where_one_is_set(session):
    async with Simulator(SimulatorSettings(**FAST, api_key="secret")) as simulator:
        url = f"{simulator.url}/chat/completions"
        async with session.post(url, json=chat("Hi")) as response:
            assert response.status == 401
        bearer = {"Authorization": "Bearer secret"}
        async with session.post(url, json=chat("Hi"), headers=bearer) as response:
            assert response.status == 200


async def test_requests_beyond_the_most_at_a_time_are_told_to_come_back(session):
    settings = SimulatorSettings(port=0, first_token_s=0.2, max_concurrent=1)
    async with Simulator(settings) as simulator:

        async def status() -> tuple[int, str | None]:
            url = f"{simulator.url}/chat/completions"
            async with session.post(url, json=chat("Hi")) as response:
                return response.status, response.headers.get("Retry-After")

        answers = await asyncio.gather(status(), status())
    assert sorted(answers, key=str) == [(200, None), (429, "1")]


async def test_garbage_is_refused_and_the_simulator_lives_on(simulator, session):
    url = f"{simulator.url}/chat/completions"
    for garbage in (b"", b"{", b"[]", b'{"messages": 1}', b'{"messages": [{"role": "x"}]}'):
        async with session.post(url, data=garbage) as response:
            assert response.status == 400
    async with session.post(url, json=chat("Hi")) as response:
        assert response.status == 200
    assert simulator.load.running == 0


async def test_a_caller_that_leaves_ends_its_request(session):
    only = SimulatedModel(name="sim-small")
    async with Simulator(SimulatorSettings(port=0, models=(only,))) as simulator:
        url = f"{simulator.url}/chat/completions"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await session.post(url, json=chat("[[sim:stall=60]]"))
        await eventually(lambda: simulator.load.running == 0)
        assert simulator.load.cancelled == 1


async def test_vectors_come_as_numbers_or_in_base64(simulator, session):
    url = f"{simulator.url}/embeddings"
    request = {"model": "sim-embed", "input": ["one text", "another"], "dimensions": 8}
    async with session.post(url, json=request) as response:
        rows = (await response.json())["data"]
    assert [len(row["embedding"]) for row in rows] == [8, 8]
    async with session.post(url, json={**request, "encoding_format": "base64"}) as response:
        assert isinstance((await response.json())["data"][0]["embedding"], str)


async def test_the_load_is_told_over_http(simulator, session):
    for _ in range(2):
        async with session.post(f"{simulator.url}/chat/completions", json=chat("Hi")) as response:
            await response.read()
    async with session.get(simulator.url.replace("/v1", "/sim/load")) as response:
        load = await response.json()
    assert load["requests"] == 2
    assert load["by_path"] == {"/v1/chat/completions": 2}
    assert load["running"] == 0


async def test_the_first_requests_can_be_refused_with_a_time_to_come_back(session):
    settings = SimulatorSettings(**FAST, error_first=2, error_status=429, error_retry_after_s=1.5)
    async with Simulator(settings) as simulator:
        answers = []
        for _ in range(3):
            url = f"{simulator.url}/chat/completions"
            async with session.post(url, json=chat("Hi")) as response:
                answers.append((response.status, response.headers.get("Retry-After")))
    assert answers == [(429, "1.5"), (429, "1.5"), (200, None)]


async def test_probabilities_of_tokens_are_told_where_they_are_asked_for(simulator, session):
    request = chat("Hi", logprobs=True, top_logprobs=2)
    async with session.post(f"{simulator.url}/chat/completions", json=request) as response:
        choice = (await response.json())["choices"][0]
    told = choice["logprobs"]["content"]
    assert "".join(each["token"] for each in told) == choice["message"]["content"]
    assert all(len(each["top_logprobs"]) == 2 for each in told)
    assert all(each["logprob"] < 0 for each in told)
