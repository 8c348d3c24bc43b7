"""Limits as data: what they match, what they count by, and the TOML file they come from."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final

from agent360.mesh.ratelimit.counters import Counter, FixedWindow, SlidingWindow, TokenBucket

_ID: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_PERIOD: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
_TENANT: Final = "tenant"


class Algorithm(Enum):
    """How a limit counts."""

    TOKEN_BUCKET = "token_bucket"  # noqa: S105 - not a password
    SLIDING_WINDOW = "sliding_window"
    FIXED_WINDOW = "fixed_window"


class LimitsError(ValueError):
    """A limits file is wrong; the message names the entry, the field and the fix."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A rule about how much of something may be done."""

    limit_id: str
    """Names it."""
    amount: int
    """Hits in a period."""
    period_s: float
    """The period."""
    name: str = ""
    """What it matches: an exact name, a prefix that ends in ``*``, or, empty, anything."""
    match: Mapping[str, str] = field(default_factory=dict)
    """Facts a request must have; ``*`` stands for any value."""
    per: tuple[str, ...] = (_TENANT,)
    """Counted apart for each value of these facts."""
    algorithm: Algorithm = Algorithm.TOKEN_BUCKET
    """How it counts."""
    burst: int = 0
    """Hits at once, of a token bucket; 0: amount."""
    shadow: bool = False
    """Decide and count, but do not deny."""
    strict: bool = False
    """No leases."""
    tenant: str = ""
    """The tenant whose own limit it is; empty: general."""

    @property
    def size(self) -> int:
        """Most hits at once."""
        token_bucket = self.algorithm is Algorithm.TOKEN_BUCKET
        return (self.burst or self.amount) if token_bucket else self.amount

    def applies(self, name: str, facts: Mapping[str, str]) -> bool:
        """Whether it limits a request."""
        if self.name.endswith("*"):
            if not name.startswith(self.name[:-1]):
                return False
        elif self.name and self.name != name:
            return False
        return all(
            key in facts if value == "*" else facts.get(key) == value
            for key, value in self.match.items()
        )

    def counter(self) -> Counter:
        """A new count of it."""
        match self.algorithm:
            case Algorithm.TOKEN_BUCKET:
                return TokenBucket(self.amount, self.period_s, self.size)
            case Algorithm.SLIDING_WINDOW:
                return SlidingWindow(self.amount, self.period_s)
            case Algorithm.FIXED_WINDOW:
                return FixedWindow(self.amount, self.period_s)


class LimitSet:
    """All limits; a tenant's own limit replaces the general one of the same id."""

    def __init__(self, limits: Iterable[Limit]) -> None:
        self._general: dict[str, Limit] = {}
        self._own: dict[str, dict[str, Limit]] = {}
        for limit in limits:
            table = self._own.setdefault(limit.tenant, {}) if limit.tenant else self._general
            if limit.limit_id in table:
                raise LimitsError(f"limit {limit.limit_id!r}: stands twice")
            table[limit.limit_id] = limit

    def of(self, tenant: str) -> dict[str, Limit]:
        """The limits a tenant is subject to, by id."""
        return {**self._general, **self._own.get(tenant, {})}


def read_limits(file: Path) -> LimitSet:
    """Reads a limits file: ``[[limits]]`` tables with the fields of ``Limit``.

    Raises:
        LimitsError: it cannot be read, or an entry is wrong; all faults of the first wrong entry.
    """
    try:
        content = tomllib.loads(file.read_text())
    except OSError as error:
        raise LimitsError(f"{file}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise LimitsError(f"{file}: {error}") from error
    unknown = sorted(set(content) - {"limits"})
    if unknown:
        raise LimitsError(f"{file}: {unknown[0]!r} is not known; expected [[limits]]")
    limits = []
    for number, entry in enumerate(content.get("limits", []), 1):
        where = f"{file}: limit {number} ({entry.get('id', 'without id')})"
        limits.append(_read_limit(entry, where))
    return LimitSet(limits)


_FIELDS: Final = {
    "id": str,
    "name": str,
    "match": dict,
    "per": list,
    "algorithm": str,
    "amount": int,
    "period": (str, int, float),
    "burst": int,
    "shadow": bool,
    "strict": bool,
    "tenant": str,
}


def _read_limit(entry: Mapping[str, Any], where: str) -> Limit:
    for key, value in entry.items():
        expected: Any = _FIELDS.get(key)
        if expected is None:
            raise LimitsError(f"{where}: {key!r} is not known; known: {', '.join(_FIELDS)}")
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            raise LimitsError(f"{where}: {key} has a value of the wrong type: {value!r}")
    limit_id = entry.get("id", "")
    if _ID.fullmatch(limit_id) is None:
        raise LimitsError(f"{where}: id must match {_ID.pattern}")
    amount, burst = entry.get("amount", 0), entry.get("burst", 0)
    if amount <= 0:
        raise LimitsError(f"{where}: amount must be a positive whole number")
    if burst < 0:
        raise LimitsError(f"{where}: burst must not be negative")
    try:
        algorithm = Algorithm(entry.get("algorithm", Algorithm.TOKEN_BUCKET.value))
    except ValueError:
        known = ", ".join(each.value for each in Algorithm)
        raise LimitsError(f"{where}: algorithm must be one of {known}") from None
    return Limit(
        limit_id=limit_id,
        amount=amount,
        period_s=_read_period(entry.get("period"), where),
        name=entry.get("name", ""),
        match={str(key): str(value) for key, value in entry.get("match", {}).items()},
        per=tuple(map(str, entry.get("per", (_TENANT,)))),
        algorithm=algorithm,
        burst=burst,
        shadow=entry.get("shadow", False),
        strict=entry.get("strict", False),
        tenant=entry.get("tenant", ""),
    )


def _read_period(value: object, where: str) -> float:
    if isinstance(value, int | float) and value > 0:
        return float(value)
    matched = _PERIOD.fullmatch(value) if isinstance(value, str) else None
    if matched is None or float(matched[1]) <= 0:
        raise LimitsError(f"{where}: period must be seconds or a text such as '1m', is {value!r}")
    return float(matched[1]) * _UNITS_S[matched[2]]
