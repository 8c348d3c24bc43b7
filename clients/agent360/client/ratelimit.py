"""The client of the ratelimit service."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Final

from msgspec import Struct

from agent360.client.coalescer import Coalescer, Wire
from agent360.client.many import Results
from agent360.client.operation import SingleOperation
from agent360.ratelimit.v1 import ratelimit_pb2

WIRE: Final = Wire(
    "agent360.ratelimit.v1.RateLimitService",
    ratelimit_pb2.PipelineRequest,
    ratelimit_pb2.PipelineItem,
    ratelimit_pb2.PipelineResponse,
    ratelimit_pb2.PipelineResult,
)

Descriptor = Mapping[str, str]
"""Facts that limits are matched and counted by, such as user, api_key, model or method."""


class Decision(Struct, frozen=True, gc=False):
    """The decision on a request."""

    allowed: bool
    """Whether it may be done."""
    granted: int
    """How many hits were granted: all, none or, with ``allow_partial``, some."""
    remaining: int
    """How many more hits the tightest limit would admit now."""
    limit: int
    """Size of the tightest limit in hits; 0 if no limit applies."""
    reset_after_s: float
    """Seconds until the tightest limit is whole again."""
    retry_after_s: float | None
    """When denied, or granted in part: seconds after which it can be admitted; None: never."""
    limit_id: str
    """The tightest limit or, when denied, the one that denied; empty if no limit applies."""
    degraded: bool
    """True where the store was away and the limit's failure mode decided."""


class CheckRequest(Struct, frozen=True, gc=False):
    """One of many checks."""

    name: str
    """What is to be done, such as ``inference.generate``."""
    hits: int = 1
    """How much is charged; 0 looks without charging."""
    descriptor: Descriptor | None = None
    """Facts for matching."""
    allow_partial: bool = False
    """Whether fewer hits than asked for may be granted."""


class Reservation(Struct, frozen=True, gc=False):
    """Tokens set aside, or the decision that denied them."""

    decision: Decision
    """The decision."""
    reservation_id: str
    """For ``settle``; empty when denied."""


class Settlement(Struct, frozen=True, gc=False):
    """What a settle did."""

    adjustment: int
    """Tokens charged beyond the reservation (positive) or given back (negative)."""
    repeated: bool
    """True if the reservation had been settled before and nothing was changed."""
    remaining: int
    """How many more tokens the tightest limit would admit now."""


class Slot(Struct, frozen=True, gc=False):
    """Concurrency slots, or the decision that denied them."""

    decision: Decision
    """The decision."""
    slot_id: str
    """For ``renew`` and ``release``; empty when denied."""
    ttl_s: float
    """Seconds after which the slots come back by themselves."""


