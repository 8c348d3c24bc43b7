"""The inference service on the wire."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Sequence
from typing import Any

import structlog
from aiohttp import web

from agent360.client import AuditEvent
from agent360.client.errors import MeshError
from agent360.inference.v1 import inference_pb2 as pb
from agent360.mesh.inference import tokens
from agent360.mesh.inference.backends.openai import OpenAIBackend
from agent360.mesh.inference.catalogue import Catalogue
from agent360.mesh.inference.catalogue_file import read_models
from agent360.mesh.inference.classifier import classifier_of
from agent360.mesh.inference.counting.counter import TokenCounter
from agent360.mesh.inference.counting.tokenizers import Tokenizers
from agent360.mesh.inference.embedding import EmbeddingService
from agent360.mesh.inference.failover.breaker import Breakers
from agent360.mesh.inference.failover.settings import BreakerSettings
from agent360.mesh.inference.failover.tally import Tally
from agent360.mesh.inference.fleet import Fleet
from agent360.mesh.inference.fleet_metrics import FleetMetrics
from agent360.mesh.inference.front.routes import OpenAIFront
from agent360.mesh.inference.local.backend import LocalBackend
from agent360.mesh.inference.members import Member
from agent360.mesh.inference.peers.assembly import connect_peers
from agent360.mesh.inference.queueing import Queues, Statistics
from agent360.mesh.inference.queueing.settings import ConcurrencySettings
from agent360.mesh.inference.routing import Router
from agent360.mesh.inference.selection import Selector
from agent360.mesh.inference.service import GenerationService
from agent360.mesh.inference.settings import InferenceSettings, ModelSettings
from agent360.mesh.inference.upstream import Upstream
from agent360.mesh.inference.wire import requests, responses
from agent360.mesh.runtime import pages
from agent360.mesh.runtime.call import MESH_TENANT, Call, Emit, Item
from agent360.mesh.runtime.http_calls import HttpCalls
from agent360.mesh.runtime.service import ServiceContext, ServiceDefinition
from agent360.mesh.runtime.settings import SettingError
from agent360.mesh.runtime.watched_file import WatchedFile


class InferenceServicer:
    """Serves agent360.inference.v1.InferenceService.

    Every item is a task of its own: a model takes its time, and nobody's neighbour waits for it.
    """

    def __init__(self, settings: InferenceSettings, context: ServiceContext) -> None:
        mesh, log = context.mesh, context.log
        self._settings = settings
        self._mesh = mesh
        self._file = self._watched_file(log)
        models = self._file.content if self._file else settings.models
        self._catalogue = Catalogue(models)
        members = _members(settings, log)
        context.registry.register(FleetMetrics(members))
        self._fleet = Fleet(
            members,
            self._catalogue,
            log,
            discover=not models,
            probe_interval_s=settings.probe_interval_s,
            probe_timeout_s=settings.probe_timeout_s,
        )
        limits = settings.limits
        peers = connect_peers(mesh, settings, context.registry, log)
        self._quota = peers.quota
        self._counter = TokenCounter(Tokenizers(log), self._fleet.known_members)
        statistics = Statistics(mesh.metrics)
        context.registry.register(statistics)
        self._queues = Queues(
            self._fleet,
            Selector(random.Random()).choose,
            _concurrency(settings),
            statistics,
            weights=settings.tenant_weights,
            clock=time.monotonic,
        )
        self._breakers = breakers = Breakers(
            {each.name: each.breaker for each in settings.backends}
            | {each.name: BreakerSettings() for each in settings.engines}
        )
        self._upstream = upstream = Upstream(
            self._queues,
            Tally(context.registry, breakers, mesh.metrics, log),
            breakers,
            settings.retry,
            settings.hedge,
        )
        self._router = Router(
            self._catalogue,
            settings.auto,
            limits.expected_output_tokens,
            classifier=classifier_of(settings.auto, log),
            conditions=self._fleet,
        )
        self._generation = GenerationService(
            settings, self._router, upstream, self._counter, *peers
        )
        self._embedding = EmbeddingService(settings, self._router, upstream, self._counter, *peers)

    @property
    def definitions(self) -> tuple[ServiceDefinition, ...]:
        """See ``Servicer.definitions``."""
        return (
            ServiceDefinition(
                descriptor=pb.DESCRIPTOR.services_by_name["InferenceService"],
                batch={
                    "Generate": self.generate,
                    "StreamGenerate": self.stream_generate,
                    "Embed": self.embed,
                    "CountTokens": self.count_tokens,
                },
                unary={"ListModels": self.list_models, "GetModel": self.get_model},
            ),
        )

    def http_routes(self, calls: HttpCalls) -> Sequence[web.RouteDef]:
        """See ``ServesHttp.http_routes``."""
        settings = self._settings
        if not settings.front.enabled:
            return ()
        (definition,) = self.definitions
        front = OpenAIFront(definition, calls, settings.front, settings.max_message_bytes)
        return front.routes()

    async def start(self) -> None:
        """Connects the backends; returns when one of them is ready."""
        if self._file:
            self._file.start(self._adopt)
        await self._fleet.start()

    async def close(self) -> None:
        """Ends what is in flight and closes the backends."""
        if self._file:
            await self._file.close()
        await self._generation.close()
        await self._embedding.close()
        await self._quota.close()
        await self._upstream.close()
        self._queues.close()
        await self._fleet.close()

    # ---------------------------------------------------------------- hot RPCs

    async def generate(self, items: Sequence[Item], emit: Emit) -> None:
        """Answers each item whole; at once where its answer is known and near."""
        for item in items:
            asked = item.request.SerializeToString()
            if not self._answered_at_once(item, asked, emit):
                emit.start(item, self._generate(item, asked, emit))

    async def stream_generate(self, items: Sequence[Item], emit: Emit) -> None:
        """Answers each item in pieces, then with a final."""
        for item in items:
            emit.start(item, self._stream_generate(item, emit))

    async def embed(self, items: Sequence[Item], emit: Emit) -> None:
        """Answers each item with vectors."""
        for item in items:
            emit.start(item, self._embed(item, emit))

    async def count_tokens(self, items: Sequence[Item], emit: Emit) -> None:
        """Counts the tokens of each item's prompt."""
        for item in items:
            emit.start(item, self._count_tokens(item, emit))

    def _answered_at_once(self, item: Item, asked: bytes, emit: Emit) -> bool:
        try:
            hot = self._generation.at_once(item.call, asked)
        except MeshError as error:
            emit.fail(item, error)
            return True
        if hot is None or hot.answer is None:
            return False
        if hot.form is None:
            hot.form = responses.cached_answer(hot.answer, hot.route)
        size = tokens.size_of(hot.answer.content)
        emit.reply(item, size).MergeFrom(hot.form)
        return True

    async def _generate(self, item: Item, asked: bytes, emit: Emit) -> None:
        prompt = requests.read_prompt(item.request, self._settings.max_prompt_bytes)
        answered = await self._generation.generate(item.call, prompt, asked)
        size = tokens.size_of(answered.answer.content)
        responses.write_answer(emit.reply(item, size), answered, with_text=True)

    async def _stream_generate(self, item: Item, emit: Emit) -> None:
        prompt = requests.read_prompt(item.request.request, self._settings.max_prompt_bytes)
        async with self._generation.board(item.call, prompt, streamed=True) as ride:
            while await ride.more():
                # What comes while the caller is not ready to take it goes into the same chunk.
                chunk = await emit.chunk(item, ride.pending_bytes)
                responses.write_delta(chunk.delta, ride.take())
            answered = await ride.answered()
            responses.write_answer(emit.reply(item).final, answered, with_text=False)

    async def _embed(self, item: Item, emit: Emit) -> None:
        request = requests.read_inputs(item.request, self._settings.max_prompt_bytes)
        embedded = await self._embedding.embed(item.call, request)
        size = 4 * sum(map(len, embedded.found.vectors))
        responses.write_embeddings(emit.reply(item, size), *embedded)

    async def _count_tokens(self, item: Item, emit: Emit) -> None:
        prompt = requests.read_prompt(item.request.request, self._settings.max_prompt_bytes)
        model = self._router.choose(prompt, item.call.tenant).model
        item.call.facts["model"] = model.name
        count = await self._counter.count(model, prompt)
        response = emit.reply(item)
        response.input_tokens = count.tokens
        response.estimated = count.estimated
        response.tokenizer = count.by

    # ---------------------------------------------------------------- models

    def _watched_file(
        self, log: structlog.stdlib.BoundLogger
    ) -> WatchedFile[tuple[ModelSettings, ...]] | None:
        """The catalogue's file, if there is one.

        Raises:
            WrongFileError: the file is wrong.
        """
        settings = self._settings
        if settings.models_file is None:
            return None
        read = functools.partial(read_models, backends=settings.backend_names)
        return WatchedFile(settings.models_file, read, log, self._on_load)

    def _adopt(self, models: tuple[ModelSettings, ...]) -> None:
        self._catalogue.replace(models)
        self._fleet.catalogue_changed()

    def _on_load(self, fault: str) -> None:
        """The catalogue's file was read; ``fault`` is what was wrong, if anything."""
        event = AuditEvent(
            "inference.models.load",
            f"files/{self._settings.models_file.name if self._settings.models_file else ''}",
            actor="inference",
            outcome="failed" if fault else "succeeded",
            attributes={"fault": fault[:256]} if fault else {},
        )
        self._mesh.audit.note(event, tenant=MESH_TENANT)

    async def list_models(self, call: Call, request: Any) -> pb.ListModelsResponse:
        """A page of the models that the caller's tenant may use."""
        size = pages.page_size(request.page_size)
        after = pages.decode_page_token(call.tenant, b"models", request.page_token)
        masked = pages.read_mask(request, pb.Model)
        models = sorted(self._catalogue.usable(call.tenant), key=lambda each: each.name)
        if after is not None:
            models = [model for model in models if model.name > str(after)]
        response = pb.ListModelsResponse()
        for model in models[:size]:
            response.models.append(masked(self._described(model)))
        if len(models) > size:
            response.next_page_token = pages.encode_page_token(
                call.tenant, b"models", models[size - 1].name
            )
        return response

    async def get_model(self, call: Call, request: Any) -> pb.GetModelResponse:
        """One model."""
        model = self._catalogue.get(request.name, call.tenant)
        masked = pages.read_mask(request, pb.Model)
        return pb.GetModelResponse(model=masked(self._described(model)))

    def _described(self, model: ModelSettings) -> pb.Model:
        described = pb.Model()
        queued = self._queues.queued(model.name)
        responses.write_model(described, model, self._fleet, self._breakers, queued)
        return described


def _concurrency(settings: InferenceSettings) -> dict[str, ConcurrencySettings]:
    """How many requests each backend gets at a time; an engine as many as it generates."""
    return {each.name: each.concurrency for each in settings.backends} | {
        engine.name: ConcurrencySettings(mode="fixed", maximum=engine.parallel)
        for engine in settings.engines
    }


def _members(settings: InferenceSettings, log: structlog.stdlib.BoundLogger) -> list[Member]:
    servers = [
        Member(OpenAIBackend(each, max_answer_bytes=settings.max_answer_bytes), probed=each.probe)
        for each in settings.backends
    ]
    for engine in settings.engines:
        if not engine.path.is_file():
            raise SettingError(f"engines: {engine.name}: there is no file {engine.path}")
    engines = [Member(LocalBackend(each, log), probed=True) for each in settings.engines]
    return servers + engines
