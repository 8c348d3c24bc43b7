"""What the client counts of itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

ClosedReason = Literal["idle", "lifetime", "unhealthy", "error", "shutdown"]
"""Why a connection was closed."""

ErrorKind = Literal["away", "busy", "connect", "lost", "protocol", "reply", "timeout"]
"""What failed: refused by the breaker; no connection free in time; a connection not opened; one
that broke; one that sent nonsense; an error reply; no reply in time."""


@dataclass(slots=True)
class Counts:
    """Totals over all servers since the start."""

    opened: int = 0
    closed: Counter[ClosedReason] = field(default_factory=Counter)
    waits: int = 0
    wait_s: float = 0.0
    round_trips: int = 0
    commands: int = 0
    errors: Counter[ErrorKind] = field(default_factory=Counter)
