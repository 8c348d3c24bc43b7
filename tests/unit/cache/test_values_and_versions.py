"""What is stored comes back as it was, under a version that only grows."""

import pytest
from support.cache_domain import Cache

from agent360.client.errors import InvalidRequestError, MeshError
from agent360.mesh.cache.admission import Bounds
from agent360.mesh.cache.changes import Condition, Stored
from agent360.mesh.cache.entry import OVERHEAD_BYTES, Payload


@pytest.mark.parametrize("value", [b"", b"\x00", b"null", b"NOT FOUND"])
def test_an_empty_or_negative_value_is_a_hit(value: bytes) -> None:
    cache = Cache()
    cache.put("k", value)
    assert cache.value("k") == value
    assert (cache.plans.counts.hits, cache.plans.counts.misses) == (1, 0)


def test_an_empty_value_that_was_filled_in_is_a_hit() -> None:
    cache = Cache()
    claimed = cache.service.claim(cache.plans, "k", False, 5.0, cache.clock.now())
    cache.service.fill(
        "acme", claimed.grant.token, "plans", "k", Payload(b"", 60.0), cache.clock.now()
    )
    found = cache.service.claim(cache.plans, "k", False, 5.0, cache.clock.now())
    assert (found.entry.value, found.grant) == (b"", None)


def test_content_type_and_tags_come_back_with_the_value() -> None:
    cache = Cache()
    payload = Payload(b"{}", 60.0, 0.0, "application/json", ("a", "b", "a"))
    cache.service.write(cache.plans, "k", payload, cache.clock.now())
    entry = cache.find("k")
    assert (entry.content_type, entry.tags) == ("application/json", ("a", "b"))


def test_versions_grow_over_all_keys_namespaces_and_tenants() -> None:
    cache = Cache()
    other = cache.space("globex", "answers")
    versions = [
        cache.put(f"k{number % 3}", space=other if number % 2 else None).version
        for number in range(20)
    ]
    assert versions == sorted(set(versions))
    assert cache.find("k1", space=other).version == versions[19]


def test_versions_grow_while_the_computers_clock_goes_backwards() -> None:
    cache = Cache()
    first = cache.put("k").version
    cache.clock.wall_offset_us -= 3_600_000_000
    assert cache.put("k").version > first


def test_versions_are_above_those_of_the_process_that_ran_before() -> None:
    before = Cache()
    last = [before.put("k").version for _ in range(50)][-1]
    after = Cache()
    after.clock.advance(1.0)
    assert after.put("k").version > last


def test_a_write_if_absent_takes_effect_once_until_the_entry_is_over() -> None:
    cache = Cache()
    now = cache.clock.now

    def write(value: bytes) -> Stored:
        payload = Payload(value, 5.0, 5.0)
        return cache.service.write(cache.plans, "k", payload, now(), Condition.IF_ABSENT)

    stored, version, _ = write(b"1")
    assert stored
    assert write(b"2") == Stored(False, version)
    assert cache.value("k") == b"1"
    cache.clock.advance(5.0)
    assert write(b"3").stored, "a stale entry counts as absent"
    assert cache.value("k") == b"3"


def test_a_write_if_version_takes_effect_only_on_that_version() -> None:
    cache = Cache()

    def write(value: bytes, version: int) -> Stored:
        return cache.service.write(
            cache.plans,
            "k",
            Payload(value, 60.0),
            cache.clock.now(),
            Condition.IF_VERSION,
            version,
        )

    assert write(b"0", 7) == Stored(False, 0)
    first = write(b"1", 0)
    assert first.stored
    assert write(b"x", 0) == Stored(False, first.version)
    second = write(b"2", first.version)
    assert second.stored
    assert write(b"x", first.version) == Stored(False, second.version)
    assert cache.value("k") == b"2"


def test_a_delete_says_whether_there_was_an_entry() -> None:
    cache = Cache()
    cache.put("k")
    now = cache.clock.now()
    assert cache.service.delete(cache.plans, "k", now)
    assert not cache.service.delete(cache.plans, "k", now)
    assert cache.value("k") is None


def test_an_entry_larger_than_the_whole_store_is_refused_and_leaves_the_old_one() -> None:
    cache = Cache(Bounds(entries=10, size_bytes=4_000))
    cache.put("k", b"small")
    with pytest.raises(InvalidRequestError, match=r"entry\.value"):
        cache.put("k", bytes(4_000 - OVERHEAD_BYTES))
    assert cache.value("k") == b"small"


def test_a_tenant_may_have_so_many_namespaces_and_reads_of_more_are_misses() -> None:
    cache = Cache(max_namespaces=2)
    cache.space("acme", "second")
    with pytest.raises(MeshError) as caught:
        cache.space("acme", "third")
    assert caught.value.reason == "NAMESPACES_EXHAUSTED"
    unknown = cache.service.space_to_read("acme", "third")
    assert cache.find("k", space=unknown) is None
    assert set(cache.service.spaces("acme")) == {"plans", "second"}
    cache.space("globex", "third")
