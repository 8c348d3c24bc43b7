"""The cache service through the client, over real gRPC."""

import asyncio

import pytest
from support.servers import connected

from agent360.client import Entry, InvalidRequestError, MeshError, Outcome


async def test_a_stored_empty_value_is_a_hit() -> None:
    async with connected("cache") as mesh:
        assert (await mesh.cache.get("k")).outcome is Outcome.MISS
        assert (await mesh.cache.set("k", b"")).stored
        lookup = await mesh.cache.get("k")
        assert lookup.hit
        assert lookup.value == b""


async def test_a_tenant_never_reads_anothers_entry() -> None:
    async with connected("cache") as mesh:
        await mesh.cache.set("k", b"secret", tenant="acme")
        assert not (await mesh.cache.get("k", tenant="globex")).hit
        await mesh.cache.invalidate(tenant="globex")
        assert (await mesh.cache.get("k", tenant="acme")).value == b"secret"


async def test_many_gets_come_back_with_the_index_of_their_key() -> None:
    async with connected("cache") as mesh:
        await mesh.cache.set_many(Entry(f"k{n}", str(n).encode()) for n in range(2_500))
        lookups = await mesh.cache.get_many(f"k{n}" for n in range(2_500))
        assert [lookup.value for lookup in lookups] == [str(n).encode() for n in range(2_500)]
        seen = {index async for index, _ in mesh.cache.get_many(["k1", "gone", "k2"])}
        assert seen == {0, 1, 2}


async def test_one_caller_fills_and_all_others_get_its_value() -> None:
    async with connected("cache") as mesh:
        claims = [asyncio.create_task(mesh.cache.claim("k")) for _ in range(50)]
        done, waiting = await asyncio.wait(claims, return_when=asyncio.FIRST_COMPLETED)
        (filler,) = done
        token = filler.result().fill_token
        assert token
        assert (await mesh.cache.fill(token, "k", b"loaded")).stored
        results = await asyncio.gather(*waiting)
        assert {(each.lookup.value, each.fill_token) for each in results} == {(b"loaded", "")}


async def test_a_cancelled_waiter_leaves_the_other_waiters_alone() -> None:
    async with connected("cache") as mesh:
        token = (await mesh.cache.claim("k")).fill_token
        first, second = (asyncio.create_task(mesh.cache.claim("k")) for _ in range(2))
        await mesh.cache.get("k")
        first.cancel()
        await mesh.cache.fill(token, "k", b"v")
        assert (await second).lookup.value == b"v"


async def test_a_fill_that_began_before_an_invalidation_is_discarded() -> None:
    async with connected("cache") as mesh:
        token = (await mesh.cache.claim("k")).fill_token
        await mesh.cache.invalidate(keys=["k"])
        assert not (await mesh.cache.fill(token, "k", b"old")).stored
        assert not (await mesh.cache.get("k")).hit


async def test_prefix_tags_and_namespace_are_invalidated() -> None:
    async with connected("cache") as mesh:
        for key, tags in (("a/1", ["x"]), ("a/2", []), ("b/1", ["x"]), ("b/2", [])):
            await mesh.cache.set(key, b"v", tags=tags)
        assert (await mesh.cache.invalidate(prefix="a/")).removed == 2
        assert (await mesh.cache.invalidate(tags=["x"])).removed == 1
        assert (await mesh.cache.get("b/2")).hit
        await mesh.cache.invalidate()
        assert not (await mesh.cache.get("b/2")).hit


async def test_statistics_count_every_hit_and_miss() -> None:
    async with connected("cache") as mesh:
        await mesh.cache.set_many(Entry(f"k{n}", b"v") for n in range(700))
        await mesh.cache.get_many(f"k{n}" for n in range(1_000))
        for _ in range(3):
            (stats,) = [each async for each in mesh.cache.stats()]
            assert (stats.l1_hits, stats.misses) == (700, 300)


async def test_a_malformed_entry_is_refused_with_every_fault_named() -> None:
    async with connected("cache", max_value_bytes=1_000) as mesh:
        with pytest.raises(InvalidRequestError) as caught:
            await mesh.cache.set("x" * 1_025, b"v", namespace="", ttl=-1.0)
        fields = {violation.field for violation in caught.value.violations}
        assert fields == {"entry.key", "entry.namespace", "entry.ttl"}
        with pytest.raises(InvalidRequestError, match=r"entry\.value"):
            await mesh.cache.set("k", b"x" * 1_001)


async def test_a_value_too_large_for_a_shared_stream_goes_by_itself() -> None:
    async with connected("cache") as mesh:
        value = bytes(3 * 2**20)
        assert (await mesh.cache.set("big", value)).stored
        assert (await mesh.cache.get("big")).value == value
        with pytest.raises(MeshError, match="MESSAGE_TOO_LARGE"):
            await mesh.cache.set("huge", bytes(17 * 2**20))
        assert (await mesh.cache.get("big")).hit
