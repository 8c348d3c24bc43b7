"""What the cache's domain needs from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from agent360.mesh.cache.entry import Counts, Entry, Payload, Space


class Timer(Protocol):
    """Something that will happen."""

    def cancel(self) -> None:
        """Makes it not happen."""


class Clock(Protocol):
    """Time."""

    def now(self) -> float:
        """Monotonic time in seconds."""

    def wall_us(self) -> int:
        """Time since the Unix epoch in microseconds."""

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Calls ``callback`` once ``now()`` has reached ``when``."""


class Store(Protocol):
    """Holds the entries of this replica, within its bounds. It works in memory: nothing waits."""

    def space(self, tenant: str, name: str) -> Space:
        """The namespace, which is made if there is none.

        Raises:
            MeshError: the tenant has as many namespaces as it may.
        """

    def space_to_read(self, tenant: str, name: str) -> Space:
        """As ``space``; if there may be no more of them, an empty one that nobody keeps."""

    def spaces(self, tenant: str) -> Mapping[str, Space]:
        """The tenant's namespaces by name."""

    def all_spaces(self) -> Iterator[Space]:
        """The namespaces of all tenants."""

    def find(self, space: Space, key: str, now: float, allow_stale: bool) -> Entry | None:
        """The entry that answers a lookup, which is counted; None, which is not, on a miss."""

    def note_reads(self) -> None:
        """Tells the eviction policy of the lookups since the last time."""

    def by_use(self, space: Space) -> list[Entry]:
        """The entries of a namespace, those that are read most of late first."""

    def peek(self, space: Space, key: str, now: float) -> Entry | None:
        """The entry that is there, fresh or not; nothing is counted."""

    def write(
        self,
        space: Space,
        key: str,
        payload: Payload,
        now: float,
        version: int,
        fresh_until: float | None = None,
    ) -> Entry:
        """Writes an entry; it is not held (``segment`` is None) if the policy refused it.

        Args:
            space: where.
            key: under which key.
            payload: what.
            now: monotonic time in seconds.
            version: of the entry.
            fresh_until: on the same clock; None: its TTL from now.
        """

    def wants_copy(self, space: Space, key: str, payload: Payload) -> bool:
        """Whether an entry that is also elsewhere, and not here, is worth its room."""

    def remove(self, entry: Entry) -> None:
        """Removes an entry, if it is held."""

    def drop_generation(self, space: Space) -> int:
        """Makes all entries of a namespace unreachable at once; their room is reclaimed later.

        Returns:
            How many there were.
        """

    def tagged(self, space: Space, tags: Iterable[str]) -> list[Entry]:
        """The entries with any of the tags."""

    def sweep(self, now: float, limit: int) -> bool:
        """Lets go of up to ``limit`` entries that are over; returns whether there are more."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all entries, those that wait to be reclaimed included."""

    def __len__(self) -> int:
        """How many entries there are, those that wait to be reclaimed included."""

    def shed_memory(self, size_bytes: int) -> int:
        """Lets go of so many bytes, worth least first; returns how many it were."""

    def totals(self) -> Counts:
        """The counts of all namespaces together."""


class AuditTrail(Protocol):
    """Where it is recorded who removed what."""

    def invalidated(self, tenant: str, namespace: str, scope: str, removed: int) -> None:
        """Records that entries were invalidated; returns at once.

        Args:
            tenant: whose.
            namespace: where.
            scope: ``keys``, ``prefix``, ``tags`` or ``namespace``.
            removed: how many entries.
        """
