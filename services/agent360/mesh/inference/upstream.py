"""Runs models: a turn at a backend, a try, and what follows when it fails or is slow."""

from __future__ import annotations

import asyncio
import math
import random
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import grpc

from agent360.client.errors import MeshError
from agent360.mesh.inference.answers import Ending, Usage
from agent360.mesh.inference.backends import openai_errors as errors
from agent360.mesh.inference.batching.embeddings import EmbeddingBatches
from agent360.mesh.inference.billing import Bill, Spent
from agent360.mesh.inference.conversation import EmbeddingInputs, Prompt
from agent360.mesh.inference.failover.attempt import Attempt, Race
from agent360.mesh.inference.failover.breaker import Breakers
from agent360.mesh.inference.failover.budget import Budget
from agent360.mesh.inference.failover.course import Course
from agent360.mesh.inference.failover.hedges import Hedges
from agent360.mesh.inference.failover.job import Embedding, Generation, Job
from agent360.mesh.inference.failover.settings import HedgeSettings, RetrySettings
from agent360.mesh.inference.failover.tally import HedgeOutcome, Tally
from agent360.mesh.inference.failover.verdict import is_ill, used_the_model
from agent360.mesh.inference.ports import Sink
from agent360.mesh.inference.queueing import Queues, Ticket, Turn
from agent360.mesh.inference.routing import Route
from agent360.mesh.inference.settings import ModelSettings

