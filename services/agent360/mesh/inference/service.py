"""Answers prompts: limited, from the cache, from a call in flight, or by running a model."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Final

import grpc

from agent360.client.context import CallScope, enter_scope
from agent360.client.errors import MeshError, RateLimitedError
from agent360.mesh.inference import fingerprint, tokens
from agent360.mesh.inference.answers import (
    Answer,
    Delta,
    Ending,
    Piece,
    Source,
    Usage,
    as_pieces,
    merge,
    whole_calls,
)
from agent360.mesh.inference.catalogue import cost_usd
from agent360.mesh.inference.codec import decode_answer, encode_answer
from agent360.mesh.inference.conversation import CacheControl, Prompt
from agent360.mesh.inference.fleet import Fleet, Member
from agent360.mesh.inference.flights import Flight, Flights, Follower
from agent360.mesh.inference.ports import AnswerCache, Meter, Quota
from agent360.mesh.inference.routing import Route, Router
from agent360.mesh.inference.settings import InferenceSettings, ModelSettings
from agent360.mesh.runtime.call import Call

NAMESPACE: Final = "inference.generate"
"""The cache namespace of answers."""


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
class Answered:
    """An answer as one caller gets it."""

    answer: Answer
    source: Source
    route: Route
    cost_usd: float
    """Zero for an answer that ran no model for this caller."""
    timing: Timing


class Ride:
    """One caller's way through the service: pieces as they come, then the answer."""

    def __init__(
        self, call: Call, route: Route, follower: Follower, received: float, meter: Meter
    ) -> None:
        self._call = call
        self._route = route
        self._follower = follower
        self._received = received
        self._meter = meter

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

    async def answered(self) -> Answered:
        """Waits for the whole answer and counts it."""
        answer = await self._follower.answer()
        source, timing = self._follower.source, self._timing()
        self._meter.answered(
            self._call.tenant,
            self._route.model.name,
            source,
            timing.total_s,
            timing.first_token_s,
        )
        self._call.facts["source"] = source.value
        cost = cost_usd(self._route.model, answer.usage) if source is Source.MODEL else 0.0
        return Answered(answer, source, self._route, cost, timing)

    def _timing(self) -> Timing:
        flight, received = self._follower.flight, self._received
        total = time.monotonic() - received
        if self._follower.source is Source.CACHE or flight.began is None:
            return Timing(total, None, total)
        first = None if flight.first_piece is None else max(0.0, flight.first_piece - received)
        return Timing(max(0.0, flight.began - received), first, total)


