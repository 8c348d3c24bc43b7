"""A real Cassandra on free ports, for tests that kill, pause and restart it."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pytest
from support.redis_servers import free_port
from support.skips import NO_CASSANDRA

_ROOT: Final = Path(__file__).parents[2]
_START_S: Final = 90.0
_FORGETFUL: Final = (
    "-Dcassandra.test.flush_local_schema_changes=false",
    "-Dcassandra.unsafesystem=true",
)


class CassandraServer:
    """A Cassandra process; it takes about ten seconds to start.

    What it acknowledged survives a kill: its commit log is flushed before.

    Example:
        >>> with CassandraServer() as server:
        ...     store = await open_cassandra(server.url("metrics"), ...)

    Attributes:
        port: of CQL; stays the same over restarts.
    """

    def __init__(self, *, forgetful: bool = False) -> None:
        """Prepares a server; skips the test where Cassandra is not at hand.

        Args:
            forgetful: whether tables are made and emptied without flushing files, which is many
                times faster; a kill loses them.
        """
        if not (_ROOT / ".cache/cassandra/.installed").exists():
            pytest.skip(NO_CASSANDRA)
        self._directory = Path(tempfile.mkdtemp(prefix="cassandra-"))
        self._flags = _FORGETFUL if forgetful else ()
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self._storage_port = free_port()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end(signal.SIGKILL)
        shutil.rmtree(self._directory, ignore_errors=True)

    def url(self, keyspace: str) -> str:
        """The URL of a store in a keyspace of it."""
        return f"cassandra://127.0.0.1:{self.port}/{keyspace}"

    async def start(self) -> None:
        """Starts it again on the same port and data; returns when it takes connections.

        Raises:
            RuntimeError: it ended instead; the message holds what it said.
        """
        await asyncio.to_thread(self._start)

    async def kill(self) -> None:
        """Kills it (SIGKILL), paused or not."""
        await asyncio.to_thread(self._end, signal.SIGKILL)

    async def stop(self) -> None:
        """Stops it in order (SIGTERM)."""
        await asyncio.to_thread(self._end, signal.SIGTERM)

    def pause(self) -> None:
        """Stops it from doing anything (SIGSTOP): connections are taken and nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it go on (SIGCONT)."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _start(self) -> None:
        said = self._directory / "said"
        script = _ROOT / "scripts/cassandra.sh"
        ports = (str(self.port), str(self._storage_port))
        with said.open("wb") as output:
            self._process = subprocess.Popen(
                [str(script), "run", str(self._directory), *ports, *self._flags],
                stdout=output,
                stderr=output,
            )
        until_s = time.monotonic() + _START_S
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"Cassandra did not start: {said.read_text()[-2000:]}")
            time.sleep(0.1)

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(number)
            process.wait()
