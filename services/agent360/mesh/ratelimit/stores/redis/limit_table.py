"""Limits that were set, kept in Redis, and every replica told of changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
import structlog

from agent360.mesh.ratelimit.book import LimitKey
from agent360.mesh.ratelimit.limits import Limit
from agent360.mesh.runtime.redis import Command, Redis, Subscription

_ASK_EVERY_S: Final = 5.0
_ASK_AGAIN_S: Final = 0.2

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Limit).decode


class RedisLimitTable:
    """The port ``LimitTable``: a hash, and a channel on which its changes are told.

    It is read when it is told to have changed, when the channel was lost and is heard again, and
    every few seconds.
    """

    def __init__(self, redis: Redis, prefix: str, log: structlog.stdlib.BoundLogger) -> None:
        self._redis = redis
        self._key = f"{prefix}:{{~limits}}".encode()
        self._channel = f"{prefix}:limits".encode()
        self._log = log
        self._changed = asyncio.Event()
        self._known: dict[bytes, bytes] | None = None
        self._on_change: Callable[[Mapping[LimitKey, Limit]], None] = lambda _: None
        self._reader: asyncio.Task[None] | None = None
        self._subscription = Subscription(
            redis,
            [self._channel],
            on_message=lambda _channel, _message: self._changed.set(),
            on_up=self._changed.set,
            on_down=lambda _reason: None,
        )

    async def start(self, on_change: Callable[[Mapping[LimitKey, Limit]], None]) -> None:
        """See ``LimitTable``."""
        self._on_change = on_change
        await self._subscription.start()
        while not await self._read():  # noqa: ASYNC110 - nobody would set an event
            await asyncio.sleep(_ASK_AGAIN_S)
        self._reader = asyncio.create_task(self._keep_reading())

    async def close(self) -> None:
        """See ``LimitTable``."""
        await self._subscription.close()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait((self._reader,))

    async def put(self, limit: Limit) -> bool:
        """See ``LimitTable``."""
        return await self._change("HSET", _field(limit.key), _encode(limit))

    async def remove(self, key: LimitKey) -> bool:
        """See ``LimitTable``."""
        return await self._change("HDEL", _field(key))

    async def _change(self, command: str, *arguments: bytes) -> bool:
        replies = await self._redis.run(
            [
                Command(self._key, (command, self._key, *arguments)),
                Command(self._key, ("PUBLISH", self._channel, b"")),
            ]
        )
        await self._read()
        return not isinstance(replies[0], Exception)

    async def _keep_reading(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_ASK_EVERY_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            if not await self._read():
                self._changed.set()
                await asyncio.sleep(_ASK_AGAIN_S)

    async def _read(self) -> bool:
        command = Command(self._key, ("HGETALL", self._key))
        (reply,) = await self._redis.run([command], repeatable=True)
        if isinstance(reply, Exception):
            return False
        rows = (
            list(reply.items())
            if isinstance(reply, dict)
            else zip(reply[::2], reply[1::2], strict=True)
        )
        table = dict(rows)
        if table == self._known:
            return True
        self._known = table
        limits = {}
        for packed in table.values():
            try:
                limit = _decode(packed)
            except msgspec.DecodeError as error:
                self._log.error("a limit in the store cannot be read", error=str(error))
                continue
            limits[limit.key] = limit
        self._on_change(limits)
        return True


def _field(key: LimitKey) -> bytes:
    return "/".join(key).encode()
