"""Policies of namespaces and shares of tenants, on a clock of the test's own."""

import pytest
from support.cache_domain import Cache, FakeClock, Trail

from agent360.mesh.cache.admission import Bounds
from agent360.mesh.cache.doorkeeper import Doorkeeper
from agent360.mesh.cache.entry import Payload
from agent360.mesh.cache.policy import (
    DEFAULT_TTL_S,
    Admission,
    NamespacePolicy,
    Rule,
    policies_by_rule,
)
from agent360.mesh.cache.replica import Limits
from agent360.mesh.cache.service import CacheService
from agent360.mesh.cache.shares import Shares
from agent360.mesh.cache.stores.memory import MemoryStore

KB = 1_024


def test_the_first_rule_that_fits_tenant_and_namespace_counts() -> None:
    short, long, rest = (NamespacePolicy(ttl_s=ttl) for ttl in (1.0, 2.0, 3.0))
    policy_of = policies_by_rule(
        [Rule(("acme",), ("plans*",), short), Rule(("*",), ("plans", "answers"), long)], rest
    )
    assert policy_of("acme", "plans-2") is short
    assert policy_of("globex", "plans") is long
    assert policy_of("globex", "plans-2") is rest


def test_a_ttl_comes_from_the_writer_then_the_content_type_then_the_namespace() -> None:
    policy = NamespacePolicy(ttl_s=60.0, ttl_by_content_type={"text/*": 5.0, "*": 7.0})
    plain = NamespacePolicy(ttl_s=60.0)

    def ttl_s(policy: NamespacePolicy, given: float, kind: str) -> float:
        return policy.settled(Payload(b"", given, 0.0, kind)).ttl_s

    assert ttl_s(policy, 9.0, "text/plain") == 9.0
    assert ttl_s(policy, DEFAULT_TTL_S, "text/plain") == 5.0
    assert ttl_s(policy, DEFAULT_TTL_S, "image/png") == 7.0
    assert ttl_s(plain, DEFAULT_TTL_S, "text/plain") == 60.0


def test_jitter_spreads_what_is_written_together() -> None:
    policy = NamespacePolicy(ttl_jitter=0.1)
    ttls = sorted(policy.settled(Payload(b"", 60.0)).ttl_s for _ in range(10_000))
    assert 54.0 <= ttls[0] < 55.0
    assert 65.0 < ttls[-1] <= 66.0
    slots = [0] * 121
    for ttl in ttls:
        slots[int((ttl - 54.0) * 10)] += 1
    assert max(slots) <= 200, "at most 2% end in the same 100 ms"


def test_a_key_is_let_in_once_it_was_asked_for_often_enough_of_late() -> None:
    door = Doorkeeper(window_s=60.0)
    door.looked_up("k", 0.0)
    assert door.written("k", 0.0) == 1, "looking and writing is one access"
    door.looked_up("k", 30.0)
    assert door.written("k", 30.0) == 2
    assert door.written("other", 30.0) == 1


def test_accesses_age_with_the_window() -> None:
    door = Doorkeeper(window_s=60.0)
    for _ in range(5):
        door.looked_up("k", 0.0)
    door.looked_up("k", 61.0)
    assert door.written("k", 61.0) == 6, "the window before still counts"
    door.looked_up("k", 200.0)
    assert door.written("k", 200.0) == 1, "yesterday's accesses do not"


def cache_with(policy: NamespacePolicy) -> tuple[CacheService, FakeClock]:
    clock = FakeClock()
    store = MemoryStore(
        Bounds(1_000, 2**20), max_namespaces=10, now=clock.now(), policy_of=lambda *_: policy
    )
    return CacheService(store, clock, Limits(2**20, 2**20), Trail()), clock


@pytest.mark.parametrize(
    ("policy", "value", "kind"),
    [
        (NamespacePolicy(admission=Admission.NEVER), b"v", ""),
        (NamespacePolicy(max_value_bytes=3), b"four", ""),
        (NamespacePolicy(content_types=("text/*",)), b"v", "image/png"),
        (NamespacePolicy(refused_content_types=("image/*",)), b"v", "image/png"),
    ],
)
def test_an_entry_that_is_refused_takes_the_one_it_would_replace_with_it(
    policy: NamespacePolicy, value: bytes, kind: str
) -> None:
    service, clock = cache_with(policy)
    space = service.space("acme", "plans")
    service._put(space, "k", Payload(b"old", 60.0), clock.now(), admitted=True)
    stored = service.write(space, "k", Payload(value, 60.0, 0.0, kind), clock.now())
    assert (stored.stored, stored.version) == (False, 0)
    assert service.find(space, "k", clock.now(), False) is None
    assert space.counts.rejections == 1


