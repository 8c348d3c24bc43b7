"""What a journal record says: samples, the series they are of, and marks of their sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np

from agent360.mesh.metrics.frame import Columns
from agent360.mesh.metrics.ports import Mark
from agent360.mesh.metrics.series import Kind, SeriesId
from agent360.mesh.metrics.series_table import SeriesTable

_TYPES: Final = ("<u4", "<f8", "<f8", "<u4")


class Entry(NamedTuple):
    """Samples that become durable together, with the marks that they move."""

    columns: Columns
    """Their series are numbers of the process's series table."""
    marks: Mapping[str, Mark]


class _Meta(msgspec.Struct, array_like=True):
    samples: int
    series: list[tuple[int, str, str, tuple[tuple[str, str], ...], int, str]]
    """Introduces numbers: tenant, name, labels, kind, unit."""
    marks: list[tuple[str, bytes, float]]


class EntryWriter:
    """Writes entries; a segment of the journal introduces every series that its records mention."""

    def __init__(self, table: SeriesTable) -> None:
        self._table = table
        self._introduced = np.zeros(0, np.bool_)

    def begin_segment(self) -> None:
        """Forgets which series were introduced."""
        self._introduced[:] = False

    def encode(self, entry: Entry) -> bytes:
        """The record of an entry."""
        columns = entry.columns
        size = len(self._table)
        if size > len(self._introduced):
            self._introduced = np.concatenate(
                (self._introduced, np.zeros(2 * size - len(self._introduced), np.bool_))
            )
        known = self._introduced[columns.series]
        fresh = [] if known.all() else np.unique(columns.series[~known]).tolist()
        self._introduced[fresh] = True
        meta = _Meta(
            len(columns.series),
            [(number, *self._table.all[number]) for number in fresh],
            [(name, mark.value, mark.time_s) for name, mark in entry.marks.items()],
        )
        head = msgspec.msgpack.encode(meta)
        body = (c.astype(kind).tobytes() for c, kind in zip(columns, _TYPES, strict=True))
        return b"".join((len(head).to_bytes(4, "little"), head, *body))


class EntryReader:
    """Reads the records of the journal in their order."""

    def __init__(self, table: SeriesTable) -> None:
        self._table = table
        self._numbers = np.zeros(0, np.int64)

    def decode(self, payload: bytes) -> Entry:
        """The entry of a record; its series are entered in the table."""
        begin = 4 + int.from_bytes(payload[:4], "little")
        meta = msgspec.msgpack.decode(payload[4:begin], type=_Meta)
        for written, *series in meta.series:
            self._introduce(written, series)
        columns = []
        for kind in _TYPES:
            columns.append(np.frombuffer(payload, kind, meta.samples, begin))
            begin += columns[-1].nbytes
        numbers, times_s, values, weights = columns
        return Entry(
            Columns(self._numbers[numbers], times_s, values, weights.astype(np.int64)),
            {name: Mark(value, time_s) for name, value, time_s in meta.marks},
        )

    def _introduce(self, written: int, series: Sequence[object]) -> None:
        tenant, name, labels, kind, unit = series
        if written >= len(self._numbers):
            room = np.zeros(2 * written + 1 - len(self._numbers), np.int64)
            self._numbers = np.concatenate((self._numbers, room))
        self._numbers[written] = self._table.enter(
            SeriesId(tenant, name, labels, Kind(kind), unit)  # type: ignore[arg-type]
        )
