"""One try at one backend, and races of two: whichever speaks first answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Final, Generic, TypeVar

from agent360.client.errors import MeshError, UnavailableError
from agent360.mesh.inference import tokens
from agent360.mesh.inference.answers import Piece, Usage, merge
from agent360.mesh.inference.failover.breaker import Breaker
from agent360.mesh.inference.ports import Sink
from agent360.mesh.inference.queueing import Turn
from agent360.mesh.inference.settings import ModelSettings

_MAX_PARTIAL_BYTES: Final = 2_048
"""Of what was said, this much is told in an error: metadata of a gRPC call is bounded."""

T = TypeVar("T")


class Attempt:
    """One try: what was said, and when.

    Invariant: once it has spoken it is the only try of its request whose words reach the caller,
    and no other is begun.
    """

    __slots__ = (
        "_breaker",
        "_limit",
        "_probe",
        "_sink",
        "_tenant",
        "_try_until",
        "_turn",
        "backend",
        "began",
        "lost",
        "model",
        "queue_s",
        "race",
        "refusal",
        "said",
        "spoke_at",
    )

    def __init__(
        self, model: ModelSettings, sink: Sink | None, race: Race[Any] | None = None
    ) -> None:
        self.model = model
        self.race = race
        self.backend = ""
        """Empty until a backend is asked."""
        self.began = 0.0
        """When it was asked, on the monotonic clock."""
        self.queue_s = 0.0
        """Seconds until its turn."""
        self.said: list[Piece] = []
        self.spoke_at: float | None = None
        """When the backend first said something; None: it has not."""
        self.refusal: MeshError | None = None
        """The error by which the one who listens ended it."""
        self.lost = False
        """A rival spoke first."""
        self._sink = sink
        self._turn: Turn | None = None
        self._breaker: Breaker | None = None
        self._probe = False
        self._tenant = ""
        self._limit: asyncio.Timeout | None = None
        self._try_until: float | None = None

    def start(self, turn: Turn, breaker: Breaker, asked: float, tenant: str) -> None:
        """Its turn has come."""
        self.backend = turn.member.backend.name
        self.began = time.monotonic()
        self.queue_s = self.began - asked
        self._turn = turn
        self._breaker = breaker
        self._probe = breaker.enter()
        self._tenant = tenant

    def limited(self, first_s: float | None, whole_s: float | None) -> asyncio.Timeout:
        """The time that it may take: until its first word, then until its end."""
        now = asyncio.get_running_loop().time()
        self._try_until = None if whole_s is None else now + whole_s
        until = self._try_until if first_s is None else now + first_s
        if until is not None and self._try_until is not None:
            until = min(until, self._try_until)
        self._limit = asyncio.timeout_at(until)
        return self._limit

    def hear(self, pieces: Sequence[Piece]) -> None:
        """Takes what the backend says and passes it on."""
        if self.spoke_at is None:
            self.speaks()
        self.said += pieces
        if self._sink is not None:
            try:
                self._sink(pieces)
            except MeshError as error:
                self.refusal = error
                raise

    def speaks(self) -> None:
        """The backend begins to answer: it works, and rivals are too late.

        Raises:
            asyncio.CancelledError: a rival was first.
        """
        if self.race is not None:
            self.race.claim(self)
        self.spoke_at = time.monotonic()
        if self._limit is not None:
            self._limit.reschedule(self._try_until)
        if self._turn is not None:
            self._turn.first_response()
        if self._breaker is not None:
            self._breaker.succeeded(probe=self._probe, tenant=self._tenant)
            self._probe = False

    def failed(self, reason: str, *, ill: bool, again: bool = False) -> None:
        """The backend answered with an error, or not at all.

        Args:
            reason: of the error.
            ill: whether that counts against the backend.
            again: whether it failed the same request before, which then may be what is at fault.
        """
        if self._breaker is None:
            return
        if ill and (self._probe or not again):
            self._breaker.failed(probe=self._probe, why=reason, tenant=self._tenant)
            self._probe = False

    def left(self) -> None:
        """The try has ended; if it has not told how the backend is, another may probe it."""
        if self._breaker is not None:
            self._breaker.left(probe=self._probe)
            self._probe = False

    def estimate(self, input_tokens: int) -> Usage:
        """What it used, judged by what was said."""
        return Usage(input_tokens, tokens.estimate_pieces(self.said), estimated=True)

    def broken(self, cause: MeshError) -> MeshError:
        """The error of an answer that ended in its middle, with what there is of it."""
        text = merge(self.said).content
        cut = text.encode()[:_MAX_PARTIAL_BYTES].decode(errors="ignore")
        metadata = {
            **cause.metadata,
            **self.facts(),
            "cause": cause.reason,
            "partial_text": cut,
        }
        if len(cut) < len(text):
            metadata["partial_text_cut"] = "true"
        return UnavailableError(
            f"the answer broke off after about {metadata['produced_tokens_estimate']} tokens: "
            f"{cause.message}",
            reason="STREAM_BROKEN",
            metadata=metadata,
        )

    def facts(self) -> dict[str, str]:
        """Who was asked and how much was said, for an error's metadata."""
        return {
            "model": self.model.name,
            "backend": self.backend,
            "produced_bytes": str(sum(map(tokens.piece_size, self.said))),
            "produced_tokens_estimate": str(tokens.estimate_pieces(self.said)),
        }


class Race(Generic[T]):
    """Tries that run at the same time for one request.

    Example:
        >>> async with Race() as race:
        ...     race.begin(first, run(first))
        ...     if await race.is_slow(first, 0.5):
        ...         race.begin(second, run(second))
        ...     result = await race.result()
    """

    def __init__(self) -> None:
        self.winner: Attempt | None = None
        """The one that spoke first."""
        self._tasks: dict[asyncio.Task[T], Attempt] = {}

    async def __aenter__(self) -> Race[T]:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends what still runs and waits until it has let go of its connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def begin(self, attempt: Attempt, work: Coroutine[Any, Any, T]) -> None:
        """Lets a try run."""
        self._tasks[asyncio.get_running_loop().create_task(work)] = attempt

    def claim(self, attempt: Attempt) -> None:
        """A try speaks: the first to do so wins, the others are cancelled.

        Raises:
            asyncio.CancelledError: another was first.
        """
        if self.winner is None:
            self.winner = attempt
            for task, rival in self._tasks.items():
                if rival is not attempt and not task.done():
                    rival.lost = True
                    task.cancel()
        elif self.winner is not attempt:
            attempt.lost = True
            raise asyncio.CancelledError

    async def is_slow(self, attempt: Attempt, delay_s: float) -> bool:
        """Waits until a try has spoken or ended (False), or took longer than that (True).

        Its time begins when a backend is asked: waiting for a turn is no reason to ask twice.
        """
        wait_s = delay_s
        while wait_s > 0:
            await asyncio.wait(self._tasks, timeout=wait_s)
            if attempt.spoke_at is not None or all(task.done() for task in self._tasks):
                return False
            waited = time.monotonic() - attempt.began if attempt.backend else 0.0
            wait_s = delay_s - waited
        return True

    async def result(self) -> T:
        """What the winner, or the last one left, comes to.

        Raises:
            MeshError: all failed, or the winner broke off.
        """
        pending = set(self._tasks)
        error: BaseException | None = None
        while pending:
            ended, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                if task.cancelled():
                    continue
                failure = task.exception()
                if failure is None:
                    return task.result()
                if self._tasks[task] is self.winner:
                    raise failure
                error = failure
        raise error or asyncio.CancelledError
