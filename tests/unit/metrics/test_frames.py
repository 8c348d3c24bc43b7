"""Frames against a plain reckoning."""

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.rollup_frames import Sample, frame_of, reckoned, rows_of, series_named

from agent360.mesh.metrics.frame import Columns, Frame
from agent360.mesh.metrics.series import Kind, SeriesId
from agent360.mesh.metrics.stores import blobs

SERIES = [
    *series_named("a", "b"),
    SeriesId("acme", "c", (("x", "1"),), Kind.COUNTER, ""),
    SeriesId("acme", "g", (), Kind.GAUGE, ""),
]
samples = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.integers(0, 4_000).map(lambda tenths: 1.8e9 + tenths / 4),
        # Multiples of 1/8: sums come out the same in any order.
        st.integers(-800, 800).map(lambda eighths: eighths / 8),
        st.integers(1, 5),
    ),
    max_size=60,
)


def same(found: Mapping[object, object], wanted: Mapping[object, object]) -> None:
    assert found == wanted


@given(samples)
def test_samples_are_rolled_up_as_one_would_by_hand(given_samples: list[Sample]) -> None:
    same(rows_of(frame_of(SERIES, given_samples)), reckoned(SERIES, given_samples))


@given(samples, st.integers(0, 60), st.integers(0, 60))
def test_merging_parts_gives_what_all_at_once_gives(
    given_samples: list[Sample], first: int, second: int
) -> None:
    cuts = sorted((first, second))
    parts = [given_samples[: cuts[0]], given_samples[cuts[0] : cuts[1]], given_samples[cuts[1] :]]
    merged = Frame.merged([frame_of(SERIES, part) for part in parts])
    same(rows_of(merged), reckoned(SERIES, given_samples))


@given(samples, samples)
def test_frames_with_lists_of_series_of_their_own_are_merged_by_what_the_numbers_mean(
    some: list[Sample], others: list[Sample]
) -> None:
    turned = list(reversed(SERIES))
    moved = [(3 - number, *rest) for number, *rest in others]
    merged = Frame.merged([frame_of(SERIES, some), frame_of(turned, moved)])  # type: ignore[arg-type]
    same(rows_of(merged), reckoned(SERIES, [*some, *others]))


@given(samples)
def test_coarser_buckets_hold_what_the_finer_ones_held(given_samples: list[Sample]) -> None:
    frame = frame_of(SERIES, given_samples)
    same(rows_of(frame.coarser(60)), reckoned(SERIES, given_samples, 60))
    same(rows_of(frame.coarser(60).coarser(3_600)), reckoned(SERIES, given_samples, 3_600))


@given(samples)
def test_the_stored_form_loses_nothing(given_samples: list[Sample]) -> None:
    frame = frame_of(SERIES, given_samples)
    blocks = list(blobs.blocks_of(frame, 3_600))
    assert len({(block.series, block.start_s) for block in blocks}) == len(blocks)
    read = blobs.frame_of(SERIES, [(each.series, each.rows, each.bins) for each in blocks])
    same(rows_of(read), rows_of(frame))


def test_a_count_beyond_four_bytes_is_stored_too() -> None:
    frame = frame_of(SERIES, [(0, 1.8e9, 2.0, 10_000_000_000), (0, 1.8e9, 4.0, 3)])
    blocks = [(each.series, each.rows, each.bins) for each in blobs.blocks_of(frame, 3_600)]
    same(rows_of(Frame.merged([blobs.frame_of(SERIES, blocks)])), rows_of(frame))


@pytest.mark.parametrize("shape", ["uniform", "lognormal", "two humps and a heavy tail"])
def test_quantiles_of_a_million_are_within_one_percent_also_merged_from_a_thousand_buckets(
    shape: str,
) -> None:
    chance = np.random.default_rng(11)
    humps = np.concatenate(
        (
            chance.normal(0.02, 0.002, 600_000),
            chance.normal(1.5, 0.1, 390_000),
            (chance.pareto(1.1, 10_000) + 1) * 5,
        )
    )
    chance.shuffle(humps)
    values = {
        "uniform": chance.uniform(1, 100, 1_000_000),
        "lognormal": chance.lognormal(0, 2, 1_000_000),
        "two humps and a heavy tail": humps,
    }[shape]
    series = series_named("seconds")
    size = len(values)
    times = 1.8e9 + np.arange(size) // (size // 1_000) * 10.0
    columns = Columns(np.zeros(size, np.int64), times, values, np.ones(size, np.int64))
    buckets = Frame.of_samples(series, columns, np.full(size, Kind.DISTRIBUTION, np.uint8))
    assert len(buckets) == 1_000
    zeros = np.zeros(len(buckets), np.int64)
    whole = buckets.regrouped(zeros, zeros, series)
    wanted = [0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0]
    exact = np.quantile(values, wanted, method="lower")
    assert whole.quantiles(wanted)[0] == pytest.approx(exact, rel=0.0100001)
    first = values[: size // 1_000]
    assert buckets.quantiles([0.5])[0] == pytest.approx(
        np.quantile(first, 0.5, method="lower"), rel=0.0100001
    )


def test_zeros_and_negative_values_are_in_order() -> None:
    frame = frame_of(SERIES, [(0, 1.8e9, value, 1) for value in (5.0, 0.0, -5.0)])
    assert frame.quantiles([0, 0.5, 1])[0] == pytest.approx([-5.0, 0.0, 5.0], rel=0.01)


def test_values_at_the_ends_of_the_numbers_stay_in_order_and_finite() -> None:
    ends = [-1.7e308, -1e-13, 0.0, 5e-324, 1e-11, 1.7e308]
    frame = frame_of(SERIES, [(0, 1.8e9, value, 1) for value in ends])
    found = frame.quantiles([0, 0.5, 0.8, 1])[0]
    assert found == pytest.approx([-1.7e308, 0.0, 1e-11, 1.7e308], rel=0.01)
