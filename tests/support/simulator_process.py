"""Simulators as processes of their own, to be killed."""

from __future__ import annotations

import asyncio
import json
import sys
import urllib.request
from types import TracebackType
from typing import Any, Self

from support.redis_servers import free_port

_START_S = 30.0


class SimulatorProcess:
    """A process of ``agent360-mesh sim``.

    Example:
        >>> async with SimulatorProcess(ttft=0.5) as simulator:
        ...     await simulator.kill()

    Attributes:
        url: base URL of its API.
    """

    def __init__(self, *, ttft: float = 0.0, itl: float = 0.0) -> None:
        self._port = free_port()
        self._pace = ("--ttft", str(ttft), "--itl", str(itl))
        self._process: asyncio.subprocess.Process | None = None
        self.url = f"http://127.0.0.1:{self._port}/v1"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.kill()

    async def start(self) -> None:
        """Starts it, again after it was killed; returns when it answers."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "agent360.mesh.cli", "sim", "--port", str(self._port),
            *self._pace, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        async with asyncio.timeout(_START_S):
            while True:
                try:
                    await self.load()
                except OSError:
                    await asyncio.sleep(0.05)
                else:
                    return

    async def load(self) -> dict[str, Any]:
        """Its counts of requests; see ``simulator.load.Load``."""
        return await asyncio.to_thread(self._load)

    async def kill(self) -> None:
        """Kills it at once; its connections break."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def _load(self) -> dict[str, Any]:
        address = f"http://127.0.0.1:{self._port}/sim/load"
        with urllib.request.urlopen(address, timeout=2) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
