"""The operations of the ratelimit client, as items of a stream."""

from __future__ import annotations

from typing import Any

from agent360.client.decisions import (
    CheckRequest,
    Decision,
    Descriptor,
    Reservation,
    Settlement,
    Slot,
)
from agent360.client.leasing import Lease
from agent360.client.operation import SingleOperation


class Check(SingleOperation[Decision]):
    __slots__ = ("request",)
    field = "check"
    repeatable = False

    def __init__(self, request: CheckRequest) -> None:
        super().__init__()
        self.request = request

    def fill(self, request: Any) -> None:
        fill_check(request, self.request)

    def read(self, response: Any) -> Decision:
        return read_check(response)


class Reserve(SingleOperation[Reservation]):
    __slots__ = ("descriptor", "name", "request_id", "tokens", "ttl")
    field = "reserve"

    def __init__(
        self,
        name: str,
        tokens: int,
        descriptor: Descriptor | None,
        ttl: float | None,
        request_id: str,
    ) -> None:
        super().__init__()
        self.request_id = request_id
        self.name = name
        self.tokens = tokens
        self.descriptor = descriptor
        self.ttl = ttl

    @property
    def repeatable(self) -> bool:  # type: ignore[override]  # only with an id of its own
        return bool(self.request_id)

    def fill(self, request: Any) -> None:
        request.name = self.name
        request.tokens = self.tokens
        request.request_id = self.request_id
        if self.descriptor:
            request.descriptor.update(self.descriptor)
        if self.ttl is not None:
            request.ttl.FromNanoseconds(round(self.ttl * 1e9))

    def read(self, response: Any) -> Reservation:
        return Reservation(read_check(response), response.reservation_id)


class Settle(SingleOperation[Settlement]):
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


class Acquire(SingleOperation[Slot]):
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
            read_check(response),
            response.slot_id,
            response.ttl.seconds + response.ttl.nanos * 1e-9,
        )


class Renew(SingleOperation[bool]):
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


class Release(SingleOperation[bool]):
    __slots__ = ("slot_id",)
    field = "release"

    def __init__(self, slot_id: str) -> None:
        super().__init__()
        self.slot_id = slot_id

    def fill(self, request: Any) -> None:
        request.slot_id = self.slot_id

    def read(self, response: Any) -> bool:
        return bool(response.released)


def fill_check(message: Any, request: CheckRequest) -> None:
    message.name = request.name
    if request.hits != 1:
        message.hits = request.hits
    if request.descriptor:
        facts = message.descriptor
        for key, value in request.descriptor.items():
            facts[key] = value
    if request.allow_partial:
        message.allow_partial = True


def read_check(response: Any) -> Decision:
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


class TakeLease(SingleOperation[Lease]):
    __slots__ = ("descriptor", "name", "tokens")
    field = "lease"
    repeatable = False

    def __init__(self, name: str, tokens: int, descriptor: Descriptor | None) -> None:
        super().__init__()
        self.name = name
        self.tokens = tokens
        self.descriptor = descriptor

    def fill(self, request: Any) -> None:
        request.name = self.name
        request.tokens = self.tokens
        if self.descriptor:
            request.descriptor.update(self.descriptor)

    def read(self, response: Any) -> Lease:
        ttl = response.ttl
        return Lease(
            read_check(response),
            response.lease_id,
            ttl.seconds + ttl.nanos * 1e-9,
            response.strict,
        )


class ReturnLease(SingleOperation[int]):
    __slots__ = ("lease_id", "unspent")
    field = "return_lease"

    def __init__(self, lease_id: str, unspent: int) -> None:
        super().__init__()
        self.lease_id = lease_id
        self.unspent = unspent

    def fill(self, request: Any) -> None:
        request.lease_id = self.lease_id
        request.unspent = self.unspent

    def read(self, response: Any) -> int:
        return int(response.returned)
