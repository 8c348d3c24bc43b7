"""Gathers items of several callers into batches, as large and as soon as measurements advise."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

import grpc

from agent360.client.errors import MeshError, UnavailableError
from agent360.mesh.inference.batching.settings import BatchSettings
from agent360.mesh.inference.queueing.lobby import Lobby
from agent360.mesh.inference.queueing.pace import Pace
from agent360.mesh.inference.queueing.service_time import ServiceTime
from agent360.mesh.inference.queueing.settings import QueueSettings
from agent360.mesh.inference.queueing.statistics import ModelStatistics, reason_of
from agent360.mesh.inference.queueing.ticket import Ticket
from agent360.mesh.inference.queueing.waiters import Waiter

T = TypeVar("T")
R = TypeVar("R")

Run = Callable[[Sequence[T], Ticket], Awaitable[Sequence[R]]]
"""Runs a batch; the results are in the order of its items."""

_CROWD_KEPT: Final = 0.7
_ALONE_FIRST: Final = 5
"""Batches at the start that run alone, so that it is known how long one takes."""
_ALONE_WHILE_SERIAL: Final = 100
"""Batches that run alone once more at a time did not help, before that is tried again."""
_SERIAL: Final = 0.7
_PERHAPS_SERIAL: Final = 0.5
_SERIAL_SHARE: Final = 0.2


class _Entry(Generic[T, R]):
    """An item and its caller."""

    __slots__ = ("batch", "future", "item")

    def __init__(self, item: T) -> None:
        self.item = item
        self.future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self.batch: _Batch[T, R] | None = None


class _Batch(Generic[T, R]):
    """A batch in flight."""

    __slots__ = ("beside", "task", "units", "waiters")

    def __init__(self, waiters: list[Waiter[_Entry[T, R]]], beside: int) -> None:
        self.waiters = waiters
        self.beside = beside
        """Batches that were in flight when it began."""
        self.units = sum(waiter.units for waiter in waiters)
        self.task: asyncio.Task[None] | None = None

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for a result of it."""
        return any(not waiter.payload.future.done() for waiter in self.waiters)


