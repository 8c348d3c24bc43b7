"""How large the window of new entries should be: learnt from what is missed."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

LEAST_SHARE: Final = 0.01
MOST_SHARE: Final = 0.95

_REMEMBERED_PART: Final = 16
_LEAST_REMEMBERED: Final = 8
_MOST_REMEMBERED: Final = 4_096


class WindowShare:
    """The part of the room that the window of new entries should have.

    The keys of the entries that went last are remembered: of those that were refused as they left
    the window, and of as many that were pushed out of the rest. A key that comes again would have
    been there if the one side had been larger, or the other: the window grows by a small step, or
    shrinks by one. So it stays small where some keys are used much more than others, and takes
    nearly all of the room where what was used last is used next.

    Sources: Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", 2003 (what is
    missed says which side should grow); Einziger, Eytan, Friedman and Manes, "Adaptive software
    cache management", 2018 (the size of the window is what to adapt).

    Example:
        >>> share = WindowShare()
        >>> share.note_refused(42)
        >>> share.note_arrival(42), share.value > LEAST_SHARE
        (True, True)
    """

    __slots__ = ("_evicted", "_refused", "_remembered", "_step", "value")

    def __init__(self) -> None:
        self.value = LEAST_SHARE
        """The share, from ``LEAST_SHARE`` to ``MOST_SHARE``."""
        self._refused: OrderedDict[int, None] = OrderedDict()
        self._evicted: OrderedDict[int, None] = OrderedDict()
        self.fit(0)

    def note_refused(self, key_hash: int) -> None:
        """Notes that an entry left the window and was not let in."""
        self._remember(self._refused, key_hash)

    def note_evicted(self, key_hash: int) -> None:
        """Notes that an entry was pushed out."""
        self._remember(self._evicted, key_hash)

    def note_arrival(self, key_hash: int) -> bool:
        """Notes that an entry comes; returns whether that changed the share."""
        if key_hash in self._refused:
            del self._refused[key_hash]
            wanted = min(MOST_SHARE, self.value + self._step)
        elif key_hash in self._evicted:
            del self._evicted[key_hash]
            wanted = max(LEAST_SHARE, self.value - self._step)
        else:
            return False
        changed, self.value = wanted != self.value, wanted
        return changed

    def fit(self, held: int) -> None:
        """Remembers as many keys as are a good sample where ``held`` entries are held."""
        part = held // _REMEMBERED_PART
        self._remembered = max(_LEAST_REMEMBERED, min(_MOST_REMEMBERED, part))
        self._step = 1 / (_REMEMBERED_PART * self._remembered)

    def _remember(self, keys: OrderedDict[int, None], key_hash: int) -> None:
        keys[key_hash] = None
        while len(keys) > self._remembered:
            keys.popitem(last=False)
