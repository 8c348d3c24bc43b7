"""The form in which answers and vectors are kept in the cache."""

from __future__ import annotations

import json
import sys
from array import array
from typing import Any, Final

from agent360.mesh.inference.answers import Answer, Embeddings, TokenLogprob, Usage
from agent360.mesh.inference.conversation import ToolCall

_VERSION: Final = 3


def encode_answer(answer: Answer) -> bytes:
    """An answer as bytes."""
    return json.dumps(
        [
            _VERSION,
            answer.content,
            [[call.id, call.name, call.arguments] for call in answer.tool_calls],
            answer.finish_reason,
            _encode_usage(answer.usage),
            answer.model,
            answer.backend,
            [_encode_logprob(each) for each in answer.logprobs],
            answer.reasoning,
        ],
        separators=(",", ":"),
    ).encode()


def decode_answer(data: bytes) -> Answer | None:
    """The answer in bytes; None if they are of another version or garbled."""
    try:
        version, *said = json.loads(data)
        if version != _VERSION:
            return None
        content, calls, finish, usage, model, backend, logprobs, reasoning = said
        return Answer(
            content=content,
            tool_calls=tuple(ToolCall(*call) for call in calls),
            finish_reason=finish,
            usage=Usage(*usage),
            model=model,
            backend=backend,
            logprobs=tuple(map(_decode_logprob, logprobs)),
            reasoning=reasoning,
        )
    except (ValueError, TypeError):
        return None


def encode_vectors(found: Embeddings) -> bytes:
    """Vectors as bytes: a line of JSON, then little-endian 32-bit floats."""
    head = [
        _VERSION,
        [len(vector) for vector in found.vectors],
        _encode_usage(found.usage),
        found.model,
        found.backend,
    ]
    body = b"".join(_little_endian(vector).tobytes() for vector in found.vectors)
    return json.dumps(head, separators=(",", ":")).encode() + b"\n" + body


def decode_vectors(data: bytes) -> Embeddings | None:
    """The vectors in bytes; None if they are of another version or garbled."""
    head, _, body = data.partition(b"\n")
    try:
        version, lengths, usage, model, backend = json.loads(head)
        if version != _VERSION or sum(lengths) * 4 != len(body):
            return None
        everything = _little_endian(array("f", body))
        vectors, start = [], 0
        for length in lengths:
            vectors.append(everything[start : start + length])
            start += length
        return Embeddings(vectors, Usage(*usage), model, backend)
    except (ValueError, TypeError):
        return None


def _encode_logprob(found: TokenLogprob) -> list[Any]:
    alternatives = [_encode_logprob(each) for each in found.alternatives]
    return [found.token, found.logprob, found.token_bytes.hex(), alternatives]


def _decode_logprob(found: list[Any]) -> TokenLogprob:
    token, logprob, coded, alternatives = found
    return TokenLogprob(
        token, logprob, bytes.fromhex(coded), tuple(map(_decode_logprob, alternatives))
    )


def _little_endian(vector: array[float]) -> array[float]:
    if sys.byteorder == "little":
        return vector
    swapped = vector[:]
    swapped.byteswap()
    return swapped


def _encode_usage(usage: Usage) -> list[Any]:
    return [usage.input_tokens, usage.output_tokens, usage.cached_input_tokens, usage.estimated]