class Batcher(Generic[T, R]):
    """Runs items in batches.

    A batch begins as soon as fewer than ``slots`` are in flight, with whatever waits by then: in
    the order of the queue's levels, shares and deadlines, up to the size that the settings and the
    measured service time allow. So nobody waits for the slowest of another batch.

    Holding a batch back for those who are about to come pays only as long as it costs less than the
    call it saves: not longer than the fixed part of the measured service time (the bound of the
    ski rental problem, at most twice the best that could be done), nor than ``max_queue_delay_s``,
    and not once as many wait as came together lately. A lone caller is never held back.

    A backend that works on one batch after the other gains nothing from several in flight, and
    batches get smaller by them. It shows by taking twice as long for two at a time; then one at a
    time is sent, until a few more are tried again.

    A batch that is refused for one of its items is halved until that item is alone; the others get
    their results. An item whose caller leaves is taken out, a batch that nobody waits for stops.

    Example:
        >>> batcher = Batcher(run, BatchSettings(), QueueSettings(), lambda: 1, counts, loop.time)
        >>> result = await batcher.submit("a text", 1, ticket)
    """

    def __init__(
        self,
        run: Run[T, R],
        settings: BatchSettings,
        queue: QueueSettings,
        slots: Callable[[], int],
        counts: ModelStatistics,
        clock: Callable[[], float],
        *,
        weight_of: Callable[[str], float] = lambda _: 1.0,
    ) -> None:
        """Makes a batcher.

        Args:
            run: runs a batch.
            settings: sizes and delays.
            queue: how items wait.
            slots: how many batches may be in flight now.
            counts: gets the counts.
            clock: the event loop's time.
            weight_of: shares of tenants in proportion to each other.
        """
        self.settings = settings
        self._run = run
        self._slots = slots
        self._counts = counts
        self._clock = clock
        self._law = ServiceTime()
        self._pace = Pace(self._slots_now, in_batches=True)
        self._lobby: Lobby[_Entry[T, R]] = Lobby(queue, weight_of, self._pace, counts, clock)
        self._in_flight: set[_Batch[T, R]] = set()
        self._units_in_flight = 0
        self._alone = _ALONE_FIRST
        self._seriality = 0.0
        self._crowd = 0.0
        self._crowd_now = 0
        self._held_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._soon = False

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is in flight."""
        return not self._lobby.line.size and not self._in_flight

    async def submit(self, item: T, size: int, ticket: Ticket) -> R:
        """Runs an item in a batch.

        Args:
            item: what to run.
            size: how many inferences it is, such as texts.
            ticket: whose it is; its tokens count for the size of a batch, too.

        Raises:
            MeshError: RESOURCE_EXHAUSTED QUEUE_FULL; DEADLINE_EXCEEDED QUEUE_DEADLINE; or what the
                batch failed with.
        """
        came = self._clock()
        waiter = self._lobby.line.waiter(_Entry[T, R](item), ticket, came, size)
        entry = waiter.payload
        try:
            self._lobby.enter(waiter)
            self._crowd_now = max(self._crowd_now, self._lobby.line.units + self._units_in_flight)
            self._start_soon()
            result = await entry.future
        except asyncio.CancelledError as error:
            self._withdraw(waiter)
            self._counts.failed(ticket.tenant, reason_of(error))
            raise
        except Exception as error:
            self._counts.failed(ticket.tenant, reason_of(error))
            raise
        return result

    def follow(self, settings: BatchSettings, queue: QueueSettings) -> None:
        """Goes by other settings from now on."""
        self.settings = settings
        self._lobby.line.settings = queue

    async def close(self) -> None:
        """Turns those away that wait, and stops what is in flight."""
        self._stop_timer()
        self._lobby.close(_stopping())
        tasks = [batch.task for batch in self._in_flight if batch.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _withdraw(self, waiter: Waiter[_Entry[T, R]]) -> None:
        if waiter.waiting:
            self._lobby.leave(waiter)
            return
        batch = waiter.payload.batch
        if batch is not None and batch.task is not None and not batch.wanted:
            batch.task.cancel()

    # ---------------------------------------------------------------- when

    def _start_soon(self) -> None:
        """Looks at what waits when all that is ready to run has run: callers come together."""
        if not self._soon and len(self._in_flight) < self._slots_now():
            self._soon = True
            asyncio.get_running_loop().call_soon(self._start, context=contextvars.Context())

    def _start(self) -> None:
        self._soon = False
        self._stop_timer()
        line = self._lobby.line
        while line.size and len(self._in_flight) < self._slots_now():
            now = self._clock()
            until = self._hold_until(now)
            if until > now:
                self._timer = asyncio.get_running_loop().call_at(
                    until, self._start, context=contextvars.Context()
                )
                return
            self._held_since = None
            if not self._begin(now):
                return

    def _slots_now(self) -> int:
        """How many batches may be in flight; one, where more have been shown not to help."""
        return 1 if self._alone else max(1, self._slots())

    def _hold_until(self, now: float) -> float:
        """When the next batch should begin if nobody else comes; ``now`` or before: at once."""
        settings, waiting = self.settings, self._lobby.line.units
        if self._held_since is None:
            self._held_since = now
        longest = self._held_since + settings.max_queue_delay_s
        if settings.preferred_sizes:
            return now if waiting >= min(settings.preferred_sizes) else longest
        expected = min(self._crowd - self._units_in_flight, self._most_units())
        if waiting >= expected:
            return now
        return min(longest, self._held_since + self._law.fixed_s)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ---------------------------------------------------------------- what

    def _most_units(self) -> int:
        """The largest batch: as set, and as is expected to be done in time."""
        settings = self.settings
        if not self._law.known:
            # Where it matters how long a lone batch takes, the first ones are of different sizes.
            several = self._alone and self._slots() > 1
            return max(1, settings.max_size // (1 + self._alone % 3 if several else 1))
        if not settings.max_service_s:
            return settings.max_size
        # A hair more, so that a size that fits exactly is not lost to rounding.
        most = self._law.largest_within(settings.max_service_s * (1 + 1e-6))
        return max(1, math.floor(min(most, settings.max_size)))

    def _begin(self, now: float) -> bool:
        """Begins a batch; False: nobody is left to be served."""
        lobby, settings = self._lobby, self.settings
        room, tokens = self._most_units(), settings.max_tokens
        fitting = [size for size in settings.preferred_sizes if size <= lobby.line.units]
        if fitting:
            room = min(room, max(fitting))
        taken: list[Waiter[_Entry[T, R]]] = []
        while (waiter := lobby.take(now)) is not None:
            if waiter.payload.future.done():
                # Its caller was cancelled and has not run since; that costs nothing.
                lobby.line.correct(waiter, -waiter.cost)
                continue
            if taken and (waiter.units > room or waiter.cost > tokens):
                lobby.put_back(waiter)
                break
            room -= waiter.units
            tokens -= waiter.cost
            taken.append(waiter)
            if room <= 0 or tokens <= 0:
                break
        if not taken:
            return False
        batch = _Batch(taken, len(self._in_flight))
        for waiter in taken:
            waiter.payload.batch = batch
            self._counts.began(waiter.ticket.tenant, now - waiter.arrived)
        self._in_flight.add(batch)
        self._units_in_flight += batch.units
        batch.task = asyncio.get_running_loop().create_task(
            self._carry_out(batch, now), context=contextvars.Context()
        )
        return True

    async def _carry_out(self, batch: _Batch[T, R], began: float) -> None:
        try:
            await self._run_or_halve(batch, batch.waiters, began)
        except asyncio.CancelledError:
            self._fail(batch.waiters, _stopping())
            raise
        finally:
            self._in_flight.discard(batch)
            self._alone = max(0, self._alone - 1)
            self._units_in_flight -= batch.units
            self._crowd = max(_CROWD_KEPT * self._crowd, float(self._crowd_now))
            self._crowd_now = self._lobby.line.units + self._units_in_flight
            self._start_soon()

    async def _run_or_halve(
        self, batch: _Batch[T, R], taken: list[Waiter[_Entry[T, R]]], began: float
    ) -> None:
        asked = self._clock()
        try:
            results = await self._run([w.payload.item for w in taken], _ticket_of(taken))
        except MeshError as error:
            if error.code is grpc.StatusCode.INVALID_ARGUMENT and len(taken) > 1:
                half = len(taken) // 2
                for part in (taken[:half], taken[half:]):
                    wanted = [waiter for waiter in part if not waiter.payload.future.done()]
                    if wanted:
                        await self._run_or_halve(batch, wanted, began)
                return
            self._fail(taken, error)
        except Exception as error:  # noqa: BLE001
            self._fail(taken, error)
        else:
            if len(results) == len(taken):
                self._learn(batch, taken, self._clock() - asked)
                self._deliver(taken, results, began)
            else:
                text = f"{len(taken)} items in a batch gave {len(results)} results"
                self._fail(taken, ValueError(text))

    def _learn(self, batch: _Batch[T, R], taken: list[Waiter[_Entry[T, R]]], took_s: float) -> None:
        """Learns how long a batch takes alone, and how much longer beside others."""
        units = sum(waiter.units for waiter in taken)
        self._pace.law.add(sum(waiter.cost for waiter in taken), took_s)
        beside = (batch.beside + len(self._in_flight) - 1) / 2
        if not beside:
            self._law.add(units, took_s)
        elif self._law.known and (alone_s := self._law.expected_s(units)) > 0:
            slower = min(1.0, max(0.0, (took_s / alone_s - 1) / beside))
            self._seriality += _SERIAL_SHARE * (slower - self._seriality)
            if self._seriality > _SERIAL:
                self._alone, self._seriality = _ALONE_WHILE_SERIAL, _PERHAPS_SERIAL

    def _deliver(
        self, taken: list[Waiter[_Entry[T, R]]], results: Sequence[R], began: float
    ) -> None:
        now = self._clock()
        for waiter, result in zip(taken, results, strict=True):
            if not waiter.payload.future.done():
                waiter.payload.future.set_result(result)
                took_s = now - waiter.arrived
                self._counts.succeeded(waiter.ticket.tenant, took_s, now - began, took_s)

    def _fail(self, taken: list[Waiter[_Entry[T, R]]], error: Exception) -> None:
        """Tells every caller; each gets an error of its own, as callers add to it."""
        if len({waiter.ticket.tenant for waiter in taken}) > 1:
            error = _for_strangers(error)
        for waiter in taken:
            if not waiter.payload.future.done():
                waiter.payload.future.set_exception(copy.copy(error))


_TOLD: Final = ("model", "backend", "http_status", "tries")


def _for_strangers(error: Exception) -> Exception:
    """The error of a batch of several tenants, without what the backend said: it may quote them."""
    if not isinstance(error, MeshError):
        return error
    told = copy.copy(error)
    told.message = "the call of the model that this request shared with others failed"
    told.args = (told.message,)
    told.metadata = {name: error.metadata[name] for name in _TOLD if name in error.metadata}
    return told


def _stopping() -> MeshError:
    return UnavailableError("the service is stopping", reason="STOPPING")


def _ticket_of(taken: Sequence[Waiter[_Entry[T, R]]]) -> Ticket:
    """The ticket of a batch: as urgent as its most urgent item, given up with its last."""
    tickets = [waiter.ticket for waiter in taken]
    deadlines = [ticket.deadline for ticket in tickets if ticket.deadline is not None]
    return Ticket(
        tenant=tickets[0].tenant,
        priority=max(ticket.priority for ticket in tickets),
        tokens=sum(waiter.cost for waiter in taken),
        deadline=max(deadlines) if len(deadlines) == len(tickets) else None,
        batched=True,
        shared=any(ticket.shared for ticket in tickets),
    )
