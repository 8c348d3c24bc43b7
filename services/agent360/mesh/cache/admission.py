"""Which entries are kept when there is no room for all: W-TinyLFU, with sizes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, NamedTuple

from agent360.mesh.cache.entry import Entry
from agent360.mesh.cache.frequency import MAX_FREQUENCY, FrequencySketch
from agent360.mesh.cache.window import WindowShare

_PROTECTED_SHARE: Final = 0.8
_READS_PER_ENTRY: Final = 10
_LEAST_SAMPLE: Final = 1_000
_MOST_TURNED_DOWN: Final = 100_000
_UNBEATEN: Final = 1 << 30


class Bounds(NamedTuple):
    """What entries may take in all."""

    entries: int
    """How many."""
    size_bytes: int
    """How many bytes."""

    def share(self, part: float) -> Bounds:
        """A part of the bounds; at least one entry."""
        return Bounds(max(1, int(self.entries * part)), int(self.size_bytes * part))


class Segment:
    """Entries in the order of their last use, the oldest first.

    Invariant: ``size_bytes`` is the sum of the entries' sizes, and an entry's ``segment`` is this.
    """

    __slots__ = ("order", "size_bytes")

    def __init__(self) -> None:
        self.order: OrderedDict[Entry, None] = OrderedDict()
        self.size_bytes = 0

    def add(self, entry: Entry) -> None:
        """Puts an entry last."""
        self.order[entry] = None
        self.size_bytes += entry.size_bytes
        entry.segment = self

    def discard(self, entry: Entry) -> None:
        """Takes an entry out."""
        del self.order[entry]
        self.size_bytes -= entry.size_bytes
        entry.segment = None

    def pop_oldest(self) -> Entry:
        """Takes out the entry that was used longest ago."""
        entry, _ = self.order.popitem(last=False)
        self.size_bytes -= entry.size_bytes
        entry.segment = None
        return entry

    def exceeds(self, bounds: Bounds) -> bool:
        """Whether the entries take more than the bounds allow."""
        return len(self.order) > bounds.entries or self.size_bytes > bounds.size_bytes


class Outcome(NamedTuple):
    """What became of entries when one was added."""

    evicted: list[Entry]
    """Pushed out: by others that are used more, or because the bounds shrank."""
    rejected: list[Entry]
    """Refused: used less than those they would push out."""
    admitted: list[Entry]
    """Let in for good."""


class TinyLfu:
    """Keeps what is used most, within a number of entries and of bytes.

    New entries pass through a window, which keeps what is used in bursts and is as large as that is
    worth. An entry that leaves the window is let in only if it was used more often than the entries
    it would push out were together: a large one must be worth the several small ones whose room it
    takes. Uses are counted over a sample that ages, so that yesterday's keys do not stay for ever.

    Invariant: after ``add``, ``resized`` and ``shrink`` what is held is within ``bounds``, and
    ``size_bytes`` is the sum over the segments. Within them both count a candidate for admission,
    which is in no segment.

    Sources: Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy",
    2017; Einziger, Eytan, Friedman and Manes, "Lightweight robust size aware cache management",
    2022 (aggregated victims); ``WindowShare`` names those of the window's size.
    """

    __slots__ = (
        "_held", "_probation", "_protected", "_protected_bounds", "_sample", "_share", "_sketch",
        "_turned_down", "_turned_down_before", "_used", "_window", "_window_bounds", "bounds",
        "epoch", "size_bytes",
    )  # fmt: skip

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.epoch = 0
        self._share = WindowShare()
        self._divide()
        self._window = Segment()
        self._probation = Segment()
        self._protected = Segment()
        self._sketch = FrequencySketch()
        self._used = 0
        self._sample = _LEAST_SAMPLE
        self._held = 0
        self._turned_down: set[int] = set()
        self._turned_down_before: set[int] = set()
        self.size_bytes = 0
        """Bytes of all entries."""

    def __len__(self) -> int:
        return self._held

    def used(self, entries: Iterable[Entry]) -> None:
        """Notes reads, one for each element; entries that are gone meanwhile are passed over."""
        epoch, probation = self.epoch, self._probation
        count = 0
        for entry in entries:
            count += 1
            segment = entry.segment
            if segment is None:
                continue
            if entry.reads_epoch != epoch:
                entry.reads >>= epoch - entry.reads_epoch
                entry.reads_epoch = epoch
            if entry.reads < MAX_FREQUENCY:
                entry.reads += 1
            if segment is probation:
                self._protect(entry)
            else:
                segment.order.move_to_end(entry)
        self._count(count)

    def add(self, entry: Entry, *, always: bool = False) -> Outcome:
        """Takes a new entry; afterwards what is held is within the bounds.

        Args:
            entry: not held.
            always: let it in for good however little it was used; the coldest go.
        """
        entry.reads_epoch = self.epoch
        entry.reads = min(MAX_FREQUENCY, self._sketch.estimate(entry.key_hash) + 1)
        if self._share.note_arrival(entry.key_hash):
            self._divide()
        self._count(1)
        outcome = Outcome([], [], [])
        self._held += 1
        self.size_bytes += entry.size_bytes
        if always:
            self._admit(entry, _UNBEATEN, outcome)
        else:
            self._window.add(entry)
            if entry.size_bytes > self._window_bounds.size_bytes:
                self._window.order.move_to_end(entry, last=False)
        self._settle(outcome)
        return outcome

    def wants_copy(self, key_hash: int, size_bytes: int) -> bool:
        """Whether to take an entry that can be had again from elsewhere.

        It is where there is room, or where the key was turned down before of late: what comes once
        pushes nothing out.
        """
        bounds, turned_down = self.bounds, self._turned_down
        if self._held < bounds.entries and self.size_bytes + size_bytes <= bounds.size_bytes:
            return True
        if key_hash in turned_down or key_hash in self._turned_down_before:
            return True
        turned_down.add(key_hash)
        if len(turned_down) >= max(_LEAST_SAMPLE, min(self._held, _MOST_TURNED_DOWN)):
            self._turned_down, self._turned_down_before = set(), turned_down
        return False

    def resized(self, entry: Entry, old_size_bytes: int) -> Outcome:
        """Notes that a held entry was rewritten with another size."""
        segment = entry.segment
        if segment is None:
            raise ValueError("the entry is not held")
        grown = entry.size_bytes - old_size_bytes
        segment.size_bytes += grown
        self.size_bytes += grown
        self.used((entry,))
        outcome = Outcome([], [], [])
        self._settle(outcome)
        return outcome

    def remove(self, entry: Entry) -> None:
        """Lets go of a held entry; how often it was used is remembered."""
        if entry.segment is not None:
            entry.segment.discard(entry)
            self._forget(entry)

    def rebound(self, bounds: Bounds) -> None:
        """Changes the bounds; what is over goes at the next ``add``, or by ``shrink``."""
        if bounds != self.bounds:
            self.bounds = bounds
            self._divide()

    def shrink(self) -> Outcome:
        """Brings what is held within the bounds: the entries that are worth least are evicted."""
        outcome = Outcome([], [], [])
        self._settle(outcome)
        outcome.evicted.extend(outcome.rejected)
        outcome.rejected.clear()
        return outcome

    def shed_memory(self, size_bytes: int) -> Outcome:
        """Evicts at least so many bytes of what is worth least, though the bounds allow it all."""
        bounds = self.bounds
        self.bounds = Bounds(self._held, max(0, self.size_bytes - size_bytes))
        outcome = Outcome([], [], [])
        self._push_out(self._excess(_UNBEATEN) or [], outcome)
        self.bounds = bounds
        return outcome

    def _divide(self) -> None:
        """Gives the window its share of the bounds, and the protected entries theirs."""
        share = self._share.value
        self._window_bounds = self.bounds.share(share)
        self._protected_bounds = self.bounds.share(_PROTECTED_SHARE * (1 - share))

    def _settle(self, outcome: Outcome) -> None:
        """Brings window and whole back within their bounds."""
        window = self._window
        while window.exceeds(self._window_bounds):
            candidate = window.pop_oldest()
            self._admit(candidate, self.frequency(candidate), outcome)
        while victims := self._excess(_UNBEATEN):
            # Without a candidate: an entry or the window grew, or the bounds shrank.
            self._push_out(victims, outcome)

    def _admit(self, candidate: Entry, frequency: int, outcome: Outcome) -> None:
        """Lets a candidate in if ``frequency`` is above that of what it would push out."""
        victims = self._excess(frequency)
        if victims is None:
            self._forget(candidate)
            self._share.note_refused(candidate.key_hash)
            outcome.rejected.append(candidate)
            return
        self._push_out(victims, outcome)
        self._probation.add(candidate)
        outcome.admitted.append(candidate)

    def _excess(self, frequency: int) -> list[Entry] | None:
        """The oldest entries whose going makes room; None if used as much as ``frequency``."""
        entries = self._held - self.bounds.entries
        size_bytes = self.size_bytes - self.bounds.size_bytes
        victims: list[Entry] = []
        if entries <= 0 and size_bytes <= 0:
            return victims
        for segment in (self._probation, self._protected, self._window):
            for victim in segment.order:
                frequency -= self.frequency(victim)
                if frequency <= 0:
                    return None
                victims.append(victim)
                entries -= 1
                size_bytes -= victim.size_bytes
                if entries <= 0 and size_bytes <= 0:
                    return victims
        return None

    def _push_out(self, victims: list[Entry], outcome: Outcome) -> None:
        for victim in victims:
            self.remove(victim)
            self._share.note_evicted(victim.key_hash)
        outcome.evicted.extend(victims)

    def _protect(self, entry: Entry) -> None:
        self._probation.discard(entry)
        protected = self._protected
        protected.add(entry)
        while protected.exceeds(self._protected_bounds):
            self._probation.add(protected.pop_oldest())

    def _forget(self, entry: Entry) -> None:
        """Lets go of an entry that is in no segment; how often it was used is remembered."""
        self._held -= 1
        self.size_bytes -= entry.size_bytes
        self._sketch.record(entry.key_hash, self.frequency(entry))

    def frequency(self, entry: Entry) -> int:
        """How often a held entry was used of late."""
        return entry.reads >> (self.epoch - entry.reads_epoch)

    def _count(self, uses: int) -> None:
        """Ages all counts once the entries were used ten times each on average."""
        self._used += uses
        if self._used < self._sample:
            return
        held = self._held
        self._sample = max(_LEAST_SAMPLE, held * _READS_PER_ENTRY)
        if self._used >= self._sample:
            self._used = 0
            self.epoch += 1
            self._sketch.fit(held)
            self._sketch.halve()
            self._share.fit(held)
