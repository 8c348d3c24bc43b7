"""How servers differ in what they make of the OpenAI API, as recorded from their answers."""

import json
from contextlib import asynccontextmanager

import grpc
import pytest
from aiohttp import web

from agent360.client.errors import MeshError
from agent360.mesh.inference.answers import TokenLogprob, Usage, merge, whole_calls
from agent360.mesh.inference.backends.openai import OpenAIBackend
from agent360.mesh.inference.conversation import (
    EmbeddingInputs,
    Message,
    Prompt,
    Sampling,
    SchemaJson,
    Tool,
)
from agent360.mesh.inference.settings import BackendSettings


class Recorded:
    """A server that answers everything with the same bytes, and keeps what it was asked."""

    def __init__(self, body: bytes, content_type: str, *, status: int, cut: bool) -> None:
        self.asked: list[dict] = []
        self._body, self._type, self._status, self._cut = body, content_type, status, cut

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        response = web.StreamResponse(status=self._status, headers={"Content-Type": self._type})
        await response.prepare(request)
        await response.write(self._body)
        if self._cut:
            request.transport.close()
        return response


@asynccontextmanager
async def recorded(body, *, streamed=True, status=200, cut=False, **settings):
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    content_type = "text/event-stream" if streamed else "application/json"
    server = Recorded(body, content_type, status=status, cut=cut)
    application = web.Application()
    application.router.add_route("*", "/v1/{path:.*}", server.answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await (site := web.TCPSite(runner, "127.0.0.1", 0)).start()
    port = site._server.sockets[0].getsockname()[1]
    backend = OpenAIBackend(
        BackendSettings(name="gpu", url=f"http://127.0.0.1:{port}/v1", **settings)
    )
    await backend.start()
    try:
        yield backend, server
    finally:
        await backend.close()
        await runner.cleanup()


def events(*chunks, done=True) -> bytes:
    data = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join([*data, "data: [DONE]\n\n" if done else ""]).encode()


def chunk(delta=None, finish=None, **more):
    return {"choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish, **more}]}


PROMPT = Prompt("m", (Message("user", "Hi"),))


async def run(backend: OpenAIBackend, prompt: Prompt = PROMPT, *, streamed: bool = True):
    pieces: list = []
    ending = await backend.generate(prompt, "m", pieces.extend, streamed=streamed)
    return merge(pieces), ending


async def failure(body, *, streamed=True, **more) -> MeshError:
    async with recorded(body, streamed=streamed, **more) as (backend, _):
        with pytest.raises(MeshError) as caught:
            await run(backend, streamed=streamed)
    return caught.value


async def test_a_stream_without_done_is_whole_if_it_said_why_it_ended():
    body = events(chunk({"content": "Hello"}), chunk(finish="eos_token"), done=False)
    async with recorded(body) as (backend, _):
        said, ending = await run(backend)
    assert (said.content, ending.finish_reason, ending.usage) == ("Hello", "stop", None)


async def test_a_stream_that_ends_without_a_reason_is_broken():
    error = await failure(events(chunk({"content": "Hello"}), done=False))
    assert error.reason == "UPSTREAM_BROKE"


async def test_a_connection_that_breaks_after_the_end_takes_nothing_from_the_answer():
    body = events(chunk({"content": "Hello"}), chunk(finish="stop"), done=False)
    async with recorded(body, cut=True) as (backend, _):
        said, ending = await run(backend)
    assert (said.content, ending.finish_reason) == ("Hello", "stop")
    error = await failure(events(chunk({"content": "Hello"}), done=False), cut=True)
    assert error.reason == "UPSTREAM_BROKE"


@pytest.mark.parametrize(
    ("last", "usage"),
    [
        (
            {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}},
            Usage(5, 2),
        ),
        (
            chunk(finish="stop") | {"usage": {"prompt_tokens": 5, "completion_tokens": 2}},
            Usage(5, 2),
        ),
        (
            {"choices": [], "timings": {"prompt_n": 3, "cache_n": 4, "predicted_n": 2}},
            Usage(7, 2, 4),
        ),
        (
            {
                "choices": [],
                "usage": {
                    "prompt_tokens": 5,
                    "completion_tokens": 2,
                    "prompt_tokens_details": {"cached_tokens": 3},
                },
            },
            Usage(5, 2, 3),
        ),
    ],
    ids=["in a chunk of its own", "with the finish reason", "llama.cpp timings", "cached"],
)
async def test_usage_comes_in_the_last_chunk(last, usage):
    async with recorded(events(chunk({"content": "x"}), chunk(finish="stop"), last)) as (
        backend,
        server,
    ):
        _, ending = await run(backend)
    assert ending.usage == usage
    assert server.asked[0]["stream_options"] == {"include_usage": True}


async def test_a_server_that_does_not_know_stream_options_is_not_sent_any():
    async with recorded(events(chunk(finish="stop")), stream_usage=False) as (backend, server):
        await run(backend)
    assert "stream_options" not in server.asked[0]


@pytest.mark.parametrize(
    "calls",
    [
        [{"function": {"name": "look", "arguments": {"city": "Rome"}}}],
        {"index": 0, "id": "", "function": {"name": "look", "arguments": '{"city":"Rome"}'}},
    ],
    ids=["arguments as an object, no index, no id", "one call instead of a list"],
)
@pytest.mark.parametrize("streamed", [True, False])
async def test_tool_calls_of_other_forms_are_read(calls, streamed):
    if streamed:
        body = events(chunk({"tool_calls": calls}), chunk(finish="stop"))
    else:
        message = {"role": "assistant", "content": None, "tool_calls": calls}
        body = {"choices": [{"message": message, "finish_reason": "stop"}]}
    async with recorded(body, streamed=streamed) as (backend, _):
        said, ending = await run(backend, streamed=streamed)
    (call,) = whole_calls(said)
    assert (call.name, call.arguments) == ("look", '{"city":"Rome"}')
    assert call.id.startswith("call_")
    assert ending.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("max_tokens", "length"),
        ("length", "length"),
        ("stop_sequence", "stop"),
        ("content_filter", "content_filter"),
        ("something new", "stop"),
    ],
)
async def test_finish_reasons_of_other_dialects_are_understood(found, expected):
    async with recorded(events(chunk({"content": "x"}), chunk(finish=found))) as (backend, _):
        assert (await run(backend))[1].finish_reason == expected


