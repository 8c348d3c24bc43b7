"""Identical requests come together: each joins a flight or begins one, and pays as agreed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from agent360.client.context import CallScope, enter_scope
from agent360.mesh.inference.answers import Source
from agent360.mesh.inference.caching.settings import CoalescingSettings
from agent360.mesh.inference.flights import Flight, Flights, Follower, Work
from agent360.mesh.inference.metering.sharing import SharedBill
from agent360.mesh.inference.metering.till import Till
from agent360.mesh.inference.ports import Amount, Payer, Place
from agent360.mesh.runtime.call import Call

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Share(Generic[T]):
    """A request, as far as flights are concerned."""

    call: Call
    """Whose it is."""
    payer: Payer
    """Who is charged."""
    place: Place
    """Where its answer is kept: that of an identical request is the same."""
    alone: bool
    """Whether it takes no part in another's flight."""
    solo: bool
    """Whether it is also whole and not kept, so that nothing is left to do after its answer."""
    streamed: bool
    """Whether pieces are wanted as the model says them."""
    most: Callable[[], Awaitable[Amount]]
    """The most that answering it can use."""
    produced: Callable[[Flight[T]], Amount]
    """What a flight that answers it has used so far."""
    fly: Work[T]
    """Answers it."""
    patience_s: float | None = None
    """The longest wait for a turn of the model that the request allows; None: it says nothing."""


class Joining(Generic[T]):
    """The flights of a service, and who may join which.

    Example:
        >>> async with joining.follow(share) as follower:
        ...     answer = await follower.answer()
    """

    def __init__(self, settings: CoalescingSettings, till: Till) -> None:
        self._settings = settings
        self._till = till
        self._flights: Flights[T] = Flights()

    async def close(self) -> None:
        """Ends what is in flight."""
        await self._flights.close()

    @contextlib.asynccontextmanager
    async def follow(self, share: Share[T]) -> AsyncIterator[Follower[T]]:
        """Joins a flight, or begins one; leaving it as the last one ends it.

        A flight that was denied by the limits of whom it began for says nothing about another: that
        one begins a flight of its own.

        Raises:
            RateLimitedError: one who joins must pay too, and may not.
        """
        while True:
            flight = self._joinable(share)
            leads = flight is None
            if flight is None:
                flight = self._launch(share)
            flight.want(share.call.deadline, int(share.call.priority))
            with self._flights.follow(flight, leads=leads) as follower:
                pays = not leads and not follower.late and flight.bill.joiners_pay
                if pays or (not leads and flight.payer != share.payer):
                    await follower.admitted()
                    if flight.denied and flight.payer != share.payer:
                        continue
                if not pays or flight.error is not None or flight.source is Source.CACHE:
                    yield follower
                else:
                    async with self._paying(follower, share):
                        yield follower
                return

    @contextlib.asynccontextmanager
    async def _paying(self, follower: Follower[T], share: Share[T]) -> AsyncIterator[None]:
        """Charges one who joined a flight too."""
        flight = follower.flight
        charge = await self._till.open(share.payer, await share.most())
        follower.charge = charge
        flight.bill.join(charge)
        try:
            yield
        finally:
            if charge.settled is None:
                flight.bill.leave(charge, share.produced(flight))

    def _joinable(self, share: Share[T]) -> Flight[T] | None:
        """A flight that answers the same; who wants no pieces can also take those of a stream."""
        if share.alone or not self._settings.enabled:
            return None
        forms: Sequence[bool] = (True,) if share.streamed else (True, False)
        for streamed in forms:
            flight = self._flights.find((share.place, streamed))
            if flight is not None:
                return None if flight.denied or _hastier(flight, share) else flight
        return None

    def _launch(self, share: Share[T]) -> Flight[T]:
        call = share.call
        # No deadline: the flight lasts as long as anybody waits, each until a deadline of its own.
        scope = CallScope(
            tenant=call.tenant,
            priority=int(call.priority),
            traceparent=call.traceparent,
            request_id=call.request_id,
        )

        async def work(flight: Flight[T]) -> None:
            enter_scope(scope)
            try:
                await share.fly(flight)
            finally:
                # Whatever it came to, everyone is charged; where nothing ran, with nothing.
                flight.bill.settle(Amount())

        bill = SharedBill(self._settings.billing)
        if share.solo:
            return self._flights.alone(share.payer, bill, work)
        flight = self._flights.launch((share.place, share.streamed), share.payer, bill, work)
        flight.patience_s = share.patience_s
        return flight


def _hastier(flight: Flight[T], share: Share[T]) -> bool:
    """Whether a flight may give up, still waiting for its turn, before the request would."""
    if flight.patience_s is None or flight.first_piece is not None:
        return False
    return share.patience_s is None or share.patience_s > flight.patience_s
