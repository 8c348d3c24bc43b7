"""Who is next in a line: levels, shares, deadlines; pure, with time as an argument."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent360.mesh.inference.queueing.line import Line, LineFullError
from agent360.mesh.inference.queueing.settings import QueueSettings
from agent360.mesh.inference.queueing.ticket import Ticket
from agent360.mesh.inference.queueing.waiters import Waiter

LOW, NORMAL, HIGH = 1, 2, 3


def line_of(weights: dict[str, float] | None = None, **options: object) -> Line[str]:
    known = weights or {}
    return Line(QueueSettings.model_validate(options), lambda tenant: known.get(tenant, 1.0))


def enter(line: Line[str], name: str, ticket: Ticket, now: float = 0.0) -> Waiter[str]:
    waiter = line.waiter(name, ticket, now)
    line.enter(waiter)
    return waiter


def order(line: Line[str], now: float = 0.0) -> list[str]:
    names = []
    while (waiter := line.take(now)) is not None:
        names.append(waiter.payload)
    return names


def test_within_a_tenant_the_earliest_deadline_goes_first() -> None:
    line = line_of()
    enter(line, "late", Ticket("acme", deadline=9.0))
    enter(line, "soon", Ticket("acme", deadline=3.0))
    enter(line, "none", Ticket("acme"))
    enter(line, "middle", Ticket("acme", deadline=5.0))
    assert order(line) == ["soon", "middle", "late", "none"]


def test_equal_deadlines_go_in_the_order_of_arrival() -> None:
    line = line_of()
    for number in range(300):
        enter(line, str(number), Ticket("acme"))
    assert order(line) == [str(number) for number in range(300)]


def test_a_deadline_of_one_tenant_gives_no_precedence_over_another_tenant() -> None:
    line = line_of()
    for number in range(4):
        enter(line, f"hasty{number}", Ticket("hasty", tokens=100, deadline=1.0))
        enter(line, f"calm{number}", Ticket("calm", tokens=100, deadline=100.0))
    assert Counter(name[:4] for name in order(line)[:4]) == {"hast": 2, "calm": 2}


def test_higher_levels_go_first() -> None:
    line = line_of()
    enter(line, "low", Ticket("acme", LOW))
    enter(line, "normal", Ticket("acme", NORMAL))
    enter(line, "high", Ticket("zeta", HIGH))
    assert order(line) == ["high", "normal", "low"]


@pytest.mark.parametrize(
    ("levels", "expected"), [(1, (0, 0, 0)), (2, (1, 0, 0)), (3, (2, 1, 0)), (9, (8, 4, 0))]
)
def test_priorities_map_to_the_levels_there_are(levels: int, expected: tuple[int, ...]) -> None:
    options = QueueSettings(levels=levels)
    assert tuple(map(options.level_of, (LOW, NORMAL, HIGH))) == expected


def test_a_level_that_starves_gets_every_second_turn() -> None:
    line = line_of(starvation_s=5.0)
    for number in range(3):
        enter(line, f"low{number}", Ticket("acme", LOW), now=0.0)
    for number in range(100):
        enter(line, f"high{number}", Ticket("acme", HIGH), now=4.0)
    assert [taken.payload for taken in map(line.take, [4.8, 4.9]) if taken] == ["high0", "high1"]
    names = [taken.payload for taken in map(line.take, [5.0] * 7) if taken]
    assert names == ["low0", "high2", "low1", "high3", "low2", "high4", "high5"]


def test_one_that_was_put_back_has_not_begun_to_wait_anew() -> None:
    line = line_of(starvation_s=5.0)
    enter(line, "old", Ticket("acme", LOW), now=0.0)
    enter(line, "new", Ticket("acme", LOW), now=4.0)
    taken = line.take(4.0)
    assert taken is not None
    line.put_back(taken)
    enter(line, "high", Ticket("acme", HIGH), now=4.0)
    assert order(line, now=6.0) == ["old", "high", "new"]


def test_a_backlog_that_waited_too_long_does_not_outdo_other_tenants_of_its_level() -> None:
    line = line_of(starvation_s=5.0)
    for _ in range(50):
        enter(line, "flood", Ticket("flood"), now=0.0)
    for _ in range(5):
        enter(line, "calm", Ticket("calm"), now=20.0)
    names = [taken.payload for taken in map(line.take, [20.0] * 10) if taken]
    assert Counter(names) == {"flood": 5, "calm": 5}


def test_unequal_sizes_are_shared_by_tokens_and_not_by_items() -> None:
    line = line_of()
    for _ in range(100):
        enter(line, "large", Ticket("large", tokens=1_000))
    for _ in range(1_000):
        enter(line, "small", Ticket("small", tokens=100))
    first = [line.take(0.0) for _ in range(110)]
    counts = Counter(waiter.payload for waiter in first if waiter is not None)
    assert counts == {"large": 10, "small": 100}


def test_weights_decide_the_shares() -> None:
    line = line_of({"gold": 3.0})
    for _ in range(100):
        enter(line, "gold", Ticket("gold", tokens=50))
        enter(line, "iron", Ticket("iron", tokens=50))
    first = [line.take(0.0) for _ in range(80)]
    counts = Counter(waiter.payload for waiter in first if waiter is not None)
    assert counts == {"gold": 60, "iron": 20}


def test_what_was_used_beyond_the_estimate_is_owed() -> None:
    line = line_of()
    for _ in range(10):
        enter(line, "liar", Ticket("liar", tokens=10))
        enter(line, "true", Ticket("true", tokens=10))
    waiter = line.take(0.0)
    assert waiter is not None
    line.correct(waiter, 50)
    names = [waiter.payload, *order(line)]
    other = "true" if waiter.payload == "liar" else "liar"
    assert names[1:7] == [other] * 6


def test_what_was_not_used_is_given_back() -> None:
    line = line_of()
    for _ in range(10):
        enter(line, "careful", Ticket("careful", tokens=100))
        enter(line, "exact", Ticket("exact", tokens=10))
    taken = Counter[str]()
    for _ in range(10):
        waiter = line.take(0.0)
        assert waiter is not None
        taken[waiter.payload] += 1
        line.correct(waiter, 10 - waiter.cost)
    assert taken == {"careful": 5, "exact": 5}


def test_idling_saves_up_no_share() -> None:
    line = line_of()
    for _ in range(50):
        enter(line, "busy", Ticket("busy", tokens=10))
    for _ in range(40):
        line.take(0.0)
    for _ in range(10):
        enter(line, "idle", Ticket("idle", tokens=10))
    assert Counter(order(line)[:10]) == {"busy": 5, "idle": 5}


def test_one_that_leaves_costs_nothing() -> None:
    line = line_of()
    gone = [enter(line, "gone", Ticket("quitter", tokens=1_000)) for _ in range(20)]
    for waiter in gone:
        line.leave(waiter)
    for _ in range(10):
        enter(line, "quitter", Ticket("quitter", tokens=10))
        enter(line, "other", Ticket("other", tokens=10))
    assert Counter(order(line)[:10]) == {"quitter": 5, "other": 5}
    assert (line.size, line.cost) == (0, 0)


# -------------------------------------------------------------------- timeouts


def test_a_rejecting_line_lets_go_of_those_that_waited_too_long() -> None:
    line = line_of(timeout_s=5.0)
    enter(line, "old", Ticket("acme"), now=0.0)
    enter(line, "new", Ticket("acme"), now=3.0)
    assert line.next_expiry() == 5.0
    assert [waiter.payload for waiter in line.expire(5.0)] == ["old"]
    assert order(line) == ["new"]


def test_a_delaying_line_puts_them_behind_all_others() -> None:
    line = line_of(timeout_s=5.0, timeout_action="delay")
    enter(line, "old", Ticket("acme", HIGH), now=0.0)
    enter(line, "low", Ticket("acme", LOW), now=3.0)
    assert line.expire(5.0) == []
    assert order(line, now=5.0) == ["low", "old"]


def test_a_delayed_one_still_ends_at_its_deadline() -> None:
    line = line_of(timeout_s=5.0, timeout_action="delay")
    enter(line, "old", Ticket("acme", deadline=8.0), now=0.0)
    assert line.expire(5.0) == []
    assert line.next_expiry() == 8.0
    assert [waiter.payload for waiter in line.expire(8.0)] == ["old"]


def test_a_request_may_shorten_its_timeout_and_not_lengthen_it() -> None:
    line = line_of(timeout_s=5.0)
    assert enter(line, "short", Ticket("acme", timeout_s=2.0)).expires == 2.0
    assert enter(line, "long", Ticket("acme", timeout_s=50.0)).expires == 5.0


def test_a_line_may_forbid_shorter_timeouts() -> None:
    line = line_of(timeout_s=5.0, allow_shorter_timeout=False)
    assert enter(line, "short", Ticket("acme", timeout_s=2.0)).expires == 5.0


def test_forgotten_timeouts_do_not_pile_up() -> None:
    line = line_of()
    for _ in range(5_000):
        line.leave(enter(line, "gone", Ticket("acme")))
    assert len(line._expiries) < 200


# -------------------------------------------------------------------- size


def test_a_full_line_refuses_the_tenant_that_holds_most() -> None:
    line = line_of(max_items=3)
    for _ in range(3):
        enter(line, "flood", Ticket("flood", tokens=10))
    with pytest.raises(LineFullError):
        enter(line, "flood", Ticket("flood", tokens=10))
    assert line.size == 3


def test_in_a_full_line_the_tenant_that_holds_most_gives_way() -> None:
    line = line_of(max_items=3)
    for number in range(3):
        enter(line, f"flood{number}", Ticket("flood", tokens=10))
    waiter = line.waiter("calm", Ticket("calm", tokens=10), 0.0)
    assert [gone.payload for gone in line.enter(waiter)] == ["flood2"]
    assert set(order(line)) == {"flood0", "flood1", "calm"}


def test_in_a_full_line_a_tenants_own_lower_level_gives_way() -> None:
    line = line_of(max_items=2)
    enter(line, "low", Ticket("acme", LOW))
    enter(line, "normal", Ticket("acme", NORMAL))
    waiter = line.waiter("high", Ticket("acme", HIGH), 0.0)
    assert [gone.payload for gone in line.enter(waiter)] == ["low"]
    with pytest.raises(LineFullError):
        enter(line, "low", Ticket("acme", LOW))


def test_the_bound_of_tokens_holds_beside_that_of_items() -> None:
    line = line_of(max_tokens=100)
    enter(line, "first", Ticket("acme", tokens=80))
    with pytest.raises(LineFullError) as refused:
        enter(line, "second", Ticket("acme", tokens=30))
    assert refused.value.excess == 30
    enter(line, "third", Ticket("acme", tokens=20))
    assert line.cost == 100


def test_nobody_is_put_out_for_one_that_does_not_fit_anyway() -> None:
    line = line_of(max_tokens=100)
    enter(line, "small", Ticket("small", tokens=20))
    enter(line, "large", Ticket("large", tokens=80))
    with pytest.raises(LineFullError):
        enter(line, "huge", Ticket("huge", tokens=95))
    assert set(order(line)) == {"small", "large"}


# -------------------------------------------------------------------- what is ahead


def test_the_cost_ahead_counts_shares_levels_and_deadlines() -> None:
    line = line_of()
    enter(line, "a", Ticket("acme", tokens=100, deadline=10.0))
    enter(line, "b", Ticket("acme", tokens=100, deadline=50.0))
    enter(line, "c", Ticket("zeta", tokens=400))

    def ahead(ticket: Ticket) -> float:
        return line.cost_ahead(line.waiter("x", ticket, 0.0))

    assert ahead(Ticket("acme", deadline=5.0)) == 0
    assert ahead(Ticket("acme", deadline=20.0)) == 100 + 100
    assert ahead(Ticket("acme", deadline=55.0)) == 200 + 200
    assert ahead(Ticket("newcomer", deadline=55.0)) == 0
    assert ahead(Ticket("newcomer", LOW)) == 600


# -------------------------------------------------------------------- properties

sizes = st.integers(1, 5_000)


@settings(deadline=None)
@given(
    first=st.lists(sizes, min_size=1, max_size=80),
    second=st.lists(sizes, min_size=1, max_size=80),
    weight=st.sampled_from([0.25, 1.0, 3.0]),
    stop=st.integers(1, 160),
)
def test_shares_of_two_that_wait_differ_by_less_than_one_item_each(
    first: list[int], second: list[int], weight: float, stop: int
) -> None:
    line = line_of({"first": weight}, max_items=10**6)
    for size in first:
        enter(line, "first", Ticket("first", tokens=size))
    for size in second:
        enter(line, "second", Ticket("second", tokens=size))
    got = {"first": 0.0, "second": 0.0}
    left = Counter(first=len(first), second=len(second))
    bound = max(max(first) / weight, *second)
    for _ in range(stop):
        if not (left["first"] and left["second"]):
            break
        waiter = line.take(0.0)
        assert waiter is not None
        left[waiter.payload] -= 1
        got[waiter.payload] += waiter.cost / (weight if waiter.payload == "first" else 1.0)
        assert abs(got["first"] - got["second"]) <= bound + 1e-6


steps = st.lists(
    st.tuples(
        st.sampled_from(["enter", "enter", "enter", "take", "leave", "tick", "back"]),
        st.sampled_from(["a", "b", "c", "d"]),
        st.integers(1, 3),
        st.integers(1, 500),
        st.floats(0.0, 20.0),
    ),
    max_size=120,
)


@settings(deadline=None, max_examples=200)
@given(steps=steps, delay=st.booleans())
def test_whatever_happens_each_leaves_the_line_exactly_once(
    steps: list[tuple[str, str, int, int, float]], delay: bool
) -> None:
    line = line_of(
        max_items=12,
        max_tokens=2_000,
        starvation_s=3.0,
        timeout_s=8.0,
        timeout_action="delay" if delay else "reject",
    )
    inside: dict[int, Waiter[str]] = {}
    now = 0.0
    for action, tenant, priority, size, amount in steps:
        if action == "enter":
            ticket = Ticket(tenant, priority, size, now + amount if amount > 5 else None)
            waiter = line.waiter(tenant, ticket, now)
            try:
                gone = line.enter(waiter)
            except LineFullError:
                continue
            for each in gone:
                del inside[each.number]
            inside[waiter.number] = waiter
        elif action in ("take", "back"):
            taken = line.take(now)
            assert (taken is None) == (not inside)
            if taken is not None and action == "take":
                del inside[taken.number]
            elif taken is not None:
                line.put_back(taken)
        elif action == "leave" and inside:
            chosen = inside.pop(random.Random(size).choice(sorted(inside)))
            line.leave(chosen)
        elif action == "tick":
            now += amount
            for each in line.expire(now):
                del inside[each.number]
        assert line.size == len(inside)
        assert line.cost == sum(each.cost for each in inside.values())
        assert all(each.waiting for each in inside.values())
    while inside:
        taken = line.take(now)
        assert taken is not None
        del inside[taken.number]
    assert line.take(now) is None
