"""Weighted rendezvous hashing: who of several takes a key; few keys move when one leaves."""

from __future__ import annotations

import hashlib
import math
from typing import Final

_BYTES: Final = 8
_RANGE: Final = 2.0 ** (8 * _BYTES)


def score(key: str, name: str, weight: float) -> float:
    """How much somebody wants a key; the highest takes it.

    Of all keys each takes a share in proportion to its weight, and if one leaves, only its own keys
    move (Thaler, Ravishankar 1998; weights: Schindelhauer, Schomaker 2005). The same in every
    process.
    """
    digest = hashlib.blake2b(f"{name}\0{key}".encode(), digest_size=_BYTES).digest()
    uniform = (int.from_bytes(digest, "big") + 0.5) / _RANGE
    return -weight / math.log(uniform)
