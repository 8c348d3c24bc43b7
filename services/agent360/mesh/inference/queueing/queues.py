"""Turns of models: who may ask which backend now, and who waits."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol

import grpc

from agent360.client.errors import MeshError, UnavailableError
from agent360.mesh.inference.queueing.kept_slot import KeptSlot
from agent360.mesh.inference.queueing.limits import Limit, Sample, limit_of
from agent360.mesh.inference.queueing.lobby import Lobby
from agent360.mesh.inference.queueing.pace import Pace
from agent360.mesh.inference.queueing.settings import ConcurrencySettings
from agent360.mesh.inference.queueing.statistics import (
    ModelStatistics,
    Statistics,
    reason_of,
)
from agent360.mesh.inference.queueing.ticket import Ticket
from agent360.mesh.inference.queueing.turn import Turn
from agent360.mesh.inference.queueing.waiters import Waiter

if TYPE_CHECKING:
    from agent360.mesh.inference.members import Member
    from agent360.mesh.inference.settings import ModelSettings

Choose = Callable[["ModelSettings", Sequence["Member"], Ticket], "Member"]
"""Chooses among members that have room."""

DOWN: Final = 3
"""``Member.rank`` of one that does not answer."""

_MOST_PASSED_OVER: Final = 8
_OVERLOADED: Final = frozenset({"UPSTREAM_STALLED", "UPSTREAM_TIMEOUT"})


class Backends(Protocol):
    """The backends of models; ``Fleet`` is one."""

    def members(
        self, model: ModelSettings, excluding: Collection[str] = frozenset()
    ) -> list[Member]:
        """The backends of a model.

        Raises:
            UnavailableError: there is none.
        """

    def at_work(self, member: Member, model: str, tokens: int = 0) -> AbstractContextManager[None]:
        """Counts a request on a backend while the block runs."""


class Queues:
    """Grants turns of all models, each to whom it is due.

    A request that finds a backend with room goes ahead at once; otherwise it waits in its model's
    line (``Line``). A turn that ends is handed to the next waiter in the same step: no task, no
    polling. A backend that several models share gives its turns to their lines in rotation. The
    last free one may be kept for a tenant that has none (``KeptSlot``).

    Example:
        >>> queues = Queues(fleet, selector.choose, {"gpu": ConcurrencySettings()}, Statistics())
        >>> async with queues.turn(model, ticket) as turn:
        ...     await turn.member.backend.generate(prompt, name, sink, streamed=False)
    """

    def __init__(
        self,
        backends: Backends,
        choose: Choose,
        limits: Mapping[str, ConcurrencySettings],
        statistics: Statistics,
        *,
        weights: Mapping[str, float] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Makes queues.

        Args:
            backends: which backends models have.
            choose: chooses among those that have room.
            limits: concurrency of backends by name; one that is not named has the default.
            statistics: gets the counts.
            weights: shares of tenants in proportion to each other; 1 for one that is not named.
            clock: monotonic seconds; None: the event loop's.
        """
        self._backends = backends
        self._choose = choose
        self._limits = limits
        self.statistics = statistics
        self._weights = weights or {}
        self.clock = clock or asyncio.get_running_loop().time
        self._gates: dict[str, _Gate] = {}
        self._queues: dict[str, _ModelQueue] = {}

    def turn(
        self, model: ModelSettings, ticket: Ticket, excluding: frozenset[str] = frozenset()
    ) -> AbstractAsyncContextManager[Turn]:
        """A turn at one of a model's backends, as soon as it is due; leaving it gives it back.

        Args:
            model: whose backends.
            ticket: who asks.
            excluding: names of backends that are not to be asked.

        Raises:
            MeshError: UNAVAILABLE NO_BACKEND, if no backend is left; RESOURCE_EXHAUSTED QUEUE_FULL;
                DEADLINE_EXCEEDED QUEUE_DEADLINE, on arrival or while it waits.
        """
        return _Visit(self._queue(model), ticket, excluding)

    def queued(self, model: str) -> int:
        """Requests that wait for a model now, or for a place in a batch of it."""
        return self.statistics.of(model).pending

    def capacity(self, model: ModelSettings) -> int:
        """Requests that the backends of a model take at a time, at present."""
        return sum(self._gate(member).limit.value for member in self._backends.members(model))

    def limit(self, backend: str) -> int | None:
        """The present concurrency limit of a backend; None: it was never asked."""
        gate = self._gates.get(backend)
        return None if gate is None else gate.limit.value

    def close(self) -> None:
        """Turns all away that wait."""
        error = UnavailableError("the service is stopping", reason="STOPPING")
        for queue in self._queues.values():
            queue.lobby.close(error)

    def weight_of(self, tenant: str) -> float:
        """The share of a tenant in proportion to others."""
        return self._weights.get(tenant, 1.0)

    def _gate(self, member: Member) -> _Gate:
        name = member.backend.name
        gate = self._gates.get(name)
        if gate is None:
            gate = _Gate(limit_of(self._limits.get(name) or ConcurrencySettings()))
            self._gates[name] = gate
        return gate

    def _queue(self, model: ModelSettings) -> _ModelQueue:
        queue = self._queues.get(model.name)
        if queue is None:
            queue = self._queues[model.name] = _ModelQueue(
                model,
                self._backends,
                self._gate,
                self._choose,
                self.statistics.of(model.name),
                self.weight_of,
                self.clock,
            )
        elif queue.model is not model:
            # The catalogue was read anew.
            queue.model = model
            queue.lobby.line.settings = model.queue
        return queue


