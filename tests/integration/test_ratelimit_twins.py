"""Each algorithm in Python and its twin in Lua go through the same histories and agree."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.redis_servers import RedisServer

from agent360.client.errors import MeshError
from agent360.mesh.ratelimit.deadline import Deadline
from agent360.mesh.ratelimit.domain import Ask, LocalDomain
from agent360.mesh.ratelimit.limiter import Limiter
from agent360.mesh.ratelimit.limits import Algorithm, Limit, LimitSet
from agent360.mesh.ratelimit.replica_leases import ReplicaLeases
from agent360.mesh.ratelimit.shared_domain import SharedDomain
from agent360.mesh.ratelimit.shared_usage import SharedUsage
from agent360.mesh.ratelimit.stores.redis import RedisStore, RedisUsageTable
from agent360.mesh.ratelimit.stores.redis import store as store_module
from agent360.mesh.ratelimit.stores.redis.scripts import script_source
from agent360.mesh.ratelimit.stores.redis.timeline import Timeline
from agent360.mesh.ratelimit.windows import Calendar
from agent360.mesh.runtime.redis import Redis, RedisSettings

LIMITS = [
    Limit("bucket", 5, 2.0, burst=7, name="a*"),
    Limit("sliding", 9, 3.0, name="*", algorithm=Algorithm.SLIDING_WINDOW),
    Limit("fixed", 8, 2.5, name="b*", per=("tenant", "user"), algorithm=Algorithm.FIXED_WINDOW),
    Limit("shadow", 2, 4.0, name="a*", shadow=True),
    Limit("hourly", 60, name="ab", algorithm=Algorithm.FIXED_WINDOW, period_s=3600.0,
          calendar=Calendar.HOUR, time_zone="Asia/Kolkata"),
    Limit("slots", 4, name="*", algorithm=Algorithm.CONCURRENCY),
    Limit("user-slots", 2, name="b*", per=("tenant", "user"), algorithm=Algorithm.CONCURRENCY),
]  # fmt: skip

RECORDS_KEPT_S = 1e6
HOUR_US = 3_600_000_000
BRIDGED_US = 60_000_000

CLOCKED = script_source().replace(
    "local t = redis.call('TIME')\nlocal now = t[1] * 1000000 + t[2]",
    "local now = tonumber(redis.call('GET', 'test-clock'))",
)
"""The script with a clock that the test moves."""

names = st.sampled_from(["aa", "ab", "ba", "c"])
users = st.sampled_from(["u1", "u2"])
hits = st.integers(0, 6)
operations = st.one_of(
    st.tuples(st.just("check"), names, users, hits, st.booleans()),
    st.tuples(st.just("reserve"), names, users, st.integers(1, 6), st.sampled_from(["", "r1"])),
    st.tuples(st.just("settle"), st.integers(0, 5), st.integers(0, 9)),
    st.tuples(st.just("lease"), names, users, st.integers(1, 9)),
    st.tuples(st.just("return"), st.integers(0, 5), st.integers(0, 9)),
    st.tuples(st.just("acquire"), names, users, st.integers(1, 3), st.integers(1, 4_000)),
    st.tuples(st.just("renew"), st.integers(0, 5), st.integers(1, 4_000)),
    st.tuples(st.just("release"), st.integers(0, 5)),
    st.tuples(st.just("mistake"), st.sampled_from(["reserve", "lease", "acquire"]),
              st.sampled_from(["settle", "return", "renew", "release"]), st.integers(0, 5)),
    st.tuples(st.just("change"), st.integers(1, 9)),
    st.tuples(st.just("step"), st.integers(-30_000_000, 30_000_000)),
)  # fmt: skip
pauses = st.one_of(st.just(0), st.integers(0, 4_000_000), st.integers(0, 20 * HOUR_US))
histories = st.lists(st.tuples(pauses, operations), min_size=1, max_size=40)


def changed(amount: int) -> LimitSet:
    """The limits, those of rates with another amount."""
    slots = Algorithm.CONCURRENCY
    return LimitSet(
        limit if limit.algorithm is slots else replace(limit, amount=amount, burst=0)
        for limit in LIMITS
    )


class Player:
    """Plays a history on one domain; ids are told by their order."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain
        self._ids: dict[str, list[str]] = {"reserve": [], "lease": [], "acquire": []}

    async def play(self, operation: tuple[Any, ...]) -> Any:
        kind, *rest = operation
        if kind in ("check", "reserve", "lease", "acquire"):
            return await self._ask(kind, *rest)
        if kind == "change":
            self._domain.replace_limits(changed(rest[0]))
            return None
        made_by = {"settle": "reserve", "return": "lease"}.get(kind, "acquire")
        if kind == "mistake":
            made_by, kind, *rest = (*rest, 9)
        ids = self._ids[made_by]
        if rest[0] >= len(ids) or not ids[-1 - rest[0]]:
            return None
        record_id = ids[-1 - rest[0]]
        try:
            match kind:
                case "settle":
                    return await self._domain.settle("acme", record_id, rest[1])
                case "return":
                    return await self._domain.return_lease("acme", record_id, rest[1])
                case "renew":
                    return await self._domain.renew("acme", record_id, rest[1] / 1e3)
                case _:
                    return await self._domain.release("acme", record_id)
        except MeshError as error:
            return error.reason

    async def _ask(self, kind: str, name: str, user: str, hits: int, *rest: Any) -> Any:
        domain, facts = self._domain, {"user": user}
        plan = domain.plan("acme", name, facts, slots=kind == "acquire")
        match kind:
            case "check":
                ask = Ask(plan, hits, rest[0])
                # Of a run the times until the limit is whole are those after it.
                return [each._replace(reset_after_s=0) for each in await domain.decide([ask] * 3)]
            case "reserve":
                decision, record_id = await domain.reserve("acme", name, plan, hits, 9.0, rest[0])
            case "lease":
                leased = await domain.lease("acme", plan, hits)
                self._ids[kind].append(leased.lease_id)
                return leased.decision, leased.ttl_s
            case _:
                decision, record_id = await domain.acquire("acme", plan, hits, rest[0] / 1e3)
        self._ids[kind].append(record_id)
        return decision


