"""What the inference service needs from outside: model servers, a cache, limits, a meter."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

from agent360.mesh.inference.answers import Ending, Piece, Source, Usage
from agent360.mesh.inference.conversation import EmbeddingInputs, Prompt

Sink = Callable[[Sequence[Piece]], None]
"""Takes pieces of an answer, those together that came together. May raise to end the answer."""


class Backend(Protocol):
    """A model server."""

    @property
    def name(self) -> str:
        """Its name in the settings."""

    async def start(self) -> None:
        """Makes ready to connect; does not yet ask whether the server is there."""

    async def close(self) -> None:
        """Closes its connections."""

    async def list_models(self) -> list[str]:
        """The names under which the server offers models.

        Raises:
            MeshError: the server does not answer, or with an error.
        """

    async def generate(self, prompt: Prompt, model: str, sink: Sink, *, streamed: bool) -> Ending:
        """Runs a model; cancelling it closes the connection, which stops the server.

        Args:
            prompt: what to answer.
            model: the server's name of the model.
            sink: gets the pieces of the answer as they come, or all at once.
            streamed: whether pieces are wanted as they come.

        Raises:
            MeshError: the server could not be reached, refused, broke off or fell silent.
        """

    async def embed(
        self, request: EmbeddingInputs, model: str
    ) -> tuple[Sequence[array[float]], Usage | None]:
        """Turns texts into vectors, in their order.

        Raises:
            MeshError: as ``generate``.
        """


class AnswerCache(Protocol):
    """Keeps answers, apart for each tenant. Never raises: without it, models are run."""

    async def get(self, tenant: str, namespace: str, key: str) -> bytes | None:
        """The kept answer, or None."""

    async def put(self, tenant: str, namespace: str, key: str, value: bytes, ttl_s: float) -> None:
        """Keeps an answer."""


class Quota(Protocol):
    """Limits of requests and tokens."""

    async def admit(self, tenant: str, model: str, user: str) -> None:
        """Charges one request.

        Raises:
            RateLimitedError: a limit denies it.
        """

    async def reserve(self, tenant: str, model: str, user: str, tokens: int) -> str:
        """Sets tokens aside.

        Returns:
            What to settle later; empty if there is nothing to settle.

        Raises:
            RateLimitedError: a limit denies it.
        """

    async def settle(self, tenant: str, reservation: str, tokens: int) -> None:
        """Replaces what was set aside by what was used. Never raises."""


class Meter(Protocol):
    """Counts what happened. Never blocks, never raises."""

    def answered(
        self, tenant: str, model: str, source: Source, total_s: float, first_token_s: float | None
    ) -> None:
        """A caller got an answer."""

    def failed(self, tenant: str, model: str, reason: str) -> None:
        """A caller got an error, or left (reason ``CANCELLED``)."""

    def consumed(
        self, tenant: str, model: str, backend: str, usage: Usage, cost_usd: float
    ) -> None:
        """A model was run, to the end or not."""