class _Gate:
    """What a backend works on, within its limit, and the queues that wait for it."""

    __slots__ = ("held", "limit", "running", "waiting")

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.running = 0
        self.held: dict[str, int] = {}
        """Of ``running``, how much is each tenant's."""
        self.waiting: OrderedDict[_ModelQueue, None] = OrderedDict()

    @property
    def open(self) -> bool:
        """Whether there is room for one more."""
        return self.running < self.limit.value

    def begin(self, tenant: str) -> None:
        """A request of a tenant is sent."""
        self.running += 1
        self.held[tenant] = self.held.get(tenant, 0) + 1

    def end(self, tenant: str) -> None:
        """A request of a tenant has ended."""
        self.running -= 1
        left = self.held[tenant] - 1
        if left:
            self.held[tenant] = left
        else:
            del self.held[tenant]

    def hand_on(self) -> None:
        """Gives free turns to the queues that wait, in rotation."""
        idle = 0
        while self.open and idle < len(self.waiting):
            queue = next(iter(self.waiting))
            self.waiting.move_to_end(queue)
            idle = 0 if queue.grant_next() else idle + 1


class _Place:
    """A caller in line."""

    __slots__ = ("excluding", "future")

    def __init__(self, excluding: frozenset[str]) -> None:
        self.excluding = excluding
        self.future: asyncio.Future[_Grant] = asyncio.get_running_loop().create_future()


class _Grant:
    """A turn that was given to a request, until it is given back."""

    __slots__ = ("at_work", "began", "gate", "turn", "waiter")

    def __init__(
        self,
        waiter: Waiter[_Place],
        turn: Turn,
        gate: _Gate,
        at_work: AbstractContextManager[None],
        began: float,
    ) -> None:
        self.waiter = waiter
        self.turn = turn
        self.gate = gate
        self.at_work = at_work
        self.began = began


