"""Requests and answers in the JSON of the OpenAI API."""

from __future__ import annotations

import base64
import json
import sys
import uuid
from array import array
from collections.abc import Mapping
from typing import Any, Final

from agent360.mesh.inference.answers import (
    FinishReason,
    Piece,
    ReasoningPiece,
    TokenLogprob,
    ToolCallPiece,
    Usage,
)
from agent360.mesh.inference.conversation import (
    AnyJson,
    EmbeddingInputs,
    ImagePart,
    Message,
    Prompt,
    SchemaJson,
    TextPart,
    Tool,
    ToolChoice,
)
from agent360.mesh.inference.settings import SchemaForm

_FINISH: Final[Mapping[str, FinishReason]] = {
    "stop": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "tool_use": "tool_calls",
    "content_filter": "content_filter",
}
BROKEN: Final = frozenset({"error", "abort"})
"""Finish reasons of answers that are not whole, as vLLM and routers have them."""


def chat_body(
    prompt: Prompt,
    model: str,
    *,
    streamed: bool,
    max_tokens_field: str,
    stream_usage: bool = True,
    schema_form: SchemaForm = "json_schema",
) -> dict[str, Any]:
    """The body of a chat completion request. The end user stays within the mesh."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [_message(message) for message in prompt.messages],
    }
    if prompt.tools:
        body["tools"] = [_tool(tool) for tool in prompt.tools]
    if prompt.tool_choice is not None:
        body["tool_choice"] = _tool_choice(prompt.tool_choice)
    sampling = prompt.sampling
    for name in (
        "temperature",
        "top_p",
        "top_k",
        "frequency_penalty",
        "presence_penalty",
        "seed",
    ):
        value = getattr(sampling, name)
        if value is not None:
            body[name] = value
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.max_tokens is not None:
        body[max_tokens_field] = sampling.max_tokens
    if sampling.logprobs:
        body["logprobs"] = True
        if sampling.top_logprobs:
            body["top_logprobs"] = sampling.top_logprobs
    if prompt.response_format is not None:
        body["response_format"] = _response_format(prompt.response_format, schema_form)
    if streamed:
        body["stream"] = True
        if stream_usage:
            body["stream_options"] = {"include_usage": True}
    return body


def embedding_body(
    request: EmbeddingInputs, model: str, encoding: str = "base64"
) -> dict[str, Any]:
    """The body of an embedding request. base64 spares parsing millions of decimal numbers."""
    body: dict[str, Any] = {"model": model, "input": list(request.inputs)}
    if encoding:
        body["encoding_format"] = encoding
    if request.dimensions:
        body["dimensions"] = request.dimensions
    return body


def read_usage(found: Any, timings: Any = None) -> Usage | None:
    """The usage object of an answer, or llama.cpp's ``timings``; None where there is neither."""
    if not isinstance(found, dict):
        if isinstance(timings, dict) and "predicted_n" in timings:
            kept = int(timings.get("cache_n") or 0)
            read = int(timings.get("prompt_n") or 0) + kept
            return Usage(read, int(timings["predicted_n"]), kept)
        return None
    details = found.get("prompt_tokens_details") or {}
    return Usage(
        input_tokens=int(found.get("prompt_tokens") or 0),
        output_tokens=int(found.get("completion_tokens") or 0),
        cached_input_tokens=int(details.get("cached_tokens") or 0),
    )


def read_finish(found: Any) -> FinishReason | None:
    """Why an answer ended; None while it has not. Reasons of other dialects count as stop."""
    return None if found is None else _FINISH.get(str(found), "stop")


def read_delta(delta: Mapping[str, Any]) -> list[Piece]:
    """The pieces in a ``delta`` of a stream or the ``message`` of a whole answer."""
    pieces: list[Piece] = []
    # DeepSeek, vLLM and llama.cpp have the one name, OpenRouter and newer vLLM the other.
    thought = delta.get("reasoning_content") or delta.get("reasoning")
    if isinstance(thought, str) and thought:
        pieces.append(ReasoningPiece(thought))
    content = delta.get("content")
    if content:
        pieces.append(content if isinstance(content, str) else _text_of(content))
    elif delta.get("refusal"):
        pieces.append(str(delta["refusal"]))
    calls = delta.get("tool_calls")
    if calls:
        # Older TGI servers send one call where a list belongs.
        calls = [calls] if isinstance(calls, dict) else calls
        pieces += [_call_piece(place, call) for place, call in enumerate(calls)]
    return pieces


def read_logprobs(found: Any) -> list[Piece]:
    """The probabilities of tokens in a choice's ``logprobs``."""
    content = found.get("content") if isinstance(found, dict) else None
    return [_logprob(each, with_alternatives=True) for each in content or ()]


def _logprob(found: Mapping[str, Any], *, with_alternatives: bool) -> TokenLogprob:
    coded = found.get("bytes")
    alternatives = found.get("top_logprobs") if with_alternatives else None
    return TokenLogprob(
        str(found["token"]),
        float(found["logprob"]),
        bytes(coded) if coded else b"",
        tuple(_logprob(each, with_alternatives=False) for each in alternatives or ()),
    )


def _call_piece(place: int, call: Mapping[str, Any]) -> ToolCallPiece:
    function = call.get("function") or {}
    index, arguments, name = call.get("index"), function.get("arguments"), function.get("name")
    if arguments is not None and not isinstance(arguments, str):
        # Ollama and TGI may send the arguments as an object.
        arguments = json.dumps(arguments, separators=(",", ":"))
    call_id = call.get("id")
    if name and not call_id:
        # The result of a call is told by its id; llama.cpp and Ollama may give none.
        call_id = f"call_{uuid.uuid4().hex[:24]}"
    return ToolCallPiece(
        place if index is None else int(index),
        str(call_id or ""),
        str(name or ""),
        arguments or "",
    )


def _text_of(parts: Any) -> str:
    """The text of a content that comes in parts, as Mistral's servers send it."""
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))


def read_vector(found: Any) -> array[float]:
    """A vector, as numbers or in base64.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(found, str):
        vector = array("f", base64.b64decode(found, validate=True))
        if sys.byteorder == "big":
            vector.byteswap()
        return vector
    if isinstance(found, list):
        return array("f", found)
    raise ValueError(f"an embedding is a {type(found).__name__}")


def _message(message: Message) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.parts:
        body["content"] = [_part(part) for part in message.parts]
    if message.tool_calls:
        body["content"] = message.content or None
        body["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        body["tool_call_id"] = message.tool_call_id
    if message.name:
        body["name"] = message.name
    return body


def _response_format(shape: AnyJson | SchemaJson, form: SchemaForm) -> dict[str, Any]:
    if not isinstance(shape, SchemaJson):
        return {"type": "json_object"}
    if form == "tgi":
        return {"type": "json", "value": shape.schema}
    if form == "guided":
        return {"type": "json_object", "schema": shape.schema}
    schema = {"name": shape.name, "schema": shape.schema, "strict": shape.strict}
    return {"type": "json_schema", "json_schema": schema}


def _part(part: TextPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image_url", "image_url": {"url": part.url}}


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters is not None:
        function["parameters"] = tool.parameters
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoice) -> Any:
    if choice.tool_name:
        return {"type": "function", "function": {"name": choice.tool_name}}
    return choice.mode
