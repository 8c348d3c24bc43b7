"""Circuit breakers and rests, on a fake clock."""

from dataclasses import dataclass

import pytest

from agent360.mesh.inference.failover.breaker import Breaker, Breakers, State
from agent360.mesh.inference.failover.settings import BreakerSettings

SETTINGS = BreakerSettings(
    consecutive_failures=3, failure_share=0.5, min_tries=10, window_s=10.0, open_s=2.0, max_open_s=5
)


@dataclass
class Clock:
    now: float = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def fail(breaker: Breaker, times: int = 3) -> None:
    for _ in range(times):
        breaker.failed(probe=False, why="UPSTREAM_STALLED")


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not(clock):
    breaker = Breaker(SETTINGS, clock)
    fail(breaker, 2)
    breaker.succeeded(probe=False)
    fail(breaker, 2)
    assert breaker.state is State.CLOSED
    fail(breaker, 1)
    assert breaker.state is State.OPEN
    assert breaker.allowed_at() == clock.now + 2.0


def test_a_share_of_failures_opens_it_once_there_are_enough_tries(clock):
    breaker = Breaker(SETTINGS, clock)
    for _ in range(4):
        breaker.succeeded(probe=False)
        breaker.failed(probe=False)
    assert breaker.state is State.CLOSED
    breaker.succeeded(probe=False)
    breaker.failed(probe=False)
    assert breaker.state is State.OPEN


def test_failures_of_long_ago_do_not_count(clock):
    breaker = Breaker(SETTINGS, clock)
    for _ in range(4):
        breaker.succeeded(probe=False)
        breaker.failed(probe=False)
    clock.now += 11.0
    breaker.succeeded(probe=False)
    breaker.failed(probe=False)
    assert breaker.state is State.CLOSED


def test_one_request_at_a_time_probes_and_its_success_closes(clock):
    breaker = Breaker(SETTINGS, clock)
    fail(breaker)
    clock.now += 2.0
    assert breaker.state is State.HALF_OPEN
    assert breaker.allowed_at() <= clock.now
    assert breaker.enter()
    assert breaker.allowed_at() > clock.now + 1e6
    breaker.left(probe=True)
    assert breaker.allowed_at() <= clock.now
    assert breaker.enter()
    breaker.succeeded(probe=True)
    assert breaker.state is State.CLOSED
    assert not breaker.enter()


def test_each_failed_probe_opens_it_for_longer_up_to_a_bound(clock):
    breaker = Breaker(SETTINGS, clock)
    fail(breaker)
    waits = []
    for _ in range(3):
        clock.now = breaker.allowed_at()
        assert breaker.enter()
        breaker.failed(probe=True)
        waits.append(breaker.allowed_at() - clock.now)
    assert waits == [4.0, 5.0, 5.0]
    assert breaker.opened == 4


def test_what_was_sent_before_it_opened_neither_closes_nor_lengthens(clock):
    breaker = Breaker(SETTINGS, clock)
    fail(breaker)
    until = breaker.allowed_at()
    clock.now += 1.0
    fail(breaker, 10)
    breaker.succeeded(probe=False)
    assert breaker.allowed_at() == until


def test_failures_of_one_of_several_tenants_do_not_open_it_until_anothers_fail(clock):
    breaker = Breaker(SETTINGS, clock)
    breaker.succeeded(probe=False, tenant="good")
    for _ in range(30):
        breaker.failed(probe=False, tenant="evil")
    assert breaker.state is State.CLOSED
    breaker.failed(probe=False, tenant="good")
    assert breaker.state is State.OPEN


def test_the_only_tenant_of_a_backend_opens_it_alone(clock):
    breaker = Breaker(SETTINGS, clock)
    breaker.succeeded(probe=False, tenant="gone")
    clock.now += 60.0
    for _ in range(3):
        breaker.failed(probe=False, tenant="only")
    assert breaker.state is State.OPEN
    assert breaker.allowed_at("only") == clock.now + 2.0
    assert breaker.allowed_at("another") < clock.now, "it may not be the backend's fault"
    assert breaker.enter()
    assert breaker.allowed_at("third") > clock.now + 60, "one at a time"
    breaker.failed(probe=True, tenant="another")
    assert breaker.allowed_at("third") > clock.now, "now it is"


def test_the_tenant_that_failed_last_probes_after_others_and_does_not_lengthen_the_time(clock):
    breaker = Breaker(SETTINGS, clock)
    for tenant in ("good", "good", "evil"):
        breaker.failed(probe=False, tenant=tenant)
    assert breaker.state is State.OPEN
    assert breaker.allowed_at("good") == clock.now + 2.0
    assert breaker.allowed_at("evil") == clock.now + 3.0
    clock.now += 3.0
    assert breaker.enter()
    breaker.failed(probe=True, tenant="evil")
    assert breaker.allowed_at("good") == clock.now + 2.0
    clock.now += 2.0
    assert breaker.enter()
    breaker.succeeded(probe=True, tenant="good")
    assert breaker.state is State.CLOSED


def test_a_disabled_breaker_stays_closed(clock):
    breaker = Breaker(SETTINGS.model_copy(update={"enabled": False}), clock)
    fail(breaker, 100)
    assert breaker.state is State.CLOSED


def test_a_rest_concerns_one_model_or_all_and_ends_by_itself(clock):
    breakers = Breakers({"gpu": SETTINGS}, clock)
    breakers.rest("gpu", "small", 3.0)
    assert not breakers.allows("gpu", "small")
    assert breakers.allows("gpu", "large")
    assert breakers.allows("other", "small")
    clock.now += 3.0
    assert breakers.allows("gpu", "small")
    breakers.rest("gpu", "", 1.0)
    assert not breakers.allows("gpu", "large")


def test_a_shorter_rest_does_not_end_a_longer_one_and_none_is_endless(clock):
    breakers = Breakers({"gpu": SETTINGS}, clock)
    breakers.rest("gpu", "small", 3.0)
    breakers.rest("gpu", "small", 1.0)
    assert breakers.allowed_at("gpu", "small") == clock.now + 3.0
    breakers.rest("gpu", "small", 1e9)
    assert breakers.allowed_at("gpu", "small") == clock.now + SETTINGS.max_rest_s


def test_who_watches_is_told_of_what_opens_and_closes(clock):
    breakers, heard = Breakers({"gpu": SETTINGS}, clock), []
    breakers.watch(lambda *told: heard.append(told))
    breaker = breakers.of("gpu")
    fail(breaker, 5)
    clock.now = breaker.allowed_at()
    assert breaker.enter()
    breaker.succeeded(probe=True)
    why = "UPSTREAM_STALLED"
    assert heard == [("gpu", State.OPEN, why), ("gpu", State.CLOSED, why)]
