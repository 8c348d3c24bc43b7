"""Entries end when they said they would."""

import pytest
from support.cache_domain import Cache


def test_each_entry_ends_by_its_own_ttl() -> None:
    cache = Cache()
    cache.put("short", ttl_s=1.0)
    cache.put("long", ttl_s=10.0)
    cache.clock.advance(0.999)
    assert cache.value("short") == b"v"
    cache.clock.advance(0.001)
    assert cache.value("short") is None
    assert cache.value("long") == b"v"


def test_a_write_begins_the_ttl_anew() -> None:
    cache = Cache()
    cache.put("k", b"1", ttl_s=10.0)
    cache.clock.advance(9.0)
    cache.put("k", b"2", ttl_s=10.0)
    cache.clock.advance(9.0)
    cache.sweep()
    assert cache.value("k") == b"2"
    cache.clock.advance(1.0)
    assert cache.value("k") is None


def test_a_write_can_shorten_the_ttl() -> None:
    cache = Cache()
    cache.put("k", b"1", ttl_s=1_000.0)
    cache.put("k", b"2", ttl_s=1.0)
    cache.clock.advance(1.0)
    assert cache.value("k") is None


def test_a_stale_entry_is_only_for_those_who_allow_it_and_only_for_its_stale_ttl() -> None:
    cache = Cache()
    cache.put("k", ttl_s=5.0, stale_ttl_s=3.0)
    cache.clock.advance(5.0)
    assert cache.value("k") is None
    assert cache.value("k", stale=True) == b"v"
    cache.clock.advance(2.999)
    assert cache.value("k", stale=True) == b"v"
    cache.clock.advance(0.001)
    assert cache.value("k", stale=True) is None
    counts = cache.plans.counts
    assert (counts.hits, counts.stale_hits, counts.misses) == (0, 2, 2)


def test_a_lookup_for_fresh_entries_alone_leaves_a_stale_one_to_others() -> None:
    cache = Cache()
    cache.put("k", ttl_s=1.0, stale_ttl_s=10.0)
    cache.clock.advance(2.0)
    assert cache.value("k") is None
    assert cache.value("k", stale=True) == b"v"


@pytest.mark.parametrize("step_s", [0.25, 1.0, 7.0, 1_000.0])
def test_the_sweeper_reclaims_what_nobody_asks_for(step_s: float) -> None:
    cache = Cache()
    for number in range(200):
        cache.put(f"k{number}", ttl_s=0.5 + number / 10)
    while cache.clock.now() < 1_000.0 + 25.0:
        cache.clock.advance(step_s)
        cache.sweep()
    assert len(cache.store) == 0
    assert cache.store.size_bytes == cache.plans.size_bytes == 0
    assert cache.plans.counts.expirations == 200


def test_the_sweeper_keeps_what_is_stale_and_what_is_fresh() -> None:
    cache = Cache()
    cache.put("over", ttl_s=1.0)
    cache.put("stale", ttl_s=1.0, stale_ttl_s=60.0)
    cache.put("fresh", ttl_s=60.0)
    cache.clock.advance(30.0)
    cache.sweep()
    assert set(cache.plans.entries) == {"stale", "fresh"}


def test_a_sweep_does_no_more_than_it_was_allowed() -> None:
    cache = Cache()
    for number in range(10):
        cache.put(f"k{number}", ttl_s=1.0)
    cache.clock.advance(5.0)
    assert cache.store.sweep(cache.clock.now(), 4)
    assert len(cache.store) == 6
    cache.put("new", ttl_s=60.0)
    cache.sweep()
    assert list(cache.plans.entries) == ["new"]


def test_an_entry_is_counted_as_expired_once() -> None:
    cache = Cache()
    cache.put("k", ttl_s=1.0)
    cache.clock.advance(2.0)
    for _ in range(3):
        assert cache.value("k") is None
    cache.sweep()
    assert cache.plans.counts.expirations == 1


def test_the_sweeper_comes_within_a_second_of_an_entrys_end() -> None:
    cache = Cache()
    cache.put("k", ttl_s=1.2, stale_ttl_s=1.3)
    cache.clock.advance(2.4)
    cache.sweep()
    assert len(cache.store) == 1
    cache.clock.advance(1.1)
    cache.sweep()
    assert len(cache.store) == 0
