"""A line whose waiters are callers: it wakes them, turns them away, and ends waits in time."""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from agent360.client.errors import MeshError
from agent360.mesh.inference.queueing import refusals
from agent360.mesh.inference.queueing.line import Line, LineFullError
from agent360.mesh.inference.queueing.pace import Pace
from agent360.mesh.inference.queueing.settings import QueueSettings
from agent360.mesh.inference.queueing.statistics import ModelStatistics
from agent360.mesh.inference.queueing.waiters import Waiter


class Caller(Protocol):
    """What waits in a lobby."""

    @property
    def future(self) -> asyncio.Future[Any]:
        """What the caller awaits; an error set on it turns the caller away."""


C = TypeVar("C", bound=Caller)


class Lobby(Generic[C]):
    """The callers that wait for one model.

    There is one timer, at the earliest end of a wait; waking a caller is setting its future.
    """

    def __init__(
        self,
        settings: QueueSettings,
        weight_of: Callable[[str], float],
        pace: Pace,
        counts: ModelStatistics,
        clock: Callable[[], float],
    ) -> None:
        self.line: Line[C] = Line(settings, weight_of)
        self.pace = pace
        self.counts = counts
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    def enter(self, waiter: Waiter[C]) -> None:
        """Lets a caller wait.

        Raises:
            MeshError: RESOURCE_EXHAUSTED QUEUE_FULL, if there is no room; DEADLINE_EXCEEDED
                QUEUE_DEADLINE, if its deadline has passed or would pass, as things stand.
        """
        line = self.line
        self._refuse_hopeless(waiter)
        try:
            gone = line.enter(waiter)
        except LineFullError as error:
            raise refusals.full(
                self.counts.model, line.size, self.pace.drains_in_s(error.excess)
            ) from None
        for each in gone:
            error_of_it = refusals.crowded_out(self.counts.model, self.pace.drains_in_s(each.cost))
            self._turn_away(each, error_of_it)
        waiter.ticket.raised = lambda: line.move_up(waiter)
        self._count(waiter, 1)
        self._watch()

    def take(
        self, now: float, withheld: Callable[[Waiter[C]], bool] | None = None
    ) -> Waiter[C] | None:
        """The next caller; None: nobody waits, or what there is to get is ``withheld`` from it.

        Those that are too late to be answered in time are turned away instead.
        """
        line = self.line
        while (waiter := line.first(now)) is not None:
            if withheld is not None and withheld(waiter):
                return None
            line.take(now)
            if not self._too_late(waiter, now):
                self._count(waiter, -1)
                return waiter
            self.line.correct(waiter, -waiter.cost)
            again_in_s = self.pace.drains_in_s(self.line.cost)
            error = refusals.waited_too_long(
                self.counts.model, now - waiter.arrived, deadline=True, again_in_s=again_in_s
            )
            self._turn_away(waiter, error)
        return None

    def put_back(self, waiter: Waiter[C]) -> None:
        """Undoes ``take``."""
        self.line.put_back(waiter)
        self._count(waiter, 1)

    def leave(self, waiter: Waiter[C]) -> None:
        """Lets a caller go that gave up."""
        self.line.leave(waiter)
        self._count(waiter, -1)

    def close(self, error: MeshError) -> None:
        """Turns all away with an error, and stops watching the time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while (waiter := self.line.take(self._clock())) is not None:
            self._turn_away(waiter, copy.copy(error))

    def _refuse_hopeless(self, waiter: Waiter[C]) -> None:
        deadline, now = waiter.ticket.deadline, waiter.arrived
        if deadline is None:
            return
        model, line = self.counts.model, self.line
        if deadline <= now:
            raise refusals.hopeless(model, line.size, 0.0, deadline - now)
        if not line.settings.refuse_hopeless:
            return
        pace = self.pace
        expected = pace.answered_in_s(line.cost_ahead(waiter), waiter.cost)
        if expected is None:
            return
        if now + expected > deadline:
            raise refusals.hopeless(model, line.size, expected, deadline - now)
        for each, without, with_it in line.displaced(waiter):
            left = math.inf if each.ticket.deadline is None else each.ticket.deadline - now
            before = pace.answered_in_s(without, each.cost) or 0.0
            if before <= left < (pace.answered_in_s(with_it, each.cost) or 0.0):
                raise refusals.displacing(model, line.size, pace.drains_in_s(waiter.cost))

    def _count(self, waiter: Waiter[C], by: int) -> None:
        if not waiter.ticket.batched:
            self.counts.pending += by

    def _too_late(self, waiter: Waiter[C], now: float) -> bool:
        deadline = waiter.ticket.deadline
        if deadline is None or waiter.ticket.shared or not self.line.settings.refuse_hopeless:
            return False
        return now + self.pace.work_s(waiter.cost) > deadline

    def _turn_away(self, waiter: Waiter[C], error: Exception) -> None:
        self._count(waiter, -1)
        if not waiter.payload.future.done():
            waiter.payload.future.set_exception(error)

    # ---------------------------------------------------------------- time

    def _watch(self) -> None:
        at = self.line.next_expiry()
        if at is None:
            return
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer_at = at
        self._timer = asyncio.get_running_loop().call_at(at, self._time_is_up)

    def _time_is_up(self) -> None:
        self._timer = None
        now, model = self._clock(), self.counts.model
        for each in self.line.expire(now):
            deadline = each.ticket.deadline
            error = refusals.waited_too_long(
                model,
                now - each.arrived,
                deadline=deadline is not None and deadline <= now,
                again_in_s=self.pace.drains_in_s(self.line.cost),
            )
            self._turn_away(each, error)
        self._watch()
