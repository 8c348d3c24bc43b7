"""What is given back, clocks that step, slots, and limits that change: bounds hold throughout."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent360.client.errors import MeshError
from agent360.mesh.ratelimit.counters import Counter, FixedWindow, SlidingWindow, TokenBucket
from agent360.mesh.ratelimit.limiter import Limiter
from agent360.mesh.ratelimit.limits import Algorithm, Limit, LimitSet
from agent360.mesh.ratelimit.slots import SlotPool
from agent360.mesh.ratelimit.windows import PlainWindows

S = 1_000_000
BEGIN = 1_790_000_000 * S


steps = st.lists(
    st.tuples(st.integers(0, 3 * S), st.integers(1, 9), st.integers(0, 9)), max_size=60
)


@given(steps)
def test_what_is_given_back_late_never_lets_a_bucket_admit_more(
    history: list[tuple[int, int, int]],
) -> None:
    """Reservations are settled at what they used; used hits obey burst + rate x dt."""
    bucket, now = TokenBucket(5, 2 * S, 9), BEGIN
    used: list[tuple[int, int]] = []
    reserved: list[tuple[int, int]] = []
    for pause, hits, settled in history:
        now += pause
        if bucket.room(now) >= hits:
            reserved.append((hits, bucket.take(now, hits)))
        if reserved and settled <= reserved[0][0]:
            held, mark = reserved.pop(0)
            bucket.give_back(now, held - settled, mark, held)
            used.append((now, settled))
    for first in range(len(used)):
        total = 0
        for at, hits in used[first:]:
            total += hits
            # A reservation is used when it is settled, up to when it was made: dt is as long.
            assert total <= 9 + 2.5 * ((at - BEGIN) / S)


def test_hits_of_a_window_that_is_over_are_not_given_back() -> None:
    fixed = FixedWindow(10, PlainWindows(10 * S))
    mark = fixed.take(BEGIN, 6)
    later = BEGIN + 10 * S
    fixed.take(later, 4)
    fixed.give_back(later, 6, mark, 6)
    assert fixed.room(later) == 6
    sliding = SlidingWindow(10, 10 * S)
    mark = sliding.take(BEGIN, 6)
    sliding.take(later + 2 * S, 4)
    sliding.give_back(later + 2 * S, 6, mark, 6)
    assert sliding.room(later + 2 * S) == 6


def test_tokens_that_flowed_back_are_not_given_back_again() -> None:
    bucket = TokenBucket(10, 10 * S, 10)
    mark = bucket.take(BEGIN, 10)
    later = BEGIN + 10 * S
    assert bucket.room(later) == 10
    bucket.take(later, 10)
    bucket.give_back(later, 10, mark, 10)
    assert bucket.room(later) == 0


def test_two_reservations_are_not_both_given_back_what_flowed_for_one() -> None:
    bucket = TokenBucket(10, 10 * S, 10)
    first, second = bucket.take(BEGIN, 5), bucket.take(BEGIN, 5)
    bucket.give_back(BEGIN, 5, first, 5)
    later = BEGIN + 5 * S
    assert bucket.room(later) == 10
    bucket.take(later, 5)
    bucket.give_back(later, 5, second, 5)
    assert bucket.room(later) == 5


def test_a_refund_after_the_limit_was_lowered_gives_nothing_of_others_back() -> None:
    """At ten in ten seconds, four of the five have flowed back; at one, they would not have."""
    bucket = TokenBucket(10, 10 * S, 10)
    mark = bucket.take(BEGIN, 5)
    later = BEGIN + 4 * S
    bucket.take(later, 5)
    bucket.resize(1, 10)
    bucket.give_back(later, 5, mark, 5)
    assert bucket.room(later) == 5, "of the first five one was left"


def test_a_refund_goes_by_the_fastest_that_the_limit_was_since_the_charge() -> None:
    bucket = TokenBucket(1, 10 * S, 10)
    mark = bucket.take(BEGIN, 5)
    bucket.resize(10, 10)
    bucket.take(BEGIN + 4 * S, 5)
    bucket.resize(1, 10)
    bucket.give_back(BEGIN + 4 * S, 5, mark, 5)
    assert bucket.room(BEGIN + 4 * S) == 5


def test_a_refund_of_what_had_all_flowed_back_before_the_limit_was_lowered_is_nothing() -> None:
    bucket = TokenBucket(10, 10 * S, 10)
    mark = bucket.take(BEGIN, 5)
    later = BEGIN + 6 * S
    bucket.take(later, 5)
    bucket.resize(1, 10)
    bucket.give_back(later, 5, mark, 5)
    assert bucket.room(later) == 5


@pytest.mark.parametrize(
    "algorithm", [Algorithm.TOKEN_BUCKET, Algorithm.SLIDING_WINDOW, Algorithm.FIXED_WINDOW]
)
def test_a_settle_after_the_amount_was_lowered_leaves_no_more_than_the_limit(
    algorithm: Algorithm,
) -> None:
    limiter = Limiter(LimitSet([Limit("r", 100, 60.0, algorithm=algorithm)]), lambda: BEGIN)
    plan = limiter.plan("acme", "x", {})
    _, reservation_id = limiter.reserve("acme", "x", plan, 80, 9.0)
    limiter.counts.replace_limits(LimitSet([Limit("r", 10, 60.0, algorithm=algorithm)]))
    settled = limiter.settle("acme", reservation_id, 3)
    assert (settled.adjustment, settled.remaining) == (-77, 7)
    assert limiter.check("acme", "x", 0).remaining == 7


def test_an_id_of_another_kind_is_refused_by_name() -> None:
    slots = Algorithm.CONCURRENCY
    limiter = Limiter(
        LimitSet([Limit("r", 40, 60.0, name="x"), Limit("s", 4, name="x", algorithm=slots)]),
        lambda: BEGIN,
    )
    plan, held = limiter.plan("acme", "x", {}), limiter.plan("acme", "x", {}, slots=True)
    _, reservation_id = limiter.reserve("acme", "x", plan, 5, 9.0)
    lease_id = limiter.lease("acme", plan, 4).lease_id
    _, slot_id = limiter.acquire("acme", held, 2, 9.0)
    _, free_id = limiter.acquire("acme", (), 2, 9.0)
    for record_id, kind in ((lease_id, "a lease"), (slot_id, "slots"), (free_id, "slots")):
        with pytest.raises(MeshError, match=f"RECORD_OF_ANOTHER_KIND.*id of {kind}"):
            limiter.settle("acme", record_id, 0)
    for record_id in (reservation_id, slot_id):
        with pytest.raises(MeshError, match="RECORD_OF_ANOTHER_KIND"):
            limiter.return_lease("acme", record_id, 1)
    for record_id in (reservation_id, lease_id):
        with pytest.raises(MeshError, match="RECORD_OF_ANOTHER_KIND"):
            limiter.release("acme", record_id)
        with pytest.raises(MeshError, match="RECORD_OF_ANOTHER_KIND"):
            limiter.renew("acme", record_id, None)
    assert limiter.check("acme", "x", 0).remaining == 31
    assert limiter.settle("acme", reservation_id, 5).adjustment == 0


def test_a_clock_that_went_back_behind_a_charge_gives_nothing_of_it_back() -> None:
    bucket = TokenBucket(10, 10 * S, 10)
    mark = bucket.take(BEGIN, 5)
    bucket.take(BEGIN + 5 * S, 5)
    bucket.give_back(BEGIN - S, 5, mark, 5)
    assert bucket.room(BEGIN - S) == 5


COUNTERS: list[Callable[[], Counter]] = [
    lambda: TokenBucket(10, 10 * S, 10),
    lambda: SlidingWindow(10, 10 * S),
    lambda: FixedWindow(10, PlainWindows(10 * S)),
]


@pytest.mark.parametrize("make", COUNTERS)
@pytest.mark.parametrize("step", [-30 * S, -S, -1])
def test_a_clock_that_steps_back_frees_nothing_and_locks_nobody_out(
    make: Callable[[], Counter], step: int
) -> None:
    counter = make()
    counter.take(BEGIN, 10)
    now = BEGIN + step
    assert counter.room(now) == 0
    wait = counter.wait(now, 10)
    assert wait is not None
    assert wait <= 21 * S
    assert counter.room(now + wait) == 10


def test_slots_come_back_by_release_and_by_time() -> None:
    pool = SlotPool(4)
    pool.hold(BEGIN, "a", 2, S)
    pool.hold(BEGIN, "b", 2, 2 * S)
    assert pool.room(BEGIN) == 0
    assert pool.wait(BEGIN, 1) == S
    assert pool.wait(BEGIN, 4) == 2 * S
    assert pool.wait(BEGIN, 5) is None
    assert pool.renew(BEGIN + S // 2, "a", 3 * S)
    assert pool.room(BEGIN + S) == 0
    assert pool.release("b")
    assert not pool.release("b")
    assert pool.room(BEGIN + S) == 2
    assert pool.room(BEGIN + 4 * S) == 4
    assert not pool.renew(BEGIN + 4 * S, "a", S)


def test_a_changed_amount_keeps_what_was_used_and_a_changed_period_begins_anew() -> None:
    now = [BEGIN]
    limiter = Limiter(LimitSet([Limit("r", 10, 60.0)]), lambda: now[0])
    limiter.check("acme", "x", 6)
    limiter.counts.replace_limits(LimitSet([Limit("r", 8, 60.0)]))
    assert limiter.check("acme", "x", 0).remaining == 2
    limiter.counts.replace_limits(LimitSet([Limit("r", 8, 30.0)]))
    assert limiter.check("acme", "x", 0).remaining == 8
    limiter.counts.replace_limits(LimitSet([]))
    assert limiter.check("acme", "x", 0).limit_id == ""


def test_the_decision_names_the_limit_that_takes_longest() -> None:
    limits = LimitSet([Limit("short", 1, 1.0), Limit("long", 1, 60.0), Limit("wide", 9, 60.0)])
    limiter = Limiter(limits, lambda: BEGIN)
    assert limiter.check("acme", "x").allowed
    denied = limiter.check("acme", "x")
    assert (denied.limit_id, denied.retry_after_s) == ("long", 60.0)


@given(st.lists(st.integers(1, 40), max_size=40))
def test_leases_shrink_as_the_limit_is_used_up_and_never_exceed_it(wanted: list[int]) -> None:
    limits = LimitSet([Limit("r", 50, 3_600.0, algorithm=Algorithm.FIXED_WINDOW)])
    limiter = Limiter(limits, lambda: BEGIN)
    leased = 0
    for tokens in wanted:
        lease = limiter.lease("acme", limiter.plan("acme", "x", {}), tokens)
        assert lease.decision.granted <= max(1, (50 - leased) // 4)
        leased += lease.decision.granted
    assert leased <= 50


def test_a_sliding_window_of_100_in_10_s_admits_no_second_hundred_at_its_edge() -> None:
    window = SlidingWindow(100, 10 * S)
    admitted = [
        at
        for at in [BEGIN + 99 * S // 10] * 100 + [BEGIN + 101 * S // 10] * 100
        if window.admit(at, 1) is not None
    ]
    assert len(admitted) == 100
    # Room comes back a period later, and at most a sixteenth of it late.
    wait = window.wait(BEGIN + 101 * S // 10, 1)
    assert wait is not None
    assert BEGIN + 199 * S // 10 <= BEGIN + 101 * S // 10 + wait <= BEGIN + 199 * S // 10 + 625_000


def test_three_a_second_asked_ten_times_a_second_for_a_minute_admit_183_at_most() -> None:
    bucket = TokenBucket(3, S, 3)
    admitted = sum(bucket.admit(BEGIN + call * S // 10, 1) is not None for call in range(600))
    assert 180 <= admitted <= 183
