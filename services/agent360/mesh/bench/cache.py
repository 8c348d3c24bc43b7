"""``bench cache``: near hits, coalesced and many gets, gets answered by Redis, and hit rates."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from agent360.client import Entry, Mesh, NearCache
from agent360.mesh.bench.bare import GET, KEYS, NAMESPACE, VALUE, BareClient, key_of
from agent360.mesh.bench.calls import TENANT, Get
from agent360.mesh.bench.hit_rates import OPERATIONS, HitRates, measure_hit_rates
from agent360.mesh.bench.processes import POLICIES_ON, bare_server, redis_server
from agent360.mesh.bench.timing import MESSAGE_ITEMS, Series, run_many, run_tasks
from agent360.mesh.cli.supervisor import Supervisor
from agent360.mesh.free_ports import free_ports

if TYPE_CHECKING:
    from redis.asyncio import Redis

TASKS: Final = 256
"""Of coalesced gets."""
SHARED_TASKS: Final = 64
"""Of gets answered by Redis."""
MGET_KEYS: Final = 100
"""Keys of one MGET."""

_TTL_S: Final = 3_600.0
_NEAR_S: Final = 20.0
_SHARED: Final = tuple(f"shared-{number}" for number in range(10_000))
_LITTLE_ROOM: Final = ("--set=max_entries=64",)
"""Room for so few of ``_SHARED`` that the service's memory answers next to nothing."""

Measurement = Callable[[float, Series], Awaitable[None]]
"""Measures for so many seconds and adds a round to the series."""


@dataclass(slots=True)
class CacheFigures:
    """What was measured."""

    series: dict[str, Series] = field(default_factory=dict)
    """By kind: near, bare_unary, coalesced, bare_many, many, shared, redis, redis_mget."""
    hit_rates: HitRates = field(default_factory=dict)
    """By trace and policy."""
    operations: int = OPERATIONS
    """Length of the traces."""
    memory_share: float = 0.0
    """The part of the gets meant for Redis that the service's memory answered."""
    left_out: str = ""
    """Why there is nothing about Redis; empty if there is."""


async def measure(
    rounds: int, seconds: float, report: Callable[[str], None], operations: int = OPERATIONS
) -> CacheFigures:
    """Measures all kinds.

    Args:
        rounds: how often every measurement is taken; the kinds take turns within a round.
        seconds: about how long one measurement takes.
        report: told of progress.
        operations: length of the traces.
    """
    figures = CacheFigures(operations=operations)
    shared: Shared | None = None
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        measurements = await _memory(stack, directory)
        program = shutil.which("redis-server")
        if program is None:
            figures.left_out = "there is no redis-server on the PATH"
        elif find_spec("redis") is None:
            figures.left_out = "redis is not installed (the extra agent360-mesh[redis])"
        else:
            shared = await _start_shared(stack, directory, program)
            measurements |= {
                "redis": lambda seconds, series: run_tasks(
                    shared.by_itself, SHARED_TASKS, seconds, series
                ),
                "shared": lambda seconds, series: run_tasks(
                    shared.through_the_mesh, SHARED_TASKS, seconds, series
                ),
                "redis_mget": lambda seconds, series: run_many(shared.by_mget, seconds, series),
            }
        for number in range(rounds + 1):
            report(f"cache: round {number} of {rounds}" if number else "cache: warming up")
            for kind, run in measurements.items():
                if number:
                    await run(seconds, figures.series.setdefault(kind, Series()))
                else:
                    await run(seconds / 4, Series())
        if shared is not None:
            figures.memory_share = await shared.memory_share()
    figures.hit_rates = await asyncio.to_thread(measure_hit_rates, operations, report)
    return figures


def flatten(figures: CacheFigures) -> dict[str, float]:
    """The figures that are promised, by name."""

    def per_s(kind: str) -> float:
        return figures.series[kind].median_per_s

    flat = {
        "near_hit_us": 1e6 / per_s("near"),
        f"coalesced_{TASKS}": per_s("coalesced") / per_s("bare_unary"),
        f"many_{MESSAGE_ITEMS}": per_s("many") / per_s("bare_many"),
    }
    if not figures.left_out:
        flat[f"l2_{SHARED_TASKS}"] = per_s("shared") / per_s("redis")
    flat |= {trace: rates["ours"] for trace, rates in figures.hit_rates.items()}
    return {name: round(value, 3) for name, value in flat.items()}


