"""The lines of a file of prompts: read a little at a time, checked, and given a key each."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, NoReturn

import msgspec
from msgspec import Meta, Struct

from agent360.client import GenerateRequest, Message, Tool
from agent360.client.chat import ToolCall
from agent360.mesh.openai_bodies import (
    ChatMessage,
    Extension,
    NamedTool,
    Part,
    ResponseFormat,
    ToolParam,
)

_BATCH: Final = 256
"""Lines read at a time."""
_BOM: Final = b"\xef\xbb\xbf"
_ROLES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_CHOICES: Final = frozenset({"auto", "none", "required"})
_SAMPLING: Final = (
    "temperature",
    "top_p",
    "top_k",
    "frequency_penalty",
    "presence_penalty",
    "seed",
)

_PositiveInt = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class _Fields(Struct):
    """What a line may hold; ``metadata`` is copied to its answer."""

    id: str | int | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    model: str | None = None
    max_tokens: _PositiveInt | None = None
    max_completion_tokens: _PositiveInt | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: _PositiveInt | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: _Int64 | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    stop: str | list[str] | None = None
    tools: list[ToolParam] | None = None
    tool_choice: str | NamedTool | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    agent360: Extension | None = None
    metadata: Any = None


class _StrictFields(_Fields, forbid_unknown_fields=True):
    """The same; a name that is not known is an error."""


@dataclass(frozen=True, slots=True)
class LineDefaults:
    """What lines are taken to say where they say nothing."""

    model: str = "auto"
    """Name of a model, or ``auto``."""
    max_tokens: int | None = None
    """Most tokens of an answer; None: the model's own bound."""


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One line of the file."""

    index: int
    """Which line, from 0."""
    size_bytes: int
    """Its length in the file, with its end."""
    id: str | int | None
    """Its own name, if it has one."""
    key: int
    """Of its id, or else its place, and of what it asks: 64 bits."""
    request: GenerateRequest | None
    """What it asks; None if it cannot be read."""
    fault: str = ""
    """Why it cannot be read."""
    metadata: Any = None
    """Its own, to be copied to its answer."""


class PromptReader:
    """Reads lines.

    Example:
        >>> reader = PromptReader(LineDefaults(model="small"), strict=True)
        >>> reader.read(0, b'{"prompt": "Name three rivers"}\\n').request.messages
        'Name three rivers'
    """

    def __init__(self, defaults: LineDefaults, *, strict: bool) -> None:
        """Makes a reader.

        Args:
            defaults: for fields that lines do not have.
            strict: whether unknown fields are errors; else they are ignored.
        """
        self._defaults = defaults
        self._decoder: msgspec.json.Decoder[_Fields] = msgspec.json.Decoder(
            _StrictFields if strict else _Fields
        )

    async def lines(self, path: Path) -> AsyncIterator[PromptLine]:
        """The lines of a file that are not blank, never more than a few hundred in memory.

        Raises:
            OSError: the file cannot be read.
        """
        file = await asyncio.to_thread(path.open, "rb")
        try:
            index = 0
            while batch := await asyncio.to_thread(_next_lines, file):
                for data in batch:
                    if index == 0:
                        data = data.removeprefix(_BOM)
                    if not data.isspace():
                        yield self.read(index, data)
                    index += 1
        finally:
            file.close()

    def read(self, index: int, data: bytes) -> PromptLine:
        """One line; what is wrong with it is said in ``fault``."""
        fields = None
        try:
            fields = self._decoder.decode(data)
            request = self._request(fields)
        except (msgspec.DecodeError, UnicodeDecodeError, _FaultError) as error:
            own = fields.id if fields is not None else None
            fault = str(error)
            if not isinstance(error, _FaultError | msgspec.ValidationError):
                fault = f"is not JSON: {fault}"
            key = _key(["fault", index, hashlib.blake2b(data).hexdigest()])
            return PromptLine(index, len(data), own, key, None, f"line {index + 1}: {fault}")
        # Of the line's own words, so that a later version of this program makes the same of them.
        asked = msgspec.json.decode(data)
        asked.pop("id", None)
        asked.pop("metadata", None)
        identity = ["line", index] if fields.id is None else ["id", fields.id]
        key = _key([*identity, self._defaults.model, self._defaults.max_tokens, asked])
        return PromptLine(index, len(data), fields.id, key, request, metadata=fields.metadata)

    def _request(self, fields: _Fields) -> GenerateRequest:
        if (fields.prompt is None) == (fields.messages is None):
            _fault("must have either a 'prompt' or 'messages'")
        limit = fields.max_completion_tokens or fields.max_tokens or self._defaults.max_tokens
        given: dict[str, Any] = {name: getattr(fields, name) for name in _SAMPLING}
        if fields.stop is not None:
            given["stop"] = [fields.stop] if isinstance(fields.stop, str) else fields.stop
        if fields.tools:
            given["tools"] = [_tool(place, tool) for place, tool in enumerate(fields.tools)]
        if fields.tool_choice is not None:
            given["tool_choice"] = _tool_choice(fields.tool_choice)
        if fields.response_format is not None:
            given |= _shape(fields.response_format)
        if fields.agent360 is not None:
            given |= _extension(fields.agent360)
        return GenerateRequest(
            messages=fields.prompt
            if fields.messages is None
            else [_message(place, each) for place, each in enumerate(fields.messages)],  # type: ignore[arg-type]
            model=fields.model or self._defaults.model,
            max_tokens=limit,
            user=fields.user or "",
            **given,
        )


class _FaultError(Exception):
    """What is wrong with a line, for people."""


def _fault(message: str) -> NoReturn:
    raise _FaultError(message)


def _next_lines(file: BinaryIO) -> list[bytes]:
    return list(islice(file, _BATCH))


def _key(parts: list[Any]) -> int:
    text = msgspec.json.encode(parts, order="deterministic")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _message(place: int, message: ChatMessage) -> Message:
    path = f"messages[{place}]"
    role = _ROLES.get(message.role)
    if role is None:
        _fault(f"{path}.role must be one of {', '.join(_ROLES)}, is {message.role!r}")
    if message.function_call is not None or message.audio is not None:
        _fault(f"{path}: function_call and audio are not supported")
    images: tuple[str, ...] = ()
    content = message.content or ""
    if isinstance(content, list):
        content, images = _parts(path, content)
    calls = message.tool_calls or ()
    return Message(
        role=role,  # type: ignore[arg-type]  # a value of _ROLES
        content=content,
        images=images,
        tool_calls=tuple(
            ToolCall(each.id, each.function.name, each.function.arguments) for each in calls
        ),
        tool_call_id=message.tool_call_id or "",
        name=message.name or "",
    )


def _parts(path: str, parts: list[Part]) -> tuple[str, tuple[str, ...]]:
    """The text of a message's parts, and the images after it."""
    texts: list[str] = []
    images: list[str] = []
    for place, part in enumerate(parts):
        if part.type == "text" and part.text is not None:
            if images:
                _fault(f"{path}.content[{place}]: texts must come before images")
            texts.append(part.text)
        elif part.type == "image_url" and part.image_url is not None:
            images.append(part.image_url.url)
        else:
            _fault(f"{path}.content[{place}] must be a text or an image_url")
    return "".join(texts), tuple(images)


