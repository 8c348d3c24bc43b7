"""The quota of the ratelimit service's own callers."""

from __future__ import annotations

from collections.abc import Awaitable

from agent360.mesh.ratelimit.decisions import UNLIMITED, Decision
from agent360.mesh.ratelimit.domain import Ask, Domain, LocalDomain
from agent360.mesh.ratelimit.limiter import Limiter


class OwnQuota:
    """Asks the service's own domain.

    Only limits that name RPCs of the mesh count here: one that matches any name would otherwise be
    charged twice for each check, once for the check and once for having asked.
    """

    def __init__(self, domain: Domain, limiter: Limiter) -> None:
        self._domain = domain
        self._limiter = limiter
        self._plans: dict[tuple[str, str], object] = {}
        self._generation = 0

    def check(
        self, tenant: str, name: str, hits: int, allow_partial: bool
    ) -> Decision | Awaitable[Decision]:
        """Charges ``hits`` to the limits of ``name``; an awaitable only if there are some."""
        if self._generation != self._domain.generation or len(self._plans) > _MAX_PLANS:
            self._generation = self._domain.generation
            self._plans.clear()
        plan = self._plans.get((tenant, name))
        if plan is None:
            plan = self._plans[tenant, name] = self._domain.plan(tenant, name, {}, own=True)
            self._generation = self._domain.generation
        if isinstance(self._domain, LocalDomain):
            if not plan:
                return UNLIMITED._replace(granted=hits)
            return self._limiter.decide(plan, hits, allow_partial, self._limiter.clock())  # type: ignore[arg-type]
        if not plan.counts:  # type: ignore[attr-defined]
            return UNLIMITED._replace(granted=hits)
        return self._decide(Ask(plan, hits, allow_partial))

    async def _decide(self, ask: Ask) -> Decision:
        (decision,) = await self._domain.decide([ask])
        return decision


_MAX_PLANS = 10_000
