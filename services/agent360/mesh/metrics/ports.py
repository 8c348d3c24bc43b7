"""What the metrics service needs of a store, by subject.

A store has the four ports; ``stores`` makes them from a URL. What a method was awaited for is
durable. A store that cannot be reached or has no space raises ``StoreError``; its callers decide
whether to try again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from prometheus_client.registry import Collector

from agent360.mesh.metrics.frame import Frame
from agent360.mesh.metrics.resolution import Resolution, Retention
from agent360.mesh.metrics.series import SeriesId


class StoreError(Exception):
    """The store could not do it now; the text says why, for operators."""


class ConflictError(StoreError):
    """An event's place in its chain is taken by another; nothing was stored."""


# -------------------------------------------------------------------- rollups


class Mark(NamedTuple):
    """How far a source of samples has come: makes what it sends again known."""

    value: bytes
    """In the form of the kind of source, such as the sequence number of a reporter."""
    time_s: float
    """When it last moved, Unix time; marks that stand still are forgotten after a while."""


@dataclass(frozen=True, slots=True)
class Commit:
    """What a writer gathered since its last commit.

    Invariant: a commit that may not have been finished is repeated with the same ``origin``, and
    then has every row that it had before, with at least as many samples in it. So a store may keep
    rows by (series, bucket, writer, origin) and let the repetition overwrite them; or do all in one
    transaction.
    """

    writer: str
    """Names the journal that the rows come from."""
    origin: int
    """The position in that journal that the commit begins at; grows from commit to commit."""
    position: int
    """Where it ends: the origin of the next."""
    frame: Frame
    """The rows, in buckets of 10 s; to be added to what the store has."""
    marks: Mapping[str, Mark] = field(default_factory=dict)
    """Sources that moved on, by name."""


class Checkpoint(NamedTuple):
    """How far a writer's commits have come."""

    position: int
    """Where its next one begins; 0 if it has none."""
    marks: Mapping[str, Mark]
    """All sources of the writer, by name."""


class RollupStore(Protocol):
    """Keeps series and their rollups."""

    async def series(self, tenant: str | None = None, name: str = "") -> list[SeriesId]:
        """A tenant's series, in no order: all names if ``name`` is empty; None: of all tenants."""

    async def checkpoint(self, writer: str) -> Checkpoint:
        """What the writer has committed."""

    async def commit(self, commit: Commit) -> None:
        """Adds rows, marks and position: all of them, or as ``Commit`` says, none that count twice.

        Raises:
            StoreError: it may or may not be done; it is to be repeated.
        """

    async def read(
        self,
        series: Sequence[SeriesId],
        start_s: float,
        end_s: float,
        resolution: Resolution,
        *,
        writer: str,
        before: int,
        bins: bool = True,
    ) -> Frame:
        """Rollups whose buckets begin within the range.

        Args:
            series: whose rollups; those that the store does not know have none.
            start_s: Unix time, included; a multiple of the resolution's bucket.
            end_s: Unix time, not included.
            resolution: of the buckets. Where these were not computed yet the store returns finer
                ones; the caller puts them together.
            writer: the journal of the caller ...
            before: ... and the position from which on the caller has its rows in memory: rows of
                that writer whose commit's origin is not below are left out.
            bins: whether the bins of sketches are wanted; they are most of the data.

        Returns:
            Rows in no order; a series and bucket may have several.
        """

    async def compact(self, now_s: float, writer: str, settled: int) -> int:
        """Computes coarser rollups of hours that are over, and again where something came late.

        May be repeated and interrupted at any point without counting anything twice.

        Args:
            now_s: Unix time.
            writer: the caller's journal ...
            settled: ... and a position: of commits with lower origins no read has rows in memory.

        Returns:
            How many hours were computed.
        """

    async def expire(
        self, now_s: float, retention: Retention, marks_before_s: float
    ) -> list[SeriesId]:
        """Drops partitions that are past their retention, and series that have no rollups left.

        Args:
            now_s: Unix time.
            retention: how long each resolution is kept.
            marks_before_s: marks that have not moved since are dropped, too.

        Returns:
            The series that were dropped.
        """


