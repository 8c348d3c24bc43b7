"""Operations of one slot that are carried out by one run of the script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from agent360.mesh.ratelimit.domain import Ask
from agent360.mesh.ratelimit.limits import Limit
from agent360.mesh.ratelimit.stores.redis.keys import Count
from agent360.mesh.ratelimit.stores.redis.places import Part
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
            self._counts.append(count.spec or self._spec_of(count.limit))
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

    def command(self, script: Script, version: int, now_us: int) -> Command:
        """The command that carries all of them out.

        Args:
            script: that knows the operations.
            version: of the limits.
            now_us: what is known of the time; see ``Timeline``.
        """
        before = len(self._counts)
        for operation in self._operations if self._records else ():
            for at, value in enumerate(operation):
                if type(value) is _Record:
                    operation[at] = before + value.number
        keys = [key.encode() for key in (*self._places, *self._records)]
        return script.command(keys, [_encode((self._counts, self._operations, version)), now_us])


class _Record:
    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class Batches:
    """Batches by tag."""

    __slots__ = ("_spec_of", "by_tag")

    def __init__(self, spec_of: Callable[[Limit], Sequence[Any]]) -> None:
        self._spec_of = spec_of
        self.by_tag: dict[str, Batch] = {}

    def __bool__(self) -> bool:
        return bool(self.by_tag)

    def of(self, tag: str) -> Batch:
        """The batch of a tag."""
        batch = self.by_tag.get(tag)
        if batch is None:
            batch = self.by_tag[tag] = Batch(self._spec_of)
        return batch

    def add_decide(self, part: Part, ask: Ask, times: int) -> tuple[str, int]:
        """Adds decisions; returns where their result will be."""
        batch = self.of(part.tag)
        places = batch.places(part.counts)
        if times > 1:
            return part.tag, batch.add("m", ask.hits, places, times)
        return part.tag, batch.add("d", ask.hits, int(ask.allow_partial), places)

    def add_give_back(self, part: Part, hits: int, row: Sequence[Any]) -> None:
        """Adds the undoing of a part of what a row says was charged."""
        batch = self.of(part.tag)
        batch.add("g", hits, batch.places(part.counts), row[6], row[1])


def results_of(reply: bytes) -> tuple[list[Any], int]:
    """What the script answered: one result for each operation, and the time it went by."""
    *results, now_us = _decode(reply)
    return results, now_us
