"""What was invalidated is gone, and nothing else is."""

import asyncio

import pytest
from support.cache_domain import Cache, at_once

from agent360.mesh.cache.admission import Bounds
from agent360.mesh.cache.entry import OVERHEAD_BYTES


def test_keys_are_removed_and_counted_once_each() -> None:
    cache = Cache()
    for key in ("a", "b", "c"):
        cache.put(key)
    removed = cache.service.invalidate_keys(cache.plans, ["a", "b", "a", "gone"], cache.clock.now())
    assert removed == 2
    assert [cache.value(key) for key in ("a", "b", "c")] == [None, None, b"v"]
    assert cache.trail.events == [("acme", "plans", "keys", 2)]


def test_a_prefix_takes_every_key_that_begins_with_it() -> None:
    cache = Cache()
    for key in ("a", "a/", "a/1", "a/1/x", "ab", "b/a/1"):
        cache.put(key)
    assert at_once(cache.service.invalidate_prefix(cache.plans, "a/")) == 3
    assert set(cache.plans.entries) == {"a", "ab", "b/a/1"}


def test_a_tag_takes_the_entries_that_have_it_now() -> None:
    cache = Cache()
    cache.put("both", tags=("x", "y"))
    cache.put("x", tags=("x",))
    cache.put("y", tags=("y",))
    cache.put("was-x", tags=("x",))
    cache.put("was-x", tags=("y",))
    cache.put("became-x", tags=())
    cache.put("became-x", tags=("x",))
    assert at_once(cache.service.invalidate_tags(cache.plans, ["x", "unknown"])) == 3
    assert set(cache.plans.entries) == {"y", "was-x"}
    assert set(cache.plans.tags) == {"y"}
    assert at_once(cache.service.invalidate_tags(cache.plans, ["x", "y", "y"])) == 2
    assert not cache.plans.tags


def test_tags_are_of_a_namespace_of_a_tenant() -> None:
    cache = Cache()
    spaces = [cache.space("acme", "answers"), cache.space("globex")]
    for space in (cache.plans, *spaces):
        cache.put("k", tags=("x",), space=space)
    at_once(cache.service.invalidate_tags(cache.plans, ["x"]))
    assert cache.value("k") is None
    assert [cache.value("k", space=space) for space in spaces] == [b"v", b"v"]


def test_a_namespaces_next_version_makes_all_entries_unreachable_at_once() -> None:
    cache = Cache()
    globex = cache.space("globex")
    cache.put("k", b"other", space=globex)
    for number in range(100):
        cache.put(f"k{number}", tags=("x",))
    version = cache.plans.generation
    cache.service.invalidate_all(cache.plans)
    assert cache.plans.generation == version + 1
    assert all(cache.value(f"k{number}", stale=True) is None for number in range(100))
    assert at_once(cache.service.invalidate_tags(cache.plans, ["x"])) == 0
    assert cache.plans.size_bytes == 0
    assert cache.plans.counts.invalidations == 100
    assert cache.value("k", space=globex) == b"other"


def test_the_room_of_unreachable_entries_is_reclaimed_before_others_are_pushed_out() -> None:
    cache = Cache(Bounds(entries=1_000, size_bytes=100 * (OVERHEAD_BYTES + 100)))
    globex = cache.space("globex")
    for number in range(30):
        cache.put(f"kept{number}", bytes(50), space=globex)
    for number in range(60):
        cache.put(f"k{number}", bytes(50))
    cache.service.invalidate_all(cache.plans)
    for number in range(60):
        assert cache.put(f"k{number}", bytes(50)).stored
    assert globex.counts.evictions == cache.plans.counts.evictions == 0
    assert len(globex.entries) == 30


def test_a_sweep_reclaims_the_entries_of_former_versions() -> None:
    cache = Cache()
    for _ in range(3):
        for number in range(50):
            cache.put(f"k{number}", tags=("x",))
        cache.service.invalidate_all(cache.plans)
    cache.put("new")
    cache.sweep()
    assert len(cache.store) == 1
    assert cache.store.size_bytes == cache.plans.size_bytes
    assert cache.value("new") == b"v"


def test_an_entry_of_a_former_version_that_expires_meanwhile_is_counted_once() -> None:
    cache = Cache()
    cache.put("k", ttl_s=1.0)
    cache.service.invalidate_all(cache.plans)
    cache.clock.advance(5.0)
    cache.sweep()
    counts = cache.plans.counts
    assert (counts.invalidations, counts.expirations) == (1, 0)
    assert cache.store.size_bytes == 0


async def test_what_is_written_while_a_long_invalidation_goes_on_stays() -> None:
    cache = Cache(Bounds(entries=100_000, size_bytes=2**30))
    for number in range(12_000):
        cache.put(f"a/{number}", tags=("x",))
    for invalidation in (
        cache.service.invalidate_prefix(cache.plans, "a/"),
        cache.service.invalidate_tags(cache.plans, ["x"]),
    ):
        task = asyncio.create_task(invalidation)
        await asyncio.sleep(0)
        cache.put("a/11999", b"new", tags=("x",))
        await task
        assert cache.value("a/11999") == b"new"
        assert len(cache.plans.entries) == 1


async def test_a_long_invalidation_lets_others_be_served() -> None:
    cache = Cache(Bounds(entries=100_000, size_bytes=2**30))
    for number in range(12_000):
        cache.put(f"a/{number}")
    task = asyncio.create_task(cache.service.invalidate_prefix(cache.plans, "a/"))
    turns = 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    assert task.result() == 12_000
    assert turns >= 3


def test_invalidations_are_recorded_with_what_they_removed() -> None:
    cache = Cache()
    cache.put("a/1", tags=("x",))
    cache.put("a/2")
    at_once(cache.service.invalidate_tags(cache.plans, ["x"]))
    at_once(cache.service.invalidate_prefix(cache.plans, "a/"))
    cache.service.invalidate_all(cache.plans)
    assert cache.trail.events == [
        ("acme", "plans", "tags", 1),
        ("acme", "plans", "prefix", 1),
        ("acme", "plans", "namespace", 0),
    ]


@pytest.mark.parametrize("scope", ["prefix", "tags"])
def test_an_entry_that_is_over_is_not_counted_as_removed(scope: str) -> None:
    cache = Cache()
    cache.put("a/1", ttl_s=1.0, tags=("x",))
    cache.put("a/2", ttl_s=60.0, tags=("x",))
    cache.clock.advance(2.0)
    if scope == "prefix":
        assert at_once(cache.service.invalidate_prefix(cache.plans, "a/")) == 1
    else:
        assert at_once(cache.service.invalidate_tags(cache.plans, ["x"])) == 1
    assert cache.plans.counts.expirations == 1
