"""Reservations and slots that no limit applies to: their ids say all there is to know.

Any replica accepts them, however they were made; there is nothing that an invented one could do.
"""

from __future__ import annotations

import re
from typing import Final

from agent360.mesh.ratelimit.decisions import Settlement
from agent360.mesh.ratelimit.record_ids import Kind

_ID: Final = re.compile(r"(.-)free-([0-9]{1,15})-[A-Za-z0-9_-]{1,64}")


def free_id(kind: Kind, quantity: int, unique: str) -> str:
    """Names a reservation of so many tokens, or slots held for so many microseconds."""
    return f"{kind.value}free-{quantity}-{unique}"


def free_quantity(kind: Kind, record_id: str) -> int | None:
    """What an id of this kind was made for; None if limits apply to it."""
    found = _ID.fullmatch(record_id)
    return int(found[2]) if found is not None and found[1] == kind.value else None


def free_settlement(record_id: str, tokens: int) -> Settlement | None:
    """What a settle does, which changes nothing; None if limits apply."""
    reserved = free_quantity(Kind.RESERVATION, record_id)
    return None if reserved is None else Settlement(tokens - reserved, False, 0)


def free_renewal(slot_id: str, ttl_s: float | None) -> float | None:
    """The time to live of renewed slots; None if limits apply."""
    ttl_us = free_quantity(Kind.SLOTS, slot_id)
    if ttl_us is None:
        return None
    return ttl_us / 1e6 if ttl_s is None else ttl_s
