"""Replicas of a service as processes of their own, as an operator would start them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from types import TracebackType
from typing import Self

import grpc

from agent360.client.channel import open_channel
from agent360.mesh.free_ports import free_ports

_START_S = 20.0


class Replica:
    """One process of ``agent360-mesh serve SERVICE``.

    Example:
        >>> async with Replica("ratelimit", store=server.url, limits=file) as replica:
        ...     await replica.kill()
    """

    def __init__(self, service: str, **settings: object) -> None:
        self._service = service
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self.port, self._http_port = free_ports(2)

    @property
    def address(self) -> str:
        """``host:port`` of its gRPC port."""
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        values = {"port": self.port, "http_port": self._http_port, "grace_s": 1, **self._settings}
        flags = [f"--set={name}={value}" for name, value in values.items()]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "agent360.mesh.cli", "serve", self._service, *flags,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        async with asyncio.timeout(_START_S), open_channel(self.address) as channel:
            state = channel.get_state(try_to_connect=True)
            while state is not grpc.ChannelConnectivity.READY:
                assert self._process.returncode is None, "the replica did not start"
                await channel.wait_for_state_change(state)
                state = channel.get_state(try_to_connect=True)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """Ends it without a chance to say good-bye."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """Stops it in order."""
        await self._end(signal.SIGTERM)

    async def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.send_signal(number)
            try:
                async with asyncio.timeout(15):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
