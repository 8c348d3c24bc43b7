"""The routes of the OpenAI-compatible front: each request is a call like those over gRPC."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

import grpc
from aiohttp import web

from agent360.client.errors import DeadlineExceededError, MeshError
from agent360.inference.v1 import inference_pb2 as pb
from agent360.mesh.inference.front import requests, responses
from agent360.mesh.inference.front.failures import failure_of
from agent360.mesh.inference.front.settings import FrontSettings
from agent360.mesh.openai_bodies import ChatBody
from agent360.mesh.runtime.call import Call
from agent360.mesh.runtime.http_calls import REQUEST_ID_HEADER, Caller, HttpCalls, request_id_of
from agent360.mesh.runtime.service import ServiceDefinition
from agent360.mesh.runtime.single import streaming_from_batch, unary_from_batch

_PREFIX: Final = "/agent360.inference.v1.InferenceService/"
_GENERATE: Final = _PREFIX + "Generate"
_STREAM: Final = _PREFIX + "StreamGenerate"
_EMBED: Final = _PREFIX + "Embed"
_LIST: Final = _PREFIX + "ListModels"
_GET: Final = _PREFIX + "GetModel"

_JSON: Final = "application/json"
_STREAM_HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
_TOLD: Final = ("model", "backend", "rule", "because", "source")
_PAGE: Final = 1_000
_FAREWELL_S: Final = 1.0
"""How long a caller that reads slowly has to take the error that ends its stream."""

Work = Callable[[Call], Awaitable[web.StreamResponse]]


class OpenAIFront:
    """Serves /v1/chat/completions, /v1/embeddings and /v1/models.

    A body becomes a request of the contract and goes to the handlers of the gRPC service, through
    the policies; what they answer becomes JSON or server-sent events.

    Example:
        >>> front = OpenAIFront(servicer.definitions[0], calls, FrontSettings(), 16 * 2**20)
        >>> app.add_routes(front.routes())
    """

    def __init__(
        self,
        definition: ServiceDefinition,
        calls: HttpCalls,
        settings: FrontSettings,
        max_body_bytes: int,
    ) -> None:
        self._generate = unary_from_batch(definition.batch["Generate"], pb.GenerateResponse)
        self._stream = streaming_from_batch(
            definition.batch["StreamGenerate"], pb.StreamGenerateResponse
        )
        self._embed = unary_from_batch(definition.batch["Embed"], pb.EmbedResponse)
        self._list_models = definition.unary["ListModels"]
        self._get_model = definition.unary["GetModel"]
        self._calls = calls
        self._settings = settings
        self._max_body_bytes = max_body_bytes

    def routes(self) -> Sequence[web.RouteDef]:
        """What is served."""
        return (
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/embeddings", self.embed),
            web.get("/v1/models", self.list_models),
            web.get("/v1/models/{name:.+}", self.get_model),
            web.route("*", "/v1/{rest:.*}", self.refuse),
        )

    # ---------------------------------------------------------------- routes

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        reply = _Reply(request, self._calls)
        try:
            caller = self._calls.identify(_GENERATE, request, reply.request_id)
            try:
                body = requests.read_chat(await self._read(request))
            except MeshError as error:
                return await self._run(_GENERATE, caller, _failing(error))
            if body.stream:
                return await self._run(
                    _STREAM, caller, lambda call: self._answer_in_pieces(body, call, reply)
                )
            return await self._run(_GENERATE, caller, lambda _: self._answer_whole(body, reply))
        except MeshError as error:
            return await reply.failure(error)

    async def embed(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/embeddings."""
        reply = _Reply(request, self._calls)

        async def work(_: Call) -> web.StreamResponse:
            body = requests.read_embedding(await self._read(request))
            wire = pb.EmbedRequest()
            requests.fill_embed(wire, body)
            answer = await self._embed(wire, None)
            coded = body.encoding_format == "base64"
            return reply.json(
                responses.embeddings(answer, coded=coded), responses.told_headers(answer)
            )

        return await self._simple(_EMBED, request, reply, work)

    async def list_models(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/models."""
        reply = _Reply(request, self._calls)

        async def work(call: Call) -> web.StreamResponse:
            found: list[pb.Model] = []
            wire = pb.ListModelsRequest(page_size=_PAGE)
            while True:
                page = await self._list_models(call, wire)
                found.extend(page.models)
                if not page.next_page_token:
                    return reply.json(responses.models(found))
                wire.page_token = page.next_page_token

        return await self._simple(_LIST, request, reply, work)

    async def get_model(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/models/NAME; a name may hold slashes."""
        reply = _Reply(request, self._calls)

        async def work(call: Call) -> web.StreamResponse:
            wire = pb.GetModelRequest(name=request.match_info["name"])
            found = await self._get_model(call, wire)
            return reply.json(responses.model(found.model))

        return await self._simple(_GET, request, reply, work)

    async def refuse(self, request: web.Request) -> web.StreamResponse:
        """Every other path below /v1."""
        return await _Reply(request, self._calls).failure(
            MeshError(
                grpc.StatusCode.NOT_FOUND,
                "ROUTE_UNKNOWN",
                f"{request.method} {request.path} is not served here; there are POST "
                "/v1/chat/completions, POST /v1/embeddings, GET /v1/models and GET /v1/models/NAME",
            )
        )

    # ---------------------------------------------------------------- work

    async def _answer_whole(self, body: ChatBody, reply: _Reply) -> web.StreamResponse:
        wire = pb.GenerateRequest()
        requests.fill_generate(wire, body)
        answer = await self._generate(wire, None)
        text = responses.completion(answer, _completion_id(), int(time.time()))
        return reply.json(text, responses.told_headers(answer))

    async def _answer_in_pieces(
        self, body: ChatBody, call: Call, reply: _Reply
    ) -> web.StreamResponse:
        wire = pb.StreamGenerateRequest()
        requests.fill_generate(wire.request, body)
        options = body.stream_options
        include_usage = options is not None and bool(options.include_usage)
        completion_id, created = _completion_id(), int(time.time())
        events: AsyncIterator[Any] = self._stream(wire, None)
        writer: responses.ChunkWriter | None = None
        async with aclosing(events) as pieces:  # type: ignore[type-var]  # a generator
            async for event in pieces:
                if writer is None:
                    # Nothing is sent before the first piece: until then an error has a status.
                    model = call.facts.get("model", body.model)
                    writer = responses.ChunkWriter(
                        completion_id, created, model, include_usage=include_usage
                    )
                    await reply.begin({"model": model, **call.facts})
                if event.HasField("final"):
                    await reply.write(writer.ending(event.final))
                else:
                    await reply.write(writer.piece(event.delta))
        return reply.streamed

    # ---------------------------------------------------------------- steps

    async def _simple(
        self, method: str, request: web.Request, reply: _Reply, work: Work
    ) -> web.StreamResponse:
        try:
            caller = self._calls.identify(method, request, reply.request_id)
            return await self._run(method, caller, work)
        except MeshError as error:
            return await reply.failure(error)

    async def _run(self, method: str, caller: Caller, work: Work) -> web.StreamResponse:
        return await self._calls.run(method, caller, work, self._settings.default_tenant)

    async def _read(self, request: web.Request) -> bytes:
        """The body, which must say that it is JSON: so no page in a browser can send one here.

        Raises:
            InvalidRequestError: it does not say so, or cannot be decoded.
            MeshError: it is too large, or does not arrive in time.
        """
        if request.content_type != _JSON:
            requests.refuse("header content-type", f"must be {_JSON}, is {request.content_type}")
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                return await request.read()
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"the body did not arrive within {self._settings.body_timeout_s:g} s"
            ) from error
        except web.RequestPayloadError:
            # Where it ends nobody can say: nothing more is read, and the connection is closed.
            request.content.feed_eof()
            requests.refuse("body", "is not what its Content-Encoding or Transfer-Encoding says")
        except web.HTTPRequestEntityTooLarge as error:
            raise MeshError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "MESSAGE_TOO_LARGE",
                f"a body may have {self._max_body_bytes:,} bytes",
            ) from error


