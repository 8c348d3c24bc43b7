"""What the domain needs of a store that replicas share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Final, Literal, NamedTuple, Protocol

from agent360.mesh.ratelimit.counts import CountKey
from agent360.mesh.ratelimit.decisions import Decision
from agent360.mesh.ratelimit.domain import Ask
from agent360.mesh.ratelimit.limits import Limit, LimitSet


class _Answer(Enum):
    AWAY = "away"


AWAY: Final = _Answer.AWAY
"""In place of an answer: the store cannot be asked."""

Away = Literal[_Answer.AWAY]


class UsageRow(NamedTuple):
    """What one replica has seen of one count in one period, since it last told."""

    count: Any
    """The count, of the store."""
    tenant: str
    """Whose share it is; empty where the count is of one tenant."""
    start: int
    """When the period began, in microseconds since 1970."""
    length: int
    """How long it is, in microseconds."""
    denied: int
    """Requests that were denied."""
    peak: int
    """The largest use seen."""
    charged: int
    """What the tenant was charged; below 0 if more was given back."""
    highest: int
    """The most that it was meanwhile."""


class CountUsage(NamedTuple):
    """What all replicas have seen of one count, or of a tenant's share of it."""

    room: int
    """What is left of the count."""
    reset_us: int
    """When it is whole again."""
    denied: int
    peak: int
    """The largest use seen in the present period; of a share, of the share."""
    charged: int
    """What the share's tenant was charged in the present period."""
    held: int
    """Slots that the share's tenant holds."""


class UsageTable(Protocol):
    """Adds up what replicas have seen of counts; every method may answer AWAY."""

    def now_us(self) -> int:
        """The time that periods go by, in microseconds since 1970."""

    @property
    def available(self) -> bool:
        """Whether rows can be added now."""

    async def add(self, rows: Sequence[UsageRow]) -> Away | None:
        """Adds rows; AWAY if some may have been lost."""

    async def listed(self, limits: LimitSet, tenant: str) -> Sequence[CountKey] | Away:
        """Counts of a tenant, and those it has a share of, that may be in use."""

    async def listed_together(self, limits: LimitSet) -> Sequence[CountKey] | Away:
        """Counts of several tenants that may be in use."""

    async def read(
        self, counts: Sequence[tuple[Limit, CountKey, int]], tenant: str, *, together: bool
    ) -> Sequence[CountUsage] | Away:
        """The usage of counts in periods that began then, in their order.

        Args:
            counts: limits, the keys of their counts, and when the present period began.
            tenant: whose counts and shares.
            together: the counts as of all tenants, in place of the tenant's shares.
        """

    def count(self, limit: Limit, key: CountKey, tenant: str) -> Any:
        """The store's count of a key."""

    def key(self, name: str) -> CountKey:
        """The key of a count that the store names so."""


class Run(NamedTuple):
    """The same request, one or more times in a row."""

    ask: Ask
    """The request; its plan are counts, at least one."""
    times: int
    """How often; more than once only if the counts are in one place, nothing is granted in part,
    and no limit is in shadow mode."""


Decided = Sequence[Decision]
"""The decisions on a run, in order."""


OnAdjusted = Callable[[LimitSet, str, str, int, int], None]
"""Takes limits, tenant, the store's name of a count, a time in microseconds since 1970, hits."""


class SharedStore(Protocol):
    """Decides with counts that all replicas share; every method may answer AWAY."""

    on_adjusted: OnAdjusted
    """Told when a count of several tenants was charged more to a tenant than at a time, or less if
    the hits are below 0: by a settle, or a lease that was returned."""

    async def start(self) -> None:
        """Returns when it can be asked."""

    async def close(self) -> None:
        """Closes all connections."""

    def in_one_place(self, counts: Any) -> bool:
        """Whether counts can be decided by one step."""

    def counts(
        self, limits: LimitSet, tenant: str, name: str, facts: Mapping[str, str], **choice: Any
    ) -> tuple[Any, ...]:
        """The counts that a request is charged to; each has its ``limit``."""

    async def decide(self, runs: Sequence[Run]) -> Sequence[tuple[Decided, Sequence[str]] | Away]:
        """Decides requests that are charged to something.

        With each run, the ids of the limits that denied or, in shadow mode, would have.
        """

    async def reserve(
        self, tenant: str, name: str, counts: Any, tokens: int, ttl_s: float, request_id: str
    ) -> tuple[Decision, str] | Away:
        """Charges an estimate and remembers it."""

    async def settle(
        self, limits: LimitSet, tenant: str, reservation_id: str, tokens: int
    ) -> tuple[bool, int, int] | Away:
        """Replaces a reservation by what was used; whether again, the adjustment, what is left."""

    async def lease(
        self, tenant: str, counts: Any, tokens: int
    ) -> tuple[Decision, str, int] | Away | None:
        """Charges tokens in advance; None where these counts cannot be leased from."""

    async def return_lease(
        self, limits: LimitSet, tenant: str, lease_id: str, unspent: int
    ) -> int | Away:
        """Gives unspent tokens back, once."""

    async def acquire(
        self, tenant: str, counts: Any, slots: int, ttl_s: float
    ) -> tuple[Decision, str] | Away:
        """Takes slots."""

    async def renew(self, tenant: str, slot_id: str, ttl_s: float | None) -> int | Away:
        """Keeps slots; their time to live in microseconds, below 0 if they had come back."""

    async def release(self, tenant: str, slot_id: str) -> int | Away:
        """Gives slots back; 0 if they had come back."""
