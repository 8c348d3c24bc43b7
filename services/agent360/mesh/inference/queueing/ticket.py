"""What a request tells the queue of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Ticket:
    """Whose request wants a turn of a model, how large it is and how soon it is needed.

    Example:
        >>> Ticket("acme", priority=2, tokens=1_200, deadline=loop.time() + 30.0)
    """

    tenant: str
    """Who pays with its share of the model."""
    priority: int = 2
    """As in agent360.call.v1.Priority: 1 low, 2 normal, 3 high. See ``raise_to``."""
    tokens: int = 1
    """Tokens of prompt and answer together, estimated."""
    deadline: float | None = None
    """When the answer is no longer wanted, on the monotonic clock (seconds); None: never. Where
    it is shared, it moves on as others come to wait."""
    shared: bool = False
    """Whether others may wait for the same answer, beyond the deadline: then it decides who goes
    first and whether to begin at all, but ends no wait."""
    session: str = ""
    """Requests of one session go to the same backend where possible; empty: none."""
    timeout_s: float | None = None
    """Longest wait that the request itself allows, in seconds; only ever shortens the queue's."""
    batched: bool = False
    """Whether it stands for a batch, whose requests are counted by the batcher."""
    raised: Callable[[], None] | None = None
    """Moves it up in the line in which it waits, by its priority; None: it waits in none."""

    def raise_to(self, priority: int) -> None:
        """Gives it a priority that is higher than its own, also while it waits."""
        if priority > self.priority:
            self.priority = priority
            if self.raised is not None:
                self.raised()
