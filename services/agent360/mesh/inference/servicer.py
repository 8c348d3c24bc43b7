"""The inference service on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent360.inference.v1 import inference_pb2 as pb
from agent360.mesh.inference import tokens
from agent360.mesh.inference.backends.openai import OpenAIBackend
from agent360.mesh.inference.catalogue import Catalogue
from agent360.mesh.inference.embedding import EmbeddingService
from agent360.mesh.inference.fleet import Fleet, Member
from agent360.mesh.inference.peers.answer_cache import MeshAnswerCache, NoAnswerCache
from agent360.mesh.inference.peers.meter import MeshMeter
from agent360.mesh.inference.peers.quota import MeshQuota, NoQuota
from agent360.mesh.inference.ports import AnswerCache, Quota
from agent360.mesh.inference.routing import Router
from agent360.mesh.inference.service import GenerationService
from agent360.mesh.inference.settings import InferenceSettings, ModelSettings
from agent360.mesh.inference.wire import requests, responses
from agent360.mesh.runtime import pages
from agent360.mesh.runtime.call import Call, Emit, Item
from agent360.mesh.runtime.service import ServiceContext, ServiceDefinition


class InferenceServicer:
    """Serves agent360.inference.v1.InferenceService.

    Every item is a task of its own: a model takes its time, and nobody's neighbour waits for it.
    """

    def __init__(self, settings: InferenceSettings, context: ServiceContext) -> None:
        mesh, log = context.mesh, context.log
        self._settings = settings
        self._catalogue = Catalogue(settings.models)
        self._fleet = Fleet(
            [
                Member(
                    OpenAIBackend(backend, max_answer_bytes=settings.max_answer_bytes),
                    probed=backend.probe,
                )
                for backend in settings.backends
            ],
            self._catalogue,
            log,
            discover=not settings.models,
            probe_interval_s=settings.probe_interval_s,
        )
        cache: AnswerCache = (
            MeshAnswerCache(mesh, settings.cache.timeout_s, log)
            if settings.cache.enabled
            else NoAnswerCache()
        )
        limits = settings.limits
        quota: Quota = (
            MeshQuota(mesh, limits.timeout_s, limits.when_away, log)
            if limits.enabled
            else NoQuota()
        )
        meter = MeshMeter(mesh, context.registry)
        self._router = Router(self._catalogue, settings.auto, limits.expected_output_tokens)
        self._generation = GenerationService(
            settings, self._router, self._fleet, cache, quota, meter
        )
        self._embedding = EmbeddingService(
            settings, self._catalogue, self._fleet, cache, quota, meter
        )

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

    async def start(self) -> None:
        """Connects the backends; returns when one of them answers."""
        await self._fleet.start()

    async def close(self) -> None:
        """Ends what is in flight and closes the backends."""
        await self._generation.close()
        await self._embedding.close()
        await self._fleet.close()

    # ---------------------------------------------------------------- hot RPCs

    async def generate(self, items: Sequence[Item], emit: Emit) -> None:
        """Answers each item whole."""
        for item in items:
            emit.start(item, self._generate(item, emit))

    async def stream_generate(self, items: Sequence[Item], emit: Emit) -> None:
        """Answers each item in pieces, then with a final."""
        for item in items:
            emit.start(item, self._stream_generate(item, emit))

    async def embed(self, items: Sequence[Item], emit: Emit) -> None:
        """Answers each item with vectors."""
        for item in items:
            emit.start(item, self._embed(item, emit))

    async def count_tokens(self, items: Sequence[Item], emit: Emit) -> None:
        """Estimates the tokens of each item's prompt."""
        for item in items:
            emit.start(item, self._count_tokens(item, emit))

    async def _generate(self, item: Item, emit: Emit) -> None:
        prompt = requests.read_prompt(item.request, self._settings.max_prompt_bytes)
        answered = await self._generation.generate(item.call, prompt)
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
        item.call.facts["model"] = self._router.choose(prompt, item.call.tenant).model.name
        count = tokens.estimate_prompt(prompt)
        response = emit.reply(item)
        response.input_tokens = count
        response.estimated = True

    # ---------------------------------------------------------------- models

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
        responses.write_model(
            described, model, self._fleet.health(model), self._fleet.load(model.name)
        )
        return described
