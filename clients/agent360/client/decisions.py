"""What users of the ratelimit client see: requests, decisions, reservations, slots."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

Descriptor = Mapping[str, str]
"""Facts that limits are matched and counted by, such as user, api_key, model or method."""


class Decision(Struct, frozen=True, gc=False):
    """The decision on a request."""

    allowed: bool
    """Whether it may be done."""
    granted: int
    """How many hits were granted: all, none or, with ``allow_partial``, some."""
    remaining: int
    """How many more hits the tightest limit would admit now."""
    limit: int
    """Size of the tightest limit in hits; 0 if no limit applies."""
    reset_after_s: float
    """Seconds until the tightest limit is whole again."""
    retry_after_s: float | None
    """When denied, or granted in part: seconds after which it can be admitted; None: never."""
    limit_id: str
    """The tightest limit or, when denied, the one that denied; empty if no limit applies."""
    degraded: bool
    """True where the store was away and the limit's failure mode decided."""


class CheckRequest(Struct, frozen=True, gc=False):
    """One of many checks."""

    name: str
    """What is to be done, such as ``inference.generate``."""
    hits: int = 1
    """How much is charged; 0 looks without charging."""
    descriptor: Descriptor | None = None
    """Facts for matching."""
    allow_partial: bool = False
    """Whether fewer hits than asked for may be granted."""


class Reservation(Struct, frozen=True, gc=False):
    """Tokens set aside, or the decision that denied them."""

    decision: Decision
    """The decision."""
    reservation_id: str
    """For ``settle``; empty when denied."""


class Settlement(Struct, frozen=True, gc=False):
    """What a settle did."""

    adjustment: int
    """Tokens charged beyond the reservation (positive) or given back (negative)."""
    repeated: bool
    """True if the reservation had been settled before and nothing was changed."""
    remaining: int
    """How many more tokens the tightest limit would admit now."""


class Slot(Struct, frozen=True, gc=False):
    """Concurrency slots, or the decision that denied them."""

    decision: Decision
    """The decision."""
    slot_id: str
    """For ``renew`` and ``release``; empty when denied."""
    ttl_s: float
    """Seconds after which the slots come back by themselves."""
