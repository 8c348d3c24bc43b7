"""The table of the series that a process knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from agent360.mesh.metrics.frame import Frame
from agent360.mesh.metrics.series import SeriesId

_FIRST_ROOM: Final = 1_024


class TooManySeriesError(Exception):
    """A tenant has as many series as it may have; the text says so."""


class SeriesTable:
    """Gives every series a small number, the same as long as the process lives.

    Label names and values that many series share are kept once.

    Example:
        >>> table = SeriesTable(max_per_tenant=10_000)
        >>> table.number(SeriesId("acme", "plans", (), Kind.COUNTER, "1"))
        0
    """

    def __init__(self, max_per_tenant: int) -> None:
        self._max_per_tenant = max_per_tenant
        self._numbers: dict[SeriesId, int] = {}
        self._by_tenant: dict[str, dict[str, list[int]]] = {}
        self._tenant_sizes: dict[str, int] = {}
        self._texts: dict[str, str] = {}
        self._kinds = np.zeros(_FIRST_ROOM, np.uint8)
        self.all: list[SeriesId] = []
        """Every series; its number is its place."""

    def __len__(self) -> int:
        return len(self.all)

    def number(self, series: SeriesId) -> int:
        """The number of a series, which is entered if it is new.

        Raises:
            TooManySeriesError: it is new and its tenant has no room.
        """
        found = self._numbers.get(series)
        if found is not None:
            return found
        if self._tenant_sizes.get(series.tenant, 0) >= self._max_per_tenant:
            raise TooManySeriesError(
                f"{series.name}: tenant {series.tenant} has {self._max_per_tenant:,} series, the "
                "most it may have (max_series_per_tenant)"
            )
        return self.enter(series)

    def enter(self, series: SeriesId) -> int:
        """The number of a series that was admitted before: no bound applies."""
        found = self._numbers.get(series)
        if found is not None:
            return found
        series = self._interned(series)
        number = len(self.all)
        self.all.append(series)
        self._numbers[series] = number
        self._tenant_sizes[series.tenant] = self._tenant_sizes.get(series.tenant, 0) + 1
        self._by_tenant.setdefault(series.tenant, {}).setdefault(series.name, []).append(number)
        if number >= len(self._kinds):
            self._kinds = np.concatenate((self._kinds, np.zeros_like(self._kinds)))
        self._kinds[number] = series.kind
        return number

    def of(self, tenant: str | None, name: str = "") -> list[SeriesId]:
        """A tenant's series, in no order; None: of all tenants; all names if ``name`` is empty."""
        tenants = self._by_tenant if tenant is None else (tenant,)
        found: list[SeriesId] = []
        for each in tenants:
            names: Mapping[str, list[int]] = self._by_tenant.get(each, {})
            wanted: Iterable[list[int]] = (names.get(name, []),) if name else names.values()
            found += [self.all[number] for numbers in wanted for number in numbers]
        return found

    def sizes(self) -> Mapping[str, int]:
        """Number of series by tenant."""
        return self._tenant_sizes

    def kinds_of(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """The kinds of series, by their numbers."""
        return self._kinds[numbers]

    def forget(self, gone: Iterable[SeriesId]) -> None:
        """Makes room for others: series without data. Their numbers are not given again."""
        for series in gone:
            number = self._numbers.pop(series, None)
            if number is None:
                continue
            self._tenant_sizes[series.tenant] -= 1
            names = self._by_tenant[series.tenant]
            names[series.name].remove(number)
            if not names[series.name]:
                del names[series.name]

    def frame_of(self, series: Iterable[SeriesId], frame: Frame) -> Frame:
        """Rows of a frame whose ``row_series`` are numbers of this table: those of some series."""
        numbers = [self._numbers[each] for each in series if each in self._numbers]
        return frame.chosen(np.isin(frame.row_series, np.array(numbers, np.int64)))

    def _interned(self, series: SeriesId) -> SeriesId:
        once = self._texts.setdefault
        return SeriesId(
            once(series.tenant, series.tenant),
            once(series.name, series.name),
            tuple((once(label, label), once(value, value)) for label, value in series.labels),
            series.kind,
            once(series.unit, series.unit),
        )
