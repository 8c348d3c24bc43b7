"""How often keys that are not held were used: a count-min sketch that ages and grows."""

from __future__ import annotations

from typing import Final

MAX_FREQUENCY: Final = 15

_HALVED: Final = bytes(value >> 1 for value in range(256))
_SLOTS_PER_KEY: Final = 8
_LEAST_SLOTS: Final = 1 << 12


class FrequencySketch:
    """Remembers, in a byte a slot, how often keys were used that are no longer held.

    The entries that are held carry their own exact counts: the sketch is asked when one comes and
    told when one goes, never on a read. Keys that share all four slots share a count, which can
    misplace an entry in the order of eviction and nothing else.

    Source: Cormode and Muthukrishnan, "An improved data stream summary: the count-min sketch and
    its applications", 2005; the aging is TinyLFU's (Einziger, Friedman and Manes, 2017).
    """

    __slots__ = ("_mask", "_slots")

    def __init__(self) -> None:
        self._slots = bytearray(_LEAST_SLOTS)
        self._mask = _LEAST_SLOTS - 1

    def estimate(self, key_hash: int) -> int:
        """How often the key was used, or more; at most ``MAX_FREQUENCY``."""
        slots, mask = self._slots, self._mask
        mixed = _mix(key_hash)
        return min(
            slots[mixed & mask],
            slots[(mixed >> 11) & mask],
            slots[(mixed >> 22) & mask],
            slots[(mixed >> 33) & mask],
        )

    def record(self, key_hash: int, frequency: int) -> None:
        """Notes that the key was used ``frequency`` times."""
        slots, mask = self._slots, self._mask
        mixed = _mix(key_hash)
        for shift in (0, 11, 22, 33):
            slot = (mixed >> shift) & mask
            if slots[slot] < frequency:
                slots[slot] = frequency

    def halve(self) -> None:
        """Ages all counts."""
        self._slots = self._slots.translate(_HALVED)

    def fit(self, keys: int) -> None:
        """Grows until there is room to tell ``keys`` keys apart; what is known stays known."""
        while len(self._slots) < keys * _SLOTS_PER_KEY:
            # A key's slots in the doubled table are copies of its slots in this one.
            self._slots = self._slots * 2
            self._mask = len(self._slots) - 1


def _mix(key_hash: int) -> int:
    """Spreads a hash over 64 bits; a tuple's hash does (a round of xxHash), and at no cost."""
    return hash((key_hash,))
