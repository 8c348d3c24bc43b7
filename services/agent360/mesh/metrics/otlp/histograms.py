"""Histograms as weighted values: what their buckets say of a distribution.

A bucket becomes one value between its bounds, with the bucket's count as weight. All are placed at
the same share of their buckets' width, chosen so that the sum of the histogram comes out. So counts
and sums are exact, and a quantile is off by less than the width of the bucket that it is in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Bucket(NamedTuple):
    """A bucket with something in it."""

    low: float
    high: float
    weight: int


def explicit_buckets(
    bounds: Sequence[float], counts: Mapping[int, int], least: float | None, most: float | None
) -> list[Bucket]:
    """The buckets of a histogram with bounds of its own.

    Args:
        bounds: ascending; bucket i ends at bound i, the last one has no end.
        counts: by bucket, of those with something in it.
        least: the smallest value, if known.
        most: the largest value, if known.
    """
    buckets = []
    for place, count in sorted(counts.items()):
        if count <= 0:
            continue
        low = bounds[place - 1] if place else -math.inf
        high = bounds[place] if place < len(bounds) else math.inf
        if least is not None:
            low = min(max(low, least), high)
        if most is not None:
            high = max(min(high, most), low)
        if low == -math.inf and 0 < high < math.inf:
            low = 0.0
        buckets.append(Bucket(low, high, count))
    return buckets


def exponential_buckets(
    scale: int, positive: Mapping[int, int], negative: Mapping[int, int], zeros: int
) -> list[Bucket]:
    """The buckets of an exponential histogram: bucket i ends at 2 ** ((i + 1) / 2 ** scale)."""
    buckets = [
        Bucket(-_bound(scale, place + 1), -_bound(scale, place), count)
        for place, count in sorted(negative.items(), reverse=True)
        if count > 0
    ]
    if zeros > 0:
        buckets.append(Bucket(0.0, 0.0, zeros))
    buckets += [
        Bucket(_bound(scale, place), _bound(scale, place + 1), count)
        for place, count in sorted(positive.items())
        if count > 0
    ]
    return buckets


def weighted_values(buckets: Sequence[Bucket], total: float | None) -> list[tuple[float, int]]:
    """A value and its weight for each bucket.

    Args:
        buckets: ascending.
        total: the sum of all values; None: not known.
    """
    closed = _closed(buckets, total)
    share = 0.5
    if total is not None:
        lowest = math.fsum(bucket.low * bucket.weight for bucket in closed)
        width = math.fsum((bucket.high - bucket.low) * bucket.weight for bucket in closed)
        share = min(1.0, max(0.0, (total - lowest) / width)) if width > 0 else 0.0
    return [(each.low + share * (each.high - each.low), each.weight) for each in closed]


def _closed(buckets: Sequence[Bucket], total: float | None) -> list[Bucket]:
    """The buckets; those without an end are put where the sum wants them, or at their other end."""
    is_open = [math.isinf(each.low) or math.isinf(each.high) for each in buckets]
    open_count = sum(b.weight for b, opened in zip(buckets, is_open, strict=True) if opened)
    rest = math.fsum(
        (each.low + each.high) / 2 * each.weight
        for each, opened in zip(buckets, is_open, strict=True)
        if not opened
    )
    closed = []
    for each, opened in zip(buckets, is_open, strict=True):
        if not opened:
            closed.append(each)
            continue
        wanted = 0.0 if total is None else (total - rest) / open_count
        place = min(max(wanted, each.low), each.high)
        if total is None:
            place = each.high if math.isinf(each.low) else each.low
        place = place if math.isfinite(place) else 0.0
        closed.append(Bucket(place, place, each.weight))
    return closed


def _bound(scale: int, place: int) -> float:
    try:
        return math.exp2(math.ldexp(place, -scale))
    except OverflowError:
        return math.inf
