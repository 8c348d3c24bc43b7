"""What the simulator says: text, JSON and tool arguments that follow from the prompt alone."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

_WORD: Final = re.compile(r"\w+|[^\w\s]")
_PIECE: Final = re.compile(r"\s*\S{1,6}")
_MARKER: Final = re.compile(r"\[\[sim:[^\]]*\]\]")
_OPENING: Final = "This is a simulated answer, made without a model, about"
_OPENING_WORDS: Final = tuple(_OPENING.split())
_FILLING: Final = (
    "the plan step result tool agent search data answer checks first then while several keeps "
    "each request value next order list source summary report customer change item before after "
    "uses finds gives needs returns compares short long open clear simple known new other"
)
_VOCABULARY: Final = tuple(_FILLING.split())
_CANONICAL: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
_TOKENS_PER_MESSAGE: Final = 4
_MAX_DEPTH: Final = 6


def count_tokens(text: str) -> int:
    """Tokens of a text as the simulator counts them: words and punctuation marks."""
    return len(_WORD.findall(text))


def prompt_tokens(messages: Sequence[Mapping[str, Any]]) -> int:
    """Tokens of a conversation."""
    return sum(_TOKENS_PER_MESSAGE + count_tokens(content_of(each)) for each in messages)


def content_of(message: Mapping[str, Any]) -> str:
    """The text of a message, whether it is one text or parts."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return ""


def subject_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the conversation is about: its last message without fault markers."""
    content = content_of(messages[-1])
    return (_MARKER.sub("", content) if "[[sim:" in content else content).strip()


def seed_of(body: Mapping[str, Any]) -> int:
    """A number that follows from what shapes the answer: model, messages, tools, format, seed."""
    shaping = [body.get(name) for name in ("model", "messages", "tools", "response_format", "seed")]
    canonical = _CANONICAL(shaping)
    return int.from_bytes(hashlib.blake2b(canonical.encode(), digest_size=8).digest(), "big")


def prose(subject: str, seed: int, tokens: int, most: int | None = None) -> list[str]:
    """A text of ``tokens`` pieces that begins by saying what it is and ends with a full stop.

    Args:
        subject: what it is about.
        seed: makes texts about the same differ.
        tokens: how many pieces the whole has.
        most: how many of them are wanted; None: all.
    """
    own = [word for word in _WORD.findall(subject)[:40] if word[0].isalnum()]
    words = [*_OPENING_WORDS, *own[:6]]
    wanted = tokens if most is None else min(tokens, most)
    if len(words) < wanted:
        choose = random.Random(seed)
        while len(words) < wanted:
            words.append(choose.choice(own if own and choose.random() < 0.2 else _VOCABULARY))
    pieces = [words[0], *(f" {word}" for word in words[1:wanted])]
    if wanted == tokens:
        pieces[-1] += "."
    return pieces


def cut(text: str) -> list[str]:
    """A text in pieces of the size of tokens; joined they are the text."""
    pieces = _PIECE.findall(text)
    rest = text[sum(map(len, pieces)) :]
    return [*pieces, rest] if rest else pieces


def instance_of(schema: Mapping[str, Any], subject: str, seed: int, depth: int = 0) -> Any:
    """A value that follows a JSON Schema: objects, arrays, enums, strings and numbers with bounds.

    References and combinations other than anyOf/oneOf are not followed.
    """
    if depth > _MAX_DEPTH:
        return None
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][seed % len(schema["enum"])]
    for combination in ("anyOf", "oneOf"):
        if schema.get(combination):
            return instance_of(schema[combination][0], subject, seed, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if isinstance(kind, list):
        kind = next((each for each in kind if each != "null"), "null")
    if kind == "object":
        properties = schema.get("properties", {})
        return {
            name: instance_of(inner, subject, seed + place, depth + 1)
            for place, (name, inner) in enumerate(properties.items(), 1)
        }
    if kind == "array":
        count = max(1, int(schema.get("minItems", 1)))
        inner = schema.get("items", {})
        return [instance_of(inner, subject, seed + place, depth + 1) for place in range(count)]
    return _scalar(kind, schema, subject, seed)


def _scalar(kind: str, schema: Mapping[str, Any], subject: str, seed: int) -> Any:
    if kind in ("integer", "number"):
        low = math.ceil(schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1))
        high = math.floor(schema.get("maximum", low + 9))
        return low + seed % (max(high - low, 0) + 1)
    if kind == "boolean":
        return seed % 2 == 0
    if kind == "null":
        return None
    words = _WORD.findall(subject) or ["simulated"]
    start = seed % len(words)
    text = " ".join(words[start : start + 4])
    text = text.ljust(int(schema.get("minLength", 0)), ".")
    return text[: int(schema.get("maxLength", 200))]


def embedding(text: str, dimensions: int) -> array[float]:
    """A unit vector; texts that share words are near each other."""
    vector = [0.0] * dimensions
    for word in _WORD.findall(text.lower()) or [""]:
        place, sign = _slot(word)
        vector[place % dimensions] += sign
    norm = math.sqrt(sum(each * each for each in vector))
    if not norm:
        vector[0] = norm = 1.0
    return array("f", [each / norm for each in vector])


def as_base64(vector: array[float]) -> str:
    """A vector as the OpenAI API's encoding_format base64: little-endian 32-bit floats."""
    return base64.b64encode(vector.tobytes()).decode()


@lru_cache(maxsize=10_000)
def _slot(word: str) -> tuple[int, float]:
    digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), 1.0 if digest[4] & 1 else -1.0
