"""Counts how often keys were asked for of late: some namespaces keep only what is wanted again."""

from __future__ import annotations

from typing import Final

_MAX_KEYS: Final = 200_000


class Doorkeeper:
    """Accesses of keys in the present window of time and the one before.

    A key's count is that of both windows together, so it ages: what was wanted yesterday must be
    wanted again. Lookups and writes are counted apart and the larger number counts: a caller that
    looks, misses and writes has asked for the key once.

    Keys are told apart by a 64-bit hash: two that share it are admitted a little early.
    """

    __slots__ = ("_before", "_ends", "_now", "_window_s")

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._now: dict[int, list[int]] = {}
        self._before: dict[int, list[int]] = {}
        self._ends = 0.0

    def looked_up(self, key: str, now: float) -> None:
        """Notes that a key was asked for."""
        self._row(key, now)[0] += 1

    def written(self, key: str, now: float) -> int:
        """Notes that a key is to be written; returns how often it was asked for."""
        row = self._row(key, now)
        row[1] += 1
        before = self._before.get(hash(key), (0, 0))
        return max(row[0] + before[0], row[1] + before[1])

    def _row(self, key: str, now: float) -> list[int]:
        if now >= self._ends or len(self._now) >= _MAX_KEYS:
            passed = now >= self._ends + self._window_s
            self._before = {} if passed else self._now
            self._now = {}
            self._ends = now + self._window_s
        key_hash = hash(key)
        row = self._now.get(key_hash)
        if row is None:
            row = self._now[key_hash] = [0, 0]
        return row