@pytest.mark.parametrize("streamed", [True, False])
async def test_an_answer_that_was_aborted_is_not_whole(streamed):
    body = (
        events(chunk({"content": "x"}), chunk(finish="abort"))
        if streamed
        else {"choices": [{"message": {"content": "x"}, "finish_reason": "abort"}]}
    )
    assert (await failure(body, streamed=streamed)).reason == "UPSTREAM_BROKE"


async def test_content_in_parts_and_refusals_are_text():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    async with recorded(events(chunk({"content": parts}), chunk(finish="stop"))) as (backend, _):
        assert (await run(backend))[0].content == "Hello"
    async with recorded(events(chunk({"refusal": "I must not"}), chunk(finish="stop"))) as (
        backend,
        _,
    ):
        assert (await run(backend))[0].content == "I must not"


LOGPROBS = {
    "content": [
        {
            "token": "He",
            "logprob": -0.25,
            "bytes": [72, 101],
            "top_logprobs": [
                {"token": "He", "logprob": -0.25, "bytes": [72, 101]},
                {"token": "Hi", "logprob": -1.5, "bytes": None},
            ],
        }
    ]
}


@pytest.mark.parametrize("streamed", [True, False])
async def test_probabilities_are_asked_for_and_read(streamed):
    if streamed:
        body = events(chunk({"content": "He"}, logprobs=LOGPROBS), chunk(finish="stop"))
    else:
        choice = {"message": {"content": "He"}, "logprobs": LOGPROBS, "finish_reason": "stop"}
        body = {"choices": [choice]}
    prompt = Prompt("m", PROMPT.messages, sampling=Sampling(logprobs=True, top_logprobs=2))
    async with recorded(body, streamed=streamed) as (backend, server):
        said, _ = await run(backend, prompt, streamed=streamed)
    assert (server.asked[0]["logprobs"], server.asked[0]["top_logprobs"]) == (True, 2)
    expected = TokenLogprob("He", -0.25, b"He", ())
    (found,) = said.logprobs
    assert found._replace(alternatives=()) == expected
    assert found.alternatives == (expected, TokenLogprob("Hi", -1.5))


@pytest.mark.parametrize(
    ("form", "sent"),
    [
        (
            "json_schema",
            {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "object"}, "strict": True},
            },
        ),
        ("guided", {"type": "json_object", "schema": {"type": "object"}}),
        ("tgi", {"type": "json", "value": {"type": "object"}}),
    ],
)
async def test_a_schema_is_told_in_the_form_that_the_server_knows(form, sent):
    shape = SchemaJson("a", {"type": "object"}, strict=True)
    prompt = Prompt("m", PROMPT.messages, response_format=shape, tools=(Tool("look"),))
    async with recorded(events(chunk(finish="stop")), schema_form=form) as (backend, server):
        await run(backend, prompt)
    assert server.asked[0]["response_format"] == sent


