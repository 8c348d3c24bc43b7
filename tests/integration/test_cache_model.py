"""The cache service over gRPC does what a dictionary with a clock does, on every replica."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import grpc
import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from support.redis_servers import RedisClusterServers, RedisServer
from support.servers import running

from agent360.client import Entry, Lookup, Mesh, MeshError, Outcome

T = TypeVar("T")

TENANTS: Final = ("acme", "globex")
KEYS: Final = ("a/1", "a/2", "ab", "b/1", "ä")
TAGS: Final = ("t", "u")
TTLS: Final = (0.15, 60.0)
STALE_TTLS: Final = (0.0, 0.15, 60.0)

SLACK_S: Final = 0.03
"""How far from an entry's end it may be found there or not."""
SETTLE_S: Final = 0.1
"""How long a replica may take to hear of what was done through another."""

LOAD_FAILED: Final = MeshError(grpc.StatusCode.UNKNOWN, "LOAD_FAILED", "it failed")
_numbers = itertools.count(1)


class World:
    """Replicas of one store with a client of each, on a loop of their own."""

    def __init__(self, store: str) -> None:
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self.meshes: list[Mesh] = []
        self.do(self._start(store))

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine to its end."""
        return self._runner.run(work)

    def close(self) -> None:
        """Stops everything."""
        self.do(self._stack.aclose())
        self._runner.close()

    async def _start(self, store: str) -> None:
        url, replicas = "memory://", 1
        if store != "memory":
            servers = RedisServer() if store == "redis" else RedisClusterServers()
            url, replicas = (await self._stack.enter_async_context(servers)).url, 2
        for _ in range(replicas):
            server = await self._stack.enter_async_context(
                running("cache", store=url, default_policy={"ttl_jitter": 0})
            )
            mesh = Mesh.connect(cache=server.address, tenant="acme", api_key="")
            self.meshes.append(await self._stack.enter_async_context(mesh))


@dataclass(frozen=True)
class Kept:
    """What the dictionary has under a key; times are the earliest and the latest possible."""

    value: bytes
    version: int
    tags: frozenset[str]
    fresh_until: tuple[float, float]
    stale_until: tuple[float, float]

    def may_be_fresh(self, asked_at: float) -> bool:
        return asked_at < self.fresh_until[1] + SLACK_S

    def is_fresh(self, answered_at: float) -> bool:
        return answered_at < self.fresh_until[0] - SLACK_S

    def may_be_there(self, asked_at: float) -> bool:
        return asked_at < self.stale_until[1] + SLACK_S

    def is_there(self, answered_at: float) -> bool:
        return answered_at < self.stale_until[0] - SLACK_S

    def outcomes(self, asked_at: float, answered_at: float, stale: bool) -> set[Outcome]:
        """How a lookup may end."""
        found = set()
        if self.may_be_fresh(asked_at):
            found.add(Outcome.HIT)
        if stale and not self.is_fresh(answered_at) and self.may_be_there(asked_at):
            found.add(Outcome.STALE)
        if not self.is_fresh(answered_at) and not (stale and self.is_there(answered_at)):
            found.add(Outcome.MISS)
        return found


class Model(RuleBasedStateMachine):
    """Random calls through random replicas, each compared with the dictionary."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.namespace = f"model{next(_numbers)}"
        self.kept: dict[tuple[str, str], Kept] = {}
        self.versions: dict[tuple[str, str], int] = {}

    # ---------------------------------------------------------------- rules

    @rule(
        via=st.integers(0, 1),
        tenant=st.sampled_from(TENANTS),
        key=st.sampled_from(KEYS),
        value=st.binary(max_size=4),
        ttl=st.sampled_from(TTLS),
        stale_ttl=st.sampled_from(STALE_TTLS),
        tags=st.frozensets(st.sampled_from(TAGS)),
    )
    def sets(
        self, via: int, tenant: str, key: str, value: bytes, ttl: float, stale_ttl: float,
        tags: frozenset[str],
    ) -> None:  # fmt: skip
        async def work() -> None:
            asked_at = time.monotonic()
            stored = await self.mesh(via).cache.set(
                key, value, namespace=self.namespace, tenant=tenant, ttl=ttl, stale_ttl=stale_ttl,
                tags=sorted(tags),
            )  # fmt: skip
            assert stored.stored
            assert stored.shared
            self.keeps(tenant, key, value, stored.version, ttl, stale_ttl, tags, asked_at)
            await self.settle(via, tenant, [key])

        self.world.do(work())

    @rule(
        via=st.integers(0, 1),
        tenant=st.sampled_from(TENANTS),
        key=st.sampled_from(KEYS),
        value=st.binary(max_size=4),
        ttl=st.sampled_from(TTLS),
        on_version=st.sampled_from(["absent", "same", "other"]),
    )
    def sets_on_a_condition(
        self, via: int, tenant: str, key: str, value: bytes, ttl: float, on_version: str
    ) -> None:
        async def work() -> None:
            there = self.kept.get((tenant, key))
            version = 0 if there is None else there.version
            condition: dict[str, Any] = {"if_absent": True}
            if on_version != "absent":
                condition = {"if_version": version + (on_version == "other")}
            asked_at = time.monotonic()
            stored = await self.mesh(via).cache.set(
                key, value, namespace=self.namespace, tenant=tenant, ttl=ttl, stale_ttl=0.0,
                **condition,
            )  # fmt: skip
            answered_at = time.monotonic()
            if on_version == "absent":
                may = there is None or not there.is_fresh(answered_at)
                must = there is None or not there.may_be_fresh(asked_at)
            elif there is None:
                may = must = condition["if_version"] == 0
            else:
                same = on_version == "same"
                may = same and there.may_be_there(asked_at)
                must = same and there.is_there(answered_at)
            assert must <= stored.stored <= may
            if stored.stored:
                self.keeps(tenant, key, value, stored.version, ttl, 0.0, frozenset(), asked_at)
            await self.settle(via, tenant, [key])

        self.world.do(work())

    @rule(
        via=st.integers(0, 1),
        tenant=st.sampled_from(TENANTS),
        keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=6),
        stale=st.booleans(),
        many=st.booleans(),
    )
    def gets(self, via: int, tenant: str, keys: list[str], stale: bool, many: bool) -> None:
        async def work() -> None:
            cache = self.mesh(via).cache
            named: dict[str, Any] = {
                "namespace": self.namespace,
                "tenant": tenant,
                "allow_stale": stale,
            }
            asked_at = time.monotonic()
            if many:
                lookups = await cache.get_many(keys, **named)
            else:
                lookups = await asyncio.gather(*(cache.get(key, **named) for key in keys))
            answered_at = time.monotonic()
            for key, lookup in zip(keys, lookups, strict=True):
                fault = self.fault(tenant, key, lookup, asked_at, answered_at, stale)
                assert not fault, fault

        self.world.do(work())

    @rule(via=st.integers(0, 1), tenant=st.sampled_from(TENANTS), key=st.sampled_from(KEYS))
    def deletes(self, via: int, tenant: str, key: str) -> None:
        async def work() -> None:
            asked_at = time.monotonic()
            deleted = await self.mesh(via).cache.delete(
                key, namespace=self.namespace, tenant=tenant
            )
            there = self.kept.pop((tenant, key), None)
            may = there is not None and there.may_be_there(asked_at)
            must = there is not None and there.is_there(time.monotonic())
            assert must <= deleted <= may
            await self.settle(via, tenant, [key])

        self.world.do(work())

    @rule(
        via=st.integers(0, 1),
        tenant=st.sampled_from(TENANTS),
        scope=st.sampled_from(["keys", "prefix", "tags", "all"]),
        keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=3),
        prefix=st.sampled_from(["a", "a/", "b/1", "ä", "z"]),
        tags=st.lists(st.sampled_from(TAGS), min_size=1, max_size=2),
        warm=st.lists(st.sampled_from(KEYS), max_size=2, unique=True),
    )
    def invalidates(
        self, via: int, tenant: str, scope: str, keys: list[str], prefix: str, tags: list[str],
        warm: list[str],
    ) -> None:  # fmt: skip
        async def work() -> None:
            named: dict[str, Any] = {
                "keys": {"keys": keys},
                "prefix": {"prefix": prefix},
                "tags": {"tags": tags},
                "all": {},
            }[scope]
            asked_at = time.monotonic()
            done = await self.mesh(via).cache.invalidate(
                namespace=self.namespace, tenant=tenant,
                warm=[Entry(key, b"warm", ttl=60) for key in warm], **named,
            )  # fmt: skip
            answered_at = time.monotonic()
            assert done.shared
            assert done.warmed == len(warm)
            gone = []
            for owner, key in list(self.kept):
                entry = self.kept[owner, key]
                concerned = {
                    "keys": key in keys,
                    "prefix": key.startswith(prefix),
                    "tags": bool(entry.tags & set(tags)),
                    "all": True,
                }[scope]
                if owner == tenant and concerned:
                    gone.append(self.kept.pop((owner, key)))
            if scope != "all":
                least = sum(each.is_there(answered_at) for each in gone)
                assert least <= done.removed <= sum(each.may_be_there(asked_at) for each in gone)
            for key in warm:
                self.keeps(tenant, key, b"warm", 0, 60.0, 0.0, frozenset(), asked_at)
            await self.settle(via, tenant, KEYS)

        self.world.do(work())

    @rule(
        via=st.integers(0, 1),
        elsewhere=st.integers(0, 1),
        tenant=st.sampled_from(TENANTS),
        key=st.sampled_from(KEYS),
        meanwhile=st.sampled_from(["nothing", "fails", "deleted", "prefix", "tag", "all", "set"]),
    )
    def claims(self, via: int, elsewhere: int, tenant: str, key: str, meanwhile: str) -> None:
        async def work() -> None:
            cache, other = self.mesh(via).cache, self.mesh(elsewhere).cache
            named = {"namespace": self.namespace, "tenant": tenant}
            asked_at = time.monotonic()
            claim = await cache.claim(key, timeout=5, **named)
            if not claim.fill_token:
                fault = self.fault(
                    tenant, key, claim.lookup, asked_at, time.monotonic(), stale=False
                )
                assert claim.lookup.outcome is Outcome.HIT
                assert not fault, fault
                return
            there = self.kept.get((tenant, key))
            assert there is None or not there.is_fresh(time.monotonic())
            changed = [key]
            match meanwhile:
                case "fails":
                    assert await other.fail(claim.fill_token, LOAD_FAILED, tenant=tenant) is None
                    return
                case "deleted":
                    await other.delete(key, **named)
                    self.kept.pop((tenant, key), None)
                case "prefix":
                    await other.invalidate(prefix=key, **named)
                    changed = [each for each in KEYS if each.startswith(key)]
                case "tag":
                    await other.invalidate(tags=["u"], **named)
                    changed = [each for each in KEYS if self.has_tag(tenant, each, "u")]
                case "all":
                    await other.invalidate(**named)
                    changed = list(KEYS)
                case "set":
                    written_at = time.monotonic()
                    stored = await other.set(key, b"set", ttl=60, stale_ttl=0.0, **named)
                    self.keeps(
                        tenant, key, b"set", stored.version, 60.0, 0.0, frozenset(), written_at
                    )
            if meanwhile in {"prefix", "tag", "all"}:
                for each in changed:
                    self.kept.pop((tenant, each), None)
            filled_at = time.monotonic()
            filled = await other.fill(
                claim.fill_token, key, b"filled", ttl=60, stale_ttl=0.0, tags=["u"], **named
            )
            assert filled.stored is (meanwhile == "nothing")
            if filled.stored:
                self.keeps(
                    tenant, key, b"filled", filled.version, 60.0, 0.0, frozenset("u"), filled_at
                )
            await self.settle(None, tenant, [*changed, key])

        self.world.do(work())

    @rule(seconds=st.sampled_from([0.05, 0.12, 0.2]))
    def time_passes(self, seconds: float) -> None:
        self.world.do(asyncio.sleep(seconds))

    # ---------------------------------------------------------------- the dictionary

    def mesh(self, via: int) -> Mesh:
        return self.world.meshes[via % len(self.world.meshes)]

    def has_tag(self, tenant: str, key: str, tag: str) -> bool:
        entry = self.kept.get((tenant, key))
        return entry is not None and tag in entry.tags

    def keeps(
        self, tenant: str, key: str, value: bytes, version: int, ttl: float, stale_ttl: float,
        tags: frozenset[str], asked_at: float,
    ) -> None:  # fmt: skip
        """Notes a write that began at a time and has ended now."""
        place, now = (tenant, key), time.monotonic()
        if version:
            assert version > self.versions.get(place, 0)
            self.versions[place] = version
        fresh_until = (asked_at + ttl, now + ttl)
        stale_until = (fresh_until[0] + stale_ttl, fresh_until[1] + stale_ttl)
        self.kept[place] = Kept(value, version, tags, fresh_until, stale_until)

    def fault(
        self, tenant: str, key: str, lookup: Lookup, asked_at: float, answered_at: float,
        stale: bool,
    ) -> str:  # fmt: skip
        """What is wrong with an answer; empty: nothing."""
        there = self.kept.get((tenant, key))
        allowed = {Outcome.MISS}
        if there is not None:
            allowed = there.outcomes(asked_at, answered_at, stale)
        if lookup.outcome not in allowed or lookup.degraded or lookup.fail_safe:
            return f"{key}: {lookup} where {there} is"
        if lookup.hit and there is not None:
            if there.version == 0:  # of a warm entry, of which no version was told
                assert lookup.version > self.versions.get((tenant, key), 0)
                self.versions[tenant, key] = lookup.version
                kept = Kept(
                    there.value, lookup.version, there.tags, there.fresh_until, there.stale_until
                )
                self.kept[tenant, key] = there = kept
            if (lookup.value, lookup.version) != (there.value, there.version):
                return f"{key}: {lookup} where {there} is"
        return ""

    async def settle(self, via: int | None, tenant: str, keys: Any) -> None:
        """Reads through all replicas until they agree; the one that was asked must at once."""
        count = len(self.world.meshes)
        for place, mesh in enumerate(self.world.meshes):
            until = time.monotonic()
            if via is None or place != via % count:
                until += SETTLE_S
            for key in keys:
                while True:
                    asked_at = time.monotonic()
                    lookup = await mesh.cache.get(key, namespace=self.namespace, tenant=tenant)
                    fault = self.fault(tenant, key, lookup, asked_at, time.monotonic(), stale=False)
                    if not fault:
                        break
                    assert asked_at < until, f"replica {place}: {fault}"
                    await asyncio.sleep(0.002)


@pytest.fixture(scope="module", params=["memory", "redis", "cluster"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(request.param)
    yield world
    world.close()


def test_every_call_is_answered_as_by_a_dictionary_with_a_clock(world: World) -> None:
    run_state_machine_as_test(
        lambda: Model(world),
        settings=settings(
            max_examples=10,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
