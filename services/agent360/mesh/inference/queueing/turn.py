"""A turn: the right to ask one backend once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent360.mesh.inference.members import Member


class Turn:
    """The right to ask one backend once, and what came of it.

    Example:
        >>> async with queues.turn(model, ticket) as turn:
        ...     ending = await turn.member.backend.generate(prompt, name, sink, streamed=False)
        ...     turn.outcome(tokens=ending.usage.input_tokens + ending.usage.output_tokens)

    Attributes:
        member: the backend to ask.
        queue_s: how long the request waited for it, in seconds.
        responded_at: when it began to answer, on the monotonic clock; None: it did not yet.
        tokens: what it really took; None: not known.
        inferences: prompts or texts that were asked at once.
    """

    __slots__ = ("_clock", "inferences", "member", "queue_s", "responded_at", "tokens")

    def __init__(
        self,
        member: Member,
        queue_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.member = member
        self.queue_s = queue_s
        self.responded_at: float | None = None
        self.tokens: int | None = None
        self.inferences = 1
        self._clock = clock

    def first_response(self) -> None:
        """Notes that the backend began to answer; only the first time counts."""
        if self.responded_at is None:
            self.responded_at = self._clock()

    def outcome(self, *, tokens: int | None = None, inferences: int = 1) -> None:
        """Tells what was used, where that is known; errors are seen from how the block ends.

        Args:
            tokens: tokens of prompt and answer together; corrects what the tenant is charged.
            inferences: prompts or texts that were asked at once.
        """
        self.tokens = tokens
        self.inferences = inferences
