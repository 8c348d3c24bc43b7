"""Answers and errors in the form of the OpenAI API, as its SDK's own types read them."""

import json
from typing import Any

import grpc
import pytest
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from agent360.client.errors import InvalidRequestError, MeshError, RateLimitedError, Violation
from agent360.inference.v1 import inference_pb2 as pb
from agent360.mesh.inference.front import responses
from agent360.mesh.inference.front.failures import failure_of, parameter_of

PROBABLE = pb.TokenLogprob(token="Hi", logprob=-0.5, token_bytes=b"Hi")
PROBABLE.alternatives.add(token="Ho", logprob=-1.5)


def answered(**message: Any) -> pb.GenerateResponse:
    answer = pb.GenerateResponse(
        message=pb.Message(role=pb.ROLE_ASSISTANT, **message),
        finish_reason=pb.FINISH_REASON_STOP,
        source=pb.ANSWER_SOURCE_CACHE,
    )
    answer.usage.input_tokens, answer.usage.output_tokens = 3, 4
    answer.usage.cached_input_tokens = 2
    answer.routing.model, answer.routing.rule = "small", "explicit"
    return answer


def events(data: bytes) -> list[Any]:
    assert data.endswith(b"\n\n")
    found = [each.removeprefix(b"data: ") for each in data.split(b"\n\n")[:-1]]
    return [each if each == b"[DONE]" else json.loads(each) for each in found]


def test_an_answer_says_its_usage_and_where_it_came_from() -> None:
    read = ChatCompletion.model_validate_json(
        responses.completion(answered(content="Hi"), "chatcmpl-1", 7), strict=True
    )
    assert read.choices[0].message.content == "Hi"
    assert read.usage is not None
    assert read.usage.total_tokens == 7
    assert read.usage.prompt_tokens_details is not None
    assert read.usage.prompt_tokens_details.cached_tokens == 2
    assert (read.model_extra or {})["agent360"]["source"] == "cache"


def test_an_empty_answer_is_a_text_and_one_of_calls_alone_is_none() -> None:
    empty = json.loads(responses.completion(answered(), "chatcmpl-1", 7))
    assert empty["choices"][0]["message"]["content"] == ""
    calls = [pb.ToolCall(id="c1", name="look", arguments="{}")]
    called = json.loads(responses.completion(answered(tool_calls=calls), "chatcmpl-1", 7))
    assert called["choices"][0]["message"]["content"] is None
    assert called["choices"][0]["message"]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    ]


def test_probabilities_of_tokens_are_told_whole_and_in_pieces() -> None:
    answer = answered(content="Hi")
    answer.logprobs.append(PROBABLE)
    whole = ChatCompletion.model_validate_json(responses.completion(answer, "c", 7), strict=True)
    writer = responses.ChunkWriter("c", 7, "small", include_usage=False)
    (event,) = events(writer.piece(pb.Delta(content="Hi", logprobs=[PROBABLE])))
    chunk = ChatCompletionChunk.model_validate(event)
    for told in (whole.choices[0].logprobs, chunk.choices[0].logprobs):
        assert told is not None
        (token,) = told.content or []
        assert (token.token, token.logprob, token.bytes) == ("Hi", -0.5, [72, 105])
        assert [(each.token, each.bytes) for each in token.top_logprobs] == [("Ho", None)]


def test_a_stream_without_a_piece_still_has_a_role_and_an_end() -> None:
    writer = responses.ChunkWriter("c", 7, "small", include_usage=True)
    *chunks, done = events(writer.ending(answered()))
    assert done == b"[DONE]"
    first, last, usage = (ChatCompletionChunk.model_validate(each) for each in chunks)
    assert first.choices[0].delta.role == "assistant"
    assert last.choices[0].finish_reason == "stop"
    assert (usage.choices, usage.usage is None) == ([], False)