class RateLimitClient:
    """Asks whether something may be done now.

    Example:
        >>> decision = await mesh.ratelimit.check("search", descriptor={"user": "u1"})
        >>> if not decision.allowed:
        ...     raise TooManyRequests(decision.retry_after_s)
    """

    def __init__(self, coalescer: Coalescer) -> None:
        self._coalescer = coalescer

    async def check(
        self,
        name: str,
        *,
        hits: int = 1,
        descriptor: Descriptor | None = None,
        allow_partial: bool = False,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Decision:
        """Decides one request and charges it to every limit that applies, or to none.

        Args:
            name: what is to be done; limits are matched by it.
            hits: how much is charged; 0 looks without charging.
            descriptor: facts for matching, such as ``{"user": "u1"}``.
            allow_partial: whether fewer hits than asked for may be granted.
            timeout: seconds; None: what remains in the current scope, or the default.
            tenant: on whose behalf; None: that of the current scope, or the Mesh's.

        Raises:
            MeshError: the service could not be asked. A denial is a result, not an error.
        """
        request = CheckRequest(name, hits, descriptor, allow_partial)
        return await self._coalescer.call(_Check(request), timeout, tenant)

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
            fill=_fill_check,
            read=_read_check,
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
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Reservation:
        """Sets an estimated number of tokens aside; ``settle`` must follow.

        Args:
            name: what is to be done.
            tokens: the estimate.
            descriptor: facts for matching.
            ttl: seconds after which an unsettled reservation counts as spent.
            timeout: as in ``check``.
            tenant: as in ``check``.
        """
        operation = _Reserve(name, tokens, descriptor, ttl)
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
        return await self._coalescer.call(_Settle(reservation_id, tokens), timeout, tenant)

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
        operation = _Acquire(name, slots, descriptor, ttl)
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
        return await self._coalescer.call(_Renew(slot_id, ttl), timeout, tenant)

    async def release(
        self, slot_id: str, *, timeout: float | None = None, tenant: str | None = None
    ) -> bool:
        """Gives slots back; False if they had already come back."""
        return await self._coalescer.call(_Release(slot_id), timeout, tenant)

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


class _Check(SingleOperation[Decision]):
    __slots__ = ("request",)
    field = "check"
    repeatable = False

    def __init__(self, request: CheckRequest) -> None:
        super().__init__()
        self.request = request

    def fill(self, request: Any) -> None:
        _fill_check(request, self.request)

    def read(self, response: Any) -> Decision:
        return _read_check(response)


class _Reserve(SingleOperation[Reservation]):
    __slots__ = ("descriptor", "name", "tokens", "ttl")
    field = "reserve"
    repeatable = False

    def __init__(
        self, name: str, tokens: int, descriptor: Descriptor | None, ttl: float | None
    ) -> None:
        super().__init__()
        self.name = name
        self.tokens = tokens
        self.descriptor = descriptor
        self.ttl = ttl

    def fill(self, request: Any) -> None:
        request.name = self.name
        request.tokens = self.tokens
        if self.descriptor:
            request.descriptor.update(self.descriptor)
        if self.ttl is not None:
            request.ttl.FromNanoseconds(round(self.ttl * 1e9))

    def read(self, response: Any) -> Reservation:
        return Reservation(_read_check(response), response.reservation_id)


class _Settle(SingleOperation[Settlement]):
    __slots__ = ("reservation_id", "tokens")
    field = "settle"

    def __init__(self, reservation_id: str, tokens: int) -> None:
        super().__init__()
        self.reservation_id = reservation_id
        self.tokens = tokens

    def fill(self, request: Any) -> None:
        request.reservation_id = self.reservation_id
        request.tokens = self.tokens

    def read(self, response: Any) -> Settlement:
        return Settlement(response.adjustment, response.repeated_settle, response.remaining)


class _Acquire(SingleOperation[Slot]):
    __slots__ = ("descriptor", "name", "slots", "ttl")
    field = "acquire"
    repeatable = False

    def __init__(
        self, name: str, slots: int, descriptor: Descriptor | None, ttl: float | None
    ) -> None:
        super().__init__()
        self.name = name
        self.slots = slots
        self.descriptor = descriptor
        self.ttl = ttl

    def fill(self, request: Any) -> None:
        request.name = self.name
        request.slots = self.slots
        if self.descriptor:
            request.descriptor.update(self.descriptor)
        if self.ttl is not None:
            request.ttl.FromNanoseconds(round(self.ttl * 1e9))

    def read(self, response: Any) -> Slot:
        return Slot(
            _read_check(response),
            response.slot_id,
            response.ttl.seconds + response.ttl.nanos * 1e-9,
        )


class _Renew(SingleOperation[bool]):
    __slots__ = ("slot_id", "ttl")
    field = "renew"

    def __init__(self, slot_id: str, ttl: float | None) -> None:
        super().__init__()
        self.slot_id = slot_id
        self.ttl = ttl

    def fill(self, request: Any) -> None:
        request.slot_id = self.slot_id
        if self.ttl is not None:
            request.ttl.FromNanoseconds(round(self.ttl * 1e9))

    def read(self, response: Any) -> bool:
        return bool(response.renewed)


class _Release(SingleOperation[bool]):
    __slots__ = ("slot_id",)
    field = "release"

    def __init__(self, slot_id: str) -> None:
        super().__init__()
        self.slot_id = slot_id

    def fill(self, request: Any) -> None:
        request.slot_id = self.slot_id

    def read(self, response: Any) -> bool:
        return bool(response.released)


def _fill_check(message: Any, request: CheckRequest) -> None:
    message.name = request.name
    if request.hits != 1:
        message.hits = request.hits
    if request.descriptor:
        facts = message.descriptor
        for key, value in request.descriptor.items():
            facts[key] = value
    if request.allow_partial:
        message.allow_partial = True


def _read_check(response: Any) -> Decision:
    message = response.decision
    reset = message.reset_after
    allowed = message.allowed
    retry_after_s = None
    if message.HasField("retry_after"):
        retry = message.retry_after
        retry_after_s = retry.seconds + retry.nanos * 1e-9
    return Decision(
        allowed,
        message.granted,
        message.remaining,
        message.limit,
        reset.seconds + reset.nanos * 1e-9,
        retry_after_s,
        message.limit_id,
        message.degraded,
    )
