"""The near cache's parts: which copies stay, and which answers may become copies."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from agent360.client import Lookup, NearCache, Outcome
from agent360.client.near_copies import ANY_VERSION, OVERHEAD_BYTES, Copies
from agent360.client.near_floors import REMEMBER_S, Floors
from agent360.client.near_tenant import NearTenant
from agent360.client.watching import Invalidation, Reset

ROOM = 2**20


def lookup(
    version: int = 1,
    value: bytes = b"v",
    *,
    ttl_s: float = 60.0,
    outcome: Outcome = Outcome.HIT,
    degraded: bool = False,
    fail_safe: bool = False,
) -> Lookup:
    return Lookup(outcome, value, "", version, ttl_s, (), degraded, fail_safe)


def put(copies: Copies, key: str, version: int = 1, **more: object) -> None:
    tags = more.pop("tags", ())
    expires = more.pop("expires", 100.0)
    tenant = str(more.pop("tenant", "acme"))
    found = lookup(version, **more)  # type: ignore[arg-type]
    copies.put(tenant, "n", key, found, tags, expires, expires, 0.0)  # type: ignore[arg-type]


def held(copies: Copies, keys: str, now: float = 0.0) -> str:
    """The keys of which there is a copy; marks none of them as used."""
    return "".join(key for key in keys if copies._there("acme", "n", key) is not None)


# ---------------------------------------------------------------- which copies stay


def test_the_oldest_unused_copy_goes_and_a_used_one_stays() -> None:
    copies = Copies(3, ROOM)
    for key in "abc":
        put(copies, key)
    copies.find("acme", "n", "a", 0.0)
    put(copies, "d")
    assert held(copies, "abcd") == "acd"
    put(copies, "e")
    assert held(copies, "abcde") == "ade"
    assert (copies.entries, copies.evictions) == (3, 2)


def test_a_scan_does_not_push_out_what_is_used_all_the_time() -> None:
    copies = Copies(100, ROOM)
    hot = [f"hot{n}" for n in range(50)]
    for key in hot:
        put(copies, key)
    for n in range(5_000):
        put(copies, f"once{n}")
        copies.find("acme", "n", hot[n % 50], 0.0)
    assert all(copies.find("acme", "n", key, 0.0) for key in hot)


def test_bytes_are_bounded_as_well_as_entries() -> None:
    copies = Copies(1_000, 100 * OVERHEAD_BYTES)
    for n in range(500):
        put(copies, f"k{n}", value=bytes(5 * OVERHEAD_BYTES))
        assert copies.size_bytes <= 100 * OVERHEAD_BYTES
    assert 10 < copies.entries < 20


def test_a_value_that_would_push_out_most_others_is_not_kept() -> None:
    copies = Copies(1_000, 80 * OVERHEAD_BYTES)
    put(copies, "small")
    put(copies, "large", value=bytes(10 * OVERHEAD_BYTES))
    assert held(copies, ["small", "large"]) == "small"  # type: ignore[arg-type]


def test_an_expired_copy_is_no_copy_and_is_counted_as_expired() -> None:
    copies = Copies(3, ROOM)
    put(copies, "a", expires=5.0)
    assert copies.find("acme", "n", "a", 4.9) is not None
    assert copies.find("acme", "n", "a", 5.0) is None
    assert (copies.entries, copies.size_bytes, copies.expired) == (0, 0, 1)


def test_tenants_and_namespaces_are_told_apart() -> None:
    copies = Copies(10, ROOM)
    put(copies, "k", value=b"acme")
    put(copies, "k", value=b"globex", tenant="globex")
    found = copies.find("acme", "n", "k", 0.0)
    assert found is not None
    assert found.value == b"acme"
    assert copies.find("acme", "other", "k", 0.0) is None
    copies.drop_tenant("acme")
    assert copies.find("globex", "n", "k", 0.0) is not None


def test_a_later_version_replaces_a_copy_and_an_earlier_one_does_not() -> None:
    copies = Copies(10, ROOM)
    put(copies, "k", 2, value=b"2")
    put(copies, "k", 1, value=b"1")
    assert copies.find("acme", "n", "k", 0.0).value == b"2"  # type: ignore[union-attr]
    put(copies, "k", 3, value=b"3")
    assert copies.find("acme", "n", "k", 0.0).value == b"3"  # type: ignore[union-attr]
    assert (copies.entries, copies.stored, copies.invalidated) == (1, 2, 1)


def test_an_invalidation_by_tag_takes_copies_whose_tags_are_not_known() -> None:
    copies = Copies(10, ROOM)
    put(copies, "a", tags=("x", "y"))
    put(copies, "b", tags=("z",))
    put(copies, "c", tags=None)
    copies.drop_tags("acme", "n", ["x", "y"], ANY_VERSION)
    assert held(copies, "abc") == "b"


def test_an_invalidation_spares_copies_of_later_versions() -> None:
    copies = Copies(10, ROOM)
    put(copies, "a1", 5, tags=("x",))
    put(copies, "a2", 6, tags=("x",))
    copies.drop_prefix("acme", "n", "a", 5)
    copies.drop_tags("acme", "n", ["x"], 5)
    copies.drop_namespace("acme", "n", 5)
    copies.drop_key("acme", "n", "a2", 5)
    assert copies.find("acme", "n", "a1", 0.0) is None
    assert copies.find("acme", "n", "a2", 0.0) is not None


KEYS = st.sampled_from(["a", "ab", "abc", "b", "ba", "c"])
TAGS = st.lists(st.sampled_from("xyz"), max_size=2, unique=True).map(tuple)
VERSIONS = st.integers(1, 9)


class CopiesAgainstADict(RuleBasedStateMachine):
    """Copies may forget what a dict holds, and hold nothing else."""

    @initialize(bound=st.sampled_from([1, 2, 4, 100]))
    def begin(self, bound: int) -> None:
        self.bound = bound
        self.copies = Copies(bound, ROOM)
        self.model: dict[str, tuple[int, tuple[str, ...], float, bytes]] = {}
        self.now = 0.0
        self.puts = 0

    @rule(key=KEYS, version=VERSIONS, tags=TAGS, ttl=st.integers(1, 30))
    def put(self, key: str, version: int, tags: tuple[str, ...], ttl: int) -> None:
        self.puts += 1
        value, ends = b"%d" % self.puts, self.now + ttl
        there = self.model.get(key)
        self.copies.put("t", "n", key, lookup(version, value), tags, ends, ends, self.now)
        copy = self.copies._there("t", "n", key)
        assert copy is not None
        if copy.value == value:
            self.model[key] = (version, tags, ends, value)
        elif there is not None and there[:2] == (version, tags):
            self.model[key] = (version, tags, max(there[2], ends), there[3])

    @rule(key=KEYS)
    def find(self, key: str) -> None:
        found = self.copies.find("t", "n", key, self.now)
        if found is not None:
            version, tags, expires, value = self.model[key]
            assert self.now < expires
            assert (found.version, found.tags, found.value) == (version, tags, value)

    @rule(seconds=st.integers(1, 10))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(key=KEYS, version=VERSIONS)
    def drop_key(self, key: str, version: int) -> None:
        self.copies.drop_key("t", "n", key, version)
        self.drop({key}, version)

    @rule(prefix=st.sampled_from(["a", "ab", "b"]), version=VERSIONS)
    def drop_prefix(self, prefix: str, version: int) -> None:
        self.copies.drop_prefix("t", "n", prefix, version)
        self.drop({key for key in self.model if key.startswith(prefix)}, version)

    @rule(tags=TAGS, version=VERSIONS)
    def drop_tags(self, tags: tuple[str, ...], version: int) -> None:
        self.copies.drop_tags("t", "n", tags, version)
        self.drop({key for key in self.model if set(self.model[key][1]) & set(tags)}, version)

    @rule(version=VERSIONS)
    def drop_namespace(self, version: int) -> None:
        self.copies.drop_namespace("t", "n", version)
        self.drop(set(self.model), version)

    @rule()
    def drop_tenant(self) -> None:
        self.copies.drop_tenant("t")
        self.model.clear()
        assert (self.copies.entries, self.copies.size_bytes, self.copies._tenants) == (0, 0, {})

    def drop(self, keys: set[str], version: int) -> None:
        for key in keys & self.model.keys():
            if self.model[key][0] <= version:
                del self.model[key]
                assert self.copies._there("t", "n", key) is None

    @invariant()
    def counts_are_exact(self) -> None:
        copies = self.copies
        assert copies.entries <= self.bound
        spaces = copies._tenants.get("t", {}).values()
        assert copies.entries == sum(len(space.copies) for space in spaces)
        gone = copies.evictions + copies.expired + copies.invalidated
        assert copies.stored == copies.entries + gone

    @invariant()
    def nothing_is_forgotten_while_there_is_room(self) -> None:
        if self.bound == 100:
            for key, (_, _, expires, _) in self.model.items():
                there = self.copies._there("t", "n", key)
                assert self.now >= expires or (there is not None and there.expires == expires)


TestCopiesAgainstADict = CopiesAgainstADict.TestCase
TestCopiesAgainstADict.settings = settings(deadline=None)


# ---------------------------------------------------------------- which answers may become copies


def opened(max_floors: int = 100) -> Floors:
    floors = Floors(max_floors)
    floors.open(0.0)
    return floors


def test_floors_allow_nothing_before_they_are_opened_or_after_they_are_closed() -> None:
    floors = Floors()
    assert not floors.allow("n", "k", 9, sent=1e9, now=1e9)
    floors.open(5.0)
    assert not floors.allow("n", "k", 9, sent=4.9, now=6.0)
    assert floors.allow("n", "k", 9, sent=5.0, now=6.0)
    floors.close()
    assert not floors.allow("n", "k", 9, sent=7.0, now=7.0)


def test_an_answer_up_to_an_invalidated_version_is_refused_for_a_while() -> None:
    floors = opened()
    floors.raise_key("n", "k", 7, now=1.0)
    for now in (1.0, 1.0 + REMEMBER_S - 0.1):
        assert not floors.allow("n", "k", 7, sent=now, now=now)
        assert floors.allow("n", "k", 8, sent=now, now=now)
        assert floors.allow("n", "other", 7, sent=now, now=now)
    later = 1.0 + REMEMBER_S
    assert floors.allow("n", "k", 7, sent=later, now=later)


def test_an_answer_that_took_longer_than_floors_are_remembered_is_refused() -> None:
    assert not opened().allow("n", "k", 9, sent=1.0, now=1.1 + REMEMBER_S)


def test_a_floor_is_never_lowered() -> None:
    floors = opened()
    floors.raise_key("n", "k", 7, now=1.0, barrier=3.0)
    floors.raise_key("n", "k", 5, now=2.0)
    assert not floors.allow("n", "k", 7, sent=3.0, now=3.0)
    assert not floors.allow("n", "k", 8, sent=2.9, now=3.0)
    assert floors.allow("n", "k", 8, sent=3.0, now=3.0)


def test_a_namespace_is_barred_alone() -> None:
    floors = opened()
    floors.bar_namespace("n", barrier=2.0, now=1.0, version=7)
    assert not floors.allow("n", "k", 9, sent=1.9, now=2.0)
    assert not floors.allow("n", "k", 7, sent=2.0, now=2.0)
    assert floors.allow("n", "k", 8, sent=2.0, now=2.0)
    assert floors.allow("other", "k", 1, sent=1.5, now=2.0)


def test_floors_that_had_to_go_early_pause_all_for_the_rest_of_their_time() -> None:
    floors = opened(max_floors=10)
    for n in range(11):
        floors.raise_key("n", f"k{n}", 7, now=1.0)
    assert len(floors) == 10
    end = 1.0 + REMEMBER_S
    assert not floors.allow("n", "elsewhere", 9, sent=end - 0.1, now=end)
    assert floors.allow("n", "elsewhere", 9, sent=end, now=end)


def test_floors_are_forgotten_in_time_and_take_bounded_memory() -> None:
    floors = opened(max_floors=10)
    for n in range(1_000):
        floors.raise_key("n", f"k{n}", 7, now=float(n) * REMEMBER_S)
    assert len(floors) == 1
    assert floors.allow("n", "k", 1, sent=1e6, now=1e6)


# ---------------------------------------------------------------- a tenant's copies and its watch


def tenant(copies: Copies, **more: float) -> NearTenant:
    bounds = {"max_ttl_s": 60.0, "lag_s": 0.0, "max_silence_s": 40.0, **more}
    return NearTenant("t", copies, **bounds)


def kept(near: NearTenant, found: Lookup, now: float = 1.0, sent: float | None = None) -> bool:
    near.keep("n", "k", found, (), now if sent is None else sent, now)
    return near.find("n", "k", now) is not None


@pytest.mark.parametrize(
    "found",
    [
        lookup(outcome=Outcome.STALE, ttl_s=0.0),
        lookup(outcome=Outcome.MISS),
        lookup(degraded=True),
        lookup(fail_safe=True),
        lookup(ttl_s=0.0),
    ],
)
def test_only_fresh_entries_that_all_replicas_hold_are_kept(found: Lookup) -> None:
    near = tenant(Copies(10, ROOM))
    near.hear(None, 0.0)
    assert not kept(near, found)


def test_a_stored_empty_value_is_kept() -> None:
    near = tenant(Copies(10, ROOM))
    near.hear(None, 0.0)
    assert kept(near, lookup(value=b""))


def test_nothing_is_kept_before_the_watch_is_live_nor_of_requests_sent_before() -> None:
    near = tenant(Copies(10, ROOM), lag_s=1.0)
    assert not kept(near, lookup())
    near.hear(None, 2.0)
    assert not kept(near, lookup(), now=3.5, sent=2.9)
    assert kept(near, lookup(), now=3.5, sent=3.0)


def test_all_is_dropped_at_once_when_the_watch_is_lost() -> None:
    copies = Copies(10, ROOM)
    near = tenant(copies)
    near.hear(None, 0.0)
    assert kept(near, lookup())
    near.lose()
    assert copies.entries == 0
    assert not kept(near, lookup())
    near.hear(None, 2.0)
    assert not kept(near, lookup(), now=2.5, sent=1.9)


def test_silence_ends_trust_even_before_anyone_notices() -> None:
    copies = Copies(10, ROOM)
    near = tenant(copies, max_silence_s=5.0)
    near.hear(None, 0.0)
    assert kept(near, lookup())
    assert near.find("n", "k", 4.9) is not None
    assert near.find("n", "k", 5.0) is None
    near.keep("n", "other", lookup(), (), 5.0, 5.0)
    near.hear(None, 6.0)
    assert copies.entries == 0


def test_a_copy_outlives_neither_its_entry_nor_the_longest_time() -> None:
    near = tenant(Copies(10, ROOM), max_ttl_s=10.0, max_silence_s=math.inf)
    near.hear(None, 0.0)
    near.keep("n", "short", lookup(ttl_s=3.0), (), 1.0, 2.0)
    near.keep("n", "long", lookup(ttl_s=99.0), (), 1.0, 2.0)
    assert near.find("n", "short", 3.9) is not None
    assert near.find("n", "short", 4.0) is None
    found = near.find("n", "long", 10.9)
    assert found is not None
    assert found.fresh_until == 100.0
    assert near.find("n", "long", 11.0) is None


def test_an_answer_that_was_on_its_way_while_its_key_was_written_is_not_kept() -> None:
    near = tenant(Copies(10, ROOM))
    near.hear(None, 0.0)
    near.hear(Invalidation("n", 7, keys=("k",)), 1.0)
    assert not kept(near, lookup(7), now=1.5, sent=0.5)
    assert kept(near, lookup(8), now=1.5, sent=0.5)


@pytest.mark.parametrize(
    "event",
    [
        Invalidation("n", 7, prefix="k"),
        Invalidation("n", 7, tags=("x",)),
        Invalidation("n", 7, all=True),
        Invalidation("n", 0, keys=("k",)),
        Reset("too far behind"),
    ],
)
def test_what_cannot_be_told_by_version_pauses_for_the_lag_of_replicas(event: object) -> None:
    copies = Copies(10, ROOM)
    near = tenant(copies, lag_s=1.0)
    near.hear(None, -2.0)
    near.keep("n", "k", lookup(7), ("x",), 0.0, 0.0)
    assert copies.entries == 1
    near.hear(event, 1.0)  # type: ignore[arg-type]
    assert copies.entries == 0
    assert not kept(near, lookup(9), now=2.0, sent=1.9)
    assert kept(near, lookup(9), now=2.0, sent=2.0)


def test_an_own_write_drops_older_copies_and_refuses_older_answers() -> None:
    near = tenant(Copies(10, ROOM))
    near.hear(None, 0.0)
    assert kept(near, lookup(3))
    near.note_write("n", "k", 5, 2.0)
    assert near.find("n", "k", 2.0) is None
    assert not kept(near, lookup(4), now=3.0)
    assert kept(near, lookup(5), now=3.0)
    near.note_write("n", "k", 5, 3.0)
    assert near.find("n", "k", 3.0) is not None
    near.note_write("n", "k", 0, 4.0)
    assert not kept(near, lookup(5), now=4.5, sent=3.9)
    assert kept(near, lookup(5), now=4.5, sent=4.0)


RARELY = st.sampled_from([True, *[False] * 9])


class NearTenantAgainstTheService(RuleBasedStateMachine):
    """A service of two replicas, one of them up to 1 s behind; answers and events in any order.

    What was heard to be outdated is never served.
    """

    @initialize(max_floors=st.integers(1, 5))
    def begin(self, max_floors: int) -> None:
        self.near = tenant(Copies(3, ROOM), lag_s=1.0, max_silence_s=1e9)
        self.near._floors = Floors(max_floors)
        self.now = 0.0
        self.last = 1
        self.versions = dict.fromkeys("abc", 1)
        self.history = [(-math.inf, dict(self.versions))]
        self.events: list[Invalidation] = []
        self.asked: list[tuple[str, int, float]] = []
        self.heard = dict.fromkeys("abc", 0)
        self.live = False
        self.deliver(0)
        self.wait(1.0)

    @rule(key=st.sampled_from("abc"))
    def write(self, key: str) -> None:
        self.last += 1
        self.versions[key] = self.last
        self.history.append((self.now, dict(self.versions)))
        self.events.append(Invalidation("n", self.last - 1, keys=(key,)))

    @rule(scope=st.sampled_from(["prefix", "tags", "all", *[""] * 9]))
    def invalidate_and_write_all(self, scope: str) -> None:
        if not scope:
            return
        version = self.last + 1
        self.last += 2
        self.versions = dict.fromkeys("abc", self.last)
        self.history.append((self.now, dict(self.versions)))
        if scope == "prefix":
            event = Invalidation("n", version, prefix="")
        elif scope == "tags":
            event = Invalidation("n", version, tags=("x",))
        else:
            event = Invalidation("n", version, all=True)
        self.events.append(event)

    @rule(key=st.sampled_from("abc"), behind=st.booleans())
    def ask(self, key: str, behind: bool) -> None:
        seen_at = self.now - 1.0 if behind else self.now
        seen = next(state for at, state in reversed(self.history) if at <= seen_at)
        self.asked.append((key, seen[key], self.now))

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        key, version, sent = self.asked.pop(data.draw(st.integers(0, len(self.asked) - 1)))
        self.near.keep("n", key, lookup(version), ("x",), sent, self.now)

    @rule(count=st.integers(0, 3))
    def deliver(self, count: int) -> None:
        if not self.live:
            self.note_heard(len(self.events))
            self.near.hear(None, self.now)
            self.live = True
        for event in self.events[:count]:
            self.near.hear(event, self.now)
        self.note_heard(count)

    @rule(it_happens=RARELY)
    def reset(self, it_happens: bool) -> None:
        if not it_happens:
            return
        self.note_heard(len(self.events))
        self.near.hear(Reset("too far behind"), self.now)
        self.live = True

    @rule(it_happens=RARELY)
    def lose(self, it_happens: bool) -> None:
        if it_happens:
            self.near.lose()
            self.live = False

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 1.5, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def note_heard(self, count: int) -> None:
        """Events that were delivered, or that a watch which begins anew makes up for."""
        for event in self.events[:count]:
            for key in event.keys or "abc":
                self.heard[key] = max(self.heard[key], event.version)
        del self.events[:count]

    @invariant()
    def nothing_outdated_is_served(self) -> None:
        for key in "abc":
            copy = self.near.find("n", key, self.now)
            assert copy is None or copy.version > self.heard[key]


TestNearTenantAgainstTheService = NearTenantAgainstTheService.TestCase
TestNearTenantAgainstTheService.settings = settings(
    max_examples=300, stateful_step_count=80, deadline=None
)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options",
    [
        {"max_entries": 0},
        {"max_bytes": -1},
        {"max_ttl": 0.0},
        {"max_tenants": 0},
        {"max_silence": math.nan},
        {"replica_lag": -1.0},
        {"namespaces": "plans"},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"near_cache.{next(iter(options))}"):
        NearCache(**options)  # type: ignore[arg-type]
