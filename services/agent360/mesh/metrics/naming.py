"""Checks what a series is called before it is entered in the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from agent360.mesh.metrics.rejections import Reason, Refused
from agent360.mesh.metrics.series import LABEL, NAME, Kind, SeriesId
from agent360.mesh.metrics.series_table import SeriesTable, TooManySeriesError

MAX_LABELS: Final = 16
"""Labels of a series."""

_MAX_VALUE_BYTES: Final = 256
_MAX_UNIT_BYTES: Final = 64


def admit(
    table: SeriesTable, tenant: str, name: str, labels: Mapping[str, str], kind: int, unit: str
) -> int | Refused:
    """The number of a series, entered if it is new; or why its samples are refused."""
    if NAME.fullmatch(name) is None:
        text = f"{name[:128]!r} is not a metric's name: {NAME.pattern}"
        return Refused(Reason.SERIES, text, tenant)
    if len(labels) > MAX_LABELS:
        return Refused(Reason.SERIES, f"{name}: has more than {MAX_LABELS} labels", tenant)
    for label, value in labels.items():
        if LABEL.fullmatch(label) is None or len(value.encode()) > _MAX_VALUE_BYTES:
            text = (
                f"{name}: label {label[:64]!r} is malformed, or its value over {_MAX_VALUE_BYTES} "
                "bytes"
            )
            return Refused(Reason.SERIES, text, tenant)
    if kind not in set(Kind):
        return Refused(Reason.SERIES, f"{name}: kind is missing", tenant)
    if len(unit.encode()) > _MAX_UNIT_BYTES:
        return Refused(Reason.SERIES, f"{name}: unit is over {_MAX_UNIT_BYTES} bytes", tenant)
    series = SeriesId(tenant, name, tuple(sorted(labels.items())), Kind(kind), unit)
    try:
        return table.number(series)
    except TooManySeriesError as error:
        return Refused(Reason.CARDINALITY, str(error), tenant)
