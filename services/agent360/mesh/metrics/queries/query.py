"""What a query asks, and what an answer holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, NamedTuple

from agent360.mesh.metrics.bins import Floats, Ints
from agent360.mesh.metrics.series import SeriesId

TENANT_LABEL: Final = "tenant"
"""The label that holds a series' tenant where a query is about all tenants."""


class Aggregation(Enum):
    """What is computed from the rollups of a step."""

    COUNT = "count"
    SUM = "sum"
    INCREASE = "increase"
    RATE = "rate"
    MEAN = "mean"
    MIN = "min"
    MAX = "max"
    LAST = "last"
    QUANTILES = "quantiles"
    SHARE_ABOVE = "share_above"

    @property
    def needs_bins(self) -> bool:
        """Whether it is computed from the bins of sketches."""
        return self in {Aggregation.QUANTILES, Aggregation.SHARE_ABOVE}

    @property
    def adds_up(self) -> bool:
        """Whether nothing means zero, and the whole is the sum of its parts."""
        return self in {
            Aggregation.COUNT,
            Aggregation.SUM,
            Aggregation.INCREASE,
            Aggregation.RATE,
        }


@dataclass(frozen=True, slots=True)
class Matcher:
    """A condition on a label."""

    label: str
    negated: bool
    value: str
    is_pattern: bool = False
    compiled: Any = field(default=None, compare=False, repr=False)
    """The expression of ``value``, if it is one."""

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether labels meet it; an absent label is empty."""
        actual = labels.get(self.label, "")
        if self.is_pattern:
            met = self.compiled.fullmatch(actual) is not None
        else:
            met = actual == self.value
        return met is not self.negated


@dataclass(frozen=True, slots=True)
class Query:
    """A question about series. All times are whole seconds since 1970, multiples of 10."""

    tenant: str | None
    """Whose series; None: those of all tenants."""
    name: str
    matchers: tuple[Matcher, ...]
    start_s: int
    end_s: int
    """A multiple of ``step_s`` after the start."""
    step_s: int
    aggregation: Aggregation
    quantiles: tuple[float, ...] = ()
    bound: float = 0.0
    """For SHARE_ABOVE."""
    group_by: tuple[str, ...] = ()
    by_series: bool = False
    top_k: int = 0
    offsets_s: tuple[int, ...] = ()
    """How much earlier the times are that each point is compared with."""

    @property
    def steps(self) -> int:
        """Number of steps."""
        return (self.end_s - self.start_s) // self.step_s


def labels_of(series: SeriesId, tenant: str | None) -> dict[str, str]:
    """A series' labels as a query of ``tenant`` sees them; None: with the series' tenant."""
    labels = dict(series.labels)
    if tenant is None:
        labels[TENANT_LABEL] = series.tenant
    return labels


class Trend(NamedTuple):
    """How the points of a group compare with those of an earlier time."""

    offset_s: int
    values: Floats
    """Shape as ``Group.values``; NaN where there were no samples."""
    ratios: Floats
    """The present values divided by them; NaN where there is none or it is zero."""


class Group(NamedTuple):
    """Series that were put together, and their points in columns."""

    labels: tuple[tuple[str, str], ...]
    unit: str
    times_s: Ints
    """Starts of the steps that have samples, ascending."""
    values: Floats
    """Shape (points, 1), or (points, quantiles)."""
    counts: Ints
    trends: tuple[Trend, ...] = ()