async def test_who_waits_gets_what_was_loaded_though_it_is_not_kept() -> None:
    service, clock = cache_with(NamespacePolicy(admission=Admission.NEVER))
    space = service.space("acme", "plans")
    token = service.claim(space, "k", False, 10.0, clock.now()).grant.token
    waiting = service.claim(space, "k", False, 10.0, clock.now())
    assert not service.fill("acme", token, "plans", "k", Payload(b"v", 60.0), clock.now()).stored
    assert (await service.wait(waiting, 10.0)).entry.value == b"v"


def test_the_first_claim_after_the_fraction_refreshes_early_and_no_other() -> None:
    service, clock = cache_with(NamespacePolicy(eager_refresh=0.8))
    space = service.space("acme", "plans")
    service.write(space, "k", Payload(b"v", 10.0), clock.now())

    def claim() -> bool:
        claimed = service.claim(space, "k", False, 5.0, clock.now())
        assert claimed.entry.value == b"v"
        return claimed.grant is not None

    assert not claim()
    clock.advance(8.0)
    assert [claim(), claim(), claim()] == [True, False, False]


async def test_a_stale_entry_stands_in_when_loading_fails_and_loading_pauses() -> None:
    policy = NamespacePolicy(fail_safe_s=60.0, fail_safe_pause_s=5.0)
    service, clock = cache_with(policy)
    space = service.space("acme", "plans")
    service.write(space, "k", Payload(b"old", 1.0), clock.now())
    clock.advance(10.0)
    token = service.claim(space, "k", False, 5.0, clock.now()).grant.token
    waiting = service.claim(space, "k", False, 5.0, clock.now())
    assert service.give_up("acme", token).value == b"old"
    late = await service.wait(waiting, 5.0)
    assert (late.entry.value, late.fail_safe, late.grant) == (b"old", True, None)
    during = service.claim(space, "k", False, 5.0, clock.now())
    assert (during.entry.value, during.fail_safe) == (b"old", True)
    clock.advance(5.1)
    assert service.claim(space, "k", False, 5.0, clock.now()).grant is not None


def test_nothing_stands_in_beyond_the_maximum_staleness() -> None:
    service, clock = cache_with(NamespacePolicy(fail_safe_s=60.0))
    space = service.space("acme", "plans")
    service.write(space, "k", Payload(b"old", 1.0, 3_600.0), clock.now())
    clock.advance(62.0)
    token = service.claim(space, "k", False, 5.0, clock.now()).grant.token
    assert service.give_up("acme", token) is None


def test_a_tenant_that_floods_pushes_out_its_own_entries() -> None:
    cache = Cache(Bounds(1_000, 100 * KB))
    globex = cache.space("globex")
    for number in range(40):
        cache.put(f"k{number}", bytes(KB))
    for number in range(5_000):
        for _ in range(3):
            cache.find(f"n{number}", space=globex)
        cache.put(f"n{number}", bytes(KB), space=globex)
        assert cache.store.size_bytes <= 100 * KB
    share = cache.plans.size_bytes
    assert share >= 100 * KB // 2 - 4 * KB, "an equal share stays whatever the other writes"
    assert globex.size_bytes > 0


def test_what_nobody_else_uses_may_be_used_until_somebody_does() -> None:
    cache = Cache(Bounds(1_000, 100 * KB))
    globex = cache.space("globex")
    for number in range(60):
        cache.put(f"k{number}", bytes(KB))
    assert cache.plans.size_bytes > 90 * KB
    for number in range(60):
        cache.put(f"n{number}", bytes(KB), space=globex)
    assert globex.size_bytes >= 40 * KB
    assert cache.store.size_bytes <= 100 * KB


def test_a_quota_bounds_a_tenant_though_there_is_room() -> None:
    quotas = {"acme": Bounds(1_000, 10 * KB)}
    shares = Shares(Bounds(1_000, 100 * KB), lambda name: quotas.get(name, Bounds(1_000, 100 * KB)))
    assert shares.of("acme").policy.bounds == Bounds(1_000, 10 * KB)
    assert shares.of("globex").policy.bounds == Bounds(1_000, 100 * KB)