# -------------------------------------------------------------------- events


class AuditEvent(NamedTuple):
    """Something that was done; ``body`` is all of it in the contract's form."""

    tenant: str
    event_id: str
    time_us: int
    """When it was done, Unix time; lists are in this order."""
    actor: str
    action: str
    resource: str
    body: bytes


class ChainKey(NamedTuple):
    """Names a chain of hashes: the events of a tenant that one writer recorded on one day."""

    tenant: str
    day: int
    """The UTC day on which they were recorded, in days since 1970-01-01."""
    writer: str
    """A replica; only one process at a time appends for it."""


class ChainedEvent(NamedTuple):
    """An event at its place in a chain."""

    chain: ChainKey
    sequence: int
    """From 1, without gaps."""
    previous: bytes
    """Hash of the event before it, or the chain's root; 32 bytes."""
    hash: bytes
    """Covers all the rest; 32 bytes."""
    event: AuditEvent


class ChainHead(NamedTuple):
    """How far a chain has come."""

    chain: ChainKey
    sequence: int
    """Of its last event; also how many events it has."""
    hash: bytes
    """Of its last event."""
    root: bytes
    """What its first event has as ``previous``: the hash of the last event of the day before on
    which the writer recorded something of the tenant; zeros if there was none."""


class Append(NamedTuple):
    """Events of one writer to be stored together with the heads that they lead to.

    Invariant: one that may not have been finished is repeated unchanged before any other of the
    writer, as long as its process lives; so a store may write rows one by one, all of them by key.
    """

    events: Sequence[ChainedEvent]
    """In the order of their sequences; of any number of tenants."""
    heads: Sequence[ChainHead]
    """One for each chain that they are in."""
    keep_until_s: float | None
    """Unix time after which a store may let them expire by itself; None: never. The same for all
    events of a day, so that a day goes as a whole."""


class Position(NamedTuple):
    """A place in a list that is ordered by time and id, the newest first."""

    time_us: int
    id: str


class EventFilter(NamedTuple):
    """Which events are meant; empty texts stand for any."""

    tenant: str
    start_us: int | None
    """Included."""
    end_us: int | None
    """Not included."""
    actor: str
    action: str
    resource: str


class EventPage(NamedTuple):
    """A part of a list."""

    events: Sequence[ChainedEvent]
    """May be fewer than asked for, even none, although there are more."""
    resume: Position | None
    """Where to go on; None: there are no more."""