def test_pieces_of_tool_calls_name_the_call_once() -> None:
    writer = responses.ChunkWriter("c", 7, "small", include_usage=False)
    first = pb.Delta(tool_calls=[pb.ToolCallDelta(index=1, id="c1", name="look", arguments="{")])
    (event,) = events(writer.piece(first))
    assert event["choices"][0]["delta"] == {
        "role": "assistant",
        "tool_calls": [
            {
                "index": 1,
                "id": "c1",
                "type": "function",
                "function": {"name": "look", "arguments": "{"},
            }
        ],
    }
    (event,) = events(writer.piece(pb.Delta(tool_calls=[pb.ToolCallDelta(index=1, arguments="}")])))
    assert event["choices"][0]["delta"]["tool_calls"] == [
        {"index": 1, "function": {"arguments": "}"}}
    ]


def test_texts_that_json_and_events_have_a_meaning_for_arrive_as_they_are() -> None:
    odd = 'line\nnext\r\n\ndata: [DONE]\n\n"quoted" \u2028 \U0001f600 \x00'
    writer = responses.ChunkWriter("c", 7, "sm\nall", include_usage=False)
    (event,) = events(writer.piece(pb.Delta(content=odd)))
    assert event["choices"][0]["delta"]["content"] == odd
    assert event["model"] == "sm\nall"


def test_vectors_keep_their_precision_in_both_encodings() -> None:
    answer = pb.EmbedResponse(embeddings=[pb.Embedding(values=[0.1, -2.5, 3e-9])])
    plain = CreateEmbeddingResponse.model_validate_json(responses.embeddings(answer, coded=False))
    assert plain.data[0].embedding == list(answer.embeddings[0].values)
    coded = json.loads(responses.embeddings(answer, coded=True))["data"][0]["embedding"]
    assert coded == "zczMPQAAIMCPKE4x"


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.value[0]])
def test_every_code_has_a_status_of_its_kind(code: grpc.StatusCode) -> None:
    failure = failure_of(MeshError(code, "SOMETHING", "what happened"))
    assert 400 <= failure.status < 600
    told = json.loads(failure.body)["error"]
    assert (told["message"], told["code"]) == ("what happened", "something")


def test_a_limit_says_when_to_come_back_in_whole_seconds_and_exactly() -> None:
    failure = failure_of(RateLimitedError("enough", retry_after_s=0.25))
    assert failure.status == 429
    assert failure.headers["Retry-After"] == "1"
    assert failure.headers["retry-after-ms"] == "250"


def test_what_is_overload_or_a_fault_of_the_service_is_not_called_the_callers_limit() -> None:
    exhausted = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure_of(MeshError(exhausted, "OVERLOADED", "")).status == 503
    assert failure_of(MeshError(exhausted, "QUEUE_FULL", "")).status == 503
    assert failure_of(MeshError(exhausted, "ANSWER_TOO_LONG", "")).status == 502
    assert failure_of(MeshError(exhausted, "RATE_LIMITED", "")).status == 429


@pytest.mark.parametrize(
    ("field", "parameter"),
    [
        ("model", "model"),
        ("sampling.temperature", "temperature"),
        ("sampling.stop[1]", "stop[1]"),
        ("cache_control.ttl", "agent360.cache.ttl_s"),
        ("cache_control.share", "agent360.cache.share"),
        ("hints.session_id", "agent360.hints.session_id"),
        ("inputs[3]", "input[3]"),
        ("tools[0].name", "tools[0].function.name"),
        ("messages[2].parts[0].image_url", "messages[2].content[0].image_url"),
        ("metadata x-agent360-tenant", "header x-agent360-tenant"),
    ],
)
def test_fields_go_by_the_names_that_the_caller_knows(field: str, parameter: str) -> None:
    assert parameter_of(field) == parameter
    told = json.loads(failure_of(InvalidRequestError([Violation(field, "is odd")])).body)["error"]
    assert (told["param"], told["message"]) == (parameter, f"{parameter}: is odd")
