"""One caller's way through the service, and what is written down of it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from agent360.client.errors import MeshError
from agent360.mesh.inference import tokens
from agent360.mesh.inference.answers import Delta, Source, Usage
from agent360.mesh.inference.catalogue import cost_usd
from agent360.mesh.inference.flights import Follower
from agent360.mesh.inference.metering.till import Charge
from agent360.mesh.inference.ports import Meter, Payer, UsageRecord
from agent360.mesh.inference.routing import Route
from agent360.mesh.runtime.call import Call


class Result(Protocol):
    """What a model gave: an answer, or vectors."""

    @property
    def usage(self) -> Usage:
        """Tokens that it took."""

    @property
    def backend(self) -> str:
        """Who made it."""


T = TypeVar("T", bound=Result)


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time went, in seconds from receiving the request."""

    queue_s: float
    """Until a model was asked; all of it where none was."""
    first_token_s: float | None
    """Until the first token; None where nothing was generated."""
    total_s: float
    """Until the end of the answer."""


@dataclass(frozen=True, slots=True)
class Answered(Generic[T]):
    """An answer as one caller gets it."""

    answer: T
    source: Source
    route: Route
    cost_usd: float
    """What this caller is charged with."""
    timing: Timing


class Ride(Generic[T]):
    """One caller's request: pieces as they come, then the answer, then its usage record.

    Invariant: one usage record is written, whatever happens.
    """

    def __init__(
        self,
        call: Call,
        user: str,
        route: Route,
        follower: Follower[T],
        received: float,
        meter: Meter,
        method: Literal["generate", "embed"] = "generate",
    ) -> None:
        """Makes one for a caller that follows a flight.

        Args:
            call: whose request it is.
            user: the end user; empty: not named.
            route: the model that was chosen for it.
            follower: of the flight that answers it.
            received: when the request came, on the monotonic clock (seconds).
            meter: told how it ended.
            method: what was asked.
        """
        self._call = call
        self._user = user
        self._route = route
        self._follower = follower
        self._received = received
        self._meter = meter
        self._method = method
        self._recorded = False

    @property
    def pending_bytes(self) -> int:
        """Size of what ``take`` would give."""
        return self._follower.pending_bytes

    async def more(self) -> bool:
        """Waits for pieces; False: everything was taken."""
        return await self._follower.more()

    def take(self) -> Delta:
        """The pieces that came since the last time, put together."""
        return self._follower.take()

    async def answered(self) -> Answered[T]:
        """Waits for the whole answer and writes it down."""
        follower = self._follower
        answer = follower.flight.answer or await follower.answer()
        route = follower.flight.route or self._route
        source, timing = follower.source, self._timing()
        charge, charged_tokens, charged_usd = self._charge, 0, 0.0
        if charge is not None and charge.settled is not None:
            charged_tokens = charge.settled.tokens
            charged_usd = charge.part * cost_usd(route.model, answer.usage)
        self._call.facts["source"] = source.value
        self._recorded = True
        self._meter.record(
            UsageRecord(
                Payer(self._call.tenant, route.model.name, self._user),
                self._method,
                "OK",
                timing.total_s,
                source,
                answer.backend,
                route.rule,
                answer.usage,
                charged_tokens,
                charged_usd,
                timing.first_token_s,
                self._call.request_id,
            )
        )
        return Answered(answer, source, route, charged_usd, timing)

    def failed(self, reason: str) -> None:
        """Writes down that there is no answer, unless there was one.

        The record of one for whom the model goes on, or who is still to be charged for what was
        produced, is written when that is done.

        Args:
            reason: of the error.
        """
        if self._recorded:
            return
        self._recorded = True
        total_s = time.monotonic() - self._received
        if self._follower.leads:
            bill = self._follower.flight.bill
            bill.when_settled(lambda: self._record_failure(reason, total_s))
        else:
            self._record_failure(reason, total_s)

    def _record_failure(self, reason: str, total_s: float) -> None:
        charge, pieces = self._charge, self._follower.flight.pieces
        settled = charge.settled if charge is not None else None
        said = Usage(0, tokens.estimate_pieces(pieces), estimated=True) if pieces else None
        self._meter.record(
            UsageRecord(
                Payer(self._call.tenant, self._route.model.name, self._user),
                self._method,
                reason,
                total_s,
                rule=self._route.rule,
                usage=said,
                charged_tokens=settled.tokens if settled is not None else 0,
                charged_usd=settled.micro_usd / 1e6 if settled is not None else 0.0,
                request_id=self._call.request_id,
            )
        )

    @property
    def _charge(self) -> Charge | None:
        """What was set aside for this caller."""
        follower = self._follower
        return follower.flight.bill.leader if follower.leads else follower.charge

    def _timing(self) -> Timing:
        flight, received = self._follower.flight, self._received
        total = time.monotonic() - received
        if self._follower.source is Source.CACHE or flight.began is None:
            return Timing(total, None, total)
        first = None if flight.first_piece is None else max(0.0, flight.first_piece - received)
        return Timing(max(0.0, flight.began - received), first, total)


def reason_of(error: BaseException) -> str:
    """What is written down of an error."""
    if isinstance(error, MeshError):
        return error.reason
    left = isinstance(error, asyncio.CancelledError | GeneratorExit)
    return "CANCELLED" if left else "INTERNAL"
