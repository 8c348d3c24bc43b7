"""The cache against a dictionary: it may forget for want of room, it never answers wrongly."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)
from support.cache_domain import Cache, at_once

from agent360.mesh.cache.admission import Bounds
from agent360.mesh.cache.changes import Condition, Stored
from agent360.mesh.cache.claims import Claim
from agent360.mesh.cache.entry import Entry, Payload, size_of

Place = tuple[str, str]
"""A tenant and its namespace."""

PLACES = st.tuples(st.sampled_from(["acme", "globex"]), st.sampled_from(["plans", "answers"]))
KEYS = st.sampled_from(["a", "a/1", "a/2", "a/2/x", "b", "b/1", "ä", ""])
PREFIXES = st.sampled_from(["a", "a/", "a/2", "b/", "c"])
TAGS = st.lists(st.sampled_from(["x", "y", "z"]), max_size=2, unique=True).map(tuple)
TTLS = st.sampled_from([0.3, 1.0, 2.5, 60.0])
STALE_TTLS = st.sampled_from([0.0, 0.5, 10.0])
SIZES = st.sampled_from([0, 1, 200, 1_500, 4_000])
BOUNDS = st.builds(Bounds, st.sampled_from([4, 12, 1_000]), st.sampled_from([6_000, 2**20]))


@dataclass(frozen=True, slots=True)
class Row:
    """What the model remembers of an entry."""

    payload: Payload
    version: int
    fresh_until: float
    gone_at: float


@dataclass(slots=True)
class Filling:
    """What the model remembers of an open claim."""

    place: Place
    key: str
    ends: float
    void_tags: set[str]


class CacheAgainstAModel(RuleBasedStateMachine):
    """Invariant: after each rule ``rows`` holds exactly the entries that the cache holds.

    What the cache let go of for want of room is taken from ``rows`` only against its own count of
    evictions and refusals.
    """

    tokens = Bundle("tokens")

    @initialize(bounds=BOUNDS)
    def begin(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.cache = Cache(bounds)
        self.rows: dict[tuple[Place, str], Row] = {}
        self.fillings: dict[str, Filling] = {}
        self.lost: dict[Place, int] = {}
        self.unreclaimed = False
        self.last_version = 0
        self.made = 0

    # ---------------------------------------------------------------- reading

    @rule(place=PLACES, key=KEYS, stale=st.booleans())
    def get(self, place: Place, key: str, stale: bool) -> None:
        space = self.cache.service.space_to_read(*place)
        self.check_answer(place, key, self.cache.find(key, stale=stale, space=space), stale)

    # ---------------------------------------------------------------- writing

    @rule(
        place=PLACES,
        key=KEYS,
        size=SIZES,
        ttl_s=TTLS,
        stale_ttl_s=STALE_TTLS,
        tags=TAGS,
        condition=st.sampled_from(Condition),
        right_version=st.booleans(),
    )
    def set(
        self,
        place: Place,
        key: str,
        size: int,
        ttl_s: float,
        stale_ttl_s: float,
        tags: tuple[str, ...],
        condition: Condition,
        right_version: bool,
    ) -> None:
        row = self.row(place, key)
        version = 0 if row is None else row.version
        if_version = version if right_version else version + 1
        holds = (
            condition is Condition.ALWAYS
            or (condition is Condition.IF_VERSION and right_version)
            or (condition is Condition.IF_ABSENT and (row is None or self.now >= row.fresh_until))
        )
        payload = Payload(self.new_value(place, key, size), ttl_s, stale_ttl_s, "", tags)
        stored = self.cache.service.write(
            self.cache.space(*place), key, payload, self.now, condition, if_version
        )
        if not holds:
            assert stored == Stored(False, version)
            return
        self.close_filling(place, key)
        self.note_write(place, key, payload, stored)

    @rule(place=PLACES, key=KEYS)
    def delete(self, place: Place, key: str) -> None:
        there = self.row(place, key) is not None
        assert self.cache.service.delete(self.cache.space(*place), key, self.now) is there
        self.forget(place, lambda name, _: name == key)

    # ---------------------------------------------------------------- claims

    @rule(
        target=tokens,
        place=PLACES,
        key=KEYS,
        stale=st.booleans(),
        timeout_s=st.sampled_from([0.5, 5.0]),
    )
    def claim(self, place: Place, key: str, stale: bool, timeout_s: float) -> object:
        found = self.cache.service.claim(self.cache.space(*place), key, stale, timeout_s, self.now)
        open_already = self.token_of(place, key) is not None
        if isinstance(found, Claim):
            assert open_already
            self.check_answer(place, key, None, stale)
            return multiple()
        self.check_answer(place, key, found.entry, stale)
        row = self.row(place, key)
        fresh = row is not None and self.now < row.fresh_until
        assert (found.grant is not None) is not (open_already or fresh)
        if found.grant is None:
            return multiple()
        token = found.grant.token
        self.fillings[token] = Filling(place, key, self.now + timeout_s, set())
        return (token, place, key)

    @rule(claimed=tokens, size=SIZES, ttl_s=TTLS, tags=TAGS, by_stranger=st.booleans())
    def fill(
        self,
        claimed: tuple[str, Place, str],
        size: int,
        ttl_s: float,
        tags: tuple[str, ...],
        by_stranger: bool,
    ) -> None:
        token, place, key = claimed
        tenant = "stranger" if by_stranger else place[0]
        payload = Payload(self.new_value(place, key, size), ttl_s, 0.0, "", tags)
        stored = self.cache.service.fill(tenant, token, place[1], key, payload, self.now)
        filling = self.fillings.get(token)
        if filling is None or by_stranger:
            assert not stored.stored
            return
        del self.fillings[token]
        if filling.void_tags.intersection(tags):
            assert stored == Stored(False, 0)
        else:
            self.note_write(place, key, payload, stored)

    @rule(claimed=tokens)
    def give_up(self, claimed: tuple[str, Place, str]) -> None:
        token, place, _ = claimed
        self.cache.service.give_up(place[0], token)
        self.fillings.pop(token, None)

    # ---------------------------------------------------------------- invalidation

    @rule(place=PLACES, keys=st.lists(KEYS, min_size=1, max_size=4))
    def invalidate_keys(self, place: Place, keys: list[str]) -> None:
        removed = self.cache.service.invalidate_keys(self.cache.space(*place), keys, self.now)
        assert removed == self.forget(place, lambda key, _: key in keys)

    @rule(place=PLACES, prefix=PREFIXES)
    def invalidate_prefix(self, place: Place, prefix: str) -> None:
        # Entries that are over but not swept yet are removed, and counted, too.
        removed = at_once(self.cache.service.invalidate_prefix(self.cache.space(*place), prefix))
        assert removed >= self.forget(place, lambda key, _: key.startswith(prefix))

    @rule(place=PLACES, tags=TAGS)
    def invalidate_tags(self, place: Place, tags: tuple[str, ...]) -> None:
        removed = at_once(self.cache.service.invalidate_tags(self.cache.space(*place), tags))
        fillings = [each for each in self.fillings.values() if each.place == place]
        for filling in fillings:
            filling.void_tags.update(tags)
        tagged = self.forget_rows(place, lambda _, row: not set(tags).isdisjoint(row.payload.tags))
        assert removed >= tagged

    @rule(place=PLACES)
    def invalidate_all(self, place: Place) -> None:
        self.cache.service.invalidate_all(self.cache.space(*place))
        self.unreclaimed = True
        self.forget(place, lambda *_: True)

    # ---------------------------------------------------------------- time

    @rule(seconds=st.sampled_from([0.1, 0.3, 1.0, 3.0, 30.0, 100.0]))
    def pass_time(self, seconds: float) -> None:
        self.cache.clock.advance(seconds)
        for (place, key), row in list(self.rows.items()):
            if self.now >= row.gone_at:
                del self.rows[place, key]
        for token, filling in list(self.fillings.items()):
            if self.now >= filling.ends:
                del self.fillings[token]

    @rule()
    def sweep(self) -> None:
        self.cache.sweep()
        self.unreclaimed = False

    # ---------------------------------------------------------------- what holds at all times

    @invariant()
    def nothing_is_missing_but_what_was_pushed_out(self) -> None:
        for place, key in list(self.rows):
            if key not in self.cache.space(*place).entries:
                del self.rows[place, key]
                self.lost[place] = self.lost.get(place, 0) + 1
        for place, lost in self.lost.items():
            counts = self.cache.space(*place).counts
            assert lost <= counts.evictions + counts.rejections

    @invariant()
    def what_is_held_is_what_was_written_last(self) -> None:
        for place, space in self.spaces():
            for key, entry in space.entries.items():
                row = self.row(place, key)
                if row is None:
                    assert self.now >= entry.gone_at, "only what is over may wait to be swept"
                else:
                    assert entry.value == row.payload.value
                    assert entry.version == row.version
                    assert entry.space is space

    @invariant()
    def bytes_and_entries_add_up_within_the_bounds(self) -> None:
        total = count = 0
        for _, space in self.spaces():
            size = 0
            tags: dict[str, set[str]] = {}
            for key, entry in space.entries.items():
                size += size_of(key, Payload(entry.value, 0.0, 0.0, entry.content_type, entry.tags))
                for tag in entry.tags:
                    tags.setdefault(tag, set()).add(key)
            assert space.size_bytes == size
            assert {tag: {each.key for each in held} for tag, held in space.tags.items()} == tags
            total += size
            count += len(space.entries)
        store = self.cache.store
        assert store.size_bytes <= self.bounds.size_bytes
        assert len(store) <= self.bounds.entries
        if self.unreclaimed:
            assert (store.size_bytes, len(store)) >= (total, count)
        else:
            assert (store.size_bytes, len(store)) == (total, count)

    # ---------------------------------------------------------------- the model

    @property
    def now(self) -> float:
        return self.cache.clock.now()

    def spaces(self):
        for tenant in ("acme", "globex"):
            for name, space in self.cache.service.spaces(tenant).items():
                yield (tenant, name), space

    def row(self, place: Place, key: str) -> Row | None:
        return self.rows.get((place, key))

    def new_value(self, place: Place, key: str, size: int) -> bytes:
        """A value that no other entry ever had, and that says whose it is."""
        self.made += 1
        return f"{place} {key} {self.made}".encode() + bytes(size)

    def check_answer(self, place: Place, key: str, entry: Entry | None, stale: bool) -> None:
        row = self.row(place, key)
        if row is None or self.now >= (row.gone_at if stale else row.fresh_until):
            assert entry is None
        else:
            assert entry is not None
            assert (entry.value, entry.version) == (row.payload.value, row.version)

    def note_write(self, place: Place, key: str, payload: Payload, stored: Stored) -> None:
        if not stored.stored:
            assert stored.version == 0
            counts = self.cache.space(*place).counts
            assert counts.evictions + counts.rejections > self.lost.get(place, 0)
            self.lost[place] = self.lost.get(place, 0) + 1
            self.rows.pop((place, key), None)
            return
        assert stored.version > self.last_version
        self.last_version = stored.version
        fresh_until = self.now + payload.ttl_s
        self.rows[place, key] = Row(
            payload, stored.version, fresh_until, fresh_until + payload.stale_ttl_s
        )

    def token_of(self, place: Place, key: str) -> str | None:
        for token, filling in self.fillings.items():
            if (filling.place, filling.key) == (place, key):
                return token
        return None

    def close_filling(self, place: Place, key: str) -> None:
        token = self.token_of(place, key)
        if token is not None:
            del self.fillings[token]

    def forget(self, place: Place, concerned) -> int:
        """Drops rows and open claims; returns how many rows."""
        for token, filling in list(self.fillings.items()):
            if filling.place == place and concerned(filling.key, None):
                del self.fillings[token]
        return self.forget_rows(place, concerned)

    def forget_rows(self, place: Place, concerned) -> int:
        gone = [
            (where, key)
            for (where, key), row in self.rows.items()
            if where == place and concerned(key, row)
        ]
        for each in gone:
            del self.rows[each]
        return len(gone)


TestTheCacheAgainstAModel = CacheAgainstAModel.TestCase
TestTheCacheAgainstAModel.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None
)
