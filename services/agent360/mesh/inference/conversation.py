"""What a caller asks of a model: messages, tools, sampling, the shape of the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
TaskClass = Literal["simple", "complex"]


@dataclass(frozen=True, slots=True)
class TextPart:
    """A text within a message."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image within a message."""

    url: str
    """Its address; may be a ``data:`` URL."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model asks for."""

    id: str
    name: str
    arguments: str
    """As the model wrote them: JSON if all went well."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message; either ``content`` or ``parts``."""

    role: Role
    content: str = ""
    parts: tuple[TextPart | ImagePart, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    """JSON Schema of its arguments."""
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may, must or must not call tools."""

    mode: Literal["auto", "none", "required"]
    tool_name: str = ""
    """The one tool to call; empty: any."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; None leaves it to the model."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    logprobs: bool = False
    """Whether the probabilities of tokens are wanted."""
    top_logprobs: int = 0
    """How many of the most probable tokens are wanted at each place besides."""


@dataclass(frozen=True, slots=True)
class AnyJson:
    """The answer is any JSON object."""


@dataclass(frozen=True, slots=True)
class SchemaJson:
    """The answer is JSON that follows a schema."""

    name: str
    schema: Mapping[str, Any]
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Hints:
    """What to keep in mind when the model is chosen by the service."""

    task_class: TaskClass | None = None
    max_cost_usd: float = 0.0
    """The most the answer may cost; zero: no ceiling."""
    max_latency_s: float | None = None
    session_id: str = ""
    queue_timeout_s: float | None = None
    """The longest wait for a turn of a model; None: as the model's queue has it."""


@dataclass(frozen=True, slots=True)
class CacheControl:
    """How the cache is used."""

    ttl_s: float | None = None
    """How long the answer may be kept; None: the service's default."""
    no_cache: bool = False
    """Do not answer from the cache, nor with the answer of a call in flight."""
    no_store: bool = False
    """Do not keep the answer."""
    share: bool = False
    """Share the answer with tenants that agreed to it, and take theirs."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation to be continued by a model."""

    model: str
    """Name of a model, or ``auto``."""
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice | None = None
    sampling: Sampling = Sampling()
    response_format: AnyJson | SchemaJson | None = None
    """None: free text."""
    hints: Hints = Hints()
    cache: CacheControl = CacheControl()
    user: str = ""
    """The end user; limits may count by it."""


@dataclass(frozen=True, slots=True)
class EmbeddingInputs:
    """Texts to turn into vectors."""

    model: str
    inputs: tuple[str, ...]
    dimensions: int = 0
    """Length of the vectors; zero: the model's own."""
    cache: CacheControl = CacheControl()
    user: str = ""
