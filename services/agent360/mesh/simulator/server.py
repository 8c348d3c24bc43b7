"""The simulator's HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, Self

import structlog
from aiohttp import web

from agent360.mesh.simulator import text
from agent360.mesh.simulator.chat import (
    FINGERPRINT,
    RESPONSE_HEADERS,
    Pace,
    Turn,
    answer_in_pieces,
    answer_whole,
    cut_in_body,
)
from agent360.mesh.simulator.faults import HEADER, Behaviour, DirectiveError, Faults
from agent360.mesh.simulator.load import Load
from agent360.mesh.simulator.script import write_script
from agent360.mesh.simulator.settings import SimulatedModel, SimulatorSettings

NOTICE: Final = "simulator; no model was run"
_MAX_BODY_BYTES: Final = 64 * 2**20
_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})


class Simulator:
    """An OpenAI-compatible model server that runs no model, for demos, tests and load tests.

    What it says follows from the prompt; how fast, from its settings and its load; what goes wrong,
    from seeded rates, a marker in the prompt such as ``[[sim:error=503]]``, or the header ``X-Sim``
    (``faults.Behaviour`` has them all). It says what it is: model names begin with ``sim-``,
    ``system_fingerprint`` is ``simulator``, and every answer has the header ``X-Simulator``.

    Example:
        >>> async with Simulator(SimulatorSettings(port=0)) as simulator:
        ...     base_url = simulator.url  # http://127.0.0.1:40123/v1

    Attributes:
        load: counts of requests.
    """

    def __init__(self, settings: SimulatorSettings | None = None) -> None:
        self.load = Load()
        self._settings = settings or SimulatorSettings()
        self._models = {model.name: model for model in self._settings.models}
        self._faults = Faults(self._settings)
        workers = self._settings.embedding_workers
        self._embedding_workers: contextlib.AbstractAsyncContextManager[None] = (
            asyncio.Semaphore(workers) if workers else contextlib.nullcontext()
        )
        self._runner: web.AppRunner | None = None
        self._port = 0
        self._log = structlog.get_logger("agent360.mesh.simulator")

    @property
    def url(self) -> str:
        """Base URL of the API, with ``/v1``."""
        return f"http://{self._settings.host}:{self._port}/v1"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Begins to listen."""
        application = web.Application(
            client_max_size=_MAX_BODY_BYTES, middlewares=[self._answer_refusals]
        )
        application[RESPONSE_HEADERS] = {"X-Simulator": NOTICE}
        application.on_response_prepare.append(_say_what_answers)
        application.add_routes(
            [
                web.get("/v1/models", self._list_models),
                web.get("/v1/models/{name}", self._get_model),
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/embeddings", self._embed),
                web.get("/sim/load", self._show_load),
            ]
        )
        if self._settings.counts_tokens:
            application.router.add_post("/tokenize", self._tokenize)
        # A caller that goes away cancels its request, as it does on a real model server.
        self._runner = web.AppRunner(
            application, access_log=None, handler_cancellation=True, shutdown_timeout=1.0
        )
        await self._runner.setup()
        family = socket.AF_INET6 if ":" in self._settings.host else socket.AF_INET
        listener = socket.create_server(
            (self._settings.host, self._settings.port), family=family, backlog=1024
        )
        self._port = listener.getsockname()[1]
        await web.SockSite(self._runner, listener).start()
        self._log.info(
            "simulator of a model server is listening: no model is run",
            url=self.url,
            models=list(self._models),
        )

    async def close(self) -> None:
        """Stops listening and ends what is running."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    # ---------------------------------------------------------------- models

    async def _list_models(self, request: web.Request) -> web.StreamResponse:
        self._authorise(request)
        models = [_model_object(model) for model in self._models.values()]
        return web.json_response({"object": "list", "data": models})

    async def _get_model(self, request: web.Request) -> web.StreamResponse:
        self._authorise(request)
        return web.json_response(_model_object(self._model(request.match_info["name"])))

    async def _show_load(self, _: web.Request) -> web.StreamResponse:
        # asdict would rebuild the Counter from pairs, and count those.
        load = {each.name: getattr(self.load, each.name) for each in dataclasses.fields(self.load)}
        return web.json_response(load)

    # ---------------------------------------------------------------- work

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self._authorise(request)
        with self.load.one("/v1/chat/completions") as number:
            body = await _read_json(request)
            _check_messages(body)
            model = self._model(body.get("model"), embeddings=False)
            behaviour = self._admit(request, "".join(map(text.content_of, body["messages"])))
            script = write_script(body, self._settings, behaviour)
            options = body.get("stream_options") or {}
            turn = Turn(
                number,
                model,
                script,
                behaviour,
                bool(options.get("include_usage")),
                int(body.get("top_logprobs") or 0) if body.get("logprobs") else None,
            )
            pace = Pace(self._settings, self.load, turn)
            answer = answer_in_pieces if body.get("stream") else answer_whole
            return await answer(request, turn, pace)

    async def _embed(self, request: web.Request) -> web.StreamResponse:
        self._authorise(request)
        with self.load.one("/v1/embeddings"):
            body = await _read_json(request)
            inputs = _inputs(body)
            model = self._model(body.get("model"), embeddings=True)
            behaviour = self._admit(request, "".join(inputs))
            settings = self._settings
            lone_s = settings.first_token_s + settings.text_s * len(inputs)
            async with self._embedding_workers:
                await asyncio.sleep(lone_s * model.slowness + behaviour.stall_s)
            answer = self._vectors(body, inputs, model, behaviour)
            if behaviour.break_after is not None:
                return await cut_in_body(request, json.dumps(answer).encode())
            return web.json_response(answer)

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        self._authorise(request)
        with self.load.one("/tokenize"):
            body = await _read_json(request)
            _check_messages(body)
            self._model(body.get("model"), embeddings=False)
            count = text.prompt_tokens(body["messages"])
            return web.json_response({"count": count, "tokens": list(range(count))})

    def _vectors(
        self, body: dict[str, Any], inputs: list[str], model: SimulatedModel, behaviour: Behaviour
    ) -> dict[str, Any]:
        dimensions = body.get("dimensions") or self._settings.dimensions
        if not isinstance(dimensions, int) or not 0 < dimensions <= 4096:
            raise _RefusalError(400, "dimensions must be 1 to 4096")
        coded = body.get("encoding_format") == "base64"
        vectors = [text.embedding(each, dimensions) for each in inputs]
        answer: dict[str, Any] = {
            "object": "list",
            "model": model.name,
            "system_fingerprint": FINGERPRINT,
            "data": [
                {
                    "object": "embedding",
                    "index": place,
                    "embedding": text.as_base64(vector) if coded else list(vector),
                }
                for place, vector in enumerate(vectors)
            ],
        }
        if behaviour.usage:
            tokens = sum(map(text.count_tokens, inputs))
            answer["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
        return answer

    # ---------------------------------------------------------------- admission

    @web.middleware
    async def _answer_refusals(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except _RefusalError as refusal:
            self.load.refused += 1
            return refusal.response()
        except (asyncio.CancelledError, ConnectionError):
            self.load.cancelled += 1
            raise

    def _authorise(self, request: web.Request) -> None:
        key = self._settings.api_key.get_secret_value()
        if key and request.headers.get("Authorization") != f"Bearer {key}":
            raise _RefusalError(401, "Incorrect API key provided", "invalid_api_key")

    def _model(self, name: object, *, embeddings: bool | None = None) -> SimulatedModel:
        model = self._models.get(name) if isinstance(name, str) else None
        if model is None:
            raise _RefusalError(
                404, f"The model '{name}' does not exist", "model_not_found", "model"
            )
        if embeddings is not None and model.embeddings is not embeddings:
            raise _RefusalError(400, f"{model.name} cannot do this", "unsupported_model", "model")
        return model

    def _admit(self, request: web.Request, prompt: str) -> Behaviour:
        """How to answer.

        Raises:
            _RefusalError: the request is one too many, or is to fail.
        """
        try:
            behaviour = self._faults.behaviour(prompt, request.headers.get(HEADER, ""))
        except DirectiveError as error:
            raise _RefusalError(400, str(error), "unknown_directive") from error
        most = self._settings.max_concurrent
        if most and self.load.running > most:
            raise _RefusalError(429, f"more than {most} requests at a time", retry_after=1.0)
        if behaviour.error:
            raise _RefusalError(
                behaviour.error, "simulated error", "simulated", retry_after=behaviour.retry_after
            )
        return behaviour


async def run(settings: SimulatorSettings) -> None:
    """Serves until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        async with Simulator(settings):
            await stop.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


