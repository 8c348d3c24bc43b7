"""A client of one HTTP/1.1 server: kept connections, and answers read as they come (RFC 9112)."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import string
import time
from collections import deque
from collections.abc import Mapping
from typing import Final, cast
from urllib.parse import urlsplit

_IDLE_S: Final = 60.0
"""How long a connection is kept that nobody uses, in seconds."""
_MAX_HEAD_BYTES: Final = 64 * 2**10
_MAX_LINE_BYTES: Final = 8 * 2**10
_PAUSE_BYTES: Final = 2**20
"""With so much unread the server is no longer read from."""
_HAPPY_EYEBALLS_S: Final = 0.25
_HEX: Final = frozenset(string.hexdigits.encode())
_DEFAULT_PORTS: Final[Mapping[str, int]] = {"http": 80, "https": 443}


class HttpError(Exception):
    """There is no answer, or not all of it."""


class NoConnectionError(HttpError):
    """The server cannot be connected to."""


class StalledError(HttpError):
    """The server said nothing for too long."""


class LateError(HttpError):
    """The answer took too long."""


class BrokenError(HttpError):
    """The connection ended before the answer did."""


class DeadConnectionError(BrokenError):
    """A kept connection ended, and nothing of an answer came: the request can be sent again."""


class NotHttpError(HttpError):
    """What came is no HTTP/1.1."""


class HttpServer:
    """The connections to one server, bounded in number.

    A request is one write; an answer that comes in one piece is read with one wake-up. Each
    connection has one timer, which looks when it is due whether the time is really up.

    Example:
        >>> server = HttpServer("http://127.0.0.1:8000", most=64, connect_timeout_s=5.0)
        >>> response = await server.ask("POST", "/v1/chat/completions", {}, body, within_s=60.0)
        >>> try:
        ...     print(response.status, await response.read(1 << 20))
        ... finally:
        ...     response.close()
    """

    def __init__(self, url: str, *, most: int, connect_timeout_s: float) -> None:
        """Describes a server.

        Args:
            url: its scheme, host and port; the rest is not used.
            most: connections at a time; further requests wait.
            connect_timeout_s: how long opening a connection may take, in seconds.
        """
        parts = urlsplit(url)
        self._host = parts.hostname or "localhost"
        self._port = parts.port or _DEFAULT_PORTS[parts.scheme]
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        bare = f"[{self._host}]" if ":" in self._host else self._host
        usual = self._port == _DEFAULT_PORTS[parts.scheme]
        self._authority = bare if usual else f"{bare}:{self._port}"
        self._most = most
        self._connect_timeout_s = connect_timeout_s
        self._open = 0
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._waiting: deque[asyncio.Future[_Connection | None]] = deque()
        self._heads: dict[tuple[str, str], bytes] = {}

    async def close(self) -> None:
        """Closes all connections."""
        for connection in (*self._idle, *self._busy):
            connection.abort()
        # Their transports close in the next turn of the loop.
        await asyncio.sleep(0)

    async def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes = b"",
        *,
        within_s: float,
        stall_s: float | None = None,
        fresh: bool = False,
    ) -> Response:
        """Sends a request and waits for the head of the answer.

        Args:
            method: such as ``POST``.
            path: with its leading slash.
            headers: beside ``Host`` and ``Content-Length``; the same for the same method and path.
            body: empty: none.
            within_s: how long it may take to the end of the answer, in seconds.
            stall_s: how long the server may say nothing, in seconds; None: as long as it likes.
            fresh: whether a new connection is wanted.

        Raises:
            HttpError: there is no answer.
        """
        until = time.monotonic() + within_s
        connection = self._free(fresh=fresh)
        reused = connection is not None
        if connection is None:
            connection, reused = await self._another(until, fresh=fresh)
        self._busy.add(connection)
        response = Response(connection, self)
        try:
            connection.begin(until, stall_s)
            connection.write(self._head(method, path, headers, len(body)) + body)
            await response.begin(method)
        except DeadConnectionError:
            response.close()
            if not reused:
                raise BrokenError("the server closed the connection without an answer") from None
            raise
        except BaseException:
            response.close()
            raise
        return response

    def _head(self, method: str, path: str, headers: Mapping[str, str], size: int) -> bytes:
        head = self._heads.get((method, path))
        if head is None:
            lines = [f"{method} {path} HTTP/1.1", f"Host: {self._authority}"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            head = self._heads[method, path] = "\r\n".join(lines).encode("latin-1")
        if not size and method == "GET":
            return head + b"\r\n\r\n"
        return b"%b\r\nContent-Length: %d\r\n\r\n" % (head, size)

    # ---------------------------------------------------------------- connections

    def _free(self, *, fresh: bool) -> _Connection | None:
        if fresh or not self._idle:
            return None
        self._drop_old()
        return self._idle.pop() if self._idle else None

    def _drop_old(self) -> None:
        """Closes what nobody used for long; those used last are at the end."""
        idle, before = self._idle, time.monotonic() - _IDLE_S
        while idle and idle[0].used_at < before:
            idle.pop(0).abort()

    async def _another(self, until: float, *, fresh: bool) -> tuple[_Connection, bool]:
        """A new connection, or one that another request has done with; and whether it is used."""
        if fresh and self._open >= self._most and self._idle:
            self._idle[0].abort()
        if self._open >= self._most:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                async with asyncio.timeout_at(until):
                    given = await turn
            except BaseException as error:
                if turn.done() and not turn.cancelled():
                    self._pass_on(turn.result())
                with contextlib.suppress(ValueError):
                    self._waiting.remove(turn)
                if isinstance(error, TimeoutError):
                    raise LateError("no connection was free") from None
                raise
            if given is not None:
                return given, True
        else:
            self._open += 1
        try:
            return await self._connect(until), False
        except BaseException:
            self._pass_on(None)
            raise

    async def _connect(self, until: float) -> _Connection:
        loop, now = asyncio.get_running_loop(), time.monotonic()
        try:
            async with asyncio.timeout_at(min(until, now + self._connect_timeout_s)):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self),
                    self._host,
                    self._port,
                    ssl=self._tls,
                    happy_eyeballs_delay=_HAPPY_EYEBALLS_S,
                )
        except TimeoutError as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise NoConnectionError(str(error)) from error
            raise NoConnectionError("no connection in time") from error
        except OSError as error:
            raise NoConnectionError(str(error)) from error
        return connection

    def release(self, connection: _Connection, *, keep: bool) -> None:
        """A request is done with a connection."""
        self._busy.discard(connection)
        if not keep:
            connection.abort()
            return
        connection.rest()
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(connection)
                return
        self._idle.append(connection)
        self._drop_old()

    def _pass_on(self, connection: _Connection | None) -> None:
        """Gives a connection, or the room of one, to the next that waits."""
        if connection is not None and not connection.lost:
            self.release(connection, keep=True)
            return
        if connection is not None:
            # Its room was given back as it was lost.
            return
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._open -= 1

    def ended(self, connection: _Connection) -> None:
        """A connection is closed."""
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)
        self._pass_on(None)


class _Connection(asyncio.Protocol):
    """One connection and what came over it that nobody has taken."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._error: HttpError | None = None
        self._paused = False
        self._in_use = False
        self._until = 0.0
        self._stall_s: float | None = None
        self._stalls_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self.received = bytearray()
        self.heard = False
        """Whether anything of the present answer has come."""
        self.used_at = 0.0
        """When a request was last done with it, on the monotonic clock."""
        self.lost = False
        """Whether the connection has ended, for whatever reason."""

    # ---------------------------------------------------------------- use

    def begin(self, until: float, stall_s: float | None) -> None:
        """A request begins that may take until then, on the monotonic clock."""
        self._in_use, self.heard = True, False
        self._until, self._stall_s = until, stall_s
        if stall_s is not None:
            self._stalls_at = time.monotonic() + stall_s
        self._watch()

    def write(self, data: bytes) -> None:
        """Sends."""
        if self._transport is not None and not self.lost:
            self._transport.write(data)

    async def more(self) -> None:
        """Waits until more has come, or the connection has ended.

        Raises:
            HttpError: it took too long.
        """
        if self._error is not None:
            raise self._error
        if self.lost:
            return
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        if self._error is not None:
            raise self._error

    def rest(self) -> None:
        """Nobody uses it for now."""
        self._in_use, self._stall_s = False, None
        self.used_at = time.monotonic()
        self._until = self.used_at + _IDLE_S
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        """Ends it at once."""
        if self._transport is not None:
            self._transport.abort()

    # ---------------------------------------------------------------- the loop's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See ``asyncio.BaseProtocol``."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        if not self._in_use:
            # Nobody asked for it.
            self.abort()
            return
        self.heard = True
        self.received += data
        if self._stall_s is not None:
            self._stalls_at = time.monotonic() + self._stall_s
        if len(self.received) > _PAUSE_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        """See ``asyncio.Protocol``: the connection is closed."""
        return False

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002
        """See ``asyncio.BaseProtocol``."""
        self.lost, self._transport = True, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()
        self._server.ended(self)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ---------------------------------------------------------------- time

    def _due(self) -> float:
        return self._until if self._stall_s is None else min(self._until, self._stalls_at)

    def _watch(self) -> None:
        """Makes sure that the timer comes no later than the time is up."""
        due = self._due()
        if self._timer is not None:
            if self._timer_at <= due:
                return
            self._timer.cancel()
        self._timer_at = due
        self._timer = self._loop.call_at(due, self._look)

    def _look(self) -> None:
        self._timer = None
        now = time.monotonic()
        if now < self._due():
            self._watch()
            return
        if self._in_use:
            late = now >= self._until
            self._error = LateError("it took too long") if late else StalledError("silence")
        self.abort()
        self._wake()


