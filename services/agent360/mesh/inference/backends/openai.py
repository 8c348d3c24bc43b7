"""A model server that speaks the OpenAI API, over aiohttp."""

from __future__ import annotations

import asyncio
import contextlib
import json
from array import array
from collections.abc import AsyncIterator
from typing import Any, Final

import aiohttp

from agent360.client.errors import MeshError
from agent360.mesh.inference.answers import Ending, FinishReason, Piece, Usage
from agent360.mesh.inference.backends import openai_errors as errors
from agent360.mesh.inference.backends import openai_format as form
from agent360.mesh.inference.backends.sse import EventParser
from agent360.mesh.inference.conversation import EmbeddingInputs, Prompt
from agent360.mesh.inference.ports import Sink
from agent360.mesh.inference.settings import BackendSettings

_MAX_ERROR_BYTES: Final = 64 * 2**10
_JSON_OVERHEAD: Final = 4
"""A JSON answer may be this much larger than its text: escapes, and what else is in it."""
_LINGER_S: Final = 0.1
_TRIES_ON_A_DEAD_CONNECTION: Final = 2

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
        self._session: aiohttp.ClientSession | None = None

    @property
    def name(self) -> str:
        """See ``Backend.name``."""
        return self._settings.name

    async def start(self) -> None:
        """See ``Backend.start``."""
        settings = self._settings
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=settings.max_connections, keepalive_timeout=60),
            headers={"Authorization": f"Bearer {self._key}"} if self._key else None,
            timeout=aiohttp.ClientTimeout(
                total=settings.try_timeout_s,
                sock_connect=settings.connect_timeout_s,
                sock_read=settings.stall_timeout_s,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """See ``Backend.close``."""
        if self._session is not None:
            await self._session.close()
            self._session = None

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
        body = form.chat_body(
            prompt, model, streamed=streamed, max_tokens_field=self._settings.max_tokens_field
        )
        async with self._ask("POST", "/chat/completions", body) as response:
            if streamed and "json" not in response.content_type:
                return await self._read_stream(response, sink)
            # Some servers answer whole whatever they are asked for.
            return self._read_whole(await self._read_json(response), sink)

    async def embed(
        self, request: EmbeddingInputs, model: str
    ) -> tuple[list[array[float]], Usage | None]:
        """See ``Backend.embed``."""
        body = form.embedding_body(request, model)
        async with self._ask("POST", "/embeddings", body) as response:
            found = await self._read_json(response)
        try:
            rows = sorted(found["data"], key=lambda row: row["index"])
            vectors = [form.read_vector(row["embedding"]) for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise errors.malformed(self.name, repr(error)) from error
        if len(vectors) != len(request.inputs):
            raise errors.malformed(
                self.name, f"{len(vectors)} vectors for {len(request.inputs)} texts"
            )
        return vectors, form.read_usage(found.get("usage"))

    # ---------------------------------------------------------------- connection

    @contextlib.asynccontextmanager
    async def _ask(
        self, method: str, path: str, body: Any = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A successful answer, while it is read; whatever fails is a MeshError."""
        response: aiohttp.ClientResponse | None = None
        try:
            response = await self._open(method, path, body)
            if response.status >= 300:
                said = await response.content.read(_MAX_ERROR_BYTES)
                raise errors.from_response(
                    self.name, response.status, response.headers, said, self._key
                )
            yield response
        except MeshError:
            # Before the others: some errors of the mesh are ConnectionErrors and TimeoutErrors too.
            raise
        except aiohttp.ConnectionTimeoutError as error:
            raise errors.unreachable(self.name, "no connection in time") from error
        except aiohttp.ServerTimeoutError as error:
            raise errors.stalled(self.name, self._settings.stall_timeout_s) from error
        except TimeoutError as error:
            raise errors.timed_out(self.name, self._settings.try_timeout_s) from error
        except aiohttp.ClientConnectorError as error:
            raise errors.unreachable(self.name, str(error.os_error or error)) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise errors.broke(self.name, _describe(error), self._key) from error
        finally:
            # Closing an answer that was read to its end keeps the connection, any other ends it.
            if response is not None:
                response.close()

    async def _open(self, method: str, path: str, body: Any) -> aiohttp.ClientResponse:
        """Sends the request and waits for the answer's head.

        A kept connection may have died since its last use; then nothing of an answer has come, and
        the request is sent once more.
        """
        if self._session is None:
            raise errors.unreachable(self.name, "the backend is not started")
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        for tries_left in reversed(range(_TRIES_ON_A_DEAD_CONNECTION)):
            try:
                return await self._session.request(
                    method,
                    self._url + path,
                    data=data,
                    headers={"Content-Type": "application/json"} if data else None,
                    allow_redirects=False,
                )
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if not tries_left:
                    raise
        raise AssertionError("unreachable")

    async def _read_json(self, response: aiohttp.ClientResponse) -> dict[str, Any]:
        received = bytearray()
        async for data in response.content.iter_any():
            received += data
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
        try:
            choice = found["choices"][0]
            pieces = form.read_delta(choice["message"])
            ending = Ending(
                form.read_finish(choice.get("finish_reason")) or "stop",
                form.read_usage(found.get("usage")),
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise errors.malformed(self.name, repr(error)) from error
        if pieces:
            sink(pieces)
        return ending

    async def _read_stream(self, response: aiohttp.ClientResponse, sink: Sink) -> Ending:
        parser = EventParser(self._max_bytes)
        state = _StreamState(self.name, self._key)
        async for data in response.content.iter_any():
            try:
                events = parser.feed(data)
            except ValueError as error:
                raise errors.malformed(self.name, str(error)) from error
            self._take(events, state, sink)
            if state.done:
                break
        else:
            self._take(parser.finish(), state, sink)
        if not state.done and state.finish is None:
            raise errors.broke(self.name, "the stream ended without a finish reason")
        if state.done:
            # The end of the body mostly follows at once; after it the connection can be kept.
            with contextlib.suppress(TimeoutError, aiohttp.ClientError):
                async with asyncio.timeout(_LINGER_S):
                    await response.content.read()
        return Ending(state.finish or "stop", state.usage)

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

    __slots__ = ("_backend", "_secret", "done", "finish", "usage")

    def __init__(self, backend: str, secret: str) -> None:
        self._backend = backend
        self._secret = secret
        self.done = False
        self.finish: FinishReason | None = None
        self.usage: Usage | None = None

    def read(self, event: bytes, pieces: list[Piece]) -> None:
        if event == b"[DONE]":
            self.done = True
            return
        try:
            chunk = _decode(event.decode())
            if chunk.get("error"):
                raise errors.broke(self._backend, errors.error_text(chunk["error"]), self._secret)
            if chunk.get("usage"):
                self.usage = form.read_usage(chunk["usage"])
            for choice in chunk.get("choices") or ():
                delta = choice.get("delta")
                if delta:
                    pieces += form.read_delta(delta)
                if choice.get("finish_reason") is not None:
                    self.finish = form.read_finish(choice["finish_reason"])
        except MeshError:
            raise
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise errors.malformed(self._backend, repr(error)) from error


def _describe(error: BaseException) -> str:
    """An error without the request that it may hold."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
