"""Walks chains of hashes as they are stored and tells where the first is not as it was recorded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from enum import Enum, auto
from typing import Final, NamedTuple

from agent360.mesh.metrics.audit.chain import NO_HASH, day_name, digest
from agent360.mesh.metrics.ports import ChainedEvent, ChainHead, ChainKey, EventStore

Anchors = dict[ChainKey, dict[int, bytes]]
"""Hashes by chain and sequence that were found earlier and kept elsewhere."""

_PAGE: Final = 1_000
_CHAINS: Final = 500


class Fault(Enum):
    """What is wrong with a chain."""

    REMOVED = auto()
    """An event is missing."""
    CHANGED = auto()
    """An event is not as it was recorded."""
    INSERTED = auto()
    """There is an event that the service did not record."""
    DETACHED = auto()
    """It does not continue the day before, or does not lead through an anchor."""


class Checked(NamedTuple):
    """What was found of a chain."""

    chain: ChainKey
    good: int = 0
    """Sequence of the last event that is as it was recorded."""
    hash: bytes = NO_HASH
    """Of that event."""
    fault: Fault | None = None
    """None: nothing is wrong."""
    sequence: int = 0
    """Of the first event that is missing or wrong."""
    event_id: str = ""
    """Of that event, if it is there."""
    description: str = ""
    """What is wrong, in words."""

    def with_fault(self, fault: Fault, sequence: int, text: str, event_id: str = "") -> Checked:
        """The same with what is wrong."""
        return self._replace(fault=fault, sequence=sequence, event_id=event_id, description=text)


class Verifier:
    """Verifies chains of a store, also while events are recorded.

    Example:
        >>> verifier = Verifier(stores.events)
        >>> async for checked in verifier.verify("acme", first_day, last_day, {}):
        ...     print(checked.fault)
    """

    def __init__(self, store: EventStore) -> None:
        self._store = store

    async def verify(
        self, tenant: str | None, first_day: int, last_day: int, anchors: Anchors
    ) -> AsyncIterator[Checked]:
        """Yields what it finds of each chain, by tenant and day.

        Args:
            tenant: whose chains; None: of all tenants.
            first_day: the first day, included.
            last_day: the last day, included.
            anchors: of chains in that range.

        Raises:
            StoreError: the store cannot be read.
        """
        after: ChainKey | None = None
        previous: dict[tuple[str, str], tuple[ChainKey, bytes]] = {}
        missing = dict(anchors)
        while True:
            chains = await self._store.chains(tenant, first_day, last_day, after, _CHAINS)
            for key, head in chains:
                if after is not None and after.tenant != key.tenant:
                    previous.clear()
                after = key
                own = missing.pop(key, {})
                checked = await self._check(key, head, previous.get((key.tenant, key.writer)), own)
                last = checked.hash if head is None or checked.fault is None else head.hash
                previous[key.tenant, key.writer] = (key, last)
                yield checked
            if len(chains) < _CHAINS:
                break
        for key, hashes in sorted(missing.items()):
            yield Checked(key).with_fault(
                Fault.REMOVED,
                1,
                f"an anchor says that it had {max(hashes):,} events; none are left",
            )

    async def _check(
        self,
        key: ChainKey,
        head: ChainHead | None,
        before: tuple[ChainKey, bytes] | None,
        anchors: Mapping[int, bytes],
    ) -> Checked:
        events = await self._store.chain(key, 0, _PAGE)
        if not events and head is not None:
            return Checked(key, hash=head.root).with_fault(
                Fault.REMOVED, 1, f"its head says that there are {head.sequence:,} events"
            )
        root = events[0].previous if events else NO_HASH
        if head is not None:
            root = head.root
        checked = Checked(key, hash=root)
        if before is not None and root != before[1]:
            return checked.with_fault(
                Fault.DETACHED,
                1,
                f"it does not continue {day_name(before[0].day)}, the day before it: the end of "
                "that day, or a day in between, is missing",
            )
        while events:
            checked = await asyncio.to_thread(_follow, checked, events, anchors)
            if checked.fault is not None:
                return checked
            events = await self._store.chain(key, checked.good, _PAGE)
            if not events:
                head = await self._head(key)
                if head is not None and head.sequence > checked.good:
                    # They may have been recorded since.
                    events = await self._store.chain(key, checked.good, _PAGE)
        return self._compare_head(checked, head, anchors)

    def _compare_head(
        self, checked: Checked, head: ChainHead | None, anchors: Mapping[int, bytes]
    ) -> Checked:
        if head is None:
            return checked.with_fault(
                Fault.INSERTED, 1, "it has no head: its events were inserted, or the head removed"
            )
        if head.sequence > checked.good or max(anchors, default=0) > checked.good:
            known = max(head.sequence, *anchors) if anchors else head.sequence
            return checked.with_fault(
                Fault.REMOVED,
                checked.good + 1,
                f"the events from {checked.good + 1:,} to {known:,} are missing",
            )
        if head.sequence < checked.good:
            return checked.with_fault(
                Fault.INSERTED,
                head.sequence + 1,
                f"its head says that there are {head.sequence:,} events, not {checked.good:,}",
            )
        if head.hash != checked.hash:
            return checked.with_fault(
                Fault.CHANGED, checked.good, "its last event is not the one its head has"
            )
        return checked

    async def _head(self, key: ChainKey) -> ChainHead | None:
        for found, head in await self._store.chains(key.tenant, key.day, key.day, None, _CHAINS):
            if found == key:
                return head
        return None


def _follow(
    checked: Checked, events: Sequence[ChainedEvent], anchors: Mapping[int, bytes]
) -> Checked:
    """Goes on along events as far as they are as they were recorded."""
    good, last = checked.good, checked.hash
    found: tuple[Fault, str] | None = None
    for row in events:
        number = row.sequence
        if number > good + 1:
            span = (
                f"{good + 1:,} is" if number == good + 2 else f"{good + 1:,} to {number - 1:,} are"
            )
            return checked._replace(good=good, hash=last).with_fault(
                Fault.REMOVED, good + 1, f"event {span} missing"
            )
        if number <= good:
            found = Fault.INSERTED, "is there twice"
        elif row.hash != digest(row.previous, row.chain, number, row.event):
            found = Fault.CHANGED, "is not what was recorded"
        elif row.previous != last:
            found = Fault.CHANGED, "does not follow the event before it"
        elif anchors.get(number, row.hash) != row.hash:
            found = (
                Fault.DETACHED,
                "is not the one that an anchor names: the chain was written anew",
            )
        if found is not None:
            return checked._replace(good=good, hash=last).with_fault(
                found[0], number, f"event {number:,} {found[1]}", row.event.event_id
            )
        good, last = number, row.hash
    return checked._replace(good=good, hash=last)
