"""The limiter's promises, with a clock of the test's own."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent360.client.errors import MeshError
from agent360.mesh.ratelimit.counters import Counter, FixedWindow, SlidingWindow, TokenBucket
from agent360.mesh.ratelimit.limiter import Limiter
from agent360.mesh.ratelimit.limits import Algorithm, FailureMode, Limit, LimitsError, LimitSet
from agent360.mesh.ratelimit.limits_file import read_limits
from agent360.mesh.ratelimit.windows import PlainWindows

S = 1_000_000


class Clock:
    """Microseconds, moved by the test in seconds."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> int:
        return round(self.now * 1e6)


def limiter(*limits: Limit) -> tuple[Limiter, Clock]:
    clock = Clock()
    return Limiter(LimitSet(limits), clock), clock


steps = st.lists(st.tuples(st.integers(0, 3 * S), st.integers(1, 4)), min_size=1, max_size=80)


@given(steps)
def test_a_token_bucket_admits_at_most_burst_plus_rate_times_any_interval(
    history: list[tuple[int, int]],
) -> None:
    bucket, now = TokenBucket(amount=5, period_us=2 * S, burst=7), 50 * S
    admitted: list[tuple[int, int]] = []
    for pause, hits in history:
        now += pause
        if bucket.room(now) >= hits:
            bucket.take(now, hits)
            admitted.append((now, hits))
    for first in range(len(admitted)):
        total = 0
        for at, hits in admitted[first:]:
            total += hits
            assert total <= 7 + 2.5 * (at - admitted[first][0]) / S


@given(steps)
def test_a_sliding_window_never_admits_more_than_its_amount_in_any_period(
    history: list[tuple[int, int]],
) -> None:
    window, now = SlidingWindow(amount=9, period_us=4 * S), 50 * S
    admitted: list[tuple[int, int]] = []
    for pause, hits in history:
        now += pause
        if window.room(now) >= hits:
            window.take(now, hits)
            admitted.append((now, hits))
    for at, _ in admitted:
        assert sum(hits for when, hits in admitted if at - 4 * S < when <= at) <= 9


COUNTERS: list[Callable[[], Counter]] = [
    lambda: TokenBucket(5, 2 * S, 7),
    lambda: SlidingWindow(7, 2 * S),
    lambda: FixedWindow(7, PlainWindows(2 * S)),
]


