"""The wire side of the ratelimit service."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from agent360.client.errors import MeshError
from agent360.mesh.ratelimit.answering import answer_checks
from agent360.mesh.ratelimit.assembly import assemble
from agent360.mesh.ratelimit.deadline import waited_s
from agent360.mesh.ratelimit.decisions import Decision
from agent360.mesh.ratelimit.domain import Ask, LocalDomain
from agent360.mesh.ratelimit.envoy import EnvoyService
from agent360.mesh.ratelimit.exposition import LimiterCollector
from agent360.mesh.ratelimit.limit_rpcs import LimitRpcs
from agent360.mesh.ratelimit.own_quota import OwnQuota
from agent360.mesh.ratelimit.settings import RateLimitSettings
from agent360.mesh.ratelimit.usage import UsageReport
from agent360.mesh.ratelimit.usage_rpcs import UsageRpcs
from agent360.mesh.ratelimit.wire import (
    MAX_SLOTS,
    read_request,
    write_decision,
)
from agent360.mesh.runtime.call import Call, Emit, Item
from agent360.mesh.runtime.service import ServiceContext, ServiceDefinition
from agent360.mesh.runtime.validation import Violations, set_duration
from agent360.ratelimit.v1 import ratelimit_pb2 as pb

_DESCRIPTOR: Final = pb.DESCRIPTOR.services_by_name["RateLimitService"]
_MAX_PLANS: Final = 100_000
_MAX_BATCH: Final = 1_000

_MAX_TTL_S: Final = 86_400.0

_NONE_RESOLVED: Final[dict[bytes, Ask]] = {}
_NOTHING_ASKED: Final = Ask((), 0, False)


class RateLimitServicer:
    """Serves agent360.ratelimit.v1.RateLimitService.

    What a request resolves to is remembered by its bytes: reading a small map field takes longer
    than serializing the whole request.
    """

    def __init__(self, settings: RateLimitSettings, context: ServiceContext) -> None:
        self._settings = settings
        self._parts = assemble(settings, context.registry, context.log, self._on_load)
        self._domain = self._parts.domain
        self._in_memory = isinstance(self._domain, LocalDomain)
        self._book = self._parts.book
        self.limiter = OwnQuota(self._domain, self._parts.limiter)
        """Its own domain, for the quota of its callers."""
        self._envoy = EnvoyService(self._domain, settings.envoy_tenant)
        self._limits = LimitRpcs(settings, context.mesh, self._domain, self._book)
        self._usage = UsageRpcs(self._domain)
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
                "SetLimit": self._limits.set_limit,
                "GetLimit": self._limits.get_limit,
                "ListLimits": self._limits.list_limits,
                "DeleteLimit": self._limits.delete_limit,
                "GetUsage": self._usage.get_usage,
                "ListUsage": self._usage.list_usage,
            },
        )
        return own, self._envoy.definition

    async def start(self) -> None:
        """See ``Servicer.start``."""
        await self._parts.connect()
        await self._book.start(self._domain.replace_limits)
        self._report.start()
        if self._settings.limits:
            self._limits.on_load("")

    async def close(self) -> None:
        """See ``Servicer.close``."""
        await self._report.close()
        await self._book.close()
        await self._parts.disconnect()

    # ---------------------------------------------------------------- hot

    async def check(self, items: Sequence[Item], emit: Emit) -> None:
        """Decides requests."""
        if self._in_memory:
            self._check_in_memory(items, emit)
            return
        asked, asks, waits_s = [], [], 0.0
        call, resolved = None, _NONE_RESOLVED
        for item in items:
            if item.call is not call:
                call = item.call
                waits_s = max(waits_s, call.waited_s)
                resolved = self._resolved_of(call.tenant)
            ask = resolved.get(item.request.SerializeToString())
            if ask is None or self._generation != self._domain.generation:
                try:
                    ask = self._resolve(call.tenant, item.request)
                except MeshError as error:
                    emit.fail(item, error)
                    continue
                resolved = self._resolved_of(call.tenant)
            asked.append(item)
            asks.append(ask)
        waited_s.set(waits_s)
        decisions = await self._domain.decide(asks)
        answer_checks(zip(asked, asks, decisions, strict=True), emit, self._report)

    def _check_in_memory(self, items: Sequence[Item], emit: Emit) -> None:
        """The same, where a request is decided before the next is resolved.

        Finding the counts of one may drop those of another to which nothing is charged yet.
        """
        limiter = self._parts.limiter
        counts, now = limiter.counts, limiter.clock()
        asked: list[Item] = []
        asks: list[Ask] = []
        decisions: list[Decision] = []
        decide = limiter.decide
        last, times = _NOTHING_ASKED, 0
        call, resolved = None, _NONE_RESOLVED
        for item in items:
            if item.call is not call:
                call = item.call
                resolved = self._resolved_of(call.tenant)
            ask = resolved.get(item.request.SerializeToString())
            if ask is not last or self._generation != counts.generation:
                if times == 1:
                    decisions.append(decide(last[0], last[1], last[2], now))
                elif times:
                    decisions += limiter.decide_run(*last, times, now)
                times = 0
                if ask is None or self._generation != counts.generation:
                    try:
                        ask = self._resolve(call.tenant, item.request)
                    except MeshError as error:
                        emit.fail(item, error)
                        last = _NOTHING_ASKED
                        continue
                    resolved = self._resolved_of(call.tenant)
                last = ask
            times += 1
            asked.append(item)
            asks.append(last)
        if times:
            decisions += limiter.decide_run(*last, times, now)
        answer_checks(zip(asked, asks, decisions, strict=True), emit, self._report)

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
        waited_s.set(call.waited_s)
        response = pb.BatchCheckResponse()
        for ask, decision in zip(asks, await self._domain.decide(asks), strict=True):
            write_decision(response.decisions.add(), decision)
            self._report.note(call.tenant, decision, ask.hits)
        return response

    # ---------------------------------------------------------------- within

    def _on_load(self, fault: str) -> None:
        self._limits.on_load(fault)

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
        waited_s.set(item.call.waited_s)
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
