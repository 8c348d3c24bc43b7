"""``bench calls``: bare unary, our unary, coalesced and many calls, side by side in one run."""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from agent360.client import CheckRequest, Entry, Mesh
from agent360.client.channel import open_channel
from agent360.mesh.bench.bare import (
    CHECK,
    GET,
    KEYS,
    NAME,
    NAMESPACE,
    USER,
    VALUE,
    BareClient,
    Subject,
    key_of,
)
from agent360.mesh.cli.supervisor import Supervisor
from agent360.mesh.free_ports import free_ports

TASKS: Final = (1, 64, 256, 1024)
MESSAGE_ITEMS: Final = 1_000
TENANT: Final = "bench"

_LIMITS: Final = f"""
[[limits]]
id = "{NAME}"
name = "{NAME}"
per = ["tenant", "user"]
algorithm = "token_bucket"
amount = 1000000000
period = "1s"
"""


@dataclass(slots=True)
class Series:
    """Rounds of one measurement."""

    per_s: list[float] = field(default_factory=list)
    """Calls a second, one figure a round."""
    latencies_s: array[float] = field(default_factory=lambda: array("d"))
    """Not a list: garbage collection would walk through a million latencies again and again."""
    """Of single calls, over all rounds; empty where calls go out together."""

    @property
    def median_per_s(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.per_s)

    def quantile_ms(self, quantile: float) -> float | None:
        """A latency quantile in milliseconds; None where there is none."""
        if not self.latencies_s:
            return None
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] * 1e3


Results = dict[tuple[str, int], Series]
"""By kind of call (bare_unary, unary, coalesced, bare_many, many) and number of tasks."""


async def measure(rounds: int, seconds: float, report: Callable[[str], None]) -> dict[str, Results]:
    """Measures both subjects.

    Args:
        rounds: how often every measurement is taken; the kinds take turns within a round.
        seconds: about how long one measurement takes.
        report: told of progress.
    """
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        limits = directory / "limits.toml"
        limits.write_text(_LIMITS)
        bare_port, *ports = free_ports(4)
        await stack.enter_async_context(bare_server(bare_port))
        policies_on = ["--set=quota.enabled=true", "--set=tracing.endpoint=http://127.0.0.1:4317"]
        mesh_processes = await stack.enter_async_context(
            Supervisor(
                {
                    "ratelimit": [f"--set=limits={limits}", *policies_on],
                    "cache": policies_on,
                },
                dict(zip(("ratelimit", "cache"), ports, strict=False)),
                log_file=directory / "log",
            )
        )
        mesh = await stack.enter_async_context(
            Mesh.connect(
                ratelimit=mesh_processes.addresses["ratelimit"],
                cache=mesh_processes.addresses["cache"],
                tenant=TENANT,
            )
        )
        entries = [Entry(key_of(number), VALUE, ttl=3600.0) for number in range(KEYS)]
        await mesh.cache.set_many(entries, namespace=NAMESPACE)
        found = {}
        for subject, ours in ((CHECK, Check(mesh)), (GET, Get(mesh))):
            address = mesh_processes.addresses[subject.key.split("_")[0]]
            bare = BareClient(subject, f"127.0.0.1:{bare_port}")
            unary = UnaryClient(subject, address)
            try:
                found[subject.key] = await _measure_subject(
                    subject, bare, unary, ours, rounds, seconds, report
                )
            finally:
                await bare.close()
                await unary.close()
        return found


class Check:
    """Our checks, as a user writes them."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    async def call(self, _: int) -> None:
        """One awaited check."""
        await self._mesh.ratelimit.check(NAME, descriptor={"user": USER})

    async def many(self, count: int) -> None:
        """``count`` checks at once."""
        requests = (CheckRequest(NAME, 1, {"user": USER}) for _ in range(count))
        await self._mesh.ratelimit.check_many(requests)


class Get:
    """Our gets, as a user writes them."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    async def call(self, number: int) -> None:
        """One awaited get."""
        await self._mesh.cache.get(key_of(number), namespace=NAMESPACE)

    async def many(self, count: int) -> None:
        """``count`` gets at once."""
        keys = (key_of(number) for number in range(count))
        await self._mesh.cache.get_many(keys, namespace=NAMESPACE)


