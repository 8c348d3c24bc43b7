"""The wire side of the ratelimit service."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import grpc
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric

from agent360.client import AuditEvent
from agent360.client.errors import MeshError
from agent360.mesh.ratelimit.limiter import Decision, Limiter, Plan
from agent360.mesh.ratelimit.limits import Algorithm, Limit, LimitSet, read_limits
from agent360.mesh.ratelimit.settings import RateLimitSettings
from agent360.mesh.runtime.call import Call, Emit, Item
from agent360.mesh.runtime.pages import (
    decode_page_token,
    encode_page_token,
    page_size,
    read_mask,
)
from agent360.mesh.runtime.service import ServiceContext, ServiceDefinition
from agent360.mesh.runtime.telemetry import MESH_TENANT
from agent360.mesh.runtime.validation import Violations, set_duration
from agent360.ratelimit.v1 import ratelimit_pb2 as pb

_DESCRIPTOR: Final = pb.DESCRIPTOR.services_by_name["RateLimitService"]
_FACT_NAME: Final = re.compile(r"[a-z0-9_.-]{1,64}")
_MAX_FACTS: Final = 16
_MAX_PLANS: Final = 100_000
_MAX_BATCH: Final = 1_000

_ALGORITHMS: Final = {
    Algorithm.TOKEN_BUCKET: pb.ALGORITHM_TOKEN_BUCKET,
    Algorithm.SLIDING_WINDOW: pb.ALGORITHM_SLIDING_WINDOW,
    Algorithm.FIXED_WINDOW: pb.ALGORITHM_FIXED_WINDOW,
}


class _Resolved(NamedTuple):
    """A check as it was read, and the counts it is charged to."""

    plan: Plan
    hits: int
    allow_partial: bool


_NONE_RESOLVED: Final[dict[bytes, _Resolved]] = {}


class RateLimitServicer:
    """Serves agent360.ratelimit.v1.RateLimitService.

    What a request resolves to is remembered by its bytes: reading a small map field takes longer
    than serializing the whole request.
    """

    def __init__(self, settings: RateLimitSettings, context: ServiceContext) -> None:
        self._settings = settings
        self._mesh = context.mesh
        limits = read_limits(settings.limits) if settings.limits else LimitSet(())
        self.limiter = Limiter(
            limits,
            time.monotonic,
            max_counters=settings.max_counters,
            max_reservations=settings.max_reservations,
        )
        self._resolved: dict[str, dict[bytes, _Resolved]] = {}
        self._plans = 0
        self._generation = 0
        context.registry.register(_LimiterCollector(self.limiter))

    @property
    def definitions(self) -> tuple[ServiceDefinition, ...]:
        """See ``Servicer.definitions``."""
        return (
            ServiceDefinition(
                _DESCRIPTOR,
                batch={"Check": self.check, "Reserve": self.reserve, "Settle": self.settle},
                unary={
                    "BatchCheck": self.batch_check,
                    "GetLimit": self.get_limit,
                    "ListLimits": self.list_limits,
                },
                planned={
                    "Acquire": "concurrency slots",
                    "Renew": "concurrency slots",
                    "Release": "concurrency slots",
                    "Lease": "leases",
                    "ReturnLease": "leases",
                    "SetLimit": "limits set at run time",
                    "DeleteLimit": "limits set at run time",
                    "GetUsage": "usage of limits",
                    "ListUsage": "usage of limits",
                },
            ),
        )

    async def start(self) -> None:
        """See ``Servicer.start``."""
        if self._settings.limits:
            event = AuditEvent(
                "ratelimit.limits.load", f"files/{self._settings.limits.name}", actor="ratelimit"
            )
            self._mesh.audit.note(event, tenant=MESH_TENANT)

    async def close(self) -> None:
        """See ``Servicer.close``."""

    # ---------------------------------------------------------------- hot

    async def check(self, items: Sequence[Item], emit: Emit) -> None:
        """Decides requests."""
        limiter = self.limiter
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
            write_decision(reply(item).decision, decide(plan, hits, allow_partial, now))

    async def reserve(self, items: Sequence[Item], emit: Emit) -> None:
        """Sets tokens aside."""
        for item in items:
            request, call = item.request, item.call
            faults = Violations()
            facts = _read_request(request, faults)
            faults.require("tokens", request.tokens > 0, "must be positive")
            ttl_s = self._settings.reservation_ttl_s
            if request.HasField("ttl"):
                ttl_s = faults.positive_duration("ttl", request.ttl)
            try:
                faults.raise_if_any()
            except MeshError as error:
                emit.fail(item, error)
                continue
            plan = self.limiter.plan(call.tenant, request.name, facts)
            decision, reservation_id = self.limiter.reserve(
                call.tenant, plan, request.tokens, ttl_s, call.request_id
            )
            response = emit.reply(item)
            write_decision(response.decision, decision)
            response.reservation_id = reservation_id

    async def settle(self, items: Sequence[Item], emit: Emit) -> None:
        """Replaces reservations by what was used."""
        for item in items:
            request = item.request
            try:
                settled = self.limiter.settle(
                    item.call.tenant, request.reservation_id, request.tokens
                )
            except MeshError as error:
                emit.fail(item, error)
                continue
            response = emit.reply(item)
            response.adjustment = settled.adjustment
            response.repeated_settle = settled.repeated
            response.remaining = settled.remaining

    # ---------------------------------------------------------------- the others

    async def batch_check(self, call: Call, request: Any) -> Any:
        """Decides many requests in their order; a malformed one refuses all."""
        faults = Violations()
        faults.count("requests", len(request.requests), at_least=1, at_most=_MAX_BATCH)
        faults.raise_if_any()
        read = []
        for index, each in enumerate(request.requests):
            faults.nested(f"requests[{index}]", partial(_read_request, each))
            read.append(each)
        faults.raise_if_any()
        response = pb.BatchCheckResponse()
        for each in read:
            plan, hits, allow_partial = self._resolve(call.tenant, each)
            decision = self.limiter.decide(plan, hits, allow_partial, self.limiter.clock())
            write_decision(response.decisions.add(), decision)
        return response

    async def get_limit(self, call: Call, request: Any) -> Any:
        """Reads the limit in force for the tenant."""
        limit = self.limiter.limits_of(call.tenant).get(request.limit_id)
        if limit is None:
            raise MeshError(
                grpc.StatusCode.NOT_FOUND,
                "LIMIT_UNKNOWN",
                f"there is no limit {request.limit_id[:128]!r}",
                metadata={"limit_id": request.limit_id[:128]},
            )
        masked = read_mask(request, pb.Limit)
        return pb.GetLimitResponse(limit=masked(_limit_message(limit)))

    async def list_limits(self, call: Call, request: Any) -> Any:
        """Lists the limits in force for the tenant, in the order of their ids."""
        size = page_size(request.page_size)
        after = decode_page_token(call.tenant, b"limits", request.page_token)
        masked = read_mask(request, pb.Limit)
        limits = self.limiter.limits_of(call.tenant)
        ids = sorted(each for each in limits if after is None or each > after)
        response = pb.ListLimitsResponse()
        for limit_id in ids[:size]:
            response.limits.append(masked(_limit_message(limits[limit_id])))
        if len(ids) > size:
            response.next_page_token = encode_page_token(call.tenant, b"limits", ids[size - 1])
        return response

    # ---------------------------------------------------------------- within

    def _resolve(self, tenant: str, request: Any) -> _Resolved:
        """Reads a check and finds its counts.

        Raises:
            InvalidRequestError: it is malformed.
        """
        faults = Violations()
        facts = _read_request(request, faults)
        faults.raise_if_any()
        found = _Resolved(
            self.limiter.plan(tenant, request.name, facts),
            request.hits if request.HasField("hits") else 1,
            request.allow_partial,
        )
        if self._generation != self.limiter.generation or self._plans >= _MAX_PLANS:
            self._generation = self.limiter.generation
            self._resolved = {}
            self._plans = 0
        self._plans += 1
        self._resolved.setdefault(tenant, {})[request.SerializeToString()] = found
        return found

    def _resolved_of(self, tenant: str) -> dict[bytes, _Resolved]:
        """The checks of a tenant that were read before, by their bytes on the wire."""
        return self._resolved.get(tenant, _NONE_RESOLVED)


class _LimiterCollector:
    """A Prometheus collector of a limiter's counts."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter

    def collect(self) -> Iterator[Metric]:
        """Metrics for Prometheus."""
        yield CounterMetricFamily(
            "ratelimit_allowed", "Requests that were allowed.", self._limiter.allowed
        )
        denied = CounterMetricFamily(
            "ratelimit_denied", "Requests that were denied, by limit.", labels=["limit"]
        )
        for limit_id, count in list(self._limiter.denied.items()):
            denied.add_metric([limit_id], count)
        yield denied


