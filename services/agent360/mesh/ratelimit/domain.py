"""What the wire side asks of the domain, whichever store it decides with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from agent360.mesh.ratelimit.counts import CountKey
from agent360.mesh.ratelimit.decisions import Decision, Leased, Settlement, Usage
from agent360.mesh.ratelimit.limiter import Limiter
from agent360.mesh.ratelimit.limits import Limit, LimitSet


class Ask(NamedTuple):
    """One of several requests that are decided together."""

    plan: Any
    """The counts that it is charged to."""
    hits: int
    """How much is charged."""
    allow_partial: bool
    """Whether fewer hits may be granted."""


class Domain(Protocol):
    """Decides and charges. Plans are its own business; they hold for one ``generation``."""

    @property
    def generation(self) -> int: ...
    @property
    def limits(self) -> LimitSet: ...

    def replace_limits(self, limits: LimitSet) -> None:
        """Decides by other limits from now on."""

    def plan(
        self,
        tenant: str,
        name: str,
        facts: Mapping[str, str],
        *,
        slots: bool = False,
        own: bool = False,
        override: Limit | None = None,
    ) -> Any:
        """The counts that a request is charged to; see ``Limiter.plan``."""

    def join(self, plans: Sequence[Any]) -> Any:
        """The plan of a request that is charged to all of these."""

    async def decide(self, asks: Sequence[Ask]) -> Sequence[Decision]:
        """Decides requests in their order and charges each to all of its counts, or none."""

    async def reserve(
        self, tenant: str, name: str, plan: Any, tokens: int, ttl_s: float, request_id: str
    ) -> tuple[Decision, str]:
        """See ``Limiter.reserve``."""

    async def settle(self, tenant: str, reservation_id: str, tokens: int) -> Settlement:
        """See ``Limiter.settle``."""

    async def lease(self, tenant: str, plan: Any, tokens: int) -> Leased:
        """See ``Limiter.lease``."""

    async def return_lease(self, tenant: str, lease_id: str, unspent: int) -> int:
        """See ``Limiter.return_lease``."""

    async def acquire(
        self, tenant: str, plan: Any, slots: int, ttl_s: float
    ) -> tuple[Decision, str]:
        """See ``Limiter.acquire``."""

    async def renew(self, tenant: str, slot_id: str, ttl_s: float | None) -> float | None:
        """See ``Limiter.renew``."""

    async def release(self, tenant: str, slot_id: str) -> bool:
        """See ``Limiter.release``."""

    async def usage(
        self, tenant: str, key: CountKey | None = None, *, together: bool = False
    ) -> Sequence[Usage]:
        """See ``CountTable.usage``."""


class LocalDomain:
    """The domain in this process's memory."""

    def __init__(self, limiter: Limiter) -> None:
        self.limiter = limiter
        """Decides."""

    @property
    def generation(self) -> int:
        """See ``Domain``."""
        return self.limiter.counts.generation

    @property
    def limits(self) -> LimitSet:
        """See ``Domain``."""
        return self.limiter.counts.limits

    def replace_limits(self, limits: LimitSet) -> None:
        """See ``Domain``."""
        self.limiter.counts.replace_limits(limits)

    def plan(
        self,
        tenant: str,
        name: str,
        facts: Mapping[str, str],
        *,
        slots: bool = False,
        own: bool = False,
        override: Limit | None = None,
    ) -> Any:
        """See ``Domain``."""
        return self.limiter.plan(tenant, name, facts, slots=slots, own=own, override=override)

    def join(self, plans: Sequence[Any]) -> Any:
        """See ``Domain``."""
        return tuple(dict.fromkeys(charge for plan in plans for charge in plan))

    async def decide(self, asks: Sequence[Ask]) -> Sequence[Decision]:
        """See ``Domain``."""
        now = self.limiter.clock()
        return [self.limiter.decide(*ask, now) for ask in asks]

    async def reserve(
        self, tenant: str, name: str, plan: Any, tokens: int, ttl_s: float, request_id: str
    ) -> tuple[Decision, str]:
        """See ``Domain``."""
        return self.limiter.reserve(tenant, name, plan, tokens, ttl_s, request_id)

    async def settle(self, tenant: str, reservation_id: str, tokens: int) -> Settlement:
        """See ``Domain``."""
        return self.limiter.settle(tenant, reservation_id, tokens)

    async def lease(self, tenant: str, plan: Any, tokens: int) -> Leased:
        """See ``Domain``."""
        return self.limiter.lease(tenant, plan, tokens)

    async def return_lease(self, tenant: str, lease_id: str, unspent: int) -> int:
        """See ``Domain``."""
        return self.limiter.return_lease(tenant, lease_id, unspent)

    async def acquire(
        self, tenant: str, plan: Any, slots: int, ttl_s: float
    ) -> tuple[Decision, str]:
        """See ``Domain``."""
        return self.limiter.acquire(tenant, plan, slots, ttl_s)

    async def renew(self, tenant: str, slot_id: str, ttl_s: float | None) -> float | None:
        """See ``Domain``."""
        return self.limiter.renew(tenant, slot_id, ttl_s)

    async def release(self, tenant: str, slot_id: str) -> bool:
        """See ``Domain``."""
        return self.limiter.release(tenant, slot_id)

    async def usage(
        self, tenant: str, key: CountKey | None = None, *, together: bool = False
    ) -> Sequence[Usage]:
        """See ``Domain``."""
        return list(self.limiter.usage(tenant, key, together=together))
