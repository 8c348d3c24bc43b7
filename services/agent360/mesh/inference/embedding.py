"""Turns texts into vectors: limited, from the cache, or by running a model."""

from __future__ import annotations

import time
from typing import NamedTuple

from agent360.mesh.inference import fingerprint
from agent360.mesh.inference.answers import Embeddings, Source
from agent360.mesh.inference.caching.keeper import Keeper
from agent360.mesh.inference.conversation import EmbeddingInputs
from agent360.mesh.inference.counting.counter import TokenCounter
from agent360.mesh.inference.flights import Flight
from agent360.mesh.inference.joining import Joining, Share
from agent360.mesh.inference.metering.runs import ChargedRuns
from agent360.mesh.inference.metering.till import Till
from agent360.mesh.inference.ports import Amount, AnswerCache, Meter, Payer, Quota, UsageRecord
from agent360.mesh.inference.ride import Ride, reason_of
from agent360.mesh.inference.routing import Route, Router
from agent360.mesh.inference.settings import InferenceSettings
from agent360.mesh.inference.upstream import Upstream
from agent360.mesh.runtime.call import Call


class Embedded(NamedTuple):
    """Vectors as one caller gets them."""

    found: Embeddings
    source: Source
    route: Route
    cost_usd: float


class EmbeddingService:
    """Makes vectors.

    Example:
        >>> embedded = await service.embed(call, EmbeddingInputs("embedder", ("a text",)))
        >>> embedded.found.vectors[0]
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
        self._keeper = Keeper(cache, settings.cache)
        self._quota = quota
        self._till = Till(quota)
        self._runs = ChargedRuns(settings, upstream, counter, self._till, quota, meter)
        self._joining: Joining[Embeddings] = Joining(settings.coalescing, self._till)
        self._meter = meter

    async def embed(self, call: Call, request: EmbeddingInputs) -> Embedded:
        """The vectors of texts.

        Raises:
            MeshError: there is no such model, a limit denies the request, or the model fails.
        """
        received = time.monotonic()
        self._keeper.refuse_reserved(call.tenant)
        route = self._router.choose_embedder(request.model, call.tenant)
        call.facts["model"] = route.model.name
        payer = Payer(call.tenant, route.model.name, request.user)
        ride: Ride[Embeddings] | None = None
        try:
            if not self._quota.admit_at_once(payer):
                await self._quota.admit(payer)
            async with self._joining.follow(self._share(call, payer, request, route)) as follower:
                ride = Ride(
                    call, request.user, route, follower, received, self._meter, method="embed"
                )
                found = await ride.answered()
        except BaseException as error:
            reason = reason_of(error)
            if ride is not None:
                ride.failed(reason)
            else:
                total_s = time.monotonic() - received
                self._meter.record(
                    UsageRecord(payer, "embed", reason, total_s, request_id=call.request_id)
                )
            raise
        return Embedded(found.answer, found.source, found.route, found.cost_usd)

    async def close(self) -> None:
        """Ends what is in flight, settles its tokens, and keeps its vectors."""
        await self._joining.close()
        await self._till.close(self._settings.limits.timeout_s * 2)

    def _share(
        self, call: Call, payer: Payer, request: EmbeddingInputs, route: Route
    ) -> Share[Embeddings]:
        control = request.cache
        scope = self._keeper.scope(call.tenant, control)
        place = self._keeper.vectors_place(scope, fingerprint.of_inputs(request, route.model))

        async def most() -> Amount:
            return await self._runs.most_of_inputs(request, route)

        async def fly(flight: Flight[Embeddings]) -> None:
            kept = None if control.no_cache else await self._keeper.find_vectors(place)
            if kept is not None:
                flight.bill.settle(Amount())
                flight.land(kept, Source.CACHE)
                return
            found = await self._runs.vectors(flight, call, request, route)
            flight.land(found)
            # Vectors of a fallback are not the model's own, so they are not kept as those.
            if found.model == route.model.name and not control.no_store:
                await self._keeper.keep_vectors(place, found, control)

        return Share(
            call=call,
            payer=payer,
            place=place,
            alone=control.no_cache,
            solo=control.no_cache and control.no_store,
            streamed=False,
            most=most,
            # Vectors come all at once: before, nothing was made.
            produced=lambda _: Amount(),
            fly=fly,
        )
