"""How many tokens a prompt probably has, where the model's tokenizer is not at hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

from agent360.mesh.inference.answers import Piece, ReasoningPiece, TokenLogprob
from agent360.mesh.inference.conversation import ImagePart, Message, Prompt

_BYTES_PER_TOKEN: Final = 4
_MOST_PER_TOKEN: Final = 8
"""Pieces of more bytes than this, on average, are more than a token each."""
_TOKENS_PER_MESSAGE: Final = 4
_TOKENS_PER_IMAGE: Final = 765


def estimate_text(size_bytes: int) -> int:
    """Tokens of a text of this size: four bytes of UTF-8 each, rounded up.

    English has about four letters to a token; scripts with three bytes to a letter have about one
    token to one and a third letters. The estimate is meant for limits, not for bills.
    """
    return -(-size_bytes // _BYTES_PER_TOKEN)


def estimate_pieces(pieces: Iterable[Piece]) -> int:
    """Tokens of what a model said so far.

    Where it told the probability of each token, these are counted. Otherwise a piece is a token, as
    model servers stream them, unless pieces are too large for that: then their bytes count.
    """
    size = count = logprobs = 0
    for piece in pieces:
        if isinstance(piece, TokenLogprob):
            logprobs += 1
            continue
        said = piece_size(piece)
        size += said
        count += said > 0
    if logprobs:
        return logprobs
    return count if size <= count * _MOST_PER_TOKEN else estimate_text(size)


def piece_size(piece: Piece) -> int:
    """Size in bytes of what a model said at a time; how probable it was is no part of that."""
    if isinstance(piece, str):
        return size_of(piece)
    if isinstance(piece, TokenLogprob):
        return 0
    if isinstance(piece, ReasoningPiece):
        return size_of(piece.text)
    return size_of(piece.arguments) + len(piece.name) + len(piece.id)


def estimate_prompt(prompt: Prompt) -> int:
    """Tokens of a conversation with its tools."""
    total = sum(map(_estimate_message, prompt.messages))
    for tool in prompt.tools:
        schema = json.dumps(tool.parameters) if tool.parameters else ""
        total += estimate_text(len(tool.name) + size_of(tool.description) + len(schema))
    return total


def texts_of(prompt: Prompt) -> tuple[list[str], int]:
    """The texts of a conversation and its tools, and how many tokens stand around them, about."""
    texts: list[str] = []
    overhead = 0
    for message in prompt.messages:
        overhead += _TOKENS_PER_MESSAGE
        texts.append(message.content)
        for part in message.parts:
            if isinstance(part, ImagePart):
                overhead += _TOKENS_PER_IMAGE
            else:
                texts.append(part.text)
        for call in message.tool_calls:
            texts += (call.name, call.arguments)
    for tool in prompt.tools:
        texts += (tool.name, tool.description)
        if tool.parameters:
            texts.append(json.dumps(tool.parameters))
    return [text for text in texts if text], overhead


def has_images(prompt: Prompt) -> bool:
    """Whether anything but text stands in a conversation."""
    return any(isinstance(part, ImagePart) for each in prompt.messages for part in each.parts)


def estimate_inputs(texts: Iterable[str]) -> int:
    """Tokens of texts to be embedded."""
    return sum(estimate_text(size_of(text)) for text in texts)


def size_of(text: str) -> int:
    """Size of a text in UTF-8, without encoding it where that can be known."""
    return len(text) if text.isascii() else len(text.encode())


def _estimate_message(message: Message) -> int:
    size = size_of(message.content)
    images = 0
    for part in message.parts:
        if isinstance(part, ImagePart):
            images += 1
        else:
            size += size_of(part.text)
    for call in message.tool_calls:
        size += len(call.name) + size_of(call.arguments)
    return _TOKENS_PER_MESSAGE + estimate_text(size) + images * _TOKENS_PER_IMAGE
