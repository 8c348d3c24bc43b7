"""Names of keys: where counts and records are, and which of them share a slot of a cluster."""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

from agent360.mesh.ratelimit.counts import CountKey
from agent360.mesh.ratelimit.limits import Algorithm, Limit, LimitSet
from agent360.mesh.ratelimit.windows import calendar_windows

_SAFE: Final = "@/+~ "
_LETTERS: Final = {
    Algorithm.TOKEN_BUCKET: "t",
    Algorithm.SLIDING_WINDOW: "s",
    Algorithm.FIXED_WINDOW: "f",
    Algorithm.CONCURRENCY: "c",
}


class Count(NamedTuple):
    """One count of one limit."""

    limit: Limit
    """What it counts for."""
    key: str
    """Where it is."""
    tag: str
    """The hash tag in its key: counts of one tag are in one slot."""
    spec: tuple[str | int, ...] | None
    """What the script is told of the limit; None: that depends on the time."""


def version_of(limits: LimitSet) -> int:
    """A number that changes when what the script is told of limits does."""
    told = sorted((limit.key, limit.kind, spec_of(limit, 0)) for limit in limits)
    return int.from_bytes(hashlib.sha256(repr(told).encode()).digest()[:6])


def counted_in(key: str) -> CountKey:
    """The count key in the name of a key."""
    name = key.partition("}:n:")[2]
    return tuple(unquote(part) for part in name.split("|"))


class Keys:
    """Makes names.

    Counts of one tenant share its hash tag. A limit that counts several tenants together has a tag
    of its own, which no tenant's name can be.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def count(self, limit: Limit, key: CountKey, tenant: str) -> Count:
        """Where a count is."""
        tag = tenant if limit.tenants_apart else f"~{limit.limit_id}"
        name = "|".join(quote(part, safe=_SAFE) for part in key)
        spec = spec_of(limit, 0) if limit.calendar is None else None
        return Count(limit, f"{self._prefix}:{{{tag}}}:n:{name}", tag, spec)

    def index(self, tag: str) -> str:
        """Where the counts of a tag are listed."""
        return f"{self._prefix}:{{{tag}}}:i"

    def shares(self, tag: str, tenant: str) -> str:
        """Where the counts of a tag that a tenant has a share of are listed; see usage.lua."""
        return f"{self._prefix}:{{{tag}}}:j:{tenant}"

    def record(self, tag: str, tenant: str, record_id: str) -> str:
        """Where a reservation, lease or slots are remembered."""
        return f"{self._prefix}:{{{tag}}}:r:{tenant}:{quote(record_id[:512], safe='~')}"


def spec_of(limit: Limit, now_us: int) -> tuple[str | int, ...]:
    """What the script is told of a limit; see prelude.lua. The time is of calendar windows only."""
    shadow = int(limit.shadow)
    if limit.algorithm is Algorithm.CONCURRENCY:
        return "c", shadow, limit.amount
    spec = (_LETTERS[limit.algorithm], shadow, limit.amount, limit.period_us, limit.size)
    if limit.calendar is None:
        return spec
    return (*spec, *calendar_windows(limit.calendar, limit.time_zone).boundaries(now_us))
