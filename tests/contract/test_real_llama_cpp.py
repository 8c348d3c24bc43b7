"""The OpenAI backend against a real llama.cpp server with a tiny random model."""

import asyncio
import json

import pytest
from support.openai_front import ALONE, sdk
from support.servers import running

from agent360.client.errors import MeshError
from agent360.mesh.bench.tiny_model import CONTEXT_TOKENS, write_tiny_model
from agent360.mesh.inference.answers import merge
from agent360.mesh.inference.backends.openai import OpenAIBackend
from agent360.mesh.inference.conversation import Message, Prompt, Sampling, SchemaJson, Tool
from agent360.mesh.inference.settings import BackendSettings

xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")

SLOTS = 2


@pytest.fixture(scope="module")
def llama_url(tmp_path_factory):
    """A llama.cpp server on a port of its own; it stops when nothing refers to it."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf"))
    parameters.model_alias = {"tiny"}
    parameters.n_ctx = CONTEXT_TOKENS * SLOTS
    parameters.n_parallel = SLOTS
    parameters.warmup = False
    parameters.verbosity = 0
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)
    yield f"{server.listening_address}/v1"
    del server


@pytest.fixture
async def backend(llama_url):
    opened = OpenAIBackend(BackendSettings(name="llama", url=llama_url))
    await opened.start()
    yield opened
    await opened.close()


def prompt(content: str, **more) -> Prompt:
    sampling = Sampling(temperature=0.0, seed=1, max_tokens=24)
    message = Message("user", content)
    return Prompt(**{"model": "tiny", "messages": (message,), "sampling": sampling, **more})


async def run(backend: OpenAIBackend, asked: Prompt, *, streamed: bool):
    pieces = []
    ending = await backend.generate(asked, "tiny", pieces.extend, streamed=streamed)
    return pieces, ending


async def test_a_real_server_lists_its_model(backend):
    assert "tiny" in await backend.list_models()


async def test_a_real_stream_is_read_in_pieces_with_its_usage(backend):
    pieces, ending = await run(backend, prompt("Say something"), streamed=True)
    assert len(pieces) > 1
    assert merge(pieces).content
    assert ending.finish_reason == "length"
    assert ending.usage.output_tokens == 24
    assert ending.usage.input_tokens > 10


async def test_a_real_server_counts_the_tokens_that_it_then_reports(backend):
    tools = (Tool("find", "Finds things", {"type": "object", "properties": {}}),)
    for asked in (
        prompt("How many tokens are these?"),
        prompt("Hä? ☃ 🦙"),
        prompt("a", tools=tools),
    ):
        counted = await backend.count_tokens(asked, "tiny")
        _, ending = await run(backend, asked, streamed=False)
        assert counted == ending.usage.input_tokens


async def test_a_real_whole_answer_is_what_the_stream_says(backend):
    whole, whole_ending = await run(backend, prompt("Say it again"), streamed=False)
    streamed, streamed_ending = await run(backend, prompt("Say it again"), streamed=True)
    assert merge(whole) == merge(streamed)
    assert whole_ending.usage.output_tokens == streamed_ending.usage.output_tokens
    assert streamed_ending.usage.cached_input_tokens > 0


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_real_answer_follows_a_json_schema(backend, streamed):
    schema = {
        "type": "object",
        "properties": {"count": {"type": "integer"}, "kind": {"enum": ["a", "b"]}},
        "required": ["count", "kind"],
    }
    asked = prompt(
        "Count",
        response_format=SchemaJson("counted", schema),
        sampling=Sampling(seed=3, max_tokens=400),
    )
    pieces, ending = await run(backend, asked, streamed=streamed)
    found = json.loads(merge(pieces).content)
    assert ending.finish_reason == "stop"
    assert isinstance(found["count"], int)
    assert found["kind"] in ("a", "b")


async def test_a_real_server_answers_many_at_once(backend):
    answers = await asyncio.gather(
        *(run(backend, prompt(f"Tell me about {n}"), streamed=n % 2 == 0) for n in range(12))
    )
    assert all(ending.usage.output_tokens == 24 for _, ending in answers)


async def test_a_prompt_beyond_the_real_context_is_refused_as_such(backend):
    with pytest.raises(MeshError) as caught:
        await run(backend, prompt("word " * CONTEXT_TOKENS), streamed=True)
    assert caught.value.reason == "CONTEXT_TOO_LONG"


async def test_cancelling_a_real_stream_leaves_the_server_well(backend):
    endless = prompt("Go on", sampling=Sampling(max_tokens=CONTEXT_TOKENS - 100, seed=2))
    heard = asyncio.Event()
    task = asyncio.create_task(
        backend.generate(endless, "tiny", lambda _: heard.set(), streamed=True)
    )
    async with asyncio.timeout(10):
        await heard.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    _, ending = await run(backend, prompt("And now?"), streamed=False)
    assert ending.usage.output_tokens == 24


@pytest.mark.parametrize("streamed", [True, False])
async def test_real_probabilities_of_tokens_are_read(backend, streamed):
    sampling = Sampling(temperature=0.0, max_tokens=8, logprobs=True, top_logprobs=3)
    pieces, ending = await run(backend, prompt("Hi", sampling=sampling), streamed=streamed)
    said = merge(pieces)
    # Tokens that are part of a character are told together with the rest of it.
    assert 0 < len(said.logprobs) <= ending.usage.output_tokens
    for each in said.logprobs:
        assert each.logprob <= 0
        assert len(each.alternatives) == 3
        assert each.token_bytes


async def test_real_probabilities_reach_the_openai_sdk_whole_and_streamed(llama_url):
    values = {"backends": [{"url": llama_url}], "models": [{"name": "tiny"}], **ALONE}
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "logprobs": True,
        "top_logprobs": 3,
        "max_tokens": 8,
        "temperature": 0.0,
    }
    async with running("inference", **values) as server, sdk(server) as client:
        whole = await client.chat.completions.create(**asked)
        fresh = {"agent360": {"cache": {"no_cache": True}}}
        stream = await client.chat.completions.create(stream=True, extra_body=fresh, **asked)
        choices = [choice async for chunk in stream for choice in chunk.choices]
    told = whole.choices[0].logprobs.content
    streamed = [each for choice in choices if choice.logprobs for each in choice.logprobs.content]
    assert told
    for each in told:
        assert each.logprob <= 0
        assert len(each.top_logprobs) == 3
    assert [each.bytes for each in streamed] == [each.bytes for each in told]
