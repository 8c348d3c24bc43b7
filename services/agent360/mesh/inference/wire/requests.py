"""Requests of the contract, checked and turned into domain values."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Final

from google.protobuf.struct_pb2 import ListValue, Struct, Value

from agent360.inference.v1 import inference_pb2 as pb
from agent360.mesh.inference.conversation import (
    AnyJson,
    CacheControl,
    EmbeddingInputs,
    Hints,
    ImagePart,
    Message,
    Prompt,
    Role,
    Sampling,
    SchemaJson,
    TaskClass,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)
from agent360.mesh.inference.tokens import size_of
from agent360.mesh.runtime.validation import Violations

MAX_MESSAGES: Final = 1_000
MAX_TOOLS: Final = 128
MAX_STOPS: Final = 16
MAX_TOP_LOGPROBS: Final = 20
MAX_INPUTS: Final = 1_000
MAX_DIMENSIONS: Final = 65_536
_MAX_NAME_BYTES: Final = 256
_MAX_SESSION_BYTES: Final = 256

_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NAME_RULE: Final = "must match [a-zA-Z0-9_-]{1,64}"

_ROLES: Final[dict[int, Role]] = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
    pb.ROLE_TOOL: "tool",
}
_TASK_CLASSES: Final[dict[int, TaskClass | None]] = {
    pb.TASK_CLASS_UNSPECIFIED: None,
    pb.TASK_CLASS_SIMPLE: "simple",
    pb.TASK_CLASS_COMPLEX: "complex",
}
_RANGES: Final = (
    ("temperature", 0.0, 2.0),
    ("top_p", 0.0, 1.0),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
)


def read_prompt(request: pb.GenerateRequest, max_prompt_bytes: int) -> Prompt:
    """The prompt in a request.

    Raises:
        InvalidRequestError: with everything that is wrong with it.
    """
    faults = Violations()
    faults.text("model", request.model, max_bytes=_MAX_NAME_BYTES)
    faults.text("user", request.user, max_bytes=_MAX_NAME_BYTES, min_bytes=0)
    faults.count("messages", len(request.messages), at_least=1, at_most=MAX_MESSAGES)
    size = request.ByteSize()
    if size > max_prompt_bytes:
        faults.add("messages", f"a prompt may have {max_prompt_bytes:,} bytes, this has {size:,}")
        # Looking further into what is refused for its size would cost what the bound is to spare.
        faults.raise_if_any()
    messages = tuple(
        _message(f"messages[{place}]", message, faults)
        for place, message in enumerate(request.messages)
    )
    tools = _tools(request.tools, faults)
    prompt = Prompt(
        model=request.model,
        messages=messages,
        tools=tools,
        tool_choice=_tool_choice(request, tools, faults),
        sampling=_sampling(request.sampling, faults),
        response_format=_response_format(request, faults),
        hints=_hints(request.hints, faults),
        cache=_cache_control(request, faults),
        user=request.user,
    )
    faults.raise_if_any()
    return prompt


def read_inputs(request: pb.EmbedRequest, max_prompt_bytes: int) -> EmbeddingInputs:
    """The texts to be embedded in a request.

    Raises:
        InvalidRequestError: with everything that is wrong with it.
    """
    faults = Violations()
    faults.text("model", request.model, max_bytes=_MAX_NAME_BYTES)
    faults.text("user", request.user, max_bytes=_MAX_NAME_BYTES, min_bytes=0)
    faults.count("inputs", len(request.inputs), at_least=1, at_most=MAX_INPUTS)
    for place, text in enumerate(request.inputs):
        faults.require(f"inputs[{place}]", bool(text), "must not be empty")
    size = sum(map(size_of, request.inputs))
    if size > max_prompt_bytes:
        faults.add("inputs", f"texts may have {max_prompt_bytes:,} bytes in all, have {size:,}")
    faults.require(
        "dimensions", request.dimensions <= MAX_DIMENSIONS, f"must be at most {MAX_DIMENSIONS:,}"
    )
    cache = _cache_control(request, faults)
    faults.raise_if_any()
    return EmbeddingInputs(
        model=request.model,
        inputs=tuple(request.inputs),
        dimensions=request.dimensions,
        cache=cache,
        user=request.user,
    )


def plain(value: Struct | ListValue | Value) -> Any:
    """A protobuf Struct as JSON has it; whole numbers become integers, as schemas expect."""
    if isinstance(value, Struct):
        return {name: plain(inner) for name, inner in value.fields.items()}
    if isinstance(value, ListValue):
        return [plain(inner) for inner in value.values]
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return plain(value.struct_value)
        case "list_value":
            return plain(value.list_value)
        case _:
            return None


def _message(path: str, message: pb.Message, faults: Violations) -> Message:
    role = _ROLES.get(message.role)
    if role is None:
        faults.add(f"{path}.role", "must be SYSTEM, USER, ASSISTANT or TOOL")
        role = "user"
    if message.parts or message.tool_calls or message.tool_call_id or role == "tool":
        return _rich_message(path, message, role, faults)
    if not message.content and role == "user":
        faults.add(f"{path}.content", "must not be empty")
    return Message(role=role, content=message.content, name=_speaker(path, message, faults))


def _rich_message(path: str, message: pb.Message, role: Role, faults: Violations) -> Message:
    if message.parts and message.content:
        faults.add(f"{path}.content", "must be empty where there are parts")
    if message.tool_calls and role != "assistant":
        faults.add(f"{path}.tool_calls", "only ASSISTANT messages have tool calls")
    if role == "tool":
        faults.text(f"{path}.tool_call_id", message.tool_call_id, max_bytes=_MAX_NAME_BYTES)
    elif message.tool_call_id:
        faults.add(f"{path}.tool_call_id", "only TOOL messages answer a tool call")
    return Message(
        role=role,
        content=message.content,
        parts=tuple(
            _part(f"{path}.parts[{place}]", part, faults)
            for place, part in enumerate(message.parts)
        ),
        tool_calls=tuple(
            _tool_call(f"{path}.tool_calls[{place}]", call, faults)
            for place, call in enumerate(message.tool_calls)
        ),
        tool_call_id=message.tool_call_id,
        name=_speaker(path, message, faults),
    )


def _speaker(path: str, message: pb.Message, faults: Violations) -> str:
    if message.name:
        faults.matches(f"{path}.name", message.name, _NAME, _NAME_RULE)
    return message.name


def _part(path: str, part: pb.ContentPart, faults: Violations) -> TextPart | ImagePart:
    kind = part.WhichOneof("part")
    if kind == "text":
        faults.require(f"{path}.text", bool(part.text), "must not be empty")
        return TextPart(part.text)
    if kind == "image_url":
        known = part.image_url.startswith(("https://", "http://", "data:"))
        faults.require(f"{path}.image_url", known, "must be an http:, https: or data: URL")
        return ImagePart(part.image_url)
    faults.add(path, "must be a text or an image")
    return TextPart("")


def _tool_call(path: str, call: pb.ToolCall, faults: Violations) -> ToolCall:
    faults.text(f"{path}.id", call.id, max_bytes=_MAX_NAME_BYTES)
    faults.matches(f"{path}.name", call.name, _NAME, _NAME_RULE)
    return ToolCall(call.id, call.name, call.arguments)


def _tools(tools: Sequence[pb.Tool], faults: Violations) -> tuple[Tool, ...]:
    if not tools:
        return ()
    faults.count("tools", len(tools), at_least=0, at_most=MAX_TOOLS)
    read, seen = [], set()
    for place, tool in enumerate(tools):
        path = f"tools[{place}].name"
        faults.matches(path, tool.name, _NAME, _NAME_RULE)
        faults.require(path, tool.name not in seen, f"{tool.name!r} is given twice")
        seen.add(tool.name)
        schema = plain(tool.parameters) if tool.HasField("parameters") else None
        read.append(Tool(tool.name, tool.description, schema, tool.strict))
    return tuple(read)


def _tool_choice(
    request: pb.GenerateRequest, tools: tuple[Tool, ...], faults: Violations
) -> ToolChoice | None:
    if not request.HasField("tool_choice"):
        return None
    choice = request.tool_choice
    if not tools and choice.mode != pb.TOOL_CHOICE_MODE_NONE:
        faults.add("tool_choice", "there are no tools to choose from")
    if choice.tool_name:
        known = any(tool.name == choice.tool_name for tool in tools)
        faults.require("tool_choice.tool_name", known, "is not one of the tools")
        allowed = choice.mode != pb.TOOL_CHOICE_MODE_NONE
        faults.require("tool_choice.mode", allowed, "must not be NONE where a tool is named")
        return ToolChoice("required", choice.tool_name)
    match choice.mode:
        case pb.TOOL_CHOICE_MODE_UNSPECIFIED:
            return None
        case pb.TOOL_CHOICE_MODE_AUTO:
            return ToolChoice("auto")
        case pb.TOOL_CHOICE_MODE_NONE:
            return ToolChoice("none") if tools else None
        case pb.TOOL_CHOICE_MODE_REQUIRED:
            return ToolChoice("required")
        case _:
            faults.add("tool_choice.mode", "must be AUTO, NONE or REQUIRED")
            return None


def _sampling(sampling: pb.Sampling, faults: Violations) -> Sampling:
    given: dict[str, Any] = {}
    for name, low, high in _RANGES:
        if sampling.HasField(name):  # type: ignore[arg-type]  # the stub lists literals
            value = given[name] = getattr(sampling, name)
            within = math.isfinite(value) and low <= value <= high
            faults.require(f"sampling.{name}", within, f"must be {low:g} to {high:g}")
    if sampling.HasField("top_k"):
        given["top_k"] = sampling.top_k
        faults.require("sampling.top_k", sampling.top_k > 0, "must be positive")
    if sampling.HasField("max_tokens"):
        given["max_tokens"] = sampling.max_tokens
        faults.require("sampling.max_tokens", sampling.max_tokens > 0, "must be positive")
    if sampling.HasField("seed"):
        given["seed"] = sampling.seed
    if sampling.stop:
        faults.count("sampling.stop", len(sampling.stop), at_least=0, at_most=MAX_STOPS)
        for place, stop in enumerate(sampling.stop):
            faults.text(f"sampling.stop[{place}]", stop, max_bytes=1_024)
        given["stop"] = tuple(sampling.stop)
    if sampling.logprobs:
        given["logprobs"] = True
    if sampling.top_logprobs:
        given["top_logprobs"] = sampling.top_logprobs
        within = sampling.top_logprobs <= MAX_TOP_LOGPROBS
        faults.require("sampling.top_logprobs", within, f"must be at most {MAX_TOP_LOGPROBS}")
        faults.require("sampling.logprobs", sampling.logprobs, "must be set with top_logprobs")
    return Sampling(**given)


def _response_format(
    request: pb.GenerateRequest, faults: Violations
) -> AnyJson | SchemaJson | None:
    match request.response_format.WhichOneof("format"):
        case "json_object":
            return AnyJson()
        case "json_schema":
            wanted = request.response_format.json_schema
            path = "response_format.json_schema"
            faults.matches(f"{path}.name", wanted.name, _NAME, _NAME_RULE)
            faults.require(f"{path}.schema", wanted.HasField("schema"), "must not be empty")
            return SchemaJson(wanted.name, plain(wanted.schema), wanted.strict)
        case _:
            return None


def _hints(hints: pb.RoutingHints, faults: Violations) -> Hints:
    faults.require(
        "hints.task_class", hints.task_class in _TASK_CLASSES, "must be SIMPLE or COMPLEX"
    )
    cost = hints.max_cost_usd
    faults.require(
        "hints.max_cost_usd", math.isfinite(cost) and cost >= 0, "must be zero or positive"
    )
    faults.text("hints.session_id", hints.session_id, max_bytes=_MAX_SESSION_BYTES, min_bytes=0)
    latency = None
    if hints.HasField("max_latency"):
        latency = faults.positive_duration("hints.max_latency", hints.max_latency)
    wait = None
    if hints.HasField("queue_timeout"):
        wait = faults.positive_duration("hints.queue_timeout", hints.queue_timeout)
    return Hints(_TASK_CLASSES.get(hints.task_class), cost, latency, hints.session_id, wait)


def _cache_control(
    request: pb.GenerateRequest | pb.EmbedRequest, faults: Violations
) -> CacheControl:
    if not request.HasField("cache_control"):
        return _DEFAULT_CACHE_CONTROL
    control = request.cache_control
    ttl_s = None
    if control.HasField("ttl"):
        ttl_s = faults.positive_duration("cache_control.ttl", control.ttl)
    return CacheControl(ttl_s, control.no_cache, control.no_store, control.share)


_DEFAULT_CACHE_CONTROL: Final = CacheControl()
