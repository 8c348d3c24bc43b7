"""Entries as bytes: a head, their tags, and a body whose value may be compressed."""

from __future__ import annotations

import asyncio
import math
import struct
from typing import Final, NamedTuple

import msgspec
import zstandard

from agent360.mesh.cache.entry import Payload

_HEAD: Final = struct.Struct(">QQQI")
_PLAIN: Final = 0
_ZSTD: Final = 1
_LEVEL: Final = 3
_WORTH_IT: Final = 0.9
_ON_A_THREAD_BYTES: Final = 2**18
_MARGIN_MS: Final = 2
"""A server removes a key by a clock that it reads less often than for the entry's head, which
readers go by."""


class _Body(msgspec.Struct, array_like=True, gc=False):
    """What only replicas read."""

    stale_us: int
    content_type: str
    codec: int
    value: bytes


class Encoded(NamedTuple):
    """An entry without the head that the server gives it."""

    keep_ms: int
    ttl_us: int
    tags: bytes
    body: bytes


class Decoded(NamedTuple):
    """An entry with what its head says."""

    payload: Payload
    version: int
    ends_us: int
    """When it is fresh no more, in microseconds of the server's clock."""


class Codec:
    """Encodes and decodes entries; large values are compressed on a thread."""

    def __init__(self, compress_min_bytes: int) -> None:
        """Makes a codec.

        Args:
            compress_min_bytes: values from this size on are compressed, if that saves a tenth.
        """
        self._compress_min_bytes = compress_min_bytes
        self._encode_body = msgspec.msgpack.Encoder().encode
        self._decode_body = msgspec.msgpack.Decoder(_Body).decode
        self._decode_tags = msgspec.msgpack.Decoder(tuple[str, ...]).decode

    async def encode(self, payload: Payload, fail_safe_s: float) -> Encoded:
        """An entry that is kept for its stale TTL or ``fail_safe_s``, whichever is longer."""
        value, codec = payload.value, _PLAIN
        if len(value) >= self._compress_min_bytes:
            value, codec = await self._compressed(value)
        ttl_us = max(1, round(payload.ttl_s * 1e6))
        kept_s = payload.ttl_s + max(payload.stale_ttl_s, fail_safe_s)
        body = _Body(round(payload.stale_ttl_s * 1e6), payload.content_type, codec, value)
        tags = self._encode_body(list(dict.fromkeys(payload.tags))) if payload.tags else b""
        keep_ms = math.ceil(kept_s * 1e3) + _MARGIN_MS
        return Encoded(keep_ms, ttl_us, tags, self._encode_body(body))

    @staticmethod
    def is_heavy(data: bytes) -> bool:
        """Whether an entry is so large that it is better decoded on a thread."""
        return len(data) >= _ON_A_THREAD_BYTES

    def decode(self, data: bytes) -> Decoded:
        """An entry as it is in the store.

        Raises:
            ValueError: this is no entry.
        """
        try:
            version, written_us, ttl_us, tags_bytes = _HEAD.unpack_from(data)
            begin = _HEAD.size + tags_bytes
            body = self._decode_body(memoryview(data)[begin:])
            tags = self._decode_tags(data[_HEAD.size : begin]) if tags_bytes else ()
            value = body.value
            if body.codec == _ZSTD:
                value = zstandard.ZstdDecompressor().decompress(value)
        except (struct.error, msgspec.DecodeError, zstandard.ZstdError) as error:
            raise ValueError(f"{len(data)} bytes that are no entry: {error}") from error
        payload = Payload(value, ttl_us / 1e6, body.stale_us / 1e6, body.content_type, tags)
        return Decoded(payload, version, written_us + ttl_us)

    async def _compressed(self, value: bytes) -> tuple[bytes, int]:
        if len(value) >= _ON_A_THREAD_BYTES:
            smaller = await asyncio.to_thread(_compress, value)
        else:
            smaller = _compress(value)
        if len(smaller) > _WORTH_IT * len(value):
            return value, _PLAIN
        return smaller, _ZSTD


def _compress(value: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=_LEVEL).compress(value)
