"""The wire side of the ratelimit service."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from agent360.client import AuditEvent
from agent360.client.errors import MeshError, unimplemented
from agent360.mesh.ratelimit.assembly import assemble
from agent360.mesh.ratelimit.domain import Ask, LocalDomain
from agent360.mesh.ratelimit.envoy import EnvoyService
from agent360.mesh.ratelimit.exposition import LimiterCollector
from agent360.mesh.ratelimit.failures import limit_unknown, limits_are_admins
from agent360.mesh.ratelimit.limits import TENANT
from agent360.mesh.ratelimit.own_quota import OwnQuota
from agent360.mesh.ratelimit.settings import RateLimitSettings
from agent360.mesh.ratelimit.usage import UsageReport
from agent360.mesh.ratelimit.wire import (
    MAX_SLOTS,
    limit_message,
    read_limit,
    read_request,
    usage_message,
    write_decision,
)
from agent360.mesh.runtime.call import MESH_TENANT, Call, Emit, Item
from agent360.mesh.runtime.pages import (
    decode_page_token,
    encode_page_token,
    page_size,
    read_mask,
)
from agent360.mesh.runtime.service import ServiceContext, ServiceDefinition
from agent360.mesh.runtime.validation import Violations, set_duration
from agent360.ratelimit.v1 import ratelimit_pb2 as pb

_DESCRIPTOR: Final = pb.DESCRIPTOR.services_by_name["RateLimitService"]
_MAX_PLANS: Final = 100_000
_MAX_BATCH: Final = 1_000

_MAX_TTL_S: Final = 86_400.0

_NONE_RESOLVED: Final[dict[bytes, Ask]] = {}


class RateLimitServicer:
    """Serves agent360.ratelimit.v1.RateLimitService.

    What a request resolves to is remembered by its bytes: reading a small map field takes longer
    than serializing the whole request.
    """

    def __init__(self, settings: RateLimitSettings, context: ServiceContext) -> None:
        self._settings = settings
        self._mesh = context.mesh
        self._parts = assemble(settings, context.registry, context.log, self._on_load)
        self._domain = self._parts.domain
        self._in_memory = isinstance(self._domain, LocalDomain)
        self._book = self._parts.book
        self.limiter = OwnQuota(self._domain, self._parts.limiter)
        """Its own domain, for the quota of its callers."""
        self._envoy = EnvoyService(self._domain, settings.envoy_tenant)
        self._report = UsageReport(context.mesh.metrics)
        self._resolved: dict[str, dict[bytes, Ask]] = {}
        self._plans = 0
        self._generation = 0
        context.registry.register(LimiterCollector(self._parts.limiter))

    @property
    def definitions(self) -> tuple[ServiceDefinition, ...]:
        """See ``Servicer.definitions``."""
        own = ServiceDefinition(
            _DESCRIPTOR,
            batch={
                "Check": self.check,
                "Reserve": self.reserve,
                "Settle": self.settle,
                "Acquire": self.acquire,
                "Renew": self.renew,
                "Release": self.release,
                "Lease": self.lease,
                "ReturnLease": self.return_lease,
            },
            unary={
                "BatchCheck": self.batch_check,
                "SetLimit": self.set_limit,
                "GetLimit": self.get_limit,
                "ListLimits": self.list_limits,
                "DeleteLimit": self.delete_limit,
                "GetUsage": self.get_usage,
                "ListUsage": self.list_usage,
            },
        )
        return own, self._envoy.definition

    async def start(self) -> None:
        """See ``Servicer.start``."""
        await self._parts.connect()
        await self._book.start(self._domain.replace_limits)
        self._report.start()
        if self._settings.limits:
            self._on_load("")

    async def close(self) -> None:
        """See ``Servicer.close``."""
        await self._report.close()
        await self._book.close()
        await self._parts.disconnect()

    # ---------------------------------------------------------------- hot

    async def check(self, items: Sequence[Item], emit: Emit) -> None:
        """Decides requests."""
        if not self._in_memory:
            await self._check_shared(items, emit)
            return
        limiter = self._parts.limiter
        now = limiter.clock()
        decide, reply = limiter.decide, emit.reply
        tenant, resolved = "", self._resolved_of("")
        for item in items:
            request = item.request
            if item.call.tenant != tenant:
                tenant = item.call.tenant
                resolved = self._resolved_of(tenant)
            known = resolved.get(request.SerializeToString())
            if known is None or self._generation != limiter.generation:
                try:
                    known = self._resolve(tenant, request)
                except MeshError as error:
                    emit.fail(item, error)
                    continue
                resolved = self._resolved_of(tenant)
            plan, hits, allow_partial = known
            decision = decide(plan, hits, allow_partial, now)
            write_decision(reply(item).decision, decision)
            self._report.note(tenant, decision, hits)

    async def _check_shared(self, items: Sequence[Item], emit: Emit) -> None:
        asked: list[Item] = []
        asks: list[Ask] = []
        for item in items:
            try:
                asks.append(self._ask(item.call.tenant, item.request))
            except MeshError as error:
                emit.fail(item, error)
                continue
            asked.append(item)
        for item, ask, decision in zip(asked, asks, await self._domain.decide(asks), strict=True):
            write_decision(emit.reply(item).decision, decision)
            self._report.note(item.call.tenant, decision, ask.hits)

    async def reserve(self, items: Sequence[Item], emit: Emit) -> None:
        """Sets tokens aside."""
        await _each(items, emit, self._reserve)

    async def _reserve(self, item: Item, emit: Emit) -> None:
        request, call = item.request, item.call
        faults = Violations()
        facts = read_request(request, faults)
        faults.require("tokens", request.tokens > 0, "must be positive")
        faults.text("request_id", request.request_id, max_bytes=64, min_bytes=0)
        ttl_s = _ttl(request, faults, self._settings.reservation_ttl_s)
        faults.raise_if_any()
        plan = self._domain.plan(call.tenant, request.name, facts)
        decision, reservation_id = await self._domain.reserve(
            call.tenant, request.name, plan, request.tokens, ttl_s, request.request_id
        )
        response = emit.reply(item)
        write_decision(response.decision, decision)
        response.reservation_id = reservation_id
        self._report.note(call.tenant, decision, request.tokens)

    async def settle(self, items: Sequence[Item], emit: Emit) -> None:
        """Replaces reservations by what was used."""
        await _each(items, emit, self._settle)

    async def _settle(self, item: Item, emit: Emit) -> None:
        request = item.request
        settled = await self._domain.settle(
            item.call.tenant, request.reservation_id, request.tokens
        )
        response = emit.reply(item)
        response.adjustment = settled.adjustment
        response.repeated_settle = settled.repeated
        response.remaining = settled.remaining

    async def acquire(self, items: Sequence[Item], emit: Emit) -> None:
        """Takes concurrency slots."""
        await _each(items, emit, self._acquire)

    async def _acquire(self, item: Item, emit: Emit) -> None:
        request, call = item.request, item.call
        faults = Violations()
        facts = read_request(request, faults)
        slots = request.slots if request.HasField("slots") else 1
        faults.require("slots", 0 < slots <= MAX_SLOTS, f"must be from 1 to {MAX_SLOTS:,}")
        ttl_s = _ttl(request, faults, self._settings.slot_ttl_s)
        faults.raise_if_any()
        plan = self._domain.plan(call.tenant, request.name, facts, slots=True)
        decision, slot_id = await self._domain.acquire(call.tenant, plan, slots, ttl_s)
        response = emit.reply(item)
        write_decision(response.decision, decision)
        if slot_id:
            response.slot_id = slot_id
            set_duration(response.ttl, ttl_s)
        self._report.note(call.tenant, decision, slots)

    async def renew(self, items: Sequence[Item], emit: Emit) -> None:
        """Keeps slots for longer."""
        await _each(items, emit, self._renew)

    async def _renew(self, item: Item, emit: Emit) -> None:
        request = item.request
        faults = Violations()
        wanted_s = _ttl(request, faults, 0.0) if request.HasField("ttl") else None
        faults.raise_if_any()
        ttl_s = await self._domain.renew(item.call.tenant, request.slot_id, wanted_s)
        response = emit.reply(item)
        if ttl_s is not None:
            response.renewed = True
            set_duration(response.ttl, ttl_s)

    async def release(self, items: Sequence[Item], emit: Emit) -> None:
        """Gives slots back."""
        await _each(items, emit, self._release)

    async def _release(self, item: Item, emit: Emit) -> None:
        released = await self._domain.release(item.call.tenant, item.request.slot_id)
        emit.reply(item).released = released

    async def lease(self, items: Sequence[Item], emit: Emit) -> None:
        """Hands tokens out in advance."""
        await _each(items, emit, self._lease)

    async def _lease(self, item: Item, emit: Emit) -> None:
        request, call = item.request, item.call
        faults = Violations()
        facts = read_request(request, faults)
        faults.require("tokens", request.tokens > 0, "must be positive")
        faults.raise_if_any()
        plan = self._domain.plan(call.tenant, request.name, facts)
        leased = await self._domain.lease(call.tenant, plan, request.tokens)
        response = emit.reply(item)
        write_decision(response.decision, leased.decision)
        response.lease_id = leased.lease_id
        response.strict = leased.strict
        set_duration(response.ttl, leased.ttl_s)
        if leased.decision.granted:
            self._report.note(call.tenant, leased.decision, leased.decision.granted)

    async def return_lease(self, items: Sequence[Item], emit: Emit) -> None:
        """Takes unspent tokens back."""
        await _each(items, emit, self._return_lease)

    async def _return_lease(self, item: Item, emit: Emit) -> None:
        request = item.request
        returned = await self._domain.return_lease(
            item.call.tenant, request.lease_id, request.unspent
        )
        emit.reply(item).returned = returned

    # ---------------------------------------------------------------- the others

    async def batch_check(self, call: Call, request: Any) -> Any:
        """Decides many requests in their order; a malformed one refuses all."""
        faults = Violations()
        faults.count("requests", len(request.requests), at_least=1, at_most=_MAX_BATCH)
        faults.raise_if_any()
        for index, each in enumerate(request.requests):
            faults.nested(f"requests[{index}]", partial(read_request, each))
        faults.raise_if_any()
        asks = [self._ask(call.tenant, each) for each in request.requests]
        response = pb.BatchCheckResponse()
        for ask, decision in zip(asks, await self._domain.decide(asks), strict=True):
            write_decision(response.decisions.add(), decision)
            self._report.note(call.tenant, decision, ask.hits)
        return response

    async def set_limit(self, call: Call, request: Any) -> Any:
        """Makes or replaces a limit."""
        if not call.principal.admin:
            raise limits_are_admins()
        faults = Violations()
        faults.require("limit", request.HasField("limit"), "must be given")
        faults.raise_if_any()
        inner = Violations()
        limit = read_limit(request.limit, inner)
        faults.nested("limit", lambda nested: nested.found.extend(inner.found))
        faults.raise_if_any()
        before = self._book.limits.find(*limit.key)
        limit = await self._book.put(limit)
        self._audit("set", limit.limit_id, call, limit.tenant, str(limit.amount), before)
        return pb.SetLimitResponse(limit=limit_message(limit))

    async def delete_limit(self, call: Call, request: Any) -> Any:
        """Removes a limit that was set."""
        if not call.principal.admin:
            raise limits_are_admins()
        before = self._book.limits.find(request.limit_id, request.tenant, request.plan)
        await self._book.remove((request.limit_id, request.tenant, request.plan))
        self._audit("delete", request.limit_id, call, request.tenant, "", before)
        return pb.DeleteLimitResponse()

    async def get_limit(self, call: Call, request: Any) -> Any:
        """Reads the limit in force for the tenant."""
        limit = self._domain.limits.of(call.tenant).get(request.limit_id)
        if limit is None:
            raise limit_unknown(request.limit_id)
        masked = read_mask(request, pb.Limit)
        return pb.GetLimitResponse(limit=masked(limit_message(limit)))

    async def list_limits(self, call: Call, request: Any) -> Any:
        """Lists the limits in force for the tenant, in the order of their ids."""
        size = page_size(request.page_size)
        after = decode_page_token(call.tenant, b"limits", request.page_token)
        masked = read_mask(request, pb.Limit)
        limits = self._domain.limits.of(call.tenant)
        ids = sorted(each for each in limits if after is None or each > after)
        response = pb.ListLimitsResponse()
        for limit_id in ids[:size]:
            response.limits.append(masked(limit_message(limits[limit_id])))
        if len(ids) > size:
            response.next_page_token = encode_page_token(call.tenant, b"limits", ids[size - 1])
        return response

    async def get_usage(self, call: Call, request: Any) -> Any:
        """Reads the usage of one count; one that was never used is whole."""
        limit = self._domain.limits.of(call.tenant).get(request.limit_id)
        if limit is None:
            raise limit_unknown(request.limit_id)
        if not limit.tenants_apart:
            raise unimplemented("usage of limits that count several tenants together")
        wanted = dict(request.counted_by)
        if wanted.keys() == set(limit.per) - {TENANT}:
            known = {**wanted, TENANT: call.tenant}
            key = (*limit.key, limit.kind, *(known[fact] for fact in limit.per))
            for usage in await self._domain.usage(call.tenant, key):
                return pb.GetUsageResponse(usage=usage_message(usage))
        return pb.GetUsageResponse(
            usage=pb.Usage(
                limit_id=limit.limit_id, counted_by=wanted, remaining=limit.size, limit=limit.size
            )
        )

    async def list_usage(self, call: Call, request: Any) -> Any:
        """Lists the counts of the tenant that are in use, by limit and facts."""
        size = page_size(request.page_size)
        query = b"usage/" + request.limit_id.encode()
        after = decode_page_token(call.tenant, query, request.page_token)
        masked = read_mask(request, pb.Usage)
        rows = sorted(
            (
                ([usage.limit_id, *(value for _, value in usage.counted_by)], usage)
                for usage in await self._domain.usage(call.tenant)
                if request.limit_id in ("", usage.limit_id)
            ),
            key=lambda row: row[0],
        )
        rows = [row for row in rows if after is None or row[0] > after]
        response = pb.ListUsageResponse()
        for _, usage in rows[:size]:
            response.usages.append(masked(usage_message(usage)))
        if len(rows) > size:
            response.next_page_token = encode_page_token(call.tenant, query, rows[size - 1][0])
        return response

    # ---------------------------------------------------------------- within

    def _on_load(self, fault: str) -> None:
        """The limits file was read; ``fault`` is what was wrong, if anything."""
        if self._settings.limits is None:
            return
        event = AuditEvent(
            "ratelimit.limits.load",
            f"files/{self._settings.limits.name}",
            actor="ratelimit",
            outcome="failed" if fault else "succeeded",
            attributes={"fault": fault[:256]} if fault else {},
        )
        self._mesh.audit.note(event, tenant=MESH_TENANT)

    def _audit(
        self, what: str, limit_id: str, call: Call, tenant: str, amount: str, before: Any
    ) -> None:
        event = AuditEvent(
            f"ratelimit.limits.{what}",
            f"limits/{limit_id}",
            actor=call.principal.name,
            attributes={
                "tenant": tenant,
                "amount": amount,
                "before": "" if before is None else str(before.amount),
            },
        )
        self._mesh.audit.note(event, tenant=tenant or MESH_TENANT)

    def _ask(self, tenant: str, request: Any) -> Ask:
        known = self._resolved_of(tenant).get(request.SerializeToString())
        if known is None or self._generation != self._domain.generation:
            known = self._resolve(tenant, request)
        return known

    def _resolve(self, tenant: str, request: Any) -> Ask:
        """Reads a check and finds its counts.

        Raises:
            InvalidRequestError: it is malformed.
        """
        faults = Violations()
        facts = read_request(request, faults)
        faults.raise_if_any()
        found = Ask(
            self._domain.plan(tenant, request.name, facts),
            request.hits if request.HasField("hits") else 1,
            request.allow_partial,
        )
        if self._generation != self._domain.generation or self._plans >= _MAX_PLANS:
            self._generation = self._domain.generation
            self._resolved = {}
            self._plans = 0
        self._plans += 1
        self._resolved.setdefault(tenant, {})[request.SerializeToString()] = found
        return found

    def _resolved_of(self, tenant: str) -> dict[bytes, Ask]:
        """The checks of a tenant that were read before, by their bytes on the wire."""
        return self._resolved.get(tenant, _NONE_RESOLVED)


async def _each(items: Sequence[Item], emit: Emit, handle: Any) -> None:
    """Handles items at once; one's failure is its own."""

    async def one(item: Item) -> None:
        try:
            await handle(item, emit)
        except MeshError as error:
            emit.fail(item, error)

    if len(items) == 1:
        await one(items[0])
    else:
        await asyncio.gather(*(one(item) for item in items))


def _ttl(request: Any, faults: Violations, default_s: float) -> float:
    if not request.HasField("ttl"):
        return default_s
    ttl_s = faults.positive_duration("ttl", request.ttl)
    faults.require("ttl", ttl_s <= _MAX_TTL_S, f"must be at most a day, is {ttl_s:g}s")
    return ttl_s