def test_memory_and_redis_agree_on_every_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """One loop and one server for all examples; the clock is the test's own."""
    with asyncio.Runner() as runner:
        stack = _Started(monkeypatch)
        runner.run(stack.start())
        try:

            @example(
                [
                    (0, ("reserve", "aa", "u1", 3, "")),
                    (0, ("reserve", "aa", "u1", 3, "")),
                    (0, ("settle", 1, 0)),
                    (1_200_000, ("check", "aa", "u1", 3, False)),
                    (0, ("settle", 0, 0)),
                    (0, ("check", "aa", "u1", 6, True)),
                ]
            )
            @example(
                [
                    (0, ("reserve", "ab", "u1", 5, "")),
                    (20 * HOUR_US, ("settle", 0, 9)),
                    (0, ("check", "ab", "u1", 0, False)),
                ]
            )
            @example(
                [
                    (0, ("reserve", "c", "u1", 3, "")),
                    (0, ("reserve", "aa", "u1", 5, "")),
                    (0, ("change", 1)),
                    (0, ("settle", 0, 0)),
                    (0, ("check", "aa", "u1", 1, False)),
                ]
            )
            @example(
                [
                    (0, ("acquire", "ba", "u1", 2, 4_000)),
                    (1_000_000, ("step", -30_000_000)),
                    (3_000_000, ("acquire", "ba", "u1", 2, 4_000)),
                ]
            )
            @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
            @given(histories)
            def agree(history: list[tuple[int, tuple[Any, ...]]]) -> None:
                runner.run(stack.compare(history))

            agree()
        finally:
            runner.run(stack.close())


class _Started:
    """A Redis with the clocked script."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.now = 0

    async def start(self) -> None:
        self._patch.setattr(store_module, "script_source", lambda: CLOCKED)
        self.server = RedisServer()
        await self.server.__aenter__()
        self.redis = Redis(self.server.url, RedisSettings(timeout_s=5), structlog.get_logger())
        self._patch.setattr(self.redis, "now_us", lambda: self.now)
        await self.redis.start()

    def _store(self) -> RedisStore:
        """One that has known the time since the beginning, and does not slow it down."""
        timeline = Timeline(lambda: self.passed_us * 1_000, pace=1.0)
        timeline.note(self.now)
        return RedisStore(
            self.redis, structlog.get_logger(), prefix="p", answer_s=5.0, lease_ttl_s=1.0,
            records_kept_s=RECORDS_KEPT_S, timeline=timeline,
        )  # fmt: skip

    async def close(self) -> None:
        await self.redis.close()
        await self.server.__aexit__(None, None, None)

    async def compare(self, history: list[tuple[int, tuple[Any, ...]]]) -> None:
        await self.server.command("FLUSHDB")
        self.now = clock = 1_790_000_000_000_000
        self.passed_us = 0
        limits = LimitSet(LIMITS)
        memory = Player(LocalDomain(self._limiter(limits)))
        log = structlog.get_logger()
        usage = SharedUsage(RedisUsageTable(self.redis, "p", log), log)
        store = self._store()
        leases = ReplicaLeases(store, usage)
        domain = SharedDomain(store, self._limiter(limits), usage, leases, Deadline(5.0))
        shared = Player(domain)
        for pause, operation in history:
            self.passed_us += pause
            self.now += pause
            clock += pause
            if operation[0] == "step":
                clock = max(clock + operation[1], self.now - BRIDGED_US)
                self.now = max(self.now, clock)
                operation = ("check", "c", "u1", 0, False)
            await self.server.command("SET", "test-clock", clock)
            assert await memory.play(operation) == await shared.play(operation), operation

    def _limiter(self, limits: LimitSet) -> Limiter:
        return Limiter(limits, lambda: self.now, reservations_kept_s=RECORDS_KEPT_S)
