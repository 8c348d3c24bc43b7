"""A model server that speaks the OpenAI API."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from array import array
from collections.abc import AsyncIterator
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from agent360.client.errors import MeshError
from agent360.mesh.inference.answers import Ending, FinishReason, Piece, ToolCallPiece, Usage
from agent360.mesh.inference.backends import http1
from agent360.mesh.inference.backends import openai_errors as errors
from agent360.mesh.inference.backends import openai_format as form
from agent360.mesh.inference.backends.sse import EventParser
from agent360.mesh.inference.backends.token_counts import TokenCounts
from agent360.mesh.inference.conversation import EmbeddingInputs, Prompt
from agent360.mesh.inference.ports import Sink
from agent360.mesh.inference.settings import BackendSettings

_MAX_ERROR_BYTES: Final = 64 * 2**10
_JSON_OVERHEAD: Final = 4
"""A JSON answer may be this much larger than its text: escapes, and what else is in it."""
_LINGER_S: Final = 0.1
_DEAD_CONNECTION_S: Final = 0.1
"""A kept connection that has died is noticed within this, in seconds."""

_encode: Final = json.JSONEncoder(separators=(",", ":")).encode
_decode: Final = json.JSONDecoder().decode
"""Reads a text; ``json.loads`` would first guess the encoding of bytes, for every token."""


class OpenAIBackend:
    """A model server behind ``/chat/completions``, ``/embeddings`` and ``/models``.

    Connections are kept and bounded in number. The key is sent to the server and shown nowhere.

    Example:
        >>> backend = OpenAIBackend(BackendSettings(url="http://127.0.0.1:8000/v1"))
        >>> await backend.start()
        >>> ending = await backend.generate(prompt, "llama", print, streamed=True)
    """

    def __init__(self, settings: BackendSettings, *, max_answer_bytes: int = 4 * 2**20) -> None:
        self._settings = settings
        self._url = settings.url.rstrip("/")
        self._key = settings.key()
        self._max_bytes = max_answer_bytes * _JSON_OVERHEAD
        self._path = urlsplit(self._url).path
        self._headers = self._headers_of_requests()
        self._server: http1.HttpServer | None = None
        self._counts = TokenCounts(self._post_to_root)

    @property
    def name(self) -> str:
        """See ``Backend.name``."""
        return self._settings.name

    async def start(self) -> None:
        """See ``Backend.start``."""
        settings = self._settings
        self._server = http1.HttpServer(
            self._url,
            most=settings.max_connections,
            connect_timeout_s=settings.connect_timeout_s,
        )

    async def close(self) -> None:
        """See ``Backend.close``."""
        if self._server is not None:
            await self._server.close()
            self._server = None

    async def list_models(self) -> list[str]:
        """See ``Backend.list_models``."""
        async with self._ask("GET", "/models") as response:
            found = await self._read_json(response)
        models = found.get("data")
        if not isinstance(models, list):
            raise errors.malformed(self.name, "the list of models has no data")
        return [str(model["id"]) for model in models if isinstance(model, dict) and "id" in model]

    async def generate(self, prompt: Prompt, model: str, sink: Sink, *, streamed: bool) -> Ending:
        """See ``Backend.generate``."""
        settings = self._settings
        body = form.chat_body(
            prompt,
            model,
            streamed=streamed,
            max_tokens_field=settings.max_tokens_field,
            stream_usage=settings.stream_usage,
            schema_form=settings.schema_form,
        )
        # What comes whole says nothing until it is done.
        stall_s = settings.stall_timeout_s if streamed else None
        async with self._ask("POST", "/chat/completions", body, stall_s=stall_s) as response:
            if streamed and "json" not in response.headers.get("content-type", ""):
                return await self._read_stream(response, sink)
            # Some servers answer whole whatever they are asked for.
            return self._read_whole(await self._read_json(response), sink)

    async def embed(
        self, request: EmbeddingInputs, model: str
    ) -> tuple[list[array[float]], Usage | None]:
        """See ``Backend.embed``."""
        body = form.embedding_body(request, model, self._settings.embedding_encoding)
        async with self._ask("POST", "/embeddings", body) as response:
            found = await self._read_json(response)
        try:
            if "data" not in found:
                raise self._no_answer(found)
            rows = sorted(found["data"], key=lambda row: row.get("index", 0))
            vectors = [form.read_vector(row["embedding"]) for row in rows]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise errors.malformed(self.name, repr(error)) from error
        if len(vectors) != len(request.inputs):
            raise errors.malformed(
                self.name, f"{len(vectors)} vectors for {len(request.inputs)} texts"
            )
        return vectors, form.read_usage(found.get("usage"))

    async def count_tokens(self, prompt: Prompt, model: str) -> int | None:
        """See ``Backend.count_tokens``."""
        return await self._counts.of_prompt(prompt, model)

    # ---------------------------------------------------------------- connection

    async def _post_to_root(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What a server offers beside the OpenAI API stands beside ``/v1``, not below it."""
        root = self._path.removesuffix("/v1")
        async with self._ask("POST", path, body, root=root) as response:
            return await self._read_json(response)

    def _headers_of_requests(self) -> dict[str, str]:
        headers = {
            "Accept": "*/*",
            "User-Agent": "agent360-mesh",
            "Content-Type": "application/json",
        }
        parts = urlsplit(self._url)
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        elif parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        return headers

    @contextlib.asynccontextmanager
    async def _ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        root: str | None = None,
        stall_s: float | None = None,
    ) -> AsyncIterator[http1.Response]:
        """A successful answer, while it is read; whatever fails is a MeshError."""
        response: http1.Response | None = None
        try:
            path = (self._path if root is None else root) + path
            response = await self._open(method, path, body, stall_s)
            if response.status >= 300:
                said = (await response.read(_MAX_ERROR_BYTES))[:_MAX_ERROR_BYTES]
                raise errors.from_response(
                    self.name, response.status, response.headers, said, self._key
                )
            yield response
        except http1.NoConnectionError as error:
            raise errors.unreachable(self.name, str(error)) from error
        except http1.StalledError as error:
            raise errors.stalled(self.name, self._settings.stall_timeout_s) from error
        except http1.LateError as error:
            raise errors.timed_out(self.name, self._settings.try_timeout_s) from error
        except http1.NotHttpError as error:
            raise errors.malformed(self.name, str(error)) from error
        except http1.HttpError as error:
            raise errors.broke(self.name, str(error), self._key) from error
        finally:
            # Closing an answer that was read to its end keeps the connection, any other ends it.
            if response is not None:
                response.close()

    async def _open(
        self, method: str, path: str, body: Any, stall_s: float | None
    ) -> http1.Response:
        """Sends the request and waits for the answer's head.

        A kept connection may have died since its last use; then nothing of an answer has come, and
        the request is sent once more.
        """
        server = self._server
        if server is None:
            raise errors.unreachable(self.name, "the backend is not started")
        data = b"" if body is None else _encode(body).encode()
        headers, within_s, began = self._headers, self._settings.try_timeout_s, time.monotonic()
        try:
            return await server.ask(method, path, headers, data, within_s=within_s, stall_s=stall_s)
        except http1.DeadConnectionError:
            # Later than that it is not the connection that died, but the server at its work.
            if time.monotonic() - began > _DEAD_CONNECTION_S:
                raise
        return await server.ask(
            method, path, headers, data, within_s=within_s, stall_s=stall_s, fresh=True
        )

    async def _read_json(self, response: http1.Response) -> dict[str, Any]:
        received = await response.read(self._max_bytes)
        if len(received) > self._max_bytes:
            raise errors.malformed(self.name, f"more than {self._max_bytes:,} bytes")
        try:
            found = json.loads(received)
        except ValueError as error:
            raise errors.malformed(self.name, str(error)) from error
        if not isinstance(found, dict):
            raise errors.malformed(self.name, f"a {type(found).__name__} instead of an object")
        return found

    # ---------------------------------------------------------------- answers

    def _read_whole(self, found: dict[str, Any], sink: Sink) -> Ending:
        if not found.get("choices"):
            raise self._no_answer(found)
        try:
            choice = found["choices"][0]
            pieces = form.read_delta(choice["message"])
            called = any(isinstance(piece, ToolCallPiece) for piece in pieces)
            if choice.get("logprobs"):
                pieces += form.read_logprobs(choice["logprobs"])
            if choice.get("finish_reason") in form.BROKEN:
                raise errors.broke(self.name, "it ended with an error of its own")
            ending = Ending(
                _finish(form.read_finish(choice.get("finish_reason")), called=called),
                form.read_usage(found.get("usage"), found.get("timings")),
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise errors.malformed(self.name, repr(error)) from error
        if pieces:
            sink(pieces)
        return ending

    def _no_answer(self, found: dict[str, Any]) -> MeshError:
        """The error of an answer that is none though its HTTP status says success."""
        if found.get("error") or found.get("object") == "error":
            return errors.from_answer(self.name, found, self._key)
        return errors.malformed(self.name, f"it has only {', '.join(found) or 'nothing'}")

    async def _read_stream(self, response: http1.Response, sink: Sink) -> Ending:
        parser = EventParser(self._max_bytes)
        state = _StreamState(self.name, self._key)
        try:
            while data := await response.read_some():
                try:
                    events = parser.feed(data)
                except ValueError as error:
                    raise errors.malformed(self.name, str(error)) from error
                self._take(events, state, sink)
                if state.done:
                    break
            else:
                self._take(parser.finish(), state, sink)
        except http1.HttpError:
            # What breaks after the end of the answer takes nothing from it but the usage.
            if state.finish is None:
                raise
        if not state.done and state.finish is None:
            raise errors.broke(self.name, "the stream ended without a finish reason")
        if state.done and not response.done:
            # The end of the body mostly follows at once; after it the connection can be kept.
            with contextlib.suppress(TimeoutError, http1.HttpError):
                async with asyncio.timeout(_LINGER_S):
                    await response.read(_MAX_ERROR_BYTES)
        return Ending(_finish(state.finish, called=state.called), state.usage)

    def _take(self, events: list[bytes], state: _StreamState, sink: Sink) -> None:
        """Hands the pieces of events that came together to the sink together."""
        pieces: list[Piece] = []
        try:
            for event in events:
                state.read(event, pieces)
        finally:
            if pieces:
                sink(pieces)


class _StreamState:
    """What a stream has said besides text."""

    __slots__ = ("_backend", "_secret", "called", "done", "finish", "usage")

    def __init__(self, backend: str, secret: str) -> None:
        self._backend = backend
        self._secret = secret
        self.called = False
        """Whether there were tool calls."""
        self.done = False
        self.finish: FinishReason | None = None
        self.usage: Usage | None = None

    def read(self, event: bytes, pieces: list[Piece]) -> None:
        if event == b"[DONE]":
            self.done = True
            return
        try:
            chunk = _decode(event.decode())
            if chunk.get("error") or chunk.get("object") == "error":
                raise errors.from_answer(self._backend, chunk, self._secret)
            if chunk.get("usage") or chunk.get("timings"):
                self.usage = form.read_usage(chunk.get("usage"), chunk.get("timings"))
            for choice in chunk.get("choices") or ():
                delta = choice.get("delta")
                if delta:
                    pieces += form.read_delta(delta)
                    self.called = self.called or bool(delta.get("tool_calls"))
                if choice.get("logprobs"):
                    pieces += form.read_logprobs(choice["logprobs"])
                reason = choice.get("finish_reason")
                if reason:
                    if reason in form.BROKEN:
                        raise errors.broke(self._backend, f"it ended with {reason!r}")
                    self.finish = form.read_finish(reason)
        except MeshError:
            raise
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise errors.malformed(self._backend, repr(error)) from error


def _finish(reason: FinishReason | None, *, called: bool) -> FinishReason:
    """Why an answer ended; some servers say ``stop`` of one that calls tools."""
    return "tool_calls" if called and reason in ("stop", None) else reason or "stop"
