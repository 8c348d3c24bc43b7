"""Histograms as weighted values: counts and sums exact, every value in its bucket."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent360.mesh.metrics.otlp.histograms import (
    explicit_buckets,
    exponential_buckets,
    weighted_values,
)

observations = st.lists(st.floats(0.001, 1_000), min_size=1, max_size=50)
BOUNDS = [0.005, 0.1, 1.0, 10.0, 100.0]


@given(observations, st.booleans(), st.booleans())
def test_a_histogram_keeps_its_count_and_sum_and_its_values_stay_in_their_buckets(
    values: list[float], with_least: bool, with_most: bool
) -> None:
    counts: dict[int, int] = {}
    for value in values:
        place = sum(bound < value for bound in BOUNDS)
        counts[place] = counts.get(place, 0) + 1
    least = min(values) if with_least else None
    most = max(values) if with_most else None
    total = math.fsum(values)
    found = weighted_values(explicit_buckets(BOUNDS, counts, least, most), total)
    assert [weight for _, weight in found] == [counts[place] for place in sorted(counts)]
    assert math.fsum(value * weight for value, weight in found) == pytest.approx(total)
    for (value, _), place in zip(found, sorted(counts), strict=True):
        low = BOUNDS[place - 1] if place else 0.0
        high = BOUNDS[place] if place < len(BOUNDS) else math.inf
        assert low * (1 - 1e-9) <= value <= high * (1 + 1e-9)


@given(st.lists(st.floats(-1_000, 1_000).filter(lambda v: abs(v) > 0.01), max_size=40))
def test_an_exponential_histogram_keeps_its_count_and_sum_of_both_signs(
    values: list[float],
) -> None:
    scale = 3
    signs: dict[bool, dict[int, int]] = {True: {}, False: {}}
    for value in values:
        place = math.ceil(math.log2(abs(value)) * 2**scale) - 1
        counts = signs[value > 0]
        counts[place] = counts.get(place, 0) + 1
    buckets = exponential_buckets(scale, signs[True], signs[False], 2)
    assert [each.low for each in buckets] == sorted(each.low for each in buckets)
    found = weighted_values(buckets, math.fsum(values))
    assert sum(weight for _, weight in found) == len(values) + 2
    total = math.fsum(value * weight for value, weight in found)
    assert total == pytest.approx(math.fsum(values), abs=1e-6)


def test_what_is_not_told_is_taken_from_the_bounds() -> None:
    assert weighted_values(explicit_buckets([], {0: 4}, None, None), 10.0) == [(2.5, 4)]
    assert weighted_values(explicit_buckets([1.0], {1: 3}, None, None), None) == [(1.0, 3)]
    assert weighted_values(explicit_buckets([-1.0], {0: 3}, None, None), None) == [(-1.0, 3)]
    assert weighted_values(explicit_buckets([], {0: 3}, None, None), None) == [(0.0, 3)]
    assert weighted_values([], 0.0) == []