class GenerationService:
    """Generates answers.

    A request is admitted by the request limits, then joins the flight of an identical request of
    its tenant or begins one. A flight looks into the cache, reserves tokens, runs the model, keeps
    the answer and settles the tokens, whoever still waits for it.

    Example:
        >>> async with service.board(call, prompt, streamed=True) as ride:
        ...     while await ride.more():
        ...         print(ride.take().content)
        ...     final = await ride.answered()
    """

    def __init__(
        self,
        settings: InferenceSettings,
        router: Router,
        fleet: Fleet,
        cache: AnswerCache,
        quota: Quota,
        meter: Meter,
    ) -> None:
        self._settings = settings
        self._router = router
        self._fleet = fleet
        self._cache = cache
        self._quota = quota
        self._meter = meter
        self._flights = Flights()
        self._afterwards: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Ends what is in flight and settles its tokens."""
        await self._flights.close()
        if self._afterwards:
            await asyncio.wait(self._afterwards, timeout=self._settings.limits.timeout_s * 2)

    async def generate(self, call: Call, prompt: Prompt) -> Answered:
        """The whole answer to a prompt."""
        async with self.board(call, prompt, streamed=False) as ride:
            return await ride.answered()

    @contextlib.asynccontextmanager
    async def board(self, call: Call, prompt: Prompt, *, streamed: bool) -> AsyncIterator[Ride]:
        """Begins to answer a prompt; leaving early withdraws from it.

        Args:
            call: whose request it is.
            prompt: what to answer.
            streamed: whether pieces are wanted as the model says them.

        Raises:
            MeshError: there is no such model, a limit denies the request, or the model fails.
        """
        received = time.monotonic()
        model = prompt.model
        try:
            route = self._router.choose(prompt, call.tenant)
            model = route.model.name
            call.facts["model"], call.facts["rule"] = model, route.rule
            if route.because:
                call.facts["because"] = route.because
            prompt = _bounded(prompt, route.model)
            await self._quota.admit(call.tenant, model, prompt.user)
            key = fingerprint.of_prompt(prompt, model)
            async with self._follow(call, prompt, route, key, streamed) as follower:
                yield Ride(call, route, follower, received, self._meter)
        except asyncio.CancelledError:
            self._meter.failed(call.tenant, model, "CANCELLED")
            raise
        except MeshError as error:
            known = model if error.reason != "MODEL_UNKNOWN" else ""
            self._meter.failed(call.tenant, known, error.reason)
            raise
        except Exception:
            self._meter.failed(call.tenant, model, "INTERNAL")
            raise

    # ---------------------------------------------------------------- flights

    @contextlib.asynccontextmanager
    async def _follow(
        self, call: Call, prompt: Prompt, route: Route, key: str, streamed: bool
    ) -> AsyncIterator[Follower]:
        """Joins a flight, or begins one.

        A flight that was denied by the limits of the user it began for says nothing about another
        user: that one begins a flight of its own.
        """
        while True:
            flight = self._joinable(call.tenant, key, prompt, streamed)
            leads = flight is None
            if flight is None:
                flight = self._launch(call, prompt, route, key, streamed)
            with self._flights.follow(flight, leads=leads) as follower:
                if not leads and flight.user != prompt.user:
                    await follower.admitted()
                    if flight.denied:
                        continue
                yield follower
                return

    def _joinable(self, tenant: str, key: str, prompt: Prompt, streamed: bool) -> Flight | None:
        """A flight that answers the same; who wants no pieces can also take those of a stream."""
        if prompt.cache.no_cache or not self._settings.coalesce:
            return None
        flight = self._flights.find((tenant, key, True))
        if flight is None and not streamed:
            flight = self._flights.find((tenant, key, False))
        return None if flight is None or flight.denied else flight

    def _launch(self, call: Call, prompt: Prompt, route: Route, key: str, streamed: bool) -> Flight:
        tenant = call.tenant
        # No deadline: the flight lasts as long as anybody waits, each until a deadline of its own.
        scope = CallScope(
            tenant=tenant,
            priority=int(call.priority),
            traceparent=call.traceparent,
            request_id=call.request_id,
        )

        async def fly(flight: Flight) -> None:
            enter_scope(scope)
            if not prompt.cache.no_cache:
                kept = await self._kept(tenant, key)
                if kept is not None:
                    flight.push(as_pieces(kept))
                    flight.land(kept, Source.CACHE)
                    return
            answer = await self._run_model(flight, tenant, prompt, route, streamed)
            flight.land(answer)
            if not prompt.cache.no_store and answer.finish_reason != "content_filter":
                await self._keep(tenant, key, answer, prompt.cache)

        return self._flights.launch((tenant, key, streamed), prompt.user, fly)

    async def _run_model(
        self, flight: Flight, tenant: str, prompt: Prompt, route: Route, streamed: bool
    ) -> Answer:
        model = route.model
        estimate = tokens.estimate_prompt(prompt)
        output = prompt.sampling.max_tokens or self._settings.limits.expected_output_tokens
        try:
            reservation = await self._quota.reserve(
                tenant, model.name, prompt.user, estimate + output
            )
        except RateLimitedError:
            flight.denied = True
            raise
        flight.admit()
        member: Member | None = None
        ending: Ending | None = None
        try:
            member = self._fleet.choose(model)
            flight.began = time.monotonic()
            with self._fleet.at_work(member, model.name):
                ending = await member.backend.generate(
                    prompt, model.upstream_name, self._sink(flight), streamed=streamed
                )
            return _assembled(flight.pieces, ending, estimate, model, member.backend.name)
        except MeshError as error:
            error.metadata = {**error.metadata, **_produced(flight, model)}
            raise
        finally:
            used = _used(flight, ending, estimate)
            self._do_afterwards(self._quota.settle(tenant, reservation, _total(used)))
            if member is not None and used is not None:
                backend = member.backend.name
                self._meter.consumed(tenant, model.name, backend, used, cost_usd(model, used))

    def _sink(self, flight: Flight) -> Any:
        most = self._settings.max_answer_bytes

        def sink(pieces: list[Piece]) -> None:
            flight.push(pieces)
            if flight.said_bytes > most:
                raise MeshError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "ANSWER_TOO_LONG",
                    f"the model said more than {most:,} bytes",
                )

        return sink

    def _do_afterwards(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs ``work`` even if the task it comes from is being cancelled."""
        task = asyncio.get_running_loop().create_task(work)
        self._afterwards.add(task)
        task.add_done_callback(self._afterwards.discard)

    # ---------------------------------------------------------------- cache

    async def _kept(self, tenant: str, key: str) -> Answer | None:
        data = await self._cache.get(tenant, NAMESPACE, key)
        return None if data is None else decode_answer(data)

    async def _keep(self, tenant: str, key: str, answer: Answer, control: CacheControl) -> None:
        settings = self._settings.cache
        ttl_s = min(control.ttl_s or settings.ttl_s, settings.max_ttl_s)
        await self._cache.put(tenant, NAMESPACE, key, encode_answer(answer), ttl_s)


def _bounded(prompt: Prompt, model: ModelSettings) -> Prompt:
    """The prompt with the model's bound of the answer's length where it has none of its own."""
    if model.max_tokens is None or prompt.sampling.max_tokens is not None:
        return prompt
    sampling = replace(prompt.sampling, max_tokens=model.max_tokens)
    return replace(prompt, sampling=sampling)


def _assembled(
    pieces: list[Piece], ending: Ending, estimate: int, model: ModelSettings, backend: str
) -> Answer:
    whole = merge(pieces)
    usage = ending.usage
    if usage is None:
        size = tokens.size_of(whole.content) + sum(len(call.arguments) for call in whole.tool_calls)
        usage = Usage(estimate, tokens.estimate_text(size), estimated=True)
    return Answer(
        content=whole.content,
        tool_calls=whole_calls(whole),
        finish_reason=ending.finish_reason,
        usage=usage,
        model=model.name,
        backend=backend,
    )


def _used(flight: Flight, ending: Ending | None, estimate: int) -> Usage | None:
    """What a flight used; None if its model said nothing.

    A model that broke off or was stopped has read the prompt and made what it said.
    """
    if ending is not None and ending.usage is not None:
        return ending.usage
    if ending is None and flight.first_piece is None:
        return None
    return Usage(estimate, tokens.estimate_text(flight.said_bytes), estimated=True)


def _total(used: Usage | None) -> int:
    return 0 if used is None else used.input_tokens + used.output_tokens


def _produced(flight: Flight, model: ModelSettings) -> dict[str, str]:
    return {
        "model": model.name,
        "produced_bytes": str(flight.said_bytes),
        "produced_tokens_estimate": str(tokens.estimate_text(flight.said_bytes)),
    }
