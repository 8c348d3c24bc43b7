"""``bench ratelimit``: leased, awaited and many checks, checks decided in Redis, and Gubernator."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

from rich.console import Console
from rich.table import Table

from agent360.client import Mesh
from agent360.mesh.bench.bare import CHECK, NAME, USER, BareClient
from agent360.mesh.bench.calls import TENANT, Check
from agent360.mesh.bench.gubernator import find_gubernator, gubernator_server
from agent360.mesh.bench.processes import (
    POLICIES_ON,
    PROCESSES,
    bare_server,
    cpu_seconds,
    redis_server,
)
from agent360.mesh.bench.timing import MESSAGE_ITEMS, Series, run_many, run_tasks
from agent360.mesh.cli.supervisor import Supervisor
from agent360.mesh.free_ports import free_ports

TASKS: Final = 256
"""Of awaited checks."""
SHARED_TASKS: Final = 64
"""Of checks decided in Redis."""

_CPU_DECISIONS: Final = 100_000
"""Between two looks at a server's CPU time, which goes by hundredths of a second."""

_LEASED: Final = "leased"
_LEASED_AT_ONCE: Final = 1_000
_A_LOT: Final = 1_000_000_000
_LIMITS: Final = f"""
[[limits]]
id = "{NAME}"
name = "{NAME}"
per = ["tenant", "user"]
amount = {_A_LOT}
period = "1s"
strict = true

[[limits]]
id = "{_LEASED}"
name = "{_LEASED}"
amount = {_A_LOT}
period = "1s"
"""

_TITLES: Final = {
    "leased": "leased check, in the client",
    "bare_unary": f"bare unary, {TASKS} tasks",
    "coalesced": f"awaited check, {TASKS} tasks",
    "bare_many": f"bare stream, {MESSAGE_ITEMS:,} a message",
    "many": f"check_many, {MESSAGE_ITEMS:,} a message",
    "gubernator": f"Gubernator, {MESSAGE_ITEMS:,} a message",
    "limits": f"limits (fixed window, Redis), {SHARED_TASKS} tasks",
    "shared": f"awaited check (Redis, strict), {SHARED_TASKS} tasks",
}

Measurement = Callable[[float, Series], Awaitable[None]]
"""Measures for so many seconds and adds a round to the series."""


class _Server(NamedTuple):
    """A server whose CPU time is measured."""

    many: Callable[[int], Awaitable[None]]
    """Has it decide so often."""
    pid: int


@dataclass(slots=True)
class RateLimitFigures:
    """What was measured."""

    series: dict[str, Series] = field(default_factory=dict)
    """By kind; see the titles."""
    cpu_s: dict[str, float] = field(default_factory=dict)
    """CPU time of the server of a kind, over as many decisions for every kind that is here."""
    cpu_decisions: int = 0
    """How many decisions that were, of each kind."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why there is nothing about Redis or Gubernator, by name."""


async def measure(rounds: int, seconds: float, report: Callable[[str], None]) -> RateLimitFigures:
    """Measures all kinds.

    Args:
        rounds: how often every measurement is taken; the kinds take turns within a round.
        seconds: about how long one measurement takes.
        report: told of progress.
    """
    figures = RateLimitFigures()
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        await asyncio.to_thread((directory / "limits.toml").write_text, _LIMITS)
        measurements, ours = await _memory(stack, directory)
        servers: dict[str, _Server] = {}
        gubernator = find_gubernator()
        if gubernator is None:
            figures.left_out["Gubernator"] = "it is neither on the PATH nor in .cache/bin"
        elif not PROCESSES.is_dir():
            figures.left_out["Gubernator"] = f"CPU times are read in {PROCESSES}, which is not here"
        else:
            theirs = await _gubernator(stack, gubernator)
            servers = {"many": ours, "gubernator": theirs}
            measurements["gubernator"] = _many(theirs.many)
        redis = shutil.which("redis-server")
        if redis is None:
            figures.left_out["Redis"] = "there is no redis-server on the PATH"
        elif find_spec("redis") is None or find_spec("limits") is None:
            figures.left_out["Redis"] = "redis and limits are not both installed"
        else:
            measurements |= await _shared(stack, directory, redis)
        for number in range(rounds + 1):
            report(f"ratelimit: round {number} of {rounds}" if number else "ratelimit: warming up")
            for kind, run in measurements.items():
                if number:
                    await run(seconds, figures.series.setdefault(kind, Series()))
                else:
                    await run(seconds / 4, Series())
            if number and servers:
                await _add_cpu_times(figures, servers)
    return figures


def flatten(figures: RateLimitFigures) -> dict[str, float]:
    """The figures that are promised, by name."""

    def per_s(kind: str) -> float:
        return figures.series[kind].median_per_s

    flat = {
        "leased_us": 1e6 / per_s("leased"),
        f"coalesced_{TASKS}": per_s("coalesced") / per_s("bare_unary"),
        f"many_{MESSAGE_ITEMS}": per_s("many") / per_s("bare_many"),
    }
    if "gubernator" in figures.series:
        flat["gubernator_per_s"] = per_s("gubernator")
        flat["gubernator_ratio"] = per_s("many") / per_s("gubernator")
        flat["gubernator_cpu_ratio"] = figures.cpu_s["gubernator"] / figures.cpu_s["many"]
    if "limits" in figures.series:
        flat[f"redis_{SHARED_TASKS}"] = per_s("shared") / per_s("limits")
    return {name: round(value, 3) for name, value in flat.items()}


