"""Replicas of services as processes of their own, as an operator would start them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from support.redis_servers import free_port
from support.servers import NOBODY

from agent360.client import Mesh, NearCache
from agent360.mesh.cli.prober import wait_until_serving
from agent360.mesh.services import NAMES

_START_S: Final = 30.0
_STOP_S: Final = 15.0


class Replica:
    """A process of ``agent360-mesh serve SERVICE``.

    Example:
        >>> async with Replica("ratelimit", store=redis.url, limits=file) as replica:
        ...     await replica.kill()
        ...     await replica.start()

    Attributes:
        address: ``host:port``; stays the same over restarts.
    """

    def __init__(self, service: str, **settings: Any) -> None:
        """Makes a replica; it runs once it is entered.

        Args:
            service: its name.
            settings: by their dotted paths, with ``__`` in place of the dots.
        """
        self._port, self._http_port = free_port(), free_port()
        self._service = service
        self._settings = {
            "grace_s": 1.0,
            "mesh": dict.fromkeys(NAMES, NOBODY),
            **{name.replace("__", "."): value for name, value in settings.items()},
        }
        self._process: asyncio.subprocess.Process | None = None
        self._log = Path(tempfile.mkstemp(prefix=f"{service}-replica-", suffix=".log")[1])
        self.address = f"127.0.0.1:{self._port}"

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
        if self._process is not None and self._process.returncode is None:
            try:
                await self.stop()
            except TimeoutError:
                await self.kill()
        self._log.unlink(missing_ok=True)

    @property
    def log(self) -> str:
        """What it has logged."""
        return self._log.read_text()

    async def start(self) -> None:
        """Starts it, again on the same ports; returns when it is serving."""
        flags = [
            f"--set={name}={json.dumps(value) if isinstance(value, dict | list) else value}"
            for name, value in self._settings.items()
        ]
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "agent360.mesh.cli", "serve", self._service),
                *(f"--port={self._port}", f"--http-port={self._http_port}", "--while-stdin-open"),
                *flags,
                stdin=asyncio.subprocess.PIPE,  # closes with the tests, however they end
                stdout=log,
                stderr=log,
                env={**os.environ, "AGENT360_COMMON__MESH__API_KEY": ""},
            )
        if not await wait_until_serving(self.address, _START_S):
            raise RuntimeError(f"the replica did not become ready:\n{self.log}")

    async def kill(self) -> None:
        """Kills it (SIGKILL)."""
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def stop(self) -> int:
        """Stops it in order (SIGTERM); returns its exit status."""
        process = self._process
        assert process is not None
        process.terminate()
        async with asyncio.timeout(_STOP_S):
            status = await process.wait()
        self._process = None
        return status


class CacheReplica(Replica):
    """A process that serves the cache.

    Example:
        >>> async with CacheReplica(redis.url) as replica, replica.connect() as mesh:
        ...     await mesh.cache.set("k", b"v")
    """

    def __init__(self, store: str, **settings: Any) -> None:
        """Makes a replica; it runs once it is entered.

        Args:
            store: URL of the store that replicas share.
            settings: as of ``Replica``.
        """
        super().__init__("cache", store=store, **settings)

    @asynccontextmanager
    async def connect(
        self, tenant: str = "acme", *, near_cache: NearCache | None = None, timeout_s: float = 10.0
    ) -> AsyncIterator[Mesh]:
        """A client of it."""
        async with Mesh.connect(
            cache=self.address,
            tenant=tenant,
            api_key="",
            near_cache=near_cache,
            default_timeout=timeout_s,
        ) as mesh:
            yield mesh


@asynccontextmanager
async def two_replicas(
    store: str, **settings: Any
) -> AsyncIterator[tuple[CacheReplica, CacheReplica]]:
    """Two replicas of one store, started at once."""
    first, second = CacheReplica(store, **settings), CacheReplica(store, **settings)
    async with AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(each) for each in (first, second)))
        yield first, second


@asynccontextmanager
async def connected(
    *replicas: CacheReplica, tenant: str = "acme"
) -> AsyncIterator[tuple[Mesh, ...]]:
    """A client of each replica."""
    async with AsyncExitStack() as stack:
        yield tuple([await stack.enter_async_context(each.connect(tenant)) for each in replicas])
