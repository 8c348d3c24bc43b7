"""Cumulative numbers turned into increases, with resets known by their start times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import msgspec

from agent360.mesh.metrics.ports import Mark

PREFIX: Final = "otlp/"
"""Marks of cumulative series begin with it."""

SUM: Final = "sum"
"""The name of a histogram's sum, which may also decrease."""

Numbers = dict[str, float]


class Total(msgspec.Struct, array_like=True, frozen=True):
    """What a cumulative series had counted at a time."""

    start_ns: int
    """When it began to count, Unix time; 0: not known."""
    time_ns: int
    numbers: Numbers
    """What it counts, by name: one number, or the sum and the buckets of a histogram."""
    scale: int = 0
    """Of an exponential histogram: its buckets are named ``p`` and ``n`` with their places."""


class TooManyTotalsError(Exception):
    """As many cumulative series are followed as may be."""


class StaleTotalError(Exception):
    """A total is from before a restart that was seen."""


class Followed(NamedTuple):
    """What a total adds."""

    increase: Numbers | None
    """None: nothing is known, as it is the first of a series that began before the service did, or
    nothing is new, as it came before."""
    mark: Mark | None
    """What to remember; None: nothing new."""
    scale: int = 0
    """Of an exponential histogram: that of the increase."""


class Totals:
    """Follows cumulative series; what it remembers are marks, made durable with the samples.

    A series that is new is taken from its beginning if that was after ``since_ns``; otherwise its
    first total only tells where it stands, for how much of it came lately is not known.
    """

    def __init__(self, marks: Callable[[], Mapping[str, Mark]], bound: int, since_ns: int) -> None:
        """Makes one.

        Args:
            marks: gives all marks there are now.
            bound: cumulative series that are followed.
            since_ns: Unix time; series that began later are known from their beginning.
        """
        self._marks = marks
        self._bound = bound
        self._since_ns = since_ns
        self._count = 0

    def follow(self, name: str, total: Total, earlier: Mapping[str, Mark]) -> Followed:
        """What a total adds to the one before.

        Args:
            name: of the series' mark.
            total: what came.
            earlier: marks that were made since and are not in ``marks`` yet.

        Raises:
            TooManyTotalsError: it is new and there is no room.
            StaleTotalError: it is from before a restart that was seen.
        """
        mark = earlier.get(name) or self._marks().get(name)
        if mark is None:
            self._make_room(len(earlier))
            whole = dict(total.numbers) if total.start_ns >= self._since_ns else None
            return Followed(whole, _mark(total), total.scale)
        before = msgspec.msgpack.decode(mark.value, type=Total)
        if total.start_ns and total.start_ns < before.start_ns:
            raise StaleTotalError
        if total.start_ns == before.start_ns and total.time_ns <= before.time_ns:
            return Followed(None, None)
        if total.start_ns == before.start_ns:
            increase = _difference(total, before)
            if increase is not None:
                return Followed(increase, _mark(total), min(total.scale, before.scale))
        return Followed(dict(total.numbers), _mark(total), total.scale)

    def _make_room(self, coming: int) -> None:
        self._count += 1
        if self._count + coming > self._bound:
            self._count = sum(name.startswith(PREFIX) for name in self._marks()) + 1
            if self._count + coming > self._bound:
                raise TooManyTotalsError


def _mark(total: Total) -> Mark:
    return Mark(msgspec.msgpack.encode(total), total.time_ns / 1e9)


def _difference(after: Total, before: Total) -> Numbers | None:
    """What was added; None if something became less: it began anew without saying so."""
    scale = min(after.scale, before.scale)
    new, old = _at_scale(after, scale), _at_scale(before, scale)
    increase = {name: number - old.get(name, 0) for name, number in new.items()}
    lost = any(name not in new for name, number in old.items() if number)
    decreased = any(amount < 0 for name, amount in increase.items() if name != SUM)
    return None if lost or decreased else increase


def _at_scale(total: Total, scale: int) -> Numbers:
    """Numbers of an exponential histogram with wider buckets: two become one at each step."""
    shift = total.scale - scale
    if not shift:
        return total.numbers
    numbers: Numbers = {}
    for name, number in total.numbers.items():
        wider = f"{name[0]}{int(name[1:]) >> shift}" if name[0] in "pn" else name
        numbers[wider] = numbers.get(wider, 0) + number
    return numbers
