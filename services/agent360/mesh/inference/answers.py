"""What a model says: pieces while it speaks, an answer when it is done."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

from agent360.mesh.inference.conversation import ToolCall

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class ToolCallPiece(NamedTuple):
    """A piece of a tool call."""

    place: int
    """Which call of the message, from 0."""
    id: str
    """The call's id, in its first piece."""
    name: str
    """The tool's name, in its first piece."""
    arguments: str
    """Arguments to append."""


class TokenLogprob(NamedTuple):
    """How probable a token was."""

    token: str
    """As text; of a token that is no whole character, what the backend writes for it."""
    logprob: float
    """Natural logarithm of its probability."""
    token_bytes: bytes = b""
    """Empty where the backend does not tell."""
    alternatives: tuple[TokenLogprob, ...] = ()
    """The most probable tokens at its place."""


class ReasoningPiece(NamedTuple):
    """A piece of what a model thinks before it answers."""

    text: str


Piece = str | ToolCallPiece | TokenLogprob | ReasoningPiece
"""What a model says at a time: text, a piece of a tool call, how probable its text was, or what it
thinks."""


class Delta(NamedTuple):
    """Pieces put together, in the order in which they came."""

    content: str
    tool_calls: tuple[ToolCallPiece, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""


class Source(Enum):
    """Where an answer came from."""

    MODEL = "model"
    CACHE = "cache"
    COALESCED = "coalesced"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that an answer took."""

    input_tokens: int
    output_tokens: int = 0
    cached_input_tokens: int = 0
    estimated: bool = False
    """True where the backend did not say."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a backend ended an answer."""

    finish_reason: FinishReason
    usage: Usage | None
    """None where the backend did not say."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer of a model."""

    content: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    usage: Usage
    model: str
    backend: str
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""
    """What the model thought before it answered, where the backend tells."""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors in the order of their texts."""

    vectors: Sequence[array[float]]
    usage: Usage
    model: str
    backend: str


def merge(pieces: Iterable[Piece]) -> Delta:
    """Puts pieces together: one text, and one piece for each tool call among them."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: dict[int, tuple[str, str, list[str]]] = {}
    logprobs: list[TokenLogprob] = []
    for piece in pieces:
        if isinstance(piece, str):
            texts.append(piece)
            continue
        if isinstance(piece, TokenLogprob):
            logprobs.append(piece)
            continue
        if isinstance(piece, ReasoningPiece):
            thoughts.append(piece.text)
            continue
        known_id, known_name, arguments = calls.get(piece.place, ("", "", []))
        arguments.append(piece.arguments)
        calls[piece.place] = (known_id or piece.id, known_name or piece.name, arguments)
    return Delta(
        "".join(texts),
        tuple(
            ToolCallPiece(place, call_id, name, "".join(arguments))
            for place, (call_id, name, arguments) in sorted(calls.items())
        ),
        tuple(logprobs),
        "".join(thoughts),
    )


def whole_calls(delta: Delta) -> tuple[ToolCall, ...]:
    """The tool calls of a delta that holds all pieces of a message."""
    return tuple(ToolCall(piece.id, piece.name, piece.arguments) for piece in delta.tool_calls)


def as_pieces(answer: Answer) -> list[Piece]:
    """The pieces of an answer that is already whole, for replaying it as a stream."""
    pieces: list[Piece] = [ReasoningPiece(answer.reasoning)] if answer.reasoning else []
    if answer.content:
        pieces.append(answer.content)
    pieces += [
        ToolCallPiece(place, call.id, call.name, call.arguments)
        for place, call in enumerate(answer.tool_calls)
    ]
    pieces += answer.logprobs
    return pieces
