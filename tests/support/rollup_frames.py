"""Frames of made-up samples, and a plain reckoning to compare them with."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from agent360.mesh.metrics.bins import codes_of
from agent360.mesh.metrics.frame import Columns, Frame
from agent360.mesh.metrics.series import Kind, SeriesId

Sample = tuple[int, float, float, int]
"""Series number, time, value, weight."""


def series_named(
    *names: str, tenant: str = "acme", kind: Kind = Kind.DISTRIBUTION
) -> list[SeriesId]:
    """Series without labels."""
    return [SeriesId(tenant, name, (), kind, "s") for name in names]


def columns_of(samples: Sequence[Sample]) -> Columns:
    """Samples in columns."""
    return Columns(
        np.array([each[0] for each in samples], np.int64),
        np.array([each[1] for each in samples], np.float64),
        np.array([each[2] for each in samples], np.float64),
        np.array([each[3] for each in samples], np.int64),
    )


def frame_of(series: Sequence[SeriesId], samples: Sequence[Sample]) -> Frame:
    """Samples rolled up."""
    kinds = np.array([series[each[0]].kind for each in samples], np.uint8)
    return Frame.of_samples(series, columns_of(samples), kinds)


def reckoned(
    series: Sequence[SeriesId], samples: Iterable[Sample], length_s: int = 10
) -> dict[tuple[str, int], tuple[object, ...]]:
    """What a frame must hold: by series and bucket count, sum, least, most, last, time and bins."""
    rows: dict[tuple[str, int], tuple[object, ...]] = {}
    for number, time_s, value, weight in samples:
        key = (series[number].name, int(time_s // length_s) * length_s)
        count, total, least, most, last, last_s, bins = rows.get(
            key, (0, 0.0, math.inf, -math.inf, 0.0, -math.inf, {})
        )
        bins = dict(bins)
        if series[number].kind is Kind.DISTRIBUTION:
            code = int(codes_of(np.array([value]))[0])
            bins[code] = bins.get(code, 0) + weight
        if time_s >= last_s:
            last, last_s = value, time_s
        rows[key] = (
            count + weight,
            total + value * weight,
            min(least, value),
            max(most, value),
            last,
            last_s,
            bins,
        )
    return rows


def rows_of(frame: Frame) -> dict[tuple[str, int], tuple[object, ...]]:
    """The same of a frame, which must have one row for each series and bucket."""
    rows = {}
    for row in range(len(frame)):
        key = (frame.series[frame.row_series[row]].name, int(frame.bucket_s[row]))
        assert key not in rows
        mine = frame.bin_row == row
        codes = frame.bin_code[mine].tolist()
        assert codes == sorted(set(codes))
        rows[key] = (
            int(frame.count[row]),
            float(frame.total[row]),
            float(frame.least[row]),
            float(frame.most[row]),
            float(frame.last[row]),
            float(frame.last_time_s[row]),
            dict(zip(codes, frame.bin_count[mine].tolist(), strict=True)),
        )
    return rows
