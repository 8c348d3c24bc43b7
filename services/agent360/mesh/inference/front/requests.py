"""Bodies of the OpenAI API as requests of the contract, which then are checked like any other."""

from __future__ import annotations

import re
from typing import Any, Final, NoReturn, TypeVar

import msgspec

from agent360.client.errors import InvalidRequestError, Violation
from agent360.inference.v1 import inference_pb2 as pb
from agent360.mesh.openai_bodies import (
    ChatBody,
    ChatMessage,
    EmbeddingBody,
    Extension,
    Part,
    ResponseFormat,
    ToolParam,
)

_ROLES: Final = {
    "system": pb.ROLE_SYSTEM,
    "developer": pb.ROLE_SYSTEM,
    "user": pb.ROLE_USER,
    "assistant": pb.ROLE_ASSISTANT,
    "tool": pb.ROLE_TOOL,
}
_MODES: Final = {
    "auto": pb.TOOL_CHOICE_MODE_AUTO,
    "none": pb.TOOL_CHOICE_MODE_NONE,
    "required": pb.TOOL_CHOICE_MODE_REQUIRED,
}
_TASK_CLASSES: Final = {"simple": pb.TASK_CLASS_SIMPLE, "complex": pb.TASK_CLASS_COMPLEX}
_SAMPLING: Final = (
    "temperature",
    "top_p",
    "top_k",
    "frequency_penalty",
    "presence_penalty",
    "seed",
)
_UNSUPPORTED: Final[tuple[tuple[str, tuple[Any, ...], str], ...]] = (
    ("n", (None, 1), "one answer is made for a request; send several requests"),
    ("logit_bias", (None, {}), "is not supported"),
    ("modalities", (None, ["text"]), "answers are text"),
    ("parallel_tool_calls", (None, True), "models may always call several tools at once"),
    ("functions", (None, []), "use tools"),
    ("function_call", (None,), "use tool_choice"),
    ("audio", (None,), "answers are text"),
    ("prediction", (None,), "is not supported"),
    ("web_search_options", (None,), "is not supported"),
    ("moderation", (None,), "is not supported"),
    ("reasoning_effort", (None,), "is not supported"),
    ("verbosity", (None,), "is not supported"),
)
"""Fields that would change the answer: what of them asks for nothing, and why they are refused."""

_PLACE: Final = re.compile(r" - at `\$\.?(.*)`$")
_UNKNOWN: Final = re.compile(r"unknown field `(.*?)`")

_chat: Final = msgspec.json.Decoder(ChatBody)
_embedding: Final = msgspec.json.Decoder(EmbeddingBody)

B = TypeVar("B")


def read_chat(data: bytes) -> ChatBody:
    """The body of a chat request.

    Raises:
        InvalidRequestError: it is not JSON, or not of that form.
    """
    return _decoded(_chat, data)


def read_embedding(data: bytes) -> EmbeddingBody:
    """The body of an embedding request.

    Raises:
        InvalidRequestError: it is not JSON, or not of that form.
    """
    return _decoded(_embedding, data)


def fill_generate(request: pb.GenerateRequest, body: ChatBody) -> None:
    """Fills in a request of the contract.

    Raises:
        InvalidRequestError: the body asks for what the mesh does not do.
    """
    for name, harmless, why in _UNSUPPORTED:
        value = getattr(body, name)
        if value not in harmless:
            refuse(name, why)
    request.model = body.model
    for place, message in enumerate(body.messages):
        _fill_message(request.messages.add(), message, f"messages[{place}]")
    _fill_sampling(request.sampling, body)
    if body.tools:
        for place, tool in enumerate(body.tools):
            _fill_tool(request.tools.add(), tool, f"tools[{place}]")
    _fill_tool_choice(request, body)
    if body.response_format is not None:
        _fill_format(request, body.response_format)
    if body.user:
        request.user = body.user
    if body.agent360 is not None:
        _fill_extension(request, body.agent360)


def fill_embed(request: pb.EmbedRequest, body: EmbeddingBody) -> None:
    """Fills in a request of the contract.

    Raises:
        InvalidRequestError: the inputs are tokens, or the extension has hints.
    """
    request.model = body.model
    inputs = [body.input] if isinstance(body.input, str) else body.input
    for place, each in enumerate(inputs):
        if not isinstance(each, str):
            refuse(f"input[{place}]", "must be a text: arrays of tokens are not supported")
        request.inputs.append(each)
    if body.dimensions is not None:
        request.dimensions = body.dimensions
    if body.user:
        request.user = body.user
    extension = body.agent360
    if extension is not None:
        if extension.hints is not None:
            refuse("agent360.hints", "are for chat completions")
        _fill_cache(request, extension)


def refuse(field: str, why: str) -> NoReturn:
    """Refuses a field.

    Raises:
        InvalidRequestError: always.
    """
    raise InvalidRequestError([Violation(field, why)])


def _decoded(decoder: msgspec.json.Decoder[B], data: bytes) -> B:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        text = str(error)
        unknown = _UNKNOWN.search(text)
        place = _PLACE.search(text)
        path = place[1] if place else ""
        if unknown:
            path = f"{path}.{unknown[1]}" if path else unknown[1]
            raise InvalidRequestError([Violation(path, "is not a field of this API")]) from error
        said = _PLACE.sub("", text)
        raise InvalidRequestError([Violation(path or "body", said)]) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError([Violation("body", f"is not JSON: {error}")]) from error


