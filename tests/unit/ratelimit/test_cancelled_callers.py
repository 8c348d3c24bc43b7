"""The store on a cluster whose servers answer when the test says."""

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import structlog

from agent360.mesh.ratelimit.limits import Algorithm, Limit, LimitSet
from agent360.mesh.ratelimit.stores.redis import RedisStore

TAKEN = [1, 1, 5, 1, 0, -1, [0], []]
DENIED = [0, 0, 0, 1, 0, 1_000, [], [1]]


async def test_what_another_slot_denied_is_given_back_though_the_caller_is_cancelled() -> None:
    runs: list[Any] = []
    go = asyncio.Event()

    async def run(commands: list[Any]) -> list[bytes]:
        runs.append(commands)
        await go.wait()
        rows: list[Any] = [TAKEN, DENIED] if len(commands) == 2 else [1]
        return [msgspec.msgpack.encode([row, 1_790_000_000_000_000]) for row in rows]

    redis: Any = SimpleNamespace(
        run=run,
        topology=SimpleNamespace(clustered=True),
        script=lambda _: SimpleNamespace(
            command=lambda _, packed: msgspec.msgpack.decode(packed[0])
        ),
    )
    store = RedisStore(
        redis, structlog.get_logger(), prefix="p", answer_s=5, lease_ttl_s=1, records_kept_s=1
    )
    slots = Algorithm.CONCURRENCY
    limits = LimitSet([Limit("each", 5, algorithm=slots), Limit("all", 5, per=(), algorithm=slots)])
    counts = store.counts(limits, "acme", "x", {}, slots=True)
    asking = asyncio.create_task(store.acquire("acme", counts, 1, 60.0))
    async with asyncio.timeout(5):
        while not runs:  # noqa: ASYNC110 - the test's own loop
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        go.set()
        while len(runs) < 2:  # noqa: ASYNC110 - the test's own loop
            await asyncio.sleep(0)
    (released,) = runs[1]
    assert released[1][0][0] == "f"
