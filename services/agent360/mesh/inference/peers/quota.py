"""Limits of requests and tokens, decided by the ratelimit service."""

from __future__ import annotations

import time
from typing import Final, Literal

import structlog

from agent360.client import Decision, Mesh
from agent360.client.context import current_scope
from agent360.client.errors import MeshError, QuotaViolation, RateLimitedError, UnavailableError
from agent360.mesh.inference.peers.reachability import Reachability

REQUESTS: Final = "inference.requests"
"""Name that limits of requests match; one hit a request."""
TOKENS: Final = "inference.tokens"
"""Name that limits of tokens match; reserved before a model runs, settled after."""


class MeshQuota:
    """The port ``Quota`` over the mesh's ratelimit service.

    The descriptor of both names is ``model`` and, where the request names one, ``user``.
    """

    def __init__(
        self,
        mesh: Mesh,
        timeout_s: float,
        when_away: Literal["open", "closed"],
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self._mesh = mesh
        self._timeout_s = timeout_s
        self._open = when_away == "open"
        consequence = "requests are served without limits" if self._open else "requests are refused"
        self._reach = Reachability("ratelimit", consequence, log)

    async def admit(self, tenant: str, model: str, user: str) -> None:
        """See ``Quota.admit``."""
        if not self._worth_asking(tenant):
            return
        try:
            decision = await self._mesh.ratelimit.check(
                REQUESTS,
                descriptor=_descriptor(model, user),
                timeout=self._timeout_s,
                tenant=tenant,
            )
        except MeshError as error:
            if _own_deadline_passed():
                # The caller gave no time to answer; that must not open the limits for others.
                raise
            self._unanswered(tenant, error)
            return
        self._reach.answered()
        if not decision.allowed:
            raise _denied(tenant, "requests", decision)

    async def reserve(self, tenant: str, model: str, user: str, tokens: int) -> str:
        """See ``Quota.reserve``."""
        if not self._worth_asking(tenant):
            return ""
        try:
            reservation = await self._mesh.ratelimit.reserve(
                TOKENS,
                tokens,
                descriptor=_descriptor(model, user),
                timeout=self._timeout_s,
                tenant=tenant,
            )
        except MeshError as error:
            self._unanswered(tenant, error)
            return ""
        self._reach.answered()
        if not reservation.decision.allowed:
            raise _denied(tenant, f"tokens ({tokens:,} wanted)", reservation.decision)
        return reservation.reservation_id

    async def settle(self, tenant: str, reservation: str, tokens: int) -> None:
        """See ``Quota.settle``."""
        if not reservation:
            return
        try:
            await self._mesh.ratelimit.settle(
                reservation, tokens, timeout=self._timeout_s, tenant=tenant
            )
        except MeshError as error:
            # Unsettled, the reservation counts as spent when its time is over.
            self._reach.failed(error)

    def _worth_asking(self, tenant: str) -> bool:
        if self._reach.worth_asking():
            return True
        self._decide_alone(tenant, None)
        return False

    def _unanswered(self, tenant: str, error: MeshError) -> None:
        self._reach.failed(error)
        self._decide_alone(tenant, error)

    def _decide_alone(self, tenant: str, error: MeshError | None) -> None:
        self._mesh.metrics.count("inference_ratelimit_unanswered_total", tenant=tenant)
        if not self._open:
            raise UnavailableError(
                "the ratelimit service does not answer, and nothing is served without it",
                reason="RATELIMIT_UNAVAILABLE",
                retry_after_s=1.0,
            ) from error


class NoQuota:
    """The port ``Quota`` where nothing is limited."""

    async def admit(self, tenant: str, model: str, user: str) -> None:
        """See ``Quota.admit``."""

    async def reserve(self, tenant: str, model: str, user: str, tokens: int) -> str:  # noqa: ARG002
        """See ``Quota.reserve``."""
        return ""

    async def settle(self, tenant: str, reservation: str, tokens: int) -> None:
        """See ``Quota.settle``."""


def _own_deadline_passed() -> bool:
    deadline = current_scope().deadline
    return deadline is not None and deadline <= time.monotonic()


def _descriptor(model: str, user: str) -> dict[str, str]:
    return {"model": model, "user": user} if user else {"model": model}


def _denied(tenant: str, what: str, decision: Decision) -> RateLimitedError:
    when = decision.retry_after_s
    hint = "" if when is None else f"; try again in {when:.3g} s"
    return RateLimitedError(
        f"limit {decision.limit_id} of {what} is exceeded{hint}",
        metadata={"limit_id": decision.limit_id, "remaining": str(decision.remaining)},
        retry_after_s=when,
        quotas=[QuotaViolation(f"tenant:{tenant}", f"limit {decision.limit_id} of {what}")],
    )
