"""Runs models for flights: charged before and after, within slots and bounds."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, Final

import grpc

from agent360.client.errors import MeshError, RateLimitedError
from agent360.mesh.inference import tokens
from agent360.mesh.inference.answers import Answer, Embeddings, Piece, merge, whole_calls
from agent360.mesh.inference.billing import Bill
from agent360.mesh.inference.catalogue import cost_usd
from agent360.mesh.inference.conversation import EmbeddingInputs, Prompt
from agent360.mesh.inference.counting.counter import TokenCounter
from agent360.mesh.inference.flights import Flight
from agent360.mesh.inference.metering.till import Till, most_of, used_of
from agent360.mesh.inference.ports import Amount, Meter, Quota, Sink
from agent360.mesh.inference.queueing import Ticket
from agent360.mesh.inference.routing import Route
from agent360.mesh.inference.selection import affinity_key
from agent360.mesh.inference.settings import InferenceSettings
from agent360.mesh.inference.upstream import Ran, Upstream
from agent360.mesh.runtime.call import Call

_LONG_ANSWER: Final = 8
"""An answer that may be longer than so many expected ones counts as these in queues and for the
load of backends: what a request may use at most says little of what it will."""

_NO_SLOT: Final = contextlib.nullcontext()


class ChargedRuns:
    """Runs models; what may be used is set aside before, what was used is settled after.

    Example:
        >>> answer = await runs.answer(flight, call, prompt, route, streamed=True)
        >>> flight.bill.total
        Amount(tokens=42, micro_usd=0)
    """

    def __init__(
        self,
        settings: InferenceSettings,
        upstream: Upstream,
        counter: TokenCounter,
        till: Till,
        quota: Quota,
        meter: Meter,
    ) -> None:
        self._settings = settings
        self._upstream = upstream
        self._counter = counter
        self._till = till
        self._quota = quota
        self._meter = meter

    async def answer(
        self, flight: Flight[Answer], call: Call, prompt: Prompt, route: Route, *, streamed: bool
    ) -> Answer:
        """Runs the model of a flight and settles what everybody pays for it.

        Args:
            flight: gets what the model says; its payer is asked for what may be used.
            call: the one that the flight began for.
            prompt: what to answer.
            route: the model.
            streamed: whether pieces are wanted as the model says them.

        Raises:
            MeshError: a limit denies it, or the model fails.
        """
        most = await self.most(prompt, route)
        bill = Bill()
        await self._reserve(flight, most)
        async with self._slot(flight, route):
            flight.admit()
            session = affinity_key(route.model, prompt, call.tenant)
            flight.ticket = ticket = Ticket(
                call.tenant,
                flight.priority,
                most.tokens - self._improbable(prompt),
                deadline=flight.wanted_until,
                shared=True,
                session=session,
                timeout_s=prompt.hints.queue_timeout_s,
            )
            try:
                ran = await self._upstream.generate(
                    ticket, prompt, route, self._sink(flight), streamed=streamed, bill=bill
                )
            finally:
                self._settle(flight, bill)
        flight.began = ran.began
        if ran.rule != route.rule:
            flight.route = replace(route, model=ran.model, rule=ran.rule)
        return _assembled(flight.pieces, ran)

    async def vectors(
        self, flight: Flight[Embeddings], call: Call, request: EmbeddingInputs, route: Route
    ) -> Embeddings:
        """Runs the model of a flight on texts; as ``answer``."""
        most = await self.most_of_inputs(request, route)
        bill = Bill()
        await self._reserve(flight, most)
        async with self._slot(flight, route):
            flight.admit()
            flight.ticket = ticket = Ticket(
                call.tenant,
                flight.priority,
                most.tokens,
                deadline=flight.wanted_until,
                shared=True,
            )
            try:
                ran = await self._upstream.embed(ticket, request, route, bill=bill)
            finally:
                self._settle(flight, bill)
        flight.began = ran.began
        if ran.rule != route.rule:
            flight.route = replace(route, model=ran.model, rule=ran.rule)
        return Embeddings(ran.vectors, ran.usage, ran.model.name, ran.backend)

    async def most_of_inputs(self, request: EmbeddingInputs, route: Route) -> Amount:
        """The most that making vectors of texts can use."""
        count = await self._counter.of_inputs(route.model, request.inputs)
        margin = self._settings.limits.prompt_margin if count.estimated else 1.0
        return most_of((route.model, *route.fallbacks), int(count.tokens * margin), 0)

    def _settle(self, flight: Flight[Any], bill: Bill) -> None:
        """Charges all who share a flight, and counts what the model took."""
        flight.bill.settle(used_of(bill))
        for each in bill.spent:
            cost = cost_usd(each.model, each.usage)
            self._meter.consumed(
                flight.payer.tenant, each.model.name, each.backend, each.usage, cost
            )

    async def _reserve(self, flight: Flight[Any], most: Amount) -> None:
        """Sets aside what the flight may use."""
        try:
            flight.bill.leader = await self._till.open(flight.payer, most)
        except RateLimitedError:
            flight.denied = True
            raise

    def _slot(
        self, flight: Flight[Any], route: Route
    ) -> contextlib.AbstractAsyncContextManager[None]:
        """Holds a slot where the model asks for one."""
        return self._held_slot(flight) if route.model.concurrency_slots else _NO_SLOT

    @contextlib.asynccontextmanager
    async def _held_slot(self, flight: Flight[Any]) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as held:
            try:
                await held.enter_async_context(self._quota.slot(flight.payer))
            except RateLimitedError:
                flight.denied = True
                raise
            yield

    async def most(self, prompt: Prompt, route: Route) -> Amount:
        """The most that answering a prompt can use."""
        limits = self._settings.limits
        count = await self._counter.at_hand(route.model, prompt)
        input_tokens = count.tokens
        if count.estimated:
            input_tokens = int(input_tokens * limits.prompt_margin)
        output = prompt.sampling.max_tokens or limits.expected_output_tokens
        return most_of((route.model, *route.fallbacks), input_tokens, output)

    def _improbable(self, prompt: Prompt) -> int:
        """Tokens that an answer may have and is not expected to."""
        probable = _LONG_ANSWER * self._settings.limits.expected_output_tokens
        return max(0, (prompt.sampling.max_tokens or 0) - probable)

    def _sink(self, flight: Flight[Answer]) -> Sink:
        most = self._settings.max_answer_bytes

        def sink(pieces: Sequence[Piece]) -> None:
            flight.push(pieces)
            if flight.said_bytes > most:
                raise MeshError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "ANSWER_TOO_LONG",
                    f"the model said more than {most:,} bytes",
                )

        return sink


def produced_of(flight: Flight[Answer], prompt: Prompt, route: Route) -> Amount:
    """What a flight has used so far, about; nothing if nothing was said."""
    if not flight.said_bytes:
        return Amount()
    said = tokens.estimate_pieces(flight.pieces)
    return most_of([route.model], tokens.estimate_prompt(prompt), said)


def _assembled(pieces: list[Piece], ran: Ran) -> Answer:
    whole = merge(pieces)
    return Answer(
        content=whole.content,
        tool_calls=whole_calls(whole),
        finish_reason=ran.ending.finish_reason,
        usage=ran.usage,
        model=ran.model.name,
        backend=ran.backend,
        logprobs=whole.logprobs,
        reasoning=whole.reasoning,
    )
