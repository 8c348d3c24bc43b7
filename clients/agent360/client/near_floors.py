"""What a near cache may not take in: answers that recent invalidations may have outdated."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final, NamedTuple, TypeVar

REMEMBER_S: Final = 10.0
"""How long an invalidation is remembered; an answer that took longer is not taken in."""
MAX_FLOORS: Final = 20_000
"""Keys whose invalidations are remembered."""
MAX_NAMESPACES: Final = 1_000
"""Namespaces whose invalidations are remembered."""

_NEVER: Final = -math.inf

_K = TypeVar("_K")


class _Floor(NamedTuple):
    """What the answers about a key, or about a namespace, must be above."""

    version: int
    """Entries up to this version are outdated."""
    barrier: float
    """Requests must have been sent at this time or later."""
    until: float
    """When all this may be forgotten."""


_NO_FLOOR: Final = _Floor(-1, _NEVER, _NEVER)


class Floors:
    """The recent invalidations of one tenant, in bounded memory.

    An answer may be on its way while its entry is invalidated, and a replica may not have heard of
    an invalidation yet: so what was invalidated is remembered for ``REMEMBER_S``, as a version, and
    where versions do not tell enough, as a time before which requests must not have been sent.

    Invariant: no answer that one of the invalidations of the last ``REMEMBER_S`` outdated is
    allowed, also where some had to be forgotten early.

    Example:
        >>> floors = Floors()
        >>> floors.open(now)
        >>> floors.raise_key("plans", "plan:42", version=7, now=now)
        >>> floors.allow("plans", "plan:42", version=7, sent=now, now=now)
        False
    """

    __slots__ = ("_barrier", "_keys", "_max", "_namespaces")

    def __init__(self, max_floors: int = MAX_FLOORS) -> None:
        """Makes floors that allow nothing until they are opened.

        Args:
            max_floors: how many keys are remembered.
        """
        self._max = max_floors
        self._barrier = math.inf
        self._keys: OrderedDict[tuple[str, str], _Floor] = OrderedDict()
        self._namespaces: OrderedDict[str, _Floor] = OrderedDict()

    def __len__(self) -> int:
        """How many keys are remembered."""
        return len(self._keys)

    def open(self, barrier: float) -> None:
        """Allows answers to requests sent at ``barrier`` or later."""
        self._barrier = barrier

    def close(self) -> None:
        """Allows nothing."""
        self._barrier = math.inf
        self._keys.clear()
        self._namespaces.clear()

    def bar(self, barrier: float) -> None:
        """Allows no answers to requests sent before ``barrier``."""
        self._barrier = max(self._barrier, barrier)

    def bar_namespace(self, namespace: str, barrier: float, now: float, version: int = 0) -> None:
        """The same for one namespace, and for entries up to ``version`` for a while."""
        forgotten = _raise(
            self._namespaces, namespace, _Floor(version, barrier, now + REMEMBER_S),
            now, MAX_NAMESPACES,
        )  # fmt: skip
        self.bar(forgotten)

    def raise_key(
        self, namespace: str, key: str, version: int, now: float, barrier: float = _NEVER
    ) -> None:
        """Allows no entry of a key up to ``version``, nor requests sent before ``barrier``."""
        forgotten = _raise(
            self._keys, (namespace, key), _Floor(version, barrier, now + REMEMBER_S),
            now, self._max,
        )  # fmt: skip
        self.bar(forgotten)

    def allow(self, namespace: str, key: str, version: int, sent: float, now: float) -> bool:
        """Whether an answer may be taken in.

        Args:
            namespace: of the entry.
            key: of the entry.
            version: of the entry.
            sent: when the request was made.
            now: when the answer is there.
        """
        if sent < self._barrier or now - sent > REMEMBER_S:
            return False
        floor = self._namespaces.get(namespace)
        if floor is not None and _below(floor, version, sent, now):
            return False
        floor = self._keys.get((namespace, key))
        return floor is None or not _below(floor, version, sent, now)


def _below(floor: _Floor, version: int, sent: float, now: float) -> bool:
    return now < floor.until and (version <= floor.version or sent < floor.barrier)


def _raise(
    floors: OrderedDict[_K, _Floor], key: _K, floor: _Floor, now: float, limit: int
) -> float:
    """Raises a floor and forgets old ones; returns until when one that went early had to stay."""
    there = floors.pop(key, _NO_FLOOR)
    floors[key] = _Floor(
        max(there.version if now < there.until else -1, floor.version),
        max(there.barrier, floor.barrier),
        floor.until,
    )
    forgotten = _NEVER
    while floors:
        oldest = next(iter(floors))
        until = floors[oldest].until
        if now < until:
            if len(floors) <= limit:
                break
            forgotten = until
        del floors[oldest]
    return forgotten
