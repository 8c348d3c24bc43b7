"""The store stays within its bounds and keeps what is used."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cache_domain import Cache

from agent360.mesh.cache.admission import Bounds, TinyLfu
from agent360.mesh.cache.entry import (
    OVERHEAD_BYTES,
    TAG_OVERHEAD_BYTES,
    Entry,
    Payload,
    Space,
    size_of,
)
from agent360.mesh.cache.frequency import MAX_FREQUENCY, FrequencySketch

KB = 1_024


def test_the_size_of_an_entry_counts_its_texts_in_utf_8() -> None:
    payload = Payload(b"1234", 60.0, 0.0, "text/plain", ("tag", "änd"))
    expected = 4 + 3 + 10 + OVERHEAD_BYTES + 3 + 4 + 2 * TAG_OVERHEAD_BYTES
    assert size_of("ké", payload) == expected


def test_bytes_never_exceed_the_bound_whatever_is_written() -> None:
    cache = Cache(Bounds(entries=1_000, size_bytes=64 * KB))
    chance = random.Random(7)
    for _ in range(3_000):
        size = chance.choice([0, 10, 1_000, 20_000, 60_000])
        cache.put(f"k{chance.randrange(200)}", bytes(size))
        cache.find(f"k{chance.randrange(200)}")
        assert cache.store.size_bytes <= 64 * KB
    held = cache.plans.entries.values()
    assert cache.store.size_bytes == sum(entry.size_bytes for entry in held)
    assert cache.plans.size_bytes == cache.store.size_bytes
    assert len(cache.store) == len(held)


def test_giving_up_memory_costs_what_is_worth_least() -> None:
    cache = Cache(Bounds(entries=1_000, size_bytes=1_000 * KB))
    for number in range(100):
        cache.put(f"k{number}", bytes(KB))
    for _ in range(5):
        for number in range(0, 100, 10):
            assert cache.find(f"k{number}") is not None
    before = cache.store.size_bytes
    freed = cache.store.shed_memory(before // 2)
    assert freed == before - cache.store.size_bytes >= before // 2
    held = cache.plans.entries
    assert all(f"k{number}" in held for number in range(0, 100, 10))
    assert cache.store.size_bytes == sum(entry.size_bytes for entry in held.values())
    for number in range(100, 200):
        cache.put(f"k{number}", bytes(KB))
    assert cache.store.size_bytes > before * 0.9


def test_the_number_of_entries_never_exceeds_the_bound() -> None:
    cache = Cache(Bounds(entries=50, size_bytes=10_000 * KB))
    for number in range(500):
        cache.put(f"k{number}")
        assert len(cache.store) <= 50
    counts = cache.plans.counts
    assert counts.sets == 500
    assert counts.evictions + counts.rejections == 450


def test_every_entry_that_went_is_counted_with_its_reason() -> None:
    cache = Cache(Bounds(entries=30, size_bytes=1_000 * KB))
    for number in range(100):
        cache.put(f"k{number}", ttl_s=1.0 if number % 2 else 100.0)
    cache.clock.advance(2.0)
    cache.sweep()
    cache.service.invalidate_keys(cache.plans, list(cache.plans.entries)[:3], cache.clock.now())
    counts = cache.plans.counts
    gone = counts.evictions + counts.rejections + counts.expirations + counts.invalidations
    assert counts.sets == 100
    assert counts.sets - gone == len(cache.store)


def test_what_is_read_again_and_again_survives_a_scan() -> None:
    cache = Cache(Bounds(entries=100, size_bytes=10_000 * KB))
    hot = [f"hot{number}" for number in range(50)]
    for key in hot:
        cache.put(key)
    for _ in range(5):
        for key in hot:
            assert cache.find(key)
    for number in range(10_000):
        cache.put(f"scan{number}")
        if not number % 20:
            cache.find(hot[number // 20 % 50])
    kept = sum(cache.find(key) is not None for key in hot)
    assert kept >= 45


def test_yesterdays_favourites_make_room_for_todays() -> None:
    cache = Cache(Bounds(entries=100, size_bytes=10_000 * KB))
    for day in range(3):
        keys = [f"day{day}/{number}" for number in range(100)]
        for _ in range(60):
            for key in keys:
                if cache.find(key) is None:
                    cache.put(key)
        assert sum(cache.find(key) is not None for key in keys) >= 80


def test_a_newcomer_is_let_in_once_it_is_used_more_than_what_it_would_push_out() -> None:
    cache = Cache(Bounds(entries=2, size_bytes=1_000 * KB))
    cache.put("favourite")
    for _ in range(5):
        cache.find("favourite")
    rounds = 0
    while "favourite" in cache.plans.entries:
        cache.put("newcomer")
        cache.put(f"passing{rounds}")
        rounds += 1
        assert rounds < 20
    assert rounds == 7
    assert cache.value("newcomer") == b"v"


def test_a_former_favourite_has_to_earn_its_place_again() -> None:
    cache = Cache(Bounds(entries=10, size_bytes=1_000 * KB))
    now = cache.clock.now()
    cache.put("former")
    for _ in range(64):
        cache.find("former")
    cache.put("present")
    cache.service.delete(cache.plans, "former", now)
    cache.put("former")
    assert cache.find("former").reads == MAX_FREQUENCY
    cache.service.delete(cache.plans, "former", now)
    for _ in range(10_000):
        cache.find("present")
    cache.put("former")
    assert cache.find("former").reads == 1


@given(st.lists(st.tuples(st.integers(), st.integers(1, MAX_FREQUENCY)), max_size=300))
def test_how_often_a_key_was_used_is_never_remembered_as_less(
    uses: list[tuple[int, int]],
) -> None:
    sketch = FrequencySketch()
    most: dict[int, int] = {}
    for number, (key_hash, frequency) in enumerate(uses):
        sketch.record(key_hash, frequency)
        most[key_hash] = max(most.get(key_hash, 0), frequency)
        if number == len(uses) // 2:
            sketch.fit(5_000)
    for key_hash, frequency in most.items():
        assert frequency <= sketch.estimate(key_hash) <= MAX_FREQUENCY
    sketch.halve()
    for key_hash, frequency in most.items():
        assert sketch.estimate(key_hash) >= frequency // 2


def test_keys_that_were_never_used_are_told_from_those_that_were() -> None:
    sketch = FrequencySketch()
    sketch.fit(2_000)
    for number in range(1_000):
        sketch.record(hash(("used", number)), 8)
    strangers = [sketch.estimate(hash(("stranger", number))) for number in range(1_000)]
    assert sum(estimate > 0 for estimate in strangers) < 50


def test_a_large_newcomer_does_not_push_out_many_small_entries_that_are_used() -> None:
    cache = Cache(Bounds(entries=1_000, size_bytes=100 * KB))
    small = [f"s{number}" for number in range(90)]
    for key in small:
        cache.put(key, bytes(100))
    for _ in range(3):
        for key in small:
            cache.find(key)
    stored = cache.put("large", bytes(90 * KB))
    assert (stored.stored, stored.version) == (False, 0)
    assert all(cache.find(key) for key in small)


def test_a_refused_entry_is_not_served_and_leaves_nothing_behind() -> None:
    cache = Cache(Bounds(entries=1_000, size_bytes=100 * KB))
    for number in range(90):
        cache.put(f"s{number}", bytes(100))
        for _ in range(3):
            cache.find(f"s{number}")
    cache.put("large", bytes(90 * KB), tags=("big",))
    assert cache.value("large") is None
    assert "big" not in cache.plans.tags
    assert cache.plans.counts.rejections == 1


@pytest.mark.parametrize("grown", [3 * KB, 50 * KB, 90 * KB])
def test_an_entry_that_grows_pushes_others_out_or_goes_itself(grown: int) -> None:
    cache = Cache(Bounds(entries=1_000, size_bytes=100 * KB))
    for number in range(50):
        cache.put(f"k{number}", bytes(KB))
    stored = cache.put("k10", bytes(grown))
    assert cache.store.size_bytes <= 100 * KB
    assert cache.value("k10") == (bytes(grown) if stored.stored else None)
    held = cache.plans.entries.values()
    assert cache.store.size_bytes == sum(entry.size_bytes for entry in held)


def test_one_entry_may_fill_the_whole_store() -> None:
    cache = Cache(Bounds(entries=10, size_bytes=10 * KB))
    value = bytes(10 * KB - OVERHEAD_BYTES - 1)
    assert cache.put("k", value).stored
    assert cache.value("k") == value
    assert cache.store.size_bytes == 10 * KB


def test_a_tenants_eviction_is_counted_where_the_entry_was() -> None:
    cache = Cache(Bounds(entries=20, size_bytes=1_000 * KB))
    globex = cache.space("globex")
    for number in range(20):
        cache.put(f"k{number}")
    for number in range(200):
        for _ in range(2):
            cache.find(f"n{number}", space=globex)
        cache.put(f"n{number}", space=globex)
    for space in (cache.plans, globex):
        counts = space.counts
        assert counts.sets - counts.evictions - counts.rejections == len(space.entries)
        assert space.size_bytes == sum(entry.size_bytes for entry in space.entries.values())


def entry_of(number: int, size_bytes: int = KB) -> Entry:
    """An entry that is not held yet."""
    entry = Entry(Space("acme", "plans"), f"k{number}", number)
    entry.size_bytes = size_bytes
    return entry


def full_policy(entries: int, reads: int = 0) -> tuple[TinyLfu, list[Entry]]:
    """A policy that holds as many entries as it may, each read so often."""
    policy = TinyLfu(Bounds(entries, 10_000 * KB))
    held = [entry_of(number) for number in range(entries)]
    for entry in held:
        policy.add(entry)
    for _ in range(reads):
        policy.used(held)
    return policy, held


def test_an_entry_that_is_always_let_in_pushes_out_the_coldest() -> None:
    policy, held = full_policy(50, reads=5)
    policy.used(held[1:])
    newcomer = entry_of(1_000)
    outcome = policy.add(newcomer, always=True)
    assert outcome.admitted == [newcomer]
    assert not outcome.rejected
    assert outcome.evicted == [held[0]]
    refused = entry_of(1_001)
    for number in range(2_000, 2_010):
        policy.add(refused if number == 2_000 else entry_of(number))
    assert refused.segment is None
    assert newcomer.segment is not None


def test_what_is_always_let_in_makes_room_for_itself_among_the_small() -> None:
    policy, _ = full_policy(50, reads=5)
    policy.rebound(Bounds(50, 50 * KB))
    newcomer = entry_of(1_000, 10 * KB)
    outcome = policy.add(newcomer, always=True)
    assert len(outcome.evicted) == 10
    assert policy.size_bytes == 50 * KB


def test_what_is_larger_than_the_bounds_is_not_let_in_even_always() -> None:
    policy, held = full_policy(10)
    policy.rebound(Bounds(10, 20 * KB))
    newcomer = entry_of(1_000, 21 * KB)
    outcome = policy.add(newcomer, always=True)
    assert outcome.rejected == [newcomer]
    assert not outcome.evicted
    assert len(policy) == len(held)


def test_narrower_bounds_take_effect_with_shrink_and_the_coldest_go() -> None:
    policy, held = full_policy(100, reads=1)
    hot = held[20:60]
    for _ in range(3):
        policy.used(hot)
    policy.rebound(Bounds(50, 10_000 * KB))
    assert len(policy) == 100
    outcome = policy.shrink()
    assert len(policy) == 50
    assert len(outcome.evicted) == 50
    assert not outcome.rejected
    assert all(entry.segment is None for entry in outcome.evicted)
    assert all(entry.segment is not None for entry in hot)


def test_narrower_bounds_take_effect_with_the_next_entry_and_wider_ones_leave_room() -> None:
    policy, _ = full_policy(100, reads=1)
    policy.rebound(Bounds(50, 10_000 * KB))
    policy.add(entry_of(1_000))
    assert len(policy) == 50
    policy.rebound(Bounds(60, 10_000 * KB))
    assert policy.shrink() == ([], [], [])
    for number in range(2_000, 2_010):
        assert not policy.add(entry_of(number)).evicted
    assert len(policy) == 60


def test_a_policy_may_be_left_no_room_at_all() -> None:
    policy, held = full_policy(10)
    policy.rebound(Bounds(0, 0))
    assert len(policy.shrink().evicted) == len(held)
    newcomer = entry_of(1_000)
    outcome = policy.add(newcomer)
    assert [*outcome.evicted, *outcome.rejected] == [newcomer]
    assert (len(policy), policy.size_bytes) == (0, 0)


STEPS = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 30), st.sampled_from([1, 700, 5_000])),
    st.tuples(st.just("always"), st.integers(0, 30), st.sampled_from([1, 700, 5_000])),
    st.tuples(st.just("resize"), st.integers(0, 30), st.sampled_from([1, 700, 5_000])),
    st.tuples(st.just("use"), st.integers(0, 30), st.integers(1, 5)),
    st.tuples(st.just("remove"), st.integers(0, 30), st.none()),
    st.tuples(st.just("rebound"), st.integers(0, 20), st.sampled_from([0, 3_000, 20_000])),
)


@given(st.lists(STEPS, max_size=200))
def test_every_entry_is_held_within_the_bounds_or_went_exactly_once(
    steps: list[tuple[str, int, int]],
) -> None:
    policy = TinyLfu(Bounds(10, 10_000))
    held: dict[int, Entry] = {}
    for step, number, size in steps:
        entry = held.get(number)
        gone: list[Entry] = []
        if step in ("add", "always") and entry is None:
            held[number] = entry_of(number, size)
            outcome = policy.add(held[number], always=step == "always")
            gone = [*outcome.evicted, *outcome.rejected]
        elif step == "rebound":
            policy.rebound(Bounds(number, size))
            outcome = policy.shrink()
            assert not outcome.rejected
            gone = outcome.evicted
        elif entry is not None and step == "resize":
            before, entry.size_bytes = entry.size_bytes, size
            outcome = policy.resized(entry, before)
            gone = [*outcome.evicted, *outcome.rejected]
        elif entry is not None and step == "use":
            policy.used([entry] * size)
        elif entry is not None and step == "remove":
            policy.remove(held.pop(number))
        for each in gone:
            assert held.pop(each.key_hash) is each
            assert each.segment is None
        assert all(each.segment is not None for each in held.values())
        assert len(policy) == len(held) <= policy.bounds.entries
        assert policy.size_bytes == sum(each.size_bytes for each in held.values())
        assert policy.size_bytes <= policy.bounds.size_bytes


def test_a_copy_is_taken_where_there_is_room_or_when_the_key_comes_again() -> None:
    policy = TinyLfu(Bounds(2, 10 * KB))
    assert policy.wants_copy(1, KB)
    cache = Cache(Bounds(entries=2, size_bytes=1_000 * KB))
    for key in ("a", "b"):
        cache.put(key)
    payload = Payload(b"v", 60.0)
    assert not cache.store.wants_copy(cache.plans, "c", payload)
    assert cache.store.wants_copy(cache.plans, "c", payload)
    for number in range(5_000):
        cache.store.wants_copy(cache.plans, f"passing{number}", payload)
    assert not cache.store.wants_copy(cache.plans, "c", payload), "it was forgotten"
