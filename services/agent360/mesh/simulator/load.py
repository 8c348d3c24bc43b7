"""How many requests the simulator has had and has now."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(slots=True)
class Load:
    """Counts of requests; tests and ``GET /sim/load`` read them."""

    requests: int = 0
    """Requests so far."""
    running: int = 0
    """Requests now."""
    peak: int = 0
    """Most requests at a time so far."""
    cancelled: int = 0
    """Requests whose caller went away before the answer ended."""
    refused: int = 0
    """Requests refused or struck by an error."""
    by_path: Counter[str] = field(default_factory=Counter)
    """Requests by path."""

    @contextlib.contextmanager
    def one(self, path: str) -> Iterator[int]:
        """Counts a request as running; gives its number, from 1."""
        self.requests += 1
        self.by_path[path] += 1
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            yield self.requests
        finally:
            self.running -= 1