class UnaryClient:
    """Calls our service as a stranger with generated stubs does: one unary RPC a call."""

    def __init__(self, subject: Subject, address: str) -> None:
        self._subject = subject
        self._channel = open_channel(address)
        self._request_class = getattr(subject.modules, f"{subject.method}Request")
        self._rpc = self._channel.unary_unary(
            f"/{subject.service}/{subject.method}",
            request_serializer=self._request_class.SerializeToString,
            response_deserializer=getattr(subject.modules, f"{subject.method}Response").FromString,
        )

    async def call(self, number: int) -> None:
        """One unary call."""
        request = self._request_class()
        self._subject.fill_request(request, number)
        response = await self._rpc(request, metadata=(("x-agent360-tenant", TENANT),))
        self._subject.read_response(response)

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()


async def _measure_subject(
    subject: Subject,
    bare: BareClient,
    unary: UnaryClient,
    ours: Check | Get,
    rounds: int,
    seconds: float,
    report: Callable[[str], None],
) -> Results:
    results: Results = {}
    for number in range(rounds + 1):
        report(f"{subject.title}: " + (f"round {number} of {rounds}" if number else "warming up"))
        current = results if number else {}
        length = seconds if number else seconds / 4
        for tasks in TASKS:
            for kind, call in (
                ("bare_unary", bare.call),
                ("unary", unary.call),
                ("coalesced", ours.call),
            ):
                series = current.setdefault((kind, tasks), Series())
                await _run_tasks(call, tasks, length, series)
        for kind, many in (
            ("bare_many", lambda count: bare.many(count, MESSAGE_ITEMS)),
            ("many", ours.many),
        ):
            await _run_many(many, length, current.setdefault((kind, MESSAGE_ITEMS), Series()))
    return results


async def _run_tasks(
    call: Callable[[int], Awaitable[None]], tasks: int, seconds: float, series: Series
) -> None:
    """Runs ``tasks`` tasks that call one after another, for a while and at least once."""
    done = 0
    latencies = array("d")
    end = time.perf_counter() + seconds

    async def work(first: int) -> None:
        nonlocal done
        number, started = first, time.perf_counter()
        while True:
            await call(number)
            ended = time.perf_counter()
            latencies.append(ended - started)
            done += 1
            if ended >= end:
                return
            number, started = number + tasks, ended

    started = time.perf_counter()
    await asyncio.gather(*(work(first) for first in range(tasks)))
    series.per_s.append(done / (time.perf_counter() - started))
    series.latencies_s += latencies


async def _run_many(many: Callable[[int], Awaitable[None]], seconds: float, series: Series) -> None:
    done, count = 0, 20 * MESSAGE_ITEMS
    started = time.perf_counter()
    while not done or time.perf_counter() - started < seconds:
        await many(count)
        done += count
    series.per_s.append(done / (time.perf_counter() - started))


def flatten(found: dict[str, Results]) -> dict[str, float]:
    """The ratios by name: ours over bare, of the medians."""
    flat = {}
    for key, results in found.items():
        most = max(TASKS)

        def ratio(kind: str, bare: str, tasks: int, results: Results = results) -> float:
            return results[kind, tasks].median_per_s / results[bare, tasks].median_per_s

        flat[f"{key}_unary"] = ratio("unary", "bare_unary", min(most, 64))
        for tasks in TASKS:
            flat[f"{key}_coalesced_{tasks}"] = ratio("coalesced", "bare_unary", tasks)
        flat[f"{key}_many_{MESSAGE_ITEMS}"] = ratio("many", "bare_many", MESSAGE_ITEMS)
    return {name: round(value, 3) for name, value in flat.items()}


@asynccontextmanager
async def bare_server(port: int) -> Any:
    """Runs the bare server in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agent360.mesh.bench.bare", str(port)
    )
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            async with asyncio.timeout(20):
                state = channel.get_state(try_to_connect=True)
                while state is not grpc.ChannelConnectivity.READY:
                    await channel.wait_for_state_change(state)
                    state = channel.get_state(try_to_connect=True)
        yield
    finally:
        process.terminate()
        await process.wait()