class _ModelQueue:
    """Who waits for one model.

    Invariant: while somebody waits, every gate of the model is closed, or those first in line
    exclude the backends behind the open ones, or the last free turn is kept from them.
    """

    def __init__(
        self,
        model: ModelSettings,
        backends: Backends,
        gate_of: Callable[[Member], _Gate],
        choose: Choose,
        counts: ModelStatistics,
        weight_of: Callable[[str], float],
        clock: Callable[[], float],
    ) -> None:
        self.model = model
        self.counts = counts
        self.running = 0
        self._backends = backends
        self._gate_of = gate_of
        self._choose = choose
        self._clock = clock
        self._waits_at: set[_Gate] = set()
        self._kept = KeptSlot(weight_of)
        self._pace = Pace(lambda: self.running)
        self.lobby: Lobby[_Place] = Lobby(model.queue, weight_of, self._pace, counts, clock)

    # ---------------------------------------------------------------- arrival

    def ask(self, ticket: Ticket, excluding: frozenset[str]) -> _Grant | Waiter[_Place]:
        """A turn, or a place in line.

        Raises:
            MeshError: there is no backend, no room, or no hope.
        """
        now, line = self._clock(), self.lobby.line
        waiter = line.waiter(_Place(excluding), ticket, now)
        free, gates = self._free(excluding)
        if not ticket.batched:
            self._kept.came(waiter, now, line.settings.keep_slot_s)
        if free and self._goes_ahead(waiter, gates, now):
            line.charge(waiter)
            return self._grant(waiter, free, now)
        self.lobby.enter(waiter)
        for gate in gates:
            self._waits_at.add(gate)
            gate.waiting[self] = None
            gate.hand_on()
        return waiter

    def withdraw(self, waiter: Waiter[_Place]) -> None:
        """A caller gives up that was in line, or was just given its turn."""
        if waiter.waiting:
            self.lobby.leave(waiter)
            self._rest_if_empty()
            return
        future = waiter.payload.future
        if not future.cancelled() and future.exception() is None:
            self.lobby.line.correct(waiter, -waiter.cost)
            self._release(future.result(), asyncio.CancelledError())

    # ---------------------------------------------------------------- handing on

    def grant_next(self) -> bool:
        """Gives a free turn to the next in line; False: those first in line have no use for it."""
        lobby, now = self.lobby, self._clock()
        passed_over: list[Waiter[_Place]] = []
        granted = False

        def withheld(waiter: Waiter[_Place]) -> bool:
            return self._is_kept_from(waiter, self._free(waiter.payload.excluding)[1], now)

        while not granted and len(passed_over) < _MOST_PASSED_OVER:
            waiter = lobby.take(now, withheld if self._kept.shared else None)
            if waiter is None:
                break
            place = waiter.payload
            if place.future.done():
                # Its caller was cancelled and has not run since; that costs nothing.
                lobby.line.correct(waiter, -waiter.cost)
                continue
            # What goes wrong is for the one whose turn it is, not for the one who hands it on.
            try:
                free, _ = self._free(place.excluding)
                if not free:
                    passed_over.append(waiter)
                    continue
                grant = self._grant(waiter, free, now)
            except Exception as error:  # noqa: BLE001
                place.future.set_exception(error)
            else:
                place.future.set_result(grant)
                granted = True
        for waiter in reversed(passed_over):
            lobby.put_back(waiter)
        self._rest_if_empty()
        return granted

    def _goes_ahead(self, waiter: Waiter[_Place], gates: list[_Gate], now: float) -> bool:
        """Whether one that comes while there is room need not wait in line."""
        line = self.lobby.line
        if not line.size:
            return not self._is_kept_from(waiter, gates, now)
        slots = sum(gate.limit.value for gate in gates)
        return self._kept.is_kept_for(waiter, line, slots, _held_at(gates))

    def _is_kept_from(self, waiter: Waiter[_Place], gates: list[_Gate], now: float) -> bool:
        """Whether the last free turn is kept for another tenant."""
        if waiter.ticket.batched or not self._kept.shared:
            return False
        slots = free = 0
        for gate in gates:
            limit = gate.limit.value
            slots += limit
            free += max(0, limit - gate.running)
        if free != 1:
            return False
        return self._kept.is_kept_from(waiter, self.lobby.line, slots, _held_at(gates), now)

    def _free(self, excluding: frozenset[str]) -> tuple[list[Member], list[_Gate]]:
        """The members that have room, and the gates of all."""
        members = self._backends.members(self.model, excluding)
        if len(members) > 1:
            # One that is down is no overflow for those that work.
            ranks = [member.rank(self.model) for member in members]
            if min(ranks) < DOWN:
                members = [m for m, rank in zip(members, ranks, strict=True) if rank < DOWN]
        gates = [self._gate_of(member) for member in members]
        return [m for m, gate in zip(members, gates, strict=True) if gate.open], gates

    def _rest_if_empty(self) -> None:
        if self._waits_at and not self.lobby.line.size:
            for gate in self._waits_at:
                gate.waiting.pop(self, None)
            self._waits_at.clear()

    def _grant(self, waiter: Waiter[_Place], free: Sequence[Member], now: float) -> _Grant:
        ticket = waiter.ticket
        member = self._choose(self.model, free, ticket)
        at_work = self._backends.at_work(member, self.model.name, ticket.tokens)
        at_work.__enter__()
        gate = self._gate_of(member)
        gate.begin(ticket.tenant)
        self.running += 1
        turn = Turn(member, now - waiter.arrived, self._clock)
        return _Grant(waiter, turn, gate, at_work, now)

    # ---------------------------------------------------------------- the end

    def finish(self, grant: _Grant, error: BaseException | None) -> None:
        """Ends a turn that was used, learns from it and hands it on."""
        waiter, turn, now = grant.waiter, grant.turn, self._clock()
        took_s = now - grant.began
        responded_s = (turn.responded_at or now) - grant.began
        if turn.tokens is not None:
            self.lobby.line.correct(waiter, turn.tokens - waiter.cost)
        elif isinstance(error, MeshError):
            self.lobby.line.correct(waiter, -waiter.cost)
        overloaded = isinstance(error, MeshError) and _overloaded(error)
        if error is None:
            self._pace.law.add(waiter.cost, took_s)
            self.counts.executed(turn.inferences, took_s)
        if error is None or overloaded:
            grant.gate.limit.learn(
                Sample(grant.began, now, responded_s, grant.gate.running, overloaded)
            )
        if not waiter.ticket.batched:
            self._count(waiter, error, now, took_s, grant.began - waiter.arrived + responded_s)
        self._release(grant, error)

    def _count(
        self,
        waiter: Waiter[_Place],
        error: BaseException | None,
        now: float,
        took_s: float,
        responded_s: float,
    ) -> None:
        tenant = waiter.ticket.tenant
        if error is None:
            self.counts.succeeded(tenant, now - waiter.arrived, took_s, responded_s)
        else:
            self.counts.failed(tenant, reason_of(error))

    def _release(self, grant: _Grant, error: BaseException | None) -> None:
        grant.gate.end(grant.waiter.ticket.tenant)
        self.running -= 1
        if error is None:
            grant.at_work.__exit__(None, None, None)
        else:
            grant.at_work.__exit__(type(error), error, error.__traceback__)
        grant.gate.hand_on()
        # One that came back to health has room that nobody was told of.
        for gate in tuple(self._waits_at):
            gate.hand_on()


