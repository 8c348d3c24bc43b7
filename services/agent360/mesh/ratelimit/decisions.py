"""What the ratelimit service decides, whichever store it decides with."""

from __future__ import annotations

from typing import Final, NamedTuple


class Decision(NamedTuple):
    """The decision on a request."""

    allowed: bool
    granted: int
    remaining: int
    limit: int
    reset_after_s: float
    retry_after_s: float | None
    limit_id: str
    degraded: bool = False


class Settlement(NamedTuple):
    """What a settle did."""

    adjustment: int
    repeated: bool
    remaining: int


class Leased(NamedTuple):
    """Tokens that may be spent without asking."""

    decision: Decision
    lease_id: str
    ttl_s: float
    strict: bool = False
    """Whether a limit allows no leases."""


class Usage(NamedTuple):
    """How much of one count is used."""

    limit_id: str
    counted_by: tuple[tuple[str, str], ...]
    used: int
    remaining: int
    limit: int
    denied: int
    peak: int
    reset_after_s: float


_new_tuple: Final = tuple.__new__
"""A NamedTuple's own constructor takes twice as long."""

UNLIMITED: Final = Decision(True, 1, 0, 0, 0.0, None, "")
UNLIMITED_LEASE_S: Final = 5.0
"""How long a caller may believe that no limit applies."""


def unlimited(hits: int) -> Decision:
    """The decision where no limit applies."""
    return UNLIMITED if hits == 1 else UNLIMITED._replace(granted=hits)


def allowed_run(
    hits: int, times: int, remaining: int, limit: int, reset_after_s: float, limit_id: str
) -> list[Decision]:
    """The decisions on a request that was allowed so many times in a row.

    Args:
        hits: granted each time.
        times: how often.
        remaining: after the last.
        limit: see ``Decision``.
        reset_after_s: after the last; all have it.
        limit_id: see ``Decision``.
    """
    return [
        _new_tuple(Decision, (True, hits, left, limit, reset_after_s, None, limit_id, False))
        for left in range(remaining + (times - 1) * hits, remaining - 1, -hits)
    ]


def lease_size(wanted: int, room: int) -> int:
    """How many of the tokens asked for are leased: less the less there is, for others' sake."""
    return min(wanted, max(1, room // 4)) if room > 0 else 0
