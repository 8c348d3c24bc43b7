"""The HTTP front as the real ``openai`` SDK sees it."""

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel
from support.openai_front import fronted, sdk
from support.polling import eventually, eventually_async
from support.servers import running

from agent360.mesh.runtime.policies.authentication import hash_key
from agent360.mesh.runtime.server import Server
from agent360.mesh.simulator import Simulator, SimulatorSettings

HELLO: list[Any] = [{"role": "user", "content": "Name three rivers"}]
WEATHER: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


def asking(content: str) -> list[Any]:
    return [{"role": "user", "content": content}]


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    settings = SimulatorSettings(port=0, first_token_s=0.005, inter_token_s=0.0)
    async with Simulator(settings) as started:
        yield started


@pytest.fixture
async def server(simulator: Simulator) -> AsyncIterator[Server]:
    async with fronted(simulator) as started:
        yield started


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with sdk(server) as connected:
        yield connected


def chats(simulator: Simulator) -> int:
    return simulator.load.by_path["/v1/chat/completions"]


# -------------------------------------------------------------------- chat


async def test_a_whole_answer_says_who_answered_and_why(client: AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(model="small", messages=HELLO)
    answer = raw.parse()
    assert (answer.choices[0].message.content or "").startswith("This is a simulated answer")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == "small"
    told = {name: raw.headers[f"x-agent360-{name}"] for name in ("model", "backend", "source")}
    assert told == {"model": "small", "backend": "default", "source": "model"}
    assert raw.headers["x-agent360-rule"] == "explicit"
    assert answer._request_id == raw.headers["x-request-id"]


async def test_a_stream_is_the_whole_answer_in_pieces(client: AsyncOpenAI) -> None:
    ask = asking("Name three rivers [[sim:itl=0.003]]")
    whole = await client.chat.completions.create(model="small", messages=ask)
    stream = await client.chat.completions.create(
        model="small", messages=ask, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    *pieces, usage = chunks
    text = "".join(each.choices[0].delta.content or "" for each in pieces)
    assert text == whole.choices[0].message.content
    assert len(pieces) > 5
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [each.choices[0].finish_reason for each in pieces if each.choices[0].finish_reason] == [
        "stop"
    ]
    assert usage.choices == []
    assert usage.usage is not None
    assert whole.usage is not None
    assert usage.usage.completion_tokens == whole.usage.completion_tokens
    assert len({each.id for each in chunks}) == 1


async def test_usage_is_streamed_only_where_it_is_asked_for(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="small", messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.usage is None for chunk in chunks)
    told = (chunks[-1].model_extra or {})["agent360"]
    assert (told["rule"], told["source"], told["backend"]) == ("explicit", "model", "default")


async def test_the_stream_helper_of_the_sdk_accumulates_an_answer(client: AsyncOpenAI) -> None:
    async with client.chat.completions.stream(
        model="small", messages=HELLO, tools=WEATHER, tool_choice="required"
    ) as stream:
        events = [event.type async for event in stream]
        final = await stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert call.function.name == "weather"
    assert "city" in json.loads(call.function.arguments)
    assert "tool_calls.function.arguments.done" in events


async def test_tools_go_round(client: AsyncOpenAI) -> None:
    ask: list[Any] = asking("What is the weather in Rome?")
    first = await client.chat.completions.create(model="small", messages=ask, tools=WEATHER)
    said = first.choices[0].message
    (call,) = said.tool_calls or []
    assert first.choices[0].finish_reason == "tool_calls"
    assert said.content is None
    ask += [said, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    second = await client.chat.completions.create(model="small", messages=ask, tools=WEATHER)
    assert second.choices[0].message.content
    assert second.choices[0].finish_reason == "stop"


async def test_one_tool_can_be_asked_for_and_all_forbidden(client: AsyncOpenAI) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    tools = [other, *WEATHER]
    named = await client.chat.completions.create(
        model="small",
        messages=HELLO,
        tools=tools,
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    (call,) = named.choices[0].message.tool_calls or []
    assert call.function.name == "weather"
    free = await client.chat.completions.create(
        model="small", messages=HELLO, tools=tools, tool_choice="none"
    )
    assert free.choices[0].message.tool_calls is None


async def test_answers_follow_a_json_schema(client: AsyncOpenAI) -> None:
    class City(BaseModel):
        name: str
        population: int

    parsed = await client.chat.completions.parse(
        model="small", messages=HELLO, response_format=City
    )
    assert isinstance(parsed.choices[0].message.parsed, City)
    loose = await client.chat.completions.create(
        model="small", messages=HELLO, response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(loose.choices[0].message.content or ""), dict)


async def test_bounds_and_stop_texts_are_kept(client: AsyncOpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        short = await client.chat.completions.create(model="small", messages=HELLO, **{name: 3})
        assert short.choices[0].finish_reason == "length"
        assert short.usage is not None
        assert short.usage.completion_tokens == 3
    stopped = await client.chat.completions.create(
        model="small", messages=HELLO, stop="simulated", seed=7, temperature=0.5, user="ana"
    )
    assert stopped.choices[0].message.content == "This is a "


async def test_images_reach_models_that_can_see(client: AsyncOpenAI) -> None:
    look: list[Any] = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            ],
        }
    ]
    seen = await client.chat.completions.create(model="small", messages=look)
    assert "What is this" in (seen.choices[0].message.content or "")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="family/large", messages=look)
    assert caught.value.code == "model_lacks_capability"


async def test_auto_chooses_by_hints_of_the_extension(client: AsyncOpenAI) -> None:
    async def rule(task_class: str) -> str:
        raw = await client.chat.completions.with_raw_response.create(
            model="auto",
            messages=HELLO,
            extra_body={"agent360": {"hints": {"task_class": task_class}}},
        )
        return f"{raw.headers['x-agent360-rule']} {raw.headers['x-agent360-model']}"

    assert await rule("complex") == "auto:complex family/large"
    assert await rule("simple") == "auto:simple small"


async def test_kept_answers_are_said_to_be_and_can_be_declined(simulator: Simulator) -> None:
    async with (
        running("cache") as cache,
        fronted(
            simulator, cache={"enabled": True, "timeout_s": 5}, mesh={"cache": cache.address}
        ) as server,
        sdk(server) as client,
    ):

        async def source(**more: Any) -> str:
            raw = await client.chat.completions.with_raw_response.create(
                model="small", messages=HELLO, temperature=0.0, **more
            )
            return raw.headers["x-agent360-source"]

        assert await source() == "model"

        async def kept() -> bool:
            return await source() == "cache"

        await eventually_async(kept)
        fresh = {"agent360": {"cache": {"no_cache": True, "ttl_s": 60}}}
        assert await source(extra_body=fresh) == "model"
        stream = await client.chat.completions.create(
            model="small", messages=HELLO, temperature=0.0, stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert (chunks[-1].model_extra or {})["agent360"]["source"] == "cache"


async def test_the_example_of_the_readme_runs_as_pasted(
    server: Server, tmp_path: Path, simulator: Simulator
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(from openai .+?)\n```", readme, re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(example.replace(":8360/", f":{server.http_port}/"))
    run = await asyncio.create_subprocess_exec(
        sys.executable, str(script), stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        said, _ = await run.communicate()
    assert run.returncode == 0
    assert said.startswith(b"This is a simulated answer")
    assert chats(simulator) == 1


# -------------------------------------------------------------------- embeddings and models


async def test_vectors_are_the_same_as_floats_and_as_base64(client: AsyncOpenAI) -> None:
    texts = ["one text", "another"]
    coded = await client.embeddings.create(model="embedder", input=texts, dimensions=8)
    plain = await client.embeddings.create(
        model="embedder", input=texts, dimensions=8, encoding_format="float"
    )
    assert [each.index for each in coded.data] == [0, 1]
    assert [len(each.embedding) for each in coded.data] == [8, 8]
    assert [each.embedding for each in coded.data] == [each.embedding for each in plain.data]
    single = await client.embeddings.create(model="embedder", input="one text", dimensions=8)
    assert single.data[0].embedding == coded.data[0].embedding
    assert single.usage.prompt_tokens > 0


@pytest.mark.parametrize("tokens", [[1, 2], [[1, 2], [3]]])
async def test_tokens_in_place_of_texts_are_refused_clearly(
    client: AsyncOpenAI, tokens: Any
) -> None:
    with pytest.raises(openai.BadRequestError, match="arrays of tokens") as caught:
        await client.embeddings.create(model="embedder", input=tokens)
    assert caught.value.param == "input[0]"


async def test_models_are_listed_and_read(client: AsyncOpenAI) -> None:
    names = [model.id async for model in client.models.list()]
    assert names == ["embedder", "family/large", "small"]
    large = await client.models.retrieve("family/large")
    assert large.id == "family/large"
    assert (large.model_extra or {})["agent360"]["health"] == "ready"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt")


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 2}, "n"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]},
         "tools[0].function.name"),
        ({"messages": [{"role": "nobody", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
         "messages[0].content[0].type"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"extra_body": {"agent360": {"cache": {"ttl": 1}}}}, "agent360.cache.ttl"),
        ({"extra_body": {"agent360": {"cache": {"ttl_s": -1}}}}, "agent360.cache.ttl_s"),
        ({"extra_body": {"model": 7}}, "model"),
    ],
)  # fmt: skip
async def test_a_bad_request_names_its_field(
    client: AsyncOpenAI, simulator: Simulator, more: dict[str, Any], param: str
) -> None:
    for streamed in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(
                **{"model": "small", "messages": HELLO, "stream": streamed, **more}
            )
        assert caught.value.param == param
        assert caught.value.type == "invalid_request_error"
        assert caught.value.code == "invalid_request"
        assert param.rpartition(".")[2] in caught.value.message
    assert chats(simulator) == 0


async def test_what_is_not_there_is_not_found(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions") as unserved:
        await client.responses.create(model="small", input="Hi")
    assert unserved.value.code == "route_unknown"


async def test_keys_are_checked_and_bound_to_their_tenants(simulator: Simulator) -> None:
    keys = [
        {"name": "one", "sha256": hash_key("key-one"), "tenants": ["acme"]},
        {"name": "two", "sha256": hash_key("key-two"), "tenants": ["acme", "globex"]},
    ]
    async with fronted(simulator, authentication={"keys": keys}) as server:

        async def ask(key: str, tenant: str = "") -> None:
            headers = {"x-agent360-tenant": tenant} if tenant else {}
            async with sdk(server, api_key=key, default_headers=headers) as client:
                await client.chat.completions.create(model="small", messages=HELLO)

        with pytest.raises(openai.AuthenticationError) as unknown:
            await ask("guess")
        assert unknown.value.code == "invalid_api_key"
        await ask("key-one")
        await ask("key-two", "globex")
        with pytest.raises(openai.PermissionDeniedError) as another:
            await ask("key-one", "globex")
        assert another.value.type == "permission_error"
        with pytest.raises(openai.BadRequestError, match="x-agent360-tenant"):
            await ask("key-two")
    assert chats(simulator) == 2


def limit(tmp_path: Path, amount: int, period: str) -> dict[str, Any]:
    file = tmp_path / "limits.toml"
    file.write_text(
        '[[limits]]\nid = "few"\nname = "inference.requests"\n'
        f'amount = {amount}\nperiod = "{period}"\n'
    )
    return {"limits": file}


async def test_an_exhausted_limit_says_when_to_come_back(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with (
        running("ratelimit", **limit(tmp_path, 1, "1h")) as limiter,
        fronted(
            simulator,
            limits={"enabled": True, "timeout_s": 5},
            mesh={"ratelimit": limiter.address},
        ) as server,
        sdk(server) as client,
    ):
        await client.chat.completions.create(model="small", messages=HELLO)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model="small", messages=HELLO, stream=True)
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.type == "rate_limit_error"
    assert 0 < int(caught.value.response.headers["retry-after"]) <= 3_600


async def test_the_sdk_waits_as_long_as_it_is_told_and_comes_back(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with (
        running("ratelimit", **limit(tmp_path, 1, "1s")) as limiter,
        fronted(
            simulator,
            limits={"enabled": True, "timeout_s": 5},
            mesh={"ratelimit": limiter.address},
        ) as server,
        sdk(server, max_retries=5) as client,
    ):
        for _ in range(3):
            await client.chat.completions.create(model="small", messages=HELLO)
    assert chats(simulator) == 3


async def test_what_is_more_than_the_service_takes_is_overload(simulator: Simulator) -> None:
    async with fronted(simulator, shedding={"max_in_flight": 1}) as server, sdk(server) as client:
        slow = asyncio.create_task(
            client.chat.completions.create(model="small", messages=asking("[[sim:stall=30]]"))
        )
        await eventually(lambda: chats(simulator) == 1)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model="small", messages=HELLO)
        slow.cancel()
    assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
    assert caught.value.response.headers["retry-after"]


async def test_a_failing_backend_is_a_server_error(client: AsyncOpenAI) -> None:
    for streamed in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(
                model="small", messages=asking("[[sim:error=503]]"), stream=streamed
            )
        assert caught.value.type == "server_error"


async def test_a_body_that_is_too_large_is_refused(simulator: Simulator) -> None:
    async with fronted(simulator, max_message_bytes=2**16) as server, sdk(server) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(model="small", messages=asking("x" * 2**17))
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")


# -------------------------------------------------------------------- time


async def test_a_caller_that_runs_out_of_patience_stops_the_model(
    client: AsyncOpenAI, simulator: Simulator
) -> None:
    with pytest.raises(openai.APITimeoutError):
        await client.chat.completions.create(
            model="small", messages=asking("[[sim:stall=30]]"), timeout=0.2
        )
    await eventually(lambda: simulator.load.cancelled == 1)


async def test_a_deadline_is_kept_and_its_passing_not_repeated(
    server: Server, simulator: Simulator
) -> None:
    async with sdk(server, max_retries=3) as client:
        began = time.monotonic()
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(
                model="small",
                messages=asking("[[sim:stall=30]]"),
                extra_headers={"x-agent360-timeout": "0.3"},
            )
        assert time.monotonic() - began < 5.0
        with pytest.raises(openai.BadRequestError, match="x-agent360-timeout"):
            await client.chat.completions.create(
                model="small", messages=HELLO, extra_headers={"x-agent360-timeout": "soon"}
            )
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert chats(simulator) == 1
    await eventually(lambda: simulator.load.cancelled == 1)


async def test_leaving_a_stream_stops_the_model(client: AsyncOpenAI, simulator: Simulator) -> None:
    stream = await client.chat.completions.create(
        model="small", messages=asking("[[sim:itl=0.02]][[sim:tokens=2000]]"), stream=True
    )
    async for _ in stream:
        break
    await stream.close()
    await eventually(lambda: simulator.load.cancelled == 1)


async def test_a_broken_stream_ends_with_an_error_after_what_was_said(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="small", messages=asking("[[sim:break=10]]"), stream=True
    )
    said = []

    async def hear() -> None:
        async for chunk in stream:
            said.append(chunk.choices[0].delta.content or "")  # noqa: PERF401 - errors follow

    with pytest.raises(openai.APIError, match="broke off") as caught:
        await hear()
    assert not isinstance(caught.value, openai.APIStatusError)
    assert caught.value.code == "stream_broken"
    body: Any = caught.value.body
    assert body["agent360"]["metadata"]["produced_bytes"] == str(len("".join(said)))


async def test_many_callers_at_once_are_answered_each_with_its_own(client: AsyncOpenAI) -> None:
    async def whole(number: int) -> str:
        answer = await client.chat.completions.create(
            model="small", messages=asking(f"about number{number} please")
        )
        return answer.choices[0].message.content or ""

    async def streamed(number: int) -> str:
        stream = await client.chat.completions.create(
            model="small", messages=asking(f"about number{number} please"), stream=True
        )
        return "".join([each.choices[0].delta.content or "" async for each in stream])

    wholes = await asyncio.gather(*map(whole, range(60)))
    streams = await asyncio.gather(*map(streamed, range(60)))
    assert wholes == streams
    assert all(f"number{place} " in text for place, text in enumerate(wholes))


# -------------------------------------------------------------------- what models tell beside


async def test_probabilities_of_tokens_are_told_whole_and_in_chunks(client: AsyncOpenAI) -> None:
    more: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "messages": HELLO}
    answer = await client.chat.completions.create(model="small", **more)
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert "".join(each.token for each in told.content) == answer.choices[0].message.content
    for each in told.content:
        assert each.logprob < 0
        assert bytes(each.bytes or ()).decode() == each.token
        assert [other.token for other in each.top_logprobs] == [each.token, f"{each.token}~1"]
    stream = await client.chat.completions.create(
        model="small",
        stream=True,
        extra_body={"agent360": {"cache": {"no_cache": True}}},
        **more,
    )
    chunks = [choice async for chunk in stream for choice in chunk.choices]
    streamed = [each for choice in chunks if choice.logprobs for each in choice.logprobs.content]
    assert streamed == told.content


async def test_probabilities_are_left_out_where_nobody_asked(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="small", messages=HELLO)
    assert answer.choices[0].logprobs is None


async def test_what_a_model_thinks_is_told_apart_from_what_it_says(client: AsyncOpenAI) -> None:
    ask = asking("Name three rivers [[sim:think=12]]")
    whole = await client.chat.completions.create(model="small", messages=ask)
    message = whole.choices[0].message
    thought = (message.model_extra or {})["reasoning_content"]
    assert len(thought.split()) == 12
    assert thought not in (message.content or "")
    stream = await client.chat.completions.create(model="small", messages=ask, stream=True)
    deltas = [choice.delta async for chunk in stream for choice in chunk.choices]
    extras = [(delta.model_extra or {}).get("reasoning_content", "") for delta in deltas]
    assert "".join(extras) == thought
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert whole.usage is not None
    said = len((message.content or "").split())
    assert whole.usage.completion_tokens >= said + 12


async def test_answers_say_what_decided_and_what_chose_among_backends(server: Server) -> None:
    async with sdk(server) as client:
        raw = await client.chat.completions.with_raw_response.create(
            model="auto", messages=HELLO, extra_body={"agent360": {"hints": {"session_id": "s"}}}
        )
        told = (raw.parse().model_extra or {})["agent360"]
        assert told["rule"] == "auto:simple"
        assert told["because"].startswith("length: ")
        assert told["policy"] == "only"
        assert raw.headers["x-agent360-because"] == told["because"]
        streaming = await client.chat.completions.with_raw_response.create(
            model="auto", messages=asking("Name three lakes"), stream=True
        )
        assert streaming.headers["x-agent360-because"].startswith("length: ")
        chunks = [chunk async for chunk in streaming.parse()]
    told = (chunks[-1].model_extra or {})["agent360"]
    assert (told["rule"], told["policy"]) == ("auto:simple", "only")
    assert told["because"].startswith("length: ")


async def test_named_models_have_no_header_of_what_decided(client: AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(model="small", messages=HELLO)
    assert "x-agent360-because" not in raw.headers
    assert (raw.parse().model_extra or {})["agent360"]["because"] == ""
