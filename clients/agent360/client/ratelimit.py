"""The client of the ratelimit service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from time import monotonic
from typing import Final

from agent360.client.coalescer import Coalescer, Wire
from agent360.client.context import current_scope
from agent360.client.decisions import (
    CheckRequest,
    Decision,
    Descriptor,
    Reservation,
    Settlement,
    Slot,
)
from agent360.client.errors import DeadlineExceededError
from agent360.client.leasing import Lease, LeasePool, Leases
from agent360.client.many import Results
from agent360.client.ratelimit_operations import (
    Acquire,
    Check,
    Release,
    Renew,
    Reserve,
    ReturnLease,
    Settle,
    TakeLease,
    fill_check,
    read_check,
)
from agent360.ratelimit.v1 import ratelimit_pb2

WIRE: Final = Wire(
    "agent360.ratelimit.v1.RateLimitService",
    ratelimit_pb2.PipelineRequest,
    ratelimit_pb2.PipelineItem,
    ratelimit_pb2.PipelineResponse,
    ratelimit_pb2.PipelineResult,
)


class RateLimitClient:
    """Asks whether something may be done now.

    Example:
        >>> decision = await mesh.ratelimit.check("search", descriptor={"user": "u1"})
        >>> if not decision.allowed:
        ...     raise TooManyRequests(decision.retry_after_s)
    """

    def __init__(self, coalescer: Coalescer) -> None:
        self._coalescer = coalescer
        self._leases = Leases(self._lease, self._return_lease)

    async def check(
        self,
        name: str,
        *,
        hits: int = 1,
        descriptor: Descriptor | None = None,
        allow_partial: bool = False,
        leased: bool = False,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Decision:
        """Decides one request and charges it to every limit that applies, or to none.

        A leased check spends tokens that were charged in advance, normally without asking the
        service: it takes microseconds, never admits more than the limit, and may deny while
        others hold the last tokens. What is not spent within a second or so goes back. Limits that
        are strict are asked about all the same.

        Args:
            name: what is to be done; limits are matched by it.
            hits: how much is charged; 0 looks without charging.
            descriptor: facts for matching, such as ``{"user": "u1"}``.
            allow_partial: whether fewer hits than asked for may be granted.
            leased: whether tokens may be leased.
            timeout: seconds; None: what remains in the current scope, or the default.
            tenant: on whose behalf; None: that of the current scope, or the Mesh's.

        Raises:
            MeshError: the service could not be asked. A denial is a result, not an error.
        """
        if leased and hits > 0 and not allow_partial:
            owner = tenant or current_scope().tenant or self._coalescer.tenant
            pool = self._leases.pool(owner, name, descriptor)
            now = monotonic()
            if now >= pool.strict_until:
                decision = pool.take(hits, now) or await self._leased(pool, hits, timeout)
                if decision is not None:
                    return decision
        request = CheckRequest(name, hits, descriptor, allow_partial)
        return await self._coalescer.call(Check(request), timeout, tenant)

    def spend(
        self,
        name: str,
        *,
        hits: int = 1,
        descriptor: Descriptor | None = None,
        tenant: str | None = None,
    ) -> Decision | None:
        """Decides a request with leased tokens that are at hand, at once.

        Args:
            name: as in ``check``.
            hits: as in ``check``.
            descriptor: as in ``check``.
            tenant: as in ``check``.

        Returns:
            The decision, or None where only ``check`` with ``leased`` can tell.
        """
        owner = tenant or current_scope().tenant or self._coalescer.tenant
        pool = self._leases.pool(owner, name, descriptor)
        now = monotonic()
        return pool.take(hits, now) if now >= pool.strict_until else None

    async def _leased(self, pool: LeasePool, hits: int, timeout: float | None) -> Decision | None:
        left_s = self._coalescer.default_timeout_s if timeout is None else timeout
        deadline = current_scope().deadline
        if deadline is not None:
            left_s = min(left_s, deadline - monotonic())
        try:
            async with asyncio.timeout(left_s):
                return await pool.lease(hits)
        except TimeoutError:
            raise DeadlineExceededError from None

    def check_many(
        self,
        requests: Iterable[CheckRequest],
        *,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Results[Decision]:
        """Decides many requests, each on its own; see ``Results``."""
        return Results(
            self._coalescer,
            "check",
            requests,
            fill=fill_check,
            read=read_check,
            repeatable=False,
            timeout=timeout,
            tenant=tenant,
        )

    async def reserve(
        self,
        name: str,
        tokens: int,
        *,
        descriptor: Descriptor | None = None,
        ttl: float | None = None,
        request_id: str = "",
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Reservation:
        """Sets an estimated number of tokens aside; ``settle`` must follow.

        Args:
            name: what is to be done.
            tokens: the estimate.
            descriptor: facts for matching.
            ttl: seconds after which an unsettled reservation counts as spent; at most a day.
            request_id: a UUID chosen for this reservation; a second ``reserve`` with it, of the
                same name, returns the first one's. Never that of the scope. Empty: each is new.
            timeout: as in ``check``.
            tenant: as in ``check``.
        """
        operation = Reserve(name, tokens, descriptor, ttl, request_id)
        return await self._coalescer.call(operation, timeout, tenant)

    async def settle(
        self,
        reservation_id: str,
        tokens: int,
        *,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Settlement:
        """Replaces a reservation by what was really used; repeating it changes nothing."""
        return await self._coalescer.call(Settle(reservation_id, tokens), timeout, tenant)

    async def acquire(
        self,
        name: str,
        *,
        slots: int = 1,
        descriptor: Descriptor | None = None,
        ttl: float | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Slot:
        """Takes concurrency slots; ``release`` gives them back."""
        operation = Acquire(name, slots, descriptor, ttl)
        return await self._coalescer.call(operation, timeout, tenant)

    async def renew(
        self,
        slot_id: str,
        *,
        ttl: float | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> bool:
        """Keeps slots for longer; False if they had already come back."""
        return await self._coalescer.call(Renew(slot_id, ttl), timeout, tenant)

    async def release(
        self, slot_id: str, *, timeout: float | None = None, tenant: str | None = None
    ) -> bool:
        """Gives slots back; False if they had already come back."""
        return await self._coalescer.call(Release(slot_id), timeout, tenant)

    async def settle_leases(self, grace: float) -> None:
        """Gives unspent leases back; for the Mesh."""
        await self._leases.close(grace)

    async def _lease(
        self, name: str, tokens: int, descriptor: Descriptor | None, tenant: str
    ) -> Lease:
        return await self._coalescer.call(TakeLease(name, tokens, descriptor), None, tenant)

    async def _return_lease(self, lease_id: str, unspent: int, tenant: str) -> int:
        return await self._coalescer.call(ReturnLease(lease_id, unspent), None, tenant)

    async def set_limit(
        self,
        limit: ratelimit_pb2.Limit,
        *,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> ratelimit_pb2.Limit:
        """Makes or replaces a limit; returns it as it is in force. For admins.

        Raises:
            MeshError: it stands in the limits file, is malformed, or may not be changed.
        """
        request = ratelimit_pb2.SetLimitRequest(limit=limit)
        response = await self._coalescer.unary(
            "SetLimit", request, ratelimit_pb2.SetLimitResponse, timeout, tenant
        )
        found: ratelimit_pb2.Limit = response.limit
        return found

    async def delete_limit(
        self,
        limit_id: str,
        *,
        of_tenant: str = "",
        plan: str = "",
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> None:
        """Removes a limit that was set. For admins.

        Args:
            limit_id: of the limit.
            of_tenant: the tenant whose own limit it is; empty: general.
            plan: the plan it is for; empty: all.
            timeout: as in ``check``.
            tenant: as in ``check``.
        """
        request = ratelimit_pb2.DeleteLimitRequest(limit_id=limit_id, tenant=of_tenant, plan=plan)
        await self._coalescer.unary(
            "DeleteLimit", request, ratelimit_pb2.DeleteLimitResponse, timeout, tenant
        )

    async def get_usage(
        self,
        limit_id: str,
        *,
        counted_by: Descriptor | None = None,
        all_tenants: bool = False,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> ratelimit_pb2.Usage:
        """Reads how much of a limit the tenant has used.

        Args:
            limit_id: of the limit.
            counted_by: the facts that the limit is counted by, except the tenant.
            all_tenants: of a limit that counts several tenants, what all of them use; for
                operators.
            timeout: as in ``check``.
            tenant: as in ``check``.
        """
        request = ratelimit_pb2.GetUsageRequest(
            limit_id=limit_id, counted_by=counted_by or {}, all_tenants=all_tenants
        )
        response = await self._coalescer.unary(
            "GetUsage", request, ratelimit_pb2.GetUsageResponse, timeout, tenant
        )
        usage: ratelimit_pb2.Usage = response.usage
        return usage

    async def list_usage(
        self,
        limit_id: str = "",
        *,
        all_tenants: bool = False,
        page_size: int = 0,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> AsyncIterator[ratelimit_pb2.Usage]:
        """Yields the tenant's counts that are in use, by limit and facts.

        Args:
            limit_id: only of this limit; empty: of all.
            all_tenants: the limits that count several tenants, as all of these use them; for
                operators.
            page_size: how many to fetch at a time; 0: the service's default.
            timeout: seconds for each page.
            tenant: as in ``check``.
        """
        request = ratelimit_pb2.ListUsageRequest(
            limit_id=limit_id, page_size=page_size, all_tenants=all_tenants
        )
        while True:
            page = await self._coalescer.unary(
                "ListUsage", request, ratelimit_pb2.ListUsageResponse, timeout, tenant
            )
            for usage in page.usages:
                yield usage
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def get_limit(
        self, limit_id: str, *, timeout: float | None = None, tenant: str | None = None
    ) -> ratelimit_pb2.Limit:
        """Reads the limit in force for the tenant."""
        request = ratelimit_pb2.GetLimitRequest(limit_id=limit_id)
        response = await self._coalescer.unary(
            "GetLimit", request, ratelimit_pb2.GetLimitResponse, timeout, tenant
        )
        limit: ratelimit_pb2.Limit = response.limit
        return limit

    async def list_limits(
        self,
        *,
        page_size: int = 0,
        fields: Sequence[str] = (),
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> AsyncIterator[ratelimit_pb2.Limit]:
        """Yields the limits that the tenant can see, in the order of their ids.

        Args:
            page_size: how many to fetch at a time; 0: the service's default.
            fields: only these fields of each; empty: all.
            timeout: seconds for each page.
            tenant: as in ``check``.
        """
        request = ratelimit_pb2.ListLimitsRequest(page_size=page_size)
        request.read_mask.paths.extend(fields)
        while True:
            page = await self._coalescer.unary(
                "ListLimits", request, ratelimit_pb2.ListLimitsResponse, timeout, tenant
            )
            for limit in page.limits:
                yield limit
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token
