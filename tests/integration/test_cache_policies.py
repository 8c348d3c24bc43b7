"""Policies of namespaces and quotas of tenants over gRPC, in memory and before a shared store."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

import grpc
import pytest
import pytest_asyncio
from support.cache_domain import Cache as Domain
from support.redis_servers import RedisServer
from support.servers import running

from agent360.client import Entry, InvalidRequestError, Mesh, MeshError
from agent360.client.channel import MAX_MESSAGE_BYTES
from agent360.mesh.cache.admission import Bounds
from agent360.mesh.cache.policy import NamespacePolicy

pytestmark = pytest.mark.asyncio(loop_scope="module")

Cache = Callable[..., AbstractAsyncContextManager[Mesh]]

LOAD_FAILED: Final = MeshError(grpc.StatusCode.UNKNOWN, "LOAD_FAILED", "it failed")
_numbers = itertools.count(1)


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=["memory", "redis"])
async def cache(request: pytest.FixtureRequest) -> AsyncIterator[Cache]:
    """Makes a cache whose default policy is given, and a client of it."""

    @asynccontextmanager
    async def at(store: str, policy: dict[str, Any], **settings: Any) -> AsyncIterator[Mesh]:
        shared = {"prefix": f"cache{next(_numbers)}"}
        async with (
            running(
                "cache", store=store, default_policy=policy, shared=shared, **settings
            ) as server,
            Mesh.connect(
                cache=server.address,
                tenant="acme",
                api_key="",
                max_message_bytes=settings.get("max_message_bytes", MAX_MESSAGE_BYTES),
            ) as mesh,
        ):
            yield mesh

    if request.param == "memory":
        yield lambda policy=None, **settings: at("memory://", policy or {}, **settings)
    else:
        async with RedisServer() as redis:
            yield lambda policy=None, **settings: at(redis.url, policy or {}, **settings)


async def stats_of(mesh: Mesh, namespace: str = "default", tenant: str | None = None) -> Any:
    """The counts of a namespace."""
    asked = mesh.cache.stats(namespaces=[namespace], tenant=tenant)
    (stats,) = [each async for each in asked]
    return stats


# -------------------------------------------------------------------- what is let in


@pytest.mark.parametrize("admission", ["always", "tinylfu"])
async def test_all_is_let_in_where_there_is_room(cache: Cache, admission: str) -> None:
    async with cache({"admission": admission}) as mesh:
        assert (await mesh.cache.set("k", b"v")).stored
        assert (await mesh.cache.get("k")).value == b"v"


async def test_nothing_is_let_in_and_what_was_there_goes_where_the_policy_is_never(
    cache: Cache,
) -> None:
    async with cache({"admission": "never"}) as mesh:
        stored = await mesh.cache.set("k", b"v")
        assert (stored.stored, stored.version) == (False, 0)
        assert not (await mesh.cache.get("k")).hit
        value = await mesh.cache.get_or_load("k", lambda: asyncio.sleep(0, b"loaded"))
        assert value == b"loaded"
        claim = await mesh.cache.claim("k2")
        waiting = [asyncio.create_task(mesh.cache.claim("k2")) for _ in range(5)]
        await asyncio.sleep(0.05)
        assert not (await mesh.cache.fill(claim.fill_token, "k2", b"filled")).stored
        for answer in await asyncio.gather(*waiting):
            assert (answer.lookup.value, answer.fill_token) == (b"filled", "")
        assert not (await mesh.cache.get("k2")).hit
        stats = await stats_of(mesh)
        assert stats.rejections >= 3
        assert stats.entries == 0


async def test_a_doorkeeper_lets_in_what_was_asked_for_again_within_its_window(
    cache: Cache,
) -> None:
    policy = {"admission": "doorkeeper", "doorkeeper_accesses": 2, "doorkeeper_window_s": 0.4}
    async with cache(policy) as mesh:

        async def asks_and_writes(key: str) -> bool:
            await mesh.cache.get(key)
            return (await mesh.cache.set(key, b"v")).stored

        assert not await asks_and_writes("k")
        assert await asks_and_writes("k")
        assert (await mesh.cache.get("k")).hit
        assert not await asks_and_writes("once")
        await asyncio.sleep(1.0)  # two windows: what was counted is forgotten
        assert not await asks_and_writes("once")
        assert await asks_and_writes("once")


async def test_a_value_over_the_policys_size_is_not_let_in_and_replaces_nothing_by_halves(
    cache: Cache,
) -> None:
    async with cache({"max_value_bytes": 100}) as mesh:
        assert (await mesh.cache.set("k", bytes(100))).stored
        assert not (await mesh.cache.set("k", bytes(101))).stored
        assert not (await mesh.cache.get("k")).hit


@pytest.mark.parametrize(
    ("content_type", "stored"),
    [("text/plain", True), ("text/html", False), ("image/png", False), ("", False)],
)
async def test_media_types_are_let_in_by_pattern(
    cache: Cache, content_type: str, stored: bool
) -> None:
    policy = {"content_types": ["text/*"], "refused_content_types": ["text/html"]}
    async with cache(policy) as mesh:
        result = await mesh.cache.set("k", b"v", content_type=content_type)
        assert result.stored is stored
        assert (await mesh.cache.get("k")).hit is stored


async def test_the_first_policy_that_fits_a_tenant_and_a_namespace_counts(cache: Cache) -> None:
    policies = [
        {"tenants": ["acme"], "namespaces": ["secret-*"], "admission": "never"},
        {"namespaces": ["secret-*", "short"], "ttl_s": 5, "ttl_jitter": 0},
    ]
    async with cache(policies=policies) as mesh:
        assert not (await mesh.cache.set("k", b"v", namespace="secret-1")).stored
        assert (await mesh.cache.set("k", b"v", namespace="secret-1", tenant="globex")).stored
        lookup = await mesh.cache.get("k", namespace="secret-1", tenant="globex")
        assert 4 < lookup.ttl_s <= 5
        await mesh.cache.set("k", b"v", namespace="other")
        assert (await mesh.cache.get("k", namespace="other")).ttl_s > 3_000


async def test_a_ttl_follows_the_media_type_and_varies_by_a_tenth(cache: Cache) -> None:
    policy = {"ttl_by_content_type": {"text/*": 10, "*": 1_000}, "ttl_s": 7}
    async with cache(policy) as mesh:
        lived = {"text/plain": 10.0, "application/json": 1_000.0}
        for content_type, ttl_s in lived.items():
            entries = [Entry(f"k{n}", b"v", content_type=content_type) for n in range(300)]
            await mesh.cache.set_many(entries)
            lookups = await mesh.cache.get_many(f"k{n}" for n in range(300))
            left = [each.ttl_s for each in lookups]
            assert 0.9 * ttl_s - 1.5 < min(left) < 0.94 * ttl_s
            assert 1.06 * ttl_s - 1.5 < max(left) <= 1.1 * ttl_s
        await mesh.cache.set("k", b"v", content_type="text/plain", ttl=100)
        assert 89 < (await mesh.cache.get("k")).ttl_s <= 110


async def test_entries_of_one_ttl_end_spread_over_a_fifth_of_it() -> None:
    domain = Domain(Bounds(entries=20_000, size_bytes=2**30))
    domain.plans.policy = NamespacePolicy(ttl_jitter=0.1)
    keys = [f"k{number}" for number in range(10_000)]
    for key in keys:
        assert domain.put(key, ttl_s=60.0).stored
    began = domain.clock.now()
    ends_s = [entry.fresh_until - began for entry in domain.plans.entries.values()]
    in_tenths = Counter(int(end_s * 10) for end_s in ends_s)
    assert max(in_tenths.values()) <= len(keys) * 0.02
    for after_s, there in ((53.9, len(keys)), (66.1, 0)):
        domain.clock.advance(began + after_s - domain.clock.now())
        domain.sweep()
        assert sum(domain.find(key) is not None for key in keys) == there


# -------------------------------------------------------------------- stale, eager, fail-safe


async def test_a_stale_value_is_taken_at_once_while_one_caller_loads_it_anew(cache: Cache) -> None:
    async with cache({"stale_ttl_s": 30, "ttl_jitter": 0}) as mesh:
        loads = 0

        async def load() -> bytes:
            nonlocal loads
            loads += 1
            await asyncio.sleep(0.1)
            return b"v2"

        await mesh.cache.set("k", b"v1", ttl=0.1)
        await asyncio.sleep(0.15)
        began = time.monotonic()
        values = await asyncio.gather(*(mesh.cache.get_or_load("k", load) for _ in range(20)))
        assert time.monotonic() - began < 0.1
        assert set(values) == {b"v1"}
        async with asyncio.timeout(5):
            while (await mesh.cache.get("k")).value != b"v2":  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.01)
        assert loads == 1


async def test_the_first_claim_after_a_fraction_of_the_ttl_and_no_other_refreshes(
    cache: Cache,
) -> None:
    async with cache({"eager_refresh": 0.5, "ttl_jitter": 0}) as mesh:
        await mesh.cache.set("k", b"v1", ttl=1.0)
        early = await mesh.cache.claim("k")
        assert (early.lookup.value, early.fill_token) == (b"v1", "")
        await asyncio.sleep(0.55)
        claims = await asyncio.gather(*(mesh.cache.claim("k") for _ in range(50)))
        assert {each.lookup.value for each in claims} == {b"v1"}
        tokens = [each.fill_token for each in claims if each.fill_token]
        assert len(tokens) == 1
        assert (await mesh.cache.claim("k")).fill_token == ""
        assert (await mesh.cache.fill(tokens[0], "k", b"v2", ttl=30)).stored
        lookup = await mesh.cache.get("k")
        assert (lookup.value, lookup.ttl_s > 20) == (b"v2", True)


async def test_a_claim_may_ask_for_an_earlier_refresh_than_the_policy(cache: Cache) -> None:
    async with cache({"ttl_jitter": 0}) as mesh:
        await mesh.cache.set("k", b"v", ttl=2.0)
        await asyncio.sleep(0.3)
        assert not (await mesh.cache.claim("k")).fill_token
        assert not (await mesh.cache.claim("k", eager_refresh=0.9)).fill_token
        claim = await mesh.cache.claim("k", eager_refresh=0.1)
        assert (claim.lookup.value, bool(claim.fill_token)) == (b"v", True)


async def test_where_loading_fails_the_old_value_stands_in_flagged_until_it_is_too_old(
    cache: Cache,
) -> None:
    policy = {"fail_safe_s": 1.0, "fail_safe_pause_s": 0.3, "ttl_jitter": 0}
    async with cache(policy) as mesh:
        loads = 0

        async def load() -> bytes:
            nonlocal loads
            loads += 1
            raise MeshError(grpc.StatusCode.INTERNAL, "BROKEN", "the source is away")

        await mesh.cache.set("k", b"v", ttl=0.1)
        ends = time.monotonic() + 0.1
        await asyncio.sleep(0.12)
        assert not (await mesh.cache.get("k")).hit
        for _ in range(5):
            assert await mesh.cache.get_or_load("k", load, allow_stale=False) == b"v"
        assert loads == 1
        lookup = (await mesh.cache.claim("k")).lookup
        assert (lookup.value, lookup.fail_safe, lookup.outcome.name) == (b"v", True, "STALE")
        await asyncio.sleep(0.35)
        assert await mesh.cache.get_or_load("k", load, allow_stale=False) == b"v"
        assert loads == 2
        stats = await stats_of(mesh)
        assert stats.fail_safe_hits >= 5
        assert stats.fill_failures == 2
        await asyncio.sleep(max(0.0, ends + 1.4 - time.monotonic()))
        with pytest.raises(MeshError, match="BROKEN"):
            await mesh.cache.get_or_load("k", load, allow_stale=False)


async def test_a_long_stale_ttl_does_not_lengthen_the_fail_safe(cache: Cache) -> None:
    policy = {"fail_safe_s": 0.3, "fail_safe_pause_s": 0.1, "ttl_jitter": 0}
    async with cache(policy) as mesh:
        await mesh.cache.set("k", b"v", ttl=0.1, stale_ttl=60)
        await asyncio.sleep(0.6)
        claim = await mesh.cache.claim("k")
        assert claim.fill_token
        assert await mesh.cache.fail(claim.fill_token, LOAD_FAILED) is None


async def test_without_fail_safe_a_failed_load_falls_to_the_next_who_waits(cache: Cache) -> None:
    async with cache() as mesh:
        first = await mesh.cache.claim("k")
        waiting = asyncio.create_task(mesh.cache.claim("k", timeout=5))
        await asyncio.sleep(0.05)
        assert await mesh.cache.fail(first.fill_token, LOAD_FAILED) is None
        second = await waiting
        assert second.fill_token not in {"", first.fill_token}
        assert not (await mesh.cache.fill(first.fill_token, "k", b"late")).stored
        assert (await mesh.cache.fill(second.fill_token, "k", b"v")).stored


# -------------------------------------------------------------------- room


async def test_a_tenant_that_floods_the_cache_leaves_the_others_their_equal_shares(
    cache: Cache,
) -> None:
    async with cache({"admission": "always"}, max_bytes=4 * 2**20, max_entries=3_000) as mesh:
        keys = [f"k{n}" for n in range(1_000)]
        for tenant in ("quiet-a", "quiet-b"):
            await mesh.cache.set_many([Entry(key, b"v") for key in keys], tenant=tenant)
        for burst in range(4):
            entries = [Entry(f"{burst}/{n}", bytes(500)) for n in range(2_000)]
            await mesh.cache.set_many(entries, tenant="noisy")
            for tenant in ("quiet-a", "quiet-b"):
                assert (await stats_of(mesh, tenant=tenant)).entries == 1_000
        for tenant in ("quiet-a", "quiet-b"):
            stats = await stats_of(mesh, tenant=tenant)
            assert stats.evictions == 0


async def test_a_tenants_quota_binds_it_where_there_is_room(cache: Cache) -> None:
    quotas = [{"tenants": ["small"], "max_bytes": 100_000}]
    async with cache(max_bytes=2**24, tenant_quotas=quotas) as mesh:
        for tenant in ("small", "large"):
            await mesh.cache.set_many(
                [Entry(f"k{n}", bytes(1_000)) for n in range(1_000)], tenant=tenant
            )
        assert (await stats_of(mesh, tenant="small")).bytes <= 100_000
        assert (await stats_of(mesh, tenant="large")).entries == 1_000


async def test_ten_megabytes_are_never_more_than_ten_and_a_half(cache: Cache) -> None:
    bound = 10 * 2**20
    settings = {"max_bytes": bound, "max_value_bytes": 32 * 2**20, "max_message_bytes": 40 * 2**20}
    async with cache({"admission": "always"}, **settings) as mesh:
        for burst in range(8):
            await mesh.cache.set_many(
                Entry(f"{burst}/{n}", bytes(100 + 977 * n % 20_000), tags=("t",))
                for n in range(400)
            )
            assert (await stats_of(mesh)).bytes <= bound * 1.05
        assert (await stats_of(mesh)).bytes > bound * 0.8


async def test_a_value_of_20_megabytes_is_refused_and_evicts_nothing(cache: Cache) -> None:
    settings = {"max_bytes": 10 * 2**20, "max_value_bytes": 32 * 2**20}
    async with cache(max_message_bytes=64 * 2**20, **settings) as mesh:
        await mesh.cache.set_many([Entry(f"k{n}", bytes(1_000)) for n in range(1_000)])
        before = await stats_of(mesh)
        with pytest.raises(InvalidRequestError, match=r"entry\.value"):
            await mesh.cache.set("big", bytes(20 * 2**20))
        claim = await mesh.cache.claim("big")
        with pytest.raises(InvalidRequestError, match=r"entry\.value"):
            await mesh.cache.fill(claim.fill_token, "big", bytes(20 * 2**20))
        after = await stats_of(mesh)
        assert (after.entries, after.evictions) == (before.entries, 0)
        lookups = await mesh.cache.get_many(f"k{n}" for n in range(1_000))
        assert all(each.hit for each in lookups)