TOO_LONG = "This model's maximum context length is 1024 tokens. However, you requested 1029 tokens."


@pytest.mark.parametrize(
    ("status", "body", "code", "reason"),
    [
        (
            400,
            {"object": "error", "message": TOO_LONG, "type": "BadRequestError", "code": 400},
            "INVALID_ARGUMENT",
            "CONTEXT_TOO_LONG",
        ),
        (
            500,
            {"error": {"code": 500, "message": "too large", "type": "exceed_context_size_error"}},
            "INVALID_ARGUMENT",
            "CONTEXT_TOO_LONG",
        ),
        (
            422,
            {
                "error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4",
                "error_type": "validation",
            },
            "INVALID_ARGUMENT",
            "CONTEXT_TOO_LONG",
        ),
        (
            400,
            {"error": {"message": "no", "code": "content_filter", "innererror": {"code": "X"}}},
            "INVALID_ARGUMENT",
            "CONTENT_FILTERED",
        ),
        (
            400,
            {"error": {"message": "no", "code": None, "innererror": {"code": "content_filter"}}},
            "INVALID_ARGUMENT",
            "CONTENT_FILTERED",
        ),
        (
            429,
            {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}},
            "FAILED_PRECONDITION",
            "UPSTREAM_UNPAID",
        ),
        (404, {"error": "model 'x' not found"}, "FAILED_PRECONDITION", "UPSTREAM_MODEL_UNKNOWN"),
        (422, {"detail": [{"msg": "field required"}]}, "INVALID_ARGUMENT", "UPSTREAM_REFUSED"),
        (
            200,
            {"error": {"code": 400, "message": "bad", "type": "invalid_request_error"}},
            "INVALID_ARGUMENT",
            "UPSTREAM_REFUSED",
        ),
        (200, {"error": "it went wrong"}, "UNAVAILABLE", "UPSTREAM_BROKE"),
        (200, {"object": "list"}, "UNAVAILABLE", "UPSTREAM_MALFORMED"),
    ],
)
async def test_error_bodies_of_all_servers_are_understood(status, body, code, reason):
    error = await failure(body, streamed=False, status=status)
    assert (error.code, error.reason) == (grpc.StatusCode[code], reason)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            events({"error": {"message": TOO_LONG, "type": "BadRequestError", "code": 400}}),
            "CONTEXT_TOO_LONG",
        ),
        (
            events({"object": "error", "message": "no", "type": "BadRequestError", "code": 400}),
            "UPSTREAM_REFUSED",
        ),
        (events({"error": "Model is overloaded", "error_type": "overloaded"}), "UPSTREAM_FAILED"),
        (events({"error": "failed", "error_type": "generation"}), "UPSTREAM_BROKE"),
        (
            b'error: {"code":500,"message":"CUDA error","type":"server_error"}\n\n',
            "UPSTREAM_FAILED",
        ),
        (b"event: error\n" + events({"error": {"message": "x"}}, done=False), "UPSTREAM_BROKE"),
    ],
)
async def test_errors_within_a_stream_are_understood(body, reason):
    assert (await failure(body)).reason == reason


async def test_vectors_as_numbers_and_without_an_index_are_read():
    body = {"data": [{"embedding": [1.0, 2.0]}, {"embedding": [3.0, 4.0]}]}
    request = EmbeddingInputs("m", ("a", "b"))
    async with recorded(body, streamed=False, embedding_encoding="") as (backend, server):
        vectors, usage = await backend.embed(request, "m")
    assert [list(vector) for vector in vectors] == [[1.0, 2.0], [3.0, 4.0]]
    assert usage is None
    assert "encoding_format" not in server.asked[0]
    async with recorded({"error": "too busy"}, streamed=False) as (backend, _):
        with pytest.raises(MeshError, match="too busy"):
            await backend.embed(request, "m")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_thoughts_are_read_by_both_names_that_servers_give_them(name):
    body = events(
        chunk({"role": "assistant", "content": None, name: "Let me "}),
        chunk({name: "see.", "content": ""}),
        chunk({"content": "Yes", name: None}),
        chunk(finish="stop"),
    )
    async with recorded(body) as (backend, _):
        said, _ = await run(backend)
    assert (said.reasoning, said.content) == ("Let me see.", "Yes")
    message = {"role": "assistant", "content": "Yes", name: "Let me see."}
    whole = {"choices": [{"message": message, "finish_reason": "stop"}]}
    async with recorded(whole, streamed=False) as (backend, _):
        said, _ = await run(backend, streamed=False)
    assert (said.reasoning, said.content) == ("Let me see.", "Yes")
