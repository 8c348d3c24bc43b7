"""What usage tells of counts in memory, with a clock of the test's own."""

from agent360.mesh.ratelimit.decisions import Usage
from agent360.mesh.ratelimit.limiter import Limiter
from agent360.mesh.ratelimit.limits import Algorithm, Limit, LimitSet


class Clock:
    """Microseconds, moved by the test in seconds."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> int:
        return round(self.now * 1e6)


def only(limiter: Limiter, tenant: str, *, together: bool = False) -> Usage:
    (usage,) = limiter.usage(tenant, together=together)
    return usage


def test_the_peak_outlives_what_is_given_back_and_ends_with_its_period() -> None:
    clock = Clock()
    subject = Limiter(LimitSet([Limit("r", 10, 60.0, algorithm=Algorithm.SLIDING_WINDOW)]), clock)
    plan = subject.plan("acme", "x", {})
    _, reservation_id = subject.reserve("acme", "x", plan, 8, 60.0)
    subject.settle("acme", reservation_id, 3)
    assert (only(subject, "acme").used, only(subject, "acme").peak) == (3, 8)
    clock.now += 60
    assert (only(subject, "acme").used, only(subject, "acme").peak) == (3, 3)
    assert not subject.check("acme", "x", 9).allowed
    assert only(subject, "acme").denied == 1


def test_a_tenants_share_tells_nothing_of_the_others() -> None:
    clock = Clock()
    window = Algorithm.FIXED_WINDOW
    subject = Limiter(LimitSet([Limit("all", 10, 60.0, per=(), algorithm=window)]), clock)
    assert subject.check("acme", "x", 3).allowed
    assert subject.check("globex", "x", 5).allowed
    assert not subject.check("globex", "x", 4).allowed
    mine, theirs = only(subject, "acme"), only(subject, "globex")
    assert (mine.used, mine.peak, mine.denied) == (3, 3, 0)
    assert (theirs.used, theirs.peak, theirs.denied) == (5, 5, 1)
    assert list(subject.usage("initech")) == []
    whole = only(subject, "initech", together=True)
    assert (whole.used, whole.peak, whole.denied, whole.remaining) == (8, 8, 1, 2)
    clock.now += 60
    assert only(subject, "acme").used == 0
    assert subject.check("acme", "x", 10).allowed


def test_what_was_charged_in_an_earlier_period_is_not_given_back_to_the_share() -> None:
    clock = Clock()
    window = Algorithm.FIXED_WINDOW
    subject = Limiter(LimitSet([Limit("all", 10, 60.0, per=(), algorithm=window)]), clock)
    _, reservation_id = subject.reserve("acme", "x", subject.plan("acme", "x", {}), 8, 60.0)
    clock.now += 60
    assert subject.check("acme", "x", 2).allowed
    subject.settle("acme", reservation_id, 1)
    assert only(subject, "acme").used == 2
    assert only(subject, "acme", together=True).used == 2


def test_a_tenant_holds_the_slots_that_it_took_until_they_come_back() -> None:
    clock = Clock()
    limit = Limit("slots", 8, per=(), algorithm=Algorithm.CONCURRENCY)
    subject = Limiter(LimitSet([limit]), clock)
    plans = {each: subject.plan(each, "x", {}, slots=True) for each in ("acme", "globex")}
    _, kept = subject.acquire("acme", plans["acme"], 2, 10.0)
    subject.acquire("acme", plans["acme"], 1, 1.0)
    _, released = subject.acquire("globex", plans["globex"], 4, 10.0)
    assert (only(subject, "acme").used, only(subject, "globex").used) == (3, 4)
    assert subject.release("globex", released)
    clock.now += 5
    assert subject.renew("acme", kept, 10.0)
    clock.now += 7
    mine, theirs = only(subject, "acme"), only(subject, "globex")
    assert (mine.used, mine.peak, mine.remaining) == (2, 3, 6)
    assert (theirs.used, theirs.peak) == (0, 4)
    assert only(subject, "acme", together=True).used == 2