class EventStore(Protocol):
    """Keeps audit events: in their chains, and for lists by tenant and one of: actor, action,
    resource."""

    async def known(self, events: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        """Which of these (tenant, event id) are recorded, by any writer."""

    async def heads(self, tenants: Sequence[str], writer: str) -> dict[str, ChainHead]:
        """By tenant, the head of the writer's chain of the latest day that it has one of.

        If rows may be written one by one: never behind a row that a later ``chain`` returns.
        """

    async def append(self, append: Append) -> None:
        """Stores events for all of their reads, and their heads in place of those before.

        Raises:
            ConflictError: a sequence is taken; the heads are to be read again. For stores that
                notice.
            StoreError: it may or may not be done, also in part; it is to be repeated.
        """

    async def events(self, wanted: EventFilter, before: Position | None, limit: int) -> EventPage:
        """Events by time and id, the newest first, beginning after ``before``.

        Reads by the most selective condition (resource, actor, action, none) and drops what does
        not meet the others; of that it reads a bounded number of rows, then returns with what it
        found.

        Raises:
            StoreError: it could not be read.
        """

    async def chains(
        self,
        tenant: str | None,
        first_day: int,
        last_day: int,
        after: ChainKey | None,
        limit: int,
    ) -> list[tuple[ChainKey, ChainHead | None]]:
        """Chains in the order of their keys, beginning after ``after``, with their heads.

        One that has events but no head, or a head but no events, is among them.

        Args:
            tenant: whose; None: of all tenants.
            first_day: the first day, included.
            last_day: the last day, included.
            after: a key; None: from the first.
            limit: how many at most.
        """

    async def chain(self, key: ChainKey, after: int, limit: int) -> list[ChainedEvent]:
        """Events of a chain with sequences above ``after``, in their order, as they are stored."""

    async def drop_days(self, before: int) -> int:
        """Removes the chains of the days before a day, each whole; returns how many.

        A store whose rows expire by themselves may leave it to that.
        """


# -------------------------------------------------------------------- logs


class LogRecord(NamedTuple):
    """A line of a service's log; ``body`` is all of it in the contract's form."""

    tenant: str
    record_id: str
    """Unique; the same if it is sent again."""
    time_us: int
    level: int
    """The numbers of Python's logging: 10 debug, 20 info, 30 warning, 40 error, 50 critical."""
    service: str
    pattern: str
    """The message without what varies."""
    trace_id: str
    """32 hexadecimal digits; empty: none."""
    body: bytes


class LogFilter(NamedTuple):
    """Which records are meant; empty texts stand for any."""

    tenant: str | None
    """None: of all tenants, for operators."""
    start_us: int | None
    """Included."""
    end_us: int | None
    """Not included."""
    level: int
    """The least one; 0: any."""
    service: str
    pattern: str
    trace_id: str


class LogPage(NamedTuple):
    """A part of a list."""

    records: Sequence[LogRecord]
    """May be fewer than asked for, even none, although there are more."""
    resume: Position | None
    """Where to go on; None: there are no more."""


class LogStore(Protocol):
    """Keeps log records for a while: partitions by time, dropped or expired as a whole."""

    async def write(self, records: Sequence[LogRecord], keep_s: float) -> None:
        """Stores records; one with a known (time, id) changes nothing.

        Args:
            records: of any tenants and times.
            keep_s: how long a record is kept, from its time on; for stores whose rows expire.

        Raises:
            StoreError: it may or may not be done, also in part; it may be repeated.
        """

    async def records(self, wanted: LogFilter, before: Position | None, limit: int) -> LogPage:
        """Records by time and id, the newest first, beginning after ``before``.

        Reads by the most selective condition (trace, tenant and service, tenant, service, none)
        and drops what does not meet the others; of that it reads a bounded number of rows, then
        returns with what it found.

        Raises:
            StoreError: it could not be read.
        """

    async def drop(self, before_us: int) -> None:
        """Removes the partitions whose records are all older.

        A store whose rows expire by themselves may leave it to that.
        """


# -------------------------------------------------------------------- rules


class Document(NamedTuple):
    """Something small that the service remembers by name, such as an alert rule."""

    tenant: str
    kind: str
    """What it is: ``rule``, ``alert`` (the state of one label set), ``silence`` and so on."""
    name: str
    """Unique among the tenant's documents of the kind."""
    body: bytes


class RuleStore(Protocol):
    """Keeps alert rules, the states of their alerts, and silences."""

    async def put(self, documents: Sequence[Document], gone: Sequence[Document] = ()) -> None:
        """Stores documents in place of those of the same names, and removes others, all at once."""

    async def documents(self, kind: str, tenant: str | None = None) -> list[Document]:
        """Documents of a kind by tenant and name; None: of all tenants."""

    async def lease(self, name: str, now_s: float, for_s: float, /) -> bool:
        """Takes or keeps, for ``for_s`` seconds from now, what only one of several replicas may do.

        What is done under a lease must do no harm if it is done twice.

        Args:
            name: what it is.
            now_s: Unix time; a store with a clock of its own uses that one.
            for_s: 0: gives it back.

        Returns:
            Whether this replica has it.
        """


@dataclass(frozen=True, slots=True)
class Stores:
    """The ports of one store."""

    rollups: RollupStore
    events: EventStore
    logs: LogStore
    rules: RuleStore
    close: Callable[[], Awaitable[None]]
    """Finishes what was asked for, then lets go of the store."""
    collectors: Sequence[Collector] = ()
    """What the store counts of itself, for Prometheus."""
