"""Calls of a model in flight: one call, any number of callers who wait for its answer."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import Callable, Coroutine, Hashable, Iterator, Sequence
from typing import Any, Final, Generic, TypeVar

from agent360.client.errors import UnavailableError
from agent360.mesh.inference.answers import (
    Answer,
    Delta,
    Piece,
    Source,
    as_pieces,
    merge,
)
from agent360.mesh.inference.metering.sharing import SharedBill
from agent360.mesh.inference.metering.till import Charge
from agent360.mesh.inference.ports import Amount, Payer
from agent360.mesh.inference.queueing import Ticket
from agent360.mesh.inference.routing import Route
from agent360.mesh.inference.tokens import piece_size

T = TypeVar("T")

_ADMISSION: Final = "admission"
_PIECES: Final = "pieces"


class Flight(Generic[T]):
    """One call of a model and what it has said so far.

    Invariant: ``pieces`` only grows, and a follower that joins late reads it from the start.
    Exactly one of ``answer`` and ``error`` is set when it has ended.
    """

    def __init__(self, key: Hashable, payer: Payer, bill: SharedBill) -> None:
        self.key = key
        self.payer = payer
        """Whose limits decide whether the model is run."""
        self.bill = bill
        """Who is charged."""
        self.pieces: list[Piece] = []
        self.said_bytes = 0
        self.answer: T | None = None
        self.error: Exception | None = None
        self.source = Source.MODEL
        self.admitted = False
        """Limits let it pass, or it needs none."""
        self.denied = False
        """Limits refused it."""
        self.route: Route | None = None
        """What answered, where that is not what the callers' own routes say: after a fallback."""
        self.began: float | None = None
        """When the model was asked, on the monotonic clock."""
        self.first_piece: float | None = None
        """When it first said something."""
        self.priority = 0
        """The highest of those who wait or waited."""
        self.wanted_until: float | None = None
        """The latest deadline of those who wait, on the monotonic clock; None: nobody told one."""
        self.ticket: Ticket | None = None
        """What the model's queue was told of it, once it was."""
        self.patience_s: float | None = None
        """The longest wait for a turn of the model that whom it began for allows; None: any."""
        self.followers: set[Follower[T]] = set()
        self.task: asyncio.Task[None] | None = None
        self.work: Callable[[], Coroutine[Any, Any, None]] | None = None
        """What its only caller has yet to do itself; None where a task does it."""
        self.begun = False
        """Whether its work has begun: a task that is cancelled before never does."""

    @property
    def ended(self) -> bool:
        """Whether there is an answer or an error."""
        return self.answer is not None or self.error is not None

    def admit(self) -> None:
        """Notes that limits let the call pass."""
        self.admitted = True
        self._wake(_ADMISSION)

    def want(self, until: float, priority: int) -> None:
        """Notes that somebody waits, until a deadline on the monotonic clock."""
        if priority > self.priority:
            self.priority = priority
            if self.ticket is not None:
                self.ticket.raise_to(priority)
        if self.wanted_until is None or until > self.wanted_until:
            self.wanted_until = until
            if self.ticket is not None:
                self.ticket.deadline = until

    def push(self, pieces: Sequence[Piece]) -> None:
        """Adds what the model said."""
        if self.first_piece is None:
            self.first_piece = time.monotonic()
        self.pieces += pieces
        self.said_bytes += sum(map(piece_size, pieces))
        self._wake(_PIECES)

    def land(self, answer: T, source: Source = Source.MODEL) -> None:
        """Ends it with an answer, all of whose pieces were pushed."""
        self.answer, self.source, self.admitted = answer, source, True
        self._wake()

    def fail(self, error: Exception) -> None:
        """Ends it with an error, unless it has ended."""
        if not self.ended:
            self.error = error
            self._wake()

    def _wake(self, happened: str = "") -> None:
        """Wakes those who wait for it; all where the flight has ended."""
        for follower in self.followers:
            if not happened or follower.awaits == happened:
                follower.wake()


