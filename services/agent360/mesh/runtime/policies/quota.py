"""Quotas: every call is charged to the limits named like its method."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Final, Literal, Protocol

import grpc
import structlog

from agent360.client.context import enter_scope
from agent360.client.errors import MeshError, QuotaViolation, RateLimitedError, UnavailableError
from agent360.mesh.runtime.batch import Group

_UNLIMITED_S: Final = 5.0
"""How long the answer that no limit applies is believed."""

_MAX_UNLIMITED: Final = 10_000


class Grant(Protocol):
    """The part of a rate limit decision that the policy reads."""

    @property
    def allowed(self) -> bool: ...
    @property
    def granted(self) -> int: ...
    @property
    def remaining(self) -> int: ...
    @property
    def retry_after_s(self) -> float | None: ...
    @property
    def limit_id(self) -> str: ...


class LocalLimiter(Protocol):
    """Decides in this process: the ratelimit service asking itself."""

    def check(
        self, tenant: str, name: str, hits: int, allow_partial: bool
    ) -> Grant | Awaitable[Grant]:
        """Charges ``hits`` to the limits of ``name``; an awaitable where a store is asked."""


class RemoteLimiter(Protocol):
    """Decides in the ratelimit service: ``agent360.client.RateLimitClient``."""

    def spend(self, name: str, *, hits: int = 1, tenant: str | None = None) -> Grant | None:
        """Decides with leased tokens that are at hand; None: ask."""

    async def check(
        self,
        name: str,
        *,
        hits: int = 1,
        allow_partial: bool = False,
        leased: bool = False,
        tenant: str | None = None,
        timeout: float | None = None,
    ) -> Grant:
        """Charges ``hits`` to the limits of ``name``."""


class LocalQuotaPolicy:
    """The quota of the ratelimit service itself: it asks its own domain."""

    def __init__(self, limiter: LocalLimiter) -> None:
        self._limiter = limiter

    def before(self, group: Group) -> Awaitable[None] | None:
        """Charges the group, once for all of its items.

        Raises:
            RateLimitedError: not even one item is admitted.
        """
        call = group.call
        if call.principal.service:
            return None
        grant = self._limiter.check(call.tenant, call.method[1:], len(group.items), True)
        if isinstance(grant, Awaitable):
            return self._apply(group, grant)
        apply_grant(group, grant)
        return None

    async def _apply(self, group: Group, grant: Awaitable[Grant]) -> None:
        began = time.monotonic()
        granted = await grant
        group.call.waited_s = time.monotonic() - began
        apply_grant(group, granted)

    def after(self, group: Group, code: grpc.StatusCode, count: int, duration_s: float) -> None:
        """Nothing: what was admitted stays charged."""


class RemoteQuotaPolicy:
    """The quota of the other services: they ask the ratelimit service through the client."""

    def __init__(
        self,
        limiter: RemoteLimiter,
        *,
        when_away: Literal["open", "closed"],
        timeout_s: float,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self._limiter = limiter
        self._open = when_away == "open"
        self._timeout_s = timeout_s
        self._log = log
        self._away = False
        self._unlimited: dict[tuple[str, str], float] = {}
        self.unasked = 0
        """Calls decided without the ratelimit service, because it was away."""

    def before(self, group: Group) -> Awaitable[None] | None:
        """Charges the group, once for all of its items.

        The mesh's own calls are exempt; a method without limits is asked about every 5 s, and
        tokens of the others are leased, so that normally nothing is asked.
        """
        call = group.call
        if call.principal.service:
            return None
        if self._unlimited and (
            self._unlimited.get((call.tenant, call.method), 0.0) > time.monotonic()
        ):
            return None
        grant = self._limiter.spend(call.method[1:], hits=len(group.items), tenant=call.tenant)
        if grant is not None and grant.allowed:
            return None
        return self._ask(group)

    def after(self, group: Group, code: grpc.StatusCode, count: int, duration_s: float) -> None:
        """Nothing: what was admitted stays charged."""

    async def _ask(self, group: Group) -> None:
        call = group.call
        # The question belongs to the caller's trace, but a caller in a hurry says nothing about
        # whether the ratelimit service is away.
        enter_scope(group.scope()._replace(deadline=None))
        try:
            async with asyncio.timeout(self._timeout_s):
                grant = await self._charge(call.method[1:], len(group.items), call.tenant)
        except (MeshError, TimeoutError) as error:
            if isinstance(error, MeshError) and error.code not in _AWAY:
                raise
            self._note_away(error, group.left)
            if self._open:
                return
            raise UnavailableError(
                "the ratelimit service is away and quota.when_away is closed",
                reason="QUOTA_UNKNOWN",
                retry_after_s=1.0,
            ) from error
        if self._away:
            self._away = False
            self._log.info("the ratelimit service is back", unasked=self.unasked)
        if grant.allowed and not grant.limit_id:
            if len(self._unlimited) >= _MAX_UNLIMITED:
                self._unlimited.clear()
            self._unlimited[call.tenant, call.method] = time.monotonic() + _UNLIMITED_S
        apply_grant(group, grant)

    async def _charge(self, name: str, hits: int, tenant: str) -> Grant:
        """Charges leased tokens or, if they do not reach for all, as many as there are."""
        grant = await self._limiter.check(
            name, hits=hits, leased=True, tenant=tenant, timeout=self._timeout_s
        )
        if grant.allowed or hits == 1 or not grant.remaining:
            return grant
        return await self._limiter.check(
            name, hits=hits, allow_partial=True, tenant=tenant, timeout=self._timeout_s
        )

    def _note_away(self, error: Exception, calls: int) -> None:
        self.unasked += calls
        if not self._away:
            self._away = True
            self._log.warning("the ratelimit service is away", served=self._open, error=str(error))


_AWAY: Final = {
    # That it does not accept this service's own key is no fault of the caller.
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}


def apply_grant(group: Group, grant: Grant) -> None:
    """Refuses the items of a group that were not granted.

    Raises:
        RateLimitedError: none was.
    """
    granted = grant.granted
    if granted >= len(group.items):
        return
    error = RateLimitedError(
        f"limit {grant.limit_id!r} of tenant {group.call.tenant!r} is exhausted",
        metadata={"limit_id": grant.limit_id},
        retry_after_s=grant.retry_after_s,
        quotas=[QuotaViolation(f"tenant:{group.call.tenant}", f"limit {grant.limit_id}")],
    )
    if granted <= 0:
        raise error
    group.keep(granted, error)