async def _memory(stack: AsyncExitStack, directory: Path) -> dict[str, Measurement]:
    """Starts what answers from memory: a service, and a bare server beside it."""
    (bare_port,) = free_ports(1)
    await stack.enter_async_context(bare_server(bare_port))
    address = await _service(stack, directory / "memory.log", POLICIES_ON)
    mesh = await stack.enter_async_context(Mesh.connect(cache=address, tenant=TENANT))
    keys = [key_of(number) for number in range(KEYS)]
    await _fill(mesh, keys)
    near_mesh = await stack.enter_async_context(
        Mesh.connect(cache=address, tenant=TENANT, near_cache=NearCache(max_ttl=_TTL_S))
    )
    async with asyncio.timeout(_NEAR_S):
        while near_mesh.cache.near_stats.entries < KEYS:  # its watch opens in the background
            await near_mesh.cache.get_many(keys, namespace=NAMESPACE)
            await asyncio.sleep(0.02)
    bare = BareClient(GET, f"127.0.0.1:{bare_port}")
    stack.push_async_callback(bare.close)
    gets, near = Get(mesh), Get(near_mesh)

    async def one_by_one(count: int) -> None:
        for number in range(count):
            await near.call(number)
        await asyncio.sleep(0)  # answers from the process's own memory never pause

    return {
        "near": lambda seconds, series: run_many(one_by_one, seconds, series),
        "bare_unary": lambda seconds, series: run_tasks(bare.call, TASKS, seconds, series),
        "coalesced": lambda seconds, series: run_tasks(gets.call, TASKS, seconds, series),
        "bare_many": lambda seconds, series: run_many(
            lambda count: bare.many(count, MESSAGE_ITEMS), seconds, series
        ),
        "many": lambda seconds, series: run_many(gets.many, seconds, series),
    }


class Shared:
    """Gets that Redis answers, through the mesh and by redis-py itself."""

    def __init__(self, mesh: Mesh, redis: Redis) -> None:
        self._mesh = mesh
        self._redis = redis

    async def fill(self) -> None:
        """Writes the same values under the same keys by both ways."""
        await _fill(self._mesh, _SHARED)
        await self._redis.mset(dict.fromkeys(_SHARED, VALUE))

    async def through_the_mesh(self, number: int) -> None:
        """One awaited get of the mesh."""
        key = _SHARED[number % len(_SHARED)]
        lookup = await self._mesh.cache.get(key, namespace=NAMESPACE)
        _check(lookup.value)

    async def by_itself(self, number: int) -> None:
        """One awaited GET."""
        _check(await self._redis.get(_SHARED[number % len(_SHARED)]))

    async def by_mget(self, count: int) -> None:
        """``count`` values by MGET, one after another."""
        for first in range(0, count, MGET_KEYS):
            start = first % len(_SHARED)
            for value in await self._redis.mget(_SHARED[start : start + MGET_KEYS]):
                _check(value)

    async def memory_share(self) -> float:
        """The part of the mesh's gets that the service answered from its own memory."""
        async for stats in self._mesh.cache.stats(namespaces=[NAMESPACE]):
            return stats.l1_hits / max(1, stats.l1_hits + stats.l2_hits + stats.misses)
        return 0.0


async def _start_shared(stack: AsyncExitStack, directory: Path, program: str) -> Shared:
    """Starts a Redis and a service with a store in it."""
    from redis.asyncio import Redis  # noqa: PLC0415 - an extra may be missing

    (redis_port,) = free_ports(1)
    await stack.enter_async_context(redis_server(program, redis_port, str(directory)))
    url = f"redis://127.0.0.1:{redis_port}/0"
    arguments = (*POLICIES_ON, *_LITTLE_ROOM, f"--set=store={url}")
    address = await _service(stack, directory / "shared.log", arguments)
    mesh = await stack.enter_async_context(Mesh.connect(cache=address, tenant=TENANT))
    redis = Redis.from_url(url)
    stack.push_async_callback(redis.aclose)
    shared = Shared(mesh, redis)
    await shared.fill()
    return shared


async def _service(stack: AsyncExitStack, log_file: Path, arguments: tuple[str, ...]) -> str:
    """Starts a cache service, and the ratelimit service that its policies ask; its address."""
    ports = dict(zip(("ratelimit", "cache"), free_ports(2), strict=True))
    supervisor = Supervisor({"ratelimit": (), "cache": arguments}, ports, log_file=log_file)
    await stack.enter_async_context(supervisor)
    return supervisor.addresses["cache"]


async def _fill(mesh: Mesh, keys: Sequence[str]) -> None:
    entries = [Entry(key, VALUE, ttl=_TTL_S) for key in keys]
    await mesh.cache.set_many(entries, namespace=NAMESPACE)


def _check(value: object) -> None:
    if value != VALUE:
        raise RuntimeError("Redis did not answer with what was written")
