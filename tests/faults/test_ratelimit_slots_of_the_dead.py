"""Holders of concurrency slots are killed: their slots come back, when promised and only those."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from support.redis_servers import RedisClusterServers, RedisServer
from support.replicas import Replica

from agent360.client import Mesh

TTL_S = 5.0
ACQUIRERS = 100
KILLED = 4
LIMITS = """
[[limits]]
id = "slots"
name = "run"
algorithm = "concurrency"
amount = 8
"""
HOLDER = Path(__file__).parents[1] / "support/slot_holder.py"


@pytest.fixture(params=["memory", "redis", "cluster"])
async def addresses(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[list[str]]:
    """Two replicas of one store; one where the store is its own memory."""
    file = tmp_path / "limits.toml"
    _ = file.write_text(LIMITS)
    async with AsyncExitStack() as stack:
        store = "memory://"
        if request.param == "redis":
            store = (await stack.enter_async_context(RedisServer())).url
        elif request.param == "cluster":
            store = (await stack.enter_async_context(RedisClusterServers())).url
        patient = {"answer_s": 2, "redis.timeout_s": 2, "redis.wait_timeout_s": 2}
        started = [
            await stack.enter_async_context(
                Replica("ratelimit", store=store, limits=file, **patient)
            )
            for _ in range(1 if request.param == "memory" else 2)
        ]
        yield [each.address for each in started]


class Victim:
    """A process that holds a slot."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, addresses: list[str], tenant: str) -> Victim:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(HOLDER), ",".join(addresses), tenant),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        return cls(process)

    async def holds(self) -> None:
        assert await self._line() == "held\n"

    async def renew(self) -> tuple[float, float]:
        """Between when it renewed, on the monotonic clock."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        renewed, before, after = json.loads(await self._line())
        assert renewed
        return before, after

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _line(self) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            return (await self._process.stdout.readline()).decode()


async def test_the_slots_of_four_killed_holders_come_back_after_their_time_and_no_others(
    addresses: list[str],
) -> None:
    tenant = "acme"
    acquired: list[tuple[float, str]] = []
    stopping = asyncio.Event()

    async with Mesh.connect(ratelimit=addresses, tenant=tenant, api_key="") as mesh:

        async def acquirer(number: int) -> None:
            """Asks until it holds a slot, and keeps that."""
            while not stopping.is_set():
                slot = await mesh.ratelimit.acquire("run", ttl=TTL_S, timeout=10)
                if slot.decision.allowed:
                    acquired.append((time.monotonic(), slot.slot_id))
                    break
                await asyncio.sleep(0.2 + number / 1_000)
            while not stopping.is_set():
                assert await mesh.ratelimit.renew(slot.slot_id, timeout=10), (
                    "it came back too early"
                )
                await asyncio.sleep(1)

        victims = [await Victim.start(addresses, tenant) for _ in range(KILLED)]
        try:
            await asyncio.gather(*(victim.holds() for victim in victims))
            async with asyncio.TaskGroup() as tasks:
                for number in range(ACQUIRERS - KILLED):
                    tasks.create_task(acquirer(number))
                async with asyncio.timeout(20):
                    while len(acquired) < KILLED:  # noqa: ASYNC110 - what the tasks append to
                        await asyncio.sleep(0.01)
                # They renew what would soon have come back, and are killed.
                await asyncio.sleep(TTL_S - 2)
                renewals = await asyncio.gather(*(victim.renew() for victim in victims))
                assert len(acquired) == KILLED, "eight hold a slot, never more"
                await asyncio.gather(*(victim.kill() for victim in victims))
                last = max(after for _, after in renewals)
                await asyncio.sleep(max(0.0, last + TTL_S + 1.5 - time.monotonic()))
                held = list(acquired)
                look = await mesh.ratelimit.acquire("run", slots=8, timeout=10)
                stopping.set()
        finally:
            await asyncio.gather(*(victim.kill() for victim in victims))
    back = sorted(at for at, _ in held[KILLED:])
    assert len(back) == KILLED, "four came back, and four only"
    for at, (before, after) in zip(back, sorted(renewals), strict=True):
        assert before + TTL_S - 0.5 <= at <= after + TTL_S + 0.5
    assert not look.decision.allowed
    assert look.decision.remaining == 0
