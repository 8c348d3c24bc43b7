"""Turns texts into vectors: limited, from the cache, or by running a model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Final, NamedTuple

from agent360.client.errors import MeshError
from agent360.mesh.inference import fingerprint, tokens
from agent360.mesh.inference.answers import Embeddings, Source, Usage
from agent360.mesh.inference.catalogue import Catalogue, cost_usd
from agent360.mesh.inference.codec import decode_vectors, encode_vectors
from agent360.mesh.inference.conversation import EmbeddingInputs
from agent360.mesh.inference.fleet import Fleet
from agent360.mesh.inference.ports import AnswerCache, Meter, Quota
from agent360.mesh.inference.routing import EXPLICIT, Route, lacking
from agent360.mesh.inference.settings import InferenceSettings, ModelSettings
from agent360.mesh.runtime.call import Call

NAMESPACE: Final = "inference.embed"
"""The cache namespace of vectors."""


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
        catalogue: Catalogue,
        fleet: Fleet,
        cache: AnswerCache,
        quota: Quota,
        meter: Meter,
    ) -> None:
        self._settings = settings
        self._catalogue = catalogue
        self._fleet = fleet
        self._cache = cache
        self._quota = quota
        self._meter = meter
        self._afterwards: set[asyncio.Task[None]] = set()

    async def embed(self, call: Call, request: EmbeddingInputs) -> Embedded:
        """The vectors of texts.

        Raises:
            MeshError: there is no such model, a limit denies the request, or the model fails.
        """
        received = time.monotonic()
        tenant = call.tenant
        model = self._catalogue.get(request.model, tenant)
        call.facts["model"] = model.name
        if "embeddings" not in model.capabilities:
            raise lacking(model.name, {"embeddings"})
        try:
            await self._quota.admit(tenant, model.name, request.user)
            key = fingerprint.of_inputs(request, model.name)
            found = None if request.cache.no_cache else await self._kept(tenant, key)
            source = Source.CACHE if found is not None else Source.MODEL
            if found is None:
                found = await self._run_model(tenant, request, model)
                if not request.cache.no_store:
                    self._do_afterwards(self._keep(tenant, key, found, request))
        except asyncio.CancelledError:
            self._meter.failed(tenant, model.name, "CANCELLED")
            raise
        except MeshError as error:
            self._meter.failed(tenant, model.name, error.reason)
            raise
        self._meter.answered(tenant, model.name, source, time.monotonic() - received, None)
        cost = cost_usd(model, found.usage) if source is Source.MODEL else 0.0
        return Embedded(found, source, Route(model, EXPLICIT), cost)

    async def close(self) -> None:
        """Waits for tokens to be settled and vectors to be kept."""
        if self._afterwards:
            await asyncio.wait(self._afterwards, timeout=self._settings.limits.timeout_s * 2)

    async def _run_model(
        self, tenant: str, request: EmbeddingInputs, model: ModelSettings
    ) -> Embeddings:
        estimate = tokens.estimate_inputs(request.inputs)
        reservation = await self._quota.reserve(tenant, model.name, request.user, estimate)
        used: Usage | None = None
        try:
            member = self._fleet.choose(model)
            with self._fleet.at_work(member, model.name):
                vectors, said = await member.backend.embed(request, model.upstream_name)
            used = said or Usage(estimate, estimated=True)
        finally:
            spent = used.input_tokens if used else 0
            self._do_afterwards(self._quota.settle(tenant, reservation, spent))
        backend = member.backend.name
        self._meter.consumed(tenant, model.name, backend, used, cost_usd(model, used))
        return Embeddings(vectors, used, model.name, backend)

    def _do_afterwards(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs ``work`` without the caller's waiting for it, even if the caller leaves."""
        task = asyncio.get_running_loop().create_task(work)
        self._afterwards.add(task)
        task.add_done_callback(self._afterwards.discard)

    async def _kept(self, tenant: str, key: str) -> Embeddings | None:
        data = await self._cache.get(tenant, NAMESPACE, key)
        return None if data is None else decode_vectors(data)

    async def _keep(
        self, tenant: str, key: str, found: Embeddings, request: EmbeddingInputs
    ) -> None:
        settings = self._settings.cache
        ttl_s = min(request.cache.ttl_s or settings.ttl_s, settings.max_ttl_s)
        await self._cache.put(tenant, NAMESPACE, key, encode_vectors(found), ttl_s)
