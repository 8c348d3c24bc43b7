"""Answers prompts: limited, from the cache, from a call in flight, or by running a model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc

from agent360.client.errors import MeshError, RateLimitedError
from agent360.mesh.inference import fingerprint
from agent360.mesh.inference.answers import (
    Answer,
    Source,
    as_pieces,
)
from agent360.mesh.inference.caching.hot import Hot, HotAnswers
from agent360.mesh.inference.caching.keeper import Keeper
from agent360.mesh.inference.conversation import Prompt
from agent360.mesh.inference.counting.counter import TokenCounter
from agent360.mesh.inference.flights import Flight, landed
from agent360.mesh.inference.joining import Joining, Share
from agent360.mesh.inference.metering.runs import ChargedRuns, produced_of
from agent360.mesh.inference.metering.till import Till
from agent360.mesh.inference.ports import (
    Amount,
    AnswerCache,
    Meter,
    Payer,
    Place,
    Quota,
    UsageRecord,
)
from agent360.mesh.inference.ride import Answered, Ride, reason_of
from agent360.mesh.inference.routing import EXPLICIT, Route, Router
from agent360.mesh.inference.settings import InferenceSettings
from agent360.mesh.inference.upstream import Upstream
from agent360.mesh.runtime.call import Call


class GenerationService:
    """Generates answers.

    A request is admitted by the request limits, then answered from a copy that is near, or joins
    the flight of an identical request, or begins one. A flight looks into the cache, sets tokens
    and money aside, runs the model, settles, and keeps the answer, whoever still waits for it.

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
        upstream: Upstream,
        counter: TokenCounter,
        cache: AnswerCache,
        quota: Quota,
        meter: Meter,
    ) -> None:
        self._settings = settings
        self._router = router
        self._cache = cache
        self._keeper = Keeper(cache, settings.cache)
        self._quota = quota
        self._till = Till(quota)
        self._runs = ChargedRuns(settings, upstream, counter, self._till, quota, meter)
        self._meter = meter
        self._joining: Joining[Answer] = Joining(settings.coalescing, self._till)
        self._hot = HotAnswers(cache)

    async def close(self) -> None:
        """Ends what is in flight and settles its tokens."""
        await self._joining.close()
        await self._till.close(self._settings.limits.timeout_s * 2)

    def at_once(self, call: Call, asked: bytes) -> Hot | None:
        """The answer to a request that was answered from a near copy before, if that can be now.

        Args:
            call: whose request it is.
            asked: the request as it came.

        Returns:
            The answer; None where only ``generate`` can tell.

        Raises:
            RateLimitedError: a limit denies the request.
        """
        received = time.monotonic()
        hot = self._hot.find(call.tenant, asked)
        if hot is None:
            return None
        if not self._router.stands(hot.route, call.tenant):
            self._hot.forget(call.tenant, asked)
            return None
        outcome, answer = "OK", None
        try:
            if not self._hot.refresh(hot) or not self._quota.admit_at_once(hot.payer):
                return None
            answer = hot.answer
        except RateLimitedError as error:
            outcome = error.reason
            raise
        finally:
            if answer is not None or outcome != "OK":
                # Rounded, so that many of one duration are told to the metrics service as one.
                total_s = round(time.monotonic() - received, 5)
                self._record_at_once(call, hot, outcome, total_s)
        return hot

    def _record_at_once(self, call: Call, hot: Hot, outcome: str, total_s: float) -> None:
        _note_route(call, hot.route)
        call.facts["source"] = Source.CACHE.value
        answer = hot.answer if outcome == "OK" else None
        self._meter.record(
            UsageRecord(
                hot.payer,
                "generate",
                outcome,
                total_s,
                Source.CACHE if answer is not None else None,
                answer.backend if answer is not None else "",
                hot.route.rule,
                answer.usage if answer is not None else None,
                request_id=call.request_id,
            )
        )

    async def generate(self, call: Call, prompt: Prompt, asked: bytes = b"") -> Answered[Answer]:
        """The whole answer to a prompt.

        Args:
            call: whose request it is.
            prompt: what to answer.
            asked: the request as it came, for ``at_once`` to know it again; empty: it need not.
        """
        async with self.board(call, prompt, streamed=False, asked=asked) as ride:
            return await ride.answered()

    @contextlib.asynccontextmanager
    async def board(
        self, call: Call, prompt: Prompt, *, streamed: bool, asked: bytes = b""
    ) -> AsyncIterator[Ride[Answer]]:
        """Begins to answer a prompt; leaving early withdraws from it.

        Args:
            call: whose request it is.
            prompt: what to answer.
            streamed: whether pieces are wanted as the model says them.
            asked: as in ``generate``.

        Raises:
            MeshError: there is no such model, a limit denies the request, or the model fails.
        """
        received = time.monotonic()
        model = prompt.model
        ride: Ride[Answer] | None = None
        try:
            self._keeper.refuse_reserved(call.tenant)
            route = self._router.choose(prompt, call.tenant)
            model = route.model.name
            _note_route(call, route)
            prompt = self._completed(prompt, route)
            payer = Payer(call.tenant, model, prompt.user)
            if not self._quota.admit_at_once(payer):
                await self._quota.admit(payer)
            place = self._place(call, prompt, route)
            near = None if prompt.cache.no_cache else self._keeper.near_answer(place)
            if near is not None:
                if asked and route.rule == EXPLICIT:
                    self._hot.remember(call.tenant, asked, Hot(route, payer, place))
                there = landed(near, payer)
                ride = Ride(call, prompt.user, route, there, received, self._meter)
                yield ride
                return
            share = self._share(call, prompt, route, payer, place, streamed)
            async with self._joining.follow(share) as follower:
                ride = Ride(call, prompt.user, route, follower, received, self._meter)
                yield ride
        except BaseException as error:
            reason = reason_of(error)
            if ride is not None:
                ride.failed(reason)
            else:
                known = model if reason != "MODEL_UNKNOWN" else ""
                self._meter.record(
                    UsageRecord(
                        Payer(call.tenant, known, prompt.user),
                        "generate",
                        reason,
                        time.monotonic() - received,
                        request_id=call.request_id,
                    )
                )
            raise

    def _completed(self, prompt: Prompt, route: Route) -> Prompt:
        """The prompt with what it leaves open, as far as the settings say it."""
        prompt = route.completed(prompt)
        limits = self._settings.limits
        if not limits.bound_answers or prompt.sampling.max_tokens is not None:
            return prompt
        bound = replace(prompt.sampling, max_tokens=limits.expected_output_tokens)
        return replace(prompt, sampling=bound)

    def _place(self, call: Call, prompt: Prompt, route: Route) -> Place:
        """Where the answer is kept, and by what identical requests are known."""
        scope = self._keeper.scope(call.tenant, prompt.cache)
        return self._keeper.answer_place(scope, fingerprint.of_prompt(prompt, route.model))

    # ---------------------------------------------------------------- flights

    def _share(
        self,
        call: Call,
        prompt: Prompt,
        route: Route,
        payer: Payer,
        place: Place,
        streamed: bool,
    ) -> Share[Answer]:
        async def most() -> Amount:
            return await self._runs.most(prompt, route)

        async def fly(flight: Flight[Answer]) -> None:
            kept, token = await self._look(place, prompt, streamed)
            if kept is not None:
                flight.bill.settle(Amount())
                flight.push(as_pieces(kept))
                flight.land(kept, Source.CACHE)
                return
            try:
                answer = await self._runs.answer(flight, call, prompt, route, streamed=streamed)
            except BaseException as error:
                if token:
                    self._till.do_afterwards(self._cache.abandon(place, token, _told(error)))
                raise
            flight.land(answer)
            await self._keep(place, answer, prompt, route, token)

        return Share(
            call=call,
            payer=payer,
            place=place,
            alone=prompt.cache.no_cache,
            solo=prompt.cache.no_cache and prompt.cache.no_store and not streamed,
            streamed=streamed,
            most=most,
            produced=lambda flight: produced_of(flight, prompt, route),
            fly=fly,
            patience_s=prompt.hints.queue_timeout_s,
        )

    async def _look(
        self, place: Place, prompt: Prompt, streamed: bool
    ) -> tuple[Answer | None, str]:
        """The kept answer; or None and what other replicas wait by, empty where none do."""
        control, coalescing = prompt.cache, self._settings.coalescing
        if control.no_cache:
            return None, ""
        if streamed or control.no_store or not coalescing.across_replicas:
            return await self._keeper.find_answer(place), ""
        return await self._keeper.claim_answer(place, coalescing.across_replicas_s)

    async def _keep(
        self, place: Place, answer: Answer, prompt: Prompt, route: Route, token: str
    ) -> None:
        """Keeps an answer that is whole and the model's own: that of a fallback is not."""
        own = answer.model == route.model.name and answer.finish_reason != "content_filter"
        if own and not prompt.cache.no_store:
            await self._keeper.keep_answer(place, answer, prompt.cache, route.task_class, token)
        elif token:
            await self._cache.abandon(place, token, _told(None))


def _note_route(call: Call, route: Route) -> None:
    call.facts["model"], call.facts["rule"] = route.model.name, route.rule
    if route.because:
        call.facts["because"] = route.because


def _told(error: BaseException | None) -> MeshError:
    """What is told to replicas that waited for an answer that does not come."""
    if isinstance(error, MeshError):
        return error
    return MeshError(
        grpc.StatusCode.ABORTED, "ANSWER_NOT_KEPT", "the answer that was waited for was not kept"
    )
