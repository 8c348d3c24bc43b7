"""In-memory forms of what the inference service needs from the rest of the mesh."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from agent360.client.errors import QuotaViolation, RateLimitedError
from agent360.mesh.inference.answers import Source, Usage


@dataclass
class MemoryAnswers:
    """A cache that forgets nothing."""

    entries: dict[tuple[str, str, str], bytes] = field(default_factory=dict)
    ttls: dict[str, float] = field(default_factory=dict)

    async def get(self, tenant: str, namespace: str, key: str) -> bytes | None:
        return self.entries.get((tenant, namespace, key))

    async def put(self, tenant: str, namespace: str, key: str, value: bytes, ttl_s: float) -> None:
        self.entries[tenant, namespace, key] = value
        self.ttls[key] = ttl_s


@dataclass
class TokenBudget:
    """A budget of requests and tokens for each tenant, and of tokens for each user of it."""

    requests: int = 1_000_000
    tokens: int = 1_000_000
    user_tokens: dict[str, int] = field(default_factory=dict)
    used_requests: Counter[str] = field(default_factory=Counter)
    used_tokens: Counter[str] = field(default_factory=Counter)
    open: dict[str, tuple[str, int]] = field(default_factory=dict)
    made: int = 0

    async def admit(self, tenant: str, model: str, user: str) -> None:
        if self.used_requests[tenant] >= self.requests:
            raise self._denied("requests")
        self.used_requests[tenant] += 1

    async def reserve(self, tenant: str, model: str, user: str, tokens: int) -> str:
        of_user = self.user_tokens.get(user, tokens)
        if self.used_tokens[tenant] + tokens > self.tokens or tokens > of_user:
            raise self._denied("tokens")
        self.used_tokens[tenant] += tokens
        self.made += 1
        self.open[f"r{self.made}"] = (tenant, tokens)
        return f"r{self.made}"

    async def settle(self, tenant: str, reservation: str, tokens: int) -> None:
        owner, reserved = self.open.pop(reservation)
        assert owner == tenant
        self.used_tokens[tenant] += tokens - reserved

    @staticmethod
    def _denied(what: str) -> RateLimitedError:
        return RateLimitedError(
            f"no more {what}", retry_after_s=1.5, quotas=[QuotaViolation("tenant", what)]
        )


@dataclass
class Ledger:
    """Writes down what happened."""

    answers: list[tuple[str, str, Source]] = field(default_factory=list)
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    usages: list[tuple[str, str, Usage, float]] = field(default_factory=list)

    def answered(
        self, tenant: str, model: str, source: Source, total_s: float, first_token_s: float | None
    ) -> None:
        self.answers.append((tenant, model, source))

    def failed(self, tenant: str, model: str, reason: str) -> None:
        self.failures.append((tenant, model, reason))

    def consumed(
        self, tenant: str, model: str, backend: str, usage: Usage, cost_usd: float
    ) -> None:
        self.usages.append((tenant, model, usage, cost_usd))
