"""A real Cassandra on free ports, for tests that kill, pause and restart it."""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pytest

from support.redis_servers import free_port

NO_CASSANDRA: Final = "Cassandra is not at hand"

_ROOT: Final = Path(__file__).parents[2]
_START_S: Final = 90.0


class CassandraServer:
    """A Cassandra process; it takes about ten seconds to start.

    What it acknowledged survives a kill: its commit log is flushed before.

    Example:
        >>> async with CassandraServer() as server:
        ...     store = await open_store(server.url("metrics"))

    Attributes:
        port: of CQL; stays the same over restarts.
    """

    def __init__(self) -> None:
        if not (_ROOT / ".cache/cassandra/.installed").exists():
            pytest.skip(NO_CASSANDRA)
        self._directory = Path(tempfile.mkdtemp(prefix="cassandra-"))
        self._process: asyncio.subprocess.Process | None = None
        self.port = free_port()
        self._storage_port = free_port()

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

    def url(self, keyspace: str) -> str:
        """The URL of a store in a keyspace of it."""
        return f"cassandra://127.0.0.1:{self.port}/{keyspace}"

    async def start(self) -> None:
        """Starts it, again on the same port and data; returns when it takes connections.

        Raises:
            RuntimeError: it ended instead; the message holds what it said.
        """
        said = self._directory / "said"
        with said.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                str(_ROOT / "scripts/cassandra.sh"),
                *("run", str(self._directory), str(self.port), str(self._storage_port)),
                stdout=output,
                stderr=output,
            )
        async with asyncio.timeout(_START_S):
            while not await self._listens():
                if self._process.returncode is not None:
                    raise RuntimeError(f"Cassandra ended: {said.read_text()[-2000:]}")
                await asyncio.sleep(0.1)

    async def kill(self) -> None:
        """Kills it (SIGKILL), paused or not."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """Stops it in order (SIGTERM)."""
        await self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Stops it from doing anything (SIGSTOP): connections are taken and nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it go on (SIGCONT)."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        return True

    async def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.send_signal(number)
            await process.wait()
