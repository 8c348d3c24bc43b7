"""A program that asks for a key many times at once, loads it where that falls to it, and reports.

Run with a job as JSON; see ``Job``. It says ``ready``, waits for a line, and begins. It says
``loading`` whenever it begins to load, and ends with its report as JSON; see ``Report``.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from agent360.client import Mesh, MeshError


class Job(msgspec.Struct):
    """What to do."""

    address: str
    """Of the cache service."""
    key: str
    """Which key."""
    count: int
    """How many ask at once."""
    load_s: float = 0.05
    """How long loading takes."""
    value: str = "loaded"
    """What is loaded."""
    claims: bool = True
    """Whether every caller claims for itself, or all use ``get_or_load``."""
    fill_timeout_s: float = 10.0
    """How long a fill may take."""
    forgets: int = 0
    """How many of the first loads are cancelled half-way and never filled or given up."""
    cancels_first: bool = False
    """Whether the first caller is cancelled while it waits or loads."""
    timeout_s: float = 10.0
    """How long each waits."""


class Report(msgspec.Struct):
    """What came of it."""

    loads: int
    """Loads that were begun."""
    values: dict[str, int]
    """How many callers got which value."""
    errors: dict[str, int]
    """How many ended with which error."""
    cancelled: int
    """How many callers were cancelled."""


class Client:
    """The program at work."""

    def __init__(self, mesh: Mesh, job: Job) -> None:
        self.mesh = mesh
        self.job = job
        self.loads = 0
        self.cancelled = 0
        self.values: dict[str, int] = {}
        self.errors: dict[str, int] = {}

    async def load(self) -> bytes:
        """Loads the value."""
        self.loads += 1
        print("loading", flush=True)
        await asyncio.sleep(self.job.load_s)
        return self.job.value.encode()

    async def claim(self) -> bytes:
        """Reads the key or fills it."""
        job, cache = self.job, self.mesh.cache
        claim = await cache.claim(job.key, fill_timeout=job.fill_timeout_s, timeout=job.timeout_s)
        if not claim.fill_token:
            return claim.lookup.value
        forgets = self.loads < job.forgets
        if forgets:
            await asyncio.wait_for(self.load(), job.load_s / 2)
        value = await self.load()
        await cache.fill(claim.fill_token, job.key, value)
        return value

    async def get_or_load(self) -> bytes:
        """The same by the client's own means."""
        job = self.job
        return await self.mesh.cache.get_or_load(
            job.key, self.load, fill_timeout=job.fill_timeout_s, timeout=job.timeout_s
        )

    async def note(self, asking: Awaitable[bytes]) -> None:
        """Notes how a caller ends."""
        try:
            value = (await asking).decode()
            self.values[value] = self.values.get(value, 0) + 1
        except TimeoutError:
            self.cancelled += 1
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        except MeshError as error:
            name = f"{error.code.name} {error.reason}"
            self.errors[name] = self.errors.get(name, 0) + 1

    async def run(self) -> Report:
        """All callers at once."""
        ask = self.claim if self.job.claims else self.get_or_load
        callers = [asyncio.create_task(self.note(ask())) for _ in range(self.job.count)]
        if self.job.cancels_first:
            await asyncio.sleep(self.job.load_s / 2)
            callers[0].cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        return Report(self.loads, self.values, self.errors, self.cancelled)


async def main(job: Job) -> None:
    """Does the job."""
    async with Mesh.connect(cache=job.address, tenant="acme", api_key="") as mesh:
        await mesh.cache.get("first", timeout=10.0)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        report = await Client(mesh, job).run()
    print(msgspec.json.encode(report).decode(), flush=True)


class LoadingClient:
    """The program as a process, as tests see it.

    Example:
        >>> async with LoadingClient(address=replica.address, key="k", count=200) as client:
        ...     client.go()
        ...     report = await client.report()
    """

    def __init__(self, **job: Any) -> None:
        """Prepares it; the arguments are those of ``Job``."""
        self._job = msgspec.convert(job, Job)
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(Path(__file__)), msgspec.json.encode(self._job).decode()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        await self.until("ready")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.kill()

    def go(self) -> None:
        """Begins."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")

    async def until(self, word: str, timeout_s: float = 30.0) -> None:
        """Returns when it says something."""
        while await self._line(timeout_s) != word:
            pass

    async def report(self, timeout_s: float = 30.0) -> Report:
        """Its report, once it is done."""
        while not (line := await self._line(timeout_s)).startswith("{"):
            pass
        return msgspec.json.decode(line, type=Report)

    async def kill(self) -> None:
        """Kills it (SIGKILL)."""
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _line(self, timeout_s: float) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout_s):
            line = await self._process.stdout.readline()
        assert line, "it ended without a word"
        return line.decode().strip()


if __name__ == "__main__":
    asyncio.run(main(msgspec.json.decode(sys.argv[1], type=Job)))
