"""What replicas tell each other: the changes that the scripts publish."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec


class Message(msgspec.Struct, array_like=True, gc=False):
    """One published change; ``prelude.lua`` makes it."""

    kind: str
    """k: keys, each followed by its version; p: a prefix; t: a tag; a: all; c: a claim's end."""
    base: str
    """Of the shard."""
    previous: int
    """The last version given before the change; what is missing between shows by it."""
    latest: int
    """The last version given with it."""
    version: int
    """Entries up to this version are concerned, of a prefix, a tag or all."""
    space: str
    """The namespace's version after it."""
    names: Any
    """Keys and versions, a prefix, a tag, or a key and the nonce of its claim."""


class KeyVersion(NamedTuple):
    """A key and the version of its last change."""

    key: str
    version: int


_decode = msgspec.msgpack.Decoder(Message).decode


def read_message(payload: bytes) -> Message | None:
    """A published change; None if it is none."""
    try:
        return _decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def keys_of(message: Message) -> list[KeyVersion]:
    """The keys of a message of kind k."""
    names = message.names
    return [KeyVersion(names[at], names[at + 1]) for at in range(0, len(names), 2)]
