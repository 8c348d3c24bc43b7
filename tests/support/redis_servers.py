"""Real Redis servers and clusters on free ports, for tests that kill, pause and restart them."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

import hiredis
import pytest

NO_REDIS: Final = "redis-server is not at hand"

_SLOTS: Final = 16_384
_START_S: Final = 10.0


class RedisServer:
    """A redis-server process.

    Example:
        >>> async with RedisServer(persistent=True) as server:
        ...     await server.command("SET", "k", "v")
        ...     await server.kill()
        ...     await server.start()

    Attributes:
        port: stays the same over restarts.
    """

    def __init__(self, *options: str, persistent: bool = False) -> None:
        """Makes a server; it runs once it is entered.

        Args:
            options: of redis-server.
            persistent: whether what was written survives a kill.
        """
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip(NO_REDIS)
        self._program = program
        self._directory = tempfile.mkdtemp(prefix="redis-")
        self._process: asyncio.subprocess.Process | None = None
        self.port = free_port()
        durability = ("--appendonly", "yes", "--appendfsync", "always") if persistent else ()
        self._options = (
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", self._directory),
            *("--save", "", *durability, *options),
        )

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.kill()
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Its URL for clients."""
        return f"redis://{self.address}"

    @property
    def running(self) -> bool:
        """Whether there is a process, paused or not."""
        return self._process is not None

    async def start(self) -> None:
        """Starts it, again on the same port; returns when it answers."""
        self._process = await asyncio.create_subprocess_exec(
            self._program, *self._options, stdout=asyncio.subprocess.DEVNULL
        )
        async with asyncio.timeout(_START_S):
            while True:
                try:
                    await self.command("PING")
                except OSError:
                    await asyncio.sleep(0.01)
                except hiredis.ReplyError as error:
                    if "LOADING" not in str(error):
                        return  # it wants a login
                    await asyncio.sleep(0.01)
                else:
                    return

    async def kill(self) -> None:
        """Kills it (SIGKILL), paused or not."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """Stops it in order (SIGTERM)."""
        await self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Stops it from doing anything (SIGSTOP): connections are taken and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it go on (SIGCONT)."""
        self._signal(signal.SIGCONT)

    async def command(self, *arguments: str | bytes | int) -> Any:
        """Carries out a command on a connection of its own.

        Raises:
            OSError: it is not there.
            hiredis.ReplyError: it answered with an error.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        replies = hiredis.Reader(notEnoughData=Ellipsis)
        try:
            writer.write(hiredis.pack_command(arguments))  # type: ignore[arg-type]
            while (reply := replies.gets()) is Ellipsis:
                chunk = await reader.read(65_536)
                if not chunk:
                    raise ConnectionResetError("closed by the server")
                replies.feed(chunk)
        finally:
            writer.transport.abort()
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def info(self, section: str) -> dict[str, str]:
        """What it says of itself."""
        text = (await self.command("INFO", section)).decode()
        return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            await process.wait()


class RedisClusterServers:
    """A cluster of three primaries, each with a third of the slots.

    Example:
        >>> async with RedisClusterServers() as cluster:
        ...     redis = Redis(cluster.url, RedisSettings(), log)

    Attributes:
        servers: the primaries.
    """

    def __init__(self, *options: str) -> None:
        """Makes a cluster; it runs once it is entered.

        Args:
            options: of each redis-server.
        """
        clustered = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", *options)
        self.servers = [
            RedisServer(*clustered, "--cluster-port", str(free_port())) for _ in range(3)
        ]

    async def __aenter__(self) -> Self:
        try:
            await asyncio.gather(*(server.start() for server in self.servers))
            await self._join()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for server in self.servers:
            await server.__aexit__(kind, error, traceback)

    @property
    def url(self) -> str:
        """Its URL for clients, with all primaries."""
        return f"redis+cluster://{','.join(server.address for server in self.servers)}"

    async def move_slot(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """Moves a slot and its keys from one primary to another; returns when all agree."""
        await self.begin_move(slot, source, target)
        while keys := await source.command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            await source.command(
                *("MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "KEYS", *keys)
            )
        target_id = await target.command("CLUSTER", "MYID")
        others = [server for server in self.servers if server not in (source, target)]
        for server in (target, source, *others):
            await server.command("CLUSTER", "SETSLOT", slot, "NODE", target_id)
        await self._agree()

    async def begin_move(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """Begins to move a slot: keys that the source has not are redirected to the target."""
        source_id = await source.command("CLUSTER", "MYID")
        target_id = await target.command("CLUSTER", "MYID")
        await target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
        await source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)

    async def until(self, state: str, *servers: RedisServer) -> None:
        """Returns when servers, or all, say that the cluster is in a state (``ok``, ``fail``)."""
        wanted = f"cluster_state:{state}\r\n".encode()
        for server in servers or self.servers:
            await _until(lambda reply: wanted in reply, server, "CLUSTER", "INFO")

    async def _agree(self) -> None:
        """Returns when all servers see the same: before that, another move may undo the last."""
        async with asyncio.timeout(_START_S):
            while len({await self._view(each) for each in self.servers}) > 1:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def _view(self, server: RedisServer) -> frozenset[tuple[str, ...]]:
        """Who serves which slots since which epoch, as one server sees it."""
        rows = (await server.command("CLUSTER", "NODES")).decode().splitlines()
        fields = [row.split() for row in rows]
        return frozenset((row[0], row[6], *row[8:]) for row in fields)

    async def _join(self) -> None:
        count = len(self.servers)
        for number, server in enumerate(self.servers):
            first, last = _SLOTS * number // count, _SLOTS * (number + 1) // count - 1
            await server.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            await server.command("CLUSTER", "ADDSLOTSRANGE", first, last)
        first_server, *others = self.servers
        for other in others:
            bus_port = int(other._options[other._options.index("--cluster-port") + 1])
            await first_server.command("CLUSTER", "MEET", "127.0.0.1", other.port, bus_port)
        for server in self.servers:
            await _until(lambda rows: len(rows) == count, server, "CLUSTER", "SLOTS")
        await self.until("ok")
        await self._agree()


async def _until(
    holds: Callable[[Any], bool], server: RedisServer, *arguments: str | bytes | int
) -> None:
    """Asks a server until its reply is as it should be."""
    async with asyncio.timeout(_START_S):
        while not holds(await server.command(*arguments)):  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.02)


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
