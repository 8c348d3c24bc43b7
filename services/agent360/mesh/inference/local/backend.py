"""A model that runs in this process, behind the port of backends."""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import Sequence

import grpc
import structlog

from agent360.client.errors import MeshError, UnavailableError
from agent360.mesh.inference.answers import Ending, FinishReason, Piece, Usage
from agent360.mesh.inference.backends import openai_errors as errors
from agent360.mesh.inference.backends import openai_format as form
from agent360.mesh.inference.conversation import EmbeddingInputs, Prompt
from agent360.mesh.inference.local.engine import Event, LocalEngine
from agent360.mesh.inference.local.settings import LocalEngineSettings
from agent360.mesh.inference.ports import Sink


class LocalBackend:
    """The port ``Backend`` over llama.cpp in this process.

    The model is loaded in the background once the backend is started; until then the backend
    answers UNAVAILABLE, so that another one is asked.

    Example:
        >>> backend = LocalBackend(LocalEngineSettings(path=Path("model.gguf")), log)
        >>> await backend.start()
        >>> ending = await backend.generate(prompt, "model", print, streamed=True)
    """

    def __init__(self, settings: LocalEngineSettings, log: structlog.stdlib.BoundLogger) -> None:
        self._settings = settings
        self._log = log
        self._engine = LocalEngine(settings)
        self._loading: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """See ``Backend.name``."""
        return self._settings.name

    async def start(self) -> None:
        """See ``Backend.start``; the model is being loaded when it returns."""
        self._loading = asyncio.create_task(self._load())

    async def close(self) -> None:
        """See ``Backend.close``."""
        if self._loading is not None:
            # Loading cannot be interrupted: it is waited for, then what it loaded is freed.
            with contextlib.suppress(MeshError):
                await self._loading
            await self._engine.close()

    async def list_models(self) -> list[str]:
        """See ``Backend.list_models``."""
        self._ready()
        return [self._settings.listed_as]

    async def generate(self, prompt: Prompt, model: str, sink: Sink, *, streamed: bool) -> Ending:  # noqa: ARG002
        """See ``Backend.generate``; pieces are handed over as they come, ``streamed`` or not.

        Raises:
            MeshError: FAILED_PRECONDITION, if it makes vectors only.
        """
        self._ready()
        if self._settings.embeddings:
            raise self._lacks("chat: it is set to make vectors")
        # Streamed in any case: between pieces is when llama.cpp asks whether to go on.
        body = form.chat_body(prompt, model, streamed=True, max_tokens_field="max_tokens")
        reader = _Reader(sink)
        await self._engine.chat(body, reader.take)
        if reader.finish is None:
            raise errors.broke(self.name, "the answer has no end")
        return Ending(reader.finish, reader.usage)

    async def embed(
        self, request: EmbeddingInputs, model: str
    ) -> tuple[Sequence[array[float]], Usage | None]:
        """See ``Backend.embed``.

        Raises:
            MeshError: FAILED_PRECONDITION, if it chats only.
        """
        self._ready()
        if not self._settings.embeddings:
            raise self._lacks("embeddings: it is set to chat")
        if request.dimensions:
            raise self._lacks("vectors of another length than its own; leave dimensions out")
        found = await self._engine.embed(form.embedding_body(request, model))
        rows = sorted(found["data"], key=lambda row: row["index"])
        vectors = [form.read_vector(row["embedding"]) for row in rows]
        return vectors, form.read_usage(found.get("usage"))

    async def count_tokens(self, prompt: Prompt, model: str) -> int | None:
        """See ``Backend.count_tokens``: the model's own count, its chat template included."""
        self._ready()
        body = form.chat_body(prompt, model, streamed=False, max_tokens_field="max_tokens")
        templated = await self._engine.ask("/apply-template", body)
        tokens = await self._engine.ask(
            "/tokenize", {"content": templated["prompt"], "add_special": True}
        )
        return len(tokens["tokens"])

    async def _load(self) -> None:
        began = asyncio.get_running_loop().time()
        try:
            await self._engine.load()
        except MeshError as error:
            self._log.exception(
                "model not loaded", backend=self.name, reason=error.reason, error=error.message
            )
            raise
        self._log.info(
            "model loaded",
            backend=self.name,
            path=str(self._settings.path),
            seconds=round(asyncio.get_running_loop().time() - began, 3),
        )

    def _ready(self) -> None:
        """Raises what became of loading, unless the model is there."""
        if self._loading is None or not self._loading.done():
            raise UnavailableError(
                f"backend {self.name} is loading its model",
                reason="ENGINE_LOADING",
                metadata={"backend": self.name},
            )
        self._loading.result()

    def _lacks(self, what: str) -> MeshError:
        return MeshError(
            grpc.StatusCode.FAILED_PRECONDITION,
            "UPSTREAM_LACKS_FEATURE",
            f"backend {self.name} does not do {what}",
            metadata={"backend": self.name},
        )


class _Reader:
    """Reads the events of one answer."""

    __slots__ = ("_sink", "finish", "usage")

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.finish: FinishReason | None = None
        self.usage: Usage | None = None

    def take(self, events: list[Event]) -> None:
        """Reads events that came together."""
        pieces: list[Piece] = []
        for event in events:
            if event.get("usage"):
                self.usage = form.read_usage(event["usage"])
            for choice in event.get("choices") or ():
                pieces += form.read_delta(choice.get("delta") or {})
                if choice.get("logprobs"):
                    pieces += form.read_logprobs(choice["logprobs"])
                if choice.get("finish_reason") is not None:
                    self.finish = form.read_finish(choice["finish_reason"])
        if pieces:
            self._sink(pieces)
