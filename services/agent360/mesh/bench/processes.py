"""The processes that benchmarks run beside the mesh's services."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import grpc

from agent360.client.channel import open_channel

POLICIES_ON: Final = ("--set=quota.enabled=true", "--set=tracing.endpoint=http://127.0.0.1:4317")
"""Arguments that turn on those of the mesh's policies that are off by default."""

PROCESSES: Final = Path("/proc")
"""Where Linux tells about processes."""

_START_S: Final = 20.0


@asynccontextmanager
async def bare_server(port: int) -> AsyncIterator[None]:
    """Runs the bare gRPC server in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agent360.mesh.bench.bare", str(port)
    )
    try:
        async with asyncio.timeout(_START_S), open_channel(f"127.0.0.1:{port}") as channel:
            state = channel.get_state(try_to_connect=True)
            while state is not grpc.ChannelConnectivity.READY:
                await channel.wait_for_state_change(state)
                state = channel.get_state(try_to_connect=True)
        yield
    finally:
        process.terminate()
        await process.wait()


@asynccontextmanager
async def simulator(port: int) -> AsyncIterator[None]:
    """Runs the simulator of a model server, without delays, in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent360.mesh.cli", "sim", "--port", str(port)),
        *("--ttft", "0", "--itl", "0"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(_START_S):
            while not await _listens(port):  # noqa: ASYNC110 - another process: nothing tells
                await asyncio.sleep(0.02)
        yield
    finally:
        process.terminate()
        await process.wait()


@asynccontextmanager
async def redis_server(program: str, port: int, directory: str) -> AsyncIterator[None]:
    """Runs a Redis that keeps nothing on disk in a process of its own.

    Args:
        program: the server's path.
        port: where it listens, on the loopback address.
        directory: where it may write.
    """
    process = await asyncio.create_subprocess_exec(
        program,
        *("--bind", "127.0.0.1", "--port", str(port), "--dir", directory),
        *("--save", "", "--appendonly", "no", "--loglevel", "warning"),
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(_START_S):
            while not await _answers(port):  # noqa: ASYNC110 - another process: nothing tells
                await asyncio.sleep(0.02)
        yield
    finally:
        process.terminate()
        await process.wait()


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, in user and system mode, all threads; see proc(5)."""
    stat = (PROCESSES / str(pid) / "stat").read_text()
    after_name = stat.rpartition(")")[2].split()  # from field 3 on: a name may have spaces
    return sum(map(int, after_name[11:13])) / os.sysconf("SC_CLK_TCK")


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM; see proc(5)."""
    pages = int((PROCESSES / str(pid) / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def _answers(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.write(b"PING\r\n")
    line = await reader.readline()
    writer.close()
    return line == b"+PONG\r\n"