class Response:
    """An answer; its body is read as it comes.

    Attributes:
        status: the HTTP status.
        headers: by name in lower case; the last of several of one name.
        done: whether its end was read.
    """

    __slots__ = (
        "_chunked",
        "_connection",
        "_expects_break",
        "_keep",
        "_left",
        "_server",
        "_trailing",
        "done",
        "headers",
        "status",
    )

    def __init__(self, connection: _Connection, server: HttpServer) -> None:
        self._connection: _Connection | None = connection
        self._server = server
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False
        self._keep = True
        self._chunked = False
        self._left: int | None = 0
        """Bytes until the end of the chunk, or of the body; None: it goes on until the end."""
        self._expects_break = False
        self._trailing = False

    async def begin(self, method: str) -> None:
        """Waits for the head.

        Raises:
            HttpError: none comes.
        """
        connection = self._the_connection
        received = connection.received
        while True:
            end = received.find(b"\r\n\r\n")
            if end < 0:
                if len(received) > _MAX_HEAD_BYTES:
                    raise NotHttpError("the head of the answer is too long")
                if connection.lost:
                    kind = BrokenError if connection.heard else DeadConnectionError
                    raise kind("the connection ended before an answer came")
                await connection.more()
                continue
            self._read_head(bytes(received[:end]))
            del received[: end + 4]
            if self.status >= 200:
                break
            if self.status == 101:
                raise NotHttpError("the server changes to another protocol")
        self._frame(method)

    async def read_some(self) -> bytes:
        """The next part of the body; empty: it has ended.

        Raises:
            HttpError: it broke off, or took too long.
        """
        connection = self._the_connection
        while not self.done:
            data = self._take_chunks() if self._chunked else self._take_plain()
            if data:
                return data
            if self.done:
                break
            if connection.lost:
                if self._left is None and not self._chunked:
                    self.done = True
                    break
                raise BrokenError("the connection ended in the middle of the answer")
            await connection.more()
        return b""

    async def read(self, most: int) -> bytes:
        """The rest of the body, or its first bytes.

        Args:
            most: reading ends when there is more than that, in bytes.
        """
        data = await self.read_some()
        if self.done:
            return data
        whole = bytearray(data)
        while len(whole) <= most and (data := await self.read_some()):
            whole += data
        return bytes(whole)

    def close(self) -> None:
        """Gives the connection back; one whose answer was not read to its end is closed."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        keep = self.done and self._keep and not connection.received and not connection.lost
        self._server.release(connection, keep=keep)

    @property
    def _the_connection(self) -> _Connection:
        if self._connection is None:
            raise BrokenError("the answer was closed")
        return self._connection

    # ---------------------------------------------------------------- parsing

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        code = rest[:3]
        if version not in ("HTTP/1.1", "HTTP/1.0") or not (code.isascii() and code.isdecimal()):
            raise NotHttpError("the answer is not HTTP/1.1")
        self.status = int(code)
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or not name or name[0].isspace():
                raise NotHttpError("a line of the answer's head is no header")
            name, value = name.lower(), value.strip()
            if name == "content-length" and headers.get(name, value) != value:
                raise NotHttpError("the answer has two lengths")
            headers[name] = value
        self.headers = headers
        said = headers.get("connection", "").lower()
        self._keep = "close" not in said and (version == "HTTP/1.1" or "keep-alive" in said)

    def _frame(self, method: str) -> None:
        """Finds out where the body ends (RFC 9112, section 6.3)."""
        headers = self.headers
        coding, length = headers.get("transfer-encoding"), headers.get("content-length")
        if method == "HEAD" or self.status in (204, 304):
            self.done = True
        elif coding is not None:
            if coding.lower() != "chunked":
                raise NotHttpError(f"the answer's transfer coding is {coding}")
            self._chunked, self._left = True, None
            # Both is what smuggling looks like: the connection is not used again.
            self._keep = self._keep and length is None
        elif length is not None:
            if not (length.isascii() and length.isdecimal()):
                raise NotHttpError(f"the answer's length is {length[:40]}")
            self._left = int(length)
            self.done = self._left == 0
        else:
            self._left, self._keep = None, False

    def _take_plain(self) -> bytes:
        received, left = self._the_connection.received, self._left
        if left is None or len(received) <= left:
            data = bytes(received)
            received.clear()
        else:
            data = bytes(received[:left])
            del received[:left]
        if left is not None:
            self._left = left - len(data)
            self.done = self._left == 0
        return data

    def _take_chunks(self) -> bytes:
        """What has come of the chunks (RFC 9112, section 7.1)."""
        received = self._the_connection.received
        parts: list[bytearray] = []
        at, end, left = 0, len(received), self._left
        while at < end:
            if left:
                part = received[at : at + left]
                parts.append(part)
                at += len(part)
                left -= len(part)
                self._expects_break = not left
                continue
            line_end = received.find(b"\r\n", at)
            if line_end < 0:
                if end - at > _MAX_LINE_BYTES:
                    raise NotHttpError("a line between chunks is too long")
                break
            line = bytes(received[at:line_end])
            at = line_end + 2
            if self._expects_break:
                if line:
                    raise NotHttpError("a chunk is longer than it says")
                self._expects_break = False
            elif self._trailing:
                if not line:
                    self.done = True
                    break
            else:
                left = _size_of_chunk(line)
                self._trailing = not left
        del received[:at]
        self._left = left
        return b"".join(parts)


def _size_of_chunk(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    if not digits or len(digits) > 15 or not _HEX.issuperset(digits):
        raise NotHttpError("a chunk does not say its length")
    return int(digits, 16)
