"""One connection, and the exchange of commands and replies on it."""

from __future__ import annotations

import asyncio
import contextvars
import math
from typing import Any, Final, Literal, Protocol

from hiredis import ProtocolError, Reader
from redis.exceptions import InvalidResponse, RedisError

# What turns the text of an error reply into redis-py's exception has no public name.
from redis._parsers.base import BaseParser  # isort: skip

from agent360.mesh.runtime.redis.failures import RedisAwayError

_MOST_TIMEOUTS: Final = 10
"""Large replies may take this many timeouts, as long as something of them comes within each."""

UNFINISHED: Final = object()
"""What the reader gives while a reply has not arrived whole."""

Fault = Literal["lost", "protocol", "timeout"]
"""How a connection failed."""


class Exchange:
    """Commands sent as one, and the replies to them.

    Once it has begun it runs to its end: what its caller does, or whether it still has one, does
    not matter. Nothing else is sent on the connection before the last reply has been read, and a
    connection whose exchange failed is closed, so no caller ever reads another's reply.
    """

    __slots__ = ("answer", "begun_at", "count", "data", "erred", "queued_at", "replies", "timer")

    def __init__(self, data: bytes, count: int, loop: asyncio.AbstractEventLoop) -> None:
        """Prepares an exchange.

        Args:
            data: the commands in RESP.
            count: how many they are.
            loop: that it runs on.
        """
        self.data = data
        self.count = count
        self.answer: asyncio.Future[list[Any] | RedisAwayError] = loop.create_future()
        """The replies, or why there are none; done or cancelled: nobody waits any more."""
        self.replies: list[Any] = []
        self.erred = False
        """Whether an error is among the replies."""
        self.timer: asyncio.TimerHandle | None = None
        self.queued_at = 0.0
        self.begun_at = 0.0
        """When it was sent, on the loop's clock."""

    def settle(self, outcome: list[Any] | RedisAwayError) -> None:
        """Ends it; the caller may have gone."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if not self.answer.done():
            self.answer.set_result(outcome)


class Owner(Protocol):
    """Who is told what becomes of a connection."""

    def freed(self, connection: Connection) -> None:
        """It is connected and has nothing to do."""

    def failed(self, connection: Connection, fault: Fault) -> None:
        """It was closed without having been asked to."""


class Wire(asyncio.Protocol):
    """Bytes from a server turned into replies."""

    def __init__(self, address: str, loop: asyncio.AbstractEventLoop) -> None:
        self.address = address
        """``host:port`` of the server."""
        self.loop = loop
        self.heard_at = -math.inf
        """When something was last received, on the loop's clock."""
        self.closed: asyncio.Future[None] = loop.create_future()
        """Done when the socket is closed."""
        self._errors = _ReplyErrors()
        self._reader = Reader(
            protocolError=InvalidResponse, replyError=self._errors, notEnoughData=UNFINISHED
        )
        self._writer: asyncio.StreamWriter | None = None
        self._transport: asyncio.Transport | None = None

    def connected(self, writer: asyncio.StreamWriter) -> None:
        """Takes over a connection that has logged in.

        The writer is kept because the socket would be closed with it.
        """
        self._writer = writer
        self._transport = writer.transport  # type: ignore[assignment]  # declared as a WriteTransport

    @property
    def usable(self) -> bool:
        """Whether it is open as far as is known."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """Closes the socket at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's own
        """See asyncio.Protocol."""
        self._writer = self._transport = None
        if not self.closed.done():
            self.closed.set_result(None)


class Connection(Wire):
    """A connection on which commands are exchanged for replies, one exchange at a time."""

    def __init__(self, address: str, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        super().__init__(address, loop)
        self.owner: Owner | None = None
        """Is told what becomes of it."""
        self.used_at = loop.time()
        """When it was last free after commands of a caller, on the loop's clock."""
        self.expires_at = math.inf
        """When it is to be replaced, on the loop's clock."""
        self._timeout_s = timeout_s
        self._context = contextvars.Context()
        self._exchange: Exchange | None = None
        self._given_up = False
        self._fed_at = -math.inf
        """When a part of the replies was last received, on the loop's clock."""

    def begin(self, exchange: Exchange, timeout_s: float | None = None) -> None:
        """Sends commands; the connection must be free and usable."""
        transport = self._transport
        if transport is None or self._exchange is not None:
            raise RuntimeError("the connection is closed or taken")
        self._exchange = exchange
        exchange.begun_at = now = self.loop.time()
        exchange.timer = self.loop.call_at(
            now + (timeout_s or self._timeout_s), self._expire, context=self._context
        )
        transport.write(exchange.data)

    def close(self) -> None:
        """Closes it; an exchange under way fails."""
        self._given_up = True
        super().close()
        if self._exchange is not None:
            self._end_exchange(RedisAwayError(f"{self.address}: closed here", sent=True))

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        exchange, reader = self._exchange, self._reader
        try:
            reader.feed(data)
            if exchange is None:
                if not self._given_up:
                    self._fail(f"it said, unasked: {reader.gets()!r:.100}", "protocol")
                return
            replies, count = exchange.replies, exchange.count
            while len(replies) < count:
                reply = reader.gets()
                if reply is UNFINISHED:
                    self._fed_at = self.loop.time()
                    return
                replies.append(reply)
        except (InvalidResponse, ProtocolError, RedisError) as error:
            self._fail(f"it does not speak RESP: {error}", "protocol")
            return
        if reader.has_data():
            self._fail("it sent more replies than there were commands", "protocol")
            return
        exchange.erred = self._errors.taken()
        self.heard_at = self.loop.time()
        self._exchange = None
        exchange.settle(replies)
        if self.owner is not None:
            self.owner.freed(self)

    def eof_received(self) -> None:
        """See asyncio.Protocol; the other half is closed as well."""

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.Protocol."""
        super().connection_lost(error)
        self._fail(f"the connection was lost: {error or 'closed by the server'}", "lost")

    def _expire(self) -> None:
        """The time is over, unless large replies are still coming in."""
        exchange, now = self._exchange, self.loop.time()
        if exchange is not None and now - exchange.begun_at < _MOST_TIMEOUTS * self._timeout_s:
            until = self._fed_at + self._timeout_s
            if until > now and self._fed_at > exchange.begun_at:
                exchange.timer = self.loop.call_at(until, self._expire, context=self._context)
                return
        self._fail(f"no answer within {self._timeout_s} s", "timeout")

    def _fail(self, reason: str, fault: Fault) -> None:
        if self._given_up:
            return
        self._given_up = True
        super().close()
        if self.owner is not None:
            self.owner.failed(self, fault)
        error = RedisAwayError(f"{self.address}: {reason}", sent=True, lost=fault == "lost")
        self._end_exchange(error)

    def _end_exchange(self, error: RedisAwayError) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.settle(error)


class _ReplyErrors:
    """Makes redis-py's exceptions of error replies, and notes that there were some.

    The reader holds on to it and is unknown to the garbage collector: it must not know the wire.
    """

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen = False

    def __call__(self, text: str) -> Exception:
        self._seen = True
        error: Exception = BaseParser.parse_error(text)  # type: ignore[no-untyped-call]
        return error

    def taken(self) -> bool:
        """Whether there were errors since this was last asked."""
        seen, self._seen = self._seen, False
        return seen
