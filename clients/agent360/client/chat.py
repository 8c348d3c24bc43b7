"""What is said to a model, and what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, Literal

from agent360.inference.v1 import inference_pb2 as pb

RoleName = Literal["system", "user", "assistant", "tool"]

_ROLES: Final[dict[str, int]] = {
    "system": pb.ROLE_SYSTEM,
    "user": pb.ROLE_USER,
    "assistant": pb.ROLE_ASSISTANT,
    "tool": pb.ROLE_TOOL,
}


class FinishReason(IntEnum):
    """Why an answer ended."""

    STOP = 1
    """It was complete."""
    LENGTH = 2
    """``max_tokens`` was reached."""
    TOOL_CALLS = 3
    """Tools are to be called."""
    CONTENT_FILTER = 4
    """The backend withheld content."""


class AnswerSource(IntEnum):
    """Where an answer came from."""

    MODEL = 1
    """The model was run for this request."""
    CACHE = 2
    """The cache."""
    COALESCED = 3
    """An identical request that was already running."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the model asks for."""

    id: str
    """Names the call in the message with its result."""
    name: str
    """The tool's name."""
    arguments: str
    """The arguments as the model wrote them: JSON if all went well."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: RoleName
    """Who speaks."""
    content: str = ""
    """What is said."""
    images: tuple[str, ...] = ()
    """URLs of images that follow the text; may be data: URLs."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls the model asked for."""
    tool_call_id: str = ""
    """The call that this is the result of, for the role ``tool``."""
    name: str = ""
    """Name of the speaker."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    """Its name."""
    description: str = ""
    """What it does, for the model."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """JSON Schema of its arguments."""
    strict: bool = False
    """Whether arguments must follow the schema exactly."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A conversation to be continued by a model.

    Example:
        >>> GenerateRequest("Name three rivers.", max_tokens=50)
        >>> GenerateRequest([Message("system", "Be brief."), Message("user", "Hello")])
    """

    messages: str | Sequence[Message]
    """The conversation; a text stands for one message of the user."""
    model: str = "auto"
    """Name of a model, or ``auto``."""
    max_tokens: int | None = None
    """At most this many tokens are generated."""
    temperature: float | None = None
    """0 to 2."""
    top_p: float | None = None
    """0 to 1."""
    top_k: int | None = None
    """Only the k most likely tokens; not known to every backend."""
    frequency_penalty: float | None = None
    """-2 to 2."""
    presence_penalty: float | None = None
    """-2 to 2."""
    logprobs: bool = False
    """Whether to tell how probable each token was, where the backend can."""
    top_logprobs: int = 0
    """How many of the most probable tokens to tell at each place; at most 20; implies
    ``logprobs``."""
    seed: int | None = None
    """Makes an answer repeatable where the backend can."""
    stop: Sequence[str] = ()
    """Generation ends before any of these."""
    tools: Sequence[Tool] = ()
    """Functions the model may call."""
    tool_choice: str = ""
    """``auto``, ``none`` or ``required``; another text names the one tool to call."""
    json_schema: Mapping[str, Any] | None = None
    """JSON Schema that the answer must follow."""
    json_schema_strict: bool = False
    """Whether it must follow the schema exactly, where the model can promise it."""
    json_object: bool = False
    """Whether the answer must be a JSON object."""
    task_class: Literal["", "simple", "complex"] = ""
    """For ``auto``: how demanding the request is; empty: found out by the service."""
    max_cost_usd: float = 0.0
    """For ``auto``: the most the answer may cost; 0: no ceiling."""
    max_latency: float | None = None
    """For ``auto``: the latency aimed at, in seconds."""
    session_id: str = ""
    """For ``auto``: requests of one session go to the same backend where possible."""
    queue_timeout: float | None = None
    """Longest wait for a turn of the model, in seconds; only ever shortens the service's bound."""
    cache_ttl: float | None = None
    """Seconds that the answer may be kept; None: the service's default."""
    no_cache: bool = False
    """Do not answer from the cache."""
    no_store: bool = False
    """Do not keep the answer."""
    share: bool = False
    """Share the answer with other tenants that ask for it too; needs the service's agreement."""
    user: str = ""
    """The end user; limits may count by it."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that were used."""

    input_tokens: int = 0
    """Tokens of the prompt."""
    output_tokens: int = 0
    """Tokens that were generated."""
    cached_input_tokens: int = 0
    """Tokens of the prompt that the backend had already processed."""
    estimated: bool = False
    """True where the backend reported none and the numbers are estimates."""
    cost_usd: float = 0.0
    """What the answer cost."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How probable a token of an answer was."""

    token: str
    """The token as text."""
    logprob: float
    """Natural logarithm of its probability."""
    token_bytes: bytes = b""
    """Its bytes; empty where the backend does not tell."""
    alternatives: tuple[TokenLogprob, ...] = ()
    """The most probable tokens at its place, the most probable first."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    text: str
    """What the model said."""
    tool_calls: tuple[ToolCall, ...]
    """Calls it asks for."""
    finish_reason: FinishReason
    """Why it ended."""
    usage: Usage
    """Tokens used."""
    source: AnswerSource
    """Where the answer came from."""
    model: str
    """The model that answered."""
    backend: str
    """The backend that answered."""
    rule: str
    """The routing rule that chose the model."""
    because: str
    """What decided the rule, such as ``tools``; empty where the request named the model."""
    policy: str
    """What chose among the model's backends, such as ``session`` or ``least_tokens``."""
    first_token_s: float | None
    """Seconds from the service's receiving the request to the first token; None: none."""
    total_s: float
    """Seconds from the service's receiving the request to the end of the answer."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """How probable its tokens were; empty where it was not asked for or is not known."""
    reasoning: str = ""
    """What the model thought before it answered, where its backend tells."""


def fill_request(message: Any, request: GenerateRequest) -> None:
    """Fills a wire GenerateRequest in place."""
    message.model = request.model
    if isinstance(request.messages, str):
        message.messages.add(role=pb.ROLE_USER, content=request.messages)
    else:
        for each in request.messages:
            _fill_message(message.messages.add(), each)
    _fill_sampling(message, request)
    _fill_tools(message, request)
    _fill_hints(message, request)
    if request.json_schema is not None:
        message.response_format.json_schema.schema.update(dict(request.json_schema))
        message.response_format.json_schema.name = "answer"
        message.response_format.json_schema.strict = request.json_schema_strict
    elif request.json_object:
        message.response_format.json_object.SetInParent()
    if request.cache_ttl is not None:
        message.cache_control.ttl.FromNanoseconds(round(request.cache_ttl * 1e9))
    if request.no_cache:
        message.cache_control.no_cache = True
    if request.no_store:
        message.cache_control.no_store = True
    if request.share:
        message.cache_control.share = True
    if request.user:
        message.user = request.user


def size_of_request(request: GenerateRequest) -> int:
    """About the bytes that a request takes on the wire."""
    if isinstance(request.messages, str):
        size = len(request.messages) + 256
    else:
        size = sum(
            len(each.content) + 64 + sum(len(image) for image in each.images)
            for each in request.messages
        )
    return size + 512 * len(request.tools) + 256


def read_logprobs(found: Iterable[Any]) -> tuple[TokenLogprob, ...]:
    """Reads wire TokenLogprobs."""
    return tuple(
        TokenLogprob(each.token, each.logprob, each.token_bytes, read_logprobs(each.alternatives))
        for each in found
    )


def read_answer(
    response: Any,
    text: str | None = None,
    logprobs: Sequence[TokenLogprob] = (),
    reasoning: str = "",
) -> Answer:
    """Reads a wire GenerateResponse; for streams, what was streamed stands for its own."""
    message, usage = response.message, response.usage
    routing, timing = response.routing, response.timing
    first, found = timing.first_token, response.logprobs
    return Answer(
        text=message.content if text is None else text,
        tool_calls=_read_calls(message.tool_calls) if message.tool_calls else (),
        finish_reason=FinishReason(response.finish_reason or 1),
        usage=Usage(
            usage.input_tokens,
            usage.output_tokens,
            usage.cached_input_tokens,
            usage.estimated,
            usage.cost_usd,
        ),
        source=AnswerSource(response.source or 1),
        model=routing.model,
        backend=routing.backend,
        rule=routing.rule,
        because=routing.because,
        policy=routing.policy,
        first_token_s=first.ToNanoseconds() / 1e9 if timing.HasField("first_token") else None,
        total_s=timing.total.ToNanoseconds() / 1e9,
        logprobs=tuple(logprobs) or (read_logprobs(found) if found else ()),
        reasoning=reasoning or message.reasoning,
    )


def _read_calls(found: Iterable[Any]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(each.id, each.name, each.arguments) for each in found)


def _fill_message(message: Any, source: Message) -> None:
    role = _ROLES.get(source.role)
    if role is None:
        raise ValueError(f"role {source.role!r} is not one of {', '.join(_ROLES)}")
    message.role = role
    if source.images:
        if source.content:
            message.parts.add(text=source.content)
        for url in source.images:
            message.parts.add(image_url=url)
    else:
        message.content = source.content
    for call in source.tool_calls:
        message.tool_calls.add(id=call.id, name=call.name, arguments=call.arguments)
    if source.tool_call_id:
        message.tool_call_id = source.tool_call_id
    if source.name:
        message.name = source.name


_SAMPLING: Final = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "frequency_penalty",
    "presence_penalty",
    "seed",
)


def _fill_sampling(message: Any, request: GenerateRequest) -> None:
    sampling = message.sampling
    for name in _SAMPLING:
        value = getattr(request, name)
        if value is not None:
            setattr(sampling, name, value)
    if request.logprobs or request.top_logprobs:
        sampling.logprobs = True
        sampling.top_logprobs = request.top_logprobs
    if request.stop:
        sampling.stop.extend(request.stop)


_TOOL_CHOICES: Final = {
    "auto": pb.TOOL_CHOICE_MODE_AUTO,
    "none": pb.TOOL_CHOICE_MODE_NONE,
    "required": pb.TOOL_CHOICE_MODE_REQUIRED,
}


def _fill_tools(message: Any, request: GenerateRequest) -> None:
    for tool in request.tools:
        wire = message.tools.add(name=tool.name, description=tool.description, strict=tool.strict)
        wire.parameters.update(dict(tool.parameters))
    choice = request.tool_choice
    if choice in _TOOL_CHOICES:
        message.tool_choice.mode = _TOOL_CHOICES[choice]
    elif choice:
        message.tool_choice.mode = pb.TOOL_CHOICE_MODE_REQUIRED
        message.tool_choice.tool_name = choice


_TASK_CLASSES: Final = {"simple": pb.TASK_CLASS_SIMPLE, "complex": pb.TASK_CLASS_COMPLEX}


def _fill_hints(message: Any, request: GenerateRequest) -> None:
    if request.task_class:
        message.hints.task_class = _TASK_CLASSES[request.task_class]
    if request.max_cost_usd:
        message.hints.max_cost_usd = request.max_cost_usd
    if request.max_latency is not None:
        message.hints.max_latency.FromNanoseconds(round(request.max_latency * 1e9))
    if request.session_id:
        message.hints.session_id = request.session_id
    if request.queue_timeout is not None:
        message.hints.queue_timeout.FromNanoseconds(round(request.queue_timeout * 1e9))
