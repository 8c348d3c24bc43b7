"""What the inference service needs from outside: model servers, a cache, limits, a meter."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, NamedTuple, Protocol

from agent360.client.errors import MeshError
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

    async def count_tokens(self, prompt: Prompt, model: str) -> int | None:
        """Tokens of a prompt as the server counts them; None: it does not say.

        Raises:
            MeshError: the server does not answer.
        """


class Place(NamedTuple):
    """Where something is kept in the cache."""

    scope: str
    """The tenant in whose name it is kept."""
    namespace: str
    """Groups keys."""
    key: str
    """Its name."""


class AnswerCache(Protocol):
    """Keeps answers, apart for each scope. Never raises: without it, models are run."""

    def near(self, place: Place) -> bytes | None:
        """The kept answer if a copy of it is in this process; at once."""

    async def get(self, place: Place) -> bytes | None:
        """The kept answer, or None."""

    async def claim(self, place: Place, wait_s: float) -> Claimed:
        """The kept answer, or whether it is this process that should bring it about.

        Args:
            place: of the answer.
            wait_s: how long to wait for another process that brings it about, in seconds.
        """

    async def put(self, place: Place, value: bytes, ttl_s: float, token: str = "") -> None:
        """Keeps an answer; with the token of a claim, for those who wait for it."""

    async def abandon(self, place: Place, token: str, error: MeshError) -> None:
        """Gives a claim up, so that another process takes it."""


class Claimed(NamedTuple):
    """What came of a claim."""

    value: bytes | None
    """The answer; None: there is none."""
    token: str = ""
    """Not empty: others wait until ``put`` or ``abandon`` is called with it."""


class Payer(NamedTuple):
    """Who is charged, for what."""

    tenant: str
    """Whose limits and budgets."""
    model: str
    """The model that was chosen."""
    user: str = ""
    """The end user; empty: not named."""


class Amount(NamedTuple):
    """What limits and budgets are charged with."""

    tokens: int = 0
    """Of prompt and answer together."""
    micro_usd: int = 0
    """Millionths of a US dollar."""


class Reservation(NamedTuple):
    """What was set aside; ids are empty where there is nothing to settle."""

    tokens: str = ""
    """Id of the tokens."""
    money: str = ""
    """Id of the money."""


class Quota(Protocol):
    """Limits of requests, tokens, money and slots."""

    async def close(self) -> None:
        """Gives back what is still held; waits for that, but not for ever."""

    def admit_at_once(self, payer: Payer) -> bool:
        """Charges one request if that can be decided in this process; False: ask ``admit``.

        Raises:
            RateLimitedError: a limit denies it.
        """

    async def admit(self, payer: Payer) -> None:
        """Charges one request.

        Raises:
            RateLimitedError: a limit denies it.
        """

    def free(self, payer: Payer, most: Amount) -> bool:
        """Whether it is known in this process that no limit of tokens or money applies."""

    async def reserve(self, payer: Payer, most: Amount) -> Reservation:
        """Sets tokens and money aside: both, or neither.

        Raises:
            RateLimitedError: a limit denies it.
        """

    async def settle(self, payer: Payer, reservation: Reservation, used: Amount) -> None:
        """Replaces what was set aside by what was used. Never raises."""

    def slot(self, payer: Payer) -> AbstractAsyncContextManager[None]:
        """Holds a concurrency slot inside.

        Raises:
            RateLimitedError: all are taken.
        """


class UsageRecord(NamedTuple):
    """One request, answered or not, and what it is charged with."""

    payer: Payer
    """Who asked, and the model that was chosen or answered."""
    method: Literal["generate", "embed"]
    """What was asked."""
    outcome: str
    """``OK``, or the reason of the error; ``CANCELLED``: the caller left."""
    total_s: float
    """Seconds from receiving the request to its end."""
    source: Source | None = None
    """Where the answer came from; None: there is none."""
    backend: str = ""
    """Who made the answer; empty: nobody."""
    rule: str = ""
    """The routing rule that chose the model; empty: none was chosen."""
    usage: Usage | None = None
    """Tokens of the answer; None: there is none."""
    charged_tokens: int = 0
    """Tokens that limits were charged with in the end."""
    charged_usd: float = 0.0
    """What it costs who asked, in US dollars."""
    first_token_s: float | None = None
    """Seconds to the first token; None where nothing was generated for this request."""
    request_id: str = ""
    """The caller's name for the request; empty: none."""


class Meter(Protocol):
    """Counts what happened. Never blocks, never raises."""

    def record(self, record: UsageRecord) -> None:
        """A request ended; told once for each."""

    def consumed(
        self, tenant: str, model: str, backend: str, usage: Usage, cost_usd: float
    ) -> None:
        """A model was run, to the end or not."""