@pytest.mark.parametrize("make", COUNTERS)
@given(history=steps)
def test_waiting_as_told_admits_and_waiting_nine_tenths_does_not(
    make: Callable[[], Counter], history: list[tuple[int, int]]
) -> None:
    counter, now = make(), 50 * S
    for pause, hits in history:
        now += pause
        if counter.room(now) >= hits:
            counter.take(now, hits)
            continue
        wait = counter.wait(now, hits)
        assert wait is not None
        if wait > 1_000:
            assert counter.room(now + wait * 9 // 10) < hits
        now += wait
        assert counter.room(now) >= hits


def test_a_denied_parent_charges_no_child() -> None:
    subject, _ = limiter(
        Limit("tenant", 10, 60.0), Limit("user", 100, 60.0, per=("tenant", "user"))
    )
    decisions = [subject.check("acme", "x", facts={"user": "u"}) for _ in range(50)]
    assert sum(decision.allowed for decision in decisions) == 10
    assert decisions[-1].limit_id == "tenant"
    plan = subject.plan("acme", "x", {"user": "u"})
    assert plan[1].counter.room(1_000 * S) == 90


def test_one_tenants_use_leaves_anothers_limit_whole() -> None:
    subject, _ = limiter(Limit("r", 1, 60.0))
    assert subject.check("acme", "x").allowed
    assert not subject.check("acme", "x").allowed
    assert subject.check("globex", "x").allowed


def test_a_tenants_own_limit_replaces_the_general_one() -> None:
    subject, _ = limiter(Limit("r", 5, 60.0), Limit("r", 1, 60.0, tenant="small"))
    assert sum(subject.check("small", "x").allowed for _ in range(5)) == 1
    assert sum(subject.check("acme", "x").allowed for _ in range(9)) == 5


def test_zero_hits_look_without_charging() -> None:
    subject, _ = limiter(Limit("r", 2, 60.0))
    assert subject.check("acme", "x", 0).remaining == 2
    assert subject.check("acme", "x", 2).allowed
    assert not subject.check("acme", "x", 0).allowed


def test_a_partial_grant_takes_what_is_left() -> None:
    subject, _ = limiter(Limit("r", 10, 60.0))
    assert subject.check("acme", "x", 7, allow_partial=True).granted == 7
    assert subject.check("acme", "x", 7, allow_partial=True).granted == 3


def test_more_hits_than_the_limit_ever_admits_are_denied_without_a_retry_time() -> None:
    subject, _ = limiter(Limit("r", 10, 60.0))
    assert subject.check("acme", "x", 11).retry_after_s is None


def test_a_shadow_limit_counts_denials_and_denies_nothing() -> None:
    subject, _ = limiter(Limit("r", 1, 60.0, shadow=True))
    assert all(subject.check("acme", "x").allowed for _ in range(5))
    assert subject.denied == {"r": 4}


def test_a_request_that_no_limit_matches_is_allowed() -> None:
    subject, _ = limiter(Limit("r", 1, 60.0, name="inference.*", match={"model": "*"}))
    assert subject.check("acme", "search").limit_id == ""
    assert subject.check("acme", "inference.generate").limit_id == ""
    decision = subject.check("acme", "inference.generate", facts={"model": "m"})
    assert decision.limit_id == "r"


def test_twenty_reserves_of_a_hundred_fit_ten_times_into_a_thousand_and_settle_once() -> None:
    subject, _ = limiter(Limit("tokens", 1_000, 3_600.0, algorithm=Algorithm.FIXED_WINDOW))
    plan = subject.plan("acme", "x", {})
    reserved = [subject.reserve("acme", "x", plan, 100, 60.0) for _ in range(20)]
    ids = [reservation_id for decision, reservation_id in reserved if decision.allowed]
    assert len(ids) == 10
    for reservation_id in ids:
        assert subject.settle("acme", reservation_id, 40).adjustment == -60
    assert subject.check("acme", "x", 0).remaining == 600
    again = subject.settle("acme", ids[0], 40)
    assert again.repeated
    assert again.remaining == 600


def test_a_reserve_of_the_same_request_id_is_charged_once() -> None:
    subject, _ = limiter(Limit("tokens", 1_000, 3_600.0))
    plan = subject.plan("acme", "x", {})
    first = subject.reserve("acme", "x", plan, 100, 60.0, "request-1")
    assert subject.reserve("acme", "x", plan, 100, 60.0, "request-1") == first
    assert subject.check("acme", "x", 0).remaining == 900


def test_another_tenants_reservation_is_not_found() -> None:
    subject, _ = limiter(Limit("tokens", 1_000, 3_600.0))
    _, reservation_id = subject.reserve("acme", "x", subject.plan("acme", "x", {}), 1, 60.0)
    with pytest.raises(MeshError, match="RESERVATION_UNKNOWN"):
        subject.settle("globex", reservation_id, 1)


def test_what_no_limit_applies_to_is_settled_renewed_and_released_by_any_replica() -> None:
    (made, _), (other, _) = limiter(), limiter()
    decision, reservation_id = made.reserve("acme", "x", (), 100, 60.0)
    assert decision.allowed
    for _ in range(2):
        settled = other.settle("acme", reservation_id, 40)
        assert (settled.adjustment, settled.repeated) == (-60, False)
    decision, slot_id = made.acquire("acme", (), 2, 1.5)
    assert decision.allowed
    assert other.renew("acme", slot_id, None) == 1.5
    assert other.renew("acme", slot_id, 9.0) == 9.0
    assert other.release("acme", slot_id)


def test_a_changed_per_begins_anew() -> None:
    subject, _ = limiter(Limit("r", 10, 60.0, per=("tenant", "user")))
    assert subject.check("acme", "x", 6, facts={"user": "u"}).allowed
    subject.counts.replace_limits(LimitSet([Limit("r", 10, 60.0, per=("tenant", "model"))]))
    assert subject.check("acme", "x", 0, facts={"model": "u"}).remaining == 10
    assert [each.used for each in subject.usage("acme")] == [0]


def test_counts_beyond_the_bound_go_when_they_are_whole_again() -> None:
    clock = Clock()
    subject = Limiter(LimitSet([Limit("r", 1, 1.0)]), clock, max_counters=10)
    for number in range(10):
        subject.check(f"t{number}", "x")
    clock.now += 5
    assert subject.check("one-more", "x").allowed
    assert subject.counts.generation == 1
    assert not subject.check("one-more", "x").allowed


def test_a_count_in_use_is_never_dropped_and_a_closed_limit_refuses_one_more() -> None:
    limits = [
        Limit("r", 1, 600.0, name="open"),
        Limit("c", 1, 600.0, name="closed", failure_mode=FailureMode.CLOSED),
        Limit("s", 1, name="open", algorithm=Algorithm.CONCURRENCY),
    ]
    subject = Limiter(LimitSet(limits), Clock(), max_counters=10)
    held = subject.plan("t0", "open", {}, slots=True)
    assert subject.acquire("t0", held, 1, 60.0)[0].allowed
    for number in range(9):
        assert subject.check(f"t{number}", "open").allowed
    for number in range(30):
        assert subject.check(f"more-{number}", "open").allowed
        with pytest.raises(MeshError, match="COUNTS_EXHAUSTED"):
            subject.check(f"more-{number}", "closed")
    assert subject.counts.generation == 0
    assert not any(subject.check(f"t{number}", "open").allowed for number in range(9))
    assert subject.plan("t0", "open", {}, slots=True) == held


def test_room_for_one_count_is_made_by_looking_at_a_few() -> None:
    clock = Clock()
    subject = Limiter(LimitSet([Limit("r", 1, 1.0)]), clock, max_counters=1_000)
    for number in range(1_000):
        subject.check(f"t{number}", "x")
    clock.now += 5
    subject.check("one-more", "x")
    assert sum(1 for number in range(1_000) for _ in subject.usage(f"t{number}")) == 936


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('[[limits]]\nid="a"\namount=0\nperiod="1s"', "amount must be a positive"),
        ('[[limits]]\nid="A!"\namount=1\nperiod="1s"', "id must match"),
        ('[[limits]]\nid="a"\namount=1\nperiod="soon"', "period must be"),
        ('[[limits]]\nid="a"\namount=1\nperiod="1s"\ntypo=1', "'typo' is not known"),
        ('[[limits]]\nid="a"\namount=1\nperiod="1s"\nalgorithm="x"', "algorithm must be one of"),
        ('[[limits]]\nid="a"\namount=1\nperiod="1s"\n' * 2, "stands twice"),
        ("[[limits", "at end of document"),
    ],
)
def test_a_wrong_limits_file_is_refused_with_what_is_wrong(
    tmp_path: Path, text: str, fault: str
) -> None:
    file = tmp_path / "limits.toml"
    file.write_text(text)
    with pytest.raises(LimitsError, match=fault):
        read_limits(file)
