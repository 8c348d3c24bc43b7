"""What the session counts of itself."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Final, Literal

Operation = Literal["read", "write", "conditional"]
"""What a request does; a conditional write is agreed on by the copies first (Paxos)."""

BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the buckets of latencies, in seconds."""


@dataclass(slots=True)
class Latencies:
    """How long requests of one kind took."""

    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    """Requests by bound; the last element: those above all."""
    total_s: float = 0.0

    def note(self, seconds: float) -> None:
        """Counts a request."""
        self.buckets[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds


@dataclass(slots=True)
class Counts:
    """Totals since the start."""

    latencies: dict[Operation, Latencies] = field(
        default_factory=lambda: {
            "read": Latencies(),
            "write": Latencies(),
            "conditional": Latencies(),
        }
    )
    """Of requests that were answered, by what they do."""
    errors: Counter[str] = field(default_factory=Counter)
    """By ``failures.ErrorKind``."""
    retries: int = 0
    recycled: int = 0
    """Connections that were replaced because of their age."""
