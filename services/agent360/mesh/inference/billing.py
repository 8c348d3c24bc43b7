"""What running models for one request used, try by try."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent360.mesh.inference.answers import Usage
from agent360.mesh.inference.settings import ModelSettings


@dataclass(frozen=True, slots=True)
class Spent:
    """What one try used."""

    model: ModelSettings
    backend: str
    usage: Usage
    wasted: bool = False
    """Its words reached nobody: the loser of a hedge, or a try that failed before it spoke."""


@dataclass(slots=True)
class Bill:
    """What a request used; filled as it goes, so that it is right however the request ends.

    Example:
        >>> bill = Bill()
        >>> try:
        ...     await upstream.generate(ticket, prompt, route, sink, streamed=True, bill=bill)
        ... finally:
        ...     settle(bill.tokens)
    """

    spent: list[Spent] = field(default_factory=list)
    """In the order in which the tries ended."""

    @property
    def tokens(self) -> int:
        """Tokens for the caller's limits: those of words that reached it, not of wasted tries."""
        return sum(
            each.usage.input_tokens + each.usage.output_tokens
            for each in self.spent
            if not each.wasted
        )
