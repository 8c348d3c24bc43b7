"""The connections to one server: who waits for them, how many there are, how long they live."""

from __future__ import annotations

import asyncio
import contextvars
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from agent360.mesh.runtime.redis.connection import Connection, Exchange, Fault
from agent360.mesh.runtime.redis.counts import ClosedReason, Counts
from agent360.mesh.runtime.redis.failures import RedisAwayError, UnwillingError
from agent360.mesh.runtime.redis.settings import RedisSettings
from agent360.mesh.runtime.redis.tasks import Tasks

_PING: Final = b"*1\r\n$4\r\nPING\r\n"
_CLOSING_S: Final = 1.0


class Watcher(Protocol):
    """Who judges from what happens whether the server is away."""

    def answered(self) -> None:
        """A reply came."""

    def failed(self, fault: Fault) -> None:
        """A connection failed."""

    def not_opened(self, error: Exception, begun_at: float) -> None:
        """A connection that was begun at some time, on the loop's clock, could not be opened."""


class Pool:
    """Gives each exchange a connection of its own, the one last used first.

    What waits is the exchange, not its caller: it begins on the connection that falls free, from
    there. An exchange whose caller left before that is never sent.

    ``_connections`` are all that are open; each is in ``_idle``, or in ``_pinged``, or has an
    exchange of a caller under way.
    """

    def __init__(
        self,
        address: str,
        settings: RedisSettings,
        counts: Counts,
        tasks: Tasks,
        open_connection: Callable[[], Awaitable[Connection]],
        watcher: Watcher,
    ) -> None:
        self._address = address
        self._settings = settings
        self._counts = counts
        self._tasks = tasks
        self._open_connection = open_connection
        self._watcher = watcher
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.Context()
        self._sockets: set[asyncio.Future[None]] = set()
        self._connections: set[Connection] = set()
        self._idle: list[Connection] = []
        self._pinged: set[Connection] = set()
        self._queue: deque[Exchange] = deque()
        self._opening = 0
        self._open_after = -math.inf
        self._closed = False

    @property
    def idle(self) -> int:
        """Connections that are free."""
        return len(self._idle)

    @property
    def in_use(self) -> int:
        """Connections with an exchange under way."""
        return len(self._connections) - len(self._idle)

    # ---------------------------------------------------------------- exchanges

    def submit(self, exchange: Exchange) -> None:
        """Begins an exchange, or lets it wait for a connection."""
        connection = self._take()
        if connection is not None:
            self._begin(connection, exchange)
            return
        if len(self._queue) >= self._settings.max_waiting:
            self._refuse(exchange, f"{len(self._queue):,} pipelines wait for a connection already")
            return
        exchange.queued_at = now = self._loop.time()
        exchange.timer = self._loop.call_at(
            now + self._settings.wait_timeout_s, self._give_up, exchange, context=self._context
        )
        self._queue.append(exchange)
        self._counts.waits += 1
        self.grow()

    def freed(self, connection: Connection) -> None:
        """See connection.Owner."""
        self._watcher.answered()
        if connection in self._pinged:
            self._pinged.discard(connection)
        else:
            connection.used_at = connection.heard_at
        self._offer(connection)

    def failed(self, connection: Connection, fault: Fault) -> None:
        """See connection.Owner."""
        unused = connection in self._idle or connection in self._pinged
        self._counts.errors[fault] += 1
        self._forget(connection, "unhealthy" if unused else "error")
        self._watcher.failed(fault)
        self.grow()

    def _take(self) -> Connection | None:
        now = self._loop.time()
        while self._idle:
            connection = self._idle.pop()
            if not connection.usable:
                continue  # it is about to tell why
            if connection.expires_at < now:
                self._drop(connection, "lifetime")
            elif now - connection.heard_at > self._settings.health_check_s:
                self._ping(connection)
            else:
                return connection
        return None

    def _begin(self, connection: Connection, exchange: Exchange) -> None:
        self._counts.round_trips += 1
        self._counts.commands += exchange.count
        connection.begin(exchange)

    def _offer(self, connection: Connection) -> None:
        if self._closed or connection.expires_at < self._loop.time():
            self._drop(connection, "shutdown" if self._closed else "lifetime")
            self.grow()
            return
        while self._queue:
            exchange = self._queue.popleft()
            if exchange.answer.done():
                continue
            self._counts.wait_s += self._loop.time() - exchange.queued_at
            if exchange.timer is not None:
                exchange.timer.cancel()
            self._begin(connection, exchange)
            return
        self._idle.append(connection)

    def _give_up(self, exchange: Exchange) -> None:
        """Fails what waited too long; all in front of it have waited longer."""
        self._counts.wait_s += self._loop.time() - exchange.queued_at
        if not exchange.answer.done():
            self._refuse(
                exchange, f"no connection was free within {self._settings.wait_timeout_s} s"
            )
        while self._queue and self._queue[0].answer.done():
            self._queue.popleft()

    def _refuse(self, exchange: Exchange, reason: str) -> None:
        self._counts.errors["busy"] += 1
        exchange.settle(RedisAwayError(f"{self._address}: {reason}", sent=False))

    # ---------------------------------------------------------------- connections

    def adopt(self, connection: Connection) -> None:
        """Takes a connection that was opened and is free."""
        lifetime_s = self._settings.max_lifetime_s * random.uniform(0.9, 1.1)
        connection.expires_at = self._loop.time() + lifetime_s
        connection.used_at = self._loop.time()
        connection.owner = self
        self._counts.opened += 1
        self._connections.add(connection)
        self._sockets.add(connection.closed)
        connection.closed.add_done_callback(self._sockets.discard)
        self._offer(connection)

    def grow(self, least: int = 0) -> None:
        """Opens connections for what waits, and as many as there should be at least."""
        if self._closed or self._loop.time() < self._open_after:
            return
        coming = self._opening + len(self._pinged)
        total = len(self._connections) + self._opening
        wanted = max(len(self._queue) - coming, least - total)
        for _ in range(min(wanted, self._settings.max_connections - total)):
            self._opening += 1
            self._tasks.spawn(self._open())

    def verify(self) -> None:
        """After a connection was lost: none is used unpinged, and one is opened at once."""
        for connection in self._connections:
            connection.heard_at = -math.inf
        self._open_after = -math.inf
        if not self._opening:
            self.grow(least=min(len(self._connections) + 1, self._settings.max_connections))

    def renew(self) -> None:
        """Has all connections replaced when they are next free."""
        for connection in self._connections:
            connection.expires_at = -math.inf

    def tidy(self) -> None:
        """Closes what is too old or unused for too long, pings the quiet, opens what is missing."""
        settings, now = self._settings, self._loop.time()
        for connection in list(self._idle):
            spare = len(self._connections) > settings.min_connections
            if connection.expires_at < now:
                self._idle.remove(connection)
                self._drop(connection, "lifetime")
            elif spare and now - connection.used_at > settings.max_idle_s:
                self._idle.remove(connection)
                self._drop(connection, "idle")
            elif connection.usable and now - connection.heard_at > settings.health_check_s / 2:
                self._idle.remove(connection)
                self._ping(connection)
        self.grow(least=settings.min_connections)

    def abandon(self, reason: str) -> None:
        """The server is away: nothing waits for it, and no idle connection to it is trusted."""
        while self._queue:
            exchange = self._queue.popleft()
            if not exchange.answer.done():
                self._counts.wait_s += self._loop.time() - exchange.queued_at
                self._counts.errors["away"] += 1
                exchange.settle(RedisAwayError(f"{self._address} is away: {reason}", sent=False))
        for connection in self._idle[:]:
            self._drop(connection, "unhealthy")
        self._idle.clear()

    def stop(self) -> None:
        """Opens no more connections, and closes those that fall free."""
        self._closed = True

    async def close(self) -> None:
        """Closes all connections; what is under way or waits fails."""
        self.stop()
        for connection in list(self._connections):
            self._drop(connection, "shutdown")
        self.abandon("the client was closed")
        if self._sockets:
            await asyncio.wait(set(self._sockets), timeout=_CLOSING_S)

    async def _open(self) -> None:
        begun_at = self._loop.time()
        try:
            connection = await self._open_connection()
        except (OSError, UnwillingError) as error:
            self._opening -= 1
            self._open_after = self._loop.time() + self._settings.probe_s
            self._watcher.not_opened(error, begun_at)
            return
        except asyncio.CancelledError:
            self._opening -= 1
            raise
        self._opening -= 1
        self._watcher.answered()
        self.adopt(connection)

    def _ping(self, connection: Connection) -> None:
        """Half the time that exchanges wait is for the ping, the other for opening another."""
        self._pinged.add(connection)
        exchange = Exchange(_PING, 1, self._loop)
        limit_s = min(self._settings.timeout_s, self._settings.wait_timeout_s / 2)
        connection.begin(exchange, limit_s)

    def _drop(self, connection: Connection, reason: ClosedReason) -> None:
        self._forget(connection, reason)
        connection.close()

    def _forget(self, connection: Connection, reason: ClosedReason) -> None:
        self._counts.closed[reason] += 1
        self._connections.discard(connection)
        self._pinged.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
