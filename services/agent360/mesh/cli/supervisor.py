"""Runs the services as processes of their own and stops them together."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console

from agent360.mesh.cli.prober import wait_until_serving
from agent360.mesh.services import NAMES, service_kind

_START_S: Final = 30.0
_STOP_S: Final = 15.0


class Supervisor:
    """Service processes: started in order, watched, stopped in reverse.

    Example:
        >>> async with Supervisor({"cache": ["--port", "0"]}) as mesh:
        ...     await mesh.wait()
    """

    def __init__(
        self,
        arguments: Mapping[str, Sequence[str]],
        ports: Mapping[str, int] | None = None,
        *,
        log_file: Path | None = None,
    ) -> None:
        """Prepares the processes.

        Args:
            arguments: of ``serve``, by service; services that are not named are not run.
            ports: gRPC ports by service; the HTTP port is 1,000 above. None: the defaults.
            log_file: where the services' logs go; None: standard error.
        """
        self._arguments = arguments
        self._log_file = log_file
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self.ports: dict[str, int] = {
            name: (ports or {}).get(name) or service_kind(name).settings.default_port
            for name in NAMES
            if name in arguments
        }
        """gRPC ports by service."""
        self.addresses: dict[str, str] = {
            name: f"127.0.0.1:{port}" for name, port in self.ports.items()
        }
        """gRPC addresses by service."""

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by service, of those that were started."""
        return {name: process.pid for name, process in self._processes.items()}

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    async def wait(self) -> str:
        """Waits until a process ends by itself; returns which."""
        waiters = {
            asyncio.create_task(process.wait()): name for name, process in self._processes.items()
        }
        try:
            done, _ = await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiter in waiters:
                waiter.cancel()
        return waiters[done.pop()]

    async def stop(self) -> None:
        """Stops all processes, the last started first."""
        for process in reversed(self._processes.values()):
            with suppress(ProcessLookupError):
                process.terminate()
        for process in self._processes.values():
            try:
                async with asyncio.timeout(_STOP_S):
                    await process.wait()
            except TimeoutError:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        self._processes.clear()

    async def _start(self) -> None:
        environment = self._environment()
        log: Any = self._log_file.open("ab") if self._log_file is not None else None
        try:
            for name, port in self.ports.items():
                self._processes[name] = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "agent360.mesh.cli",
                    "serve",
                    name,
                    f"--port={port}",
                    f"--http-port={port + 1000}",
                    "--while-stdin-open",
                    *self._arguments[name],
                    env=environment,
                    stdin=asyncio.subprocess.PIPE,  # closes with this process, however it ends
                    stderr=log,
                    start_new_session=True,
                )
        finally:
            if log is not None:
                log.close()
        ready = await asyncio.gather(
            *(self._is_up(name, address) for name, address in self.addresses.items())
        )
        for name, up in zip(self.addresses, ready, strict=True):
            if not up:
                raise RuntimeError(f"{name} did not become ready; its log says why")

    async def _is_up(self, name: str, address: str) -> bool:
        process = self._processes[name]
        serving = asyncio.create_task(wait_until_serving(address, _START_S))
        ended = asyncio.create_task(process.wait())
        await asyncio.wait((serving, ended), return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not serving.done():
            serving.cancel()
            return False
        return serving.result() and process.returncode is None

    def _environment(self) -> dict[str, str]:
        """The services' environment: where the others are, and a key of their own."""
        environment = dict(os.environ)
        environment.setdefault("AGENT360_COMMON__MESH__API_KEY", secrets.token_urlsafe(32))
        for name, address in self.addresses.items():
            environment[f"AGENT360_COMMON__MESH__{name.upper()}"] = address
        return environment


def run_up(config: Path | None, limits: Path | None) -> int:
    """Runs all four services until a signal or until one of them ends."""
    arguments: dict[str, list[str]] = {
        name: [f"--config={config}"] if config else [] for name in NAMES
    }
    if limits:
        arguments["ratelimit"].append(f"--set=limits={limits}")
    return asyncio.run(_up(arguments))


async def _up(arguments: Mapping[str, Sequence[str]]) -> int:
    console = Console(stderr=True)
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    try:
        async with Supervisor(arguments) as mesh:
            for name, address in mesh.addresses.items():
                console.print(f"{name:<10} grpc {address}  http {mesh.ports[name] + 1000}")
            console.print("Ctrl-C stops all four.")
            ended = asyncio.create_task(mesh.wait())
            signalled = asyncio.create_task(asked.wait())
            await asyncio.wait((ended, signalled), return_when=asyncio.FIRST_COMPLETED)
            signalled.cancel()
            if ended.done():
                console.print(f"{ended.result()} ended by itself; stopping the others")
                return 1
            ended.cancel()
            return 0
    except RuntimeError as error:
        console.print(f"agent360-mesh: {error}")
        return 1
