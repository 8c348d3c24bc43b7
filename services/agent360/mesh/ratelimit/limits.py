"""Limits as data: what they match, what they count by, and which of them apply to a request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Final

from agent360.mesh.ratelimit.counters import Counter, FixedWindow, SlidingWindow, TokenBucket
from agent360.mesh.ratelimit.windows import Calendar, CalendarWindows, PlainWindows, Windows

ID_PATTERN: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
TENANT: Final = "tenant"
PLAN: Final = "plan"
DEFAULT_PLAN: Final = "default"

_OWN_METHODS: Final = "agent360."
_HOUR_US: Final = 3_600_000_000


class Algorithm(Enum):
    """How a limit counts."""

    TOKEN_BUCKET = "token_bucket"  # noqa: S105 - not a password
    SLIDING_WINDOW = "sliding_window"
    FIXED_WINDOW = "fixed_window"
    CONCURRENCY = "concurrency"


class FailureMode(Enum):
    """What a limit answers while its store is away."""

    OPEN = "open"
    """Allow, within the same limit counted by each replica alone."""
    CLOSED = "closed"
    """Deny."""


class Source(Enum):
    """Where a limit came from."""

    FILE = "file"
    API = "api"
    REQUEST = "request"
    """The request that is subject to it; it is in no list."""


class LimitsError(ValueError):
    """Limits are wrong; the message names the entry, the field and the fix."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A rule about how much of something may be done."""

    limit_id: str
    """Names it."""
    amount: int
    """Hits in a period, or slots held at a time."""
    period_s: float = 0.0
    """The period; of no use to concurrency slots and calendar windows."""
    name: str = ""
    """What it matches: an exact name, a prefix that ends in ``*``, or, empty, anything."""
    match: Mapping[str, str] = field(default_factory=dict)
    """Facts a request must have: a value, a prefix that ends in ``*``, or ``*``: any value."""
    per: tuple[str, ...] = (TENANT,)
    """Counted apart for each value of these facts."""
    algorithm: Algorithm = Algorithm.TOKEN_BUCKET
    """How it counts."""
    burst: int = 0
    """Hits at once, of a token bucket; 0: amount."""
    calendar: Calendar | None = None
    """The calendar's period of a fixed window; None: multiples of ``period_s``."""
    time_zone: str = ""
    """IANA time zone of calendar windows; empty: UTC."""
    failure_mode: FailureMode = FailureMode.OPEN
    """What is answered while the store is away."""
    shadow: bool = False
    """Decide and count, but do not deny."""
    strict: bool = False
    """No leases."""
    tenant: str = ""
    """The tenant whose own limit it is; empty: general."""
    plan: str = ""
    """The plan whose tenants it is for; empty: all."""
    group: str = ""
    """Of the limits of one group that match, only the most specific applies; empty: alone."""
    source: Source = Source.FILE
    """Where it came from."""
    updated: datetime | None = None
    """When it was last changed, aware; None: not known."""

    @property
    def size(self) -> int:
        """Most hits at once."""
        token_bucket = self.algorithm is Algorithm.TOKEN_BUCKET
        return (self.burst or self.amount) if token_bucket else self.amount

    @property
    def period_us(self) -> int:
        """The period in whole microseconds."""
        return max(1, round(self.period_s * 1e6))

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it apart: a tenant, a plan and everybody may have one of the same id."""
        return self.limit_id, self.tenant, self.plan

    @property
    def kind(self) -> str:
        """What its counts cannot survive a change of."""
        per = ",".join(self.per)
        if self.algorithm is Algorithm.CONCURRENCY:
            return f"c/{per}"
        if self.calendar is not None:
            return f"{self.calendar.name.lower()}@{self.time_zone}/{per}"
        return f"{self.algorithm.value[0]}{self.period_us}/{per}"

    @property
    def tenants_apart(self) -> bool:
        """Whether each of its counts is of one tenant."""
        return bool(self.tenant) or TENANT in self.per

    @property
    def specificity(self) -> tuple[bool, bool, int, int, int]:
        """Orders the limits of a group: own, plan's, name, exact facts, other facts."""
        exact = sum(not value.endswith("*") for value in self.match.values())
        name = 0 if not self.name else len(self.name) + (not self.name.endswith("*")) * 1_000
        return bool(self.tenant), bool(self.plan), name, exact, len(self.match)

    @property
    def names_own_methods(self) -> bool:
        """Whether it was made for the RPCs of the ratelimit service itself."""
        return self.name.startswith(_OWN_METHODS)

    def applies(self, name: str, facts: Mapping[str, str]) -> bool:
        """Whether it limits a request."""
        if not _fits(self.name, name):
            return False
        return all(
            key in facts and _fits(value, facts[key], empty=False)
            for key, value in self.match.items()
        )

    def windows(self) -> Windows:
        """The windows of a fixed window."""
        if self.calendar is not None:
            return CalendarWindows(self.calendar, self.time_zone)
        return PlainWindows(self.period_us)

    def periods(self) -> Windows:
        """The periods that its usage is told of: a fixed window's own, else multiples of its
        period since 1970; of concurrency slots, hours.
        """
        if self.algorithm is Algorithm.CONCURRENCY:
            return PlainWindows(_HOUR_US)
        return self.windows()

    def counter(self) -> Counter:
        """A new count of it.

        Raises:
            ValueError: it limits concurrency.
        """
        match self.algorithm:
            case Algorithm.TOKEN_BUCKET:
                return TokenBucket(self.amount, self.period_us, self.size)
            case Algorithm.SLIDING_WINDOW:
                return SlidingWindow(self.amount, self.period_us)
            case Algorithm.FIXED_WINDOW:
                return FixedWindow(self.amount, self.windows())
        raise ValueError("slots are held, not counted")


