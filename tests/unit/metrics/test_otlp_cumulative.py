"""Cumulative totals against a plain reckoning, with resets, repetitions and other scales."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent360.mesh.metrics.otlp.cumulative import (
    PREFIX,
    StaleTotalError,
    TooManyTotalsError,
    Total,
    Totals,
)
from agent360.mesh.metrics.ports import Mark

NAME = PREFIX + "a"


class Follower:
    """Follows series and remembers their marks, as the intake does."""

    def __init__(self, bound: int = 10, since_ns: int = 0) -> None:
        self.marks: dict[str, Mark] = {}
        self._totals = Totals(lambda: self.marks, bound, since_ns)

    def add(self, total: Total, name: str = NAME) -> dict[str, float] | None:
        followed = self._totals.follow(name, total, {})
        if followed.mark is not None:
            self.marks[name] = followed.mark
        return followed.increase


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=5))
def test_increases_add_up_to_all_that_was_counted_over_restarts(lives: list[list[int]]) -> None:
    follower, seen, time_ns = Follower(), 0.0, 1
    for life in lives:
        start_ns, counted = time_ns, 0
        for step in life:
            time_ns += 1
            counted += step
            total = Total(start_ns, time_ns, {"value": counted})
            seen += (follower.add(total) or {"value": 0})["value"]
            assert follower.add(total) is None, "it came again"
    assert seen == sum(map(sum, lives))


def test_a_total_that_fell_without_a_new_start_began_anew() -> None:
    follower = Follower()
    follower.add(Total(1, 2, {"value": 10}))
    assert follower.add(Total(1, 3, {"value": 4})) == {"value": 4}


def test_a_bucket_that_fell_or_vanished_is_a_reset_and_a_sum_that_fell_is_not() -> None:
    follower = Follower()
    follower.add(Total(1, 2, {"0": 3, "1": 2, "sum": 9.0}))
    assert follower.add(Total(1, 3, {"0": 4, "1": 2, "sum": 5.0})) == {
        "0": 1,
        "1": 0,
        "sum": -4.0,
    }
    assert follower.add(Total(1, 4, {"0": 9, "sum": 9.0})) == {"0": 9, "sum": 9.0}


def test_an_exponential_histogram_is_compared_at_the_coarser_scale() -> None:
    follower = Follower()
    follower.add(Total(1, 2, {"p4": 3, "p5": 1, "n-3": 2, "zeros": 1}, 2))
    assert follower.add(Total(1, 3, {"p2": 6, "n-2": 2, "zeros": 1}, 1)) == {
        "p2": 2,
        "n-2": 0,
        "zeros": 0,
    }


def test_what_began_before_the_service_only_tells_where_it_stands() -> None:
    follower = Follower(since_ns=100)
    assert follower.add(Total(50, 200, {"value": 1_000})) is None
    assert follower.add(Total(50, 201, {"value": 1_001})) == {"value": 1}


def test_a_total_from_before_a_restart_is_refused() -> None:
    follower = Follower()
    follower.add(Total(5, 6, {"value": 1}))
    with pytest.raises(StaleTotalError):
        follower.add(Total(1, 7, {"value": 9}))


def test_no_more_are_followed_than_may_be_and_the_forgotten_make_room() -> None:
    follower = Follower(bound=2)
    follower.marks["report/x"] = Mark(b"", 0)
    for name in "ab":
        follower.add(Total(1, 2, {"value": 1}), PREFIX + name)
    with pytest.raises(TooManyTotalsError):
        follower.add(Total(1, 2, {"value": 1}), PREFIX + "c")
    del follower.marks[PREFIX + "a"]
    follower.add(Total(1, 2, {"value": 1}), PREFIX + "c")
    assert msgspec.msgpack.decode(follower.marks[PREFIX + "c"].value, type=Total).time_ns == 2
