"""What the cache's domain needs of a store that replicas share, and what that tells them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from enum import Enum
from typing import Final, NamedTuple, Protocol

from agent360.mesh.cache.changes import Condition, Scope
from agent360.mesh.cache.entry import Payload, Space


class Away(Enum):
    """Stands for the answer of a shared store that is away."""

    AWAY = "away"
    """It was not asked, or has done nothing."""
    UNSURE = "unsure"
    """What it was asked for may have been done, or may still be done for a moment."""


AWAY: Final = Away.AWAY
UNSURE: Final = Away.UNSURE


class SharedEntry(NamedTuple):
    """An entry of the shared store."""

    payload: Payload
    """What was written."""
    version: int
    """Of the entry."""
    fresh_until: float
    """On this replica's clock, never later than on the store's own."""


class SharedWritten(NamedTuple):
    """What became of a write or a fill."""

    stored: bool
    """Whether the condition held, or the claim was still valid."""
    version: int
    """Of the entry now in place; 0 if there is none."""
    fresh_until: float
    """Of the entry that was written."""


class SharedRemoved(NamedTuple):
    """What became of a removal."""

    entries: int
    """How many were removed."""
    version: int
    """Up to which entries were concerned."""


class SharedAsk(NamedTuple):
    """A wish to fill a key."""

    space: Space
    key: str
    nonce: str
    """Names the claim, should it be given."""
    timeout_s: float
    """How long the fill may take."""
    refreshed_version: int
    """Of the fresh entry that is to be refreshed early; 0: none is."""


class SharedClaim(NamedTuple):
    """The answer to a wish to fill a key."""

    granted: bool
    """Whether it may be filled."""
    entry: SharedEntry | None
    """What is there: fresh, unless ``granted`` or ``remaining_s``; else perhaps stale."""
    decided_at: int
    """The last version that had been given when this was decided."""
    remaining_s: float
    """Another fills it, for this long at most; 0: nobody does."""
    failed: bool
    """Loading failed lately, and the entry stands in for so long."""


class SharedWrite(NamedTuple):
    """A write."""

    space: Space
    key: str
    payload: Payload
    """Its TTLs are settled."""
    condition: Condition
    if_version: int


class SharedStore(Protocol):
    """Entries, claims and changes that all replicas share.

    Every method answers ``Away``, for each thing that was asked, when the store cannot be reached
    or does not answer in time. What was asked is carried out or not as a whole, and is carried on
    with when the caller is cancelled; it is not carried out any more once the caller was told that
    the store is away and the time that it waits at most has passed. Versions are given by the
    store and grow.
    """

    @property
    def available(self) -> bool:
        """Whether the store answers."""

    @property
    def listening(self) -> bool:
        """Whether changes by other replicas are being heard."""

    @property
    def newest_version(self) -> int:
        """A version that no entry written so far is above."""

    def version_after(self, answer: Away) -> int:
        """A version that nothing which was asked for before such an answer will be above."""

    def version_of(self, space: Space) -> int:
        """The namespace's version as last seen here; 0 if it has none yet."""

    async def start(self, listener: Listener) -> None:
        """Connects; returns when the store answers and changes are heard."""

    async def close(self) -> None:
        """Disconnects."""

    async def read(
        self, wanted: Sequence[tuple[Space, str]]
    ) -> Sequence[SharedEntry | Away | None]:
        """Entries by key, fresh or not; one round trip for each server."""

    async def write(self, writes: Sequence[SharedWrite]) -> Sequence[SharedWritten | Away]:
        """Writes entries; ends the claims of their keys."""

    async def delete(
        self, wanted: Sequence[tuple[Space, str]], upto: Collection[int] = ()
    ) -> Sequence[SharedRemoved | Away]:
        """Removes entries by key; takes the claims of their keys away.

        Args:
            wanted: the keys.
            upto: of each key, the version above which its entry stays; empty: none stays.
        """

    async def claim(self, asks: Sequence[SharedAsk]) -> Sequence[SharedClaim | Away]:
        """Reads entries, or claims keys."""

    async def fill(
        self, space: Space, key: str, nonce: str, payload: Payload, *, keep: bool
    ) -> SharedWritten | Away:
        """Stores what was claimed; with ``keep`` false only ends the claim.

        ``stored`` tells whether the claim was still valid.
        """

    async def release(
        self, space: Space, key: str, nonce: str, pause_s: float
    ) -> SharedEntry | Away | None:
        """Gives a claim up; an entry that is there stands in for ``pause_s`` and is returned."""

    async def remove_prefix(self, space: Space, prefix: str, upto: int = 0) -> SharedRemoved | Away:
        """Removes entries by prefix; those above version ``upto`` stay, if that is not 0."""

    async def remove_tags(
        self, space: Space, tags: Sequence[str], upto: int = 0
    ) -> SharedRemoved | Away:
        """Removes entries by tag; those above version ``upto`` stay, if that is not 0."""

    async def move(
        self, space: Space, warm: Sequence[tuple[str, Payload]]
    ) -> Sequence[SharedWritten] | Away:
        """Moves a namespace to its next version, in which there are the ``warm`` entries only."""

    def keys(self, space: Space) -> AsyncIterator[Sequence[str]]:
        """The keys of a namespace, some at a time; some may have expired."""

    async def remember_hottest(self, space: Space, keys: Sequence[str]) -> None:
        """Notes the keys that were read most, for the next run."""

    async def hottest(self, space: Space) -> Sequence[str]:
        """The keys that were read most in the last run, the hottest first."""


class Listener(Protocol):
    """Who is told of the changes in a shared store, in the order in which they were made."""

    def written(self, tenant: str, namespace: str, keys: Sequence[tuple[str, int]]) -> None:
        """Keys were written or removed; entries below the versions are outdated."""

    def invalidated(
        self,
        tenant: str,
        namespace: str,
        scope: Scope,
        names: Sequence[str],
        version: int,
        within: Callable[[str], bool],
    ) -> None:
        """Entries up to a version were removed: of a prefix, of tags, or all.

        Versions tell the order of changes within a part of the namespace: ``within`` says which
        keys the version is for.
        """

    def released(self, tenant: str, namespace: str, key: str, nonce: str) -> None:
        """The claim that the nonce names ended without a fill."""

    def missed(self, tenant: str, namespace: str) -> None:
        """Changes of a namespace may have gone unheard."""

    def reaches(self, available: bool) -> None:
        """The store, or a part of it, answers no more; or all of it does again."""

    def hears(self) -> None:
        """From now on changes are heard; those before may have gone unheard."""

    def hears_no_more(self, reason: str) -> None:
        """Changes are not heard."""
