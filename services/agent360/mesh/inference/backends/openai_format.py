"""Requests and answers in the JSON of the OpenAI API."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Mapping
from typing import Any, Final

from agent360.mesh.inference.answers import FinishReason, Piece, ToolCallPiece, Usage
from agent360.mesh.inference.conversation import (
    EmbeddingInputs,
    ImagePart,
    Message,
    Prompt,
    SchemaJson,
    TextPart,
    Tool,
    ToolChoice,
)

_FINISH: Final[Mapping[str, FinishReason]] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}


def chat_body(
    prompt: Prompt, model: str, *, streamed: bool, max_tokens_field: str
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
    if isinstance(prompt.response_format, SchemaJson):
        shape = prompt.response_format
        schema = {"name": shape.name, "schema": shape.schema, "strict": shape.strict}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif prompt.response_format is not None:
        body["response_format"] = {"type": "json_object"}
    if streamed:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    return body


def embedding_body(request: EmbeddingInputs, model: str) -> dict[str, Any]:
    """The body of an embedding request. base64 spares parsing millions of decimal numbers."""
    body: dict[str, Any] = {
        "model": model,
        "input": list(request.inputs),
        "encoding_format": "base64",
    }
    if request.dimensions:
        body["dimensions"] = request.dimensions
    return body


def read_usage(found: Any) -> Usage | None:
    """The usage object of an answer; None where there is none."""
    if not isinstance(found, dict):
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
    content = delta.get("content")
    if content:
        pieces.append(str(content))
    for place, call in enumerate(delta.get("tool_calls") or ()):
        function = call.get("function") or {}
        index = call.get("index")
        pieces.append(
            ToolCallPiece(
                place if index is None else int(index),
                str(call.get("id") or ""),
                str(function.get("name") or ""),
                str(function.get("arguments") or ""),
            )
        )
    return pieces


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
