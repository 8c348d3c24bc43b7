"""A llama.cpp engine in this process: loading it, and its answers as they come."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import secrets
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import aiohttp
import grpc

from agent360.client.errors import MeshError, UnavailableError
from agent360.mesh.inference.backends import openai_errors as errors
from agent360.mesh.inference.local.settings import LocalEngineSettings

Event = Mapping[str, Any]
"""A chunk of an answer, in the form of the OpenAI API."""

Take = Callable[[list[Event]], None]
"""Gets the events that came together, on the event loop. May raise to end the answer."""

_QUIET: Final = 0
_LISTENER_TIMEOUT: Final = aiohttp.ClientTimeout(total=10)


class LocalEngine:
    """llama.cpp with one model, asked from an event loop.

    An answer occupies a thread, which sleeps outside of Python's lock while llama.cpp computes, and
    hands what comes to the loop, all that came together at once. llama.cpp generates ``parallel``
    answers in one continuous batch; further ones wait in it.

    llama.cpp's server also listens for HTTP, which cannot be turned off: here it listens on a
    socket in a directory of this user alone, and asks for a key that nobody else knows.
    """

    def __init__(self, settings: LocalEngineSettings) -> None:
        self._settings = settings
        self._server: Any = None
        self._answers: set[_Answer] = set()
        self._threads = ThreadPoolExecutor(
            settings.parallel + 1, thread_name_prefix=f"llama-{settings.name}"
        )
        self._key = secrets.token_urlsafe(32)
        self._directory: Path | None = None
        self._listener: aiohttp.ClientSession | None = None

    async def load(self) -> None:
        """Loads the model.

        Raises:
            MeshError: the extra is not installed, or the file is no model that llama.cpp can run.
        """
        try:
            self._server = await asyncio.to_thread(self._load)
        except ImportError as error:
            raise _refused(
                self._settings.name,
                "ENGINE_NOT_INSTALLED",
                "llama.cpp is not installed: pip install 'agent360-mesh[local]'",
            ) from error
        except (RuntimeError, ValueError, OSError) as error:
            raise _refused(
                self._settings.name,
                "ENGINE_NOT_LOADED",
                f"{self._settings.path} cannot be loaded: {error}",
            ) from error
        path = f"{self._directory}/{_SOCKET}"
        self._listener = aiohttp.ClientSession(
            "http://llama",
            connector=aiohttp.UnixConnector(path),
            headers={"Authorization": f"Bearer {self._key}"},
            timeout=_LISTENER_TIMEOUT,
        )

    async def close(self) -> None:
        """Ends what is being generated and frees the model."""
        for answer in self._answers:
            answer.stop()
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        if self._listener is not None:
            await self._listener.close()
        server, self._server = self._server, None
        # The model is freed by the last reference to it: on a thread, for that takes its time.
        await asyncio.to_thread(_free, [server])
        del server
        if self._directory is not None:
            await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    async def chat(self, body: Mapping[str, Any], take: Take) -> None:
        """Generates an answer; cancelling it frees its place in the batch at the next token.

        Raises:
            MeshError: llama.cpp refused the request or failed.
            Exception: what ``take`` raised.
        """
        server = self._loaded()
        answer = _Answer(self._settings.name, take)
        self._answers.add(answer)
        try:
            running = asyncio.get_running_loop().run_in_executor(
                self._threads, answer.run, server.handle_chat_completions, dict(body)
            )
            try:
                await asyncio.shield(running)
            except asyncio.CancelledError:
                answer.stop()
                running.cancel()
                raise
            answer.finish()
        finally:
            self._answers.discard(answer)

    async def embed(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Turns texts into vectors.

        Raises:
            MeshError: llama.cpp refused the request or failed.
        """
        server = self._loaded()
        try:
            found = await asyncio.get_running_loop().run_in_executor(
                self._threads, server.handle_embeddings, dict(body)
            )
        except (ValueError, RuntimeError, TypeError) as error:
            raise _unanswerable(self._settings.name, error) from error
        if "error" in found:
            raise _from_event(self._settings.name, found["error"])
        return dict(found)

    async def ask(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Asks llama.cpp for what its Python binding does not offer.

        Raises:
            MeshError: llama.cpp refused the request or failed.
        """
        self._loaded()
        assert self._listener is not None  # noqa: S101 - opened when the model was loaded
        try:
            async with self._listener.post(path, json=body) as response:
                data = await response.read()
                if response.status >= 300:
                    raise errors.from_response(
                        self._settings.name, response.status, response.headers, data, self._key
                    )
                found = await response.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise errors.unreachable(self._settings.name, str(error)) from error
        return dict(found)

    def _loaded(self) -> Any:
        if self._server is None:
            raise UnavailableError(
                f"backend {self._settings.name} has not loaded its model",
                reason="ENGINE_LOADING",
                metadata={"backend": self._settings.name},
            )
        return self._server

    def _load(self) -> Any:
        # A hundred megabytes that most installations do without; it has no types.
        xllamacpp: Any = importlib.import_module("xllamacpp")
        settings = self._settings
        if not settings.path.is_file():
            raise FileNotFoundError(2, "there is no such file")
        self._directory = Path(tempfile.mkdtemp(prefix="agent360-llama-"))
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(settings.path)
        parameters.model_alias = {settings.listed_as}
        parameters.n_parallel = settings.parallel
        parameters.n_ctx = settings.context_tokens * settings.parallel
        parameters.n_gpu_layers = settings.gpu_layers
        parameters.flash_attn_type = _flash_attention(parameters.flash_attn_type, settings)
        # Threads wait for each other by spinning: one whose core is taken holds all of them up.
        threads = settings.threads or max(1, (os.cpu_count() or 1) - 1)
        parameters.cpuparams.n_threads = threads
        parameters.cpuparams_batch.n_threads = threads
        parameters.warmup = settings.warm_up
        parameters.verbosity = _QUIET
        parameters.hostnames = [f"{self._directory}/{_SOCKET}"]
        parameters.api_keys = [self._key]
        parameters.endpoint_slots = False
        if settings.embeddings:
            parameters.embedding = True
            pooling = type(parameters.pooling_type)
            parameters.pooling_type = getattr(
                pooling, f"LLAMA_POOLING_TYPE_{settings.pooling.upper()}"
            )
        return xllamacpp.Server(parameters)


_SOCKET: Final = "llama.sock"


class _Answer:
    """One answer on its way from the thread of llama.cpp to the loop.

    Events are appended by the thread and taken by the loop. ``_scheduled`` says whether the loop
    has been told: while it has not come round, what else arrives goes along.
    """

    __slots__ = (
        "_backend",
        "_events",
        "_lock",
        "_loop",
        "_scheduled",
        "_take",
        "failure",
        "stopped",
    )

    def __init__(self, backend: str, take: Take) -> None:
        self._backend = backend
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._lock = threading.Lock()
        self._scheduled = False
        self.stopped = False
        self.failure: Exception | None = None

    def stop(self) -> None:
        """Has llama.cpp end the answer at its next token."""
        self.stopped = True

    def finish(self) -> None:
        """Hands over the rest, on the loop.

        Raises:
            Exception: what the answer failed with.
        """
        self._hand_over()
        if self.failure is not None:
            raise self.failure

    def run(self, handle: Callable[[dict[str, Any], Any], None], body: dict[str, Any]) -> None:
        """Generates the answer, on a thread."""
        if self.stopped:
            return
        try:
            handle(body, self._came)
        except (ValueError, RuntimeError, TypeError) as error:
            self.failure = self.failure or _unanswerable(self._backend, error)

    def _came(self, event: Event) -> bool:
        """Called by llama.cpp for each event, on the thread; True ends the answer.

        It must not raise: llama.cpp's binding would swallow that and go on.
        """
        if self.stopped:
            return True
        with self._lock:
            self._events.append(event)
            scheduled, self._scheduled = self._scheduled, True
        if not scheduled:
            try:
                self._loop.call_soon_threadsafe(self._hand_over)
            except RuntimeError:
                # The loop is closed: nobody waits any more.
                self.stopped = True
        return self.stopped

    def _hand_over(self) -> None:
        with self._lock:
            events = list(self._events)
            self._events.clear()
            self._scheduled = False
        if not events or self.failure is not None or self.stopped:
            return
        refusal = events.pop()["error"] if "error" in events[-1] else None
        try:
            if events:
                self._take(events)
        except Exception as error:  # noqa: BLE001 - raised by chat()
            self.failure, self.stopped = error, True
        if refusal is not None and self.failure is None:
            self.failure, self.stopped = _from_event(self._backend, refusal), True


def _flash_attention(kind: Any, settings: LocalEngineSettings) -> Any:
    """The engine's own value for the setting; ``kind`` is a value of its enumeration."""
    wanted = settings.flash_attention
    if wanted == "auto":
        wanted = "on" if settings.gpu_layers else "off"
    disabled, enabled = 0, 1
    return type(kind)(enabled if wanted == "on" else disabled)


def _free(holder: list[Any]) -> None:
    with suppress(IndexError):
        holder.pop()


def _from_event(backend: str, error: Mapping[str, Any]) -> MeshError:
    status = int(error.get("code") or 500)
    return errors.from_response(backend, status, {}, json.dumps({"error": error}).encode(), "")


def _unanswerable(backend: str, error: Exception) -> MeshError:
    return MeshError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "UPSTREAM_REFUSED",
        f"backend {backend} cannot answer this request: {error}"[:1000],
        metadata={"backend": backend},
    )


def _refused(backend: str, reason: str, message: str) -> MeshError:
    return MeshError(
        grpc.StatusCode.FAILED_PRECONDITION, reason, message, metadata={"backend": backend}
    )
