"""Samples that were refused: why, counted and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple


class Reason(StrEnum):
    """Why a sample was refused."""

    TENANT = "tenant"
    """It is of a tenant that its sender may not speak for, or none."""
    SERIES = "series"
    """Its series is malformed or was not introduced."""
    CARDINALITY = "cardinality"
    """Its tenant has as many series as it may have."""
    VALUE = "value"
    """Its number is not one of its kind."""
    TIME = "time"
    """It is too old, or in the future."""
    KIND = "kind"
    """It is of a kind that is not taken."""


class Refused(NamedTuple):
    """Why samples were refused."""

    reason: Reason
    text: str
    tenant: str = ""
    """Whose they are, where that is known."""
    samples: int = 1
    """How many."""

    def __str__(self) -> str:
        return self.text


class Rejections:
    """Counts what was refused, by reason, and by tenant for the tenants' own measurements.

    Example:
        >>> rejections = Rejections()
        >>> rejections.add([Refused(Reason.TIME, "plans: is older than 90,000 s", "acme")])
        >>> rejections.by_reason[Reason.TIME]
        1
    """

    def __init__(self) -> None:
        self.by_reason: Counter[Reason] = Counter()
        """All since the start."""
        self._fresh: Counter[tuple[str, Reason]] = Counter()

    def add(self, refused: Iterable[Refused]) -> None:
        """Counts samples."""
        for each in refused:
            self.by_reason[each.reason] += each.samples
            if each.tenant:
                self._fresh[each.tenant, each.reason] += each.samples

    def drain(self) -> dict[tuple[str, Reason], int]:
        """Those of known tenants since the last drain."""
        fresh, self._fresh = self._fresh, Counter()
        return fresh