def _tool(place: int, tool: ToolParam) -> Tool:
    function = tool.function
    if tool.type != "function" or function is None:
        _fault(f"tools[{place}] must be of type 'function' and have a 'function'")
    return Tool(
        function.name,
        function.description or "",
        function.parameters or {},
        bool(function.strict),
    )


def _tool_choice(choice: str | NamedTool) -> str:
    if isinstance(choice, str):
        if choice not in _CHOICES:
            _fault(f"tool_choice must be auto, none, required or a function, is {choice!r}")
        return choice
    if choice.function is None:
        _fault("tool_choice must name a function")
    return choice.function.name


def _shape(wanted: ResponseFormat) -> dict[str, Any]:
    match wanted.type:
        case "text":
            return {}
        case "json_object":
            return {"json_object": True}
        case "json_schema":
            if wanted.json_schema is None or wanted.json_schema.schema is None:
                _fault("response_format.json_schema.schema is missing")
            return {
                "json_schema": wanted.json_schema.schema,
                "json_schema_strict": bool(wanted.json_schema.strict),
            }
        case other:
            _fault(f"response_format.type must be text, json_object or json_schema, is {other!r}")


def _extension(extension: Extension) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if extension.cache is not None:
        cache = extension.cache
        given |= {
            "cache_ttl": cache.ttl_s,
            "no_cache": cache.no_cache,
            "no_store": cache.no_store,
            "share": cache.share,
        }
    if extension.hints is not None:
        hints = extension.hints
        given |= {
            "task_class": hints.task_class or "",
            "max_cost_usd": hints.max_cost_usd,
            "max_latency": hints.max_latency_s,
            "session_id": hints.session_id,
        }
    return given
