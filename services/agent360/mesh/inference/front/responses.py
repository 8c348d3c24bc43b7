"""Answers of the contract as the OpenAI API has them, in JSON."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from agent360.inference.v1 import inference_pb2 as pb

_FINISH: Final[Mapping[int, str]] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
    pb.FINISH_REASON_CONTENT_FILTER: "content_filter",
}
_SOURCE: Final[Mapping[int, str]] = {
    pb.ANSWER_SOURCE_MODEL: "model",
    pb.ANSWER_SOURCE_CACHE: "cache",
    pb.ANSWER_SOURCE_COALESCED: "coalesced",
}
_HEALTH: Final[Mapping[int, str]] = {
    pb.MODEL_HEALTH_UNSPECIFIED: "unknown",
    pb.MODEL_HEALTH_READY: "ready",
    pb.MODEL_HEALTH_DEGRADED: "degraded",
    pb.MODEL_HEALTH_UNAVAILABLE: "unavailable",
    pb.MODEL_HEALTH_WARMING: "warming",
}

_encode: Final = msgspec.json.Encoder().encode


def completion(answer: pb.GenerateResponse, completion_id: str, created: int) -> bytes:
    """The body of a whole answer."""
    message = answer.message
    said: dict[str, Any] = {
        "role": "assistant",
        "content": message.content or (None if message.tool_calls else ""),
        "refusal": None,
    }
    if message.reasoning:
        said["reasoning_content"] = message.reasoning
    if message.tool_calls:
        said["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    choice = {
        "index": 0,
        "message": said,
        "logprobs": _logprobs(answer.logprobs),
        "finish_reason": _FINISH.get(answer.finish_reason, "stop"),
    }
    return _encode(
        {
            "id": completion_id,
            "object": "chat.completion",
            "created": created,
            "model": answer.routing.model,
            "choices": [choice],
            "usage": _usage(answer.usage),
            "agent360": _told(answer.usage, answer.source, answer.routing, answer.timing),
        }
    )


class ChunkWriter:
    """Makes the events of one streamed answer.

    Example:
        >>> writer = ChunkWriter("chatcmpl-1", 1_700_000_000, "small", include_usage=True)
        >>> writer.piece(delta)
        b'data: {"id":"chatcmpl-1",...}\\n\\n'
    """

    __slots__ = ("_after", "_before", "_first", "_include_usage")

    def __init__(
        self, completion_id: str, created: int, model: str, *, include_usage: bool
    ) -> None:
        head = _encode(
            {
                "id": completion_id,
                "object": "chat.completion.chunk",
                "created": created,
                "model": model,
            }
        )
        self._before = b"data: " + head[:-1] + b',"choices":'
        self._after = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._include_usage = include_usage
        self._first = True

    def piece(self, delta: pb.Delta) -> bytes:
        """The event of a piece of the answer."""
        said: dict[str, Any] = {}
        if self._first:
            self._first = False
            said["role"] = "assistant"
        if delta.reasoning:
            said["reasoning_content"] = delta.reasoning
        if delta.content or not (delta.tool_calls or delta.reasoning):
            said["content"] = delta.content
        if delta.tool_calls:
            said["tool_calls"] = [_tool_call(piece) for piece in delta.tool_calls]
        choice = _choice(said, None)
        if delta.logprobs:
            choice["logprobs"] = _logprobs(delta.logprobs)
        return self._before + _encode([choice]) + self._after

    def ending(self, final: pb.GenerateResponse) -> bytes:
        """The events that end an answer."""
        start = self.piece(pb.Delta()) if self._first else b""
        finish = _FINISH.get(final.finish_reason, "stop")
        told = _encode(_told(final.usage, final.source, final.routing, final.timing))
        last = self._before + _encode([_choice({}, finish)]) + b',"agent360":' + told + self._after
        if self._include_usage:
            last += self._before + b'[],"usage":' + _encode(_usage(final.usage)) + b"}\n\n"
        return start + last + DONE


DONE: Final = b"data: [DONE]\n\n"
"""The last event of every stream that went well."""


def embeddings(answer: pb.EmbedResponse, *, coded: bool) -> bytes:
    """The body of vectors; ``coded``: each as base64 of little-endian 32-bit floats."""
    return _encode(
        {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": place,
                    "embedding": _coded(each.values) if coded else list(each.values),
                }
                for place, each in enumerate(answer.embeddings)
            ],
            "model": answer.routing.model,
            "usage": {
                "prompt_tokens": answer.usage.input_tokens,
                "total_tokens": answer.usage.input_tokens,
            },
            "agent360": _told(answer.usage, answer.source, answer.routing, None),
        }
    )


def models(listed: Iterable[pb.Model]) -> bytes:
    """The body of a list of models."""
    return _encode({"object": "list", "data": [_model(each) for each in listed]})


def model(described: pb.Model) -> bytes:
    """The body of one model."""
    return _encode(_model(described))


def told_headers(answer: pb.GenerateResponse | pb.EmbedResponse) -> dict[str, str]:
    """Who answered and why, for headers."""
    routing = answer.routing
    told = {
        "x-agent360-model": routing.model,
        "x-agent360-backend": routing.backend,
        "x-agent360-rule": routing.rule,
        "x-agent360-source": _SOURCE.get(answer.source, ""),
    }
    if fits_header(routing.because):
        told["x-agent360-because"] = routing.because
    return told


def fits_header(value: str) -> bool:
    """Whether there is something to tell in a header; a classifier may say what none can hold."""
    return bool(value) and value.isascii() and value.isprintable()


def _choice(delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _logprobs(found: Sequence[pb.TokenLogprob]) -> dict[str, Any] | None:
    if not found:
        return None
    content = [
        {**_token(each), "top_logprobs": [_token(other) for other in each.alternatives]}
        for each in found
    ]
    return {"content": content, "refusal": None}


def _token(each: pb.TokenLogprob) -> dict[str, Any]:
    return {
        "token": each.token,
        "logprob": each.logprob,
        "bytes": list(each.token_bytes) or None,
    }


def _tool_call(piece: pb.ToolCallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": piece.arguments}
    call: dict[str, Any] = {"index": piece.index, "function": function}
    if piece.id:
        call["id"], call["type"] = piece.id, "function"
    if piece.name:
        function["name"] = piece.name
    return call


def _usage(usage: pb.Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_input_tokens},
    }


def _told(
    usage: pb.Usage, source: int, routing: pb.Routing, timing: pb.Timing | None
) -> dict[str, Any]:
    told: dict[str, Any] = {
        "model": routing.model,
        "backend": routing.backend,
        "rule": routing.rule,
        "because": routing.because,
        "policy": routing.policy,
        "source": _SOURCE.get(source, ""),
        "cost_usd": usage.cost_usd,
        "estimated_usage": usage.estimated,
    }
    if timing is not None:
        told["queue_s"] = timing.queue.ToNanoseconds() / 1e9
        told["total_s"] = timing.total.ToNanoseconds() / 1e9
        if timing.HasField("first_token"):
            told["first_token_s"] = timing.first_token.ToNanoseconds() / 1e9
    return told


def _model(described: pb.Model) -> dict[str, Any]:
    return {
        "id": described.name,
        "object": "model",
        "created": 0,
        "owned_by": ",".join(described.backends),
        "agent360": {
            "capabilities": [
                pb.Capability.Name(each).removeprefix("CAPABILITY_").lower()
                for each in described.capabilities
            ],
            "context_tokens": described.context_tokens,
            "health": _HEALTH.get(described.health, "unknown"),
            "input_usd_per_million": described.input_usd_per_million,
            "output_usd_per_million": described.output_usd_per_million,
        },
    }


def _coded(values: Iterable[float]) -> str:
    floats = array("f", values)
    if sys.byteorder == "big":
        floats.byteswap()
    return base64.b64encode(floats).decode()
