"""The bodies of requests as the OpenAI API has them, and the mesh's own extension of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

_PositiveInt = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
_Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class ImageUrl(Struct):
    """Where an image is."""

    url: str
    detail: str | None = None
    """Accepted, and left to the model."""


class Part(Struct):
    """A part of a message."""

    type: str
    text: str | None = None
    image_url: ImageUrl | None = None
    refusal: str | None = None


class CalledFunction(Struct):
    """The function of a tool call."""

    name: str
    arguments: str


class Call(Struct):
    """A tool call that an assistant's message asked for."""

    id: str
    function: CalledFunction
    type: str = "function"


class ChatMessage(Struct):
    """A message; what a model's own message holds beside this is ignored."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    audio: Any = None


class Function(Struct):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolParam(Struct):
    """A tool."""

    type: str
    function: Function | None = None


class NamedFunction(Struct):
    """The name of a function."""

    name: str


class NamedTool(Struct):
    """The one tool to call."""

    type: str
    function: NamedFunction | None = None


class JsonSchema(Struct):
    """A schema that the answer follows."""

    name: str
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Struct):
    """The shape of the answer."""

    type: str
    json_schema: JsonSchema | None = None


class StreamOptions(Struct):
    """What a stream says beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class CacheExtension(Struct, forbid_unknown_fields=True):
    """How the cache is used; as CacheControl of the contract."""

    ttl_s: float | None = None
    no_cache: bool = False
    no_store: bool = False
    share: bool = False


class HintsExtension(Struct, forbid_unknown_fields=True):
    """What to keep in mind for model ``auto``; as RoutingHints of the contract."""

    task_class: Literal["simple", "complex"] | None = None
    max_cost_usd: float = 0.0
    max_latency_s: float | None = None
    session_id: str = ""
    queue_timeout_s: float | None = None


class Extension(Struct, forbid_unknown_fields=True):
    """What the mesh offers beyond the OpenAI API: the field ``agent360`` of a body."""

    cache: CacheExtension | None = None
    hints: HintsExtension | None = None


class ChatBody(Struct, forbid_unknown_fields=True):
    """The body of POST /v1/chat/completions.

    The last group of fields says nothing about what the answer is, and is accepted and ignored;
    those typed Any before it are refused where they ask for something.
    """

    model: str
    messages: list[ChatMessage]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _PositiveInt | None = None
    max_completion_tokens: _PositiveInt | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: _PositiveInt | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: _Int64 | None = None
    logprobs: bool | None = None
    top_logprobs: _TopLogprobs | None = None
    stop: str | list[str] | None = None
    tools: list[ToolParam] | None = None
    tool_choice: str | NamedTool | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    agent360: Extension | None = None

    n: int | None = None
    logit_bias: Any = None
    modalities: list[str] | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    moderation: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None

    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None


class EmbeddingBody(Struct, forbid_unknown_fields=True):
    """The body of POST /v1/embeddings."""

    model: str
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: _PositiveInt | None = None
    user: str | None = None
    agent360: Extension | None = None
