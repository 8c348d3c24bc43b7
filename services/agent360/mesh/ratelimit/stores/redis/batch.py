"""Operations of one slot that are carried out by one run of the script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from agent360.mesh.ratelimit.limits import Limit
from agent360.mesh.ratelimit.stores.redis.keys import Count
from agent360.mesh.runtime.redis import Command, Script

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


class Batch:
    """Gathers operations; each count is named once.

    Invariant: counts come before records among the keys, in the order in which the script's list
    of counts has them; references to records are resolved when the command is made.
    """

    __slots__ = ("_counts", "_operations", "_places", "_records", "_spec_of")

    def __init__(self, spec_of: Callable[[Limit], Sequence[Any]]) -> None:
        self._spec_of = spec_of
        self._places: dict[str, int] = {}
        self._counts: list[Sequence[Any]] = []
        self._records: list[str] = []
        self._operations: list[list[Any]] = []

    def place(self, count: Count) -> int:
        """The number of a count among the keys, from 1."""
        place = self._places.get(count.key)
        if place is None:
            self._counts.append(self._spec_of(count.limit))
            place = self._places[count.key] = len(self._counts)
        return place

    def places(self, counts: Sequence[Count]) -> list[int]:
        """The numbers of some counts."""
        return [self.place(count) for count in counts]

    def record(self, key: str) -> Any:
        """Refers to a record's key, for ``add``."""
        self._records.append(key)
        return _Record(len(self._records))

    def add(self, *operation: Any) -> int:
        """Adds an operation; returns its place among the results."""
        self._operations.append(list(operation))
        return len(self._operations) - 1

    def command(self, script: Script) -> Command:
        """The command that carries all of them out."""
        before = len(self._counts)
        for operation in self._operations:
            for at, value in enumerate(operation):
                if type(value) is _Record:
                    operation[at] = before + value.number
        keys = [key.encode() for key in (*self._places, *self._records)]
        return script.command(keys, [_encode((self._counts, self._operations))])


class _Record:
    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


def results_of(reply: bytes) -> list[Any]:
    """What the script answered, one result for each operation."""
    results: list[Any] = _decode(reply)
    return results
