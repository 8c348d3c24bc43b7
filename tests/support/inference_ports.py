"""In-memory forms of what the inference service needs from the rest of the mesh."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from agent360.client.errors import MeshError, QuotaViolation, RateLimitedError
from agent360.mesh.inference.answers import Source, Usage
from agent360.mesh.inference.ports import (
    Amount,
    Claimed,
    Payer,
    Place,
    Reservation,
    UsageRecord,
)


@dataclass
class MemoryAnswers:
    """A cache that forgets nothing."""

    entries: dict[tuple[str, str, str], bytes] = field(default_factory=dict)
    ttls: dict[str, float] = field(default_factory=dict)

    def near(self, place: Place) -> bytes | None:
        return None

    async def get(self, place: Place) -> bytes | None:
        return self.entries.get(tuple(place))

    async def claim(self, place: Place, wait_s: float) -> Claimed:
        return Claimed(self.entries.get(tuple(place)))

    async def put(self, place: Place, value: bytes, ttl_s: float, token: str = "") -> None:
        self.entries[tuple(place)] = value
        self.ttls[place.key] = ttl_s

    async def abandon(self, place: Place, token: str, error: MeshError) -> None:
        raise AssertionError("nothing was claimed")


@dataclass
class TokenBudget:
    """A budget of requests, tokens and money for each tenant, and of tokens for each user of it."""

    requests: int = 1_000_000
    tokens: int = 1_000_000
    micro_usd: int = 1_000_000_000
    slots: int = 1_000_000
    user_tokens: dict[str, int] = field(default_factory=dict)
    used_requests: Counter[str] = field(default_factory=Counter)
    used_tokens: Counter[str] = field(default_factory=Counter)
    used_micro_usd: Counter[str] = field(default_factory=Counter)
    used_slots: Counter[str] = field(default_factory=Counter)
    open: dict[str, tuple[str, Amount]] = field(default_factory=dict)
    made: int = 0

    def admit_at_once(self, payer: Payer) -> bool:
        return False

    async def admit(self, payer: Payer) -> None:
        if self.used_requests[payer.tenant] >= self.requests:
            raise self._denied("requests")
        self.used_requests[payer.tenant] += 1

    def free(self, payer: Payer, most: Amount) -> bool:
        return False

    async def reserve(self, payer: Payer, most: Amount) -> Reservation:
        tenant = payer.tenant
        of_user = self.user_tokens.get(payer.user, most.tokens)
        if self.used_tokens[tenant] + most.tokens > self.tokens or most.tokens > of_user:
            raise self._denied("tokens")
        if self.used_micro_usd[tenant] + most.micro_usd > self.micro_usd:
            raise self._denied("money")
        self._charge(tenant, most)
        self.made += 1
        self.open[f"r{self.made}"] = (tenant, most)
        return Reservation(f"r{self.made}")

    async def settle(self, payer: Payer, reservation: Reservation, used: Amount) -> None:
        owner, most = self.open.pop(reservation.tokens)
        assert owner == payer.tenant
        self._charge(owner, Amount(used.tokens - most.tokens, used.micro_usd - most.micro_usd))

    @contextlib.asynccontextmanager
    async def slot(self, payer: Payer) -> AsyncIterator[None]:
        if self.used_slots[payer.tenant] >= self.slots:
            raise self._denied("slots")
        self.used_slots[payer.tenant] += 1
        try:
            yield
        finally:
            self.used_slots[payer.tenant] -= 1

    def _charge(self, tenant: str, amount: Amount) -> None:
        self.used_tokens[tenant] += amount.tokens
        self.used_micro_usd[tenant] += amount.micro_usd

    @staticmethod
    def _denied(what: str) -> RateLimitedError:
        return RateLimitedError(
            f"no more {what}", retry_after_s=1.5, quotas=[QuotaViolation("tenant", what)]
        )


@dataclass
class Ledger:
    """Writes down what happened."""

    records: list[UsageRecord] = field(default_factory=list)
    usages: list[tuple[str, str, Usage, float]] = field(default_factory=list)

    @property
    def answers(self) -> list[tuple[str, str, Source]]:
        """Tenant, model and source of each request that was answered."""
        return [
            (each.payer.tenant, each.payer.model, each.source)
            for each in self.records
            if each.source is not None
        ]

    @property
    def failures(self) -> list[tuple[str, str, str]]:
        """Tenant, model and reason of each request that was not."""
        return [
            (each.payer.tenant, each.payer.model, each.outcome)
            for each in self.records
            if each.source is None
        ]

    def record(self, record: UsageRecord) -> None:
        self.records.append(record)

    def consumed(
        self, tenant: str, model: str, backend: str, usage: Usage, cost_usd: float
    ) -> None:
        self.usages.append((tenant, model, usage, cost_usd))
