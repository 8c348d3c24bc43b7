"""The client: commands in, replies out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from agent360.mesh.runtime.redis.commands import Argument, Command, pack
from agent360.mesh.runtime.redis.counts import Counts
from agent360.mesh.runtime.redis.dialing import Dialer
from agent360.mesh.runtime.redis.errand import Errand
from agent360.mesh.runtime.redis.script import Script
from agent360.mesh.runtime.redis.server import Server
from agent360.mesh.runtime.redis.settings import RedisSettings
from agent360.mesh.runtime.redis.topology import Cluster, SingleServer, Topology
from agent360.mesh.runtime.redis.url import Endpoint, parse_redis_url


class Redis:
    """A client of one Redis server or cluster.

    Example:
        >>> redis = Redis("redis://127.0.0.1:6379", RedisSettings(), log)
        >>> await redis.start()
        >>> stored, value = await redis.run(
        ...     [Command(b"k", ("SET", b"k", b"v")), Command(b"k", ("GET", b"k"))]
        ... )
        >>> await redis.close()
    """

    def __init__(
        self, url: str, settings: RedisSettings, log: structlog.stdlib.BoundLogger
    ) -> None:
        """Prepares a client; needs a running event loop.

        Args:
            url: see url.check_redis_url.
            settings: of the connections.
            log: where servers that go away and come back are noted.

        Raises:
            ValueError: the URL names no server or cluster.
            OSError: the authorities to trust cannot be read.
        """
        target = parse_redis_url(url)
        self.settings = settings
        self.counts = Counts()
        """What it counts of itself; see exposition.RedisCollector."""
        self.log = log
        self.dialer = Dialer(target, settings.connect_timeout_s, settings.ca)
        """Opens connections."""
        self.topology: Topology
        """Where commands go."""
        if target.clustered:
            self.topology = Cluster(
                target.endpoints, self._make_server, self.dialer, settings, log, self._review
            )
        else:
            self.topology = SingleServer(self._make_server(target.endpoints[0]))
        self._scripts: dict[str, Script] = {}
        self._callbacks: list[Callable[[bool], None]] = []
        self._started = False
        self._was_available = True

    async def start(self) -> None:
        """Connects; returns when the server, or all primaries of the cluster, have answered.

        Keeps trying until then, and says so in the log. If it is cancelled, ``close`` cleans up.
        """
        await self.topology.start()
        self._started = True
        self._review()

    async def close(self) -> None:
        """Closes all connections; commands under way fail."""
        self._started = False
        await self.topology.close()
        await asyncio.sleep(0)

    @property
    def available(self) -> bool:
        """Whether no server is considered away."""
        return self._started and not any(server.away for server in self.topology.servers)

    async def run(self, commands: Sequence[Command], *, repeatable: bool = False) -> list[Any]:
        """Carries out commands: one round trip to each server, to all at once.

        A caller that is cancelled leaves the commands that were sent to run to their end. Commands
        to one server are carried out in their order, but for those that it redirects or whose
        script it does not know yet: these follow after the others.

        Args:
            commands: any number, to any keys.
            repeatable: they may be sent once more when a connection turns out dead.

        Returns:
            The replies in the order of the commands. In place of a reply: redis-py's ResponseError
            where the server answered with an error, RedisAwayError where there was no answer.
        """
        if not commands:
            return []
        topology = self.topology
        server = topology.route(commands[0].key)
        if (
            server is not None
            and not server.away
            and (len(commands) == 1 or _all_go_to(server, commands, topology))
        ):
            exchange = server.submit(pack(commands), len(commands))
            outcome = await exchange.answer
            if isinstance(outcome, list) and not exchange.erred:
                if isinstance(topology, Cluster):
                    topology.is_down = False
                return outcome
            return await self._errand(commands, repeatable).go_on(server, exchange)
        return await self._errand(commands, repeatable).run()

    async def each_server(self, *arguments: Argument) -> list[Any]:
        """Carries out one command without a key on every primary, at once.

        Returns:
            The replies in the order of ``topology.servers``; errors in place as of ``run``.
        """
        data = pack([Command(b"", arguments)])
        exchanges = [server.submit(data, 1) for server in self.topology.servers]
        outcomes = [await exchange.answer for exchange in exchanges]
        return [outcome[0] if isinstance(outcome, list) else outcome for outcome in outcomes]

    def script(self, source: str) -> Script:
        """Makes a Lua script known; ``run`` loads it on servers that do not know it."""
        script = Script(source, clustered=self.topology.clustered)
        return self._scripts.setdefault(script.sha, script)

    def now_us(self) -> int:
        """The servers' clock in microseconds since 1970: never behind any server's own.

        A bound rather than a guess: ahead by what the last TIME took to be asked, and by what the
        clocks may have drifted since. A server's clock that is set forward is followed within 5 s.

        Raises:
            RuntimeError: no server has answered yet.
        """
        now = time.monotonic()
        clocks = [server.clock for server in self.topology.servers if server.clock.known]
        if not clocks:
            raise RuntimeError("no server has said the time yet")
        return max(clock.now_us(now) for clock in clocks)

    def on_change(self, callback: Callable[[bool], None]) -> None:
        """Has a function told False when the first server goes away, True when all are back.

        Args:
            callback: called on the event loop, after ``start`` only.
        """
        self._callbacks.append(callback)

    def _errand(self, commands: Sequence[Command], repeatable: bool) -> Errand:
        return Errand(
            commands,
            self.topology,
            self._scripts,
            self.counts,
            repeatable=repeatable,
            timeout_s=self.settings.timeout_s,
        )

    def _make_server(self, endpoint: Endpoint) -> Server:
        return Server(endpoint, self.settings, self.dialer, self.counts, self.log, self._review)

    def _review(self) -> None:
        """Tells whether the servers are there, if that has changed."""
        available = self.available
        if not self._started or available == self._was_available:
            return
        self._was_available = available
        for callback in self._callbacks:
            try:
                callback(available)
            except Exception:
                self.log.exception("a listener to redis going away failed")


def _all_go_to(server: Server, commands: Sequence[Command], topology: Topology) -> bool:
    return not topology.clustered or all(
        not command.key or topology.route(command.key) is server for command in commands
    )
