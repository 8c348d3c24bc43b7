"""What the domain needs of a store that replicas share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class SharedUsage(NamedTuple):
    """One count that is in use."""

    limit: Limit
    key: CountKey
    room: int
    reset_us: int


class Run(NamedTuple):
    """The same request, one or more times in a row."""

    ask: Ask
    """The request; its plan are counts, at least one."""
    times: int
    """How often; more than once only if the counts are in one place, nothing is granted in part,
    and no limit is in shadow mode."""


Decided = Sequence[Decision]
"""The decisions on a run, in order."""


class SharedStore(Protocol):
    """Decides with counts that all replicas share; every method may answer AWAY."""

    async def start(self) -> None:
        """Returns when it can be asked."""

    async def close(self) -> None:
        """Closes all connections."""

    def in_one_place(self, counts: Any) -> bool:
        """Whether counts can be decided by one step."""

    def counts(
        self, limits: LimitSet, tenant: str, name: str, facts: Mapping[str, str], **choice: bool
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
        self, tenant: str, reservation_id: str, tokens: int
    ) -> tuple[bool, int, int] | Away:
        """Replaces a reservation by what was used; whether again, the adjustment, what is left."""

    async def lease(
        self, tenant: str, counts: Any, tokens: int
    ) -> tuple[Decision, str, int] | Away | None:
        """Charges tokens in advance; None where these counts cannot be leased from."""

    async def return_lease(self, tenant: str, lease_id: str, unspent: int) -> int | Away:
        """Gives unspent tokens back, once."""

    async def acquire(
        self, tenant: str, counts: Any, slots: int, ttl_s: float
    ) -> tuple[Decision, str] | Away:
        """Takes slots."""

    async def renew(self, tenant: str, slot_id: str, ttl_s: float | None) -> int | Away:
        """Keeps slots; their time to live in microseconds, below 0 if they had come back."""

    async def release(self, tenant: str, slot_id: str) -> int | Away:
        """Gives slots back; 0 if they had come back."""

    async def usage(
        self, limits: LimitSet, tenant: str, key: CountKey | None
    ) -> Sequence[SharedUsage] | Away:
        """The counts of a tenant that are in use; or only one, in use or not."""