class _RefusalError(Exception):
    """A request that is answered with an HTTP error in the form of the OpenAI API."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        *,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self._status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self._body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self._headers = {} if retry_after is None else {"Retry-After": f"{retry_after:g}"}

    def response(self) -> web.Response:
        return web.json_response(self._body, status=self._status, headers=self._headers)


async def _say_what_answers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(request.app[RESPONSE_HEADERS])


async def _read_json(request: web.Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.read())
    except ValueError as error:
        raise _RefusalError(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise _RefusalError(400, "the body must be an object")
    return body


def _check_messages(body: dict[str, Any]) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _RefusalError(400, "messages must be a non-empty list", param="messages")
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise _RefusalError(400, f"messages[{place}].role is not known", param="messages")
    for place, tool in enumerate(body.get("tools") or ()):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _RefusalError(400, f"tools[{place}].function.name is missing", param="tools")


def _inputs(body: dict[str, Any]) -> list[str]:
    given = body.get("input")
    inputs = [given] if isinstance(given, str) else given
    if not isinstance(inputs, list) or not inputs or not all(isinstance(i, str) for i in inputs):
        raise _RefusalError(400, "input must be a text or a non-empty list of texts", param="input")
    return inputs


def _model_object(model: SimulatedModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": 0, "owned_by": FINGERPRINT}
