"""One server: whether it is away, what its clock shows, and its connections."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final

import structlog

from agent360.mesh.runtime.redis.clock import ServerClock
from agent360.mesh.runtime.redis.connection import Connection, Exchange, Fault
from agent360.mesh.runtime.redis.counts import Counts
from agent360.mesh.runtime.redis.dialing import Dialer
from agent360.mesh.runtime.redis.failures import RedisAwayError, UnwillingError
from agent360.mesh.runtime.redis.pool import Pool
from agent360.mesh.runtime.redis.settings import RedisSettings
from agent360.mesh.runtime.redis.tasks import Tasks
from agent360.mesh.runtime.redis.url import Endpoint

_TIME: Final = b"*1\r\n$4\r\nTIME\r\n"
_GREETING: Final = b"*1\r\n$4\r\nPING\r\n" + _TIME
_CLOCK_S: Final = 5.0
_FIRST_CLOCK_S: Final = 0.05
"""A process that starts is slow to read answers: its server's clock is asked for often at first."""
_NEVER: Final = -math.inf
_TICKS: Final = 4
"""How often upkeep looks at connections within the shortest of their times."""
_MAX_TICK_S: Final = 1.0
_MIN_TICK_S: Final = 0.02


class Server:
    """Carries out commands on one server while it is there, and fails them at once while not.

    It counts as away after some timeouts in a row, or when a connection was refused, or was lost
    and cannot be opened again; and until a new connection has answered.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        settings: RedisSettings,
        dialer: Dialer,
        counts: Counts,
        log: structlog.stdlib.BoundLogger,
        on_change: Callable[[], None],
    ) -> None:
        """Prepares a server.

        Args:
            endpoint: where it listens.
            settings: of its connections.
            dialer: opens them.
            counts: what is counted, over all servers.
            log: of the client.
            on_change: called when it goes away and when it is back.
        """
        self.endpoint = endpoint
        self.address = str(endpoint)
        """``host:port``."""
        self.clock = ServerClock()
        """What its clock shows."""
        self.away: str = ""
        """Why it counts as away; empty: it does not."""
        self.answering = asyncio.Event()
        """Set for good when it has answered for the first time."""
        self._settings = settings
        self._dialer = dialer
        self._counts = counts
        self._log = log.bind(server=self.address)
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._tasks = Tasks(self._log)
        self.pool = Pool(self.address, settings, counts, self._tasks, self._open, self)
        self._changed = asyncio.Event()
        self._failures = 0
        self._lost_at = _NEVER
        self._away_since = 0.0
        self._clock_pause_s = _FIRST_CLOCK_S
        self._clock_due = self._loop.time() + _FIRST_CLOCK_S
        self._crowded = False

    def start(self) -> None:
        """Begins the upkeep: connections are opened, and looked for while it is away."""
        self._tasks.spawn(self._keep_up())

    async def close(self) -> None:
        """Closes everything; what is under way fails."""
        self.away = "the client was closed"
        self.pool.stop()
        await self._tasks.close()
        await self.pool.close()

    def submit(self, data: bytes, count: int) -> Exchange:
        """Has commands carried out.

        Args:
            data: the commands in RESP.
            count: how many they are.
        """
        exchange = Exchange(data, count, self._loop)
        if self.away:
            self._counts.errors["away"] += 1
            exchange.settle(RedisAwayError(f"{self.address} is away: {self.away}", sent=False))
        else:
            self.pool.submit(exchange)
        return exchange

    def unwilling(self, reason: str) -> None:
        """A command was answered by the server's refusal to serve: it loads its data."""
        self._go_away(reason)

    def demoted(self) -> None:
        """It has become a replica: its name may mean another server by now."""
        self.pool.renew()

    # ---------------------------------------------------------------- what the pool sees

    def answered(self) -> None:
        """See pool.Watcher."""
        self._failures = 0
        self._lost_at = _NEVER
        if not self.answering.is_set():
            self.answering.set()

    def failed(self, fault: Fault) -> None:
        """See pool.Watcher."""
        if self.away:
            return
        if fault == "timeout":
            self._count_failure("no answer in time")
        else:
            self._lost_at = self._loop.time()
            self.pool.verify()

    def not_opened(self, error: Exception, begun_at: float) -> None:
        """See pool.Watcher."""
        self._counts.errors["connect"] += 1
        has_others = self.pool.idle + self.pool.in_use > 0
        if self._lost_at > begun_at:
            self.pool.verify()  # what cut the others may have cut it as well
        elif self._lost_at == _NEVER and has_others:
            if not self._crowded:
                self._log.warning("redis takes no more connections", reason=str(error))
            self._crowded = True  # how the server is, the others will tell
        elif self._lost_at == _NEVER and isinstance(error, TimeoutError):
            self._count_failure(str(error))
        else:
            self._go_away(str(error))

    def _count_failure(self, reason: str) -> None:
        self._failures += 1
        if self._failures >= self._settings.failures:
            self._go_away(f"{reason}, {self._failures} times in a row")

    # ---------------------------------------------------------------- away and back

    def _go_away(self, reason: str) -> None:
        if self.away:
            return
        self.away = reason or "it does not answer"
        self._away_since = self._loop.time()
        self._changed.set()
        self.pool.abandon(self.away)
        self._log.warning("redis is away", reason=self.away)
        self._on_change()

    async def _probe(self) -> None:
        """Tries once whether it is back."""
        try:
            connection = await self._open()
        except (OSError, UnwillingError) as error:
            reason = str(error)
            if isinstance(error, UnwillingError) and reason != self.away:
                self._log.warning("redis is away", reason=reason)
                self.away = reason
            return
        self.away = ""
        self.answered()
        self.pool.adopt(connection)
        self._log.info("redis is back", away_s=round(self._loop.time() - self._away_since, 3))
        self._on_change()

    async def _open(self) -> Connection:
        """Opens a connection; it has answered, and the server's clock is known.

        Raises:
            OSError: the server cannot be reached; TimeoutError: not in time.
            UnwillingError: it does not serve.
        """
        connection = Connection(self.address, self._loop, self._settings.timeout_s)
        await self._dialer.dial(self.endpoint, connection)
        try:
            await self._greet(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    async def _greet(self, connection: Connection) -> None:
        exchange = Exchange(_GREETING, 2, self._loop)
        connection.begin(exchange)
        outcome = await exchange.answer
        if isinstance(outcome, RedisAwayError):
            raise ConnectionError(str(outcome)) if outcome.lost else TimeoutError(str(outcome))
        for reply in outcome:
            if isinstance(reply, Exception):
                raise UnwillingError(str(reply))
        self._crowded = False
        self.clock.note(exchange.begun_at, outcome[1])

    # ---------------------------------------------------------------- upkeep

    async def _keep_up(self) -> None:
        settings = self._settings
        shortest_s = min(settings.max_idle_s, settings.max_lifetime_s, settings.health_check_s)
        tick_s = min(max(shortest_s / _TICKS, _MIN_TICK_S), _MAX_TICK_S)
        self.pool.grow(least=max(1, settings.min_connections))
        while True:
            self._changed.clear()
            if self.away:
                await self._probe()
                if self.away:
                    await asyncio.sleep(settings.probe_s)
                continue
            self.pool.tidy()
            if self._loop.time() > self._clock_due:
                await self._ask_clock()
            pause_s = min(tick_s, max(_MIN_TICK_S, self._clock_due - self._loop.time()))
            try:
                async with asyncio.timeout(pause_s):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _ask_clock(self) -> None:
        self._clock_pause_s = min(_CLOCK_S, 2 * self._clock_pause_s)
        self._clock_due = self._loop.time() + self._clock_pause_s
        exchange = self.submit(_TIME, 1)
        outcome = await exchange.answer
        if not isinstance(outcome, RedisAwayError) and not exchange.erred:
            self.clock.note(exchange.begun_at, outcome[0])