def write_decision(message: Any, decision: Decision) -> None:
    """Fills a wire Decision in place."""
    allowed, granted, remaining, limit, reset_after_s, retry_after_s, limit_id = decision
    if allowed:
        message.allowed = True
    message.granted = granted
    message.remaining = remaining
    if limit_id:
        message.limit = limit
        message.limit_id = limit_id
        if reset_after_s > 0:
            reset = message.reset_after
            whole = int(reset_after_s)
            if whole:
                reset.seconds = whole
            reset.nanos = int((reset_after_s - whole) * 1e9)
    if retry_after_s is not None:
        set_duration(message.retry_after, retry_after_s + 1e-6)


def _read_request(request: Any, faults: Violations) -> dict[str, str]:
    """Checks name and descriptor, and returns the latter."""
    faults.text("name", request.name, max_bytes=128)
    facts = dict(request.descriptor)
    faults.count("descriptor", len(facts), at_least=0, at_most=_MAX_FACTS)
    for key, value in facts.items():
        faults.matches(f"descriptor[{key[:64]}]", key, _FACT_NAME, "keys match [a-z0-9_.-]{1,64}")
        faults.text(f"descriptor[{key[:64]}]", value, max_bytes=256, min_bytes=0)
    faults.require("descriptor[tenant]", "tenant" not in facts, "is set by the service")
    return facts


def _limit_message(limit: Limit) -> Any:
    message = pb.Limit(
        limit_id=limit.limit_id,
        name=limit.name,
        match=dict(limit.match),
        per=limit.per,
        algorithm=_ALGORITHMS[limit.algorithm],
        amount=limit.amount,
        burst=limit.size if limit.algorithm is Algorithm.TOKEN_BUCKET else 0,
        shadow=limit.shadow,
        strict=limit.strict,
        tenant=limit.tenant,
        source=pb.LIMIT_SOURCE_FILE,
    )
    set_duration(message.period, limit.period_s)
    return message