HEDGE: Final = "hedge"
_NOBODY: Final[frozenset[str]] = frozenset()
_LOOK_AGAIN_S: Final = 0.1
_PROBING_S: Final = 1.0
"""When to come back while a probe of the only backend is under way, in seconds."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ran:
    """A model that answered."""

    ending: Ending
    usage: Usage
    """What the answer took; an estimate where the backend did not say."""
    model: ModelSettings
    """The model that answered; another than was asked for after a fallback."""
    backend: str
    rule: str
    """What chose it: the route's rule, ``fallback:`` and the model's name, or ``hedge``."""
    began: float
    """When it was asked, on the monotonic clock."""
    queue_s: float
    """Seconds of waiting for turns."""
    tries: int
    """How many times a backend was asked, this one included."""


@dataclass(frozen=True, slots=True)
class RanEmbeddings:
    """A model that made vectors; the fields are those of ``Ran``."""

    vectors: Sequence[array[float]]
    usage: Usage
    model: ModelSettings
    backend: str
    rule: str
    began: float
    queue_s: float
    tries: int


class Upstream:
    """Runs the model of a route, or one of its fallbacks.

    Until something of an answer is said, failures stay unseen: other backends of the model are
    tried at once, then the fallbacks, then after a pause all of them again, within the model's
    ``RetrySettings`` and its budget. A backend whose breaker is open, or that asked for a rest, is
    not asked. A try that is slower than most gets a rival (``HedgeSettings``). After the first word
    nothing is tried any more: the caller gets ``STREAM_BROKEN`` with what there is.

    Deadlines: each try has those of its model and backend; pauses end before the ticket's; who
    waits no longer cancels.

    Example:
        >>> upstream = Upstream(queues, tally, breakers)
        >>> bill = Bill()
        >>> ran = await upstream.generate(ticket, prompt, route, print, streamed=True, bill=bill)
        >>> ran.model.name, ran.backend, ran.rule
        ('small', 'gpu', 'fallback:small')
    """

    def __init__(
        self,
        queues: Queues,
        tally: Tally,
        breakers: Breakers,
        retry: RetrySettings | None = None,
        hedge: HedgeSettings | None = None,
    ) -> None:
        self._queues = queues
        self._batches = EmbeddingBatches(self._embed_alone, queues)
        self._tally = tally
        self._breakers = breakers
        self._retry = retry or RetrySettings()
        self._hedges = Hedges(hedge or HedgeSettings())
        self._retry_budgets: dict[str, Budget] = {}

    async def generate(
        self,
        ticket: Ticket,
        prompt: Prompt,
        route: Route,
        sink: Sink,
        *,
        streamed: bool,
        bill: Bill,
    ) -> Ran:
        """Runs a model on a prompt.

        Args:
            ticket: who asks.
            prompt: what to answer.
            route: the model and its fallbacks.
            sink: gets the pieces of the answer, of one try only.
            streamed: whether pieces are wanted as they come.
            bill: gets what the tries used, however this ends.

        Raises:
            MeshError: no backend answered, or the one that did broke off.
        """
        job = Generation(prompt, sink, streamed=streamed)
        done = await self._run(_Request(ticket, route, job, bill))
        return Ran(
            done.result,
            done.usage,
            done.attempt.model,
            done.attempt.backend,
            done.rule,
            done.attempt.began,
            done.queue_s,
            done.tries,
        )

    async def embed(
        self, ticket: Ticket, request: EmbeddingInputs, route: Route, *, bill: Bill
    ) -> RanEmbeddings:
        """Runs a model on texts, in one call with those of others; as ``generate``."""
        if route.model.batch.enabled:
            return await self._batches.embed(ticket, request, route, bill=bill)
        return await self._embed_alone(ticket, request, route, bill=bill)

    async def close(self) -> None:
        """Turns those away that wait for a batch, and stops batches in flight."""
        await self._batches.close()

    async def _embed_alone(
        self, ticket: Ticket, request: EmbeddingInputs, route: Route, *, bill: Bill
    ) -> RanEmbeddings:
        done = await self._run(_Request(ticket, route, Embedding(request), bill))
        return RanEmbeddings(
            done.result.vectors,
            done.usage,
            done.attempt.model,
            done.attempt.backend,
            done.rule,
            done.attempt.began,
            done.queue_s,
            done.tries,
        )

    # ---------------------------------------------------------------- rounds

    async def _run(self, request: _Request[T]) -> _Done[T]:
        course, route = Course(), request.route
        while True:
            done = await self._try_model(request, course, route.model)
            if done is not None:
                return done
            for model in route.fallbacks:
                done = await self._try_model(request, course, model)
                if done is not None:
                    return done
            await self._pause(request, course)
            course.next_round()

    async def _try_model(
        self, request: _Request[T], course: Course, model: ModelSettings
    ) -> _Done[T] | None:
        """Asks the backends of a model one after the other; None: no answer from any."""
        retry, name = model.retry or self._retry, model.name
        reason = ""
        while (backends := course.hopeful(model, retry.max_tries)) and (
            free := [
                each
                for each in backends
                if course.may_ask(name, each)
                and self._breakers.allows(each, name, request.ticket.tenant)
            ]
        ):
            if not self._allowed(request, course, model, retry, reason):
                return None
            excluding = _NOBODY
            if len(free) < len(model.backends):
                excluding = frozenset(model.backends).difference(free)
            try:
                return await self._try(request, course, model, excluding)
            except _AsideError:
                return None
            except MeshError as error:
                if course.over or self._too_late(request.ticket):
                    error.metadata = {**error.metadata, "tries": str(course.tries)}
                    raise
                reason = error.reason
        return None

    def _allowed(
        self,
        request: _Request[T],
        course: Course,
        model: ModelSettings,
        retry: RetrySettings,
        reason: str,
    ) -> bool:
        """Whether a model may be asked; once for each request, then as its budget allows."""
        name, tenant = model.name, request.ticket.tenant
        budget = self._retry_budgets.get(name)
        if budget is None:
            budget = self._retry_budgets[name] = Budget(retry.budget_burst)
        if course.tries_at(name) == 0:
            if not course.first_meets(name):
                return True
            budget.earn(retry.budget, retry.budget_burst)
            if model is not request.route.model:
                self._tally.fell_back(tenant, request.route.model.name, name)
            return True
        if budget.spend():
            self._tally.retried(tenant, name, reason or course.reason)
            return True
        self._tally.denied(name)
        course.no_more(name)
        return False

    async def _pause(self, request: _Request[T], course: Course) -> None:
        """Waits until another round is worth its while.

        Raises:
            MeshError: it will not be, or not in time.
        """
        route, now = request.route, time.monotonic()
        tenant = request.ticket.tenant
        times = [
            self._breakers.allowed_at(backend, model.name, tenant)
            for model in (route.model, *route.fallbacks)
            for backend in course.hopeful(model, (model.retry or self._retry).max_tries)
        ]
        if not times:
            raise self._given_up(course, route, tenant)
        retry = route.model.retry or self._retry
        at = min(times)
        # While somebody probes the only backend, its outcome is looked for again and again.
        rest_s = _LOOK_AGAIN_S if at == math.inf else max(0.0, at - now)
        backoff_s = 0.0
        if course.tries:
            backoff_s = min(retry.max_backoff_s, retry.backoff_s * 2**course.rounds)
        # Jitter keeps those who failed together from coming back together.
        pause_s = max(rest_s + random.random() * retry.backoff_s, backoff_s * _jitter())
        deadline = request.ticket.deadline
        if course.waited_s + rest_s > retry.max_wait_s or (
            deadline is not None and now + pause_s >= deadline
        ):
            raise self._given_up(course, route, tenant)
        await asyncio.sleep(pause_s)
        if rest_s or not course.tries:
            course.waited_s += pause_s

    def _given_up(self, course: Course, route: Route, tenant: str) -> MeshError:
        model = route.model
        at = min(
            (self._breakers.allowed_at(each, model.name, tenant) for each in model.backends),
            default=-math.inf,
        )
        again_in_s = _PROBING_S if at == math.inf else at - time.monotonic()
        return course.error(model.name, self._breakers.why(model.backends), again_in_s)

    @staticmethod
    def _too_late(ticket: Ticket) -> bool:
        return ticket.deadline is not None and time.monotonic() >= ticket.deadline

    # ---------------------------------------------------------------- tries

    async def _try(
        self, request: _Request[T], course: Course, model: ModelSettings, excluding: frozenset[str]
    ) -> _Done[T]:
        """One try, and a rival for it if it is slow."""
        hedges, delay_s = self._hedges, None
        if hedges.enabled(model):
            if course.tries_at(model.name) == 0:
                hedges.requested(model)
            delay_s = hedges.delay_s(model, request.job.kind)
        if delay_s is None:
            attempt = Attempt(model, request.job.sink)
            return await self._attempt(request, course, attempt, excluding)
        async with Race[_Done[T]]() as race:
            first = Attempt(model, request.job.sink, race)
            race.begin(first, self._attempt(request, course, first, excluding))
            if not await race.is_slow(first, delay_s):
                return await race.result()
            if not hedges.allowed(model):
                self._tally.hedged(request.ticket.tenant, model.name, "denied")
                return await race.result()
            second = Attempt(model, request.job.sink, race)
            aside = self._aside(request, model, excluding, first.backend)
            race.begin(second, self._attempt(request, course, second, aside, HEDGE))
            outcome: HedgeOutcome = "failed"
            try:
                done = await race.result()
                outcome = "won" if done.attempt is second else "lost"
                return done
            finally:
                self._tally.hedged(request.ticket.tenant, model.name, outcome)

    def _aside(
        self, request: _Request[T], model: ModelSettings, excluding: frozenset[str], busy: str
    ) -> frozenset[str]:
        """Whom a hedge is not to ask: the busy one neither, unless there is no other."""
        others = [
            each
            for each in model.backends
            if each != busy
            and each not in excluding
            and self._breakers.allows(each, model.name, request.ticket.tenant)
        ]
        return excluding | {busy} if others else excluding

    async def _attempt(
        self,
        request: _Request[T],
        course: Course,
        attempt: Attempt,
        excluding: frozenset[str],
        rule: str = "",
    ) -> _Done[T]:
        """Waits for a turn and asks the backend that it is given."""
        model, asked = attempt.model, time.monotonic()
        fallback = model is not request.route.model
        try:
            while True:
                name = ""
                try:
                    async with self._queues.turn(model, request.ticket, excluding) as turn:
                        name = turn.member.backend.name
                        return await self._ask(request, course, attempt, turn, asked, rule)
                except _AsideError:
                    excluding |= {name}
                    if excluding.issuperset(model.backends):
                        raise
        except _AsideError:
            raise
        except MeshError as error:
            if attempt.spoke_at is not None:
                course.over = True
            course.failed(model.name, attempt.backend, error, fallback=fallback)
            raise

    async def _ask(
        self,
        request: _Request[T],
        course: Course,
        attempt: Attempt,
        turn: Turn,
        asked: float,
        rule: str,
    ) -> _Done[T]:
        """Asks a backend, and notes how it went."""
        model, job = attempt.model, request.job
        tenant = request.ticket.tenant
        if not self._breakers.allows(turn.member.backend.name, model.name, tenant):
            # While the request waited for its turn the backend asked for a rest.
            raise _AsideError
        attempt.start(turn, self._breakers.of(turn.member.backend.name), asked, tenant)
        course.asks(model.name)
        course.queue_s += attempt.queue_s
        outcome, usage, wasted = "cancelled", None, False
        try:
            result = await self._limited(job, attempt, turn)
            usage = job.usage(result) or attempt.estimate(job.input_tokens())
            if attempt.spoke_at is None:
                attempt.speaks()
            outcome = "ok"
        except MeshError as error:
            outcome = error.reason
            usage, wasted = self._failed(attempt, request, error)
            if attempt.spoke_at is not None and error is not attempt.refusal:
                raise attempt.broken(error) from error
            error.metadata = {**error.metadata, **attempt.facts()}
            raise
        except asyncio.CancelledError:
            if attempt.lost:
                outcome, wasted = "lost", True
            if usage is None and (attempt.lost or attempt.spoke_at is not None):
                usage = attempt.estimate(job.input_tokens())
            raise
        finally:
            attempt.left()
            if usage is not None:
                turn.outcome(
                    tokens=usage.input_tokens + usage.output_tokens, inferences=job.inferences
                )
                request.bill.spent.append(Spent(model, attempt.backend, usage, wasted))
            self._tally.tried(model.name, attempt.backend, outcome)
            if outcome in ("ok", "lost") and self._hedges.enabled(model):
                self._hedges.measured(attempt, job.kind)
        if not rule:
            rule = request.route.rule
            if model is not request.route.model:
                rule = f"fallback:{model.name}"
        return _Done(result, usage, attempt, rule, course.queue_s, course.tries)

    async def _limited(self, job: Job[T], attempt: Attempt, turn: Turn) -> T:
        """Runs a job within the times of a try."""
        backend, model = turn.member.backend, attempt.model
        retry = model.retry or self._retry
        first_s, whole_s = retry.first_token_timeout_s, retry.try_timeout_s
        if job.kind != "stream":
            # What comes whole says nothing until it is done.
            first_s = None
        if first_s is None and whole_s is None:
            return await job.run(backend, model, attempt.hear)
        limit = attempt.limited(first_s, whole_s)
        try:
            async with limit:
                return await job.run(backend, model, attempt.hear)
        except MeshError:
            raise
        except TimeoutError as error:
            if not limit.expired():
                raise
            if attempt.spoke_at is None and first_s is not None:
                raise errors.stalled(backend.name, first_s) from error
            raise errors.timed_out(backend.name, whole_s or 0.0) from error

    def _failed(
        self, attempt: Attempt, request: _Request[T], error: MeshError
    ) -> tuple[Usage | None, bool]:
        """Notes what an error says of a backend.

        Returns:
            What the try used, None for nothing; and whether that was wasted.
        """
        job, ill = request.job, is_ill(error) and error is not attempt.refusal
        attempt.failed(error.reason, ill=ill, again=attempt.backend in request.failed_by)
        if ill and error.reason != "UPSTREAM_UNREACHABLE":
            request.failed_by.add(attempt.backend)
        if error.retry_after_s:
            # Limits are of a model; a server that is overloaded or in maintenance is so as a whole.
            concerned = "" if is_ill(error) else attempt.model.name
            self._breakers.rest(attempt.backend, concerned, error.retry_after_s)
        if attempt.spoke_at is not None:
            return attempt.estimate(job.input_tokens()), False
        if used_the_model(error):
            return attempt.estimate(job.input_tokens()), True
        return None, False


class _AsideError(MeshError):
    """A turn is given back unused."""

    def __init__(self) -> None:
        super().__init__(
            grpc.StatusCode.ABORTED, "BACKEND_RESTING", "the backend asked for a rest meanwhile"
        )


@dataclass(frozen=True, slots=True)
class _Request(Generic[T]):
    """What is to be done, for whom."""

    ticket: Ticket
    route: Route
    job: Job[T]
    bill: Bill
    failed_by: set[str] = field(default_factory=set)
    """Backends that were reached and failed it."""


@dataclass(frozen=True, slots=True)
class _Done(Generic[T]):
    """A try that answered."""

    result: T
    usage: Usage
    attempt: Attempt
    rule: str
    queue_s: float
    tries: int


def _jitter() -> float:
    return 0.5 + random.random()
