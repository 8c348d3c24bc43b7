"""A TCP proxy that cuts connections, withholds bytes and goes away, as networks do."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final, Self

_CHUNK_BYTES: Final = 65_536


class CuttingProxy:
    """Forwards connections to one server until it is told otherwise.

    Example:
        >>> async with CuttingProxy(server.address) as proxy:
        ...     mesh = Mesh.connect(cache=proxy.address)
        ...     proxy.hold_answers()
        ...     proxy.cut()
        ...     proxy.release()

    Attributes:
        bytes_to_server: bytes forwarded to the server so far.
        bytes_to_client: bytes forwarded to clients so far.
        connections: connections taken so far.
    """

    def __init__(self, target: str) -> None:
        """Makes a proxy; it listens once it is entered.

        Args:
            target: ``host:port`` of the server.
        """
        self._host, _, port = target.rpartition(":")
        self._target_port = int(port)
        self._port = 0
        self._listener: asyncio.Server | None = None
        self._requests_flow = asyncio.Event()
        self._answers_flow = asyncio.Event()
        self._open: dict[asyncio.Task[None], tuple[asyncio.StreamWriter, ...]] = {}
        self.bytes_to_server = 0
        self.bytes_to_client = 0
        self.connections = 0
        self.release()

    async def __aenter__(self) -> Self:
        await self.come_back()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        tasks = list(self._open)
        await self.go_away()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def address(self) -> str:
        """``host:port`` for clients; stays the same while the proxy is away."""
        return f"127.0.0.1:{self._port}"

    @property
    def open_connections(self) -> int:
        """Connections that are open now."""
        return len(self._open)

    def cut(self) -> None:
        """Resets all connections; new ones are taken."""
        for task, writers in list(self._open.items()):
            for writer in writers:
                writer.transport.abort()
            task.cancel()

    def hold_answers(self) -> None:
        """Withholds what the server sends, on connections old and new."""
        self._answers_flow.clear()

    def hold_requests(self) -> None:
        """Withholds what clients send, on connections old and new."""
        self._requests_flow.clear()

    def release(self) -> None:
        """Forwards in both directions again, beginning with what was withheld."""
        self._requests_flow.set()
        self._answers_flow.set()

    async def go_away(self) -> None:
        """Resets all connections and refuses new ones."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self.cut()

    async def come_back(self) -> None:
        """Takes connections, again on the same port."""
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._listener.sockets[0].getsockname()[1]

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections += 1
        self._open[task] = (to_client,)
        try:
            server, to_server = await asyncio.open_connection(self._host, self._target_port)
            self._open[task] = (to_client, to_server)
            pumps = [
                asyncio.create_task(self._carry_requests(client, to_server)),
                asyncio.create_task(self._carry_answers(server, to_client)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # the server is away, or the connection was cut: the client sees a reset
        finally:
            for writer in self._open.pop(task):
                writer.transport.abort()

    async def _carry_requests(
        self, client: asyncio.StreamReader, to_server: asyncio.StreamWriter
    ) -> None:
        while chunk := await client.read(_CHUNK_BYTES):
            await self._requests_flow.wait()
            self.bytes_to_server += len(chunk)
            to_server.write(chunk)
            await to_server.drain()

    async def _carry_answers(
        self, server: asyncio.StreamReader, to_client: asyncio.StreamWriter
    ) -> None:
        while chunk := await server.read(_CHUNK_BYTES):
            await self._answers_flow.wait()
            self.bytes_to_client += len(chunk)
            to_client.write(chunk)
            await to_client.drain()
