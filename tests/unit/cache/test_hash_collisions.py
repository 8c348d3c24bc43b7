"""Keys with the same hash are not the same key, and tenants never meet in one."""

from __future__ import annotations

import itertools

import pytest
from support.cache_domain import Cache, at_once

from agent360.mesh.cache.admission import Bounds
from agent360.mesh.cache.entry import Payload, Space


class SameHash(str):
    """A text whose hash is that of every other of its kind."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other)

    def __hash__(self) -> int:
        return 42


def colliding(bounds: Bounds | None = None) -> tuple[Cache, Space, Space]:
    """A cache in which all keys of all tenants have one hash, for dictionaries and policy alike."""
    cache = Cache(bounds or Bounds(1_000, 2**20), hash_key=lambda _: 42)
    spaces = cache.space(SameHash("acme")), cache.space(SameHash("globex"))
    for space in spaces:
        space.salt = 0
    return cache, *spaces


def test_the_collision_is_real() -> None:
    cache, acme, globex = colliding()
    cache.put(SameHash("k"), space=acme)
    cache.put(SameHash("l"), space=globex)
    held = [*acme.entries.values(), *globex.entries.values()]
    assert len({entry.key_hash for entry in held}) == 1
    assert len({hash(entry.key) for entry in held}) == 1
    assert hash(acme.tenant) == hash(globex.tenant)


def test_a_tenant_never_reads_an_entry_of_another_whose_key_has_the_same_hash() -> None:
    cache, acme, globex = colliding()
    cache.put(SameHash("k"), b"of acme", space=acme)
    assert cache.find(SameHash("k"), space=globex) is None
    assert cache.find(SameHash("l"), space=globex) is None
    cache.put(SameHash("k"), b"of globex", space=globex)
    assert cache.value(SameHash("k"), space=acme) == b"of acme"
    assert cache.value(SameHash("k"), space=globex) == b"of globex"


def test_keys_of_one_tenant_with_the_same_hash_are_told_apart() -> None:
    cache, acme, _ = colliding()
    keys = [SameHash(f"k{number}") for number in range(50)]
    for key in keys:
        cache.put(key, key.encode(), space=acme)
    assert [cache.value(key, space=acme) for key in keys] == [key.encode() for key in keys]
    cache.service.delete(acme, keys[0], cache.clock.now())
    assert cache.value(keys[0], space=acme) is None
    assert cache.value(keys[1], space=acme) == b"k1"


def test_evictions_among_colliding_keys_make_misses_and_no_wrong_values() -> None:
    cache, acme, globex = colliding(Bounds(entries=20, size_bytes=2**20))
    for number in range(400):
        space, owner = ((acme, b"acme"), (globex, b"globex"))[number % 2]
        key = SameHash(f"k{number % 40}")
        cache.put(key, owner + key.encode(), space=space)
        for other, name in itertools.product(range(40), ((acme, b"acme"), (globex, b"globex"))):
            found = cache.value(SameHash(f"k{other}"), space=name[0])
            assert found in (None, name[1] + b"k%d" % other)
    assert len(cache.store) == len(acme.entries) + len(globex.entries) <= 20
    assert acme.entries
    assert globex.entries


def test_an_invalidation_does_not_touch_another_tenants_colliding_entries() -> None:
    cache, acme, globex = colliding()
    for space in (acme, globex):
        for key in ("a/1", "a/2", "b"):
            cache.put(SameHash(key), tags=(SameHash("x"),), space=space)
    cache.service.invalidate_keys(acme, [SameHash("b")], cache.clock.now())
    at_once(cache.service.invalidate_prefix(acme, "a/1"))
    assert set(acme.entries) == {SameHash("a/2")}
    at_once(cache.service.invalidate_tags(acme, [SameHash("x")]))
    cache.service.invalidate_all(acme)
    cache.sweep()
    assert not acme.entries
    assert len(globex.entries) == len(cache.store) == 3


@pytest.mark.parametrize("key", ["k", "l"])
def test_a_claim_is_not_filled_by_another_tenants_colliding_key(key: str) -> None:
    cache, acme, globex = colliding()
    now = cache.clock.now()
    ours = cache.service.claim(acme, SameHash("k"), False, 5.0, now).grant
    theirs = cache.service.claim(globex, SameHash(key), False, 5.0, now).grant
    assert ours.token != theirs.token
    payload = Payload(b"of globex", 60.0)
    assert not cache.service.fill("globex", ours.token, "plans", key, payload, now).stored
    assert cache.service.fill("globex", theirs.token, "plans", key, payload, now).stored
    assert cache.find(SameHash("k"), space=acme) is None