def _fits(pattern: str, value: str, *, empty: bool = True) -> bool:
    if pattern.endswith("*"):
        return value.startswith(pattern[:-1])
    return pattern == value or (empty and not pattern)


class LimitSet:
    """All limits, and the plans of tenants.

    Of the limits of one id a tenant is subject to one: its own, else its plan's, else the general.
    """

    def __init__(self, limits: Iterable[Limit], plans: Mapping[str, str] | None = None) -> None:
        """Makes a set.

        Args:
            limits: any number.
            plans: of tenants; the others are on the plan ``default``.

        Raises:
            LimitsError: two have the same key.
        """
        self._by_key: dict[tuple[str, str, str], Limit] = {}
        for limit in limits:
            if limit.key in self._by_key:
                raise LimitsError(f"limit {limit.limit_id!r}: stands twice")
            self._by_key[limit.key] = limit
        self.plans: Mapping[str, str] = dict(plans or {})
        self._of: dict[str, dict[str, Limit]] = {}

    def __iter__(self) -> Iterator[Limit]:
        return iter(self._by_key.values())

    def find(self, limit_id: str, tenant: str = "", plan: str = "") -> Limit | None:
        """The limit of a key."""
        return self._by_key.get((limit_id, tenant, plan))

    def plan_of(self, tenant: str) -> str:
        """The plan a tenant is on."""
        return self.plans.get(tenant, DEFAULT_PLAN)

    def of(self, tenant: str) -> dict[str, Limit]:
        """The limits a tenant is subject to, by id."""
        known = self._of.get(tenant)
        if known is None:
            plan = self.plan_of(tenant)
            known = {}
            for limit in sorted(self, key=lambda each: (bool(each.tenant), bool(each.plan))):
                if limit.tenant in ("", tenant) and limit.plan in ("", plan):
                    known[limit.limit_id] = limit
            if len(self._of) >= _MAX_TENANTS:
                self._of.clear()
            self._of[tenant] = known
        return known

    def matching(self, tenant: str, name: str, facts: Mapping[str, str]) -> list[Limit]:
        """The limits that a request is subject to; ``facts`` include tenant and plan."""
        found: list[Limit] = []
        grouped: dict[str, int] = {}
        for limit in self.of(tenant).values():
            if not limit.applies(name, facts):
                continue
            place = grouped.get(limit.group) if limit.group else None
            if place is None:
                if limit.group:
                    grouped[limit.group] = len(found)
                found.append(limit)
            elif limit.specificity > found[place].specificity:
                found[place] = limit
        return found


_MAX_TENANTS: Final = 10_000
