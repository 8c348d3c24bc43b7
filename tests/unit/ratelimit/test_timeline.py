"""The time that a replica takes along to Redis, and windows that it tells of."""

from __future__ import annotations

import pytest

from agent360.mesh.ratelimit.record_ids import Kind
from agent360.mesh.ratelimit.stores.redis.places import Part, record_id, tags_of
from agent360.mesh.ratelimit.stores.redis.timeline import Timeline
from agent360.mesh.ratelimit.windows import Calendar, CalendarWindows

S = 1_000_000
BEGIN = 1_790_000_000 * S


class Monotonic:
    def __init__(self) -> None:
        self.ns = 5_000

    def __call__(self) -> int:
        return self.ns

    def advance(self, s: float) -> None:
        self.ns += round(s * 1e9)


def test_a_timeline_that_was_told_nothing_knows_nothing() -> None:
    assert Timeline(Monotonic()).now_us() == 0


def test_a_timeline_stays_behind_a_clock_that_runs_and_goes_on_where_it_was_set_back() -> None:
    monotonic = Monotonic()
    timeline = Timeline(monotonic)
    timeline.note(BEGIN)
    monotonic.advance(10)
    assert timeline.now_us() == BEGIN + 9_500_000
    timeline.note(BEGIN + 10 * S)
    assert timeline.now_us() == BEGIN + 10 * S
    monotonic.advance(10)
    assert timeline.now_us() == BEGIN + 19_500_000


def test_an_answer_that_was_overtaken_by_a_later_one_changes_nothing() -> None:
    timeline = Timeline(Monotonic())
    timeline.note(BEGIN + 50_000)
    timeline.note(BEGIN)
    assert timeline.now_us() == BEGIN + 50_000


def test_a_clock_that_was_set_back_beyond_what_is_bridged_is_followed() -> None:
    timeline = Timeline(Monotonic())
    timeline.note(BEGIN)
    timeline.note(BEGIN - 3_600 * S)
    assert timeline.now_us() == BEGIN - 3_600 * S


@pytest.mark.parametrize("unit", list(Calendar))
def test_boundaries_are_those_of_windows_one_after_another(unit: Calendar) -> None:
    windows, fresh = CalendarWindows(unit, "Europe/Berlin"), CalendarWindows(unit, "Europe/Berlin")
    for now in (BEGIN, BEGIN + 1, BEGIN + 400 * 86_400 * S, BEGIN - 86_400 * S):
        before, *others = windows.boundaries(now)
        assert others[0] <= now < others[1]
        assert fresh.at(before).end == others[0]
        assert [fresh.at(each).start for each in others] == others
        assert [fresh.at(each).end for each in others[:-1]] == others[1:]


def test_an_id_says_in_which_slots_its_record_is_and_is_made_anew_or_from_the_request() -> None:
    parts = [Part("acme", ()), Part("~all", ())]
    ids = {record_id(Kind.RESERVATION, "acme", parts, ("x", "r-1")) for _ in range(3)}
    assert len(ids) == 1
    assert tags_of("acme", ids.pop()) == ["acme", "~all"]
    assert len({record_id(Kind.LEASE, "acme", parts) for _ in range(3)}) == 3
    alone = record_id(Kind.SLOTS, "acme", [Part("~all", ())])
    assert tags_of("acme", alone) == ["~all"]
