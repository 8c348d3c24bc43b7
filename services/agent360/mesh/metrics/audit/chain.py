"""Chains of hashes: events are linked when they are recorded, and links checked later.

A chain has the events of one tenant that one writer recorded on one UTC day. Each event's hash is
SHA-256 over the hash before it, its place and all of its columns; the first event of a day follows
the last of the writer's day before. So a row that is removed, changed, moved or inserted shows, and
so does a day that is gone from the middle. Who can write to the store could write a whole chain
anew: heads that are kept elsewhere (anchors) show that, too.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Final

from agent360.mesh.metrics.ports import AuditEvent, ChainedEvent, ChainHead, ChainKey

NO_HASH: Final = bytes(32)
"""What the first event of a writer follows."""

DAY_S: Final = 86_400
_EPOCH: Final = date(1970, 1, 1)
_NUMBERS: Final = struct.Struct("<qqq")
_LENGTH: Final = struct.Struct("<I")


def link(head: ChainHead, events: Iterable[AuditEvent]) -> tuple[list[ChainedEvent], ChainHead]:
    """Events with their places after a head, and the head that they lead to.

    Args:
        head: of the chain that they go on with; sequence 0 for one that has no events yet.
        events: in the order in which they are recorded.
    """
    key, sequence, previous = head.chain, head.sequence, head.hash
    linked = []
    for event in events:
        sequence += 1
        own = digest(previous, key, sequence, event)
        linked.append(ChainedEvent(key, sequence, previous, own, event))
        previous = own
    return linked, ChainHead(key, sequence, previous, head.root)


def successor(head: ChainHead | None, key: ChainKey) -> ChainHead:
    """The head to go on from, given the writer's latest; a new day's chain begins where that ended.

    A day never comes before the latest, so that a clock which is set back breaks nothing.
    """
    if head is None:
        return ChainHead(key, 0, NO_HASH, NO_HASH)
    if head.chain.day >= key.day:
        return head
    return ChainHead(key, 0, head.hash, head.hash)


def digest(previous: bytes, key: ChainKey, sequence: int, event: AuditEvent) -> bytes:
    """The hash of an event at its place."""
    hashed = hashlib.sha256(previous)
    hashed.update(_NUMBERS.pack(key.day, sequence, event.time_us))
    texts = (key.tenant, key.writer, event.tenant, event.event_id)
    for text in (*texts, event.actor, event.action, event.resource):
        encoded = text.encode()
        hashed.update(_LENGTH.pack(len(encoded)))
        hashed.update(encoded)
    hashed.update(event.body)
    return hashed.digest()


def day_of(time_s: float) -> int:
    """The UTC day of a Unix time."""
    return int(time_s // DAY_S)


def day_name(day: int) -> str:
    """A day as YYYY-MM-DD."""
    return (_EPOCH + timedelta(days=day)).isoformat()


def day_named(name: str) -> int:
    """The day of YYYY-MM-DD.

    Raises:
        ValueError: it is none.
    """
    return day_of(datetime.strptime(name, "%Y-%m-%d").replace(tzinfo=UTC).timestamp())