class Follower(Generic[T]):
    """A caller that waits for a flight's answer, at its own pace.

    Example:
        >>> while await follower.more():
        ...     delta = follower.take()
    """

    __slots__ = (
        "_bytes_taken",
        "_taken",
        "_waiter",
        "awaits",
        "charge",
        "flight",
        "late",
        "leads",
    )

    def __init__(self, flight: Flight[T], leads: bool) -> None:
        self.flight = flight
        self.leads = leads
        """Whether the flight began for this caller."""
        self.late = flight.answer is not None
        """Whether the answer was there before this caller came."""
        self.charge: Charge | None = None
        """What was set aside for a caller who joined; None: nothing."""
        self.awaits = ""
        """What wakes this caller before the end."""
        self._waiter: asyncio.Future[None] | None = None
        self._taken = 0
        self._bytes_taken = 0

    @property
    def source(self) -> Source:
        """Where this caller's answer comes from."""
        if self.late:
            return Source.CACHE
        if self.flight.source is Source.MODEL and not self.leads:
            return Source.COALESCED
        return self.flight.source

    @property
    def pending_bytes(self) -> int:
        """Size of what ``take`` would give."""
        return self.flight.said_bytes - self._bytes_taken

    async def admitted(self) -> None:
        """Waits until limits let the flight pass, or it ended."""
        while not self.flight.admitted and not self.flight.ended:
            await self._woken(_ADMISSION)

    async def more(self) -> bool:
        """Waits until there is something to take; False: everything was taken.

        Raises:
            Exception: what the flight failed with, after all that was said before was taken.
        """
        flight = self.flight
        while True:
            if self._taken < len(flight.pieces):
                return True
            if flight.error is not None:
                raise flight.error.with_traceback(None)
            if flight.answer is not None:
                return False
            await self._woken(_PIECES)

    def take(self) -> Delta:
        """What was said since the last time, put together."""
        pieces = self.flight.pieces
        fresh = pieces if self._taken == 0 else pieces[self._taken :]
        self._taken = len(pieces)
        self._bytes_taken = self.flight.said_bytes
        return merge(fresh)

    async def answer(self) -> T:
        """Waits for the whole answer.

        Raises:
            Exception: what the flight failed with.
        """
        flight = self.flight
        if flight.work is not None:
            work, flight.work = flight.work, None
            await work()
        while flight.answer is None:
            if flight.error is not None:
                raise flight.error.with_traceback(None)
            await self._woken("the end")
        return flight.answer

    def wake(self) -> None:
        """Something happened that this caller waits for."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _woken(self, awaits: str) -> None:
        self.awaits = awaits
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


Work = Callable[[Flight[T]], Coroutine[Any, Any, None]]
"""Does a flight's work: pushes pieces, lands or raises."""


class Flights(Generic[T]):
    """The flights of a service.

    A flight is a task of its own, in an empty context: it outlives the caller it began for while
    another waits, and is cancelled when nobody does. One that nobody can join needs none
    (``alone``).
    """

    def __init__(self) -> None:
        self._joinable: dict[Hashable, Flight[T]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def find(self, key: Hashable) -> Flight[T] | None:
        """The flight of that key that can be joined."""
        return self._joinable.get(key)

    def launch(self, key: Hashable, payer: Payer, bill: SharedBill, work: Work[T]) -> Flight[T]:
        """Begins a flight; others can join it unless one of its key is there already."""
        flight: Flight[T] = Flight(key, payer, bill)
        self._joinable.setdefault(key, flight)
        task = asyncio.get_running_loop().create_task(
            self._run(flight, work), context=contextvars.Context()
        )
        flight.task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return flight

    def alone(self, payer: Payer, bill: SharedBill, work: Work[T]) -> Flight[T]:
        """A flight that nobody can join: its caller does the work on the way to the answer.

        That spares a task and the way there and back. Only for work that ends with its answer.
        """
        flight: Flight[T] = Flight(None, payer, bill)
        flight.work = lambda: self._run(flight, work)
        return flight

    @contextlib.contextmanager
    def follow(self, flight: Flight[T], *, leads: bool) -> Iterator[Follower[T]]:
        """Waits for a flight; leaving it as the last one cancels it."""
        follower = Follower(flight, leads)
        flight.followers.add(follower)
        try:
            yield follower
        finally:
            flight.followers.discard(follower)
            if not flight.followers and not flight.ended:
                self._withdraw(flight)
                if flight.task is not None:
                    flight.task.cancel()
                if not flight.begun:
                    flight.bill.settle(Amount())

    async def close(self) -> None:
        """Cancels all flights and waits for their end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, flight: Flight[T], work: Work[T]) -> None:
        flight.begun = True
        try:
            await work(flight)
        except asyncio.CancelledError:
            flight.fail(UnavailableError("the service is stopping", reason="STOPPING"))
            raise
        except Exception as error:  # noqa: BLE001 - it is the answer of everyone who waits
            flight.fail(error)
        finally:
            self._withdraw(flight)

    def _withdraw(self, flight: Flight[T]) -> None:
        if self._joinable.get(flight.key) is flight:
            del self._joinable[flight.key]


def landed(answer: Answer, payer: Payer) -> Follower[Answer]:
    """A caller whose answer is there already: nothing flies, nobody joins, nothing is charged."""
    flight: Flight[Answer] = Flight(None, payer, SharedBill("leader"))
    flight.push(as_pieces(answer))
    flight.land(answer, Source.CACHE)
    return Follower(flight, leads=True)
