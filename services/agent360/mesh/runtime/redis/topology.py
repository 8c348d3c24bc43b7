"""Which server has which key: of a single server, and of a cluster's hash slots."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

import structlog
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError

from agent360.mesh.runtime.redis.connection import Connection, Exchange
from agent360.mesh.runtime.redis.dialing import Dialer
from agent360.mesh.runtime.redis.failures import RedisAwayError, UnwillingError
from agent360.mesh.runtime.redis.server import Server
from agent360.mesh.runtime.redis.settings import RedisSettings
from agent360.mesh.runtime.redis.tasks import Tasks
from agent360.mesh.runtime.redis.url import Endpoint

_SLOTS_COMMAND: Final = b"*2\r\n$7\r\nCLUSTER\r\n$5\r\nSLOTS\r\n"
_REFRESH_S: Final = 30.0
_REFRESH_AWAY_S: Final = 1.0

MakeServer = Callable[[Endpoint], Server]
"""Makes a server, not started."""


class Topology(Protocol):
    """Where commands go."""

    servers: list[Server]
    """The primaries, in the order of their addresses."""
    clustered: bool
    """Whether they are a cluster."""

    async def start(self) -> None:
        """Returns when all primaries have answered."""

    async def close(self) -> None:
        """Closes all servers."""

    def route(self, key: bytes) -> Server | None:
        """The server of a key; of the empty key, one that is there; None: nobody has it."""


class SingleServer:
    """A server that has all keys."""

    clustered = False

    def __init__(self, server: Server) -> None:
        self.servers = [server]

    async def start(self) -> None:
        """See Topology."""
        (server,) = self.servers
        server.start()
        await server.answering.wait()

    async def close(self) -> None:
        """See Topology."""
        await self.servers[0].close()

    def route(self, key: bytes) -> Server | None:  # noqa: ARG002 - the interface is shared
        """See Topology."""
        return self.servers[0]


class Cluster:
    """A cluster's slots, learnt from its servers and from where they redirect commands."""

    clustered = True

    def __init__(
        self,
        seeds: Iterable[Endpoint],
        make_server: MakeServer,
        dialer: Dialer,
        settings: RedisSettings,
        log: structlog.stdlib.BoundLogger,
        on_change: Callable[[], None],
    ) -> None:
        """Prepares a cluster.

        Args:
            seeds: some of its servers.
            make_server: makes a server, not started.
            dialer: opens the connections on which the slots are asked for.
            settings: of the connections.
            log: of the client.
            on_change: called when servers came or went.
        """
        self.servers: list[Server] = []
        self.is_down = False
        """Whether it said so itself, after it was given time."""
        self._seeds = list(seeds)
        self._make_server = make_server
        self._dialer = dialer
        self._settings = settings
        self._log = log
        self._on_change = on_change
        self._tasks = Tasks(log)
        self._known: dict[Endpoint, Server] = {}
        self._slots: list[Server | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._wanted = asyncio.Event()
        self._problem = ""

    async def start(self) -> None:
        """See Topology."""
        while not await self._refresh():  # noqa: ASYNC110 - nobody would set an event
            await asyncio.sleep(self._settings.probe_s)
        self._tasks.spawn(self._keep_up())
        while not all(server.answering.is_set() for server in self.servers):  # noqa: ASYNC110
            await asyncio.sleep(self._settings.probe_s)  # the servers may be others by then

    async def close(self) -> None:
        """See Topology."""
        await self._tasks.close()
        await asyncio.gather(*(server.close() for server in self._known.values()))

    def route(self, key: bytes) -> Server | None:
        """See Topology."""
        if key:
            return self._slots[key_slot(key)]
        there = [server for server in self.servers if not server.away]
        return random.choice(there or self.servers or [None])

    def moved(self, error: AskError, said_by: Server) -> Server:
        """The server that a slot was said to have moved to."""
        server = self.named(error, said_by)
        self._slots[error.slot_id] = server
        self.refresh_soon()
        return server

    def named(self, error: AskError, said_by: Server) -> Server:
        """The server that a redirection names; without a host it is on that of who said so."""
        return self._server(Endpoint(error.host or said_by.endpoint.host, error.port))

    def refresh_soon(self) -> None:
        """Has the slots asked for."""
        self._wanted.set()

    def _server(self, endpoint: Endpoint) -> Server:
        server = self._known.get(endpoint)
        if server is None:
            server = self._known[endpoint] = self._make_server(endpoint)
            server.start()
            self._list_servers()
        return server

    # ---------------------------------------------------------------- refreshing

    async def _keep_up(self) -> None:
        while True:
            away = any(server.away for server in self.servers)
            try:
                async with asyncio.timeout(_REFRESH_AWAY_S if away else _REFRESH_S):
                    await self._wanted.wait()
            except TimeoutError:
                pass
            self._wanted.clear()
            await self._refresh()
            await asyncio.sleep(self._settings.probe_s)

    async def _refresh(self) -> bool:
        """Asks one server after the other for the slots until one has told."""
        servers = sorted(self._known.values(), key=lambda each: (bool(each.away), random.random()))
        asked = dict.fromkeys([*(server.endpoint for server in servers), *self._seeds])
        for endpoint in asked:
            try:
                rows = await self._ask(endpoint)
            except (OSError, UnwillingError) as error:
                problem = f"{endpoint}: {error}"
            else:
                if rows:
                    self._problem = ""
                    await self._adopt(endpoint, rows)
                    return True
                problem = f"{endpoint}: it serves no slots"
            if problem != self._problem:
                self._problem = problem
                self._log.warning("the redis cluster's slots are not known", reason=problem)
        return False

    async def _ask(self, endpoint: Endpoint) -> list[Any]:
        loop = asyncio.get_running_loop()
        connection = Connection(str(endpoint), loop, self._settings.timeout_s)
        await self._dialer.dial(endpoint, connection)
        exchange = Exchange(_SLOTS_COMMAND, 1, loop)
        try:
            connection.begin(exchange)
            outcome = await exchange.answer
        finally:
            connection.close()
            await asyncio.wait((connection.closed,), timeout=self._settings.timeout_s)
        if isinstance(outcome, RedisAwayError):
            raise ConnectionError(str(outcome))
        (rows,) = outcome
        if isinstance(rows, Exception):
            raise UnwillingError(str(rows))
        return list(rows)

    async def _adopt(self, told_by: Endpoint, rows: list[Any]) -> None:
        slots: list[Server | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, primary, *_ in rows:
            host = (primary[0] or b"").decode()
            if host in ("", "?"):
                host = told_by.host
            server = self._server(Endpoint(host, primary[1]))
            slots[first : last + 1] = [server] * (last + 1 - first)
        self._slots = slots
        serving = set(slots)
        gone = [server for server in self._known.values() if server not in serving]
        for server in gone:
            del self._known[server.endpoint]
            self._tasks.spawn(self._leave(server))
        self._list_servers()
        self._on_change()

    async def _leave(self, server: Server) -> None:
        """Closes a server once what was on its way there has been answered."""
        try:
            await asyncio.sleep(self._settings.wait_timeout_s + self._settings.timeout_s)
        finally:
            await server.close()

    def _list_servers(self) -> None:
        self.servers = sorted(self._known.values(), key=lambda server: server.endpoint)