def print_ratelimit_figures(
    figures: RateLimitFigures, flat: dict[str, float], console: Console
) -> None:
    """Prints the rates and the ratios."""
    table = Table(title="ratelimit: medians of the rounds", title_justify="left")
    for column in ("", "checks/s", "p50 ms", "p99 ms", "server CPU us"):
        table.add_column(column, justify="left" if not column else "right")
    for kind, title in _TITLES.items():
        series = figures.series.get(kind)
        if series is None:
            continue
        quantiles = [series.quantile_ms(quantile) for quantile in (0.5, 0.99)]
        shown = ["-" if each is None else f"{each:.2f}" for each in quantiles]
        cpu_s = figures.cpu_s.get(kind)
        shown.append("-" if cpu_s is None else f"{cpu_s / figures.cpu_decisions * 1e6:.2f}")
        table.add_row(title, f"{series.median_per_s:,.0f}", *shown)
    console.print(table)
    for name, value in flat.items():
        console.print(f"{name} = {value:,.3f}")
    for name, reason in figures.left_out.items():
        console.print(f"nothing about {name}: {reason}")


async def _memory(stack: AsyncExitStack, directory: Path) -> tuple[dict[str, Measurement], _Server]:
    """Starts what decides in memory: a service, and a bare server beside it."""
    bare_port, port = free_ports(2)
    await stack.enter_async_context(bare_server(bare_port))
    service = await _service(stack, port, directory, "memory", POLICIES_ON)
    mesh = await stack.enter_async_context(
        Mesh.connect(ratelimit=service.addresses["ratelimit"], tenant=TENANT)
    )
    bare = BareClient(CHECK, f"127.0.0.1:{bare_port}")
    stack.push_async_callback(bare.close)
    checks = Check(mesh)
    facts = {"user": USER}

    async def leased(count: int) -> None:
        check = mesh.ratelimit.check
        for number in range(count):
            await check(_LEASED, descriptor=facts, leased=True)
            if number % _LEASED_AT_ONCE == 0:
                await asyncio.sleep(0)  # leased checks never pause: let leases be renewed

    measurements = {
        "leased": _many(leased),
        "bare_unary": lambda seconds, series: run_tasks(bare.call, TASKS, seconds, series),
        "coalesced": lambda seconds, series: run_tasks(checks.call, TASKS, seconds, series),
        "bare_many": _many(lambda count: bare.many(count, MESSAGE_ITEMS)),
        "many": _many(checks.many),
    }
    return measurements, _Server(checks.many, service.pids["ratelimit"])


async def _gubernator(stack: AsyncExitStack, program: str) -> _Server:
    """Starts Gubernator."""
    client = await stack.enter_async_context(gubernator_server(program))
    return _Server(lambda count: client.many(count, MESSAGE_ITEMS), client.pid)


def _many(many: Callable[[int], Awaitable[object]]) -> Measurement:
    return lambda seconds, series: run_many(many, seconds, series)


async def _add_cpu_times(figures: RateLimitFigures, servers: dict[str, _Server]) -> None:
    for kind, server in servers.items():
        before_s = cpu_seconds(server.pid)
        await server.many(_CPU_DECISIONS)
        used_s = cpu_seconds(server.pid) - before_s
        figures.cpu_s[kind] = figures.cpu_s.get(kind, 0.0) + used_s
    figures.cpu_decisions += _CPU_DECISIONS


async def _shared(stack: AsyncExitStack, directory: Path, program: str) -> dict[str, Measurement]:
    """Starts what decides in Redis: a service, and the limits library in this process."""
    redis_port, port = free_ports(2)
    await stack.enter_async_context(redis_server(program, redis_port, str(directory)))
    url = f"redis://127.0.0.1:{redis_port}"
    service = await _service(stack, port, directory, "shared", (f"--set=store={url}", *POLICIES_ON))
    mesh = await stack.enter_async_context(
        Mesh.connect(ratelimit=service.addresses["ratelimit"], tenant=TENANT)
    )
    checks = Check(mesh)
    limits: Any = import_module("limits")
    storage = import_module("limits.aio.storage").RedisStorage(
        f"async+{url}", implementation="redispy"
    )
    limiter = import_module("limits.aio.strategies").FixedWindowRateLimiter(storage)
    limit = limits.RateLimitItemPerSecond(_A_LOT)

    async def by_limits(_: int) -> None:
        await limiter.hit(limit, TENANT, USER)

    return {
        "limits": lambda seconds, series: run_tasks(by_limits, SHARED_TASKS, seconds, series),
        "shared": lambda seconds, series: run_tasks(checks.call, SHARED_TASKS, seconds, series),
    }


async def _service(
    stack: AsyncExitStack, port: int, directory: Path, name: str, arguments: tuple[str, ...]
) -> Supervisor:
    limits = f"--set=limits={directory / 'limits.toml'}"
    return await stack.enter_async_context(
        Supervisor(
            {"ratelimit": [limits, *arguments]},
            {"ratelimit": port},
            log_file=directory / f"{name}.log",
        )
    )