class _Reply:
    """The answer to one request: a body, or a stream that an error may end."""

    __slots__ = ("_calls", "_request", "_response", "request_id")

    def __init__(self, request: web.Request, calls: HttpCalls) -> None:
        self._request = request
        self._calls = calls
        self._response: web.StreamResponse | None = None
        self.request_id = request_id_of(request)

    def json(self, body: bytes, headers: dict[str, str] | None = None) -> web.Response:
        response = web.Response(body=body, headers=headers, content_type=_JSON)
        self._finish_headers(response)
        return response

    async def begin(self, told: Mapping[str, str]) -> None:
        """Begins a stream; its headers say of who answers and why what is known so early."""
        response = web.StreamResponse(headers=_STREAM_HEADERS)
        for name in _TOLD:
            if responses.fits_header(told.get(name, "")):
                response.headers[f"x-agent360-{name}"] = told[name]
        self._finish_headers(response)
        try:
            await response.prepare(self._request)
        except ConnectionError as error:
            raise asyncio.CancelledError from error
        self._response = response

    async def write(self, data: bytes) -> None:
        """Writes a piece of a stream that has begun; waits while the caller reads too slowly.

        Raises:
            asyncio.CancelledError: the caller is gone.
        """
        if self._response is None:
            raise RuntimeError("a stream is written to before it began")
        try:
            await self._response.write(data)
        except ConnectionError as error:
            raise asyncio.CancelledError from error

    @property
    def streamed(self) -> web.StreamResponse:
        """The stream that has begun; its end is written by whoever gets it."""
        if self._response is None:
            raise RuntimeError("there was no piece of the stream, not even its end")
        return self._response

    async def failure(self, error: MeshError) -> web.StreamResponse:
        """Answers with an error: as an event where a stream has begun, which it ends."""
        status, body, headers = failure_of(error)
        if self._response is not None:
            try:
                async with asyncio.timeout(_FAREWELL_S):
                    await self._response.write(b"data: " + body + b"\n\n")
            except TimeoutError:
                if self._request.transport is not None:
                    self._request.transport.abort()
            return self._response
        response = web.Response(body=body, status=status, headers=headers, content_type=_JSON)
        self._finish_headers(response)
        return response

    def _finish_headers(self, response: web.StreamResponse) -> None:
        response.headers[REQUEST_ID_HEADER] = self.request_id
        if self._calls.draining or self._request.content.exception() is not None:
            response.force_close()


def _failing(error: MeshError) -> Work:
    async def work(_: Call) -> web.StreamResponse:
        raise error

    return work


def _completion_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"