class _Visit(AbstractAsyncContextManager[Turn]):
    """One request's way through a queue."""

    __slots__ = ("_excluding", "_grant", "_queue", "_ticket")

    def __init__(self, queue: _ModelQueue, ticket: Ticket, excluding: frozenset[str]) -> None:
        self._queue = queue
        self._ticket = ticket
        self._excluding = excluding
        self._grant: _Grant | None = None

    async def __aenter__(self) -> Turn:
        queue, ticket = self._queue, self._ticket
        try:
            asked = queue.ask(ticket, self._excluding)
            if isinstance(asked, _Grant):
                grant = asked
            else:
                try:
                    grant = await asked.payload.future
                except asyncio.CancelledError:
                    queue.withdraw(asked)
                    raise
        except (MeshError, asyncio.CancelledError) as error:
            if not ticket.batched:
                queue.counts.failed(ticket.tenant, reason_of(error))
            raise
        self._grant = grant
        if not ticket.batched:
            queue.counts.began(ticket.tenant, grant.turn.queue_s)
        return grant.turn

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        grant, self._grant = self._grant, None
        if grant is not None:
            self._queue.finish(grant, error)


def _held_at(gates: Sequence[_Gate]) -> Callable[[str], int]:
    """How many turns tenants have at these backends."""
    return lambda tenant: sum(gate.held.get(tenant, 0) for gate in gates)


def _overloaded(error: MeshError) -> bool:
    """Whether a backend's error says that it has too much to do."""
    return (
        error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        or error.reason in _OVERLOADED
        or error.metadata.get("http_status") == "503"
    )
