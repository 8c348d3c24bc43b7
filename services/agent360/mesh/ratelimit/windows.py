"""Windows of time that follow each other: plain periods, and hours to years of a calendar."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import lru_cache
from typing import Final, NamedTuple, Protocol
from zoneinfo import ZoneInfo

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


class Calendar(Enum):
    """A period of the calendar."""

    HOUR = "hour"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    YEAR = "year"

    @property
    def length_s(self) -> float:
        """Its usual length in seconds."""
        return _LENGTHS_S[self.value]


_LENGTHS_S: Final = {
    "hour": 3_600.0,
    "day": 86_400.0,
    "week": 7 * 86_400.0,
    "month": 30 * 86_400.0,
    "year": 365 * 86_400.0,
}


class Window(NamedTuple):
    """A span of time in microseconds since 1970; the end is not part of it."""

    start: int
    end: int


class Windows(Protocol):
    """The windows of one limit."""

    def at(self, now: int) -> Window:
        """The window that a time is in."""


class PlainWindows:
    """Windows that begin at multiples of a period since 1970."""

    def __init__(self, period_us: int) -> None:
        self.period_us = period_us
        """Their length."""

    def at(self, now: int) -> Window:
        """See ``Windows.at``."""
        start = now // self.period_us * self.period_us
        return Window(start, start + self.period_us)


@lru_cache(maxsize=1_024)
def calendar_windows(unit: Calendar, time_zone: str) -> CalendarWindows:
    """The windows of a calendar; they remember what they found last."""
    return CalendarWindows(unit, time_zone)


class CalendarWindows:
    """Hours, days, weeks (from Monday), months or years of a time zone.

    A day with a change of clocks has 23 or 25 hours.
    """

    def __init__(self, unit: Calendar, time_zone: str) -> None:
        """Makes them.

        Raises:
            ZoneInfoNotFoundError: there is no such time zone.
        """
        self._unit = unit
        self._zone = ZoneInfo(time_zone or "UTC")
        self._last = Window(0, 0)
        self._around: tuple[Window, tuple[int, ...]] = self._last, ()

    def at(self, now: int) -> Window:
        """See ``Windows.at``."""
        if not self._last.start <= now < self._last.end:
            self._last = self._find(now)
        return self._last

    def boundaries(self, now: int) -> tuple[int, ...]:
        """Where windows begin, from the one before that of a time to the fourth after it."""
        around, found = self._around
        if not around.start <= now < around.end:
            around = self._find(now)
            ends = [around.end]
            for _ in range(3):
                ends.append(self._find(ends[-1]).end)
            found = (self._find(around.start - 1).start, around.start, *ends)
            self._around = around, found
        return found

    def _find(self, now: int) -> Window:
        local = (_EPOCH + timedelta(microseconds=now)).astimezone(self._zone)
        if self._unit is Calendar.HOUR:  # of the local clock, whole hours of time
            into = local.minute * 60_000_000 + local.second * 1_000_000 + local.microsecond
            return Window(now - into, now - into + 3_600_000_000)
        day = local.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None, fold=0)
        match self._unit:
            case Calendar.DAY:
                first, after = day, day + timedelta(days=1)
            case Calendar.WEEK:
                first = day - timedelta(days=day.weekday())
                after = first + timedelta(days=7)
            case Calendar.MONTH:
                first = day.replace(day=1)
                after = (first + timedelta(days=31)).replace(day=1)
            case _:
                first = day.replace(month=1, day=1)
                after = first.replace(year=first.year + 1)
        return Window(self._instant(first), self._instant(after))

    def _instant(self, local: datetime) -> int:
        return (local.replace(tzinfo=self._zone) - _EPOCH) // _MICROSECOND