def _fill_message(target: pb.Message, message: ChatMessage, path: str) -> None:
    role = _ROLES.get(message.role)
    if role is None:
        refuse(f"{path}.role", f"must be one of {', '.join(_ROLES)}, is {message.role!r}")
    target.role = role
    content = message.content
    if isinstance(content, str):
        target.content = content
    elif content is not None:
        for place, part in enumerate(content):
            _fill_part(target.parts.add(), part, f"{path}.content[{place}]")
    if message.tool_calls:
        for call in message.tool_calls:
            target.tool_calls.add(
                id=call.id, name=call.function.name, arguments=call.function.arguments
            )
    if message.tool_call_id:
        target.tool_call_id = message.tool_call_id
    if message.name:
        target.name = message.name
    if message.function_call is not None:
        refuse(f"{path}.function_call", "use tool_calls")
    if message.audio is not None:
        refuse(f"{path}.audio", "is not supported")


def _fill_part(target: pb.ContentPart, part: Part, path: str) -> None:
    if part.type == "text" and part.text is not None:
        target.text = part.text
    elif part.type == "image_url" and part.image_url is not None:
        target.image_url = part.image_url.url
    elif part.type == "refusal" and part.refusal is not None:
        target.text = part.refusal
    elif part.type in {"text", "image_url", "refusal"}:
        refuse(f"{path}.{part.type}", "is missing")
    else:
        refuse(f"{path}.type", f"must be text or image_url, is {part.type!r}")


def _fill_sampling(target: pb.Sampling, body: ChatBody) -> None:
    limit, own = body.max_completion_tokens, body.max_tokens
    if limit is not None and own is not None and limit != own:
        refuse("max_tokens", "differs from max_completion_tokens; give one of them")
    limit = own if limit is None else limit
    if limit is not None:
        target.max_tokens = limit
    for name in _SAMPLING:
        value = getattr(body, name)
        if value is not None:
            setattr(target, name, value)
    if body.logprobs:
        target.logprobs = True
    if body.top_logprobs:
        target.top_logprobs = body.top_logprobs
    if body.stop:
        target.stop.extend([body.stop] if isinstance(body.stop, str) else body.stop)


def _fill_tool(target: pb.Tool, tool: ToolParam, path: str) -> None:
    function = tool.function
    if tool.type != "function" or function is None:
        refuse(path, "must be of type 'function' and have a 'function'")
    target.name = function.name
    target.description = function.description or ""
    target.strict = bool(function.strict)
    if function.parameters is not None:
        _fill_object(target.parameters, function.parameters, f"{path}.function.parameters")


def _fill_tool_choice(request: pb.GenerateRequest, body: ChatBody) -> None:
    choice = body.tool_choice
    if choice is None:
        return
    if isinstance(choice, str):
        mode = _MODES.get(choice)
        if mode is None:
            refuse("tool_choice", f"must be auto, none, required or a function, is {choice!r}")
        request.tool_choice.mode = mode
        return
    if choice.type != "function" or choice.function is None:
        refuse("tool_choice", "must name a function")
    request.tool_choice.mode = pb.TOOL_CHOICE_MODE_REQUIRED
    request.tool_choice.tool_name = choice.function.name


def _fill_format(request: pb.GenerateRequest, wanted: ResponseFormat) -> None:
    target = request.response_format
    match wanted.type:
        case "text":
            target.text.SetInParent()
        case "json_object":
            target.json_object.SetInParent()
        case "json_schema":
            if wanted.json_schema is None:
                refuse("response_format.json_schema", "is missing")
            target.json_schema.name = wanted.json_schema.name
            target.json_schema.strict = bool(wanted.json_schema.strict)
            if wanted.json_schema.schema is not None:
                schema = wanted.json_schema.schema
                _fill_object(target.json_schema.schema, schema, "response_format.json_schema")
        case other:
            refuse(
                "response_format.type", f"must be text, json_object or json_schema, is {other!r}"
            )


def _fill_object(target: Any, found: dict[str, Any], field: str) -> None:
    try:
        target.update(found)
    except (OverflowError, RecursionError) as error:
        refuse(field, f"cannot be passed on: {error}")


def _fill_extension(request: pb.GenerateRequest, extension: Extension) -> None:
    _fill_cache(request, extension)
    hints = extension.hints
    if hints is None:
        return
    target = request.hints
    if hints.task_class is not None:
        target.task_class = _TASK_CLASSES[hints.task_class]
    target.max_cost_usd = hints.max_cost_usd
    if hints.max_latency_s is not None:
        _fill_duration(target.max_latency, hints.max_latency_s, "agent360.hints.max_latency_s")
    target.session_id = hints.session_id
    if hints.queue_timeout_s is not None:
        name = "agent360.hints.queue_timeout_s"
        _fill_duration(target.queue_timeout, hints.queue_timeout_s, name)


def _fill_cache(request: pb.GenerateRequest | pb.EmbedRequest, extension: Extension) -> None:
    cache = extension.cache
    if cache is None:
        return
    target = request.cache_control
    target.no_cache, target.no_store = cache.no_cache, cache.no_store
    target.share = cache.share
    if cache.ttl_s is not None:
        _fill_duration(target.ttl, cache.ttl_s, "agent360.cache.ttl_s")


def _fill_duration(target: Any, seconds: float, field: str) -> None:
    if not 0 < seconds <= _MAX_DURATION_S:
        refuse(field, f"must be positive and at most {_MAX_DURATION_S:,} seconds")
    target.FromNanoseconds(round(seconds * 1e9))


_MAX_DURATION_S: Final = 10 * 365 * 86_400
